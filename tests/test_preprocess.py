"""classification/preprocess.py: tiny raw sets of every layout, pictures against hand-computed values."""

import csv
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import get_decoder
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1

from classification import preprocess
from classification.preprocess import (
    DataError,
    assign_folds,
    group_patients,
    main,
    read_image,
    resize,
)

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")
SPLITS = ("train", "val", "test")
ROOT = Path(__file__).resolve().parents[1]
HASH = hashlib.sha256(b"Doe^1234").hexdigest()[:12]


def noise(name: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(0, 256, shape or (12, 12), dtype=np.uint8)


def shown(path: Path) -> np.ndarray:
    """The gray of a file in 0..1, whether it is read as bytes or as floats."""
    gray = read_image(path).gray
    assert gray.dtype in (np.uint8, np.float32)
    return gray / 255 if gray.dtype == np.uint8 else gray


def dicom(path: Path, pixels: object, lut: tuple = (), **header: object) -> Path:
    """An uncompressed DICOM of 12 bits, or 8 for uint8; lut = first value, bits, entries of a VOI LUT."""
    pixels = np.atleast_2d(pixels)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype("<i2" if pixels.min() < 0 else "<u2")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = (
        ComputedRadiographyImageStorage,
        "1.2.3",
        "Doe^1234",
    )
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *pixels.shape[:2], 3 if pixels.ndim == 3 else 1
    ds.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    ds.BitsAllocated, ds.PixelRepresentation = pixels.itemsize * 8, int(pixels.dtype.kind == "i")
    ds.BitsStored = min(ds.BitsAllocated, 12)
    ds.HighBit, ds.RescaleIntercept, ds.PlanarConfiguration = ds.BitsStored - 1, 0, 0
    ds.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    ds["PixelData"].VR = "OW"
    if lut:
        item = pydicom.Dataset()
        item.add_new("LUTDescriptor", "SS" if lut[0] < 0 else "US", [len(lut[2]), *lut[:2]])
        item.add_new("LUTData", "US", [int(v) for v in lut[2]])
        ds.VOILUTSequence = pydicom.Sequence([item])
    for name, value in header.items():
        if isinstance(value, pydicom.DataElement):
            ds.add(value)
        else:
            setattr(ds, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def folders(raw: Path, names: str, pixels: np.ndarray | None = None) -> Path:
    """PNG files below raw, by their names without the suffix: noise that depends on the name, or `pixels`."""
    for name in names.split():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(name) if pixels is None else pixels).save(raw / f"{name}.png")
    return raw


def rsna(
    raw: Path, rows: str, files: str, header: str = "patientId,x,Target", stage: int = 2
) -> Path:
    (raw / f"stage_{stage}_train_images").mkdir(parents=True)
    (raw / f"stage_{stage}_train_labels.csv").write_text("\n".join([header, *rows.split()]))
    for name in files.split():
        dicom(raw / f"stage_{stage}_train_images" / f"{name}.dcm", noise(name))
    return raw


def run(raw: Path, *options: str, out: str = "out") -> tuple[np.ndarray, list[dict], dict]:
    """Call main: images.npy as a memory map, the rows of index.csv, meta.json."""
    out = raw.parent / out
    main(["--data", str(raw), "--out", str(out), *options])
    images = np.load(out / "images.npy", mmap_mode="r")
    rows = list(csv.DictReader((out / "index.csv").open()))
    meta = json.loads((out / "meta.json").read_text())
    assert images.dtype == np.uint8 and images.shape == (len(rows), meta["size"], meta["size"])
    assert (out / "images.npy").stat().st_size == 128 + images.nbytes and meta["n"] == len(rows)
    return images, rows, meta


def refused(reason: str, raw: Path, *options: str, **kwargs: str) -> None:
    with pytest.raises(DataError, match=reason):
        run(raw, *options, **kwargs)


def window(center: object, width: object, **header: object) -> dict:
    return {"WindowCenter": center, "WindowWidth": width, **header}


INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}
HALF = window(1000.5, 1001)  # LINEAR: 500 and less -> 0, 1000 -> 0.5, 1500 and more -> 1
DEEP = np.arange(1001, dtype=np.uint16)
STRETCHED = ((DEEP - 5.0) / 990).clip(0, 1)  # the 0.5 and the 99.5 percentile are 5 and 995
GRAY = np.uint8([[0, 51], [102, 255]])
PRIMARY = np.uint16([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])


