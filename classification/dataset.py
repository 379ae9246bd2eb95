"""The cache of preprocess.py as batches of tensors, augmentation, and a synthetic raw set.

In the shapes below N is the number of images in a cache, B that in a batch, S their side in pixels,
C their channels: 1, or 3 of a cache with colour.
"""

import csv
import io
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.checkpoint import DataError, read_meta

META = ("classes", "positive_class", "multi_label", "size", "fit", "channels", "n")
COLUMNS = ("id", "patient", "fold", "split", "digest")
# The folds that training and evaluation know; a person may edit them in index.csv.
FOLD_NAMES = ("0", "1", "2", "3", "4", "test")
LABEL_VALUES = {"0": 0, "1": 1, "": -1}  # in a column of one of several labels; blank: unknown
PHANTOM = 256  # pixels per side of a synthetic picture


# --- the cache ---


def open_cache(cache: Path) -> tuple[dict, list[dict[str, str]]]:
    """meta.json and the rows of index.csv. Raises DataError unless images.npy goes with them."""
    meta = read_meta(cache, "classification", META)
    shape = (meta["n"], meta["size"], meta["size"])
    if meta["channels"] == 3:
        shape = (*shape, 3)
    load_array(cache / "images.npy", "uint8", shape)  # (N, S, S), color: (N, S, S, 3)
    labels = meta["classes"] if meta["multi_label"] else ["label"]
    return meta, read_index(cache / "index.csv", meta["n"], (*COLUMNS, *labels))


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


def read_labels(rows: list[dict[str, str]], meta: dict) -> Tensor:
    """Labels int64 (N,), numbers of classes; or (N, C), several an image: 1, 0, -1 for unknown."""
    classes = meta["classes"]
    if not meta["multi_label"]:
        return torch.tensor([classes.index(row["label"]) for row in rows], dtype=torch.long)
    values = [[LABEL_VALUES[row[name]] for name in classes] for row in rows]
    return torch.tensor(values, dtype=torch.long).reshape(len(rows), len(classes))


def count_classes(cache: Path, fold: int, meta: dict, index: list[dict[str, str]]) -> Tensor:
    """Training images of each class (C,), or, of several labels, without and with each (C, 2).

    Raises DataError if the fold leaves a class out of the training or the validation images; of
    several labels an image, if it leaves one value only of all of them: of some it is noted.
    """
    labels = read_labels(index, meta)
    sides = {"training": [], "validation": []}
    for k, row in enumerate(index):
        if row["fold"] != "test":
            sides["validation" if row["fold"] == str(fold) else "training"].append(k)
    counts = {}
    for side, rows in sides.items():
        if meta["multi_label"]:
            of_each = [(labels[rows] == value).sum(0) for value in (0, 1)]
            counts[side] = torch.stack(of_each, 1)
        else:
            counts[side] = torch.bincount(labels[rows], minlength=len(meta["classes"]))
        missing = [name for k, name in enumerate(meta["classes"]) if (counts[side][k] == 0).any()]
        if not missing or (side == "validation" and fold < 0):
            continue
        problem = f"fold {fold} leaves no {side} images of {', '.join(missing)}"
        if meta["multi_label"] and len(missing) < len(meta["classes"]):
            print(f"note: {problem}, or none without")
            continue
        patients = len({row["patient"] for row in index})
        advice = f"{patients} patients in all (--patient-regex of preprocess.py makes them)"
        raise DataError(f"{cache}: {problem}: {advice}; merge or leave out classes, or --fold -1")
    return counts["training"]


def describe_counts(counts: Tensor, meta: dict) -> str:
    """The training images of each class, or with each label of those where it is known."""
    classes = meta["classes"]
    if not meta["multi_label"]:
        return f"{counts.tolist()} images of {classes}\npositive class: {meta['positive_class']}"
    pairs = zip(classes, counts.tolist(), strict=True)
    cells = [f"{name} {positive} of {negative + positive}" for name, (negative, positive) in pairs]
    return f"images with each label: {', '.join(cells)}"


# --- batches ---


class XrayDataset(Dataset):
    """Raw images and labels of a cache, a batch at a time: augmentation is on the device.

    `dataset[row_numbers]` gives images uint8 (B, C, S, S) and their `labels`, those of
    `read_labels` for all rows. Each worker maps the file itself, because a pickled memory map is
    the whole array.
    """

    def __init__(self, cache: Path, labels: Tensor) -> None:
        self.cache = cache
        self.labels = labels
        self.images = None  # opened by the first batch, in the process that loads it

    def __getstate__(self) -> dict:
        return {"cache": self.cache, "labels": self.labels, "images": None}

    def __getitem__(self, row_numbers: list[int]) -> tuple[Tensor, Tensor]:
        if self.images is None:
            self.images = np.load(self.cache / "images.npy", mmap_mode="r")  # (N, S, S [, 3])
        images = torch.from_numpy(self.images[row_numbers])  # a copy in memory
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images, self.labels[row_numbers]  # (B, C, S, S), (B,) or (B, labels)


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


# --- augmentation, on the device ---


