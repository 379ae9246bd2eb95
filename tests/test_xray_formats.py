"""The recipes of the READMEs about X-rays, "From other formats": their very lines, run on small files."""

import gzip
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.caches import ROOT
from tests.raw import draw, noise, run


def recipes(task: str) -> dict[str, str]:
    """The code blocks of the section by the bold name before them; the first, of what all use, by ""."""
    text = (ROOT / task / "README.md").read_text(encoding="utf-8")
    section = text.split("## From other formats\n")[1].split("\n## ")[0]
    code = r"((?:(?: {4}.*)?\n)+)"
    first = re.search(rf"\n\n{code}", section)[1]
    blocks = re.findall(rf"^\*\*(.+?)\*\*.*\n(?:\S.*\n)*\n{code}", section + "\n", re.MULTILINE)
    return {name: textwrap.dedent(block) for name, block in [("", first), *blocks]}


def convert(task: str, name: str, raw: Path, files: dict[str, str], monkeypatch) -> None:
    """Write the files and run a recipe beside them."""
    for file, text in files.items():
        path = raw / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    monkeypatch.chdir(raw)
    blocks = recipes(task)
    assert len(blocks[name].strip().splitlines()) <= 8
    exec(blocks[""] + "\n" + blocks[name], {})


MIMIC = {
    "mimic-cxr-2.0.0-chexpert.csv.gz": "subject_id,study_id,Edema,Fracture\n7,70,1.0,\n8,80,-1.0,0.0\n",
    "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split\na-1,70,7,train\na-2,70,7,train\nb-1,80,8,validate\nc-1,90,9,test\n",
}
PADCHEST = "ImageID,PatientID,Labels\n1.png,p1,\"['cardiomegaly', 'pleural effusion']\"\n2.png,p2,['normal']\n3.png,p2,['minor cardiomegaly']\n"
VINDR = """image_id,class_name,rad_id
u1,Cardiomegaly,R1
u1,Cardiomegaly,R2
u1,Pleural effusion,R3
u1,Cardiomegaly,R2
u2,No finding,R1
u2,Pleural effusion,R2
u2,Pleural effusion,R3
u3,Cardiomegaly,R1
"""
NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age\na.png,Mass|Edema,0,1,50\nb.png,No Finding,1,2,40\nc.png,Mass,0,1,30\n"
CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema\n"
VIEW = "CheXpert-v1.0/{}/patient0000{}/study1/view1.jpg,F,50,Frontal,AP,{}\n"
CHEXPERTS = {
    "train.csv": CHEXPERT + VIEW.format("train", 1, ",1.0") + VIEW.format("train", 2, "1.0,-1.0"),
    "valid.csv": CHEXPERT + VIEW.format("valid", 3, "0.0,0.0"),
}


