"""What a training does at every step and what eval.py makes of its networks, by values."""

import csv
import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.checkpoint import load_checkpoint, save_checkpoint
from tests.caches import (
    change_rows,
    copy,
    draw_cache,
    draw_images,
    evaluate,
    module,
    read_rows,
    small_network,
    train,
)
from tests.conftest import read_table

pytestmark = pytest.mark.slow
TASKS = pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
XRAYS = pytest.mark.parametrize("task", ["classification", "detection"])


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_network():
        yield


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return {
        task: draw_cache(folder / task, task)
        for task in ("classification", "detection", "segmentation")
    }


def read_metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


# --- a step ---


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@TASKS
def test_a_compiled_run_and_a_bare_one_resume_each_other(caches, tmp_path, task, monkeypatch):
    compiled = []
    compiler = functools.partial(torch.compile, fullgraph=True)

    def compile_model(model: torch.nn.Module, **options: bool) -> torch.nn.Module:
        compiled.append(model)
        return compiler(model, **options)

    monkeypatch.setattr(torch, "compile", compile_model)
    for first, second in ((["--compile"], []), ([], ["--compile"])):
        out = tmp_path / f"run{len(compiled)}"
        train(task, caches[task], out, "--epochs", "2", "--stop-after", "1", *first)
        train(task, caches[task], out, "--epochs", "2", "--resume", *second)
        evaluate(task, caches[task], "--checkpoint", out / "last.pt", "--split", "val")
    train(task, caches[task], tmp_path / "bare", "--epochs", "2")
    bare = load_checkpoint(tmp_path / "bare" / "last.pt")["model"]
    assert len(compiled) == 2
    for run in ("run0", "run1"):
        model = load_checkpoint(tmp_path / run / "last.pt")["model"]
        assert model.keys() == bare.keys()  # not those of the wrapper, which begin with _orig_mod
        for name, weight in bare.items():
            torch.testing.assert_close(model[name], weight, rtol=0.05, atol=5e-3)


@TASKS
def test_gradients_are_clipped_to_1_between_backward_and_step(caches, tmp_path, task, monkeypatch):
    clipped = []

    def clip_to_nothing(parameters: Iterator, largest: float) -> None:
        parameters = list(parameters)
        assert all(parameter.grad is not None for parameter in parameters)
        clipped.append(largest)
        for parameter in parameters:
            parameter.grad.zero_()

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_to_nothing)
    options = ["--weight-decay", "0", "--epochs", "2"]
    train(task, caches[task], tmp_path / "run", *options)
    after = load_checkpoint(tmp_path / "run" / "last.pt")
    steps = int(after["optimizer"]["state"][0]["step"])
    assert clipped == [1.0] * steps and steps >= 4
    before = {}
    build = module(task, "train").build_model

    def keep_first_weights(*args: object) -> torch.nn.Module:
        model = build(*args)
        before.update({name: weight.clone() for name, weight in model.named_parameters()})
        return model

    monkeypatch.setattr(module(task, "train"), "build_model", keep_first_weights)
    train(task, caches[task], tmp_path / "again", *options)
    assert all(torch.equal(after["model"][name], weight) for name, weight in before.items())


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    learning_rate = module("classification", "train").learning_rate
    rates = [learning_rate(step, 200, 1.0) for step in range(200)]
    assert rates[:11] == pytest.approx([*(k / 10 for k in range(1, 11)), 1.0])  # 5 % of the steps
    assert rates[10 + 95] == pytest.approx(0.5)
    assert rates[10 + 38] == pytest.approx(0.5 + 0.5 * math.cos(0.2 * math.pi))
    assert (
        rates[-1] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 190)) and min(rates) == rates[-1]
    )
    assert learning_rate(0, 1, 0.3) == 0.3


@TASKS
def test_every_step_has_its_learning_rate(caches, tmp_path, task, monkeypatch):
    script, asked = module(task, "train"), []
    monkeypatch.setattr(
        script, "learning_rate", lambda *args: asked.append(args) or 1e-3 * len(asked)
    )
    train(task, caches[task], tmp_path, "--epochs", "3", "--lr", "0.25")
    steps = len(asked) // 3
    assert asked == [(k, 3 * steps, 0.25) for k in range(3 * steps)]
    last = load_checkpoint(tmp_path / "last.pt")
    assert [row["lr"] for row in last["log"]] == pytest.approx(
        [1e-3 * steps * k for k in (1, 2, 3)]
    )
    assert {group["lr"] for group in last["optimizer"]["param_groups"]} == {1e-3 * len(asked)}


