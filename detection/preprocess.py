"""Turn raw chest X-rays with one box around the heart into one small array and an index.

  python detection/preprocess.py --data heart_xray --out data/heart
  python detection/preprocess.py --data rsna --out data/rsna_heart
  python detection/preprocess.py --data heart_xray --out data/sites --group-regex "^[a-z]+" --test-group jsrt
  python detection/preprocess.py --data other_hospital --out data/other --like data/heart

Layouts of RAW, recognised by what lies in it:
  boxes.csv                   image,xmin,ymin,xmax,ymax in pixels of the original image as it is shown, max
                              exclusive; the images beside it or in images/
  rsna_heart_detection.csv    name,x0,y0,w,h in 224x224 coordinates; the images anywhere below RAW
Images are DICOM, JPEG, PNG or TIFF, known by their content.

Written to OUT: images.npy uint8 (N, S, S); index.csv (id, patient, fold, group, box and size of the original
image, source); meta.json.
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
MORE_DECODERS = "more decoders: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
FOLDS = 5
MAX_PIXELS = 2**27  # of an image: five times the largest X-rays


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


def prepare(picture: np.ndarray, size: int) -> np.ndarray:
    """What the network sees of a picture: gray values stretched, then uint8 (size, size).

    Scanners differ in range far more than hearts do: 1 % of the pixels on either side (borders, labels) clip.
    """
    return resize(stretch(picture, *np.percentile(picture, (1, 99))), size, "squash")


# --- finding the cases ---


@dataclass
class Case:
    """One image with its box before it is read."""

    id: str
    source: str  # path below RAW
    box: tuple[float, ...]  # xmin, ymin, xmax, ymax in pixels, or in units of `grid`
    grid: int = 0  # the box is in coordinates of an image squashed to (grid, grid); 0 = of the image itself
    patient: str = ""  # "" = the DICOM PatientID, or else the file
    group: str = ""
    size: tuple[int, int] = (0, 0)  # height and width in pixels, once it is read
    spacing: tuple[float, ...] = ()  # mm per pixel down and across, where the file says


def read_table(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """Place (file:line), name (first column) and numbers (the others; NaN if they are none) of every row."""
    for place, row in read_rows(table, columns):
        values = tuple(read_number(row[column]) for column in columns[1:])
        yield place, (row[columns[0]] or "").strip(), values


def read_number(text: str | None) -> float:
    """A number as tables have it, NaN for anything else: Python alone would read 1_0 as 10."""
    try:
        return math.nan if "_" in (text or "_") else float(text)
    except ValueError:
        return math.nan


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


def find_cases(
    raw: Path, regex: str | None, patient_regex: str | None
) -> tuple[str, list[Case], list[tuple]]:
    """Recognise the layout of RAW: its name, the cases, and (source, reason) of what cannot be one."""
    if not raw.is_dir():
        raise DataError(f"{raw}: not a folder")
    layout = recognise_layout(raw)
    if layout == "boxes.csv":
        cases, bad = find_boxes_csv(raw)
    elif layout == "RSNA heart boxes":
        cases, bad = find_rsna_hearts(raw)
    else:
        raise DataError(f"{raw}: {describe_folder(raw)}; expected boxes.csv or rsna_heart_detection.csv")
    again = {name for name, reason in bad if ": a second box" in reason}  # nobody knows which one is right
    cases = [case for case in cases if case.id not in again]
    if not cases and not bad:
        raise DataError(f"{raw}: {layout} names no image that is here")
    for case in cases:
        name = Path(case.source).name
        if regex:
            case.group = match_patient(regex, name)
            if not case.group:
                raise DataError(f"--group-regex {regex!r} finds nothing in {case.source}")
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


def find_boxes_csv(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """boxes.csv: one row per image, every image in it. Also returns (source, reason) of what is wrong."""
    table = raw / "boxes.csv"
    folder = raw / "images" if (raw / "images").is_dir() else raw
    files = {path.name: path for path in find_images(folder) if path.parent == folder}
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
    report_left_out(raw, {table.name} | {path.relative_to(raw).as_posix() for path in files.values()})
    return cases, bad


def find_rsna_hearts(raw: Path) -> tuple[list[Case], list[tuple[str, str]]]:
    """rsna_heart_detection.csv: boxes at 224x224 for some of the RSNA images; only those are read."""
    table = raw / "rsna_heart_detection.csv"
    files = defaultdict(list)
    for path in find_images(raw):
        files[path.stem].append(path)
    cases, bad, seen, missing = [], [], {}, []
    for place, name, (x, y, w, h) in read_table(table, ("name", "x0", "y0", "w", "h")):
        name = name.removesuffix(".dcm")
        if name in seen:
            bad.append((name, f"{place}: a second box for {name}, first in line {seen[name]}"))
        elif name not in files:
            missing.append(name)
        elif len(files[name]) > 1:
            bad.append(
                (name, f"{place}: {len(files[name])} files for {name}: {files[name][0]}, {files[name][1]}")
            )
        else:
            source = files[name][0].relative_to(raw).as_posix()
            cases.append(Case(name, source, (x, y, x + w, y + h), grid=224, patient=name))
        seen.setdefault(name, place.rsplit(":", 1)[1])
    if missing:
        print(f"note: {len(missing)} of {len(seen)} images named in {table.name} are not here: {missing[0]}")
    return cases, bad


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
    good = {
        "size": type(meta.get("size")) is int and 32 <= meta["size"] <= 4096,
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
    add("--data", type=Path, required=True, metavar="RAW", help="the raw images and boxes")
    add("--out", type=Path, required=True, metavar="DIR", help="the cache to write")
    add("--size", type=int, help="pixels per side (default: 224)")
    add("--patient-regex", help="finds the patient in a file name, as its first group if any")
    add("--group-regex", help="finds the group (a site, say) in a file name, as its first group if any")
    add("--test-group", metavar="NAME", help="keep this group as test")
    add("--test-fraction", type=float, default=0.0, help="part of the patients kept as test (default: 0)")
    add("--like", type=Path, metavar="CACHE", help="a test set for the models of this cache: its size, mean "
        "and std, every row test")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
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
    for option, regex in (("--group-regex", args.group_regex), ("--patient-regex", args.patient_regex)):
        try:
            re.compile(regex or "")
        except re.error as error:
            parser.error(f"{option} {regex!r}: {error}")
    return args


def load(case: Case, raw: Path, size: int) -> tuple[np.ndarray, str, str, tuple[str, ...]] | DataError:
    """Read and resize one case: uint8 (size, size), hash of its pixels, hashed PatientID and notes.

    Returns the DataError that says why it cannot be used. The box becomes one in pixels of the original
    image as it is shown.
    """
    if not is_utf8(case.source):
        return DataError(f"{case.source}: the name is not UTF-8, which index.csv is: rename the file")
    if has_control(case.source):
        return DataError(f"{case.source}: control characters in the name: rename the file")
    try:
        picture = read_image(raw / case.source)
    except DataError as error:
        return error
    height, width = picture.gray.shape
    case.size = (height, width)
    case.spacing = picture.spacing
    if case.grid:
        scale = (width / case.grid, height / case.grid) * 2
        case.box = tuple(round(v * s, 3) for v, s in zip(case.box, scale, strict=True))
    xmin, ymin, xmax, ymax = case.box
    if not (0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height):  # also true for NaN
        expected = f"expected 0 <= xmin < xmax <= {width}, 0 <= ymin < ymax <= {height}"
        return DataError(f"{raw / case.source}: box {case.box}, {expected}")
    return prepare(picture.gray, size), picture.digest, picture.patient, picture.notes


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
    layout, cases, bad = find_cases(args.data, args.group_regex, args.patient_regex)
    groups = sorted({case.group for case in cases})
    if args.test_group and args.test_group not in groups:
        raise DataError(f"--test-group {args.test_group}, found the groups {groups}")
    total, size = len(cases) + len(bad), like.get("size") or args.size or 224
    print(f"{args.data}: {layout}, {len(cases)} images with a box, to {size}x{size}")

    # every image once: read, resize, write; what fails is collected, so that one run names it all
    kept, digests, patient_ids, moments, notes = [], [], [], [], []

    def good_images() -> Iterator[np.ndarray]:
        results = in_threads(partial(load, raw=args.data, size=size), cases, args.workers)
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
            raise DataError(f"{len(bad)} of {total} images cannot be used: mend them, or use --skip-bad")
        if bad:
            with open(
                folder / "skipped.csv", "w", newline="", encoding="utf-8", errors="backslashreplace"
            ) as file:
                csv.writer(file).writerows([("source", "reason"), *bad])

        # patients, folds, index
        patients = choose_patients(
            [case.source for case in kept], [case.patient for case in kept], patient_ids
        )
        patients = group_patients(patients, digests)
        report_patients(patients)
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
    command = "eval.py --checkpoint runs/detection/best.pt --split test" if like else "train.py"
    print(f"next: python detection/{command} --data {args.out}")


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
