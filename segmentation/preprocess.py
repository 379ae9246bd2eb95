"""Turn MR or CT volumes, or pictures, with masks into arrays on a common grid and an index.

  python segmentation/preprocess.py --data Task04_Hippocampus --out data/hippocampus
  python segmentation/preprocess.py --data left_atrium --out data/atrium --spacing 1.5 1.5 1.5
  python segmentation/preprocess.py --data lesions --out data/lesions
  python segmentation/preprocess.py --data other_hospital --out data/other --like data/atrium

RAW is a folder as in the Medical Segmentation Decathlon: imagesTr/NAME.nii.gz, 3D, or 4D with the
channels last, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ..., a file a channel; or
imagesTr/NAME, a folder with a DICOM series, or NAME.dcm, an enhanced file with all slices;
labelsTr/NAME.nii.gz; and dataset.json, which names labels and modalities. imagesVa and labelsVa
are the validation set, imagesTs and labelsTs the test set. Or images/NAME and masks/NAME (or
labels/), perhaps in train/, val/ and test/: volumes, or pictures (PNG, JPEG, TIFF), which are
volumes of one slice with three channels, in pixels.

RAW may hold cases.csv: id and, optionally, patient, fold or split, and columns to keep.
Written to OUT, a new folder: index.csv (id, patient, fold, official split, digest of the voxels,
image, mask), meta.json, and for each case in volumes/
  ID.image.npy     float16 (C, X, Y, Z) in RAS (right, front, top), resampled, normalised
  ID.mask.npy      uint8 (X, Y, Z), class numbers on the same grid
  ID.points.npy    int16 (N, 4), up to 1000 voxels of each class: class, x, y, z
  ID.truth.nii.gz  the mask as it was, on the grid of its image's file, for eval.py
While it runs, OUT's disk also holds the voxels as they were read, 2 to 5 bytes each.

The sections of this file, in the order of execution:
  find   the cases of RAW, and the names of classes and channels
  read   every case once, and refuse what contradicts itself
  split  the patients into folds, and choose the common grid by the training cases
  write  the arrays on that grid, index.csv and meta.json
  new    images without masks, and the way back to a file's grid, for eval.py
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

# Cases are read side by side, and BLAS threads would only wait for each other: 1.7 times as long on
# two cores. NumPy looks this up when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
from nibabel import Nifti1Header, Nifti2Header
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.linalg import det, norm
from PIL import Image, ImageOps
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    FORMAT,
    DataError,
    new_folder,
    one_line,
    progress,
    read_meta,
    run_command,
    write_csv,
)

# Keys that --like caches and checkpoints inherit; picture_unit is px, or None for volumes
META = ("classes", "values", "channels", "resample", "spacing", "slice_axis", "shape")
META += ("normalisation", "picture_unit")
# Official splits by the ending of imagesTr and labelsTr, ...
FOLDERS = {"Tr": "", "Va": "val", "Ts": "test"}
# Official splits by the names that their folders have, in any case
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
# Endings of the names of masks
MASK_ENDING = re.compile(r"[_-](mask|seg|segmentation|label|gt|manual1?)$", re.IGNORECASE)
# What files are by their first bytes, in lower case
FORMATS = {
    b"\x89png": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"ii*\0": "TIFF",
    b"mm\0*": "TIFF",
    b"gif8": "GIF",
    b"nrrd": "NRRD",
    b"bm": "BMP",
    b"mz": "program",
    b"pk\3\4": "ZIP",
    b"\xd0\xcf\x11\xe0": "Office file or Thumbs.db",
    b"\xff\xfe": "text in UTF-16",
    b"objecttype": "MetaImage",
    b"ndims": "MetaImage",
    b"version https://git-lfs": "Git LFS pointer (run: git lfs pull)",
    b"<!doctype html": "web page (download the file again)",
    b"<html": "web page (download the file again)",
}
PICTURES = ("PNG", "JPEG", "TIFF")
COLOURS = ["red", "green", "blue"]
IMAGES = ("NIfTI", "DICOM", *PICTURES, "GIF", "NRRD", "MetaImage")
UID_HINT = "a UID for each slice? give all slices of a series one SeriesInstanceUID"
RECIPES = "see 'From other formats' in segmentation/README.md"
PREDICTION = b"prediction of segmentation/eval.py"  # in the header of masks
AS_READ = "as_read"  # folder of what is read and not yet written
FOLDS = 5
MAX_GRID = 2**30  # voxels: a larger grid has a wrong unit
SHIFT = 0.1  # voxels that a slice or a corner may lie off
POINTS = 1000  # voxels of a class, to draw patches at
SAMPLE = 10_000  # voxels of a case that CT is measured on
MASK_VALUES = 64  # the most values in a file of masks

RAS = [[0, 1], [1, 1], [2, 1]]  # nibabel's identity orientation
PICTURE_TO_RAS = np.diag([1.0, -1.0, 1.0, 1.0])  # the first row is at the top
LPS_TO_RAS = np.diag([-1, -1, 1, 1])  # DICOM: left, back, top
UNIT_MM = {1: 1000.0, 3: 0.001}  # xyzt_units: metre and micron
QUIET = logging.Logger("repairs", logging.CRITICAL + 1)  # nibabel reports every repair
CT_NAMES = "CT CTA CTPA CCTA CBCT CECT NCCT HRCT LDCT MDCT MSCT DECT"  # whole words
# The functional groups that place a frame of an enhanced file and scale its pixels. Others, private
# ones above all (Philips), hold attributes of the same names with other values.
MACROS = "PlanePositionSequence PlaneOrientationSequence PixelMeasuresSequence "
MACROS += "FrameContentSequence PixelValueTransformationSequence MREchoSequence"

Shape = tuple[int, ...]
Labels = dict[int, str]  # class names by mask value
Header = Nifti1Header | None  # None for DICOM and pictures
Notes = list[tuple[str, str]]  # what is odd, in the same words each time, and details
Reasons = list[tuple[str, str]]  # what cannot be used, and why


@dataclass
class Volume:
    """An image as it was read."""

    voxels: np.ndarray  # (X, Y, Z, C) of the file, by `compact`
    affine: np.ndarray  # (4, 4) to RAS in mm, or pixels
    header: Header = None
    modality: str = ""  # DICOM: CT, MR, PT
    patient: str = ""  # hash of the DICOM PatientID, or ""


@dataclass
class Case:
    """A volume and its mask: where they are, what reading them shows, and where they go."""

    id: str
    images: list[Path]  # one, or one a channel
    mask: Path
    split: str = ""  # train, val, test, 0 to 4, or ""
    patient: str = ""  # by cases.csv, else the PatientID, else the case
    more: dict[str, str] = field(default_factory=dict)  # columns of cases.csv
    error: str = ""  # why it cannot be used
    notes: Notes = field(default_factory=list)

    # Set by `inspect`
    image: Volume | None = None  # its voxels lie in AS_READ
    shape: Shape = ()  # voxels along the RAS axes
    spacing: np.ndarray | None = None  # mm along the RAS axes, (3,)
    values: list[int] = field(default_factory=list)  # all values in the mask
    foreground: np.ndarray | None = None  # in the mask, float32 (N, C)
    digest: str = ""  # hash of the voxels

    # Set by `split_cases` and `convert`
    group: str = ""
    fold: str = ""
    seen: np.ndarray | None = None  # voxels of each class on the grid, (K,)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw volumes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache, a new folder")
    add("--spacing", nargs="+", default=["median"], metavar="MM", help="X Y Z, median or keep")
    add("--patient-regex", help="finds the patient in file names or paths, by its first group")
    add("--test-fraction", type=float, default=0.0, help="of the cases (default: %(default)s)")
    add("--like", type=Path, metavar="CACHE", help="a test set for the models of this cache")
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave unusable cases out, see skipped.csv")
    args = parser.parse_args(argv)

    if args.like and (args.spacing != ["median"] or args.test_fraction):
        parser.error("--like brings its spacing, and all cases are test")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    try:
        if args.spacing not in (["median"], ["keep"]):
            args.spacing = [float(value) for value in args.spacing]
            if len(args.spacing) != 3 or not all(0.01 <= mm <= 100 for mm in args.spacing):
                raise ValueError("--spacing: expected three numbers from 0.01 to 100")
        re.compile(args.patient_regex or "")
    except (ValueError, re.error) as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    preprocess(args)
    command = "eval.py --checkpoint RUN/best.pt --split test" if args.like else "train.py"
    print(f"next: python segmentation/{command} --data {shlex.quote(str(args.out))}")


def preprocess(args: Namespace) -> None:
    """Write the cache; `args` are those of `parse_args`. Raises DataError."""
    like = read_meta(args.like, "segmentation", META) if args.like else {}

    # Find. What cannot be used is collected, here and below, so that one run names all of it.
    bad: Reasons = []
    cases = find_cases(args.data, bad)
    read_cases_table(args.data, cases)
    labels, channels = read_description(args.data)
    if like:
        trained = dict(zip(like["values"], like["classes"], strict=True))
        if labels and labels != trained:
            raise DataError(f"{args.data}: labels {labels}, but {args.like} has {trained}")
        labels = trained
        channels = like["channels"]
    print(f"{args.data}: {len(cases)} cases with masks")
    with new_folder(args.out) as folder:
        print_reasons(bad)

        # Read what has to be known of all cases before the first is written.
        (folder / AS_READ).mkdir()
        one = partial(inspect, count=len(channels or []), folder=folder)
        for_each(one, cases, args.workers, "read")
        read = [case for case in cases if not case.error]
        labels, channels = complete_names(read, labels, channels)
        rule = "as in the training set" if like else "without gaps, or a dataset.json with others"
        check = partial(check_names, labels=labels, channels=channels, rule=rule)
        for_each(check, read, 1, "checked")
        cases = drop_bad(cases, bad, args.skip_bad)

        # Split into folds, and choose the common grid by the training cases.
        use_patient_ids(cases)
        split_cases(cases, args)
        meta = like or plan_cache(cases, args.spacing, labels, channels)
        print_plan(cases, meta)

        # Write the arrays, and then index.csv and meta.json.
        (folder / "volumes").mkdir()
        for_each(partial(convert, folder=folder, meta=meta), cases, args.workers, "written")
        shutil.rmtree(folder / AS_READ)  # with what was refused
        cases = drop_bad(cases, bad, args.skip_bad)
        split_cases(cases, args)
        if bad:  # a name that is not UTF-8 may be the reason
            options = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
            with open(folder / "skipped.csv", "w", **options) as file:
                csv.writer(file).writerows([("source", "reason"), *bad])
        print_classes(cases, meta)
        counts = Counter(case.fold for case in cases)
        print("  ".join(f"fold {fold}: {counts[fold]}" for fold in sorted(counts)))
        write_index(folder / "index.csv", args.data, cases)
        meta |= {"format": FORMAT, "task": "segmentation", "n": len(cases)}
        meta |= {"counts": dict(counts), "skipped": len(bad)}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


# --- find: cases, classes and channels ---


def find_cases(raw: Path, bad: Reasons) -> list[Case]:
    """The cases of a folder in one of the layouts. Files that cannot be used go to `bad`."""
    if not raw.is_dir():
        raise DataError(f"{raw}: {'not a folder' if raw.exists() else 'not found'}")
    folders = find_folders(raw)
    cases = []
    beside = set(raw.iterdir())
    for images, masks, split in folders:
        cases += pair_masks(raw, images, masks, split, bad)
        beside |= set(images.parent.iterdir())
    beside -= {path for images, masks, _ in folders for path in (images, masks, images.parent)}
    for folder in sorted(beside):  # nothing is left out in silence
        example = next((path for path in list_files(folder) if kind_of(path) in IMAGES), None)
        if example:
            print(f"note: {folder}: left out, images such as {example.relative_to(folder)}")
    if not cases:
        print_reasons(bad)
        for below in raw.iterdir():
            if not folders and below.is_dir() and find_folders(below):
                raise DataError(f"{raw}: one folder too high: use --data {below}")
        files = [path.relative_to(raw).as_posix() for path in islice(list_files(raw), 3)]
        found = f"no image with a mask of its name, but {', '.join(files) or 'no files'}"
        expected = "imagesTr/NAME.nii.gz and labelsTr/NAME.nii.gz, or images/NAME and masks/NAME"
        raise DataError(f"{raw}: {found}; expected {expected}; {RECIPES}")
    if len({case.id for case in cases}) < len(cases):
        for case in cases:  # numbers that start anew
            case.id = f"{case.split or 'train'}_{case.id}"
    return cases


def find_folders(raw: Path) -> list[tuple[Path, Path, str]]:
    """Folders of images that are there, those of their masks, and the official split or ""."""
    folders = [(raw / f"images{end}", raw / f"labels{end}", FOLDERS[end]) for end in FOLDERS]
    for parent in [raw, *sorted(raw.iterdir())]:
        if parent.is_dir() and (parent == raw or parent.name.lower() in SPLITS):
            inside = {path.name.lower(): path for path in parent.iterdir()}
            masks = inside.get("masks", inside.get("labels", parent / "masks"))
            split = "" if parent == raw else SPLITS[parent.name.lower()]
            folders.append((inside.get("images", parent / "images"), masks, split))
    return [pair for pair in folders if pair[0].is_dir()]


def list_files(top: Path) -> Iterator[Path]:
    """All files below a folder in the order of their names, but hidden ones and DICOMDIR."""
    for folder, names, files in os.walk(top, followlinks=True):
        # A link to a folder above would never end.
        above = {path.resolve() for path in (Path(folder), *Path(folder).parents)}
        names[:] = [name for name in sorted(names) if Path(folder, name).resolve() not in above]
        names[:] = [name for name in names if not name.startswith(".")]
        # macOS writes ._NAME beside NAME; DICOMDIR is the table of contents of a disc.
        for name in sorted(files):
            if not name.upper().startswith((".", "DICOMDIR")):
                yield Path(folder, name)


def kind_of(path: Path) -> str:
    """The format of a file, DICOM for a folder with such files, or else a word for messages."""
    if path.is_dir():
        is_series = any(path.is_file() and kind_of(path) == "DICOM" for path in path.iterdir())
        return "DICOM" if is_series else "folder"
    if not path.is_file():
        return "broken link"
    if NIFTI.search(path.name):
        return "NIfTI"
    with open(path, "rb") as file:
        kind = name_format(file.read(132))
    if kind in ("", "text", "zero bytes") and path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return "DICOM"
    return kind or path.suffix.lower() or "file"


def name_format(head: bytes) -> str:
    """The format of a file by its first 132 bytes, or ""."""
    if head[128:] == b"DICM":  # PS3.10 7.1: after a preamble of 128 bytes
        return "DICOM"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for first, kind in FORMATS.items():
        if start.startswith(first):
            return kind
    if not head:
        return "zero bytes"
    return "text" if all(byte >= 32 or byte in b"\t\n\r" for byte in head) else ""


def case_name(path: Path) -> str:
    """The name of a case: of a file without its suffix, or of the folder of a series."""
    if path.is_dir() or NIFTI.search(path.name):
        return NIFTI.sub("", path.name)
    return re.sub(r"\.[A-Za-z]+$", "", path.name)  # but not the end of 1.2.840.5


def pair_masks(raw: Path, images_in: Path, masks_in: Path, split: str, bad: Reasons) -> list[Case]:
    """The cases of two folders. Files of none go to `bad`, with the reason."""

    def refuse(paths: Iterable[Path], reason: str) -> None:
        for path in paths:
            bad.append((path.relative_to(raw).as_posix(), f"{path}: {reason}"))

    images = list_by_name(images_in)
    if split in ("val", "test") and not masks_in.is_dir():
        print(f"note: {len(images)} images in {images_in} have no masks and are left out")
        return []
    masks = defaultdict(list)
    stems = {split_channel(name)[0] for name in images} | images.keys()
    for name, paths in list_by_name(masks_in).items():
        masks[name if name in stems else MASK_ENDING.sub("", name)] += paths

    # Channel numbers and files of each image. A name may end in four digits by itself.
    channels = defaultdict(list)
    for name, paths in images.items():
        stem, number = split_channel(name)
        if name in masks or stem in images or stem not in masks:
            stem, number = name, 0
        channels[stem] += [(number, path) for path in paths]
    cases = []
    for name, files in sorted(channels.items()):
        numbers = [number for number, _ in sorted(files)]
        paths = [path for _, path in sorted(files)]
        mask_paths = masks.pop(name, [])
        if len(mask_paths) != 1 or not name.isprintable():
            refuse(paths, f"{len(mask_paths)} masks of that (printable) name in {masks_in.name}")
        elif numbers != list(range(len(numbers))):
            refuse(paths, f"files of this name for channels {numbers}, expected 0, 1, ...")
        else:
            cases.append(Case(name, paths, mask_paths[0], split))
    for paths in masks.values():
        refuse(paths, f"no image of that name in {images_in.name}")
    return cases


def split_channel(name: str) -> tuple[str, int | None]:
    """nnU-Net's NAME_0001 as NAME and 1; other names as they are and None."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], int(match[2])) if match else (name, None)


