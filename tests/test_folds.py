"""Cross-validation and subgroups: which network predicts what, and what the pooled figure is."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification.preprocess import DataError
from common.checkpoint import (
    file_sha256,
    list_trained_on,
    load_checkpoint,
    save_checkpoint,
)
from common.metrics import split_by, summarise_by
from tests.caches import (
    change_rows,
    copy,
    draw_cache,
    evaluate,
    module,
    read_rows,
    small_network,
    train,
)
from tests.conftest import read_table

pytestmark = pytest.mark.slow

TASKS = ("classification", "detection", "segmentation")
FOLDS = ("0", "1", "2", "3", "4")
SCORES = (0.1, 0.9, 0.8, 0.3, 0.6)  # what the network of each fold gives, whatever the image
THRESHOLDS = (0.2, 0.4, 0.9, 0.7, 0.8)
# Of the four images of each fold
LABELS = {"0": "0001", "1": "1101", "2": "0111", "3": "0011", "4": "1000", "test": "0101"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_network():
        yield


def constant_weights(task: str, state: dict, score: float) -> dict:
    """Weights that give every image the same probability, box (0, 0, score, 1) or class."""
    name = {"classification": "fc", "detection": "out", "segmentation": "head"}[task]
    logit = math.log(score / (1 - score))
    bias = [0, 0, score, 1] if task == "detection" else [0, logit]
    weight = torch.zeros_like(state[f"{name}.weight"])
    return state | {f"{name}.weight": weight, f"{name}.bias": torch.tensor(bias).float()}


def save_fold(cache: Path, task: str, checkpoint: dict, number: int, path: Path) -> Path:
    """A checkpoint of the training that left this fold out, with the constant answer of SCORES."""
    rows = [k for k, row in enumerate(read_rows(cache)) if row["fold"] not in (str(number), "test")]
    settings = {"fold": number, "index": file_sha256(cache / "index.csv")}
    contents = {
        "settings": checkpoint["settings"] | settings,
        "model": constant_weights(task, checkpoint["model"], SCORES[number]),
        "trained_on": list_trained_on(*module(task, "dataset").fingerprints(cache, rows)),
        "threshold": THRESHOLDS[number],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, checkpoint | contents)
    return path


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict[str, tuple[Path, list[Path]]]:
    """For each task a cache of five folds and a test set, and the checkpoints of five trainings."""
    made = {}
    seen = dict.fromkeys(LABELS, 0)  # images of each fold so far

    def refold(k: int, row: dict) -> None:
        group = k if "group" in row else k // 2
        row["fold"] = (*FOLDS, "test")[group % 6]
        row["sex"] = "MF"[group % 2]
        if "label" in row:
            row["label"] = LABELS[row["fold"]][seen[row["fold"]]]
            seen[row["fold"]] += 1

    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        cache = draw_cache(folder / "cache", task)
        change_rows(cache, refold)
        train(task, cache, folder / "run")
        checkpoint = load_checkpoint(folder / "run" / "best.pt")
        paths = []
        for number in range(5):
            path = folder / f"fold{number}" / "best.pt"
            paths.append(save_fold(cache, task, checkpoint, number, path))
        made[task] = (cache, paths)
    return made


def report(path: Path) -> dict:
    return json.loads((path / "metrics.json").read_text())


def test_every_image_is_predicted_by_the_network_that_left_it_out(studies, tmp_path):
    cache, paths = studies["classification"]
    evaluate("classification", cache, "--checkpoint", *paths, "--out", tmp_path)
    rows = read_table(tmp_path / "predictions.csv")
    assert sorted(row["id"] for row in rows) == sorted(
        row["id"] for row in read_rows(cache) if row["fold"] != "test"
    )
    for row in rows:
        assert float(row["probability_yes"]) == pytest.approx(SCORES[int(row["fold"])])
    folds_of = {row["id"]: row["fold"] for row in read_rows(cache)}
    assert all(folds_of[row["id"]] == row["fold"] for row in rows)


def test_the_pooled_figures_are_those_of_all_predictions_together(studies, tmp_path, capsys):
    """20 images; predicted positive at 0.5: folds 1, 2 and 4, which hold 3 + 3 + 1 positives."""
    cache, paths = studies["classification"]
    evaluate("classification", cache, "--checkpoint", *paths, "--out", tmp_path)
    result = report(tmp_path)
    summary = result["summary"]
    right = 3 + 3 + 3 + 2 + 1  # negatives of folds 0 and 3, positives of the others
    assert summary["accuracy"]["value"] == pytest.approx(right / 20)
    assert summary["sensitivity"]["value"] == pytest.approx((3 + 3 + 1) / 10)
    assert summary["accuracy"]["low"] < right / 20 < summary["accuracy"]["high"]
    positives = {k: LABELS[fold].count("1") for k, fold in enumerate(FOLDS)}
    wins = 0.0
    for a, score in enumerate(SCORES):
        for b, other in enumerate(SCORES):
            pairs = positives[a] * (4 - positives[b])
            wins += pairs * (1 if score > other else 0.5 * (score == other))
    assert summary["auroc"]["value"] == pytest.approx(wins / 100)

    assert [(row["fold"], row["n"]) for row in result["folds"]] == [(fold, 4) for fold in FOLDS]
    assert [row["accuracy"] for row in result["folds"]] == [3 / 4, 3 / 4, 3 / 4, 2 / 4, 1 / 4]
    printed = capsys.readouterr().out
    assert "fold       n  accuracy  balanced_accuracy     auroc" in printed
    assert "\n3          4    0.5000             0.5000    0.5000" in printed


def test_the_tuned_threshold_of_a_fold_is_that_of_the_others(studies, tmp_path, capsys):
    cache, paths = studies["classification"]
    evaluate("classification", cache, "--checkpoint", *paths, "--out", tmp_path)
    result = report(tmp_path)
    # Of the others: 0.7, 0.65, 0.525, 0.575 and 0.55; so folds 1, 2 and 4 are positive as at 0.5.
    expected = [(3.0 - own) / 4 for own in THRESHOLDS]
    assert list(result["run"]["thresholds_tuned"].values()) == pytest.approx(expected)
    assert result["run"]["threshold_tuned"] is None
    assert result["summary"]["accuracy_tuned"]["value"] == pytest.approx(12 / 20)
    assert "threshold of each fold is the mean of those of the other" in capsys.readouterr().out
    # With 0.1 for fold 2 and 0.9 for the others, it alone is tuned to 0.9, and those to 0.7.
    changed = []
    for k, path in enumerate(paths):
        changed.append(tmp_path / f"{k}.pt")
        save_checkpoint(changed[k], load_checkpoint(path) | {"threshold": 0.1 if k == 2 else 0.9})
    evaluate("classification", cache, "--checkpoint", *changed, "--out", tmp_path / "again")
    result = report(tmp_path / "again")
    # So fold 1 alone is positive, and not fold 2 (a score of 0.8).
    of_folds = [3 / 4, 3 / 4, 1 / 4, 2 / 4, 3 / 4]
    assert [row["accuracy_tuned"] for row in result["folds"]] == of_folds
    assert result["summary"]["accuracy_tuned"]["value"] == pytest.approx(sum(of_folds) / 5)


def test_an_operating_point_is_chosen_on_the_validation_fold(studies, tmp_path):
    """Every network scores all images alike, so its own threshold is its score (SCORES)."""
    cache, paths = studies["classification"]
    point = ("--operating-point", "sensitivity=0.5")
    one = ("--checkpoint", paths[3], *point, "--split", "test")
    evaluate("classification", cache, *one, "--out", tmp_path / "one")
    assert report(tmp_path / "one")["run"]["threshold_tuned"] == pytest.approx(SCORES[3])
    evaluate("classification", cache, "--checkpoint", *paths, *point, "--out", tmp_path / "all")
    expected = [(sum(SCORES) - own) / 4 for own in SCORES]
    found = report(tmp_path / "all")["run"]["thresholds_tuned"]
    assert list(found.values()) == pytest.approx(expected)

    other = copy(cache, tmp_path / "other")  # its test images, in an index of its own
    change_rows(other, lambda k, row: row.update(fold="test", id=f"o{k}", patient=f"o{k}"))
    images = np.load(other / "images.npy")
    np.save(other / "images.npy", 255 - images)
    with pytest.raises(DataError, match=r"other: not the cache of the training.*--tune-on"):
        evaluate("classification", other, *one, "--out", tmp_path / "no")
    evaluate("classification", other, *one, "--tune-on", cache, "--out", tmp_path / "yes")
    without_point = ["--checkpoint", one[one.index("--checkpoint") + 1], "--split", "test"]
    with pytest.raises(DataError, match=r"--tune-on .*other: not the cache of the training"):
        evaluate("classification", cache, *without_point, "--tune-on", other)
    assert report(tmp_path / "yes")["run"]["threshold_tuned"] == pytest.approx(SCORES[3])
    assert report(tmp_path / "yes")["run"]["n"] == len(images)


@pytest.mark.parametrize("point", ["accuracy=0.9", "sensitivity=0", "sensitivity", "specificity=2"])
def test_an_operating_point_is_a_sensitivity_or_a_specificity(point, capsys):
    options = ["--checkpoint", "a.pt", "--data", "a", "--operating-point", point]
    with pytest.raises(SystemExit, match="2"):
        module("classification", "eval").parse_args(options)
    assert "--operating-point" in capsys.readouterr().err


def test_the_map_of_a_mistake_is_that_of_the_network_that_made_it(studies, tmp_path, monkeypatch):
    cache, paths = studies["classification"]
    evaluation = module("classification", "eval")
    draw = evaluation.draw_activation
    drawn = []

    def record(model: torch.nn.Module, *args: object) -> torch.Tensor:
        drawn.append(model.fc.bias[1].sigmoid().item())
        return draw(model, *args)

    monkeypatch.setattr(evaluation, "draw_activation", record)
    evaluate("classification", cache, "--checkpoint", *paths, "--out", tmp_path)
    # The most confident ones first: a mistake each in folds 0 and 1, then folds 2, 3 and 4.
    assert drawn == pytest.approx([0.1, 0.9, 0.8, 0.3, 0.3, 0.6, 0.6, 0.6])


def test_boxes_and_masks_are_pooled_likewise(studies, tmp_path):
    cache, paths = studies["detection"]
    evaluate("detection", cache, "--checkpoint", *paths, "--out", tmp_path / "boxes")
    for row in read_table(tmp_path / "boxes" / "predictions.csv"):
        # The box spans the whole height and the given part of the width of 32 pixels.
        assert float(row["xmax"]) == pytest.approx(32 * SCORES[int(row["fold"])], abs=0.01)
        overlap = 8 * min(8, max(0, 32 * SCORES[int(row["fold"])] - 6))
        union = 64 + 32 * 32 * SCORES[int(row["fold"])] - overlap
        assert float(row["iou"]) == pytest.approx(overlap / union, abs=1e-4)
    result = report(tmp_path / "boxes")
    mean = sum(row["iou"] for row in result["cases"]) / 20
    assert result["summary"]["mean_iou"]["value"] == pytest.approx(mean, abs=1e-4)
    assert [row["n"] for row in result["folds"]] == [4] * 5

    cache, paths = studies["segmentation"]
    evaluate("segmentation", cache, "--checkpoint", *paths, "--out", tmp_path / "masks")
    result = report(tmp_path / "masks")
    # All voxels or none are the cube, of 4 x 4 voxels in each of 3 to 5 slices.
    expected = []
    for row in read_table(tmp_path / "masks" / "cases.csv"):
        cube = 16 * (3 + int(row["id"][1:]) % 3)
        is_found = SCORES[int(row["fold"])] > 0.5
        expected.append(2 * cube / (cube + 8**3) if is_found else 0)
        assert float(row["dice"]) == pytest.approx(expected[-1])
    assert result["summary"]["dice"]["value"] == pytest.approx(np.mean(expected))
    assert [row["n"] for row in result["folds"]] == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("task", TASKS)
def test_a_fold_in_the_pool_is_the_fold_alone_and_neither_replaces_the_other(studies, task, capsys):
    cache, paths = studies[task]
    evaluate(task, cache, "--checkpoint", paths[1])
    alone = report(paths[1].parent / "eval_val")
    assert "folds" not in alone and "by" not in alone
    evaluate(task, cache, "--checkpoint", *paths[1:3], "--by", "fold")
    assert report(paths[1].parent / "eval_val") == alone
    pooled = report(paths[1].parent / "eval_folds")
    assert [row["fold"] for row in pooled["folds"]] == ["1", "2"]
    left_out = {"segmentation": "fold 0, 3, 4: 4 rows"}.get(task, "fold 0, 3, 4: 12 rows")
    assert f"note: no checkpoint of {left_out} are left out" in capsys.readouterr().out
    (by_fold, _) = pooled["by"]["values"]
    assert by_fold["n"] == alone["run"]["n"] == pooled["folds"][0]["n"]
    for name, metric in alone["summary"].items():
        if name in pooled["folds"][0] and not name.endswith("_tuned"):
            assert pooled["folds"][0][name] == metric["value"], name
    of_fold = [case for case in pooled["cases"] if case["fold"] == "1"]
    assert of_fold == alone["cases"]


def test_checkpoints_of_one_fold_are_averaged_for_it(studies, tmp_path):
    cache, paths = studies["classification"]
    other = load_checkpoint(paths[1])
    other["model"] = constant_weights("classification", other["model"], 0.5)
    save_checkpoint(tmp_path / "other.pt", other)
    command = ("--checkpoint", *paths, tmp_path / "other.pt", "--out", tmp_path)
    evaluate("classification", cache, *command)
    for row in read_table(tmp_path / "predictions.csv"):
        expected = {"1": 0.7}.get(row["fold"], SCORES[int(row["fold"])])
        assert float(row["probability_yes"]) == pytest.approx(expected)
    evaluate("classification", cache, *command, "--split", "test")
    for row in read_table(tmp_path / "predictions.csv"):  # the mean of all six
        assert row["fold"] == "test"
        assert float(row["probability_yes"]) == pytest.approx((sum(SCORES) + 0.5) / 6)


@pytest.mark.parametrize("task", TASKS)
def test_a_network_that_knows_its_fold_is_refused(studies, tmp_path, task):
    cache, paths = studies[task]
    checkpoint = load_checkpoint(paths[3])
    rows = [k for k, row in enumerate(read_rows(cache)) if row["fold"] == "3"]
    known = list_trained_on(*module(task, "dataset").fingerprints(cache, rows[:1]))
    save_checkpoint(tmp_path / "known.pt", checkpoint | {"trained_on": known})
    command = ("--checkpoint", *paths[:3], tmp_path / "known.pt", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"known.pt: trained on \d of these \d images or patients"):
        evaluate(task, cache, *command)
    other = copy(cache, tmp_path / "cache")
    change_rows(other, lambda k, row: row.update(id=f"{row['id']}b"))
    with pytest.raises(ValueError, match="not the cache of the training"):
        evaluate(task, other, "--checkpoint", *paths, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- subgroups ---


def test_values_of_a_column_are_groups_and_many_numbers_are_bands():
    assert split_by(["b", "a", "", "b", "nan"]) == {"a": [1], "b": [0, 3], "(empty)": [2, 4]}
    assert list(split_by(["10", "9", "1", "9"])) == ["1", "9", "10"]
    ages = ["70", "", "20", "30", "41", "50", "60", "65", "75", "80.5", "80.5"]
    expected = {"20 to 30": [2, 3], "41 to 60": [4, 5, 6], "65 to 70": [7, 0]}
    assert split_by(ages) == expected | {"75 to 80.5": [8, 9, 10], "(empty)": [1]}
    ties = ["1"] * 20 + [str(k) for k in range(2, 12)]
    assert [(name, len(rows)) for name, rows in split_by(ties).items()] == [
        ("1", 20),
        ("2 to 3", 2),
        ("4 to 11", 8),
    ]
    many = [str(k) for k in range(12)]
    assert list(split_by(many, bands=False)) == many
    assert [len(rows) for rows in split_by(many).values()] == [3] * 4
    assert len(split_by([f"x{k}" for k in range(12)])) == 12  # words are no numbers


def mean_of(numbers: list[float]):
    table = torch.tensor(numbers, dtype=torch.float64)
    return lambda rows: {"mean": table[rows].mean().item()}


def test_the_difference_of_two_values_has_an_interval_and_of_more_has_none():
    rng = np.random.default_rng(0)
    numbers = [*rng.normal(0, 1, 100), *rng.normal(3, 1, 100), *rng.normal(8, 1, 100)]
    groups = [f"p{k}" for k in range(300)]
    first, second, third = list(range(100)), list(range(100, 200)), list(range(200, 300))
    by = summarise_by(mean_of(numbers), "sex", {"F": first, "M": second}, groups, 400)
    difference = by["differences"]["mean"]
    expected = np.mean(numbers[100:200]) - np.mean(numbers[:100])
    assert difference["value"] == pytest.approx(expected)
    assert (difference["highest"], difference["lowest"]) == ("M", "F")
    half_width = 1.96 * math.sqrt(2 / 100)  # of the difference of two means of 100
    assert difference["low"] == pytest.approx(expected - half_width, abs=0.08)
    assert difference["high"] == pytest.approx(expected + half_width, abs=0.08)
    turned = summarise_by(mean_of(numbers), "sex", {"M": second, "F": first}, groups, 400)
    assert turned["differences"]["mean"]["low"] == pytest.approx(difference["low"], abs=0.08)

    three = {"F": first, "M": second, "X": third}
    by = summarise_by(mean_of(numbers), "sex", three, groups, 100)
    difference = by["differences"]["mean"]
    assert difference["value"] == pytest.approx(np.mean(numbers[200:]) - np.mean(numbers[:100]))
    assert (difference["highest"], difference["lowest"]) == ("X", "F")
    assert math.isnan(difference["low"]) and math.isnan(difference["high"])
    assert [row["patients"] for row in by["values"]] == [100] * 3


def test_the_difference_to_a_few_patients_has_no_interval():
    numbers = np.random.default_rng(0).normal(0, 1, 60).tolist()

    def interval(patients: int) -> list[float]:
        groups = [f"p{k}" for k in range(40)] + [f"q{k % patients}" for k in range(20)]
        values = {"F": list(range(40)), "M": list(range(40, 60))}
        difference = summarise_by(mean_of(numbers), "sex", values, groups, 50)
        return [difference["differences"]["mean"][name] for name in ("low", "high")]

    assert all(map(math.isfinite, interval(10)))
    assert all(map(math.isnan, interval(9)))


def test_paired_values_have_the_narrow_interval_of_pairs():
    """Two views of each patient, the second 1 above the first: the difference is always 1."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 5, 50)
    noise = rng.normal(0, 0.1, 50)
    numbers = [*first, *(first + 1 + noise)]
    groups = [f"p{k % 50}" for k in range(100)]
    views = {"AP": list(range(50)), "PA": list(range(50, 100))}
    difference = summarise_by(mean_of(numbers), "view", views, groups, 200)["differences"]["mean"]
    assert 0.9 < difference["low"] < 1 + noise.mean() < difference["high"] < 1.1


