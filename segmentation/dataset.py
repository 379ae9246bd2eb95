"""The cache of preprocess.py as batches of patches, augmentation, and a synthetic raw set.

In the shapes below B is the batch, C the channels, *S the two or three axes of a patch, (X, Y, Z)
the axes of a volume in RAS: right, anterior, superior. Spacings and extents are in mm.
"""

import csv
import itertools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.checkpoint import DataError, read_meta
from segmentation.model import cut, window_size

META = (
    "classes",
    "values",
    "channels",
    "resample",
    "spacing",
    "slice_axis",
    "shape",
    "normalisation",
    "picture_unit",
    "n",
)
COLUMNS = ("id", "patient", "fold", "split", "digest")
# Values of the column fold in index.csv, which a user may edit
FOLD_NAMES = ("0", "1", "2", "3", "4", "test")
FOREGROUND = 0.5  # share of the patches that are centred on a foreground voxel


# --- the cache ---


def open_cache(cache: Path) -> tuple[dict, list[dict[str, str]]]:
    """meta.json and the rows of index.csv. Raises DataError unless the arrays go with them."""
    meta = read_meta(cache, "segmentation", META)
    rows = read_index(cache / "index.csv", meta["n"], COLUMNS)
    for row in rows:
        check_case(cache, row["id"], meta)
    return meta, rows


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


def check_case(cache: Path, name: str, meta: dict) -> None:
    """Raise DataError unless the arrays of a case go together."""
    mask = load_array(cache / "volumes" / f"{name}.mask.npy", "uint8", (None, None, None))
    shape = (len(meta["channels"]), *mask.shape)  # (C, X, Y, Z)
    load_array(cache / "volumes" / f"{name}.image.npy", "float16", shape)
    load_array(cache / "volumes" / f"{name}.points.npy", "int16", (None, 4))


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


