"""classification/train.py and eval.py: the real commands at a tiny setting."""

import functools
import importlib
import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock

from classification import eval as evaluation
from classification import preprocess, train
from classification.dataset import write_demo
from classification.preprocess import DataError
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from detection.model import narrow
from tests.caches import change_rows, copy, small_network, write_index
from tests.conftest import assert_same_training, read_table, run_scripts, same

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TINY = ["--epochs", "2", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
TINY += ["--channels", "16"]


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_demo(folder, patients=60)
    return folder


@pytest.fixture(scope="session")
def cache(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "demo"
    preprocess.main(
        ["--data", str(raw), "--out", str(out), "--size", "72", "--test-fraction", "0.2"]
    )
    return out


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    train.main(["--data", str(cache), "--out", str(out), *TINY])
    return out


def test_stop_and_resume_equal_the_straight_run(cache, trained, tmp_path):
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--stop-after", "1"])
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    (tmp_path / "log.csv").write_text("rows of an epoch that was lost\n" * 5)
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--resume"])
    assert_same_training(trained, tmp_path)
    rows = read_table(tmp_path / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]


def test_workers_do_not_change_the_weights(cache, trained, tmp_path):
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--workers", "2"])
    assert_same_training(trained, tmp_path)


def test_another_seed_changes_the_weights(cache, trained, tmp_path):
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--seed", "1"])
    assert not same(
        load_checkpoint(trained / "last.pt")["model"],
        load_checkpoint(tmp_path / "last.pt")["model"],
    )


def test_resume_refuses_other_settings_and_other_data(cache, trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"lr 0.001 \(now 0.01\)"):
        train.main(["--data", str(cache), "--out", str(trained), *TINY, "--resume", "--lr", "0.01"])
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--resume"])
    with pytest.raises(CheckpointError, match="--resume, --overwrite"):
        train.main(["--data", str(cache), "--out", str(trained), *TINY])


def test_two_processes(cache, tmp_path):
    script = ROOT / "classification" / "train.py"
    options = ["--data", str(cache), *TINY, "--out", "a"]
    done = run_scripts(script, *options, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 ") == 1  # only rank 0 speaks
    printed = load_checkpoint(tmp_path / "a" / "last.pt")["figures"]["auroc"]
    evaluation.main(
        ["--data", str(cache), "--checkpoint", str(tmp_path / "a" / "last.pt"), "--samples", "2"]
    )
    summary = json.loads((tmp_path / "a" / "eval_val" / "metrics.json").read_text())["summary"]
    assert summary["auroc"]["value"] == pytest.approx(printed, abs=1e-9)
    with pytest.raises(CheckpointError, match=r"world_size 2 \(now 1\)"):
        train.main(["--data", str(cache), "--out", str(tmp_path / "a"), *TINY, "--resume"])


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_eval_gives_the_score_that_train_printed(cache, tmp_path, amp, capsys):
    options = f"--amp {amp} --class-weights balanced --label-smoothing 0.1 --flip --epochs 1"
    command = ["--data", str(cache), "--out", str(tmp_path), *TINY, *options.split()]
    # A CPU computes halves slowly, and any network tells whether eval.py uses them as train.py did.
    with nullcontext() if amp == "off" else small_network():
        train.main(command)
        check_score(cache, tmp_path, capsys)


def check_score(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    printed = load_checkpoint(tmp_path / "best.pt")["figures"]
    evaluation.main(
        ["--data", str(cache), "--checkpoint", str(tmp_path / "best.pt"), "--samples", "20"]
    )
    result = json.loads((tmp_path / "eval_val" / "metrics.json").read_text())
    for name, value in printed.items():
        assert result["summary"][name]["value"] == (None if np.isnan(value) else value), name
    assert result["run"]["n"] == len(result["cases"])
    assert result["run"]["positive_class"] == "pneumonia"
    # by train.py and by eval.py
    assert capsys.readouterr().out.count("positive class: pneumonia") == 2
    assert "f1_tuned" in result["summary"]
    for name in ("confusion_matrix.png", "roc.png", "mistakes.png"):
        assert Image.open(tmp_path / "eval_val" / name).size[0] > 200
    rows = read_table(tmp_path / "eval_val" / "predictions.csv")
    wrong = np.mean([row["label"] != row["prediction"] for row in rows])
    assert result["summary"]["accuracy"]["value"] == pytest.approx(1 - wrong)


def test_compile_has_no_graph_breaks(cache, trained, tmp_path, monkeypatch):
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--epochs", "1", "--compile"])
    assert set(load_checkpoint(tmp_path / "last.pt")["model"]) == set(
        load_checkpoint(trained / "last.pt")["model"]
    )


def test_init_takes_the_weights_only(cache, trained, tmp_path):
    options = [
        "--init",
        str(trained / "last.pt"),
        "--lr",
        "1e-12",
        "--weight-decay",
        "0",
        "--epochs",
        "1",
    ]
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, *options])
    old, new = (load_checkpoint(path / "last.pt") for path in (trained, tmp_path))
    assert torch.allclose(old["model"]["fc.weight"], new["model"]["fc.weight"], atol=1e-6)
    assert len(new["log"]) == 1


def build_narrow(arch: str, num_classes: int, size: int, *others: object) -> nn.Module:
    """A ResNet with one block a stage and a quarter of the channels: it learns the same, sooner."""
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    narrow(model, 1 / 4)
    model.conv1 = nn.Conv2d(1, 16, 7, 2, 3, bias=False)
    model.fc = nn.Linear(128, num_classes)
    return model


def test_overfits_sixteen_images(cache, tmp_path, monkeypatch):
    rows = read_table(cache / "index.csv")
    few = []
    for label in "01":
        few += [k for k, row in enumerate(rows) if row["label"] == label][:8]
    images = np.load(cache / "images.npy")[few]
    np.save(tmp_path / "images.npy", np.concatenate([images, images]))
    index = []
    for fold in ("1", "0"):  # the validation set is what the network has seen
        index += [rows[k] | {"id": f"{fold}{k}", "patient": k, "fold": fold} for k in few]
    write_index(tmp_path, index)
    (tmp_path / "meta.json").write_text((cache / "meta.json").read_text())
    monkeypatch.setattr(train, "build_model", build_narrow)
    options = [
        "--epochs",
        "20",
        "--augment",
        "0",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    log = load_checkpoint(tmp_path / "run" / "last.pt")["log"]
    assert log[0]["train_loss"] > 0.3
    assert log[-1]["train_loss"] < 0.1
    assert log[-1]["val_accuracy"] == 1
    assert log[-1]["val_auroc"] == 1


def test_a_loss_that_is_not_finite_stops(cache, tmp_path):
    command = ["--data", str(cache), "--out", str(tmp_path), *TINY]
    with pytest.raises(DataError, match=r"epoch 1: the loss is .*lower --lr"):
        train.main([*command, "--lr", "1e9", "--weight-decay", "1e9"])
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "64"], "less than one batch"),
        (["--device", "cuda:9"], "--device cuda:9"),
        (["--device", "abacus"], "--device abacus"),
        (["--init", "nowhere.pt"], "nowhere.pt: no checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(cache, tmp_path, options, message):
    with pytest.raises((DataError, CheckpointError), match=re.escape(message)):
        train.main(["--data", str(cache), "--out", str(tmp_path), "--workers", "0", *options])


def test_a_fold_without_images_of_a_class_is_refused(cache, tmp_path):
    copied = copy(cache, tmp_path / "cache")
    change_rows(copied, lambda k, row: row.update(fold="0" if row["label"] == "1" else "1"))
    message = "fold 0 leaves no training images of pneumonia"
    with pytest.raises(DataError, match=message):
        train.main(["--data", str(copied), "--out", str(tmp_path / "run"), *TINY])


@pytest.mark.parametrize(
    "options",
    [["--epochs", "0"], ["--lr", "-1"], ["--augment", "nan"], ["--amp", "yes"], ["--fold", "7"]],
)
def test_impossible_options_exit_with_status_2(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", "x", *options])
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err


def test_new_images(raw, trained, tmp_path, capsys):
    folder = raw / "stage_2_train_images"
    Image.fromarray(np.arange(10000, dtype=np.uint8).reshape(100, 100)).save(tmp_path / "a.png")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "bad.png").write_text("no picture")
    (tmp_path / "new" / "notes.txt").write_text("no picture either")
    (tmp_path / "new" / "demo0002.dcm").write_bytes((folder / "demo0002.dcm").read_bytes())
    command = ["--checkpoint", str(trained / "best.pt"), "--out", str(tmp_path / "out"), "--images"]
    evaluation.main(
        [
            *command,
            str(folder / "demo0000.dcm"),
            str(folder / "demo0001.dcm"),
            str(tmp_path / "a.png"),
        ]
    )
    rows = read_table(tmp_path / "out" / "predictions.csv")
    assert [Path(row["image"]).name for row in rows] == ["demo0000.dcm", "demo0001.dcm", "a.png"]
    assert Image.open(tmp_path / "out" / "0002_a.png").size[0] == 2 * evaluation.TILE
    with pytest.raises(DataError, match="1 of 2 files"):
        evaluation.main([*command, str(tmp_path / "new")])
    assert "bad.png" in capsys.readouterr().err


def test_new_images_get_the_probabilities_of_the_labelled_run(cache, raw, trained, tmp_path):
    evaluation.main(
        [
            "--data",
            str(cache),
            "--checkpoint",
            str(trained / "best.pt"),
            "--samples",
            "2",
            "--split",
            "test",
        ]
    )
    known = {r["id"]: r for r in read_table(trained / "eval_test" / "predictions.csv")}
    files = [str(raw / "stage_2_train_images" / f"{name}.dcm") for name in known]
    evaluation.main(
        ["--checkpoint", str(trained / "best.pt"), "--out", str(tmp_path), "--images", *files]
    )
    for row in read_table(tmp_path / "predictions.csv"):
        expected = float(known[Path(row["image"]).stem]["probability_pneumonia"])
        assert float(row["probability_pneumonia"]) == pytest.approx(expected, abs=1e-5)


def test_several_checkpoints_are_averaged_and_compared(cache, trained, tmp_path):
    train.main(["--data", str(cache), "--out", str(tmp_path / "b"), *TINY, "--seed", "1"])
    paths = [str(trained / "last.pt"), str(tmp_path / "b" / "last.pt")]
    found = {}
    for name, chosen in {"a": paths[:1], "b": paths[1:], "ab": paths}.items():
        options = ["--samples", "50", "--out", str(tmp_path / name)]
        options += ["--compare", str(tmp_path / "a" / "predictions.csv")] if name != "a" else []
        evaluation.main(["--data", str(cache), "--checkpoint", *chosen, *options])
        rows = read_table(tmp_path / name / "predictions.csv")
        found[name] = np.array([float(row["probability_pneumonia"]) for row in rows])
    assert found["ab"] == pytest.approx((found["a"] + found["b"]) / 2, abs=2e-6)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text())["summary"] for name in "ab")
    expected = b["auroc"]["value"] - a["auroc"]["value"]
    assert b["auroc_difference"]["value"] == pytest.approx(
        expected, abs=1e-3
    )  # predictions.csv is rounded
    (tmp_path / "short.csv").write_text("id,probability_no_pneumonia,probability_pneumonia\n")
    with pytest.raises(DataError, match="are missing"):
        evaluation.main(
            [
                "--data",
                str(cache),
                "--checkpoint",
                paths[0],
                "--compare",
                str(tmp_path / "short.csv"),
            ]
        )


