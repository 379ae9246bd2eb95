"""How a training starts: from raw data, from the weights of another one, or where one has ended."""

import json
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageColor
from torch import nn
from torch.distributed import new_group

from classification.model import build_model as build_classifier
from common.checkpoint import (
    CURVE,
    draw_log,
    linear_ticks,
    load_checkpoint,
    load_fitting_weights,
    log_ticks,
    save_checkpoint,
)
from detection.model import build_model as build_detector
from segmentation import preprocess
from segmentation import train as segmentation
from tests.caches import draw_cache, evaluate, module, small_network, train
from tests.conftest import assert_same_training, same

pytestmark = pytest.mark.slow
TASKS = pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_network():
        yield


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths are short, so that messages are whole


def refusal(call: Callable, *args: object) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert type(caught.value).__name__ in ("DataError", "CheckpointError")
    return str(caught.value)


def write_raw(raw: Path, task: str) -> None:
    """Noise: 40 pictures in two class folders or with boxes, or 8 volumes with a cube."""
    rng = np.random.default_rng(0)
    if task == "segmentation":
        for folder in ("imagesTr", "labelsTr"):
            (raw / folder).mkdir(parents=True)
        for k in range(8):
            mask = np.zeros((8, 8, 8), np.uint8)
            mask[2:6, 2:6, 2:6] = 1
            volume = rng.normal(0, 0.3, mask.shape) + 2 * mask
            nib.save(nib.Nifti1Image(volume, np.eye(4)), raw / "imagesTr" / f"v{k}.nii.gz")
            nib.save(nib.Nifti1Image(mask, np.eye(4)), raw / "labelsTr" / f"v{k}.nii.gz")
        return
    folders = {"classification": ("no", "yes"), "detection": ("images", "images")}[task]
    for folder in folders:
        (raw / folder).mkdir(parents=True, exist_ok=True)
    lines = ["image,xmin,ymin,xmax,ymax"]
    for k in range(40):
        pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(raw / folders[k % 2] / f"i{k}.png")
        lines.append(f"i{k}.png,4,4,20,{20 + k % 8}")
    if task == "detection":
        (raw / "boxes.csv").write_text("\n".join(lines))


def some_file(raw: Path) -> Path:
    return sorted(path for path in raw.rglob("*") if path.suffix in (".png", ".gz"))[0]


def arrays(cache: Path) -> dict[str, bytes]:
    """All of a cache but meta.json, which has its path."""
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != "meta.json")
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


# --- from raw data ---


@TASKS
def test_raw_data_become_the_cache_of_the_printed_command(task, capsys):
    raw, out, cache = Path("raw"), Path("run"), Path("run_cache")
    write_raw(raw, task)
    train(task, raw, out, "--epochs", "2", "--stop-after", "1")
    printed = capsys.readouterr().out
    command = shlex.split(printed.split("so first: ")[1].splitlines()[0])
    assert command == ["python", f"{task}/preprocess.py", "--data", "raw", "--out", "run_cache"]
    assert f"eval.py --data {cache} --checkpoint run/best.pt" in printed.splitlines()[-1]
    module(task, "preprocess").main([*command[2:-1], "by_hand"])
    assert arrays(cache) == arrays(Path("by_hand"))

    before = (cache / "meta.json").stat()
    (raw / ".DS_Store").write_text("what macOS leaves behind")
    train(task, raw, out, "--epochs", "2", "--resume")
    assert "reusing run_cache, made from the same files" in capsys.readouterr().out
    assert load_checkpoint(out / "last.pt")["epoch"] == 2
    assert (cache / "meta.json").stat() == before


def add(raw: Path) -> None:
    (raw / "readme.txt").write_text("new")


def remove(raw: Path) -> None:
    some_file(raw).unlink()


def rename(raw: Path) -> None:
    some_file(raw).rename(some_file(raw).with_name(f"z{some_file(raw).name}"))


def enlarge(raw: Path) -> None:
    path = some_file(raw)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path, ns=times)


