"""Several labels an image: where they come from, the loss, the metrics, and the way to a prediction."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification import eval as evaluation
from classification.dataset import XrayDataset, check_counts, count_labels, open_cache
from classification.model import (
    class_weights,
    multi_label_loss,
    to_probabilities,
    validation_loss,
    weighted_loss,
)
from classification.preprocess import Case, DataError, list_strata
from classification.train import main as train
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.metrics import auroc, best_threshold, classification_metrics, youden_threshold
from tests.caches import change_meta, change_rows, copy, small_network
from tests.conftest import assert_same_training, read_table
from tests.test_dataset_classification import NoReads
from tests.test_label_tables import table
from tests.test_preprocess import folders, noise, refused, run

# --- loss and metrics ---

LOGITS = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
LABELS = torch.tensor([[1, -1], [0, 1]])


def test_unknown_labels_add_nothing_to_the_loss():
    losses = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    ones = torch.ones(2)
    assert multi_label_loss(LOGITS, LABELS, ones, 0.0).item() == pytest.approx(sum(losses) / 4)
    assert weighted_loss(LOGITS, LABELS, ones, 0.0) == multi_label_loss(LOGITS, LABELS, ones, 0.0)
    assert validation_loss(LOGITS, LABELS).item() == pytest.approx(sum(losses) / 3)
    logits = LOGITS.clone().requires_grad_()
    multi_label_loss(logits, LABELS, ones, 0.1).backward()
    assert logits.grad[0, 1] == 0 and (logits.grad != 0).sum() == 3
    with NoReads():  # nothing waits for the device
        multi_label_loss(LOGITS.to("meta"), LABELS.to("meta"), ones.to("meta"), 0.1)


def test_weights_are_those_of_the_positives_and_smoothing_moves_the_targets():
    weights = torch.tensor([5.0, 2.0])
    losses = [5 * math.log(2), math.log(1 + math.exp(-1)), 2 * math.log(1 + math.exp(-3))]
    assert multi_label_loss(LOGITS, LABELS, weights, 0.0).item() == pytest.approx(sum(losses) / 4)
    smooth = multi_label_loss(
        torch.tensor([[0.0], [2.0]]), torch.tensor([[1], [0]]), torch.ones(1), 0.2
    )
    expected = (
        math.log(2) + 0.9 * math.log(1 + math.exp(2)) + 0.1 * math.log(1 + math.exp(-2))
    ) / 2
    assert smooth.item() == pytest.approx(expected)
    counts = torch.tensor([[30, 10], [5, 0]])
    assert class_weights("balanced", counts).tolist() == [3, 5]
    assert class_weights("none", counts).tolist() == [1, 1]


def test_labels_are_probabilities_by_themselves():
    probabilities = to_probabilities(LOGITS, {"multi_label": True})
    assert torch.equal(probabilities, LOGITS.sigmoid())
    assert torch.equal(to_probabilities(LOGITS, {}), LOGITS.softmax(1))


SCORES = torch.tensor([[0.9, 0.2, 0.3], [0.6, 0.7, 0.3], [0.4, 0.6, 0.3], [0.1, 0.8, 0.3]])
TRUTH = torch.tensor([[1, 0, 0], [0, 1, 0], [1, -1, 0], [0, 0, -1]])


def test_metrics_of_each_label_are_those_of_its_known_images_and_means_leave_out_constant_ones():
    metrics = classification_metrics(TRUTH, SCORES, names=["a", "b", "c"])
    assert metrics["auroc_a"] == 0.75 and metrics["auroc_b"] == 0.5
    assert metrics["auroc"] == 0.625 and math.isnan(metrics["auroc_c"])
    assert (metrics["sensitivity_a"], metrics["specificity_a"]) == (0.5, 0.5)
    assert (metrics["sensitivity_b"], metrics["specificity_b"]) == (1, 0.5)
    assert metrics["accuracy"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert metrics["accuracy_c"] == 1 and metrics["brier_c"] == pytest.approx(0.09)
    known = TRUTH[:, 1] >= 0
    pair = torch.stack([1 - SCORES[known, 1], SCORES[known, 1]], 1)
    alone = classification_metrics(TRUTH[known, 1], pair)
    assert all(metrics[f"{name}_b"] == value for name, value in alone.items() if value == value)


def test_thresholds_are_tuned_for_each_label():
    thresholds = best_threshold(TRUTH, SCORES)
    assert thresholds[0] == youden_threshold(TRUTH[:, 0], SCORES[:, 0])
    assert thresholds[1] == youden_threshold(TRUTH[[0, 1, 3], 1], SCORES[[0, 1, 3], 1])
    assert math.isnan(thresholds[2])
    given = torch.tensor([[0.35, 0.75, 0.5]], dtype=torch.float64).expand(4, 3)
    metrics = classification_metrics(TRUTH, SCORES, given, ["a", "b", "c"])
    assert metrics["sensitivity_tuned_a"] == 1 and metrics["specificity_tuned_a"] == 0.5
    assert metrics["sensitivity_tuned_b"] == 0 and metrics["specificity_tuned_b"] == 0.5


def test_a_label_that_is_unknown_everywhere_is_no_number():
    labels = torch.tensor([[1, -1], [0, -1]])
    metrics = classification_metrics(labels, SCORES[:2, :2], names=["a", "b"])
    assert metrics["auroc"] == metrics["auroc_a"] == auroc(labels[:, 0], SCORES[:2, 0])
    assert math.isnan(metrics["auroc_b"]) and math.isnan(metrics["accuracy_b"])


# --- layouts ---


def labels_of(rows: list[dict], *names: str) -> list[list[str]]:
    return [[row[name] for name in names] for row in rows]


def test_columns_of_0_and_1_are_labels(tmp_path, capsys):
    text = "image,patient,edema,age,mass,note a,p1,1,70,0, b,p2,0.0,60,, c,p3,-1,61,1.0,x d,p4,,3,,"
    raw = table(tmp_path / "raw", text, "a b c d")
    _, rows, meta = run(raw)
    assert meta["classes"] == ["edema", "mass"] and meta["multi_label"] is True
    assert meta["positive_class"] is None
    total = [
        sum(fold.get(name, 0) for fold in meta["counts"].values()) for name in ("edema", "mass")
    ]
    assert total == [1, 1]
    assert labels_of(rows, "edema", "mass") == [["1", "0"], ["0", ""], ["", "1"]]
    assert list(rows[0]) == ["id", "patient", "fold", "edema", "mass", "age", "note", "source"]
    printed = capsys.readouterr().out
    assert "3 images with several labels (edema, mass)" in printed
    assert "note: 1 rows without a label left out, such as " in printed
    cache_meta, index = open_cache(tmp_path / "out")
    labels = XrayDataset(tmp_path / "out")[[0, 1, 2]][1]
    assert labels.tolist() == [[1, 0], [0, -1], [-1, 1]] and len(index) == 3
    assert count_labels(index, cache_meta).tolist() == [[1, 1], [1, 1]]


def test_classes_chooses_labels_and_their_order(tmp_path):
    raw = table(tmp_path / "raw", "image,a,b,c x,1,0,1 y,0,1,-1", "x y")
    _, rows, meta = run(raw, "--classes", "c", "a")
    assert meta["classes"] == ["c", "a"] and labels_of(rows, "c", "a", "b") == [
        ["1", "1", "0"], ["", "0", "1"]]  # fmt: skip
    refused(
        r"labels \['a', 'q'\], expected two or more of \['a', 'b', 'c'\]",
        raw,
        "--classes",
        "a",
        "q",
        out="x",
    )
    refused("expected two or more", raw, "--classes", "a", out="x")


@pytest.mark.parametrize("text, words", [
    ("image,a x,1", r"columns \['image', 'a'\], expected a column label, or two or more columns of 0"),
    ("image,a,b x,1,2", "expected a column label, or two or more columns of 0 and 1"),
    ("image,a,b x,1,0 x.png,1,1", r"csv:3: x\.png has the b '1', but '0' in .*csv:2"),
])  # fmt: skip
def test_tables_of_labels_that_are_refused(tmp_path, text, words):
    refused(words, table(tmp_path / "raw", text, "x"))


def test_like_takes_the_labels_and_what_is_missing_is_unknown(tmp_path, capsys):
    run(table(tmp_path / "raw", "image,a,b,c x,1,0,1 y,0,1,0", "x y"), "--classes", "b", "a")
    like = ["--like", str(tmp_path / "out")]
    _, rows, meta = run(table(tmp_path / "two", "image,z,a x,1,0 y,0,1", "x y"), *like, out="like")
    assert meta["classes"] == ["b", "a"] and labels_of(rows, "b", "a", "z") == [
        ["", "0", "1"], ["", "1", "0"]]  # fmt: skip
    assert "note: labels that the data do not have, unknown here: b\n" in capsys.readouterr().out
    foreign = table(tmp_path / "foreign", "image,q,r x,1,0", "x")
    refused(
        r"labels in the data \['q', 'r'\], expected some of \['b', 'a'\]", foreign, *like, out="x"
    )
    single = table(tmp_path / "single", "image,label x,a y,b", "x y")
    refused("one label an image, expected several labels an image as ", single, *like, out="x")


def test_chestxray14_as_downloaded(tmp_path, capsys):
    raw = tmp_path / "raw"
    names = ["1_0", "1_1", "2_0", "3_0"]
    folders(
        raw,
        "images_001/images/1_0 images_001/images/1_1 images_002/images/2_0 images_002/images/3_0",
    )
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height],"
    found = ["Mass|Effusion", "No Finding", "Hernia", "Effusion"]
    rows = [f"{n}.png,{f},0,{n[0]},9,9," for n, f in zip(names, found, strict=True)]
    (raw / "Data_Entry_2017_v2020.csv").write_text(
        "\n".join([header, *rows, "4_0.png,Mass,0,4,9,9,"])
    )
    (raw / "test_list.txt").write_text("3_0.png\n")
    (raw / "train_val_list.txt").write_text("1_0.png\n1_1.png\n2_0.png\n")
    _, rows, meta = run(raw)
    assert meta["classes"] == ["Effusion", "Hernia", "Mass"] and meta["layout"] == "ChestX-ray14"
    assert labels_of(rows, *meta["classes"]) == [list("101"), list("000"), list("010"), list("100")]
    assert [row["patient"] for row in rows] == list("1123") and rows[3]["fold"] == "test"
    assert rows[0]["fold"] == rows[1]["fold"] != "test" and "" not in rows[0]
    assert rows[0]["Follow-up #"] == "0" and rows[0]["OriginalImage[Width"] == "9"
    printed = capsys.readouterr().out
    assert "note: 1 rows without a file left out, such as 4_0.png\n" in printed
    assert "left out: " not in printed
    (raw / "Data_Entry_2017.csv").write_text("")
    refused("2 tables, expected one", raw, out="x")


def test_chexpert_as_downloaded(tmp_path, capsys):
    raw = tmp_path / "chexpert_renamed"
    folders(raw, "train/patient00001/study1/view1_frontal train/patient00001/study2/view1_frontal")
    folders(raw, "train/patient00002/study1/view1_frontal valid/patient64541/study1/view1_frontal")
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema"
    rows = ["train/patient00001/study1/view1_frontal.png,Male,70,Frontal,AP,,1.0",
            "train/patient00001/study2/view1_frontal.png,Male,71,Frontal,PA,,-1.0",
            "train/patient00002/study1/view1_frontal.png,Female,30,Frontal,PA,1.0,"]  # fmt: skip
    rows = [f"CheXpert-v1.0-small/{row}" for row in rows]
    (raw / "train.csv").write_text("\n".join([header, *rows]))
    row = (
        "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.png,Male,9,Frontal,AP,0.0,1.0"
    )
    (raw / "valid.csv").write_text(f"{header}\n{row}\n")
    _, index, meta = run(raw)
    assert meta["classes"] == ["No Finding", "Edema"] and meta["layout"] == "CheXpert"
    assert labels_of(index, "No Finding", "Edema") == [
        ["0", "1"],
        ["0", ""],
        ["1", "0"],
        ["0", "1"],
    ]
    assert [row["patient"][-2:] for row in index] == ["01", "01", "02", "41"]
    assert index[3]["fold"] == "0" and "0" not in {row["fold"] for row in index[:3]}
    assert [row["AP/PA"] for row in index] == ["AP", "PA", "PA", "AP"] and index[2][
        "Sex"
    ] == "Female"
    assert "note: 3 findings that a report does not mention count as 0\n" in capsys.readouterr().out
    (raw / "valid.csv").write_text(f"{header}\n{row[:-3]}2\n")
    refused("valid.csv:2: finding '2', expected 1, 0, -1 or nothing", raw, out="x")


def test_a_table_beside_class_folders_is_none_of_labels(tmp_path):
    raw = folders(tmp_path / "raw", "train/A/1 train/B/2")
    for name in ("train.csv", "labels.csv"):
        (raw / name).write_text("name,class\n1,A\n")
    assert run(raw)[2]["layout"] == "class folders"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/labels.csv").write_text("name,class\n1,A\n")
    refused(r"no column \['image'\], found \['name', 'class'\]", tmp_path / "other", out="x")


def test_chestmnist_has_several_labels(tmp_path):
    labels = np.arange(40 * 3).reshape(40, 3) // 2 % 2
    np.savez(tmp_path / "m.npz", train_images=noise("m", 40, 9, 9), train_labels=labels)
    _, rows, meta = run(tmp_path / "m.npz")
    assert meta["classes"] == ["0", "1", "2"] and meta["multi_label"]
    assert labels_of(rows, "0", "1", "2") == labels.astype(str).tolist()
    names = ["--classes", "x", "y", "z"]
    assert run(tmp_path / "m.npz", *names, out="named")[2]["classes"] == names[1:]
    for wrong, words in ((labels * 2, "from 0 to 2, expected 0 and 1"), (labels[:9], r"\(9, 3\)")):
        np.savez(tmp_path / "w.npz", train_images=noise("m", 40, 9, 9), train_labels=wrong)
        refused(words, tmp_path / "w.npz", out="x")


def test_folds_are_balanced_for_the_rarest_label_of_an_image():
    labels = [(1, 0), (1, 1), (1, -1), (0, 0)]
    cases = [Case(str(k), "", label, "") for k, label in enumerate(labels)]
    assert list_strata(cases) == ["0", "1", "0", "none"]
    assert list_strata([Case("", "", 2, "")]) == ["2"]


# --- from training to prediction ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Two squares that are there or not, independently, one of them often unknown; a third never."""
    folder = tmp_path_factory.mktemp("multi") / "cache"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (120, 32, 32), dtype=np.uint8)
    with open(folder / "index.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "fold", "top", "low", "never", "sex", "source"))
        for k in range(120):
            top, low = k % 2, k // 2 % 2
            images[k, 2:12, 2:30] += 150 * top
            images[k, 20:30, 2:30] += 150 * low
            fold = ("0", "1", "2", "test")[k // 4 % 4]
            seen = "" if k % 5 == 0 else low
            writer.writerow(
                (f"i{k}", f"p{k // 4}", fold, top, seen, 0, "fm"[k % 3 == 0], f"i{k}.png")
            )
    np.save(folder / "images.npy", images)
    meta = {"classes": ["top", "low", "never"], "multi_label": True}
    meta |= {"size": 32, "fit": "squash", "mean": 0.2, "std": 0.2}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


SMALL = ["--workers", "0", "--device", "cpu", "--batch-size", "8", "--lr", "0.02"]


@pytest.fixture(scope="module")
def run_folder(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    with small_network():
        options = ["--class-weights", "balanced", "--label-smoothing", "0.1", "--augment", "0.1"]
        train(["--data", str(cache), "--out", str(out), "--epochs", "8", *SMALL, *options])
    return out


def evaluate(*options: object) -> None:
    command = ["--workers", "0", "--device", "cpu", "--samples", "20", *options]
    with small_network():
        evaluation.main([str(word) for word in command])


@pytest.mark.slow
def test_labels_are_learned_and_measured_each_by_itself(cache, run_folder, capsys):
    evaluate("--data", cache, "--checkpoint", run_folder / "best.pt")
    report = json.loads((run_folder / "eval_val/metrics.json").read_text())
    summary = report["summary"]
    assert summary["auroc_top"]["value"] > 0.95 and summary["auroc_low"]["value"] > 0.95
    expected = (summary["auroc_top"]["value"] + summary["auroc_low"]["value"]) / 2
    assert (
        summary["auroc"]["value"] == pytest.approx(expected)
        and summary["auroc_never"]["value"] is None
    )
    best = load_checkpoint(run_folder / "best.pt")
    for name, value in best["figures"].items():  # the score that train.py printed
        assert summary[name]["value"] == (None if math.isnan(value) else value), name
    assert report["run"]["threshold_tuned"][:2] == best["threshold"][:2]
    assert "f1_tuned_top" in summary and report["run"]["positive_class"] is None
    printed = capsys.readouterr().out
    assert "note: one value only, left out of the means: never\n" in printed
    assert "auroc_low " in printed and "f1_low" not in printed and "positive class" not in printed
    rows = read_table(run_folder / "eval_val/predictions.csv")
    index = {row["id"]: row for row in read_table(cache / "index.csv")}
    for row in rows:
        assert [row[f"label_{name}"] for name in ("top", "low")] == [
            index[row["id"]][name] for name in ("top", "low")]  # fmt: skip
        likely = [
            name for name in ("top", "low", "never") if float(row[f"probability_{name}"]) >= 0.5
        ]
        assert row["prediction"] == "|".join(likely)
    names = {path.name for path in (run_folder / "eval_val").iterdir()}
    assert {"roc.png", "roc.csv"} <= names and "confusion_matrix.png" not in names
    curves = {row["class"] for row in read_table(run_folder / "eval_val/roc.csv")}
    assert curves == {"top", "low", "never"}
    points = [p for p in read_table(run_folder / "eval_val/roc.csv") if p["class"] == "low"]
    fpr, tpr = (torch.tensor([float(p[name]) for p in points]) for name in ("fpr", "tpr"))
    area = torch.trapezoid(tpr, fpr).item()
    assert area == pytest.approx(summary["auroc_low"]["value"]) and len(points) > 3


@pytest.mark.slow
def test_folds_groups_and_comparisons_of_several_labels(cache, run_folder, tmp_path, capsys):
    with small_network():
        train(
            [
                "--data",
                str(cache),
                "--out",
                str(tmp_path / "b"),
                "--epochs",
                "1",
                "--fold",
                "1",
                *SMALL,
            ]
        )
    paths = [run_folder / "best.pt", tmp_path / "b/best.pt"]
    evaluate("--data", cache, "--checkpoint", *paths, "--by", "sex", "--out", tmp_path / "both")
    report = json.loads((tmp_path / "both/metrics.json").read_text())
    assert [row["fold"] for row in report["folds"]] == ["0", "1"]
    of_a, of_b = (load_checkpoint(path)["threshold"] for path in paths)
    assert report["run"]["thresholds_tuned"]["0"][:2] == of_b[:2]
    assert report["run"]["thresholds_tuned"]["1"][:2] == of_a[:2]
    assert [row["value"] for row in report["by"]["values"]] == ["f", "m"]
    for path, name in zip(paths, "ab", strict=True):
        evaluate(
            "--data", cache, "--checkpoint", path, "--split", "test", "--out", tmp_path / f"t{name}"
        )
    capsys.readouterr()
    theirs = tmp_path / "ta/predictions.csv"
    evaluate("--data", cache, "--checkpoint", paths[1], "--split", "test", "--out", tmp_path / "c",
             "--compare", theirs)  # fmt: skip
    a, b, c = (
        json.loads((tmp_path / n / "metrics.json").read_text())["summary"]
        for n in ("ta", "tb", "c")
    )
    difference = b["auroc"]["value"] - a["auroc"]["value"]
    assert c["auroc_difference"]["value"] == pytest.approx(difference, abs=1e-6)
    assert "auroc_difference" in capsys.readouterr().out
    theirs.write_text(theirs.read_text().replace(",0,0,0,", ",1,0,0,", 1))
    with pytest.raises(DataError, match=r" is 1, 0, 0 of test, expected 0, 0, 0 of test"):
        evaluate("--data", cache, "--checkpoint", paths[1], "--split", "test", "--compare", theirs)


def test_new_images_get_a_map_for_each_likely_label(cache, run_folder, tmp_path):
    images = np.load(cache / "images.npy")
    for k, name in ((3, "both"), (4, "none")):
        Image.fromarray(images[k]).save(tmp_path / f"{name}.png")
    evaluate("--checkpoint", run_folder / "best.pt", "--out", tmp_path / "new",
             "--images", tmp_path / "both.png", tmp_path / "none.png")  # fmt: skip
    both, none = read_table(tmp_path / "new/predictions.csv")
    assert both["prediction"] == "top|low" and none["prediction"] == ""
    assert float(both["probability_top"]) > 0.5 > float(none["probability_top"])
    heights = [Image.open(tmp_path / "new" / row["overlay"]).size[1] for row in (both, none)]
    assert heights[0] == 2 * heights[1]


def test_the_worst_mistakes_of_each_label_come_first():
    truth = torch.tensor([[1, 0], [0, -1], [1, 0], [1, 0], [0, 1]])
    scores = torch.tensor([[0.3, 0.1], [0.9, 0.9], [0.2, 0.6], [0.4, 0.2], [0.1, 0.9]])
    worst = evaluation.choose_worst(truth, scores, evaluation.decide(scores, True), ["a", "b"])
    assert [(k, target) for k, target, _ in worst] == [(1, 0), (2, 0), (0, 0), (2, 1)]
    assert worst[0][2] == "a: 0, predicted 0.900"
    labels = torch.tensor([0, 1])
    pair = torch.tensor([[0.4, 0.6], [0.8, 0.2]])
    worst = evaluation.choose_worst(labels, pair, evaluation.decide(pair, False), ["no", "yes"])
    assert worst == [(1, 0, "yes, predicted no 0.800"), (0, 1, "no, predicted yes 0.600")]


def test_one_map_for_the_class_and_one_for_each_likely_label():
    multi = {"multi_label": True}
    assert evaluation.choose_targets(torch.tensor([0.5, 0.5]), {}) == [0]
    assert evaluation.choose_targets(torch.tensor([0.5, 0.1, 0.9]), multi) == [0, 2]
    assert evaluation.choose_targets(torch.tensor([0.1, 0.4]), multi) == [1]


def test_stop_and_resume_equal_the_straight_run(cache, tmp_path):
    command = ["--data", str(cache), "--epochs", "2", *SMALL]
    with small_network():
        train([*command, "--out", str(tmp_path / "a")])
        train([*command, "--out", str(tmp_path / "b"), "--stop-after", "1"])
        train([*command, "--out", str(tmp_path / "b"), "--resume"])
    assert_same_training(tmp_path / "a", tmp_path / "b")


def test_labels_of_one_value_are_named_and_without_others_refused(cache, tmp_path, capsys):
    meta = {"classes": ["a", "b"], "multi_label": True}
    some = torch.tensor([[4, 0], [3, 1]])
    note = check_counts(some, meta, "c: fold 0", "training")
    assert note == "note: c: fold 0 leaves training images of one value only of a"
    with pytest.raises(DataError, match="c: fold 0 leaves no validation images of a, b"):
        check_counts(torch.tensor([[4, 0], [0, 1]]), meta, "c: fold 0", "validation")
    copied = copy(cache, tmp_path / "cache")
    change_rows(copied, lambda k, row: row.update(low="2" if k == 5 else row["low"]))
    with pytest.raises(DataError, match=r"row 6: low '2', expected 1, 0 or nothing"):
        open_cache(copied)


def test_checkpoints_of_one_and_of_several_labels_do_not_mix(cache, run_folder, tmp_path):
    single = copy(cache, tmp_path / "cache")
    change_meta(single, multi_label=False)
    change_rows(single, lambda k, row: row.update(never=row["never"], label=k % 3))
    with pytest.raises(CheckpointError, match=r"multi_label False, but .* has True"):
        evaluate("--data", single, "--checkpoint", run_folder / "best.pt")
    broken = load_checkpoint(run_folder / "best.pt")
    save_checkpoint(tmp_path / "x.pt", broken | {"threshold": [0.5]})
    with pytest.raises(CheckpointError, match=r"threshold \[0.5\], expected 3 numbers"):
        evaluate("--data", cache, "--checkpoint", tmp_path / "x.pt")
