"""Seconds of an epoch of each training, beside the same steps on one batch that is there already.

  python tests/benchmarks/training.py
  python tests/benchmarks/training.py --device cuda --amp bf16 --compile --steps 100

Random images and volumes are trained on through the loop of each train.py, with its own loader,
augmentation and validation. The same loop is then run on a batch that is loaded and augmented once:
what the first takes longer is what loading and augmentation cost. The first epoch of each run warms
up and does not count, of the others the fastest does. CPU seconds are those of the process itself,
without its workers.
"""

import argparse
import contextlib
import csv
import ctypes
import importlib
import io
import json
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZE = 224  # pixels per side of an image
VOLUME = (128, 128, 80)  # voxels; the default patch in 3D is 57 x 57 x 80
TRAININGS = {
    "ResNet-18": ("classification", []),
    "heart": ("detection", []),
    "U-Net 2D": ("segmentation", ["--dims", "2"]),
    "U-Net 3D": ("segmentation", ["--dims", "3"]),
}
BATCH_SIZES = {"ResNet-18": 32, "heart": 32, "U-Net 2D": 16, "U-Net 3D": 2}  # of train.py


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="default: all")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="default: %(default)s")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    add("--steps", type=int, default=8, help="of an epoch (default: %(default)s)")
    add("--batch-size", type=int, help="default: that of each train.py")
    add("--waits", action="store_true", help="list what makes the host wait for the GPU")
    add("--epochs", type=int, default=3, help="with the one to warm up (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}, expected at least 2: the first does not count")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print(describe_machine(args), flush=True)
    for name in args.only:
        task, options = TRAININGS[name]
        train = importlib.import_module(f"{task}.train")
        with tempfile.TemporaryDirectory() as folder:
            batch_size = args.batch_size or BATCH_SIZES[name]
            draw_cache(Path(folder) / "cache", task, options, args.steps * batch_size)
            command = ["--data", f"{folder}/cache", "--out", f"{folder}/run", "--overwrite"]
            command += ["--device", args.device, "--amp", args.amp, *options]
            command += ["--batch-size", str(batch_size)]
            command += ["--compile"] if args.compile else []
            command += ["--epochs", str(args.epochs), "--workers", str(args.workers)]
            report(name, train, command, batch_size)
            if args.waits:
                count_waits(name, train, command)


def describe_machine(args: argparse.Namespace) -> str:
    """Versions and hardware, in one line."""
    is_cuda = args.device.startswith("cuda")
    hardware = torch.cuda.get_device_name() if is_cuda else platform.processor()
    threads = f"{torch.get_num_threads()} threads"
    compiled = "--compile" if args.compile else "not compiled"
    batch = f"--batch-size {args.batch_size}, " if args.batch_size else ""
    how = (
        f"{batch}--amp {args.amp}, {compiled}, {args.workers} workers, {args.steps} steps an epoch"
    )
    return f"torch {torch.__version__}, {hardware}, {threads}, {how}"


# --- random caches ---


