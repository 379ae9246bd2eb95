"""Turn raw chest X-rays into one small array and an index that train.py and eval.py read.

  python classification/preprocess.py --data rsna-pneumonia-detection-challenge --out data/rsna
  python classification/preprocess.py --data chest_xray --out data/chest --patient-regex "person[0-9]+"
  python classification/preprocess.py --data pneumoniamnist.npz --out data/mnist
  python classification/preprocess.py --data other_hospital --out data/other --like data/chest

Layouts of RAW, recognised by what lies in it:
  RSNA challenge   stage_2_train_images/*.dcm and stage_2_train_labels.csv (or stage_1_...), as downloaded
  class folders    RAW/CLASS/* or RAW/{train,val,test}/CLASS/*: .jpg .jpeg .png .tif .tiff .dcm
  MedMNIST         a .npz file, or a folder with one

Written to OUT: images.npy uint8 (N, S, S); index.csv (id, patient, fold, label, source); meta.json.
"""

import argparse
import csv
import hashlib
import json
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


# --- finding the cases ---


@dataclass
class Case:
    """One labelled image before it is read: a file, or pixels that are in memory already."""

    id: str
    source: str  # path below RAW
    label: int
    patient: str  # "" = the DICOM PatientID, or else the file stem
    split: str = ""  # official split: train, val, test, or "" for none
    pixels: np.ndarray | None = None


def find_rsna(raw: Path) -> tuple[list[str], list[Case]] | None:
    """RSNA Pneumonia Detection Challenge: one CSV row per box, merged per patient; label 1 = any box."""
    stage = next((s for s in ("stage_2", "stage_1") if (raw / f"{s}_train_images").is_dir()), None)
    if stage is None:
        return None
    table, folder = raw / f"{stage}_train_labels.csv", raw / f"{stage}_train_images"
    if not table.is_file():
        raise DataError(f"{table}: not found, expected the label table beside {folder.name}")
    labels = read_rsna_labels(table)
    files = {path.stem for path in folder.glob("*.dcm")}
    lost = {"rows without a file": labels.keys() - files, "files without a row": files - labels.keys()}
    for what, ids in lost.items():
        if ids:
            print(f"note: {len(ids)} {what} left out, such as {min(ids)}")
    cases = [Case(i, f"{folder.name}/{i}.dcm", labels[i], i) for i in sorted(labels.keys() & files)]
    if not cases:
        raise DataError(f"{folder}: none of the {len(labels)} patients in {table.name} has a .dcm file here")
    return ["no_pneumonia", "pneumonia"], cases


def read_rsna_labels(table: Path) -> dict[str, int]:
    """Labels by patientId from the challenge's CSV: patientId, x, y, width, height, Target, a row per box."""
    labels: dict[str, int] = {}
    text = table.read_text(encoding="utf-8-sig", errors="replace").replace(
        "\0", ""
    )  # Python 3.10 stops at NUL
    reader = csv.DictReader(text.splitlines())
    missing = {"patientId", "Target"} - set(reader.fieldnames or [])
    if missing:
        raise DataError(f"{table}: no column {sorted(missing)}, found {reader.fieldnames}")
    for row in reader:
        name, target = row["patientId"], row["Target"]
        if target not in ("0", "1") or not name:
            raise DataError(f"{table}:{reader.line_num}: {name!r} has Target {target!r}, expected 0 or 1")
        if labels.setdefault(name, int(target)) != int(target):
            raise DataError(f"{table}:{reader.line_num}: {name} has rows with Target 0 and with Target 1")
    return labels


