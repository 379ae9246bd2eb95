"""Turn raw chest X-rays into one small array and an index that train.py and eval.py read.

  python classification/preprocess.py --data rsna-pneumonia-detection-challenge --out data/rsna
  python classification/preprocess.py --data chest_xray --out data/chest \\
      --patient-regex "person[0-9]+|IM-[0-9]+"
  python classification/preprocess.py --data pneumoniamnist.npz --out data/mnist
  python classification/preprocess.py --data other_hospital --out data/other --like data/chest

Layouts of RAW, recognised by what lies in it:
  RSNA challenge   stage_2_train_images/* and stage_2_train_labels.csv (or stage_1_...)
  table of labels  labels.csv, or a CSV file as RAW: image,label and, if you like, patient, fold (0
                   to 4, test) or split (train, val, test); further columns are kept; several labels
                   an image: in place of label two or more columns of 0, 1 and, for unknown, -1 or
                   nothing
  ChestX-ray14     Data_Entry_2017*.csv and the images; test_list.txt is the official test set
  CheXpert         train.csv, valid.csv, train/ and valid/
  class folders    RAW/CLASS/* or RAW/{train,val,test}/CLASS/*; a folder below CLASS is a patient
  MedMNIST         a .npz file, or a folder with one
Images are DICOM, JPEG, PNG or TIFF, known by their content.

Written to OUT: images.npy uint8 (N, S, S), or (N, S, S, 3) with --color; index.csv (id, patient,
fold, label or a column for each label, what else a table says, source); meta.json.

The code follows main:
  find    the layout of RAW, its classes and its cases
  read    every image once: gray as it is meant to be shown, resized, straight to images.npy
  split   images into patients, patients who share an image into one, patients into folds
  write   index.csv and meta.json
"""

import argparse
import csv
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import pydicom
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Tag
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_color_lut, apply_windowing, pixel_array

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Blocks, of 16 MiB at the most, that Pillow keeps for the next image. To ask for fresh memory, and
# to have it cleared, takes as long for every image as to decode it.
Image.core.set_blocks_max(16)