def touch(raw: Path) -> None:
    os.utime(some_file(raw), ns=(0, 1))


@TASKS
@pytest.mark.parametrize("change", [add, remove, rename, enlarge, touch])
def test_a_cache_of_changed_raw_data_is_neither_used_nor_replaced(task, change):
    raw = Path("raw")
    write_raw(raw, task)
    module(task, "preprocess").main(["--data", "raw", "--out", "run_cache"])
    before = arrays(Path("run_cache"))
    change(raw)
    found = refusal(train, task, raw, Path("run"), "--overwrite")
    again = f"python {task}/preprocess.py --data raw --out run_cache --overwrite"
    assert found == (
        "run_cache: made from other files than raw has now; train on it as it is with --data "
        f"run_cache, or make it again: {again}"
    )
    assert arrays(Path("run_cache")) == before and not Path("run").exists()


@TASKS
def test_a_cache_with_other_options_is_named(task):
    write_raw(Path("raw"), task)
    words = ["--data", "raw", "--out", "run_cache", "--patient-regex", "[0-9]+", "--workers", "1"]
    module(task, "preprocess").main(words)
    found = refusal(train, task, Path("raw"), Path("run"))
    assert "made with other options: patient_regex [0-9]+ (now None); train" in found
    meta = json.loads(Path("run_cache/meta.json").read_text())
    del meta["listing"]  # as older caches are
    Path("run_cache/meta.json").write_text(json.dumps(meta))
    assert "from other files than raw" in refusal(train, task, Path("raw"), Path("run"))
    train(task, Path("run_cache"), Path("run"))


@TASKS
def test_bad_raw_files_are_refused_with_the_command_that_goes_on(task, capsys):
    write_raw(Path("raw"), task)
    some_file(Path("raw")).write_bytes(b"nothing")
    found = refusal(train, task, Path("raw"), Path("run"))
    assert str(some_file(Path("raw"))) in capsys.readouterr().err
    command = f"python {task}/preprocess.py --data raw --out run_cache --skip-bad"
    assert found.endswith(f"use --skip-bad: {command}") and not Path("run_cache").exists()
    module(task, "preprocess").main(shlex.split(command)[2:])
    assert "skip_bad True (now None)" in refusal(train, task, Path("raw"), Path("run"))
    train(task, Path("run_cache"), Path("run"))


@TASKS
def test_what_is_neither_raw_data_nor_a_cache_is_told(task, capsys):
    Path("else").mkdir()
    Path("else/notes.txt").write_text("x")
    found = refusal(train, task, Path("else"), Path("run"))
    assert found.startswith("else: found ") and "expected" in found
    assert "else is not a cache of preprocess.py" in capsys.readouterr().out
    for name in ("nowhere", "half"):  # a half cache, as older versions left it when interrupted
        found = refusal(train, task, Path(name), Path("run"))
        assert found.startswith(f"{name}: no finished cache here; make one by: python {task}/")
        Path("half").mkdir(exist_ok=True)
        parts = {"segmentation": ("index.csv", "volumes")}.get(task, ("images.npy",))
        for part in parts:
            Path("half", part).mkdir(exist_ok=True)


def test_options_that_raw_data_need_go_to_preprocess():
    write_raw(Path("raw"), "classification")
    Path("raw/no").rename("raw/covid")
    Path("raw/yes").rename("raw/normal")
    found = refusal(train, "classification", Path("raw"), Path("run"))
    command = "python classification/preprocess.py --data raw --out run_cache"
    assert "--classes normal covid" in found and found.endswith(f"; the command: {command}")


def test_a_training_that_must_not_go_is_seen_before_anything_is_preprocessed():
    write_raw(Path("raw"), "segmentation")
    Path("run").mkdir()
    Path("run/best.pt").touch()
    assert "holds a training" in refusal(train, "segmentation", Path("raw"), Path("run"))
    assert not Path("run_cache").exists()


