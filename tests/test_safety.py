"""Nothing misleading is printed and nothing of the user's is lost: train.py and eval.py."""

import csv
import gc
import json
import math
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint as checkpoints
from common.checkpoint import (
    CheckpointError,
    hold_folder,
    load_checkpoint,
    save_checkpoint,
    written,
)
from detection.dataset import inverse
from segmentation.preprocess import META
from tests.caches import (
    change_meta,
    change_rows,
    copy,
    draw_cache,
    draw_images,
    draw_volumes,
    evaluate,
    module,
    read_rows,
    small_network,
    train,
    write_index,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TASKS = pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
XRAYS = pytest.mark.parametrize("task", ["classification", "detection"])
FIGURE = {"classification": "auroc", "detection": "mean_iou", "segmentation": "dice"}
ERRORS = (ValueError,)  # DataError of each task and CheckpointError


def refusal(call, *args: object) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ERRORS) as caught:
        call(*args)
    assert type(caught.value).__name__ in ("DataError", "CheckpointError")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_network():
        yield


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return {task: draw_cache(folder / task, task) for task in FIGURE}


@pytest.fixture(scope="module")
def runs(caches, tmp_path_factory) -> dict[str, Path]:
    """A training of one epoch on each cache, validated on fold 0."""
    folder = tmp_path_factory.mktemp("runs")
    for task, cache in caches.items():
        train(task, cache, folder / task)
    return {task: folder / task for task in caches}


# --- a network that gives NaN has no score ---


def give_nan(monkeypatch, task: str, script: str) -> None:
    """The networks of this script give NaN instead of what they find."""
    if task == "segmentation":
        nothing = torch.full((2, 8, 8, 8), math.nan, dtype=torch.float16)
        monkeypatch.setattr(module(task, script), "predict_volume", lambda *_: nothing.clone())
        return
    real = module(task, script).evaluate

    def evaluate_nan(*args: object) -> tuple:
        outputs, truth = real(*args)
        outputs[0] = math.nan  # one image is enough
        return outputs, truth

    monkeypatch.setattr(module(task, script), "evaluate", evaluate_nan)


@TASKS
def test_training_stops_where_the_network_gives_nan(caches, tmp_path, task, monkeypatch):
    give_nan(monkeypatch, task, "train")
    assert "the network gives NaN or infinite values; lower --lr" in refusal(
        train, task, caches[task], tmp_path
    )
    assert contents(tmp_path) == {}


@TASKS
def test_eval_gives_no_figures_of_nan(caches, runs, tmp_path, task, monkeypatch):
    give_nan(monkeypatch, task, "eval")
    options = ("--checkpoint", runs[task] / "best.pt", "--out", tmp_path / "out")
    assert "the network gives NaN" in refusal(evaluate, task, caches[task], *options)
    assert not (tmp_path / "out" / "metrics.json").exists()


@TASKS
def test_weights_that_are_nan_are_named(caches, runs, tmp_path, task):
    broken = load_checkpoint(runs[task] / "best.pt")
    name = next(name for name, weight in broken["model"].items() if weight.ndim > 1)
    broken["model"][name].flatten()[0] = math.nan
    save_checkpoint(tmp_path / "nan.pt", broken)
    expected = f"nan.pt: {name} holds NaN or infinite weights"
    assert expected in refusal(
        train, task, caches[task], tmp_path / "run", "--init", str(tmp_path / "nan.pt")
    )
    assert expected in refusal(evaluate, task, caches[task], "--checkpoint", tmp_path / "nan.pt")


# --- best.pt ---


def test_best_is_there_although_all_masks_are_empty(tmp_path, monkeypatch):
    cache = draw_volumes(tmp_path / "cache", empty=True)
    dice = iter(
        [0.0, math.nan, 0.0, math.nan, 0.0]
    )  # something wrong, then nothing, which is right
    train_module = module("segmentation", "train")
    one = torch.ones(1, 1, dtype=torch.float64)
    monkeypatch.setattr(train_module, "evaluate", lambda *_: next(dice) * one)
    train("segmentation", cache, tmp_path / "run", "--epochs", "5", "--stop-after", "1")
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 1
    train("segmentation", cache, tmp_path / "run", "--epochs", "5", "--resume")
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 4  # of equals the later one
    monkeypatch.undo()
    evaluate("segmentation", cache, "--checkpoint", tmp_path / "run" / "best.pt")
    summary = json.loads((tmp_path / "run" / "eval_val" / "metrics.json").read_text())["summary"]
    assert summary["volume_error_ml"]["value"] >= 0


