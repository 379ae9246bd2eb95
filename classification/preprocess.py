"""Turn raw images and their labels into one small array and an index for train.py and eval.py.

  python classification/preprocess.py --data rsna-pneumonia-detection-challenge --out data/rsna
  python classification/preprocess.py --data chest_xray --out data/chest \\
      --patient-regex "person[0-9]+|IM-[0-9]+"
  python classification/preprocess.py --data ham10000/HAM10000_metadata.csv --out data/skin \\
      --color --columns image=image_id label=dx patient=lesion_id
  python classification/preprocess.py --data other_hospital --out data/other --like data/chest

Layouts of RAW, recognised by what lies in it; a table wins over folders:
  RSNA challenge   stage_2_train_images/* and stage_2_train_labels.csv (or stage_1_...)
  table of labels  labels.csv, or a CSV file as RAW: image,label and, optionally, patient, fold (0
                   to 4, test) or split (train, val, test); further columns are kept. Several labels
                   an image: in place of label two or more columns of 0, 1 and, for unknown, -1
  class folders    RAW/CLASS/* or RAW/{train,val,test}/CLASS/*; a folder below CLASS is a patient
  MedMNIST         a .npz file, or a folder with one
Images are DICOM, JPEG, PNG or TIFF, known by their content.

Written to OUT, a new folder: images.npy uint8 (N, S, S), or (N, S, S, 3) with --color; index.csv
(id, patient, fold, official split, digest of the raw pixels, the name of the class as label or a
column for each label, what else a table says, source); meta.json.

The code follows main:
  find    the layout of RAW, its classes and its cases
  read    every image once: gray as it is meant to be shown, resized, straight to images.npy
  split   images into patients, patients who share an image into one, patients into folds
  write   index.csv and meta.json
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL
import pydicom
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Tag
from pydicom import Dataset, uid
from pydicom.pixels import apply_color_lut, pixel_array

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    FORMAT,
    DataError,
    new_folder,
    one_line,
    progress,
    read_meta,
    run_command,
)

Row = dict[str, str]  # a row of a table by column; under "" stands its place, file:line
Noted = tuple[np.ndarray, tuple[str, ...]]  # an image, and notes
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow's convert("L")
# What a DICOM header has to say of its pixels
NEEDED = ("PixelData", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")
NEEDED += ("PixelRepresentation", "PhotometricInterpretation")
PHOTOMETRIC = ["MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB"]
PHOTOMETRIC += ["YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"]
# Their modality LUT leads to X-ray intensity, and not to what is shown (PS3.3 C.8.7.1.1.2).
ANGIOGRAPHY = (uid.XRayAngiographicImageStorage, uid.XRayRadiofluoroscopicImageStorage)
# How a JPEG, PNG or TIFF begins
PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".dcm", ".dicom"}
UNREAD = {".bmp", ".gif", ".heic", ".jp2", ".pgm", ".ppm", ".webp"}
TABLES = (".csv", ".tsv", ".csv.gz")
BLANKS = {"nan", "na", "n/a", "<na>", "none", "null"}  # missing values
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and bytes that are not UTF-8
MASK = re.compile("[_-](mask|seg|segmentation)([_-]?[0-9]+)?$", re.IGNORECASE)
# Folders of masks: lung masks, lesion_masks, ground_truth
MASKS = re.compile(
    r"(.*[ _-])?(masks?|segmentations?|annotations?|ground[ _-]?truths?)([ _-].*)?", re.IGNORECASE
)
# Official splits, by what folders and tables call them
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing"),
}
# In multi-label columns, in any case of letters; "" is unknown
LABEL_VALUES = {"0": "0", "1": "1", "-1": "", "": "", "false": "0", "true": "1"}
# What the columns of other tables are called, to suggest a line to type
ALIKE = {
    "image": "image|img|file|path",
    "label": "label|class|target|diagnos|dx|cancer",
    "patient": "patient|subject|lesion",
    "split": "^(split|set|subset|partition)$",
}
# The columns of index.csv that mean something to train.py and eval.py
INDEX_COLUMNS = ("id", "patient", "fold", "split", "digest", "label", "source")
FOLDS = 5
COLOUR_LOST = "colour turned gray"
FEW_LEVELS = 64  # gray levels: a window that leaves fewer is noted
MAX_PIXELS = 2**27  # five times the largest X-rays
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of twice as many
MAX_CLASSES = 256  # there is a name, a column and an output for each
# Names of a class without a finding: normal, no_finding, NonCOVID, uninfected, HER2-
NO_FINDING = re.compile(
    r"(?i:(?<![^\W\d_])(normals?|healthy|neg|negatives?|controls?|benign|clear|absent|no|not|nicht"
    r"|without|ohne|nein|keine?|nee|nej|unauff\w*)(?![^\W\d_])|^non|^un[a-z])|^No(?=[A-Z])|-$"
)
# Folders of images, masks, patients, sites or parts of a download, which are no classes
NO_CLASS = re.compile(
    r"(images?|imgs?|masks?|annotations?)([ _-]?\d+)?|(p|pat|patient|subject|case|study|series|part"
    r"|batch|fold|site|folder)[ _-]?\d+|\D*\d{4}.*",
    re.IGNORECASE,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="such as label=dx")
    add("--size", type=int, help="pixels per side (default: 224; MedMNIST: as it is)")
    add("--fit", choices=("crop", "pad", "squash"), help="how to make it square (default: crop)")
    add("--color", action="store_true", help="keep colour (default: it becomes gray)")
    add("--classes", nargs="+", metavar="NAME", help="in order, the last is the positive one")
    add("--patient-regex", type=regex, metavar="REGEX", help="finds it in a file's name, or path")
    add("--test-fraction", type=float, default=0.0, help="part of the patients (default: 0)")
    add("--like", type=Path, metavar="CACHE", help="make a test set for the models of this cache")
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out unusable files, listed in skipped.csv")
    args = parser.parse_args(argv)
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}, expected 8 to 4096")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    if args.like and any((args.size, args.fit, args.color, args.classes, args.test_fraction)):
        parser.error("--like brings size, fit, color, classes and makes every row test: omit those")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    preprocess(args)
    command = "eval.py --checkpoint RUN/best.pt --split test" if args.like else "train.py"
    print(f"next: python classification/{command} --data {shlex.quote(str(args.out))}")


def preprocess(args: argparse.Namespace) -> None:
    """Write the cache; `args` are those of `parse_args`. Raises DataError."""
    # A test set has to look like what the network was trained on.
    names = ("classes", "multi_label", "size", "fit", "channels")
    like = read_meta(args.like, "classification", names) if args.like else {}

    # find: layout, cases, classes; then the size of what is written
    layout, cases, classes = find_cases(args, like)
    # MedMNIST comes resized: to resize it again would only blur.
    native = 224 if cases[0].pixels is None else len(cases[0].pixels)
    size = like.get("size") or args.size or native
    fit = like.get("fit") or args.fit or "crop"
    channels = 3 if args.color else like.get("channels", 1)
    print(f"{args.data}: {layout}, {len(cases)} images, to {size}x{size} x {channels} ({fit})")
    multi_label = isinstance(cases[0].label, tuple)
    positive = None if multi_label or len(classes) != 2 else classes[1]
    print("labels:" if multi_label else "classes:", ", ".join(classes))
    if positive:  # what sensitivity, precision and AUROC are about
        print(f"positive class: {positive}")

    with new_folder(args.out) as folder:
        # read: every image once. What fails is collected, so that one run names it all.
        raw = args.data if args.data.is_dir() else args.data.parent
        load_case = partial(load, raw=raw, size=size, fit=fit, channels=channels)
        shape = (size, size, 3) if channels == 3 else (size, size)
        good, bad = write_images(folder / "images.npy", shape, cases, load_case, args.workers)
        refuse_bad(folder, bad, len(cases), args.skip_bad)

        # split: images into patients, patients into folds
        patients = group_patients(choose_patients(good), [case.digest for case in good])
        # An official split is kept. With --like every row is test.
        splits = ["test" if like else case.split for case in good]
        folds = assign_folds(patients, list_strata(good), splits, args.test_fraction)
        if not like and set(folds) == {"test"}:
            raise DataError(f"{args.data}: only test images; use --like TRAIN_CACHE for them")
        overlaps = report_overlaps(good, folds, patients)

        # write: index.csv, and meta.json last
        meta = {
            "format": FORMAT,
            "task": "classification",
            "classes": classes,
            "positive_class": positive,
            "multi_label": multi_label,
            "size": size,
            "fit": fit,
            "channels": channels,
            "layout": layout,
            "n": len(good),
            "counts": write_index(folder / "index.csv", good, folds, patients, classes),
            "overlaps": overlaps,
            "skipped": len(bad),
            "versions": {module.__name__: module.__version__ for module in (np, PIL, pydicom)},
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def default_workers() -> int:
    """As many as this process may use cores, but at most 8: each holds a whole image."""
    if hasattr(os, "sched_getaffinity"):  # on a shared node fewer than os.cpu_count()
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def regex(text: str) -> re.Pattern:
    """A regular expression of an option; a usage error if it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


