"""The cache of preprocess.py as batches of tensors, augmentation, and a synthetic raw set.

In the shapes below N is the number of images in a cache, B that in a batch, S their side in pixels.
Boxes are xmin, ymin, xmax, ymax in fractions of the image, whatever its size.
"""

import csv
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from pydicom import uid
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.checkpoint import DataError, read_meta

META = ("size", "mean", "std", "n")
BOX = ("xmin", "ymin", "xmax", "ymax")
PLACE = ("id", "patient", "fold", "split", "digest", "site")
COLUMNS = (*PLACE, *BOX, "height", "width", "spacing")
# The folds that training and evaluation know; a person may edit them in index.csv.
FOLD_NAMES = ("0", "1", "2", "3", "4", "test")
PHANTOM = 256  # pixels per side of a synthetic picture


# --- the cache ---


def open_cache(cache: Path) -> tuple[dict, list[dict[str, str]]]:
    """meta.json and the rows of index.csv. Raises DataError unless images.npy goes with them."""
    meta = read_meta(cache, "detection", META)
    load_array(cache / "images.npy", "uint8", (meta["n"], meta["size"], meta["size"]))
    return meta, read_index(cache / "index.csv", meta["n"], COLUMNS)


def load_array(path: Path, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of a cache, mapped: only what is used is read. Raises DataError naming the file.

    `shape` has None where an axis may have any length.
    """
    try:
        array = np.load(path, mmap_mode="r")
        content = f"{array.dtype} {array.shape}"
    except Exception as error:  # the one place where numpy's many exceptions become ours
        raise DataError(f"{path}: {type(error).__name__}: {error}; preprocess again") from error
    fits = len(shape) == array.ndim
    fits = fits and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        raise DataError(f"{path}: {content}, expected {dtype} {shape}; preprocess again")
    return array


def read_index(path: Path, count: int, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of an index.csv with these columns. Raises DataError unless there are `count`."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: {error}; preprocess again") from error
    if len(rows) != count:
        raise DataError(f"{path}: {len(rows)} rows, expected {count} by meta.json")
    for number, row in enumerate(rows, 1):
        # csv.DictReader: the key None holds surplus values, the value None is a missing one.
        if None in row or None in row.values() or not set(columns) <= row.keys():
            expected = f"expected a value for each of {', '.join(columns)}"
            raise DataError(f"{path}: row {number}: found {list(row)}, {expected}")
        if row["fold"] not in FOLD_NAMES:
            problem = f"fold {row['fold']!r}, expected one of {' '.join(FOLD_NAMES)}"
            raise DataError(f"{path}: row {number}: {problem}")
    return rows


def read_boxes(rows: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """Boxes float32 (N, 4) in fractions of the image; their scale (N, 4): pixels of the image."""
    columns = (*BOX, "width", "height")
    values = torch.tensor([[float(row[name]) for name in columns] for row in rows])  # (N, 6)
    scale = values[:, 4:].repeat(1, 2)
    return values[:, :4] / scale, scale


# --- batches ---


class XrayDataset(Dataset):
    """Raw images and boxes of a cache, a batch at a time: augmentation is on the device.

    `dataset[row_numbers]` gives images uint8 (B, 1, S, S) and their `boxes`, float32 (N, 4) in
    fractions of the image. Each worker maps the file itself, because a pickled memory map is the
    whole array.
    """

    def __init__(self, cache: Path, boxes: Tensor) -> None:
        self.cache = cache
        self.boxes = boxes
        self.images = None  # opened by the first batch, in the process that loads it

    def __getstate__(self) -> dict:
        return {"cache": self.cache, "boxes": self.boxes, "images": None}

    def __getitem__(self, row_numbers: list[int]) -> tuple[Tensor, Tensor]:
        if self.images is None:
            self.images = np.load(self.cache / "images.npy", mmap_mode="r")  # (N, S, S)
        images = torch.from_numpy(self.images[row_numbers])  # (B, S, S), a copy in memory
        return images[:, None], self.boxes[row_numbers]


def make_loader(
    dataset: Dataset, batches: Sampler | list[list[int]], workers: int, device: torch.device
) -> DataLoader:
    """A loader of whole batches of row numbers: the dataset is asked for one at once.

    Workers stay from epoch to epoch: the dataset knows no epoch, only the sampler does.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupt,
    )


