"""The cache of preprocess.py as batches of patches, augmentation on the device, and the synthetic raw set."""

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

from common.checkpoint import short_hash
from segmentation.preprocess import DataError, read_meta, resample

COLUMNS = ("id", "group", "fold")
# The folds that training and evaluation know; a person may edit them in index.csv.
FOLD_NAMES = ("0", "1", "2", "3", "4", "test")
FOREGROUND = 0.5  # the part of the patches that is centred on a foreground voxel


def read_index(cache: Path) -> list[dict[str, str]]:
    """The rows of index.csv (id, group, fold, image, mask)."""
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
    if "/" in row["id"] or "\\" in row["id"] or row["id"].startswith("."):
        return f"id {row['id']!r}, expected a name without separators: files are called by it"
    return ""


def open_cache(cache: Path) -> tuple[dict, list[dict[str, str]]]:
    """meta.json and the rows of index.csv. Raises DataError unless they are those of a cache."""
    meta = read_meta(cache)
    try:
        rows = read_index(cache)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{cache / 'index.csv'}: {error}; preprocess again") from error
    for k, row in enumerate(rows):
        if problem := check_row(row, meta):
            raise DataError(f"{cache / 'index.csv'}: row {k + 1}: {problem}")
    return meta, rows


def check_case(cache: Path, name: str, meta: dict) -> None:
    """Raise DataError unless the arrays of a case go together and hold what the network can take.

    All of it is read once, as an epoch will do.
    """
    path, again = cache / "volumes" / f"{name}.image.npy", "make the cache again"
    mask_path = path.with_name(f"{name}.mask.npy")
    image, mask = load_array(path, "float16", 4), load_array(mask_path, "uint8", 3)
    expected = (len(meta["channels"]), *mask.shape)
    if image.shape != expected:
        raise DataError(
            f"{path}: shape {image.shape}, expected {expected} by its mask and meta.json; {again}"
        )
    if broken := int((~np.isfinite(image)).sum()):
        raise DataError(f"{path}: {broken} voxels are NaN or infinite; {again}")
    if mask.max() >= len(meta["classes"]):
        raise DataError(
            f"{mask_path}: class number {mask.max()}, expected those of {meta['classes']}; {again}"
        )