@pytest.mark.parametrize("task", TASKS)
def test_by_gives_every_metric_of_every_value(studies, tmp_path, task, capsys):
    cache, paths = studies[task]
    evaluate(task, cache, "--checkpoint", *paths, "--out", tmp_path, "--by", "sex")
    result = report(tmp_path)
    women, men = result["by"]["values"]
    assert (women["value"], men["value"]) == ("F", "M")
    assert result["by"]["column"] == "sex"
    sexes = {row["id"]: row["sex"] for row in read_rows(cache)}
    figure = {"classification": "accuracy", "detection": "mean_iou", "segmentation": "dice"}[task]
    for row in (women, men):
        cases = [case for case in result["cases"] if sexes[case["id"]] == row["value"]]
        assert row["n"] == len(cases)
        if task == "classification":
            scores = [case["label"] == case["prediction"] for case in cases]
        else:
            scores = [case[{"detection": "iou"}.get(task, "dice")] for case in cases]
        value = row["summary"][figure]["value"]
        if len(cases) < 5:  # four volumes and three
            assert value is None
        else:
            assert value == pytest.approx(np.mean(scores), abs=1e-4)
    printed = capsys.readouterr().out
    assert f"\nby sex{'n':>35}\n" in printed
    if task == "segmentation":
        assert f"dice\n  F{'':29}        3  -\n  M{'':29}        4  -\n" in printed
        assert result["by"]["differences"]["dice"]["value"] is None
    else:
        assert "  largest difference " in printed
    assert "note: fewer than 10 patients, which show little: F (" in printed


