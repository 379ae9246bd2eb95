"""The cache of preprocess.py as batches of tensors, augmentation on the device, and the synthetic raw set."""

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

from classification.preprocess import DataError, read_meta
from common.checkpoint import short_hash

COLUMNS = ("id", "patient", "fold", "label")
# The folds that training and evaluation know; a person may edit them in index.csv.
FOLD_NAMES = ("0", "1", "2", "3", "4", "test")


def read_index(cache: Path) -> list[dict[str, str]]:
    """The rows of index.csv (id, patient, fold, label, source), in the order of images.npy."""
    with open(cache / "index.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load_array(path: Path, dtype: str, axes: int) -> np.ndarray:
    """An array of a cache, mapped: only what is used is read. Raises DataError naming the file."""
    again = "make the cache again with preprocess.py --overwrite"
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # the one place where numpy's many exceptions become ours
        raise DataError(f"{path}: {type(error).__name__}: {error}; {again}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != axes:
        found = f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}"
        raise DataError(f"{path}: {found}, expected {dtype} with {axes} axes; {again}")
    if path.stat().st_size != array.offset + array.nbytes:
        found = f"{path}: {path.stat().st_size} bytes"
        raise DataError(f"{found}, expected {array.offset + array.nbytes} by its header; {again}")
    return array


def check_row(row: dict[str, str], meta: dict) -> str:
    """What is wrong with a row of index.csv, or ""."""
    if None in row or None in row.values() or not set(COLUMNS) <= row.keys():
        return f"found {list(row)}, expected a value for each of {', '.join(COLUMNS)}"
    if not row["id"]:
        return "no id, expected a name"
    if row["fold"] not in FOLD_NAMES:
        return f"fold {row['fold']!r}, expected one of {' '.join(FOLD_NAMES)}"
    if row["label"] not in [str(k) for k in range(len(meta["classes"]))]:
        return f"label {row['label']!r}, expected 0 to {len(meta['classes']) - 1}"
    return ""


def open_cache(cache: Path) -> tuple[dict, list[dict[str, str]]]:
    """meta.json and the rows of index.csv. Raises DataError unless they and images.npy go together."""
    meta = read_meta(cache)
    images = load_array(cache / "images.npy", "uint8", 3)
    try:
        rows = read_index(cache)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{cache / 'index.csv'}: {error}; preprocess again") from error
    expected = (len(rows), meta["size"], meta["size"])
    if images.shape != expected:
        found = f"{cache}: images.npy {images.shape}"
        raise DataError(
            f"{found}, expected {expected} by index.csv and meta.json; preprocess again"
        )
    for k, row in enumerate(rows):
        if problem := check_row(row, meta):
            raise DataError(f"{cache / 'index.csv'}: row {k + 1}: {problem}")
    return meta, rows


def fingerprints(cache: Path, rows: list[int]) -> tuple[list[str], list[str]]:
    """Hashes of the patient and of the image of every row: by them eval.py knows what was trained on."""
    index, images = read_index(cache), np.load(cache / "images.npy", mmap_mode="r")
    patients = [short_hash(index[k]["patient"].encode()) for k in rows]
    return patients, [short_hash(images[k]) for k in rows]


class XrayDataset(Dataset):
    """Raw images and labels of a cache, fetched a batch of row numbers at a time.

    `dataset[rows]` gives images uint8 (B, 1, S, S) and labels int64 (B,). It pickles as nothing
    but the path: each worker maps the file itself, because a pickled memory map is the whole array.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.images = self.labels = None

    def __getstate__(self) -> dict:
        return {"cache": self.cache, "images": None, "labels": None}

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        if self.images is None:
            self.images = np.load(self.cache / "images.npy", mmap_mode="r")
            self.labels = torch.tensor([int(row["label"]) for row in read_index(self.cache)])
        return torch.from_numpy(self.images[rows])[:, None], self.labels[rows]


def in_batches(rows: list[int], batch_size: int) -> list[list[int]]:
    """Rows in their order, nothing dropped: the batches of an evaluation."""
    return [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]


def ignore_interrupt(worker: int) -> None:
    """`worker_init_fn`: Ctrl-C is for the main process, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    cache: Path, batches: Sampler | list[list[int]], workers: int, device: torch.device
) -> DataLoader:
    """A loader of whole batches. Workers stay from epoch to epoch: the dataset knows no epoch."""
    return DataLoader(XrayDataset(cache), batch_size=None, sampler=batches, num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_interrupt)  # fmt: skip


