"""A training in all three tasks: what decides its numbers, how it resumes, what it refuses."""

import functools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint
from common.checkpoint import draw_log, load_checkpoint, save_checkpoint
from tests import caches as kit
from tests.caches import read_table
from tests.conftest import assert_same_training, run_scripts, same, start_script, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def last_of(run: Path) -> dict:
    return load_checkpoint(run / "last.pt")


def record_models(monkeypatch, task: str, hook: Callable = lambda *_: None) -> list[dict]:
    """The first weights of every network that train.py builds from here on, whose calls are hooked."""
    script = kit.module(task, "train")
    build = script.build_model
    weights = []

    def build_and_record(*args: object) -> torch.nn.Module:
        model = build(*args)
        model.register_forward_pre_hook(hook)
        weights.append({name: value.clone() for name, value in model.named_parameters()})
        return model

    monkeypatch.setattr(script, "build_model", build_and_record)
    return weights


# --- what decides the numbers ---


@kit.TASKS
def test_each_option_alone_changes_the_weights(caches, tmp_path, task):
    options = ["", "--seed 1", "--lr 2e-3", "--weight-decay 9", "--augment 0.5", "--fold 1"]
    options += {
        "classification": ["--flip", "--loss smooth_ce"],
        "detection": ["--loss smooth_l1", "--loss smooth_l1_giou", "--channels 17"],
        "segmentation": ["--loss dice", "--dims 3 --batch-size 2", "--patch 4 6"],
    }[task]
    seen = {}
    for number, some in enumerate(options):
        kit.train(task, caches[task], tmp_path / f"run{number}", some)
        model = last_of(tmp_path / f"run{number}")["model"]
        total = sum(w.double().abs().sum().item() for w in model.values() if w.ndim > 1)
        assert total not in seen, (some, seen.get(total))
        seen[total] = some


@kit.TASKS
def test_every_random_number_depends_on_the_seed(caches, tmp_path, task, monkeypatch):
    """First weights, order of the images, and the draws of every step and epoch."""
    real = np.random.default_rng
    seeds = {2: [], 4: []}  # by their number of values: (seed, epoch) or with step and rank

    def record(seed: object) -> np.random.Generator:
        if isinstance(seed, tuple):
            seeds[len(seed)].append(seed)
        return real(np.abs(seed))

    weights = record_models(monkeypatch, task)
    monkeypatch.setattr(np.random, "default_rng", record)
    for number, seed in enumerate((5, 5, 6)):
        kit.train(task, caches[task], tmp_path / f"run{number}", f"--seed {seed} --epochs 2")
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])
    assert seeds[2] == [(seed, e) for seed in (5, 5, 6) for e in (0, 1)]
    steps = len(seeds[4]) // 6
    assert steps >= 2
    assert seeds[4] == [(*order, s + 1, 0) for order in seeds[2] for s in range(steps)]
    seeds[4].clear()
    other = (torch.device("cpu"), -1, 1)  # a rank that no other process has
    monkeypatch.setattr(kit.module(task, "train"), "start_processes", lambda *_: other)
    kit.train(task, caches[task], tmp_path / "other")
    assert seeds[4] == [(0, 0, s + 1, -1) for s in range(steps)]


@kit.TASKS
def test_a_step_and_a_validation_have_their_rows_modes_and_precision(
    caches, tmp_path, task, monkeypatch
):
    """And the gradients are clipped to 1 before they are applied."""
    script = kit.module(task, "train")
    batches = script.dataset.EpochBatches
    losses = dict(script.LOSSES)
    rows = []
    modes = []
    types = set()
    clipped = []

    def record_mode(model: torch.nn.Module, _: tuple) -> None:
        modes.append((model.training, torch.is_grad_enabled()))

    def record_rows(*args: object) -> object:
        rows.extend(next(arg for arg in args if isinstance(arg, list)))
        return batches(*args)

    def record_type(outputs: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        types.add(outputs.dtype)
        return next(iter(losses.values()))(outputs, *rest)

    def clip_to_nothing(parameters: Iterator, largest: float) -> None:
        clipped.append(largest)
        for parameter in parameters:
            parameter.grad.zero_()

    monkeypatch.setattr(script.dataset, "EpochBatches", record_rows)
    monkeypatch.setattr(script, "LOSSES", dict.fromkeys(losses, record_type))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_to_nothing)
    weights = record_models(monkeypatch, task, record_mode)
    kit.train(task, caches[task], tmp_path / "run", "--amp bf16 --epochs 2 --weight-decay 1e-12")
    index = kit.read_rows(caches[task])
    assert rows == [k for k, row in enumerate(index) if row["fold"] in ("1", "2")]
    after = last_of(tmp_path / "run")
    steps = int(after["optimizer"]["state"][0]["step"])
    assert steps >= 4 and modes.count((True, True)) == steps and clipped == [1.0] * steps
    assert set(modes) == {(True, True), (False, False)}
    assert types == {torch.float32}
    groups = after["optimizer"]["param_groups"]
    assert [group["weight_decay"] > 0 for group in groups] == [True, False]  # norms, biases: none
    assert all(torch.equal(after["model"][name], weight) for name, weight in weights[0].items())


