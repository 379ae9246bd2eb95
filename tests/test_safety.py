"""Nothing of the user's is lost, and what cannot be used is one line: folders, checkpoints, errors."""

import copy as copying
import io
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from common import checkpoint
from tests import caches as kit
from tests.conftest import run_scripts

pytestmark = pytest.mark.usefixtures("quick")


# --- new folders ---


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    """An error removes it, an interrupted run leaves it."""
    out = tmp_path / "a" / "out"
    unfinished = {"a/out.unfinished/x": b"x"}
    for error, left in ((None, {"a/out/x": b"x"}), (KeyError, {}), (KeyboardInterrupt, unfinished)):
        with suppress(KeyError, KeyboardInterrupt), checkpoint.new_folder(out) as folder:
            (folder / "x").write_text("x")
            assert kit.contents(tmp_path) == unfinished
            if error:
                raise error
        assert kit.contents(tmp_path) == left
        shutil.rmtree(out, ignore_errors=True)
    found = kit.refusal(checkpoint.new_folder(out).__enter__)
    assert found.startswith(f"{out}.unfinished: another run writes there, or one was stopped")
    assert kit.contents(tmp_path) == unfinished


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda out: out.symlink_to("nowhere")])
def test_what_is_there_is_never_replaced(tmp_path, make):
    make(tmp_path / "out")
    found = kit.refusal(checkpoint.new_folder(tmp_path / "out").__enter__)
    assert found.startswith(f"{tmp_path}/out: exists already")
    assert os.listdir(tmp_path) == ["out"]
    assert kit.refusal(checkpoint.new_folder(Path("/")).__enter__).startswith("/: exists already")


@pytest.mark.slow
@kit.TASKS
def test_no_command_replaces_files(caches, runs, tmp_path, task):
    raw = kit.write_raw(tmp_path / "raw", task)
    before = kit.contents(raw)
    best = runs[task] / "best.pt"
    options = f"--checkpoint {best} --out {raw}"
    for found in (
        kit.refusal(kit.evaluate, task, caches[task], options),
        kit.refusal(kit.predict, task, best, raw, raw),
        kit.refusal(kit.preprocess, task, raw, raw),
        kit.refusal(kit.train, task, caches[task], raw),
    ):
        assert f"{raw}: exists already" in found
    assert kit.contents(raw) == before


@pytest.mark.slow
@kit.TASKS
def test_a_second_evaluation_gets_the_next_name_and_says_it(caches, runs, tmp_path, task, capsys):
    run = kit.copy(runs[task], tmp_path / "run")
    options = f"--checkpoint {run}/best.pt"
    for name in ("eval_val", "eval_val-2"):
        kit.evaluate(task, caches[task], options)
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"in {run / name}")
    table = "cases.csv" if task == "segmentation" else "predictions.csv"
    first = kit.contents(run / "eval_val")
    second = kit.contents(run / "eval_val-2")
    assert first.keys() == second.keys() and first[table] == second[table]
    found = kit.refusal(kit.evaluate, task, caches[task], options, "--by age")
    assert "--by age: no column in index.csv, expected one of id, patient, fold" in found
    assert not list(run.glob("eval_val-3*"))


@pytest.mark.slow
def test_two_runs_that_began_in_one_empty_folder_do_not_mix(caches, tmp_path, monkeypatch):
    begin = checkpoint.Run.begin
    path = tmp_path / "run" / "last.pt"

    def begin_late(*args: object) -> None:
        begin(*args)
        path.write_text("another run was faster")

    monkeypatch.setattr(checkpoint.Run, "begin", begin_late)
    found = kit.refusal(kit.train, "segmentation", caches["segmentation"], tmp_path / "run")
    assert "another run writes here" in found and path.read_text() == "another run was faster"


# --- raw data, and the synthetic set ---


