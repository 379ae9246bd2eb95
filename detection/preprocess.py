"""Turn raw chest X-rays with one box around the heart into one small array and an index.

  python detection/preprocess.py --data heart_xray --out data/heart
  python detection/preprocess.py --data rsna --out data/rsna_heart
  python detection/preprocess.py --data heart_xray --out data/sites \\
      --site-regex "^[a-z]+" --test-site jsrt
  python detection/preprocess.py --data other_hospital --out data/other --like data/heart

Layouts of RAW, recognised by what lies in it:
  boxes.csv                   image,xmin,ymin,xmax,ymax in pixels of the original image as it is
                              shown, max exclusive; the images beside it or in images/
  rsna_heart_detection.csv    name,x0,y0,w,h in 224x224 coordinates; the images anywhere below RAW
Images are DICOM, JPEG, PNG or TIFF, known by their content.

Written to OUT: images.npy uint8 (N, S, S); index.csv (id, patient, fold, site, box and size of the
original image, source); meta.json.

The code follows main:
  find    the layout of RAW, its images and their boxes
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
BOX = ("xmin", "ymin", "xmax", "ymax")
# The columns of index.csv that mean something to train.py and eval.py
INDEX_COLUMNS = ("id", "patient", "fold", "site", *BOX, "height", "width", "spacing", "source")


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
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images and boxes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--size", type=int, help="pixels per side (default: 224)")
    patient = "finds the patient in a file name, as its first group if any"
    add("--patient-regex", help=patient)
    site = "finds the site (a hospital, say) in a file name, as its first group if any"
    add("--site-regex", help=site)
    add("--test-site", metavar="NAME", help="keep this site as test")
    fraction = "part of the patients kept as test (default: 0)"
    add("--test-fraction", type=float, default=0.0, help=fraction)
    like = "make a test set for the models of this cache: with its size, mean and std"
    add("--like", type=Path, metavar="CACHE", help=like)
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out unusable images, listed in skipped.csv")
    add("--overwrite", action="store_true", help="replace a finished cache in OUT")
    args = parser.parse_args(argv)
    if args.size is not None and not 32 <= args.size <= 4096:
        parser.error(f"--size {args.size}, expected 32 to 4096")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    if args.test_site and not args.site_regex:
        parser.error("--test-site needs --site-regex")
    if args.like and (args.size or args.test_fraction or args.test_site):
        parser.error("--like brings its size and makes every row test: omit those options")
    if args.like and args.like.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the cache of --like: give another folder")
    regexes = {"--site-regex": args.site_regex, "--patient-regex": args.patient_regex}
    for option, regex in regexes.items():
        try:
            re.compile(regex or "")
        except re.error as error:
            parser.error(f"{option} {regex!r}: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = describe_source(args)
    warnings.filterwarnings("ignore", module=r"pydicom|PIL")  # header slips, one line for each file
    # A test set has to look like what the network was trained on: same size, same normalisation.
    like = read_meta(args.like) if args.like else {}

    # find: layout, images and boxes; then the size of what is written
    layout, cases, bad = find_cases(args.data, args.site_regex, args.patient_regex)
    sites = sorted({case.site for case in cases})
    if args.test_site and args.test_site not in sites:
        raise DataError(f"--test-site {args.test_site}, found the sites {sites}")
    if args.test_fraction and any(case.split for case in cases):
        raise DataError(f"{args.data}: has its own folds, which --test-fraction cannot change")
    size = like.get("size") or args.size or 224
    print(f"{args.data}: {layout}, {len(cases)} images with a box, to {size}x{size}")

    out = args.out.resolve()
    with open_output(out, args.overwrite) as folder:
        # read: every image once. What fails is collected, so that one run names it all.
        load_case = partial(load, raw=args.data, size=size)
        path = folder / "images.npy"
        shape = (size, size)
        good, unreadable, notes = write_images(path, shape, cases, load_case, args.workers)
        total = len(cases) + len(bad)
        bad += unreadable
        report_bad(bad)
        report_notes(notes)
        if bad and not (args.skip_bad and good):
            count = f"{len(bad)} of {total} images cannot be used"
            raise DataError(f"{count}: fix or remove them, or use --skip-bad")
        if bad:
            write_skipped(folder / "skipped.csv", bad)

        # split: images into patients, patients into folds
        digests = [case.digest for case in good]
        patients = group_patients(choose_patients(good), digests)
        report_patients(patients)
        splits = []  # a site or another hospital that is kept as test, as if it were official
        for case in good:
            is_test = like or (args.test_site and case.site == args.test_site)
            splits.append("test" if is_test else case.split)
        sites = [case.site for case in good]
        folds = assign_folds(patients, sites, splits, args.test_fraction)
        if not like and set(folds) == {"test"}:
            problem = "only test images; for an external test set use --like TRAIN_CACHE"
            raise DataError(f"{args.data}: {problem}")
        note_small_validation(folds)
        note_both_sides(patients, folds)
        copies = len(digests) - len(set(digests))
        if copies:
            print(f"note: {copies} pixel-identical copies")

        # write: index.csv, and meta.json last
        counts = write_index(folder / "index.csv", good, folds, patients)
        mean, std = mean_and_std(good, folds)
        meta = {
            "size": size,
            "layout": layout,
            "n": len(good),
            "counts": counts,
            # Of the training images, or those that the models of --like were trained with
            "mean": like.get("mean", mean),
            "std": like.get("std", std),
            "copies": copies,
            "skipped": len(bad),
            # train.py tells by it whether this cache is still that of RAW
            **source,
            "versions": {module.__name__: module.__version__ for module in (np, PIL, pydicom)},
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    command = "train.py"
    if like:
        command = "eval.py --checkpoint runs/detection/best.pt --split test"
    print(f"next: python detection/{command} --data {args.out}")


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
    good = {
        "size": type(meta.get("size")) is int and 32 <= meta["size"] <= 4096,
        "mean": is_number(meta.get("mean")),
        "std": is_number(meta.get("std"), 0),
    }
    for name, is_good in good.items():
        if not is_good:
            problem = f"{name} {meta.get(name)!r}, which is not that of a cache of"
            script = f"{Path(__file__).parent.name}/preprocess.py"
            raise DataError(f"{where}: {problem} {script}; preprocess again")


def is_number(value: object, low: float = -math.inf) -> bool:
    """Whether a value of a JSON file is a finite number above `low`."""
    return type(value) in (int, float) and math.isfinite(value) and value > low


# --- find: layout and cases ---


@dataclass
class Case:
    """One image with its box."""

    id: str
    source: str  # path below RAW
    box: tuple[float, ...]  # xmin, ymin, xmax, ymax in pixels as shown, or in units of `grid`
    grid: int = 0  # the box is of an image squashed to (grid, grid); 0 = of the image itself
    patient: str = ""  # by the layout or --patient-regex; "" = the DICOM PatientID, else the file
    site: str = ""  # by --site-regex or boxes.csv
    split: str = ""  # by boxes.csv: train, val, test, a fold 0 to 4, or "" for none
    more: dict[str, str] = field(default_factory=dict)  # further columns of boxes.csv
    # Filled when the image is read:
    size: tuple[int, int] = (0, 0)  # height and width in pixels, as shown
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, where the file says
    digest: str = ""  # SHA-256 of the stored pixels: tells copies
    patient_id: str = ""  # hash of the DICOM PatientID, "" where there is none
    moments: tuple[float, float] = (0.0, 0.0)  # mean and mean square of the resized image, in 0..1


def find_cases(
    raw: Path, site_regex: str | None, patient_regex: str | None
) -> tuple[str, list[Case], list[tuple[str, str]]]:
    """Recognise the layout of RAW: its name, the cases, and (source, reason) of what cannot be one.

    Raises DataError if there is none, or if a regular expression finds nothing in a name.
    """
    if not raw.is_dir():
        raise DataError(f"{raw}: not a folder")
    layout = recognise_layout(raw)
    if layout == "boxes.csv":
        cases, bad = find_boxes_csv(raw)
    elif layout == "RSNA heart boxes":
        cases, bad = find_rsna_hearts(raw)
    else:
        expected = "boxes.csv or rsna_heart_detection.csv"
        raise DataError(f"{raw}: {describe_folder(raw)}; expected {expected}")
    # Of two boxes nobody knows which one is right.
    doubles = {name for name, reason in bad if ": a second box" in reason}
    cases = [case for case in cases if case.id not in doubles]
    if not cases and not bad:
        raise DataError(f"{raw}: {layout} names no image that is here")
    for case in cases:
        name = Path(case.source).name
        if site_regex:
            case.site = match_patient(site_regex, name)
            if not case.site:
                raise DataError(f"--site-regex {site_regex!r} finds nothing in {case.source}")
        if patient_regex:
            case.patient = match_patient(patient_regex, name)
            if not case.patient:
                raise DataError(f"--patient-regex {patient_regex!r} finds nothing in {case.source}")
    return layout, cases, bad


def recognise_layout(raw: Path) -> str:
    """The name of the layout in a folder, by the table in it, or ""."""
    if (raw / "boxes.csv").is_file():
        return "boxes.csv"
    if (raw / "rsna_heart_detection.csv").is_file():
        return "RSNA heart boxes"
    return ""


def find_boxes_csv(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """boxes.csv: one row per image, every image in it. Also (source, reason) of what is wrong.

    Columns patient, site, and fold or split say what they say in index.csv; others are kept.
    """
    table = raw / "boxes.csv"
    # Names in the table are names of files, so images in deeper folders cannot be meant.
    folder = raw / "images" if (raw / "images").is_dir() else raw
    files = {path.name: path for path in find_images(folder) if path.parent == folder}
    cases = []
    bad = []
    lines = {}  # where each name stands first
    for place, name, box, row in read_table(table, ("image", *BOX)):
        name = name.removeprefix("images/")  # some tables have it
        if name in lines:
            problem = f"a second box for {name}, first in line {lines[name]}"
            bad.append((name, f"{place}: {problem}"))
        elif name not in files:
            bad.append((name, f"{place}: no image {name!r} in {folder}"))
        else:
            case = Case(name, files[name].relative_to(raw).as_posix(), box)
            case.patient = row.get("patient", "")
            case.site = row.get("site", "")
            case.split = read_split(place, row)
            case.more = further_columns(row, ("image", *BOX, "patient", "site", "fold", "split"))
            cases.append(case)
        lines.setdefault(name, place.rsplit(":", 1)[1])
    for name, path in files.items():
        if name not in lines:
            bad.append((name, f"{path}: no box in {table.name}"))
    if cases:
        report_renamed(cases)
    known = {path.relative_to(raw).as_posix() for path in files.values()}
    report_left_out(raw, {table.name} | known)
    return cases, bad


def read_table(
    table: Path, columns: tuple[str, ...]
) -> Iterator[tuple[str, str, tuple[float, ...], dict[str, str]]]:
    """Place (file:line), name (first column), numbers (the others) and values of every row."""
    for place, row in read_rows(table, columns):
        values = tuple(read_number(row[column]) for column in columns[1:])
        yield place, row[columns[0]], values, row


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


def read_number(text: str | None) -> float:
    """A number as tables have it, NaN for anything else."""
    if not text or "_" in text:  # Python alone would read 1_0 as 10
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan


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


def find_rsna_hearts(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """rsna_heart_detection.csv: boxes at 224x224 of some RSNA images; only those are read."""
    table = raw / "rsna_heart_detection.csv"
    # The challenge's archive has been unpacked in any of several ways.
    files = defaultdict(list)
    for path in find_images(raw):
        files[path.stem].append(path)
    cases = []
    bad = []
    missing = []
    lines = {}  # where each name stands first
    for place, name, box, _ in read_table(table, ("name", "x0", "y0", "w", "h")):
        name = name.removesuffix(".dcm")
        if name in lines:
            problem = f"a second box for {name}, first in line {lines[name]}"
            bad.append((name, f"{place}: {problem}"))
        elif name not in files:
            missing.append(name)
        elif len(files[name]) > 1:
            problem = f"{len(files[name])} files for {name}: {files[name][0]}, {files[name][1]}"
            bad.append((name, f"{place}: {problem}"))
        else:
            source = files[name][0].relative_to(raw).as_posix()
            x, y, width, height = box
            box = (x, y, x + width, y + height)  # max exclusive, as everywhere here
            cases.append(Case(name, source, box, grid=224, patient=name))
        lines.setdefault(name, place.rsplit(":", 1)[1])
    if missing:
        count = f"{len(missing)} of {len(lines)} images named in {table.name}"
        print(f"note: {count} are not here: {missing[0]}")
    return cases, bad


def match_patient(regex: str, text: str) -> str:
    """What a regular expression matches: its first group, or all of it; "" for no match."""
    match = re.search(regex, text)
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group()) or ""


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


def load(case: Case, raw: Path, size: int) -> tuple[np.ndarray, tuple[str, ...]] | DataError:
    """Read and resize one case: uint8 (size, size) and notes, or why it cannot be used.

    Fills what a case learns by reading: size, spacing, the hashes of its pixels and its PatientID,
    the moments. The box becomes one in pixels of the original image as it is shown.
    """
    if not is_utf8(case.source):
        problem = "the name is not UTF-8, which index.csv is"
        return DataError(f"{case.source}: {problem}: rename the file")
    if has_control(case.source):
        return DataError(f"{case.source}: control characters in the name: rename the file")
    try:
        # Never at half scale: it would move the percentiles of `prepare`, 1.2 gray levels (RMS).
        picture = read_image(raw / case.source)
    except DataError as error:
        return error
    height, width = picture.gray.shape
    if case.grid:
        scale = (width / case.grid, height / case.grid) * 2  # of x, y, x, y
        case.box = tuple(round(v * s, 3) for v, s in zip(case.box, scale, strict=True))
    xmin, ymin, xmax, ymax = case.box
    if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):  # also true for NaN
        expected = f"expected 0 <= xmin < xmax <= {width}, 0 <= ymin < ymax <= {height}"
        return DataError(f"{raw / case.source}: box {case.box}, {expected}")
    image = prepare(picture.gray, size)
    case.size = (height, width)
    case.spacing = picture.spacing
    case.digest = picture.digest
    case.patient_id = picture.patient
    case.moments = gray_moments(image)
    return image, picture.notes


def is_utf8(name: str) -> bool:
    """Whether a file name can be written to index.csv: on Linux, names are bytes of any kind."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_control(text: str) -> bool:
    """Whether a name has control characters, which would reach the screen from index.csv."""
    return any(unicodedata.category(c) == "Cc" for c in text)