def list_by_name(folder: Path) -> dict[str, list[Path]]:
    """Images or masks of a folder by name: volumes, or else pictures. What is none is noted."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    kinds = {path: kind_of(path) for path in inside if not path.name.startswith(".")}
    wanted = [kind for kind in ("NIfTI", "DICOM") if kind in kinds.values()] or PICTURES
    by_name = defaultdict(list)  # a.nii and a.NII.gz: a
    skipped = defaultdict(list)
    for path, kind in kinds.items():
        if kind in wanted:
            by_name[case_name(path)].append(path)
        else:
            skipped[kind].append(path.name)
    for kind, names in skipped.items():
        print(f"note: {folder}: left out, {kind}: {len(names)}, such as {names[0]}")
    return by_name


# --- find: cases.csv, dataset.json ---


def read_cases_table(raw: Path, cases: list[Case]) -> None:
    """Set patient, split and further columns of the cases by RAW/cases.csv, if there is one."""
    table = raw / "cases.csv"
    if (raw / "splits_final.json").is_file():
        print(f"note: splits_final.json is not read: make cases.csv; {RECIPES}")
    if not table.is_file():
        return
    rows = {}
    splits = {"": ""} | SPLITS | {str(fold): str(fold) for fold in range(FOLDS)}
    for place, row in read_table(table):
        name = NIFTI.sub("", row.pop("id"))
        split = row.pop("fold", "") + row.pop("split", "").lower()
        if split not in splits:
            expected = "one of the two: fold 0 to 4 or test, split train, val or test"
            raise DataError(f"{place}: fold or split {split!r}, expected {expected}")
        if name in rows:
            raise DataError(f"{place}: {name} stands there twice, expected one row")
        rows[name] = (splits[split], row.pop("patient", ""), row)
    without = [case.id for case in cases if case.id not in rows]
    unmatched = sorted(rows.keys() - {case.id for case in cases})
    if len(unmatched) == len(rows):
        raise DataError(f"{table}: no id of its rows is a case, expected such as {cases[0].id}")
    blank = ("", "", dict.fromkeys(row, ""))
    for case in cases:
        split, case.patient, case.more = rows.get(case.id, blank)
        case.split = split or case.split
    if without or unmatched:
        counts = f"{len(without)} cases without a row, {len(unmatched)} rows without a case"
        print(f"note: {table}: {counts}, such as {(without + unmatched)[0]}")


def read_table(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place (file:line) and values of every row of a CSV table in UTF-8 with a column id."""
    with explaining(table):
        text = table.read_text(encoding="utf-8-sig")  # Excel's byte order mark
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        (_, names), *rows = [(reader.line_num, [one.strip() for one in row]) for row in reader]
    read = ("id", "patient", "fold", "split")  # in any case of letters
    names = [name.lower() if name.lower() in read else name for name in names]
    if "id" not in names or len(set(names)) < len(names) or {*names} & {"digest", "image", "mask"}:
        expected = "id and different others, none of digest, image, mask"
        raise DataError(f"{table}: columns {names}, expected {expected}")
    for line, row in rows:
        if len(row) > len(names):
            fields = f"{len(row)} fields for {len(names)} columns; decimal commas?"
            raise DataError(f"{table}:{line}: {fields} expected points")
        if any(row):
            values = dict(zip_longest(names, row, fillvalue=""))
            values.pop("", None)  # the row numbers of pandas
            yield f"{table}:{line}", values


