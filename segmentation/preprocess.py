"""Turn labelled MR or CT volumes into arrays on a common grid and an index that train.py and eval.py read.

  python segmentation/preprocess.py --data Task04_Hippocampus --out data/hippocampus
  python segmentation/preprocess.py --data left_atrium --out data/atrium --spacing 1.5 1.5 1.5
  python segmentation/preprocess.py --data other_hospital --out data/other --like data/atrium

RAW is a folder as in the Medical Segmentation Decathlon (MSD): imagesTr/NAME.nii.gz, 3D, or 4D with the
channels last; labelsTr/NAME.nii.gz; and dataset.json, which names labels and modalities. If there are
imagesTs and labelsTs, they become test cases. Without dataset.json classes are called by their values.

Written to OUT: index.csv (id, group, fold, image, mask), meta.json, and for each case in volumes/
  ID.image.npy     float16 (C, X, Y, Z), axes to the right, front and top (RAS), resampled, normalised
  ID.mask.npy      uint8 (X, Y, Z), class numbers on the same grid
  ID.points.npy    int16 (N, 4), up to 1000 voxels of each class as (class, x, y, z): where patches are drawn
  ID.truth.nii.gz  the mask as it was, with the image's affine and header: what eval.py compares with
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

# What of meta.json goes into --like caches and checkpoints: all that a new image needs.
META = ("classes", "values", "channels", "resample", "spacing", "slice_axis", "shape", "normalisation")
RAS = [[0, 1], [1, 1], [2, 1]]  # nibabel's way to say: every axis stays, none is flipped
FOLDS = 5


class DataError(ValueError):
    """What the user can mend: shown as one line with exit status 1, without a traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Text for a terminal: on one line, control characters escaped, a long one cut in its middle."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


