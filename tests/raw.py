"""Small raw files that tests write: drawn pictures, DICOM of 12 or 8 bits, tables; and what was made of them."""

import json
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from common.checkpoint import DataError
from tests.caches import preprocess, read_rows


def noise(name: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(0, 256, shape or (12, 12), dtype=np.uint8)


def element(keyword: str, vr: str, value: object) -> pydicom.DataElement:
    """An element with a VR that pydicom would not choose."""
    return pydicom.DataElement(pydicom.datadict.tag_for_keyword(keyword), vr, value)


def dataset(pixels: object, **header: object) -> pydicom.Dataset:
    """An uncompressed DICOM of 12 bits, or 8 for uint8. A header value of None removes the element."""
    pixels = np.atleast_2d(pixels)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype("<i2" if pixels.min() < 0 else "<u2")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = "1.2.3"
    ds.PatientID = "Doe^1234"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    ds.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.itemsize
    ds.BitsStored = min(ds.BitsAllocated, 12)
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    ds["PixelData"].VR = "OW"
    for name, value in header.items():
        if isinstance(value, pydicom.DataElement):
            ds.add(value)
        elif value is None:
            ds.pop(name, None)
        else:
            setattr(ds, name, value)
    return ds


def dicom(path: Path, pixels: object, **header: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(pixels, **header).save_as(path, enforce_file_format=True)
    return path


def draw(raw: Path, names: str) -> Path:
    """Pictures below raw by their names, separated by blanks: noise that depends on the name."""
    for name in names.split():
        path = raw / (name if Path(name).suffix else f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(name)).save(path)
    raw.mkdir(parents=True, exist_ok=True)
    return raw


def table(raw: Path, text: str, files: str = "a b c d", name: str = "labels.csv") -> Path:
    """Drawn pictures and a table, whose rows are separated by blanks in `text`; ~ is a blank."""
    draw(raw, files)
    lines = text.replace(" ", "\n").replace("~", " ")
    (raw / name).write_text(f"{lines}\n", encoding="utf-8")
    return raw


def run(raw: Path, options: str = "", task: str = "classification", out: str = "out") -> tuple:
    """Preprocess: images.npy, the rows of index.csv, meta.json."""
    cache = raw.parent / out
    preprocess(task, raw, cache, options)
    meta = json.loads((cache / "meta.json").read_text())
    return np.load(cache / "images.npy"), read_rows(cache), meta


def refused(
    words: str, raw: Path, options: str = "", task: str = "classification", out: str = "out"
) -> str:
    """The message of a run that fails, which has these words (a regular expression) in it."""
    with pytest.raises(DataError, match=words) as error:
        run(raw, options, task, out)
    assert not (raw.parent / out).exists()
    return str(error.value)
