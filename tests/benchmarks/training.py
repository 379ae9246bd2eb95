"""Seconds of an epoch of each training, beside the same steps on one batch that is there already.

  python tests/benchmarks/training.py
  python tests/benchmarks/training.py --device cuda --amp bf16 --compile --steps 100

Random images and volumes are trained on through the loop of each train.py, with its own loader,
augmentation and validation. The same loop is then run on a batch that is loaded and augmented once:
what the first takes longer is what loading and augmentation cost. The first epoch of each run warms
up and does not count, of the others the fastest does.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.caches import change_rows, draw_images, draw_volumes

SIZE = 224  # pixels per side of an image
VOLUME = (128, 128, 80)  # voxels; the default patch in 3D is 57 x 57 x 80
TRAININGS = {  # task, options, and the batch size of train.py
    "ResNet-18": ("classification", "", 32),
    "heart": ("detection", "", 32),
    "U-Net 2D": ("segmentation", "--dims 2", 16),
    "U-Net 3D": ("segmentation", "--dims 3", 2),
}
PATCHES = {"U-Net 2D": VOLUME[2], "U-Net 3D": 5}  # that an epoch takes from a volume


def main(argv: list[str] | None = None) -> None:
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
    add("--epochs", type=int, default=3, help="with the one to warm up (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}, expected at least 2: the first does not count")
    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} threads, {vars(args)}")

    for name in args.only:
        task, options, batch_size = TRAININGS[name]
        batch_size = args.batch_size or batch_size
        train = importlib.import_module(f"{task}.train")
        with tempfile.TemporaryDirectory() as folder:
            draw_cache(Path(folder) / "cache", name, task, args.steps * batch_size)
            command = f"--data {folder}/cache --device {args.device} --amp {args.amp} {options}"
            command += f" --epochs {args.epochs} --workers {args.workers}"
            command += f" --batch-size {batch_size}" + " --compile" * args.compile
            report(name, train, command.split(), batch_size)


def draw_cache(cache: Path, name: str, task: str, count: int) -> None:
    """A cache that gives `count` images or patches an epoch, and a quarter to validate."""
    count = max(1, count // PATCHES.get(name, 1))
    total = count + max(1, count // 4)
    if task == "segmentation":
        draw_volumes(cache, total, VOLUME)
    else:
        draw_images(cache, task, total, SIZE)
    change_rows(cache, lambda k, row: row.update(fold="1" if k < count else "0"))


# --- one training ---


def report(name: str, train: ModuleType, command: list[str], batch_size: int) -> None:
    """Run a training, and its steps on one batch alone; print what each part takes."""
    watch = Watch(train, command)
    with resident_batch(train):
        resident = Watch(train, command)
    images = watch.steps * batch_size
    epoch, validation = watch.fastest()
    bare, _ = resident.fastest()
    print(f"{name:10} epoch {epoch:8.3f} s, {images / epoch:.1f} images/s,", end=" ")
    print(f"{epoch / bare:.3f} times one resident batch; validation {validation:.3f} s", flush=True)


class Watch:
    """Runs a training and times it at the calls that begin an epoch, end its steps and save it."""

    def __init__(self, train: ModuleType, command: list[str]) -> None:
        self.loader = None  # of the training set
        self.steps = 0  # of an epoch
        self.clocks = []  # seconds at each of these calls
        self.end = train.mean_loss
        self.make_loader = train.make_loader
        save = train.Run.save

        def on_save(*rest: object) -> None:
            self.clock()
            save(*rest)

        torch._dynamo.reset()  # what a run before has compiled is for its own model
        with (
            patch.object(train, "mean_loss", self.on_end),
            patch.object(train.Run, "save", on_save),
            patch.object(train, "make_loader", self.on_loader),
            tempfile.TemporaryDirectory() as out,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train.main([*command, "--out", f"{out}/run"])

    def clock(self) -> None:
        self.clocks.append(time.perf_counter())

    def on_end(self, loss_sum: Tensor, steps: int, epoch: int, world_size: int = 0) -> float:
        if not world_size:  # for the line of progress
            return self.end(loss_sum, steps, epoch)
        loss = self.end(loss_sum, steps, epoch, world_size)  # it reads the loss: all steps are done
        self.clock()
        self.steps = steps
        return loss

    def on_loader(self, *rest: object) -> object:
        loader = self.make_loader(*rest)
        if self.loader is not None:  # the one of the validation
            return loader
        self.loader = loader
        return WatchedLoader(loader, self.clock)

    def fastest(self) -> tuple[float, float]:
        """Seconds of the fastest training and validation, without the first epoch."""
        begins, ends, saves = (self.clocks[k::3] for k in (3, 4, 5))  # three calls an epoch
        training = min(end - begin for begin, end in zip(begins, ends, strict=True))
        return training, min(save - end for end, save in zip(ends, saves, strict=True))


class WatchedLoader:
    """A loader that says when an epoch begins, and may give a single batch again and again."""

    def __init__(self, loader: object, on_begin: Callable = int, batch: tuple = ()) -> None:
        self.loader = loader
        self.sampler = loader.sampler
        self.dataset = loader.dataset
        self.on_begin = on_begin
        self.batch = batch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        self.on_begin()
        return iter([self.batch] * len(self.loader) if self.batch else self.loader)


@contextlib.contextmanager
def resident_batch(train: ModuleType) -> Iterator[None]:
    """Let train.py train on one batch that is loaded and augmented once."""
    make_loader = train.make_loader
    to_input = train.to_input
    loaders = []
    inputs = []

    def make(*rest: object) -> object:
        loader = make_loader(*rest)
        if not loaders:  # the first one is that of the training
            images, targets = loader.dataset[next(iter(loader.sampler))]
            loader = WatchedLoader(loader, batch=(images, targets.to(rest[-1])))
        loaders.append(loader)
        return loader

    def prepare(images: Tensor, *rest: object) -> Tensor | tuple[Tensor, Tensor]:
        if images is not loaders[0].batch[0]:
            return to_input(images, *rest)
        if not inputs:
            inputs.append(to_input(images, *rest))
        return inputs[0]

    with patch.object(train, "make_loader", make), patch.object(train, "to_input", prepare):
        yield


if __name__ == "__main__":
    main()