# --- reading one volume ---


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a folder with one DICOM series: float32 (X, Y, Z, 1), rescaled, and its affine (4, 4) to RAS mm.

    Slices are put in order by their positions along the normal (PS3.3 C.7.6.2.1.1), not by name or number.
    """
    slices = []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "."):
        ds = pydicom.dcmread(path, force=True)
        if ds.get("PixelData") and ds.get("ImagePositionPatient") and ds.get("ImageOrientationPatient"):
            slices.append(ds)
    kinds = {(d.get("SeriesInstanceUID"), d.Rows, d.Columns, d.get("NumberOfFrames", 1)) for d in slices}
    if len(kinds) != 1 or max(kinds)[3] != 1:
        raise DataError(f"{folder}: {len(kinds)} DICOM series or image sizes, expected one, a file per slice")
    rows = np.array([d.ImageOrientationPatient for d in slices], float)
    right, down = rows[0, :3], rows[0, 3:]
    normal = np.cross(right, down)
    positions = np.array([d.ImagePositionPatient for d in slices], float)
    order = np.argsort(positions @ normal)
    steps = np.diff((positions @ normal)[order])
    if np.abs(rows - rows[0]).max() > 1e-3 or (len(steps) and np.ptp(steps) > 0.1 * np.median(steps)):
        raise DataError(f"{folder}: slices turned, doubled or missing, expected one stack at equal distances")
    spacing = np.array(slices[0].PixelSpacing, float)  # between rows, between columns
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = right * spacing[1], down * spacing[0]
    affine[:3, 2] = normal * (steps.mean() if len(steps) else float(slices[0].get("SliceThickness") or 1))
    affine[:3, 3] = positions[order[0]]
    lut = [(float(d.get("RescaleSlope", 1)), float(d.get("RescaleIntercept", 0))) for d in slices]
    planes = [slices[k].pixel_array.T.astype(np.float32) * lut[k][0] + lut[k][1] for k in order]
    return np.stack(planes, 2)[..., None].astype(np.float32), np.diag([-1, -1, 1, 1]) @ affine


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header | None]:
    """Read .nii, .nii.gz or a DICOM series: float32 (X, Y, Z, C) in the axes of the file, affine, header.

    Raises DataError that names the file for whatever keeps it from being a volume with content.
    """
    try:
        header = None
        if path.is_dir():
            volume, affine = read_series(path)
        else:
            if not path.stat().st_size:
                raise DataError(f"{path}: zero bytes")
            nifti = nib.load(path)
            if nifti.get_data_dtype().kind not in "iuf":
                raise DataError(f"{path}: voxels of type {nifti.get_data_dtype()}, expected numbers")
            volume, affine = nifti.get_fdata(dtype=np.float32, caching="unchanged"), nifti.affine
            header = nifti.header
    except DataError:
        raise
    except Exception as error:  # the one place where the readers' many exceptions become ours
        raise DataError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if volume.ndim == 3:
        volume = volume[..., None]
    if volume.ndim != 4 or 0 in volume.shape:
        raise DataError(f"{path}: shape {volume.shape}, expected 3D, or 4D with the channels last")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: affine {affine.round(4).tolist()}, expected one that can be inverted")
    if broken := int((~np.isfinite(volume)).sum()):
        raise DataError(f"{path}: {broken} voxels are NaN or infinite")
    if not all(volume[..., k].min() < volume[..., k].max() for k in range(volume.shape[3])):
        raise DataError(f"{path}: no contrast, all voxels (of a channel) have one value")
    return volume, affine, header


def read_mask(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Read a mask, uint8 (X, Y, Z). Raises DataError unless it holds integers on its image's grid."""
    try:
        nifti = nib.load(path)
        mask, own = np.asanyarray(nifti.dataobj), nifti.affine
    except Exception as error:  # as in read_volume
        raise DataError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    mask = mask[..., 0] if mask.ndim == 4 and mask.shape[3] == 1 else mask
    if mask.shape != shape:
        raise DataError(f"{path}: shape {mask.shape}, expected {shape} as its image")
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
    apart = np.abs(corners @ (own - affine).T).max()
    if not apart <= 0.1 * nib.affines.voxel_sizes(affine).min():
        found, expected = own[:3].round(3).tolist(), affine[:3].round(3).tolist()
        raise DataError(f"{path}: affine {found}, expected {expected} as its image ({apart:.3g} mm apart)")
    whole = np.rint(mask) if mask.dtype.kind == "f" else mask
    if not (mask.dtype.kind in "iuf" and np.all(np.abs(mask - whole) <= 1e-3)):
        raise DataError(
            f"{path}: mask of {mask.dtype} with values between the integers, expected 0, 1, 2, ..."
        )
    if whole.min() < 0 or whole.max() > 255:
        raise DataError(f"{path}: mask values {whole.min():g} to {whole.max():g}, expected 0 to 255")
    return whole.astype(np.uint8)


def write_mask(path: Path, mask: np.ndarray, affine: np.ndarray, header: nib.Nifti1Header | None) -> None:
    """Write uint8 (X, Y, Z) with the affine and the header of the image it belongs to."""
    nifti = nib.Nifti1Image(mask, affine, header)
    nifti.set_data_dtype(np.uint8)
    nifti.header["cal_min"] = nifti.header["cal_max"] = 0  # the image's window would hide the classes
    nib.save(nifti, path)


