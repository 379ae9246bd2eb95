"""From raw X-rays to a cache: patients, folds, fit, colour, --like, what cannot be used, and the shared text."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classification import preprocess
from classification.preprocess import (
    Case,
    DataError,
    assign_folds,
    group_patients,
    in_threads,
    read_image,
)
from detection import preprocess as detection
from tests.raw import dicom, draw, noise, refused, run, table

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom|PIL")
ROOT = Path(__file__).resolve().parents[1]


def patients_of(rows: list[dict]) -> dict[str, str]:
    return {row["id"].rsplit(".", 1)[0]: row["patient"] for row in rows}


# --- folds ---

FOLDS = ["0", "1", "2", "3", "4"]


def count(folds: list[str], chosen: list[bool]) -> list[int]:
    return [sum(f == fold and c for f, c in zip(folds, chosen, strict=True)) for fold in FOLDS]


def test_folds_are_balanced_in_every_stratum_whatever_the_order():
    groups = [f"p{k}" for k in range(53)]
    strata = ["rare" if k % 7 == 0 else "often" for k in range(53)]  # 8 and 45
    folds = assign_folds(groups, strata, [""] * 53, 0)
    assert sorted(count(folds, [s == "rare" for s in strata])) == [1, 1, 2, 2, 2]
    assert count(folds, [s == "often" for s in strata]) == [9] * 5
    assert assign_folds(groups[::-1], strata[::-1], [""] * 53, 0)[::-1] == folds


def test_a_patient_is_in_one_fold_and_counts_as_the_rarest_of_his_labels():
    groups = [f"p{k // 2}" for k in range(40)]
    strata = ["rare" if k % 8 == 0 else "often" for k in range(40)]
    folds = assign_folds(groups, strata, [""] * 40, 0)
    assert len(set(zip(groups, folds, strict=True))) == 20
    assert count(folds, [s == "rare" for s in strata]) == [1] * 5
    assert count(folds, [True] * 40) == [8] * 5


@pytest.mark.parametrize("splits, expected", [
    (["val", "test"] + ["train"] * 6, ["0", "test", "1", "1", "2", "2", "3", "4"]),  # fold 0 is val alone
    (["3", "3", "0", "test", "1", "2", "4", "4"], ["3", "3", "0", "test", "1", "2", "4", "4"]),
])  # fmt: skip
def test_official_splits_and_given_folds_are_kept(splits, expected):
    folds = assign_folds(list("abcdefgh"), ["x"] * 8, splits, 0)
    assert folds[:2] == expected[:2] and sorted(folds[2:]) == sorted(expected[2:])


def test_test_fraction_is_that_of_the_patients_of_every_stratum():
    strata = ["ab"[k % 4 == 0] for k in range(200)]
    folds = assign_folds([f"p{k}" for k in range(200)], strata, [""] * 200, 0.1)
    tests = [stratum for stratum, fold in zip(strata, folds, strict=True) if fold == "test"]
    assert Counter(tests) == {"a": 15, "b": 5}


def test_patients_who_share_an_image_are_one_named_by_the_smallest():
    assert group_patients(list("cabxd"), list("11232")) == list("aabxb")
    assert group_patients(list("cbba"), list("1122")) == list("aaaa")


@pytest.mark.parametrize(("validation", "is_small"), [(2, True), (8, False)])
def test_a_small_official_validation_set_is_noted(tmp_path, capsys, validation, is_small):
    names = [f"val/{label}/v{label}{k}" for label in "AB" for k in range(validation // 2)]
    names += [f"train/{label}/t{label}{k}" for label in "AB" for k in range(20)]
    run(draw(tmp_path / "raw", " ".join(names)))
    note = "note: fold 0 has, as given, only 2 of 42: too few to choose by; train.py --fold 1"
    assert (note in capsys.readouterr().out) == is_small


def test_copies_share_a_fold_and_contradictions_are_counted(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/a B/b")
    for name in ("A/z9", "B/m5", "B/q1"):
        Image.fromarray(noise("same")).save(raw / f"{name}.png")
    _, rows, meta = run(raw)
    assert patients_of(rows) == {"A/a": "a", "A/z9": "m5", "B/b": "b", "B/m5": "m5", "B/q1": "m5"}
    assert len({row["fold"] for row in rows if row["patient"] == "m5"}) == 1
    assert list(meta["overlaps"].values()) == [2, 1, 0]
    assert len({row["digest"] for row in rows}) == 3 and all(
        len(row["digest"]) == 16 for row in rows
    )
    printed = capsys.readouterr().out
    assert "2 pixel-identical copies\nnote: 1 identical pixels with different labels" in printed


def test_several_labels_are_balanced_for_the_rarest_of_an_image():
    labels = [("1", "01"[k % 8 == 0]) for k in range(40)] + [("0", "")]
    cases = [Case(f"{k}", f"{k}", label) for k, label in enumerate(labels)]
    strata = preprocess.list_strata(cases)
    assert Counter(strata) == {"0": 35, "1": 5, "none": 1} and strata[8] == "1"


# --- patients ---


@pytest.mark.parametrize("ids, patients, words", [
    ("X X X X X X", 6, "one PatientID stands in every file"),
    ("X X X Y Y Y", 2, "one patient has 3 of 6 images .or use --patient-regex"),  # one a class
    ("X X X X X Y", 2, "one patient has 5 of 6 images .or use --patient-regex"),
    ("X X Y Y  ", 4, "2 images name no patient, .*use --patient-regex"),
])  # fmt: skip
def test_patient_ids_and_placeholders(tmp_path, ids, patients, words, capsys):
    for k, name in enumerate(ids.split(" ")):
        path = tmp_path / "raw" / "AB"[k // 3] / f"v{k}_p{k % 3}.dcm"
        dicom(path, noise(f"{k}"), PatientID=name)
    _, rows, _ = run(tmp_path / "raw")
    assert len({row["patient"] for row in rows}) == patients
    assert re.search(words, capsys.readouterr().out)
    assert not any(b"Doe" in path.read_bytes() for path in (tmp_path / "out").iterdir())
    _, rows, _ = run(tmp_path / "raw", "--patient-regex p[0-9]", out="regex")
    assert {row["patient"] for row in rows} == {"p0", "p1", "p2"}
    assert "--patient-regex: 3, such as p0 in A/v0_p0.dcm" in capsys.readouterr().out


def test_files_without_a_suffix_are_patients_by_themselves(tmp_path):
    for k in range(6):
        dicom(tmp_path / "raw" / "AB"[k % 2] / f"IM.000{k}", noise(f"{k}"), PatientID="")
    assert len({row["patient"] for row in run(tmp_path / "raw")[1]}) == 6


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_a_patient_regex_has_one_meaning(tmp_path, task):
    """The file's name, else its path; over the table's own; an error where nothing is found."""
    text = "image,label,xmin,ymin,xmax,ymax,patient x/p1_a,n,1,1,9,9,q y/p2/b,i,1,1,9,9,q"
    raw = table(
        tmp_path / "raw",
        text,
        "x/p1_a y/p2/b",
        "labels.csv" if task == "classification" else "boxes.csv",
    )
    _, rows, _ = run(raw, "--patient-regex p[0-9] --size 32", task)
    assert [row["patient"] for row in rows] == ["p1", "p2"]
    refused(
        "--patient-regex p1 finds nothing in y/p2/b.png",
        raw,
        "--patient-regex p1 --size 32",
        task,
        "x",
    )


# --- what is written ---


def test_images_are_those_of_their_rows_cut_to_the_middle(tmp_path):
    raw = draw(tmp_path / "raw", "A/a B/b")
    wide = np.hstack([noise("w", 12, 6), noise("middle"), noise("w", 12, 6)])
    Image.fromarray(wide).save(raw / "B/wide.png")
    images, rows, meta = run(raw, "--size 12")
    assert meta["fit"] == "crop" and [row["id"] for row in rows] == [
        "A/a.png",
        "B/b.png",
        "B/wide.png",
    ]
    assert (images == np.stack([noise("A/a"), noise("B/b"), noise("middle")])).all()
    squashed = run(raw, "--size 12 --fit squash", out="squash")
    assert (squashed[0][:2] == images[:2]).all() and (squashed[0][2] != images[2]).any()
    assert (tmp_path / "out/images.npy").stat().st_size == 128 + images.nbytes
    assert squashed[2]["format"] == meta["format"] and meta["counts"] == squashed[2]["counts"]


def test_color_keeps_the_channels_and_says_what_has_none(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/gray B/b")
    rgb = noise("rgb", 12, 12, 3)
    Image.fromarray(rgb).save(raw / "A/a.png")
    images, _, meta = run(raw, "--color --size 12")
    assert (
        meta["channels"] == 3
        and (images[0] == rgb).all()
        and (images[1] == noise("A/gray")[..., None]).all()
    )
    printed = capsys.readouterr().out
    assert "note: 2 images: gray, kept as three equal channels, such as A/gray.png" in printed
    assert "colour turned gray" not in printed
    run(raw, out="gray")
    assert "note: 1 images: colour turned gray, such as A/a.png" in capsys.readouterr().out
    assert run(raw, f"--like {tmp_path}/out", out="like")[2]["channels"] == 3


def test_like_brings_everything_and_makes_every_row_test(tmp_path, capsys):
    train = draw(tmp_path / "raw", " ".join(f"{c}/{c}{k}" for c in "AB" for k in range(6)))
    _, rows, meta = run(train, "--size 16 --fit pad --classes B A --test-fraction 0.4")
    assert 0 < sum(row["fold"] == "test" for row in rows) < 12
    like = f"--like {tmp_path}/out"
    _, rows, external = run(draw(tmp_path / "other", "A/1 A/2"), like, out="external")
    assert [(row["fold"], row["label"]) for row in rows] == [("test", "A")] * 2
    assert all(external[key] == meta[key] for key in ("classes", "size", "fit", "channels"))
    assert "no image of B in fold test" in capsys.readouterr().out
    np.savez(tmp_path / "m.npz", test_images=noise("m", 4, 8, 8), test_labels=np.ones((4, 1), int))
    assert run(tmp_path / "m.npz", like, out="m")[2]["counts"] == {"test": {"A": 4}}
    assert "classes: 0 is B, 1 is A" in capsys.readouterr().out
    refused(
        r"\['A', 'C'\], expected \['B', 'A'\]", draw(tmp_path / "foreign", "A/1 C/2"), like, out="x"
    )
    refused("no finished cache", train, f"--like {train}", out="x")
    refused("only test images; .*--like", tmp_path / "m.npz", out="x")


def test_detection_takes_over_mean_and_std_and_stretches(tmp_path):
    raw = table(
        tmp_path / "raw",
        "image,xmin,ymin,xmax,ymax a,1,1,9,9 b,1,1,9,9 c,2,2,9,9",
        "a b c",
        "boxes.csv",
    )
    images, _, meta = run(raw, "--size 32", "detection")
    assert (meta["mean"], meta["std"]) == pytest.approx(
        ((images / 255).mean(), (images / 255).std())
    )
    other = table(tmp_path / "other", "image,xmin,ymin,xmax,ymax x,1,1,9,9", "x", "boxes.csv")
    external = run(other, f"--like {tmp_path}/out", "detection", "like")
    assert external[2]["mean"] == meta["mean"] and [row["fold"] for row in external[1]] == ["test"]
    dim = (noise("dim", 40, 40) // 4 + 60).astype(np.uint8)
    prepared = detection.prepare(dim, 40)
    assert prepared.min() == 0 and prepared.max() == 255
    apart = prepared.astype(int) - detection.prepare(dim / np.float32(255), 40)
    assert abs(apart).max() <= 1 and (apart != 0).mean() < 0.01  # bytes and floats alike


def test_boxes_are_in_pixels_of_the_image_as_it_is_shown(tmp_path):
    raw = table(
        tmp_path / "raw", "image,xmin,ymin,xmax,ymax a.jpg,1,2,11,29 b,1,1,9,9", "b", "boxes.csv"
    )
    exif = Image.Exif()
    exif[274] = 6  # stored 12 high and 30 wide, shown 30 high and 12 wide
    Image.fromarray(noise("turned", 12, 30)).save(raw / "a.jpg", exif=exif)
    _, rows, _ = run(raw, "--size 32", "detection")
    assert (rows[0]["height"], rows[0]["width"], rows[0]["ymax"]) == ("30", "12", "29.0")
    dicom(raw / "b.dcm", noise("b"), PixelSpacing=[0.2, 0.1])
    (raw / "b.png").unlink()
    _, rows, _ = run(raw, "--size 32", "detection", "spacing")
    assert [row["spacing"] for row in rows] == ["", "0.2 0.1"]


@pytest.mark.parametrize("options", [
    "--like c --size 32", "--like c --fit pad", "--like c --color", "--like c --classes A B", "--like c --test-fraction 0.1", "--size 0",
    "--test-fraction 1", "--patient-regex (", "--fit stretch",
])  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(SystemExit) as error:
        preprocess.main(["--data", "r", "--out", "o", *options.split()])
    assert error.value.code == 2


# --- what cannot be used ---


def test_bad_files_are_all_named_in_one_run_and_left_out_by_skip_bad(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/a0 A/a1 B/x0 B/x1")
    Image.new("L", (9, 9)).save(raw / "B/constant.png")
    (raw / "B/text.png").write_text("not a picture")
    (raw / "B/zero.png").touch()
    dicom(raw / "B/cut.dcm", noise("d", 64, 64))
    (raw / "B/cut.dcm").write_bytes((raw / "B/cut.dcm").read_bytes()[:-1000])
    (raw / "B/evil\x1b[2J.png").touch()
    bad = ["B/constant.png", "B/cut.dcm", "B/evil\x1b[2J.png", "B/text.png", "B/zero.png"]
    refused("5 of 9 images cannot be used", raw)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5 and "\x1b" not in "".join(told)
    for name, line in zip(bad, sorted(told), strict=False):
        assert name.split("\x1b")[0] in "".join(told) and ": " in line
    images, rows, meta = run(raw, "--skip-bad --size 12")
    assert meta["skipped"] == 5 and [row["id"] for row in rows] == [
        "A/a0.png",
        "A/a1.png",
        "B/x0.png",
        "B/x1.png",
    ]
    assert all(
        (image == noise(row["id"][:4])).all() for image, row in zip(images, rows, strict=True)
    )
    skipped = (tmp_path / "out/skipped.csv").read_text()
    assert skipped.count("\n") == 6 and "B/zero.png,B" not in skipped
    with pytest.raises(DataError, match="exists already"):  # nothing is replaced
        run(raw, "--skip-bad")


@pytest.mark.parametrize(
    "reason, lines",
    [("zero bytes", 1), ("box (1, {k}), expected x", 1)],
)
def test_the_same_reason_is_told_once_for_many_files(reason, lines, capsys):
    preprocess.report_bad([(f"{k}.dcm", f"raw/{k}.dcm: {reason.format(k=k)}") for k in range(9)])
    assert capsys.readouterr().err == f"raw/0.dcm: {reason.format(k=0)} (and 8 more files)\n"
    preprocess.report_bad([(f"{k}.dcm", f"raw/{k}.dcm: {reason.format(k=k)}") for k in range(3)])
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_notes_are_grouped_whatever_their_numbers(capsys):
    preprocess.report_notes(
        [
            ("a", "window 1/2 leaves 3 gray levels of 99"),
            ("b", "window 7/8 leaves 9 gray levels of 12"),
            ("c", "x"),
        ]
    )
    assert (
        capsys.readouterr().out
        == "note: 2 images: window 1/2 leaves 3 gray levels of 99, such as a\nnote: 1 images: x, such as c\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/1 A/2 B/3 B/4")
    os.rename(raw / "A/2.png", os.fsencode(raw) + b"/A/\xff2.png")
    refused("1 of 4 images cannot be used", raw)
    assert r"A/\udcff2.png: control characters, or no UTF-8, in the name" in capsys.readouterr().err
    assert [row["id"] for row in run(raw, "--skip-bad")[1]] == ["A/1.png", "B/3.png", "B/4.png"]
    assert r"\udcff2.png" in (tmp_path / "out/skipped.csv").read_text()


def command(raw: Path, out: Path, **environment: str) -> subprocess.Popen:
    words = [sys.executable, preprocess.__file__, "--data", raw, "--out", out, "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=os.environ | environment, **pipes)


def test_errors_are_one_line_letters_are_escaped_and_hashes_do_not_matter(tmp_path):
    raw = draw(tmp_path / "raw", "正常/1 肺炎/2")
    indices = set()
    for seed in ("1", "2"):
        out, error = command(
            raw, tmp_path / seed, PYTHONIOENCODING="ascii", PYTHONHASHSEED=seed
        ).communicate()
        assert error == "" and r"positive class: \u80ba\u708e" in out
        indices.add((tmp_path / seed / "index.csv").read_bytes())
    assert len(indices) == 1 and "肺炎" in indices.pop().decode()
    running = command(tmp_path / "nowhere", tmp_path / "x")
    assert (
        running.communicate() == ("", f"error: {tmp_path}/nowhere: not found\n")
        and running.returncode == 1
    )


def test_an_interrupt_is_one_line(tmp_path):
    raw = draw(tmp_path / "raw", "a/0 b/0")
    Image.fromarray(noise("big", 3000, 3000)).save(raw / "big.png")
    for k in range(200):
        os.link(raw / "big.png", raw / "a" / f"big{k}.png")
    (raw / "big.png").unlink()
    running = command(raw, tmp_path / "out")
    images = tmp_path / "out.unfinished/images.npy"
    while running.poll() is None and not (images.exists() and images.stat().st_size > 128):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=30)[1] == "interrupted\n" and running.returncode == 130
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left"):
        run(draw(tmp_path / "raw", "A/1 B/2"))
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize("module", [preprocess, detection])
def test_threads_give_results_in_order_and_end_with_the_last(module):
    before = threading.active_count()
    for workers in (0, 1, 3):
        for total in (0, 1, 63, 64, 65, 200):
            assert list(in_threads(lambda k: k * k, list(range(total)), workers)) == [
                k * k for k in range(total)
            ]
            assert threading.active_count() <= before
    with pytest.raises(ZeroDivisionError):
        list(module.in_threads(lambda k: 1 // (k - 5), list(range(9)), 2))


def test_several_threads_write_the_same_cache_as_one(tmp_path):
    raw = draw(tmp_path / "raw", " ".join(f"{'AB'[k % 2]}/{k}" for k in range(150)))
    run(raw)
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "two"), "--workers", "3"])
    for name in ("images.npy", "index.csv", "meta.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_threads_are_no_more_than_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for cores, workers in ((3, 3), (64, 8)):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False
        )
        assert preprocess.default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    assert preprocess.default_workers() == 8


# --- text ---


def definitions(task: str) -> dict[str, str]:
    """The text of every function and class of a preprocess.py."""
    text = (ROOT / task / "preprocess.py").read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return found


def test_functions_of_both_folders_are_the_same():
    own = {"parse_args", "main", "preprocess", "Case", "find_cases", "load", "write_index"}
    texts = {task: definitions(task) for task in ("classification", "detection", "segmentation")}
    shared = texts["classification"].keys() & texts["detection"].keys() - own
    assert len(shared) > 45
    for name in shared:
        assert texts["classification"][name] == texts["detection"][name], name
    for name in ("group_patients", "assign_folds", "hash_pixels"):
        assert len({text[name] for text in texts.values()}) == 1, name


def test_preprocessing_needs_no_torch(tmp_path):
    code = "import sys; sys.path.insert(0, '.'); import {}.preprocess; assert 'torch' not in sys.modules"
    for task in ("classification", "detection"):
        subprocess.run([sys.executable, "-c", code.format(task)], cwd=ROOT, check=True)


def test_what_a_cache_says(tmp_path):
    run(draw(tmp_path / "raw", "A/a A/b B/c B/d"))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    keys = "format task classes positive_class multi_label size fit channels layout n counts"
    assert set(meta) == {*keys.split(), "overlaps", "skipped", "versions"}
    assert read_image(tmp_path / "raw/A/a.png").digest in (tmp_path / "out/index.csv").read_text()
