"""Files of a run: new folders, atomic writing, checkpoints that are safe to read, resuming.

torch is imported where it is used: preprocess.py needs only the first parts, and starts ten times
as fast without it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import unicodedata
import warnings
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

FORMAT = 1  # version of caches and checkpoints; another number is refused
BACKBONE = "backbone."  # prefix of the ResNet's weights in detection, which classification lacks
PANEL = (500, 400)  # width and height in pixels of a panel of log.png
CURVES = {"train": "#1f4e9c", "val": "#c0392b"}  # colours by the prefix of a column


# --- errors and the command line ---


class DataError(ValueError):
    """An error the user can fix: shown as one line with exit status 1, without a traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Text for a terminal: one line, control characters escaped, cut in the middle if long."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    line = "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in line)
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


def run_command(main: Callable) -> None:
    """Run a script's main: user errors and Ctrl-C print one line, a bug keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the terminal lacks
    # Small faults in headers: some sets have one in every file.
    warnings.filterwarnings("ignore", module=r"pydicom|PIL|nibabel")
    try:
        main()
    except (DataError, OSError, RecursionError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker", "Symlink loop")):
            raise
        sys.exit(f"error: {one_line(error)} (out of memory? use fewer --workers)")


def progress(text: str) -> None:
    """Print a line that overwrites itself on a terminal, and nothing elsewhere."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


# --- new folders: what never replaces a file cannot lose one ---


def free_name(path: Path, newest: bool = False) -> Path:
    """The first of path, path-2, path-3, ... that does not exist; `newest`: the one before it."""
    names = [path]
    while os.path.lexists(names[-1]):
        names.append(path.with_name(f"{path.name}-{len(names) + 1}"))
    return names[-2] if newest and len(names) > 1 else names[-1]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder, OUT.unfinished, which becomes OUT at the end. Raises DataError if one exists."""
    refuse_existing(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.mkdir()
    except FileExistsError as error:
        reason = "another run writes there, or one was stopped: then remove this folder"
        raise DataError(f"{unfinished}: {reason}") from error
    try:
        yield unfinished
        unfinished.rename(out)
    except Exception:  # but a killed or interrupted run leaves its results so far
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_existing(out: Path, hint: str = "") -> None:
    """Raise DataError if `out` exists, even as a broken link."""
    if os.path.lexists(out) or not out.name:  # "/" and "." have no name
        raise DataError(f"{out}: exists already; {hint or 'remove it, or give another --out'}")


# --- writing ---


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed at the end. Raises DataError if it is not written."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")  # the suffix decides the format
    try:
        yield temporary
        os.replace(temporary, path)  # atomic, because both are in one folder
    except (OSError, RuntimeError) as error:
        # torch hides the OSError of a full disk in a RuntimeError.
        raise DataError(f"{path}: not written ({error.__context__ or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of plain values, lists, dicts, tensors; a crash leaves the old or the new file.

    Put the bare model's `state_dict()` into it, not that of a compiled or distributed wrapper.
    Raises DataError if it cannot be written.
    """
    import torch

    checkpoint = {"format": FORMAT, **checkpoint}
    checkpoint["digest"] = hash_values(checkpoint)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # or a power cut may leave an empty file under the new name