@kit.TASKS
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(caches, tmp_path, task):
    script = kit.module(task, "train")
    optimizer = script.make_optimizer(torch.nn.Linear(1, 1), 1.0, 0.0)
    args = script.parse_args(["--lr", "1", "--epochs", "4", "--out", str(tmp_path)])
    rates = []
    for epoch in range(4):
        for step in range(1, 51):
            rates.append(script.set_learning_rate(optimizer, args, epoch, step, 50))
            assert [group["lr"] for group in optimizer.param_groups] == 2 * rates[-1:]
    assert rates[:11] == pytest.approx([*(k / 10 for k in range(1, 11)), 1.0])  # 5 % of the steps
    assert rates[10 + 95] == pytest.approx(0.5)
    assert rates[10 + 38] == pytest.approx(0.5 + 0.5 * math.cos(0.2 * math.pi))
    assert rates[-1] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 190))
    kit.train(task, caches[task], tmp_path / "run", "--epochs 3 --lr 0.25")
    log = last_of(tmp_path / "run")["log"]
    assert log[0]["lr"] > log[1]["lr"] > log[2]["lr"] > 0


# --- resume ---


@kit.TASKS
def test_stop_and_resume_equal_the_straight_run_with_any_workers(caches, tmp_path, task):
    kit.train(task, caches[task], tmp_path / "straight", "--epochs 3")
    resumed = tmp_path / "resumed"
    kit.train_until(2, task, caches[task], resumed, "--epochs 3 --workers 1")
    (resumed / "log.csv").write_text("rows of an epoch that was lost\n" * 5)
    kit.train(task, caches[task], resumed, "--epochs 3 --resume")
    assert_same_training(tmp_path / "straight", resumed)
    assert [row["epoch"] for row in read_table(resumed / "log.csv")] == ["1", "2", "3"]


