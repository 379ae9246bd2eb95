"""The lines of segmentation/README.md that make a raw folder of other sets, run on small ones."""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from segmentation.preprocess import main
from tests.conftest import read_table
from tests.test_volumes import block, draw, save, save_picture

README = Path(__file__).resolve().parents[1] / "segmentation" / "README.md"
SECTION = README.read_text(encoding="utf-8").split("## From other formats\n")[1].split("\n## ")[0]
CODE = r"((?:(?: {4}.*)?\n)+)"
FIRST = re.search(rf"\n\n{CODE}", SECTION)[1]  # what all of them follow
BLOCKS = re.findall(rf"^\*\*(.+?)\*\*.*\n\n{CODE}", SECTION, re.MULTILINE)
RECIPES = {name: code for names, code in BLOCKS for name in names.split(", ")}

IMAGE, MASK = block()
PICTURE, DRAWN = draw(colour=True)


def acdc() -> None:
    for k in range(3):
        folder = Path(f"ACDC/training/patient{k:03d}")
        save(folder / f"patient{k:03d}_frame01.nii.gz", IMAGE + np.int16(k))
        save(folder / f"patient{k:03d}_frame01_gt.nii.gz", MASK)
        save(folder / f"patient{k:03d}_4d.nii.gz", np.stack([IMAGE] * 3, 3))


def mms() -> None:
    for k in range(3):
        folder = Path(f"M&Ms/Training/Labeled/A{k}S9V9")
        save(folder / f"A{k}S9V9_sa.nii.gz", np.stack([IMAGE + np.int16(k)] * 4, 3))
        save(folder / f"A{k}S9V9_sa_gt.nii.gz", np.stack([0 * MASK, MASK, 0 * MASK, MASK], 3))


def kits() -> None:
    for k in range(3):
        save(Path(f"kits/case_0000{k}/imaging.nii.gz"), IMAGE + np.int16(k))
        save(Path(f"kits/case_0000{k}/segmentation.nii.gz"), MASK)


def lits() -> None:
    for k in range(3):
        save(Path(f"LiTS/Batch 1/volume-{k}.nii"), IMAGE + np.int16(k))
        save(Path(f"LiTS/Batch 1/segmentation-{k}.nii"), MASK)


def btcv() -> None:
    for k in range(3):
        save(Path(f"BTCV/img/img000{k}.nii.gz"), IMAGE + np.int16(k))
        save(Path(f"BTCV/label/label000{k}.nii.gz"), MASK)


def brats(year: str, separator: str, kinds: str, values: list[int]) -> Callable:
    def write() -> None:
        for k in range(3):
            start = f"BraTS{year}/B{k}/B{k}{separator}"
            for number, kind in enumerate(kinds.split()):
                save(Path(f"{start}{kind}.nii.gz"), IMAGE + np.int16(100 * number + k))
            save(Path(f"{start}seg.nii.gz"), np.array(values, np.uint8)[MASK])

    return write


def totalsegmentator() -> None:
    for k in range(3):
        save(Path(f"Totalsegmentator/s000{k}/ct.nii.gz"), IMAGE + np.int16(k))
        for value, organ in enumerate(("liver", "spleen"), 1):
            path = Path(f"Totalsegmentator/s000{k}/segmentations/{organ}.nii.gz")
            save(path, np.uint8(value == MASK))


def amos() -> None:
    for suffix, numbers in (("Tr", (1, 2, 3, 507)), ("Va", (4, 508))):
        for number in numbers:
            save(Path(f"amos22/images{suffix}/amos_{number:04d}.nii.gz"), IMAGE + np.int16(number))
            save(Path(f"amos22/labels{suffix}/amos_{number:04d}.nii.gz"), MASK)


def kvasir() -> None:
    for k in range(3):
        save_picture(Path(f"Kvasir-SEG/images/k{k}.jpg"), np.roll(PICTURE, k, 0))
        save_picture(Path(f"Kvasir-SEG/masks/k{k}.jpg"), 255 * DRAWN)


def drive() -> None:
    for k in range(21, 24):
        save_picture(Path(f"DRIVE/training/images/{k}_training.tif"), np.roll(PICTURE, k, 0))
        save_picture(Path(f"DRIVE/training/1st_manual/{k}_manual1.gif"), 255 * DRAWN)
        save_picture(Path(f"DRIVE/training/mask/{k}_training_mask.gif"), 255 * DRAWN)


def isic() -> None:
    for k in range(3):
        name = f"ISIC_000000{k}"
        picture = np.roll(PICTURE, k, 0)
        save_picture(Path(f"ISIC2018_Task1-2_Training_Input/{name}.jpg"), picture)
        path = Path(f"ISIC2018_Task1_Training_GroundTruth/{name}_segmentation.png")
        save_picture(path, 255 * DRAWN)
    Path("ISIC2018_Task1-2_Training_Input/LICENSE.txt").write_text("CC-0")