def test_eval_refuses_what_was_trained_on(cache, raw, trained, tmp_path):
    other = load_checkpoint(trained / "best.pt")
    other["settings"]["fold"] = 1
    save_checkpoint(tmp_path / "fold1.pt", other)
    paths = [str(trained / "best.pt"), str(tmp_path / "fold1.pt")]
    with pytest.raises(DataError, match=r"fold1.pt: trained on"):
        evaluation.main(["--data", str(cache), "--checkpoint", *paths])
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "like"), "--like", str(cache)])
    with pytest.raises(DataError, match="not the cache of the training"):
        evaluation.main(["--data", str(tmp_path / "like"), "--checkpoint", paths[0]])
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "small"), "--size", "40"])
    with pytest.raises(CheckpointError, match="size 40"):
        evaluation.main(["--data", str(tmp_path / "small"), "--checkpoint", paths[0]])


def test_three_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = (rng.integers(0, 60, (90, 28, 28)) + 60 * labels[:, None, None]).astype(np.uint8)
    arrays = {"train_images": images[:60], "train_labels": labels[:60, None]}
    np.savez(tmp_path / "m.npz", **arrays, val_images=images[60:], val_labels=labels[60:, None])
    preprocess.main(["--data", str(tmp_path / "m.npz"), "--out", str(tmp_path / "cache")])
    options = ["--out", str(tmp_path / "run"), *TINY, "--epochs", "1"]
    train.main(["--data", str(tmp_path / "cache"), *options])
    command = ["--data", str(tmp_path / "cache"), "--checkpoint", str(tmp_path / "run" / "best.pt")]
    evaluation.main([*command, "--samples", "20"])
    result = json.loads((tmp_path / "run" / "eval_val" / "metrics.json").read_text())
    assert result["run"]["positive_class"] is None
    assert (
        result["summary"]["auroc"]["value"]
        == load_checkpoint(tmp_path / "run" / "best.pt")["figures"]["auroc"]
    )
    assert {row["class"] for row in read_table(tmp_path / "run" / "eval_val" / "roc.csv")} == {
        "0",
        "1",
        "2",
    }
    with pytest.raises(DataError, match="found 3 classes, expected two"):
        evaluation.main([*command, "--operating-point", "sensitivity=0.9"])


