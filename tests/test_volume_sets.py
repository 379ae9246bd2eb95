"""segmentation/preprocess.py: layouts, tables, dataset.json, splits and the cache that is written."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmentation import preprocess
from segmentation.preprocess import DataError, main
from tests.conftest import read_table
from tests.test_volumes import (
    SPACING,
    block,
    draw,
    make_enhanced,
    make_slices,
    oblique,
    save,
    save_picture,
    save_series,
    set_pixels,
)

NAMES = [f"c{k}" for k in range(6)]


def make_set(raw: Path, names: list[str], labels: object = None, **description: object) -> Path:
    """imagesTr and labelsTr with these cases, and a dataset.json unless `labels` is None."""
    image, mask = block()
    for k, name in enumerate(names):
        save(raw / "imagesTr" / f"{name}.nii.gz", image + np.int16(k))
        save(raw / "labelsTr" / f"{name}.nii.gz", mask)
    if labels is not None:
        text = json.dumps({"labels": labels, "modality": {"0": "MRI"}} | description)
        (raw / "dataset.json").write_text(text)
    return raw


def run(raw: Path, out: Path, *options: str) -> tuple[dict, list[dict]]:
    main(["--data", str(raw), "--out", str(out), "--workers", "2", *options])
    return json.loads((out / "meta.json").read_text()), read_table(out / "index.csv")


def array(out: Path, name: str) -> np.ndarray:
    return np.load(out / "volumes" / f"{name}.npy")


# --- the cache ---


def test_a_cache_has_everything_once_and_nothing_of_the_reading_is_left(tmp_path, monkeypatch):
    reads = []
    read_nifti = preprocess.read_nifti
    monkeypatch.setattr(
        preprocess, "read_nifti", lambda *a: (reads.append(a[0]), read_nifti(*a))[1]
    )
    raw = make_set(tmp_path / "raw", NAMES, {"0": "background", "1": "a", "2": "b"})
    out = tmp_path / "cache"
    meta, rows = run(raw, out)
    assert len(reads) == len(set(reads)) == 12
    assert {path.name for path in out.iterdir()} == {"volumes", "index.csv", "meta.json"}
    assert meta["classes"] == ["background", "a", "b"] and meta["spacing"] == list(SPACING)
    assert meta["slice_axis"] == 2 and meta["n"] == 6 and meta["shape"] == [12, 10, 8]
    assert meta["picture_unit"] is None and meta["format"] == 1 and meta["task"] == "segmentation"
    assert list(rows[0]) == ["id", "patient", "fold", "split", "digest", "image", "mask"]
    assert rows[1]["image"] == "imagesTr/c1.nii.gz" and len(rows[1]["digest"]) == 16
    assert sorted(row["fold"] for row in rows) == ["0", "0", "1", "2", "3", "4"]
    image = array(out, "c1.image")
    assert image.dtype == np.float16 and image.shape == (1, 12, 10, 8)
    assert float(image.astype(float).std()) == pytest.approx(1, abs=1e-3)
    assert np.array_equal(array(out, "c1.mask"), block()[1])
    points = array(out, "c1.points")
    assert (block()[1][tuple(points[:, 1:].T)] == points[:, 0]).all() and len(points) == 150
    truth = nib.load(out / "volumes" / "c1.truth.nii.gz")
    assert truth.get_data_dtype() == np.uint8
    assert np.array_equal(truth.affine, nib.load(raw / "imagesTr" / "c1.nii.gz").affine)
    with pytest.raises(DataError, match="exists already"):
        run(raw, out)


def test_spacing_by_value_keep_and_like(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0", "c1"], {"0": "background", "1": "a", "2": "b"})
    coarse = tmp_path / "coarse"
    meta, _ = run(raw, coarse, "--spacing", "2", "3", "2.5")
    assert array(coarse, "c0.mask").shape == (6, 5, 8) and meta["spacing"] == [2, 3, 2.5]
    other = tmp_path / "other"
    save(other / "imagesTr" / "d0.nii.gz", block()[0], (2, 3, 2.5))
    save(other / "labelsTr" / "d0.nii.gz", block()[1], (2, 3, 2.5))
    meta, rows = run(other, tmp_path / "like", "--like", str(coarse))
    assert [row["fold"] for row in rows] == ["test"] and meta["classes"][1] == "a"
    assert array(tmp_path / "like", "d0.mask").shape == (12, 10, 8)
    meta, _ = run(other, tmp_path / "keep", "--spacing", "keep")
    assert array(tmp_path / "keep", "d0.mask").shape == (12, 10, 8) and not meta["resample"]
    (other / "dataset.json").write_text('{"labels": {"0": "background", "1": "other"}}')
    with pytest.raises(DataError, match=r"labels .*other.*, but .*coarse has"):
        run(other, tmp_path / "wrong", "--like", str(coarse))


def test_identical_images_share_a_fold_whatever_type_stores_them(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    image = nib.load(raw / "imagesTr" / "c2.nii.gz").get_fdata()
    save(raw / "imagesTr" / "copy.nii.gz", image)
    save(raw / "labelsTr" / "copy.nii.gz", np.roll(block()[1], 1, 2))
    _, rows = run(raw, tmp_path / "cache")
    by_id = {row["id"]: row for row in rows}
    for column in ("patient", "fold", "digest"):
        assert by_id["copy"][column] == by_id["c2"][column]
    assert "c2 and copy are one image" in capsys.readouterr().out


def test_ct_is_clipped_to_the_foreground_of_the_training_cases(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0"], {"0": "background", "1": "a", "2": "b"})
    description = json.loads((raw / "dataset.json").read_text())
    save(raw / "imagesTr" / "c0.nii.gz", np.stack([block()[0]] * 2, 3))
    (raw / "dataset.json").write_text(
        json.dumps(description | {"modality": {"0": "CT scan", "1": "T1"}})
    )
    meta, _ = run(raw, tmp_path / "cache")
    inside = block()[0][block()[1] > 0]
    low, high = np.percentile(inside, (0.5, 99.5))
    ct, mr = meta["normalisation"]
    assert (ct["low"], ct["high"]) == pytest.approx((low, high)) and mr is None
    expected = (block()[0].clip(low, high) - inside.clip(low, high).mean()) / ct["std"]
    assert np.allclose(array(tmp_path / "cache", "c0.image")[0], expected, rtol=1e-3, atol=1e-2)
    printed = capsys.readouterr().out
    assert "CT scan (as CT: clipped to" in printed and "T1 (each image to mean 0" in printed


def test_ct_by_its_many_names():
    names = ("CT", "ct", "CT scan", "CTA", "CBCT", "Computed Tomography", "CT_portal")
    assert all(map(preprocess.is_ct, names))
    assert not any(map(preprocess.is_ct, ("MRI", "T1", "CT1", "PET", "PET/CT", "ADC", "SPECT")))


def test_too_little_memory_is_named_and_skipped_in_every_step(tmp_path, capsys, monkeypatch):
    raw = make_set(tmp_path / "raw", NAMES[:4])
    read = preprocess.read_volume
    to_grid = preprocess.to_grid

    def fail_to_read(path: Path, *more: object, **options: object) -> object:
        if path.name == "c1.nii.gz":
            raise MemoryError
        return read(path, *more, **options)

    def fail_to_resample(path: Path, *more: object) -> np.ndarray:
        if path.name == "c3.nii.gz":
            raise MemoryError("Unable to allocate 52 TiB")
        return to_grid(path, *more)

    monkeypatch.setattr(preprocess, "read_volume", fail_to_read)
    monkeypatch.setattr(preprocess, "to_grid", fail_to_resample)
    meta, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [row["id"] for row in rows] == ["c0", "c2"] and meta["n"] == meta["skipped"] == 2
    printed = capsys.readouterr().err
    assert "c1.nii.gz: not enough memory" in printed
    assert "c3.nii.gz: not enough memory for it (Unable" in printed
    assert [row["source"] for row in read_table(tmp_path / "cache" / "skipped.csv")] == ["c1", "c3"]
    assert not list((tmp_path / "cache" / "volumes").glob("c3*"))


@pytest.mark.parametrize("spacing", ["0.01", "90"])
def test_a_grid_that_is_impossible_is_refused_before_it_is_made(tmp_path, capsys, spacing):
    raw = make_set(tmp_path / "raw", ["c0"])
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache", "--spacing", spacing, spacing, spacing)
    assert "[12, 10, 8] voxels of [1.0, 1.5, 2.5] mm would become" in capsys.readouterr().err


def test_options_that_contradict_each_other_are_refused(capsys):
    for words in ("--spacing 1 2", "--spacing 0 1 1", "--spacing few", "--test-fraction 1",
                  "--patient-regex (", "--like x --spacing keep"):  # fmt: skip
        with pytest.raises(SystemExit):
            preprocess.parse_args(["--data", "raw", "--out", "out", *words.split()])


# --- what the network will see ---


def test_classes_that_the_grid_loses_are_counted(tmp_path, capsys):
    raw = make_set(
        tmp_path / "raw", NAMES, {"0": "background", "1": "organ", "2": "vessel", "3": "none"}
    )
    for k, name in enumerate(NAMES):
        mask = block()[1].clip(0, 1)
        mask[4, 5, 3] = 2  # one voxel
        save(raw / "labelsTr" / f"{name}.nii.gz", mask if k else 0 * mask)
    run(raw, tmp_path / "cache", "--spacing", "3", "3", "3")
    printed = capsys.readouterr().out
    assert "vessel: lost on this grid in 5 cases; in 5 of 6 masks, median 0 voxels" in printed
    assert "organ: in 5 of 6 masks, median" in printed and "none: in 0 of 6 masks\n" in printed
    assert "note: 1 masks are empty" in printed


def test_slices_are_cut_across_an_axis_of_one_voxel(tmp_path):
    for k in range(3):
        image, mask = block((12, 10, 8))
        for folder, voxels in (("imagesTr", image + np.int16(k)), ("labelsTr", mask)):
            save(tmp_path / "raw" / folder / f"c{k}.nii.gz", voxels[:, 4:5], (1, 1, 1))
    meta, _ = run(tmp_path / "raw", tmp_path / "cache")
    assert meta["slice_axis"] == 1


def test_views_whose_thickest_axes_differ_are_counted(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    for name in NAMES[:4]:
        save(raw / "imagesTr" / f"{name}.nii.gz", block()[0] + np.int16(len(name)), (1, 1, 8))
        save(raw / "labelsTr" / f"{name}.nii.gz", block()[1], (1, 1, 8))
    for name in NAMES[4:]:
        save(raw / "imagesTr" / f"{name}.nii.gz", block()[0], (8, 1, 1))
        save(raw / "labelsTr" / f"{name}.nii.gz", block()[1], (8, 1, 1))
    run(raw, tmp_path / "cache")
    assert "thickest axis z in 4, x in 2, but slices" in capsys.readouterr().out


# --- layouts ---


def test_series_and_enhanced_files_are_training_images(tmp_path):
    """Masks lie as a program keeps them that reads the series, or turned as dcm2niix does it."""
    raw = tmp_path / "raw"
    mask = np.zeros((5, 6, 12), np.int16)
    mask[1:4, 1:5, 3:8] = 1
    for k in range(4):
        slices = make_slices()
        for z, ds in enumerate(slices):
            ds.SeriesInstanceUID = f"1.2.{k}"
            pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(6, 5)
            set_pixels(ds, pixels + 500 * mask[..., z].T + k)
        folder = raw / "imagesTr" / f"c{k}"
        path = save_series(folder, slices)
        if k == 3:
            path = raw / "imagesTr" / "c3.dcm"
            make_enhanced(slices).save_as(path, enforce_file_format=True)
            folder.rename(tmp_path / "c3")
        affine = preprocess.read_volume(path, []).affine
        own = mask
        if k % 2:  # the rows from below
            own = mask[:, ::-1]
            affine = affine @ nib.orientations.inv_ornt_aff([[0, 1], [1, -1], [2, 1]], mask.shape)
        (raw / "labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(own, affine), raw / "labelsTr" / f"c{k}.nii.gz")
    meta, rows = run(raw, tmp_path / "cache", "--spacing", "keep")
    assert [row["image"] for row in rows][2:] == ["imagesTr/c2", "imagesTr/c3.dcm"]
    assert meta["channels"] == ["CT"] and meta["normalisation"][0] is not None  # by the headers
    for row in rows:
        image = array(tmp_path / "cache", f"{row['id']}.image")[0]
        inside = array(tmp_path / "cache", f"{row['id']}.mask") > 0
        assert inside.sum() == 60 and image[inside].min() >= image[~inside].max()


def test_nnunet_names_are_channels_and_a_missing_one_is_named(tmp_path, capsys):
    names = {"0": "T1", "1": "T2"}
    raw = make_set(
        tmp_path / "raw", ["c0", "c1", "c2"], {"background": 0, "a": 1, "b": 2}, channel_names=names
    )
    folder = raw / "imagesTr"
    for name in ("c0", "c1", "c2"):
        save(
            folder / f"{name}_0001.nii.gz",
            -nib.load(folder / f"{name}.nii.gz").get_fdata().astype(np.int16),
        )
        (folder / f"{name}.nii.gz").rename(folder / f"{name}_0000.nii.gz")
    meta, rows = run(raw, tmp_path / "cache")
    assert meta["channels"] == ["T1", "T2"] and [row["id"] for row in rows] == ["c0", "c1", "c2"]
    assert rows[0]["image"] == "imagesTr/c0_0000.nii.gz;imagesTr/c0_0001.nii.gz"
    first, second = array(tmp_path / "cache", "c0.image")
    assert np.allclose(first, -second, atol=0.01)
    (folder / "c0_0000.nii.gz").unlink()
    (folder / "c1_0001.nii.gz").unlink()
    save(folder / "c2_0001.nii.gz", block()[0], (1, 1.5, 3))
    with pytest.raises(DataError, match="3 cases or files"):
        run(raw, tmp_path / "bad")
    printed = capsys.readouterr().err
    assert "c0_0001.nii.gz: its channel files are [1], expected 0, 1, ..." in printed
    assert "c1_0000.nii.gz: 1 channels, expected ['T1', 'T2']" in printed
    assert "c2_0001.nii.gz: affine" in printed


def test_validation_and_test_folders_are_official_splits(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    for suffix, count in (("Va", 2), ("Ts", 1)):
        for k in range(count):
            save(raw / f"images{suffix}" / f"{suffix}{k}.nii.gz", block()[0] + np.int16(20 + k))
            save(raw / f"labels{suffix}" / f"{suffix}{k}.nii.gz", block()[1])
    save(raw / "imagesUnlabelled" / "u.nii.gz", block()[0])
    save(raw / "test" / "images" / "t.nii.gz", block()[0])
    _, rows = run(raw, tmp_path / "cache")
    folds = {row["id"]: (row["fold"], row["split"]) for row in rows}
    assert folds["Va0"] == folds["Va1"] == ("0", "val") and folds["Ts0"] == ("test", "test")
    assert {folds[name][0] for name in NAMES} == {"1", "2", "3", "4"}
    printed = capsys.readouterr().out
    assert "imagesUnlabelled: left out, images such as u.nii.gz" in printed
    assert (
        "note: 1 images in" in printed and "test/images have no masks and are left out" in printed
    )


def test_pictures_with_official_splits_endings_and_names_in_any_case(tmp_path, capsys):
    picture, mask = draw()
    number = 0
    for split, count in (("Train", 8), ("VAL", 2), ("test", 2)):
        for k in range(count):
            number += 1
            folder = tmp_path / "raw" / split
            save_picture(folder / "Images" / f"{k}.tif", np.roll(picture, number, 0))
            save_picture(folder / "labels" / f"{k}_{'gt' if k else 'mask'}.png", 255 * mask)
    meta, rows = run(tmp_path / "raw", tmp_path / "cache")
    folds = {row["id"]: row["fold"] for row in rows}
    assert folds["val_0"] == folds["val_1"] == "0" and folds["test_0"] == folds["test_1"] == "test"
    assert {folds[f"train_{k}"] for k in range(8)} == {"1", "2", "3", "4"}
    assert meta["picture_unit"] == "px" and meta["spacing"] == [1, 1, 1]
    assert meta["channels"] == ["red", "green", "blue"] and meta["slice_axis"] == 2
    assert meta["values"] == [0, 255] and "255 is taken as class 1" in capsys.readouterr().out
    assert rows[0]["mask"] == "Train/labels/0_mask.png"


def test_gray_pictures_a_file_a_channel(tmp_path):
    picture, mask = draw()
    raw = tmp_path / "raw"
    for k in range(3):
        for number in range(2):
            save_picture(raw / "imagesTr" / f"e{k}_000{number}.png", picture + np.uint8(k + number))
        save_picture(raw / "labelsTr" / f"e{k}.png", mask)
    meta, _ = run(raw, tmp_path / "cache")
    assert meta["channels"] == ["channel 0", "channel 1"]
    assert array(tmp_path / "cache", "e0.image").shape == (2, 32, 24, 1)


def test_pictures_and_volumes_are_not_mixed(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["v"])
    save(raw / "imagesTr" / "v.nii.gz", np.stack([block()[0]] * 3, 3))
    save_picture(raw / "images" / "p.png", draw()[0])
    save_picture(raw / "masks" / "p.png", draw()[1])
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert "p.png: a picture, expected a volume" in capsys.readouterr().err


def test_what_looks_like_a_case_and_is_none_is_named_once_for_each_mistake(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    save(raw / "imagesTr" / "c0.nii_old.nii.gz", block()[0] + np.int16(50))
    for k in range(40):
        save(raw / "labelsTr" / f"label{k:04d}.nii.gz", block()[1])
    (raw / "imagesTr" / "c9.nii.gz").mkdir()
    save(raw / "labelsTr" / "c2.nii", block()[1])
    (raw / "imagesTr" / "c0.nrrd").write_bytes(b"NRRD0004")
    (raw / "imagesTr" / "._c0.nii.gz").write_text("of a Mac")
    save_series(raw / "imagesTr" / "nested" / "series", make_slices(2))
    with pytest.raises(DataError, match="46 cases or files"):
        run(raw, tmp_path / "cache")
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    expected = [
        "c9.nii.gz: a folder, expected a file, or one DICOM series in it",
        "(and 1 more such as imagesTr/nested)",
        "c2.nii: 2 files of this name",
        "c0.nii_old.nii.gz: no mask of that name in labelsTr, or several (and 1 more such as imagesTr/c2",
        "label0000.nii.gz: no image of that name in imagesTr (and 39 more such as labelsTr/label0001",
    ]
    assert len(lines) == len(expected) - 1
    for message in expected:
        assert any(message in line for line in lines), (message, lines)
    assert "imagesTr: left out: 1 NRRD, such as c0.nrrd" in printed.out
    _, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [row["id"] for row in rows] == ["c0", "c1", "c3", "c4", "c5"]


def test_the_notes_of_a_case_are_printed_with_its_error(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0"])
    nifti = nib.Nifti1Image(block()[0], None)
    nib.save(nifti, raw / "imagesTr" / "c0.nii.gz")
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert "as its image" in (printed := capsys.readouterr().err)
    assert "(note: no sform and no qform" in printed


FOLDERS = {  # files -> message
    "drive": (["training/images/21_training.tif", "training/1st_manual/21_manual1.gif"], "no mask of|1st_man"),
    "organs": (["s0/ct.nii.gz", "s0/segmentations/liver.nii.gz"], "but s0/ct.nii.gz, s0/seg"),
    "too high": (["top/imagesTr/a.nii.gz", "top/labelsTr/a.nii.gz"], "one folder too high: use --data .*top"),
    "btcv": (["imagesTr/img1.nii.gz", "labelsTr/label1.nii.gz"], "no image with a mask of its name, but imagesTr"),
    "empty": ([], "but no files; expected imagesTr/NAME.nii.gz"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_cases_is_described(tmp_path, capsys, name):
    files, message = FOLDERS[name]
    (tmp_path / "raw").mkdir()
    for file in files:
        path = tmp_path / "raw" / file
        if file.endswith("gz"):
            save(path, block()[1] if "label" in file else block()[0])
        else:
            save_picture(path, draw()[1])
    with pytest.raises(DataError, match=r"From other formats|too high") as error:
        run(tmp_path / "raw", tmp_path / "cache")
    printed = capsys.readouterr()
    for part in message.split("|"):
        assert re.search(part, f"{error.value} {printed.out} {printed.err}")


# --- patients and folds ---


def test_scans_of_one_patient_share_a_fold(tmp_path, capsys):
    names = [f"patient{k:03d}_frame{frame}" for k in range(8) for frame in ("01", "12")]
    raw = make_set(tmp_path / "raw", names)
    _, rows = run(raw, tmp_path / "apart")
    assert len({row["patient"] for row in rows}) == 16
    assert "16 cases look like 8 patients, such as patient000" in capsys.readouterr().out
    _, rows = run(raw, tmp_path / "cache", "--patient-regex", "(patient[0-9]+)_")
    assert len({(row["patient"], row["fold"]) for row in rows}) == 8
    assert all(row["id"].startswith(row["patient"]) for row in rows)
    with pytest.raises(DataError, match="'person' finds nothing in 16 names: patient000_"):
        run(raw, tmp_path / "none", "--patient-regex", "person")
    # The path counts where the name says nothing, and both overrule cases.csv.
    (raw / "cases.csv").write_text("\n".join(["id,patient", *(f"{name},p" for name in names)]))
    _, rows = run(raw, tmp_path / "below", "--patient-regex", "imagesTr/(patient[0-9]+)")
    assert len({row["patient"] for row in rows}) == 8


def test_a_table_of_cases_gives_patients_folds_and_columns(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    rows = [
        "id;patient;fold;site;mask",
        "c0;p1;3;Ä;x",
        "c1.nii.gz;p1;4;B;",
        "c9;p9;;A;",
        "c3;;test;;",
    ]
    (raw / "cases.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    _, rows = run(raw, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert [row["patient"] for row in rows] == ["p1", "p1", "c2", "c3", "c4", "c5"]
    assert [rows[k]["fold"] for k in (0, 1, 3)] == ["3", "4", "test"]
    assert [row["site"] for row in rows] == ["Ä", "B", "", "", "", ""]
    assert rows[0]["table_mask"] == "x" and rows[0]["mask"] == "labelsTr/c0.nii.gz"
    assert "cases.csv: 3 cases without a row in it, such as c2" in printed
    assert "cases.csv: 1 rows without a case, such as c9" in printed
    assert "1 patients in several splits or folds, such as p1" in printed


TABLES = {
    "name,site\nc0,A": r"columns \['name', 'site'\], expected different ones, id too",
    "id,site,site\nc0,A,B": "expected different ones",
    "id,fold\nc0,7": r"cases\.csv:2: fold '7', split '', expected one of the two: fold 0 to 4",
    "id,fold\nc0,1\nc0,2": r"cases\.csv:3: c0 stands there twice",
    "id,fold\nx,1": "no id of its rows is a case, expected such as c0",
    "id,fold,split\nc0,1,val": "expected one of the two",
    "id,age\nc0,1,5": "3 fields for 2 columns; decimal commas",
    'id,age\n"c0,1': "unexpected end of data",
}


@pytest.mark.parametrize("text", TABLES)
def test_a_table_of_cases_that_does_not_fit_is_refused(tmp_path, text):
    raw = make_set(tmp_path / "raw", ["c0", "c1"])
    (raw / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=TABLES[text]):
        run(raw, tmp_path / "cache")
    (raw / "cases.csv").write_bytes("id,site\nc0,Hüfte".encode("latin-1"))
    with pytest.raises(DataError, match=r"cases\.csv: 'utf-8' codec can't decode"):
        run(raw, tmp_path / "cache")


# --- dataset.json ---

DESCRIPTIONS = {  # labels as text -> names by number, or the refusal
    '{"0": "background", "1": "a", "2": "b"}': {0: "background", 1: "a", 2: "b"},
    '{"background": 0, "a": 2, "b": 4}': {0: "background", 2: "a", 4: "b"},
    '{"background": 0, "3": 1, "1": 2}': {0: "background", 1: "3", 2: "1"},
    '{"0": 0, "1": 2, "2": 1}': {0: "0", 1: "2", 2: "1"},
    '{"0": "background", "1": "a", "2": "a"}': "another label has this name or this number",
    '{"background": 0, "a": 1, "b": 1}': "another label has this name or this number",
    '{"background": 0, "a": 1, "a": 2}': "'a' stands there twice",
    '{"background": 0, "whole": [1, 2]}': "regions and nnU-Net's ignore are not supported",
    '{"background": 0, "a": 1, "ignore": 2}': "ignore are not supported",
    '{"0": "background", "1": "a", "2": "Ignore"}': "ignore are not supported",
    '{"background": 0, "a": 1.7}': "no whole number",
    '{"background": 0, "a": 1e999}': "no whole number",
    '{"background": 0, "a": true}': "no whole number",
    '{"background": 0, "a": 500}': "give the classes numbers up to 255",
    '{"a": 1}': "without 0 = background and others",
    "[1]": "expected labels and modality as in the Decathlon",
    "[" * 9999: "expected labels and modality as in the Decathlon",
}


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_labels_are_one_to_one(tmp_path, text):
    (tmp_path / "dataset.json").write_text(f'{{"labels": {text}}}')
    expected = DESCRIPTIONS[text]
    if isinstance(expected, dict):
        assert preprocess.read_description(tmp_path) == (expected, None)
        return
    with pytest.raises(DataError, match=rf"dataset\.json: .*{expected}"):
        preprocess.read_description(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_and_a_modality_without_numbers_are_read(tmp_path, encoding):
    text = '{"labels": {"0": "background", "1": "Hüfte"}, "modality": "MRI"}'
    (tmp_path / "dataset.json").write_text(text, encoding=encoding)
    labels, channels = preprocess.read_description(tmp_path)
    assert labels[1] == "Hüfte" and channels == "MRI"


def test_values_without_names_are_refused(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    save(raw / "labelsTr" / "c1.nii.gz", 255 * block()[1].clip(0, 1))
    save(raw / "labelsTr" / "c2.nii.gz", 4 * block()[1])
    with pytest.raises(DataError, match="2 cases"):
        run(raw, tmp_path / "cache")
    printed = capsys.readouterr().err
    assert "c1.nii.gz: mask values [0, 255], expected [0, 1, 2] without gaps" in printed
    _, rows = run(raw, tmp_path / "rest", "--skip-bad")
    assert [row["id"] for row in rows] == ["c0", "c3", "c4", "c5"]
    raw = make_set(tmp_path / "named", ["c0"], {"background": 0, "a": 1})
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert "mask values [0, 1, 2], expected [0, 1]" in capsys.readouterr().err


def test_oblique_axes_keep_their_affine_in_the_truth(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0"])
    for folder, voxels in (("imagesTr", block()[0]), ("labelsTr", block()[1])):
        nib.save(nib.Nifti1Image(voxels, oblique()), raw / folder / "c0.nii.gz")
    run(raw, tmp_path / "cache")
    truth = nib.load(tmp_path / "cache" / "volumes" / "c0.truth.nii.gz")
    assert np.allclose(truth.affine, oblique(), atol=1e-5)


def test_a_smeared_mask_gives_no_class_a_name(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    smeared = block()[1].copy()
    smeared[0, 0, :3] = (3, 4, 255)
    save(raw / "labelsTr" / "c1.nii.gz", smeared)
    meta, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert meta["classes"] == ["background", "1", "2"] and len(rows) == 5
    assert "mask values [0, 1, 2, 3, 4, 255], expected [0, 1, 2]" in capsys.readouterr().err