# ITU-R BT.601, what Pillow uses for convert("L")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
PHOTOMETRIC = [
    "MONOCHROME1",
    "MONOCHROME2",
    "PALETTE COLOR",
    "RGB",
    "YBR_FULL",
    "YBR_FULL_422",
    "YBR_ICT",
    "YBR_RCT",
]
# The first bytes of a file
MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}
DICOM_SUFFIXES = {".dcm", ".dicom"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"} | DICOM_SUFFIXES
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
# Of several labels an image
LABEL_VALUES = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1, "": -1}
# The columns of index.csv that mean something to train.py and eval.py
INDEX_COLUMNS = ("id", "patient", "fold", "label", "source")
# What is done to gray values that no average of pixels may come before
NOT_LINEAR = ("ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "PixelPaddingValue")
MORE_DECODERS = "more decoders: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
FOLDS = 5
COLOUR_LOST = "colour turned gray"  # a note
# Of malloc.h, for mallopt
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
PR_SET_PDEATHSIG = 1  # of Linux, for prctl
MAX_PIXELS = 2**27  # of an image: five times the largest X-rays
MAX_CLASSES = 256  # there is a name, a column and an output for each
# Names of a class without a finding: normal, healthy, negative, control, no_finding, NonCOVID
NO_FINDING = re.compile(
    r"(?i:(?<![a-z])(normals?|healthy|negatives?|neg|controls?)(?![a-z])|^no[ _-]|^non|^without)"
    r"|^No(?=[A-Z])"
)


class DataError(ValueError):
    """An error the user can fix: shown as one line with exit status 1, without a traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Text for a terminal: one line, control characters escaped, cut in the middle if long."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    line = "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in line)
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--size", type=int, help="pixels per side (default: 224; MedMNIST: as it is)")
    add("--fit", choices=("squash", "pad"), help="images that are not square (default: squash)")
    add("--color", action="store_true", help="keep colour (default: it becomes gray)")
    fast = "decode gray JPEG in DICOM at half scale where size allows it: 1.8 times as fast, 0.3 "
    add("--fast-decode", action="store_true", help=fast + "gray levels (RMS) away")
    order = "class names in order, the last is the positive one; of several labels those to keep"
    add("--classes", nargs="+", metavar="NAME", help=order)
    patient = "finds the patient in the name of a file, as its first group if any"
    add("--patient-regex", help=patient)
    fraction = "part of the patients kept as test (default: 0)"
    add("--test-fraction", type=float, default=0.0, help=fraction)
    like = "make a test set for the models of this cache: with its classes, size, color and so on"
    add("--like", type=Path, metavar="CACHE", help=like)
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out unusable files, listed in skipped.csv")
    add("--overwrite", action="store_true", help="replace a finished cache in OUT")
    args = parser.parse_args(argv)
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}, expected 8 to 4096")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    own = (args.size, args.fit, args.color, args.fast_decode, args.test_fraction)
    if args.like and any(own):
        brings = "--like brings its size, fit, color and decoding and makes every row test"
        parser.error(f"{brings}: omit those options")
    if args.like and args.like.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the cache of --like: give another folder")
    try:
        re.compile(args.patient_regex or "")
    except re.error as error:
        parser.error(f"--patient-regex {args.patient_regex!r}: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = describe_source(args)
    warnings.filterwarnings("ignore", module=r"pydicom|PIL")  # header slips, one line for each file
    # A test set has to look like what the network was trained on: same size, same normalisation.
    like = read_meta(args.like) if args.like else {}

    # find: layout, cases, classes; then the size of what is written
    layout, cases, classes = find_labelled(args, like)
    # MedMNIST comes resized: to resize it again would only blur.
    native = 224 if cases[0].pixels is None else len(cases[0].pixels)
    size = like.get("size") or args.size or native
    fit = like.get("fit") or args.fit or "squash"
    channels = 3 if args.color else like.get("channels", 1)
    kept = f"{fit}, color" if channels == 3 else fit
    positive = print_content(args.data, layout, cases, classes, f"{size}x{size} ({kept})")

    out = args.out.resolve()
    with open_output(out, args.overwrite) as folder:
        # read: every image once. What fails is collected, so that one run names it all.
        raw = args.data if args.data.is_dir() else args.data.parent  # what sources are relative to
        least = size if args.fast_decode or like.get("fast_decode") else 0
        load_case = partial(load, raw=raw, size=size, fit=fit, channels=channels, least=least)
        path = folder / "images.npy"
        shape = (size, size, 3) if channels == 3 else (size, size)
        good, bad, notes = write_images(path, shape, cases, load_case, args.workers)
        report_bad(bad)
        report_notes(notes)
        if bad and not (args.skip_bad and good):
            count = f"{len(bad)} of {len(cases)} files cannot be used"
            raise DataError(f"{count}: fix or remove them, or use --skip-bad")
        if bad:
            write_skipped(folder / "skipped.csv", bad)

        # split: images into patients, patients into folds
        digests = [case.digest for case in good]
        patients = group_patients(choose_patients(good), digests)
        report_patients(patients)
        # An official split is kept. Nothing of another hospital is for training.
        splits = ["test" if like else case.split for case in good]
        folds = assign_folds(patients, list_strata(good), splits, args.test_fraction)
        if not like and set(folds) == {"test"}:
            problem = "only test images; for an external test set use --like TRAIN_CACHE"
            raise DataError(f"{args.data}: {problem}")
        note_small_validation(folds)
        overlaps = report_overlaps(good, patients)

        # write: index.csv, and meta.json last
        counts = write_index(folder / "index.csv", good, folds, patients, classes)
        mean, std = mean_and_std(good, folds)
        meta = {
            "classes": classes,
            "positive_class": positive,
            "size": size,
            "fit": fit,
            "layout": layout,
            "n": len(good),
            "counts": counts,
            # Of the training images, or those that the models of --like were trained with; one pair
            # for all channels, whose differences are the colour
            "mean": like.get("mean", mean),
            "std": like.get("std", std),
            "overlaps": overlaps,
            "skipped": len(bad),
            # train.py tells by it whether this cache is still that of RAW
            **source,
            "versions": {module.__name__: module.__version__ for module in (np, PIL, pydicom)},
        }
        meta |= describe_unusual(channels, least, cases[0])
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    command = "train.py"
    if like:
        command = "eval.py --checkpoint runs/classification/best.pt --split test"
    print(f"next: python classification/{command} --data {args.out}")


def default_workers() -> int:
    """As many as this process may use cores, but at most 8: each holds a whole image."""
    if hasattr(os, "sched_getaffinity"):  # on a shared node fewer than os.cpu_count()
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


# --- find: the cache of --like ---


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
    """Raise DataError unless a meta.json (or a checkpoint's meta) has what a network needs."""
    if not isinstance(meta, dict):
        problem = f"{type(meta).__name__}, expected names and values"
        raise DataError(f"{where}: {problem}; preprocess again")
    classes = meta.get("classes")
    is_list = isinstance(classes, list)
    good = {
        "classes": is_list and len(set(map(str, classes))) == len(classes) >= 2,
        "size": type(meta.get("size")) is int and 8 <= meta["size"] <= 4096,
        "fit": meta.get("fit") in ("squash", "pad"),
        "channels": meta.get("channels", 1) in (1, 3),
        "multi_label": meta.get("multi_label", False) in (True, False),
        "fast_decode": meta.get("fast_decode", False) in (True, False),
        "mean": is_number(meta.get("mean")),
        "std": is_number(meta.get("std"), 0),
    }
    for name, is_good in good.items():
        if not is_good:
            problem = f"{name} {meta.get(name)!r}, which is not that of a cache of"
            script = f"{Path(__file__).parent.name}/preprocess.py"
            raise DataError(f"{where}: {problem} {script}; preprocess again")


def is_multi_label(meta: dict) -> bool:
    """Whether an image has several labels, each 1, 0 or unknown, and not one class."""
    return bool(meta.get("multi_label"))


def is_number(value: object, low: float = -math.inf) -> bool:
    """Whether a value of a JSON file is a finite number above `low`."""
    return type(value) in (int, float) and math.isfinite(value) and value > low


# --- find: layout and cases ---


@dataclass
class Case:
    """One labelled image: a file, or pixels that are in memory already."""

    id: str
    source: str  # path below RAW
    label: int | tuple[int, ...]  # number of the class; of several labels 1, 0 or -1 = unknown each
    patient: str  # by the layout or --patient-regex; "" = the DICOM PatientID, else the file stem
    split: str = ""  # official split: train, val, test, a fold 0 to 4, or "" for none
    pixels: np.ndarray | None = None
    more: dict[str, str] = field(default_factory=dict)  # further columns of a table
    # Filled when the image is read:
    digest: str = ""  # SHA-256 of the stored pixels: tells copies
    patient_id: str = ""  # hash of the DICOM PatientID, "" where there is none
    moments: tuple[float, float] = (0.0, 0.0)  # mean and mean square of the resized image, in 0..1


def find_labelled(args: argparse.Namespace, like: dict) -> tuple[str, list[Case], list[str]]:
    """The layout of RAW, its cases, and its classes in their order: with --like those of its cache.

    Raises DataError if they are not what the options and the cache of --like need.
    """
    layout, names, cases = find_cases(args.data, args.patient_regex)
    multi_label = isinstance(cases[0].label, tuple)
    if like and multi_label != is_multi_label(like):
        kinds = {True: "several labels an image", False: "one label an image"}
        expected = kinds[is_multi_label(like)]
        raise DataError(f"{args.data}: {kinds[multi_label]}, expected {expected} as {args.like}")
    if like and multi_label:
        names = add_unknown_labels(args.data, names, cases, like["classes"])
    classes = order_classes(args.data, layout, names, cases, args.classes or like.get("classes"))
    if like and classes != like["classes"]:
        raise DataError(f"--classes {classes}, but {args.like} has {like['classes']}")
    if args.test_fraction and any(case.split for case in cases):
        problem = "has an official split, which --test-fraction cannot change"
        raise DataError(f"{args.data}: {problem}")
    return layout, cases, classes


def find_cases(raw: Path, regex: str | None) -> tuple[str, list[str], list[Case]]:
    """Recognise the layout of RAW: its name, the classes and the cases.

    Raises DataError if there is none, naming what lies there and what was expected.
    """
    if not raw.exists():
        raise DataError(f"{raw}: not found")
    # By what lies there: people rename folders, but not what is in them.
    layout = recognise_layout(raw)
    if layout == "RSNA challenge":
        return layout, *find_rsna(raw)
    if layout == "table of labels":
        return layout, *find_label_table(raw, regex)
    if layout == "ChestX-ray14":
        return layout, *find_chestxray14(raw)
    if layout == "CheXpert":
        return layout, *find_chexpert(raw)
    if layout == "MedMNIST":
        return layout, *find_medmnist(raw)
    if layout == "class folders":
        return layout, *find_class_folders(raw, regex)
    raise DataError(
        f"{raw}: {describe_folder(raw)}; expected stage_2_train_images/ and "
        "stage_2_train_labels.csv (RSNA), labels.csv (image,label), Data_Entry_2017.csv "
        "(ChestX-ray14), train.csv and valid.csv (CheXpert), CLASS/*.png or "
        "{train,val,test}/CLASS/*.png (class folders), or a MedMNIST .npz"
    )


def recognise_layout(raw: Path) -> str:
    """The name of the layout in a folder (or file), by what lies in it, or ""."""
    if raw.is_file():
        layouts = {".npz": "MedMNIST", ".csv": "table of labels", ".tsv": "table of labels"}
        return layouts.get(raw.suffix.lower(), "")
    if any(raw.glob("stage_[12]_train_*")):
        return "RSNA challenge"
    if any(raw.glob("Data_Entry_2017*.csv")):
        return "ChestX-ray14"
    if has_column(raw / "train.csv", "Path"):
        return "CheXpert"
    if has_column(raw / "labels.csv", "image"):
        return "table of labels"
    if any(raw.glob("*.npz")):
        return "MedMNIST"
    folders = list_folders(raw)
    if any(folder.name.lower() in SPLITS for folder in folders):
        return "class folders"
    if any(find_images(folder) for folder in folders):
        return "class folders"
    return "table of labels" if (raw / "labels.csv").is_file() else ""


def has_column(table: Path, name: str) -> bool:
    """Whether there is a table whose first line has a column of this name."""
    if not table.is_file():
        return False
    with open(table, encoding="utf-8-sig", errors="replace") as file:
        return name in [cell.strip() for cell in re.split('[,;\t"]', file.readline())]


def find_rsna(raw: Path) -> tuple[list[str], list[Case]]:
    """RSNA Pneumonia Detection Challenge (Shih et al., Radiology: AI 2019): label 1 = any box.

    The table has a row for each box; those of a patient are merged.
    """
    stage = "stage_2" if any(raw.glob("stage_2_train_*")) else "stage_1"
    table = raw / f"{stage}_train_labels.csv"
    folder = raw / f"{stage}_train_images"
    expected = f"{table.name} and {folder.name}/ side by side"
    if not table.exists():
        raise DataError(f"{table}: not found, expected {expected}")
    labels = read_rsna_labels(
        table
    )  # first, so that a wrong table is named before files are searched
    if not folder.exists():
        raise DataError(f"{folder}: not found, expected {expected}")
    files = {}
    for path in find_images(folder):
        if path.stem in files:
            other = files[path.stem]
            raise DataError(f"{path}: a second file of patient {path.stem}, beside {other}")
        files[path.stem] = path
    # Sorted, so that the cache does not depend on the order of rows or files
    cases = []
    for name in sorted(labels.keys() & files.keys()):
        source = files[name].relative_to(raw).as_posix()
        cases.append(Case(name, source, labels[name], patient=name))
    if not cases:
        content = count_files(list_files(folder), folder) or "nothing"
        problem = f"none of the {len(labels)} patients in {table.name} has a file here"
        raise DataError(f"{folder}: {problem} ({content})")
    lost = labels.keys() - files.keys()
    if lost:
        print(f"note: {len(lost)} rows without a file left out, such as {min(lost)}")
    stray = files.keys() - labels.keys()
    if stray:
        print(f"note: {len(stray)} files without a row left out, such as {min(stray)}")
    known = {path.relative_to(raw).as_posix() for path in files.values()}
    report_left_out(raw, {table.name} | known)
    return ["no_pneumonia", "pneumonia"], cases


def read_rsna_labels(table: Path) -> dict[str, int]:
    """Labels by patientId from the challenge's CSV: patientId, x, y, width, height, Target."""
    labels: dict[str, int] = {}
    for place, row in read_rows(table, ("patientId", "Target")):
        name = row["patientId"]
        target = row["Target"]
        if target not in ("0", "1") or not name:
            raise DataError(f"{place}: {name!r} has Target {target!r}, expected 0 or 1")
        if labels.setdefault(name, int(target)) != int(target):
            raise DataError(f"{place}: {name} has rows with Target 0 and with Target 1")
    return labels


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


def find_label_table(raw: Path, regex: str | None) -> tuple[list[str], list[Case]]:
    """A table with the columns image and label; patient, fold or split, and others if it has them.

    The images lie beside the table, in images/ or below. Labels are numbers or words, classes in
    their order. Without the column label, those of 0 and 1 are several labels of an image.
    """
    table = raw / "labels.csv" if raw.is_dir() else raw
    rows = list_rows(table, ("image",))
    columns = choose_label_columns(table, rows)
    decisive = (*columns, "patient", "fold", "split")
    labelled = leave_out_unlabelled(rows, columns)
    matched = match_rows([table], labelled, "image", decisive)
    cases = []
    for source, (place, row) in matched.items():
        patient = row.get("patient", "")
        if regex and not patient:
            patient = match_patient(regex, source)
        split = read_split(place, row)
        more = further_columns(row, ("image", *decisive))
        cases.append(Case(source, source, -1, patient, split, more=more))
    check_matched(table.parent, cases, regex)
    report_renamed(cases)
    matched_rows = [row for _, row in matched.values()]
    if columns == ["label"]:
        return number_classes(table, cases, [row["label"] for row in matched_rows]), cases
    for case, row in zip(cases, matched_rows, strict=True):
        case.label = tuple(LABEL_VALUES[row[name]] for name in columns)
    return columns, cases


def list_rows(table: Path, columns: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """The rows of `read_rows` in a list. Raises DataError if there are none."""
    rows = list(read_rows(table, columns))
    if not rows:
        raise DataError(f"{table}: no rows below the names of the columns")
    return rows


def choose_label_columns(table: Path, rows: list[tuple[str, dict[str, str]]]) -> list[str]:
    """The column label, or without it all columns that hold nothing but 0, 1, -1 and blanks."""
    names = list(rows[0][1])
    if "label" in names:
        return ["label"]
    columns = []
    for name in names:
        values = {row[name] for _, row in rows}
        is_binary = values <= LABEL_VALUES.keys() and values & {"0", "1", "0.0", "1.0"}
        if is_binary and name and name not in ("image", "patient", "fold", "split", *INDEX_COLUMNS):
            columns.append(name)
    if len(columns) < 2:
        expected = "a column label, or two or more columns of 0 and 1"
        raise DataError(f"{table}: columns {names}, expected {expected}")
    return columns


def leave_out_unlabelled(
    rows: list[tuple[str, dict[str, str]]], columns: list[str]
) -> list[tuple[str, dict[str, str]]]:
    """The rows with a label, which must name an image; the others are left out with a note."""
    labelled = []
    unlabelled = []
    for place, row in rows:
        if not any(row[name] for name in columns):
            unlabelled.append(place)
        elif row["image"]:
            labelled.append((place, row))
        else:
            raise DataError(f"{place}: a label without an image")
    if unlabelled:
        print(f"note: {len(unlabelled)} rows without a label left out, such as {unlabelled[0]}")
    return labelled


def number_classes(table: Path, cases: list[Case], names: list[str]) -> list[str]:
    """The classes of a table; each case gets the number of the class that `names` has for it."""
    classes_of = defaultdict(set)  # the classes of each split
    for case, name in zip(cases, names, strict=True):
        classes_of[case.split].add(name)
    check_class_names(table, classes_of)
    classes = sort_classes(set(names))
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{table}: {len(classes)} different labels, expected at most {MAX_CLASSES}")
    for case, name in zip(cases, names, strict=True):
        case.label = classes.index(name)
    return classes


def match_rows(
    tables: list[Path],
    rows: list[tuple[str, dict[str, str]]],
    column: str,
    decisive: tuple[str, ...],
) -> dict[str, tuple[str, dict[str, str]]]:
    """The place and row of every image of some tables, by the image's path below their folder.

    `rows` are places and rows, `column` the one that names the image. Raises DataError for a name
    that fits several files, and for rows of one image that differ in the `decisive` columns. Rows
    without an image and images without a row are left out, with a note.
    """
    folder = tables[0].parent
    by_path, by_name = files_by_name(folder)
    matched = {}
    lost = []
    repeated = []
    for place, row in rows:
        name = row[column]
        sources = find_named(name, by_path, by_name)
        if not sources:
            lost.append(name)
            continue
        if len(sources) > 1:
            problem = f"{name} may be {sources[0]} or {sources[1]}"
            raise DataError(f"{place}: {problem}; write the path below {folder} into the table")
        first_place, first = matched.setdefault(sources[0], (place, row))
        if first is row:
            continue
        repeated.append(name)
        for key in decisive:
            if row.get(key) != first.get(key):
                problem = f"{name} has the {key} {row[key]!r}"
                raise DataError(f"{place}: {problem}, but {first[key]!r} in {first_place}")
    if not matched:
        content = count_files(list_files(folder), folder) or "nothing"
        problem = f"none of the images in its {len(rows)} rows is in {folder}"
        example = f", such as {lost[0]}" if lost else ""
        raise DataError(f"{tables[0]}: {problem}{example}; found {content}")
    if lost:
        print(f"note: {len(lost)} rows without a file left out, such as {min(lost)}")
    if repeated:
        print(f"note: {len(repeated)} repeated rows left out, such as {min(repeated)}")
    report_left_out(folder, {*(table.name for table in tables), *matched})
    # Sorted, so that the cache does not depend on the order of the rows
    return dict(sorted(matched.items()))


def files_by_name(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The images below a folder by their paths and by their names, with and without the suffix."""
    by_path = defaultdict(list)
    by_name = defaultdict(list)
    for path in find_images(folder):
        source = path.relative_to(folder).as_posix()
        # The last number of a DICOM UID is no suffix.
        suffix = "" if path.suffix[1:].isdigit() else path.suffix
        for key in {source, source.removesuffix(suffix)}:
            by_path[key].append(source)
        for key in {path.name, path.name.removesuffix(suffix)}:
            by_name[key].append(source)
    return by_path, by_name


def find_named(
    name: str, by_path: dict[str, list[str]], by_name: dict[str, list[str]]
) -> list[str]:
    """The images that a table may mean by a name.

    A path is one below the folder, whole or without folders at its beginning: those of another
    computer, or of a folder that was renamed. A name without folders may lie anywhere.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if len(parts) == 1:
        name = parts[0]  # without ./
        return by_path.get(name) or by_path.get(f"images/{name}") or by_name.get(name, [])
    for start in range(len(parts) - 1):
        path = "/".join(parts[start:])
        sources = by_path.get(path) or by_path.get(f"images/{path}")
        if sources:
            return sources
    return []


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


def sort_classes(names: set[str]) -> list[str]:
    """Numbers by their value, words by the alphabet."""
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def find_chestxray14(raw: Path) -> tuple[list[str], list[Case]]:
    """ChestX-ray14 (Wang et al., CVPR 2017): findings joined by |, or "No Finding" for none.

    The images of test_list.txt are the official test set; the list of the others needs no reading.
    """
    tables = sorted(raw.glob("Data_Entry_2017*.csv"))
    if len(tables) > 1:
        raise DataError(f"{raw}: {len(tables)} tables, expected one of {[t.name for t in tables]}")
    columns = ("Image Index", "Finding Labels", "Patient ID")
    rows = list_rows(tables[0], columns)
    official = raw / "test_list.txt"
    test_names = set(official.read_text().split()) if official.is_file() else set()
    lists = [official, raw / "train_val_list.txt"]
    matched = match_rows(tables + lists, rows, "Image Index", columns[1:])
    findings_of = {}
    for source, (_, row) in matched.items():
        findings_of[source] = {name.strip() for name in row["Finding Labels"].split("|")}
    names = sorted(set().union(*findings_of.values()) - {"No Finding", ""})
    cases = []
    for source, (_, row) in matched.items():
        label = tuple(int(name in findings_of[source]) for name in names)
        split = "test" if row["Image Index"] in test_names else ""
        more = further_columns(row, (*columns, *names))
        cases.append(Case(source, source, label, row["Patient ID"], split, more=more))
    return names, cases


def find_chexpert(raw: Path) -> tuple[list[str], list[Case]]:
    """CheXpert (Irvin et al., AAAI 2019): a column for each finding, 1, 0, -1 for uncertain.

    What a report does not mention is empty, and taken for 0 as in the publications; uncertain is
    unknown. valid.csv is the official validation set.
    """
    others = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
    tables = [raw / name for name in ("train.csv", "valid.csv") if (raw / name).is_file()]
    rows = []
    for table in tables:
        for place, row in list_rows(table, others):
            rows.append((place, row | {"split": SPLITS[table.stem]}))
    names = [name for name in rows[0][1] if name and name not in (*others, "split")]
    cases = []
    empty = 0
    for source, (place, row) in match_rows(tables, rows, "Path", tuple(names)).items():
        values = [row.get(name, "") for name in names]
        strange = set(values) - LABEL_VALUES.keys()
        if strange:
            raise DataError(f"{place}: finding {min(strange)!r}, expected 1, 0, -1 or nothing")
        empty += values.count("")
        label = tuple(LABEL_VALUES[value or "0"] for value in values)
        patient = match_patient("patient[0-9]+", row["Path"])
        more = {name: row[name] for name in others[1:]}
        cases.append(Case(source, source, label, patient, row["split"], more=more))
    if empty:
        print(f"note: {empty} findings that a report does not mention count as 0")
    return names, cases


def find_medmnist(raw: Path) -> tuple[list[str], list[Case]]:
    """MedMNIST v2 (Yang et al., Scientific Data 2023): one .npz with any of the three splits.

    {split}_images uint8 (N, S, S) or (N, S, S, 3) and {split}_labels integers (N, 1) or (N,), or
    0 and 1 (N, C) for several labels an image (ChestMNIST).
    """
    paths = [raw] if raw.is_file() else sorted(raw.glob("*.npz"))
    if len(paths) > 1:
        problem = f"{len(paths)} .npz files, expected one; give --data the file itself"
        raise DataError(f"{raw}: {problem}")
    path = paths[0]
    try:
        with np.load(path) as archive:  # without pickle: an archive cannot run code
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, zlib, pickle and OS errors alike
        raise DataError(f"{path}: {type(error).__name__}: {error}") from error
    cases = []
    for split in ("train", "val", "test"):
        images = arrays.get(f"{split}_images")
        labels = arrays.get(f"{split}_labels")
        if images is None or labels is None:
            continue
        check_medmnist(path, split, images, labels)
        for k, row in enumerate(labels.reshape(len(images), -1).tolist()):
            label = tuple(row) if len(row) > 1 else row[0]
            name = f"{split}/{k}"  # also the patient: MedMNIST names none
            cases.append(Case(name, f"{path.name}:{name}", label, name, split, images[k]))
    if not cases:
        expected = "train_images, train_labels and so on"
        raise DataError(f"{path}: arrays {sorted(arrays)}, expected {expected}")
    label = cases[0].label
    widths = {len(case.label) if isinstance(case.label, tuple) else 1 for case in cases}
    if len(widths) > 1:
        raise DataError(f"{path}: {sorted(widths)} labels an image, expected one number of them")
    count = len(label) if isinstance(label, tuple) else max(case.label for case in cases) + 1
    return [str(k) for k in range(count)], cases


def check_medmnist(path: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise DataError unless a split has gray or RGB images with one class number or 0s and 1s."""
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)):
        problem = f"{split}_images {images.dtype} {images.shape}"
        raise DataError(f"{path}: {problem}, expected uint8 (N, S, S) or (N, S, S, 3)")
    n = len(images)
    has_shape = labels.ndim in (1, 2) and len(labels) == n and labels.shape[1:] != (0,)
    if not has_shape or labels.dtype.kind not in "iu":
        problem = f"{split}_labels {labels.dtype} {labels.shape}"
        expected = f"integers ({n}, 1), or ({n}, C) for several labels an image"
        raise DataError(f"{path}: {problem}, expected {expected}")
    if n and labels.size > n and not 0 <= labels.min() <= labels.max() <= 1:
        problem = f"{split}_labels {labels.shape} from {labels.min()} to {labels.max()}"
        raise DataError(f"{path}: {problem}, expected 0 and 1 for several labels an image")
    if n and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        problem = f"{split}_labels from {labels.min()} to {labels.max()}"
        expected = f"numbers of classes: 0 to {MAX_CLASSES - 1} at most"
        raise DataError(f"{path}: {problem}, expected {expected}")


def find_class_folders(raw: Path, regex: str | None) -> tuple[list[str], list[Case]]:
    """RAW/CLASS/... or RAW/{train,val,test}/CLASS/...; a folder below CLASS is a patient.

    Classes in alphabetical order. Folders called images are no patients, those called masks are
    left out.
    """
    cases = []
    names = []  # the class of each case, whose number is known when all classes are
    classes_of = defaultdict(set)  # the classes of each split
    for split, folder in list_class_folders(raw):
        check_no_set(folder)
        for case in list_class(raw, split, folder, regex):
            cases.append(case)
            names.append(folder.name)
            classes_of[split].add(folder.name)
    check_matched(raw, cases, regex)
    if not cases:
        content = count_files(list_files(raw), raw) or "nothing"
        raise DataError(f"{raw}: no images in its folders ({content})")
    check_class_names(raw, classes_of)
    classes = sorted(set(names))
    for case, name in zip(cases, names, strict=True):
        case.label = classes.index(name)
    report_left_out(raw, {case.source for case in cases})
    return classes, cases


def list_class_folders(raw: Path) -> list[tuple[str, Path]]:
    """Split and folder of what is taken for a class; the split is "" where RAW has none."""
    split_folders = []
    for folder in list_folders(raw):
        split = SPLITS.get(folder.name.lower())
        if split:
            split_folders.append((split, folder))
    class_folders = []
    for split, split_folder in split_folders or [("", raw)]:
        for folder in list_folders(split_folder):
            class_folders.append((split, folder))
    return class_folders


def check_no_set(class_folder: Path) -> None:
    """Raise DataError if what would be taken for a class is a data set by itself."""
    for folder in list_folders(class_folder):
        if folder.name.lower() in SPLITS or re.match("stage_[12]_train_", folder.name):
            problem = f"one folder too high: {class_folder.name} holds {folder.name}/"
            raise DataError(f"{class_folder.parent}: {problem}; use --data {class_folder}")


def list_class(raw: Path, split: str, class_folder: Path, regex: str | None) -> list[Case]:
    """The images of a class, without a label yet; a patient is what `regex` finds, or a folder."""
    cases = []
    for path in find_images(class_folder):
        below = path.relative_to(class_folder)
        folders = [name for name in below.parts[:-1] if name.lower() not in ("image", "images")]
        if any(name.lower() in ("mask", "masks") for name in folders):  # as in COVID-19 Radiography
            continue
        patient = folders[0] if folders else ""
        if regex:
            patient = match_patient(regex, below.as_posix())
        source = path.relative_to(raw).as_posix()
        cases.append(Case(source, source, -1, patient, split))
    return cases


def check_matched(raw: Path, cases: list[Case], regex: str | None) -> None:
    """Raise DataError if --patient-regex was given and finds no patient in a name."""
    unmatched = [case for case in cases if regex and not case.patient]
    if unmatched:
        problem = f"finds nothing in {len(unmatched)} names"
        raise DataError(f"--patient-regex {regex!r} {problem}: {raw / unmatched[0].source}")


def match_patient(regex: str, text: str) -> str:
    """What a regular expression matches: its first group, or all of it; "" for no match."""
    match = re.search(regex, text)
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group()) or ""


def check_class_names(raw: Path, classes_of: dict[str, set[str]]) -> None:
    """Raise DataError for a class of val or test that train lacks, or one spelled in two ways."""
    train = classes_of.get("train")
    for split, classes in classes_of.items():
        if any(map(has_control, classes)):
            problem = f"control characters in a class of {sorted(classes)}"
            raise DataError(f"{raw}: {problem}: rename it")
        if train and classes - train:
            problem = f"{split} has the classes {sorted(classes - train)}, which train has not"
            raise DataError(f"{raw}: {problem}: expected {sorted(train)}, so rename them")
        # No_Finding and "no finding" are one class that was unpacked twice, and so are 1 and 1.0.
        spellings = defaultdict(list)
        for name in sorted(classes):
            spellings[normal_spelling(name)].append(name)
        for names in spellings.values():
            if len(names) > 1:
                problem = f"{' and '.join(names)} look like one class"
                raise DataError(f"{raw}: {problem}: merge or rename them")


def normal_spelling(name: str) -> str:
    """What is the same for two spellings of one class."""
    try:
        return str(float(name))
    except ValueError:
        return re.sub(r"[\s_.-]+", "", name).casefold()


def has_control(text: str) -> bool:
    """Whether a name has control characters, which would reach the screen from index.csv."""
    return any(unicodedata.category(c) == "Cc" for c in text)


def describe_folder(folder: Path) -> str:
    """What lies in a folder where no layout was recognised, for a message."""
    if not folder.is_dir():
        return "a file"
    for below in list_folders(folder):
        layout = recognise_layout(below)
        if layout:
            return f"one folder too high: {below.name} holds {layout}; use --data {below}"
    content = [f"{path.name}/" for path in list_folders(folder)]
    if len(content) > 5:
        content[5:] = [f"and {len(content) - 5} more folders"]
    visible = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    files = count_files(visible, folder)
    if files:
        content.append(files)
    return f"found {', '.join(content) or 'nothing'}"


def list_folders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and what macOS adds to archives."""
    names = sorted(folder.iterdir())  # sorted: file systems give names in any order
    folders = [path for path in names if path.is_dir() and path.name != "__MACOSX"]
    return [path for path in folders if not path.name.startswith(".")]


def find_images(folder: Path) -> list[Path]:
    """All images below a folder."""
    return [path for path in list_files(folder) if is_image(path)]


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, but hidden ones (.DS_Store, ._NAME) and those in hidden folders."""
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if not is_hidden and path.is_file():
            files.append(path)
    return files


def is_image(path: Path) -> bool:
    """Whether a file is to be read: by its suffix, or by its content where that says nothing."""
    if path.name.upper() == "DICOMDIR":  # the table of contents of an export, itself in DICOM
        return False
    return path.suffix.lower() in SUFFIXES or image_kind(path) != ""


def image_kind(path: Path) -> str:
    """What a file is by its first bytes: DICOM, JPEG, PNG, TIFF, or "" for anything else."""
    with open(path, "rb") as file:
        head = file.read(132)
    # PS3.10 7.1: a preamble of 128 bytes, then DICM. Some writers leave the preamble out.
    if head[128:] == b"DICM" or head.startswith(b"DICM"):
        return "DICOM"
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    # A bare data set (older archives) begins with group 0002 or 0008 and a VR or a short length.
    starts_a_group = head[:2] in (b"\x02\0", b"\x08\0", b"\0\x08")
    has_vr = head[4:6].isalpha() and head[4:6].isupper()
    if starts_a_group and (has_vr or head[6:8] == b"\0\0"):
        return "DICOM"
    return ""


def count_files(paths: Iterable[Path], folder: Path) -> str:
    """How many files of each suffix, for a message; images with the folder that they lie in."""
    counts = Counter()
    for path in paths:
        suffix = path.suffix.lower() or "without a suffix"
        parent = path.parent.relative_to(folder).as_posix()
        where = f" in {parent}/" if suffix in SUFFIXES and parent != "." else ""
        counts[f"{suffix}{where}"] += 1
    common = counts.most_common(8)  # a message stays one line
    text = ", ".join(f"{count} {what}" for what, count in common)
    others = counts.total() - sum(count for _, count in common)
    return f"{text} and {others} more" if others else text


def report_left_out(raw: Path, used: set[str]) -> None:
    """Say which files below RAW are not used: `used` are paths relative to RAW."""
    left_out = []
    for path in list_files(raw):
        if path.relative_to(raw).as_posix() not in used:
            left_out.append(path)
    if left_out:
        print(f"note: left out: {count_files(left_out, raw)}")


# --- find: classes ---


def order_classes(
    raw: Path,
    layout: str,
    classes: list[str],
    cases: list[Case],
    wanted: list[str] | None,
) -> list[str]:
    """Put the cases into the wanted class order and return it.

    The classes of folders and tables are matched by name; those of the other layouts are numbers
    that get names. Raises DataError if the wanted ones are not those of the data.
    """
    if isinstance(cases[0].label, tuple):
        return order_labels(raw, layout, classes, cases, wanted)
    if len(wanted or classes) < 2:
        if layout == "table of labels":
            raise DataError(f"{raw}: every label is {classes[0]!r}, expected two or more classes")
        expected = "a folder for each of two or more classes"
        raise DataError(f"{raw}: {describe_folder(raw)}; expected {expected}")
    if wanted is None:
        check_positive_class(classes)
        return classes
    if len(set(wanted)) != len(wanted):
        raise DataError(f"--classes {' '.join(wanted)}: expected each class once")
    # The other layouts have numbers, and any names will do.
    by_name = layout in ("class folders", "table of labels")
    has_unknown = by_name and not set(classes) <= set(wanted)
    if has_unknown or len(classes) > len(wanted):
        raise DataError(f"{raw}: classes in the data {classes}, expected {wanted}")
    if by_name:
        for case in cases:
            case.label = wanted.index(classes[case.label])
    return wanted


def order_labels(
    raw: Path,
    layout: str,
    names: list[str],
    cases: list[Case],
    wanted: list[str] | None,
) -> list[str]:
    """Of several labels an image keep the wanted ones in their order, and return them.

    The others become further columns. MedMNIST has numbers, which get the wanted names. Raises
    DataError for names that the data do not have.
    """
    wanted = wanted or names
    if layout == "MedMNIST" and len(wanted) == len(names):
        names = wanted
    if len(set(wanted)) != len(wanted) or len(wanted) < 2 or not set(wanted) <= set(names):
        raise DataError(f"{raw}: labels {wanted}, expected two or more of {names}")
    for case in cases:
        value_of = dict(zip(names, case.label, strict=True))
        case.label = tuple(value_of.pop(name) for name in wanted)
        case.more |= {name: show_label(value) for name, value in value_of.items()}
    return wanted


def add_unknown_labels(
    raw: Path, names: list[str], cases: list[Case], wanted: list[str]
) -> list[str]:
    """The labels of the data and those that --like has besides, unknown in all images."""
    missing = [name for name in wanted if name not in names]
    if len(missing) == len(wanted):
        raise DataError(f"{raw}: labels in the data {names}, expected some of {wanted}")
    if missing:
        print(f"note: labels that the data do not have, unknown here: {', '.join(missing)}")
    for case in cases:
        case.label += (-1,) * len(missing)
    return names + missing


def show_label(value: int) -> str:
    """One of several labels in a table: 1, 0, or nothing where it is unknown."""
    return "" if value < 0 else str(value)


def check_positive_class(classes: list[str]) -> None:
    """Raise DataError if alphabetical order makes the class without a finding the positive one."""
    positive = positive_class(classes)
    if positive and NO_FINDING.search(positive):
        problem = "would be the positive class, because it comes last"
        swapped = f"--classes {shlex.join(reversed(classes))}"
        meant = f"(or, if it is meant, --classes {shlex.join(classes)})"
        raise DataError(f"{positive!r} {problem}: give the order, for example {swapped} {meant}")


def positive_class(classes: list[str]) -> str | None:
    """The class that sensitivity, precision and AUROC are about: the last of two, None of more."""
    return classes[1] if len(classes) == 2 else None


def print_content(
    raw: Path, layout: str, cases: list[Case], classes: list[str], form: str
) -> str | None:
    """Say what was found and what it becomes; returns the positive class, None if there is none."""
    if isinstance(cases[0].label, tuple):
        content = f"{len(cases)} images with several labels ({', '.join(classes)})"
        print(f"{raw}: {layout}, {content}, to {form}")
        return None
    print(f"{raw}: {layout}, {len(cases)} images of {' '.join(classes)}, to {form}")
    positive = positive_class(classes)
    if positive:
        print(f"positive class: {positive}")
    return positive


# --- read: the loop ---


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


def write_images(
    path: Path,
    shape: tuple[int, ...],
    cases: list[Case],
    load_case: Callable,
    workers: int,
) -> tuple[list[Case], list[tuple[str, str]], list[tuple[str, str]]]:
    """Write every image that can be read to an .npy file, uint8 (N, *shape).

    `load_case(case)` gives uint8 of this shape and notes, or the DataError that says why not.
    Returns the cases that are in the file, in its order; (source, reason) of those that are not;
    and (source, note) of what was changed or passed over in reading.

    Written one by one: no image stays in memory, and a full disk is an OSError (through a memory
    map it would be a bus error, which nobody can report).
    """
    keep_memory()
    good = []
    bad = []
    notes = []
    with open(path, "wb") as file:
        write_header(file, (len(cases), *shape))
        for case, result in in_processes(load_case, cases, workers, part=8):
            if isinstance(result, DataError):
                bad.append((case.source, str(result)))
                continue
            image, image_notes = result
            file.write(image.tobytes())
            good.append(case)
            notes.extend((case.source, note) for note in image_notes)
        write_header(file, (len(good), *shape))  # some may have been bad
    return good, bad, notes


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


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file of uint8 of this shape at its beginning.

    numpy leaves room for the count to grow, so the header has one length for any of them.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


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


def progress(text: str) -> None:
    """A line that overwrites itself on a terminal, and nothing elsewhere."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


# --- read: one case ---


class Picture(NamedTuple):
    """One image as it is meant to be shown, and what else its file says."""

    gray: np.ndarray  # (H, W) from black to white: uint8, or float32 in 0..1
    digest: str  # SHA-256 of the stored pixels: tells copies
    colour: np.ndarray | None = None  # RGB float32 (H, W, 3) in 0..1, None where there is none
    patient: str = ""  # hash of the DICOM PatientID, "" where there is none
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, () where unknown
    notes: tuple[str, ...] = ()  # what was left out or changed in reading


def load(
    case: Case, raw: Path, size: int, fit: str, channels: int, least: int = 0
) -> tuple[np.ndarray, tuple[str, ...]] | DataError:
    """Read and resize one case: uint8 (size, size) or (size, size, 3) and notes, or why not.

    Fills what a case learns by reading: the hashes of its pixels and its PatientID, the moments.
    """
    if not is_utf8(case.source):
        problem = "the name is not UTF-8, which index.csv is"
        return DataError(f"{case.source}: {problem}: rename the file")
    if has_control(case.source):
        return DataError(f"{case.source}: control characters in the name: rename the file")
    if case.pixels is not None:
        picture = read_array(case.pixels)
    else:
        try:
            picture = read_image(raw / case.source, least)
        except DataError as error:
            return error
    image, notes = prepare_image(picture, size, fit, channels)
    case.digest = picture.digest
    case.patient_id = picture.patient
    case.moments = gray_moments(image)
    return image, notes


def is_utf8(name: str) -> bool:
    """Whether a file name can be written to index.csv: on Linux, names are bytes of any kind."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_array(pixels: np.ndarray) -> Picture:
    """What a file would give for uint8 pixels that are in memory, (H, W) or RGB (H, W, 3)."""
    if pixels.ndim == 2:
        return Picture(pixels, hash_pixels(pixels))
    notes = []
    gray = colour_to_gray(pixels, 255)  # (H, W)
    colour = find_colour(pixels, 255, notes)
    return Picture(gray, hash_pixels(pixels), colour, notes=tuple(notes))


def prepare_image(
    picture: Picture, size: int, fit: str, channels: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """What the network sees of a picture, uint8 (size, size) or (size, size, 3), and notes."""
    if channels == 1:
        return resize(picture.gray, size, fit), picture.notes
    if picture.colour is None:
        gray = resize(picture.gray, size, fit)
        return np.stack([gray] * 3, -1), (*picture.notes, "gray, kept as three equal channels")
    rgb = [resize(channel, size, fit) for channel in picture.colour.transpose(2, 0, 1)]
    notes = tuple(note for note in picture.notes if note != COLOUR_LOST)
    return np.stack(rgb, -1), notes


def gray_moments(image: np.ndarray) -> tuple[float, float]:
    """Mean and mean square of a uint8 image, in 0..1: what mean and std of a set are made of."""
    # In float64: a variance is a small difference of two means.
    return image.mean(dtype=np.float64) / 255, np.square(image / 255).mean()


# --- read: one file. The same text in classification/ and detection/ ---


def read_image(path: Path, least: int = 0) -> Picture:
    """Read any supported file as it is meant to be shown, whatever its suffix.

    `least` allows gray JPEG in DICOM at half scale if that leaves so many pixels a side (0: never).
    Raises DataError that names the file for whatever keeps it from being one gray picture with
    content.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: zero bytes")
        kind = image_kind(path)
        if kind == "DICOM":
            picture = read_dicom(path, least)
        elif kind and path.suffix.lower() in DICOM_SUFFIXES:
            problem = f"holds a {kind} picture, not DICOM"
            raise DataError(f"{path}: {problem}: rename it to .{kind.lower()}")
        elif kind:
            picture = read_picture(path, kind)
        else:
            raise DataError(f"{path}: neither DICOM nor JPEG, PNG or TIFF, by its first bytes")
    except DataError:
        raise
    except PIL.UnidentifiedImageError as error:
        problem = f"a {kind} picture that Pillow cannot read: damaged, or of a rare kind"
        raise DataError(f"{path}: {problem}") from error
    except Exception as error:  # the one place where the readers' many exceptions become ours
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "plugin" in reason and find_spec("pylibjpeg") is None:
            reason += f"; {MORE_DECODERS}"
        raise DataError(f"{path}: {reason}") from error
    if not picture.gray.min() < picture.gray.max():  # also true for NaN
        raise DataError(f"{path}: no contrast, all pixels have one value (or some are NaN)")
    return picture


def read_dicom(path: Path, least: int) -> Picture:
    """Read a single-frame DICOM image as it is meant to be shown (PS3.3 C.7.6.3, C.11.1, C.11.2).

    Modality LUT or rescale, then VOI LUT or window. Without a window, up to 8 bits keep their range
    and deeper data are stretched from the 0.5 to the 99.5 percentile, padding left out. An optional
    attribute that cannot be used is passed over, with a note.
    """
    ds = open_dicom(path)
    check_single_image(ds, path)  # before pixels are decoded: a header may claim any size
    pixels, padding = stored_pixels(ds, least)
    allowed = [(ds.Rows, ds.Columns)]
    if least:
        allowed.append(((ds.Rows + 1) // 2, (ds.Columns + 1) // 2))
    if pixels.shape[:2] not in allowed:
        expected = f"a single image ({ds.Rows}, {ds.Columns})"
        raise DataError(f"{path}: pixels {pixels.shape}, expected {expected}")
    digest = hash_pixels(pixels)
    notes = []
    colour = None
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        rgb = palette_colours(ds, pixels)
        highest = 65535 if rgb.max() > 255 else 255  # some fill 8 of the 16 bits of an entry
        gray = colour_to_gray(rgb, highest)
        colour = find_colour(rgb, highest, notes)
    elif pixels.ndim == 3:
        gray = colour_to_gray(pixels, 2**ds.BitsStored - 1)
        colour = find_colour(pixels, 2**ds.BitsStored - 1, notes)
    else:
        gray = display_values(ds, pixels, padding, path, notes)
        if ds.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
            gray = (255 if gray.dtype == np.uint8 else 1) - gray
        if padding.any():
            gray = np.where(padding, 0, gray)  # black, also after the inversion
    return Picture(gray, digest, colour, hash_patient(ds), pixel_spacing(ds), tuple(notes))


def open_dicom(path: Path) -> pydicom.Dataset:
    """Read a data set, with or without preamble and meta header, which older archives leave out."""
    with open(path, "rb") as file:
        has_bare_prefix = file.read(4) == b"DICM"  # the preamble alone is missing
    if has_bare_prefix:
        ds = pydicom.dcmread(io.BytesIO(path.read_bytes()[4:]), force=True)
    else:
        ds = pydicom.dcmread(path, force=True)
    if not ds.file_meta.get("TransferSyntaxUID"):
        # As pydicom guessed it from the first element; compressed pixels would need the real one.
        implicit_vr, little_endian = ds.original_encoding
        if implicit_vr:
            ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
        elif little_endian:
            ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        else:
            ds.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    return ds


def check_single_image(ds: pydicom.Dataset, path: Path) -> None:
    """Raise DataError for a data set that is not one image of a known kind."""
    if not ds.get("PixelData"):
        kind = ds.get("Modality") or "no modality"
        raise DataError(f"{path}: DICOM without pixel data ({kind}), expected an image")
    frames = number(ds, "NumberOfFrames", 1)
    if frames > 1:
        raise DataError(f"{path}: DICOM with {frames:.0f} frames, expected a single image")
    rows = number(ds, "Rows", 0)
    columns = number(ds, "Columns", 0)
    if rows * columns > MAX_PIXELS:  # a few bytes can claim any size
        size = f"{rows:.0f} x {columns:.0f} pixels"
        raise DataError(f"{path}: {size}, expected at most {MAX_PIXELS} in all")
    # Padded to an even length by a space, or wrongly by NUL
    photometric = str(ds.get("PhotometricInterpretation", "")).strip(" \0").upper()
    if photometric not in PHOTOMETRIC:
        problem = f"photometric interpretation {photometric!r}"
        raise DataError(f"{path}: {problem}, expected one of {PHOTOMETRIC}")
    ds.PhotometricInterpretation = photometric


def number(ds: pydicom.Dataset, keyword: str, default: float) -> float:
    """The first value of an optional attribute, or `default` where it is no finite number."""
    values = numbers(ds, keyword)
    return values[0] if values and math.isfinite(values[0]) else default


def numbers(ds: pydicom.Dataset, keyword: str) -> list[float]:
    """The values of an optional attribute as floats, NaN for one that is empty or no number."""
    try:
        values = np.atleast_1d(ds.get(keyword))
    except Exception:  # pydicom converts on access, and fails on bad values in many ways
        return []
    converted = []
    for value in values:
        try:
            converted.append(float(value))
        except (TypeError, ValueError):
            converted.append(math.nan)
    return converted


def stored_pixels(ds: pydicom.Dataset, least: int) -> tuple[np.ndarray, np.ndarray]:
    """The stored values, (H, W) or RGB (H, W, 3), and where they are padding, bool (H, W).

    Bits outside BitsStored are no image (PS3.5 8.1.1), natively or compressed. A HighBit other than
    BitsStored - 1 says that native values are stored further left; compressed streams ignore it.
    """
    bits = ds.BitsStored
    shift = 0  # how many bits further left than usual
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated and ds.get("SamplesPerPixel") == 1:
        shift = int(number(ds, "HighBit", bits - 1)) + 1 - bits
        if not 0 <= shift <= ds.BitsAllocated - bits:
            shift = 0
        ds.BitsStored = ds.BitsAllocated  # so that pydicom masks nothing before the shift
    container = decode_pixels(ds, least)
    ds.BitsStored = bits
    # In the byte order of this machine, so that one image has one hash
    pixels = container.astype(container.dtype.newbyteorder("="), copy=False)
    unused = max(0, 8 * container.itemsize - bits)
    if unused:
        # To the left end and back to the right: the shift right extends the sign of signed values.
        pixels = (pixels << (unused - min(shift, unused))) >> unused

    padding = np.zeros(pixels.shape[:2], bool)
    low, high = padding_range(ds)
    if pixels.ndim == 2 and not math.isnan(low):
        padding = (low <= pixels) & (pixels <= high)
        # The padding value may use bits that an image may not.
        padding |= (low <= container) & (container <= high)
    if padding.all():  # then it is no padding
        padding[:] = False
    return pixels, padding


def decode_pixels(ds: pydicom.Dataset, least: int) -> np.ndarray:
    """What a data set stores, (H, W) or (H, W, 3), YBR converted to RGB."""
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax == uid.JPEGBaseline8Bit and ds.get("SamplesPerPixel") == 1:
        pixels = decode_gray_jpeg(ds, least)
        if pixels is not None:
            return pixels
    return pixel_array(ds)


def decode_gray_jpeg(ds: pydicom.Dataset, least: int = 0) -> np.ndarray | None:
    """Pixels uint8 (H, W) of gray JPEG Baseline by Pillow; None where that is not what is there.

    pydicom prefers pylibjpeg where it is installed, which takes four times as long, and differs by
    a gray level here and there. Its own way to Pillow takes half as long again.
    """
    try:
        frame = next(generate_frames(ds.PixelData, number_of_frames=1))
        with Image.open(io.BytesIO(frame), formats=["JPEG"]) as image:
            is_gray = image.mode == "L" and image.size == (ds.Columns, ds.Rows)
            is_plain = ds.BitsAllocated == 8 and ds.PixelRepresentation == 0
            # libjpeg makes 4 x 4 pixels of a block of 8 x 8. What is not linear has to come before.
            is_linear = not any(keyword in ds for keyword in NOT_LINEAR)
            if least and 2 * least <= min(image.size) and is_linear:
                image.draft("L", (image.width // 2, image.height // 2))
            return np.asarray(image) if is_gray and is_plain else None
    except (OSError, SyntaxError, ValueError, StopIteration):  # pydicom's decoders may know it
        return None


def padding_range(ds: pydicom.Dataset) -> tuple[float, float]:
    """Lowest and highest stored value that means padding (PS3.3 C.7.5.1.1.2); NaN for none.

    The VR is "US or SS", and files have the wrong one of them: the same bits are read again with
    the sign of the pixels (65535 stored as -1, or -2000 stored as 63536).
    """
    value = number(ds, "PixelPaddingValue", math.nan)
    if math.isnan(value):
        return math.nan, math.nan
    limit = number(ds, "PixelPaddingRangeLimit", value)
    count = 2**ds.BitsAllocated
    ends = []
    for end in (value, limit):
        bits = int(end) % count
        is_negative = ds.PixelRepresentation == 1 and bits >= count // 2
        ends.append(bits - count if is_negative else bits)
    return min(ends), max(ends)  # the limit may lie below the value


def palette_colours(ds: pydicom.Dataset, pixels: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) of indices (H, W) into the palette (PS3.3 C.7.6.3.1.5, C.7.6.3.1.6)."""
    rgb = apply_color_lut(pixels, ds)[..., :3]
    is_big_endian = not ds.file_meta.TransferSyntaxUID.is_little_endian
    if is_big_endian and "RedPaletteColorLookupTableData" in ds:
        rgb = rgb.byteswap()  # pydicom takes the entries for little endian
    return rgb


def colour_to_gray(rgb: np.ndarray, highest: float) -> np.ndarray:
    """RGB (H, W, 3), or gray (H, W, 1), of the range 0..highest to gray float32 (H, W) in 0..1."""
    if rgb.shape[-1] == 1:
        return (rgb[..., 0] / highest).astype(np.float32)
    return (rgb @ LUMA / highest).astype(np.float32)


def find_colour(rgb: np.ndarray, highest: float, notes: list[str]) -> np.ndarray | None:
    """RGB (H, W, 3) of the range 0..highest as float32 in 0..1, with a note; None where it is gray.

    JPEG leaves small differences between the channels of a gray picture: those are no colour.
    """
    # Channel by channel: along an axis of 3, NumPy takes 25 times as long.
    channels = np.moveaxis(rgb, -1, 0)
    spread = reduce(np.maximum, channels) - reduce(np.minimum, channels)  # (H, W)
    if spread.max() <= highest / 32:
        return None
    notes.append(COLOUR_LOST)
    return rgb.astype(np.float32) / float(highest)


def modality_values(ds: pydicom.Dataset, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values (H, W) to values with a meaning, by modality LUT or rescale (PS3.3 C.11.1)."""
    if has_lut(ds, "ModalityLUTSequence"):
        table = read_lut(ds, "ModalityLUTSequence", stored_range(ds))
        if table is None:
            problem = "the modality LUT has fewer entries than its descriptor says"
            raise DataError(f"{path}: {problem}")
        return np.interp(pixels, *table)
    slope = number(ds, "RescaleSlope", 1) or 1  # a slope of 0 would make all pixels one value
    return pixels * float(slope) + number(ds, "RescaleIntercept", 0)


def has_lut(ds: pydicom.Dataset, keyword: str) -> bool:
    """Whether the first item of a LUT sequence has content."""
    items = ds.get(keyword)  # some devices write a sequence, and leave it empty
    return bool(items and items[0].get("LUTDescriptor") and items[0].get("LUTData"))


def stored_range(ds: pydicom.Dataset) -> np.ndarray:
    """Every value that a pixel can have, in rising order; above 16 bits the two ends only."""
    count = 2**ds.BitsStored
    every_value = np.arange(count) if ds.BitsStored <= 16 else np.array([0, count - 1])
    lowest = -(count // 2) if ds.PixelRepresentation == 1 else 0  # two's complement
    return every_value + lowest


def read_lut(
    ds: pydicom.Dataset, keyword: str, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and outputs of a sequence's first LUT (PS3.3 C.11.1.1.1, C.11.2.1.1), for np.interp.

    `inputs` are the values that it can be asked for. One missing entry repeats the last; returns
    None for a table that lacks more, or whose descriptor cannot be read.
    """
    item = ds[keyword][0]
    descriptor = numbers(item, "LUTDescriptor")
    if len(descriptor) != 3 or not all(map(math.isfinite, descriptor)):
        return None
    count, first, bits = map(int, descriptor)
    count = count % 2**16 or 2**16  # 0 stands for 2^16, and a wrong VR may have made it negative
    entries = read_entries(ds, item, count, bits)
    if len(entries) < count - 1:
        return None
    entries = np.append(entries, entries[-1])[:count]  # some tables are one entry short
    first = first_input(first, count, inputs)
    return np.arange(first, first + count), entries


def read_entries(ds: pydicom.Dataset, item: pydicom.Dataset, count: int, bits: int) -> np.ndarray:
    """The entries of a LUT: uint16, or uint8 where two of them share a word."""
    entries = item.LUTData
    if isinstance(entries, bytes):  # OW, or UN: words in the byte order of the file
        order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(entries + bytes(len(entries) % 2), f"{order}u2")
    entries = np.atleast_1d(entries).astype("<u2")
    if bits <= 8 and len(entries) < count - 1:
        entries = entries.view(np.uint8)  # two entries a word, the first in its low byte
    return entries


def first_input(first: int, count: int, inputs: np.ndarray) -> int:
    """The input of a LUT's first entry, with the sign that lets the table meet its inputs.

    Its VR is "US or SS" as well, and files have the wrong one of them: the same bits are tried with
    the sign of the inputs, then with the other one.
    """
    unsigned = first % 2**16
    signed = unsigned - 2**16 if unsigned >= 2**15 else unsigned
    candidates = [unsigned, signed]
    if inputs.min() < 0:
        candidates.reverse()
    first, other = candidates
    misses = first > inputs.max() or first + count <= inputs.min()
    return other if misses else first


def display_values(
    ds: pydicom.Dataset,
    pixels: np.ndarray,
    padding: np.ndarray,
    path: Path,
    notes: list[str],
) -> np.ndarray:
    """Stored values (H, W) to gray as in Picture by VOI LUT, window or range (PS3.3 C.11.2)."""
    # Only one of VOI LUT and window may be applied (C.11.2); the LUT is the richer of the two.
    every_value = modality_values(ds, stored_range(ds), path)
    table = None
    if has_lut(ds, "VOILUTSequence"):
        table = read_lut(ds, "VOILUTSequence", every_value)
        if table is None:
            notes.append("VOI LUT passed over: fewer entries than its descriptor says")
    window = read_window(ds)
    if window is None and ds.get("WindowCenter") is not None:
        notes.append("window passed over: no number, or too narrow")

    # There are more pixels than values, so gray is computed for each value and then looked up.
    has_table = ds.BitsStored <= 16
    if has_table:
        values = np.roll(every_value, stored_range(ds)[0])  # by stored value: [-1] is that of -1
    else:
        values = modality_values(ds, pixels, path)
    used = ""
    if table is not None:
        inputs, outputs = table
        # The range of the entries, not of BitsStored: an 8-bit LUT may serve 12-bit pixels.
        gray = stretch(np.interp(values, inputs, outputs), outputs.min(), outputs.max())
        used = "VOI LUT"
    elif window is not None:
        gray = apply_windowing(values, window).astype(np.float32)
        used = f"window {window.WindowCenter:g}/{window.WindowWidth:g}"
    elif ds.BitsStored <= 8 and ds.PixelRepresentation == 0:
        gray = stretch(values, every_value.min(), every_value.max())
    else:
        # Not the extremes: a burnt-in marker or a dead pixel would decide the contrast.
        if has_table:
            inside = pixels[~padding] if padding.any() else pixels
            numbers, counts = count_pixels(inside)
            low, high = percentiles(values[numbers], counts, (0.5, 99.5))
        else:
            low, high = np.percentile(values[~padding], (0.5, 99.5))
        gray = stretch(values, low, high)
    if has_table:
        gray = look_up(gray, pixels)

    # A window that misses all values would leave nothing to see.
    shown = gray[~padding] if padding.any() else gray
    if used and shown.min() == shown.max():
        inside = modality_values(ds, pixels[~padding], path)
        if inside.min() < inside.max():
            raise DataError(f"{path}: {used} shows none of {inside.min():g} to {inside.max():g}")
    return gray


def look_up(table: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The entry of a float32 table for each stored value (H, W); negative ones count from its end.

    The values themselves, uint8, where the table says the same: to carry a byte a pixel and not
    four makes reading a third faster.
    """
    if pixels.dtype == np.uint8 and np.array_equal(table, np.arange(256, dtype=np.float32) / 255):
        return pixels
    # Some rows at a time: NumPy makes 8-byte indices of the values, and so they stay in the cache.
    gray = np.empty(pixels.shape, np.float32)
    for start in range(0, len(pixels), 32):
        rows = slice(start, start + 32)
        np.take(table, pixels[rows], out=gray[rows], mode="wrap")
    return gray


def count_pixels(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers from the lowest to the highest of the pixels, and how often each occurs."""
    lowest = int(pixels.min())
    counts = np.bincount(np.subtract(pixels, lowest, dtype=np.intp).reshape(-1))
    return np.arange(lowest, lowest + len(counts)), counts


def percentiles(
    values: np.ndarray, counts: np.ndarray, percents: tuple[float, float]
) -> np.ndarray:
    """np.percentile, which would sort all pixels, of values (K,) that occur so many times (K,)."""
    order = np.argsort(values)  # a modality LUT may fall
    ends = np.cumsum(counts[order])
    ranks = (ends[-1] - 1) * (np.array(percents) / 100)  # from 0, mostly between two pixels
    below = np.floor(ranks).astype(int)
    above = np.minimum(below + 1, ends[-1] - 1)
    low = values[order[np.searchsorted(ends, below, side="right")]]
    high = values[order[np.searchsorted(ends, above, side="right")]]
    return interpolate(low, high, ranks - below)


def interpolate(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The values between low and high, rounded as np.percentile rounds them."""
    width = high - low
    return np.where(share < 0.5, low + width * share, high - width * (1 - share))


def read_window(ds: pydicom.Dataset) -> pydicom.Dataset | None:
    """The first window, as a data set for pydicom; None without a usable one."""
    center = number(ds, "WindowCenter", math.nan)
    width = number(ds, "WindowWidth", math.nan)
    if math.isnan(center) or math.isnan(width):
        return None
    # One stored bit makes 0..1 the output range of pydicom's apply_windowing.
    window = pydicom.Dataset()
    window.PhotometricInterpretation = "MONOCHROME2"
    window.PixelRepresentation = 0
    window.BitsStored = 1
    function = str(ds.get("VOILUTFunction") or "").strip().upper()
    window.VOILUTFunction = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    # PS3.3 C.11.2.1.2.1 wants a width of at least 1, C.11.2.1.3.2 one above 0.
    narrowest = 1 if window.VOILUTFunction == "LINEAR" else 1e-9
    if width < narrowest:
        return None
    window.WindowCenter = center
    window.WindowWidth = width
    return window


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..1, float32, and clip what lies outside."""
    # float(): a NumPy scalar would promote float32 values to float64.
    width = float(high - low) or 1.0
    scaled = values - float(low)
    scaled /= width  # in place: fresh memory for a whole image takes longer than the arithmetic
    return scaled.clip(0, 1, out=scaled).astype(np.float32, copy=False)


def hash_pixels(pixels: np.ndarray) -> str:
    """What tells copies: the SHA-256 of shape and stored pixels."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels))  # without a copy in most cases
    return digest.hexdigest()


def hash_patient(ds: pydicom.Dataset) -> str:
    """A hash of the PatientID, "" where there is none: the ID itself is personal data."""
    patient = str(ds.get("PatientID") or "").strip()
    if not patient:
        return ""
    return hashlib.sha256(patient.encode()).hexdigest()[
        :12
    ]  # 48 bits tell the patients of a set apart


def pixel_spacing(ds: pydicom.Dataset) -> tuple[float, ...]:
    """Mm per pixel down and across (PS3.3 10.7.1.3), () where no usable value stands.

    PixelSpacing, else ImagerPixelSpacing, which is measured at the detector.
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = numbers(ds, keyword)
        if len(spacing) == 2 and all(0.001 <= mm <= 100 for mm in spacing):
            return tuple(spacing)
    return ()


def read_picture(path: Path, kind: str) -> Picture:
    """Read a JPEG, PNG or TIFF, turned as its orientation tag says: what viewers show.

    Up to 8 bits keep their range, deeper data are stretched from the 0.5 to the 99.5 percentile.
    """
    notes = []
    colour = None
    # As a file object: opened by path, Pillow >= 11 scrambles an uncompressed TIFF that it turns.
    with open(path, "rb") as file, Image.open(file, formats=[kind]) as image:
        seek_main_image(image, path)
        tags = dict(getattr(image, "tag_v2", {}))
        deep = read_deep_colour(image, path)
        ImageOps.exif_transpose(image, in_place=True)
        is_signed = tags.get(Tag.SampleFormat, (1,))[0] == 2
        if deep is not None:
            highest = max(1, deep.max())
            pixels = colour_to_gray(deep, highest)
            colour = find_colour(deep, highest, notes)
        elif image.mode[0] in "IF" or is_signed:  # Pillow's modes of more than 8 bits
            pixels = np.asarray(image)
        else:
            if image.mode not in ("1", "L", "LA"):
                colour = find_colour(np.asarray(image.convert("RGB")), 255, notes)
            pixels = np.asarray(image if image.mode == "L" else image.convert("L"))
            return Picture(pixels, hash_pixels(pixels), colour, notes=tuple(notes))
    # Pillow has no type for these two, and hands out their bits as another.
    if pixels.dtype == np.uint8:
        pixels = pixels.view(np.int8)
    elif pixels.dtype == np.int32 and tags and not is_signed:
        pixels = pixels.view(np.uint32)
    # WhiteIsZero, which Pillow heeds in 8 bits only
    is_inverse = tags.get(Tag.PhotometricInterpretation) == 0
    ends = (99.5, 0.5) if is_inverse else (0.5, 99.5)
    if pixels.dtype.kind in "iu" and pixels.itemsize <= 2:
        black, white = percentiles(*count_pixels(pixels), ends)
    else:
        black, white = np.percentile(pixels, ends)
    if colour is not None:
        colour = stretch(colour, black, white)
    gray = stretch(pixels, black, white)
    return Picture(gray, hash_pixels(pixels), colour, notes=tuple(notes))


def seek_main_image(image: Image.Image, path: Path) -> None:
    """Go to the one full image of a file. Raises DataError if there are several."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":  # phones put a preview behind the picture
        return
    full = []
    for frame in range(frames if image.format == "TIFF" else 0):
        image.seek(frame)
        # TIFF 6.0, NewSubfileType: bit 0 is a reduced image, bit 2 a mask.
        is_preview = image.tag_v2.get(Tag.NewSubfileType, 0) & 5
        if not is_preview:
            full.append(frame)
    if len(full) != 1:
        raise DataError(f"{path}: {frames} frames, expected a single image")
    image.seek(full[0])


def read_deep_colour(image: Image.Image, path: Path) -> np.ndarray | None:
    """Colour, or gray with alpha, of 16 bits a sample: uint16 (H, W, 1 or 3). None for others.

    Pillow keeps 8 of the bits before anybody has looked at the range. Its raw mode names the order
    of the two bytes (RGB;16B is big endian): by the opposite order it decodes the other byte.
    """
    if image.mode[0] in "IF" or not image.tile:
        return None
    raw_modes = []  # one a tile, mostly one in all
    for tile in image.tile:
        raw_modes.append(tile.args if isinstance(tile.args, str) else tile.args[0])
    depths = getattr(image, "tag_v2", {}).get(Tag.BitsPerSample, (8,))
    if max(depths) == 16 and raw_modes[0] == "R":  # planar: a raw mode for each channel
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        raw_modes = [f"{raw_mode};16{order}" for raw_mode in raw_modes]
    if ";16" not in raw_modes[0]:
        return None
    if raw_modes[0] == "LA;16B":  # four bytes a pixel: gray, gray, alpha, alpha
        samples = decode_as(["RGBA"], image, path)
        return (samples[..., :1] << 8) + samples[..., 1:2]
    if raw_modes[0][:3] not in ("RGB", "R;1"):
        raise DataError(f"{path}: 16 bits a sample as {raw_modes[0]}, expected gray or RGB")
    native = "B" if sys.byteorder == "little" else "L"
    opposite = {"L": "B", "B": "L", "N": native}
    swapped = [raw_mode[:-1] + opposite[raw_mode[-1]] for raw_mode in raw_modes]
    high = decode_as(raw_modes, image, path)  # uint16 (H, W, 3 or 4) with values of 8 bits
    low = decode_as(swapped, image, path)
    return ((high << 8) + low)[..., :3]


def decode_as(raw_modes: list[str], image: Image.Image, path: Path) -> np.ndarray:
    """Decode the frame of `image` again by other raw modes, one a tile; uint16 (H, W, C)."""
    with open(path, "rb") as file, Image.open(file, formats=[image.format]) as again:
        again.seek(image.tell())
        for k, raw_mode in enumerate(raw_modes):
            # What Pillow's decoder is told: the raw mode comes first, or is all there is.
            tile = again.tile[k]
            more = () if isinstance(tile.args, str) else tile.args[1:]
            again.tile[k] = tile._replace(args=(raw_mode, *more))
        ImageOps.exif_transpose(again, in_place=True)
        return np.asarray(again).astype(np.uint16)


def resize(picture: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Resize (H, W), uint8 or float32 in 0..1, with antialiasing to uint8 (size, size).

    With the fit "pad" the proportions stay, and what is missing is black.
    """
    height, width = picture.shape
    new_width = size
    new_height = size
    if fit == "pad":
        scale = size / max(height, width)
        new_width = max(1, round(width * scale))
        new_height = max(1, round(height * scale))
    image = Image.fromarray(picture)
    highest = 1
    if image.mode == "L":
        image = image.convert("F")  # the two passes of a resize would round twice
        highest = 255
    small = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    # Rounded here and not before: that would cost gray levels. (new_height, new_width)
    levels = np.rint(np.asarray(small).clip(0, highest) * (255 / highest))
    top = (size - new_height) // 2
    left = (size - new_width) // 2
    out = np.zeros((size, size), np.uint8)
    out[top : top + new_height, left : left + new_width] = levels
    return out


# --- read: what was left out ---


def report_bad(bad: list[tuple[str, str]]) -> None:
    """Print why each file cannot be used; a missing decoder once, with the number of files.

    `bad` are pairs of source and a message that begins with the path.
    """
    messages = defaultdict(list)
    for source, message in bad:
        reason = message.split(f"{source}: ")[-1]  # without the path, so that equal ones meet
        messages[reason].append(message)
    for reason, same in messages.items():
        if "plugin" in reason and len(same) > 1:
            print(f"{same[0]} (and {len(same) - 1} more files)", file=sys.stderr)
        else:
            print(*map(one_line, same), sep="\n", file=sys.stderr)


def report_notes(notes: list[tuple[str, str]]) -> None:
    """Print what was passed over in reading, once for each kind: `notes` are (source, note)."""
    sources = defaultdict(list)
    for source, note in notes:
        sources[note].append(source)
    for note, files in sources.items():
        print(f"note: {len(files)} images: {note}, such as {files[0]}")


def write_skipped(path: Path, bad: list[tuple[str, str]]) -> None:
    """skipped.csv: source and reason of every file that was left out."""
    # A name that is not UTF-8 is one of the reasons.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("source", "reason"), *bad])


# --- split: patients and folds ---


def choose_patients(cases: list[Case]) -> list[str]:
    """A patient for each image: by layout or --patient-regex, else the PatientID, else the file.

    One PatientID in every file is none but what anonymisation left: it is passed over, with a note.
    A file name stands for a patient without its folder, unless it occurs in several folders.
    """
    unnamed = [case for case in cases if not case.patient]
    patient_ids = {case.patient_id for case in unnamed if case.patient_id}
    is_placeholder = len(unnamed) > 1 and len(patient_ids) == 1
    if is_placeholder:
        problem = "one PatientID stands in every file, so it names no patient"
        print(f"note: {problem}: each file counts as one")
        patient_ids = set()
    stems = Counter(Path(case.source).stem for case in cases)
    patients = []
    alone = 0  # images that nothing says the patient of
    for case in cases:
        path = PurePosixPath(case.source)
        if case.patient:
            patients.append(case.patient)
        elif case.patient_id in patient_ids:
            patients.append(case.patient_id)
        else:
            is_unique = stems[path.stem] == 1
            patients.append(path.stem if is_unique else path.with_suffix("").as_posix())
            alone += 1
    if alone and not is_placeholder:
        hint = "(--patient-regex finds one in file names)"
        print(f"note: {alone} images name no patient {hint}: each is one")
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


def report_patients(patients: list[str]) -> None:
    """Say where folds and intervals rest on few patients, or on one more than on the others."""
    counts = Counter(patients)
    largest = max(counts.values())  # images of one patient
    if len(counts) < 10:
        print(f"note: {len(counts)} patients only: folds are uneven, and intervals say little")
    elif largest > len(patients) / 5:
        print(f"note: one patient has {largest} of {len(patients)} images: folds are uneven")


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


def list_strata(cases: list[Case]) -> list[str]:
    """What folds are balanced for: the label, of several the rarest that an image has."""
    if not isinstance(cases[0].label, tuple):
        return [str(case.label) for case in cases]
    counts = np.sum([np.equal(case.label, 1) for case in cases], axis=0)  # images with each label
    strata = []
    for case in cases:
        positive = [k for k, value in enumerate(case.label) if value == 1]
        strata.append(str(min(positive, key=counts.__getitem__, default="none")))
    return strata


def report_overlaps(cases: list[Case], patients: list[str]) -> dict[str, int]:
    """Count and print what public sets have: copies, contradictions, patients on both sides."""
    labels = defaultdict(set)  # by pixels
    splits = defaultdict(set)  # by patient
    for case, patient in zip(cases, patients, strict=True):
        labels[case.digest].add(case.label)
        splits[patient].add(case.split)
    overlaps = {
        "pixel-identical copies": len(cases) - len(labels),
        "identical pixels with different labels": count_several(labels),
        "patients on both sides of an official split": count_several(splits),
    }
    for what, count in overlaps.items():
        if count:
            print(f"note: {count} {what}")
    return overlaps


def count_several(sets: dict[str, set]) -> int:
    """How many of the sets have more than one member."""
    return sum(len(members) > 1 for members in sets.values())


# --- write ---


def write_index(
    path: Path,
    cases: list[Case],
    folds: list[str],
    patients: list[str],
    classes: list[str],
) -> dict:
    """Write index.csv; returns and prints the counts per fold and class, or of images per label."""
    counts: dict[str, Counter] = defaultdict(Counter)
    multi_label = isinstance(cases[0].label, tuple)
    columns = classes if multi_label else ["label"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "fold", *columns, *cases[0].more, "source"))
        # The order is that of images.npy: row k is image k.
        for case, fold, patient in zip(cases, folds, patients, strict=True):
            labels = map(show_label, case.label) if multi_label else [case.label]
            more = case.more.values()
            writer.writerow((case.id, patient, fold, *labels, *more, case.source))
            values = case.label if multi_label else [k == case.label for k in range(len(classes))]
            for name, value in zip(classes, values, strict=True):
                if value == 1:
                    counts[fold][name] += 1
    for fold in sorted(counts):
        cells = [f"{counts[fold][name]:8d} {name}" for name in classes]
        print(f"fold {fold:5}" + "".join(cells))
    return {fold: dict(counts[fold]) for fold in sorted(counts)}


def mean_and_std(cases: list[Case], folds: list[str]) -> tuple[float, float]:
    """Mean and standard deviation of all pixels, in 0..1: of the test images only if all are."""
    training = [case.moments for case, fold in zip(cases, folds, strict=True) if fold != "test"]
    moments = training or [case.moments for case in cases]
    mean, square = np.mean(moments, axis=0)
    return mean, float(np.sqrt(square - mean**2))


# --- what eval.py needs besides ---


def describe_unusual(channels: int, least: int, case: Case) -> dict:
    """What caches of gray images with one label each, decoded in full, do not say."""
    unusual = {}
    if channels == 3:
        unusual["channels"] = channels
    if least:
        unusual["fast_decode"] = True
    if isinstance(case.label, tuple):
        unusual["multi_label"] = True
    return unusual


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


# --- the command line ---


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