@pytest.mark.parametrize("script", ["preprocess", "train", "eval"])
def test_help_and_errors_of_the_command_line(script, tmp_path, capsys):
    path = ROOT / "classification" / f"{script}.py"
    options = {
        "preprocess": ["--data", "nowhere", "--out", "cache"],
        "train": ["--data", "nowhere"],
        "eval": ["--data", "nowhere", "--checkpoint", "nowhere.pt"],
    }[script]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"classification.{script}").main(["--help"])
    assert stop.value.code == 0 and f"python classification/{script}.py" in capsys.readouterr().out
    done = run_scripts(path, *options, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1


def test_new_images_are_never_overwritten(trained, tmp_path):
    checkpoint = ["--checkpoint", str(trained / "best.pt")]
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a.png", "0000_a.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(
            scans / name
        )
    before = {path.name: path.read_bytes() for path in scans.iterdir()}
    for out in (scans, scans / "new"):
        with pytest.raises(DataError, match=r"lies in .*scans, where it would be read as images"):
            evaluation.main([*checkpoint, "--out", str(out), "--images", str(scans)])
    with pytest.raises(DataError, match=r"0000_a\.png: would be overwritten by a result"):
        files = [str(scans / "a.png"), str(scans / "0000_a.png")]
        evaluation.main([*checkpoint, "--out", str(scans), "--images", *files])
    assert {path.name: path.read_bytes() for path in scans.iterdir()} == before
