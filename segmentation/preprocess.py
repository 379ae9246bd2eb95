"""Turn MR or CT volumes, or pictures, with masks into arrays on a common grid and an index.

  python segmentation/preprocess.py --data Task04_Hippocampus --out data/hippocampus
  python segmentation/preprocess.py --data left_atrium --out data/atrium --spacing 1.5 1.5 1.5
  python segmentation/preprocess.py --data acdc --out data/acdc --patient-regex "patient[0-9]+"
  python segmentation/preprocess.py --data lesions --out data/lesions
  python segmentation/preprocess.py --data other_hospital --out data/other --like data/atrium

RAW is a folder as in the Medical Segmentation Decathlon (MSD): imagesTr/NAME.nii.gz, 3D, or 4D with
the channels last, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ..., a file a channel; or
imagesTr/NAME, a folder with a DICOM series, or NAME.dcm, an enhanced file with all slices;
labelsTr/NAME.nii.gz; and dataset.json, which names labels and modalities. If there are imagesTs and
labelsTs, they become test cases. Without dataset.json classes are called by their values.

Or images/NAME and masks/NAME (or labels/), perhaps in official train/, val/ and test/: volumes, or
pictures (PNG, JPEG, TIFF), which are volumes of one slice. Their unit is the pixel, unless all of
them say a resolution.

In RAW there may be cases.csv (id and, if you like, patient, fold, and columns to keep) and the
splits_final.json of nnU-Net, whose folds are taken.

Written to OUT: index.csv (id, group, fold, image, mask), meta.json, and for each case in volumes/
  ID.image.npy     float16 (C, X, Y, Z) in RAS (right, front, top), resampled, normalised
  ID.mask.npy      uint8 (X, Y, Z), class numbers on the same grid
  ID.points.npy    int16 (N, 4), up to 1000 voxels of each class: class, x, y, z
  ID.truth.nii.gz  the mask as it was, with its image's affine and header, for eval.py
While it runs, OUT's disk also holds the voxels as they were read, 2 to 5 bytes each.

The sections of this file, in the order of execution:
  find   the cases of RAW, and in dataset.json the names of classes and channels
  read   every case once, NIfTI files or DICOM series, and check all that can be wrong with them
  split  the patients into folds, and choose the common grid by the training cases
  write  the arrays on that grid, index.csv and meta.json
  share  what the other scripts use as well: the way back to the file's grid, meta.json, errors
"""

import argparse
import csv
import ctypes
import errno
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

# Cases are read side by side, where NumPy's own threads for matrix products only wait for each
# other: 1.7 times as long on two cores. It looks this up when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import (
    apply_orientation,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Tag
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
    "picture_unit",  # px or mm; volumes have none
)
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
PICTURE_KINDS = "PNG, JPEG or TIFF"
RGB = ["red", "green", "blue"]
# Official splits by the names that their folders have, in any case
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
MASK_ENDING = r"[_-](mask|seg|segmentation|label)$"  # of a mask's name, in any case
NO_RESOLUTION = b"picture in pixels"  # in the header of a picture and its mask
DEFAULT_DPI = (72, 96)  # what programs write that know no resolution
AS_READ = "as_read"  # the folder of volumes that are read and not yet written
INDEX_COLUMNS = ("id", "group", "fold", "image", "mask")
FOLDS = 5
MAX_GRID = 2**30  # voxels of the common grid, 2 GiB a channel: what is more has a wrong unit
SHIFT = 0.1  # voxels: how far a slice or a corner may lie from where the affine puts it
POINTS = 1000  # voxels of each class, to draw patches at
# Of malloc.h, for mallopt
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
PR_SET_PDEATHSIG = 1  # of Linux, for prctl
SAMPLE = 10_000  # voxels of each case that the normalisation of CT is measured on
CHUNK = 2**16  # voxels at a time: NumPy makes 8-byte indices of them, which so stay in the cache

RAS = [[0, 1], [1, 1], [2, 1]]  # nibabel's way to say: every axis stays, none is flipped
LPS_TO_RAS = np.diag([-1, -1, 1, 1])  # DICOM's axes point to the left, back and top
UNIT_MM = {1: 1000.0, 3: 0.001}  # NIfTI's xyzt_units that are not mm: metre and micron
QUIET = logging.Logger(
    "repairs", logging.CRITICAL + 1
)  # nibabel's repairs of a header are not news
CT_NAME = r"CT|CTA|CTPA|CCTA|CBCT|CECT|NCCT|HRCT|LDCT|MDCT|MSCT|DECT"  # whole words
# What tells images at one position apart, for the message.
VARYING = (
    "EchoTime",
    "EffectiveEchoTime",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "DiffusionBValue",
    "TriggerTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "ImageType",
)

# What is odd in a header, in the same words each time, and its detail.
Notes = list[tuple[str, str]]
# Voxels (X, Y, Z, C) of the type that `compact` chooses, affine (4, 4) to RAS in mm, and the
# header; None for DICOM.
Volume = tuple[np.ndarray, np.ndarray, nib.Nifti1Header | None]