def test_resume_without_best_writes_it_again(caches, tmp_path, monkeypatch):
    dice = iter([0.9, 0.8, 0.1])
    one = torch.ones(1, 1, dtype=torch.float64)
    monkeypatch.setattr(module("segmentation", "train"), "evaluate", lambda *_: next(dice) * one)
    train("segmentation", caches["segmentation"], tmp_path, "--epochs", "3", "--stop-after", "2")
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 1
    (tmp_path / "best.pt").unlink()
    train("segmentation", caches["segmentation"], tmp_path, "--epochs", "3", "--resume")
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 3


# --- what a checkpoint belongs to ---


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("classification", {"fit": "pad"}, "fit squash (now pad)"),
        ("classification", {"std": 0.3}, "std 0.2 (now 0.3)"),
        ("detection", {"mean": 0.1}, "mean 0.2 (now 0.1)"),
        ("segmentation", {"spacing": [1, 1, 2]}, "spacing [1, 1, 1] (now [1, 1, 2])"),
    ],
)
def test_resume_refuses_images_prepared_in_another_way(
    caches, runs, tmp_path, task, change, message
):
    cache, run = copy(caches[task], tmp_path / "cache"), copy(runs[task], tmp_path / "run")
    change_meta(cache, **change)
    assert message in refusal(train, task, cache, run, "--resume")


def test_resume_refuses_arrays_of_another_size(caches, runs, tmp_path):
    cache = copy(caches["segmentation"], tmp_path / "cache")
    for kind, shape in (("image", (1, 8, 8, 9)), ("mask", (8, 8, 9))):
        path = cache / "volumes" / f"v3.{kind}.npy"  # a test case: it changes no patch
        np.save(path, np.zeros(shape, np.load(path).dtype))
    assert "array_bytes" in refusal(train, "segmentation", cache, runs["segmentation"], "--resume")


# --- what was trained on ---


@TASKS
def test_eval_refuses_a_test_set_of_the_training(caches, runs, tmp_path, task):
    cache = copy(caches[task], tmp_path / "cache")
    change_rows(cache, lambda k, row: row.update(fold="test"))  # as --like the training data
    options = ("--checkpoint", runs[task] / "best.pt", "--split", "test")
    count = {"segmentation": "4 of these 8"}.get(task, "12 of these 24")
    assert f"trained on {count} images or patients" in refusal(evaluate, task, cache, *options)
    change_rows(
        cache, lambda k, row: row.update(fold="test" if k == 2 else "0")
    )  # one row, of fold 1
    assert "1 of these 1 images" in refusal(evaluate, task, cache, *options)
    evaluate(task, caches[task], *options)  # its own test set is not


@TASKS
def test_eval_refuses_other_images_of_patients_in_training(tmp_path, task):
    cache = draw_cache(tmp_path / "cache", task)
    patient = "group" if task == "segmentation" else "patient"
    taken = {}

    def move(k: int, row: dict) -> None:
        taken.setdefault(row["fold"], row[patient])
        if row["fold"] == "test":
            row[patient] = taken["1"]

    change_rows(cache, move)
    train(task, cache, tmp_path / "run")
    options = ("--checkpoint", tmp_path / "run" / "best.pt", "--split", "test")
    count = {"segmentation": "2 of these 2"}.get(task, "6 of these 6")
    assert f"trained on {count} images or patients" in refusal(evaluate, task, cache, *options)


@TASKS
def test_eval_knows_what_init_was_trained_on(caches, runs, tmp_path, task, capsys):
    init = ["--init", str(runs[task] / "best.pt"), "--fold", "1"]
    train(task, caches[task], tmp_path / "run", *init)
    count = {"segmentation": "2 of 2"}.get(task, "6 of 6")
    assert f"--init was trained on {count} validation images" in capsys.readouterr().out
    train(
        task,
        caches[task],
        tmp_path / "again",
        "--init",
        str(tmp_path / "run" / "best.pt"),
        "--fold",
        "1",
    )
    for run in ("run", "again"):
        options = ("--checkpoint", tmp_path / run / "best.pt", "--split", "val")
        assert "images or patients" in refusal(evaluate, task, caches[task], *options)


