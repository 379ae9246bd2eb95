"""Turn raw chest X-rays with one box around the heart into one small array and an index.

  python detection/preprocess.py --data heart_xray --out data/heart
  python detection/preprocess.py --data rsna --out data/rsna_heart
  python detection/preprocess.py --data heart_xray --out data/sites --group-regex "^[a-z]+" --test-group jsrt
  python detection/preprocess.py --data other_hospital --out data/other --like data/heart

Layouts of RAW, recognised by what lies in it:
  boxes.csv                   image,xmin,ymin,xmax,ymax in pixels of the original image, max exclusive; the
                              images (.jpg .jpeg .png .tif .tiff .dcm) beside it or in images/
  rsna_heart_detection.csv    name,x0,y0,w,h in 224x224 coordinates; NAME.dcm anywhere below RAW

Written to OUT: images.npy uint8 (N, S, S); index.csv (id, patient, fold, group, box and size of the original
image, source); meta.json.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pydicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, what Pillow uses for convert("L")
PHOTOMETRIC = ["MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"]
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".dcm"}
FOLDS = 5


class DataError(ValueError):
    """What the user can mend: shown as one line with exit status 1, without a traceback."""


# --- reading one image ---


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..1, float32, and clip what lies outside."""
    return ((values - float(low)) / (float(high - low) or 1.0)).clip(0, 1).astype(np.float32)