@dataclass
class Case:
    """A volume and its mask: where they are, what reading them shows, and where they go."""

    id: str
    images: list[Path]  # one file with all channels, or one file a channel
    mask: Path
    split: str = ""  # official split: train, val, test, a fold 0 to 4, or "" for none
    patient: str = ""  # by cases.csv
    more: dict[str, str] = field(default_factory=dict)  # further columns of cases.csv
    error: str = ""  # why it cannot be used

    # Set by `inspect`.
    shape: tuple[int, ...] = ()  # voxels along the RAS axes
    spacing: np.ndarray | None = None  # mm along the RAS axes, (3,)
    channels: int = 0
    values: list[int] = field(default_factory=list)  # all values in the mask
    foreground: np.ndarray | None = None  # a sample of the image inside the mask, float32 (N, C)
    digest: str = ""  # SHA-256 of the image
    mask_digest: str = ""
    affine: np.ndarray | None = None  # (4, 4) from voxels of the file to RAS in mm
    header: nib.Nifti1Header | None = None  # None for DICOM
    notes: Notes = field(default_factory=list)
    unit: str = "mm"  # of the spacing; px of a picture that does not say its resolution

    # Set by `split_cases`.
    group: str = ""
    fold: str = ""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw volumes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    spacing = (
        "of the common grid: X Y Z in mm, median (default: of the training cases), "
        "or keep (each volume keeps its own)"
    )
    add("--spacing", nargs="+", metavar="MM", help=spacing)
    regex = (
        "finds the patient in a file name, as its first group if any: cases of one patient share "
        "a fold (default: each case is a patient)"
    )
    add("--patient-regex", help=regex)
    test_fraction = "part of the cases kept as test (default: 0)"
    add("--test-fraction", type=float, default=0.0, help=test_fraction)
    like = (
        "a test set for the models of this cache: its classes, spacing and normalisation, "
        "every row test"
    )
    add("--like", type=Path, metavar="CACHE", help=like)
    add = parser.add_argument_group("run").add_argument
    workers = "processes, each with a volume in memory (default: %(default)s)"
    add("--workers", type=int, default=default_workers(), help=workers)
    skip_bad = "leave unusable cases out and list them in skipped.csv"
    add("--skip-bad", action="store_true", help=skip_bad)
    add("--overwrite", action="store_true", help="replace a finished cache in OUT")
    args = parser.parse_args(argv)

    if args.like and (args.spacing or args.test_fraction):
        parser.error("--like brings its spacing and makes every row test: leave those options out")
    if args.like and args.like.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the cache of --like: give another folder")
    args.spacing = args.spacing or ["median"]  # from here on that, ["keep"], or three numbers in mm
    if args.spacing not in (["median"], ["keep"]):
        try:
            args.spacing = [float(value) for value in args.spacing]
        except ValueError:
            given = " ".join(args.spacing)
            parser.error(f"--spacing {given}, expected three numbers, median or keep")
        if len(args.spacing) != 3 or not all(0.01 <= value <= 100 for value in args.spacing):
            parser.error(f"--spacing {args.spacing}, expected three numbers from 0.01 to 100")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    try:  # here, and not after the volumes have been read
        re.compile(args.patient_regex or "")
    except re.error as error:
        parser.error(f"--patient-regex {args.patient_regex!r}: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = describe_source(args)
    like = read_like(args.like)

    # Find. What cannot be used is collected, here and below, so that one run names all of it.
    cases, bad = find_cases(args.data)
    read_cases_table(args.data, cases)
    if not like:
        read_splits(args.data, cases, bad)
    labels, channels = read_description(args.data)
    if like:
        labels = like_labels(args, like, labels)
        channels = like["channels"]
    print(f"{args.data}: {len(cases)} cases with masks")
    out = args.out.resolve()
    check_outputs([out], list_inputs(cases))
    with open_output(out, args.overwrite) as folder:
        for _, reason in bad:
            print(reason, file=sys.stderr)

        # Read what has to be known of all cases before the first is written.
        (folder / AS_READ).mkdir()
        keep_memory()
        inspect_one = partial(inspect, values=list(labels or []), folder=folder / AS_READ)
        cases = [case for _, case in in_processes(inspect_one, cases, args.workers, part=1)]
        labels, channels = complete_names(cases, labels, channels)
        check_names(cases, labels, channels)
        cases = drop_bad(cases, bad, args.skip_bad)

        # Split into folds, and choose the common grid by the training cases.
        split_cases(cases, args)
        meta = like or describe(cases, args.spacing, labels, channels)
        check_grids(cases, meta)
        if any(case.error for case in cases):  # groups and medians are those of what is left
            cases = drop_bad(cases, bad, args.skip_bad)
            split_cases(cases, args)
            meta = like or describe(cases, args.spacing, labels, channels)
        note_both_sides([case.group for case in cases], [case.fold for case in cases])
        note_unit(cases, meta)
        print_notes(cases)
        if not args.patient_regex and not like:
            suggest_regex([case.id for case in cases])
        print_plan(meta)

        # Write the arrays, and then what says which of them there are.
        (folder / "volumes").mkdir()
        convert_one = partial(convert, folder=folder, meta=meta)
        cases = [case for _, case in in_processes(convert_one, cases, args.workers, part=1)]
        shutil.rmtree(folder / AS_READ)  # holds what check_grids has refused
        if any(case.error for case in cases):
            cases = drop_bad(cases, bad, args.skip_bad)
            split_cases(cases, args)
        if bad:
            write_rows(folder / "skipped.csv", [("source", "reason"), *bad])
        counts = Counter(case.fold for case in cases)
        print("  ".join(f"fold {fold}: {counts[fold]}" for fold in sorted(counts)))
        write_index(folder / "index.csv", args.data, cases)
        meta |= {
            "n": len(cases),
            "counts": dict(counts),
            "copies": report_copies(cases),
            "empty": sum(case.values == [0] for case in cases),
            "skipped": len(bad),
            # train.py tells by it whether this cache is still that of RAW
            **source,
            "versions": {module.__name__: module.__version__ for module in (np, nib)},
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    command = "train.py"
    if like:
        command = "eval.py --checkpoint runs/segmentation/best.pt --split test"
    print(f"next: python segmentation/{command} --data {args.out}")


# --- find: cases, classes and channels ---


def read_like(cache: Path | None) -> dict:
    """What of the meta.json of --like this cache takes over; empty without --like."""
    if cache is None:
        return {}
    return {name: value for name, value in read_meta(cache).items() if name in META}


def like_labels(
    args: argparse.Namespace, like: dict, labels: dict[int, str] | None
) -> dict[int, str]:
    """Class names by mask value of --like. Raises DataError if dataset.json says something else."""
    expected = dict(zip(like["values"], like["classes"], strict=True))
    if labels and labels != expected:
        raise DataError(f"{args.data}: labels {labels}, but {args.like} has {expected}")
    return expected


def find_cases(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """The cases of a folder in one of the layouts, and (file, reason) for every unusable file."""
    bad: list[tuple[Path, str]] = []
    cases = []
    for images, masks, split in find_folders(raw):
        cases += pair_masks(images, masks, split, bad)
    if not cases:
        for _, reason in bad:
            print(reason, file=sys.stderr)
        inside = "no folder"
        if raw.is_dir():
            inside = sorted(path.name for path in raw.iterdir())[:5]
        expected = "imagesTr/NAME.nii.gz and labelsTr/NAME.nii.gz, or images/NAME and masks/NAME"
        raise DataError(f"{raw}: found {inside}, expected {expected}")
    if any(is_picture(case.images[0]) for case in cases):
        name_by_split(cases)  # their names are mostly numbers, which start anew in each folder
    for name, count in Counter(case.id for case in cases).items():
        if count > 1:
            where = "is in imagesTr and in imagesTs"
            raise DataError(f"{raw}: {name} {where}, expected different names")
    return cases, [(path.relative_to(raw).as_posix(), reason) for path, reason in bad]


def find_folders(raw: Path) -> list[tuple[Path, Path, str]]:
    """Folders of images, those of their masks, and the official split ("" for none)."""
    found = [(raw / "imagesTr", raw / "labelsTr", ""), (raw / "imagesTs", raw / "labelsTs", "test")]
    parents = [(raw, "")]
    for name, folder in folders_by_name(raw).items():
        if name in SPLITS:
            parents.append((folder, SPLITS[name]))
    for parent, split in parents:
        inside = folders_by_name(parent)
        masks = [inside[name] for name in ("masks", "labels") if name in inside]
        if "images" not in inside:
            continue
        if len(masks) > 1:
            print(f"note: {masks[0]} has the masks, {masks[1]} is left out")
        found.append((inside["images"], (masks or [parent / "masks"])[0], split))
    return found


def folders_by_name(parent: Path) -> dict[str, Path]:
    """The folders in a folder by their names in lower case."""
    inside = sorted(parent.iterdir()) if parent.is_dir() else []
    return {path.name.lower(): path for path in inside if path.is_dir()}


def name_by_split(cases: list[Case]) -> None:
    """Put the split before the names if several splits have one."""
    is_double = len({case.id for case in cases}) < len(cases)
    for case in cases:
        if is_double and case.split:
            case.id = f"{case.split}_{case.id}"


def pair_masks(
    image_folder: Path, mask_folder: Path, split: str, bad: list[tuple[Path, str]]
) -> list[Case]:
    """The cases of two folders. Files of none go to `bad`, with the reason."""
    unusable: list[tuple[Path, str]] = []
    images = list_by_name(image_folder, unusable)
    masks = list_by_name(mask_folder, unusable)
    if split == "test" and not masks:
        if images:
            where = image_folder.name
            print(f"note: {len(images)} images in {where} have no masks and are left out")
        return []
    bad += unusable

    cases = []
    channels = match_channels(images, masks)
    masks = match_endings(masks, channels.keys())
    for name, by_number in sorted(channels.items()):
        numbers = sorted(by_number)  # 0, 1, ...: the channels in their order
        paths = [by_number[number] for number in numbers]
        missing = sorted(set(range(numbers[-1])) - set(numbers))
        if name not in masks:
            refuse(bad, paths, f"no file of that name in {mask_folder.name}")
        elif missing:
            refuse(bad, paths, f"channel {name}_{missing[0]:04d} is missing beside it")
        else:
            cases.append(Case(name, paths, masks[name], split))
    for name in sorted(masks.keys() - channels.keys()):
        refuse(bad, [masks[name]], f"no file of that name in {image_folder.name}")
    return cases


def match_endings(masks: dict[str, Path], images: Iterable[str]) -> dict[str, Path]:
    """Masks by the names of their images: NAME_mask is the mask of NAME if nothing else is."""
    by_stem = defaultdict(list)
    for name in masks:
        by_stem[re.sub(MASK_ENDING, "", name, flags=re.IGNORECASE)].append(name)
    renamed = dict(masks)
    for stem, names in by_stem.items():
        if len(names) == 1 and names[0] not in images and stem in images:
            renamed[stem] = renamed.pop(names[0])
    return renamed


def refuse(bad: list[tuple[Path, str]], paths: list[Path], reason: str) -> None:
    """Add files that cannot be used to `bad`, each with its name in the message."""
    for path in paths:
        bad.append((path, one_line(f"{path}: {reason}")))


def list_by_name(folder: Path, bad: list[tuple[Path, str]]) -> dict[str, Path]:
    """The images or masks of a folder by name: volumes and DICOM series, or else pictures.

    What looks like one and cannot be used goes to `bad`.
    """
    images, others = list_volumes(folder)
    images += [path for path in others if is_series(path)]
    expected = "no .nii or .nii.gz"
    if not images and any(is_picture(path) for path in others):
        images = [path for path in others if is_picture(path)]
        expected = f"neither {PICTURE_KINDS}".replace("or", "nor")
    others = sorted(set(others) - set(images))
    same_name = defaultdict(list)  # a.nii, a.NII and a.nii.gz have one name
    for path in images:
        same_name[image_name(path)].append(path)
    by_name = {}
    for name, paths in same_name.items():
        if len(paths) > 1:  # nothing tells which one is meant
            refuse(bad, paths, f"one of {len(paths)} files of this name, expected one")
        elif has_control(name):
            refuse(bad, paths, "control characters in the name: rename the file")
        else:
            by_name[name] = paths[0]
    no_files = [path for path in others if is_volume(path)]
    refuse(bad, no_files, "a folder or a broken link, expected a file")
    note_others(folder, [path for path in others if not is_volume(path)], expected)
    return by_name


def list_volumes(folder: Path) -> tuple[list[Path], list[Path]]:
    """The .nii and .nii.gz files of a folder, and what else lies there, but for hidden files."""
    volumes = []
    others = []
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in inside:
        if path.name.startswith("."):  # macOS writes ._NAME beside NAME
            continue
        if path.is_file() and is_volume(path):
            volumes.append(path)
        else:
            others.append(path)
    return volumes, others


def image_name(path: Path) -> str:
    """The name of a case: of a file without its suffix, or of the folder of a series."""
    if is_volume(path) or path.is_dir():
        return volume_name(path)
    return re.sub(r"\.[A-Za-z]+$", "", path.name)  # but not the last number of 1.2.840.5


def volume_name(path: Path) -> str:
    """The name of a file without .nii or .nii.gz, in any case."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def is_volume(path: Path) -> bool:
    """Whether a path is called .nii or .nii.gz."""
    return volume_name(path) != path.name


def is_picture(path: Path) -> bool:
    """Whether a file is called as pictures are."""
    return path.suffix.lower() in PICTURES and path.is_file()


def is_series(path: Path) -> bool:
    """Whether a path is a folder with DICOM files, or one such file (enhanced, with all slices)."""
    if is_volume(path):
        return False
    if path.is_dir():
        return any(file.is_file() and is_dicom(file) for file in path.iterdir())
    return path.is_file() and is_dicom(path)


def has_control(text: str) -> bool:
    """Whether a name has control characters, which would reach the screen from index.csv."""
    return any(unicodedata.category(c) == "Cc" for c in text)


def note_others(folder: Path, others: list[Path], reason: str = "no .nii or .nii.gz") -> None:
    """Note what lies beside the images of a folder: nothing is left out in silence."""
    if others:
        kinds = count_kinds(dict.fromkeys(others))
        example = others[0].name
        print(f"note: {folder}: left out, because {reason}: {kinds}, such as {example}")


def match_channels(images: dict[str, Path], masks: dict[str, Path]) -> dict[str, dict[int, Path]]:
    """The files of each image by channel number: NAME, or nnU-Net's NAME_0000, NAME_0001, ..."""
    channels = defaultdict(dict)
    for name, path in images.items():
        stem, number = split_channel(name)
        # A name may end in four digits by itself: then there is a mask of just this name.
        if number is None or name in masks or stem in images or stem not in masks:
            channels[name][0] = path
        else:
            channels[stem][number] = path
    return channels


def split_channel(name: str) -> tuple[str, int | None]:
    """nnU-Net's NAME_0001 as NAME and 1; other names as they are and None."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    if match is None:
        return name, None
    return match[1], int(match[2])


def read_cases_table(raw: Path, cases: list[Case]) -> None:
    """Set patient, split and further columns of the cases by RAW/cases.csv, if there is one."""
    table = raw / "cases.csv"
    if not table.is_file():
        return
    by_id = {case.id: case for case in cases}
    places = {}  # of the row of each case
    lost = []
    for place, row in read_rows(table, ("id",)):
        name = volume_name(Path(row["id"]))
        if name not in by_id:
            lost.append(name)
            continue
        if name in places:
            raise DataError(f"{place}: {name} stands in {places[name]} already, expected one row")
        places[name] = place
        case = by_id[name]
        case.patient = row.get("patient", "")
        case.split = read_split(place, row) or case.split
        case.more = further_columns(row, ("id", "patient", "fold", "split"))
    if not places:
        expected = f"expected names such as {cases[0].id}"
        raise DataError(f"{table}: no id of its {len(lost)} rows is a case, {expected}")
    without = [case for case in cases if case.id not in places]
    columns = by_id[next(iter(places))].more
    for case in without:
        case.more = dict.fromkeys(columns, "")
    if without:
        print(f"note: {len(without)} cases without a row in {table.name}, such as {without[0].id}")
    if lost:
        print(f"note: {len(lost)} rows of {table.name} without a case left out, such as {lost[0]}")
    report_renamed(cases)


def read_rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place (file:line) and values of every row of a CSV table that has these columns.

    Commas, semicolons or tabs separate them: what the first line has most of. Values come without
    blanks around them and without control characters, which would reach the screen. Raises
    DataError that names the line: for a quote that is not closed, which would swallow all rows
    below, and for more fields than there are columns, as decimal commas make them.
    """
    if not table.is_file():
        raise DataError(f"{table}: not a file")
    # Excel writes a byte order mark. Python 3.10's csv stops at NUL.
    text = table.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "")
    lines = text.splitlines()
    separator = max(",;\t", key="".join(lines[:1]).count)
    reader = csv.DictReader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    line = 1  # where the current row began
    try:
        reader.fieldnames = [to_blanks(name) for name in reader.fieldnames or []]
        missing = set(columns) - set(reader.fieldnames)
        if missing:
            raise DataError(f"{table}: no column {sorted(missing)}, found {reader.fieldnames}")
        for name, count in Counter(reader.fieldnames).items():
            if name and count > 1:
                raise DataError(f"{table}: {count} columns are called {name}, expected one")
        line = reader.line_num + 1
        for row in reader:
            place = f"{table}:{reader.line_num}"
            if None in row:  # where DictReader puts what is beyond the last column
                fields = len(reader.fieldnames) + len(row[None])
                problem = f"{fields} fields for {len(reader.fieldnames)} columns"
                raise DataError(f"{place}: {problem}; decimal commas? expected points")
            yield place, {name: to_blanks(value or "") for name, value in row.items()}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{table}:{line}: {error}, expected a closing quote") from error


def to_blanks(text: str) -> str:
    """Control characters (tabs, line ends) as blanks, and none around the text."""
    if text.isprintable():  # nearly all are, and this is far quicker
        return text.strip()
    return "".join(" " if has_control(c) else c for c in text).strip()


def read_split(place: str, row: dict[str, str]) -> str:
    """The fold (0 to 4, test) or the split (train, val, test) that a table gives, "" for none."""
    fold = row.get("fold", "")
    split = row.get("split", "")
    if fold and split:
        raise DataError(f"{place}: fold {fold!r} and split {split!r}, expected one of the two")
    if fold and fold not in ("0", "1", "2", "3", "4", "test"):
        raise DataError(f"{place}: fold {fold!r}, expected 0 to 4 or test")
    if split and split.lower() not in SPLITS:
        raise DataError(f"{place}: split {split!r}, expected train, val or test")
    return fold or SPLITS.get(split.lower(), "")


def further_columns(row: dict[str, str], used: tuple[str, ...]) -> dict[str, str]:
    """What else a table says of an image, under names that index.csv has no other use for."""
    more = {}
    for name, value in row.items():
        if name and name not in used:  # some tables end every line with a comma
            more[f"table_{name}" if name in INDEX_COLUMNS else name] = value
    return more


def report_renamed(cases: list[Case]) -> None:
    """Say which further columns have got another name."""
    renamed = [name for name in INDEX_COLUMNS if f"table_{name}" in cases[0].more]
    if renamed:
        print(f"note: columns of the table that are called table_... now: {', '.join(renamed)}")


def read_splits(raw: Path, cases: list[Case], bad: list[tuple[str, str]]) -> None:
    """Set the split of the cases by nnU-Net's RAW/splits_final.json, if there is one.

    The fold of a case is the number of the split that validates it; of a single split the others
    are "train". Raises DataError for names of no case, and for cases in no fold or in two.
    """
    path = raw / "splits_final.json"
    if not path.is_file():
        return
    folds = defaultdict(list)  # of each name
    names = set()
    try:
        splits = json.loads(path.read_bytes())
        for number, split in enumerate(splits):
            for name in split["val"]:
                folds[name].append(str(number))
            names |= {*split["train"], *split["val"]}
    except (ValueError, TypeError, KeyError) as error:
        expected = "a list of up to 5 splits with the lists train and val, as nnU-Net writes it"
        raise DataError(f"{path}: {type(error).__name__}: {error}, expected {expected}") from error
    if not 1 <= len(splits) <= FOLDS:
        raise DataError(f"{path}: {len(splits)} splits, expected 1 to {FOLDS}")
    known = {case.id for case in cases}
    for source, _ in bad:  # with --skip-bad
        name = image_name(Path(source))
        known |= {name, split_channel(name)[0]}
    unknown = sorted(names - known)
    if unknown:
        count = f"{len(unknown)} names of no case, such as {unknown[0]}"
        raise DataError(f"{path}: {count}, expected names such as {cases[0].id}")
    for case in cases:
        if case.split == "test" and case.id not in names:
            continue
        own = folds[case.id]
        if len(splits) == 1 and not own and case.id in names:
            own = ["train"]
        if len(own) != 1:
            found = f"validated in the splits {', '.join(own)}" if own else "validated in no split"
            raise DataError(f"{path}: {case.id} is {found}, expected one; or remove the file")
        case.split = "val" if len(splits) == 1 and own == ["0"] else own[0]
    print(f"note: the folds are those of {path.name}")


def list_inputs(cases: list[Case]) -> list[Path]:
    """All files that are read, and must not be written."""
    files = []
    for case in cases:
        files += [*case.images, case.mask]
    return files


def read_description(raw: Path) -> tuple[dict[int, str] | None, list[str] | str | None]:
    """Class names by mask value, and channel names, of dataset.json; None for what it does not say.

    A string instead of channel names ("modality": "MRI") is what all channels are.
    """
    path = raw / "dataset.json"
    if not path.is_file():
        return None, None
    try:
        # As bytes: json tells the encoding by the byte order mark, if there is one.
        description = json.loads(path.read_bytes(), object_pairs_hook=refuse_doubles)
        labels = description.get("labels")
        channels = description.get("channel_names", description.get("modality"))
        if labels:
            labels = read_labels(path, labels)
        if isinstance(channels, dict):
            channels = [str(channels[key]) for key in sorted(channels, key=int)]
    except DataError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        expected = "labels and modality as in the Decathlon"
        raise DataError(f"{path}: {error}, expected {expected}") from error
    if labels and (min(labels) != 0 or max(labels) > 255 or len(labels) < 2):
        expected = "0 = background and others up to 255"
        raise DataError(f"{path}: labels {labels}, expected {expected}")
    return labels or None, channels or None


def refuse_doubles(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object in which no key stands twice: the first value would be lost."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return dict(pairs)


def read_labels(path: Path, labels: dict) -> dict[int, str]:
    """Class names by mask value, of {"0": "background"} or, newer, {"background": 0}.

    Raises DataError unless they are one to one: a class would be left out of the mean Dice.
    """
    names: dict[int, str] = {}
    for key, value in labels.items():
        name = key
        number = value
        if str(key).isdigit():  # the older way round
            name = value
            number = key
        name = str(name).strip()
        if isinstance(number, list) or isinstance(value, list):
            problem = f"label {name!r} is {number}: overlapping regions are not supported"
            raise DataError(
                f"{path}: {problem}; give each voxel one class, and each class one number"
            )
        if name.lower() == "ignore":
            problem = "label 'ignore': voxels that do not count (nnU-Net) are not supported"
            raise DataError(f"{path}: {problem}; give them the number of a class")
        number = int(number)
        if number in names or name in names.values():
            problem = (
                f"label {name!r} with number {number}: another label has this name or this number"
            )
            raise DataError(f"{path}: {problem}; expected each once")
        names[number] = name
    return dict(sorted(names.items()))


# --- read: every case once ---


def inspect(case: Case, values: list[int], folder: Path) -> Case:
    """Read and check a case; its mask values must be among `values`, if there are any.

    Its voxels go to `folder` as they are, for `convert`: to decompress them again takes longer.
    """
    with keeping_error(case):
        volume, affine, header = read_channels(case.images, case.notes)  # (X, Y, Z, C) of the file
        mask = read_mask(case.mask, volume.shape[:3], affine)  # (X, Y, Z)
        is_inside = mask > 0
        counts = np.bincount(mask.T[is_inside.T], minlength=256)  # few of all voxels
        counts[0] = mask.size - counts.sum()
        inside = np.flatnonzero(z_innermost(is_inside))  # (N,)
        case.values = np.flatnonzero(counts).tolist()
        if values and not set(case.values) <= set(values):
            raise DataError(f"{case.mask}: mask values {case.values}, expected {values}")
        if is_picture(case.mask) and not values:
            check_smear(case.mask, case.values)
        case.unit = unit_of(header)
        _, case.spacing = orient(affine)
        case.shape = ras_shape(volume.shape[:3], affine)
        case.channels = volume.shape[3]
        every = len(inside) // SAMPLE + 1
        x, y, z = np.unravel_index(inside[::every], mask.shape)
        case.foreground = volume[x, y, z].astype(np.float32)  # (N, C)
        case.digest = hash_pixels(volume.T)  # NIfTI has x innermost: no copy
        case.mask_digest = hash_pixels(mask.T)
        case.affine = affine
        case.header = header
        with open(folder / case.id, "wb") as file:
            np.save(file, volume)
            np.save(file, mask)
    return case


@contextmanager
def keeping_error(case: Case) -> Iterator[None]:
    """Keep what makes a case unusable in its `error`: the other cases go on."""
    try:
        yield
    except DataError as error:
        case.error = str(error)
    except MemoryError as error:
        case.error = str(explain(case.images[0], error))


def read_channels(
    paths: list[Path], notes: Notes | None = None, files: list[Path] | None = None
) -> Volume:
    """Read an image of one file with all channels, or of one file a channel: as `read_volume`.

    Raises DataError if the files do not lie on one grid.
    """
    volume, affine, header = read_volume(paths[0], notes, files)
    if len(paths) == 1:
        return volume, affine, header
    volumes = [volume]
    for path in paths[1:]:
        other, own, _ = read_volume(path, notes)
        check_same_grid(path, other.shape[:3], own, volume.shape[:3], affine)
        volumes.append(other)
    for path, one in zip(paths, volumes, strict=True):
        if one.shape[3] != 1:
            problem = f"{one.shape[3]} channels in one of {len(paths)} channel files"
            raise DataError(f"{path}: {problem}, expected 1")
    return np.concatenate(volumes, 3), affine, header


def read_volume(path: Path, notes: Notes | None = None, files: list[Path] | None = None) -> Volume:
    """Read .nii, .nii.gz or a DICOM series: voxels, affine and header.

    Voxels are (X, Y, Z, C) in the axes of the file, of the type that `compact` chooses. The affine
    (4, 4) leads to RAS in mm, whatever the unit of the file. The header is None for DICOM. `notes`
    gets (what, detail) of what is odd; `files` are those of a DICOM series that is not alone in its
    folder.

    Raises DataError that names the file for whatever keeps it from being a volume with
    content.
    """
    notes = [] if notes is None else notes
    with reading(path):
        if path.exists() and not path.is_dir() and not path.is_file():
            raise DataError(f"{path}: neither a file nor a folder")  # a pipe would wait for ever
        if is_picture(path):
            volume, affine, header = read_pixels(path, notes)
        elif path.is_dir() or is_dicom(path):
            volume, affine = read_series(path, notes, files)
            header = None
        else:
            volume, affine, header = read_nifti(path, notes, np.float32)
    if volume.ndim == 3:
        volume = volume[..., None]
    check_values(path, volume)
    # A unit that is not what the header says shows by a factor of 1000.
    lengths = np.array(volume.shape[:3]) * nib.affines.voxel_sizes(affine)  # mm
    if not 1 <= lengths.max() <= 10_000 and not is_picture(path):
        problem = f"{lengths.max():.4g} mm long by its header, expected 1 to 10000 mm"
        raise DataError(f"{path}: {problem}: check pixdim and xyzt_units")
    return compact(volume), affine, header


def compact(volume: np.ndarray) -> np.ndarray:
    """Voxels in the first of uint8, int16 and float32 that holds all of them as they are.

    CT and most MR are whole numbers, whatever type stores them. So copies have one hash, and
    `normalise` can look values up.
    """
    low = volume.min()
    high = volume.max()
    for dtype in (np.uint8, np.int16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            small = volume.astype(dtype, copy=False)
            if volume.dtype.kind in "iu" or np.array_equal(small, volume):
                return small
            break
    return volume.astype(np.float32, copy=False)


def check_values(path: Path, volume: np.ndarray) -> None:
    """Raise DataError if voxels (X, Y, Z, C) are not finite, or all the same in a channel."""
    broken = volume.size - np.count_nonzero(np.isfinite(volume))
    if broken:
        raise DataError(f"{path}: {broken} voxels are NaN or infinite")
    constant = 0
    for k in range(volume.shape[3]):
        constant += int(volume[..., k].min() == volume[..., k].max())
    # Of a picture a colour may be absent, such as a dye that found nothing.
    if constant > (volume.shape[3] - 1 if is_picture(path) else 0):
        raise DataError(f"{path}: no contrast, all voxels (of a channel) have one value")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The one place where the readers' many exceptions become a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # nibabel, gzip, zlib and decoders raise whatever they like
        raise explain(path, error) from error


def explain(path: Path, error: Exception) -> "DataError":
    """An exception of a reader as one line that names the file."""
    if isinstance(error, MemoryError):
        return DataError(f"{path}: not enough memory for it ({str(error) or 'MemoryError'})")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: not found")
    reason = " ".join(str(error).split())
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return DataError(f"{path}: cut or damaged ({reason})")
    if "plugins" in reason:  # pydicom lists those that it would need
        reason += '; more decoders: pip install "pylibjpeg[all]"'
    return DataError(f"{path}: {type(error).__name__}: {reason}")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its preamble or, without one, by its suffix."""
    with open(path, "rb") as file:
        head = file.read(132)  # PS3.10 7.1: a preamble of 128 bytes, then DICM
    return head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima")


def check_same_grid(
    path: Path,
    shape: tuple[int, ...],
    own: np.ndarray,
    image_shape: tuple[int, ...],
    affine: np.ndarray,
) -> None:
    """Raise DataError unless a file has the shape and, to 0.1 voxel, the corners of its image."""
    if shape != image_shape:
        raise DataError(f"{path}: shape {shape}, expected {image_shape} as its image")
    apart = corner_distance(own, affine, shape)  # mm
    if not apart <= SHIFT * nib.affines.voxel_sizes(affine).min():
        given = own[:3].round(3).tolist()
        expected = affine[:3].round(3).tolist()
        raise DataError(
            f"{path}: affine {given}, expected {expected} as its image ({apart:.3g} mm apart)"
        )


def corner_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far, along one axis of the world, two affines (4, 4) put a corner of a volume apart."""
    ends = [(0, length) for length in shape]
    corners = np.array(list(itertools.product(*ends, [1])))  # (8, 4), homogeneous
    return float(np.abs(corners @ (first - second).T).max())


def read_mask(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Read a mask, uint8 (X, Y, Z). Raises DataError unless it holds integers on its image's grid.

    A mask that names no unit may have that of its image: many programs drop it.
    """
    with reading(path):
        if is_picture(path):
            return read_picture_mask(path, shape)
        mask, own, header = read_nifti(path, [])
    turn = ornt_transform(find_axes(own), find_axes(affine))
    if not np.array_equal(turn, RAS):  # the same voxels along other axes, as dcm2niix has them
        own = own @ inv_ornt_aff(turn, mask.shape)
        mask = apply_orientation(mask, turn)
    if int(header["xyzt_units"]) & 7 == 0:
        candidates = [own]
        for factor in UNIT_MM.values():
            candidates.append(np.diag([factor, factor, factor, 1]) @ own)
        distances = [corner_distance(candidate, affine, shape) for candidate in candidates]
        own = candidates[int(np.argmin(distances))]
    check_same_grid(path, mask.shape, own, shape, affine)
    whole = mask
    if mask.dtype.kind == "f":  # floats, or a slope in the header: 0.99999 is 1, 0.5 is no class
        whole = np.rint(mask)
        if not np.all(np.abs(mask - whole) <= 1e-3):  # also true for NaN
            problem = f"mask of {mask.dtype} with values between the integers"
            raise DataError(f"{path}: {problem}, expected 0, 1, 2, ...")
    if whole.min() < 0 or whole.max() > 255:
        problem = f"mask values {whole.min():g} to {whole.max():g}"
        raise DataError(f"{path}: {problem}, expected 0 to 255")
    return whole.astype(np.uint8, copy=False)


def hash_pixels(pixels: np.ndarray) -> str:
    """What tells copies: the SHA-256 of shape and stored pixels."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels))  # without a copy in most cases
    return digest.hexdigest()


def keep_memory() -> None:
    """Let the C library keep what is freed, at most 256 MiB, for the next image (glibc only).

    Otherwise it asks the system for fresh memory, which has to be cleared page by page: a sixth of
    the time that an image takes, and threads wait for each other there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes: what is larger is fresh all the same
    mallopt(M_TRIM_THRESHOLD, 2**28)


def progress(text: str) -> None:
    """A line that overwrites itself on a terminal, and nothing elsewhere."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


def in_threads(function: Callable, items: list, workers: int) -> Iterator:
    """`map` in threads (decoding and resizing release the GIL), in the order of the items.

    In chunks, so that results do not pile up in memory.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for start in range(0, len(items), 256):
            yield from pool.map(function, items[start : start + 256])
            progress(f"read {min(start + 256, len(items))}/{len(items)}")
    finally:
        # Without waiting: Ctrl-C may come while the pool holds a lock that its threads want.
        pool.shutdown(wait=False, cancel_futures=True)
    progress("")


def in_processes(function: Callable, items: list, workers: int, part: int) -> Iterator[tuple]:
    """Item and function(item), in the order of the items, by copies of this process.

    Each gets `part` items at a time. An item comes back because a function that fills it in has
    only its process's copy. In threads, which wait for each other in the interpreter, where copies
    are not worth their start, or not to be had.
    """
    if workers < 2 or len(items) < 32 * part or sys.platform != "linux":
        yield from zip(items, in_threads(function, items, workers), strict=True)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=begin_process)
    waiting = deque()  # a few for each process, so that results do not pile up in memory
    try:
        for start in range(0, len(items), part):
            waiting.append(pool.submit(run_part, function, items[start : start + part]))
            if len(waiting) > 3 * workers:
                yield from waiting.popleft().result()
                progress(f"read {start + part - part * len(waiting)}/{len(items)}")
        for results in waiting:
            yield from results.result()
    except BrokenProcessPool as error:
        problem = "the system has ended a process (out of memory?)"
        raise DataError(f"{problem}: use fewer --workers") from error
    finally:
        # Without waiting: what is running after Ctrl-C is of no use.
        pool.shutdown(wait=False, cancel_futures=True)
    progress("")


def begin_process() -> None:
    """Leave Ctrl-C to the first process, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_part(function: Callable, items: list) -> list[tuple]:
    """Each of the items with function(item)."""
    return [(item, function(item)) for item in items]


def default_workers() -> int:
    """As many as this process may use cores, but at most 8: each holds a whole image."""
    if hasattr(os, "sched_getaffinity"):  # on a shared node fewer than os.cpu_count()
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


# --- read: a picture ---


def read_pixels(path: Path, notes: Notes) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """A picture as a volume of one slice: float32 (X, Y, 1, C), affine and header.

    C is 1, or 3 if a pixel has a colour. x goes to the right and y down, turned as its orientation
    tag says. The header's unit is mm if the file says its resolution, otherwise none: pixels.
    """
    image, spacing, _ = open_picture(path, notes)
    if image.mode not in ("1", "L", "LA") and image.mode[0] not in "IF":
        image = image.convert("RGB")
    elif image.mode in ("1", "LA"):
        image = image.convert("L")
    pixels = np.asarray(image).astype(np.float32)  # (Y, X) or (Y, X, 3)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    volume = pixels.swapaxes(0, 1)[:, :, None]  # (X, Y, 1, C)
    return volume, *picture_grid(volume.shape[:3], spacing)


def open_picture(path: Path, notes: Notes) -> tuple[Image.Image, list[float], str]:
    """A decoded picture as viewers show it, the size of a pixel in mm or [], and the format."""
    # As a file object: opened by path, Pillow >= 11 scrambles an uncompressed TIFF that it turns.
    with open(path, "rb") as file, Image.open(file, formats=("PNG", "JPEG", "TIFF")) as image:
        kind = "JPEG" if image.format == "MPO" else image.format  # phones add a preview
        if getattr(image, "n_frames", 1) > 1 and kind != "JPEG":
            raise DataError(f"{path}: {image.n_frames} pages, expected a single picture")
        if image.mode.startswith("RGB") and ";16" in str(image.tile):
            notes.append(("16 bits a colour: the upper 8 are read", ""))
        spacing = read_resolution(image, notes)
        if image.getexif().get(Tag.Orientation, 1) >= 5:  # turned by 90 degrees
            spacing = spacing[::-1]
        image.load()
        image = ImageOps.exif_transpose(image)
    return image, spacing, kind


def read_resolution(image: Image.Image, notes: Notes) -> list[float]:
    """Width and height of a pixel in mm, or [] if the file does not say it in a credible way."""
    says = image.format == "PNG"  # Pillow has a dpi of PNG only if the unit is the metre
    if image.format == "TIFF":
        says = image.tag_v2.get(Tag.ResolutionUnit) in (2, 3)  # inch, cm
    dpi = image.info.get("dpi", ()) if says else ()
    spacing = [25.4 / float(dots) for dots in dpi if float(dots) > 0]
    if len(spacing) != 2:
        return []
    if all(round(float(dots)) in DEFAULT_DPI for dots in dpi):
        return []
    if not all(0.01 <= mm <= 100 for mm in spacing):
        notes.append(("a resolution that is none: pixels are the unit", f"{show_size(dpi)} dpi"))
        return []
    return spacing


def picture_grid(
    shape: tuple[int, ...], spacing: list[float]
) -> tuple[np.ndarray, nib.Nifti1Header]:
    """Affine (4, 4) to RAS and header of a picture (X, Y, 1): its first row is at the top."""
    across, down = spacing or (1.0, 1.0)
    affine = np.diag([across, -down, 1.0, 1.0])
    nifti = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    nifti.set_sform(affine, 1)
    nifti.set_qform(affine, 1)
    if spacing:
        nifti.header.set_xyzt_units("mm")
    else:
        nifti.header["descrip"] = NO_RESOLUTION
    return affine, nifti.header


def unit_of(header: nib.Nifti1Header | None) -> str:
    """What the affine of an image is in: mm, or px for a picture without a resolution."""
    description = b"" if header is None else bytes(header["descrip"])
    return "px" if description.startswith(NO_RESOLUTION) else "mm"


def read_picture_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a mask, uint8 (X, Y, 1), of gray values or of the numbers of a palette.

    Raises DataError unless it has the size of its picture and one value a pixel.
    """
    image, _, kind = open_picture(path, [])
    if (*image.size, 1) != shape:
        turned = ""
        if image.size == shape[1::-1]:
            turned = "; has one of the two lost its orientation tag?"
        size = f"{show_size(image.size)} pixels, expected {show_size(shape[:2])} as its picture"
        raise DataError(f"{path}: {size}{turned}")
    if image.mode == "LA":
        image = image.convert("L")
    values = np.asarray(image)  # (Y, X), for P the numbers of the colours
    if values.ndim == 3:
        rgb = np.asarray(image.convert("RGB"))
        values = rgb[..., 0]
        if not (rgb == rgb[..., :1]).all():
            count = len(np.unique(rgb.reshape(-1, 3), axis=0))
            problem = f"a colour mask ({count} colours)"
            raise DataError(f"{path}: {problem}, expected a number for each class: convert it")
    if values.min() < 0 or values.max() > 255:
        problem = f"mask values {values.min():g} to {values.max():g}"
        raise DataError(f"{path}: {problem}, expected 0 to 255")
    found = np.unique(values).tolist()
    if kind == "JPEG" and not set(found) <= {0, 255}:
        problem = f"a JPEG mask with {len(found)} values: JPEG blurs the numbers of classes"
        raise DataError(f"{path}: {problem}; save masks as PNG, from the originals")
    if not np.isin(found, np.arange(256)).all():
        raise DataError(f"{path}: mask with values between the integers, expected 0, 1, 2, ...")
    return values.T[..., None].astype(np.uint8)


def check_smear(path: Path, values: list[int]) -> None:
    """Raise DataError if a mask without a dataset.json has 255 and other values beside 0."""
    if 255 in values and len(values) > 2:
        problem = f"{len(values)} mask values, {show_values(values)}"
        cause = "edges smeared by JPEG or resizing, or pixels that do not count"
        expected = "0 and 255, or 0, 1, 2, ... without gaps, or a dataset.json that names them"
        raise DataError(f"{path}: {problem} ({cause}), expected {expected}")


def show_values(values: list[int]) -> str:
    """Values for a message, such as 0, 1, 2, ..., 255."""
    shown = [str(value) for value in values]
    if len(shown) > 4:
        shown[3:-1] = ["..."]
    return ", ".join(shown)


# --- read: a NIfTI file ---


def read_nifti(
    path: Path, notes: Notes, dtype: type | None = None
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Voxels (X, Y, Z[, C]) with the slope applied, affine (4, 4) to RAS in mm, repaired header.

    Without a slope, integers of up to 16 bits stay what they are; others become `dtype`, if any.
    `notes` gets (what, detail) of what is odd in the header. Reads to the end: gzip has its
    checksum there.
    """
    header_path, data_path = find_pair(path)
    raw = read_header(header_path)
    if int(raw["datatype"]) not in nib.nifti1.data_type_codes:
        raise DataError(f"{path}: datatype {int(raw['datatype'])}, which NIfTI does not have")
    header = repair_header(raw)
    if header.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path}: voxels of type {header.get_data_dtype()}, expected numbers")
    shape = header.get_data_shape()
    # Axes of one at the end are what programs write for "no time".
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(f"{path}: shape {shape}, expected 3D, or 4D with the channels last")
    pixdim = np.abs(raw["pixdim"][1:4].astype(float))  # before nibabel puts 1 where it is 0
    affine = choose_affine(path, header, pixdim, notes)
    check_shear(affine, notes)
    affine[:3] *= UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)  # bits 0 to 2: the unit of space
    stored = header.get_data_dtype()
    size = header.get_data_offset() + math.prod(shape) * stored.itemsize
    with open_bytes(data_path, size) as file:
        # By a proxy of our own: nib.load goes by the suffix, and does not read to the end.
        proxy = nib.arrayproxy.ArrayProxy(file, header, mmap=False)
        has_slope = (proxy.slope, proxy.inter) != (1, 0)
        if stored.kind in "iu" and stored.itemsize <= 2 and not has_slope:
            dtype = stored.newbyteorder("=")
        try:
            voxels = np.asanyarray(proxy, dtype=dtype)
        except MemoryError as error:
            raise MemoryError(f"shape {shape}") from error
        while file.read(2**20):
            pass
    return voxels.reshape(shape, order="F"), affine, header


def find_pair(path: Path) -> tuple[Path, Path]:
    """The files with header and voxels: one file, or NAME.hdr and NAME.img."""
    match = re.fullmatch(r"(.+)\.(hdr|img)((?:\.gz)?)", path.name, re.IGNORECASE)
    if not match:
        return path, path
    stem, _, packed = match.groups()
    header_path = path.with_name(f"{stem}.hdr{packed}")
    data_path = path.with_name(f"{stem}.img{packed}")
    for file in (header_path, data_path):
        if not file.is_file():
            raise DataError(f"{path}: half of a pair, {file.name} is not beside it")
    return header_path, data_path


def read_header(path: Path) -> nib.Nifti1Header:
    """The header as it stands in the file, NIfTI-1 or 2. Raises DataError for other formats."""
    with open_bytes(path) as file:
        head = file.read(540)  # the length of a NIfTI-2 header
        kind = header_kind(path, head)
        file.seek(0)
        header = kind.from_fileobj(file, check=False)  # as it stands: we look before it is repaired
    if 3000 <= int(header["intent_code"]) < 3100:
        problem = "CIFTI (values on a brain surface), expected voxels"
        raise DataError(f"{path}: {problem}: export it as a volume")
    return header


def header_kind(path: Path, head: bytes) -> type[nib.Nifti1Header]:
    """NIfTI-1 or 2, by the first 540 bytes of a file. Raises DataError for other formats."""
    if not head:
        raise DataError(f"{path}: zero bytes")
    # The first number is the length of the header, 348 or 540, in the byte order of the file.
    lengths = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if 348 in lengths and head[344:347] in (b"n+1", b"ni1"):
        return nib.Nifti1Header
    if 540 in lengths and head[4:7] in (b"n+2", b"ni2"):
        return nib.Nifti2Header
    if lengths & {348, 540} and len(head) < 348:
        raise DataError(f"{path}: cut after {len(head)} bytes, within the header")
    if 348 in lengths:
        raise DataError(
            f"{path}: Analyze 7.5, which does not tell left from right; expected NIfTI: convert it "
            "where its orientation is known (dcm2niix from DICOM, or nibabel)"
        )
    raise DataError(
        f"{path}: no NIfTI header, expected .nii, .nii.gz or a folder with one DICOM series; "
        "convert other formats to NIfTI first"
    )


@contextmanager
def open_bytes(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """Open a file to read; what is gzip by its content, whatever its name, is decompressed.

    `size` is how many bytes are in it, if known: then it is decompressed at once, where possible.
    """
    with open(path, "rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            yield file
            return
        content = decompress(file.read(), size) if size else None
        if content is not None:
            yield io.BytesIO(content)
            return
        file.seek(0)
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked


def decompress(packed: bytes, size: int) -> bytes | None:
    """What a gzip file holds, in two thirds of the time of GzipFile, which goes by small pieces.

    None for what is left to GzipFile: more bytes, damage, several streams in one file.
    """
    stream = zlib.decompressobj(wbits=31)  # gzip, with its checksum
    try:
        content = stream.decompress(packed, size + 1)  # no more, whatever there is
    except zlib.error:
        return None
    return content if stream.eof and not stream.unused_data else None


def repair_header(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """A copy with what nibabel repairs: qfac, negative pixdim. Else raises HeaderDataError."""
    fixed = header.copy()
    fixed.check_fix(QUIET, 40)  # raises from level 40 on, an error in the terms of logging
    for name in ("sform_code", "qform_code"):
        # A code that nibabel does not know says that there is a form all the same.
        if header[name] != 0 and fixed[name] == 0:
            fixed[name] = 1
    return fixed


def choose_affine(
    path: Path, header: nib.Nifti1Header, pixdim: np.ndarray, notes: Notes
) -> np.ndarray:
    """Affine (4, 4) from voxels to RAS, in the unit of the file: the sform, or else the qform.

    `header` is repaired, `pixdim` (3,) is what it was before; it is set from the sform if it is
    unusable. Raises DataError if neither can be used, or if they contradict each other about the
    size of a voxel.
    """
    has_sizes = bool(np.isfinite(pixdim).all() and pixdim.min() > 0)
    sform, problem = read_form(header, "sform")
    problems = [problem]
    qform = None
    if has_sizes:
        qform, problem = read_form(header, "qform")
        problems.append(problem)
    reason = "; ".join(filter(None, problems))

    if sform is None and not has_sizes:
        problem = f"pixdim {pixdim.tolist()} and no sform"
        raise DataError(f"{path}: {problem}, expected the size of a voxel")
    if sform is None and qform is None:
        if reason:  # coded, and unusable
            hint = "set one, for example by nibabel's set_sform"
            raise DataError(f"{path}: {reason}, expected an affine: {hint}")
        what = "no sform and no qform: the axes are taken to point to the left, front and top"
        notes.append((what, ""))
        return header.get_base_affine()
    if reason:
        taken = "qform" if sform is None else "sform"
        notes.append((f"the {taken} is taken, the other form is unusable", reason))
    if sform is None:
        return qform

    # The sform is taken; does it go with pixdim and with the qform?
    sizes = nib.affines.voxel_sizes(sform)
    if not has_sizes:
        header["pixdim"][1:4] = sizes  # masks are written with this header
        return sform
    if not np.allclose(sizes, pixdim, rtol=0.01):
        return settle_sizes(path, sform, qform, pixdim, notes)
    if qform is not None:
        apart = corner_distance(sform, qform, header.get_data_shape()[:3]) / pixdim.min()  # voxels
        if apart > SHIFT:
            detail = f"by up to {apart:.3g} voxels"
            notes.append(("sform and qform differ: the sform is taken", detail))
    return sform


def read_form(header: nib.Nifti1Header, name: str) -> tuple[np.ndarray | None, str]:
    """The sform or qform (4, 4); or None and why it cannot be used, "" if it is not coded."""
    try:
        if name == "sform":
            affine, _ = header.get_sform(coded=True)
        else:
            affine, _ = header.get_qform(coded=True)
    except (HeaderDataError, ValueError) as error:  # a quaternion longer than 1
        return None, f"{name} with a broken quaternion ({error})"
    if affine is None:
        return None, ""
    shown = f"{name} {affine[:3].round(4).tolist()}"
    sizes = nib.affines.voxel_sizes(affine)
    if not (np.isfinite(affine).all() and sizes.min() > 0):
        return None, shown
    # The volume of a cube of unit edges along the axes: 0 if they lie in one plane.
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        return None, f"{shown} cannot be inverted"
    return affine, ""


def settle_sizes(
    path: Path, sform: np.ndarray, qform: np.ndarray | None, pixdim: np.ndarray, notes: Notes
) -> np.ndarray:
    """Of two forms that differ in the size of a voxel the one that was filled in, with a note.

    Voxels of 1 x 1 x 1 beside other ones are what a program writes that knows no better (ACDC). Any
    other contradiction is a DataError: one of the two is wrong by a factor, and nothing tells
    which.
    """
    sizes = nib.affines.voxel_sizes(sform)
    detail = f"sform {show_size(sizes)}, pixdim {show_size(pixdim)}"
    if np.allclose(sizes, 1, atol=1e-3) and qform is not None:
        notes.append(("voxel sizes contradict each other: the qform is taken", detail))
        return qform
    if np.allclose(pixdim, 1, atol=1e-3):
        notes.append(("voxel sizes contradict each other: the sform is taken", detail))
        return sform
    hint = "set the wrong one right, by nibabel"
    raise DataError(f"{path}: voxels by {detail}, expected one size: {hint}")


def show_size(sizes: np.ndarray | list | tuple) -> str:
    """Sizes for a message, such as 1 x 1.5 x 2.5."""
    return " x ".join(f"{size:.5g}" for size in sizes)


def check_shear(affine: np.ndarray, notes: Notes) -> None:
    """Note axes that are not perpendicular: resampling and distances take voxels for boxes."""
    directions = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    cosines = np.abs(directions.T @ directions - np.eye(3))  # (3, 3), of the angles between axes
    largest = cosines.max()
    if largest > 0.01:
        angle = np.degrees(np.arccos(min(1.0, largest)))
        detail = f"{angle:.1f} instead of 90 degrees"
        notes.append(("sheared axes: the voxels are taken for boxes", detail))


# --- read: a DICOM series ---


@dataclass
class Slice:
    """One plane of a series: a file, or a frame of a multi-frame file."""

    name: str
    ds: pydicom.Dataset  # the file
    plane: pydicom.Dataset  # the attributes of this plane; the file itself if it has one frame
    frame: int = 0


def read_series(
    path: Path, notes: Notes, files: list[Path] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a folder with one DICOM series, or one multi-frame file, or some files of a folder.

    Gives float32 (X, Y, Z, 1), x along the rows and y down the columns, and the affine to RAS in
    mm.

    A series must be a box of CT, MR or PET slices, or the DataError quotes the attribute and both
    values: one SeriesInstanceUID; one size, orientation and PixelSpacing; one image at each
    position; positions at equal distances, straight above each other. All of it within 0.1 voxel.
    Slices are put in order by their positions along the normal (PS3.3 C.7.6.2.1.1), not by name or
    number.
    """
    # Filter the images, and check that they are planes of one kind.
    slices = filter_images(path, notes, files)
    check_series(path, slices)
    positions = read_numbers(path, slices, "ImagePositionPatient", 3)  # (N, 3) in mm
    right, down = read_directions(path, slices)
    spacing = read_spacing(path, slices)
    normal = np.cross(right, down)

    # Sort them by how far they lie along the normal.
    order = np.argsort(positions @ normal, kind="stable")
    slices = [slices[k] for k in order]
    positions = positions[order]
    along = positions @ normal  # (N,) in mm, ascending

    # Check that they lie straight above each other, at equal distances.
    check_doubles(path, slices, along)
    start, step = fit_distances(path, slices, along)
    check_drift(path, slices, positions, np.stack([right, down]), spacing)
    note_slices(slices, notes)

    # Merge their pixels.
    planes = [read_plane(path, one) for one in slices]  # each (X, Y)
    volume = np.stack(planes, 2)[..., None]  # (X, Y, Z, 1)

    # Transform voxels to DICOM's axes in mm, and those to RAS.
    affine = np.eye(4)
    affine[:3, 0] = right * spacing[0]
    affine[:3, 1] = down * spacing[1]
    affine[:3, 2] = normal * step
    # The first position, moved along the normal to where the line through all of them begins.
    affine[:3, 3] = positions[0] + normal * (start - positions[0] @ normal)
    return volume, LPS_TO_RAS @ affine


def filter_images(path: Path, notes: Notes, files: list[Path] | None) -> list[Slice]:
    """The planes of all images. Raises DataError for a file of theirs that cannot be used."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    inside = files or inside
    inside = [file for file in inside if not file.name.startswith(".")]
    files = [file for file in inside if file.is_file()]
    images = {}  # data sets by file
    others = {}  # None for a file that is no DICOM
    for file in files:
        ds = read_dataset(file)
        if ds is not None and has_pixels(ds):
            images[file] = ds
        else:
            others[file] = ds
    if not images:
        folders = sum(file.is_dir() for file in inside)
        kinds = f"{count_kinds(others)}, {folders} folders"
        raise DataError(f"{path}: 0 DICOM series ({kinds}), expected the images of one series")
    lost = [file for file, ds in others.items() if belongs(file, ds, images)]
    if lost:
        names = ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in lost[:3])
        raise DataError(
            f"{path}: {len(lost)} of {len(files)} files are cut, empty or damaged: {names}; the "
            "volume would be incomplete: export the series again, or move what is no part of it"
        )
    if others:
        notes.append(("files that are no images are left out", count_kinds(others)))
    slices = []
    for file, ds in images.items():
        slices += list_planes(file, ds)
    return slices


def read_dataset(path: Path, **options: bool) -> pydicom.Dataset | None:
    """The data set of a file, with or without the DICOM preamble; None if it holds none.

    `options` are those of pydicom's reader.
    """
    try:
        ds = pydicom.dcmread(path, force=True, **options)
    except MemoryError:
        raise
    except Exception:  # text and cut files raise whatever their bytes happen to mean
        return None
    known = ("SOPClassUID", "PixelData", "DirectoryRecordSequence")
    if not any(keyword in ds for keyword in known):
        return None
    return ds


def has_pixels(ds: pydicom.Dataset) -> bool:
    return all(ds.get(keyword) for keyword in ("PixelData", "Rows", "Columns"))


def belongs(file: Path, ds: pydicom.Dataset | None, images: dict[Path, pydicom.Dataset]) -> bool:
    """Whether a file without pixels is of the series of the images, by its data set or suffix."""
    if ds is None:
        suffix = file.suffix.lower()
        suffixes = {image.suffix.lower() for image in images}
        # Names that end in a number or in no suffix at all are what archives give to DICOM files.
        has_letters = re.fullmatch(r"\.\w*[a-z]\w*", suffix) is not None
        return not has_letters or suffix in suffixes or is_dicom(file)
    if "DirectoryRecordSequence" in ds:  # a DICOMDIR, the table of contents of a disc
        return False
    series = str(ds.get("SeriesInstanceUID") or "")  # of a cut file it may be cut as well
    for image in images.values():
        if str(image.get("SeriesInstanceUID") or "").startswith(series):  # "" if nothing is left
            return True
        if ds.get("SOPClassUID") == image.get("SOPClassUID"):
            return True
    return False


def count_kinds(datasets: dict[Path, pydicom.Dataset | None]) -> str:
    """The number of files of each kind, as "12 CT Image Storage, 1 .txt"."""
    kinds = []
    for file, ds in datasets.items():
        kind = "" if ds is None else name_storage(ds)
        kinds.append(kind or file.suffix.lower() or "without suffix")
    counts = [f"{count} {kind}" for kind, count in Counter(kinds).most_common()]
    return ", ".join(counts) or "no files"


def name_storage(ds: pydicom.Dataset) -> str:
    """The standard's name of what a DICOM file stores, such as CT Image Storage."""
    return UID(str(ds.get("SOPClassUID") or "")).name


def list_planes(file: Path, ds: pydicom.Dataset) -> list[Slice]:
    """The frames of an enhanced file, each with its functional groups as one data set; or the file.

    PS3.3 C.7.6.16: what holds for all frames stands in the shared groups, the others in those of
    the frame.
    """
    groups = ds.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        return [Slice(file.name, ds, ds)]
    if len(groups) != int(ds.get("NumberOfFrames") or 1):
        problem = f"{ds.get('NumberOfFrames')} frames, but {len(groups)} functional groups"
        raise DataError(f"{file}: {problem}")
    shared = ds.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    slices = []
    for k, group in enumerate(groups):
        plane = pydicom.Dataset()
        # What some scanners write outside of the groups.
        for keyword in ("RescaleSlope", "RescaleIntercept", "ImageType"):
            if keyword in ds:
                plane[keyword] = ds[keyword]
        # The later one of two counts, which is that of the frame.
        for macro in (*shared[0], *group):
            if macro.VR == "SQ" and macro.value:
                plane.update(macro.value[0])
        slices.append(Slice(f"{file.name} frame {k + 1}", ds, plane, k))
    return slices


def check_series(path: Path, slices: list[Slice]) -> None:
    """Raise DataError unless all planes are slices of one series, and all of one size."""
    series = defaultdict(list)
    for one in slices:
        series[str(one.ds.get("SeriesInstanceUID"))].append(one)
    if len(series) > 1:
        names = [describe_series(members) for members in series.values()]
        if len(names) > 5:
            names[5:] = ["..."]
        listed = ", ".join(names)
        raise DataError(f"{path}: {len(series)} DICOM series: {listed}; give each its own folder")
    for one in slices:
        kind = name_kind(one)
        if kind:
            raise DataError(f"{path}: {one.name} is {kind}; expected CT or MR slices")
    if all("LOCALIZER" in str(one.plane.get("ImageType")).upper() for one in slices):
        raise DataError(f"{path}: a localizer (scout), expected CT or MR slices")
    if path.is_file() and len(slices) == 1:
        raise DataError(
            f"{path}: one DICOM slice, expected a volume: give the folder of its series"
        )
    sizes = np.array([(one.ds.Rows, one.ds.Columns) for one in slices], float)
    check_equal(path, slices, "Rows, Columns", sizes, 0)


def describe_series(slices: list[Slice]) -> str:
    """A series for a message, such as: 3 'T1 axial' (24 MR images such as 0001.dcm)."""
    ds = slices[0].ds
    name = f"{ds.get('SeriesNumber') or '-'} {str(ds.get('SeriesDescription') or '')!r}"
    return f"{name} ({len(slices)} {ds.get('Modality') or ''} images such as {slices[0].name})"


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
    # (0019,100A) is Siemens' private NumberOfImagesInMosaic
    if "MOSAIC" in image_type or (is_siemens and (0x0019, 0x100A) in ds):
        return "a Siemens mosaic, all slices in one picture: convert it by dcm2niix"
    photometric = read_photometric(ds)
    is_gray = photometric in ("", "MONOCHROME1", "MONOCHROME2")
    if int(ds.get("SamplesPerPixel") or 1) != 1 or not is_gray:
        return f"a colour image ({photometric})"
    if one.plane is ds and int(ds.get("NumberOfFrames") or 1) > 1:
        frames = f"{storage}, {ds.NumberOfFrames} frames"
        return f"a multi-frame file ({frames}) without the frames' positions"
    return ""


def read_photometric(ds: pydicom.Dataset) -> str:
    """PhotometricInterpretation without the slips that occur in it."""
    return str(ds.get("PhotometricInterpretation") or "").strip().upper()


def read_numbers(path: Path, slices: list[Slice], keyword: str, count: int) -> np.ndarray:
    """An attribute of all planes, float64 (N, count). Raises DataError if it is missing in some."""
    rows = []
    missing = []
    for one in slices:
        try:
            row = [float(value) for value in np.atleast_1d(one.plane.get(keyword))]
        except (TypeError, ValueError):  # absent, empty, or text
            row = []
        rows.append(row)
        if len(row) != count or not np.isfinite(row).all():
            missing.append(one.name)
    if missing:
        problem = f"{len(missing)} of {len(slices)} images have no {keyword} of {count} numbers"
        raise DataError(
            f"{path}: {problem}, such as {missing[0]}: they cannot be put in their place"
        )
    return np.array(rows)


def read_directions(path: Path, slices: list[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Directions of rows and columns, unit vectors (3,) in DICOM's axes: those of every plane."""
    values = read_numbers(path, slices, "ImageOrientationPatient", 6)
    orientation = check_equal(path, slices, "ImageOrientationPatient", values, reach(slices))
    right = orientation[:3]
    down = orientation[3:]
    lengths = np.linalg.norm([right, down], axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(right @ down) > 0.01:
        problem = f"ImageOrientationPatient {orientation.tolist()}"
        raise DataError(f"{path}: {problem}, expected two perpendicular unit vectors")
    return right, down


def read_spacing(path: Path, slices: list[Slice]) -> np.ndarray:
    """Distance in mm of columns and of rows (2,), the same in every plane.

    PixelSpacing has that of the rows first (PS3.3 10.7.1.3).
    """
    spacing = read_numbers(path, slices, "PixelSpacing", 2)
    if spacing.min() <= 0:
        raise DataError(f"{path}: PixelSpacing {spacing.min()}, expected more than 0")
    tolerance = reach(slices) * spacing.min()
    return check_equal(path, slices, "PixelSpacing", spacing, tolerance)[::-1]


def reach(slices: list[Slice]) -> float:
    """The change of a step, in parts of it, that moves the far end of a row by 0.1 voxel."""
    return SHIFT / max(slices[0].ds.Rows, slices[0].ds.Columns)


def check_equal(
    path: Path, slices: list[Slice], keyword: str, values: np.ndarray, tolerance: float
) -> np.ndarray:
    """The commonest row of `values` (N, n). Raises DataError naming the planes that differ."""
    rows = [tuple(row) for row in values.round(6).tolist()]
    commonest = Counter(rows).most_common(1)[0][0]
    usual = values[rows.index(commonest)]  # (n,), not rounded
    apart = np.abs(values - usual).max(1)  # (N,)
    differing = np.flatnonzero(apart > tolerance)
    if len(differing):
        first = differing[0]
        name = slices[first].name
        if "LOCALIZER" in str(slices[first].plane.get("ImageType")).upper():
            name += " (a localizer)"
        if len(differing) > 1:
            name += f" and {len(differing) - 1} more"
        odd = f"{keyword} {values[first].tolist()} in {name}"
        others = f"{usual.tolist()} in the other {len(rows) - len(differing)}"
        raise DataError(f"{path}: {odd}, {others}; expected one stack")
    return usual


def check_doubles(path: Path, slices: list[Slice], along: np.ndarray) -> None:
    """Raise DataError if planes share a position; `along` (N,) in mm along the normal, sorted."""
    is_next = np.diff(along) > 0.01  # mm
    place = np.concatenate([[0], np.cumsum(is_next)])  # (N,), the number of each plane's position
    counts = np.bincount(place)  # images at each position
    if counts.max() == 1:
        return
    if counts.min() == counts.max():
        together = slices[: counts[0]]  # those at the first position
        differing = []
        for keyword in VARYING:
            values = {str(one.plane.get(keyword)) for one in together}
            if len(values) > 1:
                differing.append(keyword)
        what = f" that differ in {', '.join(differing)}" if differing else ""
        problem = f"{len(counts)} positions with {counts[0]} images each{what}"
        kinds = "a time series, echoes or copies"
        raise DataError(
            f"{path}: {problem}, such as {slices[0].name}: {kinds}; expected one image a position"
        )
    pair = int(np.argmax(np.diff(place) == 0))  # the first two in one place
    names = f"{slices[pair].name} and {slices[pair + 1].name}"
    where = f"{along[pair] - along[0]:.4g} mm from the first slice"
    doubled = f"{int((counts > 1).sum())} of {len(counts)} positions are doubled"
    raise DataError(
        f"{path}: {doubled}: {names} lie in one place, {where}; expected one image a position"
    )


def fit_distances(path: Path, slices: list[Slice], along: np.ndarray) -> tuple[float, float]:
    """Place of the first plane and distance of the planes, in mm along the normal.

    By a line through `along` (N,) and not two neighbours, because positions are rounded in the
    header: 0, 0.6, 1.2, 1.9 for 0.625 mm.
    """
    if len(along) == 1:
        thickness = read_numbers(path, slices, "SliceThickness", 1)[0, 0]
        if thickness <= 0:
            problem = f"one slice with SliceThickness {thickness}"
            raise DataError(f"{path}: {problem}, expected more than 0")
        return float(along[0]), float(thickness)

    number = np.arange(len(along))
    step = fit_slope(along)  # mm
    start = along.mean() - (len(along) - 1) / 2 * step
    if np.abs(along - start - number * step).max() <= SHIFT * step:
        return float(start), float(step)

    # No line: by the largest gap, is a slice missing, or do the distances vary?
    gaps = np.diff(along)  # (N - 1,) in mm
    k = int(np.argmax(gaps))
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # the lower median
    between = f"{slices[k].name} and {slices[k + 1].name} are {gaps[k]:.4g} mm apart"
    if gaps[k] > 1.5 * usual:
        missing = 0
        for gap in gaps.tolist():
            missing += max(0, round(gap / usual) - 1)
        raise DataError(f"{path}: missing slices: {missing}; {between}, the others {usual:.4g} mm")
    distances = f"from {gaps.min():.4g} to {gaps[k]:.4g} mm"
    raise DataError(f"{path}: slices at distances {distances}: {between}")


def fit_slope(values: np.ndarray) -> np.ndarray:
    """By how much `values` (N, ...) grow from one to the next, by least squares."""
    number = np.arange(len(values)) - (len(values) - 1) / 2
    return number @ (values - values.mean(0)) / (number**2).sum()


def check_drift(
    path: Path, slices: list[Slice], positions: np.ndarray, axes: np.ndarray, spacing: np.ndarray
) -> None:
    """Raise DataError unless the sorted planes lie straight above each other.

    `positions` (N, 3) in mm, `axes` (2, 3) along the rows and columns, `spacing` (2,) along those.
    """
    aside = (positions - positions[0]) @ axes.T  # (N, 2) in mm
    if np.abs(aside / spacing).max() <= SHIFT:
        return
    # A gantry tilt moves each slice by the same step; a slice out of place does not.
    number = np.arange(len(aside)) - (len(aside) - 1) / 2
    line = number[:, None] * fit_slope(aside)  # (N, 2)
    bent = np.abs(aside - aside.mean(0) - line) / spacing  # voxels
    if bent.max() <= SHIFT:
        drift = np.linalg.norm(aside[-1])
        length = np.linalg.norm(positions[-1] - positions[0])
        angle = np.degrees(np.arcsin(min(1.0, drift / length)))
        raise DataError(
            f"{path}: the slices drift by {drift:.4g} mm in their plane over {length:.4g} mm "
            f"(gantry tilt of {angle:.1f} degrees), expected a box: dcm2niix converts the series "
            "and corrects it"
        )
    from_middle = np.linalg.norm(aside - np.median(aside, 0), axis=1)
    k = int(np.argmax(from_middle))
    raise DataError(
        f"{path}: {slices[k].name} lies {from_middle[k]:.4g} mm aside of the other slices in their "
        "plane, expected a box"
    )


def note_slices(slices: list[Slice], notes: Notes) -> None:
    """Note what was changed or doubted in a series that can be read."""
    if any(read_photometric(one.ds) == "MONOCHROME1" for one in slices):
        notes.append(("MONOCHROME1: the gray values are inverted", ""))
    tilts = [0.0]
    for one in slices:
        tilt = one.plane.get("GantryDetectorTilt")
        if isinstance(tilt, (int, float)):
            tilts.append(abs(float(tilt)))
    if max(tilts) > 0.1:
        what = "GantryDetectorTilt, but the positions are a box: the positions are believed"
        notes.append((what, f"{max(tilts):.4g} degrees"))


def read_plane(path: Path, one: Slice) -> np.ndarray:
    """Modality values float32 (X, Y) of a plane; MONOCHROME1 is inverted within the bits stored."""
    where = path / one.name if path.is_dir() else path
    ds = one.ds
    if ds.Rows * ds.Columns > 2**27:  # a few bytes can claim any size
        problem = f"{ds.Rows} x {ds.Columns} pixels"
        raise DataError(f"{where}: {problem}, expected at most 2^27")
    with reading(where):
        pixels = pixel_array(ds, index=one.frame)  # (rows, columns)
        if read_photometric(ds) == "MONOCHROME1":
            # The values that stand for white and black change places: -1 - p for signed ones.
            highest = -1 if ds.PixelRepresentation else 2**ds.BitsStored - 1
            pixels = highest - pixels.astype(np.int64)
        # apply_modality_lut fails on attributes that are there and empty.
        for keyword, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            if one.plane.get(keyword) in (None, ""):
                setattr(one.plane, keyword, default)
        if float(one.plane.RescaleSlope) == 0:
            raise DataError(f"{where}: RescaleSlope 0, expected another number")
        values = apply_modality_lut(pixels, one.plane)
        return values.T.astype(np.float32)  # (columns, rows), which is (X, Y)


# --- read: do the cases go together? ---


def complete_names(
    cases: list[Case], labels: dict[int, str] | None, channels: list[str] | str | None
) -> tuple[dict[int, str], list[str]]:
    """Class names by mask value, and channel names; by what the cases hold where none are given."""
    good = [case for case in cases if not case.error]
    if labels is None:
        seen = set()
        for case in good:
            seen.update(case.values)
        labels = name_values(seen)
    if not isinstance(channels, list):  # None, or one name for all
        count = 1
        if good and is_picture(good[0].images[0]):
            # A gray picture among coloured ones has three equal channels.
            count = max(case.channels for case in good)
            if channels is None and count in (1, 3):
                return labels, RGB if count == 3 else ["gray"]
        elif good:
            # What most cases have: the others are the odd ones out.
            count = Counter(case.channels for case in good).most_common(1)[0][0]
        if channels and count == 1:
            channels = [channels]
        else:
            name = channels or "channel"
            channels = [f"{name} {k}" for k in range(count)]
    return labels, channels


def name_values(seen: set[int]) -> dict[int, str]:
    """Class names by mask value without a dataset.json: 0, 1, 2, ... without gaps, or 0 and 255."""
    if seen == {0, 255}:
        print("note: the masks hold 0 and 255: 255 is taken as class 1; predictions hold 255 too")
        return {0: "background", 255: "1"}
    names = {0: "background"}
    while len(names) in seen:
        names[len(names)] = str(len(names))
    return names


def check_names(cases: list[Case], labels: dict[int, str], channels: list[str]) -> None:
    """Set the error of cases with values that have no name, or another number of channels."""
    for case in cases:
        if case.error:
            continue
        with keeping_error(case):
            if not set(case.values) <= set(labels):
                expected = f"{sorted(labels)} without gaps, or a dataset.json that names the others"
                raise DataError(f"{case.mask}: mask values {case.values}, expected {expected}")
            paths = " and ".join(str(path) for path in case.images)
            if is_gray_of_colours(case.images[0], case.channels, channels):
                case.foreground = case.foreground.repeat(3, 1)  # (N, 3)
            else:
                check_channels(paths, case.channels, channels)


def is_gray_of_colours(path: Path, count: int, channels: list[str]) -> bool:
    """Whether an image of `count` channels is a gray picture for a network of three colours."""
    return count == 1 and len(channels) == 3 and is_picture(path)


def check_channels(path: object, count: int, channels: list[str]) -> None:
    """Raise DataError unless an image has as many channels as there are names."""
    if count != len(channels):
        hint = "; time is no channel" if count > len(channels) else ""
        if hint and str(path).lower().endswith(PICTURES):
            hint = "; convert it to gray"
        raise DataError(f"{path}: {count} channels, expected {channels}{hint}")


def drop_bad(cases: list[Case], bad: list[tuple[str, str]], skip_bad: bool) -> list[Case]:
    """The cases without an error; the others are printed and put into `bad`.

    Raises DataError if there are any, unless they may be skipped and something is left.
    """
    good = []
    for case in cases:
        if case.error:
            print(case.error, file=sys.stderr)
            bad.append((case.id, case.error))
        else:
            good.append(case)
    if bad and not (skip_bad and good):
        raise DataError(f"{len(bad)} cases or files cannot be used: fix them, or use --skip-bad")
    return good


def print_notes(cases: list[Case]) -> None:
    """What is odd in the headers, one line for each kind of oddity."""
    kinds = defaultdict(list)
    for case in cases:
        for what, detail in case.notes:
            kinds[what].append((case.id, detail))
    for what, members in kinds.items():
        name, detail = members[0]
        if len(members) > 1:
            name += f" and {len(members) - 1} more"
        print_note(name, what, detail)


def print_note(subject: object, what: str, detail: str) -> None:
    """What is odd in a header, on one line."""
    print(f"note: {subject}: {what}" + (f" ({detail})" if detail else ""))


# --- split: patients and folds ---


def split_cases(cases: list[Case], args: argparse.Namespace) -> None:
    """Set patient group and fold of each case; with --like all are test."""
    patients = [case.id for case in cases]
    if args.patient_regex:
        names = [case.images[0].name for case in cases]
        patients = find_patients(names, args.patient_regex)
    patients = [case.patient or patient for case, patient in zip(cases, patients, strict=True)]
    groups = group_patients(patients, [case.digest for case in cases])
    strata = [str(case.values) for case in cases]
    splits = ["test" if args.like else case.split for case in cases]
    folds = assign_folds(groups, strata, splits, args.test_fraction)
    for case, group, fold in zip(cases, groups, folds, strict=True):
        case.group = group
        case.fold = fold
    if not args.like and all(case.fold == "test" for case in cases):
        hint = "for an external test set use --like TRAIN_CACHE"
        raise DataError(f"{args.data}: only test cases; {hint}")
    note_small_validation(folds)


def find_patients(names: list[str], regex: str) -> list[str]:
    """The patient in each file name. Raises DataError for names without one."""
    patients = [match_patient(regex, name) for name in names]
    unmatched = [name for name, patient in zip(names, patients, strict=True) if not patient]
    if unmatched:
        problem = f"finds nothing in {len(unmatched)} names: {unmatched[0]}"
        raise DataError(f"--patient-regex {regex!r} {problem}")
    return patients


def match_patient(regex: str, text: str) -> str:
    """What a regular expression matches: its first group, or all of it; "" for no match."""
    match = re.search(regex, text)
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group()) or ""


def group_patients(patients: list[str], digests: list[str]) -> list[str]:
    """A group per row: patients who share a pixel-identical image are one group.

    It is named by the smallest of their ids (union-find by name, so the order does not matter).
    """
    parent = {patient: patient for patient in patients}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            patient = parent[patient]
        return patient

    first: dict[str, str] = {}  # by digest: the first patient with this image
    for patient, digest in zip(patients, digests, strict=True):
        other = first.setdefault(digest, patient)
        smaller, larger = sorted((root(patient), root(other)))
        parent[larger] = smaller
    return [root(patient) for patient in patients]


def assign_folds(
    groups: list[str], strata: list[str], splits: list[str], test_fraction: float
) -> list[str]:
    """Fold of every row, "0" to "4" or "test": that of its patient group.

    A given split is kept: "test", "val" is fold 0 (then nothing else is), "0" to "4" are folds.
    Other groups are dealt, stratum (label, site, classes of the mask) by stratum, each to the fold
    with the fewest rows of its stratum, so that a group is the most by which folds differ.
    Hashes of the names decide the rest: the order of rows changes nothing.
    """
    given = {"test": "test", "val": "0"} | {str(k): str(k) for k in range(FOLDS)}
    first = 1 if "val" in splits else 0
    folds = [str(k) for k in range(first, FOLDS)]
    stratum_sizes = Counter(strata)
    sizes: Counter = Counter()  # rows of each group
    stratum_of = {}  # of each group: the rarest of its rows
    for group, stratum, split in zip(groups, strata, splits, strict=True):
        if split not in given:
            sizes[group] += 1
            rank = (stratum_sizes[stratum], stratum)
            stratum_of[group] = min(rank, stratum_of.get(group, rank))

    fold_of = {}
    hashes = {group: hashlib.sha256(f"0:{group}".encode()).hexdigest() for group in sizes}
    order = sorted(sizes, key=lambda group: (stratum_of[group], hashes[group]))
    for number, group in enumerate(order):  # every tenth, if test_fraction is 0.1
        if int((number + 1) * test_fraction) > int(number * test_fraction):
            fold_of[group] = "test"

    counts: Counter = Counter()  # rows by fold, and by fold and stratum
    # The largest group of a stratum first: small ones even out what it leaves.
    for group in sorted(order, key=lambda group: (stratum_of[group], -sizes[group])):
        stratum = stratum_of[group]
        if group not in fold_of:
            fold = min(folds, key=lambda fold: (counts[fold, stratum], counts[fold], fold))
            fold_of[group] = fold
            counts[fold, stratum] += sizes[group]
            counts[fold] += sizes[group]
    pairs = zip(groups, splits, strict=True)
    return [given[split] if split in given else fold_of[group] for group, split in pairs]


def note_small_validation(folds: list[str]) -> None:
    """Say that the official validation set, fold 0, is too small to choose by, if it is.

    The paediatric X-rays of Kermany et al. come with one of 16 images, beside 5,216 to train on.
    """
    counts = Counter(folds)
    if 0 < 4 * counts["0"] < counts["1"]:
        few = f"fold 0 has, as given, only {counts['0']} of {len(folds)}: too few to choose by"
        print(f"note: {few}; train.py --fold 1 validates on {counts['1']}")


def note_both_sides(patients: list[str], folds: list[str]) -> None:
    """Note patients whom an official split, or given folds, have on two sides."""
    folds_of = defaultdict(set)
    for patient, fold in zip(patients, folds, strict=True):
        folds_of[patient].add(fold)
    both = sorted(patient for patient, own in folds_of.items() if {"test"} < own)
    if both:
        count = f"{len(both)}, such as {both[0]}"
        print(f"note: patients on both sides of the official split: {count}")
    apart = sorted(patient for patient, own in folds_of.items() if len(own - {"test"}) > 1)
    if apart:
        count = f"{len(apart)}, such as {apart[0]}"
        print(
            f"note: patients in several folds, as given: {count}; eval.py will refuse those folds"
        )


def note_unit(cases: list[Case], meta: dict) -> None:
    """Say what the unit of pictures rests on: people print scores of it."""
    unit = meta.get("picture_unit")
    known = sum(case.unit == "mm" for case in cases)
    if unit == "mm":
        print("note: all pictures say a resolution, so sizes and distances are in mm;")
        print("      if that is one of print or screen, take it out of the files")
    elif unit == "px" and known:
        print(f"note: {known} of {len(cases)} pictures say a resolution: the unit is the pixel")


def suggest_regex(names: list[str]) -> None:
    """Note names that look like several scans of a patient: p001_frame01, p001_frame12."""
    starts = [re.match(r".*?\d+(?=[_-])", name) for name in names]
    patients = {start.group() for start in starts if start}
    if all(starts) and 1 < len(patients) < len(names):
        guess = f"{len(names)} cases look like {len(patients)} patients, such as {min(patients)}"
        hint = 'keep the scans of each in one fold: --patient-regex "^.*?[0-9]+(?=[_-])"'
        print(f"note: {guess}; if so, {hint}")


# --- split: the common grid ---


def describe(
    cases: list[Case], spacing: list[str] | list[float], labels: dict[int, str], channels: list[str]
) -> dict:
    """What meta.json says of the grid, the classes and the normalisation, by the training cases.

    `spacing` is ["median"], ["keep"] or three numbers in mm.
    """
    training = [case for case in cases if case.fold != "test"]
    unit = choose_unit(cases)
    spacings = [case_spacing(case, unit) for case in training]
    median = np.median(spacings, 0).round(7 if unit else 4).tolist()
    rounded = [round(mm, 2) for mm in median]  # 0.9999 and 1.0 are equal
    coarsest = [axis for axis in range(3) if rounded[axis] == max(rounded)]
    meta = {
        "classes": list(labels.values()),
        "values": list(labels),
        "channels": channels,
        "resample": spacing != ["keep"],
        "spacing": median if isinstance(spacing[0], str) else spacing,  # mm
        "slice_axis": coarsest[-1],  # of equal ones the last, z: axial slices
    }
    if unit:
        meta |= {"picture_unit": unit, "slice_axis": 2}
    shapes = []
    for case, mm in zip(training, spacings, strict=True):
        shapes.append(grid_shape(case.shape, mm, meta))
    foreground = np.concatenate([case.foreground for case in training])  # (N, C)
    if not len(foreground):
        raise DataError("no training mask has any foreground: nothing to learn")
    constants = []
    for k, name in enumerate(channels):
        constants.append(measure_ct(foreground[:, k]) if is_ct(name) else None)
    meta["shape"] = np.median(shapes, 0).astype(int).tolist()
    meta["normalisation"] = constants
    return meta


def choose_unit(cases: list[Case]) -> str | None:
    """The unit of a set of pictures: mm if each says its resolution, else px. None for volumes.

    Raises DataError for a set of both.
    """
    pictures = [case for case in cases if is_picture(case.images[0])]
    if not pictures:
        return None
    if len(pictures) < len(cases):
        (volume, *_) = [case.images[0] for case in cases if case not in pictures]
        both = f"{pictures[0].images[0]} is a picture and {volume} a volume"
        raise DataError(f"{both}: expected one kind; preprocess them apart")
    return "mm" if all(case.unit == "mm" for case in pictures) else "px"


def case_spacing(case: Case, unit: str | None) -> np.ndarray:
    """Size of a voxel along the RAS axes (3,) in mm, or in pixels where those are the unit."""
    return np.ones(3) if unit == "px" else case.spacing


def measure_ct(values: np.ndarray) -> dict[str, float]:
    """Constants for `normalise`, as in nnU-Net, of the foreground of all training cases (N,)."""
    low, high = np.percentile(values, (0.5, 99.5)).tolist()  # beyond: metal, and slips of the mask
    clipped = values.clip(low, high).astype(np.float64)
    return {
        "low": low,
        "high": high,
        "mean": float(clipped.mean()),
        "std": float(clipped.std()) or 1.0,
    }


def is_ct(channel: str) -> bool:
    """Whether a modality or channel name is one of CT: CT, "CT scan", CTA, CBCT, ..."""
    # Words and not parts of them: "CT1" is contrast-enhanced T1.
    words = set(re.split(r"[^A-Z0-9]+", channel.upper()))
    if words >= {"COMPUTED", "TOMOGRAPHY"}:
        return True
    if words & {"PET", "SPECT"}:
        return False
    return any(re.fullmatch(CT_NAME, word) for word in words)


def check_grids(cases: list[Case], meta: dict) -> None:
    """Set the error of cases that cannot be put on the common grid."""
    unit = meta.get("picture_unit")
    for case in cases:
        with keeping_error(case):
            check_unit(case.images[0], case.unit, meta)
            check_grid(case.images[0], case.shape, case_spacing(case, unit), meta)


def check_unit(path: Path, unit: str, meta: dict) -> None:
    """Raise DataError for a picture among volumes, a volume among pictures, or px among mm."""
    is_flat = "picture_unit" in meta
    if is_picture(path) != is_flat:
        kinds = ("a volume", "a picture")
        found = f"{kinds[not is_flat]}, expected {kinds[is_flat]}"
        raise DataError(f"{path}: {found}, as the network was trained on")
    if meta.get("picture_unit") == "mm" and unit == "px":
        expected = "expected one as in training: write it into the file (PNG pHYs, TIFF tags)"
        raise DataError(f"{path}: no resolution, {expected}")


def check_grid(path: Path, shape: tuple[int, ...], spacing: np.ndarray, meta: dict) -> None:
    """Raise DataError if a volume in RAS gets an impossible grid: its unit or spacing is wrong."""
    if not meta["resample"]:
        return
    grid = grid_shape(shape, spacing, meta)
    if math.prod(grid) > MAX_GRID or max(grid) < 2:
        before = f"{show_size(shape)} voxels of {show_size(spacing)} mm"
        after = f"{show_size(grid)} voxels of {show_size(meta['spacing'])} mm"
        hint = "check its pixdim and unit, or --spacing"
        raise DataError(f"{path}: {before} would become {after}: {hint}")


def grid_shape(shape: tuple[int, ...], spacing: np.ndarray, meta: dict) -> tuple[int, ...]:
    """Voxels per axis of the common grid for a volume in RAS: it covers the same millimetres."""
    if not meta["resample"]:
        return tuple(shape)
    sizes = np.array(shape) * spacing / meta["spacing"]
    # A spacing that differs by rounding in the header only must not change the number of voxels.
    rounded = np.floor(sizes + 0.5 + 1e-3)
    return tuple(max(1, int(size)) for size in rounded)


def find_axes(affine: np.ndarray) -> np.ndarray:
    """Of each axis of a file (3, 2): the RAS axis that it comes next to, and 1 or -1."""
    return find_axes_once(affine.astype(float).tobytes())


@lru_cache  # a case asks several times, and files mostly have the affine of their neighbours
def find_axes_once(affine: bytes) -> np.ndarray:
    return io_orientation(np.frombuffer(affine).reshape(4, 4))


def orient(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How nibabel turns the axes of a file into RAS, (3, 2), and the spacing in mm along those."""
    orientation = find_axes(affine)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    return orientation, spacing


def ras_shape(shape: tuple[int, ...], affine: np.ndarray) -> tuple[int, ...]:
    """Voxels along the RAS axes of a volume with this shape (X, Y, Z) in the axes of its file."""
    orientation = find_axes(affine)
    return tuple(int(shape[axis]) for axis in np.argsort(orientation[:, 0]))


def print_plan(meta: dict) -> None:
    """Classes, how each channel is normalised, and the common grid, on one line."""
    unit = meta.get("picture_unit", "mm")
    kind = f"to {meta['spacing']} {unit}" if meta["resample"] else "each on its own grid"
    names = []
    for name, constants in zip(meta["channels"], meta["normalisation"], strict=True):
        how = "each image to mean 0, deviation 1"
        if constants is not None:
            how = f"as CT: clipped to {constants['low']:.4g} .. {constants['high']:.4g}"
        names.append(f"{name} ({how})")
    print(f"classes {' '.join(meta['classes'])}; channels {' '.join(names)}; {kind}")


# --- write: the arrays ---


def convert(case: Case, folder: Path, meta: dict) -> Case:
    """Write the four files of a case, from the voxels that `inspect` has left, or set its error."""
    path = folder / AS_READ / case.id
    with keeping_error(case):
        with open(path, "rb") as file:
            volume = np.load(file)  # (X, Y, Z, C) of the file
            mask = np.load(file)  # (X, Y, Z) of the file
        image = (volume, case.affine, case.header)
        volume, affine, header = fit_picture(case.images[0], image, meta)
        image = to_grid(volume, affine, meta)  # (C, X, Y, Z) of the common grid
        check_range(case.images[0], image)
        labels = mask_to_grid(mask, affine, meta)  # (X, Y, Z) of the common grid
    path.unlink()  # so that the disk never holds all volumes twice
    if not case.error:
        volumes = folder / "volumes"
        write_mask(volumes / f"{case.id}.truth.nii.gz", mask, affine, header)
        np.save(volumes / f"{case.id}.image.npy", image)
        np.save(volumes / f"{case.id}.mask.npy", labels)
        points = draw_points(labels, len(meta["classes"]))
        np.save(volumes / f"{case.id}.points.npy", points)
    return case


def fit_picture(path: Path, image: Volume, meta: dict) -> Volume:
    """A picture in the unit and with the channels of a meta.json; a volume as it is."""
    volume, affine, header = image
    check_unit(path, unit_of(header), meta)
    if meta.get("picture_unit") == "px":
        affine, header = picture_grid(volume.shape[:3], [])
    if is_gray_of_colours(path, volume.shape[3], meta["channels"]):
        volume = volume.repeat(3, 3)
    return volume, affine, header


def to_grid(volume: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
    """A volume (X, Y, Z, C) of a file as networks see it: float16 (C, X, Y, Z) on the grid."""
    orientation, spacing = orient(affine)
    volume = apply_orientation(volume, orientation)  # RAS
    volume = np.moveaxis(volume, 3, 0)  # (C, X, Y, Z)
    shape = grid_shape(volume.shape[1:], spacing, meta)
    image = np.empty((len(volume), *shape), np.float16)
    with np.errstate(over="ignore"):  # check_range names it
        for k, constants in enumerate(meta["normalisation"]):
            if shape == volume[k].shape:
                image[k] = normalise(volume[k], constants, np.float16)
            else:
                image[k] = resample(normalise(volume[k], constants), shape)
    return image


def normalise(
    channel: np.ndarray, constants: dict | None, dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """CT, with constants: clip and scale by those. Others: to mean 0 and deviation 1 of the image.

    If more than half of the voxels have the smallest value (air set to zero), they do not count.
    """
    values = channel
    is_whole = channel.dtype.kind in "iu"
    if is_whole:
        # There are more voxels than values: each value is normalised once, and then looked up.
        channel = z_innermost(channel)
        values, counts = count_values(channel)
    if constants:
        clipped = values.clip(constants["low"], constants["high"])
        normalised = (clipped - constants["mean"]) / constants["std"]
    else:
        mean, std = weighted_moments(values, counts) if is_whole else moments(values)
        normalised = (values - mean) / (std or 1.0)
    normalised = normalised.astype(dtype, copy=False)
    return apply_table(normalised, channel) if is_whole else normalised


def z_innermost(volume: np.ndarray) -> np.ndarray:
    """`np.ascontiguousarray` of (X, Y, Z), several times as fast where x is innermost, as in NIfTI.

    A plane at a time, which is packed first: so it stays in the cache while its axes are exchanged.
    """
    if volume.flags.c_contiguous:
        return volume
    result = np.empty(volume.shape, volume.dtype)
    for y in range(volume.shape[1]):
        result[:, y] = volume[:, y].copy(order="K")
    return result


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and deviation, without the smallest value if more than half of them have it."""
    inside = values > values.min()
    if 0 < inside.mean() < 0.5:
        values = values[inside]  # (N,)
    return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))


def weighted_moments(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The `moments` of values (K,) that occur so many times."""
    counts = counts.copy()
    smallest = np.argmin(np.where(counts, values, np.inf))
    above = counts.sum() - counts[smallest]
    if 0 < above / counts.sum() < 0.5:
        counts[smallest] = 0
    values = values.astype(np.float64)
    mean = counts @ values / counts.sum()
    variance = counts @ np.square(values - mean) / counts.sum()
    return float(mean), math.sqrt(variance)


def count_values(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers 0 .. highest, lowest .. -1, float32 (K,), and how often each occurs (K,).

    In this order a number is its own index, where negative ones count from the end.
    """
    lowest = min(0, int(numbers.min()))
    highest = max(0, int(numbers.max()))
    counts = np.zeros(highest - lowest + 1, np.int64)
    flat = numbers.reshape(-1)
    for start in range(0, len(flat), CHUNK):
        index = np.subtract(flat[start : start + CHUNK], lowest, dtype=np.intp)
        counts += np.bincount(index, minlength=len(counts))
    values = np.arange(lowest, highest + 1, dtype=np.float32)
    return np.roll(values, lowest), np.roll(counts, lowest)


def apply_table(table: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The entry of a table (K,) for each of the whole numbers; negative ones count from its end."""
    numbers = np.ascontiguousarray(numbers)
    result = np.empty(numbers.shape, table.dtype)
    flat = numbers.reshape(-1)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        np.take(table, flat[part], out=result.reshape(-1)[part], mode="wrap")
    return result


def resample(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample float32 (X, Y, Z) to another shape over the same extent."""
    ratios = [new / old for new, old in zip(shape, volume.shape, strict=True)]
    for axis in np.argsort(ratios, kind="stable").tolist():  # shrink first: less is left to do
        if shape[axis] != volume.shape[axis]:
            matrix = resampling_matrix(volume.shape[axis], shape[axis])
            volume = np.tensordot(matrix, volume, (1, axis))  # the new axis comes first
            volume = np.moveaxis(volume, 0, axis)
    return volume


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """Weights float32 (new, old) that resample `old` voxels of an axis to `new` of the same extent.

    Linear interpolation; when shrinking the triangle widens to the new voxel size, which is
    antialiasing.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5  # of the new voxels, in old ones
    distance = np.abs(centers[:, None] - np.arange(old))  # (new, old) in old voxels
    width = max(1.0, old / new)
    weights = (1 - distance / width).clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def check_range(path: Path, image: np.ndarray) -> None:
    """Raise DataError if a normalised image does not fit into float16."""
    exponents = image.view(np.uint16) & 0x7C00
    if exponents.max() == 0x7C00:  # infinite or NaN (IEEE 754); isfinite takes 20 times as long
        raise DataError(
            f"{path}: normalised values beyond 65504, which float16 cannot hold: the object has "
            "almost no contrast of its own beside its background; check its values"
        )


def mask_to_grid(mask: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
    """Class numbers uint8 (X, Y, Z) on the grid: classes are resampled, the largest share wins."""
    orientation, spacing = orient(affine)
    mask = z_innermost(mask)
    if meta["values"] != list(range(len(meta["values"]))):
        class_of = np.searchsorted(meta["values"], np.arange(256)).astype(np.uint8)
        mask = apply_table(class_of, mask)
    mask = apply_orientation(mask, orientation)  # RAS
    shape = grid_shape(mask.shape, spacing, meta)
    if shape == mask.shape:
        return np.ascontiguousarray(mask)
    # A running maximum: all classes at once would not fit into memory.
    best = np.zeros(shape, np.float32)
    labels = np.zeros(shape, np.uint8)
    for k in range(len(meta["values"])):
        share = resample((mask == k).astype(np.float32), shape)
        labels[share > best] = k
        np.maximum(best, share, out=best)
    return labels


def draw_points(labels: np.ndarray, classes: int) -> np.ndarray:
    """Up to 1000 random voxels of each foreground class, int16 (N, 4): class, x, y, z."""
    rng = np.random.default_rng(0)
    points = [np.empty((0, 4), np.int16)]  # in case that there is no foreground
    for k in range(1, classes):  # as many of a small structure as of a large one
        inside = np.flatnonzero(labels == k)  # (n,)
        inside = rng.choice(inside, min(POINTS, len(inside)), replace=False)
        voxels = np.column_stack(np.unravel_index(inside, labels.shape))  # (up to POINTS, 3)
        points.append(np.insert(voxels, 0, k, axis=1).astype(np.int16))
    return np.concatenate(points)


def write_mask(
    path: Path,
    mask: np.ndarray,
    affine: np.ndarray,
    header: nib.Nifti1Header | None,
    description: bytes = b"",
) -> None:
    """Write uint8 (X, Y, Z) with the forms, codes and unit of its image's header.

    Without a header (DICOM) both forms are the affine, in mm. What the header says of the image's
    values (window, intent, file of colours) does not hold for classes.
    """
    if header is None:
        nifti = nib.Nifti1Image(mask, affine)
        nifti.header.set_xyzt_units("mm")
        nifti.set_qform(affine, 1)
        nifti.set_sform(affine, 1)
    elif isinstance(header, nib.Nifti2Header):
        nifti = nib.Nifti2Image(mask, None, header)
    else:
        nifti = nib.Nifti1Image(mask, None, header)
    nifti.set_data_dtype(np.uint8)
    nifti.header["cal_min"] = 0
    nifti.header["cal_max"] = 0
    nifti.header.set_intent("none")
    nifti.header["aux_file"] = b""
    if description:
        nifti.header["descrip"] = description
    nib.save(nifti, path)


# --- write: the cache ---


def check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise DataError if an output is an input, or a folder that holds one.

    By whatever name: symbolic and hard links count.
    """
    targets = {path.resolve() for path in outputs}
    existing = [path.stat() for path in targets if path.is_file()]
    inodes = {(status.st_dev, status.st_ino) for status in existing}
    for path in inputs:
        real = path.resolve()
        status = real.stat() if real.exists() else None
        is_linked = status is not None and (status.st_dev, status.st_ino) in inodes
        if is_linked or targets & {real, *real.parents}:
            raise DataError(f"{path}: would be overwritten by a result; give another --out")


@contextmanager
def open_output(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes OUT at the end: a stopped run leaves OUT as it was.

    Raises DataError if OUT holds anything but a cache (--overwrite never deletes what is not
    ours), if another run writes to it (the lock ends with the process), or if something cannot be
    written.
    """
    partial = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    lock = out.with_name(f".{out.name}.lock")
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
    names = set()
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
    elif out.exists():
        names = {"a file"}
    ours = {"images.npy", "volumes", "index.csv", "meta.json", "skipped.csv"}
    if names and not {"meta.json"} <= names <= ours:
        foreign = min(names - ours or names)
        raise DataError(f"{out}: holds {foreign}, expected a new folder or a cache")
    if names and not overwrite:
        raise DataError(f"{out}: exists already; use --overwrite, or another --out")


def write_index(path: Path, raw: Path, cases: list[Case]) -> None:
    """index.csv, a row a case; the files of channels are joined by semicolons."""
    rows = [(*INDEX_COLUMNS, *cases[0].more)]
    for case in cases:
        images = ";".join(image.relative_to(raw).as_posix() for image in case.images)
        mask = case.mask.relative_to(raw).as_posix()
        rows.append((case.id, case.group, case.fold, images, mask, *case.more.values()))
    write_rows(path, rows)


def write_rows(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file; the first row is the header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def report_copies(cases: list[Case]) -> list[dict]:
    """Name the cases whose images are the same to the last voxel, and whether their masks are."""
    same_image = defaultdict(list)
    for case in cases:
        same_image[case.digest].append(case)
    report = []  # goes into meta.json
    for members in same_image.values():
        if len(members) == 1:
            continue
        names = [case.id for case in members]
        folds = sorted({case.fold for case in members})
        different = len({case.mask_digest for case in members}) > 1
        masks = "different" if different else "the same"
        report.append({"cases": names, "masks": masks, "folds": folds})
        listed = " and ".join(names)
        print(f"note: {listed} are one image with {masks} masks, in fold {', '.join(folds)}")
    return report


# --- share: the way back to the file's grid ---


def from_grid(probabilities: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Probabilities (K, X, Y, Z) to class numbers uint8 in the shape and axes of the file.

    The probabilities are resampled slab by slab with a running maximum: on the file's grid, all
    classes at once would fill the memory (14 classes at 512x512x512: 15 GB).
    """
    orientation, _ = orient(affine)
    full = ras_shape(shape, affine)
    matrix = resampling_matrix(probabilities.shape[1], full[0])  # (full[0], X)
    labels = np.zeros(full, np.uint8)
    for start in range(0, full[0], 16):
        rows = matrix[start : start + 16]  # the weights of a slab of 16 planes
        used = np.flatnonzero(rows.any(0))  # the planes of the grid that they come from
        low = used[0]
        high = used[-1] + 1
        best = None
        for k, probability in enumerate(probabilities):
            part = probability[low:high].astype(np.float32)
            slab = np.tensordot(rows[:, low:high], part, 1)  # (16, Y, Z)
            slab = resample(slab, (len(rows), *full[1:]))  # (16, *full[1:])
            if best is None:  # class 0, with which `labels` is filled
                best = slab
                continue
            labels[start : start + 16][slab > best] = k
            np.maximum(best, slab, out=best)
    return apply_orientation(labels, ornt_transform(RAS, orientation))


# --- share: meta.json ---


def read_meta(cache: Path) -> dict:
    """The meta.json of a finished cache. Raises DataError with the command that makes one."""
    try:
        meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        command = f"python {Path(__file__).parent.name}/preprocess.py --data RAW --out {cache}"
        raise DataError(f"{cache}: no finished cache here; make one by: {command}") from error
    check_meta(meta, cache / "meta.json")
    return meta


def is_raw(path: Path) -> bool:
    """Whether train.py's --data is raw: a file, or a folder without what a cache is known by."""
    if not path.is_dir():
        return path.is_file()
    names = {inside.name for inside in path.iterdir()}
    return not names & {"meta.json", "images.npy"} and not {"index.csv", "volumes"} <= names


def describe_source(args: argparse.Namespace) -> dict:
    """Where a cache comes from, for its meta.json: the options, and a hash of what RAW holds.

    The hash is of names, sizes and times of all files: a change shows without reading them.
    """
    digest = hashlib.sha256()
    for path in [args.data] if args.data.is_file() else sorted(args.data.rglob("*")):
        parts = path.relative_to(args.data).parts
        is_hidden = any(part.startswith(".") for part in parts)  # .DS_Store, which nobody reads
        if path.is_file() and not is_hidden:
            status = path.stat()
            digest.update(repr((parts, status.st_size, status.st_mtime_ns)).encode())
    options = {name: str(value) for name, value in vars(args).items() if value}
    return {"options": options, "listing": digest.hexdigest()}


def compare_source(meta: dict, source: dict, raw: Path) -> str:
    """How a cache was made if not from these files with these options; "" if it was."""
    if meta.get("listing") != source["listing"]:
        return f"from other files than {raw} has now"
    then = meta.get("options", {})
    now = source["options"]
    differing = []
    for name in sorted({*then, *now} - {"data", "out", "workers", "overwrite"}):
        if then.get(name) != now.get(name):
            differing.append(f"{name} {then.get(name)} (now {now.get(name)})")
    return f"with other options: {', '.join(differing)}" if differing else ""


def check_meta(meta: object, where: Path) -> None:
    """Raise DataError unless a meta.json, or a checkpoint's meta, has what a network needs."""
    if not isinstance(meta, dict):
        problem = f"{type(meta).__name__}, expected names and values"
        raise DataError(f"{where}: {problem}; preprocess again")
    classes = meta.get("classes")
    values = meta.get("values")
    channels = meta.get("channels")
    spacing = meta.get("spacing")
    shape = meta.get("shape")
    normalisation = meta.get("normalisation")
    good = {
        "classes": isinstance(classes, list) and len(set(map(str, classes))) == len(classes) >= 2,
        "values": are_values(values),
        "channels": isinstance(channels, list) and len(channels) >= 1,
        "resample": type(meta.get("resample")) is bool,
        "spacing": is_triple(spacing) and all(is_number(mm, 0) for mm in spacing),
        "slice_axis": meta.get("slice_axis") in (0, 1, 2),
        "shape": is_triple(shape) and all(type(n) is int and n > 0 for n in shape),
        "normalisation": isinstance(normalisation, list)
        and all(map(is_normalisation, normalisation)),
        "picture_unit": meta.get("picture_unit", "mm") in ("px", "mm"),
    }
    # One mask value a class, one normalisation a channel.
    for one, other in (("values", "classes"), ("normalisation", "channels")):
        good[one] = good[one] and good[other] and len(meta[one]) == len(meta[other])
    for name, is_good in good.items():
        if not is_good:
            problem = f"{name} {meta.get(name)!r}, which is not that of a cache of"
            script = f"{Path(__file__).parent.name}/preprocess.py"
            raise DataError(f"{where}: {problem} {script}; preprocess again")


def is_triple(value: object) -> bool:
    """Whether a value of a JSON file is a list with an element for each of x, y and z."""
    return isinstance(value, list) and len(value) == 3


def are_values(values: object) -> bool:
    """Whether a value of a JSON file lists mask values: 0 and others up to 255, ascending."""
    if not isinstance(values, list):
        return False
    if not all(type(value) is int and 0 <= value <= 255 for value in values):
        return False
    return values[:1] == [0] and values == sorted(set(values))


def is_normalisation(constants: object) -> bool:
    """Whether `normalise` can use these constants: None, or numbers, low < high and std > 0."""
    if constants is None:
        return True
    names = ("low", "high", "mean", "std")
    if not isinstance(constants, dict) or not all(is_number(constants.get(name)) for name in names):
        return False
    return constants["low"] < constants["high"] and constants["std"] > 0


def is_number(value: object, low: float = -math.inf) -> bool:
    """Whether a value of a JSON file is a finite number above `low`."""
    return type(value) in (int, float) and math.isfinite(value) and value > low


# --- share: errors ---


class DataError(ValueError):
    """An error the user can fix: shown as one line with exit status 1, without a traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Text for a terminal: one line, control characters escaped, cut in the middle if long."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    line = "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in line)
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


def run_command(main: Callable, *errors: type) -> None:
    """Run a script's main: what the user can fix, or stopped, is one line.

    A bug keeps its traceback.
    """
    # A screen may lack the letters of a file's name; headers have slips, some in every file.
    sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"pydicom|PIL|nibabel")
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
