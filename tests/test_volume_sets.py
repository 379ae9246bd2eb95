"""segmentation/preprocess.py: layouts, tables, dataset.json, splits, the cache, and new images."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from segmentation import preprocess
from segmentation.preprocess import PREDICTION, DataError, find_new, main, read_new, write_mask
from tests.caches import read_table, refusal
from tests.test_volumes import (
    COLOUR,
    DRAWN,
    GRAY,
    GRID,
    IMAGE,
    MASK,
    META,
    SPACING,
    make_enhanced,
    make_slices,
    odd,
    put,
    save,
    save_picture,
    save_series,
    set_pixels,
)

SIX = "c0 c1 c2 c3 c4 c5"
LABELS = {"0": "background", "1": "a", "2": "b"}


def pairs(names: str, spacing: tuple = SPACING, mask: np.ndarray = MASK, end: str = "Tr") -> dict:
    """Images, which differ from each other, and their masks: arrays and spacings by file."""
    files = {}
    for k, name in enumerate(names.split()):
        files[f"images{end}/{name}.nii.gz"] = (IMAGE + np.int16(k), spacing)
        files[f"labels{end}/{name}.nii.gz"] = (mask, spacing)
    return files


def write(raw: Path, files: dict) -> Path:
    """Text, arrays, and arrays with a spacing as files: volumes, or pictures by their suffix."""
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, errors="surrogateescape")
        elif callable(content):
            content(path)
        elif isinstance(content, tuple):
            save(path, *content)
        elif name.endswith((".gz", ".nii")):
            save(path, content)
        else:
            save_picture(path, content)
    return raw


def describe(labels: object, **more: object) -> dict:
    description = {"labels": labels, "modality": {"0": "MRI"}} | more
    return {"dataset.json": json.dumps(description)}


def run(raw: Path, out: Path, *options: object) -> tuple[dict, list[dict]]:
    main(["--data", str(raw), "--out", str(out), "--workers", "2", *map(str, options)])
    return json.loads((out / "meta.json").read_text()), read_table(out / "index.csv")


def array(out: Path, name: str) -> np.ndarray:
    return np.load(out / "volumes" / f"{name}.npy")


# --- the cache ---


def test_a_cache_has_everything_once_and_nothing_of_the_reading_is_left(
    tmp_path, monkeypatch, capsys
):
    """Also that identical images share a fold, whatever type stores them."""
    reads = []
    read = preprocess.read_nifti
    monkeypatch.setattr(preprocess, "read_nifti", lambda *a: (reads.append(a[0]), read(*a))[1])
    copy = {"imagesTr/copy.nii.gz": IMAGE + 2.0, "labelsTr/copy.nii.gz": np.roll(MASK, 1, 2)}
    raw = write(tmp_path / "raw", pairs(SIX) | copy | describe(LABELS))
    out = tmp_path / "cache"
    meta, rows = run(raw, out)
    assert len(reads) == len(set(reads)) == 14
    assert {path.name for path in out.iterdir()} == {"volumes", "index.csv", "meta.json"}
    expected = {"classes": ["background", "a", "b"], "spacing": list(SPACING), "slice_axis": 2}
    expected |= {"shape": [12, 10, 8], "picture_unit": None, "n": 7}
    assert expected.items() <= meta.items()
    assert list(rows[0]) == ["id", "patient", "fold", "split", "digest", "image", "mask"]
    assert rows[1]["image"] == "imagesTr/c1.nii.gz" and len(rows[1]["digest"]) == 16
    assert {row["fold"] for row in rows} == {"0", "1", "2", "3", "4"}
    for column in ("patient", "fold", "digest"):
        assert rows[2][column] == rows[6][column] != rows[1][column]
    printed = capsys.readouterr().out
    assert "c2 and copy are one image" in printed and "PatientID" not in printed
    image = array(out, "c1.image")
    assert image.dtype == np.float16 and image.shape == (1, 12, 10, 8)
    assert float(image.astype(float).std()) == pytest.approx(1, abs=1e-3)
    assert np.array_equal(array(out, "c1.mask"), MASK)
    points = array(out, "c1.points")
    assert (MASK[tuple(points[:, 1:].T)] == points[:, 0]).all() and len(points) == 150
    truth = nib.load(out / "volumes" / "c1.truth.nii.gz")
    assert truth.get_data_dtype() == np.uint8 and np.array_equal(truth.affine, GRID)
    assert "exists already" in refusal(run, raw, out)


def test_spacing_by_value_keep_and_like(tmp_path, capsys):
    raw = write(tmp_path / "raw", pairs("c0 c1") | describe(LABELS))
    coarse = tmp_path / "coarse"
    meta, _ = run(raw, coarse, "--spacing", 2, 3, 2.5)
    assert array(coarse, "c0.mask").shape == (6, 5, 8) and meta["spacing"] == [2, 3, 2.5]
    other = write(tmp_path / "other", pairs("d0", (2, 3, 2.5)))
    meta, rows = run(other, tmp_path / "like", "--like", coarse)
    assert [row["fold"] for row in rows] == ["test"] and meta["classes"][1] == "a"
    assert array(tmp_path / "like", "d0.mask").shape == (12, 10, 8)
    meta, _ = run(other, tmp_path / "keep", "--spacing", "keep")
    assert array(tmp_path / "keep", "d0.mask").shape == (12, 10, 8) and not meta["resample"]
    flat = {"imagesTr/c0.nii.gz": IMAGE[:, 4:5], "labelsTr/c0.nii.gz": MASK[:, 4:5]}
    meta, _ = run(write(tmp_path / "flat", flat), tmp_path / "flat_cache")
    assert meta["slice_axis"] == 1  # across the axis of one voxel, not the thickest one
    (other / "dataset.json").write_text('{"labels": {"0": "background", "1": "other"}}')
    found = refusal(run, other, tmp_path / "wrong", "--like", coarse)
    assert re.search(r"labels .*other.*, but .*coarse has", found)
    bright = write(tmp_path / "bright", pairs("e0", mask=np.uint8(255 * (MASK > 0))))
    refusal(run, bright, tmp_path / "wrong", "--like", coarse)
    said = "mask values [0, 255], expected [0, 1, 2] as in the training set"
    assert said in capsys.readouterr().err


def test_ct_is_clipped_to_the_foreground_of_the_training_cases(tmp_path, capsys):
    files = {"imagesTr/c0.nii.gz": np.stack([IMAGE] * 2, 3), "labelsTr/c0.nii.gz": MASK}
    files |= describe(LABELS, modality={"0": "CT scan", "1": "T1"})
    meta, _ = run(write(tmp_path / "raw", files), tmp_path / "cache")
    inside = IMAGE[MASK > 0]
    low, high = np.percentile(inside, (0.5, 99.5))
    ct, mr = meta["normalisation"]
    assert (ct["low"], ct["high"]) == pytest.approx((low, high)) and mr is None
    expected = (IMAGE.clip(low, high) - inside.clip(low, high).mean()) / ct["std"]
    assert np.allclose(array(tmp_path / "cache", "c0.image")[0], expected, rtol=1e-3, atol=1e-2)
    printed = capsys.readouterr().out
    assert "CT scan (as CT: clipped to" in printed and "T1 (each image to mean 0" in printed


def test_ct_by_its_many_names():
    for name in ("CT", "ct", "CT scan", "CTA", "CBCT", "Computed Tomography", "CT_portal"):
        assert preprocess.ct_constants(name, IMAGE)
    for name in ("MRI", "T1", "CT1", "PET", "PET/CT", "ADC", "SPECT"):
        assert preprocess.ct_constants(name, IMAGE) is None


def test_too_little_memory_is_named_and_skipped_in_every_step(tmp_path, capsys, monkeypatch):
    raw = write(tmp_path / "raw", pairs("c0 c1 c2 c3"))
    for name, case in (("read_volume", "c1"), ("to_grid", "c3")):
        function = getattr(preprocess, name)

        def fail(path: Path, *more: object, function=function, case=case) -> object:
            if path.name == f"{case}.nii.gz":
                raise MemoryError("Unable to allocate 52 TiB")
            return function(path, *more)

        monkeypatch.setattr(preprocess, name, fail)
    meta, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [row["id"] for row in rows] == ["c0", "c2"] and meta["n"] == meta["skipped"] == 2
    for row, case in zip(read_table(tmp_path / "cache" / "skipped.csv"), ("c1", "c3"), strict=True):
        assert row["source"] == case and "not enough memory for it (Unable" in row["reason"]
    assert not list((tmp_path / "cache" / "volumes").glob("c3*"))


def test_options_that_contradict_each_other_are_refused():
    for words in ("--spacing 1 2", "--spacing 0 1 1", "--spacing few", "--test-fraction 1",
                  "--patient-regex (", "--like x --spacing keep"):  # fmt: skip
        with pytest.raises(SystemExit):
            preprocess.parse_args(["--data", "raw", "--out", "out", *words.split()])


# --- layouts ---


def test_series_and_enhanced_files_are_training_images(tmp_path):
    """Masks lie as a program keeps them that reads the series, or turned as dcm2niix does it."""
    raw = tmp_path / "raw"
    mask = np.zeros((5, 6, 12), np.int16)
    mask[1:4, 1:5, 3:8] = 1
    for k in range(4):
        slices = make_slices(SeriesInstanceUID=f"1.2.{k}")
        for z, ds in enumerate(slices):
            set_pixels(ds, ds.pixel_array + 500 * mask[..., z].T + k)
        path = raw / "imagesTr" / f"c{k}"
        if k == 3:
            path = save_series(raw / "imagesTr", [make_enhanced(slices)], "c3.dcm") / "c3.dcm"
        else:
            save_series(path, slices)
        nifti = nib.Nifti1Image(mask, preprocess.read_volume(path, []).affine)
        if k % 2:
            nifti = nifti.as_reoriented(np.array([[0, 1], [1, -1], [2, 1]]))  # rows from below
        (raw / "labelsTr").mkdir(exist_ok=True)
        nib.save(nifti, raw / "labelsTr" / f"c{k}.nii.gz")
    meta, rows = run(raw, tmp_path / "cache", "--spacing", "keep")
    assert [row["image"] for row in rows][2:] == ["imagesTr/c2", "imagesTr/c3.dcm"]
    assert meta["channels"] == ["CT"] and meta["normalisation"][0] is not None  # by the headers
    for row in rows:
        image = array(tmp_path / "cache", f"{row['id']}.image")[0]
        inside = array(tmp_path / "cache", f"{row['id']}.mask") > 0
        assert inside.sum() == 60 and image[inside].min() >= image[~inside].max()


def test_nnunet_names_are_channels_and_a_missing_one_is_named(tmp_path, capsys):
    files = describe({"background": 0, "a": 1, "b": 2}, channel_names={"0": "T1", "1": "T2"})
    for k in range(3):
        files[f"imagesTr/c{k}_0000.nii.gz"] = IMAGE + np.int16(k)
        files[f"imagesTr/c{k}_0001.nii.gz"] = -IMAGE
        files[f"labelsTr/c{k}.nii.gz"] = MASK
    raw = write(tmp_path / "raw", files)
    meta, rows = run(raw, tmp_path / "cache")
    assert meta["channels"] == ["T1", "T2"] and [row["id"] for row in rows] == ["c0", "c1", "c2"]
    assert rows[0]["image"] == "imagesTr/c0_0000.nii.gz;imagesTr/c0_0001.nii.gz"
    first, second = array(tmp_path / "cache", "c0.image")
    assert np.allclose(first, -second, atol=0.01)
    (raw / "imagesTr" / "c0_0000.nii.gz").unlink()
    (raw / "imagesTr" / "c1_0001.nii.gz").unlink()
    save(raw / "imagesTr" / "c2_0001.nii.gz", IMAGE, (1, 1.5, 3))
    assert "3 cases or files" in refusal(run, raw, tmp_path / "bad")
    printed = capsys.readouterr().err
    assert "c0_0001.nii.gz: files of this name for channels [1], expected 0, 1, ..." in printed
    assert "c1_0000.nii.gz: 1 channels, expected ['T1', 'T2']" in printed
    assert "c2_0001.nii.gz: affine" in printed


def pictures(split: str, count: int, start: int = 0) -> dict:
    files = {}
    for k in range(count):
        files[f"{split}/Images/{k}.tif"] = np.roll(GRAY, start + k, 0)
        files[f"{split}/labels/{k}_{'gt' if k else 'mask'}.png"] = 255 * DRAWN
    return files


SMEARED = MASK.copy()
SMEARED[0, 0, :3] = (3, 4, 255)
VESSEL = MASK.clip(0, 1)
VESSEL[4, 5, 3] = 2  # one voxel
ORGANS = describe({"0": "background", "1": "organ", "2": "vessel", "3": "none"})
LEFT_OUT = {
    "imagesTr/c0.nrrd": "NRRD0004",
    "imagesTr/._c0.nii.gz": "of a Mac",
    "imagesTr/LICENSE": "CC",
}
RAW = {  # files, options, what is printed (parts by |), and the ids (of --skip-bad), if any
    "a class is lost": (
        pairs(SIX, mask=VESSEL) | pairs("c0", mask=0 * MASK) | ORGANS, "--spacing 3 3 3",
        "vessel: lost on this grid in 5 cases; in 5 of 6 masks, median 0 vox|organ: in 5 of 6 masks, median|none: in 0 of 6 masks\n|note: 1 masks are empty", SIX),
    "thickest axes differ": (
        pairs(SIX, (1, 1, 8)) | pairs("c0 c1", (8, 1, 1)), "", "thickest axis z in 4, x in 2, but slices", SIX),
    "grid too large": (pairs("c0"), "--spacing 0.01 0.01 0.01", r"\[12, 10, 8\] voxels of \[1.0, 1.5, 2.5\] mm would become", ""),
    "grid too small": (pairs("c0"), "--spacing 90 90 90", r"\[12, 10, 8\] voxels of \[1.0, 1.5, 2.5\] mm would become", ""),
    "official splits": (
        pairs(SIX) | pairs("Va0 Va1", end="Va", mask=VESSEL) | pairs("Ts0", end="Ts") | {"imagesBeside/u.nii.gz": IMAGE, "test/images/t.nii.gz": IMAGE}, "",
        "imagesBeside: left out, images such as u.nii.gz|note: 1 images in .*test/images have no masks and are|fold 0: 2 .*fold 1: 2 .*fold test: 1", f"{SIX} Va0 Va1 Ts0"),
    "pictures among volumes": (
        {"imagesTr/v.nii.gz": np.stack([IMAGE] * 3, 3), "labelsTr/v.nii.gz": MASK, "images/p.png": GRAY, "masks/p.png": DRAWN}, "",
        "p.png: a picture, expected a volume", "v"),
    "other values": (
        pairs("c0 c3") | pairs("c1", mask=255 * MASK.clip(0, 1)) | pairs("c2", mask=4 * MASK), "",
        r"c1.nii.gz: mask values \[0, 255\], expected \[0, 1, 2\] without gaps", "c0 c3"),
    "a smeared mask": (
        pairs("c0 c2") | pairs("c1", mask=SMEARED), "", r"mask values \[0, 1, 2, 3, 4, 255\], expected \[0, 1, 2\]", "c0 c2"),
    "no name": (
        pairs("c0") | pairs("c1", mask=MASK.clip(0, 1)) | describe({"background": 0, "a": 1}), "", r"mask values \[0, 1, 2\], expected \[0, 1\]", "c1"),
    "time points": (pairs("c0") | {"imagesTr/c0.nii.gz": np.stack([IMAGE] * 5, 3)} | describe(LABELS), "", "5 channels, expected .* write a file each", ""),
    "notes with an error": (
        pairs("c0") | {"imagesTr/c0.nii.gz": odd((252, 0, 0, "h"))}, "", r"as its image.*\(note: no sform and no qform", ""),
    "two of one name": (pairs("c0 c1 c2") | {"labelsTr/c1.nii": MASK, "imagesTr/c2.nii": IMAGE}, "",
        r"c1.nii.gz: 2 masks of that \(printable\) name in labelsTr|c2.nii: files of this name for channels \[0, 0\], expected 0, 1.*\(and 1 more", "c0"),
    "no pairs": (
        pairs("c0") | {f"labelsTr/label{k:04d}.nii.gz": MASK for k in range(40)} | {"imagesTr/c0.nii_old.nii.gz": IMAGE}, "",
        "c0.nii_old.nii.gz: 0 masks of|label0000.nii.gz: no image of that name in imagesTr .and 39 more such as labelsTr/label0001|41 cases or files", "c0"),
    "no images": (
        pairs("c0") | LEFT_OUT | {"imagesTr/nested/series/0.nii.gz": IMAGE}, "", "imagesTr: left out, NRRD: 1, such as c0.nrrd|left out, text: 1, such as LICENSE|left out, folder: 1, such as nested", "c0"),
    "drive": (
        {"training/images/21_training.tif": GRAY, "training/1st_manual/21_manual1.gif": DRAWN}, "", "From other formats|1st_manual: left out|0 masks of", ""),
    "organs": ({"s0/ct.nii.gz": IMAGE, "s0/segmentations/liver.nii.gz": MASK}, "", "but s0/ct.nii.gz, s0/seg.*From other formats", ""),
    "too high": ({f"top/{file}": content for file, content in pairs("a").items()}, "", "one folder too high: use --data .*top", ""),
    "btcv": ({"imagesTr/img1.nii.gz": IMAGE, "labelsTr/label1.nii.gz": MASK}, "", "no image with a mask of its name, but imagesTr", ""),
    "empty": ({}, "", "but no files; expected imagesTr/NAME.nii.gz", ""),
    "pictures in any case": (
        pictures("Train", 8) | pictures("VAL", 2, 8) | pictures("test", 2, 10), "",
        "255 is taken as class 1|channels red .* green .* blue .* px|fold 0: 2  fold 1: 2  fold 2: 2  fold 3: 2  fold 4: 2  fold test: 2",
        f"{' '.join(f'train_{k}' for k in range(8))} val_0 val_1 test_0 test_1"),
}  # fmt: skip
TABLES = {  # cases.csv -> refusal
    "name,site\nc0,A": r"columns \['name', 'site'\], expected id and different others",
    "id,site,site\nc0,A,B": "expected id and different others",
    "id,mask\nc0,A": "none of digest, image, mask",
    "id,fold\nc0,7": r"cases\.csv:2: fold or split '7', expected one of the two: fold 0 to 4",
    "id,fold\nc0,1\nc0,2": r"cases\.csv:3: c0 stands there twice",
    "id,fold\nx,1": "no id of its rows is a case, expected such as c0",
    "id,fold,split\nc0,1,val": "expected one of the two",
    "id,age\nc0,1,5": "3 fields for 2 columns; decimal commas",
    'id,age\n"c0,1': "unexpected end of data",
    "id,site\nc0,H\udcfcfte": r"cases\.csv: 'utf-8' codec can't decode",
}
RAW |= {text: (pairs("c0") | {"cases.csv": text}, "", TABLES[text], "") for text in TABLES}


@pytest.mark.parametrize("name", RAW)
def test_a_raw_folder_is_read_noted_or_refused(tmp_path, capsys, name):
    files, options, messages, ids = RAW[name]
    raw = write(tmp_path / "raw", files)
    refused = ""
    try:
        run(raw, tmp_path / "cache", *options.split())
    except DataError as error:
        refused = str(error)
        if ids:
            run(raw, tmp_path / "cache", "--skip-bad", *options.split())
    printed = capsys.readouterr()
    for message in messages.split("|"):
        assert re.search(message, f"{printed.out}\n{printed.err}\n{refused}"), message
    assert (tmp_path / "cache").exists() == bool(ids)
    rows = read_table(tmp_path / "cache" / "index.csv") if ids else []
    assert " ".join(row["id"] for row in rows) == ids


# --- patients and folds ---


def test_scans_of_one_patient_share_a_fold(tmp_path):
    names = [f"patient{k:03d}_frame{frame}" for k in range(8) for frame in ("01", "12")]
    raw = write(tmp_path / "raw", pairs(" ".join(names)))
    _, rows = run(raw, tmp_path / "apart")
    assert len({row["patient"] for row in rows}) == 16
    _, rows = run(raw, tmp_path / "cache", "--patient-regex", "(patient[0-9]+)_")
    assert len({(row["patient"], row["fold"]) for row in rows}) == 8
    assert all(row["id"].startswith(row["patient"]) for row in rows)
    found = refusal(run, raw, tmp_path / "none", "--patient-regex", "person")
    assert re.search("'person' finds nothing in .*patient000_frame01", found)
    # The path counts where the name says nothing, and both overrule cases.csv.
    (raw / "cases.csv").write_text("\n".join(["id,patient", *(f"{name},p" for name in names)]))
    _, rows = run(raw, tmp_path / "below", "--patient-regex", "imagesTr/(patient[0-9]+)")
    assert len({row["patient"] for row in rows}) == 8
    _, rows = run(raw, tmp_path / "either", "--patient-regex", "(nobody)|(patient[0-9]+)")
    assert len({row["patient"] for row in rows}) == 8


def test_scans_of_one_patient_id_share_a_fold(tmp_path, capsys):
    mask = np.zeros((5, 6, 12), np.int16)
    mask[1:4, 1:5, 3:8] = 1
    for k in range(12):
        slices = make_slices(SeriesInstanceUID=f"1.2.{k}", PatientID=f"P{k // 2} ")
        set_pixels(slices[0], slices[0].pixel_array + k)
        folder = save_series(tmp_path / f"raw/imagesTr/c{k:02d}", slices)
        affine = preprocess.read_volume(folder, []).affine
        (tmp_path / "raw/labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(mask, affine), tmp_path / f"raw/labelsTr/c{k:02d}.nii.gz")
    _, rows = run(tmp_path / "raw", tmp_path / "cache")
    assert [row["patient"] for row in rows[:2]] == [hashlib.sha256(b"P0").hexdigest()[:12]] * 2
    assert len({(row["patient"], row["fold"]) for row in rows}) == 6
    for folder in (tmp_path / "raw/imagesTr").iterdir():  # what anonymisation leaves
        for path in folder.iterdir():
            path.write_bytes(re.sub(b"P[0-5] ", b"AN ", path.read_bytes()))
    _, rows = run(tmp_path / "raw", tmp_path / "anonymous")
    assert [row["patient"] for row in rows[:2]] == ["c00", "c01"]
    assert capsys.readouterr().out.count("one PatientID stands in every file") == 1


def test_a_table_of_cases_gives_patients_folds_and_columns(tmp_path, capsys):
    raw = write(tmp_path / "raw", pairs(SIX))
    text = ";ID;Patient;Fold;site 0;c0;p1;3;Ä 1;c1.nii.gz;p1;4;B 2;c9;p9;;A 3;c3;;test;"
    (raw / "cases.csv").write_text(text.replace(" ", "\n"), encoding="utf-8-sig")
    _, rows = run(raw, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert [row["patient"] for row in rows] == ["p1", "p1", "c2", "c3", "c4", "c5"]
    assert [rows[k]["fold"] for k in (0, 1, 3)] == ["3", "4", "test"]
    assert [row["split"] for row in rows] == ["", "", "", "test", "", ""]
    assert [row["site"] for row in rows] == ["Ä", "B", "", "", "", ""]
    assert list(rows[0])[-2:] == ["mask", "site"] and rows[0]["mask"] == "labelsTr/c0.nii.gz"
    assert "cases.csv: 3 cases without a row, 1 rows without a case, such as c2" in printed
    assert "1 patients in several splits or folds, such as p1" in printed


# --- dataset.json ---

DESCRIPTIONS = {  # labels as text -> names by number, or the refusal
    '{"0": "background", "1": "a", "2": "b"}': {0: "background", 1: "a", 2: "b"},
    '{"background": 0, "a": 2, "b": 4}': {0: "background", 2: "a", 4: "b"},
    '{"background": 0, "3": 1, "1": 2}': {0: "background", 1: "3", 2: "1"},
    '{"0": 0, "1": 2, "2": 1}': {0: "0", 1: "2", 2: "1"},
    '{"0": "background", "1": "a", "2": "a"}': "two of them have one name or one number",
    '{"background": 0, "a": 1, "b": 1}': "two of them have one name or one number",
    '{"background": 0, "a": 1, "a": 2}': "'a' stands there twice",
    '{"background": 0, "whole": [1, 2]}': "regions and nnU-Net's ignore are not supported",
    '{"background": 0, "a": 1, "ignore": 2}': "ignore are not supported",
    '{"0": "background", "1": "a", "2": "Ignore"}': "ignore are not supported",
    '{"background": 0, "a": 1.7}': "not supported",
    '{"background": 0, "a": true}': "not supported",
    '{"background": 0, "a": 500}': "give the classes numbers up to 255",
    '{"a": 1}': "expected 0 = background and others",
    "[1]": "labels and modality as in the Decathlon",
    "[" * 9999: "labels and modality as in the Decathlon",
}


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_labels_are_one_to_one(tmp_path, text):
    (tmp_path / "dataset.json").write_text(f'{{"labels": {text}}}')
    expected = DESCRIPTIONS[text]
    if isinstance(expected, dict):
        assert preprocess.read_description(tmp_path) == (expected, None)
    else:
        found = refusal(preprocess.read_description, tmp_path)
        assert re.search(rf"dataset\.json: .*{expected}", found)


def test_a_byte_order_mark_and_a_modality_without_numbers_are_read(tmp_path):
    text = '{"labels": {"0": "background", "1": "Hüfte"}, "modality": "MRI"}'
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "dataset.json").write_text(text, encoding=encoding)
        assert preprocess.read_description(tmp_path) == ({0: "background", 1: "Hüfte"}, ["MRI"])


# --- new images ---


def names_of(paths: list[Path], **meta: object) -> list[str]:
    return [image.name for image in find_new(paths, META | meta)]


def series(slices: list[pydicom.Dataset], name: str = "IM{}", **attributes: object) -> Callable:
    for keyword, value in attributes.items():
        put(keyword, value)(slices)
    return lambda path: save_series(path, slices, name)


def link(target: str) -> Callable:
    return lambda path: path.symlink_to(path.parents[1] / target)


def marked(path: Path) -> None:
    """By its values it could be an image, but our mark says that it is a prediction."""
    write_mask(path, IMAGE.clip(0, 60).astype(np.uint8), GRID, None, PREDICTION)


RGB = {"picture_unit": "px", "channels": ["red", "green", "blue"], "normalisation": [None] * 3}
OWN_UID = {"SeriesInstanceUID": lambda ds, k: f"1.2.{k}"}
SLICES = r"left out, single DICOM slices .* a UID for each .*\): 12, such as"
NEW = {  # files, keys of meta.json, names or "! " and refusal, what is printed (parts by |)
    "masks": (
        {"case1": series(make_slices()), "case1/segmentation.nii.gz": MASK, "case2/imaging.nii.gz": IMAGE,
         "case2/segments/liver.nii.gz": 255.0 * (MASK > 0), "case2/pred.nii.gz": marked,
         "old/a.nii.gz": IMAGE, "old/volumes.csv": "image,mask,ml_a"}, {},
        "case1 case2_imaging", "left out, masks: 3, such as|left out, results: 2, such as"),
    "masks alone": ({"segmentation.nii.gz": MASK}, {}, "! .*no image in it as in training", "masks: 1"),
    "one name": ({"a.nii": IMAGE, "A.nii.gz": IMAGE}, {}, r"! .*A\.nii\.gz and .*a\.nii would both be called a", ""),
    "pictures": (
        {"a/1.png": COLOUR, "b/left/1.png": COLOUR, "2.TIF": COLOUR, "e_0000.png": COLOUR, "a/2_mask.png": DRAWN}, RGB,
        "2 a_1 b_left_1 e_0000", "left out, masks: 1, such as"),
    "a UID for each slice": ({"ct": series(make_slices(), **OWN_UID)}, {}, "! .*no image in it as in tr", SLICES),
    "a folder, too": ({"ct": series(make_slices(), "{0}/{0}.dcm", **OWN_UID)}, {}, "! .*no image in it as in tr", SLICES),
    "one number": (
        {f"mr{k}": series([make_enhanced(make_slices())], f"../mr/{k}", SeriesInstanceUID=f"1.{k}", SeriesNumber=5) for k in "12"}, {},
        "! .*new/mr and .*new/mr would both be called mr_5", ""),
    "links": (
        {"store/scan.nii": IMAGE, "a/store": link("store"), "b/a": link("a"), "a/b": link("b"), "a/top": link(".")}, {},
        "a_store_scan b_a_store_scan store_scan", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_new_images_have_different_names_and_masks_are_none(tmp_path, capsys, name):
    files, meta, expected, messages = NEW[name]
    try:
        found = " ".join(sorted(names_of([write(tmp_path / "new", files)], **meta)))
    except DataError as error:
        found = f"! {error}"
    assert re.fullmatch(f"{expected}.*" if found[0] == "!" else expected, found), found
    printed = capsys.readouterr().out
    assert all(re.search(message, printed) for message in messages.split("|")), printed


def test_an_export_is_read_series_by_series(tmp_path, capsys, monkeypatch):
    """PATIENT/STUDY/SERIES, two in a folder, one in two, a scout, a cut file, a report, DICOMDIR."""
    export = tmp_path / "export"

    def write(folder: str, number: int, slices: list[pydicom.Dataset], name: str = "IM{}") -> None:
        uid = f"1.2.{number}"
        series(slices, name, SeriesInstanceUID=uid, SeriesNumber=number)(export / folder)

    write("p1/ct/axial", 1, make_slices())
    write("p1/ct/scout", 2, make_slices(1, ImageType=["X", "X", "LOCALIZER"]))
    for number in (3, 4):
        write("p2/ct/all", number, [make_enhanced(make_slices())], f"enhanced{number}")
    write("p3/ct/axial", 5, make_slices())
    cut = export / "p3" / "ct" / "axial" / "IM6"
    cut.write_bytes(cut.read_bytes()[:300])
    slices = make_slices()
    write("p4/part1", 6, slices[:6])
    write("p4/part2", 6, slices[6:])
    for part in ("part1", "part2"):
        (export / "p4" / part / "LICENSE").write_text("CC BY, as download tools leave it")
    report = make_slices(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    del report[0].PixelData, report[0].Rows, report[0].Columns
    write("p5", 8, report, "report.dcm")
    write("p5", 7, make_slices())
    save(export / "p6" / "scan.nii.gz", IMAGE)
    (export / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (export / "readme.txt").write_text("exported on Monday")
    images = {image.name: image for image in find_new([export], META)}
    names = ["p1_ct_axial", "p2_ct_all_3", "p2_ct_all_4", "p3_ct_axial", "p4", "p5", "p6_scan"]
    assert list(images) == names
    left_out = {"p4": ["2, such as LICENSE"], "p5": ["1, such as report.dcm"]}
    for name in ("p1_ct_axial", "p2_ct_all_4", "p4", "p5"):
        on_grid, affine, header, shape, notes = read_new(images[name], META)
        assert on_grid.shape == (1, 5, 6, 12) and shape == (5, 6, 12) and header is None
        assert [detail for _, detail in notes] == left_out.get(name, [])
        assert np.allclose(affine[2], [0, 0, 2.5, 0])
    assert re.search("1 are cut, .* IM6", refusal(read_new, images["p3_ct_axial"], META))
    printed = capsys.readouterr().out
    assert "left out, no images as in training: 1, such as" in printed
    assert re.search(r"left out, single DICOM slices .*: 1, such as .*/scout/IM0", printed)
    monkeypatch.chdir(export / "p1" / "ct" / "axial")
    assert names_of([Path(".")]) == ["axial"]
    found = refusal(names_of, [Path("."), export / "p3" / "ct" / "axial"])
    assert "axial: rename one, or give the folder above them" in found


def test_channel_files_are_one_image_in_the_order_of_their_numbers(tmp_path):
    meta = META | {"channels": ["T1", "T2"], "normalisation": [None, None]}
    dark = save(tmp_path / "c0_0001.nii.gz", -IMAGE)
    bright = save(tmp_path / "c0_0000.nii.gz", IMAGE)
    save(tmp_path / "c1_0001.nii.gz", IMAGE)
    save(tmp_path / "scan_2024.nii.gz", np.stack([IMAGE, IMAGE], 3))
    images = {one.name: one for one in find_new([tmp_path], meta)}
    assert sorted(images) == ["c0", "c1", "scan_2024"]
    first, second = read_new(images["c0"], meta)[0]
    assert np.allclose(first, -second, atol=0.01) and first.max() > 0
    assert len(read_new(images["scan_2024"], meta)[0]) == 2
    assert len(find_new([tmp_path], META)) == 4  # to a network of one channel
    for paths in ([bright, dark], [dark, bright], [dark, tmp_path, bright]):
        image = next(image for image in find_new(paths, meta) if image.name == "c0")
        assert np.array_equal(read_new(image, meta)[0], np.stack([first, second]))
    more = [save(tmp_path / "more" / f"c2_000{k}.nii.gz", IMAGE) for k in range(3)]
    for image, message in (
        (images["c1"], "c1_0001.nii.gz: 1 channels, expected ['T1', 'T2']"),
        (find_new(more, meta)[0], "c2_0000.nii.gz: 3 channels, expected"),
        (find_new(more[1:], meta)[0], "c2_0001.nii.gz: channel files [1, 2], expected 0"),
    ):
        assert message in refusal(read_new, image, meta)