# --- find: layout and cases ---


class Listing(NamedTuple):
    """What lies below a folder, as sorted paths relative to it, without hidden files."""

    images: list[str]
    non_images: list[str]  # by suffix and content
    masks: list[str]  # NAME_mask beside NAME
    closed: list[str]  # dangling links, loops, pipes, unreadable folders


class Picture(NamedTuple):
    """One image as it is meant to be shown, and what else its file says."""

    gray: np.ndarray  # (H, W) from black to white: uint8, or float32 in 0..1
    digest: str  # hash of the stored pixels
    colour: np.ndarray | None = None  # RGB (H, W, 3) like gray
    patient: str = ""  # hash of the DICOM PatientID, or ""
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, or ()
    notes: tuple[str, ...] = ()  # what was changed in reading


@dataclass
class Case:
    """One labelled image: a file, or pixels that are in memory already."""

    id: str
    source: str  # path below RAW
    label: str | tuple[str, ...]  # class; or 1, 0, "" = unknown of each label
    patient: str = ""  # "" = the PatientID, else the file
    split: str = ""  # train, val, test, a fold 0 to 4, or ""
    more: dict[str, str] = field(default_factory=dict)  # further columns
    pixels: np.ndarray | None = None
    # Filled when the image is read:
    digest: str = ""  # hash of the stored pixels
    patient_id: str = ""  # hash of the DICOM PatientID, or ""


def find_cases(args: argparse.Namespace, like: dict) -> tuple[str, list[Case], list[str]]:
    """The layout of RAW, its cases, and its classes or labels in their order."""
    raw = args.data
    wanted = args.classes or like.get("classes") or []
    if not raw.exists():
        raise DataError(f"{raw}: not found")
    # People rename folders, but not the tables in them.
    table = find_table(raw, "labels")
    if not table and args.columns:
        raise DataError(f"{raw}: --columns is for tables; give --data the table itself")
    labels = ["label"]
    if table:
        layout = "table of labels"
        rows = read_rows(table, args.columns, ("image",))
        labels = choose_labels(table, rows, wanted)
        cases = match_labels(raw, rows, labels, list_folder(table.parent))
    elif raw.suffix == ".npz" or any(raw.glob("*.npz")):
        layout = "MedMNIST"
        labels, cases = find_medmnist(raw)
    elif raw.is_file():
        raise DataError(f"{raw}: a file, expected a folder, a table (CSV) or a .npz of MedMNIST")
    elif any(raw.glob("stage_[12]_train_*")):
        layout = "RSNA challenge"
        cases = match_labels(raw, read_rsna(raw), labels, list_folder(raw))
        for case in cases:
            case.id = case.patient
    else:
        layout = "class folders"
        cases = find_classes(raw, list_folder(raw), wanted)
    set_by_path(cases, "patient", args.patient_regex)  # it overrules all others
    multi_label = isinstance(cases[0].label, tuple)
    if like and multi_label != like["multi_label"]:
        found = "several labels an image" if multi_label else "one label an image"
        raise DataError(f"{raw}: {found}, unlike {args.like}")
    if args.test_fraction and any(case.split for case in cases):
        raise DataError(f"{raw}: has an official split: omit --test-fraction")
    if multi_label:
        return layout, cases, order_labels(raw, labels, cases, wanted)
    return layout, cases, order_classes(raw, cases, wanted)


def match_labels(raw: Path, rows: list[Row], labels: list[str], listing: Listing) -> list[Case]:
    """The cases of a table, of which the columns `labels` hold the label or labels."""
    labelled = [row for row in rows if any(row.get(name) for name in labels)]
    if not labelled:
        raise DataError(f"{raw}: none of the {len(rows)} rows has a label")
    if len(labelled) < len(rows):
        print(f"note: {len(rows) - len(labelled)} of {len(rows)} rows left out: no label")
    cases = []
    for source, row in match_rows(labelled, (*labels, "patient", "fold", "split"), listing).items():
        if labels == ["label"]:
            label = plain_number(row["label"])
        else:
            label = tuple(label_value(row[name]) for name in labels)
        cases.append(Case(source, source, label, **read_row(row, ("image", *labels))))
    return cases


def read_rsna(raw: Path) -> list[Row]:
    """RSNA Pneumonia Detection Challenge (Shih et al., Radiology: AI 2019): a row for each box."""
    stage = "stage_2" if any(raw.glob("stage_2_train_*")) else "stage_1"
    table = raw / f"{stage}_train_labels.csv"
    if not table.is_file():
        raise DataError(f"{raw}: expected {table.name} and {stage}_train_images/ side by side")
    rows = []
    for row in read_rows(table, [], ("patientId", "Target")):
        patient = row["patientId"]
        if row["Target"] not in ("0", "1") or not patient:
            raise DataError(f"{row['']}: {patient!r} has Target {row['Target']!r}, expected 0 or 1")
        label = "pneumonia" if row["Target"] == "1" else "no_pneumonia"
        image = f"{stage}_train_images/{patient}"
        rows.append({"": row[""], "image": image, "label": label, "patient": patient})
    return rows


def find_medmnist(raw: Path) -> tuple[list[str], list[Case]]:
    """MedMNIST v2 (Yang et al., Scientific Data 2023): one .npz with any of the three splits.

    {split}_images uint8 (N, S, S) or (N, S, S, 3) and {split}_labels integers (N, 1), or 0 and 1
    (N, C) for several labels an image (ChestMNIST).
    """
    path, *others = [raw] if raw.is_file() else sorted(raw.glob("*.npz"))
    if others:
        raise DataError(f"{raw}: several .npz files; give --data the file itself")
    try:
        with np.load(path) as archive:  # without pickle
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, zlib and pickle errors
        raise DataError(f"{path}: {type(error).__name__}: {error}") from error
    cases = []
    counts = set()  # labels of an image
    for split in SPLITS:
        if f"{split}_images" not in arrays:
            continue
        images = arrays[f"{split}_images"]
        labels = arrays.get(f"{split}_labels", np.empty(0))
        labels = labels.reshape(len(labels), -1) if labels.size else labels
        counts.add(labels.shape[-1])
        highest = MAX_CLASSES - 1 if counts == {1} else 1
        is_picture = images.dtype == np.uint8 and images.shape[3:] in ((), (3,)) and images.ndim > 2
        is_label = labels.dtype.kind in "iu" and np.isin(labels, np.arange(highest + 1)).all()
        if not (is_picture and is_label) or len(labels) != len(images) or len(counts) > 1:
            found = f"images {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}"
            raise DataError(f"{path}: {split}: {found}, expected uint8, labels 0 to {highest}")
        for k, row in enumerate(labels.tolist()):
            label = tuple(map(str, row)) if len(row) > 1 else str(row[0])
            name = f"{split}/{k}"  # also the patient: MedMNIST names none
            cases.append(Case(name, f"{path.name}:{name}", label, name, split, pixels=images[k]))
    if not cases:
        raise DataError(f"{path}: arrays {sorted(arrays)}, expected train_images, train_labels")
    return [str(k) for k in range(max(counts))], cases