def prepare(rank: int, slow: Callable, connect: Callable, results: multiprocessing.Queue) -> None:
    """One of two processes that turn back after two seconds of waiting."""
    preprocess.main = slow
    if rank == 1:
        dist.new_group = connect
    file = f"file://{Path('rendezvous').resolve()}"
    patience = timedelta(seconds=2)
    dist.init_process_group("gloo", file, rank=rank, world_size=2, timeout=patience)
    args = segmentation.parse_args(["--data", "raw", "--out", "run"])
    try:
        results.put(str(segmentation.prepare_cache(args, rank == 0, 2)))
    except preprocess.DataError as error:
        results.put(str(error))


def write_slowly(words: list[str]) -> None:
    time.sleep(4)
    Path("run_cache").mkdir()


def fail(words: list[str]) -> None:
    raise preprocess.DataError("no space left")


def connect_too_late(**options: object) -> None:
    """As in a process that the other one does not wait for."""
    new_group(**options)
    raise RuntimeError("Gloo connectFullMesh failed: Connection closed by peer")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("make, connect, found", [
    (write_slowly, new_group, ["run_cache", "run_cache"]),
    (fail, new_group, ["no space left", "process 0 has stopped; the reason is its message"]),
    (fail, connect_too_late, ["no space left", "process 0 has stopped; the reason is its message"]),
])  # fmt: skip
def test_processes_wait_for_the_cache_as_long_as_it_takes_and_end_together(make, connect, found):
    write_raw(Path("raw"), "segmentation")
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    both = [fork.Process(target=prepare, args=(rank, make, connect, results)) for rank in (0, 1)]
    for process in both:
        process.start()
    assert sorted(results.get(timeout=60) for _ in both) == found
    for process in both:
        process.join(60)


# --- from the weights of another run ---


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_detector_takes_the_whole_backbone_of_a_classifier_and_back(arch):
    source = build_classifier(arch, 2, 96, width=8)
    model = build_detector(arch, "linear", 8)
    taken = load_fitting_weights(model, {"model": source.state_dict()}, Path("x.pt"))
    rest = model.state_dict().keys() - taken
    assert rest == {"out.weight", "out.bias"} and len(taken) == len(source.state_dict()) - 2
    for name in taken:
        weight = source.state_dict()[name.removeprefix("backbone.")]
        assert torch.equal(model.state_dict()[name], weight)
    other = build_classifier(arch, 3, 96, width=8)
    load_fitting_weights(other, {"model": model.state_dict()}, Path("x.pt"))
    assert torch.equal(other.layer4[0].conv1.weight, source.layer4[0].conv1.weight)


def test_the_usual_width_starts_with_the_weights_that_it_always_had():
    torch.manual_seed(3)
    expected = torchvision.models.resnet18()
    expected.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(expected.conv1.weight, mode="fan_out", nonlinearity="relu")
    expected.fc = nn.Linear(512, 3)
    torch.manual_seed(3)
    assert same(build_classifier("resnet18", 3, 96).state_dict(), expected.state_dict())


def test_what_was_taken_and_what_was_not_is_counted(capsys):
    for task in ("classification", "detection"):
        draw_cache(Path(task), task)
    train("classification", Path("classification"), Path("a"))
    capsys.readouterr()
    options = ["--init", "a/last.pt", "--lr", "1e-12", "--weight-decay", "0"]
    train("detection", Path("detection"), Path("b"), *options, "--channels", "16")
    line = "--init a/last.pt: 7 of its 9 arrays taken; 2 that it lacks or has in other shapes start"
    assert f"{line} at random: out.bias, out.weight\n" in capsys.readouterr().out
    old, new = (load_checkpoint(Path(run, "last.pt"))["model"] for run in "ab")
    assert torch.allclose(old["conv1.weight"], new["backbone.conv1.weight"], atol=1e-6)
    train("detection", Path("detection"), Path("c"), "--init", "b/last.pt", "--channels", "16")
    assert "--init b/last.pt: 9 of its 9 arrays taken\n" in capsys.readouterr().out


