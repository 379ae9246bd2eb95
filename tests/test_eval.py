"""What eval.py makes of checkpoints: which network predicts what, and what the metrics are."""

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import list_trained_on, load_checkpoint, save_checkpoint
from common.metrics import auroc
from segmentation.eval import keep_largest, measure_case
from tests import caches as kit
from tests.caches import read_table
from tests.raw import noise

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
FOLDS = ("0", "1", "2", "3", "4")
ANSWERS = (0.1, 0.9, 0.8, 0.3, 0.6)  # of the network of each fold, whatever the image
THRESHOLDS = (0.2, 0.4, 0.9, 0.7, 0.8)  # Youden's, by the validation predictions of each
# The labels of the four images of each fold
LABELS = {"0": "0001", "1": "1101", "2": "0111", "3": "0011", "4": "1000", "test": "0101"}


def constant_weights(task: str, state: dict, score: float) -> dict:
    """Weights that give every image the same probability, box (0, 0, score, 1) or class."""
    name = {"classification": "fc", "detection": "out", "segmentation": "head"}[task]
    logit = math.log(score / (1 - score))
    bias = [0, 0, score, 1] if task == "detection" else [0, logit]
    weight = torch.zeros_like(state[f"{name}.weight"])
    return state | {f"{name}.weight": weight, f"{name}.bias": torch.tensor(bias).float()}


def validation(threshold: float) -> dict:
    """Predictions of a validation fold whose best threshold is this one."""
    scores = torch.tensor([threshold - 0.05, threshold + 0.05], dtype=torch.float64)
    probabilities = torch.stack([1 - scores, scores], 1)
    return {"ids": ["a", "b"], "labels": torch.tensor([0, 1]), "probabilities": probabilities}