def fingerprints(cache: Path, rows: list[int]) -> tuple[list[str], list[str]]:
    """Hashes of the group and of the image of every row: by them eval.py knows what was trained on.

    Of an image its middle plane is enough, because no two are the same and a cache may fill a disk.
    """
    index, patients, images = read_index(cache), [], []
    for k in rows:
        image, _ = open_case(cache, index[k]["id"])
        patients.append(short_hash(index[k]["group"].encode()))
        images.append(short_hash(np.ascontiguousarray(image[:, image.shape[1] // 2])))
    return patients, images


def open_case(cache: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Image float16 (C, X, Y, Z) and mask uint8 (X, Y, Z) of a case, mapped: only what is used is read."""
    image, mask = (
        np.load(cache / "volumes" / f"{name}.{kind}.npy", mmap_mode="r")
        for kind in ("image", "mask")
    )
    return image, mask


def read_points(cache: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Foreground voxels of a case, integers (N, 4): class, x, y, z. Raises DataError naming the file."""
    path = cache / "volumes" / f"{name}.points.npy"
    try:
        points = np.load(path)
    except Exception as error:  # as in load_array
        raise DataError(f"{path}: {type(error).__name__}: {error}; preprocess again") from error
    good = isinstance(points, np.ndarray) and points.dtype.kind == "i" and points.shape[1:] == (4,)
    if not good or (points[:, 1:] < 0).any() or (points[:, 1:] >= shape).any():
        raise DataError(
            f"{path}: expected integers (N, 4), class and voxel inside {shape}; preprocess again"
        )
    return points


def patch_axes(values: list, dims: int, slice_axis: int) -> list:
    """Of values for x, y and z those that a patch has: with two dimensions all but the slice axis."""
    return [value for axis, value in enumerate(values) if dims == 3 or axis != slice_axis]


def window_size(patch: list[int], slice_axis: int) -> list[int]:
    """The patch as a box of voxels: a slice is one voxel thick along the slice axis."""
    return list(patch) if len(patch) == 3 else [*patch[:slice_axis], 1, *patch[slice_axis:]]


def box_slices(
    corner: list[int], size: list[int], shape: tuple[int, ...]
) -> tuple[list[slice], list[slice]]:
    """The part of the box that lies in a volume of `shape`: its slices of the volume, and of the box."""
    inside = [
        slice(max(0, a), max(0, min(n, a + s))) for a, s, n in zip(corner, size, shape, strict=True)
    ]
    return inside, [
        slice(part.start - a, part.stop - a) for part, a in zip(inside, corner, strict=True)
    ]


def cut(volume: np.ndarray, corner: list[int], size: list[int]) -> np.ndarray:
    """The box of `size` at `corner` of (..., X, Y, Z), zeros where it reaches out of the volume."""
    inside, place = box_slices(corner, size, volume.shape[-3:])
    out = np.zeros((*volume.shape[:-3], *size), volume.dtype)
    out[(..., *place)] = volume[(..., *inside)]
    return out


class PatchDataset(Dataset):
    """Patches of a cache's volumes, fetched a batch of (row number, corner x, y, z) at a time.

    `dataset[places]` gives images float16 (B, C, *patch) and masks uint8 (B, *patch); `patch`
    has two or three axes. It holds paths and sizes only, so it can go to workers.
    """

    def __init__(self, cache: Path, patch: list[int]) -> None:
        meta = read_meta(cache)
        self.cache, self.size, self.names = cache, window_size(patch, meta["slice_axis"]), None
        self.flat = meta["slice_axis"] - 3 if len(patch) == 2 else None
        self.spacing = patch_axes(meta["spacing"], len(patch), meta["slice_axis"])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "names": None}

    def __getitem__(self, places: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        if self.names is None:
            self.names = [row["id"] for row in read_index(self.cache)]
        images, masks = [], []
        for row, *corner in places:
            image, mask = open_case(self.cache, self.names[row])
            images.append(cut(image, corner, self.size))
            masks.append(cut(mask, corner, self.size))
        images, masks = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))
        return (
            (images, masks)
            if self.flat is None
            else (images.squeeze(self.flat), masks.squeeze(self.flat))
        )


def in_batches(rows: list[int], batch_size: int) -> list[list[int]]:
    """Rows in their order, nothing dropped: the batches of an evaluation."""
    return [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]


def ignore_interrupt(worker: int) -> None:
    """`worker_init_fn`: Ctrl-C is for the main process, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    cache: Path, patch: list[int], batches: Sampler, workers: int, device: torch.device
) -> DataLoader:
    """A loader of whole batches. Workers stay from epoch to epoch: the dataset knows no epoch."""
    dataset = PatchDataset(cache, patch)
    return DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_interrupt)  # fmt: skip


class EpochBatches(Sampler):
    """Batches of (row, x, y, z) for training, drawn from (seed, epoch); each rank takes its share.

    An epoch takes from every case as many patches as its volume holds. A part of them lies about a voxel of
    foreground, of any class with the same chance, the others anywhere; none reaches out of a larger volume.
    The patches left over by the last full step are dropped: every rank needs the same number of steps. The
    loop sets `epoch`.
    """

    def __init__(
        self,
        cache: Path,
        patch: list[int],
        rows: list[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        size = window_size(patch, read_meta(cache)["slice_axis"])
        self.size, self.batch_size, self.seed = np.array(size), batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        names, self.shapes, self.points = [row["id"] for row in read_index(cache)], {}, {}
        draws = []
        for row in rows:
            _, mask = open_case(cache, names[row])
            points = read_points(cache, names[row], mask.shape)
            self.points[row] = [points[points[:, 0] == k, 1:] for k in np.unique(points[:, 0])]
            self.shapes[row] = np.array(mask.shape)
            draws += [row] * max(1, round(mask.size / np.minimum(self.size, mask.shape).prod()))
        self.draws = np.array(draws)

    def __len__(self) -> int:
        return len(self.draws) // (self.batch_size * self.world_size)

    def corner(self, row: int, rng: np.random.Generator) -> list[int]:
        """Where a patch of the case begins: negative if the volume is smaller and lies in its middle."""
        free, points = self.shapes[row] - self.size, self.points[row]
        corner = rng.integers(0, np.maximum(free, 0) + 1)
        if rng.random() < FOREGROUND and points:
            of_class = points[rng.integers(len(points))]
            corner = np.clip(
                of_class[rng.integers(len(of_class))] - self.size // 2, 0, np.maximum(free, 0)
            )
        return np.where(free < 0, free // 2, corner).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        # To NumPy (seed, epoch) is (seed, epoch, 0, 0); the draws of the loop count their steps from 1.
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.draws)[
            : len(self) * self.batch_size * self.world_size
        ].tolist()
        for batch in in_batches(order, self.batch_size * self.world_size):
            yield [(row, *self.corner(row, rng)) for row in batch][self.rank :: self.world_size]


def random_affine(draws: np.ndarray, extent: np.ndarray) -> Tensor:
    """Matrices (B, D, D + 1) for affine_grid: rotation in mm about the middle, scaling, shift.

    `draws` (9 or 5, B) in -1..1: a scaling common to the axes, one for each axis, a shift for each, and an
    angle for each plane. `extent` is the size of the patch in mm, (D,).
    """
    dims, batch = len(extent), draws.shape[1]
    common, own, shift, angles = (
        draws[0],
        draws[1 : 1 + dims],
        draws[1 + dims : 1 + 2 * dims],
        draws[1 + 2 * dims :],
    )
    matrix = np.broadcast_to(np.eye(dims), (batch, dims, dims))
    for (a, b), angle in zip(
        itertools.combinations(range(dims), 2), angles * math.radians(20), strict=True
    ):
        turn = np.broadcast_to(np.eye(dims), (batch, dims, dims)).copy()
        turn[:, a, a] = turn[:, b, b] = np.cos(angle)
        turn[:, a, b], turn[:, b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    matrix = matrix * np.exp(0.2 * common + 0.1 * own).T[:, None]
    matrix = matrix * extent / extent[:, None]  # from mm to the -1..1 of each axis
    # grid_sample names the last axis first
    theta = np.concatenate([matrix[:, ::-1, ::-1], 0.2 * shift.T[:, ::-1, None]], 2)
    return torch.from_numpy(theta.astype(np.float32))


def augment(
    images: Tensor, masks: Tensor, rng: np.random.Generator, spacing: list[float], strength: float = 1.0,
    mirror: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Random affine for images (B, C, *S) and masks (B, *S); gamma, contrast, brightness, noise for images.

    S has two or three axes with `spacing` in mm. Parameters are drawn per image on the CPU from `rng`, so
    that neither workers nor the device change them; only the noise is drawn on the device, from a generator
    that `rng` seeds. `mirror` flips each axis in half of the images.
    """
    batch, device, dims = len(images), images.device, len(spacing)
    if mirror:
        for axis in range(1, dims + 1):
            chosen = torch.from_numpy(rng.random(batch) < 0.5).to(device, non_blocking=True)
            images = torch.where(chosen.view(-1, *[1] * (dims + 1)), images.flip(axis + 1), images)
            masks = torch.where(chosen.view(-1, *[1] * dims), masks.flip(axis), masks)
    if strength == 0:
        return images, masks
    moves = 1 + 2 * dims + dims * (dims - 1) // 2
    draws = strength * rng.uniform(-1, 1, (moves + 4, batch))
    # Half the images keep their place: interpolation blurs, and evaluation is on images that are as sharp as
    # they come.
    draws[:moves] *= rng.random(batch) < 0.5
    extent = np.array(images.shape[2:]) * np.array(spacing)
    theta = random_affine(draws[:moves], extent).to(device, non_blocking=True)
    grid = F.affine_grid(theta, [batch, 1, *images.shape[2:]], align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    masks = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[
        :, 0
    ].to(masks.dtype)

    values = torch.from_numpy(draws[moves:].astype(np.float32)).to(device, non_blocking=True)
    gamma, contrast, brightness, noise = (v.view(-1, *[1] * (dims + 1)) for v in values)
    axes = tuple(range(2, dims + 2))
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    width = (high - low).clamp(min=1e-3)
    images = low + width * ((images - low) / width).clamp(1e-4, 1) ** torch.exp(0.4 * gamma)
    images = images * torch.exp(0.3 * contrast) + 0.3 * brightness
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    noise = 0.2 * noise.clamp(min=0) * torch.randn(images.shape, generator=generator, device=device)
    return images + noise, masks


def to_input(
    images: Tensor, masks: Tensor, device: torch.device, *augmentation: object
) -> tuple[Tensor, Tensor]:
    """Images to float32 and masks to int64 on `device`, augmented if asked for."""
    images, masks = (
        images.to(device, non_blocking=True).float(),
        masks.to(device, non_blocking=True),
    )
    if augmentation:
        images, masks = augment(images, masks, *augmentation)
    return images, masks.long()


# --- the synthetic raw set ---


def draw_phantom(
    rng: np.random.Generator, shape: list[int], affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A trunk-like volume, int16 (X, Y, Z), and its mask, uint8: 1 = the wall, 2 = the core of an organ.

    It is drawn in mm in RAS, so that it is the same on any grid. A smaller, darker twin on the other side and
    small spheres as bright as the organ are background.
    """
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0) / rng.uniform(0.9, 1.1)

    def ellipsoid(center: np.ndarray, radii: np.ndarray, wave: float = 0.0) -> np.ndarray:
        a, b, c = ((v - m) / r for v, m, r in zip((x, y, z), center, radii, strict=True))
        bumps = np.sin(3 * a + 2 * b + phase[0]) + np.sin(3 * b + 2 * c + phase[1])
        return np.sqrt(a**2 + b**2 + c**2) + wave * bumps < 1

    phase = rng.uniform(0, 2 * math.pi, 2)
    picture = np.where(ellipsoid([0, 0, 0], [36, 28, 60]), 0.5, 0.0)
    center = np.array([15, 3, 0]) + rng.normal(0, 2.5, 3)
    radii = np.array([10, 9, 13]) * rng.uniform(0.85, 1.15, 3)
    organ = ellipsoid(center, radii, 0.12)
    core = ellipsoid(center + rng.normal(0, 1, 3), 0.55 * radii, 0.12) & organ
    picture[ellipsoid(np.array([-15, 3, 0]) + rng.normal(0, 2.5, 3), 0.85 * radii, 0.12)] = 0.66
    for _ in range(5):
        picture[
            ellipsoid(rng.uniform(-1, 1, 3) * [24, 18, 24], np.full(3, rng.uniform(2.5, 4.5)))
        ] = 0.8
    picture[organ], picture[core] = 0.8, 0.58
    bias, texture = (resample(rng.normal(0, 1, [n] * 3).astype(np.float32), shape) for n in (3, 12))
    picture = picture * (1 + 0.08 * bias + 0.06 * texture) + rng.normal(0, 0.04, shape)
    return np.rint(picture.clip(0) * rng.uniform(500, 2000)).astype(np.int16), organ.astype(
        np.uint8
    ) + core


def write_demo(raw: Path, cases: int = 30, size: float = 72, seed: int = 0) -> None:
    """Write a synthetic raw set in the layout of the Decathlon: NIfTI volumes of `size` mm and dataset.json.

    Spacing, axis order and direction differ from case to case, and the axes are oblique.
    """
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for k in range(cases):
        rng, name = np.random.default_rng((seed, k)), f"demo_{k:03d}"
        spacing = np.array(
            [[1.8, 1.8, 1.8], [1.6, 1.6, 2.4], [2.2, 1.6, 1.8], [1.5, 1.8, 2]][k % 4]
        )
        turn, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.1, (3, 3)))  # oblique: some 10 degrees
        turn = np.abs(np.diag(turn)) / np.diag(turn) * turn
        axes, signs = rng.permutation(3), rng.choice([-1, 1], 3)
        shape = np.rint(size / spacing)[axes].astype(int).tolist()
        affine = np.eye(4)
        affine[:3, :3] = (turn * spacing)[:, axes] * signs
        affine[:3, 3] = rng.normal(0, 2, 3) - affine[:3, :3] @ (np.array(shape) - 1) / 2
        volume, mask = draw_phantom(rng, shape, affine)
        nib.save(nib.Nifti1Image(volume, affine), raw / "imagesTr" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(mask, affine), raw / "labelsTr" / f"{name}.nii.gz")
    description = {"name": "synthetic", "modality": {"0": "MRI"}, "numTraining": cases,
                   "labels": {"0": "background", "1": "wall", "2": "core"}}  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(description))
