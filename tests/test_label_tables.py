"""Tables of labels: where their images lie, what their columns mean, and what is refused."""

from pathlib import Path

import pytest

from classification import preprocess
from tests.test_preprocess import dicom, folders, noise, refused, run


def table(raw: Path, text: str, files: str = "a b c", name: str = "labels.csv") -> Path:
    """A folder with noise images and a table, whose rows are separated by blanks in `text`."""
    folders(raw, files)
    (raw / name).write_text("\n".join(text.split()) + "\n")
    return raw


def test_a_table_gives_labels_patients_and_further_columns(tmp_path, capsys):
    text = "image,label,patient,sex,id a.png,ill,p1,f,7 b,ok,p1,m,8 gone.png,ok,p3,f,9 sub/c,ill,p2,f,10"
    raw = table(tmp_path / "raw", text, "a images/b sub/c stray")
    images, rows, meta = run(raw, "--classes", "ok", "ill", "--size", "12")
    assert [row["source"] for row in rows] == ["a.png", "images/b.png", "sub/c.png"]
    assert [(row["label"], row["patient"], row["sex"]) for row in rows] == [
        ("1", "p1", "f"), ("0", "p1", "m"), ("1", "p2", "f")]  # fmt: skip
    assert list(rows[0]) == ["id", "patient", "fold", "label", "sex", "table_id", "source"]
    assert rows[0]["table_id"] == "7" and rows[0]["fold"] == rows[1]["fold"]
    assert (images[2] == noise("sub/c")).all() and meta["layout"] == "table of labels"
    printed = capsys.readouterr().out
    assert "note: 1 rows without a file left out, such as gone.png\n" in printed
    assert "note: left out: 1 .png\n" in printed
    assert "note: columns of the table that are called table_... now: id\n" in printed


def test_a_file_is_a_table_and_its_images_lie_beside_it(tmp_path):
    raw = table(tmp_path / "raw", "image,label a,x b,y", "a b", name="Mine.CSV")
    main_out = run(raw / "Mine.CSV", out="../out")
    assert [row["label"] for row in main_out[1]] == ["0", "1"]


@pytest.mark.parametrize(
    "name", ["a", "./a.png", "deep/a.png", "./deep/a", "/home/me/raw/deep/a.png", r"x\deep\a"]
)
def test_an_image_is_found_by_its_path_or_its_name(tmp_path, name):
    raw = table(tmp_path / "raw", f"image,label {name},x b,y", "deep/a b")
    assert [row["source"] for row in run(raw)[1]] == ["b.png", "deep/a.png"]


def test_the_last_number_of_a_uid_is_no_suffix(tmp_path):
    raw = tmp_path / "raw"
    for name in ("1.2", "1.2.3", "1.2.3.4.dcm"):
        dicom(raw / name, noise(name))
    (raw / "labels.tsv").write_text("image\tlabel\n1.2\tx\n1.2.3\ty\n1.2.3.4\tx\n")
    rows = run(raw / "labels.tsv", out="../out")[1]
    assert [(row["source"], row["label"]) for row in rows] == [
        ("1.2", "0"), ("1.2.3", "1"), ("1.2.3.4.dcm", "0")]  # fmt: skip


def test_a_path_never_means_an_image_of_another_folder(tmp_path):
    text = "image,label train/1.png,x test/1.png,y test/a.png,x a,y"
    raw = table(tmp_path / "raw", text, "train/1 a")
    assert [row["source"] for row in run(raw)[1]] == ["a.png", "train/1.png"]