def refold(k: int, row: dict) -> None:
    """A fold, or test, for each patient, and a sex; X-rays have two images of each, and 12 patients."""
    patient = k if "mask" in row else k // 2
    row["fold"] = (*FOLDS, "test")[patient % 6]
    row["sex"] = "MF"[patient % 2]
    if "label" in row:
        row["label"] = ("no", "yes")[int(LABELS[row["fold"]][k // 12 * 2 + k % 2])]


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict[str, tuple[Path, list[Path]]]:
    """For each task a cache of five folds and a test set, and checkpoints of five trainings.

    Each is a training's but for its weights, which give the constant answer of its fold, and for the
    rows and the predictions that it keeps.
    """
    made = {}
    for task in kit.NAMES:
        folder = tmp_path_factory.mktemp(task)
        cache = kit.draw_cache(folder / "cache", task)
        kit.change_rows(cache, refold)
        if task == "segmentation":  # nothing to find, and nothing found: no Dice
            nothing = np.zeros((8, 8, 8), np.uint8)
            np.save(cache / "volumes/v6.mask.npy", nothing)
            nib.save(nib.Nifti1Image(nothing, np.eye(4)), cache / "volumes/v6.truth.nii.gz")
        with kit.small_network():
            kit.train(task, cache, folder / "run")
        base = load_checkpoint(folder / "run" / "best.pt")
        made[task] = (cache, [folder / f"fold{number}.pt" for number in range(5)])
        for number, path in enumerate(made[task][1]):
            checkpoint = base | {"settings": base["settings"] | {"fold": number}}
            checkpoint["model"] = constant_weights(task, base["model"], ANSWERS[number])
            index = kit.read_rows(cache)
            checkpoint["trained_on"] = list_trained_on(index, str(number), {})
            checkpoint["validation"] = validation(THRESHOLDS[number])
            save_checkpoint(path, checkpoint)
    return made


def measure(studies: dict, task: str, out: Path, *options: object, paths: list = ()) -> dict:
    """metrics.json of all five checkpoints, or of these."""
    cache, all_paths = studies[task]
    kit.evaluate(task, cache, "--checkpoint", *(paths or all_paths), "--out", out, *options)
    return kit.report(out)


def value(result: dict, name: str) -> float:
    return result["summary"][name]["value"]


# --- folds ---


def test_every_image_is_predicted_by_the_network_that_left_it_out(studies, tmp_path):
    """Predicted positive at 0.5: folds 1, 2 and 4, which hold 3 + 3 + 1 positives of 10."""
    result = measure(studies, "classification", tmp_path / "out")
    folds_of = {row["id"]: row["fold"] for row in kit.read_rows(studies["classification"][0])}
    rows = read_table(tmp_path / "out" / "predictions.csv")
    assert {row["id"] for row in rows} == {id for id, fold in folds_of.items() if fold != "test"}
    for row in rows:
        assert float(row["probability_yes"]) == pytest.approx(ANSWERS[int(folds_of[row["id"]])])
    assert value(result, "sensitivity") == pytest.approx((3 + 3 + 1) / 10)
    labels = torch.tensor([int(label) for fold in FOLDS for label in LABELS[fold]])
    scores = torch.tensor(ANSWERS).repeat_interleave(4)  # four images a fold
    assert value(result, "auroc") == pytest.approx(auroc(labels, scores))
    # Folds are --by fold: right are the negatives of folds 0 and 3, the positives of the others.
    assert result["by"]["column"] == "fold"
    assert [(row["value"], row["n"]) for row in result["by"]["values"]] == [(k, 4) for k in FOLDS]
    accuracies = [row["summary"]["accuracy"]["value"] for row in result["by"]["values"]]
    assert accuracies == [3 / 4, 3 / 4, 3 / 4, 2 / 4, 1 / 4]
    assert value(result, "accuracy") == pytest.approx(12 / 20)


def test_a_case_with_nothing_to_find_and_nothing_found_has_no_dice(studies, tmp_path):
    result = measure(studies, "segmentation", tmp_path / "masks")
    # All voxels or none are the cube, of 4 x 4 voxels in each of 3 to 5 slices.
    expected = []
    for row in read_table(tmp_path / "masks" / "cases.csv"):
        cube = 0 if row["id"] == "v6" else 16 * (3 + int(row["id"][1:]) % 3)
        is_found = ANSWERS[int(row["fold"])] > 0.5
        expected.append(2 * cube / (cube + 8**3) if is_found else 0 if cube else math.nan)
        assert float(row["dice"]) == pytest.approx(expected[-1], nan_ok=True)
    assert value(result, "dice") == pytest.approx(np.nanmean(expected))
    assert sum(math.isnan(dice) for dice in expected) == 1
    assert [row["n"] for row in result["by"]["values"]] == [2, 2, 1, 1, 1]


PICTURES = {
    "classification": {"confusion_matrix.png", "roc.png", "mistakes.png"},
    "detection": {"gallery.png"},
    "segmentation": {"worst.png", "worst.gif"},
}


@kit.TASKS
def test_a_fold_in_the_pool_is_the_fold_alone(studies, tmp_path, task, capsys):
    paths = studies[task][1]
    alone = measure(studies, task, tmp_path / "alone", paths=paths[1:2])
    assert alone["by"] is None
    pooled = measure(studies, task, tmp_path / "pooled", paths=paths[1:3])
    rows = "4 rows" if task == "segmentation" else "12 rows"
    note = f"note: no checkpoint of fold 0, 3, 4: {rows} are left out"
    assert note in capsys.readouterr().out
    fold, other = pooled["by"]["values"]
    assert (fold["value"], other["value"], fold["n"]) == ("1", "2", alone["run"]["n"])
    assert fold["summary"].items() >= alone["summary"].items()  # tuned on the other one
    assert [case for case in pooled["cases"] if case["fold"] == "1"] == alone["cases"]
    for name in PICTURES[task]:
        picture = np.asarray(Image.open(tmp_path / "pooled" / name).convert("RGB"))
        assert picture.min() < 30 and picture.max() > 200, name


def test_checkpoints_of_one_fold_are_averaged_for_it(studies, tmp_path):
    paths = studies["classification"][1]
    other = load_checkpoint(paths[1])
    other["model"] = constant_weights("classification", other["model"], 0.5)
    save_checkpoint(tmp_path / "other.pt", other)
    paths = [*paths, tmp_path / "other.pt"]
    measure(studies, "classification", tmp_path / "val", paths=paths)
    for row in read_table(tmp_path / "val" / "predictions.csv"):
        expected = {"1": 0.7}.get(row["fold"], ANSWERS[int(row["fold"])])
        assert float(row["probability_yes"]) == pytest.approx(expected)
    measure(studies, "classification", tmp_path / "test", "--split test", paths=paths)
    for row in read_table(tmp_path / "test" / "predictions.csv"):  # the mean of all six
        assert (row["fold"], row["split"]) == ("test", "test")
        assert float(row["probability_yes"]) == pytest.approx((sum(ANSWERS) + 0.5) / 6)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_boxes_and_masks_of_several_networks_are_averaged(studies, task, monkeypatch):
    evaluation = kit.module(task, "eval")
    runs = evaluation.load_runs(studies[task][1][:2], torch.device("cpu"))
    answers = [torch.rand(2, 3, 3, 3).half() for _ in range(2)]
    found = iter([answer.clone() for answer in answers])
    if task == "segmentation":
        monkeypatch.setattr(evaluation, "predict_volume", lambda *_: next(found))
    else:
        monkeypatch.setattr(evaluation, "evaluate", lambda *_: (next(found), None))
    mean = evaluation.predict(runs, np.zeros(0), torch.device("cpu"), None)
    assert torch.allclose(mean.float(), torch.stack(answers).float().mean(0), atol=2e-3)


@kit.TASKS
def test_folds_of_another_cache_are_refused(studies, tmp_path, task):
    cache, paths = studies[task]
    other = kit.copy(cache, tmp_path / "cache")
    kit.change_rows(other, lambda k, row: row.update(patient=f"{row['patient']}b"))
    options = f"--out {tmp_path}/out --checkpoint {paths[0]}"
    found = kit.refusal(kit.evaluate, task, other, options, *paths[1:])
    assert "not the cache of the training" in found and not (tmp_path / "out").exists()
    if task == "classification":
        kit.change_meta(other, fit="pad")
        found = kit.refusal(kit.evaluate, task, other, options)
        assert "fit pad, but" in found and "has squash" in found


# --- thresholds ---


def test_the_tuned_threshold_of_a_fold_is_that_of_the_others(studies, tmp_path):
    cache, paths = studies["classification"]
    result = measure(studies, "classification", tmp_path / "a")
    # Of the others: 0.7, 0.65, 0.525, 0.575 and 0.55; so folds 1, 2 and 4 are positive as at 0.5.
    expected = [(3.0 - own) / 4 for own in THRESHOLDS]
    assert list(result["run"]["thresholds_tuned"].values()) == pytest.approx(expected)
    assert value(result, "accuracy_tuned") == pytest.approx(12 / 20)
    # With 0.1 for fold 2 and 0.9 for the others, it alone is tuned to 0.9, and those to 0.7:
    changed = []
    for k, path in enumerate(paths):
        changed.append(tmp_path / f"{k}.pt")
        own = {"validation": validation(0.1 if k == 2 else 0.9)}
        save_checkpoint(changed[k], load_checkpoint(path) | own)
    result = measure(studies, "classification", tmp_path / "b", paths=changed)
    # so fold 1 alone is positive, and not fold 2 (an answer of 0.8).
    accuracies = [row["summary"]["accuracy_tuned"]["value"] for row in result["by"]["values"]]
    assert accuracies == [3 / 4, 3 / 4, 1 / 4, 2 / 4, 3 / 4]
    # One fold has no other: no threshold on it, but one for the test set
    result = measure(studies, "classification", tmp_path / "val", paths=paths[3:4])
    assert not any(name.endswith("_tuned") for name in result["summary"])
    options = f"--checkpoint {paths[3]} --operating-point sensitivity=0.5"
    found = kit.refusal(kit.evaluate, "classification", cache, options)
    assert "--operating-point: no other fold to choose it on" in found
    result = measure(studies, "classification", tmp_path / "c", "--split test", paths=paths[3:4])
    assert result["run"]["thresholds_tuned"] == {"test": pytest.approx(THRESHOLDS[3])}
    assert value(result, "sensitivity_tuned") == 0  # 0.3 is below 0.7


def test_an_operating_point_is_chosen_by_the_validation_predictions(studies, tmp_path, capsys):
    scores = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    own = validation(0.5) | {"labels": torch.tensor([1, 0, 1, 1])}
    own["probabilities"] = torch.stack([1 - scores, scores], 1)
    path = tmp_path / "a.pt"
    save_checkpoint(path, load_checkpoint(studies["classification"][1][3]) | {"validation": own})
    for point, threshold in (("sensitivity=0.6", 0.5), ("sensitivity=1", 0.2)):
        options = f"--split test --operating-point {point}"
        result = measure(studies, "classification", tmp_path / point, options, paths=[path])
        assert result["run"]["thresholds_tuned"]["test"] == pytest.approx(threshold)
    for point in ("accuracy=0.9", "sensitivity=0", "sensitivity", "specificity=2"):
        with pytest.raises(SystemExit, match="2"):
            kit.module("classification", "eval").main(["--operating-point", point])
        assert "argument --operating-point" in capsys.readouterr().err


# --- subgroups, intervals ---


@kit.TASKS
def test_by_gives_every_metric_of_every_value(studies, tmp_path, task, capsys):
    result = measure(studies, task, tmp_path / "out", "--by sex")
    assert result["by"]["column"] == "sex"
    sexes = {row["id"]: row["sex"] for row in kit.read_rows(studies[task][0])}
    metric = {"classification": "accuracy", "detection": "mean_iou", "segmentation": "dice"}[task]
    for row, sex in zip(result["by"]["values"], "FM", strict=True):
        cases = [case for case in result["cases"] if sexes[case["id"]] == sex]
        assert (row["value"], row["n"]) == (sex, len(cases))
        if task == "classification":
            scores = [case["label"] == case["prediction"] for case in cases]
        else:
            scores = [case["iou" if task == "detection" else "dice"] for case in cases]
        assert row["summary"].keys() == result["summary"].keys()
        mean = np.nanmean(np.array(scores, float))
        assert row["summary"][metric]["value"] == pytest.approx(mean, abs=1e-4)
        assert row["summary"][metric]["low"] is None  # ten images of five patients
    printed = capsys.readouterr().out
    assert f"{metric} by sex\n  F " in printed
    assert ("note: 7 patients, so no intervals" in printed) == (task == "segmentation")
    with pytest.raises(SystemExit):
        kit.module(task, "eval").main(["--checkpoint", "a", "--images", "a", "--by", "sex"])


@kit.TASKS
def test_many_images_of_one_patient_have_no_interval(runs, tmp_path, task):
    cache = tmp_path / "cache"
    cache = kit.draw_volumes(cache, 12) if task == "segmentation" else kit.draw_images(cache, task)
    kit.change_rows(cache, lambda k, row: row.update(fold="test", patient="one", digest=f"x{k}"))
    options = f"--checkpoint {runs[task]}/best.pt --split test --out {tmp_path}/out"
    kit.evaluate(task, cache, options)
    assert {metric["low"] for metric in kit.report(tmp_path / "out")["summary"].values()} == {None}


@kit.TASKS
def test_eval_gives_the_score_that_train_printed(caches, tmp_path, task):
    kit.train(task, caches[task], tmp_path / "run", "--amp bf16 --epochs 2 --lr 1e-2")
    metrics = load_checkpoint(tmp_path / "run" / "last.pt")["metrics"]
    kit.evaluate(task, caches[task], f"--checkpoint {tmp_path}/run/last.pt")
    assert kit.SCORES[task] in metrics
    kit.assert_evaluated_as_trained(metrics, tmp_path / "run" / "eval_val", 1e-9)


# --- boxes ---


def test_boxes_and_their_errors_by_hand(studies, tmp_path, monkeypatch, capsys):
    cache, (path, *_) = studies["detection"]
    cache = kit.copy(cache, tmp_path / "cache")
    new = {"digest": "", "spacing": "0.5 0.25"}
    fold = lambda k: "test" if k < 8 else "0"  # noqa: E731
    kit.change_rows(cache, lambda k, row: row.update(new, patient=f"x{k}", fold=fold(k)))
    evaluation = kit.module("detection", "eval")
    real = evaluation.evaluate

    def evaluate_shifted(*args: object) -> tuple:
        _, boxes = real(*args)
        shift = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0, 1, 0]) / 32
        return boxes + shift, boxes  # box k lies k pixels aside, of 8

    monkeypatch.setattr(evaluation, "evaluate", evaluate_shifted)
    options = f"--checkpoint {path} --by site --split test --out {tmp_path}/out"
    kit.evaluate("detection", cache, options)
    result = kit.report(tmp_path / "out")
    iou = [(8 - k) / (8 + k) for k in range(8)]
    a, b = (row["summary"] for row in result["by"]["values"])
    for summary, rows in ((a, (0, 1, 4, 5)), (b, (2, 3, 6, 7)), (result["summary"], range(8))):
        shift = sum(rows) / len(rows)
        expected = sum(iou[k] for k in rows) / len(rows)
        assert summary["mean_iou"]["value"] == pytest.approx(expected, abs=1e-6)
        assert summary["mae_px"]["value"] == pytest.approx(shift / 2, abs=1e-5)
        assert summary["mae_mm"]["value"] == pytest.approx(0.25 * shift / 2, abs=1e-5)  # across
    for k, row in enumerate(read_table(tmp_path / "out" / "predictions.csv")):
        assert float(row["xmin"]) - float(row["true_xmin"]) == pytest.approx(k, abs=0.011)
    printed = capsys.readouterr().out
    doubtful = [k for k in range(8) if iou[k] < 0.5]
    assert f"{len(doubtful)} with an IoU below 0.5" in printed
    worst = [line.split()[1] for line in printed.splitlines() if line.startswith("  0.")]
    assert worst == [f"i{k}" for k in reversed(doubtful)]


# --- masks ---


def test_masks_have_the_values_of_the_files_and_largest_tells_what_it_drops(
    caches, runs, tmp_path, monkeypatch, capsys
):
    probabilities = torch.zeros(2, 8, 8, 8, dtype=torch.float16)
    probabilities[0] = 0.4
    probabilities[1, 1:5, 1:5, 1:5] = 1  # 64 voxels
    probabilities[1, 7, 7, 5:8] = 1  # and 3
    script = kit.module("segmentation", "eval")
    monkeypatch.setattr(script, "predict_volume", lambda *_: probabilities.clone())
    for option, count in (("", 67), ("--largest", 64)):
        out = tmp_path / f"out{option}"
        options = f"--checkpoint {runs['segmentation']}/best.pt --out {out}"
        kit.evaluate("segmentation", caches["segmentation"], options, option)
        for case in kit.report(out)["cases"]:
            mask = np.asanyarray(nib.load(out / "predictions" / f"{case['id']}.nii.gz").dataobj)
            path = caches["segmentation"] / "volumes" / f"{case['id']}.truth.nii.gz"
            truth = np.asanyarray(nib.load(path).dataobj)
            assert np.unique(mask).tolist() == [0, 2] and (mask[1:5, 1:5, 1:5] == 2).all()
            assert (mask == 2).sum() == count
            dice = 2 * ((mask == 2) & (truth == 2)).sum() / (count + (truth == 2).sum())
            assert case["dice_cube"] == case["dice"] == pytest.approx(dice)
            assert case.get("dropped_ml") == (0.003 if option else None)
    printed = capsys.readouterr().out
    assert "--largest dropped parts of 2 of 2 cases, at most 0.003 ml, of v0" in printed


def test_each_class_is_measured_and_one_that_nobody_has_is_left_out_of_the_mean():
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[:2] = 1
    truth[2] = 2
    prediction = truth.copy()
    prediction[1] = 0  # half of class 1
    metrics = measure_case(truth, prediction, np.diag([1, 2, 3, 1]), ["background", *"abc"])
    assert [metrics[f"dice_{name}"] for name in "ab"] == pytest.approx([2 / 3, 1])
    assert metrics["dice"] == pytest.approx((2 / 3 + 1) / 2) and math.isnan(metrics["dice_c"])
    assert metrics["volume_error_ml_a"] == pytest.approx(16 * 6 / 1000)


def test_the_largest_part_of_each_class_is_kept():
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[0:2, 0, 0] = 1  # 2 voxels
    labels[3:6, 2, 0:2] = 1  # 6 voxels
    labels[5, 3, 2] = 1  # touches the large part by an edge only
    labels[0:2, 1, 0:3] = 2  # touches a part of another class
    labels[0, 4, 3] = labels[2, 4, 3] = 3  # two parts of one size: the first is kept
    kept, dropped = keep_largest(labels[::-1])  # the axes of a file may run backwards
    expected = np.zeros_like(labels)
    expected[3:6, 2, 0:2] = 1
    expected[0:2, 1, 0:3] = 2
    expected[2, 4, 3] = 3  # the first one of the reversed axis
    assert np.array_equal(kept[::-1], expected) and dropped == 2 + 1 + 1
    spiral = np.zeros((9, 9, 1), np.uint8)
    spiral[0, :] = spiral[:, 8] = spiral[8, 2:] = spiral[2:, 2] = spiral[2, 2:6] = 1
    spiral[5, 5] = 1  # alone
    kept, dropped = keep_largest(spiral)
    assert dropped == 1 and kept.sum() == spiral.sum() - 1
    assert not keep_largest(np.zeros((2, 2, 2), np.uint8))[0].any()


# --- pictures ---


def test_the_map_of_a_mistake_is_that_of_the_network_that_made_it(studies, tmp_path, monkeypatch):
    evaluation = kit.module("classification", "eval")
    draw = evaluation.draw_map
    drawn = []

    def record(run: object, image: torch.Tensor, target: int, *more: object) -> torch.Tensor:
        drawn.append(run.model.fc.bias[1].sigmoid().item())
        assert target == 1  # the positive class, whatever was predicted
        return draw(run, image, target, *more)

    monkeypatch.setattr(evaluation, "draw_map", record)
    measure(studies, "classification", tmp_path / "out")
    # The most confident ones first: a mistake each in folds 0 and 1, then folds 2, 3 and 4.
    assert drawn == pytest.approx([0.1, 0.9, 0.8, 0.3, 0.3, 0.6, 0.6, 0.6])


def test_a_network_of_another_kind_has_maps_as_well(caches, tmp_path, monkeypatch):
    flat = lambda *_: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32 * 32, 2))  # noqa: E731
    for script in ("model", "train"):
        monkeypatch.setattr(kit.module("classification", script), "build_model", flat)
    kit.train("classification", caches["classification"], tmp_path / "run")
    options = f"--checkpoint {tmp_path}/run/best.pt"
    kit.evaluate("classification", caches["classification"], options)
    assert (tmp_path / "run/eval_val/mistakes.png").is_file()


