"""Turn raw chest X-rays into one small array and an index that train.py and eval.py read.

  python classification/preprocess.py --data rsna-pneumonia-detection-challenge --out data/rsna
  python classification/preprocess.py --data chest_xray --out data/chest --patient-regex "person[0-9]+"
  python classification/preprocess.py --data pneumoniamnist.npz --out data/mnist
  python classification/preprocess.py --data other_hospital --out data/other --like data/chest

Layouts of RAW, recognised by what lies in it:
  RSNA challenge   stage_2_train_images/* and stage_2_train_labels.csv (or stage_1_...), as downloaded
  class folders    RAW/CLASS/* or RAW/{train,val,test}/CLASS/*; a folder below CLASS is a patient
  MedMNIST         a .npz file, or a folder with one
Images are DICOM, JPEG, PNG or TIFF, known by their content.

Written to OUT: images.npy uint8 (N, S, S); index.csv (id, patient, fold, label, source); meta.json.
"""

import argparse
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL
import pydicom
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Tag
from pydicom import uid
from pydicom.pixels import apply_color_lut, apply_windowing, pixel_array

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, what Pillow uses for convert("L")
PHOTOMETRIC = ["MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT",
               "YBR_RCT"]  # fmt: skip
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
MORE_DECODERS = "more decoders: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
FOLDS = 5
MAX_PIXELS = 2**27  # of an image: five times the largest X-rays
MAX_CLASSES = 256  # there is a name, a column and an output for each
# Names of a class without a finding: normal, healthy, negative, control, no_finding, NonCOVID
NO_FINDING = re.compile(
    r"(?i:(?<![a-z])(normals?|healthy|negatives?|neg|controls?)(?![a-z])|^no[ _-]|^non|^without)"
    r"|^No(?=[A-Z])"
)


class DataError(ValueError):
    """What the user can mend: shown as one line with exit status 1, without a traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Text for a terminal: on one line, control characters escaped, a long one cut in its middle."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    line = "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in line)
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


# --- reading one image: the same text in classification/ and detection/ ---


class Picture(NamedTuple):
    """One image as it is meant to be shown, and what else its file says."""

    gray: np.ndarray  # float32 (H, W), 0 = black, 1 = white
    digest: str  # SHA-256 of the stored pixels: tells copies
    patient: str = ""  # hash of the DICOM PatientID, "" where there is none
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, () where unknown
    notes: tuple[str, ...] = ()  # what was left out or changed in reading


def image_kind(path: Path) -> str:
    """What the first bytes of a file say that it is: DICOM, JPEG, PNG, TIFF, or "" for anything else."""
    with open(path, "rb") as file:
        head = file.read(132)
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


def read_image(path: Path) -> Picture:
    """Read any supported file as it is meant to be shown, whatever its suffix.

    Raises DataError that names the file for whatever keeps it from being one gray picture with content.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: zero bytes")
        kind = image_kind(path)
        if kind == "DICOM":
            picture = read_dicom(path)
        elif kind and path.suffix.lower() in DICOM_SUFFIXES:
            raise DataError(f"{path}: holds a {kind} picture, not DICOM: rename it to .{kind.lower()}")
        elif kind:
            picture = read_picture(path, kind)
        else:
            raise DataError(f"{path}: neither DICOM nor JPEG, PNG or TIFF, by its first bytes")
    except DataError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"{path}: a {kind} picture that Pillow cannot read: damaged, or of a rare kind"
        ) from error
    except Exception as error:  # the one place where the readers' many exceptions become ours
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "plugin" in reason and find_spec("pylibjpeg") is None:
            reason += f"; {MORE_DECODERS}"
        raise DataError(f"{path}: {reason}") from error
    if not picture.gray.min() < picture.gray.max():  # also true for NaN
        raise DataError(f"{path}: no contrast, all pixels have one value (or some are NaN)")
    return picture


def read_dicom(path: Path) -> Picture:
    """Read a single-frame DICOM image as it is meant to be shown (PS3.3 C.7.6.3, C.11.1, C.11.2).

    Modality LUT or rescale, then VOI LUT or window. Without a window, up to 8 bits keep their range and
    deeper data are stretched from the 0.5 to the 99.5 percentile, padding left out. Colour becomes gray.
    An optional attribute that cannot be used is passed over, with a note.
    """
    ds = open_dicom(path)
    check_single_image(ds, path)
    pixels, padding = stored_pixels(ds)
    if pixels.shape[:2] != (ds.Rows, ds.Columns):
        raise DataError(f"{path}: pixels {pixels.shape}, expected a single image ({ds.Rows}, {ds.Columns})")
    notes = []
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        rgb = apply_color_lut(pixels, ds)[..., :3]
        if not ds.file_meta.TransferSyntaxUID.is_little_endian and "RedPaletteColorLookupTableData" in ds:
            rgb = rgb.byteswap()  # pydicom takes the entries for little endian
        gray = colour_to_gray(rgb, 65535 if rgb.max() > 255 else 255, notes)
    elif pixels.ndim == 3:
        gray = colour_to_gray(pixels, 2**ds.BitsStored - 1, notes)
    else:
        values = modality_values(ds, pixels, path)
        gray = display_values(ds, values, padding, path, notes)
        if ds.PhotometricInterpretation == "MONOCHROME1":
            gray = 1 - gray
        gray[padding] = 0
    # The PatientID is personal data: only a hash leaves this function.
    patient = str(ds.get("PatientID") or "").strip()
    patient = hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""
    return Picture(gray, hash_pixels(pixels), patient, pixel_spacing(ds), tuple(notes))


