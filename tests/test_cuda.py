"""On a machine with an NVIDIA GPU: trainings there, stopped and resumed, and their evaluation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_checkpoint
from tests.caches import ROOT, TASKS, assert_evaluated_as_trained, draw_cache, split_words

GPUS = os.environ["TEST_GPUS"]  # CUDA_VISIBLE_DEVICES before conftest.py hid them, or "all"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("nvidia-smi") or torch.version.cuda is None or GPUS in ("", "-1"),
        reason="no NVIDIA GPU, or torch has no CUDA, or CUDA_VISIBLE_DEVICES hides it",
    ),
]
OPTIONS = {
    "classification": "--batch-size 8",
    "detection": "--batch-size 6 --channels 16",
    "segmentation": "--batch-size 2 --channels 4 --dims 3",
}
# Scores that change smoothly with the network
SMOOTH = {"classification": "brier", "detection": "mean_iou", "segmentation": "dice"}


def start(task: str, script: str, *options: object) -> subprocess.Popen:
    """A script in a process that sees the GPUs."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=GPUS)
    if GPUS == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, ROOT / task / f"{script}.py", *split_words(*options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@TASKS
def test_training_on_a_gpu(tmp_path: Path, task: str, amp: str):
    cache = draw_cache(tmp_path / "cache", task)
    options = ["--data", cache, OPTIONS[task], "--amp", amp, "--epochs 3 --out"]
    process = start(task, "train", *options, tmp_path / "straight")
    assert "training on cuda" in process.communicate()[0] and process.returncode == 0
    process = start(task, "train", *options, tmp_path / "resumed")
    assert any(line.startswith("epoch 1 ") for line in process.stdout)
    process.kill()
    process.wait()
    process = start(task, "train", *options, tmp_path / "resumed", "--resume")
    assert process.communicate() and process.returncode == 0
    path = tmp_path / "straight" / "last.pt"
    straight = load_checkpoint(path)
    resumed = load_checkpoint(tmp_path / "resumed" / "last.pt")
    # Some kernels add up in varying order.
    for first, second in zip(straight["log"], resumed["log"], strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=0.02)
    process = start(task, "eval", "--data", cache, "--checkpoint", path, "--out", tmp_path / "out")
    assert process.communicate() and process.returncode == 0
    score = SMOOTH[task]
    assert_evaluated_as_trained({score: straight["metrics"][score]}, tmp_path / "out", 0.01)