# --- new images ---


@kit.TASKS
def test_new_images_have_a_row_each_and_only_the_first_ones_an_overlay(
    runs, tmp_path, task, monkeypatch, capsys
):
    """The constant of 100 pictures is lowered to 3; a bad file, and one that is given twice."""
    folder = tmp_path / "new"
    folder.mkdir()
    is_volume = task == "segmentation"
    paths = [folder / f"i{k}.{'nii.gz' if is_volume else 'png'}" for k in range(8)]
    for path in paths:
        if is_volume:
            nib.save(nib.Nifti1Image(noise(path.name, 8, 8, 8), np.eye(4)), path)
        else:
            Image.fromarray(noise(path.name, 20, 60)).save(path)
    paths[2].write_bytes(b"nothing")
    evaluation = kit.module(task, "eval")
    name = {"classification": "draw_map", "detection": "draw_boxes"}.get(task, "draw_panels")
    draw = getattr(evaluation, name)
    drawn = []
    monkeypatch.setattr(evaluation, name, lambda *args: drawn.append(1) or draw(*args))
    monkeypatch.setattr(evaluation, "write_gif", lambda *_: None, raising=False)
    monkeypatch.setattr(evaluation, "OVERLAYS", 3)
    out = tmp_path / "out"
    again = [] if is_volume else [paths[0]]
    found = kit.refusal(kit.predict, task, runs[task] / "best.pt", out, folder, *again)
    assert found == "1 files could not be read (named above)"
    captured = capsys.readouterr()
    assert paths[2].name in captured.err
    assert "note: overlays of the first 3 images only" in captured.out
    assert captured.out.splitlines()[-1].endswith(f"in {out}")
    table = "volumes.csv" if is_volume else "predictions.csv"
    rows = read_table(out / table)
    assert [Path(row["image"]).name for row in rows] == [p.name for p in paths if p != paths[2]]
    assert len(drawn) == 3
    if not is_volume:
        overlays = ["0000_i0.png", "0001_i1.png", "0002_i3.png"]
        assert [row["overlay"] for row in rows] == [*overlays, "", "", "", ""]
        assert all((out / name).is_file() for name in overlays)
    kit.predict(task, runs[task] / "best.pt", tmp_path / "alone", paths[7])
    (alone,) = read_table(tmp_path / "alone" / table)
    for key in alone.keys() - {"image", "overlay", "prediction", "mask"}:
        # Another batch size rounds differently: 0.01 in a box, that is rounded to 0.01 px.
        assert float(rows[6][key]) == pytest.approx(float(alone[key]), abs=0.011), key


@kit.XRAYS
def test_new_images_get_what_the_same_images_of_a_cache_get(tmp_path, task):
    raw = kit.write_raw(tmp_path / "raw", task)
    kit.preprocess(task, raw, tmp_path / "cache", "--size 32")
    kit.train(task, tmp_path / "cache", tmp_path / "run")
    best = tmp_path / "run" / "best.pt"
    kit.evaluate(task, tmp_path / "cache", f"--checkpoint {best} --out {tmp_path}/known")
    kit.predict(task, best, tmp_path / "new", raw)
    new = {row["image"]: row for row in read_table(tmp_path / "new" / "predictions.csv")}
    sources = {row["id"]: row["source"] for row in kit.read_rows(tmp_path / "cache")}
    columns = {"classification": ["probability_no"], "detection": ["xmin", "ymin", "xmax", "ymax"]}
    for row in read_table(tmp_path / "known" / "predictions.csv"):
        for column in columns[task]:
            found = float(new[sources[row["id"]]][column])
            assert found == pytest.approx(float(row[column]), abs=0.011)
