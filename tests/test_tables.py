"""Tables and folders as people have them: what they become, and what a refusal tells to type."""

import gzip
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classification import preprocess
from classification.preprocess import Case, DataError
from tests.raw import dicom, draw, noise, refused, run, table


def values(folder: Path, content: bytes, columns: str = "") -> list[dict]:
    path = folder / ("t.csv.gz" if content.startswith(b"\x1f\x8b") else "t.csv")
    path.write_bytes(content)
    rows = preprocess.read_rows(path, columns.split())
    return [{name: value for name, value in row.items() if name} for row in rows]


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


ROW = [{"image": "a", "label": "é"}]
TEXT = "image,label\na,é\n"


@pytest.mark.parametrize("content, expected", [
    (TEXT.encode(), ROW),
    (gzip.compress(TEXT.encode()), ROW),
    ("\ufeffimage;label\r\n a ; é \r\n".encode(), ROW),  # Excel's mark, line ends and semicolons
    ("image\tlabel\na\té".encode("utf-16"), ROW),
    (b"\xff\xfe" + TEXT.encode("utf-16-le"), ROW),
    ("sep=|\nimage|label\na|é\n".encode(), ROW),
    (decomposed(TEXT).encode(), ROW),
    ("image,label,\na,é,\n\n,,\n".encode(), ROW),  # a comma at the end of every line, empty rows
    (b'image,label\na,"x, ""y"""\n', [{"image": "a", "label": 'x, "y"'}]),
    ("image,label\na,x\u2028y\n".encode(), [{"image": "a", "label": "x\u2028y"}]),  # ends no row
    (b"image,label\na,x\x1b[2J\n", [{"image": "a", "label": "x [2J"}]),
    (b"image,label\na\n", [{"image": "a", "label": ""}]),
    (b"image,label\na,nan\na,NaN\na,NA\na,N/A\na,None\na,null\na,<NA>\n", [{"image": "a", "label": ""}] * 7),
])  # fmt: skip
def test_tables_as_programs_write_them(tmp_path, content, expected):
    assert values(tmp_path, content) == expected


@pytest.mark.parametrize("content, columns, words", [
    ("image,label\na,x\nb,良性\n".encode("gbk"), "", "t.csv:3: not UTF-8: save .* CSV UTF-8"),
    (b"PK\x03\x04\x14\x00\xb2", "", "not UTF-8: save the table as CSV UTF-8"),  # a workbook
    (b"image,label\na,x\nb,1,5\n", "", "t.csv:3: 3 fields for 2 columns; decimal commas"),
    (b'image,label\na,x\nb,"y\nc,z\n', "", "t.csv:3: .*expected a closing quote"),
    (b"image,label,label\na,x,y\n", "", "two columns are called label"),
    (b"image,label\n", "", "no rows below the names of the columns"),
    (b"", "", "no rows below the names of the columns"),
    (gzip.compress(TEXT.encode())[:-9], "", "t.csv.gz: .*end-of-stream .*; copy or download it again"),
    (b"image_id,dx\na,nv\n", "label=dy", "no column label, found .*: use --columns image=image_id label=dx"),
    (b",image,label\n0,a,x\n", "label", "--columns label: expected NAME=COLUMN"),
])  # fmt: skip
def test_tables_that_are_refused_name_the_line(tmp_path, content, columns, words):
    with pytest.raises(DataError, match=words):
        values(tmp_path, content, columns)