def test_patients_on_both_sides_of_an_official_split_are_counted(tmp_path, capsys):
    cache = draw_images(tmp_path / "cache", "classification")
    change_meta(cache, overlaps={"patients on both sides of an official split": 1})
    change_rows(
        cache, lambda k, row: row.update(patient="p1") if k in (0, 1) else None
    )  # p1 is in fold 1
    train("classification", cache, tmp_path / "run")
    options = ("--checkpoint", tmp_path / "run" / "best.pt")
    evaluate("classification", cache, *options)
    assert (
        "2 of 6 images are of patients in training, by the official split"
        in capsys.readouterr().out
    )
    change_meta(cache, overlaps={})
    assert "trained on 2 of these 6" in refusal(evaluate, "classification", cache, *options)


@TASKS
def test_older_checkpoints_are_evaluated_with_a_note(caches, runs, tmp_path, task, capsys):
    older = load_checkpoint(runs[task] / "best.pt")
    del older["trained_on"], older["task"], older["settings"]["array_bytes"]
    save_checkpoint(tmp_path / "best.pt", older)
    evaluate(task, caches[task], "--checkpoint", tmp_path / "best.pt")
    assert "does not say what it was trained on" in capsys.readouterr().out
    last = load_checkpoint(runs[task] / "last.pt")
    del last["trained_on"], last["task"], last["settings"]["array_bytes"]
    save_checkpoint(tmp_path / "last.pt", last)
    train(task, caches[task], tmp_path, "--resume")  # is done already


# --- --compare ---


