"""common/checkpoint.py: what is written comes back, and nothing else is taken for it."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.checkpoint import (
    CheckpointError,
    check_settings,
    file_sha256,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
FILL_DISK = """
import resource, sys, torch
from pathlib import Path
from common.checkpoint import CheckpointError, save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for shape in [(1_000_000,), (12_400,)]:  # far too large, and just too large
    try:
        save_checkpoint(Path(sys.argv[1]), {"model": {"weight": torch.zeros(shape)}})
    except CheckpointError as error:
        print(error)
"""


def message(call: Callable, *args: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path) -> Path:
    save_checkpoint(tmp_path / "last.pt", {"model": {"weight": torch.ones(2)}, "epoch": 1})
    return tmp_path / "last.pt"


def test_round_trip(path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(4, 2)).square().sum().backward()
    optimizer.step()
    plain = {
        "epoch": 3,
        "best": 0.5,
        "threshold": None,
        "log": [{"lr": 1e-3}],
        "classes": ["a", "b"],
        "x": True,
    }
    save_checkpoint(
        path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **plain}
    )
    loaded = load_checkpoint(path)
    assert {k: loaded[k] for k in plain} == plain
    assert loaded["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(loaded["model"][k], v) for k, v in model.state_dict().items())
    moments = optimizer.state_dict()["state"]
    assert all(
        torch.equal(loaded["optimizer"]["state"][k]["exp_avg"], moments[k]["exp_avg"])
        for k in moments
    )
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]  # nothing left over


def test_tensors_come_to_the_device(path):
    assert load_checkpoint(path)["model"]["weight"].device.type == "cpu"
    assert load_checkpoint(path, torch.device("meta"))["model"]["weight"].device.type == "meta"


@pytest.mark.parametrize("crash", [KeyboardInterrupt, RuntimeError("no such kernel")])
def test_a_crash_leaves_the_old_file(path, monkeypatch, crash):
    def half(checkpoint: dict, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise crash

    monkeypatch.setattr(torch, "save", half)
    for name in ("last.pt", "best.pt"):
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            save_checkpoint(path.with_name(name), {"model": {}, "epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1
    assert "no checkpoint here" in message(load_checkpoint, path.with_name("best.pt"))
    monkeypatch.undo()
    save_checkpoint(path, {"model": {}, "epoch": 3})  # the half file does not stand in the way
    assert load_checkpoint(path)["epoch"] == 3


def test_the_file_is_on_the_disk_before_it_gets_its_name(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append((a, b)) or replace(a, b))
    save_checkpoint(path, {"model": {}})
    assert calls == [path.stat().st_size, (path.with_name("last.pt.tmp"), path)]


@pytest.mark.slow
def test_disk_full(path):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FILL_DISK, str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(
        line.startswith(f"{path}: not written (") and "File too large" in line for line in lines
    )
    assert load_checkpoint(path)["epoch"] == 1


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_code_in_a_file_is_not_run(tmp_path):
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    torch.save({"model": {"weight": Code(marker)}}, path)
    assert message(load_checkpoint, path).startswith(f"{path}: not a checkpoint of train.py")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the trap was set


def test_a_truncated_file_is_refused(path):
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:size])
        assert message(load_checkpoint, path).startswith(f"{path}: not a ")


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PK\3\4" + bytes(100),
        pickle.dumps({"model": object}, protocol=2),
        saved([1, 2]),
        saved({"state_dict": {}}),
        saved({"model": 3}),
        saved({"model": {}, "where": Path("x")}),
    ],
    ids=["empty", "text", "zip", "pickle", "list", "other", "number", "path"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "odd.pt"
    path.write_bytes(content)
    assert message(load_checkpoint, path).startswith(f"{path}: not a ")


def test_a_missing_file_or_folder_is_named(tmp_path):
    assert message(load_checkpoint, tmp_path / "no.pt").startswith(
        f"{tmp_path / 'no.pt'}: no checkpoint here"
    )
    assert message(load_checkpoint, tmp_path).startswith(f"{tmp_path}: no checkpoint here")
    lost = tmp_path / "no" / "last.pt"
    assert message(save_checkpoint, lost, {"model": {}}).startswith(f"{lost}: not written")


def test_load_weights():
    source, model, path = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), Path("some/best.pt")
    load_weights(model, {"model": source.state_dict()}, path)
    assert torch.equal(model.weight, source.weight) and torch.equal(model.bias, source.bias)
    wider = message(load_weights, torch.nn.Linear(2, 4), {"model": source.state_dict()}, path)
    assert (
        wider.startswith("some/best.pt: does not fit this model")
        and "size mismatch for weight" in wider
    )
    assert '"bias"' in message(load_weights, model, {"model": {"weight": source.weight}}, path)
    more = {"model": {**source.state_dict(), "extra": torch.ones(1)}}
    assert '"extra"' in message(load_weights, model, more, path)


def test_check_settings_lists_both_sides():
    settings = {"lr": 0.1, "seed": 0, "amp": "off", "fold": 2}
    check_settings(settings, dict(reversed(settings.items())), Path("last.pt"))
    now = {"lr": 0.2, "seed": 0, "amp": "off", "arch": "resnet18"}
    text = message(check_settings, settings, now, Path("last.pt"))
    assert text.startswith("last.pt: cannot resume")
    assert text.endswith("lr 0.1 (now 0.2), fold 2 (now None), arch None (now resnet18)")


def test_file_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc").startswith(
        "ba7816bf8f01cfea414140de5dae2223"
    )  # FIPS 180-2, B.1