def ignore_interrupt(worker: int) -> None:
    """`worker_init_fn`: Ctrl-C is for the main process, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_batches(rows: list[int], batch_size: int) -> list[list[int]]:
    """Rows in their order, nothing dropped: the batches of an evaluation."""
    return [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]


class EpochBatches(Sampler):
    """Batches of row numbers for training, in an order given by (seed, epoch).

    Each rank takes its share. The rows left over by the last full step are dropped: BatchNorm fails
    on a batch of one, and every rank needs the same number of steps. The loop sets `epoch`.
    """

    def __init__(
        self, rows: list[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        if len(self) == 0:
            size = f"--batch-size {batch_size} in each of {world_size} processes"
            raise DataError(f"{len(rows)} training images, less than one batch of {size}")

    def __len__(self) -> int:
        return len(self.rows) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        # To NumPy (seed, epoch) is (seed, epoch, 0, 0); the draws of the loop count steps from 1.
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.rows)
        step_size = self.batch_size * self.world_size
        steps = order[: len(self) * step_size].reshape(len(self), step_size)
        for rows in steps:
            # Every rank-th row, so that all ranks together see the batch of one process.
            yield rows[self.rank :: self.world_size].tolist()


# --- augmentation, on the device: images and boxes together ---


def to_input(
    images: Tensor,
    boxes: Tensor,
    device: torch.device,
    mean_std: tuple[float, float],
    rng: np.random.Generator | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """uint8 (B, 1, S, S) to float32 on `device`, normalised, channels last: what the network takes.

    The boxes (B, 4) go to the device as well. With `rng` both are augmented, the images in 0..1,
    before they are normalised.
    """
    images = images.to(device, non_blocking=True) / 255  # float32
    if rng is not None:
        images, boxes = augment(images, boxes, rng, strength)
    mean, std = mean_std
    images = (images - mean) / std
    images = images.contiguous(memory_format=torch.channels_last)
    return images, boxes.to(device, non_blocking=True)


def augment(
    images: Tensor, boxes: Tensor, rng: np.random.Generator, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Random affine, gray, cutout and (one image in 20) mirroring for float (B, 1, S, S) in 0..1.

    Boxes (B, 4) in fractions, on the CPU, move with the images. Few are mirrored, because the heart
    has a side, but some, because not in everyone. Parameters are drawn per image on the CPU from
    `rng`, so that neither workers nor the device change them; only the noise is drawn on the
    device, from a generator that `rng` seeds. The images may leave 0..1.
    """
    if strength == 0:
        return images, boxes
    batch = len(images)
    draws = strength * rng.uniform(-1, 1, (11, batch))
    affine = make_affine(draws[:6], degrees=10, aspect=0.1)  # (B, 2, 3)
    affine[rng.random(batch) < 0.05 * strength, :, 0] *= -1  # what x is multiplied by
    images = move_images(images, affine)
    images = change_gray(images, draws[6:], rng)
    images = cut_out(images, rng.uniform(0, 1, (4, 2, batch)), strength)
    return images, torch.from_numpy(move_boxes(boxes.numpy(), affine))


def make_affine(draws: np.ndarray, degrees: float, aspect: float) -> np.ndarray:
    """Affine maps (B, 2, 3) from draws (6, B) in -1..1, for `move_images`.

    They say where each output pixel comes from, in the coordinates of grid_sample: x and y from -1
    to 1, edge to edge. The ends of the range turn by `degrees`, change the size by 22 % and the
    proportions by a factor of exp(2 `aspect`), shear by 0.1 and shift by a tenth of the image.
    """
    angle, log_scale, log_aspect, shear, dx, dy = draws  # (B,) each
    cos = np.cos(angle * math.radians(degrees))
    sin = np.sin(angle * math.radians(degrees))
    scale_x = np.exp(0.2 * log_scale + aspect * log_aspect)
    scale_y = np.exp(0.2 * log_scale - aspect * log_aspect)
    # Rotation times shear times scale, the shift beside it.
    x_from_x = cos * scale_x
    x_from_y = (0.1 * shear * cos - sin) * scale_y
    y_from_x = sin * scale_x
    y_from_y = (cos + 0.1 * shear * sin) * scale_y
    row_x = [x_from_x, x_from_y, 0.2 * dx]  # a tenth of the image: its width is 2
    row_y = [y_from_x, y_from_y, 0.2 * dy]
    return np.stack(row_x + row_y, 1).reshape(-1, 2, 3)