def hash_values(checkpoint: dict) -> str:
    """SHA-256 of all plain values, and of the types and shapes of all tensors, of a checkpoint."""
    values = {name: value for name, value in checkpoint.items() if name != "digest"}
    text = json.dumps(values, default=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}")
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, values: dict) -> None:
    """Write a report; NaN and infinite numbers, which JSON does not have, become null."""
    plain = json.loads(json.dumps(values), parse_constant=lambda name: None)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with the columns of all of them; missing values stay empty."""
    columns = {name: None for row in rows for name in row}  # a dict keeps their order
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# --- reading ---


def read_meta(cache: Path, task: str, keys: tuple[str, ...]) -> dict:
    """The values of these keys in the meta.json of a finished cache. Raises DataError."""
    path = cache / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        command = f"python {task}/preprocess.py --data RAW --out {cache}"
        raise DataError(f"{cache}: no finished cache here; make one by: {command}") from error
    check_version(path, meta, task, "preprocess")
    missing = [name for name in keys if name not in meta]
    if missing:
        raise DataError(f"{path}: no {', '.join(missing)} in it; preprocess again")
    return {name: meta[name] for name in ("format", "task", *keys)}


def load_checkpoint(path: Path, task: str | None = None) -> dict:
    """Load a checkpoint of this task (None: of any task) on the CPU. Raises DataError."""
    import torch

    if not path.is_file():
        hint = "train.py writes best.pt and last.pt to its --out"
        raise DataError(f"{path}: no checkpoint here; {hint}")
    try:
        # A pickle can run any code when it is loaded; weights_only refuses such a file.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at the checksums
    except Exception as error:  # torch, pickle and zipfile each raise their own
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values; nothing of it was run"
        raise DataError(f"{path}: not a checkpoint of train.py ({reason[:120]})") from error
    if damaged:
        raise DataError(f"{path}: not a whole checkpoint, the checksum of {damaged} is wrong")
    check_version(path, checkpoint, task, "train")
    with suppress(Exception):  # keys and values of any type
        if checkpoint["digest"] == hash_values(checkpoint):
            return checkpoint
    problem = "not a checkpoint of this version: its values were changed after it was written"
    raise DataError(f"{path}: {problem}; train again")


def check_version(path: Path, values: object, task: str | None, step: str) -> None:
    """Raise DataError unless the contents of a file name this format and task."""
    if not isinstance(values, dict) or str(values.get("format")) != str(FORMAT):  # or a tensor
        script = f"{task or 'TASK'}/{step}.py"
        raise DataError(f"{path}: not made by this version of {script}; {step} again")
    if task not in (None, values.get("task")):
        raise DataError(f"{path}: made for {values.get('task')}, expected {task}")


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Copy weights by name into a bare model. Raises DataError if they do not fit, or are NaN."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{path}: does not fit this model: {error}") from error
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():  # every loss and score would be NaN
            raise DataError(f"{path}: {name} holds NaN or infinite weights, expected numbers")


def load_init(path: Path, model: nn.Module, is_main: bool) -> dict:
    """Copy the weights of --init whose name and shape fit into a bare model; return its checkpoint.

    With other classes all but the last layer fits, between classification and detection the ResNet.
    Raises DataError if nothing fits.
    """
    checkpoint = load_checkpoint(path)
    model_weights = model.state_dict()
    init = {name.removeprefix(BACKBONE): weight for name, weight in checkpoint["model"].items()}
    fitting = {}
    for name in model_weights:
        weight = init.get(name.removeprefix(BACKBONE))
        if weight is not None and weight.shape == model_weights[name].shape:
            fitting[name] = weight
    # A norm's counter of batches has no dimensions and fits every network.
    if not any(weight.ndim for weight in fitting.values()):
        message = "none of its weights has the name and the shape of one of this model"
        raise DataError(f"{path}: {message}")
    load_weights(model, model_weights | fitting, path)
    if is_main:
        missing = sorted(model_weights.keys() - fitting.keys())
        at_random = f"{len(missing)} at random: {', '.join(missing[:4]) or 'none'}"
        print(f"--init {path}: {len(fitting)} of {len(init)} arrays taken, {at_random}")
    return checkpoint


# --- a run: a training's folder and its state ---


@dataclass
class Run:
    """A training's folder and state. All ranks restore, only rank 0 saves."""

    out: Path
    score: str  # the column of log.csv that best.pt is chosen by
    model: nn.Module  # the bare one
    optimizer: Optimizer
    scaler: GradScaler
    epoch: int = 0  # epochs done
    best: float = -math.inf  # validation score of best.pt
    best_epoch: int = 0
    log: list[dict] = field(default_factory=list)  # a row for each epoch
    trained_on: list[str] = field(default_factory=list)  # see list_trained_on

    def begin(
        self, args: Namespace, settings: dict, meta: dict, index: list[dict], is_main: bool
    ) -> None:
        """Resume from last.pt, or make the folder and start from the weights of --init.

        Raises DataError if the settings or the cache are not those of last.pt.
        """
        if not args.resume:
            init = load_init(args.init, self.model, is_main) if args.init else {}
            if is_main:
                self.trained_on = list_trained_on(index, str(args.fold), init)
                self.out.mkdir(parents=True, exist_ok=True)
                print(f"settings: {json.dumps(settings)}")
            return
        path = self.out / "last.pt"
        saved = load_checkpoint(path, meta["task"])
        if "optimizer" not in saved:
            raise DataError(f"{path}: no state of the optimizer in it, as in a copy of best.pt")
        check_settings(saved["settings"], settings, path)
        check_settings(saved["meta"], meta, path)
        load_weights(self.model, saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch = saved["epoch"]
        self.log = saved["log"]
        self.trained_on = saved["trained_on"]
        if (self.out / "best.pt").exists():  # otherwise the next epoch becomes the best
            self.best = saved["best"]
            self.best_epoch = saved["best_epoch"]

    def save(self, row: dict, score: float | None, contents: dict) -> None:
        """Save an epoch: best.pt if its score is the best so far, then last.pt; log and print it.

        `score` is None without validation. On a tie keep the later epoch, whose learning rate is
        lower. A crash never leaves a last.pt without its best.pt, which is written first.
        """
        self.epoch = row["epoch"]
        self.log.append(row)
        if self.epoch == 1 and (self.out / "last.pt").exists():
            raise DataError(f"{self.out}: another run writes here; give another --out")
        state = {"epoch": self.epoch, "trained_on": self.trained_on}
        contents = contents | state | {"model": self.model.state_dict()}
        if score is not None and score >= self.best:
            self.best = score
            self.best_epoch = self.epoch
            save_checkpoint(self.out / "best.pt", contents)
        contents |= {"best": self.best, "best_epoch": self.best_epoch, "log": self.log}
        contents |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        save_checkpoint(self.out / "last.pt", contents)
        write_csv(self.out / "log.csv", self.log)
        with atomic_path(self.out / "log.png") as temporary:
            draw_log(self.log, self.score, self.best_epoch).save(temporary)
        progress("")
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


def check_settings(saved: dict, current: dict, path: Path) -> None:
    """Raise DataError listing the settings that differ from those of the run to resume."""
    names = [name for name in saved | current if saved.get(name) != current.get(name)]
    changes = [f"{name} {saved.get(name)} (now {current.get(name)})" for name in names]
    if changes:  # more epochs too: the learning rate has ended at zero
        hint = f"to continue from its weights: --init {path}"
        raise DataError(f"{path}: was trained with {', '.join(changes)}; {hint}")


# --- log.png ---


def draw_log(log: list[dict], score: str, best: int) -> Image.Image:
    """Two panels, loss and `score` by epoch, from the rows of log.csv; `best` is an epoch, or 0."""
    picture = Image.new("RGB", (2 * PANEL[0], PANEL[1]), "white")
    for k, columns in enumerate((("train_loss", "val_loss"), (score,))):
        curves = {}  # (epoch, value) by column, finite values only
        for column in columns:
            rows = [row for row in log if math.isfinite(row.get(column, math.nan))]
            if rows:  # segmentation has no val_loss, --fold -1 no score
                curves[column] = [(row["epoch"], row[column]) for row in rows]
        if curves:
            draw_panel(ImageDraw.Draw(picture), k * PANEL[0], curves, len(log), best)
    return picture


def draw_panel(
    draw: ImageDraw.ImageDraw, left: int, curves: dict[str, list], epochs: int, best: int
) -> None:
    """One panel of log.png with its left side at pixel `left`: (epoch, value) by curve name."""
    font = ImageFont.load_default(size=14)
    values = [value for points in curves.values() for _, value in points]
    low = min(values)
    high = max(values)

    def place(epoch: float, value: float) -> tuple[float, float]:
        """Pixel (x, y) of a value; y points downwards."""
        along = (epoch - 1) / max(1, epochs - 1)
        up = (value - low) / ((high - low) or 1)
        return left + 70 + along * (PANEL[0] - 100), PANEL[1] - 50 - up * (PANEL[1] - 100)

    draw.line([place(1, high), place(1, low), place(epochs, low)], "black")
    for epoch, value in ((1, low), (1, high), (epochs, low)):  # the ends of the axes
        x, y = place(epoch, value)
        if epoch == 1:
            draw.text((x - 6, y), f"{value:.4g}", "black", font, anchor="rm")
        if value == low:
            draw.text((x, y + 16), f"{epoch}", "black", font, anchor="mm")
    if best:
        draw.line([place(best, low), place(best, high)], "#999999")
        x, y = place(best, high)
        anchor = "lm" if 2 * best < epochs else "rm"  # to the side that has room
        draw.text((x, y - 12), f"best: epoch {best}", "#666666", font, anchor=anchor)
    for k, (name, points) in enumerate(curves.items()):
        colour = CURVES[name.split("_")[0]]
        places = [place(*point) for point in points]
        draw.line(places, colour, 3)
        draw.point(places, colour)  # a line through one point draws nothing
        title = f"{name} {points[-1][1]:.4g}"
        draw.text((left + 70 + 200 * k, 14), title, colour, font, anchor="lm")


# --- what was trained on ---


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, which identifies the index or checkpoint of a result."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_trained_on(index: list[dict], fold: str, init: dict) -> list[str]:
    """Sorted hashes of the training rows of index.csv, and of the checkpoint of --init, if any."""
    hashes = set(init.get("trained_on", []))
    val = [row for row in index if row["fold"] == fold]
    seen = sum(not hashes.isdisjoint(hash_row(row)) for row in val)
    if seen:
        print(f"note: --init was trained on {seen} of {len(val)} rows of the validation fold:")
        print("      the scores below are too high, and eval.py will refuse them")
    for row in index:
        if row["fold"] not in ("test", fold):
            hashes |= hash_row(row)
    return sorted(hashes)


def hash_row(row: dict[str, str]) -> set[str]:
    """Hashes of the image and the patient of a row, the same in every cache."""
    patient = hashlib.sha256(f"patient {row['patient']}".encode())
    return {row["digest"], patient.hexdigest()[:16]}


def refuse_trained_on(
    path: Path, checkpoint: dict, index: list[dict], rows: list[dict], is_own_cache: bool
) -> None:
    """Raise DataError if a checkpoint, or its --init, was trained on some of these rows.

    Shared images and shared patients both count. Patients on both sides of an official split are
    reported, not refused. `rows` are a part of `index`, the rows of index.csv; `is_own_cache`: this
    cache is the one of the training.
    """
    splits_of = defaultdict(set)  # the official splits of each patient
    for row in index:
        if row["split"] and is_own_cache:
            splits_of[row["patient"]].add(row["split"])
    hashes = set(checkpoint["trained_on"])
    seen = [row for row in rows if not hashes.isdisjoint(hash_row(row))]
    refused = [row for row in seen if len(splits_of[row["patient"]]) < 2]
    if refused:
        count = f"{len(refused)} of these {len(rows)} images or patients"
        hint = "take others, or, if only names are alike, change them in index.csv"
        raise DataError(f"{path}: trained on {count}, such as {refused[0]['id']}; {hint}")
    if seen:
        count = f"{len(seen)} of {len(rows)} images are of patients in training"
        print(f"note: {count}, by the official split")