def open_dicom(path: Path) -> pydicom.Dataset:
    """Read a data set, with or without preamble and meta header, which older archives leave out."""
    with open(path, "rb") as file:
        bare_prefix = file.read(4) == b"DICM"
    if bare_prefix:  # the preamble alone is missing
        ds = pydicom.dcmread(io.BytesIO(path.read_bytes()[4:]), force=True)
    else:
        ds = pydicom.dcmread(path, force=True)
    if not ds.file_meta.get("TransferSyntaxUID"):
        # Set as pydicom guessed it from the first element; compressed pixels would need the real one.
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
    rows, columns = number(ds, "Rows", 0), number(ds, "Columns", 0)
    if rows * columns > MAX_PIXELS:  # a few bytes can claim any size
        raise DataError(f"{path}: {rows:.0f} x {columns:.0f} pixels, expected at most {MAX_PIXELS} in all")
    photometric = str(ds.get("PhotometricInterpretation", "")).strip(" \0").upper()
    if photometric not in PHOTOMETRIC:
        raise DataError(f"{path}: photometric interpretation {photometric!r}, expected one of {PHOTOMETRIC}")
    ds.PhotometricInterpretation = photometric


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


def number(ds: pydicom.Dataset, keyword: str, default: float) -> float:
    """The first value of an optional attribute, or `default` where it is no finite number."""
    values = numbers(ds, keyword)
    return values[0] if values and math.isfinite(values[0]) else default