@pytest.mark.parametrize("name, files, images, expected", [
    ("ChestX-ray14", {"Data_Entry_2017_v2020.csv": NIH, "test_list_NIH.txt": "b.png\n"}, "images_001/images/a images_002/images/b images_002/images/c",
     {"a.png": ("1", "", "1", "1"), "b.png": ("2", "test", "0", "0"), "c.png": ("1", "", "0", "1")}),
    ("CheXpert", CHEXPERTS, "batch2/patient00001/study1/view1.jpg batch2/patient00002/study1/view1.jpg valid/patient00003/study1/view1.jpg",
     {"patient00001": ("patient00001", "train", "0", "1"), "patient00002": ("patient00002", "train", "1", ""), "patient00003": ("patient00003", "val", "0", "0")}),
    ("MIMIC-CXR-JPG", MIMIC, "files/p1/p7/s70/a-1.jpg files/p1/p7/s70/a-2.jpg files/p1/p8/s80/b-1.jpg files/p1/p9/s90/c-1.jpg",
     {"a-1.jpg": ("7", "train", "1", ""), "a-2.jpg": ("7", "train", "1", ""), "b-1.jpg": ("8", "val", "", "0")}),
    ("PadChest", {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz": PADCHEST}, "0/1 0/2 1/3",
     {"1.png": ("p1", "", "1", "1"), "2.png": ("p2", "", "0", "0"), "3.png": ("p2", "", "0", "0")}),
    ("VinDr-CXR", {"train.csv": VINDR}, "train/u1 train/u2 train/u3",
     {"u1.png": ("u1", "", "1", "0"), "u2.png": ("u2", "", "0", "1"), "u3.png": ("u3", "", "0", "0")}),
    ("SIIM-ACR pneumothorax", {"train-rle.csv": "ImageId, EncodedPixels\n1.2.3, 5 6 7\n1.2.3, 9 9 9\n1.2.4,-1\n"}, "x/1.2.3.png x/1.2.4.png",
     {"1.2.3.png": ("1.2.3", "", "pneumothorax"), "1.2.4.png": ("1.2.4", "", "no_pneumothorax")}),
    ("Shenzhen", {}, "CXR_png/CHNCXR_0001_0 CXR_png/CHNCXR_0002_1",
     {"CHNCXR_0001_0.png": ("CHNCXR_0001_0", "", "normal"), "CHNCXR_0002_1.png": ("CHNCXR_0002_1", "", "tuberculosis")}),
    ("ISIC", {"ISIC_2019_Training_GroundTruth.csv": "image,MEL,NV,UNK\nI1,0.0,1.0,0.0\nI2,1.0,0.0,0.0\n"}, "in/I1.jpg in/I2.jpg",
     {"I1.jpg": ("I1", "", "NV"), "I2.jpg": ("I2", "", "MEL")}),
])  # fmt: skip
def test_labels(tmp_path, name, files, images, expected, monkeypatch):
    raw = draw(tmp_path / "raw", images)
    convert("classification", name, raw, files, monkeypatch)
    _, rows, meta = run(raw)
    columns = ["patient", "split", *(meta["classes"] if meta["multi_label"] else ["label"])]
    found = {}
    for row in rows:
        key = row["patient"] if name == "CheXpert" else Path(row["source"]).name
        found[key] = tuple(row[column] for column in columns)
    assert found == expected


COCO = {
    "images": [{"id": 5, "file_name": "a.png"}],
    "annotations": [{"image_id": 5, "bbox": [2, 3, 8, 8]}],
}
LABELME = {"imagePath": "a.png", "shapes": [{"points": [[10, 3], [2, 11]]}]}
VOC = "<annotation><filename>a.png</filename><object><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>10</xmax><ymax>11</ymax></bndbox></object></annotation>"
CVAT = '<annotations><image name="a.png"><box xtl="2" ytl="3" xbr="10" ybr="11"/></image></annotations>'


@pytest.mark.parametrize("name, files", [
    ("COCO", {"annotations.json": json.dumps(COCO)}), ("YOLO", {"labels/a.txt": "0 0.5 0.4375 0.6666667 0.5\n"}),
    ("Pascal VOC", {"Annotations/a.xml": VOC}), ("LabelMe", {"json/a.json": json.dumps(LABELME)}),
    ("CVAT", {"annotations.xml": CVAT}), ("Masks", {}),
])  # fmt: skip
def test_boxes(tmp_path, name, files, monkeypatch):
    raw = tmp_path / "raw"
    pictures = {"images": noise("a", 16, 12)}  # 12 wide, 16 high
    if name == "Masks":
        pictures["masks"] = np.zeros((16, 12), np.uint8)
        pictures["masks"][3:11, 2:10] = 255
    for folder, picture in pictures.items():
        (raw / folder).mkdir(parents=True)
        Image.fromarray(picture).save(raw / folder / "a.png")
    convert("detection", name, raw, files, monkeypatch)
    _, (row,), _ = run(raw, "--size 32", "detection")
    box = [row[key] for key in ("id", "xmin", "ymin", "xmax", "ymax")]
    assert box == ["a.png", "2.0", "3.0", "10.0", "11.0"]


def test_every_recipe_is_run():
    assert len(recipes("classification")) == 9 and len(recipes("detection")) == 7