def test_class_weights_and_label_smoothing_are_in_the_loss(tmp_path, monkeypatch):
    cache = draw_images(tmp_path / "cache", "classification")

    def draw(k: int, row: dict) -> None:
        row["label"] = int(k in (1, 2, 4))  # one of two in fold 0, two of 16 in fold 1
        if row["fold"] != "test":
            row["fold"] = "0" if k < 2 else "1"

    change_rows(cache, draw)
    script = module("classification", "train")
    logits = torch.tensor([2.0, 0.0])  # whatever comes in

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(logits.clone())

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(images), 2)

    monkeypatch.setattr(script, "build_model", lambda *_: Constant())
    options = ["--batch-size", "16", "--lr", "1e-12", "--weight-decay", "0"]  # one step with all 16

    def loss(*more: str) -> float:
        train("classification", cache, tmp_path / "run", *options, *more, "--overwrite")
        return load_checkpoint(tmp_path / "run" / "last.pt")["log"][0]["train_loss"]

    no, yes = (-logits.log_softmax(0)).tolist()
    assert loss() == pytest.approx((14 * no + 2 * yes) / 16, rel=1e-5)
    balanced = (14 * no * 16 / (2 * 14) + 2 * yes * 16 / (2 * 2)) / 16
    assert loss("--class-weights", "balanced") == pytest.approx(balanced, rel=1e-5)
    no, yes = 0.9 * no + 0.1 * (no + yes) / 2, 0.9 * yes + 0.1 * (no + yes) / 2
    assert loss("--label-smoothing", "0.1") == pytest.approx((14 * no + 2 * yes) / 16, rel=1e-5)


@TASKS
def test_options_reach_the_training(caches, tmp_path, task):
    """Each of them alone changes the weights."""
    options = ["", "--seed 1", "--lr 2e-3", "--weight-decay 9", "--augment 0.5", "--fold 1"]
    options += {
        "classification": ["--flip", "--label-smoothing 0.2"],
        "detection": ["--loss smooth_l1", "--head linear"],
        "segmentation": ["--mirror", "--loss dice", "--dims 3 --batch-size 2", "--patch 4 6"],
    }[task]
    seen = {}
    for some in options:
        train(task, caches[task], tmp_path / "run", *some.split(), "--overwrite")
        model = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
        total = sum(
            weight.double().abs().sum().item() for weight in model.values() if weight.ndim > 1
        )
        assert total not in seen, (some, seen.get(total))
        seen[total] = some


# --- eval.py ---


@XRAYS
def test_several_networks_are_averaged(task):
    evaluation = module(task, "eval")
    meta = {"meta": {"mean": 0, "std": 1}, "settings": {"amp": "off"}}
    truth = torch.zeros(2, dtype=torch.long)
    first = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    second = torch.tensor([[0, 3.0, 0, 0], [1, 1, 1, 1]])
    with pytest.MonkeyPatch.context() as patch:
        found = iter([first, second])
        patch.setattr(evaluation, "evaluate", lambda *_: (next(found), truth))
        mean, _ = evaluation.predict([None, None], [meta, meta], [], torch.device("cpu"), None)
    if task == "classification":
        first, second = first.softmax(1), second.softmax(1)
    assert torch.allclose(mean, (first + second) / 2)


def test_several_networks_of_volumes_are_averaged(monkeypatch):
    evaluation = module("segmentation", "eval")
    parts = [
        torch.rand(2, 3, 3, 3).half(),
        torch.rand(2, 3, 3, 3).half(),
        torch.rand(2, 3, 3, 3).half(),
    ]
    found = iter([part.clone() for part in parts])
    monkeypatch.setattr(evaluation, "predict_volume", lambda *_: next(found))
    settings = {"patch": [3, 3], "batch_size": 1, "amp": "off", "mirror": False}
    checkpoint = {"settings": settings, "meta": {"slice_axis": 2}}
    mean = evaluation.predict(
        [None] * 3, [checkpoint] * 3, np.zeros(0), torch.device("cpu"), None, False
    )
    assert torch.allclose(mean.float(), torch.stack(parts).float().mean(0), atol=2e-3)


def test_metrics_of_a_site_are_those_of_its_images(tmp_path, monkeypatch):
    cache = draw_images(tmp_path / "cache", "detection")
    change_rows(cache, lambda k, row: row.update(site="ab"[k % 4 < 2], fold="0" if k < 8 else "1"))
    train("detection", cache, tmp_path / "run")
    evaluation = module("detection", "eval")
    real = evaluation.evaluate

    def evaluate_shifted(*args: object) -> tuple:
        _, boxes = real(*args)
        shift = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0, 1, 0]) / 32
        return boxes + shift, boxes  # box k lies k pixels aside, of 8

    monkeypatch.setattr(evaluation, "evaluate", evaluate_shifted)
    evaluate("detection", cache, "--checkpoint", tmp_path / "run" / "best.pt")
    summary = read_metrics(tmp_path / "run" / "eval_val")["summary"]
    iou = [(8 - k) / (8 + k) for k in range(8)]
    for name, rows in (("_b", (0, 1, 4, 5)), ("_a", (2, 3, 6, 7)), ("", range(8))):
        expected = sum(iou[k] for k in rows) / len(rows)
        assert summary[f"mean_iou{name}"]["value"] == pytest.approx(expected, abs=1e-6)
        assert summary[f"mae_px{name}"]["value"] == pytest.approx(
            sum(rows) / len(rows) / 2, abs=1e-5
        )


