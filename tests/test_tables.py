"""Tables and folders as people have them: what they become, and what a refusal tells to type."""

import gzip
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classification.preprocess import (
    Case,
    DataError,
    list_folder,
    list_images,
    locate,
    order_classes,
    plain_number,
    read_rows,
    set_by_path,
    split_of,
)
from tests.raw import dicom, draw, noise, refused, run, table


def values(path: Path, content: bytes, columns: tuple[str, ...] = ()) -> list[dict]:
    path.write_bytes(content)
    return [{k: v for k, v in row.items() if k} for row in read_rows(path, list(columns))]


ROW = [{"image": "a", "label": "é"}]


@pytest.mark.parametrize("content, expected", [
    ("image,label\na,é\n".encode(), ROW),
    ("\ufeffimage;label\r\n a ; é \r\n".encode(), ROW),  # Excel's mark, line ends and semicolons
    ("image\tlabel\na\té".encode("utf-16"), ROW),
    ("image,label\na,é".encode("utf-16-le").join([b"\xff\xfe", b""]), ROW),
    ("sep=|\nimage|label\na|é\n".encode(), ROW),
    (unicodedata.normalize("NFD", "image,label\na,é\n").encode(), ROW),
    ("image,label,\na,é,\n\n,,\n".encode(), ROW),  # a comma at the end of every line, empty rows
    (b'image,label\na,"x, ""y"""\n', [{"image": "a", "label": 'x, "y"'}]),
    ("image,label\na,x\u2028y\n".encode(), [{"image": "a", "label": "x\u2028y"}]),  # ends no row
    (b"image,label\na,x\x1b[2J\n", [{"image": "a", "label": "x [2J"}]),
    (b"image,label\na\n", [{"image": "a", "label": ""}]),
    (b"image,label\na,nan\na,NaN\na,NA\na,N/A\na,None\na,null\na,<NA>\n", [{"image": "a", "label": ""}] * 7),
])  # fmt: skip
def test_tables_as_programs_write_them(tmp_path, content, expected):
    assert values(tmp_path / "t.csv", content) == expected