def draw_cache(cache: Path, task: str, options: list[str], count: int) -> None:
    """Write a cache that gives `count` images or patches an epoch, and a quarter to validate."""
    if task != "segmentation":
        draw_images(cache, task, count)
        return
    patches = VOLUME[2] if options == ["--dims", "2"] else 5  # that an epoch takes from a volume
    draw_volumes(cache, max(1, count // patches))


def draw_images(cache: Path, task: str, count: int) -> None:
    rng = np.random.default_rng(0)
    total = count + max(1, count // 4)
    cache.mkdir()
    np.save(cache / "images.npy", rng.integers(0, 256, (total, SIZE, SIZE), np.uint8))
    rows = []
    for k in range(total):
        row = {"id": k, "patient": k, "fold": 1 if k < count else 0, "label": k % 2, "site": ""}
        row |= {"xmin": 20, "ymin": 24, "xmax": 60, "ymax": 50, "spacing": ""}
        rows.append(row | {"height": SIZE, "width": SIZE})
    meta = {"size": SIZE, "mean": 0.5, "std": 0.3, "n": total, "fit": "squash"}
    if task == "classification":
        meta |= {"classes": ["no", "yes"]}
    write_tables(cache, rows, meta)


def draw_volumes(cache: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    total = count + max(1, count // 4)
    mask = np.zeros(VOLUME, np.uint8)
    mask[8:80, 8:80, 4:60] = 1
    points = np.argwhere(mask)[::100]
    points = np.column_stack([np.ones(len(points), int), points]).astype(np.int16)
    image = rng.standard_normal((1, *VOLUME), np.float32).astype(np.float16)
    (cache / "volumes").mkdir(parents=True)
    rows = []
    for k in range(total):
        for kind, array in (("image", image), ("mask", mask), ("points", points)):
            np.save(cache / "volumes" / f"v{k}.{kind}.npy", array)
        fold = 1 if k < count else 0
        rows.append({"id": f"v{k}", "group": k, "fold": fold, "image": "", "mask": ""})
    meta = {"classes": ["background", "cube"], "values": [0, 1], "channels": ["MRI"]}
    meta |= {"resample": False, "spacing": [1, 1, 1], "slice_axis": 2, "shape": list(VOLUME)}
    write_tables(cache, rows, meta | {"normalisation": [None]})


def write_tables(cache: Path, rows: list[dict], meta: dict) -> None:
    with open(cache / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (cache / "meta.json").write_text(json.dumps(meta))


# --- one training ---


def report(name: str, train: ModuleType, command: list[str], batch_size: int) -> None:
    """Run a training, and its steps on one batch alone; print what each part takes."""
    clear_peak()
    with Watch(train) as watch:
        run_quietly(train, command)
    peak = peak_memory()
    with Watch(train) as resident, resident_batch(train):
        run_quietly(train, command)
    images = watch.steps * batch_size

    epoch = min(watch.training)
    bare = min(resident.training)
    cpu_ratio = min(watch.training_cpu) / min(resident.training_cpu)
    validation = min(watch.validation)
    loading = time_loading(watch.loader)

    def line(what: str, seconds: float, more: str) -> None:
        print(f"{name:10} {what:22} {seconds:8.3f} s  {more}", flush=True)

    line("epoch, its training", epoch, f"{images / epoch:.1f} images/s")
    line("the same, CPU", min(watch.training_cpu), f"{cpu_ratio:.3f} of the resident batch's")
    line("one resident batch", bare, f"the epoch takes {epoch / bare:.3f} times as long")
    line("loading alone", loading, f"{images / loading:.0f} images/s")
    share = validation / (epoch + validation)
    line("validation", validation, f"{share:.1%} of the whole, {min(watch.validation_cpu):.3f} CPU")
    print(f"{name:10} {'peak memory':22} {peak:8.0f} MB", flush=True)


def run_quietly(train: ModuleType, command: list[str]) -> None:
    torch._dynamo.reset()  # what a run before has compiled is for its own model
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(command)


class Watch:
    """Times training and validation of every epoch but the first, within `with`.

    It stands at the calls with which the loop begins, ends its steps and saves.
    """

    def __init__(self, train: ModuleType) -> None:
        self.train = train
        self.loader = None  # of the training set
        self.steps = 0  # of an epoch
        self.training = []  # seconds of each epoch
        self.training_cpu = []
        self.validation = []
        self.validation_cpu = []
        self.stack = contextlib.ExitStack()
        self.waits = None  # set to count what waits for the GPU

    def __enter__(self) -> "Watch":
        begin = self.train.checkpoint.set_training
        end = self.train.mean_over_processes
        save = self.train.Run.save
        make_loader = self.train.make_loader
        state = {"epoch": 0}

        def clock() -> tuple[float, float]:
            return time.perf_counter(), time.process_time()

        def on_begin(model: torch.nn.Module) -> None:
            begin(model)
            state["start"] = clock()
            if self.waits is not None and state["epoch"] > 0:
                torch.cuda.set_sync_debug_mode("warn")

        def on_end(loss_sum: Tensor, *rest: object) -> float:
            if self.waits is not None:
                torch.cuda.set_sync_debug_mode("default")
            loss = end(loss_sum, *rest)  # it reads the loss, so all steps are done
            state["middle"] = clock()
            self.steps = rest[0]
            return loss

        def on_save(run: object, *rest: object) -> None:
            if state["epoch"] > 0:
                now = clock()
                self.training.append(state["middle"][0] - state["start"][0])
                self.training_cpu.append(state["middle"][1] - state["start"][1])
                self.validation.append(now[0] - state["middle"][0])
                self.validation_cpu.append(now[1] - state["middle"][1])
            state["epoch"] += 1
            save(run, *rest)

        def on_loader(*rest: object) -> DataLoader:
            loader = make_loader(*rest)
            self.loader = self.loader or loader  # the first one made
            return loader

        self.stack.enter_context(patch.object(self.train.checkpoint, "set_training", on_begin))
        self.stack.enter_context(patch.object(self.train, "mean_over_processes", on_end))
        self.stack.enter_context(patch.object(self.train.Run, "save", on_save))
        self.stack.enter_context(patch.object(self.train, "make_loader", on_loader))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


class ResidentLoader:
    """In place of the training's loader: its first batch, again and again."""

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.sampler = loader.sampler
        self.dataset = loader.dataset
        images, targets = loader.dataset[next(iter(loader.sampler))]
        self.batch = (images, targets.to(device))
        self.steps = len(loader)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            yield self.batch


@contextlib.contextmanager
def resident_batch(train: ModuleType) -> Iterator[None]:
    """Let train.py train on one batch that is loaded and augmented once."""
    make_loader = train.make_loader
    to_input = train.to_input
    loaders = []
    inputs = []

    def make(*rest: object) -> DataLoader | ResidentLoader:
        loader = make_loader(*rest)
        if loaders:  # of the validation
            return loader
        loaders.append(ResidentLoader(loader, rest[-1]))
        return loaders[0]

    def prepare(images: Tensor, *rest: object) -> Tensor | tuple[Tensor, Tensor]:
        if images is not loaders[0].batch[0]:
            return to_input(images, *rest)
        if not inputs:
            inputs.append(to_input(images, *rest))
        return inputs[0]

    with patch.object(train, "make_loader", make), patch.object(train, "to_input", prepare):
        yield


def time_loading(loader: DataLoader) -> float:
    """Seconds in which the loader hands out an epoch to someone who does nothing with it."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def clear_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # Linux: begin anew with what is in use
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """MB of the GPU, or else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def count_waits(name: str, train: ModuleType, command: list[str]) -> None:
    """Print the lines of code that make the GPU wait, and how often in an epoch."""
    with warnings.catch_warnings(record=True) as caught, Watch(train) as watch:
        watch.waits = True
        warnings.simplefilter("always")
        run_quietly(train, [*command, "--stop-after", "2"])
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w))
    for place, count in places.most_common():
        print(f"{name:10} waits at {place}: {count} times in {watch.steps} steps", flush=True)
    if not places:
        print(f"{name:10} waits nowhere in {watch.steps} steps", flush=True)


if __name__ == "__main__":
    main()