def test_a_name_means_the_image_beside_the_table_or_in_images_first(tmp_path):
    raw = table(tmp_path / "raw", "image,label a,x b.png,y", "a images/a images/b other/b")
    assert [row["source"] for row in run(raw)[1]] == ["a.png", "images/b.png"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(tmp_path, separator):
    folders(tmp_path / "raw", "a b")
    rows = [["image", "label", "remark"], ['"a.png"', '"1"', '"x, y; ""z"""'], ["b", "0", ""]]
    text = "\r\n".join(separator.join(row) for row in rows) + "\r\n\r\n"
    (tmp_path / "raw/labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    _, rows, meta = run(tmp_path / "raw")
    assert meta["classes"] == ["0", "1"]
    assert [row["remark"] for row in rows] == ['x, y; "z"', ""]


def test_numbers_are_classes_in_their_order_and_words_by_the_alphabet(tmp_path):
    raw = table(tmp_path / "raw", "image,label a,10 b,9 c,-1")
    assert run(raw)[2]["classes"] == ["-1", "9", "10"]
    raw = table(tmp_path / "words", "image,label a,10 b,9 c,x")
    assert run(raw, out="words_out")[2]["classes"] == ["10", "9", "x"]
    refused(
        "'normal' would be the positive class", table(tmp_path / "n", "image,label a,ill b,normal")
    )


@pytest.mark.parametrize("column, values, folds", [
    ("split", "Train VALID testing", ["1234", "0", "test"]),
    ("fold", "3 test 0", ["3", "test", "0"]),
])  # fmt: skip
def test_folds_and_splits_of_a_table_are_kept(tmp_path, column, values, folds):
    values = values.split()
    text = f"image,label,{column} a,x,{values[0]} b,y,{values[1]} c,x,{values[2]} d,y,{values[0]}"
    _, rows, _ = run(table(tmp_path / "raw", text, "a b c d"), "--classes", "y", "x")
    assert [row["fold"] in fold for row, fold in zip(rows[:3], folds, strict=True)] == [True] * 3


def test_control_characters_of_a_table_never_reach_the_screen(tmp_path):
    folders(tmp_path / "raw", "a b")
    text = 'image,label,re\tmark\na,x\x1b[2J,"red\x1b[31m"\nb,y,"two\twords"\n'
    (tmp_path / "raw/labels.csv").write_text(text)
    _, rows, meta = run(tmp_path / "raw")
    assert meta["classes"] == ["x [2J", "y"]
    assert [row["re mark"] for row in rows] == ["red [31m", "two words"]


def test_rows_that_say_nothing_new_or_nothing_are_counted(tmp_path, capsys):
    run(table(tmp_path / "raw", "image,label a,x a.png,x b,y c,"))
    printed = capsys.readouterr().out
    assert "note: 1 repeated rows left out, such as a.png\n" in printed
    assert "rows without a label left out, such as " in printed and "labels.csv:5\n" in printed


@pytest.mark.parametrize("text, files, words", [
    ("image,label a,x a.png,y", "a", r"csv:3: a\.png has the label 'y', but 'x' in .*csv:2$"),
    ("image,label,patient a,x,1 a,x,2", "a", "csv:3: a has the patient '2', but '1' in .*csv:2$"),
    ("image,label a,x", "d/a e/a", r"csv:2: a may be d/a\.png or e/a\.png; write the path below "),
    ("image,label,split a,x,later", "a", "csv:2: split 'later', expected train, val or test"),
    ("image,label,fold a,x,5", "a", "csv:2: fold '5', expected 0 to 4 or test"),
    ("image,label,fold,split a,x,1,val", "a", "fold '1' and split 'val', expected one of the two"),
    ("image,label ,x", "a", "csv:2: a label without an image"),
    ("image,label q,x r,y", "a", r"none of the images in its 2 rows is in .*such as q; found .*1 \.png"),
    ("image,label", "a", "no rows below the names of the columns"),
    ("image,label a,x b,x", "a b", "every label is 'x', expected two or more classes"),
    ("image,label a,No_find b,no-find", "a b", "No_find and no-find look like one class"),
    ("image,label a,1 b,1.0", "a b", "1 and 1.0 look like one class"),
    ("image,label,split a,x,train b,y,val", "a b", r"val has the classes \['y'\], which train has not"),
    ("image,label,label a,x,y", "a", "csv: 2 columns are called label, expected one"),
    ("name,label a,x", "a", r"no column \['image'\], found \['name', 'label'\]"),
])  # fmt: skip
def test_tables_that_are_refused_name_the_line(tmp_path, text, files, words):
    refused(words, table(tmp_path / "raw", text, files))


def test_a_table_of_measurements_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "MAX_CLASSES", 2)
    raw = table(tmp_path / "raw", "image,label a,0.31 b,0.62 c,0.93")
    refused("3 different labels, expected at most 2", raw)


def test_the_patient_of_a_table_comes_before_the_regex(tmp_path):
    raw = table(tmp_path / "raw", "image,label,patient p1_a,x, p1_b,y,q", "p1_a p1_b")
    rows = run(raw, "--patient-regex", "p[0-9]")[1]
    assert [row["patient"] for row in rows] == ["p1", "q"]
    refused("finds nothing in 1 names: .*p1_a.png", raw, "--patient-regex", "z", "--overwrite")


def test_a_table_is_an_external_test_set(tmp_path):
    run(table(tmp_path / "raw", "image,label a,x b,y c,z"))
    raw = table(tmp_path / "other", "image,label a,z b,x")
    rows = run(raw, "--like", str(tmp_path / "out"), out="like")[1]
    assert [(row["fold"], row["label"]) for row in rows] == [("test", "2"), ("test", "0")]