@pytest.mark.parametrize("pixels, expected, header", [
    ([0, 500, 1000, 1250, 1500, 4095], [0, 0, 0.5, 0.75, 1, 1], HALF),
    ([0, 500, 1000, 1250, 1500, 4095], [1, 1, 0.5, 0.25, 0, 0], HALF | INVERTED),
    ([0xF000, 0xF000 + 1250, 0x3000 + 4095], [0, 0.75, 1], HALF),  # unused high bits that are not 0
    ([250, 500, 625, 4095], [0, 0.5, 0.75, 1], window(0.5, 1001, RescaleSlope=2, RescaleIntercept=-1000)),
    ([0, 819, 4095], [1, 0.8, 0], window(2048, 4096, RescaleSlope=-1, RescaleIntercept=4095)),
    ([-1500, -250, 0, 1500], [0, 0.25, 0.5, 1], window(0.5, 1001)),
    ([1250, 1500, 0], [0.75, 1, 0], window([1000.5, 9], [1001, 9], VOILUTFunction="")),
    ([0, 1000, 4000], [0, 0.5, 1], window(0.1, 0.2, VOILUTFunction="LINEAR_EXACT", RescaleSlope=1e-4)),
    ([1750, 2000], [1 / (1 + np.e), 0.5], window(2000, 1000, VOILUTFunction="SIGMOID")),
    ([0, 100, 101, 102, 4095], [0, 0, 0.25, 0.75, 1], HALF | {"lut": (100, 12, [0, 1000, 3000, 4000])}),
    ([0, 1600, 4095], [0, 100 / 255, 1], {"lut": (0, 8, np.arange(4096) // 16)}),  # 12 bits in, 8 out
    ([0, 1, 4095], [0.5, 0.75, 1], {"lut": (-2, 16, range(5))}),
    (np.uint8([0, 51, 102]), [0, 0.2, 0.4], {}),
    (np.uint8([0, 51, 102]), [1, 0.8, 0.6], INVERTED),
    (np.uint8([0, 51, 102]), [1, 0.8, 0.6], {"RescaleSlope": -1}),
    (np.uint8([0, 51, 102]), [0, 0.2, 0.4], window(5, 0)),  # no valid window
    (np.uint8([9, 51, 102]), [0, 0.2, 0.4], {"PixelPaddingValue": 9}),
    (np.uint8([9, 51, 102]), [0, 0.8, 0.6], {"PixelPaddingValue": 9} | INVERTED),
    ([DEEP, DEEP * 0 + 4095], [STRETCHED, DEEP * 0], {"PixelPaddingValue": 4095}),
    ([DEEP, DEEP + 2000], [STRETCHED, DEEP * 0], {"PixelPaddingValue": 2000, "PixelPaddingRangeLimit": 4095}),
    (np.uint8(PRIMARY), [[0.299, 0.587, 0.114]], {}),
    (PRIMARY // 255 * 4095, [[0.299, 0.587, 0.114]], {}),
    (np.uint8([[[76, 85, 255], [200, 128, 128]]]), [[0.299 * 254 / 255, 200 / 255]],
     {"PhotometricInterpretation": "YBR_FULL"}),  # PS3.3 C.7.6.3.1.2: (254, 0, 0) and a gray
])  # fmt: skip
def test_dicom_by_hand(tmp_path, pixels, expected, header):
    path = dicom(tmp_path / "a.dcm", pixels, **header)
    np.testing.assert_allclose(shown(path), np.atleast_2d(expected), atol=1e-6)
    assert read_image(path).patient == HASH


@pytest.mark.parametrize("reason, header", [
    ("No suitable Palette Color", {"PhotometricInterpretation": "PALETTE COLOR"}),
    ("YBR_PARTIAL_420", {"PhotometricInterpretation": "YBR_PARTIAL_420"}),
    ("without pixel data", {"PixelData": None}),
    ("2 frames", {"NumberOfFrames": 2}),
    ("expected a single image", {"Rows": 1}),  # pixels of a second frame that the header does not count
    ("bytes of pixel data is less", {"Rows": 9}),
    ("window 9999/2 shows none of 1 to 4$", window(9999, 2)),
])  # fmt: skip
def test_dicom_refused(tmp_path, reason, header):
    path = dicom(tmp_path / "a.dcm", [[1, 2], [3, 4]], **header)
    with pytest.raises(DataError, match=rf"{path}: .*{reason}"):
        read_image(path)


def test_files_of_pydicom():
    """Odd files of real devices: a picture or a DataError, never another exception; decoders are named."""
    pictures, refusals = [], {}
    for path in sorted((Path(pydicom.__file__).parent / "data").rglob("*.dcm")):
        try:
            pictures.append(shown(path))
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
            refusals[path.name] = str(error)
    assert len(pictures) > 40 and all(p.ndim == 2 for p in pictures)
    assert all(0 <= p.min() < p.max() <= 1.000001 for p in pictures)
    if not get_decoder(JPEGLosslessSV1).is_available:
        assert "pylibjpeg-libjpeg" in refusals["SC_rgb_jpeg_gdcm.dcm"]


@pytest.mark.parametrize("image, name, expected, options", [
    (Image.fromarray(GRAY), "a.png", GRAY / 255, {}),
    (Image.fromarray(GRAY).convert("RGBA"), "a.tif", GRAY / 255, {}),
    (Image.fromarray(GRAY).convert("P"), "a.PNG", GRAY / 255, {}),
    (Image.fromarray(GRAY > 60), "a.png", GRAY > 60, {}),
    (Image.fromarray(np.uint8(PRIMARY)), "a.png", [[76 / 255, 150 / 255, 29 / 255]], {}),
    (Image.fromarray(DEEP[None]), "a.png", [STRETCHED], {}),
    (Image.fromarray(DEEP[None]), "a.tiff", [STRETCHED], {}),
    (Image.fromarray(DEEP[None]), "a.tif", [1 - STRETCHED], {"tiffinfo": {262: 0}}),  # WhiteIsZero
    (Image.fromarray(np.float32(DEEP[None])), "a.tif", [STRETCHED], {}),
    (Image.fromarray(np.float32([[1, np.nan]])), "a.tif", "no contrast", {}),
    (Image.fromarray(GRAY), "a.tif", "2 frames",
     {"save_all": True, "append_images": [Image.new("L", (1, 1))]}),
])  # fmt: skip
def test_pictures_by_hand(tmp_path, image, name, expected, options):
    image.save(tmp_path / name, **options)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"{tmp_path / name}: {expected}"):
            read_image(tmp_path / name)
    else:
        np.testing.assert_allclose(shown(tmp_path / name), expected, atol=1e-6)


def test_resize():
    white = np.ones((4, 8), np.float32)
    assert (resize(white, 8, "squash") == 255).all()
    np.testing.assert_array_equal(resize(white, 8, "pad")[:, 3], [0, 0, 255, 255, 255, 255, 0, 0])
    thin = np.eye(64, dtype=np.float32)
    assert resize(thin, 8, "squash").max() < 64  # antialiased: thin lines grow faint


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_bytes_and_floats_of_a_picture_are_resized_alike(fit):
    levels = noise("levels", 90, 70)
    floats = resize(levels.astype(np.float32) / 255, 31, fit)
    # Beside the last bit of a float there is nothing between them.
    assert (resize(levels, 31, fit) != floats).mean() < 0.001
    rounded = Image.fromarray(levels).resize((31, 31), Image.Resampling.BILINEAR)
    assert fit == "pad" or (np.asarray(rounded) != floats).mean() > 0.01  # what is not done


def test_bytes_stay_bytes_where_the_header_changes_nothing(tmp_path):
    levels = noise("levels", 40, 30)
    as_stored = dicom(tmp_path / "a.dcm", levels)
    inverted = dicom(tmp_path / "b.dcm", levels, PhotometricInterpretation="MONOCHROME1")
    windowed = dicom(tmp_path / "c.dcm", levels, **window(100, 50))
    padded = dicom(tmp_path / "d.dcm", levels, PixelPaddingValue=int(levels[0, 0]))
    assert (read_image(as_stored).gray == levels).all()
    assert (read_image(inverted).gray == 255 - levels).all()
    assert read_image(windowed).gray.dtype == np.float32
    assert (read_image(padded).gray == np.where(levels == levels[0, 0], 0, levels)).all()
    assert read_image(padded).digest == read_image(as_stored).digest  # of what is stored


@pytest.mark.parametrize("stage", [1, 2])
def test_rsna(tmp_path, stage, capsys):
    raw = rsna(tmp_path / "raw", "b,5,1 a,,0 b,7,1 lost,,0", "a b stray", stage=stage)
    images, rows, meta = run(raw, "--size", "12")
    assert [(row["id"], row["patient"], row["label"]) for row in rows] == [
        ("a", "a", "0"),
        ("b", "b", "1"),
    ]
    assert (
        rows[1]["source"] == f"stage_{stage}_train_images/b.dcm" and (images[1] == noise("b")).all()
    )
    assert meta["classes"] == ["no_pneumonia", "pneumonia"] and meta["layout"] == "RSNA challenge"
    printed = capsys.readouterr().out
    assert "1 rows without a file left out, such as lost" in printed
    assert "1 files without a row left out, such as stray" in printed
    assert run(raw, "--overwrite", "--classes", "healthy", "ill")[2]["classes"] == [
        "healthy",
        "ill",
    ]
    table = raw / f"stage_{stage}_train_labels.csv"
    table.write_text("patientId,Target", encoding="utf-16")
    refused(r"labels\.csv: no column", raw)
    table.unlink()
    refused(r"labels\.csv: not found", raw)


@pytest.mark.parametrize("reason, rows, header", [
    (r"labels\.csv:3: a has rows with Target 0 and with Target 1", "a,,0 a,,1", "patientId,x,Target"),
    (r"labels\.csv:2: 'a' has Target '2', expected 0 or 1", "a,,2", "patientId,x,Target"),
    (r"labels\.csv:2: 'a' has Target ''", "a", "patientId,x,Target"),
    (r"labels\.csv: no column \['Target'\], found \['patientId', 'label'\]", "a,1", "patientId,label"),
    (r"labels\.csv: no column", "", ""),
    ("none of the 1 patients", "b,,0", "patientId,x,Target"),
])  # fmt: skip
def test_rsna_refused(tmp_path, reason, rows, header):
    refused(reason, rsna(tmp_path / "raw", rows, "a", header))


def test_class_folders(tmp_path, capsys):
    raw = folders(tmp_path / "raw", "NORMAL/p1_a NORMAL/p1_b NORMAL/p2_a COVID/p3_a .cache/p4_a")
    for name in (
        "NORMAL/._p1_a.png",
        "NORMAL/scan.bmp",
    ):  # what macOS leaves behind; a type that is not read
        (raw / name).write_bytes(b"x")
    order = ("--classes", "COVID", "NORMAL")
    images, rows, meta = run(raw, *order, "--patient-regex", "(p[0-9])_", "--size", "12")
    assert "note: left out: 1 .bmp\n" in capsys.readouterr().out
    assert [row["patient"] for row in rows] == ["p3", "p1", "p1", "p2"] and rows[1]["fold"] == rows[
        2
    ]["fold"]
    for image, row in zip(images, rows, strict=True):
        assert (image == noise(row["id"].removesuffix(".png"))).all() and row["id"] == row["source"]
    assert meta["classes"] == ["COVID", "NORMAL"]
    assert (meta["mean"], meta["std"]) == pytest.approx(
        ((images / 255).mean(), (images / 255).std())
    )

    _, rows, meta = run(raw, "--overwrite", "--classes", "NORMAL", "COVID", "--patient-regex", "p.")
    assert meta["classes"] == ["NORMAL", "COVID"] and [row["label"] for row in rows] == [
        "1",
        "0",
        "0",
        "0",
    ]
    assert [row["patient"] for row in rows] == ["p3", "p1", "p1", "p2"]
    refused(r"in 3 names: .*p1_a\.png", raw, "--patient-regex", "p3")
    refused(
        r"\['COVID', 'NORMAL'\], expected \['NORMAL', 'ILL'\]", raw, "--classes", "NORMAL", "ILL"
    )
    refused(
        "found A/; expected a folder for each of two or more", folders(tmp_path / "one", "A/1 A/2")
    )


def test_official_split(tmp_path, capsys):
    names = " ".join(
        f"train/{c}/{c}{k} val/{c}/v{c}{k} test/{c}/t{c}{k}" for c in "AB" for k in range(12)
    )
    raw = folders(
        tmp_path / "raw", f"{names} train/A/p9/1 test/A/p9/2 test/A/A1"
    )  # p9 lies on both sides
    _, rows, meta = run(raw)
    found = {(row["id"].split("/")[0], row["fold"]) for row in rows}
    assert found == {("val", "0"), ("test", "test"), *(("train", fold) for fold in "1234")}
    assert meta["classes"] == ["A", "B"] and list(meta["overlaps"].values()) == [0, 0, 1]
    printed = capsys.readouterr().out
    assert "1 patients on both sides of an official split" in printed and "too few" not in printed
    refused("official split", raw, "--test-fraction", "0.2", "--overwrite")


def test_an_official_validation_set_that_is_too_small_to_choose_by_is_noted(tmp_path, capsys):
    names = " ".join(f"train/{c}/{c}{k}" for c in "AB" for k in range(20))
    run(folders(tmp_path / "raw", f"{names} val/A/v val/B/w"))
    note = "note: fold 0 has, as given, only 2 of 42: too few to choose by; "
    assert f"{note}train.py --fold 1 validates on 10" in capsys.readouterr().out


@pytest.mark.parametrize("color", [(), (3,)])
@pytest.mark.parametrize("splits", [SPLITS, ("train", "test"), ("train",)])
def test_medmnist(tmp_path, splits, color):
    arrays = {
        f"{split}_images": np.asfortranarray(noise(split, 40, 9, 9, *color)) for split in splits
    }
    labels = {f"{split}_labels": np.arange(40, dtype=np.uint8)[:, None] % 3 for split in splits}
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw/mini.npz", **arrays, **labels)
    images, rows, meta = run(tmp_path / "raw")
    expected = np.concatenate(list(arrays.values()))
    np.testing.assert_allclose(
        images, expected @ [0.299, 0.587, 0.114] if color else expected, atol=0.51
    )
    assert meta["classes"] == ["0", "1", "2"] and [row["label"] for row in rows[:4]] == [
        "0",
        "1",
        "2",
        "0",
    ]
    folds = {"train": "1234" if "val" in splits else "01234", "val": "0", "test": ["test"]}
    found = {(row["id"].split("/")[0], row["fold"]) for row in rows}
    assert found == {(split, fold) for split in splits for fold in folds[split]}
    assert run(tmp_path / "raw/mini.npz", "--size", "16")[0].shape[1:] == (16, 16)


@pytest.mark.parametrize("reason, split, images, labels", [
    (r"train_labels int64 \(4, 2, 7\)", "train", noise("a", 4, 8, 8), (4, 2, 7)),
    (r"train_labels int64 \(3, 1\)", "train", noise("a", 4, 8, 8), (3, 1)),
    (r"train_images uint8 \(4, 8, 8, 8\)", "train", noise("a", 4, 8, 8, 8), (4, 1)),
    ("train_images float64", "train", np.ones((4, 8, 8)), (4, 1)),
    ("only test images", "test", noise("a", 4, 8, 8), (4, 1)),
    ("arrays .* expected train_images", "other", noise("a", 4, 8, 8), (4, 1)),
])  # fmt: skip
def test_medmnist_refused(tmp_path, reason, split, images, labels):
    path, labels = tmp_path / "a.npz", np.arange(np.prod(labels)).reshape(labels) % 2
    np.savez(path, **{f"{split}_images": images, f"{split}_labels": labels})
    refused(rf"a\.npz: {reason}", path)
    np.savez(tmp_path / "b.npz", train_images=noise("b", 4, 8, 8))
    refused(
        r"b\.npz: arrays \['train_images'\], expected train_images, train_labels",
        tmp_path / "b.npz",
    )
    refused(r"2 \.npz files, expected one; give --data the file itself", tmp_path)
    path.write_bytes(path.read_bytes()[:200])  # a download that stopped half way
    refused(r"a\.npz: (BadZipFile|EOFError)", path)


def fold_counts(folds: list[str], chosen: list[bool]) -> list[int]:
    """Rows in folds 0 to 4, of those that are chosen."""
    return [sum(f == str(k) and c for f, c in zip(folds, chosen, strict=True)) for k in range(5)]


def test_folds_are_balanced_in_every_stratum():
    groups = [f"p{k}" for k in range(53)]
    strata = ["rare" if k % 7 == 0 else "often" for k in range(53)]  # 8 and 45
    folds = assign_folds(groups, strata, [""] * 53, 0)
    assert sorted(fold_counts(folds, [s == "rare" for s in strata])) == [1, 1, 2, 2, 2]
    assert fold_counts(folds, [s == "often" for s in strata]) == [9] * 5


def test_a_patient_with_many_images_does_not_drive_the_other_label_out_of_his_fold():
    groups = ["many"] * 10 + [f"p{k}" for k in range(20)]
    strata = ["a"] * 10 + ["b"] * 20
    folds = assign_folds(groups, strata, [""] * 30, 0)
    assert fold_counts(folds, [s == "b" for s in strata]) == [4] * 5


def test_the_largest_patient_is_what_folds_differ_by_at_most():
    rng = np.random.default_rng(0)
    groups = [f"p{k}" for k in range(40) for _ in range(rng.integers(1, 20))]
    folds = assign_folds(groups, [""] * len(groups), [""] * len(groups), 0)
    counts = fold_counts(folds, [True] * len(groups))
    assert max(counts) - min(counts) <= 2  # small ones even out what large ones leave
    assert len({(group, fold) for group, fold in zip(groups, folds, strict=True)}) == 40


def test_test_fraction_is_that_of_the_groups():
    groups = [f"p{k}" for k in range(200)]
    strata = ["ab"[k % 4 == 0] for k in range(200)]
    folds = assign_folds(groups, strata, [""] * 200, 0.1)
    tests = [stratum for stratum, fold in zip(strata, folds, strict=True) if fold == "test"]
    assert sorted(tests) == ["a"] * 15 + ["b"] * 5


def test_order_of_rows_does_not_change_folds():
    groups = [f"p{k % 30}" for k in range(100)]
    strata = ["xyz"[k % 30 % 3] for k in range(100)]
    folds = assign_folds(groups, strata, [""] * 100, 0.2)
    turned = assign_folds(groups[::-1], strata[::-1], [""] * 100, 0.2)
    assert turned[::-1] == folds


def test_official_splits_and_given_folds_are_kept():
    groups = list("abcdefgh")
    splits = ["val", "test", "train", "train", "train", "train", "train", "train"]
    folds = assign_folds(groups, ["x"] * 8, splits, 0)
    assert folds[:2] == ["0", "test"]
    assert sorted(folds[2:]) == ["1", "1", "2", "2", "3", "4"]  # fold 0 is val alone
    given = ["3", "3", "0", "test", "1", "2", "4", "4"]
    assert assign_folds(groups, ["x"] * 8, given, 0) == given


def test_fewer_than_five_patients_are_a_fold_each():
    assert sorted(assign_folds(list("aabc"), list("xxyx"), [""] * 4, 0)) == ["0", "1", "1", "2"]


def test_a_patient_counts_as_the_rarest_of_his_labels():
    groups = [f"p{k // 2}" for k in range(40)]  # two images each, one in four shows the rare label
    strata = ["rare" if k % 8 == 0 else "often" for k in range(40)]
    folds = assign_folds(groups, strata, [""] * 40, 0)
    assert fold_counts(folds, [s == "rare" for s in strata]) == [1] * 5
    assert fold_counts(folds, [True] * 40) == [8] * 5


def test_hash_folds(tmp_path):
    index = []
    for seed, rows in (("1", "a,,0 b,,1 c,,0"), ("2", "c,,0 b,,1 a,,0")):
        raw = rsna(tmp_path / seed / "raw", rows, "a b c")
        command = [
            sys.executable,
            preprocess.__file__,
            "--data",
            raw,
            "--out",
            tmp_path / seed / "out",
        ]
        subprocess.run(
            command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        )
        index.append((tmp_path / seed / "out/index.csv").read_bytes())
    assert index[0] == index[1]


def test_copies_share_a_fold(tmp_path, capsys):
    assert group_patients(list("cabxd"), list("11232")) == list("aabxb")
    assert group_patients(list("cbba"), list("1122")) == list("aaaa")
    _, rows, meta = run(folders(folders(tmp_path / "raw", "A/z9 B/m5 B/q1", GRAY), "A/a0 B/b0"))
    patients = {row["id"]: row["patient"] for row in rows}
    assert list(patients) == ["A/a0.png", "A/z9.png", "B/b0.png", "B/m5.png", "B/q1.png"]
    assert list(patients.values()) == ["a0", "m5", "b0", "m5", "m5"]
    assert len({row["fold"] for row in rows if row["patient"] == "m5"}) == 1
    printed = capsys.readouterr().out
    assert (
        "note: 2 pixel-identical copies\nnote: 1 identical pixels with different labels\n"
        in printed
    )
    assert list(meta["overlaps"].values()) == [2, 1, 0]


def test_patient_id_is_hashed(tmp_path):
    for name in ("A/1", "A/2", "B/3"):
        dicom(
            tmp_path / "raw" / f"{name}.dcm",
            noise(name),
            PatientID="Doe^1234 " if "A" in name else "Roe",
        )
    assert [row["patient"] for row in run(tmp_path / "raw")[1]][:2] == [HASH, HASH]
    assert not any(b"Doe" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_like_and_test_fraction(tmp_path):
    train = folders(tmp_path / "raw", " ".join(f"{c}/{c}{k}" for c in "AB" for k in range(6)))
    options = ["--size", "16", "--fit", "pad", "--classes", "B", "A", "--test-fraction", "0.4"]
    images, rows, meta = run(train, *options)
    kept = images[[row["fold"] != "test" for row in rows]] / 255
    assert 0 < len(kept) < 12 and (meta["mean"], meta["std"]) == pytest.approx(
        (kept.mean(), kept.std())
    )
    like = ["--like", str(tmp_path / "out")]
    _, rows, external = run(folders(tmp_path / "other", "A/1 A/2"), *like, out="external")
    assert [(row["fold"], row["label"]) for row in rows] == [("test", "1")] * 2
    assert all(external[key] == meta[key] for key in ("classes", "size", "fit", "mean", "std"))
    np.savez(tmp_path / "m.npz", test_images=noise("m", 4, 8, 8), test_labels=np.ones((4, 1), int))
    assert run(tmp_path / "m.npz", *like, out="m")[2]["counts"] == {"test": {"A": 4}}
    refused(
        r"\['A', 'C'\], expected \['B', 'A'\]",
        folders(tmp_path / "foreign", "A/1 C/2"),
        *like,
        out="x",
    )
    refused(r"has \['B', 'A'\]", tmp_path / "other", *like, "--classes", "A", "B", out="x")
    refused(r"no finished cache .*preprocess\.py --data RAW", train, "--like", str(train), out="x")


@pytest.mark.parametrize("options", [
    "--like c --size 32", "--like c --fit pad", "--like c --test-fraction 0.1", "--like o", "--size 0",
    "--test-fraction 1", "--patient-regex (", "--fit crop"])  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(SystemExit) as error:
        main(["--data", "r", "--out", "o", *options.split()])
    assert error.value.code == 2


BAD = ["B/constant.png", "B/text.png", "B/truncated.dcm", "B/truncated.jpg", "B/zero.png"]


@pytest.mark.slow
def test_bad_files(tmp_path, capsys):
    raw = folders(
        folders(tmp_path / "raw", "A/a0 A/a1 B/x0 B/x1"), "B/constant", np.zeros_like(GRAY)
    )
    (raw / "B/text.png").write_text("not a picture")
    dicom(raw / "B/truncated.dcm", noise("d", 64, 64))
    Image.fromarray(noise("j", 64, 64)).save(raw / "B/truncated.jpg")
    for name in BAD[2:4]:
        (raw / name).write_bytes((raw / name).read_bytes()[:-1000])
    (raw / "B/zero.png").touch()
    refused("5 of 9 files cannot be used", raw)
    reasons = [line.split(": ", 1) for line in capsys.readouterr().err.splitlines()]
    assert [path for path, _ in reasons] == [str(raw / name) for name in BAD]
    assert all(len(reason) > 8 for _, reason in reasons) and os.listdir(tmp_path) == ["raw"]

    for path, count in ((raw, 6), (raw / "A", 1), (tmp_path / "nowhere", 1), (raw / "A/a0.png", 1)):
        command = [sys.executable, preprocess.__file__, "--data", path, "--out", tmp_path / "out"]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        lines = result.stderr.splitlines()  # the last one sums up, after a reason for each bad file
        assert result.returncode == 1 and len(lines) == count
        assert [k for k, line in enumerate(lines, 1) if line.startswith("error: ")] == [count]

    images, rows, meta = run(raw, "--skip-bad", "--size", "12")
    skipped = list(csv.DictReader((tmp_path / "out/skipped.csv").open()))
    assert [row["source"] for row in skipped] == BAD and meta["skipped"] == 5
    assert [row["id"] for row in rows] == ["A/a0.png", "A/a1.png", "B/x0.png", "B/x1.png"]
    assert all(
        (image == noise(row["id"][:4])).all() for image, row in zip(images, rows, strict=True)
    )


def test_overwrite_and_interrupt(tmp_path, monkeypatch):
    raw, out = folders(tmp_path / "raw", "A/1 B/2"), tmp_path / "out"

    def read(path: Path, least: int) -> tuple:
        if path.stem == "2":
            raise KeyboardInterrupt
        return read_image(path, least)

    def interrupted(*options: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preprocess, "read_image", read)
            run(raw, *options)

    interrupted()
    assert os.listdir(tmp_path) == ["raw"]
    out.mkdir()  # an empty folder may become a cache
    run(raw)
    refused("use --overwrite", raw)
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    interrupted("--overwrite")
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]
    assert run(folders(raw, "A/3"), "--overwrite")[2]["n"] == 3
    (out / "notes.txt").write_text("mine")
    for folder in ("out", "raw", "raw/A/1.png"):
        refused("expected a new folder or a cache", raw, "--overwrite", out=folder)
    assert (out / "notes.txt").is_file() and (raw / "A/1.png").is_file()


# --- folders as people have them ---


def patients_of(rows: list[dict]) -> dict[str, str]:
    return {row["id"].rsplit(".", 1)[0]: row["patient"] for row in rows}


def test_one_patient_id_in_every_file_is_none(tmp_path, capsys):
    for name in ("A/1", "A/2", "B/3"):
        dicom(tmp_path / "raw" / f"{name}.dcm", noise(name), PatientID="ANONYMOUS")
    (tmp_path / "raw/A/._1.dcm").write_bytes(b"x")
    assert patients_of(run(tmp_path / "raw")[1]) == {"A/1": "1", "A/2": "2", "B/3": "3"}
    printed = capsys.readouterr().out
    assert (
        "note: one PatientID stands in every file, so it names no patient: each file counts as one"
        in printed
    )
    dicom(tmp_path / "raw/B/4.dcm", noise("4"), PatientID="Roe")  # two of them do name patients
    patients = patients_of(run(tmp_path / "raw", "--overwrite")[1])
    assert patients["A/1"] == patients["A/2"] == patients["B/3"] != patients["B/4"]


def test_notes_tell_how_many_patients_there_are(tmp_path, capsys):
    run(folders(tmp_path / "few", "A/1 A/2 B/3"), out="few_out")
    printed = capsys.readouterr().out
    assert (
        "note: 3 images name no patient (--patient-regex finds one in file names): each is one"
        in printed
    )
    assert "note: 3 patients only: folds are uneven" in printed
    many = " ".join(f"{'AB'[k % 2]}/p{k if k < 12 else 0}_{k}" for k in range(20))
    run(folders(tmp_path / "many", many), "--patient-regex", "(p[0-9]+)_", out="many_out")
    printed = capsys.readouterr().out
    assert (
        "note: one patient has 9 of 20 images: folds are uneven" in printed
        and "name no patient" not in printed
    )


def test_a_file_name_in_two_folders_is_no_patient(tmp_path):
    _, rows, _ = run(folders(tmp_path / "raw", "train/A/1 train/B/1 train/B/x test/A/1 test/B/y"))
    assert patients_of(rows) == {name: name for name in ("train/A/1", "train/B/1", "test/A/1")} | {
        "train/B/x": "x", "test/B/y": "y"}  # fmt: skip


def test_a_folder_below_the_class_is_a_patient(tmp_path, capsys):
    names = "A/p1/1 A/p1/deep/2 A/3 B/p1/1 B/images/4 B/images/p2/5 B/masks/4 B/masks/p2/5"
    _, rows, _ = run(folders(tmp_path / "raw", names))
    assert patients_of(rows) == {
        "A/p1/1": "p1", "A/p1/deep/2": "p1", "A/3": "3",
        "B/p1/1": "p1", "B/images/4": "4", "B/images/p2/5": "p2",
    }  # fmt: skip
    assert "note: left out: 1 .png in B/masks/, 1 .png in B/masks/p2/\n" in capsys.readouterr().out
    _, rows, _ = run(
        folders(tmp_path / "b", "A/p1/1 B/p2/2"), "--patient-regex", "p([0-9])/", out="b_out"
    )
    assert patients_of(rows) == {"A/p1/1": "1", "B/p2/2": "2"}


@pytest.mark.parametrize("train, val, test", [
    ("train", "valid", "test"), ("Train", "Val", "Test"), ("training", "validation", "testing"),
    ("TRAIN", "VALID", "TEST")])  # fmt: skip
def test_split_folders_by_any_of_their_names(tmp_path, train, val, test):
    names = " ".join(
        f"{split}/{c}/{split}{c}{k}"
        for split in (train, val, test)
        for c in "AB"
        for k in range(14)
    )
    _, rows, _ = run(folders(tmp_path / "raw", names))
    found = {(row["id"].split("/")[0], row["fold"]) for row in rows}
    assert found == {(val, "0"), (test, "test"), *((train, fold) for fold in "1234")}


@pytest.mark.parametrize("names, words", [
    ("train/ill/1 train/ok/2 test/Ill/3", r"test has the classes \['Ill'\], which train has not.*'ok'"),
    ("train/ill/1 train/ok/2 val/il/3", r"val has the classes \['il'\]"),
    ("No_Finding/1 ill/2 no finding/3", "No_Finding and no finding look like one class"),
    ("chest/train/A/1 chest/train/B/2", "one folder too high: chest holds train/; use --data .*raw/chest$"),
    ("set/A/1 set/B/2", "one folder too high: set holds class folders; use --data .*raw/set;"),
    ("images/1 images/2", "found images/; expected a folder for each of two or more classes"),
    ("a b c", r"found 3 \.png; expected stage_2_train_images/"),
    ("", "found nothing; expected stage_2_train_images/"),
])  # fmt: skip
def test_folders_that_are_refused_say_what_lies_there(tmp_path, names, words):
    (tmp_path / "raw").mkdir()
    for name in names.replace("no finding", "no?finding").split():
        folders(tmp_path / "raw", name)
    for path in (tmp_path / "raw").glob("no?finding"):
        path.rename(path.with_name("no finding"))
    refused(words, tmp_path / "raw")


@pytest.mark.parametrize("first, last", [
    ("covid", "normal"), ("Abnormal", "Healthy"), ("ill", "negative"), ("case", "control"),
    ("mass", "no_mass"), ("COVID", "NonCOVID"), ("finding", "no finding"), ("Edema", "NoFinding"),
    ("TB", "normal_chest")])  # fmt: skip
def test_a_negative_class_is_never_positive_unasked(tmp_path, first, last):
    for name in (first, last):
        (tmp_path / "raw" / name).mkdir(parents=True)
        Image.fromarray(noise(name)).save(tmp_path / "raw" / name / f"{name[:2]}.png")
    line = shlex.join([last, first])
    refused(f"'{last}' would be the positive class, .* --classes {line} ", tmp_path / "raw")
    assert run(tmp_path / "raw", "--classes", last, first)[2]["positive_class"] == first
    assert (
        run(tmp_path / "raw", "--classes", first, last, "--overwrite")[2]["positive_class"] == last
    )


def test_the_positive_class_is_printed_and_stored(tmp_path, capsys):
    assert (
        run(folders(tmp_path / "raw", "normal/1 nodule/2"), "--classes", "normal", "nodule")[2][
            "positive_class"
        ]
        == "nodule"
    )
    assert "positive class: nodule\n" in capsys.readouterr().out
    assert (
        run(folders(tmp_path / "three", "a/1 b/2 normal/3"), out="o3")[2]["positive_class"] is None
    )
    assert "positive class" not in capsys.readouterr().out


def test_rsna_files_of_other_names(tmp_path, capsys):
    raw = rsna(tmp_path / "raw", "a,,0 b,,1 c,,0 d,,1", "a b")
    images = raw / "stage_2_train_images"
    (images / "b.dcm").rename(images / "b.DCM")
    dicom(images / "c", noise("c"))
    Image.fromarray(noise("d")).save(images / "d.png")
    (raw / "stage_2_train_labels.csv").write_text(
        ' patientId ,x,Target\n a,,0\n"b ",,1\nc ,, 0\nd,,1 \n'
    )
    folders(raw, "stage_2_test_images/e")
    assert [row["id"] for row in run(raw, "--size", "12")[1]] == list("abcd")
    assert "note: left out: 1 .png in stage_2_test_images/\n" in capsys.readouterr().out
    folders(images, "a")
    refused("a second file of patient a", raw)
    refused(
        "one folder too high: raw holds stage_2_train_images/; use --data .*raw$",
        tmp_path,
        out="x/y",
    )
    shutil.rmtree(images)
    refused(r"stage_2_train_images: not found, expected stage_2_train_labels\.csv and stage_2", raw)


def test_colour_becomes_gray_with_a_note(tmp_path, capsys):
    raw = folders(tmp_path / "raw", "A/1 B/2")
    Image.fromarray(noise("c", 12, 12, 3)).save(raw / "A/c.png")
    run(raw)
    assert "note: 1 images: colour turned gray, such as A/c.png\n" in capsys.readouterr().out
    np.savez(tmp_path / "m.npz", train_images=noise("m", 9, 8, 8, 3), train_labels=np.arange(9) % 2)
    run(tmp_path / "m.npz", out="m")
    assert "note: 9 images: colour turned gray, such as m.npz:train/0\n" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    raw = folders(tmp_path / "raw", "A/1 A/2 B/3 B/4")
    os.rename(raw / "A/2.png", os.fsencode(raw) + b"/A/\xff2.png")
    command = [sys.executable, preprocess.__file__, "--data", raw, "--out", tmp_path / "out"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1 and r"A/\udcff2.png: the name is not UTF-8" in result.stderr
    assert [row["id"] for row in run(raw, "--skip-bad")[1]] == ["A/1.png", "B/3.png", "B/4.png"]
    assert r"A/\udcff2.png" in (tmp_path / "out/skipped.csv").read_text()


def test_names_that_the_output_cannot_show_are_escaped(tmp_path):
    raw = folders(tmp_path / "raw", "正常/1 肺炎/2")
    command = [sys.executable, preprocess.__file__, "--data", raw, "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, check=False, capture_output=True, env=environment)
    assert result.returncode == 0 and rb"positive class: \u80ba\u708e" in result.stdout
    assert "肺炎" in (tmp_path / "out/index.csv").read_text("utf-8")


def test_a_missing_decoder_is_told_once(capsys):
    words = "RuntimeError: Unable to decode as all plugins are missing dependencies"
    preprocess.report_bad(
        [(f"{k}.dcm", f"raw/{k}.dcm: {words}") for k in range(3)] + [("x", "raw/x: zero bytes")]
    )
    assert capsys.readouterr().err == f"raw/0.dcm: {words} (and 2 more files)\nraw/x: zero bytes\n"


FRESH_PAGES = """
import resource, sys
import numpy as np
from {task}.preprocess import keep_memory

if sys.argv[1] == "kept":
    keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [np.ones(2**21, np.uint8) for _ in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_memory_that_is_freed_is_kept_for_the_next_image(task):
    faults = {}
    for kind in ("fresh", "kept"):
        command = [sys.executable, "-c", FRESH_PAGES.format(task=task), kind]
        faults[kind] = int(subprocess.check_output(command, cwd=ROOT))
    assert faults["kept"] < 100  # pages
    if faults["fresh"] < 100:
        pytest.skip("freed memory is kept here without that, or page faults are not counted")


def test_other_c_libraries_go_without(monkeypatch):
    for lacks in (AttributeError, OSError, TypeError):  # macOS, none found, Windows

        def load(_: None, error: type = lacks) -> None:
            raise error

        monkeypatch.setattr(preprocess.ctypes, "CDLL", load)
        preprocess.keep_memory()


def test_threads_are_no_more_than_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    assert preprocess.default_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert preprocess.default_workers() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert preprocess.default_workers() == 8