def to_input(
    images: Tensor,
    device: torch.device,
    mean_std: tuple[float, float] | None,
    rng: np.random.Generator | None = None,
    strength: float = 1.0,
    flip: bool = False,
) -> Tensor:
    """uint8 (B, C, S, S) to float32 on `device`, normalised, channels last: what the network takes.

    Brightness and contrast depend on the machine, so images are normalised one by one; weights that
    know other images (--pretrained) need the `mean_std` of those, in 0..1. With `rng` the images
    are augmented, in 0..1, before they are normalised.
    """
    images = images.to(device, non_blocking=True) / 255  # float32
    if rng is not None:
        images = augment(images, rng, strength, flip)
    if mean_std is None:
        images = F.layer_norm(images, images.shape[1:], eps=1e-6)  # one gray value becomes 0
    else:
        mean, std = mean_std
        images = (images - mean) / std
    return images.contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor, rng: np.random.Generator, strength: float = 1.0, flip: bool = False
) -> Tensor:
    """Random affine, gray values, blur and noise for float (B, C, S, S) in 0..1.

    Parameters are drawn per image on the CPU from `rng`, so that neither workers nor the device
    change them; only the noise is drawn on the device, from a generator that `rng` seeds. `flip`
    mirrors half the images.

    No image keeps its place and proportions: where these differ between the classes, as in public
    sets of X-rays, a network learns them first, and fails elsewhere (Zech et al., PLOS Medicine
    2018). The result may leave 0..1.
    """
    if strength == 0 and not flip:
        return images
    batch = len(images)
    draws = strength * rng.uniform(-1, 1, (11, batch))
    affine = make_affine(draws[:6], degrees=15, aspect=0.2)  # (B, 2, 3)
    if flip:
        affine[:, :, 0] *= rng.choice([-1, 1], (batch, 1))  # what x is multiplied by
    images = move_images(images, affine)
    return images if strength == 0 else change_gray(images, draws[6:], rng)


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


# --- the synthetic raw set ---


def write_demo(raw: Path, patients: int = 600, seed: int = 0) -> None:
    """Write a synthetic set like the RSNA challenge: DICOM files, a row per opacity (a blob)."""
    folder = raw / "stage_2_train_images"
    folder.mkdir(parents=True, exist_ok=True)
    table = raw / "stage_2_train_labels.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("patientId", "x", "y", "width", "height", "Target"))
        for k in range(patients):
            rng = np.random.default_rng((seed, k))  # so that a longer set begins with a shorter one
            name = f"demo{k:04d}"
            opacities = rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])
            picture, boxes = draw_phantom(rng, opacities)
            write_dicom(folder / f"{name}.dcm", picture, jpeg=k % 2 == 0)
            for box in boxes:
                writer.writerow((name, *box, 1))
            if not boxes:
                writer.writerow((name, "", "", "", "", 0))


def draw_phantom(rng: np.random.Generator, opacities: int) -> tuple[np.ndarray, list[tuple]]:
    """A chest-like picture, float (256, 256) in 0..1; boxes x, y, width, height of opacities."""
    # Coordinates from -1 to 1, y down, shifted and stretched as patients are.
    y, x = np.mgrid[-1 : 1 : PHANTOM * 1j, -1 : 1 : PHANTOM * 1j]
    x = (x - rng.normal(0, 0.03)) / rng.uniform(0.92, 1.08)
    y = (y - rng.normal(0, 0.03)) / rng.uniform(0.92, 1.08)

    def inside(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        """1 inside an ellipse, 0 outside, soft between."""
        distance = np.hypot((x - cx) / rx, (y - cy) / ry)  # 1 on the outline
        return 1 / (1 + np.exp((12 * (distance - 1)).clip(-30, 30)))

    body = inside(0, 0.15, 0.9, 1.3)
    lungs = inside(-0.4, -0.05, 0.3, 0.66) + inside(0.4, -0.05, 0.28, 0.66)
    heart = inside(0.15, 0.3, rng.uniform(0.3, 0.42), rng.uniform(0.28, 0.36))
    lungs *= 1 - 0.9 * heart
    picture = body * (0.62 - 0.42 * lungs + 0.12 * heart)  # air is dark
    # Ribs fall from the spine to the sides.
    picture += 0.05 * body * np.sin(32 * (y - 0.55 * np.abs(x) ** 1.6 + rng.uniform(0, 0.1)))
    boxes = []
    for _ in range(opacities):
        cx = rng.choice([-1, 1]) * rng.uniform(0.28, 0.52)  # in one of the lungs
        cy = rng.uniform(-0.35, 0.35)
        blob = inside(cx, cy, *rng.uniform(0.1, 0.25, 2))
        picture += rng.uniform(0.05, 0.4) * blob * (0.3 + 0.7 * lungs)
        ys, xs = np.nonzero(blob > 0.5)
        boxes.append((xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1))
    picture += rng.normal(0, 0.02, picture.shape)
    gamma = rng.uniform(0.8, 1.25)
    return (0.03 + 0.9 * picture.clip(0, 1.1) ** gamma).clip(0, 1), boxes


def write_dicom(path: Path, picture: np.ndarray, jpeg: bool) -> None:
    """Write float (H, W) in 0..1 as one of the two kinds of file that a reader has to tell apart.

    JPEG Baseline (8 bit, MONOCHROME2), or uncompressed (12 bit, MONOCHROME1, windowed).
    """
    ds = pydicom.Dataset()
    ds.SOPClassUID = uid.ComputedRadiographyImageStorage
    ds.SOPInstanceUID = uid.generate_uid(entropy_srcs=[path.stem])
    ds.PatientID = path.stem
    ds.Modality = "CR"
    ds.ViewPosition = "PA"
    if jpeg:
        pixels = np.rint(picture * 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        ds.set_pixel_data(pixels, "MONOCHROME2", 8, generate_instance_uid=False)
        ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
        ds.PixelData = encapsulate([buffer.getvalue()])
    else:
        ds.WindowCenter = 2048
        ds.WindowWidth = 4096
        pixels = np.rint((1 - picture) * 4095).astype(np.uint16)
        ds.set_pixel_data(pixels, "MONOCHROME1", 12, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
