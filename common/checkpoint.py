"""Checkpoints: written atomically, loaded without running code from the file."""

import hashlib
import os
import pickle
from pathlib import Path

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer


class CheckpointError(ValueError):
    """A checkpoint that is missing or damaged, does not fit, or cannot be written."""


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of plain values, lists, dicts and tensors; a crash leaves the old file or the new one.

    Keep the bare model's `state_dict()` in it, not that of a compiled or distributed wrapper. Raises
    CheckpointError naming the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch hides the OSError of a full disk in a RuntimeError
        raise CheckpointError(f"{path}: not written ({error.__context__ or error})") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save_checkpoint` wrote, tensors on `device`. Raises CheckpointError naming the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint here; train.py writes best.pt and last.pt to its --out")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values; nothing of it was run"
        raise CheckpointError(f"{path}: not a checkpoint of train.py ({reason})") from error
    except Exception as error:  # torch, pickle and zipfile each raise their own
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of train.py, expected the weights under 'model'")
    return checkpoint


def load_weights(model: torch.nn.Module, checkpoint: dict, path: Path) -> None:
    """Copy `checkpoint["model"]` into a bare model. Raises CheckpointError listing what does not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: does not fit this model: {reason}") from error


def check_settings(saved: dict, current: dict, path: Path) -> None:
    """Refuse to resume with settings that change the result. Raises CheckpointError listing both sides."""
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if differing:
        lines = ", ".join(f"{name} {saved.get(name)} (now {current.get(name)})" for name in differing)
        raise CheckpointError(f"{path}: cannot resume, it was trained with {lines}")


def open_run(out: Path, overwrite: bool) -> None:
    """Make the output folder. Raises CheckpointError if it holds a training that nobody said may go."""
    if (out / "last.pt").exists() and not overwrite:
        raise CheckpointError(f"{out}: holds a training; use --resume, --overwrite, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("last.pt", "best.pt", "log.csv"):
        (out / name).unlink(missing_ok=True)


def restore(
    path: Path, settings: dict, model: torch.nn.Module, optimizer: Optimizer, scaler: GradScaler
) -> tuple[int, float, list[dict]]:
    """Put last.pt into model, optimizer and scaler; returns the epochs done, the best score, and the log.

    Raises CheckpointError if it was trained with other settings.
    """
    checkpoint = load_checkpoint(path)
    check_settings(checkpoint["settings"], settings, path)
    load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["epoch"], checkpoint["best"], checkpoint["log"]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, to say which index or checkpoint a result belongs to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