@pytest.mark.parametrize("content, words", [
    ("image,label\na,x\nb,良性\n".encode("gbk"), "t.csv:3: not UTF-8: save .* CSV UTF-8"),
    ("image,label\na,ü\n".encode("latin-1"), "t.csv:2: not UTF-8"),
    (b"image,label\na,x\nb,1,5\n", "t.csv:3: 3 fields for 2 columns; decimal commas"),
    (b'image,label\na,x\nb,"y\nc,z\n', "t.csv:3: .*expected a closing quote"),
    (b"image,label,label\na,x,y\n", "two columns are called label"),
    (b"image,label\n", "no rows below the names of the columns"),
    (b"", "no rows below the names of the columns"),
])  # fmt: skip
def test_tables_that_are_refused_name_the_line(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        values(tmp_path / "t.csv", content)


def test_a_packed_table_is_read_and_a_workbook_named(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress("image,label\na,é\n".encode()))
    assert [row["label"] for row in read_rows(tmp_path / "t.csv.gz", [])] == ["é"]
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(DataError, match="t.xlsx:1: not UTF-8: save the table as CSV UTF-8"):
        read_rows(tmp_path / "t.xlsx", [])


def test_columns_are_renamed_and_keep_out_of_each_others_way(tmp_path):
    found = values(
        tmp_path / "t.csv", b"image_id,dx,label\na,nv,7\n", ("image=image_id", "label=dx")
    )
    assert found == [{"image": "a", "label": "nv", "table_label": "7"}]
    for columns, words in (
        (["label=dy"], "no column label, found .*: use --columns image=image_id label=dx"),
        (["dx"], "expected NAME=COLUMN"),
    ):
        with pytest.raises(DataError, match=words):
            read_rows(tmp_path / "t.csv", columns)


@pytest.mark.parametrize("names, files, expected", [
    ("a", "deep/a.png", "deep/a.png"),
    ("./deep/a.png", "deep/a.png other/a.png", "deep/a.png"),
    ("A.PNG", "a.png", "a.png"),
    (r"D:\scans\1.dcm", "1.DCM", "1.DCM"),  # of another computer
    ("/home/me/raw/deep/a.png", "deep/a.png", "deep/a.png"),
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
])  # fmt: skip
def test_names_are_located_by_the_longest_end_of_their_paths(names, files, expected):
    found = locate(set(names.split()), files.split())
    places = [" ".join(found.get(name, [])) for name in names.split()]
    assert places == expected.split("|")


def test_composed_and_decomposed_letters_are_one():
    file = unicodedata.normalize("NFD", "Müller.png")
    assert locate({"Müller.png"}, [file]) == {"Müller.png": [file]}


@pytest.mark.parametrize(
    "text, expected",
    [("0.0", "0"), ("-1.0", "-1"), ("01", "01"), ("1.50", "1.50"), ("a1.0", "a1.0")],
)
def test_whole_numbers_are_one_however_programs_write_them(text, expected):
    assert plain_number(text) == expected


@pytest.mark.parametrize("name, split", [
    ("train", "train"), ("Training_Set", "train"), ("VALID", "val"), ("validate", "val"), ("val-data", "val"),
    ("test set", "test"), ("Testing", "test"), ("contest", ""), ("set", ""), ("images", ""),
])  # fmt: skip
def test_splits_are_known_by_any_of_their_names(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("regex, path, patient", [
    ("p[0-9]+", "x/p1_a.png", "p1"), ("(p[0-9]+)_", "p1_a.png", "p1"), ("p[0-9]+", "p7/a.png", "p7"),
    ("^[a-z]+", "images/jsrt_1.png", "jsrt"),  # the file's name comes first
    ("z", "a.png", None), ("^(x)?", "a.png", None),
])  # fmt: skip
def test_a_patient_is_found_in_the_name_or_else_in_the_path(regex, path, patient):
    case = Case("id", path, "label")
    if patient is None:
        with pytest.raises(DataError, match=r"--patient-regex .* finds nothing in a\.png"):
            set_by_path([case], "patient", re.compile(regex))
        return
    set_by_path([case], "patient", re.compile(regex))
    assert case.patient == patient


# --- folders: what is walked ---


def test_links_are_followed_and_what_is_passed_over_is_counted(tmp_path, capsys):
    store = draw(tmp_path / "store", "x y")
    raw = draw(tmp_path / "raw", "a b_mask b notes_mask .hidden/c __MACOSX/d deep/e deep/e_seg-1")
    (raw / "linked").symlink_to(store)
    (raw / "loop").symlink_to(raw)
    (raw / "gone.png").symlink_to(tmp_path / "nothing")
    (raw / "notes.txt").write_text("x")
    Image.fromarray(noise("bmp")).save(raw / "old.bmp")
    os.mkfifo(raw / "pipe.png")
    listing = list_folder(raw)
    assert listing.images == [
        "a.png",
        "b.png",
        "deep/e.png",
        "linked/x.png",
        "linked/y.png",
        "notes_mask.png",
    ]
    assert listing.masks == ["b_mask.png", "deep/e_seg-1.png"]
    assert listing.others == ["notes.txt", "old.bmp"]
    assert listing.closed == ["gone.png", "loop", "pipe.png"]
    # What is named is read.
    assert list_images([raw, raw / "a.png", raw / "old.bmp"])["old.bmp"] == raw / "old.bmp"
    printed = capsys.readouterr().out
    for words in (
        "1 .txt, such as notes.txt",
        "1 .bmp (convert to PNG), such as old.bmp",
        "2 masks beside",
        "3 links to nothing",
        "such as gone.png",
    ):
        assert words in printed, words
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image, expected DICOM, JPEG, PNG or TIFF"):
        list_images([tmp_path / "empty"])


# --- tables of labels ---


def test_a_table_gives_labels_patients_folds_and_further_columns(tmp_path, capsys):
    text = "image,label,patient,sex,id,fold a.png,ill,p1,f,7,1 b,ok,p1.0,m,8,2 gone.png,ok,p3,f,9,0 sub/c,ill,2.0,f,10,3"
    raw = table(tmp_path / "raw", text, "a images/b sub/c stray")
    images, rows, meta = run(raw, "--classes ok ill --size 12")
    assert [row["source"] for row in rows] == ["a.png", "images/b.png", "sub/c.png"]
    found = [(row["label"], row["patient"], row["sex"], row["fold"]) for row in rows]
    assert found == [("ill", "p1", "f", "1"), ("ok", "p1.0", "m", "2"), ("ill", "2", "f", "3")]
    assert list(rows[0]) == [
        "id", "patient", "fold", "split", "digest", "label", "sex", "table_id", "source"]  # fmt: skip
    assert (images[2] == noise("sub/c")).all() and meta["layout"] == "table of labels"
    assert meta["positive_class"] == "ill"
    printed = capsys.readouterr().out
    assert "1 rows without a file left out, such as 'gone.png'" in printed
    assert "left out: 1 .png, such as stray.png\n" in printed


@pytest.mark.parametrize("text, labels", [
    ("image,label a,x b, c,y d,nan", ["x", "y"]),
    ("image,label a,1.0 b,0.0 c,nan d,0", ["1", "0", "0"]),
    ("image,label a,10 b,9 c,9.0 d,10", ["10", "9", "9", "10"]),
    ("image,label a,x a.png,x b,y ./a,x", ["x", "y"]),  # said again
])  # fmt: skip
def test_blank_labels_are_left_out_and_repeated_rows_read_once(tmp_path, text, labels):
    _, rows, meta = run(table(tmp_path / "raw", text))
    assert [row["label"] for row in rows] == labels
    assert meta["classes"] == sorted(set(labels), key=lambda name: (len(name), name))


@pytest.mark.parametrize("text, words", [
    ("image,label a,x a.png,y b,y", r"labels.csv:3: label 'y' of a.png, but 'x' in .*labels.csv:2"),
    ("image,label,patient a,x,1 a.png,x,2 b,y,1", "patient '2' of a.png, but '1'"),
    ("image,label,fold a,x,1 a.png,x,2 b,y,1", "fold '2' of a.png, but '1'"),
    ("image,label,split a,x,train b,y,holdout", "split 'holdout', expected"),
    ("image,label,fold,split a,x,1,train b,y,2,", "fold '1' and split 'train', expected fold .*, or split"),
    ("image,label,fold a,x,7 b,y,2", "fold '7'"),
    ("image,label q,x r,y", "no image of its 2 rows lies beside it or below, such as 'q'; found 4 .png"),
    ("image,label a,x b,x", "1 classes .'x'., expected 2 to 256"),
    ("image,label a,No_find b,no-find c,z", "two of .*No_find.* look like one class: merge or rename"),
    ("Image,Label a,x b,y", r"labels.csv: no column image, found \['Image', 'Label'\]: use --columns image=Image label=Label"),
    ("image,age a,70 b,60", "expected label .--columns label=COLUMN., or two or more of 0 and 1"),
])  # fmt: skip
def test_tables_of_labels_that_are_refused(tmp_path, text, words):
    refused(words, table(tmp_path / "raw", text))


def test_an_ambiguous_name_is_refused_with_both_images(tmp_path):
    raw = table(tmp_path / "raw", "image,label a,x b,y", "x/a y/a b")
    refused("labels.csv:2: a may be x/a.png or y/a.png", raw)


@pytest.mark.parametrize(
    "folders",
    [
        "images_001/a images_001/b images_002/c",
        "p10/a p11/b p10/c",
        "train_images/1000/a train_images/1001/b",
    ],
)
@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_a_table_wins_over_folders(tmp_path, folders, name):
    text = "image_id,dx,lesion_id a,nv,l1 b,mel,l2 c,nv,l1"
    raw = table(tmp_path / "raw", text, folders, name)
    words = "no column image, found" if name == "labels.csv" else f"use --data .*{name} --columns"
    told = refused(words, raw)
    assert "image_id" in told and "lesion_id" in told
    options = "--columns image=image_id label=dx patient=lesion_id"
    _, rows, _ = run(raw / name, options, out="../out")
    assert {row["label"] for row in rows} == {"nv", "mel"} and {row["patient"] for row in rows} == {
        "l1",
        "l2",
    }


MULTI = (
    "image,patient,edema,age,mass,note a,p1,1,70,0, b,p2,0.0,60,, c,p3,-1,61,1.0,x d,p4,nan,3,NA,"
)


def test_columns_of_0_and_1_are_labels(tmp_path):
    _, rows, meta = run(table(tmp_path / "raw", MULTI))
    assert (
        meta["classes"] == ["edema", "mass"]
        and meta["multi_label"]
        and meta["positive_class"] is None
    )
    assert [(row["edema"], row["mass"]) for row in rows] == [("1", "0"), ("0", ""), ("", "1")]
    assert [row["age"] for row in rows] == ["70", "60", "61"]
    assert [row["patient"] for row in rows] == ["p1", "p2", "p3"]


def test_one_of_several_columns_may_be_chosen(tmp_path):
    raw = table(
        tmp_path / "raw", "image,hand,leg,fractured,count a,0,1,1,3 b,1,0,0,0 c,0,0,1,1 d,1,1,,0"
    )
    _, rows, meta = run(raw, "--classes fractured")
    assert (
        meta["classes"] == ["no_fractured", "fractured"] and meta["positive_class"] == "fractured"
    )
    assert [row["label"] for row in rows] == ["fractured", "no_fractured", "fractured"]
    _, rows, meta = run(raw, "--classes leg hand", out="two")
    assert meta["classes"] == ["leg", "hand"] and [row["fractured"] for row in rows] == [
        "1",
        "0",
        "1",
        "",
    ]
    _, _, meta = run(raw, f"--like {tmp_path}/out", out="like")
    assert meta["counts"] == {"test": {"fractured": 2, "no_fractured": 1}}


def test_an_odd_value_among_many_is_an_error_with_its_line(tmp_path):
    rows = [f"{k},{k % 2},{k % 3 // 2}" for k in range(30)]
    rows[4] = "4,2,1"
    raw = table(
        tmp_path / "raw", f"image,edema,mass {' '.join(rows)}", " ".join(map(str, range(30)))
    )
    refused("labels.csv:6: edema is '2', expected 0, 1, -1 or blank", raw)
    refused("labels .*expected two or more|columns", raw, "--classes mass gone")


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


# --- the order of classes ---


@pytest.mark.parametrize("names, wanted, expected", [
    ("a b", "b a", "b a"), ("a b", "b a c", "b a c"), ("0 1", "normal ill", "normal ill"), ("0 1", "1 0", "1 0"),
    ("1", "normal ill", "normal ill"), ("1 2 3", "x y z", "x y z"), ("no_pneumonia pneumonia", "pneumonia no_pneumonia", "pneumonia no_pneumonia"),
    ("a b", "b c", None), ("0 1 2", "x y", None), ("0 1", "0 ill", None), ("a b", "a a", None), ("a b", "a b b", None), ("no_x x", "healthy ill", None),
])  # fmt: skip
def test_classes_orders_known_names_and_names_numbers(tmp_path, names, wanted, expected):
    cases = [Case(name, name, name) for name in names.split()]
    if expected is None:
        with pytest.raises(DataError):
            order_classes(tmp_path, names.split(), cases, wanted.split())
        return
    assert order_classes(tmp_path, names.split(), cases, wanted.split()) == expected.split()
    first = cases[0].label
    named = {"0 1 normal ill": "normal", "1 normal ill": "ill", "1 2 3 x y z": "x"}
    assert first == named.get(f"{names} {wanted}", names.split()[0])


@pytest.mark.parametrize("first, last", [
    ("covid", "normal"), ("Abnormal", "Healthy"), ("ill", "negative"), ("case", "control"), ("mass", "no_mass"),
    ("COVID", "NonCOVID"), ("Edema", "NoFinding"), ("TB", "normal_chest"), ("Parasitized", "Uninfected"),
    ("affected", "unaffected"), ("Malignant", "benign"), ("TB", "clear"), ("Befund", "ohne Befund"), ("Fraktur", "unauffällig"),
    ("ja", "nee"), ("Krank", "nein"), ("is_ill", "not_ill"), ("Mass", "absent"), ("Abnormal", "unremarkable"),
])  # fmt: skip
def test_a_class_without_a_finding_is_never_positive_unasked(first, last):
    with pytest.raises(DataError, match=f"'{last}' would be the positive class"):
        order_classes(Path("raw"), [first, last], [], [])


@pytest.mark.parametrize("first, last", [("benign", "malignant"), ("normal", "nodule"), ("Negative", "Positive"), ("no", "yes"),
                                         ("clear", "pneumothorax"), ("A", "ulcer"), ("0", "1"), ("mild", "severe")])  # fmt: skip
def test_other_names_are_not_asked_for(first, last):
    assert order_classes(Path("raw"), [first, last], [], []) == [first, last]


# --- class folders ---


@pytest.mark.parametrize("names, expected", [
    ("A/p1/1 A/p1/deep/2 A/3 B/p1/1 B/images/4 B/images/p2/5 B/masks/4",
     {"A/3": "3", "A/p1/1": "p1", "A/p1/deep/2": "p1", "B/images/4": "4", "B/images/p2/5": "p2", "B/p1/1": "p1"}),
    ("train/A/1 train/B/1 train/B/x test/A/1 test/B/y",
     {"test/A/1": "test/A/1", "test/B/y": "y", "train/A/1": "train/A/1", "train/B/1": "train/B/1", "train/B/x": "x"}),
    ("A/p0/a A/p1/a B/p0/a B/p1/a", {"A/p0/a": "p0", "A/p1/a": "p1", "B/p0/a": "p0", "B/p1/a": "p1"}),
    ("0/a 0/b 1/c 2/d 3/e", {"0/a": "a", "0/b": "b", "1/c": "c", "2/d": "d", "3/e": "e"}),
    ("A/a_mask A/a B/b B/b-seg_1 B/c_mask", {"A/a": "a", "B/b": "b", "B/c_mask": "c_mask"}),
])  # fmt: skip
def test_class_folders(tmp_path, names, expected):
    _, rows, _ = run(draw(tmp_path / "raw", names))
    assert {row["id"].removesuffix(".png"): row["patient"] for row in rows} == expected


@pytest.mark.parametrize(
    "train, val, test", [("train", "valid", "test"), ("Training_Set", "validate", "TEST_SET")]
)
def test_official_splits(tmp_path, train, val, test, capsys):
    names = [f"{s}/{c}/{s}{c}{k}" for s in (train, val, test) for c in "AB" for k in range(10)]
    _, rows, _ = run(
        draw(tmp_path / "raw", " ".join([*names, f"{train}/A/p9/1", f"{test}/A/p9/2", "stray/x"]))
    )
    found = {(row["id"].split("/")[0], row["fold"], row["split"]) for row in rows}
    assert found == {
        (val, "0", "val"),
        (test, "test", "test"),
        *((train, fold, "train") for fold in "1234"),
    }
    printed = capsys.readouterr().out
    assert (
        "1 patients on both sides of an official split" in printed
        and "left out: 1 .png, such as stray/x.png" in printed
    )
    refused("official split", tmp_path / "raw", "--test-fraction 0.2", out="x")


@pytest.mark.parametrize("names, words", [
    ("No_Finding/1 ill/2 nofinding/3", "two of .*No_Finding.* look like one class"),
    ("chest/train/A/1 chest/train/B/2", "one folder too high. Use --data .*chest/train; .*; found 2 .png, such"),
    ("a/b/train/A/1 a/b/train/B/2 a/b/test/A/3 a/b/test/B/4", "one folder too high. Use --data .*/a/b;"),
    ("NORMAL/p1/1 NORMAL/p2/2", ": no folders of classes; "),
    ("images/1 images/2", "expected a folder for each of two or more classes"),
    ("site_a/ill/1 site_a/ok/2 site_b/ill/3 site_b/ok/4", r"several of \['site_a', 'site_b'\] hold ill and ok; expected"),
    ("images_001/1 images_002/2", "images_001/ is no class"),
    ("p10/1 p11/2", "p10/ is no class"),
    ("images/1 masks/1", "images/ is no class"),
    ("10006/1 10007/2 10008/3", "10006/ is no class"),
    (" ".join(f"c{k}/{k}" for k in range(10)), "10 folders of 10 images are patients"),
    ("train/1 test/2", "expected a folder for each of two or more classes"),
    ("ill/1 ok/2 other/3.bmp", "other/ holds no image that is read; .* 1 .bmp .convert to PNG., such as other/3.bmp"),
    ("ill/1.bmp ok/2.bmp", r"found 2 .bmp \(convert to PNG\), such as ill/1.bmp"),
    ("a b c", "found 3 .png"), ("", "found nothing"), ("A/1 A/2", "expected a folder for each of two or more"),
])  # fmt: skip
def test_folders_that_are_refused_say_what_lies_there(tmp_path, names, words):
    refused(words, draw(tmp_path / "raw", names))


def test_no_message_sends_into_a_folder_of_sites_or_patients(tmp_path):
    for names in (
        "montgomery/tb/1 montgomery/ok/2 shenzhen/tb/3 shenzhen/ok/4",
        "x/images_1/1 x/images_2/2",
    ):
        assert "--data" not in refused("expected", draw(tmp_path / names[:4], names))


# --- the public layouts ---


def test_rsna(tmp_path, capsys):
    raw = tmp_path / "raw"
    for name in ("a.dcm", "b.DCM", "c", "stray.dcm"):
        dicom(raw / "stage_2_train_images" / name, noise(name))
    text = ' patientId ,x,Target\n"b ",5,1\n a,,0\nb,7,1\nlost,,0\nc ,, 0\n'
    (raw / "stage_2_train_labels.csv").write_text(text)
    draw(raw, "stage_2_test_images/e")
    images, rows, meta = run(raw, "--size 12")
    assert [(row["id"], row["patient"], row["label"]) for row in rows] == [
        ("a", "a", "no_pneumonia"), ("b", "b", "pneumonia"), ("c", "c", "no_pneumonia")]  # fmt: skip
    assert (images[1] == noise("b.DCM")).all() and rows[1]["source"] == "stage_2_train_images/b.DCM"
    printed = capsys.readouterr().out
    assert "1 rows without a file left out, such as 'stage_2_train_images/lost'" in printed
    assert "1 .dcm, such as stage_2_train_images/stray.dcm" in printed
    assert "1 .png, such as stage_2_test_images/e.png" in printed
    meta = run(raw, "--classes pneumonia no_pneumonia", out="turned")[2]
    assert (
        meta["classes"] == ["pneumonia", "no_pneumonia"]
        and meta["counts"] == run(raw, out="x")[2]["counts"]
    )
    refused("classes in the data", raw, "--classes healthy ill", out="y")
    refused("no folders of classes|folder too high", tmp_path, out="z/y")


@pytest.mark.parametrize("text, words", [
    ("patientId,Target a,0 a,1", "labels.csv:3: label 'pneumonia' of .*a, but 'no_pneumonia'"),
    ("patientId,Target a,2", "labels.csv:2: 'a' has Target '2', expected 0 or 1"),
    ("patientId,Target a", "has Target ''"), ("patientId,label a,1", "no column Target"),
    ("patientId,Target b,0", "no image of its 1 rows"),
])  # fmt: skip
def test_rsna_refused(tmp_path, text, words):
    dicom(tmp_path / "raw/stage_1_train_images/a.dcm", noise("a"))
    refused(words, table(tmp_path / "raw", text, "", "stage_1_train_labels.csv"))
    (tmp_path / "raw/stage_1_train_labels.csv").unlink()
    refused(
        "expected stage_1_train_labels.csv and stage_1_train_images/ side by side", tmp_path / "raw"
    )


@pytest.mark.parametrize(
    "shape, labels, classes",
    [
        ((9, 9), (40, 1), ["0", "1", "2"]),
        ((9, 9, 3), (40,), ["0", "1", "2"]),
        ((9, 9), (40, 5), list("01234")),
    ],
)
def test_medmnist(tmp_path, shape, labels, classes):
    arrays = {f"{split}_images": noise(split, 40, *shape) for split in ("train", "val", "test")}
    top = 2 if len(labels) > 1 and labels[1] > 1 else 3
    arrays |= {
        f"{split}_labels": np.arange(np.prod(labels)).reshape(labels) % top
        for split in ("train", "val", "test")
    }
    draw(tmp_path / "raw", "")
    np.savez(tmp_path / "raw/mini.npz", **arrays)
    images, rows, meta = run(tmp_path / "raw", "--color" if len(shape) == 3 else "")
    assert (
        meta["classes"] == classes
        and meta["multi_label"] == (len(classes) == 5)
        and meta["size"] == 9
    )
    assert (
        images == np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    ).all()
    assert {row["fold"] for row in rows if row["split"] == "val"} == {"0"}
    if classes == ["0", "1", "2"]:
        assert [row["label"] for row in rows[:4]] == ["0", "1", "2", "0"]
        named = run(tmp_path / "raw/mini.npz", "--classes a b c", out="../named")
        assert [row["label"] for row in named[1][:4]] == ["a", "b", "c", "a"]


@pytest.mark.parametrize("key, images, labels", [
    ("train", noise("a", 4, 8, 8), np.zeros((3, 1), int)), ("train", noise("a", 4, 8), np.zeros((4, 1), int)),
    ("train", noise("a", 4, 8, 8, 8), np.zeros((4, 1), int)), ("train", np.ones((4, 8, 8)), np.zeros((4, 1), int)),
    ("train", noise("a", 4, 8, 8), np.float64([[0], [1.7], [1], [0]])), ("train", noise("a", 4, 8, 8), np.array([[0], [1], [-1], [0]])),
    ("train", noise("a", 4, 8, 8), np.array([[0], [200_000_000], [1], [0]])), ("other", noise("a", 4, 8, 8), np.zeros((4, 1), int)),
    ("train", noise("a", 4, 8, 8), np.array([[0, 2]] * 4)),
])  # fmt: skip
def test_medmnist_refused(tmp_path, key, images, labels):
    np.savez(tmp_path / "a.npz", **{f"{key}_images": images, f"{key}_labels": labels})
    refused("a.npz: .*expected", tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(
        (tmp_path / "a.npz").read_bytes()[:200]
    )  # a download that stopped
    refused("a.npz: (BadZipFile|EOFError)", tmp_path / "a.npz")


# --- boxes ---

BOXES = "image,xmin,ymin,xmax,ymax,patient,site,age "


def test_boxes(tmp_path, capsys):
    text = (
        BOXES
        + "a.png,1,2,8,9.5,p1,s,50 images/b,2,2,9,9,p2,t,60 gone,1,1,5,5,p3,s,7 a.png,1,2,8,9.5,p1,s,50"
    )
    raw = table(tmp_path / "raw", text, "images/a images/b elsewhere/c", "boxes.csv")
    _, rows, meta = run(raw, "--size 32", "detection")
    found = [
        (row["id"], row["xmin"], row["ymax"], row["patient"], row["site"], row["age"])
        for row in rows
    ]
    assert found == [
        ("a.png", "1.0", "9.5", "p1", "s", "50"),
        ("b.png", "2.0", "9.0", "p2", "t", "60"),
    ]
    assert [row["height"] + row["width"] for row in rows] == ["1212", "1212"] and meta["n"] == 2
    assert "1 rows without a file left out, such as 'gone'" in capsys.readouterr().out
    renamed = (
        table(tmp_path / "x/raw", "file,l,t,r,b a,1,2,8,9 b,2,2,9,9", "a b", "mine.csv")
        / "mine.csv"
    )
    words = r"no column image, xmin, ymin, xmax, ymax, found \['file', 'l', 't', 'r', 'b'\]: use --columns"
    refused(words, renamed, "", "detection", out="../out")
    assert (
        len(
            run(renamed, "--columns image=file xmin=l ymin=t xmax=r ymax=b", "detection", "../out")[
                1
            ]
        )
        == 2
    )


@pytest.mark.parametrize("rows, words", [
    ("a,.1,.2,.8,.9 b,.1,.2,.8,.9 c,0,0,1,1", "all boxes within 0 to 1 are fractions"),
    ("a,1,2,8,9 b,1,2,8,9 c,1,2,8,9 a.png,1,2,9,9 b.png,1,1,8,9", "boxes.csv:5: xmax '9' of a.png, but '8' in .*boxes.csv:2, expected one row an image"),
    ("a,1,2,8,9 b,1,2,8,9", "1 of 3 images cannot be used"),
    ("a,17,22,22,19 b,17,22,22,19 c,17,22,22,19", "3 of 3 images cannot be used"),
    ("a,1,2,8,1.2.3 b,1,2,8,9 c,1,2,8,9", "1 of 3 images cannot be used"),
    ("a,1,2,1_0,9 b,1,2,8,9 c,1,2,8,9", "1 of 3 images cannot be used"),
    ("x,1,2,8,9 y,1,2,8,9", "no image of its 2 rows"),
    ("a,1,2,13,9 b,1,2,13,9 c,1,2,13,9", "3 of 3 images cannot be used"),  # beyond the picture
])  # fmt: skip
def test_one_mistake_of_a_table_of_boxes_is_one_message(tmp_path, rows, words):
    raw = table(tmp_path / "raw", f"image,xmin,ymin,xmax,ymax {rows}", "a b c", "boxes.csv")
    refused(words, raw, "--size 32", "detection")


def test_skip_bad_leaves_out_images_without_a_usable_box(tmp_path):
    raw = table(
        tmp_path / "raw",
        "image,xmin,ymin,xmax,ymax a,1,2,8,9 b,5,2,3,9 d,1,1,20,9",
        "a b c d",
        "boxes.csv",
    )
    _, rows, meta = run(raw, "--skip-bad --size 32", "detection")
    assert [row["id"] for row in rows] == ["a.png"] and meta["skipped"] == 3
    skipped = (tmp_path / "out/skipped.csv").read_text()
    assert all(name in skipped for name in ("b.png", "c.png", "d.png"))


def test_what_is_no_set_of_boxes_names_the_columns(tmp_path):
    words = (
        "found 1 .png, such as a.png; .* boxes.csv .image,xmin,ymin,xmax,ymax.*one folder too high"
    )
    refused(words, draw(tmp_path / "raw", "a"), "", "detection")


def test_each_reason_why_a_box_cannot_be_used_is_told(tmp_path, capsys):
    rows = "image,xmin,ymin,xmax,ymax b,5,2,3,9 d,1,1,20,9 e,1,1,1_0,9"
    refused("4 of 4 images", table(tmp_path / "raw", rows, "b c d e", "boxes.csv"), "", "detection")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and "c.png: no box in boxes.csv" in told
    assert any(
        "b.png: box (5.0, 2.0, 3.0, 9.0), expected 0 <= xmin < xmax <= 12" in t for t in told
    )
    assert any("e.png: box (1.0, 1.0, nan, 9.0)" in t for t in told)


def test_hearts_of_rsna_are_scaled_to_the_image(tmp_path):
    raw = tmp_path / "raw"
    dicom(raw / "any/x.dcm", noise("x", 448, 112))
    (raw / "rsna_heart_detection.csv").write_text(
        "label,x0,y0,w,h,name\n1,56,56,112,56,x\n1,1,1,2,2,lost\n"
    )
    _, rows, _ = run(raw, "--size 32", "detection")
    assert [rows[0][name] for name in ("xmin", "ymin", "xmax", "ymax")] == [
        "28.0",
        "112.0",
        "84.0",
        "224.0",
    ]
    assert rows[0]["id"] == rows[0]["patient"] == "x"


def test_sites_by_a_regular_expression(tmp_path):
    rows = " ".join(f"{s}_{k},1,1,9,9" for s in ("jsrt", "wing") for k in range(5))
    raw = table(
        tmp_path / "raw",
        f"image,xmin,ymin,xmax,ymax {rows}",
        " ".join(f"images/{s}_{k}" for s in ("jsrt", "wing") for k in range(5)),
        "boxes.csv",
    )
    _, rows, _ = run(raw, "--site-regex '^[a-z]+' --test-site jsrt --size 32", "detection")
    assert {(row["site"], row["fold"] == "test") for row in rows} == {
        ("jsrt", True),
        ("wing", False),
    }
    refused("found the sites", raw, "--site-regex '^[a-z]+' --test-site x", "detection", out="x")
    refused("--site-regex .* finds nothing in", raw, "--site-regex '^(x)?'", "detection", out="x")
