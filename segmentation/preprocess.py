"""Turn labelled MR or CT volumes into arrays on a common grid and an index that train.py and eval.py read.

  python segmentation/preprocess.py --data Task04_Hippocampus --out data/hippocampus
  python segmentation/preprocess.py --data left_atrium --out data/atrium --spacing 1.5 1.5 1.5
  python segmentation/preprocess.py --data acdc --out data/acdc --patient-regex "patient[0-9]+"
  python segmentation/preprocess.py --data other_hospital --out data/other --like data/atrium

RAW is a folder as in the Medical Segmentation Decathlon (MSD): imagesTr/NAME.nii.gz, 3D, or 4D with the
channels last, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ..., a file a channel; labelsTr/NAME.nii.gz;
and dataset.json, which names labels and modalities. If there are imagesTs and labelsTs, they become test
cases. Without dataset.json classes are called by their values.

Written to OUT: index.csv (id, group, fold, image, mask), meta.json, and for each case in volumes/
  ID.image.npy     float16 (C, X, Y, Z), axes to the right, front and top (RAS), resampled, normalised
  ID.mask.npy      uint8 (X, Y, Z), class numbers on the same grid
  ID.points.npy    int16 (N, 4), up to 1000 voxels of each class as (class, x, y, z): where patches are drawn
  ID.truth.nii.gz  the mask as it was, with the image's affine and header: what eval.py compares with
"""

import argparse
import csv
import errno
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.uid import UID

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What of meta.json goes into --like caches and checkpoints: all that a new image needs.
META = (
    "classes",
    "values",
    "channels",
    "resample",
    "spacing",
    "slice_axis",
    "shape",
    "normalisation",
)
RAS = [[0, 1], [1, 1], [2, 1]]  # nibabel's way to say: every axis stays, none is flipped
FOLDS = 5
MAX_GRID = 2**30  # voxels of the common grid, 2 GiB a channel: what is more has a wrong unit
SHIFT = 0.1  # voxels: how far a slice or a corner may lie from where the affine puts it
UNIT_MM = {1: 1000.0, 3: 0.001}  # NIfTI's xyzt_units that are not mm: metre and micron
QUIET = logging.Logger(
    "repairs", logging.CRITICAL + 1
)  # nibabel's repairs of a header are not news
# What tells images at one position apart, for the message.
VARYING = ("EchoTime", "EffectiveEchoTime", "TemporalPositionIdentifier", "TemporalPositionIndex",
           "DiffusionBValue", "TriggerTime", "AcquisitionNumber", "AcquisitionTime", "ImageType")  # fmt: skip


class DataError(ValueError):
    """What the user can mend: shown as one line with exit status 1, without a traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Text for a terminal: on one line, control characters escaped, a long one cut in its middle."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    line = "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in line)
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


# --- reading a NIfTI file ---


def open_bytes(path: Path) -> BinaryIO:
    """Open a file to read; what is gzip by its content is decompressed."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


def find_pair(path: Path) -> tuple[Path, Path]:
    """The files with header and voxels: one file, or NAME.hdr and NAME.img."""
    match = re.fullmatch(r"(.+)\.(hdr|img)((?:\.gz)?)", path.name, re.IGNORECASE)
    if not match:
        return path, path
    stem, _, packed = match.groups()
    pair = path.with_name(f"{stem}.hdr{packed}"), path.with_name(f"{stem}.img{packed}")
    for file in pair:
        if not file.is_file():
            raise DataError(f"{path}: half of a pair, {file.name} is not beside it")
    return pair


def read_header(path: Path) -> nib.Nifti1Header:
    """The header as it stands in the file, NIfTI-1 or NIfTI-2. Raises DataError for other formats."""
    with open_bytes(path) as file:
        head = file.read(540)  # the length of a NIfTI-2 header
    if not head:
        raise DataError(f"{path}: zero bytes")
    lengths = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if 348 in lengths and head[344:347] in (b"n+1", b"ni1"):
        kind = nib.Nifti1Header
    elif 540 in lengths and head[4:7] in (b"n+2", b"ni2"):
        kind = nib.Nifti2Header
    elif lengths & {348, 540} and len(head) < 348:
        raise DataError(f"{path}: cut after {len(head)} bytes, within the header")
    elif 348 in lengths:
        raise DataError(
            f"{path}: Analyze 7.5, which does not tell left from right; expected NIfTI: convert it where "
            "its orientation is known (dcm2niix from DICOM, or nibabel)"
        )
    else:
        raise DataError(
            f"{path}: no NIfTI header, expected .nii, .nii.gz or a folder with one DICOM series; "
            "convert other formats to NIfTI first"
        )
    with open_bytes(path) as file:
        header = kind.from_fileobj(file, check=False)
    if 3000 <= int(header["intent_code"]) < 3100:
        raise DataError(
            f"{path}: CIFTI (values on a brain surface), expected voxels: export it as a volume"
        )
    return header