def test_one_class_only_has_no_auroc_but_an_accuracy(studies, tmp_path):
    cache, paths = studies["classification"]
    evaluate("classification", cache, "--checkpoint", *paths, "--out", tmp_path, "--by", "label")
    no, yes = report(tmp_path)["by"]["values"]
    assert (no["value"], yes["value"]) == ("no", "yes")  # by name, not by number
    assert no["summary"]["auroc"]["value"] is None
    for name in ("precision", "f1", "f1_tuned", "average_precision"):  # 0 or 1, whatever it answers
        assert no["summary"][name]["value"] is yes["summary"][name]["value"] is None
    assert no["summary"]["accuracy"]["value"] == pytest.approx(5 / 10)
    assert yes["summary"]["accuracy"]["value"] == pytest.approx(7 / 10)
    difference = report(tmp_path)["by"]["differences"]
    assert difference["accuracy"]["value"] == pytest.approx(0.2)
    assert "highest" not in difference["auroc"]


@pytest.mark.parametrize("task", TASKS)
def test_by_refuses_columns_that_are_none_or_no_groups(studies, tmp_path, task, monkeypatch):
    cache, paths = studies[task]
    command = ("--checkpoint", paths[0], "--out", tmp_path / "out", "--by")
    columns = ", ".join(read_rows(cache)[0])
    with pytest.raises(ValueError) as refused:
        evaluate(task, cache, *command, "age")
    message = f"--by age: no such column in index.csv, expected one of {columns}"
    assert str(refused.value) == message
    monkeypatch.setattr(module(task, "eval"), "MOST_VALUES", 1)
    count = {"segmentation": "2 values in 2 rows"}.get(task, "4 values in 4 rows")
    with pytest.raises(ValueError, match=f"--by id: {count}, expected at most 1; the columns"):
        evaluate(task, cache, *command, "id")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        parse = module(task, "eval").parse_args
        parse(["--checkpoint", "best.pt", "--images", "a.png", "--by", "sex"])