def find_class_folders(raw: Path, regex: str | None) -> tuple[list[str], list[Case]] | None:
    """RAW/CLASS/* or RAW/{train,val,test}/CLASS/*; classes in alphabetical order."""
    splits = [s for s in ("train", "val", "test") if (raw / s).is_dir()] or [""]
    files = {
        (split, folder.name): paths
        for split in splits
        for folder in sorted(p for p in (raw / split).iterdir() if p.is_dir() and p.name[0] != ".")
        if (paths := sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."))
    }
    classes = sorted({name for _, name in files})
    cases, unmatched = [], []
    for (split, name), paths in files.items():
        for path in paths:
            match = re.search(regex, path.name) if regex else None
            if regex and not match:
                unmatched.append(path)
            patient = (match.group(1) if match.re.groups else match.group()) if match else ""
            source = path.relative_to(raw).as_posix()
            cases.append(Case(source, source, classes.index(name), patient or "", split))
    if unmatched:
        raise DataError(f"--patient-regex {regex!r} finds nothing in {len(unmatched)} names: {unmatched[0]}")
    used = {case.source for case in cases}
    rest = {p.relative_to(raw).as_posix() for p in raw.rglob("*") if p.is_file()} - used
    rest = {name for name in rest if "/." not in f"/{name}"}
    if cases and rest:
        print(f"note: {len(rest)} files of other types or in other folders left out, such as {min(rest)}")
    return (classes, cases) if cases else None


def find_medmnist(raw: Path) -> tuple[list[str], list[Case]] | None:
    """MedMNIST v2 .npz: {split}_images uint8 (N, S, S[, 3]) and {split}_labels (N, 1), any of the splits."""
    paths = [raw] if raw.is_file() else sorted(raw.glob("*.npz"))
    if not paths or paths[0].suffix != ".npz":
        return None
    if len(paths) > 1:
        raise DataError(f"{raw}: {len(paths)} .npz files, expected one; give --data the file itself")
    path = paths[0]
    try:
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, zlib, pickle and OS errors alike
        raise DataError(f"{path}: {type(error).__name__}: {error}") from error
    cases = []
    for split in ("train", "val", "test"):
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None or labels is None:
            continue
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)):
            found = f"{split}_images {images.dtype} {images.shape}"
            raise DataError(f"{path}: {found}, expected uint8 (N, S, S) or (N, S, S, 3)")
        n = len(images)
        if labels.shape not in ((n,), (n, 1)) or labels.dtype.kind not in "iu":
            found = f"{split}_labels {labels.dtype} {labels.shape}"
            raise DataError(f"{path}: {found}, expected integers ({n}, 1), one label an image")
        for i, label in enumerate(labels.reshape(-1)):
            name = f"{split}/{i}"
            cases.append(Case(name, f"{path.name}:{name}", int(label), name, split, images[i]))
    if not cases:
        raise DataError(f"{path}: arrays {sorted(arrays)}, expected train_images, train_labels and so on")
    return [str(k) for k in range(max(c.label for c in cases) + 1)], cases


def find_cases(raw: Path, regex: str | None) -> tuple[str, list[str], list[Case]]:
    """Recognise the layout of RAW: its name, the classes and the cases. Raises DataError if there is none."""
    if not raw.exists():
        raise DataError(f"{raw}: not found")
    finders: dict[str, Callable] = {
        "RSNA challenge": find_rsna,
        "MedMNIST": find_medmnist,
        "class folders": lambda folder: find_class_folders(folder, regex) if folder.is_dir() else None,
    }
    for layout, find in finders.items():
        if found := find(raw):
            return layout, *found
    inside = sorted(p.name for p in raw.iterdir())[:5] if raw.is_dir() else "a file"
    raise DataError(
        f"{raw}: found {inside}, expected stage_2_train_images/ and stage_2_train_labels.csv (RSNA), "
        "CLASS/*.png or {train,val,test}/CLASS/*.png (class folders), or a MedMNIST .npz"
    )


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


def report_overlaps(cases: list[Case], groups: list[str], digests: list[str]) -> dict[str, int]:
    """Count and print what public sets have: copies, copies with another label, patients on both sides."""
    labels, splits = defaultdict(set), defaultdict(set)
    for case, group, digest in zip(cases, groups, digests, strict=True):
        labels[digest].add(case.label)
        splits[group].add(case.split)
    found = {
        "pixel-identical copies": len(digests) - len(labels),
        "identical pixels with different labels": sum(len(v) > 1 for v in labels.values()),
        "patients on both sides of an official split": sum(len(v) > 1 for v in splits.values()),
    }
    for what, count in found.items():
        if count:
            print(f"note: {count} {what}")
    return found


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
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--size", type=int, help="pixels per side (default: 224; MedMNIST: as it is)")
    add("--fit", choices=("squash", "pad"), help="images that are not square (default: squash)")
    add("--classes", nargs="+", metavar="NAME", help="class names in order; the last is the positive one")
    add("--patient-regex", help="class folders: finds the patient in a file name, as its first group if any")
    add("--test-fraction", type=float, default=0.0, help="part of the patients kept as test (default: 0)")
    add("--like", type=Path, metavar="CACHE", help="a test set for the models of this cache: its classes, "
        "size, fit, mean and std, every row test")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave unusable files out and list them in skipped.csv")
    add("--overwrite", action="store_true", help="replace a finished cache in OUT")
    args = parser.parse_args(argv)
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}, expected 8 to 4096")
    if not 0 <= args.test_fraction < 1:
        parser.error(f"--test-fraction {args.test_fraction}, expected 0 <= fraction < 1")
    if args.like and (args.size or args.fit or args.test_fraction):
        parser.error("--like brings its size and fit and makes every row test: leave those options out")
    if args.like and args.like.resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the cache of --like: give another folder")
    try:
        re.compile(args.patient_regex or "")
    except re.error as error:
        parser.error(f"--patient-regex {args.patient_regex!r}: {error}")
    return args