def read_description(raw: Path) -> tuple[Labels | None, list[str] | None]:
    """Class names by mask value, and channel names, of dataset.json; None for what it lacks."""
    path = raw / "dataset.json"
    if not path.is_file():
        return None, None
    try:
        # As bytes: json tells the encoding by the byte order mark, if there is one.
        description = json.loads(path.read_bytes(), object_pairs_hook=refuse_doubles)
        labels = description.get("labels")
        channels = description.get("channel_names", description.get("modality"))
        if isinstance(channels, dict):
            channels = [channels[key] for key in sorted(channels, key=int)]
        elif isinstance(channels, str):
            channels = [channels]
        return read_labels(labels) if labels else None, list(map(str, channels or [])) or None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: labels and modality as in the Decathlon? {error}") from error


def refuse_doubles(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object in which no key stands twice: the first value would be lost."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return dict(pairs)


def read_labels(labels: dict) -> Labels:
    """Class names by mask value, of {"0": "background"} or, newer, {"background": 0}.

    Raises ValueError unless they are one to one.
    """
    pairs = list(labels.items())
    # Decided once for all of them: names can be numbers, too, as those of teeth.
    if all(type(value) is int for value in labels.values()):
        pairs = [(number, name) for name, number in pairs]
    names = {}
    for number, name in pairs:
        if not str(number).isdecimal() or str(name).lower() == "ignore":
            raise ValueError(f"{labels}: regions and nnU-Net's ignore are not supported")
        names[int(number)] = str(name).strip()
    if len(set(names.values())) < len(labels):  # a class would be left out of the mean Dice
        raise ValueError(f"{labels}: two of them have one name or one number")
    if 0 not in names or len(names) < 2 or max(names) > 255:
        expected = "0 = background and others; give the classes numbers up to 255"
        raise ValueError(f"{labels}, expected {expected}; {RECIPES}")
    return dict(sorted(names.items()))


# --- read: every case once ---


def for_each(function: Callable, cases: list[Case], workers: int, done: str) -> None:
    """Call function(case) for all cases in threads; what makes one unusable becomes its `error`."""

    def attempt(case: Case) -> None:
        try:
            function(case)
        except (DataError, MemoryError) as error:
            notes = "; ".join(f"{what} {detail}".strip() for what, detail in case.notes)
            case.error = f"{explain(case.images[0], error)}{notes and f' (note: {notes})'}"

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for number, _ in enumerate(pool.map(attempt, cases), 1):
            progress(f"{done} {number}/{len(cases)}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # for Ctrl-C
    progress("")


def default_workers() -> int:
    """As many as this process may use cores, but at most 8: each holds a whole image."""
    if hasattr(os, "sched_getaffinity"):  # on a shared node fewer than os.cpu_count()
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def inspect(case: Case, count: int, folder: Path) -> None:
    """Read and check a case of `count` channels (0: not known); its voxels go to `folder`."""
    case.image = read_channels(case.images, count, case.notes)
    volume = case.image.voxels  # (X, Y, Z, C) of the file
    mask = read_mask(case.mask, case.image)  # (X, Y, Z)
    case.image.voxels = None
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in mask.T)
    case.values = np.flatnonzero(counts).tolist()
    _, case.spacing, case.shape = orient(case.image.affine, mask.shape)
    inside = np.flatnonzero(mask)
    inside = inside[:: len(inside) // SAMPLE + 1]
    case.foreground = volume[np.unravel_index(inside, mask.shape)].astype(np.float32)  # (N, C)
    case.digest = hash_pixels(volume.T)  # NIfTI has x innermost
    # For `convert`: to decompress them again would take longer.
    with open(folder / AS_READ / case.id, "wb") as file:
        np.save(file, volume)
        np.save(file, mask)


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """The one place where the readers' many exceptions become a DataError that names the file."""
    try:
        yield
    except Exception as error:  # readers raise whatever they like
        raise explain(path, error) from error


def explain(path: Path, error: Exception) -> DataError:
    """An exception of a reader as one line that names the file."""
    reason = " ".join(str(error).split())
    if isinstance(error, DataError):
        return error
    if isinstance(error, MemoryError):
        return DataError(f"{path}: not enough memory for it ({reason or 'MemoryError'})")
    if "plugins" in reason:  # pydicom lists them
        reason += '; more decoders: pip install "pylibjpeg[all]"'
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return DataError(f"{path}: {kind}{reason}")


def read_channels(paths: list[Path], count: int, notes: Notes) -> Volume:
    """Read an image of one file, or of one a channel, of `count` channels (0: not known)."""
    images = [read_volume(path, notes) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.voxels.shape[3] == 3 and (len(paths) > 1 or count == 1):  # a gray picture?
            gray = image.voxels[..., :1]
            image.voxels = gray if (gray == image.voxels).all() else image.voxels
        with explaining(path):
            check_same_grid(image.voxels.shape[:3], image.affine, images[0])
    if len(paths) > 1:
        images[0].voxels = np.concatenate([image.voxels for image in images], 3)
    return images[0]


def read_volume(path: Path, notes: Notes, files: list[Path] | None = None) -> Volume:
    """Read NIfTI, DICOM (a folder, one file, or `files`) or a picture, or raise DataError."""
    with explaining(path):
        kind = kind_of(path)
        if kind in PICTURES:  # one slice in pixels, x to the right and y down; gray in colour
            picture = open_picture(path)
            is_deep = picture.mode[0] in "IF"  # gray, 16 or 32 bits
            pixels = np.atleast_3d(np.asarray(picture if is_deep else picture.convert("RGB")))
            pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))  # (Y, X, 3)
            image = Volume(pixels.swapaxes(0, 1)[:, :, None], PICTURE_TO_RAS)
        elif files or kind in ("DICOM", "folder"):
            inside = [file for file in list_files(path) if file.parent == path]
            image = read_series(path, files or inside or [path], notes)
        elif path.is_file():  # a pipe would wait for ever
            image = Volume(*read_nifti(path, notes, np.float32))
        else:
            raise ValueError("not a file" if path.exists() else "not found")
        volume = image.voxels if image.voxels.ndim == 4 else image.voxels[..., None]
        low = np.array([channel.min() for channel in np.moveaxis(volume, 3, 0)])
        high = np.array([channel.max() for channel in np.moveaxis(volume, 3, 0)])
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(volume))} voxels are NaN or infinite")
        # Of a picture a colour may be absent, such as a dye that found nothing.
        if (low == high).all() or ((low == high).any() and kind not in PICTURES):
            raise ValueError("no contrast, all voxels (of a channel) are equal")
        # A unit that is not what the header says shows by a factor of 1000.
        length = max(volume.shape[:3] * voxel_sizes(image.affine))
        if not 1 <= length <= 10_000 and kind not in PICTURES:
            raise ValueError(f"{length:.4g} mm long by its header: check pixdim and xyzt_units")
        image.voxels = compact(volume)
    return image


def compact(volume: np.ndarray) -> np.ndarray:
    """Voxels in the first of uint8, int16 and float32 that holds all: so copies have one hash."""
    dtype = np.float32
    for small in (np.int16, np.uint8):  # mostly whole numbers
        if np.iinfo(small).min <= volume.min() and volume.max() <= np.iinfo(small).max:
            dtype = small
    compacted = volume.astype(dtype, copy=False)
    is_same = volume.dtype.kind in "iu" or np.array_equal(compacted, volume)
    return compacted if is_same else volume.astype(np.float32, copy=False)


def check_same_grid(shape: Shape, affine: np.ndarray, image: Volume) -> None:
    """Raise ValueError unless a file has the shape and, to 0.1 voxel, the corners of its image."""
    expected = image.voxels.shape[:3]
    if shape != expected:
        raise ValueError(f"shape {shape}, expected {expected} as its image")
    apart = corner_distance(affine, image.affine, shape)  # mm
    if not apart <= SHIFT * voxel_sizes(image.affine).min():
        found, expected = (one[:3].round(3).tolist() for one in (affine, image.affine))
        raise ValueError(f"affine {found}, expected {expected} as its image ({apart:.3g} mm apart)")


