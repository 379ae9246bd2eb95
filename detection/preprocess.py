"""Turn raw chest X-rays with one box around the heart into one small array and an index.

  python detection/preprocess.py --data heart_xray --out data/heart
  python detection/preprocess.py --data rsna --out data/rsna_heart
  python detection/preprocess.py --data annotations.csv --out data/mine \\
      --columns image=file xmin=x1 ymin=y1 xmax=x2 ymax=y2
  python detection/preprocess.py --data heart_xray --out data/sites \\
      --site-regex "^[a-z]+" --test-site jsrt
  python detection/preprocess.py --data other_hospital --out data/other --like data/heart

Layouts of RAW, recognised by what lies in it:
  boxes.csv                   or a CSV file as RAW: image,xmin,ymin,xmax,ymax in pixels of the
                              original image as it is shown, max exclusive, and, optionally,
                              patient, site, fold (0 to 4, test) or split (train, val, test);
                              further columns are kept; the images beside the table or below
  rsna_heart_detection.csv    name,x0,y0,w,h in 224x224 coordinates; the images anywhere below RAW
Images are DICOM, JPEG, PNG or TIFF, known by their content.

Written to OUT, a new folder: images.npy uint8 (N, S, S); index.csv (id, patient, fold, official
split, digest of the raw pixels, site, box and size of the original image, source); meta.json.

The code follows main:
  find    the layout of RAW, its images and their boxes
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
from contextlib import suppress
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
# Official splits, by what folders and tables call them
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing"),
}
BOX = ("xmin", "ymin", "xmax", "ymax")
# The columns of index.csv that mean something to train.py and eval.py
PLACE = ("id", "patient", "fold", "split", "digest", "site")
# What the columns of other tables are called, to suggest a line to type
ALIKE = {
    "image": "image|img|file|path",
    "xmin": "x_?min|x_?1|left",
    "ymin": "y_?min|y_?1|top",
    "xmax": "x_?max|x_?2|right",
    "ymax": "y_?max|y_?2|bottom",
    "split": "^(split|set|subset|partition)$",
}
INDEX_COLUMNS = (*PLACE, *BOX, "height", "width", "spacing", "source")
FOLDS = 5
COLOUR_LOST = "colour turned gray"
FEW_LEVELS = 64  # gray levels: a window that leaves fewer is noted
MAX_PIXELS = 2**27  # five times the largest X-rays
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of twice as many


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images and boxes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="such as xmin=x1")
    add("--size", type=int, help="pixels per side (default: 224)")
    add("--patient-regex", type=regex, metavar="REGEX", help="finds it in a file's name, or path")
    add("--site-regex", type=regex, metavar="REGEX", help="finds the site (a hospital, say) there")
    add("--test-site", metavar="NAME", help="keep this site as test")
    add("--test-fraction", type=float, default=0.0, help="part of the patients (default: 0)")
    add("--like", type=Path, metavar="CACHE", help="make a test set for the models of this cache")
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out unusable images, listed in skipped.csv")
    args = parser.parse_args(argv)
    if args.size is not None and not 32 <= args.size <= 4096:
        parser.error(f"--size {args.size}, expected 32 to 4096")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    if args.like and (args.size or args.test_fraction or args.test_site):
        parser.error("--like brings its size and makes every row test: omit those options")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    preprocess(args)
    command = "eval.py --checkpoint RUN/best.pt --split test" if args.like else "train.py"
    print(f"next: python detection/{command} --data {shlex.quote(str(args.out))}")


def preprocess(args: argparse.Namespace) -> None:
    """Write the cache; `args` are those of `parse_args`. Raises DataError."""
    # A test set has to look like what the network was trained on: same size, same normalisation.
    like = read_meta(args.like, "detection", ("size", "mean", "std")) if args.like else {}

    # find: layout, images and boxes; then the size of what is written
    layout, cases, bad = find_cases(args.data, args.columns)
    set_by_path(cases, "patient", args.patient_regex)  # it overrules all others
    set_by_path(cases, "site", args.site_regex)
    sites = {case.site for case in cases}
    if args.test_site and args.test_site not in sites:
        raise DataError(f"--test-site {args.test_site}, found the sites {sorted(sites)}")
    if args.test_fraction and any(case.split for case in cases):
        raise DataError(f"{args.data}: has an official split: omit --test-fraction")
    size = like.get("size") or args.size or 224
    print(f"{args.data}: {layout}, {len(cases)} images with a box, to {size}x{size}")

    with new_folder(args.out) as folder:
        # read: every image once. What fails is collected, so that one run names it all.
        raw = args.data if args.data.is_dir() else args.data.parent
        load_case = partial(load, raw=raw, size=size)
        path = folder / "images.npy"
        good, unreadable = write_images(path, (size, size), cases, load_case, args.workers)
        bad += unreadable
        refuse_bad(folder, bad, len(good) + len(bad), args.skip_bad)

        # split: images into patients, patients into folds
        digests = [case.digest for case in good]
        patients = group_patients(choose_patients(good), digests)
        # A site or another hospital is kept as test, as if that were official.
        tests = sites if like else {args.test_site}
        splits = ["test" if case.site in tests else case.split for case in good]
        strata = [case.site for case in good]
        folds = assign_folds(patients, strata, splits, args.test_fraction)
        if not like and set(folds) == {"test"}:
            raise DataError(f"{args.data}: only test images; use --like TRAIN_CACHE for them")
        copies = len(digests) - len(set(digests))
        if copies:
            print(f"note: {copies} pixel-identical copies")
        both = len(set(zip(patients, folds, strict=True))) - len(set(patients))
        if both:
            print(f"note: {both} patients in several folds, as given: eval.py will refuse those")

        # write: index.csv, and meta.json last
        mean, std = mean_and_std(good, folds)
        meta = {
            "format": FORMAT,
            "task": "detection",
            "size": size,
            "layout": layout,
            "n": len(good),
            "counts": write_index(folder / "index.csv", good, folds, patients),
            # Of the training images, or those that the models of --like were trained with
            "mean": like.get("mean", mean),
            "std": like.get("std", std),
            "copies": copies,
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
    """One image with its box."""

    id: str
    source: str  # path below RAW
    box: tuple[float, ...]  # xmin, ymin, xmax, ymax in pixels as shown
    grid: int = 0  # the box is of an image squashed to (grid, grid)
    patient: str = ""  # "" = the PatientID, else the file
    site: str = ""
    split: str = ""  # train, val, test, a fold 0 to 4, or ""
    more: dict[str, str] = field(default_factory=dict)  # further columns
    # Filled when the image is read:
    size: tuple[int, int] = (0, 0)  # height and width in pixels, as shown
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, or ()
    digest: str = ""  # hash of the stored pixels
    patient_id: str = ""  # hash of the DICOM PatientID, or ""
    moments: tuple[float, float] = (0.0, 0.0)  # mean and mean square, in 0..1


def find_cases(raw: Path, columns: list[str]) -> tuple[str, list[Case], list[tuple[str, str]]]:
    """Recognise the layout of RAW: its name, the cases, and (source, reason) of what is none."""
    if not raw.exists():
        raise DataError(f"{raw}: not found")
    table = find_table(raw, "boxes")
    listing = list_folder(table.parent if table else raw)
    hearts = raw / "rsna_heart_detection.csv"
    if not table and hearts.is_file() and not columns:
        return "RSNA heart boxes", find_rsna_hearts(hearts, listing), []
    if not table:
        found = describe_files(listing)
        expected = f"expected a table as --data, or in it boxes.csv (image,{','.join(BOX)})"
        raise DataError(f"{raw}: found {found}; {expected} or {hearts.name}; one folder too high?")
    rows = read_rows(table, columns, ("image", *BOX))
    numbers = [read_number(row[name]) for row in rows for name in BOX]
    if all(0 <= number <= 1 for number in numbers):
        hint = "multiply them by the size"
        raise DataError(f"{table}: all boxes within 0 to 1 are fractions: {hint}")
    if (table.parent / "images").is_dir():  # in other folders no images can be meant
        inside = [image for image in listing.images if image.startswith("images/")]
        listing = listing._replace(images=inside)
    matched = match_rows(rows, (*BOX, "patient", "fold", "split"), listing)
    cases = []
    for source, row in matched.items():
        box = tuple(read_number(row[name]) for name in BOX)
        fields = read_row(row, ("image", *BOX, "site"))
        name = source.removeprefix("images/")
        cases.append(Case(name, source, box, site=row.get("site", ""), **fields))
    unboxed = [image for image in listing.images if image not in matched]
    return "boxes.csv", cases, [(image, f"{image}: no box in {table.name}") for image in unboxed]


def read_number(text: str) -> float:
    """A number as tables have it, NaN for anything else."""
    is_number = re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text)
    return float(text) if is_number else math.nan


def find_rsna_hearts(table: Path, listing: Listing) -> list[Case]:
    """rsna_heart_detection.csv: boxes at 224x224 of some RSNA images; only those are read."""
    rows = []
    for row in read_rows(table, [], ("name", "x0", "y0", "w", "h")):
        rows.append(row | {"image": row["name"].removesuffix(".dcm")})
    cases = []
    for source, row in match_rows(rows, ("x0", "y0", "w", "h"), listing).items():
        x, y, width, height = (read_number(row[name]) for name in ("x0", "y0", "w", "h"))
        box = (x, y, x + width, y + height)  # max exclusive, as everywhere here
        cases.append(Case(row["image"], source, box, grid=224, patient=row["image"]))
    return cases


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


def load(case: Case, raw: Path, size: int) -> Noted | DataError:
    """Read and resize one case, and fill what it learns by that; or why it cannot be used."""
    if CONTROL.search(case.source):
        return DataError(f"{case.source}: control characters, or no UTF-8, in the name: rename it")
    try:
        picture = read_image(raw / case.source)
    except DataError as error:
        return error
    height, width = picture.gray.shape
    if case.grid:
        scale = (width / case.grid, height / case.grid) * 2  # of x, y, x, y
        case.box = tuple(round(v * s, 3) for v, s in zip(case.box, scale, strict=True))
    xmin, ymin, xmax, ymax = case.box
    if math.isnan(sum(case.box)):
        return DataError(f"{raw / case.source}: no box: blank, or no numbers with decimal points")
    if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):
        expected = f"expected 0 <= xmin < xmax <= {width}, 0 <= ymin < ymax <= {height}"
        return DataError(f"{raw / case.source}: box {case.box}, {expected}")
    image = prepare(picture.gray, size)
    case.digest = picture.digest
    case.patient_id = picture.patient
    case.size = (height, width)
    case.spacing = picture.spacing
    # In float64: a variance is a small difference of two means.
    case.moments = (image.mean(dtype=np.float64) / 255, np.square(image / 255).mean())
    return image, picture.notes


def prepare(picture: np.ndarray, size: int) -> np.ndarray:
    """What the network sees of a picture (H, W), uint8 or float32: uint8 (size, size)."""
    # Scanners differ in range far more than hearts do: 1 % on either side (borders, labels) clip.
    return resize(stretch(picture, *np.percentile(picture, (1, 99))), size, "squash")


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


# --- write ---


def write_index(path: Path, cases: list[Case], folds: list[str], patients: list[str]) -> dict:
    """Write index.csv, in pixels of the original and mm; prints the counts per fold and site."""
    counts: dict[str, Counter] = defaultdict(Counter)
    columns = (*INDEX_COLUMNS[:-1], *cases[0].more, "source")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for case, fold, patient in zip(cases, folds, patients, strict=True):
            spacing = " ".join(map(str, case.spacing))  # "" where the file does not say
            geometry = (*case.box, *case.size, spacing)
            split = case.split if case.split in SPLITS else ""
            place = (case.id, patient, fold, split, case.digest, case.site)
            writer.writerow((*place, *geometry, *case.more.values(), case.source))
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


if __name__ == "__main__":
    run_command(main)