# --- trainings without a fold to validate on, or not after every epoch ---


@pytest.mark.parametrize("task", TASKS)
def test_a_training_on_all_folds_leaves_out_the_test_set_alone(task, studies, tmp_path, capsys):
    cache, _ = studies[task]
    run = tmp_path / "run"
    train(task, cache, run)  # the run that goes leaves a best.pt
    capsys.readouterr()
    train(task, cache, run, "--fold", "-1", "--epochs", "2", "--overwrite")
    command = f"next: python {task}/eval.py --data {cache} --checkpoint {run}/last.pt --split test"
    assert command in capsys.readouterr().out
    assert not (run / "best.pt").exists()
    rows = [k for k, row in enumerate(read_rows(cache)) if row["fold"] != "test"]
    expected = list_trained_on(*module(task, "dataset").fingerprints(cache, rows))
    assert load_checkpoint(run / "last.pt")["trained_on"] == expected
    assert not any(name.startswith("val_") for name in read_table(run / "log.csv")[1])
    assert Image.open(run / "log.png").size == (500, 400)  # the loss alone

    last = ("--checkpoint", run / "last.pt")
    error = module(task, "preprocess").DataError
    with pytest.raises(error, match=r"left no fold out \(--fold -1\); use --split test"):
        evaluate(task, cache, *last)
    evaluate(task, cache, *last, "--split", "test")
    assert not any(name.endswith("_tuned") for name in report(run / "eval_test")["summary"])
    if task == "classification":
        assert "note: no tuned threshold" in capsys.readouterr().out
        with pytest.raises(DataError, match="--operating-point: found a checkpoint without"):
            evaluate(task, cache, *last, "--split", "test", "--operating-point", "sensitivity=0.9")
        with pytest.raises(DataError, match="--tune-on: found a checkpoint without"):
            evaluate(task, cache, *last, "--split", "test", "--tune-on", cache)