def move_images(images: Tensor, affine: np.ndarray) -> Tensor:
    """Resample images (B, C, S, S) by affine maps (B, 2, 3); the edge is repeated outside."""
    theta = torch.from_numpy(affine.astype(np.float32)).to(images.device, non_blocking=True)
    from_x, from_y, shift = theta[:, None].unbind(3)  # (B, 1, 2) each
    size = images.shape[-1]
    # The grid of F.affine_grid in fewer operations: a GPU waits for the launch of each.
    middle = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=images.device)  # of pixels
    row = torch.addcmul(shift, from_x, middle[:, None])  # (B, S, 2)
    grid = torch.addcmul(row[:, None], from_y[:, None], middle[:, None, None])  # (B, S, S, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def change_gray(images: Tensor, draws: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Gamma, contrast, brightness, blur and noise by draws (5, B); float (B, C, S, S) in 0..1.

    All channels of an image change alike, but for the noise. What can be computed on the CPU is:
    a GPU would wait for many small kernels.
    """
    gamma, contrast, brightness, sigma, noise = draws  # (B,) each
    batch = len(images)
    # Up to 1.2 % of the side; half of the images stay sharp, and half of them without noise.
    pixels = (0.012 * images.shape[-1] * sigma).clip(0.05)
    kernels = np.exp(-0.5 * (np.arange(-4, 5) / pixels[:, None]) ** 2)  # (B, 9)
    kernels /= kernels.sum(1, keepdims=True)
    powers = (np.exp(0.5 * gamma), np.exp(0.4 * contrast))
    values = np.concatenate([*powers, 0.2 * brightness, 0.05 * noise.clip(0), kernels.ravel()])
    values = torch.from_numpy(values.astype(np.float32)).to(images.device, non_blocking=True)
    exponent, factor, offset, grain = values[: 4 * batch].view(4, batch, 1, 1, 1)
    images = images**exponent
    mean = images.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    images = torch.lerp(mean, images, factor) + offset
    images = blur(images, values[4 * batch :].view(batch, 9))
    # Seeded anew each step, so that no state of a generator has to be kept for --resume.
    seed = int(rng.integers(2**62))
    generator = torch.Generator(images.device).manual_seed(seed)
    normal = torch.randn(images.shape, generator=generator, device=images.device)
    return torch.addcmul(images, grain, normal)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each of (B, C, H, W) with its kernel of (B, 9), down and across."""
    # The batch as channels, so that every image has its kernel: (C, B, H + 8, W + 8)
    images = F.pad(images.transpose(0, 1), (4, 4, 4, 4), mode="replicate")
    images = F.conv2d(images, kernels[:, None, :, None], groups=len(kernels))  # (C, B, H, W + 8)
    images = F.conv2d(images, kernels[:, None, None], groups=len(kernels))  # (C, B, H, W)
    return images.transpose(0, 1)


def cut_out(images: Tensor, draws: np.ndarray, strength: float) -> Tensor:
    """Gray rectangles anywhere in each image (B, 1, S, S), by draws (4, count, B) in 0..1.

    At strength 1 their sides are 0.1 to 0.4 of the image. The network has to look at all of the
    heart, and takes longer to memorise images (DeVries & Taylor, 2017).
    """
    x, y, width, height = draws[..., None]  # (count, B, 1) each
    middle = (np.arange(images.shape[-1]) + 0.5) / images.shape[-1]  # (S,)
    is_across = np.abs(middle - x) < strength * (0.05 + 0.15 * width)  # (count, B, S)
    is_down = np.abs(middle - y) < strength * (0.05 + 0.15 * height)
    sides = torch.from_numpy(np.stack([is_down, is_across]))
    is_down, is_across = sides.to(images.device, non_blocking=True)
    inside = (is_down[..., None] & is_across[..., None, :]).any(0)  # (B, S, S)
    mean = images.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return torch.where(inside[:, None], mean, images)


