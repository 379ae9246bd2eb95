"""Several labels an image: metrics, thresholds, and the way from a training to a prediction."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification import eval as evaluation
from common.checkpoint import load_checkpoint
from common.metrics import auroc, best_threshold, classification_metrics
from tests import caches
from tests.caches import predict, read_table, refusal, report, train
from tests.test_metrics import pair

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
SCORES = torch.tensor([[0.9, 0.2, 0.3], [0.6, 0.7, 0.3], [0.4, 0.6, 0.3], [0.1, 0.8, 0.3]])
TRUTH = torch.tensor([[1, 0, 0], [0, 1, 0], [1, -1, 0], [0, 0, -1]])
KNOWN = TRUTH[:, 1] >= 0


def test_metrics_of_each_label_are_those_of_its_known_images_and_means_leave_out_constant_ones():
    metrics = classification_metrics(TRUTH, SCORES, names=["a", "b", "c"])
    assert metrics["auroc_a"] == 0.75 and metrics["auroc_b"] == 0.5
    assert metrics["auroc"] == 0.625 and math.isnan(metrics["auroc_c"])
    assert (metrics["sensitivity_a"], metrics["specificity_a"]) == (0.5, 0.5)
    assert (metrics["sensitivity_b"], metrics["specificity_b"]) == (1, 0.5)
    assert metrics["accuracy"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert metrics["accuracy_c"] == 1 and metrics["brier_c"] == pytest.approx(0.09)
    alone = classification_metrics(TRUTH[KNOWN, 1], pair(SCORES[KNOWN, 1]))
    assert all(metrics[f"{name}_b"] == value for name, value in alone.items() if value == value)


def test_thresholds_are_tuned_for_each_label():
    thresholds = best_threshold(TRUTH, SCORES)
    assert thresholds[0] == best_threshold(TRUTH[:, 0], pair(SCORES[:, 0]))
    assert thresholds[1] == best_threshold(TRUTH[KNOWN, 1], pair(SCORES[KNOWN, 1]))
    assert math.isnan(thresholds[2])
    given = torch.tensor([[0.35, 0.75, 0.5]], dtype=torch.float64).expand(4, 3)
    metrics = classification_metrics(TRUTH, SCORES, given, ["a", "b", "c"])
    assert metrics["sensitivity_tuned_a"] == 1 and metrics["specificity_tuned_a"] == 0.5
    assert metrics["sensitivity_tuned_b"] == 0 and metrics["specificity_tuned_b"] == 0.5
    labels = torch.tensor([[1, -1], [0, -1]])  # a label that is unknown everywhere is no number
    metrics = classification_metrics(labels, SCORES[:2, :2], names=["a", "b"])
    assert metrics["auroc"] == metrics["auroc_a"] == auroc(labels[:, 0], SCORES[:2, 0])
    assert math.isnan(metrics["auroc_b"]) and math.isnan(metrics["accuracy_b"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Two squares that are there or not, independently, one of them often unknown; a third never."""
    folder = tmp_path_factory.mktemp("multi") / "cache"
    caches.draw_images(folder, "classification", 120)
    images = np.load(folder / "images.npy") // 4

    def relabel(k: int, row: dict) -> None:
        top = k % 2
        low = k // 8 % 2  # in every fold
        images[k, 2:12, 2:30] += 150 * top
        images[k, 20:30, 2:30] += 150 * low
        del row["label"]
        row.update(top=top, low="" if k % 5 == 0 else low, never=0)

    caches.change_rows(folder, relabel)
    np.save(folder / "images.npy", images)
    names = ["top", "low", "never"]
    caches.change_meta(folder, classes=names, multi_label=True, positive_class=None)
    return folder


SMALL = "--batch-size 8 --lr 0.02"


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    options = "--epochs 20 --class-weights balanced --loss smooth_ce --augment 0.1"
    with caches.small_network():
        train("classification", cache, out, SMALL, options)
    return out


def test_labels_are_learned_and_measured_each_by_itself(cache, run, tmp_path, capsys):
    out = tmp_path / "out"
    caches.evaluate("classification", cache, f"--checkpoint {run}/best.pt --out {out}")
    summary = {name: entry["value"] for name, entry in report(out)["summary"].items()}
    top, low = summary["auroc_top"], summary["auroc_low"]
    assert top > 0.95 and low > 0.95 and summary["auroc_never"] is None
    assert summary["auroc"] == pytest.approx((top + low) / 2)
    for name, value in load_checkpoint(run / "best.pt")["metrics"].items():  # as train.py printed
        assert summary[name] == (None if math.isnan(value) else value), name
    assert report(out)["run"]["positive_class"] is None
    printed = capsys.readouterr().out
    assert "note: images of one kind only, left out of the means: never\n" in printed
    assert "auroc_low " in printed and "f1_low" not in printed and "positive class" not in printed
    index = {row["id"]: row for row in read_table(cache / "index.csv")}
    for row in read_table(out / "predictions.csv"):
        for name in ("top", "low", "never"):
            assert row[f"label_{name}"] == index[row["id"]][name]
            is_likely = float(row[f"probability_{name}"]) >= 0.5
            assert is_likely == (name in row["prediction"].split("|"))
    files = {path.name for path in out.iterdir()}
    assert {"roc.png", "roc.csv"} <= files and "confusion_matrix.png" not in files
    points = [row for row in read_table(out / "roc.csv") if row["class"] == "low"]
    tpr, fpr = (torch.tensor([float(row[name]) for row in points]) for name in ("tpr", "fpr"))
    assert points[0]["threshold"] == "inf"  # nothing is positive
    area = torch.trapezoid(tpr, fpr).item()
    assert area == pytest.approx(low, abs=1e-6) and len(points) > 3