def repair_header(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """A copy with what nibabel repairs (qfac, negative pixdim); raises HeaderDataError for the rest."""
    fixed = header.copy()
    fixed.check_fix(QUIET, 40)
    for name in ("sform_code", "qform_code"):
        if (
            header[name] != 0 and fixed[name] == 0
        ):  # a code that nibabel does not know is one all the same
            fixed[name] = 1
    return fixed


def read_form(header: nib.Nifti1Header, name: str) -> tuple[np.ndarray | None, str]:
    """The sform or qform (4, 4) if it is coded and usable; else None and the reason, "" if not coded."""
    get = header.get_sform if name == "sform" else header.get_qform
    try:
        affine, _ = get(coded=True)
    except (HeaderDataError, ValueError) as error:  # a quaternion longer than 1
        return None, f"{name} with a broken quaternion ({error})"
    if affine is None:
        return None, ""
    sizes = nib.affines.voxel_sizes(affine)
    if not (np.isfinite(affine).all() and sizes.min() > 0):
        return None, f"{name} {affine[:3].round(4).tolist()}"
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        return None, f"{name} {affine[:3].round(4).tolist()} cannot be inverted"
    return affine, ""


def choose_affine(
    path: Path, header: nib.Nifti1Header, pixdim: np.ndarray, notes: list[tuple[str, str]]
) -> np.ndarray:
    """Affine (4, 4) from voxels to RAS, in the unit of the file: the sform, or else the qform.

    `header` is repaired, `pixdim` (3,) is what it was before; it is set from the sform if it is unusable.
    Raises DataError if neither can be used, or if they contradict each other about the size of a voxel.
    """
    has_sizes = bool(np.isfinite(pixdim).all() and pixdim.min() > 0)
    sform, sform_reason = read_form(header, "sform")
    qform, qform_reason = read_form(header, "qform") if has_sizes else (None, "")
    reason = "; ".join(filter(None, (sform_reason, qform_reason)))
    if sform is None and not has_sizes:
        raise DataError(
            f"{path}: pixdim {pixdim.tolist()} and no sform, expected the size of a voxel"
        )
    if sform is None and qform is None and reason:
        raise DataError(
            f"{path}: {reason}, expected an affine: set one, for example by nibabel's set_sform"
        )
    if reason:
        taken = "qform" if sform is None else "sform"
        notes.append((f"the {taken} is taken, the other form is unusable", reason))
    if sform is None and qform is None:
        notes.append(
            ("no sform and no qform: the axes are taken to point to the left, front and top", "")
        )
        return header.get_base_affine()
    if sform is None:
        return qform
    if not has_sizes:
        header["pixdim"][1:4] = nib.affines.voxel_sizes(sform)
        return sform
    if not np.allclose(nib.affines.voxel_sizes(sform), pixdim, rtol=0.01):
        return settle_sizes(path, sform, qform, pixdim, notes)
    if qform is not None:
        apart = corner_distance(sform, qform, header.get_data_shape()[:3])
        if apart > SHIFT * pixdim.min():
            detail = f"by up to {apart / pixdim.min():.3g} voxels"
            notes.append(("sform and qform differ: the sform is taken", detail))
    return sform


def settle_sizes(
    path: Path,
    sform: np.ndarray,
    qform: np.ndarray | None,
    pixdim: np.ndarray,
    notes: list[tuple[str, str]],
) -> np.ndarray:
    """Of two forms that differ in the size of a voxel the one that was filled in, with a note.

    Voxels of 1 x 1 x 1 beside other ones are what a program writes that knows no better (ACDC). Any other
    contradiction is a DataError: one of the two is wrong by a factor, and nothing tells which.
    """
    sizes = nib.affines.voxel_sizes(sform)
    detail = f"sform {show_size(sizes)}, pixdim {show_size(pixdim)}"
    if np.allclose(sizes, 1, atol=1e-3) and qform is not None:
        notes.append(("voxel sizes contradict each other: the qform is taken", detail))
        return qform
    if np.allclose(pixdim, 1, atol=1e-3):
        notes.append(("voxel sizes contradict each other: the sform is taken", detail))
        return sform
    raise DataError(
        f"{path}: voxels by {detail}, expected one size: set the wrong one right, by nibabel"
    )


def show_size(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.5g}" for size in sizes)


def corner_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far, along one axis of the world, two affines (4, 4) put a corner of a volume apart."""
    corners = np.array(list(itertools.product(*((0, n) for n in shape), (1,))))
    return float(np.abs(corners @ (first - second).T).max())


def check_shear(affine: np.ndarray, notes: list[tuple[str, str]]) -> None:
    """Note axes that are not perpendicular: resampling and distances take voxels for boxes."""
    directions = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    cosines = np.abs(directions.T @ directions - np.eye(3))
    if cosines.max() > 0.01:
        angle = np.degrees(np.arccos(min(1.0, cosines.max())))
        notes.append(
            ("sheared axes: the voxels are taken for boxes", f"{angle:.1f} instead of 90 degrees")
        )


def read_nifti(
    path: Path, dtype: type | None = None, notes: list[tuple[str, str]] | None = None
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Voxels (X, Y, Z[, C]) with the slope applied, affine (4, 4) to RAS in mm, repaired header.

    `notes` gets (what, detail) of what is odd in the header. Reads to the end: gzip has its checksum there.
    """
    notes = [] if notes is None else notes
    header_path, data_path = find_pair(path)
    raw = read_header(header_path)
    if int(raw["datatype"]) not in nib.nifti1.data_type_codes:
        raise DataError(f"{path}: datatype {int(raw['datatype'])}, which NIfTI does not have")
    header = repair_header(raw)
    if header.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path}: voxels of type {header.get_data_dtype()}, expected numbers")
    shape = header.get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(f"{path}: shape {shape}, expected 3D, or 4D with the channels last")
    pixdim = np.abs(raw["pixdim"][1:4].astype(float))
    affine = choose_affine(path, header, pixdim, notes)
    check_shear(affine, notes)
    affine[:3] *= UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    with open_bytes(data_path) as file:
        proxy = nib.arrayproxy.ArrayProxy(file, header, mmap=False)
        try:
            voxels = np.asanyarray(proxy, dtype=dtype)
        except MemoryError as error:
            raise MemoryError(f"shape {shape}") from error
        while file.read(2**20):
            pass
    return voxels.reshape(shape, order="F"), affine, header


# --- reading a DICOM series ---


@dataclass
class Slice:
    """One plane of a series: a file, or a frame of a multi-frame file."""

    name: str
    ds: pydicom.Dataset  # the file
    plane: pydicom.Dataset  # the attributes of this plane; the file itself if it has one frame
    frame: int = 0


def read_series(
    path: Path, notes: list[tuple[str, str]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a folder with one DICOM series, or one multi-frame file: float32 (X, Y, Z, 1), affine to RAS mm.

    Slices are put in order by their positions along the normal (PS3.3 C.7.6.2.1.1), not by name or number.
    They must be one box: the same size, orientation and PixelSpacing, one image at each position, positions
    at equal distances on one line along the normal, all within 0.1 voxel. Raises DataError naming the file.
    """
    notes = [] if notes is None else notes
    slices = list_slices(path, notes)
    check_series(path, slices)
    right, down, spacing = check_planes(path, slices)
    positions = read_numbers(path, slices, "ImagePositionPatient", 3)
    normal = np.cross(right, down)
    order = np.argsort(positions @ normal, kind="stable")
    slices = [slices[k] for k in order]
    positions = positions[order]
    check_doubles(path, slices, positions @ normal)
    start, step = fit_distances(path, slices, positions @ normal)
    check_drift(path, slices, positions, np.stack([right, down]), spacing[::-1])
    note_slices(slices, notes)
    affine = np.eye(4)
    affine[:3, 0] = right * spacing[1]
    affine[:3, 1] = down * spacing[0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = positions[0] + normal * (start - positions[0] @ normal)
    planes = [read_plane(path, one) for one in slices]
    return np.stack(planes, 2)[..., None], np.diag([-1, -1, 1, 1]) @ affine


def read_dataset(path: Path) -> pydicom.Dataset | None:
    """The data set of a file, with or without the DICOM preamble; None if it holds none."""
    try:
        ds = pydicom.dcmread(path, force=True)
    except MemoryError:
        raise
    except Exception:  # text and cut files raise whatever their bytes happen to mean
        return None
    known = ("SOPClassUID", "PixelData", "DirectoryRecordSequence")
    return ds if any(keyword in ds for keyword in known) else None


def list_slices(path: Path, notes: list[tuple[str, str]]) -> list[Slice]:
    """The planes of all images. Raises DataError for a file that belongs to them and cannot be used."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [p for p in inside if p.is_file() and p.name[0] != "."]
    datasets = {file: read_dataset(file) for file in files}
    images = {file: ds for file, ds in datasets.items() if ds is not None and has_pixels(ds)}
    if not images:
        folders = sum(p.is_dir() and p.name[0] != "." for p in inside)
        found = f"{count_kinds(datasets)}, {folders} folders"
        raise DataError(f"{path}: 0 DICOM series ({found}), expected the images of one series")
    others = {file: ds for file, ds in datasets.items() if file not in images}
    lost = [file for file, ds in others.items() if belongs(file, ds, images)]
    if lost:
        names = ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in lost[:3])
        raise DataError(
            f"{path}: {len(lost)} of {len(files)} files are cut, empty or damaged: {names}; the volume would "
            "be incomplete: export the series again, or move what is no part of it"
        )
    if others:
        notes.append(("files that are no images are left out", count_kinds(others)))
    return [one for file, ds in images.items() for one in list_planes(file, ds)]


def has_pixels(ds: pydicom.Dataset) -> bool:
    return all(ds.get(keyword) for keyword in ("PixelData", "Rows", "Columns"))


def belongs(file: Path, ds: pydicom.Dataset | None, images: dict[Path, pydicom.Dataset]) -> bool:
    """Whether a file without pixels is of the series of the images, by its data set or else its suffix."""
    if ds is None:
        suffix = file.suffix.lower()
        suffixes = {image.suffix.lower() for image in images}
        # names that end in a number or in no suffix at all are what archives give to DICOM files
        has_letters = re.fullmatch(r"\.\w*[a-z]\w*", suffix) is not None
        return not has_letters or suffix in suffixes or is_dicom(file)
    if "DirectoryRecordSequence" in ds:
        return False
    series = str(ds.get("SeriesInstanceUID") or "")  # of a cut file it may be cut as well
    for image in images.values():
        if str(image.get("SeriesInstanceUID") or "").startswith(series):
            return True
        if ds.get("SOPClassUID") == image.get("SOPClassUID"):
            return True
    return False


def count_kinds(datasets: dict[Path, pydicom.Dataset | None]) -> str:
    """The number of files of each kind, as "12 CT Image Storage, 1 .txt"."""
    kinds = []
    for file, ds in datasets.items():
        suffix = file.suffix.lower() or "without suffix"
        kinds.append(suffix if ds is None else name_storage(ds) or suffix)
    return (
        ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common()) or "no files"
    )


