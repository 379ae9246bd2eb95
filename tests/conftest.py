"""What several test files use: caches, commands, and training runs compared to the bit."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_checkpoint
from tests.caches import NAMES, draw_cache, small_network, train

# What is compared to the bit has to be computed in one place, and a GPU may be busy or too old. What
# the shell said is kept for tests/test_cuda.py, in the environment: it passes on to pytest's workers.
os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A job in the background of a script ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# --- caches, and runs on them: made once, so a test that changes one copies it ---


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with small_network():
        yield


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return {task: draw_cache(folder / task, task) for task in NAMES}


@pytest.fixture(scope="session")
def runs(caches, tmp_path_factory) -> dict[str, Path]:
    """A training of one epoch on each cache, validated on fold 0."""
    folder = tmp_path_factory.mktemp("runs")
    with small_network():
        for task, cache in caches.items():
            train(task, cache, folder / task)
    return {task: folder / task for task in caches}


# --- the scripts as processes ---

# Importing torch and torchvision takes a process four seconds: this server has done it, and
# every command starts as a fork of it. Windows has no such thing.
FORKS = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "pydicom", "nibabel", "tests.conftest"])


def run_script(script: str, options: list[str], folder: Path, output: str, environment: dict):
    """In a process of its own: a script as the shell would run it, its output in two files."""
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    for stream, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115, until the process ends
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    root = Path(__file__).resolve().parents[1]  # which scripts have to find by themselves
    others = [path for path in sys.path if Path(path).resolve() != root]
    sys.path[:] = [str(Path(script).parent), *others]
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")


def start_script(script: Path, *options: str, cwd: Path, name: str = "", **environment: str):
    """A script in a process that is started and not waited for; it prints to NAME.out and .err."""
    arguments = (str(script), list(options), cwd, str(cwd / name), environment)
    process = FORKS.Process(target=run_script, args=arguments)
    process.start()
    return process


def wait_for(text: str, path: Path) -> None:
    """Until a file that a process writes to has this text."""
    for _ in range(6000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {path}")


def run_scripts(
    script: Path, *options: str, cwd: Path, processes: int = 1
) -> subprocess.CompletedProcess:
    """A script in a process, or in several with the environment of torchrun, and what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(start_script(script, *options, cwd=cwd, name=f".rank{rank}", **environment))
    for process in started:
        process.join(300)
    # None, of a process that still runs, is no success either
    code = next((process.exitcode for process in started if process.exitcode != 0), 0)
    outputs = []
    for suffix in ("out", "err"):
        texts = [(cwd / f".rank{rank}.{suffix}").read_text() for rank in range(processes)]
        outputs.append("".join(texts))
    return subprocess.CompletedProcess(options, code, *outputs)


# --- runs compared ---


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
    for one in (first, second):
        one.pop("digest")  # the hash of all values, the time among them
    for row in first["log"] + second["log"]:
        row.pop("seconds")
    assert first.keys() == second.keys()
    for name in first:
        assert same(first[name], second[name]), name