def move_boxes(boxes: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Boxes float32 (B, 4) in fractions, of images resampled by `affine` (B, 2, 3).

    What moves is the mean outline of a heart inside the box, and the new box is drawn around it: a
    box around the moved corners would grow with every rotation. Cut off at the edge of the image.
    """
    # From fractions to the coordinates of grid_sample: -1 to 1, edge to edge, so twice as long.
    center = boxes[:, 2:] + boxes[:, :2] - 1  # (B, 2): x, y
    radius = boxes[:, 2:] - boxes[:, :2]  # (B, 2), half a side
    # The map leads from the new image to the old one: old = matrix @ new + shift.
    forward = np.linalg.inv(affine[:, :, :2])  # (B, 2, 2)
    center = (forward @ (center - affine[:, :, 2])[:, :, None])[:, :, 0]  # (B, 2)
    # What will lie farthest along x lies farthest in this direction now, and so for y; in units of
    # half a side, where the box is a square.
    direction = forward * radius[:, None]  # (B, 2, 2): x, y of the direction last
    low = center - reach(-direction)  # (B, 2)
    high = center + reach(direction)
    corners = np.concatenate([low, high], 1)  # (B, 4)
    return ((corners + 1) / 2).clip(0, 1).astype(np.float32)


def reach(direction: np.ndarray) -> np.ndarray:
    """How far the mean outline of a heart reaches in directions (..., 2), times their length.

    The outline fills a box from -1 to 1, y down, and this is its support function: 1 along the
    axes and 1.22 towards the apex, below at the image's right, 0.74 above it; an ellipse has 1 all
    around, a full box 1.41 at its corners. A series in the angle, of adults' hearts.
    """
    length = np.linalg.norm(direction, axis=-1)  # (...)
    cos, sin = np.moveaxis(direction / length[..., None], -1, 0)
    return length * (1 + 2 * cos * sin * (0.11 + 0.184 * cos - 0.03 * sin))


# --- the synthetic raw set ---


def write_demo(raw: Path, patients: int = 300, seed: int = 0) -> None:
    """Write a synthetic raw set: DICOM files of a chest-like picture, its heart in boxes.csv."""
    folder = raw / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with open(raw / "boxes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", *BOX))
        for k in range(patients):
            rng = np.random.default_rng((seed, k))  # so that a longer set begins with a shorter one
            name = f"demo{k:04d}.dcm"
            picture, box = draw_phantom(rng)
            write_dicom(folder / name, picture)
            writer.writerow((name, *box))


def draw_phantom(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """A chest-like picture, float (256, 256) in 0..1, and the box of its heart in pixels.

    The box is xmin, ymin, xmax, ymax, max exclusive.
    """
    # Coordinates from -1 to 1, y down, shifted and stretched as patients are.
    y, x = np.mgrid[-1 : 1 : PHANTOM * 1j, -1 : 1 : PHANTOM * 1j]
    x = (x - rng.normal(0, 0.06)) / rng.uniform(0.85, 1.1)
    y = (y - rng.normal(0, 0.06)) / rng.uniform(0.85, 1.1)

    def inside(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        """1 inside an ellipse, 0 outside, soft between."""
        distance = np.hypot((x - cx) / rx, (y - cy) / ry)  # 1 on the outline
        return 1 / (1 + np.exp((12 * (distance - 1)).clip(-30, 30)))

    body = inside(0, 0.15, 0.9, 1.3)
    lungs = inside(-0.4, -0.05, 0.3, 0.66) + inside(0.4, -0.05, 0.28, 0.66)
    cx = rng.uniform(0.08, 0.2)
    cy = rng.uniform(0.12, 0.24)
    heart = inside(cx, cy, rng.uniform(0.25, 0.42), rng.uniform(0.2, 0.32))
    lungs *= 1 - 0.9 * heart
    picture = body * (0.62 - 0.42 * lungs + 0.14 * heart)  # air is dark
    # Ribs fall from the spine to the sides.
    picture += 0.05 * body * np.sin(32 * (y - 0.55 * np.abs(x) ** 1.6 + rng.uniform(0, 0.1)))
    picture += rng.normal(0, 0.02, picture.shape)
    gamma = rng.uniform(0.6, 1.6)
    picture = (0.03 + 0.9 * picture.clip(0, 1.1) ** gamma).clip(0, 1)

    ys, xs = np.nonzero(heart > 0.5)
    return picture, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def write_dicom(path: Path, picture: np.ndarray) -> None:
    """Write float (H, W) in 0..1 as uncompressed DICOM: 12 bit, MONOCHROME1, windowed, 1.6 mm."""
    ds = pydicom.Dataset()
    ds.SOPClassUID = uid.ComputedRadiographyImageStorage
    ds.SOPInstanceUID = uid.generate_uid(entropy_srcs=[path.stem])
    ds.PatientID = path.stem
    ds.Modality = "CR"
    ds.ViewPosition = "PA"
    ds.WindowCenter = 2048
    ds.WindowWidth = 4096
    ds.PixelSpacing = [1.6, 1.6]
    pixels = np.rint((1 - picture) * 4095).astype(np.uint16)
    ds.set_pixel_data(pixels, "MONOCHROME1", 12, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