@TASKS
def test_freeze_trains_the_head_and_nothing_else(task, capsys):
    draw_cache(Path("cache"), task)
    train(task, Path("cache"), Path("a"))
    options = ["--init", "a/last.pt", "--freeze", "--lr", "0.01", "--epochs", "2"]
    train(task, Path("cache"), Path("b"), *options)
    before, after = (load_checkpoint(Path(run, "last.pt")) for run in "ab")
    head = {"classification": "fc", "detection": "out", "segmentation": "head"}[task]
    for name, weight in after["model"].items():  # with the statistics of norms
        assert torch.equal(weight, before["model"][name]) == (not name.startswith(head)), name
    assert len(after["optimizer"]["state"]) == 2
    names = [name for name in before["model"] if not name.startswith(head)]
    assert after["frozen"] == [name for name in names if name.endswith(("weight", "bias"))]
    said = f"--freeze: {len(after['frozen'])} of {len(after['frozen']) + 2} arrays of weights stay"
    assert said in capsys.readouterr().out

    train(task, Path("cache"), Path("c"), *options, "--stop-after", "1")
    train(task, Path("cache"), Path("c"), "--freeze", *options[3:], "--resume")
    for run in "bc":  # which takes time as well
        last = load_checkpoint(Path(run, "last.pt"))
        for row in last["log"]:
            row.pop("train_seconds", None)
        save_checkpoint(Path(run, "last.pt"), last)
    assert_same_training(Path("b"), Path("c"))
    with pytest.raises(ValueError, match=r"freeze True \(now False\)"):
        train(task, Path("cache"), Path("c"), *options[3:], "--resume")


def test_freeze_is_refused_where_nothing_stays(capsys):
    draw_cache(Path("cache"), "classification")
    train("classification", Path("cache"), Path("a"))
    for task in ("classification", "detection", "segmentation"):
        with pytest.raises(SystemExit) as stop:
            module(task, "train").parse_args(["--freeze"])
        assert stop.value.code == 2 and "--freeze needs --init" in capsys.readouterr().err
        assert module(task, "train").parse_args(["--freeze", "--resume"]).freeze
    last = load_checkpoint(Path("a/last.pt"))
    last["model"] = {name: w for name, w in last["model"].items() if name.startswith("fc")}
    save_checkpoint(Path("head.pt"), last)
    command = ["--init", "head.pt", "--freeze"]
    found = refusal(train, "classification", Path("cache"), Path("b"), *command)
    assert found == "head.pt: only the head fits, which leaves --freeze nothing"


def test_checkpoints_from_before_these_options_are_resumed_and_evaluated():
    draw_cache(Path("cache"), "classification")
    train("classification", Path("cache"), Path("a"), "--epochs", "2", "--stop-after", "1")
    for name in ("last.pt", "best.pt"):
        older = load_checkpoint(Path("a", name))
        del older["settings"]["freeze"], older["settings"]["channels"], older["frozen"]
        save_checkpoint(Path("a", name), older)
    evaluate("classification", Path("cache"), "--checkpoint", "a/best.pt")
    train("classification", Path("cache"), Path("a"), "--epochs", "2", "--resume")
    assert load_checkpoint(Path("a/last.pt"))["epoch"] == 2


# --- where another one has ended ---


@TASKS
def test_resume_with_more_epochs_says_how_to_go_on(task, capsys):
    draw_cache(Path("cache"), task)
    train(task, Path("cache"), Path("a"))
    found = refusal(train, task, Path("cache"), Path("a"), "--epochs", "3", "--resume")
    assert found == (
        "a/last.pt: cannot resume, it was trained with epochs 1 (now 3); to go on from its "
        "weights: --init a/last.pt --epochs 3 --out OTHER"
    )
    other = refusal(train, task, Path("cache"), Path("a"), "--lr", "0.5", "--resume")
    assert other.endswith("lr 0.001 (now 0.5)")
    capsys.readouterr()
    train(task, Path("cache"), Path("a"), "--resume")
    said = "all 1 epochs are done; to go on from its weights: --init a/last.pt --epochs N"
    assert f"a/last.pt: {said} --out OTHER\n" in capsys.readouterr().out
    train(task, Path("cache"), Path("b"), "--epochs", "2", "--stop-after", "1")
    train(task, Path("cache"), Path("b"), "--epochs", "2", "--resume")
    assert "are done" not in capsys.readouterr().out