@pytest.fixture(scope="module")
def table(caches, runs, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("compare")
    evaluate(
        "classification",
        caches["classification"],
        "--checkpoint",
        runs["classification"] / "best.pt",
        "--out",
        out,
    )
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def other_set(rows: list[dict]) -> None:
    rows[0]["id"] = "i23"


def swapped_label(rows: list[dict]) -> None:
    rows[1]["label"] = rows[0]["label"]


def of_the_test_set(rows: list[dict]) -> None:
    rows[0]["split"] = "test"


def not_a_number(rows: list[dict]) -> None:
    rows[0]["probability_yes"] = "nan"


def beyond_one(rows: list[dict]) -> None:
    rows[0]["probability_yes"] = "7.0"


def doubled(rows: list[dict]) -> None:
    rows.append(rows[0])


def missing(rows: list[dict]) -> None:
    rows.pop()


@pytest.mark.parametrize(
    "change, message",
    [
        (other_set, "1 of 6 images are missing, and 1 are others"),
        (swapped_label, "i1 is no"),
        (of_the_test_set, "of test, expected no of val"),
        (not_a_number, "add up to 1"),
        (beyond_one, "add up to 1"),
        (doubled, "7 rows for 6 images"),
        (missing, "1 of 6 images are missing"),
    ],
)
def test_another_table_is_refused(caches, runs, tmp_path, table, change, message):
    rows = [dict(row) for row in table]
    change(rows)
    write_index(tmp_path, rows)
    options = ("--checkpoint", runs["classification"] / "best.pt", "--out", tmp_path / "out")
    command = (*options, "--compare", tmp_path / "index.csv")
    assert message in refusal(evaluate, "classification", caches["classification"], *command)
    assert not (tmp_path / "out").exists()  # and nothing was written before it was read


def test_the_table_to_compare_with_may_be_the_one_that_is_replaced(caches, runs, tmp_path, table):
    digits = [float(row["probability_yes"]) for row in table]
    assert digits != [round(digit, 6) for digit in digits]
    rows = [dict(row) for row in table]
    for row in rows:  # a model that knows nothing but the labels
        right = row["label"] == "yes"
        row |= {"probability_yes": float(right), "probability_no": float(not right)}
    rows[0] |= {"probability_yes": 1, "probability_no": 0}
    write_index(tmp_path, rows)
    (tmp_path / "index.csv").rename(tmp_path / "predictions.csv")
    options = ("--checkpoint", runs["classification"] / "best.pt", "--out", tmp_path)
    compare = ("--compare", tmp_path / "predictions.csv")
    evaluate("classification", caches["classification"], *options, *compare)
    summary = json.loads((tmp_path / "metrics.json").read_text())["summary"]
    theirs = (3 * 2 + 3 * 0.5) / 9  # of three times three pairs, those with the wrong one are tied
    difference = summary["auroc_difference"]["value"]
    assert difference == pytest.approx(summary["auroc"]["value"] - (6 + 1.5) / 9) and theirs < 1
    evaluate(
        "classification", caches["classification"], *options, *compare
    )  # with itself, to the last digit
    summary = json.loads((tmp_path / "metrics.json").read_text())["summary"]
    assert summary["auroc_difference"]["value"] == 0


def test_several_checkpoints_tune_the_threshold_on_their_mean_probability(caches, runs, tmp_path):
    cache, checkpoint = (
        caches["classification"],
        load_checkpoint(runs["classification"] / "best.pt"),
    )
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path, threshold in zip(
        paths, (0.9, 0.8), strict=True
    ):  # not the mean of what they have themselves
        save_checkpoint(path, checkpoint | {"threshold": threshold})
    evaluation = module("classification", "eval")
    for split in ("val", "test"):
        options = ("--split", split, "--out", tmp_path / split)
        evaluate("classification", cache, "--checkpoint", *paths, *options)
        run = json.loads((tmp_path / split / "metrics.json").read_text())["run"]
        assert run["threshold_tuned"] == pytest.approx(
            checkpoint["threshold"]
        )  # tuned on fold 0 for both
    args = evaluation.parse_args(["--data", str(cache), "--checkpoint", *map(str, paths)])
    other = [load_checkpoint(path) for path in paths]
    other[0]["settings"]["fold"] = 1
    assert evaluation.choose_threshold(args, [], other, torch.device("cpu")) == pytest.approx(0.85)
    assert evaluation.choose_threshold(args, [], other[:1], torch.device("cpu")) == 0.9


# --- nothing is lost ---


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run; the lock of one that failed goes with its process, which is this one."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != ".lock"]
    return {path.name: path.read_bytes() for path in files}


@TASKS
def test_overwrite_replaces_a_training_when_the_new_one_is_written(
    caches, runs, tmp_path, task, monkeypatch
):
    run = copy(runs[task], tmp_path / "run")
    before = contents(run)
    command = (
        task,
        caches[task],
        run,
        "--overwrite",
        "--seed",
        "1",
        "--init",
        str(run / "best.pt"),
    )
    with monkeypatch.context() as patch:
        give_nan(patch, task, "train")  # fails at the end of the first epoch
        refusal(train, *command)
    (tmp_path / "empty").mkdir()
    refusal(train, task, tmp_path / "empty", run, "--overwrite")  # no cache
    assert contents(run) == before
    train(*command)
    assert load_checkpoint(run / "last.pt")["settings"]["seed"] == 1
    assert contents(run).keys() == before.keys() and contents(run) != before


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv"])
def test_any_file_of_a_training_keeps_another_one_out(caches, tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    found = refusal(train, "segmentation", caches["segmentation"], tmp_path)
    assert f"holds a training ({name}); use --resume, --overwrite" in found
    assert contents(tmp_path) == {name: b"x"}


def test_an_older_last_does_not_stay_beside_a_new_best(caches, runs, tmp_path, monkeypatch):
    run = copy(runs["segmentation"], tmp_path / "run")
    real = save_checkpoint

    def full(path: Path, checkpoint: dict) -> None:
        if path.name == "last.pt":
            raise CheckpointError("no space left")
        real(path, checkpoint)

    monkeypatch.setattr(checkpoints, "save_checkpoint", full)
    refusal(train, "segmentation", caches["segmentation"], run, "--overwrite", "--seed", "1")
    assert (
        load_checkpoint(run / "best.pt")["settings"]["seed"] == 1 and not (run / "last.pt").exists()
    )


@XRAYS
def test_a_demo_replaces_a_demo_and_no_training(caches, runs, tmp_path, task, monkeypatch):
    script = module(task, "train")
    monkeypatch.setattr(script, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(script, "prepare_cache", lambda *_: tmp_path / "demo" / "cache")
    demo = copy(caches[task], tmp_path / "demo" / "cache")
    change_rows(demo, lambda k, row: row.update(source="demo"))  # another index
    run = copy(runs[task], tmp_path / "run")
    command = [
        "--out",
        str(run),
        "--epochs",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--batch-size",
        "6",
    ]
    before = contents(run)
    assert "holds a training" in refusal(script.main, command)
    assert contents(run) == before
    for seed in "12":
        script.main([*command, "--out", str(tmp_path / "new"), "--seed", seed])
        assert load_checkpoint(tmp_path / "new" / "last.pt")["settings"]["seed"] == int(seed)


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from common.checkpoint import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_runs_do_not_write_to_one_folder(caches, runs, tmp_path):
    run = copy(runs["segmentation"], tmp_path / "run")
    before = contents(run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, run, ROOT], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    cache = caches["segmentation"]
    for options in (["--overwrite"], ["--resume"]):
        assert "another run writes here" in refusal(train, "segmentation", cache, run, *options)
    options = ("--checkpoint", run / "best.pt", "--out", run)
    assert "another run writes here" in refusal(evaluate, "segmentation", cache, *options)
    assert contents(run) == before
    holder.kill()
    holder.wait()
    train("segmentation", cache, run, "--overwrite")  # a killed run keeps nobody out
    gc.collect()
    assert not (run / ".lock").exists()


def test_a_folder_is_held_once_by_one_process_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), hold_folder(tmp_path / "out"):
            raise KeyError
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_bears_its_name_is_complete(tmp_path):
    path = tmp_path / f"{'x' * 248}.nii.gz"  # the longest name there is
    path.write_text("old")
    with (
        pytest.raises(CheckpointError, match=r"not written \(No space left on device"),
        written(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), written(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {path.name: b"old"}
    with written(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("new")
    assert contents(tmp_path) == {path.name: b"new"}


@TASKS
def test_pictures_of_an_earlier_evaluation_do_not_stay(caches, runs, tmp_path, task):
    options = ("--checkpoint", runs[task] / "best.pt", "--out", tmp_path)
    evaluate(task, caches[task], *options)
    names = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    stale = {
        "classification": "mistakes.png",
        "detection": "gallery.png",
        "segmentation": "worst.gif",
    }[task]
    (tmp_path / stale).write_text("of an earlier run")
    (tmp_path / "mine.png").write_text("mine")
    evaluate(task, caches[task], *options, "--split", "test")
    assert (
        not (tmp_path / stale).exists() or (tmp_path / stale).read_bytes() != b"of an earlier run"
    )
    assert (tmp_path / "mine.png").read_text() == "mine"
    if task == "segmentation":  # the masks of the other split
        assert {path.name for path in (tmp_path / "predictions").iterdir()} == {
            "v3.nii.gz",
            "v7.nii.gz",
        }
        assert "predictions/v0.nii.gz" in names


@TASKS
def test_figures_of_an_earlier_evaluation_are_gone_if_this_one_fails(
    caches, runs, tmp_path, task, monkeypatch
):
    options = ("--checkpoint", runs[task] / "best.pt", "--out", tmp_path)
    evaluate(task, caches[task], *options)
    assert (tmp_path / "metrics.json").exists()

    def full(path: Path, picture: object) -> None:
        raise CheckpointError(f"{path}: not written (No space left on device)")

    monkeypatch.setattr(module(task, "eval"), "save_picture", full)
    assert ".png: not written (No space left" in refusal(evaluate, task, caches[task], *options)
    assert not (tmp_path / "metrics.json").exists()


@TASKS
def test_a_refused_evaluation_makes_no_folder(caches, runs, tmp_path, task):
    options = ("--checkpoint", runs[task] / "best.pt", "--out", tmp_path / "out")
    cache = copy(caches[task], tmp_path / "cache")
    change_rows(cache, lambda k, row: row.update(fold="1"))
    refusal(evaluate, task, cache, *options)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_training_keeps_its_epochs(caches, tmp_path):
    cache, out = caches["segmentation"], tmp_path / "run"
    script = ROOT / "segmentation" / "train.py"
    options = [
        "--data",
        cache,
        "--out",
        out,
        "--epochs",
        "4000",
        "--channels",
        "2",
        "--workers",
        "0",
    ]
    command = [sys.executable, script, *options, "--device", "cpu"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("epoch 2 ") for line in running.stdout)  # until then, or its end
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130 and error == "interrupted\n"
    last = load_checkpoint(out / "last.pt")
    assert last["epoch"] >= 1 and len(last["log"]) == last["epoch"]
    assert {path.name for path in out.iterdir()} == {"last.pt", "best.pt", "log.csv", "log.png"}


def test_what_the_user_cannot_help_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    run_command = module("segmentation", "preprocess").run_command

    def outcome(error: BaseException) -> object:
        def main() -> None:
            raise error

        with pytest.raises((SystemExit, RuntimeError)) as caught:
            run_command(main, CheckpointError)
        return caught.value

    killed = outcome(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"))
    assert killed.code == (
        "error: DataLoader worker (pid(s) 7) exited unexpectedly "
        "(out of memory? use fewer --workers)"
    )
    assert outcome(CheckpointError("a\nb\x1b[31mc")).code == r"error: a b\x1b[31mc"
    assert outcome(OSError(28, "No space left on device", "x.npy")).code.endswith("device: 'x.npy'")
    assert outcome(KeyboardInterrupt()).code == 130
    assert isinstance(outcome(RuntimeError("a bug")), RuntimeError)
    long = outcome(CheckpointError("begin" + 1000 * "x" + "end")).code
    assert len(long) < 320 and long.startswith("error: begin") and long.endswith("end")


# --- caches and checkpoints that are not what they should be ---


def set_row(**values: str):
    return lambda cache: change_rows(cache, lambda k, row: row.update(values) if k == 1 else None)


def set_meta(**values: object):
    return lambda cache: change_meta(cache, **values)


def cut_array(cache: Path) -> None:
    path = sorted(cache.rglob("*.npy"))[0]
    path.write_bytes(path.read_bytes()[:-50])


def long_array(cache: Path) -> None:
    path = sorted(cache.rglob("*.npy"))[0]
    path.write_bytes(path.read_bytes() + b"more")


def other_dtype(cache: Path) -> None:
    path = sorted(cache.rglob("*.npy"))[0]
    np.save(path, np.load(path).astype(np.float32))


def row_less(cache: Path) -> None:
    write_index(cache, read_rows(cache)[:-1])


def cut_row(cache: Path) -> None:
    path = cache / "index.csv"
    path.write_text(path.read_text().rstrip().rsplit(",", 3)[0])


def empty_meta(cache: Path) -> None:
    (cache / "meta.json").write_text("{}")


def list_meta(cache: Path) -> None:
    (cache / "meta.json").write_text("[]")


def nested_meta(cache: Path) -> None:
    (cache / "meta.json").write_text(100_000 * "[")


def no_index(cache: Path) -> None:
    (cache / "index.csv").unlink()


def binary_index(cache: Path) -> None:
    (cache / "index.csv").write_bytes(b"\xff\xfe\x00")


def infinite_voxel(cache: Path) -> None:
    path = cache / "volumes" / "v1.image.npy"
    image = np.load(path)
    image[0, 1, 1, 1] = np.inf
    np.save(path, image)


def unknown_class(cache: Path) -> None:
    np.save(cache / "volumes" / "v1.mask.npy", np.full((8, 8, 8), 7, np.uint8))


def points_outside(cache: Path) -> None:
    np.save(cache / "volumes" / "v1.points.npy", np.array([[1, 2, 3, 99]]))


def other_shape(cache: Path) -> None:
    np.save(cache / "volumes" / "v1.mask.npy", np.zeros((8, 8, 9), np.uint8))


ANY = [cut_array, long_array, other_dtype, cut_row, empty_meta, list_meta, nested_meta, no_index]
ANY += [binary_index, set_row(fold="5"), set_row(fold=""), set_row(id="")]
CACHES = {
    "classification": [
        row_less,
        set_row(label="2"),
        set_row(label="-1"),
        set_row(label="x"),
        set_meta(std=0),
        set_meta(mean=math.nan),
        set_meta(size=31),
        set_meta(size="32"),
        set_meta(classes=["no"]),
        set_meta(fit="crop"),
    ],
    "detection": [
        row_less,
        set_row(xmin="nan"),
        set_row(xmax="40"),
        set_row(ymin="20", ymax="10"),
        set_row(spacing="1"),
        set_row(width="x"),
        set_meta(std=0),
        set_meta(size=64),
    ],
    "segmentation": [
        infinite_voxel,
        unknown_class,
        points_outside,
        other_shape,
        set_row(id="../v1"),
        set_row(id="v99"),
        set_meta(spacing=[1, 1]),
        set_meta(channels=["a", "b"]),
        set_meta(normalisation=[{"low": 0, "high": 1, "mean": 0, "std": 0}]),
        set_meta(values=[0, 1, 2]),
        set_meta(slice_axis=3),
        set_meta(shape=[8, 8, 0]),
    ],
}


@pytest.mark.parametrize(
    ("task", "k"), [(t, k) for t, own in CACHES.items() for k in range(len(ANY + own))]
)
def test_a_bad_cache_is_one_line(caches, tmp_path, task, k):
    cache = copy(caches[task], tmp_path / "cache")
    (ANY + CACHES[task])[k](cache)
    found = refusal(train, task, cache, tmp_path / "run")
    assert str(cache) in found and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "task, other",
    [
        ("classification", "detection"),
        ("detection", "segmentation"),
        ("segmentation", "classification"),
    ],
)
def test_a_cache_or_checkpoint_of_another_task_is_one_line(caches, runs, tmp_path, task, other):
    assert "preprocess" in refusal(train, task, caches[other], tmp_path / "run")
    found = refusal(evaluate, task, caches[task], "--checkpoint", runs[other] / "best.pt")
    assert f"a checkpoint of {other}/train.py, expected one of {task}/train.py" in found


def test_who_edits_the_folds_on_purpose_is_served(caches, tmp_path):
    for task, cache in caches.items():
        cache = copy(cache, tmp_path / task)
        change_rows(
            cache, lambda k, row: row.update(fold="0" if row["fold"] == "1" else row["fold"])
        )
        train(task, cache, tmp_path / f"run_{task}")


def change_settings(**values: object):
    return lambda checkpoint: checkpoint["settings"].update(values)


def drop(name: str):
    return lambda checkpoint: checkpoint.pop(name)


CHECKPOINTS = {
    "classification": [
        drop("settings"),
        drop("meta"),
        drop("figures"),
        drop("threshold"),
        change_settings(arch="resnet9"),
        change_settings(amp="fp8"),
        change_settings(fold="0"),
        change_settings(batch_size=0),
        change_settings(index=3),
        lambda c: c["meta"].update(std=0),
        lambda c: c["meta"].update(classes=3),
        lambda c: c["model"].update({"fc.bias": torch.zeros(5)}),
        lambda c: c["model"].update({"fc.bias": "x"}),
        lambda c: c["model"].update({3: 4}),
    ],
    "detection": [
        change_settings(channels=0),
        change_settings(head="none"),
        change_settings(channels="8"),
    ],
    "segmentation": [
        change_settings(patch=[8]),
        change_settings(patch=[0, 8]),
        change_settings(patch="88"),
        change_settings(channels=10**9),
        change_settings(mirror=None),
    ],
}


@pytest.mark.parametrize(
    ("task", "k"), [(t, k) for t, all_ in CHECKPOINTS.items() for k in range(len(all_))]
)
def test_a_bad_checkpoint_is_one_line(caches, runs, tmp_path, task, k):
    checkpoint = load_checkpoint(runs[task] / "best.pt")
    CHECKPOINTS[task][k](checkpoint)
    save_checkpoint(tmp_path / "bad.pt", checkpoint)
    options = ("--checkpoint", tmp_path / "bad.pt")
    assert str(tmp_path / "bad.pt") in refusal(evaluate, task, caches[task], *options)


def first_moment(checkpoint: dict) -> None:
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("optimizer"), "a copy of best.pt cannot be resumed"),
        (drop("log"), "log is None"),
        (lambda c: c.update(epoch=7), "epoch 7 and a log of 1 epochs"),
        (drop("best"), "best is None"),
        (lambda c: c["optimizer"].update(param_groups=[]), "optimizer's state does not fit"),
        (first_moment, "optimizer's state does not fit"),
        (lambda c: c.update(settings=3), "settings is 3"),
    ],
)
def test_a_last_that_cannot_be_resumed_is_one_line(caches, runs, tmp_path, change, message):
    checkpoint = load_checkpoint(runs["segmentation"] / "last.pt")
    change(checkpoint)
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    assert message in refusal(train, "segmentation", caches["segmentation"], tmp_path, "--resume")


def test_a_flipped_bit_in_the_weights_is_found(runs, tmp_path):
    data = bytearray((runs["segmentation"] / "best.pt").read_bytes())
    weight = load_checkpoint(runs["segmentation"] / "best.pt")["model"]["down.1.first.0.weight"]
    place = data.find(weight.contiguous().numpy().tobytes()[:64])
    for at in (place, place + 5) if place > 0 else range(len(data) // 3, len(data) // 3 + 2):
        broken = bytearray(data)
        broken[at] ^= 1
        (tmp_path / "best.pt").write_bytes(broken)
        assert "checksum" in refusal(load_checkpoint, tmp_path / "best.pt")


# --- options, --init, speed ---


@TASKS
@pytest.mark.parametrize(
    "option, value",
    [
        ("--seed", 2**64),
        ("--augment", 1000),
        ("--lr", "inf"),
        ("--lr", "nan"),
        ("--weight-decay", "inf"),
        ("--batch-size", 0),
    ],
)
def test_options_beyond_their_bounds_exit_with_status_2(task, option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        module(task, "train").main(["--data", "x", option, str(value)])
    assert stop.value.code == 2 and option in capsys.readouterr().err


def test_init_from_another_number_of_classes_keeps_all_but_the_last_layer(
    caches, runs, tmp_path, capsys
):
    cache = copy(caches["classification"], tmp_path / "cache")
    change_meta(cache, classes=["no", "yes", "perhaps"])
    change_rows(
        cache, lambda k, row: row.update(label=str(k // 8)) if row["fold"] != "test" else None
    )
    change_rows(cache, lambda k, row: row.update(fold=str(k % 2)))
    options = [
        "--init",
        str(runs["classification"] / "best.pt"),
        "--lr",
        "1e-12",
        "--weight-decay",
        "0",
    ]
    train("classification", cache, tmp_path / "run", *options)
    said = (
        "7 of its 9 arrays taken; 2 that it lacks or has in other shapes start at random: fc.bias"
    )
    assert f"--init {options[1]}: {said}, fc.weight\n" in capsys.readouterr().out
    old, new = (
        load_checkpoint(path / "best.pt")["model"]
        for path in (runs["classification"], tmp_path / "run")
    )
    assert torch.allclose(old["conv1.weight"], new["conv1.weight"], atol=1e-6)
    assert new["fc.weight"].shape == (3, 16)
    options[1] = str(runs["segmentation"] / "best.pt")
    assert "none of its weights has the name and the shape" in refusal(
        train, "classification", cache, tmp_path / "other", *options
    )


@XRAYS
def test_eval_reads_the_index_a_fixed_number_of_times(caches, runs, tmp_path, task, monkeypatch):
    cache, counts = copy(caches[task], tmp_path / "cache"), []
    change_rows(cache, lambda k, row: row.update(fold="test", patient=f"new{k}"))
    images = np.load(cache / "images.npy")
    np.save(cache / "images.npy", images[:, ::-1].copy())
    for task_module in (module(task, "eval"), module(task, "dataset")):
        real = task_module.read_index
        monkeypatch.setattr(
            task_module, "read_index", lambda path, real=real: counts.append(1) or real(path)
        )
    options = ("--checkpoint", runs[task] / "best.pt", "--split", "test", "--out", tmp_path / "out")
    evaluate(task, cache, *options)
    many = len(counts)
    counts.clear()
    change_rows(cache, lambda k, row: row.update(fold="test" if k < 4 else "0"))
    evaluate(task, cache, *options)
    assert len(counts) == many < 10


def test_the_inverse_of_an_affine_is_that_of_lapack():
    generator = torch.Generator().manual_seed(0)
    matrices = (
        torch.eye(2) + 0.4 * torch.rand(1000, 2, 2, generator=generator) - 0.2
    )  # as augment draws them
    # To the bit with some processors, to the last digits with others
    torch.testing.assert_close(inverse(matrices), torch.linalg.inv(matrices), rtol=1e-6, atol=1e-7)
    turned = matrices.flip(1)  # the larger entry of the first column is below
    assert torch.allclose(inverse(turned), torch.linalg.inv(turned), atol=1e-5)
    assert inverse(torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])).tolist() == [[[0, 0.5], [1, 0]]]


def test_few_channels_need_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = module("detection", "model").build_model("resnet18", "edges", 4)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 4)


@TASKS
def test_auto_chooses_cuda_or_cpu(task, monkeypatch):
    choose_device = module(task, "train").choose_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"


@TASKS
def test_captions_show_both_ends_of_a_name(task):
    shorten = module(task, "eval").shorten
    assert shorten("a" * 40, 40) == "a" * 40
    assert shorten("begin" + "x" * 40 + "end", 21) == "beginxxxx...xxxxxxend"


def test_what_reaches_a_network_is_in_the_checks(caches):
    meta = json.loads((caches["segmentation"] / "meta.json").read_text())
    check = module("segmentation", "preprocess").check_meta
    check(meta, Path("meta.json"))
    assert "meta.json: picture_unit 'inch'" in refusal(
        check, meta | {"picture_unit": "inch"}, Path("meta.json")
    )
    for name in set(META) - {"picture_unit"}:  # which volumes do not have
        rest = {key: value for key, value in meta.items() if key != name}
        assert f"meta.json: {name} None" in refusal(check, rest, Path("meta.json"))


def test_hashes_of_init_are_kept(monkeypatch):
    first = checkpoints.list_trained_on(["p2", "p1", "p1"], ["i1", "i2", "i3"])
    assert first == {"patients": ["p1", "p2"], "images": ["i1", "i2", "i3"]}
    second = checkpoints.list_trained_on(["p3"], ["i4"], {"trained_on": first})
    assert second == {"patients": ["p1", "p2", "p3"], "images": ["i1", "i2", "i3", "i4"]}
    assert checkpoints.count_trained_on(first, ["p9", "p1", "p9"], ["i9", "i9", "i3"]) == [1, 2]
