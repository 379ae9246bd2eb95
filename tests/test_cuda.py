"""On a machine with an NVIDIA GPU: trainings there, stopped and resumed, and their evaluation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_checkpoint
from tests.caches import draw_cache

ROOT = Path(__file__).resolve().parents[1]
GPUS = os.environ["TEST_GPUS"]  # CUDA_VISIBLE_DEVICES before conftest.py hid them, or "all"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("nvidia-smi") or torch.version.cuda is None or GPUS in ("", "-1"),
        reason="no NVIDIA GPU, or torch has no CUDA, or CUDA_VISIBLE_DEVICES hides it",
    ),
]
SMALL = {
    "classification": ["--batch-size", "8", "--channels", "16"],
    "detection": ["--batch-size", "6", "--channels", "16"],
    "segmentation": ["--batch-size", "2", "--channels", "4", "--dims", "3"],
}
SCORES = {  # what train.py and eval.py call a score that changes smoothly with the network
    "classification": ("brier", "brier"),
    "detection": ("mean_iou", "mean_iou"),
    "segmentation": ("dice", "dice_cache"),
}


def run(task: str, script: str, *options: object) -> str:
    """What a script prints, in a process that sees the GPUs."""
    environment = dict(os.environ)
    if GPUS == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    command = [sys.executable, ROOT / task / f"{script}.py", *map(str, options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("task", SMALL)
def test_training_on_a_gpu(tmp_path: Path, task: str, amp: str):
    draw_cache(tmp_path / "cache", task)
    options = ["--data", tmp_path / "cache", *SMALL[task], "--amp", amp, "--epochs", "2"]
    printed = run(task, "train", *options, "--out", tmp_path / "straight")
    assert "training on cuda" in printed
    run(task, "train", *options, "--out", tmp_path / "resumed", "--stop-after", "1")
    run(task, "train", *options, "--out", tmp_path / "resumed", "--resume")
    straight = load_checkpoint(tmp_path / "straight" / "last.pt")
    resumed = load_checkpoint(tmp_path / "resumed" / "last.pt")
    # Some kernels add up in varying order.
    for first, second in zip(straight["log"], resumed["log"], strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=0.02)

    command = ["--data", tmp_path / "cache", "--checkpoint", tmp_path / "straight" / "last.pt"]
    run(task, "eval", *command, "--samples", "20", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]
    of_train, of_eval = SCORES[task]
    assert summary[of_eval]["value"] == pytest.approx(straight["figures"][of_train], abs=0.01)