def test_a_killed_or_interrupted_run_resumes_to_the_bit(caches, tmp_path):
    script = kit.ROOT / "segmentation" / "train.py"
    options = f"--epochs 20 --workers 0 --device cpu {kit.SMALL['segmentation']}"
    words = kit.split_words("--data", caches["segmentation"], options)
    done = run_scripts(script, *words, "--out", "straight", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words += ["--out", "stopped"]
    for name, number, status in (("kill", signal.SIGKILL, -9), ("interrupt", signal.SIGINT, 130)):
        more = ["--resume"] if name == "interrupt" else []
        process = start_script(script, *words, *more, cwd=tmp_path, name=name)
        wait_for("epoch ", tmp_path / f"{name}.out")
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == status
    assert (tmp_path / "interrupt.err").read_text() == "interrupted\n"
    done = run_scripts(script, *words, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "straight", tmp_path / "stopped")
    assert set(kit.contents(tmp_path / "stopped")) == {"last.pt", "best.pt", "log.csv", "log.png"}


@kit.TASKS
def test_two_processes_resume_and_are_evaluated_as_one(caches, tmp_path, task):
    size, workers = (4, "") if task == "segmentation" else (3, "--workers 0")
    words = kit.split_words("--data", caches[task], "--device cpu", workers)
    options = kit.split_words(
        "--epochs 2 --workers 0 --out run", kit.SMALL[task], "--batch-size", size
    )
    done = run_scripts(kit.ROOT / task / "train.py", *words, *options, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 ") == 1  # only rank 0 prints
    last = last_of(tmp_path / "run")
    assert last["settings"]["world_size"] == 2
    score = kit.SCORES[task]
    assert last["log"][-1][f"val_{score}"] == last["metrics"][score]
    # The validation that the ranks share has every image once, and the buffers of rank 0.
    options = ["--checkpoint", "run/last.pt", "--out", "out"]
    done = run_scripts(kit.ROOT / task / "eval.py", *words, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kit.assert_evaluated_as_trained(last["metrics"], tmp_path / "out", 1e-6)
    found = kit.refusal(kit.train, task, caches[task], tmp_path / "run", "--resume")
    assert "world_size 2 (now 1)" in found


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@kit.TASKS
def test_a_compiled_run_resumes_a_bare_one(caches, tmp_path, task, monkeypatch):
    compiler = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    compiled = []
    compile_model = lambda model, **_: compiled.append(1) or compiler(model)  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile_model)
    kit.train(task, caches[task], tmp_path / "bare", "--epochs 2")
    assert not compiled
    kit.train_until(1, task, caches[task], tmp_path / "run", "--epochs 2")
    kit.train(task, caches[task], tmp_path / "run", "--epochs 2 --resume --compile")
    bare, model = (last_of(tmp_path / name)["model"] for name in ("bare", "run"))
    assert compiled and model.keys() == bare.keys()  # not the wrapper's, of _orig_mod
    for name, weight in bare.items():
        torch.testing.assert_close(model[name], weight, rtol=0.05, atol=5e-3)


CHANGES = {  # of meta.json
    "classification": ({"fit": "pad"}, "fit squash (now pad)"),
    "detection": ({"mean": 0.1}, "mean 0.2 (now 0.1)"),
    "segmentation": ({"spacing": [1, 1, 2]}, "spacing [1, 1, 1] (now [1, 1, 2])"),
}


@kit.TASKS
def test_resume_refuses_other_settings_and_another_cache(caches, runs, tmp_path, task):
    cache = kit.copy(caches[task], tmp_path / "cache")
    run = kit.copy(runs[task], tmp_path / "run")
    resume = lambda *options: kit.refusal(kit.train, task, cache, run, "--resume", *options)  # noqa: E731
    assert f"lr 0.001 (now 0.01); to continue from its weights: --init {run}" in resume("--lr 0.01")
    assert "(now 32)" in resume("--channels 32")  # meta.json has channels as well
    assert "epochs 1 (now 9)" in resume("--epochs 9")
    change, message = CHANGES[task]
    kit.change_meta(cache, **change)
    assert message in resume()
    kit.change_rows(cache, lambda k, row: row.update(patient="other"))
    assert "index" in resume()
    (run / "last.pt").write_bytes((run / "best.pt").read_bytes())
    assert "as in a copy of best.pt" in resume()
    (run / "last.pt").unlink()
    assert "no checkpoint here" in resume()


# --- best.pt and validation ---


@pytest.mark.parametrize(
    ("dice", "stop", "best", "last"),
    [
        # Something wrong, then nothing, which is right; of equals the later one
        ([0.0, math.nan, 0.0, math.nan, 0.0], 1, 1, 4),
        ([0.9, 0.8, 0.1], 2, 1, 1),
        ([0.9, 0.8, 0.1], 2, None, 3),  # removed: written again
    ],
)
def test_best_is_that_of_the_highest_score(tmp_path, monkeypatch, dice, stop, best, last):
    cache = kit.draw_volumes(tmp_path / "cache", empty=True)
    scores = iter(torch.tensor(dice, dtype=torch.float64).view(-1, 1, 1))
    monkeypatch.setattr(kit.module("segmentation", "train"), "evaluate", lambda *_: next(scores))
    options = f"--epochs {len(dice)}"
    kit.train_until(stop, "segmentation", cache, tmp_path / "run", options)
    path = tmp_path / "run" / "best.pt"
    assert load_checkpoint(path)["epoch"] == (best or 1)
    if best is None:
        path.unlink()
    kit.train("segmentation", cache, tmp_path / "run", options, "--resume")
    assert load_checkpoint(path)["epoch"] == last


def test_a_validation_every_other_epoch_changes_no_weight(caches, tmp_path):
    cache = caches["segmentation"]
    kit.train("segmentation", cache, tmp_path / "each", "--epochs 5")
    options = "--epochs 5 --validate-every 2"
    kit.train_until(3, "segmentation", cache, tmp_path / "other", options)
    assert last_of(tmp_path / "other")["metrics"] == {}
    kit.train("segmentation", cache, tmp_path / "other", options, "--resume")
    each = last_of(tmp_path / "each")
    other = last_of(tmp_path / "other")
    assert same(each["model"], other["model"]) and each["metrics"] == other["metrics"]
    scores = [row["val_dice"] for row in each["log"]]
    expected = [None, scores[1], None, scores[3], scores[4]]
    assert [row.get("val_dice") for row in other["log"]] == expected


@kit.TASKS
def test_a_training_on_all_folds_leaves_out_the_test_set_alone(caches, tmp_path, task, capsys):
    cache = caches[task]
    run = tmp_path / "run"
    kit.train(task, cache, run, "--fold -1 --epochs 2")
    command = f"next: python {task}/eval.py --data {cache} --checkpoint {run}/last.pt --split test"
    assert command in capsys.readouterr().out
    assert not (run / "best.pt").exists()
    hashes = [checkpoint.hash_row(row) for row in kit.read_rows(cache) if row["fold"] != "test"]
    assert last_of(run)["trained_on"] == sorted(set().union(*hashes))
    assert not any(name.startswith("val_") for name in read_table(run / "log.csv")[1])
    found = kit.refusal(kit.evaluate, task, cache, f"--checkpoint {run}/last.pt")
    assert "left no fold out (--fold -1); use --split test" in found
    kit.evaluate(task, cache, f"--checkpoint {run}/last.pt --split test")
    assert not any(name.endswith("_tuned") for name in kit.report(run / "eval_test")["summary"])


def test_log_png_marks_each_value_where_it_belongs():
    log = []
    for epoch, loss, auroc in ((1, 1.0, 0.5), (2, 0.5, 0.9), (3, 0.0, math.nan)):
        log.append({"epoch": epoch, "train_loss": loss, "val_auroc": auroc})
    picture = np.asarray(draw_log(log, "val_auroc", 2)).astype(int)
    blue = (picture == (0x1F, 0x4E, 0x9C)).all(-1)
    red = (picture == (0xC0, 0x39, 0x2B)).all(-1)
    for y, x in ((50, 70), (200, 270), (350, 470)):  # falls from left to right
        assert blue[y - 5 : y + 5, x - 4 : x + 4].any()
    for y, x in ((350, 570), (50, 770)):
        assert red[y - 5 : y + 5, x - 4 : x + 4].any()
    assert not red[60:360, 790:].any()  # NaN is no point
    best = (picture == 0x99).all(-1)
    assert best[100:300, 270].mean() > 0.9 and not best[100:300, 200].any()


# --- what is no number ---


@kit.TASKS
def test_a_network_that_gives_nan_has_no_score(caches, runs, tmp_path, task, monkeypatch):
    def break_weights(model: torch.nn.Module) -> torch.nn.Module:
        for weight in model.parameters():
            weight.data.fill_(math.nan)
        return model.train(False)

    monkeypatch.setattr(torch.nn.Module, "eval", break_weights)
    found = kit.refusal(kit.train, task, caches[task], tmp_path / "run")
    assert "the network gives NaN or infinite values; lower --lr" in found
    assert kit.contents(tmp_path / "run") == {}
    options = f"--checkpoint {runs[task]}/best.pt --out {tmp_path}/out"
    assert "the network gives NaN" in kit.refusal(kit.evaluate, task, caches[task], options)
    assert not (tmp_path / "out").exists()


@kit.TASKS
def test_a_loss_or_weights_that_are_not_finite_stop(caches, runs, tmp_path, task, monkeypatch):
    broken = load_checkpoint(runs[task] / "best.pt")
    name = next(name for name, weight in broken["model"].items() if weight.ndim > 1)
    broken["model"][name].flatten()[0] = math.nan
    path = tmp_path / "nan.pt"
    save_checkpoint(path, broken)
    expected = f"nan.pt: {name} holds NaN or infinite weights"
    run = tmp_path / "run"
    assert expected in kit.refusal(kit.train, task, caches[task], run, f"--init {path}")
    assert expected in kit.refusal(kit.evaluate, task, caches[task], f"--checkpoint {path}")
    losses = {name: lambda *args: args[0].sum() * math.inf for name in ("ce", "mse", "dice_ce")}
    monkeypatch.setattr(kit.module(task, "train"), "LOSSES", losses)
    assert "epoch 1: the loss is" in kit.refusal(kit.train, task, caches[task], run)


# --- what was trained on ---


# How a row of another cache may differ from the row that was trained on
@pytest.mark.parametrize("changed", ["nothing", "patient", "digest"])
@kit.TASKS
def test_eval_refuses_images_and_patients_of_the_training(caches, runs, tmp_path, task, changed):
    options = f"--checkpoint {runs[task]}/best.pt --split test --out {tmp_path}/out"
    cache = kit.copy(caches[task], tmp_path / "cache")
    kit.change_rows(cache, lambda k, row: row.update({"fold": "test", changed: f"x{k}"}))
    count = "4 of these 8" if task == "segmentation" else "12 of these 24"
    assert f"trained on {count} images" in kit.refusal(kit.evaluate, task, cache, options)


@kit.TASKS
def test_patients_on_both_sides_of_an_official_split_are_counted(caches, tmp_path, task, capsys):
    cache = kit.copy(caches[task], tmp_path / "cache")
    shared = {}  # the first row of fold 1 and of the test set

    def share_a_patient(k: int, row: dict) -> None:
        row["split"] = "test" if row["fold"] == "test" else "train"
        if row["fold"] in ("1", "test") and shared.setdefault(row["fold"], k) == k:
            row["patient"] = "both"

    kit.change_rows(cache, share_a_patient)
    kit.train(task, cache, tmp_path / "run")
    options = f"--checkpoint {tmp_path}/run/best.pt --split test"
    kit.evaluate(task, cache, options)
    count = "1 of 2" if task == "segmentation" else "1 of 6"
    said = f"{count} images are of patients in training, by the official split"
    assert said in " ".join(capsys.readouterr().out.split())
    # Another cache has a split of its own, and a column fold is no official split.
    for change in ({"more": ""}, {"split": ""}):
        kit.change_rows(cache, lambda k, row, change=change: row.update(change))
        assert "trained on 1 of these" in kit.refusal(kit.evaluate, task, cache, options)


@kit.TASKS
def test_eval_knows_what_init_was_trained_on(caches, runs, tmp_path, task, capsys):
    kit.train(task, caches[task], tmp_path / "run", f"--init {runs[task]}/best.pt --fold 1")
    count = "2 of 2" if task == "segmentation" else "6 of 6"
    assert f"--init was trained on {count} rows of the validation" in capsys.readouterr().out
    kit.train(task, caches[task], tmp_path / "again", f"--init {tmp_path}/run/best.pt --fold 1")
    for run in ("run", "again"):
        options = f"--checkpoint {tmp_path}/{run}/best.pt"
        assert "images or patients" in kit.refusal(kit.evaluate, task, caches[task], options)


# --- --init ---


@pytest.mark.parametrize(
    ("task", "prefix", "new"), [("classification", "", "fc"), ("detection", "backbone.", "out")]
)
def test_init_takes_what_fits(caches, runs, tmp_path, capsys, task, prefix, new):
    cache = kit.copy(caches[task], tmp_path / "cache")
    if task == "classification":
        names = ["no", "yes", "perhaps"]
        kit.change_meta(cache, classes=names)
        kit.change_rows(cache, lambda k, row: row.update(label=names[k % 3], fold=str(k // 3 % 2)))
    init = runs["classification"] / "best.pt"
    kit.train(task, cache, tmp_path / "run", f"--init {init} --lr 1e-12 --weight-decay 0")
    said = f"--init {init}: 7 of 9 arrays taken, 2 at random: {new}.bias, {new}.weight"
    assert said in capsys.readouterr().out
    old = load_checkpoint(init)["model"]["conv1.weight"]
    assert torch.allclose(last_of(tmp_path / "run")["model"][f"{prefix}conv1.weight"], old)
    options = f"--init {runs['segmentation']}/best.pt"
    found = kit.refusal(kit.train, task, cache, tmp_path / "other", options)
    assert "none of its weights has the name and the shape" in found


# --- caches that are not what they should be ---


def as_signed(array: bytes) -> bytes:
    return array.replace(b"'|u1'", b"'|i1'").replace(b"'<f2'", b"'<i2'")


# What becomes of the bytes of a file, or of the values of all rows
DAMAGED = [("meta.json", lambda _, text=text: text) for text in (b"{}", b"[]", 100_000 * b"[")]
DAMAGED += [("meta.json", lambda meta: meta.replace(b'"format": 1', b'"format": 0'))]
DAMAGED += [("index.csv", lambda index: b""), ("index.csv", lambda index: index.rsplit(b",", 3)[0])]
DAMAGED += [("index.csv", lambda index: index.rstrip().rpartition(b"\n")[0])]
DAMAGED += [("*.npy", lambda array: array[:-50]), ("*.npy", as_signed), {"fold": "5"}]


@kit.TASKS
def test_a_bad_cache_is_one_line(caches, runs, tmp_path, task):
    missing = [{"id": "v99"}] if task == "segmentation" else []
    for number, change in enumerate(DAMAGED + missing):
        cache = kit.copy(caches[task], tmp_path / f"cache{number}")
        if isinstance(change, dict):
            kit.change_rows(cache, lambda k, row, change=change: row.update(change))
        else:
            path = min(cache.rglob(change[0]))
            before = path.read_bytes()
            path.write_bytes(change[1](before))
            assert path.read_bytes() != before
        found = kit.refusal(kit.train, task, cache, tmp_path / "run")
        assert str(cache) in found and not (tmp_path / "run").exists(), number
    for other in set(kit.NAMES) - {task}:
        expected = f"made for {other}, expected {task}"
        assert expected in kit.refusal(kit.train, task, caches[other], tmp_path / "run")
        options = f"--checkpoint {runs[other]}/best.pt"
        assert expected in kit.refusal(kit.evaluate, task, caches[task], options)


@kit.TASKS
def test_a_fold_or_batch_that_leaves_nothing_says_what_to_do(caches, tmp_path, task):
    cache = kit.copy(caches[task], tmp_path / "cache")
    kit.change_rows(cache, lambda k, row: row.update(fold="1"))
    found = kit.refusal(kit.train, task, cache, tmp_path / "run")
    assert "fold 0 leaves no validation" in found and not (tmp_path / "run").exists()
    if task == "classification":
        assert "12 patients in all (--patient-regex" in found and "--fold -1" in found
    found = kit.refusal(kit.train, task, caches[task], tmp_path / "run", "--batch-size 1000")
    assert "less than one batch of --batch-size 1000 in each of 1 processes" in found


# --- options and devices ---

IMPOSSIBLE = [f"--seed {2**64}", "--augment 1000", "--lr nan", "--weight-decay inf"]
IMPOSSIBLE += ["--batch-size 0", "--workers 99999999999", "--channels 99999999999", "--channels 1"]


@kit.TASKS
def test_options_beyond_their_bounds_exit_with_status_2(task, capsys):
    for option in IMPOSSIBLE:
        with pytest.raises(SystemExit, match="2"):
            kit.module(task, "train").main(["--data", "x", *option.split()])
        assert option.split()[0] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    choose_device = kit.module("classification", "train").choose_device
    for name in ("cuda:7", "hpu", "nonsense"):
        assert f"--device {name}: " in kit.refusal(choose_device, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"


# --- speed: nothing in a step waits for the device ---


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", "--flip --class-weights balanced --loss smooth_ce"),
        ("detection", "--loss smooth_l1_giou"),
        ("segmentation", ""),
        ("segmentation", "--dims 3 --loss dice"),
    ],
)
def test_a_step_reads_nothing_from_the_device(caches, tmp_path, monkeypatch, task, options):
    """A GPU would stand still. Device meta has no values: there every read raises."""
    script = kit.module(task, "train")
    generator = torch.Generator
    optimizer = script.AdamW

    def stop(loss_sum: torch.Tensor, steps_per_epoch: int, *_: object) -> None:
        assert loss_sum.device.type == "meta"
        assert 2 <= steps_per_epoch < 20  # the loop reads the loss every 20 steps
        raise kit.Stopped

    def make_adamw(groups: list[dict], fused: bool, **rates: float) -> torch.optim.Optimizer:
        assert fused  # the other kernels read the number of the step
        return optimizer(groups, **rates)

    monkeypatch.setattr(script, "mean_loss", stop)
    monkeypatch.setattr(script, "AdamW", make_adamw)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with pytest.raises(kit.Stopped):
        kit.train(task, caches[task], tmp_path / "run", "--device meta --batch-size 2", options)


# --- learning ---


def test_a_few_volumes_are_learned_by_heart(tmp_path):
    cache = kit.draw_volumes(tmp_path / "cache")
    # The second half, for training, is a copy of the first.
    kit.change_rows(cache, lambda k, row: row.update(fold="01"[k // 4], id=f"v{k % 4}"))
    options = "--dims 3 --batch-size 1 --epochs 30 --channels 16 --augment 0 --weight-decay 0"
    kit.train("segmentation", cache, tmp_path / "run", options)
    assert last_of(tmp_path / "run")["metrics"]["dice"] > 0.9  # with six seeds each reached 1