def corner_distance(first: np.ndarray, second: np.ndarray, shape: Shape) -> float:
    """How far, along one axis of the world, two affines (4, 4) put a corner of a volume apart."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*shape, 1]  # (8, 4)
    return float(np.abs(corners @ (first - second).T).max())


def read_mask(path: Path, image: Volume) -> np.ndarray:
    """Read a mask, uint8 (X, Y, Z). Raises DataError unless it has integers on its image's grid."""
    with explaining(path):
        kind = kind_of(path)
        if kind in PICTURES:  # gray values, or the numbers of a palette
            affine = PICTURE_TO_RAS
            picture = open_picture(path)
            mask = np.atleast_3d(np.asarray(picture).swapaxes(0, 1))
            black = picture.palette.colors.get((0, 0, 0)) if picture.mode == "P" else 0
            if black and (mask == black).any():
                raise ValueError(f"black is number {black} of its palette: save it as gray")
            mask = mask[..., :1] if (mask == mask[..., :1]).all() else mask
        else:
            mask, affine, _ = read_nifti(path, [])
        if kind == "JPEG" or mask.ndim > 3 or (kind in PICTURES and mask.shape[2] > 1):
            expected = "class numbers (no colours, no JPEG), and a file a time point"
            raise ValueError(f"{kind} of shape {mask.shape}, expected {expected}; {RECIPES}")
        turn = ornt_transform(io_orientation(affine), io_orientation(image.affine))
        if not np.array_equal(turn, RAS):  # as dcm2niix has them
            affine = affine @ inv_ornt_aff(turn, mask.shape)
            mask = apply_orientation(mask, turn)
        check_same_grid(mask.shape, affine, image)
        if mask.dtype.kind == "f":  # 0.99999 is 1, 0.5 is no class
            broken = np.count_nonzero(~np.isfinite(mask))
            between = np.count_nonzero(np.abs(mask - np.rint(mask)) > 1e-3)
            if broken or between:
                raise ValueError(f"{broken} voxels of the mask are NaN, {between} no integers")
            mask = np.rint(mask)
        if mask.min() < 0 or mask.max() > 255:
            found = f"mask values {mask.min():g} to {mask.max():g}"
            raise ValueError(f"{found}: give the classes numbers up to 255; {RECIPES}")
        return mask.astype(np.uint8, copy=False)


def hash_pixels(pixels: np.ndarray) -> str:
    """A hash of shape and stored pixels: equal for identical images."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels))  # without a copy in most cases
    return digest.hexdigest()[:16]


def open_picture(path: Path) -> Image.Image:
    """A decoded picture as viewers show it. Raises ValueError for what Pillow would change."""
    # As a file object: opened by path, Pillow >= 11 scrambles an uncompressed TIFF that it turns.
    with open(path, "rb") as file, Image.open(file, formats=PICTURES) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones add a preview
            raise ValueError(f"{image.n_frames} pages, expected a single picture")
        if image.mode.startswith("RGB") and ";16" in str(image.tile):
            raise ValueError("RGB of 16 bits, expected 8, or 16 of gray")
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if alpha and alpha.getextrema()[0] < 255:
            raise ValueError("transparent pixels, expected none: flatten the picture")
        image.load()
        image = ImageOps.exif_transpose(image)
    return image.convert(image.mode[:-1]) if image.mode in ("LA", "RGBA") else image


# --- read: a NIfTI file ---


def read_nifti(
    path: Path, notes: Notes, dtype: type | None = None
) -> tuple[np.ndarray, np.ndarray, Nifti1Header]:
    """Voxels (X, Y, Z[, C]) with the slope applied, affine (4, 4) to RAS in mm, repaired header.

    Without a slope, integers of up to 16 bits stay what they are; others become `dtype`, if any.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":  # gzip, whatever the name
        content = gzip.decompress(content)  # nib.load stops before the checksum
    if content[344:347] != b"n+1" and content[4:7] != b"n+2":
        problem = name_format(content[:132]) or "no NIfTI, or of a pair .hdr and .img, or Analyze"
        raise ValueError(f"{problem}, expected one .nii or .nii.gz; {RECIPES}")
    kind = Nifti2Header if content[4:7] == b"n+2" else Nifti1Header
    raw = kind.from_fileobj(io.BytesIO(content), check=False)
    header = raw.copy()
    header.check_fix(QUIET, 40)  # repairs qfac and negative pixdim
    for name in ("sform_code", "qform_code"):
        if raw[name] != 0 and header[name] == 0:  # a code unknown to nibabel
            header[name] = 1

    # Check what the header says of the voxels before they are unpacked.
    stored = header.get_data_dtype()
    shape = header.get_data_shape()
    if len(shape) == 5 and shape[3] == 1:  # ITK writes channels so
        shape = (*shape[:3], shape[4])
    while len(shape) > 3 and shape[-1] == 1:  # as written for "no time"
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1 or stored.kind not in "iuf":
        raise ValueError(f"shape {shape} of {stored}, expected numbers in 3D, or channels last")
    size = header.get_data_offset() + math.prod(shape) * stored.itemsize
    if len(content) < size:  # few bytes can claim any size
        raise ValueError(f"cut or damaged: {len(content)} bytes, {size} by its header")

    pixdim = np.abs(raw["pixdim"][1:4].astype(float))  # nibabel puts 1 where it is 0
    affine = choose_affine(header, pixdim, notes)
    directions = affine[:3, :3] / voxel_sizes(affine)
    if np.abs(directions.T @ directions - np.eye(3)).max() > 0.01:  # cosines
        raise ValueError("sheared axes, expected right angles: resample it")
    affine[:3] *= UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)  # bits 0 to 2: space
    proxy = nib.arrayproxy.ArrayProxy(io.BytesIO(content), header, mmap=False)
    if stored.kind in "iu" and stored.itemsize <= 2 and (proxy.slope, proxy.inter) == (1, 0):
        dtype = stored.newbyteorder("=")
    return np.asanyarray(proxy, dtype=dtype).reshape(shape, order="F"), affine, header


def choose_affine(header: Nifti1Header, pixdim: np.ndarray, notes: Notes) -> np.ndarray:
    """Affine (4, 4) from voxels to RAS, in the unit of the file: the sform, or else the qform.

    `header` is repaired, `pixdim` (3,) is what it was before. Raises ValueError if neither can be
    used, or if they contradict each other about the size of a voxel.
    """
    if not (np.isfinite(pixdim).all() and pixdim.min() > 0):
        raise ValueError(f"pixdim {pixdim.tolist()}, expected the sizes of a voxel: set them")
    sform = read_form(header, "sform", notes)
    qform = read_form(header, "qform", notes)
    if sform is None and qform is None:
        if header["sform_code"] or header["qform_code"]:
            raise ValueError("no usable sform or qform: set one")
        notes.append(("no sform and no qform: axes point left, front and top", ""))
        return header.get_base_affine()
    if sform is None:
        return qform

    # The sform is taken; does it agree with pixdim and with the qform?
    sizes = voxel_sizes(sform)
    if not np.allclose(sizes, pixdim, rtol=0.01):
        detail = f"sform {sizes.round(4).tolist()}, pixdim {pixdim.round(4).tolist()}"
        # Voxels of 1 x 1 x 1 beside other ones are written by programs that know no better.
        is_unit = np.allclose(sizes, 1, atol=1e-3) and qform is not None
        if not is_unit and not np.allclose(pixdim, 1, atol=1e-3):
            raise ValueError(f"voxels by {detail}: set the wrong one right, by nibabel")
        form = "qform" if is_unit else "sform"
        notes.append((f"voxel sizes contradict each other: the {form} is taken", detail))
        return qform if is_unit else sform
    if qform is not None:
        apart = corner_distance(sform, qform, header.get_data_shape()[:3]) / pixdim.min()  # voxels
        if apart > SHIFT:
            what = "sform and qform differ: the sform is taken"
            notes.append((what, f"by up to {apart:.3g} voxels"))
    return sform


def read_form(header: Nifti1Header, name: str, notes: Notes) -> np.ndarray | None:
    """The sform or qform (4, 4); None if it is not coded, or cannot be inverted."""
    if not header[f"{name}_code"]:
        return None
    with suppress(HeaderDataError, ValueError), np.errstate(all="ignore"):  # quaternion beyond 1
        affine = getattr(header, f"get_{name}")()
        # The volume of a cube of unit edges along the axes: 0 if they lie in one plane, or NaN
        if np.isfinite(affine).all() and abs(det(affine[:3, :3] / voxel_sizes(affine))) > 1e-3:
            return affine
    notes.append((f"the {name} is unusable: the other form is taken", ""))
    return None


# --- read: a DICOM series ---


@dataclass
class Slice:
    """One plane of a series: a file, or a frame of an enhanced file."""

    name: str
    ds: Dataset  # the file
    plane: Dataset  # attributes of this plane; for one frame `ds`
    frame: int = 0