def find_classes(raw: Path, listing: Listing, wanted: list[str]) -> list[Case]:
    """RAW/CLASS/... or RAW/{train,val,test}/CLASS/...; a folder below CLASS is a patient.

    Folders called images are no patients, those of masks are left out.
    """
    depth = 2 if any(split_of(image.split("/")[0]) for image in listing.images) else 1
    cases = []
    below = defaultdict(set)  # folders in each class's folder
    for path in listing.images:
        *folders, _ = path.split("/")
        split = split_of(folders[0]) if folders else ""
        inner = [name for name in folders[depth:] if name.lower() not in ("image", "images")]
        is_mask = any(map(MASKS.fullmatch, inner))
        if len(folders) < depth or is_mask or (depth == 2 and not split):
            continue
        cases.append(Case(path, path, folders[depth - 1], inner[0] if inner else "", split))
        below["/".join(folders[:depth])].update(folders[depth : depth + 1])
    refuse_table(raw, listing)
    problem = class_folder_problem(cases, below, listing, wanted)
    if problem:
        top = os.path.commonpath([os.path.dirname(path) for path in listing.images] or [""])
        if top:  # the folder that holds all images
            with suppress(DataError), redirect_stdout(io.StringIO()):
                find_classes(raw / top, list_folder(raw / top), wanted)
                problem = f"one folder too high? Use --data {shlex.quote(str(raw / top))}"
        expected = "expected a folder for each of two or more classes, or labels.csv (image,label)"
        raise DataError(f"{raw}: {problem}; {expected}; found {describe_files(listing)}")
    report_left_out(listing, {case.source for case in cases})
    return cases


def refuse_table(raw: Path, listing: Listing) -> None:
    """Raise DataError if a table in the folder names its images: then that says their classes."""
    tables = []
    for name in listing.non_images:
        if "/" not in name and name.lower().endswith(TABLES):
            rows = read_rows(raw / name, [])
            cells = {cell for row in rows for cell in row.values()}
            count = len(locate(cells, listing.images))
            if 2 * count >= len(rows):
                tables.append((count, name, list(filter(None, rows[0]))))
    if tables:
        _, name, names = max(tables)  # of a challenge's train.csv and test.csv the former
        command = f"--data {shlex.quote(str(raw / name))}{suggest_columns(names)}"
        raise DataError(f"{name} names the images: use {command} (of {', '.join(names)})")


def class_folder_problem(
    cases: list[Case], below: dict[str, set[str]], listing: Listing, wanted: list[str]
) -> str:
    """Why folders are none of classes, or ""; `below` has the folders in each."""
    classes = {case.label for case in cases}
    if not classes or (len(classes) == 1 and not classes <= set(wanted)):
        return "no folders of classes"
    for name in sorted(classes - set(wanted)):
        if NO_CLASS.fullmatch(name):
            return f"{name}/ is no class"
    if len(classes) > 8 and 2 * len(classes) >= len(cases):
        return f"{len(classes)} folders of {len(cases)} images are patients"
    depth = 1 + min(below).count("/")
    for path in listing.non_images:
        folder = "/".join(path.split("/")[:depth])
        if PurePosixPath(path).suffix.lower() in UNREAD and path != folder and folder not in below:
            return f"{folder}/ holds no image that is read"
    # Folders that several classes of a split hold; of patients both may have one called p1.
    counts = Counter()
    for folder, names in below.items():
        names = [name for name in names if not NO_CLASS.fullmatch(name)]
        counts.update((folder.rpartition("/")[0], name) for name in names)
    shared = [name for (_, name), count in sorted(counts.items()) if count > 1]
    if len(shared) > 1 and 2 * len(shared) >= len(counts):
        return f"several of {sorted(classes)} hold {' and '.join(shared[:2])}"
    return ""


def choose_labels(table: Path, rows: list[Row], wanted: list[str]) -> list[str]:
    """The column label, or without it all columns with nothing but 0, 1, -1, blanks (true, false).

    One of them that --classes names becomes the column label, of the classes no_NAME and NAME.
    """
    if "label" in rows[0]:
        return ["label"]
    labels = []
    for name in rows[0]:
        if name in ("", "image", *INDEX_COLUMNS) or (wanted and name not in wanted):
            continue
        odd = [row for row in rows if label_value(row[name]) is None]
        filled = sum(label_value(row[name]) in ("0", "1") for row in rows)
        if odd and len(odd) <= 0.05 * filled:  # a slip
            raise DataError(f"{odd[0]['']}: {name} is {odd[0][name]!r}, expected 0, 1, -1 or blank")
        if not odd and (filled or wanted):
            labels.append(name)
    if len(labels) == 1 and wanted in (labels, [f"no_{labels[0]}", *labels]):
        called = {"0": f"no_{labels[0]}", "1": labels[0], "": ""}
        for row in rows:
            row["label"] = called[label_value(row.pop(labels[0]))]
        return ["label"]
    if len(labels) < 2:
        expected = "expected label (--columns label=COLUMN), or two or more of 0 and 1"
        raise DataError(f"{table}: columns {list(filter(None, rows[0]))}, {expected}")
    return labels


def label_value(text: str) -> str | None:
    """The value of one of several labels: 1, 0 or "" for unknown; None for anything else."""
    return LABEL_VALUES.get(plain_number(text).casefold())


def order_classes(raw: Path, cases: list[Case], wanted: list[str]) -> list[str]:
    """The classes in order, the last of two is the positive one; `wanted` orders or names them.

    Raises DataError if the alphabet would make the class without a finding the positive one.
    """
    names = sorted({case.label for case in cases})
    spellings = {re.sub(r"[\s_.-]+", "", name).casefold() for name in names}
    if all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names):
        names.sort(key=float)
    elif len(spellings) < len(names):  # No_Finding and "no finding"
        raise DataError(f"{raw}: two of {names} look like one class: merge or rename them")
    if len(wanted) == 1 and set(names) == {f"no_{wanted[0]}", *wanted}:
        wanted = [f"no_{wanted[0]}", *wanted]  # --classes has chosen a column
    if not 2 <= len(wanted or names) <= MAX_CLASSES:
        raise DataError(f"{raw}: {len(names)} classes ({names[0]!r}), expected 2 to {MAX_CLASSES}")
    if not wanted:
        if names == ["-1", "0", "1"]:
            hint = "is -1 unknown? Then --classes COLUMN in place of label=COLUMN, or blanks"
            raise DataError(f"{raw}: classes {names}: {hint}")
        if len(names) == 2 and NO_FINDING.search(names[1]):
            order = f"{shlex.join(reversed(names))} (or, if it is meant, {shlex.join(names)})"
            raise DataError(f"{names[1]!r} would be the positive class: use --classes {order}")
        return names
    is_once = len(set(wanted)) == len(wanted)
    if is_once and set(names) <= set(wanted):
        return wanted
    # The numbers 0, 1, ... or, if there are as many, others in their order
    numbers = names if len(names) == len(wanted) else [str(k) for k in range(len(wanted))]
    if is_once and are_numbers(names, wanted) and set(names) <= set(numbers):
        called = dict(zip(numbers, wanted, strict=True))
        print("classes:", ", ".join(f"{k} is {name}" for k, name in called.items()))
        for case in cases:
            case.label = called[case.label]
        return wanted
    raise DataError(f"{raw}: classes in the data {names}, expected {wanted}, each once")