@pytest.mark.slow
@kit.TASKS
def test_raw_data_become_a_cache_beside_the_run(tmp_path, task, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = kit.write_raw(Path("raw"), task)
    kit.train(task, raw, Path("run"))
    lines = capsys.readouterr().out.splitlines()
    assert f"first: python {task}/preprocess.py --data raw --out run_cache" in lines
    assert [line for line in lines if line.startswith("next: ")] == lines[-1:]
    assert "--data run_cache --checkpoint run/best.pt" in lines[-1]
    kit.preprocess(task, raw, Path("by_hand"))
    assert kit.contents(Path("run_cache")) == kit.contents(Path("by_hand"))
    found = kit.refusal(kit.train, task, raw, Path("run"), "--resume")
    assert "run_cache: exists already; train on it with --data run_cache" in found
    # Data that need options, or are not there
    next(path for path in sorted(raw.rglob("*")) if path.suffix in (".png", ".gz")).write_text("x")
    assert "--skip-bad" in kit.refusal(kit.train, task, raw, Path("bad"))
    assert f"first: python {task}/preprocess.py --data raw" in capsys.readouterr().out
    assert kit.refusal(kit.train, task, Path("nowhere"), Path("bad")).startswith("nowhere: ")
    assert not Path("bad").exists() and not Path("bad_cache").exists()
    script = kit.module(task, "train")
    args = script.parse_args(["--data", "raw"])
    assert "several processes train on a cache" in kit.refusal(script.prepare_cache, args, 2)


@pytest.mark.slow
@kit.TASKS
def test_a_second_run_takes_the_next_name_and_the_same_synthetic_set(
    tmp_path, task, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    script = kit.module(task, "train")
    made = []
    write_demo = lambda folder: made.append(kit.write_raw(folder, task))  # noqa: E731
    monkeypatch.setattr(script.dataset, "write_demo", write_demo)
    words = kit.split_words("--epochs 1 --workers 0 --device cpu --batch-size 4 --channels 16")
    assert script.parse_args(["--resume"]).out == Path(f"runs/{task}")
    for name in (task, f"{task}-2"):
        script.main(words)
        printed = capsys.readouterr().out
        assert "no --data: a synthetic set." in printed
        assert f"--checkpoint runs/{name}/best.pt" in printed.splitlines()[-1]
    assert len(made) == 1 and Path(f"data/demo/{task}/cache/meta.json").exists()
    assert script.parse_args(["--resume"]).out == Path(f"runs/{task}-2")
    assert script.parse_args([]).out == Path(f"runs/{task}-3")
    Path("empty").mkdir()  # as of a run that was interrupted in its first epoch
    script.main([*words, "--out", "empty"])
    found = kit.refusal(script.main, [*words, "--out", "empty"])
    assert found == "empty: exists already; --resume it, or give another --out"


# --- files that are complete ---


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, {"model": {"weight": torch.ones(2)}, "epoch": 1})
    return path


@pytest.mark.parametrize(
    "crash", [KeyboardInterrupt, RuntimeError("no kernel"), OSError(28, "full")]
)
def test_a_crash_leaves_the_old_file(path, monkeypatch, crash):
    def half(values: dict, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise crash

    monkeypatch.setattr(torch, "save", half)
    for name in ("last.pt", "best.pt"):
        with pytest.raises((KeyboardInterrupt, checkpoint.DataError)):
            checkpoint.save_checkpoint(path.with_name(name), {"model": {}, "epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(path)["epoch"] == 1
    assert [one.name for one in path.parent.iterdir()] == ["last.pt"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(path, monkeypatch):
    calls = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append((a, b)) or replace(a, b))
    checkpoint.save_checkpoint(path, {"model": {}})
    assert calls == [path.stat().st_size, (path.with_name("last.tmp.pt"), path)]


def test_a_full_disk_is_one_line_and_the_old_file_stays(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    values = {"model": {"weight": torch.zeros(1_000_000)}}
    try:
        found = kit.refusal(checkpoint.save_checkpoint, path, values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.startswith(f"{path}: not written (") and "File too large" in found
    assert checkpoint.load_checkpoint(path)["epoch"] == 1


def test_tables_and_reports_are_written_whole(tmp_path):
    checkpoint.write_csv(tmp_path / "t.csv", [{"a": 1, "b": 2}, {"a": 3, "c": 4}])
    assert (tmp_path / "t.csv").read_text().split() == ["a,b,c", "1,2,", "3,,4"]
    checkpoint.write_json(tmp_path / "r.json", {"x": [float("nan"), 1.5], "y": float("inf")})
    found = (tmp_path / "r.json").read_text()
    assert "".join(found.split()) == '{"x":[null,1.5],"y":null}'


# --- checkpoints that are none, or damaged ---


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("marker",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("evil.pt")
    torch.save({"model": {"weight": Code()}}, path)
    found = kit.refusal(checkpoint.load_checkpoint, path)
    assert found.startswith(f"{path}: not a checkpoint of train.py (it holds more than tensors")
    assert not Path("marker").exists()
    torch.load(path, weights_only=False)
    assert Path("marker").exists()  # the trap was set


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


NO_CHECKPOINTS = [b"", b"hello", b"PK\3\4" + bytes(100), pickle.dumps({"model": object}, 2)]
NO_CHECKPOINTS += [saved([1, 2]), saved({"state_dict": {}}), saved({"format": 0, "model": {}})]
NO_CHECKPOINTS += [saved({"format": checkpoint.FORMAT, "model": {}})]
NO_CHECKPOINTS += [saved({"format": checkpoint.FORMAT, "digest": 3, 4: {(5, 6): {7}}})]


def test_what_is_no_checkpoint_or_cut_or_flipped_is_one_line(path):
    whole = path.read_bytes()
    cuts = [whole[:size] for size in range(0, len(whole), max(1, len(whole) // 20))]
    for content in NO_CHECKPOINTS + cuts:
        path.write_bytes(content)
        assert kit.refusal(checkpoint.load_checkpoint, path).startswith(f"{path}: not "), content
    assert "no checkpoint here" in kit.refusal(checkpoint.load_checkpoint, path.parent)
    place = whole.find(torch.ones(2).numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "checksum" in kit.refusal(checkpoint.load_checkpoint, path)


def places(value: object, where: tuple = ()) -> Iterator[tuple]:
    """The ways to every value in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        yield (*where, name)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*where, name))


@pytest.mark.slow
@kit.TASKS
def test_whatever_is_odd_in_a_checkpoint_is_one_line(caches, runs, tmp_path, task):
    """Values replaced by others, weights by one of four bytes that claims 12 GB."""
    huge = torch.as_strided(torch.zeros(1), (3_000_000_000,), (0,))
    for name, command in (("best.pt", kit.evaluate), ("last.pt", kit.train)):
        whole = checkpoint.load_checkpoint(runs[task] / name)
        path = tmp_path / name / name
        path.parent.mkdir()
        options = [f"--checkpoint {path}"] if name == "best.pt" else [path.parent, "--resume"]
        for number, where in enumerate(places(whole)):
            if len(where) > 1 and number % 7:
                continue
            broken = copying.deepcopy(whole)
            inside = broken
            for parent in where[:-1]:
                inside = inside[parent]
            inside[where[-1]] = huge if where[0] == "model" else "odd"
            torch.save(broken, path)
            found = kit.refusal(command, task, caches[task], *options)
            expected = "made for" if where == ("task",) else "train again"
            assert found.startswith(f"{path}: ") and expected in found, where


def test_weights_that_do_not_fit_are_one_line():
    source = torch.nn.Linear(2, 3)
    path = Path("some/best.pt")
    wider = kit.refusal(checkpoint.load_weights, torch.nn.Linear(2, 4), source.state_dict(), path)
    assert wider.startswith("some/best.pt: does not fit this model") and "size mismatch" in wider
    assert "bias" in kit.refusal(checkpoint.load_weights, source, {"weight": source.weight}, path)


# --- the command line ---


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited"), "error: DataLoader worker (pid(s)"),
        (RuntimeError("Symlink loop from 'a'"), "error: Symlink loop"),
        (checkpoint.DataError("a\nb\x1b[31mc"), r"error: a b\x1b[31mc"),
        (checkpoint.DataError("begin" + 1000 * "x" + "end"), "error: beginxxx"),
        (OSError(28, "No space left", "x.npy"), "error: [Errno 28] No space left: 'x.npy'"),
        (RecursionError("deep"), "error: deep"),
        (KeyboardInterrupt(), "130"),
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_a_user_error_is_one_line_and_a_bug_keeps_its_traceback(monkeypatch, error, expected):
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's has no reconfigure
    with pytest.raises(SystemExit if expected else type(error)) as caught:
        checkpoint.run_command(main)
    code = str(getattr(caught.value, "code", ""))
    assert code.startswith(expected or "") and len(code) < 320


@pytest.mark.slow
@kit.TASKS
def test_errors_of_the_command_line(tmp_path, task):
    for script, options in (
        ("preprocess", ["--data", "nowhere", "--out", "out"]),
        ("train", ["--data", "nowhere"]),
        ("eval", ["--data", "nowhere", "--checkpoint", "none.pt"]),
    ):
        path = kit.ROOT / task / f"{script}.py"
        done = run_scripts(path, *options, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        with pytest.raises(SystemExit, match="2"):
            kit.module(task, script).main(["--nonsense"])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("runs/*"))
    manual = run_scripts(path, "--help", cwd=tmp_path)
    assert manual.returncode == 0 and f"python {task}/eval.py" in manual.stdout


def test_model_py_needs_nothing_of_the_repository():
    for task in kit.NAMES:
        text = (kit.ROOT / task / "model.py").read_text()
        names = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        allowed = {"torch", "torchvision", "numpy", "math", "itertools", "typing"}
        assert "torch" in names and names <= allowed


@pytest.mark.slow
def test_preprocess_imports_no_torch():
    names = ", ".join(f"{task}.preprocess" for task in kit.NAMES)
    code = f"import sys, {names}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=kit.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