def read_series(path: Path, files: list[Path], notes: Notes) -> Volume:
    """Read the files of one DICOM series, or one enhanced file, as float32 (X, Y, Z).

    x runs along the rows and y down the columns. Raises ValueError unless they are a box, within
    0.1 voxel: one size, orientation and PixelSpacing, straight above each other at equal distances.
    """
    # Filter the images, and check that they are planes of one kind.
    slices = list_slices(files, notes)
    check_slices(slices)
    # The change, in parts of a step, that moves the far end of a row by 0.1 voxel
    tolerance = SHIFT / max(slices[0].ds.Rows, slices[0].ds.Columns)
    orientation = read_numbers(slices, "ImageOrientationPatient", 6, tolerance)[0]
    spacing = read_numbers(slices, "PixelSpacing", 2, tolerance)[0, ::-1]  # PS3.3 10.7.1.3
    axes = np.stack([orientation[:3], orientation[3:], np.cross(orientation[:3], orientation[3:])])
    if np.abs(axes @ axes.T - np.eye(3)).max() > 0.02 or spacing.min() <= 0:
        raise ValueError(f"no box: ImageOrientationPatient {orientation}, PixelSpacing {spacing}")

    # Sort them along the normal (PS3.3 C.7.6.2.1.1), and check that they are a box.
    positions = read_numbers(slices, "ImagePositionPatient", 3)  # (N, 3) in mm
    order = np.argsort(positions @ axes[2], kind="stable")
    slices = [slices[k] for k in order]
    positions = positions[order]
    start, step = fit_line(slices, positions, axes, spacing)

    # Merge their pixels; padding lies outside of what was measured.
    volume = np.stack([read_plane(path, one) for one in slices], 2)  # (X, Y, Z)
    padded = np.isnan(volume)
    if padded.any() and not padded.all():
        volume[padded] = volume[~padded].min()
        what = "PixelPaddingValue: these voxels get the lowest value of the others"
        notes.append((what, f"{padded.sum()} voxels"))

    # Transform voxels to DICOM's axes in mm, and those to RAS.
    affine = np.eye(4)
    affine[:3, :3] = axes.T * [*spacing, step]
    # The first position, moved along the normal to where the line through all of them begins.
    affine[:3, 3] = positions[0] + axes[2] * (start - positions[0] @ axes[2])
    modality = str(slices[0].ds.get("Modality") or "")
    patient = str(slices[0].ds.get("PatientID") or "").strip()
    # A hash, because the ID itself is personal data; 48 bits tell the patients of a set apart.
    patient = hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""
    return Volume(volume, LPS_TO_RAS @ affine, None, modality, patient)


def list_slices(files: list[Path], notes: Notes) -> list[Slice]:
    """The planes of all images. Raises ValueError for a file of theirs that cannot be used."""
    images = {}  # data sets by file
    unusable = {}  # None for a file that is no DICOM
    for file in files:
        ds = read_dataset(file)
        is_usable = is_image(ds) and all(ds.get(k) for k in ("PixelData", "Columns"))
        (images if is_usable else unusable)[file] = ds
    cut_files = [file for file, ds in unusable.items() if is_cut_image(file, ds, images)]
    if cut_files or not images:
        names = ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in cut_files[:3])
        counts = f"{len(images)} of {len(files)} files are DICOM images"
        raise ValueError(f"{counts}, {len(cut_files)} are cut, empty or damaged: {names}")
    if unusable:
        such = f"{len(unusable)}, such as {next(iter(unusable)).name}"
        notes.append(("files that are no images are left out", such))
    shared = os.path.commonpath([file.parent for file in images])
    slices = []
    for file, ds in images.items():
        slices += list_planes(file.relative_to(shared).as_posix(), ds)
    acquisitions = Counter(str(one.plane.get("AcquisitionNumber")) for one in slices)
    if 1 < len(acquisitions) < len(slices):
        counts = ", ".join(f"{count} of {number}" for number, count in acquisitions.items())
        notes.append(("one volume of several acquisitions, by AcquisitionNumber", counts))
    return slices


def read_dataset(path: Path, **options: bool) -> Dataset | None:
    """The data set of a file, with or without the DICOM preamble; None if it holds none."""
    try:
        ds = dcmread(path, force=True, **options)
    except Exception:  # bytes may mean anything
        return None
    if not ds.file_meta.get("TransferSyntaxUID"):  # of older archives: as pydicom guessed it
        _, is_little = ds.original_encoding
        syntax = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = syntax
    keywords = ("SOPClassUID", "PixelData", "DirectoryRecordSequence")
    return ds if any(keyword in ds for keyword in keywords) else None


def is_image(ds: Dataset | None) -> bool:
    """Whether a data set is of an image, and not of a report, a plan or a segmentation."""
    if ds is None or not ds.get("Rows"):
        return False
    return "Segmentation" not in UID(str(ds.get("SOPClassUID") or "")).name


def is_cut_image(file: Path, ds: Dataset | None, images: dict) -> bool:
    """Whether a file without pixels, however it is called, may be left of one of `images`."""
    if ds is None:
        return kind_of(file) not in ("text", "NIfTI", *FORMATS.values())
    series = str(ds.get("SeriesInstanceUID") or "")  # in a cut file it may be cut, too
    storage = ds.get("SOPClassUID")
    return any(
        str(image.get("SeriesInstanceUID")).startswith(series)
        or image.get("SOPClassUID") == storage
        for image in images.values()
    )


def list_planes(name: str, ds: Dataset) -> list[Slice]:
    """The file, or the frames of an enhanced one, each with its functional groups as a data set."""
    groups = ds.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        return [Slice(name, ds, ds)]
    if len(groups) != int(ds.get("NumberOfFrames") or 1):
        raise ValueError(f"{name}: {ds.NumberOfFrames} frames, but {len(groups)} functional groups")
    # PS3.3 C.7.6.16: what holds for all frames
    shared = ds.get("SharedFunctionalGroupsSequence") or [Dataset()]
    slices = []
    for k, group in enumerate(groups):
        # What some scanners write outside of the groups
        plane = Dataset()
        for keyword in ("RescaleSlope", "RescaleIntercept", "ImageType"):
            if keyword in ds:
                plane[keyword] = ds[keyword]
        for macro in MACROS.split():  # the value of the frame overrides
            for item in (shared[0].get(macro) or [], group.get(macro) or []):
                plane.update(item[0] if item else {})
        slices.append(Slice(f"{name} frame {k + 1}", ds, plane, k))
    return slices


def check_slices(slices: list[Slice]) -> None:
    """Raise ValueError unless all planes are slices of one CT, MR or PET series, of one size."""
    series = {str(one.ds.get("SeriesInstanceUID")): one.name for one in slices}
    if len(series) > 1:
        names = ", ".join(list(series.values())[:4])
        hint = UID_HINT if len(series) == len(slices) else "leave one in the folder"
        raise ValueError(f"{len(series)} DICOM series, such as of {names}; {hint}")
    for one in slices:
        kind = UID(str(one.ds.get("SOPClassUID") or "")).name
        frames = int(one.ds.get("NumberOfFrames") or 1)
        colours = str(one.ds.get("PhotometricInterpretation") or "MONOCHROME2").upper()
        is_other = "RT Dose" in kind or colours != "MONOCHROME2"
        if is_other or (one.plane is one.ds and frames > 1):
            found = f"{kind}, {colours}, {frames} frames"
            expected = "expected MONOCHROME2 of CT or MR (dcm2niix converts others)"
            raise ValueError(f"{one.name} is no slice ({found}), {expected}")
    if all("LOCALIZER" in str(one.plane.get("ImageType")).upper() for one in slices):
        raise ValueError("a localizer (scout), expected CT or MR slices")
    if len(slices) == 1:
        raise ValueError("one DICOM slice, expected the folder of a series")
    read_numbers(slices, "Rows", 1, 0)
    read_numbers(slices, "Columns", 1, 0)


def read_numbers(
    slices: list[Slice], keyword: str, count: int, tolerance: float | None = None
) -> np.ndarray:
    """An attribute of all planes, float64 (N, count), each within `tolerance` of the first."""
    rows = []
    for one in slices:
        try:
            value = one.plane.get(keyword, one.ds.get(keyword))
            row = [float(number) for number in np.atleast_1d(value)]
        except (TypeError, ValueError):  # absent, empty, or text
            row = []
        if len(row) != count or not np.isfinite(row).all():
            raise ValueError(f"no {keyword} of {count} numbers in {one.name}")
        rows.append(row)
    values = np.array(rows)
    if tolerance is not None:
        apart = np.abs(values - values[0]).max(1)  # (N,)
        # In parts of the length of a vector
        odd = np.flatnonzero(apart > tolerance * norm(values[0, :3]))
        if len(odd):
            first = f"{keyword} {rows[0]} in {slices[0].name}"
            other = f"{rows[odd[0]]} in {slices[odd[0]].name}, {len(odd)} of {len(rows)} differ"
            raise ValueError(f"{first}, {other}: expected one stack, without localizers")
    return values


def fit_line(
    slices: list[Slice], positions: np.ndarray, axes: np.ndarray, spacing: np.ndarray
) -> tuple[float, float]:
    """Place of the first plane and distance of the planes, in mm along the normal.

    `positions` (N, 3) are sorted; `axes` (3, 3) are those of rows, columns and the normal. Raises
    ValueError unless all planes lie within 0.1 voxel of a line along the normal.
    """
    along = positions @ axes[2]  # (N,) in mm, ascending
    aside = (positions - positions[0]) @ axes[:2].T  # (N, 2) in mm
    numbers = np.arange(len(along))
    # A fit, because headers round to 0, 0.6, 1.2, 1.9 for 0.625 mm
    step, start = np.polyfit(numbers, along, 1).tolist()
    off = np.abs(along - start - step * numbers).max()
    if off <= SHIFT * step and step > 0.01 and np.abs(aside / spacing).max() <= SHIFT:
        return start, step

    # Of all neighbours the two whose distance is least like that of the others
    gaps = np.column_stack([np.diff(along), np.diff(aside, axis=0)])  # (N - 1, 3)
    odd = int(np.argmax(norm(gaps - np.median(gaps, 0), axis=1)))
    places = 1 + np.count_nonzero(gaps[:, 0] > 0.01)
    raise ValueError(
        f"{len(slices)} slices at {places} positions are no box: {slices[odd].name} and "
        f"{slices[odd + 1].name} are {gaps[odd, 0]:.4g} mm apart and {norm(gaps[odd, 1:]):.4g} mm "
        f"aside, mostly {np.median(gaps[:, 0]):.4g} mm apart: missing, doubled, moved aside, "
        "tilted, two stacks, mosaics, a time series or echoes (see dcm2niix)"
    )