def order_labels(raw: Path, names: list[str], cases: list[Case], wanted: list[str]) -> list[str]:
    """Keep the wanted ones of several labels an image; the others become further columns.

    Numbers get the wanted names, if there are as many. Raises DataError for unknown names.
    """
    wanted = wanted or names
    if are_numbers(names, wanted) and len(wanted) == len(names):
        names = wanted
    if len(set(wanted)) != len(wanted) or len(wanted) < 2 or not set(wanted) <= set(names):
        raise DataError(f"{raw}: labels {names}, expected {wanted} (if unknown, an empty column)")
    for case in cases:
        value_of = dict(zip(names, case.label, strict=True))
        case.label = tuple(value_of.pop(name) for name in wanted)
        case.more |= value_of
    return wanted


def are_numbers(names: list[str], wanted: list[str]) -> bool:
    """Whether the classes of the data are numbers, and the wanted ones names for them."""
    return all(map(str.isdigit, names)) and not set(names) & set(wanted)


# --- find: tables, and the images they name. The same text in classification/ and detection/ ---


def find_table(path: Path, stem: str) -> Path | None:
    """A table by that name in a folder, or the path itself if it is a table; None without."""
    names = [path / f"{stem}{suffix}" for suffix in TABLES]
    if path.name.lower().endswith((*TABLES, ".xlsx")):
        names.append(path)
    return next(filter(Path.is_file, names), None)