def hash_pixels(pixels: np.ndarray) -> str:
    """What tells copies: the SHA-256 of shape and stored pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


# --- to the common grid and back ---


def orient(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How nibabel turns the axes of a file into RAS, (3, 2), and the spacing in mm along the RAS axes."""
    orientation, spacing = io_orientation(affine), np.empty(3)
    spacing[orientation[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    return orientation, spacing


def grid_shape(shape: tuple[int, ...], spacing: np.ndarray, meta: dict) -> tuple[int, ...]:
    """Voxels per axis of the common grid for a volume in RAS: it covers the same millimetres."""
    if not meta["resample"]:
        return tuple(shape)
    sizes = np.array(shape) * spacing / meta["spacing"]
    # a spacing that differs by rounding in the header only must not change the number of voxels
    return tuple(max(1, int(size)) for size in np.floor(sizes + 0.5 + 1e-3))


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """Weights float32 (new, old) that resample an axis of `old` voxels to `new` ones over the same extent.

    Linear interpolation; when shrinking the triangle widens to the new voxel size, which is antialiasing.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    distance = np.abs(centers[:, None] - np.arange(old)) / max(1.0, old / new)
    weights = (1 - distance).clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resample(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample float32 (X, Y, Z) to another shape over the same extent."""
    for axis in sorted(range(3), key=lambda axis: shape[axis] / volume.shape[axis]):  # shrink first
        if shape[axis] != volume.shape[axis]:
            matrix = resampling_matrix(volume.shape[axis], shape[axis])
            volume = np.moveaxis(np.tensordot(matrix, volume, (1, axis)), 0, axis)
    return volume


def normalise(channel: np.ndarray, constants: dict | None) -> np.ndarray:
    """CT, with constants: clip and scale by those. Others: to mean 0 and deviation 1 of the image itself.

    If more than half of the voxels have the smallest value (air set to zero), they do not count.
    """
    if constants:
        return (channel.clip(constants["low"], constants["high"]) - constants["mean"]) / constants["std"]
    inside = channel > channel.min()
    values = channel if inside.mean() >= 0.5 else channel[inside]
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return (channel - mean) / (std or 1.0)


def to_grid(volume: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
    """What `read_volume` gave, (X, Y, Z, C), as networks see it: float16 (C, X, Y, Z) on the common grid."""
    orientation, spacing = orient(affine)
    volume = np.moveaxis(apply_orientation(volume, orientation), 3, 0)
    shape = grid_shape(volume.shape[1:], spacing, meta)
    image = np.empty((len(volume), *shape), np.float16)
    for k, constants in enumerate(meta["normalisation"]):
        image[k] = resample(normalise(volume[k], constants), shape)
    return image


def mask_to_grid(mask: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
    """Class numbers uint8 (X, Y, Z) on the common grid: each class is resampled, the largest one wins."""
    orientation, spacing = orient(affine)
    mask = apply_orientation(np.searchsorted(meta["values"], mask).astype(np.uint8), orientation)
    shape = grid_shape(mask.shape, spacing, meta)
    if shape == mask.shape:
        return np.ascontiguousarray(mask)
    best, labels = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    for k in range(len(meta["values"])):
        share = resample((mask == k).astype(np.float32), shape)
        labels[share > best] = k
        np.maximum(best, share, out=best)
    return labels


def from_grid(probabilities: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The way back: class numbers uint8 in the shape and axes of the file, from float (C, X, Y, Z).

    The probabilities are resampled slab by slab with a running maximum: on the file's grid, all classes at
    once would fill the memory (14 classes at 512x512x512: 15 GB).
    """
    orientation, _ = orient(affine)
    full = tuple(int(shape[axis]) for axis in np.argsort(orientation[:, 0]))
    matrix, labels = resampling_matrix(probabilities.shape[1], full[0]), np.zeros(full, np.uint8)
    for start in range(0, full[0], 16):
        rows = matrix[start : start + 16]
        used = np.flatnonzero(rows.any(0))
        low, high, best = used[0], used[-1] + 1, None
        for k, probability in enumerate(probabilities):
            slab = np.tensordot(rows[:, low:high], probability[low:high].astype(np.float32), 1)
            slab = resample(slab, (len(rows), *full[1:]))
            if best is None:
                best = slab
                continue
            labels[start : start + 16][slab > best] = k
            np.maximum(best, slab, out=best)
    return apply_orientation(labels, ornt_transform(RAS, orientation))


# --- finding the cases ---


@dataclass
class Case:
    """A volume and its mask."""

    id: str
    image: Path
    mask: Path
    split: str = ""  # "test": official test case with a mask


def list_volumes(folder: Path) -> dict[str, Path]:
    """The .nii and .nii.gz files of a folder by name; macOS's ._ files are none."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        p.name.split(".nii")[0]: p for p in paths if p.name.endswith((".nii", ".nii.gz")) and p.name[0] != "."
    }


def find_cases(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """The cases of an MSD folder, and (file, reason) for every one without a partner."""
    cases, alone = [], []
    for part, split in (("Tr", ""), ("Ts", "test")):
        images, masks = (list_volumes(raw / f"{kind}{part}") for kind in ("images", "labels"))
        if split and not masks:
            if images:
                print(f"note: {len(images)} images in imagesTs have no masks and are left out")
            continue
        cases += [
            Case(name, images[name], masks[name], split) for name in sorted(images.keys() & masks.keys())
        ]
        for kind, one, other in (("images", images, masks), ("labels", masks, images)):
            for name in sorted(one.keys() - other.keys()):
                reason = (
                    f"{one[name]}: no file of that name in {'labels' if kind == 'images' else 'images'}{part}"
                )
                alone.append((one[name].relative_to(raw).as_posix(), reason))
    if not cases:
        inside = sorted(p.name for p in raw.iterdir())[:5] if raw.is_dir() else "no folder"
        raise DataError(f"{raw}: found {inside}, expected imagesTr/NAME.nii.gz and labelsTr/NAME.nii.gz")
    if double := [name for name, count in Counter(case.id for case in cases).items() if count > 1]:
        raise DataError(f"{raw}: {double[0]} is in imagesTr and in imagesTs, expected different names")
    return cases, alone


def read_description(raw: Path) -> tuple[dict[int, str] | None, list[str] | None]:
    """Class names by mask value, and channel names, of dataset.json; None for what it does not say."""
    path = raw / "dataset.json"
    if not path.exists():
        return None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        labels, channels = found.get("labels"), found.get("channel_names", found.get("modality"))
        if labels:  # {"0": "background"} or, newer, {"background": 0}
            pairs = [(k, v) if str(k).isdigit() else (v, k) for k, v in labels.items()]
            labels = {int(value): str(name) for value, name in sorted(pairs, key=lambda pair: int(pair[0]))}
        if isinstance(channels, dict):
            channels = [str(channels[k]) for k in sorted(channels, key=int)]
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error}, expected labels and modality as in the Decathlon") from error
    if labels and (min(labels) != 0 or max(labels) > 255 or len(labels) < 2):
        raise DataError(f"{path}: labels {labels}, expected 0 = background and others up to 255")
    return labels or None, channels or None


def inspect(case: Case, values: list[int] | None) -> dict | DataError:
    """Read and check one case; what has to be known of all cases before the first is written."""
    try:
        volume, affine, _ = read_volume(case.image)
        mask = read_mask(case.mask, volume.shape[:3], affine)
        found = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)).tolist()
        if values and not set(found) <= set(values):
            raise DataError(f"{case.mask}: mask values {found}, expected {values}")
    except (DataError, MemoryError) as error:
        return error if isinstance(error, DataError) else DataError(f"{case.image}: too large for the memory")
    orientation, spacing = orient(affine)
    shape = [volume.shape[axis] for axis in np.argsort(orientation[:, 0])]
    foreground = volume[mask > 0]
    return {"digest": hash_pixels(volume), "mask": hash_pixels(mask), "shape": shape, "spacing": spacing,
            "channels": volume.shape[3], "values": found,
            "foreground": foreground[:: len(foreground) // 10_000 + 1]}  # fmt: skip


# --- patients and folds ---


def group_patients(patients: list[str], digests: list[str]) -> list[str]:
    """A group per row: patients who share a pixel-identical image are one, named by their smallest id."""
    parent = {patient: patient for patient in patients}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            patient = parent[patient]
        return patient

    first: dict[str, str] = {}
    for patient, digest in zip(patients, digests, strict=True):
        a, b = sorted((root(patient), root(first.setdefault(digest, patient))))
        parent[b] = a
    return [root(patient) for patient in patients]


def assign_fold(group: str, split: str, has_val: bool, test_fraction: float) -> str:
    """Fold of a group: a hash of its name decides, so that it never depends on the other rows or their order.

    Official splits are kept: val is fold 0 (train then has 1-4), test is test.
    """
    digest = hashlib.sha256(f"0:{group}".encode()).hexdigest()
    if split == "test" or (not split and int(digest[:8], 16) < test_fraction * 2**32):
        return "test"
    if split == "val":
        return "0"
    return str(1 + int(digest[8:16], 16) % (FOLDS - 1) if has_val else int(digest[8:16], 16) % FOLDS)


def report_copies(cases: list[Case], folds: list[str], found: list[dict]) -> list[dict]:
    """Name the cases whose images are the same to the last voxel, and whether their masks are."""
    copies: dict[str, list[int]] = defaultdict(list)
    for k, info in enumerate(found):
        copies[info["digest"]].append(k)
    report = []
    for rows in copies.values():
        if len(rows) > 1:
            names, where = [cases[k].id for k in rows], sorted({folds[k] for k in rows})
            masks = "different" if len({found[k]["mask"] for k in rows}) > 1 else "the same"
            report.append({"cases": names, "masks": masks, "folds": where})
            print(f"note: {' and '.join(names)} are one image with {masks} masks, in fold {', '.join(where)}")
    return report


# --- the command ---


def progress(text: str) -> None:
    """A line that overwrites itself on a terminal, and nothing elsewhere."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


def in_threads(function: Callable, items: list, workers: int) -> Iterator:
    """`map` in threads (decoding and resizing release the GIL), in chunks, so that results do not pile up."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(items), 256):
            yield from pool.map(function, items[start : start + 256])
            progress(f"read {min(start + 256, len(items))}/{len(items)}")
    progress("")


def open_output(out: Path, overwrite: bool) -> Path:
    """The folder to write into before it becomes OUT, so that an interrupted run leaves no OUT."""
    found = {p.name for p in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    ours = {"images.npy", "volumes", "index.csv", "meta.json", "skipped.csv"}
    if found and not {"meta.json"} <= found <= ours:  # --overwrite never deletes what is not ours
        raise DataError(f"{out}: holds {min(found - ours or found)}, expected a new folder or a cache")
    if found and not overwrite:
        raise DataError(f"{out}: exists already; use --overwrite, or another --out")
    folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def read_meta(cache: Path) -> dict:
    """The meta.json of a finished cache. Raises DataError with the command that makes one."""
    try:
        meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        command = f"python {Path(__file__).parent.name}/preprocess.py --data RAW --out {cache}"
        raise DataError(f"{cache}: no finished cache here; make one by: {command}") from error
    check_meta(meta, cache / "meta.json")
    return meta


def is_number(value: object, low: float = -math.inf) -> bool:
    """Whether a value of a JSON file is a finite number above `low`."""
    return type(value) in (int, float) and math.isfinite(value) and value > low


def check_meta(meta: object, where: Path) -> None:
    """Raise DataError if what a network needs of a meta.json (or a checkpoint's meta) is not there."""
    if not isinstance(meta, dict):
        raise DataError(f"{where}: {type(meta).__name__}, expected names and values; preprocess again")
    classes, values, channels, shape = (meta.get(k) for k in ("classes", "values", "channels", "shape"))
    spacing, normalisation = meta.get("spacing"), meta.get("normalisation")
    good = {
        "classes": isinstance(classes, list) and len(set(map(str, classes))) == len(classes) >= 2,
        "values": isinstance(values, list) and all(type(v) is int and 0 <= v <= 255 for v in values),
        "channels": isinstance(channels, list) and len(channels) >= 1,
        "resample": type(meta.get("resample")) is bool,
        "spacing": isinstance(spacing, list) and len(spacing) == 3 and all(is_number(s, 0) for s in spacing),
        "slice_axis": meta.get("slice_axis") in (0, 1, 2),
        "shape": isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape),
        "normalisation": isinstance(normalisation, list) and all(map(is_normalisation, normalisation)),
    }
    good["values"] = good["values"] and values == sorted(set(values)) and values[0] == 0
    for one, other in (("values", "classes"), ("normalisation", "channels")):
        good[one] = good[one] and good[other] and len(meta[one]) == len(meta[other])
    for name, fits in good.items():
        if not fits:
            found = f"{where}: {name} {meta.get(name)!r}, which is not that of a cache of"
            raise DataError(f"{found} {Path(__file__).parent.name}/preprocess.py; preprocess again")


def is_normalisation(constants: object) -> bool:
    """Whether `normalise` can work with these constants: None, or numbers with low < high and std > 0."""
    if constants is None:
        return True
    names = ("low", "high", "mean", "std")
    if not isinstance(constants, dict) or not all(is_number(constants.get(name)) for name in names):
        return False
    return constants["low"] < constants["high"] and constants["std"] > 0


def default_workers() -> int:
    """As many threads as this process may use, at most 8: each holds an image as large as its file says."""
    if hasattr(os, "sched_getaffinity"):  # on a shared node fewer than os.cpu_count()
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw volumes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--spacing", nargs="+", metavar="MM", help="of the common grid: X Y Z in mm, median (default: of the "
        "training cases), or keep (each volume keeps its own)")  # fmt: skip
    add("--test-fraction", type=float, default=0.0, help="part of the cases kept as test (default: 0)")
    add("--like", type=Path, metavar="CACHE", help="a test set for the models of this cache: its classes, "
        "spacing and normalisation, every row test")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="threads, each with a volume in memory "
        "(default: %(default)s)")  # fmt: skip
    add("--skip-bad", action="store_true", help="leave unusable cases out and list them in skipped.csv")
    add("--overwrite", action="store_true", help="replace a finished cache in OUT")
    args = parser.parse_args(argv)
    if args.like and (args.spacing or args.test_fraction):
        parser.error("--like brings its spacing and makes every row test: leave those options out")
    if args.like and args.like.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the cache of --like: give another folder")
    args.spacing = args.spacing or ["median"]
    if args.spacing not in (["median"], ["keep"]):
        try:
            args.spacing = [float(value) for value in args.spacing]
        except ValueError:
            parser.error(f"--spacing {' '.join(args.spacing)}, expected three numbers, median or keep")
        if len(args.spacing) != 3 or not all(0.01 <= value <= 100 for value in args.spacing):
            parser.error(f"--spacing {args.spacing}, expected three numbers from 0.01 to 100")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    return args


def check_together(
    cases: list[Case], found: list, labels: dict[int, str] | None, channels: list[str] | None
) -> tuple[dict[int, str], list[str]]:
    """Class and channel names if dataset.json has none; puts a DataError in `found` where a case differs."""
    good = [info for info in found if isinstance(info, dict)]
    if labels is None:
        seen, n = {value for info in good for value in info["values"]}, 1
        while n in seen:
            n += 1
        labels = {value: "background" if value == 0 else str(value) for value in range(n)}
    if channels is None:
        count = Counter(info["channels"] for info in good).most_common(1)[0][0] if good else 1
        channels = [f"channel {k}" for k in range(count)]
    for k, info in enumerate(found):
        if isinstance(info, dict) and not set(info["values"]) <= set(labels):
            expected = f"{sorted(labels)} without gaps, or a dataset.json that names the others"
            found[k] = DataError(f"{cases[k].mask}: mask values {info['values']}, expected {expected}")
        elif isinstance(info, dict) and info["channels"] != len(channels):
            found[k] = DataError(f"{cases[k].image}: {info['channels']} channels, expected {channels}")
    return labels, channels


def describe(training: list[dict], spacing: list, labels: dict[int, str], channels: list[str]) -> dict:
    """What meta.json says of the grid, the classes and the normalisation, from the training cases."""
    median = np.median([info["spacing"] for info in training], 0).round(4).tolist()
    meta = {"classes": list(labels.values()), "values": list(labels), "channels": channels,
            "resample": spacing != ["keep"], "spacing": median if isinstance(spacing[0], str) else spacing,
            "slice_axis": max(range(3), key=lambda axis: (round(median[axis], 2), axis))}  # fmt: skip
    shapes = [grid_shape(info["shape"], info["spacing"], meta) for info in training]
    foreground = np.concatenate([info["foreground"] for info in training])
    if not len(foreground):
        raise DataError("no training mask has any foreground: nothing to learn")
    constants: list[dict | None] = [None] * len(channels)
    for k, name in enumerate(channels):
        if name.strip().upper() == "CT":
            low, high = np.percentile(foreground[:, k], (0.5, 99.5)).tolist()
            values = foreground[:, k].clip(low, high).astype(np.float64)
            constants[k] = {"low": low, "high": high, "mean": float(values.mean()),
                            "std": float(values.std()) or 1.0}  # fmt: skip
    return meta | {"shape": np.median(shapes, 0).astype(int).tolist(), "normalisation": constants}


def convert(case: Case, folder: Path, meta: dict) -> None:
    """Write the four files of a case."""
    volume, affine, header = read_volume(case.image)
    mask = read_mask(case.mask, volume.shape[:3], affine)
    write_mask(folder / f"{case.id}.truth.nii.gz", mask, affine, header)
    np.save(folder / f"{case.id}.image.npy", to_grid(volume, affine, meta))
    labels = mask_to_grid(mask, affine, meta)
    np.save(folder / f"{case.id}.mask.npy", labels)
    rng, points = np.random.default_rng(0), [np.empty((0, 4), np.int16)]
    for k in range(1, len(meta["classes"])):
        where = np.argwhere(labels == k)
        where = where[rng.permutation(len(where))[:1000]]
        points.append(np.insert(where, 0, k, axis=1).astype(np.int16))
    np.save(folder / f"{case.id}.points.npy", np.concatenate(points))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    like = {k: v for k, v in read_meta(args.like).items() if k in META} if args.like else {}

    # what there is: every case once, and what fails is collected, so that one run names it all
    cases, bad = find_cases(args.data)
    labels, channels = read_description(args.data)
    if like:
        expected = dict(zip(like["values"], like["classes"], strict=True))
        if labels and labels != expected:
            raise DataError(f"{args.data}: labels {labels}, but {args.like} has {expected}")
        labels, channels = expected, like["channels"]
    print(f"{args.data}: {len(cases)} cases with masks")
    out = args.out.resolve()
    folder = open_output(out, args.overwrite)
    try:
        found = list(in_threads(partial(inspect, values=labels and list(labels)), cases, args.workers))
        labels, channels = check_together(cases, found, labels, channels)
        bad += [(c.id, str(info)) for c, info in zip(cases, found, strict=True) if not isinstance(info, dict)]
        for _, reason in bad:
            print(reason, file=sys.stderr)
        kept = [(c, info) for c, info in zip(cases, found, strict=True) if isinstance(info, dict)]
        if bad and not (args.skip_bad and kept):
            raise DataError(f"{len(bad)} cases or files cannot be used: mend them, or use --skip-bad")
        if bad:
            with open(folder / "skipped.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("source", "reason"), *bad])
        cases, found = map(list, zip(*kept, strict=True))

        # groups, folds, the grid
        groups = group_patients([case.id for case in cases], [info["digest"] for info in found])
        rest = (False, args.test_fraction)
        folds = [assign_fold(g, case.split, *rest) for g, case in zip(groups, cases, strict=True)]
        if like:
            folds = ["test"] * len(cases)
        training = [info for info, fold in zip(found, folds, strict=True) if fold != "test"]
        if not like and not training:
            raise DataError(f"{args.data}: only test cases; for an external test set use --like TRAIN_CACHE")
        meta = like or describe(training, args.spacing, labels, channels)
        kind = f"to {meta['spacing']} mm" if meta["resample"] else "each on its own grid"
        print(f"classes {' '.join(meta['classes'])}; channels {' '.join(meta['channels'])}; {kind}")

        # the arrays and the index
        (folder / "volumes").mkdir()
        for _ in in_threads(partial(convert, folder=folder / "volumes", meta=meta), cases, args.workers):
            pass
        counts = Counter(folds)
        print("  ".join(f"fold {fold}: {counts[fold]}" for fold in sorted(counts)))
        with open(folder / "index.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "group", "fold", "image", "mask"))
            for case, group, fold in zip(cases, groups, folds, strict=True):
                paths = [path.relative_to(args.data).as_posix() for path in (case.image, case.mask)]
                writer.writerow((case.id, group, fold, *paths))
        meta |= {
            "n": len(cases), "counts": dict(counts), "copies": report_copies(cases, folds, found),
            "empty": sum(info["values"] == [0] for info in found), "skipped": len(bad),
            "options": {k: str(v) for k, v in vars(args).items() if v},
            "versions": {m.__name__: m.__version__ for m in (np, nib)},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = "eval.py --checkpoint runs/segmentation/best.pt --split test" if like else "train.py"
    print(f"next: python segmentation/{command} --data {args.out}")


def run_command(main: Callable, *errors: type) -> None:
    """Run a script's main: what the user can mend, or stopped, is one line; a bug keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a screen may lack the letters of a file's name
    warnings.filterwarnings("ignore", module=r"pydicom|PIL|nibabel")  # header slips, some for every file
    try:
        main()
    except (DataError, OSError, *errors) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"error: {one_line(error)} (out of memory? use fewer --workers)")


if __name__ == "__main__":
    run_command(main)
