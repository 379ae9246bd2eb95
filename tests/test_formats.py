"""The lines of segmentation/README.md that make a raw folder of other sets, run on small ones."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmentation.preprocess import main
from tests.caches import read_table
from tests.test_volume_sets import describe, pairs, write
from tests.test_volumes import COLOUR, DRAWN, IMAGE, MASK, save
from tests.test_xray_formats import recipes

BLOCKS = recipes("segmentation")
FIRST = BLOCKS.pop("")  # what all of them follow
RECIPES = {name: code for names, code in BLOCKS.items() for name in names.split(", ")}


def coco(path: Path) -> None:
    polygon = [12, 5, 23, 5, 23, 12, 12, 12]  # the corner pixels of DRAWN
    images = [{"id": k, "file_name": f"p{k}.png", "width": 32, "height": 24} for k in range(3)]
    drawn = [{"image_id": k, "category_id": 1, "segmentation": [polygon]} for k in range(3)]
    path.write_text(json.dumps({"images": images, "annotations": drawn}))


def brats(year: str, between: str, kinds: str, values: list[int]) -> dict:
    start = f"BraTS{year}/B{{k}}/B{{k}}{between}"
    images = {
        f"{start}{kind}.nii.gz": IMAGE + np.int16(100 * n) for n, kind in enumerate(kinds.split())
    }
    return images | {f"{start}seg.nii.gz": np.array(values, np.uint8)[MASK]}


def amos(path: Path) -> None:
    write(path, describe({"0": "background", "1": "a", "2": "b"}, modality={"0": "CT"}))
    for end, number in (("Tr", 1), ("Tr", 2), ("Tr", 3), ("Tr", 507), ("Va", 4), ("Va", 508)):
        save(path / f"images{end}/amos_{number:04d}.nii.gz", IMAGE + np.int16(number))
        save(path / f"labels{end}/amos_{number:04d}.nii.gz", MASK)


ACDC = "ACDC/training/patient00{k}/patient00{k}"
MMS = "M&Ms/Training/Labeled/A{k}S9V9/A{k}S9V9"
ISIC = "ISIC2018_Task1"
CINE = np.stack([0 * MASK, MASK, 0 * MASK, MASK], 3)
SETS = {  # recipe -> files of case k or what writes them, ids of three or more cases, values
    "ACDC": ({f"{ACDC}_frame01.nii.gz": IMAGE, f"{ACDC}_frame01_gt.nii.gz": MASK,
              f"{ACDC}_4d.nii.gz": np.stack([IMAGE] * 3, 3)}, "patient000_frame01 patient001_frame01 patient002_frame01", [0, 1, 2]),
    "M&Ms": ({f"{MMS}_sa.nii.gz": np.stack([IMAGE] * 4, 3), f"{MMS}_sa_gt.nii.gz": CINE},
             "A0S9V9_t01 A0S9V9_t03 A1S9V9_t01 A1S9V9_t03 A2S9V9_t01 A2S9V9_t03", [0, 1, 2]),
    "KiTS": ({"kits/case_0000{k}/imaging.nii.gz": IMAGE, "kits/case_0000{k}/segmentation.nii.gz": MASK},
             "case_00000 case_00001 case_00002", [0, 1, 2]),
    "LiTS": ({"LiTS/Batch 1/volume-{k}.nii": IMAGE, "LiTS/Batch 1/segmentation-{k}.nii": MASK},
             "volume-0 volume-1 volume-2", [0, 1, 2]),
    "BTCV": ({"BTCV/img/img000{k}.nii.gz": IMAGE, "BTCV/label/label000{k}.nii.gz": MASK},
             "img0000 img0001 img0002", [0, 1, 2]),
    "BraTS 2021": (brats("2021", "_", "t1 t1ce t2 flair", [0, 1, 4]), "B0 B1 B2", [0, 1, 2, 4]),
    "BraTS 2023": (brats("2023", "-", "t1n t1c t2w t2f", [0, 1, 2]), "B0 B1 B2", [0, 1, 2]),
    "TotalSegmentator": ({"Totalsegmentator/s000{k}/ct.nii.gz": IMAGE,
                          "Totalsegmentator/s000{k}/segmentations/liver.nii.gz": np.uint8(MASK == 1),
                          "Totalsegmentator/s000{k}/segmentations/spleen.nii.gz": np.uint8(MASK == 2)},
                         "s0000 s0001 s0002", [0, 1, 2]),
    "AMOS": ({"amos22": amos}, "amos_0001 amos_0002 amos_0003 amos_0004", [0, 1, 2]),
    "Kvasir": ({"Kvasir-SEG/images/k{k}.jpg": COLOUR, "Kvasir-SEG/masks/k{k}.jpg": 255 * DRAWN}, "k0 k1 k2", [0, 1]),
    "DRIVE": ({"DRIVE/training/images/2{k}_training.tif": COLOUR, "DRIVE/training/1st_manual/2{k}_manual1.gif": 255 * DRAWN,
               "DRIVE/training/mask/2{k}_training_mask.gif": 255 * DRAWN}, "20_training 21_training 22_training", [0, 255]),
    "ISIC 2018": ({f"{ISIC}-2_Training_Input/ISIC_000000{{k}}.jpg": COLOUR, f"{ISIC}-2_Training_Input/LICENSE.txt": "CC-0",
                   f"{ISIC}_Training_GroundTruth/ISIC_000000{{k}}_segmentation.png": 255 * DRAWN},
                  "ISIC_0000000 ISIC_0000001 ISIC_0000002", [0, 255]),
    "COCO": ({"images/p{k}.png": COLOUR, "annotations.json": coco}, "p0 p1 p2", [0, 1]),
    "Class numbers above 255": ({"MMWHS/ct_{k}_image.nii.gz": IMAGE, "MMWHS/ct_{k}_label.nii.gz": np.array([0, 205, 420], np.int16)[MASK]},
                                "ct_0 ct_1 ct_2", [0, 1, 2]),
}  # fmt: skip


def vary(drawn: object, k: int) -> object:
    """Images of case k differ from the others by k, or are moved by k rows; masks do not."""
    if drawn is COLOUR:
        return np.roll(drawn, k, 0)
    is_image = isinstance(drawn, np.ndarray) and drawn.max() > 900
    return drawn + np.int16(k) if is_image else drawn


def run_recipe(name: str) -> None:
    """The lines that all recipes follow, and those of one."""
    exec(FIRST + RECIPES[name], {})


@pytest.mark.parametrize("name", SETS)
def test_the_lines_make_a_set_that_preprocess_reads(tmp_path, monkeypatch, name):
    files, ids, values = SETS[name]
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        write(tmp_path, {path.format(k=k): vary(drawn, k) for path, drawn in files.items()})
    run_recipe(name)
    raw = "amos_ct" if name == "AMOS" else "raw"
    main(["--data", raw, "--out", "cache", "--workers", "1"])
    rows = read_table(Path("cache/index.csv"))
    assert [row["id"] for row in rows] == ids.split()
    meta = json.loads(Path("cache/meta.json").read_text())
    assert meta["values"] == values
    truth = np.asanyarray(nib.load(f"cache/volumes/{rows[0]['id']}.truth.nii.gz").dataobj)
    is_picture = truth.shape[2] == 1
    expected = DRAWN.T[..., None] if is_picture else MASK
    assert len(meta["channels"]) == (4 if "BraTS" in name else 3 if is_picture else 1)
    assert np.array_equal(truth > 0, expected > 0)
    if name == "AMOS":
        assert meta["channels"] == ["CT"] and rows[3]["split"] == "val"
        assert len(list(Path("amos_mr/imagesTr").iterdir())) == 1


def test_the_remaining_lines_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs").mkdir()
    nib.save(nib.Nifti1Pair(IMAGE, np.eye(4)), "pairs/a.hdr")
    run_recipe("Pairs")
    assert np.array_equal(nib.load("raw/imagesTr/a.nii.gz").get_fdata(), IMAGE)
    run_recipe("dataset.json")
    assert json.loads(Path("raw/dataset.json").read_text())["modality"] == {"0": "CT"}
    compile(FIRST + RECIPES["NRRD and MetaImage"], "README.md", "exec")
    others = {"Pairs", "dataset.json", "splits_final.json", "NRRD and MetaImage"}
    assert set(RECIPES) == {*SETS, *others}


def test_the_folds_of_nnunet_become_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "raw", pairs("c0 c1 c2 c3"))
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