def read_plane(path: Path, one: Slice) -> np.ndarray:
    """Modality values float32 (X, Y) of a plane, NaN where it is padded."""
    ds = one.ds
    plane = one.plane
    with explaining(path / one.name if path.is_dir() else path):
        is_native = not ds.file_meta.TransferSyntaxUID.is_encapsulated
        if is_native and int(ds.get("HighBit") or ds.BitsStored - 1) != ds.BitsStored - 1:
            raise ValueError(f"HighBit {ds.HighBit}, expected {ds.BitsStored - 1} for its bits")
        pixels = pixel_array(ds, index=one.frame)  # (rows, columns)
        # apply_modality_lut fails on attributes that are there and empty.
        for keyword, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            if plane.get(keyword) in (None, ""):
                setattr(plane, keyword, default)
        values = apply_modality_lut(pixels, plane).astype(np.float32)
        if float(plane.RescaleSlope) == 0 or not np.isfinite(values).all():
            raise ValueError(f"RescaleSlope {plane.RescaleSlope} gives no values")
        if isinstance(ds.get("PixelPaddingValue"), int):  # PS3.3 C.7.5.1.1.2
            # They may have the wrong sign: both 63536 and -2000 stand for the same bits.
            limit = ds.get("PixelPaddingRangeLimit")
            ends = [ds.PixelPaddingValue, ds.PixelPaddingValue if limit is None else limit]
            lowest = -(2 ** (ds.BitsAllocated - 1)) if ds.PixelRepresentation else 0
            low, high = sorted((end - lowest) % 2**ds.BitsAllocated + lowest for end in ends)
            values[(low <= pixels) & (pixels <= high)] = np.nan
    return values.T  # (columns, rows), which is (X, Y)


# --- read: do the cases go together? ---


def complete_names(
    cases: list[Case], labels: Labels | None, channels: list[str] | None
) -> tuple[Labels, list[str]]:
    """Class names by mask value, and channel names: those given, or else by what the cases hold."""
    if labels is None:
        # More values up to 255 are those of a mask that JPEG or resizing has smeared.
        clean = [case.values for case in cases if case.values[2:] == [] or case.values[-1] < 255]
        seen = {value for values in clean for value in values}
        labels = {0: "background"}
        while len(labels) in seen:
            labels[len(labels)] = str(len(labels))
        if seen == {0, 255}:
            print("note: the masks hold 0 and 255: 255 is taken as class 1, also in predictions")
            labels[255] = "1"
    if channels is None and cases:
        # What most cases have: the others are the odd ones out.
        count = Counter(case.foreground.shape[1] for case in cases).most_common(1)[0][0]
        modalities = {case.image.modality or "channel" for case in cases}  # DICOM: CT, MR
        name = modalities.pop() if len(modalities) == 1 else "channel"
        channels = [name] if count == 1 else [f"{name} {k}" for k in range(count)]
        if count == 3 and kind_of(cases[0].images[0]) in PICTURES:
            channels = COLOURS
    return labels, channels


def check_names(case: Case, labels: Labels, channels: list[str], rule: str) -> None:
    """Raise DataError for a value of the mask without a name, or a channel too many or too few."""
    if not set(case.values) <= set(labels):
        problem = f"mask values {case.values}, expected {sorted(labels)} {rule}"
        raise DataError(f"{case.mask}: {problem}")
    check_channels(case.images[0], case.foreground.shape[1], channels)


def check_channels(path: Path, count: int, channels: list[str]) -> None:
    """Raise DataError unless an image has as many channels as there are names."""
    if count != len(channels):
        hint = f"; time points? write a file each; {RECIPES}" if count > 3 else ""
        raise DataError(f"{path}: {count} channels, expected {channels}{hint}")


def drop_bad(cases: list[Case], bad: Reasons, skip_bad: bool) -> list[Case]:
    """The cases without an error; the others go to `bad`. Raises DataError unless skipped."""
    good = [case for case in cases if not case.error]
    refused = [(case.id, case.error) for case in cases if case.error]
    print_reasons(refused)
    bad += refused
    if bad and not (skip_bad and good):
        raise DataError(f"{len(bad)} cases or files cannot be used (--skip-bad goes on)")
    return good


def print_reasons(pairs: Reasons, start: str = "") -> None:
    """Reasons by source, one line for each kind: those that differ in numbers only are one."""
    kinds = defaultdict(list)
    for source, reason in pairs:
        kinds[re.sub(r"[\d.]+", "#", reason.split(": ", 1)[-1])].append((source, reason))
    for members in kinds.values():
        names = one_line(", ".join(source for source, _ in members[1:4]))
        more = f" (and {len(members) - 1} more such as {names})" if names else ""
        print(f"{start}{one_line(members[0][1])}{more}", file=None if start else sys.stderr)


# --- split: patients and folds ---


def use_patient_ids(cases: list[Case]) -> None:
    """Patients by the DICOM PatientID where cases.csv names none.

    One PatientID in every file is none but what anonymisation left: it is passed over, with a note.
    """
    ids = {case.image.patient for case in cases}
    if len(ids) == 1 < len(cases) and "" not in ids:
        print("note: one PatientID stands in every file, so it names no patient")
        return
    for case in cases:
        case.patient = case.patient or case.image.patient


def split_cases(cases: list[Case], args: Namespace) -> None:
    """Set patient group and fold of each case; with --like all are test."""
    patients = [case.patient or case.id for case in cases]
    for k, case in enumerate(cases if args.patient_regex else []):  # it overrules cases.csv
        image = case.images[0]
        match = re.search(args.patient_regex, image.name)
        match = match or re.search(args.patient_regex, image.relative_to(args.data).as_posix())
        patients[k] = match and next(filter(None, match.groups()), match[0])
        if not patients[k]:
            raise DataError(f"--patient-regex {args.patient_regex!r} finds nothing in {image}")
    groups = group_patients(patients, [case.digest for case in cases])
    strata = [str(case.values) for case in cases]
    splits = ["test" if args.like else case.split for case in cases]
    folds = assign_folds(groups, strata, splits, args.test_fraction)
    for case, group, fold in zip(cases, groups, folds, strict=True):
        case.group = group
        case.fold = fold
    if not args.like and set(folds) == {"test"}:
        raise DataError(f"{args.data}: only test cases: use --like TRAIN_CACHE")


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
    official = {"test": "test", "val": "0"} | {str(k): str(k) for k in range(FOLDS)}
    first = 1 if "val" in splits else 0
    folds = [str(k) for k in range(first, FOLDS)]
    stratum_sizes = Counter(strata)
    sizes: Counter = Counter()  # rows of each group
    stratum_of = {}  # each group's rarest one
    for group, stratum, split in zip(groups, strata, splits, strict=True):
        if split not in official:
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
    return [official[split] if split in official else fold_of[group] for group, split in pairs]


# --- split: the common grid ---


def plan_cache(cases: list[Case], spacing: list, labels: Labels, channels: list[str]) -> dict:
    """What meta.json says of grid, classes and normalisation, by the training cases."""
    train_cases = [case for case in cases if case.fold != "test"]
    median = np.median([case.spacing for case in train_cases], 0).round(4).tolist()
    # Slices are cut across the axis of one voxel in all cases, or else the coarsest one; of equal
    # ones the last, z: axial slices.
    flat = np.all([np.array(case.shape) == 1 for case in train_cases], 0)  # (3,)
    rounded = np.round(median, 2)  # 0.9999 and 1.0 are equal
    thick = flat if flat.any() else rounded == rounded.max()
    foreground = np.concatenate([case.foreground for case in train_cases])  # (N, C)
    if not len(foreground):
        raise DataError("no training mask has any foreground: nothing to learn")
    meta = {
        "classes": list(labels.values()),
        "values": list(labels),
        "channels": channels,
        "resample": spacing != ["keep"],
        "spacing": median if isinstance(spacing[0], str) else spacing,  # mm
        "slice_axis": int(np.flatnonzero(thick)[-1]),
        "picture_unit": "px" if kind_of(train_cases[0].images[0]) in PICTURES else None,
    }
    shapes = [grid_shape(case.shape, case.spacing, meta) for case in train_cases]
    meta["shape"] = np.median(shapes, 0).astype(int).tolist()
    meta["normalisation"] = list(map(ct_constants, channels, foreground.T))
    return meta


def ct_constants(channel: str, values: np.ndarray) -> dict[str, float] | None:
    """How CT is normalised, by its foreground, as in nnU-Net; None if a channel is no CT."""
    # Whole words: CT, "CT scan", CTA, CBCT, ..., but "CT1" is contrast-enhanced T1.
    words = set(re.split(r"[^A-Z0-9]+", channel.upper()))
    is_named = words & {*CT_NAMES.split()} or words >= {"COMPUTED", "TOMOGRAPHY"}
    if not is_named or words & {"PET", "SPECT"}:
        return None
    low, high = np.percentile(values, (0.5, 99.5)).tolist()  # beyond: metal, slips of the mask
    clipped = values.clip(low, high).astype(np.float64)
    std = float(clipped.std()) or 1.0
    return {"low": low, "high": high, "mean": float(clipped.mean()), "std": std}