class EpochBatches(Sampler):
    """Batches of row numbers for training, in an order given by (seed, epoch); each rank takes its share.

    The rows left over by the last full step are dropped: BatchNorm fails on a batch of one, and every rank
    needs the same number of steps. The loop sets `epoch`.
    """

    def __init__(
        self, rows: list[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def __len__(self) -> int:
        return len(self.rows) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        # To NumPy (seed, epoch) is (seed, epoch, 0, 0); the draws of the loop count their steps from 1.
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        for batch in order[: len(self) * self.batch_size * self.world_size].reshape(len(self), -1):
            yield batch[self.rank :: self.world_size].tolist()


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, 1, H, W) with a sigma (B,) in pixels for each image, cut off at 4 pixels."""
    x = torch.arange(-4, 5, device=images.device)
    kernel = torch.exp(-0.5 * (x / sigma[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    images = F.pad(
        images.transpose(0, 1), (4, 4, 4, 4), mode="replicate"
    )  # batch as channels: a kernel each
    images = F.conv2d(images, kernel[..., None], groups=len(sigma))
    return F.conv2d(images, kernel[:, None], groups=len(sigma)).transpose(0, 1)


def augment(
    images: Tensor, rng: np.random.Generator, strength: float = 1.0, flip: bool = False
) -> Tensor:
    """Random affine, gamma, contrast, brightness, blur and noise for float images (B, 1, S, S) in 0..1.

    Parameters are drawn per image on the CPU from `rng`, so that neither workers nor the device change them;
    only the noise is drawn on the device, from a generator that `rng` seeds. `flip` mirrors half the images.
    """
    if strength == 0 and not flip:
        return images
    batch, device = len(images), images.device
    draws = strength * rng.uniform(-1, 1, (11, batch))
    # Half the images keep their place: interpolation blurs, and evaluation is on images that are as sharp as
    # they come.
    draws[:6] *= rng.random(batch) < 0.5
    draws = torch.from_numpy(draws.astype(np.float32)).to(device, non_blocking=True)
    angle, log_scale, log_aspect, shear, dx, dy, gamma, contrast, brightness, sigma, noise = draws

    # where each output pixel comes from, in the coordinates of grid_sample: -1..1 from edge to edge
    cos, sin = torch.cos(angle * math.radians(15)), torch.sin(angle * math.radians(15))
    sx, sy = (
        torch.exp(0.2 * log_scale + 0.1 * log_aspect),
        torch.exp(0.2 * log_scale - 0.1 * log_aspect),
    )
    if flip:
        sign = torch.from_numpy(rng.choice([-1, 1], batch).astype(np.float32))
        sx = sx * sign.to(device, non_blocking=True)
    row_x = [cos * sx, (0.1 * shear * cos - sin) * sy, 0.2 * dx]
    row_y = [sin * sx, (cos + 0.1 * shear * sin) * sy, 0.2 * dy]
    affine = torch.stack(row_x + row_y, 1).view(batch, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    if strength == 0:
        return images

    gamma, contrast, brightness, noise = (
        v.view(-1, 1, 1, 1) for v in (gamma, contrast, brightness, noise)
    )
    images = images.clamp(1e-4, 1) ** torch.exp(0.5 * gamma)
    mean = images.mean((2, 3), keepdim=True)
    images = (images - mean) * torch.exp(0.4 * contrast) + mean + 0.2 * brightness
    images = blur(
        images, (sigma * 0.012 * images.shape[-1]).clamp(min=0.05)
    )  # half of them stay sharp
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    return images + 0.05 * noise.clamp(min=0) * torch.randn(
        images.shape, generator=generator, device=device
    )


def to_input(
    images: Tensor, device: torch.device, mean: float, std: float, *augmentation: object
) -> Tensor:
    """uint8 (B, 1, S, S) to float32 on `device`: 0..1, augmented if asked for, normalised, channels last."""
    images = images.to(device, non_blocking=True).float() / 255
    if augmentation:
        images = augment(images, *augmentation)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


# --- the synthetic raw set ---


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Noise of mean 0 and deviation about 1 on a coarse grid of `cells`, blown up to float (size, size)."""
    noise = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))