def open_case(cache: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Image float16 (C, X, Y, Z) and mask uint8 (X, Y, Z), mapped: only what is used is read."""
    image = np.load(cache / "volumes" / f"{name}.image.npy", mmap_mode="r")
    mask = np.load(cache / "volumes" / f"{name}.mask.npy", mmap_mode="r")
    return image, mask


# --- patches ---


class PatchDataset(Dataset):
    """Batches of raw patches of a cache's volumes; augmentation happens on the device.

    `names` are the ids of all rows. `dataset[places]`, with places (row number, corner x, y, z) in
    voxels, returns images float16 (B, C, *S) and masks uint8 (B, *S) of the size of `patch`, which
    has two or three axes. The arrays are reopened for each batch, so the dataset holds no open
    files and can be sent to workers.
    """

    def __init__(self, cache: Path, names: list[str], patch: list[int], slice_axis: int) -> None:
        self.cache = cache
        self.names = names
        self.size = window_size(patch, slice_axis)
        self.is_slice = len(patch) == 2
        self.thin = slice_axis - 3  # the axis that a slice lacks, counted from the end

    def __getitem__(self, places: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        images = []
        masks = []
        for row, *corner in places:
            image, mask = open_case(self.cache, self.names[row])
            images.append(cut(image, corner, self.size))  # (C, *size)
            masks.append(cut(mask, corner, self.size))  # (*size)
        images = torch.from_numpy(np.stack(images))  # (B, C, *size)
        masks = torch.from_numpy(np.stack(masks))  # (B, *size)
        if self.is_slice:
            images = images.squeeze(self.thin)  # (B, C, *S)
            masks = masks.squeeze(self.thin)  # (B, *S)
        return images, masks


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


class EpochBatches(Sampler):
    """Batches of (row, x, y, z) for training, drawn from (seed, epoch); each rank takes its share.

    An epoch takes from every case as many patches as its volume holds. FOREGROUND of them are
    centred on a foreground voxel, all classes equally likely, the others lie anywhere; none extends
    beyond a larger volume. Patches after the last full step are dropped: every rank needs the same
    number of steps. The loop sets `epoch`.
    """

    def __init__(
        self,
        images: PatchDataset,
        rows: list[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size = np.array(images.size)  # voxels, (3,)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

        self.shapes = {}  # voxels along the axes (3,), by row
        self.points = {}  # foreground voxels (N, 3), by row and class
        patch_rows = []  # the row of each patch of an epoch
        for row in rows:
            name = images.names[row]
            _, mask = open_case(images.cache, name)
            points = np.load(images.cache / "volumes" / f"{name}.points.npy")  # class, x, y, z
            classes = np.unique(points[:, 0])
            self.points[row] = [points[points[:, 0] == k, 1:] for k in classes]
            self.shapes[row] = np.array(mask.shape)
            patch_voxels = np.minimum(self.size, mask.shape).prod()
            patch_rows += [row] * max(1, round(mask.size / patch_voxels))
        self.patch_rows = np.array(patch_rows)
        if len(self) == 0:
            count = f"{len(self.patch_rows)} training patches"
            size = f"--batch-size {batch_size} in each of {world_size} processes"
            raise DataError(f"{count}, less than one batch of {size}")

    def __len__(self) -> int:
        return len(self.patch_rows) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        # NumPy seeds (seed, epoch) like (seed, epoch, 0, 0), which the loop never uses.
        rng = np.random.default_rng((self.seed, self.epoch))
        step_size = self.batch_size * self.world_size
        order = rng.permutation(self.patch_rows)[: len(self) * step_size].tolist()
        for rows in in_batches(order, step_size):
            # Every rank draws all places and takes its share, as one process would see them.
            places = [(row, *self.draw_corner(row, rng)) for row in rows]
            yield places[self.rank :: self.world_size]

    def draw_corner(self, row: int, rng: np.random.Generator) -> list[int]:
        """Corner of a patch; negative if the volume is smaller, which then lies in the middle."""
        free = self.shapes[row] - self.size
        last = np.maximum(free, 0)  # the last corner from which the patch stays inside
        points = self.points[row]
        corner = rng.integers(0, last + 1)
        if rng.random() < FOREGROUND and points:
            class_points = points[rng.integers(len(points))]
            center = class_points[rng.integers(len(class_points))]
            corner = np.clip(center - self.size // 2, 0, last)
        return np.where(free < 0, free // 2, corner).tolist()


def in_batches(rows: list[int], batch_size: int) -> list[list[int]]:
    """Rows in their order, nothing dropped: the batches of an evaluation."""
    return [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]


# --- augmentation ---


def to_input(
    images: Tensor,
    masks: Tensor,
    device: torch.device,
    rng: np.random.Generator,
    spacing: list[float],
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Images float32 (B, C, *S) and masks int64 (B, *S) on `device`, augmented."""
    images = images.to(device, non_blocking=True).float()
    masks = masks.to(device, non_blocking=True)
    return augment(images, masks, rng, spacing, strength)


def augment(
    images: Tensor,
    masks: Tensor,
    rng: np.random.Generator,
    spacing: list[float],
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Random affine for images (B, C, *S) and masks (B, *S); gamma, contrast, ... for images only.

    S has two or three axes with `spacing` in mm. Parameters are drawn per image on the CPU from
    `rng`, so they do not depend on workers or device; only the noise is drawn on the device, from a
    generator that `rng` seeds. `strength` 0 is no augmentation, 1 the default of train.py. Masks
    come back as int64, which the losses take.
    """
    if strength == 0:
        return images, masks.long()

    batch = len(images)
    dims = len(spacing)
    planes = dims * (dims - 1) // 2
    moves = 1 + dims + dims + planes  # draws for an image: scalings, shifts and angles
    draws = strength * rng.uniform(-1, 1, (moves + 4, batch))
    # Half the images are not moved: interpolation blurs, and evaluation is on unblurred images.
    draws[:moves] *= rng.random(batch) < 0.5

    size = images.shape[2:]
    theta = random_affine(draws[:moves], np.array(size) * np.array(spacing))
    theta = theta.to(images.device, non_blocking=True)
    grid = make_grid(theta, size)  # (B, *S, dims)
    images = F.grid_sample(images, grid, align_corners=False)
    moved = masks[:, None].float()  # (B, 1, *S)
    moved = F.grid_sample(moved, grid, mode="nearest", align_corners=False)
    return change_values(images, draws[moves:], rng), moved[:, 0].long()  # masks (B, *S)


def random_affine(draws: np.ndarray, extent: np.ndarray) -> Tensor:
    """Matrices float32 (B, D, D + 1) for `make_grid`: rotation about the middle, scaling, shift.

    `extent` (D,) is the size of the patch in mm: a rotation in voxels would shear the image.
    `draws` (10 or 6, B), from -1 to 1, hold a scaling of all axes, one of each axis, a shift of
    each axis, and an angle for each plane of two axes.
    """
    dims = len(extent)
    batch = draws.shape[1]
    all_axes = draws[0]  # (B,)
    each_axis = draws[1 : 1 + dims]  # (D, B)
    shift = draws[1 + dims : 1 + 2 * dims]  # (D, B)
    angles = draws[1 + 2 * dims :] * math.radians(20)  # (planes, B)

    identity = np.broadcast_to(np.eye(dims), (batch, dims, dims))
    matrix = identity
    planes = itertools.combinations(range(dims), 2)
    for (a, b), angle in zip(planes, angles, strict=True):
        turn = identity.copy()
        turn[:, a, a] = np.cos(angle)
        turn[:, b, b] = np.cos(angle)
        turn[:, a, b] = -np.sin(angle)
        turn[:, b, a] = np.sin(angle)
        matrix = matrix @ turn  # (B, D, D)
    scale = np.exp(0.2 * all_axes + 0.1 * each_axis)  # (D, B)
    matrix = matrix * scale.T[:, None]
    matrix = matrix * extent / extent[:, None]  # from mm to the -1..1 of each axis

    # grid_sample names the last axis first: z, y, x
    matrix = matrix[:, ::-1, ::-1]
    shift = 0.2 * shift.T[:, ::-1, None]  # (B, D, 1)
    theta = np.concatenate([matrix, shift], 2)  # (B, D, D + 1)
    return torch.from_numpy(theta.astype(np.float32))


def make_grid(theta: Tensor, size: tuple[int, ...]) -> Tensor:
    """Grid (B, *S, D) for grid_sample: F.affine_grid in fewer operations.

    A GPU waits for the launch of each.
    """
    dims = len(size)
    *columns, grid = theta.view(-1, *[1] * dims, dims, dims + 1).unbind(-1)  # (B, 1, ..., D) each
    for axis, length in enumerate(size):
        middle = torch.linspace(1 / length - 1, 1 - 1 / length, length, device=theta.device)
        middle = middle.view(-1, *[1] * (dims - axis))  # of the voxels along this axis
        grid = torch.addcmul(grid, columns[-1 - axis], middle)
    return grid


def change_values(images: Tensor, draws: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Gamma, contrast, brightness and noise for images (B, C, *S), by draws (4, B) from -1 to 1."""
    gamma, contrast, brightness, noise = draws  # (B,) each
    powers = (np.exp(0.4 * gamma), np.exp(0.3 * contrast))
    values = np.stack([*powers, 0.3 * brightness, 0.2 * noise.clip(0)])
    values = torch.from_numpy(values.astype(np.float32)).to(images.device, non_blocking=True)
    ones = [1] * (images.ndim - 1)
    exponent, factor, offset, grain = values.view(4, -1, *ones)  # (B, 1, ...) each
    axes = tuple(range(2, images.ndim))
    low = images.amin(axes, keepdim=True)  # (B, C, 1, ...)
    high = images.amax(axes, keepdim=True)
    width = (high - low).clamp(min=1e-3)
    share = (images - low) / width  # 0..1
    images = torch.addcmul(low, width, share**exponent)
    images = torch.addcmul(offset, images, factor)
    seed = int(rng.integers(2**62))
    generator = torch.Generator(images.device).manual_seed(seed)
    normal = torch.randn(images.shape, generator=generator, device=images.device)
    return torch.addcmul(images, grain, normal)


# --- the synthetic raw set ---


def write_demo(raw: Path, cases: int = 30, size: float = 72, seed: int = 0) -> None:
    """Write a synthetic raw set in the layout of the Decathlon: NIfTI volumes and dataset.json.

    Volumes are `size` mm wide, with oblique axes. Spacing, axis order and direction differ from
    case to case.
    """
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    spacings = [[1.8, 1.8, 1.8], [1.6, 1.6, 2.4], [2.2, 1.6, 1.8], [1.5, 1.8, 2]]  # mm
    for k in range(cases):
        rng = np.random.default_rng((seed, k))
        spacing = np.array(spacings[k % len(spacings)])
        affine, shape = draw_grid(rng, spacing, size)
        volume, mask = draw_phantom(rng, shape, affine)
        name = f"demo_{k:03d}.nii.gz"
        nib.save(nib.Nifti1Image(volume, affine), raw / "imagesTr" / name)
        nib.save(nib.Nifti1Image(mask, affine), raw / "labelsTr" / name)
    description = {
        "name": "synthetic",
        "modality": {"0": "MRI"},
        "numTraining": cases,
        "labels": {"0": "background", "1": "wall", "2": "core"},
    }
    (raw / "dataset.json").write_text(json.dumps(description))


def draw_grid(
    rng: np.random.Generator, spacing: np.ndarray, size: float
) -> tuple[np.ndarray, list[int]]:
    """Affine (4, 4) to RAS in mm, about the origin, and voxels per axis, of `size` mm."""
    oblique = np.eye(3) + rng.normal(0, 0.1, (3, 3))  # by about 10 degrees
    turn, _ = np.linalg.qr(oblique)
    diagonal = np.diag(turn)
    turn = np.abs(diagonal) / diagonal * turn  # QR leaves the signs open
    axes = rng.permutation(3)
    signs = rng.choice([-1, 1], 3)
    shape = np.rint(size / spacing)[axes].astype(int).tolist()
    affine = np.eye(4)
    affine[:3, :3] = (turn * spacing)[:, axes] * signs
    middle = (np.array(shape) - 1) / 2  # voxels
    affine[:3, 3] = rng.normal(0, 2, 3) - affine[:3, :3] @ middle
    return affine, shape


def draw_phantom(
    rng: np.random.Generator, shape: list[int], affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A trunk-like volume, int16 (X, Y, Z), and its mask, uint8: 1 = wall, 2 = core of an organ.

    It is drawn in mm in RAS, so it is the same on any grid. A smaller, darker twin on the other
    side and small spheres as bright as the organ are background.
    """
    axes = [np.arange(length) for length in shape]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), -1)  # (X, Y, Z, 3)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]  # (X, Y, Z, 3) in mm
    world = np.moveaxis(world, -1, 0) / rng.uniform(0.9, 1.1)  # (3, X, Y, Z), people differ in size
    phase = rng.uniform(0, 2 * math.pi, 2)

    def ellipsoid(center: np.ndarray, radii: np.ndarray, wave: float = 0.0) -> np.ndarray:
        a = (world[0] - center[0]) / radii[0]
        b = (world[1] - center[1]) / radii[1]
        c = (world[2] - center[2]) / radii[2]
        bumps = np.sin(3 * a + 2 * b + phase[0]) + np.sin(3 * b + 2 * c + phase[1])
        return np.sqrt(a**2 + b**2 + c**2) + wave * bumps < 1

    trunk = ellipsoid([0, 0, 0], [36, 28, 60])
    picture = np.where(trunk, 0.5, 0.0)
    center = np.array([15, 3, 0]) + rng.normal(0, 2.5, 3)
    radii = np.array([10, 9, 13]) * rng.uniform(0.85, 1.15, 3)
    organ = ellipsoid(center, radii, 0.12)
    core = ellipsoid(center + rng.normal(0, 1, 3), 0.55 * radii, 0.12) & organ
    center = np.array([-15, 3, 0]) + rng.normal(0, 2.5, 3)
    twin = ellipsoid(center, 0.85 * radii, 0.12)
    picture[twin] = 0.66
    for _ in range(5):
        center = rng.uniform(-1, 1, 3) * [24, 18, 24]
        sphere = ellipsoid(center, np.full(3, rng.uniform(2.5, 4.5)))
        picture[sphere] = 0.8
    picture[organ] = 0.8
    picture[core] = 0.58

    bias = smooth_noise(rng, 3, shape)  # the sensitivity of a receiver coil
    texture = smooth_noise(rng, 12, shape)
    noise = rng.normal(0, 0.04, shape)
    picture = picture * (1 + 0.08 * bias + 0.06 * texture) + noise
    picture = picture.clip(0) * rng.uniform(500, 2000)  # MR has no unit
    mask = organ.astype(np.uint8) + core
    return np.rint(picture).astype(np.int16), mask


def smooth_noise(rng: np.random.Generator, cells: int, shape: list[int]) -> np.ndarray:
    """Noise of mean 0 and deviation about 1 on a grid of `cells` an axis, scaled to `shape`."""
    noise = torch.from_numpy(rng.normal(0, 1, [cells] * 3).astype(np.float32))
    return F.interpolate(noise[None, None], shape, mode="trilinear")[0, 0].numpy()