def grid_shape(shape: Shape, spacing: np.ndarray, meta: dict) -> Shape:
    """Voxels per axis of the common grid for a volume in RAS: it covers the same millimetres."""
    if not meta["resample"]:
        return tuple(shape)
    sizes = np.array(shape) * spacing / meta["spacing"]
    # A spacing that differs by rounding in the header only must not change the number of voxels.
    rounded = np.floor(sizes + 0.5 + 1e-3)
    return tuple(max(1, int(size)) for size in rounded)


def orient(affine: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, Shape]:
    """How nibabel turns the axes of a file into RAS, (3, 2); spacing (mm) and shape along those."""
    orientation = io_orientation(affine)
    axes = np.argsort(orientation[:, 0])  # axes of the file, in the order of RAS
    spacing = voxel_sizes(affine)[axes]
    return orientation, spacing, tuple(int(shape[axis]) for axis in axes)


def print_plan(cases: list[Case], meta: dict) -> None:
    """What is odd in the headers, the classes, how channels are normalised, and the common grid."""
    notes = [(case.id, f"{case.id}: {' '.join(note)}") for case in cases for note in case.notes]
    print_reasons(notes, "note: ")
    names = []
    for name, constants in zip(meta["channels"], meta["normalisation"], strict=True):
        how = "each image to mean 0, deviation 1"
        if constants is not None:
            how = f"as CT: clipped to {constants['low']:.4g} .. {constants['high']:.4g}"
        names.append(f"{name} ({how})")
    grid = f"to {meta['spacing']} {meta['picture_unit'] or 'mm'}"
    grid = grid if meta["resample"] else "each on its own grid"
    print(f"classes {' '.join(meta['classes'])}; channels {' '.join(names)}; {grid}")
    # Of long-axis views among short-axis ones slices are lines of a few thick voxels.
    axis = "xyz"[meta["slice_axis"]]
    thick = [case.spacing for case in cases if max(case.spacing) > 1.5 * np.median(case.spacing)]
    counts = Counter("xyz"[np.argmax(mm)] for mm in thick)
    if set(counts) - {axis}:
        listed = ", ".join(f"{axis} in {count}" for axis, count in counts.most_common())
        print(f"note: thickest axis {listed}, but slices (--dims 2) are cut across {axis}")


# --- write: the arrays ---


def convert(case: Case, folder: Path, meta: dict) -> None:
    """Write the four files of a case, from the voxels that `inspect` has left."""
    affine = case.image.affine
    path = folder / AS_READ / case.id
    with open(path, "rb") as file:
        volume = np.load(file)  # (X, Y, Z, C) of the file
        mask = np.load(file)  # (X, Y, Z) of the file
    path.unlink()  # or the disk holds all volumes twice
    image = to_grid(case.images[0], volume, affine, meta)  # (C, X, Y, Z) of the grid
    labels = mask_to_grid(mask, affine, meta)  # (X, Y, Z) of the grid
    start = folder / "volumes" / case.id
    write_mask(Path(f"{start}.truth.nii.gz"), mask, affine, case.image.header)
    np.save(f"{start}.image.npy", image)
    np.save(f"{start}.mask.npy", labels)
    classes = len(meta["classes"])
    np.save(f"{start}.points.npy", draw_points(labels, classes))
    case.seen = sum(np.bincount(plane.ravel(), minlength=classes) for plane in labels)