def test_masks_are_written_with_the_values_of_the_files(caches, tmp_path, monkeypatch):
    train("segmentation", caches["segmentation"], tmp_path)
    half = torch.zeros(2, 8, 8, 8, dtype=torch.float16)
    half[0, :, :, :4], half[1, :, :, 4:] = 1, 1
    monkeypatch.setattr(module("segmentation", "eval"), "predict_volume", lambda *_: half.clone())
    evaluate("segmentation", caches["segmentation"], "--checkpoint", tmp_path / "best.pt")
    for name in ("v0", "v4"):
        mask = np.asanyarray(
            nib.load(tmp_path / "eval_val" / "predictions" / f"{name}.nii.gz").dataobj
        )
        assert (mask[:, :, :4] == 0).all() and (
            mask[:, :, 4:] == 2
        ).all()  # the cube is 2 in the files
        truth = np.asanyarray(
            nib.load(caches["segmentation"] / "volumes" / f"{name}.truth.nii.gz").dataobj
        )
        dice = 2 * ((mask == 2) & (truth == 2)).sum() / ((mask == 2).sum() + (truth == 2).sum())
        case = next(
            case for case in read_metrics(tmp_path / "eval_val")["cases"] if case["id"] == name
        )
        assert case["dice_cube"] == case["dice"] == pytest.approx(dice)


@TASKS
def test_patients_and_not_images_are_drawn_for_the_intervals(caches, tmp_path, task):
    cache = copy(caches[task], tmp_path / "cache")
    patient = "group" if task == "segmentation" else "patient"
    change_rows(cache, lambda k, row: row.update({patient: "one"}) if row["fold"] == "0" else None)
    train(task, cache, tmp_path / "run")
    evaluate(task, cache, "--checkpoint", tmp_path / "run" / "best.pt")
    summary = read_metrics(tmp_path / "run" / "eval_val")["summary"]
    assert {metric["low"] for metric in summary.values()} == {None}  # one patient has no interval


def test_the_confusion_is_counted_at_a_half_and_the_tables_agree(caches, tmp_path):
    train("classification", caches["classification"], tmp_path, "--epochs", "3", "--lr", "1e-2")
    evaluate("classification", caches["classification"], "--checkpoint", tmp_path / "best.pt")
    with open(tmp_path / "eval_val" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = [(float(row["probability_yes"]) >= 0.5) == (row["label"] == "yes") for row in rows]
    summary = read_metrics(tmp_path / "eval_val")["summary"]
    assert summary["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert {row["split"] for row in rows} == {"val"}
    with open(tmp_path / "eval_val" / "roc.csv", newline="") as file:
        curve = list(csv.DictReader(file))
    assert {row["class"] for row in curve} == {"yes"} and float(curve[-1]["tpr"]) == float(
        curve[-1]["fpr"]
    ) == 1


def test_older_checkpoints_are_evaluated_with_the_scale_of_their_cache(caches, tmp_path):
    cache = caches["classification"]
    train("classification", cache, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    meta = checkpoint["meta"]
    assert meta.pop("per_image")  # which older ones do not have
    save_checkpoint(tmp_path / "old.pt", checkpoint)

    in_fold = [k for k, row in enumerate(read_rows(cache)) if row["fold"] == "0"]
    images = torch.from_numpy(np.load(cache / "images.npy")[in_fold])[:, None] / 255
    std, mean = torch.std_mean(images, (2, 3), keepdim=True)
    one_by_one = (images - mean) / (std + 1e-3)
    by_cache = (images - meta["mean"]) / meta["std"]
    for name, inputs in (("run/best.pt", one_by_one), ("old.pt", by_cache)):
        path = tmp_path / name
        (model,), _ = module("classification", "eval").load_models([path], torch.device("cpu"))
        with torch.no_grad():
            expected = model.eval()(inputs).softmax(1)[:, 1].tolist()
        out = tmp_path / "eval"
        evaluate("classification", cache, "--checkpoint", path, "--out", out)
        found = [float(row["probability_yes"]) for row in read_table(out / "predictions.csv")]
        assert found == pytest.approx(expected, abs=1e-5)