def order_classes(layout: str, classes: list[str], cases: list[Case], wanted: list[str] | None) -> list[str]:
    """Put the cases into the wanted class order: matched by name (class folders), or numbers get names."""
    wanted = wanted or classes
    if len(wanted) < 2 or len(set(wanted)) != len(wanted):
        raise DataError(f"classes {wanted}, expected two or more, each once")
    by_name = layout == "class folders"
    if (by_name and not set(classes) <= set(wanted)) or len(classes) > len(wanted):
        raise DataError(f"classes in the data {classes}, expected {wanted}")
    if by_name:
        for case in cases:
            case.label = wanted.index(classes[case.label])
    return wanted


def load(case: Case, raw: Path, size: int, fit: str) -> tuple[np.ndarray, str, str] | DataError:
    """Read and resize one case: uint8 (size, size), hash of its pixels, hashed patient; or why it failed."""
    try:
        if case.pixels is None:
            picture, digest, patient = read_image(raw / case.source)
        else:
            gray = case.pixels @ LUMA if case.pixels.ndim == 3 else case.pixels
            picture, digest, patient = (gray / 255).astype(np.float32), hash_pixels(case.pixels), ""
    except DataError as error:
        return error
    return resize(picture, size, fit), digest, patient


def write_index(
    path: Path, cases: list[Case], folds: list[str], groups: list[str], classes: list[str]
) -> dict:
    """Write index.csv; returns and prints the counts per fold and class."""
    counts: dict[str, Counter] = defaultdict(Counter)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "fold", "label", "source"))
        for case, fold, group in zip(cases, folds, groups, strict=True):
            writer.writerow((case.id, group, fold, case.label, case.source))
            counts[fold][classes[case.label]] += 1
    for fold in sorted(counts):
        print(f"fold {fold:5}" + "".join(f"{counts[fold][name]:8d} {name}" for name in classes))
    return {fold: dict(counts[fold]) for fold in sorted(counts)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"pydicom|PIL")  # harmless header slips, one line per file
    like = read_meta(args.like) if args.like else {}

    # what there is
    layout, classes, cases = find_cases(args.data, args.patient_regex)
    classes = order_classes(layout, classes, cases, args.classes or like.get("classes"))
    if like and classes != like["classes"]:
        raise DataError(f"--classes {classes}, but {args.like} has {like['classes']}")
    if args.test_fraction and any(case.split for case in cases):
        raise DataError(f"{args.data}: has an official split, which --test-fraction cannot change")
    native = 224 if cases[0].pixels is None else len(cases[0].pixels)
    size, fit = like.get("size") or args.size or native, like.get("fit") or args.fit or "squash"
    print(f"{args.data}: {layout}, {len(cases)} images of {' '.join(classes)}, to {size}x{size} ({fit})")

    # every image once: read, resize, write; what fails is collected, so that one run names it all
    kept, digests, moments, bad = [], [], [], []

    def good_images() -> Iterator[np.ndarray]:
        results = in_threads(partial(load, raw=args.data, size=size, fit=fit), cases, args.workers)
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
            raise DataError(f"{len(bad)} of {len(cases)} files cannot be used: mend them, or use --skip-bad")
        if bad:
            with open(folder / "skipped.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("source", "reason"), *bad])

        # patients, folds, index
        groups = group_patients([case.patient for case in kept], digests)
        splits = [case.split for case in kept]
        rest = ("val" in splits, args.test_fraction)
        folds = [assign_fold(group, split, *rest) for group, split in zip(groups, splits, strict=True)]
        if like:
            folds = ["test"] * len(kept)
        elif set(folds) == {"test"}:
            raise DataError(f"{args.data}: only test images; for an external test set use --like TRAIN_CACHE")
        overlaps = report_overlaps(kept, groups, digests)
        counts = write_index(folder / "index.csv", kept, folds, groups, classes)
        seen = [m for m, fold in zip(moments, folds, strict=True) if like or fold != "test"]
        mean, square = np.mean(seen, axis=0)
        meta = {
            "classes": classes, "size": size, "fit": fit, "layout": layout, "n": len(kept), "counts": counts,
            "mean": like.get("mean", mean), "std": like.get("std", float(np.sqrt(square - mean**2))),
            "overlaps": overlaps, "skipped": len(bad),
            "options": {k: str(v) for k, v in vars(args).items() if v},
            "versions": {m.__name__: m.__version__ for m in (np, PIL, pydicom)},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = "eval.py --checkpoint runs/classification/best.pt --split test" if like else "train.py"
    print(f"next: python classification/{command} --data {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
