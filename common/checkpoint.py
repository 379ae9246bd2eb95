"""Checkpoints: written atomically, loaded without running code from the file."""

import hashlib
import os
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit what it is asked for."""


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of plain values, lists, dicts and tensors to `path`; a crash leaves the old file or the new one.

    Keep the bare model's `state_dict()` in it, not that of a compiled or distributed wrapper.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save_checkpoint` wrote, tensors on `device`. Raises CheckpointError naming the file."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no checkpoint here; train.py writes best.pt and last.pt into its --out"
        )
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise CheckpointError(f"{path}: no checkpoint of train.py, expected a dict with 'model'")
    return checkpoint


def load_weights(model: torch.nn.Module, checkpoint: dict, path: Path) -> None:
    """Copy `checkpoint["model"]` into a bare model. Raises CheckpointError listing what does not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit this model: {' '.join(str(error).split())[:300]}"
        ) from error


def check_settings(saved: dict, current: dict, path: Path) -> None:
    """Refuse to resume with settings that would change the result. Raises CheckpointError listing both sides."""
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if differing:
        lines = ", ".join(f"{name} {saved.get(name)} (now {current.get(name)})" for name in differing)
        raise CheckpointError(f"{path}: cannot resume, it was trained with {lines}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, to say which index or checkpoint a result belongs to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
