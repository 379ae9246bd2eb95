"""From raw X-rays to a cache: patients, folds, fit, colour, --like, and what cannot be used."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from classification import preprocess
from classification.preprocess import Case, DataError, assign_folds, group_patients, in_threads
from detection import preprocess as detection
from tests.raw import dicom, draw, noise, refused, run, table

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom|PIL")
BOXES = "image,xmin,ymin,xmax,ymax"


@pytest.mark.parametrize("rows, per_patient, rare, counts", [
    (53, 1, 7, ([1, 1, 2, 2, 2], [9, 9, 9, 9, 9])), (40, 2, 8, ([1] * 5, [7] * 5)),
])  # fmt: skip
def test_folds_are_balanced_in_every_stratum_whatever_the_order(rows, per_patient, rare, counts):
    groups = [f"p{k // per_patient}" for k in range(rows)]
    strata = ["rare" if k % rare == 0 else "often" for k in range(rows)]
    folds = assign_folds(groups, strata, [""] * rows, 0)
    found = Counter(zip(strata, folds, strict=True))
    for stratum, expected in zip(("rare", "often"), counts, strict=True):
        assert sorted(found[stratum, fold] for fold in "01234") == expected
    assert len(set(zip(groups, folds, strict=True))) == len(set(groups))
    assert assign_folds(groups[::-1], strata[::-1], [""] * rows, 0)[::-1] == folds
    # The largest patient first: small ones even out what it leaves.
    groups = ["large"] * 6 + [f"p{k}" for k in range(24)]
    assert set(Counter(assign_folds(groups, ["one"] * 30, [""] * 30, 0)).values()) == {6}


def test_test_fraction_is_that_of_the_patients_of_every_stratum():
    strata = ["ab"[k % 4 == 0] for k in range(200)]
    folds = assign_folds([f"p{k}" for k in range(200)], strata, [""] * 200, 0.1)
    counts = Counter(zip(strata, folds, strict=True))
    assert (counts["a", "test"], counts["b", "test"]) == (15, 5)


def test_patients_who_share_an_image_are_one_named_by_the_smallest():
    assert group_patients(list("cabxd"), list("11232")) == list("aabxb")
    assert group_patients(list("cbba"), list("1122")) == list("aaaa")


def test_copies_share_a_fold_and_contradictions_are_counted(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/a B/b")
    for name in ("A/z9", "B/m5", "B/q1"):
        Image.fromarray(noise("same")).save(raw / f"{name}.png")
    _, rows, meta = run(raw)
    found = {row["id"].removesuffix(".png"): row["patient"] for row in rows}
    assert found == {"A/a": "a", "A/z9": "m5", "B/b": "b", "B/m5": "m5", "B/q1": "m5"}
    assert len({row["fold"] for row in rows if row["patient"] == "m5"}) == 1
    assert list(meta["overlaps"].values()) == [2, 1, 0] and len({r["digest"] for r in rows}) == 3
    printed = capsys.readouterr().out
    assert "2 pixel-identical copies\nnote: 1 identical pixels with different labels" in printed


def test_several_labels_are_balanced_for_the_rarest_of_an_image():
    labels = [("1", "01"[k % 8 == 0]) for k in range(40)] + [("0", "")]
    strata = preprocess.list_strata([Case("", "", label) for label in labels])
    assert Counter(strata) == {"0": 35, "1": 5, "none": 1} and strata[8] == "1"


@pytest.mark.parametrize("ids, patients, words", [
    ("X X X X X X", 6, "one PatientID stands in every file"),
    ("X X X Y Y Y", 2, "one patient has 3 of 6 images: if it is none, use --patient-regex"),  # one a class
    ("X X Y Y  ", 4, "2 images name no patient, .*use --patient-regex"),
    ("     ", 6, "6 images name no patient"),  # by files, whose last number is no suffix
])  # fmt: skip
def test_patient_ids_and_placeholders(tmp_path, ids, patients, words, capsys):
    for k, name in enumerate(ids.split(" ")):
        path = tmp_path / "raw" / "AB"[k // 3] / f"IM.000{k}p{k % 3}"
        dicom(path, noise(f"{k}"), PatientID=name)
    _, rows, _ = run(tmp_path / "raw")
    assert len({row["patient"] for row in rows}) == patients
    assert re.search(words, capsys.readouterr().out)
    assert not any(b"Doe" in path.read_bytes() for path in (tmp_path / "out").iterdir())
    _, rows, _ = run(tmp_path / "raw", "--patient-regex p[0-9]", out="regex")
    assert {row["patient"] for row in rows} == {"p0", "p1", "p2"}
    assert "--patient-regex: 3, such as p0 in A/IM.0000p0" in capsys.readouterr().out


def test_images_are_those_of_their_rows_cut_to_the_middle(tmp_path):
    raw = draw(tmp_path / "raw", "A/a B/b")
    wide = np.hstack([noise("w", 12, 6), noise("middle"), noise("w", 12, 6)])
    Image.fromarray(wide).save(raw / "B/wide.png")
    images, rows, meta = run(raw, "--size 12")
    assert [row["id"] for row in rows] == ["A/a.png", "B/b.png", "B/wide.png"]
    assert (images == np.stack([noise("A/a"), noise("B/b"), noise("middle")])).all()
    squashed, *_ = run(raw, "--size 12 --fit squash", out="squash")
    assert (squashed[:2] == images[:2]).all() and (squashed[2] != images[2]).any()
    assert (tmp_path / "out/images.npy").stat().st_size == 128 + images.nbytes
    keys = "format task classes positive_class multi_label size fit channels layout n counts"
    assert set(meta) == {*keys.split(), "overlaps", "skipped", "versions"} and meta["fit"] == "crop"


def test_color_keeps_the_channels_and_says_what_has_none(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/gray B/b")
    rgb = noise("rgb", 12, 12, 3)
    Image.fromarray(rgb).save(raw / "A/a.png")
    images, _, meta = run(raw, "--color --size 12")
    assert meta["channels"] == 3 and (images[0] == rgb).all()
    assert (images[1] == noise("A/gray")[..., None]).all()
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
    arrays = tmp_path / "m.npz"
    np.savez(arrays, test_images=noise("m", 4, 8, 8), test_labels=[[0], [1], [1], [1]])
    assert run(arrays, like, out="m")[2]["counts"] == {"test": {"A": 3, "B": 1}}
    assert "classes: 0 is B, 1 is A" in capsys.readouterr().out
    foreign = draw(tmp_path / "foreign", "A/1 C/2")
    refused(r"\['A', 'C'\], expected \['B', 'A'\]", foreign, like, out="x")
    several = table(tmp_path / "several", "image,A,B a,0,1 b,1,0", "a b")
    refused("several labels an image, unlike", several, like, out="x")
    refused("no finished cache", train, f"--like {train}", out="x")
    refused("only test images; .*--like", arrays, out="x")


def test_detection_takes_over_mean_and_std_and_stretches(tmp_path):
    text = f"{BOXES},fold a,1,1,9,9,0 b,1,1,9,9,1 c,2,2,9,9,2 d,2,2,9,9,test"
    raw = table(tmp_path / "raw", text, "a b c d", "boxes.csv")
    images, _, meta = run(raw, "--size 32", "detection")
    training = images[:3] / 255
    assert (meta["mean"], meta["std"]) == pytest.approx((training.mean(), training.std()))
    other = table(tmp_path / "other", f"{BOXES} x,1,1,9,9", "x", "boxes.csv")
    external = run(other, f"--like {tmp_path}/out", "detection", "like")
    assert external[2]["mean"] == meta["mean"] and [row["fold"] for row in external[1]] == ["test"]
    dim = (noise("dim", 40, 40) // 4 + 60).astype(np.uint8)
    prepared = detection.prepare(dim, 40)
    assert prepared.min() == 0 and prepared.max() == 255
    apart = prepared.astype(int) - detection.prepare(dim / np.float32(255), 40)
    assert abs(apart).max() <= 1 and (apart != 0).mean() < 0.01  # bytes and floats alike


def test_boxes_are_in_pixels_of_the_image_as_it_is_shown(tmp_path):
    raw = table(tmp_path / "raw", f"{BOXES} a.jpg,1,2,11,29 b,1,1,9,9", "", "boxes.csv")
    exif = Image.Exif()
    exif[274] = 6  # stored 12 high and 30 wide, shown 30 high and 12 wide
    Image.fromarray(noise("turned", 12, 30)).save(raw / "a.jpg", exif=exif)
    dicom(raw / "b.dcm", noise("b"), PixelSpacing=[0.2, 0.1])
    _, rows, _ = run(raw, "--size 32 --patient-regex .$", "detection")
    assert (rows[0]["height"], rows[0]["width"], rows[0]["ymax"]) == ("30", "12", "29.0")
    assert [row["spacing"] for row in rows] == ["", "0.2 0.1"]
    assert [row["patient"] for row in rows] == ["g", "m"]


@pytest.mark.parametrize("options", [
    "--like c --size 32", "--like c --fit pad", "--like c --color", "--like c --classes A B",
    "--like c --test-fraction 0.1", "--size 0", "--test-fraction 1", "--patient-regex (", "--fit stretch",
])  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(SystemExit) as error:
        preprocess.main(["--data", "r", "--out", "o", *options.split()])
    assert error.value.code == 2


def test_bad_files_are_all_named_in_one_run_and_left_out_by_skip_bad(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/a0 A/a1 B/x0 B/x1")
    Image.new("L", (9, 9)).save(raw / "B/constant.png")
    (raw / "B/text.png").write_text("not a picture")
    (raw / "B/zero.png").touch()
    dicom(raw / "B/cut.dcm", noise("d", 64, 64))
    (raw / "B/cut.dcm").write_bytes((raw / "B/cut.dcm").read_bytes()[:-1000])
    (raw / "B/evil\x1b[2J.png").touch()
    refused("5 of 9 images cannot be used", raw)
    told = capsys.readouterr().err
    assert told.count("\n") == 5 and "\x1b" not in told
    for name in ("constant.png", "cut.dcm", "evil", "text.png", "zero.png"):
        assert f"B/{name}" in told
    images, rows, meta = run(raw, "--skip-bad --size 12")
    names = ["A/a0", "A/a1", "B/x0", "B/x1"]
    assert [row["id"] for row in rows] == [f"{name}.png" for name in names]
    assert (images == np.stack([noise(name) for name in names])).all() and meta["skipped"] == 5
    skipped = (tmp_path / "out/skipped.csv").read_text()
    assert skipped.count("\n") == 6 and "B/zero.png,B" not in skipped
    with pytest.raises(DataError, match="exists already"):  # nothing is replaced
        run(raw, "--skip-bad")


def test_what_is_alike_is_told_once_whatever_its_numbers(capsys):
    bad = [(f"{k}.dcm", f"raw/{k}.dcm: box (1, {k}), expected x") for k in range(9)]
    preprocess.report_bad(bad)
    preprocess.report_bad(bad[:3])
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "raw/0.dcm: box (1, 0), expected x (and 8 more files)" and len(told) == 4
    preprocess.report_notes([("a", "leaves 3 of 99"), ("b", "leaves 9 of 12"), ("c", "x")])
    notes = ["note: 2 images: leaves 3 of 99, such as a", "note: 1 images: x, such as c"]
    assert capsys.readouterr().out.splitlines() == notes


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path, capsys):
    raw = draw(tmp_path / "raw", "A/1 A/2 B/3 B/4")
    os.rename(raw / "A/2.png", os.fsencode(raw) + b"/A/\xff2.png")
    refused("1 of 4 images cannot be used", raw)
    assert r"A/\udcff2.png: control characters, or no UTF-8, in the name" in capsys.readouterr().err
    assert [row["id"] for row in run(raw, "--skip-bad")[1]] == ["A/1.png", "B/3.png", "B/4.png"]
    assert r"\udcff2.png" in (tmp_path / "out/skipped.csv").read_text()


def test_letters_are_escaped_and_hashes_of_strings_do_not_matter(tmp_path):
    raw = draw(tmp_path / "raw", "正常/1 肺炎/2")
    words = [sys.executable, preprocess.__file__, "--data", raw, "--out", tmp_path / "out"]
    indices = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONHASHSEED": seed}
        out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        assert out.stderr == "" and r"positive class: \u80ba\u708e" in out.stdout
        indices.add((tmp_path / "out/index.csv").read_bytes())
        shutil.rmtree(tmp_path / "out")
    assert len(indices) == 1 and "肺炎" in indices.pop().decode()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_give_results_in_order_and_end_with_the_last(workers):
    before = threading.active_count()
    for total in (0, 1, 63, 64, 65, 200):
        results = list(in_threads(lambda k: k * k, list(range(total)), workers))
        assert results == [k * k for k in range(total)]
        assert threading.active_count() <= before
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda k: 1 // (k - 5), list(range(9)), workers))
    calls = []
    results = in_threads(calls.append, list(range(200)), workers)
    next(results)
    results.close()
    assert len(calls) <= 64  # so Ctrl-C waits for one chunk


def test_threads_are_no_more_than_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for cores, workers in ((3, 3), (64, 8)):
        allowed = set(range(cores))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, a=allowed: a, raising=False)
        assert preprocess.default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    assert preprocess.default_workers() == 8