def name_storage(ds: pydicom.Dataset) -> str:
    """The standard's name of what a DICOM file stores, such as CT Image Storage."""
    return UID(str(ds.get("SOPClassUID") or "")).name


def list_planes(file: Path, ds: pydicom.Dataset) -> list[Slice]:
    """The frames of an enhanced file, each with its functional groups in one data set; else the file."""
    groups = ds.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        return [Slice(file.name, ds, ds)]
    if len(groups) != int(ds.get("NumberOfFrames") or 1):
        raise DataError(
            f"{file}: {ds.get('NumberOfFrames')} frames, but {len(groups)} functional groups"
        )
    shared = ds.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    slices = []
    for k, group in enumerate(groups):
        plane = pydicom.Dataset()
        for keyword in ("RescaleSlope", "RescaleIntercept", "ImageType"):
            if keyword in ds:
                plane[keyword] = ds[keyword]
        for macro in (*shared[0], *group):  # of one frame the own one goes before the shared one
            if macro.VR == "SQ" and macro.value:
                plane.update(macro.value[0])
        slices.append(Slice(f"{file.name} frame {k + 1}", ds, plane, k))
    return slices


def name_kind(one: Slice) -> str:
    """What a DICOM image is if it is no slice of a CT, MR or PET volume, otherwise ""."""
    ds = one.ds
    storage = name_storage(ds)
    if "RT Dose" in storage:
        return "an RT dose grid, no image"
    if "Segmentation" in storage:
        return "a segmentation, no image"
    image_type = f"{ds.get('ImageType') or ''}".upper()
    is_siemens = "SIEMENS" in str(ds.get("Manufacturer") or "").upper()
    if "MOSAIC" in image_type or (is_siemens and (0x0019, 0x100A) in ds):
        return "a Siemens mosaic, all slices in one picture: convert it by dcm2niix"
    photometric = str(ds.get("PhotometricInterpretation") or "").strip().upper()
    if int(ds.get("SamplesPerPixel") or 1) != 1 or photometric not in (
        "",
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        return f"a colour image ({photometric})"
    if one.plane is ds and int(ds.get("NumberOfFrames") or 1) > 1:
        return f"a multi-frame file ({storage}, {ds.NumberOfFrames} frames) without the frames' positions"
    return ""


def check_series(path: Path, slices: list[Slice]) -> None:
    """Raise DataError unless all planes are of one series of slices; list the series if there are more."""
    series = defaultdict(list)
    for one in slices:
        series[str(one.ds.get("SeriesInstanceUID"))].append(one)
    if len(series) > 1:
        lines = []
        for members in series.values():
            ds = members[0].ds
            name = f"{ds.get('SeriesNumber') or '-'} {str(ds.get('SeriesDescription') or '')!r}"
            found = f"{len(members)} {ds.get('Modality') or ''} images such as {members[0].name}"
            lines.append(f"{name} ({found})")
        if len(lines) > 5:
            lines[5:] = ["..."]
        raise DataError(
            f"{path}: {len(series)} DICOM series: {', '.join(lines)}; give each its own folder"
        )
    for one in slices:
        kind = name_kind(one)
        if kind:
            raise DataError(f"{path}: {one.name} is {kind}; expected CT or MR slices")
    if path.is_file() and len(slices) == 1:
        raise DataError(
            f"{path}: one DICOM slice, expected a volume: give the folder of its series"
        )


def read_numbers(path: Path, slices: list[Slice], keyword: str, count: int) -> np.ndarray:
    """An attribute of all planes, float64 (N, count). Raises DataError if it is missing in some."""
    rows, missing = [], []
    for one in slices:
        try:
            row = [float(value) for value in np.atleast_1d(one.plane.get(keyword))]
        except (TypeError, ValueError):  # absent, empty, or text
            row = []
        rows.append(row)
        if len(row) != count or not np.isfinite(row).all():
            missing.append(one.name)
    if missing:
        found = f"{len(missing)} of {len(slices)} images have no {keyword} of {count} numbers"
        raise DataError(f"{path}: {found}, such as {missing[0]}: they cannot be put in their place")
    return np.array(rows)


def check_planes(path: Path, slices: list[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of rows and columns (3,) and PixelSpacing (2,), which must be those of every plane."""
    sizes = np.array([(one.ds.Rows, one.ds.Columns) for one in slices], float)
    check_equal(path, slices, "Rows, Columns", sizes, 0)
    reach = SHIFT / sizes.max()  # what moves the far end of a row by 0.1 voxel
    read_numbers(path, slices, "ImagePositionPatient", 3)
    orientation = read_numbers(path, slices, "ImageOrientationPatient", 6)
    orientation = check_equal(path, slices, "ImageOrientationPatient", orientation, reach)
    right, down = orientation[:3], orientation[3:]
    lengths = np.linalg.norm([right, down], axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(right @ down) > 0.01:
        found = orientation.tolist()
        raise DataError(
            f"{path}: ImageOrientationPatient {found}, expected two perpendicular unit vectors"
        )
    spacing = read_numbers(path, slices, "PixelSpacing", 2)
    if spacing.min() <= 0:
        raise DataError(f"{path}: PixelSpacing {spacing.min()}, expected more than 0")
    return right, down, check_equal(path, slices, "PixelSpacing", spacing, reach * spacing.min())


def check_equal(
    path: Path, slices: list[Slice], keyword: str, values: np.ndarray, tolerance: float
) -> np.ndarray:
    """The commonest row of `values` (N, n). Raises DataError naming the planes that differ from it."""
    rows = [tuple(row) for row in values.round(6).tolist()]
    common = rows.index(Counter(rows).most_common(1)[0][0])
    apart = np.abs(values - values[common]).max(1)
    differing = np.flatnonzero(apart > tolerance)
    if len(differing):
        one = slices[differing[0]]
        name = one.name
        if "LOCALIZER" in str(one.plane.get("ImageType")).upper():
            name += " (a localizer)"
        if len(differing) > 1:
            name += f" and {len(differing) - 1} more"
        found = f"{keyword} {values[differing[0]].tolist()} in {name}"
        usual = f"{values[common].tolist()} in the other {len(rows) - len(differing)}"
        raise DataError(f"{path}: {found}, {usual}; expected one stack")
    return values[common]


def check_doubles(path: Path, slices: list[Slice], along: np.ndarray) -> None:
    """Raise DataError if several planes share a position; `along` (N,) in mm along the normal, sorted."""
    number = np.concatenate([[0], np.cumsum(np.diff(along) > 0.01)])
    counts = np.bincount(number)
    if counts.max() == 1:
        return
    first = slices[0]
    differing = [
        keyword
        for keyword in VARYING
        if len(
            {str(one.plane.get(keyword)) for one, k in zip(slices, number, strict=True) if k == 0}
        )
        > 1
    ]
    what = f" that differ in {', '.join(differing)}" if differing else ""
    if counts.min() == counts.max():
        found = f"{len(counts)} positions with {counts[0]} images each{what}, such as {first.name}"
        raise DataError(
            f"{path}: {found}: a time series, echoes or copies; expected one image a position"
        )
    pair = int(np.argmax(np.diff(number) == 0))
    names = f"{slices[pair].name} and {slices[pair + 1].name}"
    where = f"{along[pair] - along[0]:.4g} mm from the first slice"
    doubled = f"{int((counts > 1).sum())} of {len(counts)} positions are doubled"
    raise DataError(
        f"{path}: {doubled}: {names} lie in one place, {where}; expected one image a position"
    )


def fit_distances(path: Path, slices: list[Slice], along: np.ndarray) -> tuple[float, float]:
    """Place of the first plane and distance of the planes, in mm along the normal: a line through `along`.

    A line and not two neighbours, because positions are rounded in the header: 0, 0.6, 1.2, 1.9 for 0.625 mm.
    """
    if len(along) == 1:
        thickness = read_numbers(path, slices, "SliceThickness", 1)[0, 0]
        if thickness <= 0:
            raise DataError(
                f"{path}: one slice with SliceThickness {thickness}, expected more than 0"
            )
        return float(along[0]), float(thickness)
    number = np.arange(len(along))
    middle = (len(along) - 1) / 2
    step = (number - middle) @ (along - along.mean()) / ((number - middle) ** 2).sum()
    start = along.mean() - middle * step
    if np.abs(along - start - number * step).max() > SHIFT * step:
        gaps = np.diff(along)
        k = int(np.argmax(gaps))
        usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
        between = f"{slices[k].name} and {slices[k + 1].name} are {gaps[k]:.4g} mm apart"
        if gaps[k] > 1.5 * usual:
            count = sum(max(0, round(gap / usual) - 1) for gap in gaps.tolist())
            raise DataError(
                f"{path}: missing slices: {count}; {between}, the others {usual:.4g} mm"
            )
        raise DataError(
            f"{path}: slices at distances from {gaps.min():.4g} to {gaps[k]:.4g} mm: {between}"
        )
    return float(start), float(step)


def check_drift(
    path: Path, slices: list[Slice], positions: np.ndarray, axes: np.ndarray, spacing: np.ndarray
) -> None:
    """Raise DataError unless the sorted planes lie straight above each other.

    `positions` (N, 3) in mm, `axes` (2, 3) along the rows and columns, `spacing` (2,) along those.
    """
    aside = (positions - positions[0]) @ axes.T  # (N, 2) in mm
    if np.abs(aside / spacing).max() <= SHIFT:
        return
    number = np.arange(len(aside)) - (len(aside) - 1) / 2
    slope = number @ (aside - aside.mean(0)) / (number**2).sum()
    bent = np.abs(aside - aside.mean(0) - number[:, None] * slope) / spacing
    drift = np.linalg.norm(aside[-1])
    if bent.max() <= SHIFT:
        length = np.linalg.norm(positions[-1] - positions[0])
        angle = np.degrees(np.arcsin(min(1.0, drift / length)))
        raise DataError(
            f"{path}: the slices drift by {drift:.4g} mm in their plane over {length:.4g} mm (gantry tilt of "
            f"{angle:.1f} degrees), expected a box: dcm2niix converts the series and corrects it"
        )
    from_middle = np.linalg.norm(aside - np.median(aside, 0), axis=1)
    k = int(np.argmax(from_middle))
    raise DataError(
        f"{path}: {slices[k].name} lies {from_middle[k]:.4g} mm aside of the other slices in their plane, "
        "expected a box"
    )


def note_slices(slices: list[Slice], notes: list[tuple[str, str]]) -> None:
    """Note what was changed or doubted in a series that can be read."""
    if any(is_inverted(one.ds) for one in slices):
        notes.append(("MONOCHROME1: the gray values are inverted", ""))
    tilts = [one.plane.get("GantryDetectorTilt") for one in slices]
    tilts = [abs(float(tilt)) for tilt in tilts if isinstance(tilt, (int, float))]
    if max(tilts, default=0) > 0.1:
        detail = f"{max(tilts):.4g} degrees"
        notes.append(
            ("GantryDetectorTilt, but the positions are a box: the positions are believed", detail)
        )


def is_inverted(ds: pydicom.Dataset) -> bool:
    return str(ds.get("PhotometricInterpretation") or "").strip().upper() == "MONOCHROME1"


def read_plane(path: Path, one: Slice) -> np.ndarray:
    """Modality values float32 (X, Y) of a plane; MONOCHROME1 is inverted within the bits stored."""
    if one.ds.Rows * one.ds.Columns > 2**27:  # a few bytes can claim any size
        raise DataError(
            f"{path / one.name}: {one.ds.Rows} x {one.ds.Columns} pixels, expected at most 2^27"
        )
    try:
        pixels = pixel_array(one.ds, index=one.frame)
        if is_inverted(one.ds):
            highest = 2**one.ds.BitsStored - 1 if one.ds.PixelRepresentation == 0 else -1
            pixels = highest - pixels.astype(np.int64)
        for keyword, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            if one.plane.get(keyword) in (None, ""):
                setattr(one.plane, keyword, default)
        if float(one.plane.RescaleSlope) == 0:
            raise DataError(f"{path / one.name}: RescaleSlope 0, expected another number")
        return apply_modality_lut(pixels, one.plane).T.astype(np.float32)
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like
        where = path / one.name if path.is_dir() else path
        raise explain(where, error) from error


# --- images and masks ---


def explain(path: Path, error: Exception) -> DataError:
    """An exception of a reader as one line that names the file."""
    if isinstance(error, MemoryError):
        return DataError(f"{path}: not enough memory for it ({str(error) or 'MemoryError'})")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: not found")
    reason = " ".join(str(error).split())
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return DataError(f"{path}: cut or damaged ({reason})")
    hint = '; more decoders: pip install "pylibjpeg[all]"' if "plugins" in reason else ""
    return DataError(f"{path}: {type(error).__name__}: {reason}{hint}")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its preamble or, without one, by its suffix."""
    with open(path, "rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima")


def read_volume(
    path: Path, notes: list[tuple[str, str]] | None = None
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header | None]:
    """Read .nii, .nii.gz or a DICOM series: float32 (X, Y, Z, C) in the axes of the file, affine, header.

    The affine (4, 4) leads to RAS in mm, whatever the unit of the file. The header is None for DICOM.
    `notes` gets (what, detail) of what is odd. Raises DataError that names the file for whatever keeps it
    from being a volume with content.
    """
    notes = [] if notes is None else notes
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise DataError(f"{path}: neither a file nor a folder")
        if path.is_dir() or is_dicom(path):
            volume, affine = read_series(path, notes)
            header = None
        else:
            volume, affine, header = read_nifti(path, np.float32, notes)
    except DataError:
        raise
    except Exception as error:  # the one place where the readers' many exceptions become ours
        raise explain(path, error) from error
    if volume.ndim == 3:
        volume = volume[..., None]
    longest = (np.array(volume.shape[:3]) * nib.affines.voxel_sizes(affine)).max()
    if not 1 <= longest <= 10_000:
        found = f"{longest:.4g} mm long by its header, expected 1 to 10000 mm"
        raise DataError(f"{path}: {found}: check pixdim and xyzt_units")
    if broken := int((~np.isfinite(volume)).sum()):
        raise DataError(f"{path}: {broken} voxels are NaN or infinite")
    if not all(volume[..., k].min() < volume[..., k].max() for k in range(volume.shape[3])):
        raise DataError(f"{path}: no contrast, all voxels (of a channel) have one value")
    return volume, affine, header


def read_channels(
    paths: list[Path], notes: list[tuple[str, str]] | None = None
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header | None]:
    """Read an image of one file with all channels, or of one file a channel: as `read_volume`.

    Raises DataError if the files do not lie on one grid.
    """
    volume, affine, header = read_volume(paths[0], notes)
    volumes = [volume]
    for path in paths[1:]:
        other, own, _ = read_volume(path, notes)
        check_same_grid(path, other.shape[:3], own, volume.shape[:3], affine)
        volumes.append(other)
    if len(volumes) == 1:
        return volume, affine, header
    for path, one in zip(paths, volumes, strict=True):
        if one.shape[3] != 1:
            raise DataError(
                f"{path}: {one.shape[3]} channels in one of {len(paths)} channel files, expected 1"
            )
    return np.concatenate(volumes, 3), affine, header


def check_same_grid(
    path: Path,
    shape: tuple[int, ...],
    own: np.ndarray,
    image_shape: tuple[int, ...],
    affine: np.ndarray,
) -> None:
    """Raise DataError unless a file has the shape of its image, and all corners within 0.1 voxel."""
    if shape != image_shape:
        raise DataError(f"{path}: shape {shape}, expected {image_shape} as its image")
    apart = corner_distance(own, affine, shape)
    if not apart <= SHIFT * nib.affines.voxel_sizes(affine).min():
        found, expected = own[:3].round(3).tolist(), affine[:3].round(3).tolist()
        raise DataError(
            f"{path}: affine {found}, expected {expected} as its image ({apart:.3g} mm apart)"
        )


def read_mask(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Read a mask, uint8 (X, Y, Z). Raises DataError unless it holds integers on its image's grid.

    A mask that names no unit may have that of its image: many programs drop it.
    """
    try:
        mask, own, header = read_nifti(path)
    except DataError:
        raise
    except Exception as error:  # as in read_volume
        raise explain(path, error) from error
    if int(header["xyzt_units"]) & 7 == 0:
        scaled = [np.diag([factor, factor, factor, 1]) @ own for factor in (1.0, *UNIT_MM.values())]
        own = min(scaled, key=lambda candidate: corner_distance(candidate, affine, shape))
    check_same_grid(path, mask.shape, own, shape, affine)
    whole = np.rint(mask) if mask.dtype.kind == "f" else mask
    if not np.all(np.abs(mask - whole) <= 1e-3):
        raise DataError(
            f"{path}: mask of {mask.dtype} with values between the integers, expected 0, 1, 2, ..."
        )
    if whole.min() < 0 or whole.max() > 255:
        raise DataError(
            f"{path}: mask values {whole.min():g} to {whole.max():g}, expected 0 to 255"
        )
    return whole.astype(np.uint8)


def write_mask(
    path: Path,
    mask: np.ndarray,
    affine: np.ndarray,
    header: nib.Nifti1Header | None,
    description: bytes = b"",
) -> None:
    """Write uint8 (X, Y, Z) with the forms, codes and unit of the image's header; of DICOM with the affine.

    What the header says of the image's values (window, intent, file of colours) does not hold for classes.
    """
    if header is None:
        nifti = nib.Nifti1Image(mask, affine)
        nifti.header.set_xyzt_units("mm")
        nifti.set_qform(affine, 1)
        nifti.set_sform(affine, 1)
    else:
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        nifti = kind(mask, None, header)
    nifti.set_data_dtype(np.uint8)
    nifti.header["cal_min"] = nifti.header["cal_max"] = 0
    nifti.header.set_intent("none")
    nifti.header["aux_file"] = b""
    if description:
        nifti.header["descrip"] = description
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


def check_grid(path: Path, shape: tuple[int, ...], spacing: np.ndarray, meta: dict) -> None:
    """Raise DataError if a volume in RAS gets an impossible common grid: its unit or spacing is wrong."""
    grid = grid_shape(shape, spacing, meta)
    if meta["resample"] and (math.prod(grid) > MAX_GRID or max(grid) < 2):
        found = f"{show_size(np.array(shape))} voxels of {show_size(spacing)} mm"
        made = f"{show_size(np.array(grid))} voxels of {show_size(np.array(meta['spacing']))} mm"
        raise DataError(
            f"{path}: {found} would become {made}: check its pixdim and unit, or --spacing"
        )


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
        return (channel.clip(constants["low"], constants["high"]) - constants["mean"]) / constants[
            "std"
        ]
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
    with np.errstate(over="ignore"):  # check_range names it
        for k, constants in enumerate(meta["normalisation"]):
            image[k] = resample(normalise(volume[k], constants), shape)
    return image


def check_range(path: Path, image: np.ndarray) -> None:
    """Raise DataError if a normalised image does not fit into float16."""
    if not np.isfinite(image).all():
        raise DataError(
            f"{path}: normalised values beyond 65504, which float16 cannot hold: the object has almost no "
            "contrast of its own beside its background; check its values"
        )


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
    images: list[Path]  # one file with all channels, or one file a channel
    mask: Path
    split: str = ""  # "test": official test case with a mask


def volume_name(path: Path) -> str:
    """The name of a file without .nii or .nii.gz, in any case."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def has_control(text: str) -> bool:
    """Whether a name has control characters, which would reach the screen from index.csv."""
    return any(unicodedata.category(c) == "Cc" for c in text)


def list_volumes(folder: Path) -> tuple[list[Path], list[Path]]:
    """The .nii and .nii.gz files of a folder, and what else lies there; hidden files (macOS's ._) do not."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    inside = [path for path in inside if path.name[0] != "."]
    volumes = [path for path in inside if path.is_file() and volume_name(path) != path.name]
    return volumes, [path for path in inside if path not in volumes]


def list_by_name(folder: Path, bad: list[tuple[Path, str]]) -> dict[str, Path]:
    """The volumes of a folder by name. What looks like one and cannot be used goes to `bad`."""
    volumes, others = list_volumes(folder)
    names = defaultdict(list)
    for path in volumes:
        names[volume_name(path)].append(path)
    for paths in names.values():
        for path in paths if len(paths) > 1 else []:
            bad.append((path, f"{path}: one of {len(paths)} files of this name, expected one"))
    for name in [name for name in names if has_control(name)]:
        for path in names.pop(name):
            bad.append((path, one_line(f"{path}: control characters in the name: rename the file")))
    for path in others:
        if volume_name(path) != path.name:
            bad.append((path, f"{path}: a folder or a broken link, expected a file"))
    others = [path for path in others if volume_name(path) == path.name]
    if others:
        found = count_kinds(dict.fromkeys(others))
        print(
            f"note: {folder}: left out, because no .nii or .nii.gz: {found}, such as {others[0].name}"
        )
    return {name: paths[0] for name, paths in names.items() if len(paths) == 1}


def split_channel(name: str) -> tuple[str, int | None]:
    """nnU-Net's NAME_0001 as NAME and 1; other names as they are and None."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], int(match[2])) if match else (name, None)


def match_channels(images: dict[str, Path], masks: dict[str, Path]) -> dict[str, dict[int, Path]]:
    """The files of each image by channel: NAME is the mask's name, or NAME_0000, NAME_0001, ... (nnU-Net)."""
    channels = defaultdict(dict)
    for name, path in images.items():
        stem, number = split_channel(name)
        if number is None or name in masks or stem in images or stem not in masks:
            channels[name][0] = path
        else:
            channels[stem][number] = path
    return channels


def pair_masks(raw: Path, part: str, split: str) -> tuple[list[Case], list[tuple[Path, str]]]:
    """The cases of imagesTr and labelsTr, or Ts, and (file, reason) for every file that is of none."""
    bad: list[tuple[Path, str]] = []
    images = list_by_name(raw / f"images{part}", bad)
    masks = list_by_name(raw / f"labels{part}", bad)
    if split and not masks:
        if images:
            print(f"note: {len(images)} images in imagesTs have no masks and are left out")
        return [], []
    cases = []
    channels = match_channels(images, masks)
    for name, files in sorted(channels.items()):
        paths = [files[number] for number in sorted(files)]
        lost = sorted(set(range(max(files))) - set(files))
        if name not in masks:
            bad += [(path, f"{path}: no file of that name in labels{part}") for path in paths]
        elif lost:
            reason = f"channel {name}_{lost[0]:04d} is missing beside it"
            bad += [(path, f"{path}: {reason}") for path in paths]
        else:
            cases.append(Case(name, paths, masks[name], split))
    for name in sorted(masks.keys() - channels.keys()):
        bad.append((masks[name], f"{masks[name]}: no file of that name in images{part}"))
    return cases, bad


def find_cases(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """The cases of an MSD or nnU-Net folder, and (file, reason) for every file that cannot be used."""
    cases, bad = pair_masks(raw, "Tr", "")
    test_cases, test_bad = pair_masks(raw, "Ts", "test")
    cases += test_cases
    bad += test_bad
    if not cases:
        for _, reason in bad:
            print(reason, file=sys.stderr)
        inside = sorted(p.name for p in raw.iterdir())[:5] if raw.is_dir() else "no folder"
        raise DataError(
            f"{raw}: found {inside}, expected imagesTr/NAME.nii.gz and labelsTr/NAME.nii.gz"
        )
    if double := [name for name, count in Counter(case.id for case in cases).items() if count > 1]:
        raise DataError(
            f"{raw}: {double[0]} is in imagesTr and in imagesTs, expected different names"
        )
    return cases, [(path.relative_to(raw).as_posix(), reason) for path, reason in bad]


def refuse_doubles(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, but a key that stands there twice is an error: its first value would be lost."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return dict(pairs)


def read_description(raw: Path) -> tuple[dict[int, str] | None, list[str] | str | None]:
    """Class names by mask value, and channel names, of dataset.json; None for what it does not say.

    A string instead of channel names ("modality": "MRI") is what all channels are.
    """
    path = raw / "dataset.json"
    if not path.is_file():
        return None, None
    try:
        description = json.loads(
            path.read_bytes(), object_pairs_hook=refuse_doubles
        )  # by its BOM, if any
        labels = description.get("labels")
        channels = description.get("channel_names", description.get("modality"))
        if labels:
            labels = read_labels(path, labels)
        if isinstance(channels, dict):
            channels = [str(channels[k]) for k in sorted(channels, key=int)]
    except DataError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: {error}, expected labels and modality as in the Decathlon"
        ) from error
    if labels and (min(labels) != 0 or max(labels) > 255 or len(labels) < 2):
        raise DataError(f"{path}: labels {labels}, expected 0 = background and others up to 255")
    return labels or None, channels or None


def read_labels(path: Path, labels: dict) -> dict[int, str]:
    """Class names by mask value, of {"0": "background"} or, newer, {"background": 0}.

    Raises DataError unless they are one to one: a class would be left out of the mean Dice.
    """
    names: dict[int, str] = {}
    for key, value in labels.items():
        name, number = (value, key) if str(key).isdigit() else (key, value)
        name = str(name).strip()
        if isinstance(number, list) or isinstance(value, list):
            found = f"label {name!r} is {number}: overlapping regions are not supported"
            raise DataError(
                f"{path}: {found}; give each voxel one class, and each class one number"
            )
        if name.lower() == "ignore":
            found = "label 'ignore': voxels that do not count (nnU-Net) are not supported"
            raise DataError(f"{path}: {found}; give them the number of a class")
        number = int(number)
        if number in names or name in names.values():
            found = (
                f"label {name!r} with number {number}: another label has this name or this number"
            )
            raise DataError(f"{path}: {found}; expected each once")
        names[number] = name
    return dict(sorted(names.items()))


def inspect(case: Case, values: list[int] | None) -> dict | DataError:
    """Read and check one case; what has to be known of all cases before the first is written."""
    notes: list[tuple[str, str]] = []
    try:
        volume, affine, _ = read_channels(case.images, notes)
        mask = read_mask(case.mask, volume.shape[:3], affine)
        found = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)).tolist()
        if values and not set(found) <= set(values):
            raise DataError(f"{case.mask}: mask values {found}, expected {values}")
        orientation, spacing = orient(affine)
        shape = [volume.shape[axis] for axis in np.argsort(orientation[:, 0])]
        foreground = volume[mask > 0]
        return {"digest": hash_pixels(volume), "mask": hash_pixels(mask), "shape": shape,
                "spacing": spacing, "channels": volume.shape[3], "values": found, "notes": notes,
                "foreground": foreground[:: len(foreground) // 10_000 + 1]}  # fmt: skip
    except DataError as error:
        return error
    except MemoryError as error:
        return explain(case.images[0], error)


# --- patients and folds ---


def match_patient(regex: str, text: str) -> str:
    """What a regular expression finds in a file name: its first group, or all of it; "" for no match."""
    match = re.search(regex, text)
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group()) or ""


def find_patients(names: list[str], regex: str) -> list[str]:
    """The patient in each file name. Raises DataError for names without one."""
    patients = [match_patient(regex, name) for name in names]
    unmatched = [name for name, patient in zip(names, patients, strict=True) if not patient]
    if unmatched:
        raise DataError(
            f"--patient-regex {regex!r} finds nothing in {len(unmatched)} names: {unmatched[0]}"
        )
    return patients


def suggest_regex(names: list[str]) -> None:
    """Note names that look like several scans of a patient: patient001_frame01, patient001_frame12."""
    starts = [re.match(r".*?\d+(?=[_-])", name) for name in names]
    patients = {start.group() for start in starts if start}
    if all(starts) and 1 < len(patients) < len(names):
        print(
            f"note: {len(names)} cases look like {len(patients)} patients, such as {min(patients)}; "
            'if so, keep the scans of each in one fold: --patient-regex "^.*?[0-9]+(?=[_-])"'
        )


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
    return str(
        1 + int(digest[8:16], 16) % (FOLDS - 1) if has_val else int(digest[8:16], 16) % FOLDS
    )


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
            print(
                f"note: {' and '.join(names)} are one image with {masks} masks, in fold {', '.join(where)}"
            )
    return report


# --- the command ---


def check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise DataError if an output is an input by whatever name (links too), or a folder that holds one."""
    targets = {path.resolve() for path in outputs}
    files = {
        (status.st_dev, status.st_ino)
        for status in (path.stat() for path in targets if path.is_file())
    }
    for path in inputs:
        real = path.resolve()
        status = real.stat() if real.exists() else None
        if targets & {real, *real.parents} or (status and (status.st_dev, status.st_ino) in files):
            raise DataError(f"{path}: would be overwritten by a result; give another --out")


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


@contextmanager
def open_output(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes OUT at the end: a run that is stopped leaves OUT as it was.

    Raises DataError if OUT holds anything but a cache (--overwrite never deletes what is not ours), if
    another run writes to it (the lock ends with the process), or if something cannot be written.
    """
    partial, old, lock = (
        out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old", "lock")
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            if fcntl:  # not on Windows
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(
                f"{out}: another run writes here; wait for it, or use another --out"
            ) from error
        try:
            if old.exists() and not out.exists():  # stopped between the two renames below
                old.rename(out)
            check_output(out, overwrite)
            for left_over in (partial, old):
                shutil.rmtree(left_over, ignore_errors=True)
            partial.mkdir()
            yield partial
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:  # without a number: numpy, for a file that came out too short
            reason = error.strerror or f"{os.strerror(errno.ENOSPC)}? {error}"
            raise DataError(f"{error.filename or out}: {reason}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise DataError if OUT holds anything but a cache, or a cache that nobody said may go."""
    found = (
        {p.name for p in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    )
    ours = {"images.npy", "volumes", "index.csv", "meta.json", "skipped.csv"}
    if found and not {"meta.json"} <= found <= ours:
        raise DataError(
            f"{out}: holds {min(found - ours or found)}, expected a new folder or a cache"
        )
    if found and not overwrite:
        raise DataError(f"{out}: exists already; use --overwrite, or another --out")


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
        raise DataError(
            f"{where}: {type(meta).__name__}, expected names and values; preprocess again"
        )
    classes, values, channels, shape = (
        meta.get(k) for k in ("classes", "values", "channels", "shape")
    )
    spacing, normalisation = meta.get("spacing"), meta.get("normalisation")
    good = {
        "classes": isinstance(classes, list) and len(set(map(str, classes))) == len(classes) >= 2,
        "values": isinstance(values, list)
        and all(type(v) is int and 0 <= v <= 255 for v in values),
        "channels": isinstance(channels, list) and len(channels) >= 1,
        "resample": type(meta.get("resample")) is bool,
        "spacing": isinstance(spacing, list)
        and len(spacing) == 3
        and all(is_number(s, 0) for s in spacing),
        "slice_axis": meta.get("slice_axis") in (0, 1, 2),
        "shape": isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and n > 0 for n in shape),
        "normalisation": isinstance(normalisation, list)
        and all(map(is_normalisation, normalisation)),
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
    add("--patient-regex", help="finds the patient in a file name, as its first group if any: cases of one "
        "patient share a fold (default: each case is a patient)")  # fmt: skip
    add(
        "--test-fraction",
        type=float,
        default=0.0,
        help="part of the cases kept as test (default: 0)",
    )
    add("--like", type=Path, metavar="CACHE", help="a test set for the models of this cache: its classes, "
        "spacing and normalisation, every row test")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="threads, each with a volume in memory "
        "(default: %(default)s)")  # fmt: skip
    add(
        "--skip-bad",
        action="store_true",
        help="leave unusable cases out and list them in skipped.csv",
    )
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
            parser.error(
                f"--spacing {' '.join(args.spacing)}, expected three numbers, median or keep"
            )
        if len(args.spacing) != 3 or not all(0.01 <= value <= 100 for value in args.spacing):
            parser.error(f"--spacing {args.spacing}, expected three numbers from 0.01 to 100")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    try:
        re.compile(args.patient_regex or "")
    except re.error as error:
        parser.error(f"--patient-regex {args.patient_regex!r}: {error}")
    return args


def check_together(
    cases: list[Case], found: list, labels: dict[int, str] | None, channels: list[str] | str | None
) -> tuple[dict[int, str], list[str]]:
    """Class and channel names if dataset.json has none; puts a DataError in `found` where a case differs."""
    good = [info for info in found if isinstance(info, dict)]
    if labels is None:
        labels = name_values({value for info in good for value in info["values"]})
    if not isinstance(channels, list):
        count = Counter(info["channels"] for info in good).most_common(1)[0][0] if good else 1
        name = channels or "channel"
        channels = [name] if channels and count == 1 else [f"{name} {k}" for k in range(count)]
    for k, info in enumerate(found):
        if isinstance(info, dict) and not set(info["values"]) <= set(labels):
            expected = f"{sorted(labels)} without gaps, or a dataset.json that names the others"
            found[k] = DataError(
                f"{cases[k].mask}: mask values {info['values']}, expected {expected}"
            )
        elif isinstance(info, dict) and info["channels"] != len(channels):
            names = " and ".join(str(path) for path in cases[k].images)
            reason = f"{info['channels']} channels, expected {channels}"
            hint = "; time is no channel" if info["channels"] > len(channels) else ""
            found[k] = DataError(f"{names}: {reason}{hint}")
    return labels, channels


def name_values(seen: set[int]) -> dict[int, str]:
    """Class names by mask value without a dataset.json: 0, 1, 2, ... without gaps, or 0 and 255."""
    if seen == {0, 255}:
        print("note: the masks hold 0 and 255: 255 is taken as class 1; predictions hold 255 too")
        return {0: "background", 255: "1"}
    n = 1
    while n in seen:
        n += 1
    return {value: "background" if value == 0 else str(value) for value in range(n)}


def drop_bad(
    cases: list[Case], found: list, bad: list[tuple[str, str]], skip_bad: bool
) -> tuple[list[Case], list]:
    """Cases without those whose `found` is a DataError, which is printed and put into `bad`.

    Raises DataError if there are any, unless they may be skipped and something is left.
    """
    errors = [(case.id, str(one)) for case, one in zip(cases, found, strict=True)
              if isinstance(one, DataError)]  # fmt: skip
    for _, reason in errors:
        print(reason, file=sys.stderr)
    bad += errors
    kept = [k for k, one in enumerate(found) if not isinstance(one, DataError)]
    if bad and not (skip_bad and kept):
        raise DataError(f"{len(bad)} cases or files cannot be used: mend them, or use --skip-bad")
    return [cases[k] for k in kept], [found[k] for k in kept]


def print_notes(cases: list[Case], found: list[dict]) -> None:
    """What is odd in the headers, one line for each kind of oddity."""
    kinds = defaultdict(list)
    for case, info in zip(cases, found, strict=True):
        for what, detail in info["notes"]:
            kinds[what].append((case, detail))
    for what, members in kinds.items():
        case, detail = members[0]
        names = f"{case.id} and {len(members) - 1} more" if len(members) > 1 else case.id
        print(f"note: {names}: {what}" + (f" ({detail})" if detail else ""))


def split_cases(
    cases: list[Case], found: list[dict], args: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """Patient group and fold of each case; with --like all are test."""
    patients = [case.id for case in cases]
    if args.patient_regex:
        patients = find_patients([case.images[0].name for case in cases], args.patient_regex)
    groups = group_patients(patients, [info["digest"] for info in found])
    folds = []
    for group, case in zip(groups, cases, strict=True):
        folds.append(
            "test" if args.like else assign_fold(group, case.split, False, args.test_fraction)
        )
    sides = defaultdict(set)
    for group, fold in zip(groups, folds, strict=True):
        sides[group].add(fold == "test")
    both = sorted(group for group, found_in in sides.items() if len(found_in) > 1)
    if both:
        print(f"note: patients on both sides of the official split: {len(both)}, such as {both[0]}")
    if not args.like and set(folds) == {"test"}:
        raise DataError(
            f"{args.data}: only test cases; for an external test set use --like TRAIN_CACHE"
        )
    return groups, folds


def plan_cache(
    cases: list[Case],
    found: list[dict],
    args: argparse.Namespace,
    like: dict,
    labels: dict[int, str],
    channels: list[str],
) -> tuple[list[str], list[str], dict]:
    """Patient groups and folds of the cases, and what meta.json says of the grid and the classes."""
    groups, folds = split_cases(cases, found, args)
    training = [info for info, fold in zip(found, folds, strict=True) if fold != "test"]
    return groups, folds, like or describe(training, args.spacing, labels, channels)


def grid_error(case: Case, info: dict, meta: dict) -> DataError | dict:
    """The case as it is, or why it cannot be put on the common grid."""
    try:
        check_grid(case.images[0], info["shape"], info["spacing"], meta)
    except DataError as error:
        return error
    return info


def is_ct(channel: str) -> bool:
    """Whether a modality or channel name is one of the names of CT: CT, "CT scan", CTA, CBCT, ..."""
    words = set(re.split(r"[^A-Z0-9]+", channel.upper()))
    names = {
        "CT",
        "CTA",
        "CTPA",
        "CCTA",
        "CBCT",
        "CECT",
        "NCCT",
        "HRCT",
        "LDCT",
        "MDCT",
        "MSCT",
        "DECT",
    }
    return (
        bool(words & names and not words & {"PET", "SPECT"}) or {"COMPUTED", "TOMOGRAPHY"} <= words
    )


def show_normalisation(constants: dict | None) -> str:
    if constants is None:
        return "each image to mean 0, deviation 1"
    return f"as CT: clipped to {constants['low']:.4g} .. {constants['high']:.4g}"


def describe(
    training: list[dict], spacing: list, labels: dict[int, str], channels: list[str]
) -> dict:
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
        if is_ct(name):
            low, high = np.percentile(foreground[:, k], (0.5, 99.5)).tolist()
            values = foreground[:, k].clip(low, high).astype(np.float64)
            constants[k] = {"low": low, "high": high, "mean": float(values.mean()),
                            "std": float(values.std()) or 1.0}  # fmt: skip
    return meta | {"shape": np.median(shapes, 0).astype(int).tolist(), "normalisation": constants}


def convert(case: Case, folder: Path, meta: dict) -> DataError | None:
    """Write the four files of a case; returns why if it cannot be done."""
    try:
        volume, affine, header = read_channels(case.images)
        mask = read_mask(case.mask, volume.shape[:3], affine)
        image = to_grid(volume, affine, meta)
        check_range(case.images[0], image)
        labels = mask_to_grid(mask, affine, meta)
    except MemoryError as error:
        return explain(case.images[0], error)
    except DataError as error:
        return error
    write_mask(folder / f"{case.id}.truth.nii.gz", mask, affine, header)
    np.save(folder / f"{case.id}.image.npy", image)
    np.save(folder / f"{case.id}.mask.npy", labels)
    rng, points = np.random.default_rng(0), [np.empty((0, 4), np.int16)]
    for k in range(1, len(meta["classes"])):
        where = np.argwhere(labels == k)
        where = where[rng.permutation(len(where))[:1000]]
        points.append(np.insert(where, 0, k, axis=1).astype(np.int16))
    np.save(folder / f"{case.id}.points.npy", np.concatenate(points))
    return None


def write_index(
    path: Path, raw: Path, cases: list[Case], groups: list[str], folds: list[str]
) -> None:
    """index.csv, a row a case; the files of channels are joined by semicolons."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "group", "fold", "image", "mask"))
        for case, group, fold in zip(cases, groups, folds, strict=True):
            images = ";".join(image.relative_to(raw).as_posix() for image in case.images)
            writer.writerow((case.id, group, fold, images, case.mask.relative_to(raw).as_posix()))


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
    check_outputs([out], [path for case in cases for path in (*case.images, case.mask)])
    with open_output(out, args.overwrite) as folder:
        for _, reason in bad:
            print(reason, file=sys.stderr)
        found = list(
            in_threads(partial(inspect, values=labels and list(labels)), cases, args.workers)
        )
        labels, channels = check_together(cases, found, labels, channels)
        cases, found = drop_bad(cases, found, bad, args.skip_bad)

        # groups, folds, the grid
        plan = partial(plan_cache, args=args, like=like, labels=labels, channels=channels)
        groups, folds, meta = plan(cases, found)
        checked = [grid_error(case, info, meta) for case, info in zip(cases, found, strict=True)]
        if any(isinstance(one, DataError) for one in checked):
            cases, found = drop_bad(cases, checked, bad, args.skip_bad)
            groups, folds, meta = plan(cases, found)
        print_notes(cases, found)
        if not args.patient_regex and not like:
            suggest_regex([case.id for case in cases])
        kind = f"to {meta['spacing']} mm" if meta["resample"] else "each on its own grid"
        names = [
            f"{name} ({show_normalisation(constants)})"
            for name, constants in zip(meta["channels"], meta["normalisation"], strict=True)
        ]
        print(f"classes {' '.join(meta['classes'])}; channels {' '.join(names)}; {kind}")

        # the arrays and the index
        (folder / "volumes").mkdir()
        write = partial(convert, folder=folder / "volumes", meta=meta)
        failed = [error or info for error, info in
                  zip(in_threads(write, cases, args.workers), found, strict=True)]  # fmt: skip
        if any(isinstance(one, DataError) for one in failed):
            cases, found = drop_bad(cases, failed, bad, args.skip_bad)
            groups, folds = split_cases(cases, found, args)
        if bad:
            with open(folder / "skipped.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("source", "reason"), *bad])
        counts = Counter(folds)
        print("  ".join(f"fold {fold}: {counts[fold]}" for fold in sorted(counts)))
        write_index(folder / "index.csv", args.data, cases, groups, folds)
        meta |= {
            "n": len(cases), "counts": dict(counts), "copies": report_copies(cases, folds, found),
            "empty": sum(info["values"] == [0] for info in found), "skipped": len(bad),
            "options": {k: str(v) for k, v in vars(args).items() if v},
            "versions": {m.__name__: m.__version__ for m in (np, nib)},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    command = "eval.py --checkpoint runs/segmentation/best.pt --split test" if like else "train.py"
    print(f"next: python segmentation/{command} --data {args.out}")


def run_command(main: Callable, *errors: type) -> None:
    """Run a script's main: what the user can mend, or stopped, is one line; a bug keeps its traceback."""
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # a screen may lack the letters of a file's name
    warnings.filterwarnings(
        "ignore", module=r"pydicom|PIL|nibabel"
    )  # header slips, some for every file
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