@pytest.mark.parametrize("names, files, expected", [
    ("a", "deep/a.png", "deep/a.png"),
    ("./deep/a.png", "deep/a.png other/a.png", "deep/a.png"),
    (r"D:\scans\1.dcm", "1.DCM", "1.DCM"),  # of another computer
    ("set-v1/train/p1/s1/v.jpg", "part~2/p1/s1/v.jpg part~2/p2/s1/v.jpg", "part~2/p1/s1/v.jpg"),
    ("a", "a.png sub/a.png", "a.png"),  # of this very path
    ("a", "images/a.png other/a.png", "images/a.png"),
    ("a", "x/a.png y/a.png", "x/a.png y/a.png"),  # may be both
    ("a.png", "a.jpg", ""),
    ("1.2.3", "1.2.3.4.dcm 1.2.3", "1.2.3"),  # the last number of a UID is no suffix
    ("1.2.3.4", "1.2.3.4.dcm 1.2.3", "1.2.3.4.dcm"),
    ("a.png", "A.png a.png", "a.png"),
    ("train/1.png test/1.png", "train/1.png", "train/1.png|"),  # never the image of another folder
    ("test/a.png a", "a.png", "|a.png"),
    ("1", "01.png", ""),
    ("Müller.png", decomposed("Müller.png"), decomposed("Müller.png")),
])  # fmt: skip
def test_names_are_located_by_the_longest_end_of_their_paths(names, files, expected):
    found = preprocess.locate(set(names.split()), files.split())
    places = [" ".join(found.get(name, [])) for name in names.split()]
    assert places == expected.split("|")


@pytest.mark.parametrize("function, text, expected", [
    (preprocess.plain_number, "0.0", "0"), (preprocess.plain_number, "-1.0", "-1"), (preprocess.plain_number, "01", "01"), (preprocess.plain_number, "1.50", "1.50"),
    (preprocess.plain_number, "a1.0", "a1.0"), (preprocess.split_of, "train", "train"), (preprocess.split_of, "Training_Set", "train"), (preprocess.split_of, "VALID", "val"),
    (preprocess.split_of, "validate", "val"), (preprocess.split_of, "val-data", "val"), (preprocess.split_of, "test set", "test"), (preprocess.split_of, "Testing", "test"),
    (preprocess.split_of, "contest", ""), (preprocess.split_of, "set", ""), (preprocess.split_of, "images", ""),
])  # fmt: skip
def test_numbers_and_splits_are_known_by_any_of_their_names(function, text, expected):
    assert function(text) == expected