# --- log.png ---


def test_ticks_are_round_numbers_about_the_range():
    assert linear_ticks(0, 1) == [0, 0.5, 1]
    assert linear_ticks(0.62, 0.93) == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    assert linear_ticks(1, 20) == [0, 5, 10, 15, 20]
    assert linear_ticks(1, 3) == [1, 1.5, 2, 2.5, 3]
    assert min(linear_ticks(0.5, 0.5)) < 0.5 < max(linear_ticks(0.5, 0.5))
    assert log_ticks([0.03, 0.9]) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1])
    assert log_ticks([3e-5, 0.9]) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_the_picture_shows_each_value_where_it_belongs():
    blue, red = (ImageColor.getrgb(CURVE[name]) for name in ("training", "validation"))
    rows = [{"train_loss": 2.0, "val_loss": 1.0, "val_dice": 0.0}]
    rows += [{"train_loss": 1.5, "val_loss": math.inf, "val_dice": 1.0}]
    picture = draw_log(rows, "val_dice", 2)
    # Axes from x 65 to 480 and from y 345, the lowest value, to 65; the second panel is 500 further.
    assert picture.size == (1000, 400)
    assert picture.getpixel((65, 65)) == picture.getpixel((480, 205)) == blue  # 2.0 and 1.5
    assert picture.getpixel((65, 345)) == red  # a loss of 1.0; the infinite one is left out
    assert picture.getpixel((565, 345)) == picture.getpixel((980, 65)) == red
    dashes = [picture.getpixel((980, y)) for y in range(100, 340)]
    before = [picture.getpixel((700, y)) for y in range(100, 340)]
    assert sum(max(pixel) < 200 for pixel in dashes) > 100 > sum(max(p) < 200 for p in before)
    draw_log([{"train_loss": math.nan, "val_dice": math.nan}], "val_dice", 0)
    rows = [{"train_loss": 2.0}, {"train_loss": 1.5}]
    assert draw_log(rows, "val_dice", 0).size == (500, 400)
    # Scores of the epochs 2 and 4 are joined: epoch 3, which was not validated, is no gap.
    rows = [{"train_loss": 2.0} for _ in range(4)]
    rows[1] |= {"val_dice": 0.0}
    rows[3] |= {"val_dice": 1.0}
    picture = draw_log(rows, "val_dice", 4)
    assert picture.getpixel((500 + round(65 + 415 * 2 / 3), 205)) == red


@TASKS
def test_log_png_is_redrawn_every_epoch_with_the_best_one(task, monkeypatch):
    draw_cache(Path("cache"), task)
    drawn = []
    monkeypatch.setattr(
        "common.checkpoint.draw_log",
        lambda *args: drawn.append((len(args[0]), *args[1:])) or draw_log(*args),
    )
    train(task, Path("cache"), Path("a"), "--epochs", "3", "--stop-after", "2")
    name = {"classification": "auroc", "detection": "mean_iou", "segmentation": "dice"}[task]
    last = load_checkpoint(Path("a/last.pt"))
    scores = [row[f"val_{name}"] for row in last["log"]]
    better = 2 if scores[1] >= scores[0] else 1  # on a tie the later one
    assert drawn == [(1, f"val_{name}", 1), (2, f"val_{name}", better)]
    assert load_checkpoint(Path("a/best.pt"))["epoch"] == better
    last["log"][0][f"val_{name}"] = last["best"] = 2.0  # which no later epoch reaches
    save_checkpoint(Path("a/last.pt"), last)
    train(task, Path("cache"), Path("a"), "--epochs", "3", "--resume")
    assert drawn[2:] == [(3, f"val_{name}", 1)]
    assert Image.open("a/log.png").size == (1000, 400) and not list(Path("a").glob(".partial*"))