def prepare(picture: np.ndarray, size: int) -> np.ndarray:
    """What the network sees of a picture (H, W), uint8 or float32: stretched, then resized.

    To uint8 (size, size). Scanners differ in range far more than hearts do: 1 % of the pixels on
    either side (borders, labels) clip.
    """
    if picture.dtype == np.uint8:  # the same, by a table
        levels, counts = count_pixels(picture)
        low, high = percentiles(levels, counts, (1, 99))
        gray = look_up(stretch(np.arange(256.0), low, high), picture)
    else:
        low, high = np.percentile(picture, (1, 99))
        gray = stretch(picture, low, high)
    return resize(gray, size, "squash")


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


def write_index(path: Path, cases: list[Case], folds: list[str], patients: list[str]) -> dict:
    """Write index.csv; returns and prints the counts per fold and site.

    Boxes and sizes are in pixels of the original image as it is shown, spacing in mm.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    columns = (*INDEX_COLUMNS[:-1], *cases[0].more, "source")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for case, fold, patient in zip(cases, folds, patients, strict=True):
            spacing = " ".join(map(str, case.spacing))  # "" where the file does not say
            geometry = (*case.box, *case.size, spacing)
            row = (case.id, patient, fold, case.site, *geometry, *case.more.values(), case.source)
            writer.writerow(row)
            counts[fold][case.site or "images"] += 1
    for fold in sorted(counts):
        cells = [f"{count:8d} {site}" for site, count in sorted(counts[fold].items())]
        print(f"fold {fold:5}" + "".join(cells))
    return {fold: dict(counts[fold]) for fold in sorted(counts)}


def mean_and_std(cases: list[Case], folds: list[str]) -> tuple[float, float]:
    """Mean and standard deviation of all pixels, in 0..1: of the test images only if all are."""
    training = [case.moments for case, fold in zip(cases, folds, strict=True) if fold != "test"]
    moments = training or [case.moments for case in cases]
    mean, square = np.mean(moments, axis=0)
    return mean, float(np.sqrt(square - mean**2))


# --- what eval.py needs besides ---


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
