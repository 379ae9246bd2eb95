"""What several test files use: tables, and training runs compared to the bit."""

import csv
import signal
from pathlib import Path

import torch

from common.checkpoint import load_checkpoint

# A job in the background of a script ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a: object, b: object) -> bool:
    """Equal to the bit, tensors in nested dicts included; NaN is equal to NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        is_alike = a.dtype == b.dtype and a.shape == b.shape
        return is_alike and torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b or (a != a and b != b)


def assert_same_training(a: Path, b: Path) -> None:
    """The last checkpoints of two runs are the same in all but the time they took."""
    first = load_checkpoint(a / "last.pt")
    second = load_checkpoint(b / "last.pt")
    for row in first["log"] + second["log"]:
        row.pop("seconds")
        row.pop("train_seconds", None)  # segmentation has it
    assert first.keys() == second.keys()
    for name in first:
        assert same(first[name], second[name]), name