def coco() -> None:
    images = []
    annotations = []
    for k in range(3):
        save_picture(Path(f"images/p{k}.png"), np.roll(PICTURE, k, 0))
        images.append({"id": k, "file_name": f"p{k}.png", "width": 32, "height": 24})
        polygon = [12, 5, 23, 5, 23, 12, 12, 12]  # the corner pixels of DRAWN
        annotations.append({"image_id": k, "category_id": 1, "segmentation": [polygon]})
    Path("annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def mmwhs() -> None:
    for k in range(3):
        save(Path(f"MMWHS/ct_{k}_image.nii.gz"), IMAGE + np.int16(k))
        path = Path(f"MMWHS/ct_{k}_label.nii.gz")
        save(path, np.array([0, 205, 420], np.int16)[MASK])


SETS = {  # recipe -> files, ids, values of the masks
    "ACDC": (acdc, [f"patient00{k}_frame01" for k in range(3)], [0, 1, 2]),
    "M&Ms": (mms, [f"A{k}S9V9_t0{t}" for k in range(3) for t in (1, 3)], [0, 1, 2]),
    "KiTS": (kits, ["case_00000", "case_00001", "case_00002"], [0, 1, 2]),
    "LiTS": (lits, ["volume-0", "volume-1", "volume-2"], [0, 1, 2]),
    "BTCV": (btcv, ["img0000", "img0001", "img0002"], [0, 1, 2]),
    "BraTS 2021": (
        brats("2021", "_", "t1 t1ce t2 flair", [0, 1, 4]),
        ["B0", "B1", "B2"],
        [0, 1, 2, 4],
    ),
    "BraTS 2023": (brats("2023", "-", "t1n t1c t2w t2f", [0, 1, 2]), ["B0", "B1", "B2"], [0, 1, 2]),
    "TotalSegmentator": (totalsegmentator, ["s0000", "s0001", "s0002"], [0, 1, 2]),
    "AMOS": (amos, ["amos_0001", "amos_0002", "amos_0003", "amos_0004"], [0, 1, 2]),
    "Kvasir": (kvasir, ["k0", "k1", "k2"], [0, 1]),
    "DRIVE": (drive, ["21_training", "22_training", "23_training"], [0, 255]),
    "ISIC 2018": (isic, ["ISIC_0000000", "ISIC_0000001", "ISIC_0000002"], [0, 255]),
    "COCO": (coco, ["p0", "p1", "p2"], [0, 1]),
    "Class numbers above 255": (mmwhs, ["ct_0", "ct_1", "ct_2"], [0, 1, 2]),
}


def run_recipe(name: str) -> None:
    """The lines that all recipes follow, and those of one."""
    exec(textwrap.dedent(FIRST + RECIPES[name]), {})


@pytest.mark.parametrize("name", SETS)
def test_the_lines_make_a_set_that_preprocess_reads(tmp_path, monkeypatch, name):
    write, ids, values = SETS[name]
    monkeypatch.chdir(tmp_path)
    write()
    run_recipe(name)
    raw = "amos_ct" if name == "AMOS" else "raw"
    main(["--data", raw, "--out", "cache", "--workers", "1"])
    rows = read_table(Path("cache/index.csv"))
    assert [row["id"] for row in rows] == ids
    meta = json.loads(Path("cache/meta.json").read_text())
    assert meta["values"] == values and len(meta["channels"]) == (4 if "BraTS" in name else len(
        np.load(f"cache/volumes/{ids[0]}.image.npy")))  # fmt: skip
    truth = np.asanyarray(nib.load(f"cache/volumes/{ids[0]}.truth.nii.gz").dataobj)
    expected = DRAWN.T[..., None] if truth.shape[2] == 1 else MASK
    assert np.array_equal(truth > 0, expected > 0)
    if name == "AMOS":
        assert rows[3]["split"] == "val" and len(list(Path("amos_mr/imagesTr").iterdir())) == 1


def test_the_remaining_lines_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs").mkdir()
    nib.save(nib.Nifti1Pair(IMAGE, np.eye(4)), "pairs/a.hdr")
    run_recipe("Pairs")
    assert np.array_equal(nib.load("raw/imagesTr/a.nii.gz").get_fdata(), IMAGE)
    run_recipe("dataset.json")
    assert json.loads(Path("raw/dataset.json").read_text())["modality"] == {"0": "CT"}
    compile(textwrap.dedent(FIRST + RECIPES["NRRD and MetaImage"]), "README.md", "exec")
    others = {"Pairs", "dataset.json", "splits_final.json", "NRRD and MetaImage"}
    assert set(RECIPES) == {*SETS, *others}


def test_the_folds_of_nnunet_become_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(4):
        save(Path(f"raw/imagesTr/c{k}.nii.gz"), IMAGE + np.int16(k))
        save(Path(f"raw/labelsTr/c{k}.nii.gz"), MASK)
    splits = [{"train": ["c0", "c1"], "val": ["c3", "c2"]}, {"train": ["c2"], "val": ["c0", "c1"]}]
    Path("raw/splits_final.json").write_text(json.dumps(splits))
    run_recipe("splits_final.json")
    main(["--data", "raw", "--out", "cache", "--workers", "1"])
    assert [row["fold"] for row in read_table(Path("cache/index.csv"))] == ["1", "1", "0", "0"]
    assert "splits_final.json is not read: make cases.csv" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_to_eight_lines(name):
    lines = [line for line in RECIPES[name].splitlines() if line.strip() and "import" not in line]
    assert 1 <= len(lines) <= 8 and max(map(len, lines)) <= 100


def test_gif_masks_are_read_by_pillow_as_they_are_drawn(tmp_path):
    """What the recipe of DRIVE relies on: 0 and 255 stay themselves."""
    path = save_picture(tmp_path / "m.gif", 255 * DRAWN)
    assert np.array_equal(np.asarray(Image.open(path).convert("L")), 255 * DRAWN)
