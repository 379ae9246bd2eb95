"""classification/preprocess.py: tiny raw sets of every layout, pictures against hand-computed values."""

import csv
import hashlib
import json
import os
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
from classification.preprocess import DataError, assign_fold, group_patients, main, read_image, resize

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")
SPLITS = ("train", "val", "test")
HASH = hashlib.sha256(b"Doe^1234").hexdigest()[:12]


def noise(name: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(0, 256, shape or (12, 12), dtype=np.uint8)


def dicom(path: Path, pixels: object, lut: tuple = (), **header: object) -> Path:
    """An uncompressed DICOM of 12 bits, or 8 for uint8; lut = first value, bits, entries of a VOI LUT."""
    pixels = np.atleast_2d(pixels)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype("<i2" if pixels.min() < 0 else "<u2")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = ComputedRadiographyImageStorage, "1.2.3", "Doe^1234"
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


def rsna(raw: Path, rows: str, files: str, header: str = "patientId,x,Target", stage: int = 2) -> Path:
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
    picture, _, patient = read_image(dicom(tmp_path / "a.dcm", pixels, **header))
    np.testing.assert_allclose(picture, np.atleast_2d(expected), atol=1e-6)
    assert picture.dtype == np.float32 and patient == HASH


@pytest.mark.parametrize("reason, header", [
    ("PALETTE COLOR", {"PhotometricInterpretation": "PALETTE COLOR"}),
    ("YBR_PARTIAL_420", {"PhotometricInterpretation": "YBR_PARTIAL_420"}),
    ("without pixel data", {"PixelData": None}),
    ("2 frames", {"NumberOfFrames": 2}),
    ("expected a single image", {"Rows": 1}),  # pixels of a second frame that the header does not count
    ("bytes of pixel data is less", {"Rows": 9}),
    ("high bit 15", {"HighBit": 15}),
    ("no contrast", window(9999, 2)),
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
            pictures.append(read_image(path)[0])
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
            refusals[path.name] = str(error)
    assert len(pictures) > 40 and all(p.ndim == 2 and p.dtype == np.float32 for p in pictures)
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
        np.testing.assert_allclose(read_image(tmp_path / name)[0], expected, atol=1e-6)


def test_resize():
    white = np.ones((4, 8), np.float32)
    assert (resize(white, 8, "squash") == 255).all()
    np.testing.assert_array_equal(resize(white, 8, "pad")[:, 3], [0, 0, 255, 255, 255, 255, 0, 0])
    assert resize(np.eye(64, dtype=np.float32), 8, "squash").max() < 64  # antialiased: thin lines grow faint


@pytest.mark.parametrize("stage", [1, 2])
def test_rsna(tmp_path, stage, capsys):
    raw = rsna(tmp_path / "raw", "b,5,1 a,,0 b,7,1 lost,,0", "a b stray", stage=stage)
    images, rows, meta = run(raw, "--size", "12")
    assert [(row["id"], row["patient"], row["label"]) for row in rows] == [("a", "a", "0"), ("b", "b", "1")]
    assert rows[1]["source"] == f"stage_{stage}_train_images/b.dcm" and (images[1] == noise("b")).all()
    assert meta["classes"] == ["no_pneumonia", "pneumonia"] and meta["layout"] == "RSNA challenge"
    printed = capsys.readouterr().out
    assert "1 rows without a file left out, such as lost" in printed
    assert "1 files without a row left out, such as stray" in printed
    assert run(raw, "--overwrite", "--classes", "healthy", "ill")[2]["classes"] == ["healthy", "ill"]
    table = raw / f"stage_{stage}_train_labels.csv"
    table.write_text("patientId,Target", encoding="utf-16")
    refused(r"labels\.csv: no column", raw)
    table.unlink()
    refused(r"labels\.csv: not found", raw)


@pytest.mark.parametrize("reason, rows, header", [
    (r"labels\.csv:3: a has rows with Target 0 and with Target 1", "a,,0 a,,1", "patientId,x,Target"),
    (r"labels\.csv:2: 'a' has Target '2', expected 0 or 1", "a,,2", "patientId,x,Target"),
    (r"labels\.csv:2: 'a' has Target None", "a", "patientId,x,Target"),
    (r"labels\.csv: no column \['Target'\], found \['patientId', 'label'\]", "a,1", "patientId,label"),
    (r"labels\.csv: no column", "", ""),
    ("none of the 1 patients", "b,,0", "patientId,x,Target"),
])  # fmt: skip
def test_rsna_refused(tmp_path, reason, rows, header):
    refused(reason, rsna(tmp_path / "raw", rows, "a", header))


def test_class_folders(tmp_path, capsys):
    raw = folders(tmp_path / "raw", "NORMAL/p1_a NORMAL/p1_b NORMAL/p2_a COVID/p3_a .cache/p4_a")
    for name in ("NORMAL/._p1_a.png", "NORMAL/scan.bmp"):  # what macOS leaves behind; a type that is not read
        (raw / name).write_bytes(b"x")
    images, rows, meta = run(raw, "--patient-regex", "(p[0-9])_", "--size", "12")
    assert "1 files of other types or in other folders left out, such as NORMAL/sc" in capsys.readouterr().out
    assert [row["patient"] for row in rows] == ["p3", "p1", "p1", "p2"] and rows[1]["fold"] == rows[2]["fold"]
    for image, row in zip(images, rows, strict=True):
        assert (image == noise(row["id"].removesuffix(".png"))).all() and row["id"] == row["source"]
    assert meta["classes"] == ["COVID", "NORMAL"]
    assert (meta["mean"], meta["std"]) == pytest.approx(((images / 255).mean(), (images / 255).std()))

    _, rows, meta = run(raw, "--overwrite", "--classes", "NORMAL", "COVID", "--patient-regex", "p.")
    assert meta["classes"] == ["NORMAL", "COVID"] and [row["label"] for row in rows] == ["1", "0", "0", "0"]
    assert [row["patient"] for row in rows] == ["p3", "p1", "p1", "p2"]
    refused(r"in 3 names: .*p1_a\.png", raw, "--patient-regex", "p3")
    refused(r"\['COVID', 'NORMAL'\], expected \['NORMAL', 'ILL'\]", raw, "--classes", "NORMAL", "ILL")
    refused("expected two or more", folders(tmp_path / "one", "A/1 A/2"))


def test_official_split(tmp_path, capsys):
    names = " ".join(f"train/{c}/{c}{k} val/{c}/v{c}{k} test/{c}/t{c}{k}" for c in "AB" for k in range(8))
    raw = folders(tmp_path / "raw", f"{names} test/A/A1 val/C/vC")  # A1 lies on both sides; C is in val only
    _, rows, meta = run(raw)
    found = {(row["id"].split("/")[0], row["fold"]) for row in rows}
    assert found == {("val", "0"), ("test", "test"), *(("train", fold) for fold in "1234")}
    assert meta["classes"] == ["A", "B", "C"] and list(meta["overlaps"].values()) == [0, 0, 1]
    assert "1 patients on both sides of an official split" in capsys.readouterr().out
    refused("official split", raw, "--test-fraction", "0.2", "--overwrite")


@pytest.mark.parametrize("color", [(), (3,)])
@pytest.mark.parametrize("splits", [SPLITS, ("train", "test"), ("train",)])
def test_medmnist(tmp_path, splits, color):
    arrays = {f"{split}_images": np.asfortranarray(noise(split, 40, 9, 9, *color)) for split in splits}
    labels = {f"{split}_labels": np.arange(40, dtype=np.uint8)[:, None] % 3 for split in splits}
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw/mini.npz", **arrays, **labels)
    images, rows, meta = run(tmp_path / "raw")
    expected = np.concatenate(list(arrays.values()))
    np.testing.assert_allclose(images, expected @ [0.299, 0.587, 0.114] if color else expected, atol=0.51)
    assert meta["classes"] == ["0", "1", "2"] and [row["label"] for row in rows[:4]] == ["0", "1", "2", "0"]
    folds = {"train": "1234" if "val" in splits else "01234", "val": "0", "test": ["test"]}
    found = {(row["id"].split("/")[0], row["fold"]) for row in rows}
    assert found == {(split, fold) for split in splits for fold in folds[split]}
    assert run(tmp_path / "raw/mini.npz", "--size", "16")[0].shape[1:] == (16, 16)


@pytest.mark.parametrize("reason, split, images, labels", [
    (r"train_labels int64 \(4, 14\)", "train", noise("a", 4, 8, 8), (4, 14)),
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
    path.write_bytes(path.read_bytes()[:200])  # a download that stopped half way
    refused(r"a\.npz: (BadZipFile|EOFError)", path)


def test_hash_folds(tmp_path):
    folds = [assign_fold(f"p{k}", "", False, 0.2) for k in range(2000)]
    shares = [folds.count(fold) / 2000 for fold in ("test", "0", "1", "2", "3", "4")]
    np.testing.assert_allclose(shares, [0.2] + [0.16] * 5, atol=0.03)
    assert assign_fold("p7", "", False, 0) == str(int(hashlib.sha256(b"0:p7").hexdigest()[8:16], 16) % 5)
    index = []
    for seed, rows in (("1", "a,,0 b,,1 c,,0"), ("2", "c,,0 b,,1 a,,0")):
        raw = rsna(tmp_path / seed / "raw", rows, "a b c")
        command = [sys.executable, preprocess.__file__, "--data", raw, "--out", tmp_path / seed / "out"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
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
    assert "note: 2 pixel-identical copies\nnote: 1 identical pixels with different labels\n" in printed
    assert list(meta["overlaps"].values()) == [2, 1, 0]


def test_patient_id_is_hashed(tmp_path):
    for name in ("A/1", "A/2", "B/3"):
        dicom(tmp_path / "raw" / f"{name}.dcm", noise(name))
    assert {row["patient"] for row in run(tmp_path / "raw")[1]} == {HASH}
    assert not any(b"Doe" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_like_and_test_fraction(tmp_path):
    train = folders(tmp_path / "raw", " ".join(f"{c}/{c}{k}" for c in "AB" for k in range(6)))
    options = ["--size", "16", "--fit", "pad", "--classes", "B", "A", "--test-fraction", "0.4"]
    images, rows, meta = run(train, *options)
    kept = images[[row["fold"] != "test" for row in rows]] / 255
    assert 0 < len(kept) < 12 and (meta["mean"], meta["std"]) == pytest.approx((kept.mean(), kept.std()))
    like = ["--like", str(tmp_path / "out")]
    _, rows, external = run(folders(tmp_path / "other", "A/1 A/2"), *like, out="external")
    assert [(row["fold"], row["label"]) for row in rows] == [("test", "1")] * 2
    assert all(external[key] == meta[key] for key in ("classes", "size", "fit", "mean", "std"))
    np.savez(tmp_path / "m.npz", test_images=noise("m", 4, 8, 8), test_labels=np.ones((4, 1), int))
    assert run(tmp_path / "m.npz", *like, out="m")[2]["counts"] == {"test": {"A": 4}}
    refused(r"\['A', 'C'\], expected \['B', 'A'\]", folders(tmp_path / "foreign", "A/1 C/2"), *like, out="x")
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


def test_bad_files(tmp_path, capsys):
    raw = folders(folders(tmp_path / "raw", "A/a0 A/a1 B/x0 B/x1"), "B/constant", np.zeros_like(GRAY))
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
    assert all((image == noise(row["id"][:4])).all() for image, row in zip(images, rows, strict=True))


def test_overwrite_and_interrupt(tmp_path, monkeypatch):
    raw, out = folders(tmp_path / "raw", "A/1 B/2"), tmp_path / "out"

    def read(path: Path) -> tuple:
        if path.stem == "2":
            raise KeyboardInterrupt
        return read_image(path)

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