def test_a_validation_every_other_epoch_changes_no_weight(studies, tmp_path, capsys):
    cache, _ = studies["segmentation"]
    train("segmentation", cache, tmp_path / "each", "--epochs", "5")
    options = ("--epochs", "5", "--validate-every", "2")
    train("segmentation", cache, tmp_path / "other", *options, "--stop-after", "1")
    command = f"--checkpoint {tmp_path / 'other'}/last.pt --split val"  # no best one yet
    assert command in capsys.readouterr().out
    train("segmentation", cache, tmp_path / "other", *options, "--stop-after", "3", "--resume")
    assert load_checkpoint(tmp_path / "other" / "last.pt")["figures"] == {}
    train("segmentation", cache, tmp_path / "other", *options, "--resume")

    each, other = (load_checkpoint(tmp_path / name / "last.pt") for name in ("each", "other"))
    for name, weight in each["model"].items():
        assert torch.equal(weight, other["model"][name])
    assert each["figures"] == other["figures"]
    scores = [row["val_dice"] for row in each["log"]]
    seen = [row.get("val_dice") for row in other["log"]]
    assert seen == [None, scores[1], None, scores[3], scores[4]]
    best = load_checkpoint(tmp_path / "other" / "best.pt")
    assert best["figures"]["dice"] == max(score for score in seen if score is not None)
    written = [row["val_dice"] for row in read_table(tmp_path / "other" / "log.csv")]
    assert [text == "" for text in written] == [True, False, True, False, False]
