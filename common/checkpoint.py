"""Checkpoints and other files of a run: written atomically, loaded without running their code.

In this order: writing files, reading checkpoints, a run (`Run` is what the three train.py use),
the picture of its log, and the hashes by which eval.py knows what a run was trained on.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import pickle
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# Settings that older checkpoints lack, and what they were without a word
OLDER_SETTINGS = {"freeze": False, "channels": 64, "validate_every": 1}
BACKBONE = "backbone."  # prefix of the ResNet's weights in detection, which classification lacks

# log.png, in pixels of twice its final size
PANEL = (1000, 800)  # width and height of a panel, of which there are two
TOP = 130  # y of the upper end of the axes
BOTTOM = PANEL[1] - 110  # y of the horizontal axis
CURVE = {"training": "#1f4e9c", "validation": "#c0392b"}


class CheckpointError(ValueError):
    """A file of a run that is missing or damaged, does not fit, or cannot be written."""


# --- writing ---


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of plain values, lists, dicts, tensors; a crash leaves the old or the new file.

    Keep the bare model's `state_dict()` in it, not that of a compiled or distributed wrapper.
    Raises CheckpointError naming the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with old or no content
        os.replace(temporary, path)  # atomic, because both are in one folder
    except (OSError, RuntimeError) as error:
        # torch hides the OSError of a full disk in a RuntimeError
        raise CheckpointError(f"{path}: not written ({error.__context__ or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed at the end: a file that bears its name is complete.

    Raises CheckpointError naming the file if it cannot be written.
    """
    # Writers choose the format by the suffix, of which .nii.gz is the longest.
    temporary = path.with_name(f".partial_{path.name[-7:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: not written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict) -> None:
    """Write a report; NaN and infinite numbers, which JSON does not have, become null."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    with written(path) as temporary:
        temporary.write_text(json.dumps(plain(values), indent=1), encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with the columns of all; what a row lacks stays empty."""
    columns = {name: None for row in rows for name in row}  # a dict keeps their order
    with written(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def clear_results(out: Path, names: Iterable[str]) -> None:
    """Remove what an earlier run left: nothing of it is to be taken for this run's."""
    for name in names:
        (out / name).unlink(missing_ok=True)


def lock_folder(folder: Path) -> TextIO | None:
    """Make the folder and keep other processes out until the file that is returned is closed.

    Raises CheckpointError if one writes there. Windows has no such locks: there nothing is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    file = open(folder / ".lock", "w")  # noqa: SIM115, closed by unlock_folder or with the process
    try:
        # The system frees this lock when a process ends, however it ends: no stale locks.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        message = f"{folder}: another run writes here; wait for it, or use another --out"
        raise CheckpointError(message) from error
    # A command that ends with an error never unlocks, and leaves no .lock behind either.
    weakref.finalize(file, Path.unlink, folder / ".lock", missing_ok=True)
    return file


def unlock_folder(file: TextIO | None) -> None:
    """Let others write to the folder again."""
    if file is not None and not file.closed:
        Path(file.name).unlink(missing_ok=True)
        file.close()


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """`lock_folder` for the lines of a with statement."""
    lock = lock_folder(folder)
    try:
        yield
    finally:
        unlock_folder(lock)


# --- reading ---


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save_checkpoint` wrote, tensors on `device`. Raises CheckpointError."""
    if not path.is_file():
        hint = "train.py writes best.pt and last.pt to its --out"
        raise CheckpointError(f"{path}: no checkpoint here; {hint}")
    try:
        # A pickle can run any code when it is loaded; weights_only refuses such a file.
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at the checksums
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values; nothing of it was run"
        raise CheckpointError(f"{path}: not a checkpoint of train.py ({reason})") from error
    except Exception as error:  # torch, pickle and zipfile each raise their own
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if damaged:
        raise CheckpointError(f"{path}: not a whole checkpoint, the checksum of {damaged} is wrong")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        expected = "expected the weights under 'model'"
        raise CheckpointError(f"{path}: not a checkpoint of train.py, {expected}")
    return checkpoint


def check_types(values: dict, types: dict[str, type], where: object) -> None:
    """Raise CheckpointError unless `values` has all these names, each with a value of its type."""
    for name, expected in types.items():
        value = values.get(name)
        if type(value) is not expected:  # isinstance would take True for an int
            message = f"{name} is {repr(value)[:60]}, expected a value of type {expected.__name__}"
            raise CheckpointError(f"{where}: {message}")


def load_run(
    path: Path, task: str, settings: dict[str, type], device: torch.device | str = "cpu"
) -> dict:
    """Read a checkpoint of this task's train.py, with at least these settings.

    What is in its `meta` is for the task to check. Raises CheckpointError.
    """
    checkpoint = load_checkpoint(path, device)
    other = checkpoint.get("task", task)  # older checkpoints do not say
    if other != task:
        message = f"a checkpoint of {other}/train.py, expected one of {task}/train.py"
        raise CheckpointError(f"{path}: {message}")
    check_types(checkpoint, {"meta": dict, "settings": dict, "epoch": int, "figures": dict}, path)
    check_types(checkpoint["settings"], {"fold": int, "index": str, "amp": str} | settings, path)
    batch_size = checkpoint["settings"].get("batch_size")
    if type(batch_size) is not int or batch_size < 1:
        raise CheckpointError(f"{path}: batch_size is {batch_size!r}, expected 1 or more")
    return checkpoint


def check_weights(state: dict, path: Path) -> None:
    """Raise CheckpointError if a weight is NaN or infinite: no loss or score could be a number."""
    for name, weight in state.items():
        if isinstance(weight, torch.Tensor) and not weight.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite weights, expected numbers")


def load_weights(model: nn.Module, checkpoint: dict, path: Path) -> None:
    """Copy `checkpoint["model"]` into a bare model. Raises CheckpointError if it does not fit."""
    check_weights(checkpoint["model"], path)
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: does not fit this model: {reason}") from error


def load_fitting_weights(model: nn.Module, checkpoint: dict, path: Path) -> list[str]:
    """Copy the weights whose name and shape fit into a bare model; the model's names of those.

    For --init: another number of classes keeps all but the last layer, another task the backbone,
    which has a prefix where it is a part of the network. Raises CheckpointError if nothing fits.
    """
    check_weights(checkpoint["model"], path)
    own = model.state_dict()
    given = {}
    for name, weight in checkpoint["model"].items():
        given[str(name).removeprefix(BACKBONE)] = weight
    fitting = {}
    for name in own:
        weight = given.get(name.removeprefix(BACKBONE))
        if isinstance(weight, torch.Tensor) and weight.shape == own[name].shape:
            fitting[name] = weight
    # A norm's counter of batches has no dimensions, and so fits any network.
    if not any(weight.ndim for weight in fitting.values()):
        message = "none of its weights has the name and the shape of one of this model"
        raise CheckpointError(f"{path}: {message}")
    model.load_state_dict(own | fitting)
    return list(fitting)


# --- a run: a training's folder and its state ---


@dataclass
class Run:
    """A training's folder and how far it has come. Rank 0 claims and saves, all ranks restore."""

    out: Path
    score: str  # the column of log.csv that best.pt is chosen by
    epoch: int = 0  # epochs done
    best: float = -math.inf  # validation score of best.pt
    best_epoch: int = 0
    log: list[dict] = field(default_factory=list)  # a row for each epoch
    trained_on: dict | None = None  # see list_trained_on
    lock: TextIO | None = None

    def restore(
        self, settings: dict, meta: dict, model: nn.Module, optimizer: Optimizer, scaler: GradScaler
    ) -> None:
        """Go on from last.pt. Raises CheckpointError if it was trained otherwise."""
        last = self.out / "last.pt"
        saved = restore_state(last, settings, meta, model, optimizer, scaler)
        self.epoch = saved["epoch"]
        self.log = saved["log"]
        self.trained_on = saved.get("trained_on")  # older checkpoints do not say
        if (self.out / "best.pt").exists():  # without it the next epoch is the best one there is
            self.best = saved["best"]
        for row in self.log:
            if row.get(self.score) == self.best:
                self.best_epoch = row["epoch"]

    def claim(self, args: argparse.Namespace, settings: dict) -> None:
        """Keep others out of the folder. Raises CheckpointError if it holds a run that must not go.

        What a run on the synthetic set left there goes without asking, for another such run.
        """
        self.lock = lock_folder(self.out)
        last = self.out / "last.pt"
        if args.resume and self.epoch >= args.epochs:
            print(f"{last}: all {self.epoch} epochs are done; {hint_at_init(last, 'N')}")
        if not args.resume:
            is_demo = args.data is None and trained_on_index(last, settings["index"])
            refuse_overwriting(self.out, args.overwrite or is_demo)

    def save(
        self,
        row: dict,
        score: float | None,
        contents: dict,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler,
    ) -> None:
        """Print and log an epoch; write best.pt if its score is the best so far, then last.pt.

        `score` is None without validation. On a tie keep the later epoch, whose learning rate is
        lower. In this order a crash leaves a last.pt that is older than best.pt, and never one
        whose best.pt is missing.
        """
        if sys.stdout.isatty():
            print("\r\033[K", end="")  # the line of progress makes room
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        self.epoch = row["epoch"]
        self.log.append(row)
        contents = contents | {
            "epoch": self.epoch,
            "trained_on": self.trained_on,
            "model": model.state_dict(),
            "frozen": [name for name, w in model.named_parameters() if not w.requires_grad],
        }
        last = self.out / "last.pt"
        best = self.out / "best.pt"
        if score is not None and score >= self.best:
            self.best = score
            self.best_epoch = self.epoch
            save_checkpoint(best, contents)
        if self.epoch == 1:  # what a run that is replaced has left
            last.unlink(missing_ok=True)
            if not self.best_epoch:
                best.unlink(missing_ok=True)
        contents |= {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "best": self.best,
            "log": self.log,
        }
        save_checkpoint(last, contents)
        write_csv(self.out / "log.csv", self.log)
        with written(self.out / "log.png") as temporary:
            draw_log(self.log, self.score, self.best_epoch).save(temporary)


def identify_run(cache: Path, world_size: int) -> dict:
    """What tells a run from others beside its options: the number of processes and the cache."""
    return {
        "world_size": world_size,
        "index": file_sha256(cache / "index.csv"),
        "array_bytes": array_bytes(cache),
    }


def load_init(
    args: argparse.Namespace,
    model: nn.Module,
    device: torch.device,
    is_main: bool,
    head: tuple[str, ...],
) -> dict:
    """Copy what fits of --init into the model; returns its checkpoint, {} without one.

    --freeze then holds all that came from there (or with --pretrained) but for the head, whose
    names begin with one of `head`; a resumed run holds what it held before. Raises CheckpointError.
    """
    if args.resume:  # the weights themselves come from last.pt, by Run.restore
        if args.freeze:
            freeze(model, load_checkpoint(args.out / "last.pt").get("frozen", []))
        return {}
    init = {}
    taken = list(model.state_dict())  # with --pretrained and no --init: all
    if args.init:
        init = load_checkpoint(args.init, device)
        taken = load_fitting_weights(model, init, args.init)
        if is_main:
            report_init(args.init, list(model.state_dict()), taken, len(init["model"]))
    if args.freeze:
        frozen = freeze(model, [name for name in taken if not name.startswith(head)])
        total = sum(1 for _ in model.parameters())
        if not frozen:
            raise CheckpointError(f"{args.init}: only the head fits, which leaves --freeze nothing")
        if is_main:
            print(f"--freeze: {len(frozen)} of {total} arrays of weights stay as they are")
    return init


def report_init(path: Path, own: list[str], taken: list[str], given: int) -> None:
    """Say how many arrays came from --init, and which start at random."""
    line = f"--init {path}: {len(taken)} of its {given} arrays taken"
    missing = sorted(set(own) - set(taken))
    if missing:
        examples = ", ".join(missing[:4])
        if len(missing) > 4:
            examples += ", ..."
        line += f"; {len(missing)} that it lacks or has in other shapes start at random: {examples}"
    print(line)


def freeze(model: nn.Module, names: list[str]) -> list[str]:
    """Exclude weights from training; the names of those that the model has."""
    frozen = []
    for name, weight in model.named_parameters():
        if name in names:
            weight.requires_grad = False
            frozen.append(name)
    return frozen


def set_training(model: nn.Module) -> None:
    """model.train(), but norms whose weights are frozen keep the statistics that they came with.

    BatchNorm in training mode updates its running mean and variance even if its weights are fixed.
    """
    model.train()
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def check_settings(saved: dict, current: dict, path: Path) -> None:
    """Raise CheckpointError listing the settings that would change the result of a resumed run."""
    changes = {}
    for name in {**saved, **current}:
        if saved.get(name) != current.get(name):
            changes[name] = f"{name} {saved.get(name)} (now {current.get(name)})"
    if changes:
        message = f"{path}: cannot resume, it was trained with {', '.join(changes.values())}"
        if "epochs" in changes:
            message += f"; {hint_at_init(path, current['epochs'])}"
        raise CheckpointError(message)


def hint_at_init(path: Path, epochs: object) -> str:
    """What to type for more epochs: the learning rate of a run ends at zero, so it is a new one."""
    return f"to go on from its weights: --init {path} --epochs {epochs} --out OTHER"


def array_bytes(cache: Path) -> int:
    """Bytes of all arrays of a cache: with index.csv and meta.json they tell it from others."""
    return sum(path.stat().st_size for path in cache.rglob("*.npy"))


def trained_on_index(path: Path, index: str) -> bool:
    """Whether there is a checkpoint that was trained on the cache with this hash of index.csv."""
    return path.exists() and load_checkpoint(path).get("settings", {}).get("index") == index


def refuse_overwriting(out: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the output folder holds a training that nobody said may go.

    Nothing is deleted here: a training is replaced when the new one has finished its first epoch.
    """
    ours = [name for name in ("last.pt", "best.pt", "log.csv") if (out / name).exists()]
    if ours and not overwrite:
        message = f"{out}: holds a training ({', '.join(ours)})"
        raise CheckpointError(f"{message}; use --resume, --overwrite, or another --out")


def restore_state(
    path: Path,
    settings: dict,
    meta: dict,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
) -> dict:
    """Put last.pt into model, optimizer and scaler, and return all that it holds.

    Raises CheckpointError if it was trained with other settings or on another cache.
    """
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        message = "no state of the optimizer in it; a copy of best.pt cannot be resumed"
        raise CheckpointError(f"{path}: {message}")
    types = {"settings": dict, "meta": dict, "optimizer": dict, "scaler": dict, "log": list}
    check_types(checkpoint, types | {"epoch": int, "best": float}, path)
    epoch = checkpoint["epoch"]
    rows = len(checkpoint["log"])
    if rows != epoch or epoch < 1:
        message = f"epoch {epoch} and a log of {rows} epochs, expected one row for each epoch"
        raise CheckpointError(f"{path}: {message}")
    # Older checkpoints do not say how large the arrays were: taken to be as large as now.
    unsaid = {name: value for name, value in OLDER_SETTINGS.items() if name in settings}
    unsaid |= {"array_bytes": settings["array_bytes"]}
    check_settings(unsaid | checkpoint["settings"], settings, path)
    check_settings(checkpoint["meta"], meta, path)
    load_weights(model, checkpoint, path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        # torch checks the number of weights, not the shapes of their moments.
        for weight, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != weight.shape:
                    raise ValueError(f"{name} {tuple(state[name].shape)} for {tuple(weight.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: the optimizer's state does not fit ({reason})") from error
    return checkpoint


# --- log.png ---


def draw_log(log: list[dict], score: str, best: int) -> Image.Image:
    """Loss and score by epoch, side by side, of the rows of log.csv; the best epoch is marked.

    `score` is a column, `best` an epoch, or 0 for none. What is not finite leaves a gap; lines go
    on over epochs without validation. Without any there is no second panel.
    """
    panels = 2 if any(score in row for row in log) else 1
    picture = Image.new("RGB", (panels * PANEL[0], PANEL[1]), "white")
    draw = ImageDraw.Draw(picture)
    losses = {}
    for name, column in {"training": "train_loss", "validation": "val_loss"}.items():
        if column in log[0]:  # segmentation validates by scores alone
            losses[name] = [row.get(column) for row in log]
    draw_curves(draw, 0, "loss", losses, best)
    if panels == 2:
        title = score.removeprefix("val_").replace("_", " ")
        scores = {"validation": [row.get(score) for row in log]}
        draw_curves(draw, PANEL[0], title, scores, best)
    return picture.reduce(2)  # Pillow's lines are smooth only if drawn larger


def draw_curves(
    draw: ImageDraw.ImageDraw, x: int, title: str, curves: dict[str, list], best: int
) -> None:
    """One panel, whose left side is at `x`: a grid with numbers, a legend, and the curves.

    A curve has a number for each epoch, or None for one without validation.
    """
    left = x + 130  # ends of the horizontal axis
    right = x + PANEL[0] - 40
    epochs = len(next(iter(curves.values())))
    finite = []
    for values in curves.values():
        finite += [value for value in values if value is not None and math.isfinite(value)]
    finite = finite or [0.0]
    # A loss that falls to a tenth is a corner on a linear axis.
    is_log = title == "loss" and 0 < 10 * min(finite) < max(finite)
    ticks = log_ticks(finite) if is_log else linear_ticks(min(finite), max(finite))
    low = min(ticks + finite)
    high = max(ticks + finite)

    def place(epoch: float, value: float) -> tuple[float, float]:
        """Pixel (x, y) of a value; y points downwards."""
        share = (value - low) / (high - low)  # of the height of the axes
        if is_log:
            share = math.log(value / low) / math.log(high / low)
        along = (epoch - 1) / max(1, epochs - 1)
        return left + along * (right - left), BOTTOM - share * (BOTTOM - TOP)

    # Horizontal lines with their values, ticks with their epochs, axes, title
    for tick in ticks:
        _, y = place(1, tick)
        draw.line((left, y, right, y), "#dddddd", 2)
        draw.text((left - 14, y), f"{tick:.4g}", "black", small_font(), anchor="rm")
    for epoch in linear_ticks(1, epochs):
        if epoch == int(epoch) and 1 <= epoch <= epochs:
            at, _ = place(epoch, low)
            draw.line((at, BOTTOM, at, BOTTOM + 8), "black", 2)
            draw.text((at, BOTTOM + 28), f"{epoch:.0f}", "black", small_font(), anchor="mm")
    draw.line((left, TOP, left, BOTTOM, right, BOTTOM), "black", 2)
    middle = (left + right) / 2
    draw.text((middle, BOTTOM + 74), "epoch", "black", small_font(), anchor="mm")
    large = ImageFont.load_default(size=30)
    draw.text((left, 44), f"{title} (log)" if is_log else title, "black", large, anchor="lm")

    # Curves last, above all other lines
    if best:
        at, _ = place(best, low)
        text = f"best: epoch {best}"
        if title != "loss":
            text += f", {curves['validation'][best - 1]:.4g}"
        mark_best(draw, at, text, at > middle)
    draw_legend(draw, right, curves)
    for name, values in reversed(curves.items()):
        draw_curve(draw, place, values, CURVE[name])


def small_font() -> ImageFont.FreeTypeFont:
    """That of all numbers and names in a panel."""
    return ImageFont.load_default(size=24)


def mark_best(draw: ImageDraw.ImageDraw, at: float, text: str, is_left: bool) -> None:
    """A dashed line at `at`, and a text above it on its left or right side."""
    for y in range(TOP, BOTTOM, 16):
        draw.line((at, y, at, y + 8), "#888888", 2)
    beside = at - 10 if is_left else at + 10
    anchor = "rm" if is_left else "lm"
    draw.text((beside, TOP - 18), text, "#666666", small_font(), anchor)


def draw_legend(draw: ImageDraw.ImageDraw, right: float, curves: dict[str, list]) -> None:
    """Name, colour and last value of each curve, from right to left."""
    at = right
    for name, values in reversed(curves.items()):
        last = [value for value in values if value is not None][-1]
        text = f"{name} {last:.4g}"
        draw.text((at, 44), text, CURVE[name], small_font(), anchor="rm")
        at -= draw.textlength(text, small_font()) + 20
        draw.line((at - 40, 44, at, 44), CURVE[name], 6)
        at -= 70


def draw_curve(
    draw: ImageDraw.ImageDraw, place: Callable, values: list[float | None], colour: str
) -> None:
    """A line through the finite values, with dots if they are few.

    `place(epoch, value)` gives their pixels. A value that is not finite interrupts the line, None
    does not.
    """
    points = []  # since the last gap
    for epoch, value in enumerate([*values, math.nan], 1):  # the gap at the end draws the last part
        if value is None:
            continue
        if math.isfinite(value):
            points.append(place(epoch, value))
            continue
        if points:
            draw.line(points, colour, 6, joint="curve")
        if len(values) <= 30 or len(points) == 1:
            for x, y in points:
                draw.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
        points = []


def linear_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, 1, 2 or 5 times a power of ten apart, about a range."""
    if low == high:
        margin = 0.05 * max(1, abs(low))
        low -= margin
        high += margin
    step = 10 ** math.floor(math.log10((high - low) / 3))
    for factor in (5, 2):  # the largest step that leaves three numbers
        if (high - low) / (factor * step) >= 2:
            step *= factor
            break
    first = math.floor(low / step)
    return [k * step for k in range(first, math.ceil(high / step) + 1)]


def log_ticks(values: list[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten about a range; the powers alone if that is long."""
    first = math.floor(math.log10(min(values)))
    last = math.ceil(math.log10(max(values)))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = []
    for exponent in range(first, last + 1):
        ticks += [factor * 10.0**exponent for factor in factors]
    above = [tick for tick in ticks if tick >= max(values)]
    below = [tick for tick in ticks if tick <= min(values)]
    return [tick for tick in ticks if max(below) <= tick <= min(above)]


# --- what was trained on ---


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, to say which index or checkpoint a result belongs to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def short_hash(data: object) -> str:
    """The beginning of the SHA-256 of bytes or of a contiguous array."""
    return hashlib.sha256(data).hexdigest()[:12]


def list_trained_on(patients: list[str], images: list[str], init: dict | None = None) -> dict:
    """What a checkpoint keeps of its training rows: sorted hashes, with those of its --init."""
    before = (init or {}).get("trained_on") or {}
    return {
        "patients": sorted({*patients, *before.get("patients", [])}),
        "images": sorted({*images, *before.get("images", [])}),
    }


def count_trained_on(trained_on: dict, patients: list[str], images: list[str]) -> list[int]:
    """Numbers of the rows (a hash of the patient and of the image each) that were trained on."""
    known_patients = set(trained_on["patients"])
    known_images = set(trained_on["images"])
    seen = []
    for row_number, (patient, image) in enumerate(zip(patients, images, strict=True)):
        if patient in known_patients or image in known_images:
            seen.append(row_number)
    return seen