def to_grid(path: Path, volume: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
    """A volume (X, Y, Z, C) of a file as networks see it: float16 (C, X, Y, Z) on the grid.

    Raises DataError for a picture among volumes, and for an impossible grid.
    """
    kinds = ("a volume", "a picture")
    found = kinds[kind_of(path) in PICTURES]
    expected = kinds[meta["picture_unit"] is not None]
    if found != expected:
        raise DataError(f"{path}: {found}, expected {expected} as in training")
    orientation, spacing, old = orient(affine, volume.shape)
    shape = grid_shape(old, spacing, meta)
    if meta["resample"] and (math.prod(shape) > MAX_GRID or max(shape) < 2):
        before = f"{list(old)} voxels of {spacing.round(4).tolist()} mm"
        after = f"{list(shape)} voxels of {meta['spacing']} mm"
        raise DataError(f"{path}: {before} would become {after}: check its pixdim, or --spacing")
    volume = apply_orientation(volume, orientation)  # RAS
    volume = np.moveaxis(volume, 3, 0)  # (C, X, Y, Z)
    image = np.empty((len(volume), *shape), np.float16)
    with np.errstate(over="ignore"):  # named below
        for k, constants in enumerate(meta["normalisation"]):
            constants = constants or moments(volume[k])  # MR: those of each image
            if shape != old:
                image[k] = resample(normalise(volume[k], constants), shape)
                continue
            for x in range(0, shape[0], 32):  # slabs of float32 need less memory
                image[k, x : x + 32] = normalise(volume[k, x : x + 32], constants)
    if not np.isfinite([image.min(), image.max()]).all():
        raise DataError(f"{path}: normalised values beyond 65504, which float16 cannot hold")
    return image


def normalise(values: np.ndarray, constants: dict[str, float]) -> np.ndarray:
    """Values of a channel, clipped if there are ends (CT), to mean 0 and deviation 1, float32."""
    values = values.astype(np.float32, order="C")
    if "low" in constants:
        np.clip(values, constants["low"], constants["high"], out=values)
    values -= constants["mean"]
    values /= constants["std"]
    return values


def moments(channel: np.ndarray) -> dict[str, float]:
    """Mean and deviation; without the smallest value if more than half of all have it (air)."""
    values = channel[channel > channel.min()]  # (N,)
    if not 0 < len(values) < 0.5 * channel.size:
        values = channel.ravel("K")
    mean = float(values.mean(dtype=np.float64))
    parts = np.array_split(values, 100)  # as float64 they need less memory than all at once
    squares = sum(np.square(part.astype(np.float64) - mean).sum() for part in parts)
    return {"mean": mean, "std": math.sqrt(squares / len(values)) or 1.0}


def resample(volume: np.ndarray, shape: Shape) -> np.ndarray:
    """Resample float32 (X, Y, Z) to another shape over the same extent."""
    ratios = [new / old for new, old in zip(shape, volume.shape, strict=True)]
    for axis in np.argsort(ratios, kind="stable").tolist():  # shrink first
        if shape[axis] != volume.shape[axis]:
            matrix = resampling_matrix(volume.shape[axis], shape[axis])
            volume = np.tensordot(matrix, volume, (1, axis))  # the new axis is first
            volume = np.moveaxis(volume, 0, axis)
    return volume


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """Weights float32 (new, old) that resample `old` voxels of an axis to `new` of the same extent.

    Linear interpolation; when shrinking the triangle widens to the new voxel: antialiasing.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5  # in old voxels
    distance = np.abs(centers[:, None] - np.arange(old))  # (new, old) in old voxels
    width = max(1.0, old / new)
    weights = (1 - distance / width).clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def mask_to_grid(mask: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
    """Class numbers uint8 (X, Y, Z) on the grid: classes are resampled, the largest share wins."""
    orientation, spacing, _ = orient(affine, mask.shape)
    mask = apply_orientation(np.ascontiguousarray(mask), orientation)  # RAS
    shape = grid_shape(mask.shape, spacing, meta)
    if shape == mask.shape:
        numbers = np.zeros(256, np.uint8)
        numbers[meta["values"]] = np.arange(len(meta["values"]))
        return numbers[mask]
    shares = ((mask == value).astype(np.float32) for value in meta["values"])
    return largest_share(shares, shape)


def largest_share(shares: Iterable[np.ndarray], shape: Shape) -> np.ndarray:
    """The number, uint8, of the largest of float32 (X, Y, Z), each resampled to `shape`."""
    labels = np.zeros(shape, np.uint8)
    best = 0.0  # a running maximum takes less memory
    for k, share in enumerate(shares):
        share = resample(share, shape)
        labels[share > best] = k
        best = np.maximum(best, share)
    return labels


def draw_points(labels: np.ndarray, classes: int) -> np.ndarray:
    """Up to 1000 random voxels of each foreground class, int16 (N, 4): class, x, y, z."""
    rng = np.random.default_rng(0)
    points = [np.empty((0, 4), np.int16)]  # without foreground
    for k in range(1, classes):  # as many of small structures
        inside = np.flatnonzero(labels == k)  # (n,)
        inside = rng.choice(inside, min(POINTS, len(inside)), replace=False)
        voxels = np.unravel_index(inside, labels.shape)
        points.append(np.column_stack([np.full(len(inside), k), *voxels]))
    return np.concatenate(points).astype(np.int16)


def write_mask(
    path: Path, mask: np.ndarray, affine: np.ndarray, header: Header, description: bytes = b""
) -> None:
    """Write uint8 (X, Y, Z) with the forms and unit of its image's header, or else `affine` in mm.

    Left out are window and intent, and texts and extensions, which may hold the patient's name.
    """
    kind = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
    nifti = kind(mask, None if header else affine, header)
    if header is None:
        nifti.header.set_xyzt_units("mm")
        nifti.set_qform(affine, 1)
        nifti.set_sform(affine, 1)
    nifti.set_data_dtype(np.uint8)
    nifti.header.set_intent("none")
    nifti.header.extensions.clear()
    for name in ("cal_min", "cal_max", "aux_file", "db_name", "data_type", "descrip"):
        if name in nifti.header:  # NIfTI-2 lacks two of them
            nifti.header[name] = 0 if name.startswith("cal") else b""
    nifti.header["descrip"] = description
    nib.save(nifti, path)


def print_classes(cases: list[Case], meta: dict) -> None:
    """What the network will see of each class, and what is odd about the cases as a whole."""
    for k, value in enumerate(meta["values"][1:], 1):
        seen = [int(case.seen[k]) for case in cases if value in case.values]  # voxels, of each mask
        lost = f"lost on this grid in {seen.count(0)} cases; " if 0 in seen else ""
        voxels = f", median {np.median(seen):.0f} voxels on this grid" if seen else ""
        print(f"{meta['classes'][k]}: {lost}in {len(seen)} of {len(cases)} masks{voxels}")
    empty = sum(case.values == [0] for case in cases)
    if empty:
        print(f"note: {empty} masks are empty")
    names = defaultdict(list)
    splits = defaultdict(set)
    for case in cases:
        names[case.digest].append(case.id)
        splits[case.group].add((case.fold, case.split if case.split in SPLITS else ""))
    for copies in names.values():
        if len(copies) > 1:
            print(f"note: {' and '.join(copies)} are one image: do their masks agree?")
    apart = [patient for patient, of_patient in splits.items() if len(of_patient) > 1]
    if apart:
        print(f"note: {len(apart)} patients in several splits or folds, such as {min(apart)}")


def write_index(path: Path, raw: Path, cases: list[Case]) -> None:
    """index.csv, a row a case; the files of channels are joined by semicolons."""
    rows = []
    for case in cases:
        row = {"id": case.id, "patient": case.group, "fold": case.fold}
        row["split"] = case.split if case.split in SPLITS else ""
        row["digest"] = case.digest
        row["image"] = ";".join(image.relative_to(raw).as_posix() for image in case.images)
        row["mask"] = case.mask.relative_to(raw).as_posix()
        rows.append(row | case.more)
    write_csv(path, rows)


# --- new: images without masks, for eval.py ---


@dataclass
class NewImage:
    """An image without a mask, called by its path below what was asked for."""

    name: str
    path: Path  # the file, or the folder of a series
    files: list[Path]  # one, one a channel, or of a series
    is_series: bool = False  # a DICOM series


def find_new(paths: list[Path], meta: dict) -> list[NewImage]:
    """The images among files and folders, as deep as they lie, with different names.

    A DICOM series is one image, in however many folders its files lie. Masks, results of eval.py
    and what is no image are named and left out.
    """
    wanted = PICTURES if meta["picture_unit"] else ("NIfTI",)
    images = []
    single = {}  # names of images or channels by file
    for top in paths:
        files = list(list_files(top)) if top.is_dir() else [top]
        tables = [path for path in files if path.name == "volumes.csv"]
        results = {path.parent for path in tables if path.read_bytes()[:11] == b"image,mask,"}
        left = defaultdict(list)  # files by the reason
        skipped = []
        for path in files:
            if path.parent in results:
                left["results"].append(path)
            elif path != top and kind_of(path) not in wanted:
                skipped.append(path)
            elif is_mask(path):
                left["masks"].append(path)
            else:
                single[path] = name_below(top, path)
        if not meta["picture_unit"]:
            series, slices, skipped = find_series(top, skipped)
            images += series
            left[f"single DICOM slices (localizers, mosaics, or {UID_HINT})"] = slices
        left["no images as in training"] = skipped
        for reason, names in left.items():
            if names:
                note = f"note: {top}: left out, {reason}: {len(names)}, such as {names[0]}"
                print(one_line(note))
    # Pictures in colour may be called frame_0001: those are no channels.
    images += join_channels(single, 1 if meta["channels"] == COLOURS else len(meta["channels"]))
    if not images:
        raise DataError(f"{paths[0]}: no image in it as in training; {RECIPES}")
    by_name = {}
    for image in images:
        other = by_name.setdefault(image.name.casefold(), image)
        if other is not image:
            both = f"{other.path} and {image.path} would both be called {image.name}"
            raise DataError(f"{both}: rename one, or give the folder above them")
    return images


def name_below(top: Path, path: Path) -> str:
    """The path of a file or folder below `top` as the name of a file; that of `top` for itself."""
    if path == top or top.is_file():
        return case_name(Path(os.path.abspath(top)))  # "." has no name
    name = "_".join([*path.relative_to(top).parts[:-1], case_name(path)])
    return name[-150:].lstrip(".")  # folders may be called by UIDs


def join_channels(names: dict[Path, str], channels: int) -> list[NewImage]:
    """An image for each file; of several channels NAME_0000, NAME_0001, ... are one image."""
    by_stem = defaultdict(list)  # channel numbers and files
    for path in names:
        stem, number = split_channel(case_name(path))
        is_channel = channels > 1 and number is not None
        by_stem[path.with_name(stem) if is_channel else path].append((number, path))
    images = []
    for pairs in by_stem.values():
        files = [path for _, path in sorted(pairs)]
        stem, number = split_channel(names[files[0]])
        is_channel = channels > 1 and number is not None and number < channels
        images.append(NewImage(stem if is_channel else names[files[0]], files[0], files))
    return images


def is_mask(path: Path) -> bool:
    """Whether a file is one of eval.py's masks, or holds few whole numbers in large areas."""
    values = set()
    equal = []
    try:
        if kind_of(path) == "NIfTI":
            nifti = nib.load(path, keep_file_open=True)
            mark = bytes(nifti.header["descrip"])
            planes = (nifti.dataobj[..., z] for z in range(nifti.shape[-1]))
        else:
            image = open_picture(path)
            mark = image.info.get("Software", "").encode()
            planes = [np.asarray(image)]
        for plane in planes:  # an image stops at the first of them
            values.update(np.unique(plane).tolist())
            equal.append(np.mean(plane[1:] == plane[:-1]))
            if len(values) > MASK_VALUES or any(value != int(value) for value in values):
                return False
    except Exception:  # named later
        return False
    return mark.startswith(PREDICTION) or np.mean(equal) > 0.8


def find_series(top: Path, files: list[Path]) -> tuple[list[NewImage], list[Path], list[Path]]:
    """DICOM series, each with what may be cut images beside it; files of one slice; other files."""
    series = defaultdict(list)  # files by UID
    headers = {}  # the first of each series
    loose = defaultdict(list)  # by folder
    for path in files:
        ds = read_dataset(path, stop_before_pixels=True)
        if not is_image(ds):
            loose[path.parent].append(path)
            continue
        uid = str(ds.get("SeriesInstanceUID") or path.parent)
        series[uid].append(path)
        headers.setdefault(uid, ds)
    slices = []
    for uid, ds in headers.items():
        if len(series[uid]) == 1 and int(ds.get("NumberOfFrames") or 1) == 1:
            slices += series.pop(uid)
    parents = {uid: sorted({path.parent for path in files}) for uid, files in series.items()}
    folders = {uid: Path(os.path.commonpath(files)) for uid, files in parents.items()}
    images = []
    for uid, folder in folders.items():
        name = name_below(top, folder)
        if list(folders.values()).count(folder) > 1:
            name = f"{name}_{headers[uid].get('SeriesNumber') or uid}"
        beside = [path for parent in parents[uid] for path in loose[parent]]
        images.append(NewImage(name, folder, series[uid] + beside, True))
    used = set().union(*parents.values())
    left = [path for folder, files in loose.items() if folder not in used for path in files]
    return images, slices, left


def read_new(image: NewImage, meta: dict) -> tuple[np.ndarray, np.ndarray, Header, Shape, Notes]:
    """An image on the grid, float16 (C, X, Y, Z); and of its file affine, header, shape, notes."""
    notes: Notes = []
    if image.is_series:
        volume = read_volume(image.path, notes, image.files)
    else:
        numbers = [split_channel(case_name(file))[1] for file in image.files]
        if len(numbers) > 1 and numbers != list(range(len(numbers))):
            raise DataError(f"{image.path}: channel files {numbers}, expected 0, 1, ...")
        volume = read_channels(image.files, len(meta["channels"]), notes)
    check_channels(image.path, volume.voxels.shape[3], meta["channels"])
    on_grid = to_grid(image.path, volume.voxels, volume.affine, meta)
    return on_grid, volume.affine, volume.header, volume.voxels.shape[:3], notes


def from_grid(probabilities: np.ndarray, shape: Shape, affine: np.ndarray) -> np.ndarray:
    """Probabilities (K, X, Y, Z) to class numbers uint8 in the shape and axes of the file."""
    orientation, _, full = orient(affine, shape)
    matrix = resampling_matrix(probabilities.shape[1], full[0])  # (full[0], X)
    labels = np.zeros(full, np.uint8)
    for start in range(0, full[0], 16):  # all classes on the file's grid would fill the memory
        rows = matrix[start : start + 16]  # weights of 16 planes
        low, high = np.flatnonzero(rows.any(0))[[0, -1]]  # planes of the grid
        parts = (one[low : high + 1].astype(np.float32) for one in probabilities)
        slabs = (np.tensordot(rows[:, low : high + 1], part, 1) for part in parts)  # (16, Y, Z)
        labels[start : start + 16] = largest_share(slabs, (len(rows), *full[1:]))
    return apply_orientation(labels, ornt_transform(RAS, orientation))


if __name__ == "__main__":
    run_command(main)