def read_rows(path: Path, columns: list[str], needed: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a CSV table; `columns` are those of --columns.

    What Excel's sep= says separates them, or what the first line has most of. Strict: an open quote
    would swallow all rows below.
    """
    text = read_text(path)
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    if first.startswith("sep="):
        separator = first[4:5] or ","
    lines = io.StringIO(text, newline="")  # splitlines would cut at U+2028
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    names = []
    rows = []
    line = 0  # where the row above ends
    try:
        for cells in reader:
            place = f"{path}:{line + 1}"
            line = reader.line_num
            values = [CONTROL.sub(" ", cell).strip() for cell in cells]
            if not any(values) or (line == 1 and values[0] == "sep="):
                continue
            if not names:
                names = rename_columns(path, values, columns, needed)
                continue
            if any(values[len(names) :]):
                problem = f"{len(values)} fields for {len(names)} columns"
                raise DataError(f"{place}: {problem}; decimal commas? expected points")
            values = ["" if value.casefold() in BLANKS else value for value in values]
            if any(values):
                values += [""] * len(names)
                rows.append(dict(zip(names, values, strict=False)) | {"": place})
    except csv.Error as error:
        raise DataError(f"{path}:{line + 1}: {error}, expected a closing quote") from error
    if not rows:
        raise DataError(f"{path}: no rows below the names of the columns")
    return rows


def read_text(path: Path) -> str:
    """The text of a table, plain or .gz: UTF-8, or UTF-16 by its mark. Letters are composed."""
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: {error}; copy or download it again") from error
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    # Never by replacing what is wrong: names of classes that differ there would become one.
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not UTF-8: save the table as CSV UTF-8") from error
    return unicodedata.normalize("NFC", text).replace("\0", "")


def rename_columns(
    path: Path, names: list[str], columns: list[str], needed: tuple[str, ...]
) -> list[str]:
    """The columns of a table by the names of --columns; another one so called is table_NAME."""
    new = {}
    for pair in columns:
        name, _, column = unicodedata.normalize("NFC", pair).partition("=")
        if not column:  # the empty name is that of pandas' row numbers
            raise DataError(f"--columns {pair}: expected NAME=COLUMN")
        new[column] = name
    names = [new.get(name, f"table_{name}" if name in new.values() else name) for name in names]
    missing = [name for name in (*new.values(), *needed) if name not in names]
    if missing:
        problem = f"no column {', '.join(missing)}, found {names}"
        raise DataError(f"{path}: {problem}: use{suggest_columns(names)}")
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]}, expected one")
    return names


def suggest_columns(names: list[str]) -> str:
    """The --columns to type for a table whose columns are called otherwise; "" if none is."""
    pairs = []
    for name, pattern in ALIKE.items():
        alike = [column for column in names if re.search(pattern, column, re.IGNORECASE)]
        if name not in names and (alike or name not in ("patient", "split")):
            pairs.append(f"{name}={shlex.quote(alike[0] if alike else 'COLUMN')}")
    return f" --columns {' '.join(pairs)}" if pairs else ""


def plain_number(text: str) -> str:
    """7.0, as programs write 7 in a column with gaps, is 7; 07 is something else."""
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text)


def split_of(name: str) -> str:
    """train, val or test, by what folders and tables call it (Training_Set, validate), or ""."""
    word = re.sub("[ _-]?(set|data)$", "", name.lower())
    return next((split for split, words in SPLITS.items() if word in words), "")


def read_row(row: Row, used: tuple[str, ...]) -> dict:
    """What a row says besides the `used` columns, as fields of Case: patient, split and more.

    The split is a fold (0 to 4, test), an official split (train, val, test) or "".
    """
    fold = plain_number(row.get("fold", ""))
    split = row.get("split", "")
    is_known = fold in ("", "0", "1", "2", "3", "4", "test") and (not split or split_of(split))
    if not is_known or (fold and split):
        expected = "expected fold 0 to 4 or test, or split train, val or test"
        raise DataError(f"{row['']}: fold {fold!r} and split {split!r}, {expected}")
    more = {}
    for name, value in row.items():
        if name not in ("", *used, "patient", "fold", "split"):
            more[f"table_{name}" if name in INDEX_COLUMNS else name] = value
    patient = plain_number(row.get("patient", ""))
    return {"patient": patient, "split": fold or split_of(split), "more": more}


def match_rows(rows: list[Row], decisive: tuple[str, ...], listing: Listing) -> dict[str, Row]:
    """The row of every image that their column `image` names, by the image's path.

    Raises DataError for a name that fits several images, and for rows of one image that differ in
    the `decisive` columns.
    """
    places = locate({row["image"] for row in rows}, listing.images)
    matched = {}
    unmatched = []
    for row in rows:
        image = row["image"]
        candidates = places.get(image, [])
        if len(candidates) > 1:
            raise DataError(f"{row['']}: {image} may be {' or '.join(candidates)}: give its path")
        if not candidates:
            unmatched.append(image)
            continue
        first = matched.setdefault(candidates[0], row)
        for name in decisive:
            if row.get(name) != first.get(name):
                problem = f"{name} {row.get(name)!r} of {image}, but {first.get(name)!r}"
                raise DataError(f"{row['']}: {problem} in {first['']}, expected one row an image")
    for name in rows[0]:
        words = {split_of(row[name]) for row in rows}
        is_read = {"split", "fold"} & rows[0].keys()
        if len(words) > 1 and words <= SPLITS.keys() and not is_read:
            option = shlex.quote(f"split={name}")
            print(f"note: is {name} an official split? Then --columns {option}")
    table = rows[0][""].rpartition(":")[0]
    if not matched:
        problem = f"none of its {len(rows)} images lies beside it or below: {unmatched[0]!r}, ..."
        raise DataError(f"{table}: {problem}; found {describe_files(listing)}")
    if unmatched:
        print(f"note: {len(unmatched)} rows without a file left out, such as {min(unmatched)!r}")
    repeated = len(rows) - len(unmatched) - len(matched)
    if repeated:
        print(f"note: {repeated} rows repeat an image, which is read once")
    report_left_out(listing, matched.keys() | {PurePosixPath(table).name})
    # Sorted, so that the cache does not depend on the order of the rows
    return dict(sorted(matched.items()))


def locate(names: set[str], images: list[str]) -> dict[str, list[str]]:
    """The images that each name of a table may mean, by the longest end that their paths share.

    In any case of letters, with or without the suffix: D:\\scans\\1.dcm is 1.dcm beside the table.
    Folders of a name are passed over only where no other name of the table has the same end.
    """
    paths = {name: split_path(name) for name in names if name}
    stems = {name: split_path(strip_suffix(name)) for name in paths}
    ends = [(image, {split_path(image), split_path(strip_suffix(image))}) for image in images]
    places = {}
    for depth in range(max(map(len, paths.values()), default=0), 0, -1):
        by_end = defaultdict(list)
        for image, ways in ends:
            for path in ways:
                by_end[path[-depth:]].append(image)
        claims = Counter(stem[-depth:] for stem in stems.values())
        for name, path in paths.items():
            same = by_end.get(path[-depth:], [])
            is_alone = len(path) == depth or claims[stems[name][-depth:]] == 1
            if name not in places and len(path) >= depth and same and is_alone:
                exact = strip_suffix(name.replace("\\", "/").removeprefix("./"))
                whole = [image for image in same if strip_suffix(image) == exact]
                beside = [image for image in same if strip_suffix(image) == f"images/{exact}"]
                places[name] = whole or beside or same
    return places


def split_path(path: str) -> tuple[str, ...]:
    """The parts of a path of any computer, without dots, in one case of composed letters."""
    parts = unicodedata.normalize("NFC", path).casefold().replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", ".."))


def strip_suffix(path: str) -> str:
    """A path without the suffix of an image. The last number of a DICOM UID is none."""
    suffix = PurePosixPath(path).suffix
    return path.removesuffix(suffix) if suffix.lower() in SUFFIXES else path


def list_folder(folder: Path) -> Listing:
    """All files below a folder, in linked folders too, but hidden ones (._NAME, __MACOSX)."""
    listing = Listing([], [], [], [])

    def walk(below: Path, above: tuple[str, ...]) -> None:
        kind = listing.closed
        with suppress(OSError):  # no permission
            if below.is_file():
                is_image = below.suffix.lower() in SUFFIXES or image_kind(below)
                kind = listing.images if is_image else listing.non_images
            elif below.is_dir() and os.path.realpath(below) not in above:
                above = (*above, os.path.realpath(below))
                for name in sorted(os.listdir(below)):
                    if not name.startswith(".") and name != "__MACOSX":
                        walk(below / name, above)
                return
        kind.append(below.relative_to(folder).as_posix())

    walk(folder, ())
    stems = set(map(strip_suffix, listing.images))
    for image in listing.images:
        bare = MASK.sub("", strip_suffix(image))
        if bare in stems and bare != strip_suffix(image):
            listing.masks.append(image)
    masks = set(listing.masks)
    return listing._replace(images=[image for image in listing.images if image not in masks])


def list_images(paths: list[Path]) -> dict[str, Path]:
    """Files, and all images below folders, by their paths below what was given."""
    files = {}
    for path in paths:
        images = {path.name: path}
        if path.is_dir():
            listing = list_folder(path)
            images = {name: path / name for name in listing.images}
            report_left_out(listing, images.keys())
        if not images:
            raise DataError(f"{path}: no image, expected DICOM, JPEG, PNG or TIFF")
        for name, image in images.items():
            if files.setdefault(name, image) != image:
                raise DataError(f"{image}: called as {files[name]}; predict them apart")
    return files


def image_kind(path: Path) -> str:
    """What a file is by its first bytes: DICOM, picture (JPEG, PNG, TIFF), or "" for others."""
    if path.name.upper() == "DICOMDIR":  # the table of contents of an export
        return ""
    with open(path, "rb") as file:
        head = file.read(132)
    # PS3.10 7.1: 128 bytes, which may begin a TIFF, then DICM. Some writers leave the former out.
    if b"DICM" in (head[128:], head[:4]):
        return "DICOM"
    if head.startswith(PICTURES):
        return "picture"
    # A bare data set (older archives) begins with group 0002 or 0008 and a VR or a short length.
    starts_a_group = head[:2] in (b"\x02\0", b"\x08\0", b"\0\x08")
    has_vr = head[4:6].isalpha() and head[4:6].isupper()
    return "DICOM" if starts_a_group and (has_vr or head[6:8] == b"\0\0") else ""


def describe_files(listing: Listing, used: Collection[str] = ()) -> str:
    """How many files of each kind a folder holds besides the used ones, for a message."""
    kinds = defaultdict(list)
    for path in listing.images + listing.non_images:
        suffix = PurePosixPath(path).suffix.lower()
        # Of IM.0001 and a UID the last number is no suffix.
        kind = suffix if re.fullmatch(r"\.[a-z]\w*", suffix) else "without a suffix"
        kinds[f"{kind} (convert to PNG)" if suffix in UNREAD else kind].append(path)
    kinds["masks beside their images"] = listing.masks
    kinds["links to nothing or to a folder above, pipes, unreadable folders"] = listing.closed
    parts = []
    for kind, paths in kinds.items():
        unused = [path for path in paths if path not in used]
        if unused:
            parts.append(f"{len(unused)} {kind}, such as {unused[0]}")
    return "; ".join(parts) or "nothing"


def report_left_out(listing: Listing, used: Collection[str]) -> None:
    """Say which files of a listing are not among the used ones."""
    left_out = describe_files(listing, used)
    if left_out != "nothing":
        print(f"note: left out: {left_out}")


def set_by_path(cases: list[Case], name: str, regex: re.Pattern | None) -> None:
    """Set the patient, or the site, to what --NAME-regex finds in a file's name, else its path."""
    if not regex:
        return
    for case in cases:
        match = regex.search(case.source.rpartition("/")[2]) or regex.search(case.source)
        value = match and next(filter(None, match.groups()), match[0])
        if not value:
            raise DataError(f"--{name}-regex {regex.pattern} finds nothing in {case.source}")
        setattr(case, name, value)
    values = {getattr(case, name) for case in cases}
    print(f"--{name}-regex: {len(values)}, such as {getattr(cases[0], name)} in {cases[0].source}")


# --- read: the loop, and one case ---


def write_images(
    path: Path, shape: tuple[int, ...], cases: list[Case], load_case: Callable, workers: int
) -> tuple[list[Case], list[tuple[str, str]]]:
    """Write all that `load_case` can read to an .npy file, uint8 (N, *shape), one by one.

    Returns the cases that are in the file, in its order, and (source, reason) of the others.
    Not through a memory map: there a full disk would kill the process (SIGBUS).
    """
    good = []
    bad = []
    notes = []
    header = {"descr": "|u1", "fortran_order": False}
    write_header = np.lib.format.write_array_header_1_0
    with open(path, "wb") as file:
        write_header(file, header | {"shape": (len(cases), *shape)})
        for case, result in zip(cases, in_threads(load_case, cases, workers), strict=True):
            if isinstance(result, DataError):
                bad.append((case.source, str(result)))
                continue
            image, image_notes = result
            file.write(image.tobytes())
            good.append(case)
            notes.extend((case.source, note) for note in image_notes)
        file.seek(0)  # numpy leaves room for another count: some may have been bad
        write_header(file, header | {"shape": (len(good), *shape)})
    report_notes(notes)
    return good, bad


def in_threads(function: Callable, items: list, workers: int) -> Iterator:
    """`map` in threads (decoding and resizing release the GIL), in the order of the items.

    In chunks, so that results do not pile up in memory, and Ctrl-C waits for one of them only.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(items), 64):
            yield from pool.map(function, items[start : start + 64])
            progress(f"read {min(start + 64, len(items))}/{len(items)}")
    progress("")


def refuse_bad(folder: Path, bad: list[tuple[str, str]], total: int, skip_bad: bool) -> None:
    """Name what cannot be used, in skipped.csv with --skip-bad; DataError without, or if all is."""
    report_bad(bad)
    if bad and not (skip_bad and len(bad) < total):
        raise DataError(f"{len(bad)} of {total} images cannot be used: fix them, or use --skip-bad")
    if bad:  # a name that is not UTF-8 may be the reason
        options = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with open(folder / "skipped.csv", "w", **options) as file:
            csv.writer(file).writerows([("source", "reason"), *bad])


def report_bad(bad: list[tuple[str, str]]) -> None:
    """Print why each (source, reason) cannot be used; of more than 5 alike the first."""
    for alike in group_alike(bad):
        lines = [one_line(reason) for _, reason in alike]
        if len(lines) > 5:
            lines = [f"{lines[0]} (and {len(lines) - 1} more files)"]
        print(*lines, sep="\n", file=sys.stderr)


def report_notes(notes: list[tuple[str, str]]) -> None:
    """Print (source, note) of what was changed in reading, once for each kind."""
    for alike in group_alike(notes):
        source, note = alike[0]
        print(f"note: {len(alike)} images: {note}, such as {source}")


def group_alike(messages: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Group (source, message) whose messages differ in numbers or in the path before them only."""
    alike = defaultdict(list)
    for source, message in messages:
        alike[re.sub("[0-9.]+", "#", message.split(f"{source}: ")[-1])].append((source, message))
    return list(alike.values())


def load(case: Case, raw: Path, size: int, fit: str, channels: int) -> Noted | DataError:
    """Read and resize one case, and fill what it learns by that; or why it cannot be used."""
    if CONTROL.search(case.source):
        return DataError(f"{case.source}: control characters, or no UTF-8, in the name: rename it")
    try:
        picture = read_image(raw / case.source) if case.pixels is None else read_array(case.pixels)
    except DataError as error:
        return error
    image, notes = prepare_image(picture, size, fit, channels)
    case.digest = picture.digest
    case.patient_id = picture.patient
    return image, notes


def read_array(pixels: np.ndarray) -> Picture:
    """What a file would give for uint8 pixels that are in memory, (H, W) or RGB (H, W, 3)."""
    if pixels.ndim == 2:
        return Picture(pixels, hash_pixels(pixels))
    notes = []
    colour = find_colour(pixels, 255, notes)
    gray = (pixels @ LUMA / 255).astype(np.float32)
    return Picture(gray, hash_pixels(pixels), colour, notes=tuple(notes))


def prepare_image(picture: Picture, size: int, fit: str, channels: int) -> Noted:
    """What the network sees of a picture, uint8 (size, size) or (size, size, 3), and notes."""
    if channels == 1:
        return resize(picture.gray, size, fit), picture.notes
    if picture.colour is None:
        gray = resize(picture.gray, size, fit)
        return np.stack([gray] * 3, -1), (*picture.notes, "gray, kept as three equal channels")
    rgb = [resize(channel, size, fit) for channel in picture.colour.transpose(2, 0, 1)]
    return np.stack(rgb, -1), tuple(note for note in picture.notes if note != COLOUR_LOST)


# --- read: one file. The same text in classification/ and detection/ ---


def read_image(path: Path) -> Picture:
    """Read any file as it is meant to be shown; DataError if it is not one picture with content."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file")
        kind = image_kind(path)
        if not kind:
            raise DataError(f"{path}: neither DICOM nor JPEG, PNG or TIFF, by its first bytes")
        picture = read_dicom(path) if kind == "DICOM" else read_raster(path)
    except DataError:
        raise
    except Exception as error:  # anything that Pillow or pydicom raise
        reason = " ".join(str(error).split())  # pydicom names the decoder that lacks
        raise DataError(f"{path}: {type(error).__name__}: {reason}") from error
    if not picture.gray.min() < picture.gray.max():  # also true for NaN
        raise DataError(f"{path}: no contrast, all pixels have one value (or some are NaN)")
    return picture


def read_dicom(path: Path) -> Picture:
    """Read a single-frame DICOM image as it is meant to be shown (PS3.3 C.7.6.3, C.11)."""
    ds = open_dicom(path)
    check_header(ds, path)  # before pixels are decoded
    pixels, padding = stored_pixels(ds)
    if pixels.shape[:2] != (ds.Rows, ds.Columns):
        raise DataError(f"{path}: pixels {pixels.shape}, expected a single image")
    digest = hash_pixels(pixels)
    highest = 2**ds.BitsStored - 1
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)[..., :3]
        highest = 65535 if pixels.max() > 255 else 255  # some fill 8 of 16 bits
    notes = []
    colour = None
    if pixels.ndim == 3:
        gray = (pixels @ LUMA / highest).astype(np.float32)
        colour = find_colour(pixels, highest, notes)
    else:
        gray = display_values(ds, pixels, padding, path, notes)
        if ds.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
            gray = (255 if gray.dtype == np.uint8 else 1) - gray
        if padding.any():
            gray = np.where(padding, 0, gray)  # black, also after the inversion
    patient = plain_number(str(ds.get("PatientID") or "").strip())
    # A hash, because the ID itself is personal data; 48 bits tell the patients of a set apart.
    patient = hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""
    return Picture(gray, digest, colour, patient, pixel_spacing(ds), tuple(notes))


def open_dicom(path: Path) -> Dataset:
    """Read a data set, with or without preamble and meta header, which older archives leave out.

    What Enhanced objects keep in functional groups (PS3.3 C.7.6.16) is put where others have it.
    """
    data = path.read_bytes()
    ds = pydicom.dcmread(io.BytesIO(data[4:] if data[:4] == b"DICM" else data), force=True)
    if not ds.file_meta.get("TransferSyntaxUID"):
        # As pydicom guessed it from the first element; compressed pixels would need the real one.
        implicit, little = ds.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        group = (ds.get(keyword) or [{}])[0]
        for name in ("PixelValueTransformation", "FrameVOILUT", "PixelMeasures"):
            ds.update((group.get(f"{name}Sequence") or [{}])[0])
    return ds


def check_header(ds: Dataset, path: Path) -> None:
    """Raise DataError for a data set that is not one image of a known kind."""
    missing = [keyword for keyword in NEEDED if ds.get(keyword) in (None, b"")]
    if missing:
        kind = ds.get("Modality") or "no modality"
        raise DataError(f"{path}: DICOM ({kind}) without {', '.join(missing)}, expected an image")
    frames = number(ds, "NumberOfFrames", 1)
    if frames > 1:
        raise DataError(f"{path}: DICOM with {frames:.0f} frames, expected a single image")
    if ds.Rows * ds.Columns > MAX_PIXELS:  # a few bytes can claim any size
        raise DataError(f"{path}: {ds.Rows} x {ds.Columns} pixels, expected at most {MAX_PIXELS}")
    # Padded to an even length by a space, or wrongly by NUL
    photometric = str(ds.PhotometricInterpretation).strip(" \0").upper()
    ds.PhotometricInterpretation = photometric
    if photometric == "PALETTE COLOR" and not ds.file_meta.TransferSyntaxUID.is_little_endian:
        photometric += " in big endian"  # pydicom would swap the bytes of its entries
    if photometric not in PHOTOMETRIC:
        raise DataError(f"{path}: {photometric!r}, expected one of {PHOTOMETRIC}")


def number(ds: Dataset, keyword: str, default: float) -> float:
    """The first value of an optional attribute, or `default` where it is no finite number."""
    values = numbers(ds, keyword)
    return values[0] if values and math.isfinite(values[0]) else default


def numbers(ds: Dataset, keyword: str) -> list[float]:
    """The values of an optional attribute as floats, NaN for one that is empty or no number."""
    try:
        values = list(map(str, np.atleast_1d(ds.get(keyword))))
    except Exception:  # pydicom converts on access
        return []
    pattern = re.compile(r"\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*")
    return [float(value) if pattern.fullmatch(value) else math.nan for value in values]


def stored_pixels(ds: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The stored values, (H, W) or RGB (H, W, 3), and where they are padding, bool (H, W).

    Bits outside BitsStored are no image (PS3.5 8.1.1), natively or compressed. A HighBit other than
    BitsStored - 1 says that native values are stored further left; compressed streams ignore it.
    """
    bits = ds.BitsStored
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated or "PlanarConfiguration" not in ds:
        ds.PlanarConfiguration = 0  # a stream says itself in what order its colours are
    shift = 0  # how many bits further left than usual
    if not syntax.is_encapsulated and ds.SamplesPerPixel == 1:
        shift = int(number(ds, "HighBit", bits - 1)) + 1 - bits
        if not 0 <= shift <= ds.BitsAllocated - bits:
            shift = 0
        ds.BitsStored = ds.BitsAllocated  # no masking by pydicom
    # pylibjpeg, which pydicom prefers, takes four times as long, and rounds in another way.
    plugin = "pillow" if syntax == uid.JPEGBaseline8Bit else ""
    container = pixel_array(ds, decoding_plugin=plugin)  # YBR converted to RGB
    ds.BitsStored = bits
    # In the byte order of this machine, so that one image has one hash
    pixels = container.astype(container.dtype.newbyteorder("="), copy=False)
    unused = max(0, 8 * container.itemsize - bits)
    if unused:
        # To the left end and back to the right: the shift right extends the sign of signed values.
        pixels = (pixels << (unused - min(shift, unused))) >> unused
    return pixels, find_padding(ds, pixels, container)


def find_padding(ds: Dataset, pixels: np.ndarray, container: np.ndarray) -> np.ndarray:
    """Where gray pixels (H, W) are padding (PS3.3 C.7.5.1.1.2), bool (H, W).

    The VR is "US or SS", and files have the wrong one: the same bits are read with the sign of the
    pixels (65535 stored as -1, or -2000 stored as 63536). They may use bits that an image may not,
    so that they are looked for in the `container` as well.
    """
    nowhere = np.zeros(pixels.shape[:2], bool)
    value = number(ds, "PixelPaddingValue", math.nan)
    if pixels.ndim == 3 or math.isnan(value):
        return nowhere
    limit = number(ds, "PixelPaddingRangeLimit", value)  # which may lie below the value
    low, high = np.sort(np.int64([value, limit]).astype(pixels.dtype))
    padding = (low <= pixels) & (pixels <= high)
    padding |= (low <= container) & (container <= high)
    return nowhere if padding.all() else padding


def find_colour(rgb: np.ndarray, highest: float, notes: list[str]) -> np.ndarray | None:
    """RGB (H, W, 3) of the range 0..highest, bytes or float32 in 0..1, with a note; None for gray.

    JPEG leaves small differences between the channels of a gray picture: those are no colour.
    """
    # Channel by channel: along an axis of 3, NumPy takes 25 times as long.
    red, green, blue = np.moveaxis(rgb, -1, 0)
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    if (high - low).max() <= highest / 32:
        return None
    notes.append(COLOUR_LOST)
    is_byte = rgb.dtype == np.uint8 and highest == 255
    return rgb if is_byte else rgb.astype(np.float32) / np.float32(highest)


def modality_values(ds: Dataset, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values to values with a meaning, float32: modality LUT or rescale (PS3.3 C.11.1)."""
    table = None
    if ds.get("SOPClassUID") not in ANGIOGRAPHY:
        table = read_lut(ds, "ModalityLUTSequence", stored_range(ds), path)
    if table:
        return np.interp(pixels, *table).astype(np.float32)
    slope = number(ds, "RescaleSlope", 1)
    if slope == 0:
        raise DataError(f"{path}: RescaleSlope 0, which makes all pixels one value")
    return pixels * np.float32(slope) + np.float32(number(ds, "RescaleIntercept", 0))


def stored_range(ds: Dataset) -> np.ndarray:
    """Every value that a pixel can have, in rising order; above 16 bits the two ends only."""
    count = 2**ds.BitsStored
    every_value = np.arange(count) if ds.BitsStored <= 16 else np.array([0, count - 1])
    return every_value - (count // 2 if ds.PixelRepresentation == 1 else 0)  # two's complement


def read_lut(
    ds: Dataset, keyword: str, inputs: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and outputs of a sequence's first LUT (PS3.3 C.11.1.1.1, C.11.2.1.1), None without.

    By hand: pydicom 3.0.2 wraps with 8-bit entries and more than 256 of them. `inputs` are the
    values that it can be asked for. Raises DataError if more than the last entry lacks.
    """
    item = (ds.get(keyword) or [{}])[0]  # some leave it empty
    if not (item.get("LUTDescriptor") and item.get("LUTData")):
        return None
    count, first, bits = map(int, item.LUTDescriptor)
    count = count % 2**16 or 2**16  # 0 is 2^16; a wrong VR makes it negative
    entries = item.LUTData
    if isinstance(entries, bytes):  # OW or UN
        order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(entries, f"{order}u2")
    entries = np.atleast_1d(entries).astype("<u2")
    if bits <= 8 and len(entries) < count - 1:
        entries = entries.view(np.uint8)  # two entries a word
    if len(entries) < count - 1:
        raise DataError(f"{path}: {keyword} has {len(entries)} entries, expected {count}")
    first %= 2**16
    if inputs.min() < 0 and first >= 2**15:  # "US or SS" as well: it has the sign of the inputs
        first -= 2**16
    return np.arange(first, first + count), np.append(entries, entries[-1])[:count]


def display_values(
    ds: Dataset, pixels: np.ndarray, padding: np.ndarray, path: Path, notes: list[str]
) -> np.ndarray:
    """Stored values (H, W) to gray as in Picture by VOI LUT, window or range (PS3.3 C.11.2)."""
    # Only one of VOI LUT and window may be applied (C.11.2); the LUT is the richer of the two.
    every_value = modality_values(ds, stored_range(ds), path)
    table = read_lut(ds, "VOILUTSequence", every_value, path)
    center = number(ds, "WindowCenter", math.nan)
    width = number(ds, "WindowWidth", math.nan)
    function = str(ds.get("VOILUTFunction") or "").strip().upper()
    # In a linear window (C.11.2.1.2.1) 1 is a threshold: one gray level would be left.
    narrowest = 0 if function in ("LINEAR_EXACT", "SIGMOID") else 1
    has_window = not math.isnan(center) and width > narrowest
    if not has_window and ds.get("WindowCenter") is not None:
        notes.append("window passed over: no number, or too narrow")
    is_plain = table is None and not has_window
    if is_plain and pixels.dtype == np.uint8 and np.array_equal(every_value, np.arange(256)):
        return pixels  # bytes until they are resized: faster
    values = modality_values(ds, pixels, path)
    inside = values[~padding]
    if is_plain and ds.BitsStored <= 8 and ds.PixelRepresentation == 0:
        return stretch(values, every_value.min(), every_value.max())
    if is_plain:
        # Not the extremes: a burnt-in marker or a dead pixel would decide the contrast.
        return stretch(values, *np.percentile(inside, (0.5, 99.5)))
    if table is not None:
        used = "VOI LUT"
        inputs, outputs = table
        # The range of the entries, not of BitsStored: an 8-bit LUT may serve 12-bit pixels.
        gray = stretch(np.interp(values, inputs, outputs), outputs.min(), outputs.max())
    else:
        used = f"window {center:g}/{width:g}"
        gray = apply_window(values, center, width, function)
    shown = np.count_nonzero(np.bincount((gray[~padding] * 255).astype(np.uint8)))
    levels = len(np.unique(inside)) if shown < FEW_LEVELS else shown
    if shown == 1 < levels:
        raise DataError(f"{path}: {used} shows none of {inside.min():g} to {inside.max():g}")
    if shown < levels:
        notes.append(f"{used} leaves {shown} gray levels of {levels}")
    return gray


def apply_window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values (H, W) to gray in 0..1 by a window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        scaled = 4 * (values - np.float32(center)) / np.float32(width)
        return 1 / (1 + np.exp(-scaled.clip(-80, 80)))  # exp(89) overflows
    if function == "LINEAR_EXACT":
        return stretch(values, center - width / 2, center + width / 2)
    # Half a pixel and one value less: the lowest and the highest of `width` whole numbers
    return stretch(values, center - width / 2, center + width / 2 - 1)


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..1, float32, and clip what lies outside."""
    # float(): a NumPy scalar would promote float32 values to float64.
    scaled = (values - float(low)) / (float(high - low) or 1.0)
    return scaled.clip(0, 1).astype(np.float32, copy=False)


def hash_pixels(pixels: np.ndarray) -> str:
    """A hash of shape and stored pixels: equal for identical images."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels))  # without a copy in most cases
    return digest.hexdigest()[:16]


def pixel_spacing(ds: Dataset) -> tuple[float, ...]:
    """Mm per pixel down and across (PS3.3 10.7.1.3), () where no usable value stands."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):  # at the body, at the detector
        spacing = numbers(ds, keyword)
        if len(spacing) == 2 and all(0.001 <= mm <= 100 for mm in spacing):
            return tuple(spacing)
    return ()


def read_raster(path: Path) -> Picture:
    """Read a JPEG, PNG or TIFF, turned as its orientation tag says: what viewers show."""
    notes = []
    # As a file object: opened by path, Pillow >= 11 scrambles an uncompressed TIFF that it turns.
    with open(path, "rb") as file, Image.open(file, formats=["JPEG", "PNG", "TIFF"]) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones add a preview
            raise DataError(f"{path}: {frames} frames, expected a single image")
        tags = getattr(image, "tag_v2", {})
        # Pillow's raw mode of a PNG names 16 bits, a TIFF has tags for bits and sign (2).
        bits = 16 if ";16" in str(image.tile) else max(tags.get(Tag.BitsPerSample, (8,)))
        sample = tags.get(Tag.SampleFormat, (1,))[0]
        if (bits > 8 and image.mode[0] not in "IF") or (bits, sample) in ((8, 2), (32, 1)):
            problem = f"{image.format} with {image.mode} of {bits} bits (sample format {sample})"
            raise DataError(f"{path}: {problem}, expected 8, or 16 of gray")
        # WhiteIsZero, which Pillow heeds in 8 bits only
        is_inverse = tags.get(Tag.PhotometricInterpretation) == 0
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # Pillow's modes of more than 8 bits
            pixels = np.asarray(image)
            ends = np.percentile(pixels, (99.5, 0.5) if is_inverse else (0.5, 99.5))
            return Picture(stretch(pixels, *ends), hash_pixels(pixels))
        pixels = np.asarray(image.convert("L"))
        colour = None
        if image.mode not in ("1", "L", "LA"):
            colour = find_colour(np.asarray(image.convert("RGB")), 255, notes)
        if image.has_transparency_data:
            visible = np.asarray(image.convert("RGBA").getchannel("A")) > 0
            if not visible.all():  # hidden pixels
                pixels = pixels * visible
                colour = None if colour is None else colour * visible[..., None]
                notes.append("transparent pixels made black")
    return Picture(pixels, hash_pixels(pixels), colour, notes=tuple(notes))


def resize(picture: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Resize (H, W), uint8 or float32 in 0..1, with antialiasing to uint8 (size, size).

    "crop" takes the middle square, "pad" adds black bars, "squash" changes the proportions.
    """
    height, width = picture.shape
    new_height = new_width = size
    if fit == "crop":
        side = min(height, width)
        top = (height - side) // 2
        left = (width - side) // 2
        picture = picture[top : top + side, left : left + side]
    elif fit == "pad":
        new_width = max(1, round(width * size / max(height, width)))
        new_height = max(1, round(height * size / max(height, width)))
    image = Image.fromarray(picture)
    highest = 255 if image.mode == "L" else 1
    image = image.convert("F")  # two passes would round bytes twice
    small = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    # Rounded here and not before: that would cost gray levels. (new_height, new_width)
    levels = np.rint(np.asarray(small).clip(0, highest) * (255 / highest))
    top = (size - new_height) // 2
    left = (size - new_width) // 2
    out = np.zeros((size, size), np.uint8)
    out[top : top + new_height, left : left + new_width] = levels
    return out


# --- split: patients and folds ---


def choose_patients(cases: list[Case]) -> list[str]:
    """A patient for each image: by layout or --patient-regex, else the PatientID, else the file.

    One PatientID in every file is none but what anonymisation left: it is passed over, with a note.
    A file name stands for a patient without its folder, unless it occurs in several folders.
    """
    ids = Counter(case.patient_id for case in cases if case.patient_id and not case.patient)
    is_placeholder = len(ids) == 1 < ids.total()
    if is_placeholder:
        print("note: one PatientID stands in every file, so it names no patient: each is one")
    files = [strip_suffix(case.source) for case in cases]
    names = [file.rpartition("/")[2] for file in files]
    counts = Counter(names)
    patients = []
    alone = 0  # images that nothing says the patient of
    for case, file, name in zip(cases, files, names, strict=True):
        patient = case.patient or ("" if is_placeholder else case.patient_id)
        alone += not patient
        patients.append(patient or (name if counts[name] == 1 else file))
    if alone:
        print(f"note: {alone} images name no patient, so each is one (or use --patient-regex)")
    largest = max(Counter(patients).values())
    if largest > max(2, len(patients) / 5):
        count = f"{largest} of {len(patients)} images"
        print(f"note: one patient has {count}: if it is none, use --patient-regex")
    return patients


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


def list_strata(cases: list[Case]) -> list[str]:
    """What folds are balanced for: the label, of several the rarest that an image has."""
    if not isinstance(cases[0].label, tuple):
        return [case.label for case in cases]
    counts = np.sum([np.array(case.label) == "1" for case in cases], axis=0)
    strata = []
    for case in cases:
        positive = [k for k, value in enumerate(case.label) if value == "1"]
        strata.append(str(min(positive, key=counts.__getitem__, default="none")))
    return strata


def report_overlaps(cases: list[Case], folds: list[str], patients: list[str]) -> dict[str, int]:
    """Count and print duplicates, contradictory labels, and patients who are not in one split."""
    labels = defaultdict(set)  # by pixels
    splits = defaultdict(set)  # by patient
    for case, fold, patient in zip(cases, folds, patients, strict=True):
        labels[case.digest].add(case.label)
        splits[patient].add((fold, case.split if case.split in SPLITS else ""))
    overlaps = {
        "pixel-identical copies": len(cases) - len(labels),
        "identical pixels with different labels": sum(len(s) > 1 for s in labels.values()),
        "patients in several official splits or folds": sum(len(s) > 1 for s in splits.values()),
    }
    for what, count in overlaps.items():
        if count:
            print(f"note: {count} {what}")
    return overlaps


# --- write ---


def write_index(
    path: Path, cases: list[Case], folds: list[str], patients: list[str], classes: list[str]
) -> dict:
    """Write index.csv; returns and prints the counts per fold and class, or of images per label."""
    counts: dict[str, Counter] = defaultdict(Counter)
    multi_label = isinstance(cases[0].label, tuple)
    columns = classes if multi_label else ["label"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        more = cases[0].more
        writer.writerow(("id", "patient", "fold", "split", "digest", *columns, *more, "source"))
        # The order is that of images.npy: row k is image k.
        for case, fold, patient in zip(cases, folds, patients, strict=True):
            split = case.split if case.split in SPLITS else ""
            labels = case.label if multi_label else [case.label]
            place = (case.id, patient, fold, split, case.digest)
            writer.writerow((*place, *labels, *case.more.values(), case.source))
            present = [name for name, value in zip(columns, labels, strict=True) if value == "1"]
            counts[fold].update(present if multi_label else labels)
    for fold in sorted(counts):
        cells = [f"{counts[fold][name]:8d} {name}" for name in classes]
        print(f"fold {fold:5}" + "".join(cells))
    for name in classes:  # a class of test alone may be one that is spelled in two ways
        empty_folds = [fold for fold in sorted(counts) if not counts[fold][name]]
        if empty_folds:
            print(f"note: no image of {name} in fold {', '.join(empty_folds)}")
    sizes = Counter(folds)
    if 0 < 4 * sizes["0"] < sizes["1"]:  # 16 of 5,232 paediatric X-rays (Kermany et al.)
        few = f"fold 0 has, as given, only {sizes['0']} of {len(folds)}: too few to choose by"
        print(f"note: {few}; train.py --fold 1 validates on {sizes['1']}")
    return {fold: dict(counts[fold]) for fold in sorted(counts)}


if __name__ == "__main__":
    run_command(main)