def test_folds_and_thresholds_of_several_labels(cache, run, tmp_path):
    train("classification", cache, tmp_path / "b", "--fold 1", SMALL)
    paths = [run / "best.pt", tmp_path / "b" / "best.pt"]
    caches.evaluate("classification", cache, "--checkpoint", *paths, f"--out {tmp_path}/both")
    thresholds = report(tmp_path / "both")["run"]["thresholds_tuned"]
    for fold, path in (("0", paths[1]), ("1", paths[0])):  # that of the other one
        validation = load_checkpoint(path)["validation"]
        chosen = best_threshold(validation["labels"], validation["probabilities"])
        assert thresholds[fold][:2] == pytest.approx(chosen[:2])
        assert thresholds[fold][2] is None  # of a label that is never there
    assert "f1_tuned_top" in report(tmp_path / "both")["summary"]


def test_new_images_get_a_map_for_each_likely_label(cache, run, tmp_path):
    images = np.load(cache / "images.npy")
    for k, name in ((9, "both"), (2, "none")):
        Image.fromarray(images[k]).save(tmp_path / f"{name}.png")
    images = [tmp_path / "both.png", tmp_path / "none.png"]
    predict("classification", run / "best.pt", tmp_path / "new", *images)
    both, none = read_table(tmp_path / "new" / "predictions.csv")
    assert both["prediction"] == "top|low" and none["prediction"] == ""
    assert float(both["probability_top"]) > 0.5 > float(none["probability_top"])
    heights = [Image.open(tmp_path / "new" / row["overlay"]).size[1] for row in (both, none)]
    assert heights[0] == 2 * heights[1]


def test_the_worst_mistakes_of_each_label_come_first():
    meta = {"multi_label": True, "classes": ["a", "b"], "positive_class": None}
    truth = torch.tensor([[1, 0], [0, -1], [1, 0], [1, 0], [0, 1]])
    scores = torch.tensor([[0.3, 0.1], [0.9, 0.9], [0.2, 0.6], [0.4, 0.2], [0.1, 0.9]])
    worst = evaluation.choose_worst(truth, scores, evaluation.decide(scores, True), meta)
    assert [(k, target) for k, target, _ in worst] == [(1, 0), (2, 0), (0, 0), (2, 1)]
    assert worst[0][2] == "a: 0, predicted 0.900"
    meta = {"multi_label": False, "classes": ["no", "yes"], "positive_class": "yes"}
    scores = torch.tensor([[0.4, 0.6], [0.8, 0.2]])
    decided = evaluation.decide(scores, False)
    worst = evaluation.choose_worst(torch.tensor([0, 1]), scores, decided, meta)
    # The map of a missed one is that of the class that was missed.
    assert worst == [(1, 1, "yes, predicted no 0.800"), (0, 1, "no, predicted yes 0.600")]


def test_one_map_for_the_class_and_one_for_each_likely_label():
    for multi_label, positive, scores, targets in (
        (False, "yes", [0.9, 0.1], [1]),
        (False, None, [0.2, 0.7, 0.1], [1]),
        (True, None, [0.5, 0.1, 0.9], [0, 2]),
        (True, None, [0.1, 0.4], [1]),
    ):
        meta = {"multi_label": multi_label, "positive_class": positive}
        assert evaluation.choose_targets(torch.tensor(scores), meta) == targets
    half = torch.tensor([[0.5, 0.5]])  # is positive
    assert evaluation.decide(half, False).tolist() == [1]
    assert evaluation.decide(half, True).tolist() == [[1, 1]]


def test_labels_of_one_value_are_noted_and_none_with_two_refused(cache, tmp_path, capsys):
    train("classification", cache, tmp_path / "run", SMALL)
    note = "note: fold 0 leaves no training images of never, or none without"
    assert note in capsys.readouterr().out
    copied = caches.copy(cache, tmp_path / "cache")
    caches.change_rows(copied, lambda k, row: row.update(top="1", low="", never="0"))
    found = refusal(train, "classification", copied, tmp_path / "none", SMALL)
    assert "leaves no training images of top, low, never" in found