def stored_pixels(ds: pydicom.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The stored values, (H, W) or RGB (H, W, 3), and where they are padding, bool (H, W).

    Bits outside BitsStored are no image (PS3.5 8.1.1), natively or compressed. A HighBit other than
    BitsStored - 1 says that native values are stored further left; compressed streams ignore it.
    """
    bits = ds.BitsStored
    shift = 0
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated and ds.get("SamplesPerPixel") == 1:
        shift = int(number(ds, "HighBit", bits - 1)) + 1 - bits
        if not 0 <= shift <= ds.BitsAllocated - bits:
            shift = 0
        ds.BitsStored = ds.BitsAllocated  # so that pydicom masks nothing before the shift
    container = pixel_array(ds)  # converts YBR to RGB
    ds.BitsStored = bits
    unused = max(0, 8 * container.itemsize - bits)
    pixels = (container << (unused - min(shift, unused))) >> unused  # extends the sign of signed values

    padding = np.zeros(pixels.shape[:2], bool)
    low, high = padding_range(ds)
    if pixels.ndim == 2 and not math.isnan(low):
        padding = (low <= pixels) & (pixels <= high)
        padding |= (low <= container) & (container <= high)  # it may use bits that an image may not
    if padding.all():
        padding[:] = False
    return pixels, padding


def padding_range(ds: pydicom.Dataset) -> tuple[float, float]:
    """Lowest and highest stored value that means padding (PS3.3 C.7.5.1.1.2); NaN where there is none.

    The VR is "US or SS", and files have the wrong one of them: the same bits are read again with the sign
    of the pixels (65535 stored as -1, or -2000 stored as 63536).
    """
    value = number(ds, "PixelPaddingValue", math.nan)
    if math.isnan(value):
        return math.nan, math.nan
    count = 2**ds.BitsAllocated
    ends = []
    for end in (value, number(ds, "PixelPaddingRangeLimit", value)):
        bits = int(end) % count
        is_negative = ds.PixelRepresentation == 1 and bits >= count // 2
        ends.append(bits - count if is_negative else bits)
    return min(ends), max(ends)


def stored_range(ds: pydicom.Dataset) -> np.ndarray:
    """Every value that a pixel can have, in rising order; above 16 bits the lowest and the highest."""
    count = 2**ds.BitsStored
    every_value = np.arange(count) if ds.BitsStored <= 16 else np.array([0, count - 1])
    return every_value - (count // 2 if ds.PixelRepresentation == 1 else 0)


def modality_values(ds: pydicom.Dataset, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values to values with a meaning, by modality LUT or slope and intercept (PS3.3 C.11.1)."""
    if has_lut(ds, "ModalityLUTSequence"):
        table = read_lut(ds, "ModalityLUTSequence", stored_range(ds))
        if table is None:
            raise DataError(f"{path}: the modality LUT has fewer entries than its descriptor says")
        return np.interp(pixels, *table)
    slope = number(ds, "RescaleSlope", 1) or 1
    return pixels * float(slope) + number(ds, "RescaleIntercept", 0)


def has_lut(ds: pydicom.Dataset, keyword: str) -> bool:
    """Whether the first item of a LUT sequence has content."""
    items = ds.get(keyword)
    return bool(items and items[0].get("LUTDescriptor") and items[0].get("LUTData"))


def read_lut(ds: pydicom.Dataset, keyword: str, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and outputs of a sequence's first LUT (PS3.3 C.11.1.1.1, C.11.2.1.1), for np.interp.

    `inputs` are the values that it can be asked for. One missing entry repeats the last; returns None for
    a table that lacks more, or whose descriptor cannot be read.
    """
    item = ds[keyword][0]
    descriptor = numbers(item, "LUTDescriptor")
    if len(descriptor) != 3 or not all(map(math.isfinite, descriptor)):
        return None
    count, first, bits = map(int, descriptor)
    count = count % 2**16 or 2**16
    entries = item.LUTData
    if isinstance(entries, bytes):  # OW, or UN: words in the byte order of the file
        order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(entries + bytes(len(entries) % 2), f"{order}u2")
    entries = np.atleast_1d(entries).astype("<u2")
    if bits <= 8 and len(entries) < count - 1:
        entries = entries.view(np.uint8)  # two entries a word, the first in its low byte
    if len(entries) < count - 1:
        return None
    entries = np.append(entries, entries[-1])[:count]

    # The first input is "US or SS" as well: it has the sign of the inputs, or the other one to meet them.
    unsigned = first % 2**16
    signed = unsigned - 2**16 if unsigned >= 2**15 else unsigned
    first, other = (signed, unsigned) if inputs.min() < 0 else (unsigned, signed)
    if first > inputs.max() or first + count <= inputs.min():
        first = other
    return np.arange(first, first + count), entries


def display_values(
    ds: pydicom.Dataset, values: np.ndarray, padding: np.ndarray, path: Path, notes: list[str]
) -> np.ndarray:
    """Modality values to gray, float32 (H, W) in 0..1, by VOI LUT, window or range (PS3.3 C.11.2)."""
    every_value = modality_values(ds, stored_range(ds), path)
    table = None
    if has_lut(ds, "VOILUTSequence"):
        table = read_lut(ds, "VOILUTSequence", every_value)
        if table is None:
            notes.append("VOI LUT passed over: fewer entries than its descriptor says")
    window = read_window(ds)
    if window is None and ds.get("WindowCenter") is not None:
        notes.append("window passed over: no number, or too narrow")

    used = ""
    if table is not None:
        inputs, outputs = table
        gray = stretch(np.interp(values, inputs, outputs), outputs.min(), outputs.max())
        used = "VOI LUT"
    elif window is not None:
        gray = apply_windowing(values, window).astype(np.float32)
        used = f"window {window.WindowCenter:g}/{window.WindowWidth:g}"
    elif ds.BitsStored <= 8 and ds.PixelRepresentation == 0:
        gray = stretch(values, every_value.min(), every_value.max())
    else:
        gray = stretch(values, *np.percentile(values[~padding], (0.5, 99.5)))

    shown = gray[~padding]
    inside = values[~padding]
    if used and shown.min() == shown.max() and inside.min() < inside.max():
        raise DataError(f"{path}: {used} shows none of {inside.min():g} to {inside.max():g}")
    return gray


def read_window(ds: pydicom.Dataset) -> pydicom.Dataset | None:
    """The first window as a data set for pydicom, of output range 0..1; None without a usable one."""
    window = pydicom.Dataset()
    window.PhotometricInterpretation = "MONOCHROME2"
    window.PixelRepresentation = 0
    window.BitsStored = 1
    function = str(ds.get("VOILUTFunction") or "").strip().upper()
    window.VOILUTFunction = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    narrowest = 1 if window.VOILUTFunction == "LINEAR" else 1e-9  # PS3.3 C.11.2.1.2.1, C.11.2.1.3.2
    center = number(ds, "WindowCenter", math.nan)
    width = number(ds, "WindowWidth", math.nan)
    if math.isnan(center) or not width >= narrowest:
        return None
    window.WindowCenter = center
    window.WindowWidth = width
    return window


def pixel_spacing(ds: pydicom.Dataset) -> tuple[float, ...]:
    """Mm down and across (PS3.3 10.7.1.3): PixelSpacing, else ImagerPixelSpacing at the detector, else ()."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = numbers(ds, keyword)
        if len(spacing) == 2 and all(0.001 <= mm <= 100 for mm in spacing):
            return tuple(spacing)
    return ()


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..1, float32, and clip what lies outside."""
    return ((values - float(low)) / (float(high - low) or 1.0)).clip(0, 1).astype(np.float32)


def colour_to_gray(rgb: np.ndarray, highest: float, notes: list[str]) -> np.ndarray:
    """RGB (H, W, 3), or gray (H, W, 1), of the range 0..highest to gray float32 (H, W) in 0..1."""
    note_colour(rgb, highest, notes)
    if rgb.shape[-1] == 1:
        return (rgb[..., 0] / highest).astype(np.float32)
    return (rgb @ LUMA / highest).astype(np.float32)


def note_colour(rgb: np.ndarray, highest: float, notes: list[str]) -> None:
    """Say so where channels differ by more than JPEG leaves between those of a gray picture."""
    if (rgb.max(-1) - rgb.min(-1)).max() > highest / 32:
        notes.append("colour turned gray")


def read_picture(path: Path, kind: str) -> Picture:
    """Read a JPEG, PNG or TIFF as gray, turned as its orientation tag says: what viewers show.

    Up to 8 bits keep their range, deeper data are stretched from the 0.5 to the 99.5 percentile.
    """
    notes = []
    # As a file object: opened by path, Pillow >= 11 scrambles an uncompressed TIFF that is to be turned.
    with open(path, "rb") as file, Image.open(file, formats=[kind]) as image:
        seek_main_image(image, path)
        tags = dict(getattr(image, "tag_v2", {}))
        deep = read_deep_colour(image, path)
        ImageOps.exif_transpose(image, in_place=True)
        is_signed = tags.get(Tag.SampleFormat, (1,))[0] == 2
        if deep is not None:
            pixels = colour_to_gray(deep, max(1, deep.max()), notes)
        elif image.mode[0] in "IF" or is_signed:
            pixels = np.asarray(image)
        else:
            if image.mode not in ("1", "L", "LA"):
                note_colour(np.asarray(image.convert("RGB")), 255, notes)
            pixels = np.asarray(image.convert("L"))
            return Picture(pixels.astype(np.float32) / 255, hash_pixels(pixels), notes=tuple(notes))
    # Pillow has no type for these two, and hands out their bits as another.
    if pixels.dtype == np.uint8:
        pixels = pixels.view(np.int8)
    elif pixels.dtype == np.int32 and tags and not is_signed:
        pixels = pixels.view(np.uint32)
    # WhiteIsZero, which Pillow heeds in 8 bits only
    is_inverse = tags.get(Tag.PhotometricInterpretation) == 0
    black, white = np.percentile(pixels, (99.5, 0.5) if is_inverse else (0.5, 99.5))
    return Picture(stretch(pixels, black, white), hash_pixels(pixels), notes=tuple(notes))


def seek_main_image(image: Image.Image, path: Path) -> None:
    """Go to the one full image of a file. Raises DataError if there are several."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":  # phones put a preview behind the picture
        return
    full = []
    for frame in range(frames if image.format == "TIFF" else 0):
        image.seek(frame)
        is_preview = image.tag_v2.get(Tag.NewSubfileType, 0) & 5  # a reduced image, or a mask
        if not is_preview:
            full.append(frame)
    if len(full) != 1:
        raise DataError(f"{path}: {frames} frames, expected a single image")
    image.seek(full[0])


def read_deep_colour(image: Image.Image, path: Path) -> np.ndarray | None:
    """Colour, or gray with alpha, of 16 bits a sample: uint16 (H, W, 1 or 3). None for other images.

    Pillow keeps 8 of the bits before anybody has looked at the range. Its raw mode names the order of the
    two bytes (RGB;16B is big endian): by the opposite order it decodes the other byte.
    """
    if image.mode[0] in "IF" or not image.tile:
        return None
    raw_modes = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile]
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
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    high = decode_as(raw_modes, image, path)
    low = decode_as([raw_mode[:-1] + other[raw_mode[-1]] for raw_mode in raw_modes], image, path)
    return ((high << 8) + low)[..., :3]


def decode_as(raw_modes: list[str], image: Image.Image, path: Path) -> np.ndarray:
    """Decode the frame of `image` again by other raw modes, one a tile: its bytes as uint16 (H, W, C)."""
    with open(path, "rb") as file, Image.open(file, formats=[image.format]) as again:
        again.seek(image.tell())
        for k, raw_mode in enumerate(raw_modes):
            tile = again.tile[k]
            more = () if isinstance(tile.args, str) else tile.args[1:]
            again.tile[k] = tile._replace(args=(raw_mode, *more))
        ImageOps.exif_transpose(again, in_place=True)
        return np.asarray(again).astype(np.uint16)


def hash_pixels(pixels: np.ndarray) -> str:
    """What tells copies: the SHA-256 of shape and stored pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


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


def find_cases(raw: Path, regex: str | None) -> tuple[str, list[str], list[Case]]:
    """Recognise the layout of RAW: its name, the classes and the cases. Raises DataError if there is none."""
    if not raw.exists():
        raise DataError(f"{raw}: not found")
    layout = recognise_layout(raw)
    if layout == "RSNA challenge":
        return layout, *find_rsna(raw)
    if layout == "MedMNIST":
        return layout, *find_medmnist(raw)
    if layout == "class folders":
        return layout, *find_class_folders(raw, regex)
    raise DataError(
        f"{raw}: {describe_folder(raw)}; expected stage_2_train_images/ and stage_2_train_labels.csv (RSNA), "
        "CLASS/*.png or {train,val,test}/CLASS/*.png (class folders), or a MedMNIST .npz"
    )


def recognise_layout(raw: Path) -> str:
    """The name of the layout in a folder (or file), by what lies in it, or ""."""
    if raw.is_file():
        return "MedMNIST" if raw.suffix == ".npz" else ""
    if any(raw.glob("stage_[12]_train_*")):
        return "RSNA challenge"
    if any(raw.glob("*.npz")):
        return "MedMNIST"
    folders = list_folders(raw)
    if any(folder.name.lower() in SPLITS for folder in folders):
        return "class folders"
    return "class folders" if any(find_images(folder) for folder in folders) else ""


def list_folders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and what macOS adds to archives."""
    names = sorted(folder.iterdir())
    return [p for p in names if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"]


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones (.DS_Store, ._NAME) and those in hidden folders."""
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if not is_hidden and path.is_file():
            files.append(path)
    return files


def is_image(path: Path) -> bool:
    """Whether a file is to be read: by its suffix, or by its content where the suffix says nothing."""
    if path.name.upper() == "DICOMDIR":  # the table of contents of an export, itself in DICOM
        return False
    return path.suffix.lower() in SUFFIXES or image_kind(path) != ""


def find_images(folder: Path) -> list[Path]:
    """All images below a folder."""
    return [path for path in list_files(folder) if is_image(path)]


def count_files(paths: Iterable[Path], folder: Path) -> str:
    """How many files of each suffix, for a message; images with the folder that they lie in."""
    counts = Counter()
    for path in paths:
        suffix = path.suffix.lower() or "without a suffix"
        parent = path.parent.relative_to(folder).as_posix()
        where = f" in {parent}/" if suffix in SUFFIXES and parent != "." else ""
        counts[f"{suffix}{where}"] += 1
    common = counts.most_common(8)
    text = ", ".join(f"{count} {what}" for what, count in common)
    return text + (f" and {counts.total() - sum(n for _, n in common)} more" if len(counts) > 8 else "")


def report_left_out(raw: Path, used: set[str]) -> None:
    """Say which files below RAW are not used: `used` are paths relative to RAW."""
    left_out = [path for path in list_files(raw) if path.relative_to(raw).as_posix() not in used]
    if left_out:
        print(f"note: left out: {count_files(left_out, raw)}")


def describe_folder(folder: Path) -> str:
    """What lies in a folder where no layout was recognised, for a message."""
    if not folder.is_dir():
        return "a file"
    for below in list_folders(folder):
        if layout := recognise_layout(below):
            return f"one folder too high: {below.name} holds {layout}; use --data {below}"
    names = [f"{p.name}/" for p in list_folders(folder)]
    files = count_files((p for p in folder.iterdir() if p.is_file() and p.name[0] != "."), folder)
    inside = names[:5] + [f"and {len(names) - 5} more folders"] * (len(names) > 5) + [files] * bool(files)
    return f"found {', '.join(inside) or 'nothing'}"


def match_patient(regex: str, text: str) -> str:
    """What a regular expression finds in a file name: its first group, or all of it; "" for no match."""
    match = re.search(regex, text)
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group()) or ""


def find_rsna(raw: Path) -> tuple[list[str], list[Case]]:
    """RSNA Pneumonia Detection Challenge: one CSV row per box, merged per patient; label 1 = any box."""
    stage = "stage_2" if any(raw.glob("stage_2_train_*")) else "stage_1"
    table = raw / f"{stage}_train_labels.csv"
    folder = raw / f"{stage}_train_images"
    side_by_side = f"not found, expected {table.name} and {folder.name}/ side by side"
    if not table.exists():
        raise DataError(f"{table}: {side_by_side}")
    labels = read_rsna_labels(table)
    if not folder.exists():
        raise DataError(f"{folder}: {side_by_side}")
    files = {}
    for path in find_images(folder):
        if path.stem in files:
            raise DataError(f"{path}: a second file of patient {path.stem}, beside {files[path.stem]}")
        files[path.stem] = path
    cases = []
    for name in sorted(labels.keys() & files.keys()):
        source = files[name].relative_to(raw).as_posix()
        cases.append(Case(name, source, labels[name], patient=name))
    if not cases:
        found = count_files(list_files(folder), folder) or "nothing"
        raise DataError(
            f"{folder}: none of the {len(labels)} patients in {table.name} has a file here ({found})"
        )
    lost = labels.keys() - files.keys()
    if lost:
        print(f"note: {len(lost)} rows without a file left out, such as {min(lost)}")
    stray = files.keys() - labels.keys()
    if stray:
        print(f"note: {len(stray)} files without a row left out, such as {min(stray)}")
    report_left_out(raw, {table.name} | {path.relative_to(raw).as_posix() for path in files.values()})
    return ["no_pneumonia", "pneumonia"], cases


def read_rsna_labels(table: Path) -> dict[str, int]:
    """Labels by patientId from the challenge's CSV: patientId, x, y, width, height, Target, a row per box."""
    labels: dict[str, int] = {}
    for place, row in read_rows(table, ("patientId", "Target")):
        name = (row["patientId"] or "").strip()
        target = (row["Target"] or "").strip()
        if target not in ("0", "1") or not name:
            raise DataError(f"{place}: {name!r} has Target {target!r}, expected 0 or 1")
        if labels.setdefault(name, int(target)) != int(target):
            raise DataError(f"{place}: {name} has rows with Target 0 and with Target 1")
    return labels


def read_rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place (file:line) and values of every row of a CSV table that has these columns.

    Raises DataError that names the line: for a quote that is not closed, which would swallow all rows below,
    and for more fields than there are columns, as decimal commas make them.
    """
    if not table.is_file():
        raise DataError(f"{table}: not a file")
    text = table.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "")  # Python 3.10: no NUL
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True, strict=True)
    line = 1
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        missing = set(columns) - set(reader.fieldnames)
        if missing:
            raise DataError(f"{table}: no column {sorted(missing)}, found {reader.fieldnames}")
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                fields = len(reader.fieldnames) + len(row[None])
                found = f"{table}:{reader.line_num}: {fields} fields for {len(reader.fieldnames)} columns"
                raise DataError(f"{found}; decimal commas? expected points")
            yield f"{table}:{reader.line_num}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{table}:{line}: {error}, expected a closing quote") from error


def find_class_folders(raw: Path, regex: str | None) -> tuple[list[str], list[Case]]:
    """RAW/CLASS/... or RAW/{train,val,test}/CLASS/...; a folder below CLASS is a patient.

    Classes in alphabetical order. Folders called images are no patients, those called masks are left out.
    """
    split_folders = []
    for folder in list_folders(raw):
        if folder.name.lower() in SPLITS:
            split_folders.append((SPLITS[folder.name.lower()], folder))
    cases = []
    names = []
    unmatched = []
    classes_of = defaultdict(set)
    for split, split_folder in split_folders or [("", raw)]:
        for class_folder in list_folders(split_folder):
            check_no_set(class_folder)
            for path in find_images(class_folder):
                below = path.relative_to(class_folder)
                folders = [name for name in below.parts[:-1] if name.lower() not in ("image", "images")]
                if any(name.lower() in ("mask", "masks") for name in folders):
                    continue
                patient = match_patient(regex, below.as_posix()) if regex else (*folders, "")[0]
                if regex and not patient:
                    unmatched.append(path)
                source = path.relative_to(raw).as_posix()
                cases.append(Case(source, source, -1, patient, split))
                names.append(class_folder.name)
                classes_of[split].add(class_folder.name)
    if unmatched:
        raise DataError(f"--patient-regex {regex!r} finds nothing in {len(unmatched)} names: {unmatched[0]}")
    if not cases:
        raise DataError(f"{raw}: no images in its folders ({count_files(list_files(raw), raw) or 'nothing'})")
    check_class_names(raw, classes_of)
    classes = sorted(set().union(*classes_of.values()))
    for case, name in zip(cases, names, strict=True):
        case.label = classes.index(name)
    report_left_out(raw, {case.source for case in cases})
    return classes, cases


def check_no_set(class_folder: Path) -> None:
    """Raise DataError if what would be taken for a class is a data set by itself."""
    for folder in list_folders(class_folder):
        if folder.name.lower() in SPLITS or re.match("stage_[12]_train_", folder.name):
            what = f"{class_folder.name} holds {folder.name}/"
            raise DataError(f"{class_folder.parent}: one folder too high: {what}; use --data {class_folder}")


def check_class_names(raw: Path, classes_of: dict[str, set[str]]) -> None:
    """Raise DataError for a class of val or test that train lacks, or one that is spelled in two ways."""
    train = classes_of.get("train")
    for split, classes in classes_of.items():
        if any(map(has_control, classes)):
            raise DataError(f"{raw}: control characters in a class of {sorted(classes)}: rename the folder")
        if train and classes - train:
            raise DataError(
                f"{raw}: {split} has the classes {sorted(classes - train)}, which train has not: "
                f"expected {sorted(train)}, so rename the folders"
            )
        spellings = defaultdict(list)
        for name in sorted(classes):
            spellings[re.sub(r"[\W_]+", "", name).casefold()].append(name)
        for names in spellings.values():
            if len(names) > 1:
                raise DataError(
                    f"{raw}: {' and '.join(names)} look like one class: merge or rename the folders"
                )


def find_medmnist(raw: Path) -> tuple[list[str], list[Case]]:
    """MedMNIST v2 .npz: {split}_images uint8 (N, S, S[, 3]) and {split}_labels (N, 1), any of the splits."""
    paths = [raw] if raw.is_file() else sorted(raw.glob("*.npz"))
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
        if n and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
            found = f"{split}_labels from {labels.min()} to {labels.max()}"
            raise DataError(f"{path}: {found}, expected numbers of classes: 0 to {MAX_CLASSES - 1} at most")
        for i, label in enumerate(labels.reshape(-1)):
            name = f"{split}/{i}"
            cases.append(Case(name, f"{path.name}:{name}", int(label), name, split, images[i]))
    if not cases:
        raise DataError(f"{path}: arrays {sorted(arrays)}, expected train_images, train_labels and so on")
    return [str(k) for k in range(max(c.label for c in cases) + 1)], cases


# --- patients and folds ---


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


def choose_patients(sources: list[str], named: list[str], patient_ids: list[str]) -> list[str]:
    """A patient for each image: by the layout or --patient-regex, else the PatientID, else the file itself.

    One PatientID in every file is none but what anonymisation left: it is passed over, with a note. A file
    name stands for a patient without its folder, unless it occurs in several folders.
    """
    unnamed = [k for k, name in enumerate(named) if not name]
    distinct = {patient_ids[k] for k in unnamed if patient_ids[k]}
    is_placeholder = len(unnamed) > 1 and len(distinct) == 1
    if is_placeholder:
        print("note: one PatientID stands in every file, so it names no patient: each file counts as one")
        distinct = set()
    stems = Counter(Path(source).stem for source in sources)
    patients = list(named)
    alone = 0
    for k in unnamed:
        if patient_ids[k] in distinct:
            patients[k] = patient_ids[k]
            continue
        path = PurePosixPath(sources[k])
        patients[k] = path.stem if stems[path.stem] == 1 else path.with_suffix("").as_posix()
        alone += 1
    if alone and not is_placeholder:
        print(f"note: {alone} images name no patient (--patient-regex finds one in file names): each is one")
    return patients


def report_patients(groups: list[str]) -> None:
    """Say where folds and intervals rest on few patients, or on one more than on the others."""
    counts = Counter(groups)
    largest = max(counts.values())
    if len(counts) < 10:
        print(f"note: {len(counts)} patients only: folds are uneven, and intervals say little")
    elif largest > len(groups) / 5:
        print(f"note: one patient has {largest} of {len(groups)} images: folds are uneven")


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


def report_bad(bad: list[tuple[str, str]]) -> None:
    """Print why each file cannot be used; a missing decoder once, with the number of files.

    `bad` are pairs of source and a message that begins with the path.
    """
    messages = defaultdict(list)
    for source, message in bad:
        reason = message.split(f"{source}: ")[-1]
        messages[reason].append(message)
    for reason, same in messages.items():
        if "plugin" in reason and len(same) > 1:
            print(f"{same[0]} (and {len(same) - 1} more files)", file=sys.stderr)
        else:
            print(*same, sep="\n", file=sys.stderr)


def report_notes(notes: list[tuple[str, str]]) -> None:
    """Print what was passed over in reading, once for each kind: `notes` are pairs of source and note."""
    sources = defaultdict(list)
    for source, note in notes:
        sources[note].append(source)
    for note, files in sources.items():
        print(f"note: {len(files)} images: {note}, such as {files[0]}")


def check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise DataError if an output is an input by whatever name (links too), or a folder that holds one."""
    targets = {path.resolve() for path in outputs}
    files = {(status.st_dev, status.st_ino) for status in (path.stat() for path in targets if path.is_file())}
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


@contextmanager
def open_output(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes OUT at the end: a run that is stopped leaves OUT as it was.

    Raises DataError if OUT holds anything but a cache (--overwrite never deletes what is not ours), if
    another run writes to it (the lock ends with the process), or if something cannot be written.
    """
    partial, old, lock = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old", "lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            if fcntl:  # not on Windows
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(f"{out}: another run writes here; wait for it, or use another --out") from error
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
    found = {p.name for p in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    ours = {"images.npy", "volumes", "index.csv", "meta.json", "skipped.csv"}
    if found and not {"meta.json"} <= found <= ours:
        raise DataError(f"{out}: holds {min(found - ours or found)}, expected a new folder or a cache")
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
        raise DataError(f"{where}: {type(meta).__name__}, expected names and values; preprocess again")
    classes = meta.get("classes")
    good = {
        "classes": isinstance(classes, list) and len(set(map(str, classes))) == len(classes) >= 2,
        "size": type(meta.get("size")) is int and 8 <= meta["size"] <= 4096,
        "fit": meta.get("fit") in ("squash", "pad"),
        "mean": is_number(meta.get("mean")),
        "std": is_number(meta.get("std"), 0),
    }
    for name, fits in good.items():
        if not fits:
            found = f"{where}: {name} {meta.get(name)!r}, which is not that of a cache of"
            raise DataError(f"{found} {Path(__file__).parent.name}/preprocess.py; preprocess again")


# --- the command ---


def default_workers() -> int:
    """As many threads as this process may use, at most 8: each holds an image as large as its file says."""
    if hasattr(os, "sched_getaffinity"):  # on a shared node fewer than os.cpu_count()
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


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
    add("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
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


def order_classes(
    raw: Path, layout: str, classes: list[str], cases: list[Case], wanted: list[str] | None
) -> list[str]:
    """Put the cases into the wanted class order: matched by name (class folders), or numbers get names."""
    if len(wanted or classes) < 2:
        raise DataError(f"{raw}: {describe_folder(raw)}; expected a folder for each of two or more classes")
    if wanted is None:
        check_positive_class(classes)
        return classes
    if len(set(wanted)) != len(wanted):
        raise DataError(f"--classes {' '.join(wanted)}: expected each class once")
    by_name = layout == "class folders"
    if (by_name and not set(classes) <= set(wanted)) or len(classes) > len(wanted):
        raise DataError(f"{raw}: classes in the data {classes}, expected {wanted}")
    if by_name:
        for case in cases:
            case.label = wanted.index(classes[case.label])
    return wanted


def positive_class(classes: list[str]) -> str | None:
    """The class that sensitivity, precision and AUROC are about: the last of two, None of more."""
    return classes[1] if len(classes) == 2 else None


def check_positive_class(classes: list[str]) -> None:
    """Raise DataError if alphabetical order makes the class without a finding the positive one."""
    positive = positive_class(classes)
    if positive and NO_FINDING.search(positive):
        raise DataError(
            f"{positive!r} would be the positive class, because it comes last: give the order, for example "
            f"--classes {shlex.join(reversed(classes))} (or, if it is meant, --classes {shlex.join(classes)})"
        )


def load(
    case: Case, raw: Path, size: int, fit: str
) -> tuple[np.ndarray, str, str, tuple[str, ...]] | DataError:
    """Read and resize one case: uint8 (size, size), hash of its pixels, hashed PatientID and notes.

    Returns the DataError that says why it cannot be used.
    """
    if not is_utf8(case.source):
        return DataError(f"{case.source}: the name is not UTF-8, which index.csv is: rename the file")
    if has_control(case.source):
        return DataError(f"{case.source}: control characters in the name: rename the file")
    if case.pixels is not None:
        notes = []
        pixels = case.pixels if case.pixels.ndim == 3 else case.pixels[..., None]
        gray = colour_to_gray(pixels, 255, notes)
        return resize(gray, size, fit), hash_pixels(case.pixels), "", tuple(notes)
    try:
        picture = read_image(raw / case.source)
    except DataError as error:
        return error
    return resize(picture.gray, size, fit), picture.digest, picture.patient, picture.notes


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
    classes = order_classes(args.data, layout, classes, cases, args.classes or like.get("classes"))
    if like and classes != like["classes"]:
        raise DataError(f"--classes {classes}, but {args.like} has {like['classes']}")
    if args.test_fraction and any(case.split for case in cases):
        raise DataError(f"{args.data}: has an official split, which --test-fraction cannot change")
    native = 224 if cases[0].pixels is None else len(cases[0].pixels)
    size, fit = like.get("size") or args.size or native, like.get("fit") or args.fit or "squash"
    print(f"{args.data}: {layout}, {len(cases)} images of {' '.join(classes)}, to {size}x{size} ({fit})")
    if positive := positive_class(classes):
        print(f"positive class: {positive}")

    # every image once: read, resize, write; what fails is collected, so that one run names it all
    kept, digests, patient_ids, moments = [], [], [], []
    bad, notes = [], []

    def good_images() -> Iterator[np.ndarray]:
        results = in_threads(partial(load, raw=args.data, size=size, fit=fit), cases, args.workers)
        for case, result in zip(cases, results, strict=True):
            if isinstance(result, DataError):
                bad.append((case.source, str(result)))
                continue
            image, digest, patient_id, image_notes = result
            kept.append(case)
            digests.append(digest)
            patient_ids.append(patient_id)
            notes.extend((case.source, note) for note in image_notes)
            moments.append((image.mean(dtype=np.float64) / 255, np.square(image / 255).mean()))
            yield image

    out = args.out.resolve()
    with open_output(out, args.overwrite) as folder:
        write_npy(folder / "images.npy", good_images(), (size, size))
        report_bad(bad)
        report_notes(notes)
        if bad and not (args.skip_bad and kept):
            raise DataError(f"{len(bad)} of {len(cases)} files cannot be used: mend them, or use --skip-bad")
        if bad:
            with open(
                folder / "skipped.csv", "w", newline="", encoding="utf-8", errors="backslashreplace"
            ) as file:
                csv.writer(file).writerows([("source", "reason"), *bad])

        # patients, folds, index
        patients = choose_patients(
            [case.source for case in kept], [case.patient for case in kept], patient_ids
        )
        groups = group_patients(patients, digests)
        report_patients(groups)
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
            "classes": classes, "positive_class": positive_class(classes), "size": size, "fit": fit,
            "layout": layout, "n": len(kept), "counts": counts,
            "mean": like.get("mean", mean), "std": like.get("std", float(np.sqrt(square - mean**2))),
            "overlaps": overlaps, "skipped": len(bad),
            "options": {k: str(v) for k, v in vars(args).items() if v},
            "versions": {m.__name__: m.__version__ for m in (np, PIL, pydicom)},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    command = "eval.py --checkpoint runs/classification/best.pt --split test" if like else "train.py"
    print(f"next: python classification/{command} --data {args.out}")


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