def read_dicom(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Read a single-frame DICOM image as it is meant to be shown (PS3.3 C.7.6.3, C.11.1, C.11.2).

    Returns the picture, float32 (H, W) in 0..1 with 0 = black; the stored pixels; the hashed PatientID or "".
    Modality LUT or rescale, then VOI LUT or window to its output range. Without a window, up to 8 bits keep
    their range and deeper data are stretched from the 0.5 to the 99.5 percentile, padding left out.
    """
    ds = pydicom.dcmread(path)
    if not ds.get("PixelData"):
        raise DataError(f"{path}: DICOM without pixel data, expected an image")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise DataError(f"{path}: DICOM with {ds.NumberOfFrames} frames, expected a single image")
    photometric = str(ds.get("PhotometricInterpretation", ""))
    if photometric not in PHOTOMETRIC:
        raise DataError(f"{path}: photometric interpretation {photometric!r}, expected one of {PHOTOMETRIC}")
    highest = ds.BitsStored - 1
    if ds.get("HighBit", highest) != highest:  # PS3.5 8.1.1; pydicom masks the bits above `highest`
        raise DataError(f"{path}: high bit {ds.HighBit}, expected {highest}: {ds.BitsStored} bits stored")
    pixels = pixel_array(ds)  # masks unused bits, converts YBR to RGB
    if pixels.shape[:2] != (ds.Rows, ds.Columns):
        raise DataError(f"{path}: pixels {pixels.shape}, expected a single image ({ds.Rows}, {ds.Columns})")
    # The PatientID is personal data: only a hash leaves this function.
    patient = str(ds.get("PatientID") or "").strip()
    patient = hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""
    if pixels.ndim == 3:
        return (pixels @ LUMA / (2**ds.BitsStored - 1)).astype(np.float32), pixels, patient

    values = apply_modality_lut(pixels, ds)
    padding = np.zeros(pixels.shape, bool)
    if ds.get("PixelPaddingValue") is not None:
        ends = (ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue))
        padding = (pixels >= min(ends)) & (pixels <= max(ends))
    ds.VOILUTFunction = ds.get("VOILUTFunction") or "LINEAR"
    width = np.atleast_1d(ds.get("WindowWidth") or 0)[0]
    narrowest = 1 if ds.VOILUTFunction == "LINEAR" else 1e-9  # PS3.3 C.11.2.1.2 and C.11.2.1.3
    if ds.get("VOILUTSequence"):
        count, first, _ = ds.VOILUTSequence[0].LUTDescriptor
        ds.VOILUTSequence[0].LUTDescriptor[2] = 16  # pydicom 3 looks up 8-bit tables with 8-bit indices
        entries = np.arange(first, first + (count or 2**16))
        table = apply_voi_lut(entries, ds)
        values, low, high = np.interp(values, entries, table), table.min(), table.max()
    elif ds.get("WindowCenter") is not None and width >= narrowest:
        # The output range depends on five attributes: it is what the window makes of the two far ends.
        low, high = apply_voi_lut(np.array([-1e12, 1e12]), ds)
        values = apply_voi_lut(values, ds)
    elif ds.BitsStored <= 8 and ds.PixelRepresentation == 0:
        low, high = sorted(apply_modality_lut(np.array([0, 2**ds.BitsStored - 1], np.uint8), ds))
    else:
        low, high = np.percentile(values if padding.all() else values[~padding], (0.5, 99.5))
    picture = stretch(values, low, high)
    if photometric == "MONOCHROME1":
        picture = 1 - picture
    picture[padding] = 0
    return picture, pixels, patient


def read_picture(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Read a PNG, JPEG or TIFF as gray: like `read_dicom`, without a patient. 8-bit data keep their range."""
    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise DataError(f"{path}: {picture.n_frames} frames, expected a single image")
        if picture.mode[0] not in "IF":
            pixels = np.asarray(picture.convert("L"))
            return pixels.astype(np.float32) / 255, pixels, ""
        pixels = np.asarray(picture)
        # TIFF photometric interpretation 0 = WhiteIsZero, which Pillow heeds in 8 bits only
        inverse = getattr(picture, "tag_v2", {}).get(262) == 0
    black, white = np.percentile(pixels, (99.5, 0.5) if inverse else (0.5, 99.5))
    return stretch(pixels, black, white), pixels, ""


def hash_pixels(pixels: np.ndarray) -> str:
    """What tells copies: the SHA-256 of shape and stored pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def read_image(path: Path) -> tuple[np.ndarray, str, str]:
    """Read any supported file: picture float32 (H, W) in 0..1, hash of the stored pixels, hashed patient.

    Raises DataError that names the file for whatever keeps it from being a single gray picture with content.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(132)
        if not head:
            raise DataError(f"{path}: zero bytes")
        if path.suffix.lower() == ".dcm" or head[128:] == b"DICM":
            picture, pixels, patient = read_dicom(path)
        else:
            picture, pixels, patient = read_picture(path)
    except DataError:
        raise
    except Exception as error:  # the one place where the readers' many exceptions become ours
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = '; more decoders: pip install "pylibjpeg[all]"' if "plugins" in reason else ""
        raise DataError(f"{path}: {reason}{hint}") from error
    if not picture.min() < picture.max():  # also true for NaN
        raise DataError(f"{path}: no contrast, all pixels have one value (or some are NaN)")
    return picture, hash_pixels(pixels), patient


def resize(picture: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Resize float (H, W) in 0..1 with antialiasing to uint8 (size, size); "pad" adds black."""
    height, width = picture.shape
    scale = size / max(height, width)
    shape = (size, size) if fit == "squash" else (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.BILINEAR))
    out = np.zeros((size, size), np.uint8)
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    out[top : top + small.shape[0], left : left + small.shape[1]] = np.rint(small.clip(0, 1) * 255)
    return out


def prepare(picture: np.ndarray, size: int) -> np.ndarray:
    """What the network sees of a picture: gray values stretched, then uint8 (size, size).

    Scanners differ in range far more than hearts do: 1 % of the pixels on either side (borders, labels) clip.
    """
    return resize(stretch(picture, *np.percentile(picture, (1, 99))), size, "squash")


def read_spacing(path: Path) -> tuple[float, ...]:
    """PixelSpacing (PS3.3 10.7.1.3; else ImagerPixelSpacing, at the detector): mm down, mm across; or ()."""
    try:
        ds = pydicom.dcmread(path, specific_tags=["PixelSpacing", "ImagerPixelSpacing"])
    except pydicom.errors.InvalidDicomError:
        return ()  # not DICOM
    spacing = ds.get("PixelSpacing") or ds.get("ImagerPixelSpacing") or ()
    return tuple(float(mm) for mm in spacing)


# --- finding the cases ---


@dataclass
class Case:
    """One image with its box before it is read."""

    id: str
    source: str  # path below RAW
    box: tuple[float, ...]  # xmin, ymin, xmax, ymax in pixels, or in units of `grid`
    grid: int = 0  # the box is in coordinates of an image squashed to (grid, grid); 0 = of the image itself
    patient: str = ""  # "" = the DICOM PatientID, or else the file stem
    group: str = ""
    size: tuple[int, int] = (0, 0)  # height and width in pixels, once it is read
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, where the file says


def read_table(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """Place (file:line), name (first column) and numbers (the others; NaN if they are none) of every row."""
    text = table.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "")  # Python 3.10: no NUL
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = set(columns) - set(reader.fieldnames or [])
    if missing:
        raise DataError(f"{table}: no column {sorted(missing)}, found {reader.fieldnames}")

    def number(text: str | None) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return math.nan

    for row in reader:
        values = tuple(number(row[column]) for column in columns[1:])
        yield f"{table}:{reader.line_num}", (row[columns[0]] or "").strip(), values


def find_boxes_csv(raw: Path) -> tuple[list[Case], list[tuple[str, str]]] | None:
    """boxes.csv: one row per image, every image in it. Also returns (source, reason) of what is wrong."""
    table = raw / "boxes.csv"
    if not table.is_file():
        return None
    folder = raw / "images" if (raw / "images").is_dir() else raw
    files = {p.name: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES and p.name[0] != "."}
    cases, bad, seen = [], [], {}
    for place, name, box in read_table(table, ("image", "xmin", "ymin", "xmax", "ymax")):
        name = name.removeprefix("images/")
        if name in seen:
            bad.append((name, f"{place}: a second box for {name}, first in line {seen[name]}"))
        elif name not in files:
            bad.append((name, f"{place}: no image {name!r} in {folder}"))
        else:
            cases.append(Case(name, files[name].relative_to(raw).as_posix(), box))
        seen.setdefault(name, place.rsplit(":", 1)[1])
    bad += [(name, f"{path}: no box in {table.name}") for name, path in files.items() if name not in seen]
    return cases, bad


def find_rsna_hearts(raw: Path) -> tuple[list[Case], list[tuple[str, str]]] | None:
    """rsna_heart_detection.csv: boxes at 224x224 for some of the RSNA images; only those are read."""
    table = raw / "rsna_heart_detection.csv"
    if not table.is_file():
        return None
    files = {path.stem: path for path in sorted(raw.rglob("*.dcm"))}
    cases, bad, seen, missing = [], [], {}, []
    for place, name, (x, y, w, h) in read_table(table, ("name", "x0", "y0", "w", "h")):
        name = name.removesuffix(".dcm")
        if name in seen:
            bad.append((name, f"{place}: a second box for {name}, first in line {seen[name]}"))
        elif name not in files:
            missing.append(name)
        else:
            source = files[name].relative_to(raw).as_posix()
            cases.append(Case(name, source, (x, y, x + w, y + h), grid=224, patient=name))
        seen.setdefault(name, place.rsplit(":", 1)[1])
    if missing:
        print(f"note: {len(missing)} of {len(seen)} images named in {table.name} are not here: {missing[0]}")
    return cases, bad


def find_cases(raw: Path, regex: str | None) -> tuple[str, list[Case], list[tuple[str, str]]]:
    """Recognise the layout of RAW: its name, the cases, and (source, reason) of what cannot be one."""
    if not raw.is_dir():
        raise DataError(f"{raw}: not a folder")
    finders = {"boxes.csv": find_boxes_csv, "RSNA heart boxes": find_rsna_hearts}
    layout, found = next(
        ((name, found) for name, find in finders.items() if (found := find(raw))), ("", None)
    )
    if not found:
        inside = sorted(p.name for p in raw.iterdir())[:5]
        raise DataError(f"{raw}: found {inside}, expected boxes.csv or rsna_heart_detection.csv")
    cases, bad = found
    again = {name for name, reason in bad if ": a second box" in reason}  # nobody knows which one is right
    cases = [case for case in cases if case.id not in again]
    if not cases and not bad:
        raise DataError(f"{raw}: {layout} names no image that is here")
    for case in cases if regex else ():
        match = re.search(regex, Path(case.source).name)
        if not match:
            raise DataError(f"--group-regex {regex!r} finds nothing in {case.source}")
        case.group = match.group(1) if match.re.groups else match.group()
    return layout, cases, bad


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


# --- writing the cache ---


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


def write_npy(path: Path, images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    """Write uint8 images as an .npy file one by one: none stays in memory, the header gets the count last."""
    header = {"descr": "|u1", "fortran_order": False}
    count = 0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0, *shape)})
        start = file.tell()
        for image in images:
            file.write(image.tobytes())
            count += 1
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, *shape)})
        if file.tell() != start:  # numpy pads it to the same length for any count
            raise RuntimeError("the .npy header changed its length")


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
        return json.loads((cache / "meta.json").read_text())
    except (OSError, ValueError) as error:
        command = f"python {Path(__file__).parent.name}/preprocess.py --data RAW --out {cache}"
        raise DataError(f"{cache}: no finished cache here; make one by: {command}") from error


# --- the command ---


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images and boxes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--size", type=int, help="pixels per side (default: 224)")
    add("--group-regex", help="finds the group (a site, say) in a file name, as its first group if any")
    add("--test-group", metavar="NAME", help="keep this group as test")
    add("--test-fraction", type=float, default=0.0, help="part of the patients kept as test (default: 0)")
    add("--like", type=Path, metavar="CACHE", help="a test set for the models of this cache: its size, mean "
        "and std, every row test")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave unusable images out and list them in skipped.csv")
    add("--overwrite", action="store_true", help="replace a finished cache in OUT")
    args = parser.parse_args(argv)
    if args.size is not None and not 32 <= args.size <= 4096:
        parser.error(f"--size {args.size}, expected 32 to 4096")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    if args.test_group and not args.group_regex:
        parser.error("--test-group needs --group-regex")
    if args.like and (args.size or args.test_fraction or args.test_group):
        parser.error("--like brings its size and makes every row test: leave those options out")
    if args.like and args.like.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the cache of --like: give another folder")
    try:
        re.compile(args.group_regex or "")
    except re.error as error:
        parser.error(f"--group-regex {args.group_regex!r}: {error}")
    return args


def load(case: Case, raw: Path, size: int) -> tuple[np.ndarray, str, str] | DataError:
    """Read and resize one case: uint8 (size, size), hash of its pixels, hashed patient; or why it failed.

    Its box becomes one in pixels of the original image.
    """
    try:
        picture, digest, patient = read_image(raw / case.source)
        case.size, case.spacing = picture.shape, read_spacing(raw / case.source)
        height, width = case.size
        if case.grid:
            scale = (width / case.grid, height / case.grid) * 2
            case.box = tuple(round(v * s, 3) for v, s in zip(case.box, scale, strict=True))
        xmin, ymin, xmax, ymax = case.box
        if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):  # also true for NaN
            expected = f"expected 0 <= xmin < xmax <= {width}, 0 <= ymin < ymax <= {height}"
            raise DataError(f"{raw / case.source}: box {case.box}, {expected}")
    except DataError as error:
        return error
    return prepare(picture, size), digest, patient


def write_index(path: Path, cases: list[Case], folds: list[str], patients: list[str]) -> dict:
    """Write index.csv; returns and prints the counts per fold and group."""
    counts: dict[str, Counter] = defaultdict(Counter)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        box = ("xmin", "ymin", "xmax", "ymax")
        writer.writerow(("id", "patient", "fold", "group", *box, "height", "width", "spacing", "source"))
        for case, fold, patient in zip(cases, folds, patients, strict=True):
            row = (case.id, patient, fold, case.group, *case.box, *case.size)
            writer.writerow((*row, " ".join(map(str, case.spacing)), case.source))
            counts[fold][case.group or "images"] += 1
    for fold in sorted(counts):
        print(
            f"fold {fold:5}" + "".join(f"{count:8d} {name}" for name, count in sorted(counts[fold].items()))
        )
    return {fold: dict(counts[fold]) for fold in sorted(counts)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"pydicom|PIL")  # harmless header slips, one line per file
    like = read_meta(args.like) if args.like else {}

    # what there is
    layout, cases, bad = find_cases(args.data, args.group_regex)
    groups = sorted({case.group for case in cases})
    if args.test_group and args.test_group not in groups:
        raise DataError(f"--test-group {args.test_group}, found the groups {groups}")
    total, size = len(cases) + len(bad), like.get("size") or args.size or 224
    print(f"{args.data}: {layout}, {len(cases)} images with a box, to {size}x{size}")

    # every image once: read, resize, write; what fails is collected, so that one run names it all
    kept, digests, moments = [], [], []

    def good_images() -> Iterator[np.ndarray]:
        results = in_threads(partial(load, raw=args.data, size=size), cases, args.workers)
        for case, result in zip(cases, results, strict=True):
            if isinstance(result, DataError):
                bad.append((case.source, str(result)))
                continue
            image, digest, patient = result
            case.patient = case.patient or patient or Path(case.source).stem
            kept.append(case)
            digests.append(digest)
            moments.append((image.mean(dtype=np.float64) / 255, np.square(image / 255).mean()))
            yield image

    out = args.out.resolve()
    folder = open_output(out, args.overwrite)
    try:
        write_npy(folder / "images.npy", good_images(), (size, size))
        for _, reason in bad:
            print(reason, file=sys.stderr)
        if bad and not (args.skip_bad and kept):
            raise DataError(f"{len(bad)} of {total} images cannot be used: mend them, or use --skip-bad")
        if bad:
            with open(folder / "skipped.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("source", "reason"), *bad])

        # patients, folds, index
        patients = group_patients([case.patient for case in kept], digests)
        splits = ["test" if args.test_group and case.group == args.test_group else "" for case in kept]
        rest = (False, args.test_fraction)
        folds = [assign_fold(patient, split, *rest) for patient, split in zip(patients, splits, strict=True)]
        if like:
            folds = ["test"] * len(kept)
        elif set(folds) == {"test"}:
            raise DataError(f"{args.data}: only test images; for an external test set use --like TRAIN_CACHE")
        if copies := len(digests) - len(set(digests)):
            print(f"note: {copies} pixel-identical copies")
        counts = write_index(folder / "index.csv", kept, folds, patients)
        seen = [m for m, fold in zip(moments, folds, strict=True) if like or fold != "test"]
        mean, square = np.mean(seen, axis=0)
        meta = {
            "size": size, "layout": layout, "n": len(kept), "counts": counts,
            "mean": like.get("mean", mean), "std": like.get("std", float(np.sqrt(square - mean**2))),
            "copies": copies, "skipped": len(bad),
            "options": {k: str(v) for k, v in vars(args).items() if v},
            "versions": {m.__name__: m.__version__ for m in (np, PIL, pydicom)},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = "eval.py --checkpoint runs/detection/best.pt --split test" if like else "train.py"
    print(f"next: python detection/{command} --data {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
