"""segmentation/preprocess.py: layouts, tables, dataset.json, splits, the cache, and new images."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from segmentation import preprocess
from segmentation.preprocess import PREDICTION, DataError, find_new, main, read_new, write_mask
from tests.conftest import read_table
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
    oblique,
    put,
    save,
    save_picture,
    save_series,
    set_pixels,
)

NAMES = [f"c{k}" for k in range(6)]
LABELS = {"0": "background", "1": "a", "2": "b"}


def save_pair(
    raw: Path,
    name: str,
    k: int = 0,
    mask: np.ndarray = MASK,
    spacing: tuple = SPACING,
    end: str = "Tr",
) -> None:
    """An image, which differs from others by k, and its mask."""
    save(raw / f"images{end}" / f"{name}.nii.gz", IMAGE + np.int16(k), spacing)
    save(raw / f"labels{end}" / f"{name}.nii.gz", mask, spacing)


def make_set(raw: Path, names: list[str], labels: object = None, **description: object) -> Path:
    """imagesTr and labelsTr with these cases, and a dataset.json unless `labels` is None."""
    for k, name in enumerate(names):
        save_pair(raw, name, k)
    if labels is not None:
        text = json.dumps({"labels": labels, "modality": {"0": "MRI"}} | description)
        (raw / "dataset.json").write_text(text)
    return raw


def run(raw: Path, out: Path, *options: object) -> tuple[dict, list[dict]]:
    main(["--data", str(raw), "--out", str(out), "--workers", "2", *map(str, options)])
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
    raw = make_set(tmp_path / "raw", NAMES, LABELS)
    out = tmp_path / "cache"
    meta, rows = run(raw, out)
    assert len(reads) == len(set(reads)) == 12
    assert {path.name for path in out.iterdir()} == {"volumes", "index.csv", "meta.json"}
    expected = {
        "classes": ["background", "a", "b"],
        "spacing": list(SPACING),
        "slice_axis": 2,
        "n": 6,
    }
    expected |= {"shape": [12, 10, 8], "picture_unit": None, "format": 1, "task": "segmentation"}
    assert expected.items() <= meta.items()
    assert list(rows[0]) == ["id", "patient", "fold", "split", "digest", "image", "mask"]
    assert rows[1]["image"] == "imagesTr/c1.nii.gz" and len(rows[1]["digest"]) == 16
    assert sorted(row["fold"] for row in rows) == ["0", "0", "1", "2", "3", "4"]
    image = array(out, "c1.image")
    assert image.dtype == np.float16 and image.shape == (1, 12, 10, 8)
    assert float(image.astype(float).std()) == pytest.approx(1, abs=1e-3)
    assert np.array_equal(array(out, "c1.mask"), MASK)
    points = array(out, "c1.points")
    assert (MASK[tuple(points[:, 1:].T)] == points[:, 0]).all() and len(points) == 150
    truth = nib.load(out / "volumes" / "c1.truth.nii.gz")
    assert truth.get_data_dtype() == np.uint8 and np.array_equal(truth.affine, GRID)
    with pytest.raises(DataError, match="exists already"):
        run(raw, out)


def test_oblique_axes_keep_their_affine_in_the_truth(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0"])
    for folder, voxels in (("imagesTr", IMAGE), ("labelsTr", MASK)):
        nib.save(nib.Nifti1Image(voxels, oblique()), raw / folder / "c0.nii.gz")
    run(raw, tmp_path / "cache")
    truth = nib.load(tmp_path / "cache" / "volumes" / "c0.truth.nii.gz")
    assert np.allclose(truth.affine, oblique(), atol=1e-5)


def test_spacing_by_value_keep_and_like(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0", "c1"], LABELS)
    coarse = tmp_path / "coarse"
    meta, _ = run(raw, coarse, "--spacing", 2, 3, 2.5)
    assert array(coarse, "c0.mask").shape == (6, 5, 8) and meta["spacing"] == [2, 3, 2.5]
    other = tmp_path / "other"
    save_pair(other, "d0", spacing=(2, 3, 2.5))
    meta, rows = run(other, tmp_path / "like", "--like", coarse)
    assert [row["fold"] for row in rows] == ["test"] and meta["classes"][1] == "a"
    assert array(tmp_path / "like", "d0.mask").shape == (12, 10, 8)
    meta, _ = run(other, tmp_path / "keep", "--spacing", "keep")
    assert array(tmp_path / "keep", "d0.mask").shape == (12, 10, 8) and not meta["resample"]
    (other / "dataset.json").write_text('{"labels": {"0": "background", "1": "other"}}')
    with pytest.raises(DataError, match=r"labels .*other.*, but .*coarse has"):
        run(other, tmp_path / "wrong", "--like", coarse)


def test_identical_images_share_a_fold_whatever_type_stores_them(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    save(raw / "imagesTr" / "copy.nii.gz", (IMAGE + 2).astype(float))
    save(raw / "labelsTr" / "copy.nii.gz", np.roll(MASK, 1, 2))
    _, rows = run(raw, tmp_path / "cache")
    by_id = {row["id"]: row for row in rows}
    for column in ("patient", "fold", "digest"):
        assert by_id["copy"][column] == by_id["c2"][column]
    assert "c2 and copy are one image" in capsys.readouterr().out


def test_ct_is_clipped_to_the_foreground_of_the_training_cases(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0"], LABELS, modality={"0": "CT scan", "1": "T1"})
    save(raw / "imagesTr" / "c0.nii.gz", np.stack([IMAGE] * 2, 3))
    meta, _ = run(raw, tmp_path / "cache")
    inside = IMAGE[MASK > 0]
    low, high = np.percentile(inside, (0.5, 99.5))
    ct, mr = meta["normalisation"]
    assert (ct["low"], ct["high"]) == pytest.approx((low, high)) and mr is None
    expected = (IMAGE.clip(low, high) - inside.clip(low, high).mean()) / ct["std"]
    assert np.allclose(array(tmp_path / "cache", "c0.image")[0], expected, rtol=1e-3, atol=1e-2)
    printed = capsys.readouterr().out
    assert "CT scan (as CT: clipped to" in printed and "T1 (each image to mean 0" in printed


def test_ct_by_its_many_names():
    values = np.arange(9.0)
    for name in ("CT", "ct", "CT scan", "CTA", "CBCT", "Computed Tomography", "CT_portal"):
        assert preprocess.ct_constants(name, values)["mean"] == 4
    for name in ("MRI", "T1", "CT1", "PET", "PET/CT", "ADC", "SPECT"):
        assert preprocess.ct_constants(name, values) is None


def test_too_little_memory_is_named_and_skipped_in_every_step(tmp_path, capsys, monkeypatch):
    raw = make_set(tmp_path / "raw", NAMES[:4])

    def fail(name: str, case: str, *reason: str) -> None:
        function = getattr(preprocess, name)

        def wrapped(path: Path, *more: object) -> object:
            if path.name == case:
                raise MemoryError(*reason)
            return function(path, *more)

        monkeypatch.setattr(preprocess, name, wrapped)

    fail("read_volume", "c1.nii.gz")
    fail("to_grid", "c3.nii.gz", "Unable to allocate 52 TiB")
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


def test_options_that_contradict_each_other_are_refused():
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
        mask = MASK.clip(0, 1)
        mask[4, 5, 3] = 2  # one voxel
        save(raw / "labelsTr" / f"{name}.nii.gz", mask if k else 0 * mask)
    run(raw, tmp_path / "cache", "--spacing", 3, 3, 3)
    printed = capsys.readouterr().out
    assert "vessel: lost on this grid in 5 cases; in 5 of 6 masks, median 0 voxels" in printed
    assert "organ: in 5 of 6 masks, median" in printed and "none: in 0 of 6 masks\n" in printed
    assert "note: 1 masks are empty" in printed


def test_slices_are_cut_across_an_axis_of_one_voxel(tmp_path):
    for k in range(3):
        save(tmp_path / "raw" / "imagesTr" / f"c{k}.nii.gz", IMAGE[:, 4:5] + np.int16(k), (1, 1, 1))
        save(tmp_path / "raw" / "labelsTr" / f"c{k}.nii.gz", MASK[:, 4:5], (1, 1, 1))
    meta, _ = run(tmp_path / "raw", tmp_path / "cache")
    assert meta["slice_axis"] == 1


def test_views_whose_thickest_axes_differ_are_counted(tmp_path, capsys):
    for k, name in enumerate(NAMES):
        save_pair(tmp_path / "raw", name, k, spacing=(1, 1, 8) if k < 4 else (8, 1, 1))
    run(tmp_path / "raw", tmp_path / "cache")
    assert "thickest axis z in 4, x in 2, but slices" in capsys.readouterr().out


# --- layouts ---


def test_series_and_enhanced_files_are_training_images(tmp_path):
    """Masks lie as a program keeps them that reads the series, or turned as dcm2niix does it."""
    raw = tmp_path / "raw"
    mask = np.zeros((5, 6, 12), np.int16)
    mask[1:4, 1:5, 3:8] = 1
    for k in range(4):
        slices = make_slices(SeriesInstanceUID=f"1.2.{k}")
        for z, ds in enumerate(slices):
            pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(6, 5)
            set_pixels(ds, pixels + 500 * mask[..., z].T + k)
        path = raw / "imagesTr" / f"c{k}"
        if k == 3:
            path = save_series(raw / "imagesTr", [make_enhanced(slices)], "c3.dcm") / "c3.dcm"
        else:
            save_series(path, slices)
        own = mask
        affine = preprocess.read_volume(path, []).affine
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
    names = {"background": 0, "a": 1, "b": 2}
    raw = make_set(tmp_path / "raw", NAMES[:3], names, channel_names={"0": "T1", "1": "T2"})
    folder = raw / "imagesTr"
    for k, name in enumerate(NAMES[:3]):
        save(folder / f"{name}_0001.nii.gz", -IMAGE - np.int16(k))
        (folder / f"{name}.nii.gz").rename(folder / f"{name}_0000.nii.gz")
    meta, rows = run(raw, tmp_path / "cache")
    assert meta["channels"] == ["T1", "T2"] and [row["id"] for row in rows] == NAMES[:3]
    assert rows[0]["image"] == "imagesTr/c0_0000.nii.gz;imagesTr/c0_0001.nii.gz"
    first, second = array(tmp_path / "cache", "c0.image")
    assert np.allclose(first, -second, atol=0.01)
    (folder / "c0_0000.nii.gz").unlink()
    (folder / "c1_0001.nii.gz").unlink()
    save(folder / "c2_0001.nii.gz", IMAGE, (1, 1.5, 3))
    with pytest.raises(DataError, match="3 cases or files"):
        run(raw, tmp_path / "bad")
    printed = capsys.readouterr().err
    assert "c0_0001.nii.gz: files of this name for channels [1], expected 0, 1, ..." in printed
    assert "c1_0000.nii.gz: 1 channels, expected ['T1', 'T2']" in printed
    assert "c2_0001.nii.gz: affine" in printed


def test_validation_and_test_folders_are_official_splits(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    for k, name in enumerate(("Va0", "Va1", "Ts0")):
        save_pair(raw, name, 20 + k, end=name[:2])
    save(raw / "imagesUnlabelled" / "u.nii.gz", IMAGE)
    save(raw / "test" / "images" / "t.nii.gz", IMAGE)
    _, rows = run(raw, tmp_path / "cache")
    folds = {row["id"]: (row["fold"], row["split"]) for row in rows}
    assert folds["Va0"] == folds["Va1"] == ("0", "val") and folds["Ts0"] == ("test", "test")
    assert {folds[name][0] for name in NAMES} == {"1", "2", "3", "4"}
    printed = capsys.readouterr().out
    assert "imagesUnlabelled: left out, images such as u.nii.gz" in printed
    assert re.search("note: 1 images in .*test/images have no masks and are left out", printed)


def test_pictures_with_official_splits_endings_and_names_in_any_case(tmp_path, capsys):
    folders = ["Train"] * 8 + ["VAL"] * 2 + ["test"] * 2
    for number, split in enumerate(folders):
        k = number - folders.index(split)
        folder = tmp_path / "raw" / split
        save_picture(folder / "Images" / f"{k}.tif", np.roll(GRAY, number, 0))
        save_picture(folder / "labels" / f"{k}_{'gt' if k else 'mask'}.png", 255 * DRAWN)
    meta, rows = run(tmp_path / "raw", tmp_path / "cache")
    folds = {row["id"]: row["fold"] for row in rows}
    assert folds["val_0"] == folds["val_1"] == "0" and folds["test_0"] == folds["test_1"] == "test"
    assert {folds[f"train_{k}"] for k in range(8)} == {"1", "2", "3", "4"}
    assert meta["picture_unit"] == "px" and meta["spacing"] == [1, 1, 1]
    assert meta["channels"] == ["red", "green", "blue"] and meta["slice_axis"] == 2
    assert meta["values"] == [0, 255] and "255 is taken as class 1" in capsys.readouterr().out
    assert rows[0]["mask"] == "Train/labels/0_mask.png"


def test_gray_pictures_a_file_a_channel(tmp_path):
    raw = tmp_path / "raw"
    for k in range(3):
        for number in range(2):
            save_picture(raw / "imagesTr" / f"e{k}_000{number}.png", GRAY + np.uint8(k + number))
        save_picture(raw / "labelsTr" / f"e{k}.png", DRAWN)
    meta, _ = run(raw, tmp_path / "cache")
    assert meta["channels"] == ["channel 0", "channel 1"]
    assert array(tmp_path / "cache", "e0.image").shape == (2, 32, 24, 1)
    new = raw / "imagesTr" / "e1_0000.png", raw / "imagesTr" / "e1_0001.png"
    (image,) = find_new(list(new), meta)
    assert np.array_equal(read_new(image, meta)[0], array(tmp_path / "cache", "e1.image"))


def test_pictures_and_volumes_are_not_mixed(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["v"])
    save(raw / "imagesTr" / "v.nii.gz", np.stack([IMAGE] * 3, 3))
    save_picture(raw / "images" / "p.png", GRAY)
    save_picture(raw / "masks" / "p.png", DRAWN)
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert "p.png: a picture, expected a volume" in capsys.readouterr().err


def test_what_looks_like_a_case_and_is_none_is_named_once_for_each_mistake(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    save(raw / "imagesTr" / "c0.nii_old.nii.gz", IMAGE + np.int16(50))
    for k in range(40):
        save(raw / "labelsTr" / f"label{k:04d}.nii.gz", MASK)
    (raw / "imagesTr" / "c9.nii.gz").mkdir()
    save(raw / "labelsTr" / "c2.nii", MASK)
    save(raw / "imagesTr" / "c3.nii", IMAGE)
    (raw / "imagesTr" / "c0.nrrd").write_bytes(b"NRRD0004")
    (raw / "imagesTr" / "._c0.nii.gz").write_text("of a Mac")
    save_series(raw / "imagesTr" / "nested" / "series", make_slices(2))
    with pytest.raises(DataError, match="44 cases or files"):
        run(raw, tmp_path / "cache")
    printed = capsys.readouterr()
    expected = [
        "c0.nii_old.nii.gz: 0 masks of that (printable) name in labelsTr (and 1 more such as imagesTr/c2",
        "c3.nii: files of this name for channels [0, 0], expected 0, 1, ... (and 1 more such as",
        "label0000.nii.gz: no image of that name in imagesTr (and 39 more such as labelsTr/label0001",
    ]
    for message, line in zip(expected, printed.err.splitlines(), strict=True):
        assert message in line
    assert "imagesTr: left out, NRRD: 1, such as c0.nrrd" in printed.out
    assert "imagesTr: left out, folder: 2, such as c9.nii.gz" in printed.out
    _, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [row["id"] for row in rows] == ["c0", "c1", "c4", "c5"]


def test_the_notes_of_a_case_are_printed_with_its_error(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0"])
    nib.save(nib.Nifti1Image(IMAGE, None), raw / "imagesTr" / "c0.nii.gz")
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert re.search(r"as its image.*\(note: no sform and no qform", capsys.readouterr().err)


FOLDERS = {  # files -> message
    "drive": (["training/images/21_training.tif", "training/1st_manual/21_manual1.gif"], "(?s)From other formats.*1st_manual: left out.*0 masks of"),
    "organs": (["s0/ct.nii.gz", "s0/segmentations/liver.nii.gz"], "but s0/ct.nii.gz, s0/seg.*From other formats"),
    "too high": (["top/imagesTr/a.nii.gz", "top/labelsTr/a.nii.gz"], "one folder too high: use --data .*top"),
    "btcv": (["imagesTr/img1.nii.gz", "labelsTr/label1.nii.gz"], "no image with a mask of its name, but imagesTr"),
    "empty": ([], "but no files; expected imagesTr/NAME.nii.gz"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_cases_is_described(tmp_path, capsys, name):
    files, message = FOLDERS[name]
    (tmp_path / "raw").mkdir()
    for file in files:
        if file.endswith("gz"):
            save(tmp_path / "raw" / file, IMAGE)
        else:
            save_picture(tmp_path / "raw" / file, DRAWN)
    with pytest.raises(DataError) as error:
        run(tmp_path / "raw", tmp_path / "cache")
    printed = capsys.readouterr()
    assert re.search(message, f"{error.value} {printed.out} {printed.err}")


# --- patients and folds ---


def test_scans_of_one_patient_share_a_fold(tmp_path):
    names = [f"patient{k:03d}_frame{frame}" for k in range(8) for frame in ("01", "12")]
    raw = make_set(tmp_path / "raw", names)
    _, rows = run(raw, tmp_path / "apart")
    assert len({row["patient"] for row in rows}) == 16
    _, rows = run(raw, tmp_path / "cache", "--patient-regex", "(patient[0-9]+)_")
    assert len({(row["patient"], row["fold"]) for row in rows}) == 8
    assert all(row["id"].startswith(row["patient"]) for row in rows)
    with pytest.raises(DataError, match="'person' finds nothing in .*patient000_frame01"):
        run(raw, tmp_path / "none", "--patient-regex", "person")
    # The path counts where the name says nothing, and both overrule cases.csv.
    (raw / "cases.csv").write_text("\n".join(["id,patient", *(f"{name},p" for name in names)]))
    _, rows = run(raw, tmp_path / "below", "--patient-regex", "imagesTr/(patient[0-9]+)")
    assert len({row["patient"] for row in rows}) == 8


def test_a_table_of_cases_gives_patients_folds_and_columns(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    text = ";id;patient;fold;site 0;c0;p1;3;Ä 1;c1.nii.gz;p1;4;B 2;c9;p9;;A 3;c3;;test;"
    (raw / "cases.csv").write_text(text.replace(" ", "\n"), encoding="utf-8-sig")
    _, rows = run(raw, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert [row["patient"] for row in rows] == ["p1", "p1", "c2", "c3", "c4", "c5"]
    assert [rows[k]["fold"] for k in (0, 1, 3)] == ["3", "4", "test"]
    assert [row["site"] for row in rows] == ["Ä", "B", "", "", "", ""]
    assert list(rows[0])[-2:] == ["mask", "site"] and rows[0]["mask"] == "labelsTr/c0.nii.gz"
    assert "cases.csv: 3 cases without a row, 1 rows without a case, such as c2" in printed
    assert "1 patients in several splits or folds, such as p1" in printed


TABLES = {
    "name,site\nc0,A": r"columns \['name', 'site'\], expected id and different others",
    "id,site,site\nc0,A,B": "expected id and different others",
    "id,mask\nc0,A": "none of digest, image, mask",
    "id,fold\nc0,7": r"cases\.csv:2: fold or split '7', expected one of the two: fold 0 to 4",
    "id,fold\nc0,1\nc0,2": r"cases\.csv:3: c0 stands there twice",
    "id,fold\nx,1": "no id of its rows is a case, expected such as c0",
    "id,fold,split\nc0,1,val": "expected one of the two",
    "id,age\nc0,1,5": "3 fields for 2 columns; decimal commas",
    'id,age\n"c0,1': "unexpected end of data",
    "id,site\nc0,Hüfte": r"cases\.csv: 'utf-8' codec can't decode",
}


@pytest.mark.parametrize("text", TABLES)
def test_a_table_of_cases_that_does_not_fit_is_refused(tmp_path, text):
    raw = make_set(tmp_path / "raw", ["c0", "c1"])
    (raw / "cases.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=TABLES[text]):
        run(raw, tmp_path / "cache")


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
    '{"background": 0, "a": 1e999}': "not supported",
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
        return
    with pytest.raises(DataError, match=rf"dataset\.json: .*{expected}"):
        preprocess.read_description(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_and_a_modality_without_numbers_are_read(tmp_path, encoding):
    text = '{"labels": {"0": "background", "1": "Hüfte"}, "modality": "MRI"}'
    (tmp_path / "dataset.json").write_text(text, encoding=encoding)
    assert preprocess.read_description(tmp_path) == ({0: "background", 1: "Hüfte"}, ["MRI"])


SMEARED = MASK.copy()
SMEARED[0, 0, :3] = (3, 4, 255)
VALUES = {  # masks of c1 and c2, labels -> message, ids that are left
    "other values": (255 * MASK.clip(0, 1), 4 * MASK, None, "[0, 255], expected [0, 1, 2] without gaps", "c0 c3 c4 c5"),
    "smeared": (SMEARED, MASK, None, "[0, 1, 2, 3, 4, 255], expected [0, 1, 2]", "c0 c2 c3 c4 c5"),
    "no name": (MASK, MASK.clip(0, 1), {"background": 0, "a": 1}, "[0, 1, 2], expected [0, 1]", "c2"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_without_names_are_refused(tmp_path, capsys, name):
    *masks, labels, message, ids = VALUES[name]
    raw = make_set(tmp_path / "raw", NAMES, labels)
    for k, mask in enumerate(masks, 1):
        save(raw / "labelsTr" / f"c{k}.nii.gz", mask)
    with pytest.raises(DataError, match="cases or files cannot be used"):
        run(raw, tmp_path / "cache")
    assert f"mask values {message}" in capsys.readouterr().err
    _, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [row["id"] for row in rows] == ids.split()


# --- new images ---


def names_of(paths: list[Path], **meta: object) -> list[str]:
    return [image.name for image in find_new(paths, META | meta)]


def test_linked_folders_are_followed_but_for_links_upwards(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "top" / name).mkdir(parents=True)
    save(tmp_path / "top" / "store" / "scan.nii", IMAGE)
    for link, target in (("a/store", "store"), ("a/b", "b"), ("b/a", "a"), ("a/top", ".")):
        (tmp_path / "top" / link).symlink_to(tmp_path / "top" / target)
    assert names_of([tmp_path / "top"]) == ["a_store_scan", "b_a_store_scan", "store_scan"]


def test_an_export_is_read_series_by_series(tmp_path, capsys):
    """PATIENT/STUDY/SERIES, two series in a folder, one in two, a scout, a cut file, DICOMDIR."""

    def write(folder: str, number: int, slices: list[pydicom.Dataset] | None = None) -> None:
        slices = slices or make_slices()
        put("SeriesInstanceUID", f"1.2.{number}")(slices)
        put("SeriesNumber", number)(slices)
        save_series(export / folder, slices, f"IM{number:02d}{{:02d}}")

    export = tmp_path / "export"
    write("p1/ct/axial", 1)
    write("p1/ct/scout", 2, make_slices(1, ImageType=["X", "X", "LOCALIZER"]))
    write("p2/ct/all", 3)
    write("p2/ct/all", 4)
    write("p3/ct/axial", 5)
    cut = export / "p3" / "ct" / "axial" / "IM0506"
    cut.write_bytes(cut.read_bytes()[:300])
    slices = make_slices()
    write("p4/part1", 6, slices[:6])
    write("p4/part2", 6, slices[6:])
    for part in ("part1", "part2"):
        (export / "p4" / part / "license.txt").write_text("CC BY")
    write("p5", 7)
    save(export / "p6" / "scan.nii.gz", IMAGE)
    (export / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (export / "readme.txt").write_text("exported on Monday")
    images = {image.name: image for image in find_new([export], META)}
    names = ["p1_ct_axial", "p2_ct_all_3", "p2_ct_all_4", "p3_ct_axial", "p4", "p5", "p6_scan"]
    assert list(images) == names
    for name in ("p1_ct_axial", "p2_ct_all_3", "p4", "p5"):
        on_grid, affine, header, shape, notes = read_new(images[name], META)
        assert on_grid.shape == (1, 5, 6, 12) and shape == (5, 6, 12) and header is None
        texts = [("files that are no images are left out", "2, such as license.txt")]
        assert notes == (texts if name == "p4" else []) and np.allclose(affine[2], [0, 0, 2.5, 0])
    with pytest.raises(DataError, match=r"1 are cut, .* IM0506"):
        read_new(images["p3_ct_axial"], META)
    printed = capsys.readouterr().out
    assert "left out, no images as in training: 1, such as" in printed
    assert re.search(r"left out, single DICOM slices .*: 1, such as .*/scout/IM0200", printed)


@pytest.mark.parametrize("name", ["ct/{:02d}.dcm", "{0}/slice{0}.dcm"])
def test_a_uid_for_each_slice_is_no_volume_each(tmp_path, capsys, name):
    slices = make_slices()
    put("SeriesInstanceUID", lambda ds, k: f"1.2.{k}")(slices)
    save_series(tmp_path / "export", slices, name)
    with pytest.raises(DataError, match="export: no image in it as in training"):
        find_new([tmp_path / "export"], META)
    printed = capsys.readouterr().out
    assert re.search(r"left out, single DICOM slices .* a UID for each .*\): 12, such as", printed)


def test_enhanced_files_in_one_folder_are_an_image_each(tmp_path):
    for k in range(4):
        enhanced = make_enhanced(make_slices())
        enhanced.SeriesInstanceUID = f"1.3.{k}"
        enhanced.SeriesNumber = k + 5
        save_series(tmp_path / "mr", [enhanced], f"{k}{{}}")
    images = find_new([tmp_path / "mr"], META)
    assert [image.name for image in images] == ["mr_5", "mr_6", "mr_7", "mr_8"]
    assert read_new(images[3], META)[3] == (5, 6, 12)


def test_masks_are_never_images(tmp_path, capsys):
    """By their values, or our mark; beside images, and beside DICOM files."""
    save_series(tmp_path / "case1", make_slices())
    save(tmp_path / "case1" / "segmentation.nii.gz", MASK)
    save(tmp_path / "case2" / "imaging.nii.gz", IMAGE)
    save(tmp_path / "case2" / "segments" / "liver.nii.gz", 255 * (MASK > 0).astype(np.float32))
    marked = IMAGE.clip(0, 60).astype(np.uint8)  # by its values it could be an image
    write_mask(tmp_path / "case2" / "pred.nii.gz", marked, GRID, None, PREDICTION)
    save(tmp_path / "old" / "a.nii.gz", IMAGE)
    (tmp_path / "old" / "volumes.csv").write_text("image,mask,ml_a\n")
    assert names_of([tmp_path]) == ["case1", "case2_imaging"]
    printed = capsys.readouterr().out
    assert "left out, masks: 3, such as" in printed and "left out, results: 2, such as" in printed
    with pytest.raises(DataError, match="no image in it as in training"):
        names_of([tmp_path / "case1" / "segmentation.nii.gz"])


def test_two_images_of_one_name_are_refused_and_the_working_folder_has_its_own(
    tmp_path, monkeypatch
):
    for name in ("p1/a.nii", "p1/A.nii.gz", "p2/ct.nii.gz", "p3/ct.nii.gz"):
        save(tmp_path / name, IMAGE)
    with pytest.raises(DataError, match=r"p1/A\.nii\.gz and .*p1/a\.nii would both be called a"):
        names_of([tmp_path / "p1"])
    with pytest.raises(DataError, match="give the folder above them"):
        names_of([tmp_path / "p2", tmp_path / "p3"])
    monkeypatch.chdir(save_series(tmp_path / "p1" / "ct", make_slices()))
    assert names_of([Path(".")]) == ["ct"]


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

    def refused(image: preprocess.NewImage, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_new(image, meta)

    more = [save(tmp_path / "more" / f"c2_000{k}.nii.gz", IMAGE) for k in range(3)]
    refused(images["c1"], r"c1_0001\.nii\.gz: 1 channels, expected \['T1', 'T2'\]")
    refused(find_new(more, meta)[0], r"c2_0000\.nii\.gz: 3 channels, expected")
    refused(find_new(more[1:], meta)[0], r"c2_0001\.nii\.gz: channel files \[1, 2\], expected 0")


def test_new_pictures_below_folders_are_called_by_their_path(tmp_path, capsys):
    for name in ("a/1.png", "b/left/1.png", "2.TIF", "e_0000.png"):
        save_picture(tmp_path / name, COLOUR)
    save_picture(tmp_path / "a" / "2_mask.png", DRAWN)
    meta = {"picture_unit": "px", "channels": ["red", "green", "blue"], "normalisation": [None] * 3}
    assert sorted(names_of([tmp_path], **meta)) == ["2", "a_1", "b_left_1", "e_0000"]
    assert "left out, masks: 1, such as" in capsys.readouterr().out
    (image,) = find_new([tmp_path / "a" / "1.png"], META | meta)
    assert read_new(image, META | meta)[0].shape == (3, 32, 24, 1)
    with pytest.raises(DataError, match="a picture, expected a volume"):
        read_new(image, META | meta | {"picture_unit": None})
