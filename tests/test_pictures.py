"""Segmentation of pictures with masks: PNG, JPEG and TIFF are volumes of one slice."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.metrics import segmentation_metrics
from segmentation import eval as evaluation
from segmentation import preprocess, train
from segmentation.preprocess import DataError, read_mask, read_volume
from tests.conftest import read_table

pytestmark = pytest.mark.slow


def draw(rng: np.random.Generator, colour: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A dark picture of 24 rows and 32 columns with a bright block, and its mask."""
    mask = np.zeros((24, 32), np.uint8)
    top = int(rng.integers(2, 10))
    mask[top : top + 8, 12:24] = 1
    picture = (150 * mask + rng.integers(0, 60, mask.shape)).astype(np.uint8)
    if colour:
        picture = np.stack([picture, 255 - picture, picture // 2], 2)
    return picture, mask


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_pictures(raw: Path, count: int = 10, colour: bool = False, value: int = 1) -> Path:
    rng = np.random.default_rng(0)
    for k in range(count):
        picture, mask = draw(rng, colour)
        save(raw / "images" / f"p{k}.png", picture)
        save(raw / "masks" / f"p{k}.png", value * mask)
    return raw


def prepare(raw: Path, out: Path, *options: str) -> tuple[dict, list[dict]]:
    preprocess.main(["--data", str(raw), "--out", str(out), "--workers", "1", *options])
    return json.loads((out / "meta.json").read_text()), read_table(out / "index.csv")


def test_from_pictures_to_masks_as_pictures(tmp_path, capsys):
    """Learned in some epochs, scored in pixels, and predicted as PNG of the picture's size."""
    raw = make_pictures(tmp_path / "raw", colour=True, value=255)
    cache = tmp_path / "cache"
    meta, _ = prepare(raw, cache)
    assert meta["channels"] == ["red", "green", "blue"]
    assert meta["picture_unit"] == "px" and meta["spacing"] == [1, 1, 1]
    image = np.load(cache / "volumes" / "p0.image.npy")
    assert image.shape == (3, 32, 24, 1)

    run = tmp_path / "run"
    options = ["--data", str(cache), "--out", str(run), "--epochs", "12", "--lr", "1e-2"]
    options += ["--channels", "4", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    train.main([*options, "--augment", "0.3"])
    checkpoint = ["--checkpoint", str(run / "best.pt"), "--device", "cpu"]
    capsys.readouterr()
    evaluation.main([*checkpoint, "--data", str(cache), "--samples", "10"])
    printed = capsys.readouterr().out
    report = json.loads((run / "eval_val" / "metrics.json").read_text())
    assert report["summary"]["dice"]["value"] > 0.9
    assert report["run"]["unit"] == "px" and "hd95_mm" in report["summary"]
    assert "hd95_px " in printed and "hd95_mm" not in printed
    assert "distances are in pixels" in printed

    evaluation.main([*checkpoint, "--images", str(raw / "images")])
    printed = capsys.readouterr().out
    rows = read_table(run / "predictions" / "volumes.csv")
    for row in rows:
        with Image.open(run / "predictions" / row["mask"]) as file:
            found = np.asarray(file)
        with Image.open(raw / "masks" / row["mask"]) as file:
            truth = np.asarray(file)
        assert found.shape == truth.shape and set(np.unique(found)) == {0, 255}
        assert (found == truth).mean() > 0.95
        assert int(row["px_1"]) == (found == 255).sum()
    assert len(rows) == 10 and "masks are PNG files" in printed
    evaluation.main([*checkpoint, "--images", str(raw / "images")])  # results may be replaced
    save(run / "predictions" / "p3.png", truth)
    with pytest.raises(DataError, match=r"p3\.png: exists and is no earlier result"):
        evaluation.main([*checkpoint, "--images", str(raw / "images")])

    options[options.index("--out") + 1] = str(tmp_path / "run3")
    with pytest.raises(DataError, match="pictures, which have no third axis; use --dims 2"):
        train.main([*options, "--dims", "3"])
    with pytest.raises(DataError, match="no third axis; use --dims 2, no --plane"):
        train.main([*options, "--plane", "coronal", "--patch", "8", "8"])
    volume = tmp_path / "volume.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4)), volume)
    with pytest.raises(DataError, match="1 of 1 images"):
        evaluation.main([*checkpoint, "--images", str(volume)])
    assert "volume.nii.gz: a volume, expected a picture" in capsys.readouterr().err


def test_official_splits_endings_and_names_in_any_case(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("Train", 36), ("VAL", 2), ("test", 2)):
        for k in range(count):
            picture, mask = draw(rng)
            save(tmp_path / "raw" / split / "Images" / f"{k}.tif", picture)
            save(tmp_path / "raw" / split / "labels" / f"{k}_mask.png", mask)
    _, rows = prepare(tmp_path / "raw", tmp_path / "cache")
    folds = {row["id"]: row["fold"] for row in rows}
    assert folds["val_0"] == folds["val_1"] == "0"
    assert folds["test_0"] == folds["test_1"] == "test"
    assert {folds[f"train_{k}"] for k in range(36)} == {"1", "2", "3", "4"}
    assert "note: fold 0 has, as given, only 2 of 40: too few" in capsys.readouterr().out
    assert rows[0]["mask"] == "Train/labels/0_mask.png"


def test_an_ending_counts_only_if_it_makes_one_mask(tmp_path, capsys):
    raw = make_pictures(tmp_path / "raw", 3)
    picture, mask = draw(np.random.default_rng(9))
    save(raw / "images" / "both.png", picture)
    for ending in ("_mask", "-seg"):
        save(raw / "masks" / f"both{ending}.png", mask)
    with pytest.raises(DataError, match="3 cases or files"):
        prepare(raw, tmp_path / "cache")
    printed = capsys.readouterr().err
    assert "images/both.png: no file of that name in masks" in printed
    assert "masks/both-seg.png: no file of that name in images" in printed


def test_a_resolution_makes_millimetres(tmp_path, capsys):
    """254 dots an inch are 0.1 mm. One picture without it, and all are in pixels."""
    raw = tmp_path / "raw"
    rng = np.random.default_rng(0)
    for k in range(6):
        picture, mask = draw(rng)
        save(raw / "images" / f"p{k}.{'png' if k % 2 else 'tif'}", picture, dpi=(254, 508))
        save(raw / "masks" / f"p{k}.png", mask)
    meta, _ = prepare(raw, tmp_path / "mm")
    assert meta["picture_unit"] == "mm" and np.allclose(meta["spacing"], [0.1, 0.05, 1], rtol=1e-3)
    assert "so sizes and distances are in mm" in capsys.readouterr().out
    _, affine, _ = read_volume(raw / "images" / "p0.tif")
    assert np.allclose(np.diag(affine), [0.1, -0.05, 1, 1], rtol=1e-3)

    picture, mask = draw(rng)
    save(raw / "images" / "p6.png", picture, dpi=(72, 72))  # what programs write by default
    save(raw / "masks" / "p6.png", mask)
    meta, _ = prepare(raw, tmp_path / "px")
    assert meta["picture_unit"] == "px" and meta["spacing"] == [1, 1, 1]
    assert "6 of 7 pictures say a resolution: the unit is the pixel" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 cases or files"):
        prepare(raw, tmp_path / "test", "--like", str(tmp_path / "mm"))
    assert "p6.png: no resolution, expected one as in training" in capsys.readouterr().err


def test_orientation_tags_turn_picture_and_mask(tmp_path):
    """Tag 6: the first row of the file is the right side of what is shown."""
    picture, mask = draw(np.random.default_rng(0), colour=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "tif"):
        path = save(tmp_path / f"a.{suffix}", np.rot90(picture).copy(), exif=exif, dpi=(254, 127))
        volume, affine, _ = read_volume(path)
        assert volume.shape == (32, 24, 1, 3)
        shown = volume[:, :, 0].swapaxes(0, 1).astype(float)
        apart = np.abs(shown - picture).mean()
        assert apart < (25 if suffix == "jpg" else 1e-9)
    assert np.allclose(np.diag(affine)[:2], [0.2, -0.1], rtol=1e-3)  # of the TIFF, turned with it
    turned = save(tmp_path / "mask.png", np.rot90(mask).copy(), exif=exif)
    assert np.array_equal(read_mask(turned, (32, 24, 1), affine)[..., 0].T, mask)
    plain = save(tmp_path / "plain.png", np.rot90(mask).copy())
    with pytest.raises(DataError, match=r"24 x 32 pixels, expected 32 x 24 .* orientation tag"):
        read_mask(plain, (32, 24, 1), affine)


def save_palette(path: Path, numbers: np.ndarray) -> Path:
    """A picture whose pixels are numbers of colours: 0 black, 1 green, 2 red."""
    image = Image.fromarray(numbers)
    image.putpalette([0, 0, 0, 0, 200, 0, 200, 0, 0])
    image.save(path)
    return path


def test_masks_by_numbers_palette_bits_and_equal_channels(tmp_path):
    _, mask = draw(np.random.default_rng(0))
    paths = [save(tmp_path / "gray.png", mask)]
    paths.append(save(tmp_path / "rgb.png", np.stack([mask] * 3, 2)))
    paths.append(save(tmp_path / "bit.png", mask.astype(bool)))
    paths.append(save(tmp_path / "deep.tif", mask.astype(np.uint16)))
    paths.append(save_palette(tmp_path / "palette.png", mask))
    for path in paths:
        assert np.array_equal(read_mask(path, (32, 24, 1), np.eye(4))[..., 0].T, mask), path.name


def test_masks_that_are_no_classes_are_refused_in_plain_words(tmp_path, capsys):
    raw = make_pictures(tmp_path / "raw", 7, value=255)
    masks = raw / "masks"
    _, mask = draw(np.random.default_rng(0))
    soft = np.linspace(0, 255, mask.size).reshape(mask.shape).astype(np.uint8)
    (masks / "p1.png").unlink()
    save(masks / "p1.jpg", 255 * mask, quality=60)
    save(masks / "p2.png", np.stack([255 * mask, 0 * mask, 255 - 255 * mask], 2))
    save(masks / "p3.png", soft)
    save(masks / "p4.png", mask[:20])
    save(masks / "p5.png", 300 * mask.astype(np.uint16))
    save(raw / "images" / "p6.png", 0 * mask)
    with pytest.raises(DataError, match="6 cases or files"):
        prepare(raw, tmp_path / "cache")
    printed = capsys.readouterr().err
    assert "p1.jpg: a JPEG mask with" in printed and "save masks as PNG" in printed
    assert "p2.png: a colour mask (2 colours), expected a number for each class" in printed
    assert "p3.png: 256 mask values, 0, 1, 2, ..., 255 (edges smeared by" in printed
    assert "p4.png: 32 x 20 pixels, expected 32 x 24 as its picture" in printed
    assert "p5.png: mask values 0 to 300, expected 0 to 255" in printed
    assert "images/p6.png: no contrast" in printed
    assert "p0.png" not in printed


def test_a_gray_picture_among_coloured_ones_has_three_equal_channels(tmp_path, capsys):
    raw = make_pictures(tmp_path / "raw", 5, colour=True)
    picture, mask = draw(np.random.default_rng(7))
    save(raw / "images" / "gray.png", picture)
    save(raw / "masks" / "gray.png", mask)
    meta, _ = prepare(raw, tmp_path / "cache")
    image = np.load(tmp_path / "cache" / "volumes" / "gray.image.npy")
    assert meta["channels"] == ["red", "green", "blue"] and len(image) == 3
    assert np.array_equal(image[0], image[1]) and np.array_equal(image[0], image[2])
    gray = make_pictures(tmp_path / "gray", 5)
    prepare(gray, tmp_path / "gray_cache")
    with pytest.raises(DataError, match="5 cases"):
        prepare(raw, tmp_path / "test", "--like", str(tmp_path / "gray_cache"))
    assert "3 channels, expected ['gray']; convert it to gray" in capsys.readouterr().err


def test_patients_by_a_regular_expression_and_copies_share_a_fold(tmp_path, capsys):
    raw = tmp_path / "raw"
    rng = np.random.default_rng(0)
    for k in range(12):
        picture, mask = draw(rng)
        save(raw / "images" / f"p{k // 3}_view{k}.png", picture)
        save(raw / "masks" / f"p{k // 3}_view{k}.png", mask)
    save(raw / "images" / "p9_view0.tif", picture)  # the last one of p3 once more
    save(raw / "masks" / "p9_view0.png", mask)
    _, rows = prepare(raw, tmp_path / "cache", "--patient-regex", "p[0-9]+")
    folds = {(row["group"], row["fold"]) for row in rows}
    assert sorted(group for group, _ in folds) == ["p0", "p1", "p2", "p3"]
    assert "p3_view11 and p9_view0 are one image with the same masks" in capsys.readouterr().out


def test_pictures_in_the_layout_of_nnunet(tmp_path):
    """A coloured file is one channel file of nnU-Net; names of four digits are no channels."""
    raw = tmp_path / "raw"
    rng = np.random.default_rng(0)
    for k in range(5):
        picture, mask = draw(rng, colour=True)
        save(raw / "imagesTr" / f"c_{k}_0000.png", picture)
        save(raw / "labelsTr" / f"c_{k}.png", mask)
    description = {"channel_names": {"0": "R", "1": "G", "2": "B"}}
    description["labels"] = {"background": 0, "nucleus": 1}
    (raw / "dataset.json").write_text(json.dumps(description))
    meta, rows = prepare(raw, tmp_path / "cache")
    assert meta["channels"] == ["R", "G", "B"] and meta["classes"][1] == "nucleus"
    assert [row["id"] for row in rows] == [f"c_{k}" for k in range(5)]
    found = evaluation.find_images([raw / "imagesTr"], meta)
    assert [image.name for image in found] == [f"c_{k}_0000" for k in range(5)]


def test_pictures_below_folders_are_called_by_their_path(tmp_path):
    picture, _ = draw(np.random.default_rng(0))
    for name in ("a/1.png", "b/left/1.jpg", "2.TIF"):
        save(tmp_path / name, picture)
    (tmp_path / "a" / "notes.txt").write_text("x")
    meta = {"channels": ["gray"], "picture_unit": "px"}
    found = evaluation.find_images([tmp_path], meta)
    assert [image.name for image in found] == ["2", "a_1", "b_left_1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no picture in it, expected PNG, JPEG or TIFF"):
        evaluation.find_images([tmp_path / "empty"], meta)


def test_several_pages_are_refused_and_a_missing_colour_is_not(tmp_path):
    pages = [Image.fromarray(draw(np.random.default_rng(k))[0]) for k in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"pages\.tif: 3 pages, expected a single picture"):
        read_volume(tmp_path / "pages.tif")
    picture, _ = draw(np.random.default_rng(0), colour=True)
    picture[..., 2] = 0
    volume, affine, header = read_volume(save(tmp_path / "dye.png", picture))
    meta = {"resample": False, "spacing": [1, 1, 1], "normalisation": [None] * 3}
    grid = preprocess.to_grid(volume, affine, meta)
    assert np.isfinite(grid).all() and (grid[2] == 0).all()
    assert preprocess.unit_of(header) == "px"


def test_pictures_and_volumes_are_not_mixed(tmp_path):
    raw = make_pictures(tmp_path / "raw", 3)
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir()
    voxels = np.random.default_rng(0).integers(0, 9, (8, 8, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), raw / "imagesTr" / "v.nii.gz")
    nib.save(
        nib.Nifti1Image((voxels > 4).astype(np.uint8), np.eye(4)), raw / "labelsTr" / "v.nii.gz"
    )
    with pytest.raises(DataError, match=r"p0\.png is a picture and .*v\.nii\.gz a volume"):
        prepare(raw, tmp_path / "cache")


def test_volumes_too_may_lie_in_images_and_masks(tmp_path):
    raw = tmp_path / "raw"
    voxels = np.random.default_rng(0).integers(0, 9, (8, 8, 8)).astype(np.int16)
    for k in range(3):
        for part, array in (("images", voxels + k), ("masks", (voxels > 4).astype(np.int16))):
            (raw / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), raw / part / f"v{k}.nii.gz")
    meta, rows = prepare(raw, tmp_path / "cache")
    assert len(rows) == 3 and "picture_unit" not in meta


def test_distances_in_a_picture_are_those_of_outlines():
    """Squares of 7 and 5 pixels with one middle: their outlines are one pixel apart, corners more."""
    truth = torch.zeros(9, 9, 1, dtype=torch.bool)
    prediction = truth.clone()
    truth[1:8, 1:8] = True
    prediction[2:7, 2:7] = True
    metrics = segmentation_metrics(truth, prediction, [1.0, 1.0, 1.0])
    # 24 + 16 pixels of the outlines, of which the 4 outer corners are the square root of 2 away.
    assert metrics["assd_mm"] == pytest.approx((36 + 4 * 2**0.5) / 40)