def test_links_are_followed_and_what_is_passed_over_is_counted(tmp_path, capsys):
    store = draw(tmp_path / "store", "x y")
    raw = draw(tmp_path / "raw", "a b_mask b notes_mask .hidden/c __MACOSX/d deep/e deep/e_seg-1")
    (raw / "linked").symlink_to(store)
    (raw / "deep/loop").symlink_to(raw)
    (raw / "gone.png").symlink_to(tmp_path / "nothing")
    (raw / "notes.txt").write_text("x")
    (raw / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    Image.fromarray(noise("bmp")).save(raw / "old.bmp")
    Image.fromarray(noise("jpeg")).save(raw / "photo.jfif", "JPEG")
    dicom(raw / "scan", noise("dicom"))
    os.mkfifo(raw / "pipe.png")
    listing = preprocess.list_folder(raw)
    images = "a.png b.png deep/e.png linked/x.png linked/y.png notes_mask.png photo.jfif scan"
    assert listing.images == images.split()
    assert listing.masks == ["b_mask.png", "deep/e_seg-1.png"]
    assert listing.non_images == ["DICOMDIR", "notes.txt", "old.bmp"]
    assert listing.closed == ["deep/loop", "gone.png", "pipe.png"]
    named = preprocess.list_images([raw, raw / "a.png", raw / "old.bmp"])
    assert named["old.bmp"] == raw / "old.bmp"  # what is named is read
    printed = capsys.readouterr().out
    assert "1 .txt, such as notes.txt" in printed and "2 masks beside" in printed
    assert "1 .bmp (convert to PNG), such as old.bmp" in printed
    assert "3 links to nothing" in printed and "such as deep/loop" in printed
    with pytest.raises(DataError, match="no image, expected DICOM, JPEG, PNG or TIFF"):
        preprocess.list_images([draw(tmp_path / "empty", "")])
    with pytest.raises(DataError, match=r"x/a.png: called as .*raw/a.png; predict them apart"):
        preprocess.list_images([raw, draw(tmp_path / "x", "a")])


# --- what is refused: images, a table by its name and options, its rows; and the words ---

BOXES = "image,xmin,ymin,xmax,ymax"
RSNA = "stage_1_train_labels.csv"
SCAN = "stage_1_train_images/a"
STEM = "expected a folder for each of two or more classes"
SLIP = " ".join(["image,edema,mass 0,2,0", *(f"{k},{k % 2},1" for k in range(1, 30))])


@pytest.mark.parametrize("names, name, text, words", [
    ("a b", "labels.csv", "image,label a,x a.png,y b,y", r"labels.csv:3: label 'y' of a.png, but 'x' in .*labels.csv:2"),
    ("a b", "labels.csv", "image,label,patient a,x,1 a.png,x,2 b,y,1", "patient '2' of a.png, but '1'"),
    ("a b", "labels.csv", "image,label,fold a,x,1 a.png,x,2 b,y,1", "fold '2' of a.png, but '1'"),
    ("a b", "labels.csv", "image,label,split a,x,train b,y,holdout", "split 'holdout', expected"),
    ("a b", "labels.csv", "image,label,fold,split a,x,1,train b,y,2,", "fold '1' and split 'train', expected fold .*, or split"),
    ("a b", "labels.csv", "image,label,fold a,x,7 b,y,2", "fold '7'"),
    ("a b", "labels.csv --test-fraction 0.2", "image,label,split a,x,train b,y,test", "official split"),
    ("a b", "labels.csv", "image,label q,x r,y", "none of its 2 images lies beside it or below: 'q', ...; found 2 .png"),
    ("a b", "labels.csv", "image,label a,x b,x", "1 classes .'x'., expected 2 to 256"),
    ("a b", "labels.csv", "image,label a, b,nan", "none of the 2 rows has a label"),
    ("a b c", "labels.csv", "image,label a,No_find b,no-find c,z", "two of .*No_find.* look like one class: merge or rename"),
    ("a b", "labels.csv", "Image,Label a,x b,y", r"labels.csv: no column image, found \['Image', 'Label'\]: use --columns image=Image label=Label"),
    ("a b", "labels.csv", "Image,Label,Set a,x,train b,y,test", "use --columns image=Image label=Label split=Set"),
    ("a b c", "labels.csv", "image,label a,1 b,0 c,-1.0", "is -1 unknown. Then --classes COLUMN"),
    ("train/a train/b test/c", "sample_submission.csv", "id,label c,0", "sample_submission.csv names"),
    ("a b", "labels.csv", "image,age a,70 b,60", "expected label .--columns label=COLUMN., or two or more of 0 and 1"),
    ("a b", "labels.csv", SLIP, "labels.csv:2: edema is '2', expected 0, 1, -1 or blank"),  # among many of 0 and 1
    ("x/a y/a b", "labels.csv", "image,label a,x b,y", "labels.csv:2: a may be x/a.png or y/a.png"),
    # RSNA
    (SCAN, RSNA, "patientId,Target a,0 a,1", "labels.csv:3: label 'pneumonia' of .*a, but 'no_pneumonia'"),
    (SCAN, RSNA, "patientId,Target a,2", "labels.csv:2: 'a' has Target '2', expected 0 or 1"),
    (SCAN, RSNA, "patientId,Target a", "has Target ''"), (SCAN, RSNA, "patientId,label a,1", "no column Target"),
    (SCAN, RSNA, "patientId,Target b,0", "none of its 1 images"),
    (SCAN, "", "", f"expected {RSNA} and stage_1_train_images/ side by side"),
    # folders of classes
    ("No_Finding/1 ill/2 nofinding/3", "", "", "two of .*No_Finding.* look like one class"),
    ("chest/train/A/1 chest/train/B/2", "", "", "one folder too high. Use --data .*raw/chest/train; .*; found 2 .png, such"),
    ("a/b/train/A/1 a/b/train/B/2 a/b/test/A/3 a/b/test/B/4", "", "", "one folder too high. Use --data .*raw/a/b;"),
    ("NORMAL/p1/1 NORMAL/p2/2", "", "", ": no folders of classes; "), ("images/1 images/2", "", "", STEM),
    ("site_a/ill/1 site_a/ok/2 site_b/ill/3 site_b/ok/4", "", "", r"raw: several of \['site_a', 'site_b'\] hold ill and ok; expected"),
    ("x/images_1/1 x/images_2/2", "", "", "raw: no folders of classes; expected"),  # and no word of x
    ("images_001/1 images_002/2", "", "", "images_001/ is no class"), ("p10/1 p11/2", "", "", "p10/ is no class"),
    ("images/1 masks/1", "", "", "images/ is no class"), ("10006/1 10007/2 10008/3", "", "", "10006/ is no class"),
    (" ".join(f"c{k}/{k}" for k in range(10)), "", "", "10 folders of 10 images are patients"), ("train/1 test/2", "", "", STEM),
    ("ill/1 ok/2 other/3.bmp", "", "", "other/ holds no image that is read; .* 1 .bmp .convert to PNG., such as other/3.bmp"),
    ("ill/1.bmp ok/2.bmp", "", "", r"found 2 .bmp \(convert to PNG\), such as ill/1.bmp"),
    ("a b c", "", "", "found 3 .png"), ("", "", "", "found nothing"), ("A/1 A/2", "", "", STEM),
    # boxes: one mistake of a table is one message
    ("a b c", "boxes.csv", f"{BOXES} a,.1,.2,.8,.9 b,.1,.2,.8,.9 c,0,0,1,1", "all boxes within 0 to 1 are fractions"),
    ("a b", "boxes.csv", f"{BOXES} a,1,2,8,9 b,1,2,8,9 a.png,1,2,9,9", "boxes.csv:4: xmax '9' of a.png, but '8' in .*boxes.csv:2, expected one row an image"),
    ("a", "boxes.csv", "file,l,t,r,b a,1,2,8,9", r"no column image, xmin, ymin, xmax, ymax, found \['file', 'l', 't', 'r', 'b'\]: use --columns"),
    ("u_1", "boxes.csv --test-site x --site-regex [a-z]", f"{BOXES} u_1,1,1,9,9", "--test-site x, found the sites .'u'."),
    ("u_1", "boxes.csv --site-regex ^(x)?", f"{BOXES} u_1,1,1,9,9", "--site-regex .* finds nothing in u_1.png"),
    (SCAN, f"{RSNA} --classes healthy ill", "patientId,Target a,0", "classes in the data"),
    ("a", "boxes.txt", "x", "found 1 .png, such as a.png; .* boxes.csv .image,xmin,ymin,xmax,ymax.*one folder too high"),
])  # fmt: skip
def test_what_is_refused_says_what_lies_there(tmp_path, names, name, text, words):
    name, *options = name.split(" ", 1)
    raw = table(tmp_path / "raw", text, names, name) if name else draw(tmp_path / "raw", names)
    task = "detection" if name.startswith("boxes") else "classification"
    refused(words, raw, " ".join(["--size 32", *options]), task)


# --- what is read: images, a table by its name, options; rows by their columns, - for a blank; what is printed ---

HEARTS = "rsna_heart_detection.csv"
FOLDS = "a.png,ill,p1,f,7,1 b,ok,p1.0,m,8,2 gone.png,ok,p3,f,9,0 sub/c,ill,2.0,f,10,3"
LABELS = "a,p1,1,70,0, b,p2,0.0,60,, c,p3,-1,61,1.0,x d,p4,nan,3,NA,"
BOXED = (
    "a.png,1,2,8,9.5,p1,s,50 images/b,2,2,9,9,p2,t,60 gone,1,1,5,5,p3,s,7 a.png,1,2,8,9.5,p1,s,50"
)
CHOSEN = "image,hand,leg,fractured,count a,0,1,1,3 b,1,0,0,0 c,0,0,1,1 d,1,1,,0"
FEW = " ".join(["val/A/1 val/B/2", *(f"train/{'AB'[k % 2]}/t{k}" for k in range(40))])
TARGETS = "~patientId~,x,Target b~,5,1 ~a,,0 b,7,1 lost,,0 c~,,~0"


@pytest.mark.parametrize("names, name, text, options, columns, expected, words", [
    ("a images/b sub/c stray", "labels.csv", f"image,label,patient,sex,id,fold {FOLDS}", "--classes ok ill",
     "source label patient fold sex table_id", "a.png ill p1 1 f 7|images/b.png ok p1.0 2 m 8|sub/c.png ill 2 3 f 10",
     "table of labels, 3|positive class: ill|1 rows without a file left out, such as 'gone.png'|left out: 1 .png, such as stray.png"),
    ("a b c d", "labels.csv", "image,label a,x b, c,y d,nan", "", "id label", "a.png x|c.png y", "2 of 4 rows left out: no label"),
    ("a b c d", "labels.csv", "image,label a,1.0 b,0.0 c,nan d,0", "", "label", "1|0|0", "classes: 0, 1"),
    ("a b c d", "labels.csv", "image,label a,10 b,9 c,9.0 d,10", "", "label", "10|9|9|10", "classes: 9, 10"),
    ("a b", "labels.csv", "image,label a,x a.png,x b,y ./a,x", "", "label", "x|y", "2 rows repeat an image"),
    ("a b", "labels.csv", "image,label,Set a,x,train b,y,test", "", "Set split", "train -|test -", "note: is Set an official split? Then --columns split=Set"),
    ("a b c", "labels.csv", "image,label a,1 b,-1 c,-1", "", "label", "1|-1|-1", "classes: -1, 1"),
    ("a b c", "labels.csv", "image,label,patient,fold a,x,p,0 b,y,p,1 c,y,q,2", "", "fold", "0|1|2", "1 patients in several official splits or folds"),
    # several labels an image, and one column of them
    ("a b c d", "labels.csv", f"image,patient,edema,age,mass,note {LABELS}", "", "patient edema mass age",
     "p1 1 0 70|p2 0 - 60|p3 - 1 61", "labels: edema, mass"),
    ("a b c d", "labels.csv", CHOSEN, "--classes fractured", "label hand", "fractured 0|no_fractured 1|fractured 0", "classes: no_fractured, fractured"),
    ("a b c d", "labels.csv", CHOSEN, "--classes no_fractured fractured", "label", "fractured|no_fractured|fractured", ""),  # as --like has them
    ("a b c d", "labels.csv", CHOSEN, "--classes leg hand", "leg hand fractured", "1 0 1|0 1 0|0 0 1|1 1 -", "labels: leg, hand"),
    ("a b", "labels.csv", "image,x,y a,True,FALSE b,false,1", "", "x y", "1 0|0 1", "labels: x, y"),
    # folders of classes; one below is a patient
    ("A/p1/1 A/p1/deep/2 A/3 B/p1/1 B/images/4 B/images/p2/5 B/masks/4", "", "", "", "id patient label",
     "A/3.png 3 A|A/p1/1.png p1 A|A/p1/deep/2.png p1 A|B/images/4.png 4 B|B/images/p2/5.png p2 B|B/p1/1.png p1 B", "class folders, 6"),
    ("A/IM-1_a A/person2_b B/IM-3_c", "", "", "--patient-regex (IM-[0-9])|(person[0-9])", "patient", "IM-1|person2|IM-3", ""),
    ("Training_Set/A/1 Training_Set/B/1 Training_Set/B/x TEST_SET/A/1 TEST_SET/B/p9/y validate/A/p9/z stray/x", "", "", "", "patient split label",
     "TEST_SET/A/1 test A|p9 test B|Training_Set/A/1 train A|Training_Set/B/1 train B|x train B|p9 val A",
     "1 patients in several official splits or folds|left out: 1 .png, such as stray/x.png"),
    (FEW, "", "", "", "split", "|".join(["train"] * 40 + ["val"] * 2), "fold 0 has, as given, only 2 of 42: too few to choose by; train.py --fold 1"),
    ("A/p0/a A/p1/a B/p0/a B/p1/a", "", "", "", "patient label", "p0 A|p1 A|p0 B|p1 B", ""),
    ("0/a 0/b 1/c 2/d 3/e", "", "", "", "label", "0|0|1|2|3", ""),
    ("A/lung_masks/a A/images/a B/b", "", "", "", "id", "A/images/a.png|B/b.png", "left out: 1 .png, such as A/lung_masks/a.png"),
    ("A/a_mask A/a B/b B/b-seg_1 B/c_mask", "", "", "", "id", "A/a.png|B/b.png|B/c_mask.png", "2 masks beside their images"),
    # RSNA
    ("stage_2_train_images/a stage_2_train_images/b stage_2_train_images/c stage_2_train_images/d stage_2_test_images/e", "stage_2_train_labels.csv",
     TARGETS, "--classes pneumonia no_pneumonia", "id patient label source",
     "a a no_pneumonia stage_2_train_images/a.png|b b pneumonia stage_2_train_images/b.png|c c no_pneumonia stage_2_train_images/c.png",
     "RSNA challenge|positive class: no_pneumonia|1 rows without a file left out|left out: 2 .png, such as stage_2_test_images/e.png"),
    # boxes; a patient or site is found in the file's name, or else in its path
    ("images/a images/b elsewhere/c", "boxes.csv", f"{BOXES},patient,site,age {BOXED}", "", "id xmin ymax patient site age height width",
     "a.png 1.0 9.5 p1 s 50 12 12|b.png 2.0 9.0 p2 t 60 12 12", "1 rows without a file left out, such as 'gone'"),
    ("a b", "boxes.tsv", "image,x1,y1,x2,y2 a,1,2,8,9 b,2,2,9,9", "--columns xmin=x1 ymin=y1 xmax=x2 ymax=y2", "xmin ymin xmax ymax",
     "1.0 2.0 8.0 9.0|2.0 2.0 9.0 9.0", ""),
    ("images/u_1 images/u_2 images/p3/v", "boxes.csv", f"{BOXES} u_1,1,1,9,9 u_2,1,1,9,9 v,1,1,9,9", "--site-regex ^[a-z]+ --test-site u --patient-regex [_p]([0-9])",
     "site patient split", "v 3 -|u 1 -|u 2 -", "fold test        2 u|--site-regex: 2, such as v in images/p3/v.png"),
    ("any/x", HEARTS, "label,x0,y0,w,h,name 1,56,112,112,28,x 1,1,1,2,2,lost", "", "id patient xmin ymin xmax ymax", "x x 3.0 6.0 9.0 7.5", "RSNA heart boxes"),
])  # fmt: skip
def test_what_is_read_becomes_rows(
    tmp_path, capsys, names, name, text, options, columns, expected, words
):
    raw = table(tmp_path / "raw", text, names, name) if name else draw(tmp_path / "raw", names)
    task = "detection" if name.startswith("boxes") or name == HEARTS else "classification"
    size = 32 if task == "detection" else 12
    images, rows, _ = run(raw, f"--size {size} {options}", task)
    found = [" ".join(row[column] or "-" for column in columns.split()) for row in rows]
    assert "|".join(found) == expected
    printed = capsys.readouterr().out
    assert [part for part in words.split("|") if part not in printed] == []
    for image, row in zip(images, rows, strict=True):
        drawn = noise(row["source"].removesuffix(".png"))
        assert task == "detection" or (image == drawn).all()


PARTS = ("images_001/a images_001/b images_002/c", "p10/a p11/b p10/c", "t/1000/a t/1001/b")


@pytest.mark.parametrize("folders", PARTS)
@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_a_table_wins_over_folders(tmp_path, folders, name):
    text = "image_id,dx,lesion_id,label a,nv,l1,7 b,mel,l2,7 c,nv,l1,7"
    raw = table(tmp_path / "raw", text, folders, name)
    words = "no column image, found" if name == "labels.csv" else f"use --data .*{name} --columns"
    told = refused(words, raw)
    assert "image_id" in told and "lesion_id" in told
    options = "--columns image=image_id label=dx patient=lesion_id"
    _, rows, _ = run(raw / name, options, out="../out")
    found = {(row["label"], row["patient"], row["table_label"]) for row in rows}
    assert found == {("nv", "l1", "7"), ("mel", "l2", "7")}  # two columns of one name


def test_of_several_tables_the_one_of_most_images_is_proposed(tmp_path):
    raw = table(tmp_path / "raw", "id,level a,1 b,0", "train/a train/b test/c", "train.csv")
    table(raw, "id,level c,0", "", "sample_submission.csv")
    refused("train.csv names the images: use --data .*train.csv --columns image=", raw)


def test_a_label_that_like_has_besides_is_asked_for_as_an_empty_column(tmp_path):
    run(table(tmp_path / "raw", "image,edema,mass,hernia a,1,0,1 b,0,1,0 c,1,1,0"))
    raw = table(tmp_path / "other", "image,mass,edema a,1,0 b,0,1")
    like = f"--like {tmp_path}/out"
    refused("labels .*expected .*'hernia'.*an empty column", raw, like, out="x")
    raw = table(tmp_path / "other", "image,mass,edema,hernia a,1,0, b,0,1,")
    _, rows, meta = run(raw, like, out="like")
    assert meta["classes"] == ["edema", "mass", "hernia"]
    found = [(row["edema"], row["mass"], row["hernia"], row["fold"]) for row in rows]
    assert found == [("0", "1", "", "test"), ("1", "0", "", "test")]


KNOWN = "classes in the data .* expected .*, each once"


@pytest.mark.parametrize("names, wanted, expected, first", [
    ("a b", "b a", "b a", "a"), ("a b", "b a c", "b a c", "a"), ("0 1", "normal ill", "normal ill", "normal"), ("0 1", "1 0", "1 0", "0"),
    ("1", "normal ill", "normal ill", "ill"), ("1 2 3", "x y z", "x y z", "x"), ("no_x x", "x no_x", "x no_x", "no_x"),
    ("a b", "b c", "", KNOWN), ("0 1 2", "x y", "", KNOWN), ("0 1", "0 ill", "", KNOWN), ("a b", "a a", "", KNOWN), ("a b", "a b b", "", KNOWN),
    ("no_x x", "healthy ill", "", KNOWN),
    *((f"{first} {last}", "", f"{first} {last}", first) for first, last in (
        ("benign", "malignant"), ("normal", "pneumonia"), ("Negative", "Positive"), ("no", "yes"), ("0", "1"), ("A", "ulcer"), ("mild", "severe"),
        ("clear", "pneumothorax"))),
    # a class without a finding is never positive unasked
    *((f"{first} {last}", "", "", f"'{last}' would be the positive class: use --classes") for first, last in (
        ("covid", "normal"), ("Abnormal", "Healthy"), ("ill", "negative"), ("case", "control"), ("mass", "no_mass"),
        ("COVID", "NonCOVID"), ("Edema", "NoFinding"), ("TB", "normal_chest"), ("Parasitized", "Uninfected"),
        ("affected", "unaffected"), ("Malignant", "benign"), ("TB", "clear"), ("Befund", "ohne_Befund"), ("HER2+", "HER2-"), ("Fraktur", "unauffällig"),
        ("ja", "nee"), ("Krank", "nein"), ("is_ill", "not_ill"), ("Mass", "absent"), ("Abnormal", "unremarkable"))),
])  # fmt: skip
def test_classes_orders_known_names_and_names_numbers(names, wanted, expected, first):
    cases = [Case(name, name, name) for name in names.split()]
    if not expected:
        with pytest.raises(DataError, match=first):
            preprocess.order_classes(Path("raw"), cases, wanted.split())
        return
    found = preprocess.order_classes(Path("raw"), cases, wanted.split())
    assert found == expected.split() and cases[0].label == first


THREE = ["0", "1", "2"]
SPLITS = ("train", "val", "test")


@pytest.mark.parametrize("shape, labels, classes", [
    ((9, 9), (40, 1), THREE), ((9, 9, 3), (40,), THREE), ((9, 9), (40, 5), list("01234")),
])  # fmt: skip
def test_medmnist(tmp_path, shape, labels, classes, capsys):
    values = np.arange(np.prod(labels)).reshape(labels) % (3 if classes == THREE else 2)
    arrays = {f"{split}_images": noise(split, 40, *shape) for split in SPLITS}
    raw = draw(tmp_path / "raw", "")
    np.savez(raw / "mini.npz", **arrays, **{f"{split}_labels": values for split in SPLITS})
    images, rows, meta = run(raw, "--color" if len(shape) == 3 else "")
    assert "too few to choose by" not in capsys.readouterr().out
    assert (images == np.concatenate([arrays[f"{split}_images"] for split in SPLITS])).all()
    assert meta["multi_label"] == (classes != THREE) and meta["size"] == 9
    folds = {(row["split"], row["fold"]) for row in rows}
    expected = {("train", fold) for fold in "1234"} | {("val", "0"), ("test", "test")}
    assert meta["classes"] == classes and folds == expected
    if classes == THREE:
        assert [row["label"] for row in rows[:4]] == ["0", "1", "2", "0"]
        named = run(raw / "mini.npz", "--classes a b c", out="../named")
        assert [row["label"] for row in named[1][:4]] == ["a", "b", "c", "a"]
    else:
        assert [rows[1][name] for name in classes] == ["1", "0", "1", "0", "1"]


PIXELS = noise("a", 4, 8, 8)
ZEROS = np.zeros((4, 1), int)


@pytest.mark.parametrize("images, labels", [
    (PIXELS, ZEROS[:3]), (PIXELS[0], ZEROS), (PIXELS / 1.0, ZEROS), (noise("a", 4, 8, 8, 8), ZEROS), (PIXELS, ZEROS + 1.7),
    (PIXELS, ZEROS - 1), (PIXELS, ZEROS + 200_000_000), (PIXELS, np.array([[0, 2]] * 4)),
])  # fmt: skip
def test_medmnist_refused(tmp_path, images, labels):
    path = tmp_path / "a.npz"
    np.savez(path, train_images=images, train_labels=labels)
    refused("a.npz: train: images .*expected", path)
    np.savez(path, other_images=images, other_labels=labels)
    refused("a.npz: arrays .*expected train_images", path)
    path.write_bytes(path.read_bytes()[:200])  # a download that stopped
    refused("a.npz: (BadZipFile|EOFError)", path)


def test_skip_bad_leaves_out_images_without_a_usable_box_and_tells_each_reason(tmp_path, capsys):
    text = f"{BOXES} a,1,2,12,9 b,5,2,3,9 d,1,1,13,9 e,1,1,1_0,9 f,1,1,8,1.2.3"
    raw = table(tmp_path / "raw", text, "a b c d e f", "boxes.csv")
    _, rows, meta = run(raw, "--skip-bad --size 32", "detection")
    told = capsys.readouterr().err
    assert told.count("\n") == 5 and "c.png: no box in boxes.csv\n" in told
    assert "b.png: box (5.0, 2.0, 3.0, 9.0), expected 0 <= xmin < xmax <= 12" in told
    assert "e.png: no box: blank, or no numbers" in told and "f.png: no box: blank" in told
    assert [row["id"] for row in rows] == ["a.png"] and meta["skipped"] == 5