def draw_phantom(
    rng: np.random.Generator, boxes: int, size: int = 256
) -> tuple[np.ndarray, list[tuple]]:
    """A chest-like picture, float (size, size) in 0..1; boxes (x, y, width, height) of its opacities."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    x = (x - rng.normal(0, 0.03)) / rng.uniform(0.92, 1.08)
    y = (y - rng.normal(0, 0.03)) / rng.uniform(0.92, 1.08)
    edge = rng.uniform(0.02, 0.05)

    def inside(cx: float, cy: float, rx: float, ry: float, power: float = 2.0) -> np.ndarray:
        distance = (np.abs((x - cx) / rx) ** power + np.abs((y - cy) / ry) ** power) ** (1 / power)
        return 1 / (1 + np.exp(((distance - 1) * min(rx, ry) / edge).clip(-30, 30)))

    def ridge(distance: np.ndarray, width: float) -> np.ndarray:
        return np.exp(-((distance / width) ** 2))

    body, cage = inside(0, 0.15, 0.86, 1.25, 4), inside(0, 0.05, 0.78, 0.95, 3) * (np.abs(x) > 0.08)
    lungs = np.maximum(inside(-0.4, -0.05, 0.3, 0.66, 2.6), inside(0.4, -0.05, 0.28, 0.66, 2.6))
    for side, top in (
        (-1, 0.38),
        (1, 0.44),
    ):  # the diaphragm: two domes, the patient's right one higher
        lungs *= 1 - inside(0.42 * side, top + 0.6, 0.5, 0.6)
    heart = inside(0.15, 0.22, rng.uniform(0.3, 0.42), rng.uniform(0.28, 0.36))
    lungs *= 1 - 0.9 * heart
    picture = body * (0.62 - 0.42 * lungs + 0.12 * heart)
    picture += 0.16 * body * ridge(x, 0.1) * (1 + 0.25 * np.sin(y * 34))  # spine
    for k in range(9):  # ribs fall from the spine to the sides
        center = -0.75 + 0.16 * k + 0.55 * np.abs(x) ** 1.6 + rng.normal(0, 0.008)
        picture += 0.09 * cage * ridge(y - center, 0.025)
    picture += (
        0.14 * body * (np.abs(x) < 0.7) * ridge(y + 0.72 - 0.22 * np.abs(x), 0.03)
    )  # clavicles

    found = []
    for _ in range(boxes):
        cx, cy = rng.choice([-1, 1]) * rng.uniform(0.28, 0.52), rng.uniform(-0.35, 0.35)
        rx, ry = rng.uniform(0.1, 0.25, 2)
        cloud = 1 + 0.5 * smooth_noise(rng, 9, size)
        blob = np.exp(-((((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) ** 1.5))
        picture += rng.uniform(0.1, 0.5) * blob * cloud * (0.3 + 0.7 * lungs)
        points = np.argwhere(blob > 0.3)
        (top, left), (height, width) = points.min(0), np.ptp(points, axis=0) + 1
        found.append((int(left), int(top), int(width), int(height)))
    picture += 0.03 * body * smooth_noise(rng, 24, size) + rng.normal(0, 0.015, picture.shape)
    return (0.03 + 0.9 * picture.clip(0, 1.1) ** rng.uniform(0.8, 1.25)).clip(0, 1), found


def write_dicom(path: Path, picture: np.ndarray, jpeg: bool) -> None:
    """Write 0..1 as JPEG Baseline (8 bit, MONOCHROME2) or uncompressed (12 bit, MONOCHROME1, windowed)."""
    ds = pydicom.Dataset()
    ds.SOPClassUID = uid.ComputedRadiographyImageStorage
    ds.SOPInstanceUID = uid.generate_uid(entropy_srcs=[path.stem])
    ds.PatientID, ds.Modality, ds.ViewPosition = path.stem, "CR", "PA"
    if jpeg:
        pixels, buffer = np.rint(picture * 255).astype(np.uint8), io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        ds.set_pixel_data(pixels, "MONOCHROME2", 8, generate_instance_uid=False)
        ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
        ds.PixelData = encapsulate([buffer.getvalue()])
    else:
        ds.WindowCenter, ds.WindowWidth = 2048, 4096
        pixels = np.rint((1 - picture) * 4095).astype(np.uint16)
        ds.set_pixel_data(pixels, "MONOCHROME1", 12, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def write_demo(raw: Path, patients: int = 600, seed: int = 0) -> None:
    """Write a synthetic raw set in the layout of the RSNA challenge: DICOM files and one CSV row per box.

    The opacities are blobs of chance, some too faint to see: scores on them say nothing about pneumonia.
    """
    folder = raw / "stage_2_train_images"
    folder.mkdir(parents=True, exist_ok=True)
    with open(raw / "stage_2_train_labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("patientId", "x", "y", "width", "height", "Target"))
        for k in range(patients):
            rng, name = np.random.default_rng((seed, k)), f"demo{k:04d}"
            picture, boxes = draw_phantom(rng, rng.choice(4, p=[0.5, 0.2, 0.2, 0.1]))
            write_dicom(folder / f"{name}.dcm", picture, jpeg=k % 2 == 0)
            writer.writerows([(name, *box, 1) for box in boxes] or [(name, "", "", "", "", 0)])
