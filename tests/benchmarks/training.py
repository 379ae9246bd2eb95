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
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.caches import change_rows, draw_images, draw_volumes

SIZE = 224  # pixels per side of an image
VOLUME = (128, 128, 80)  # voxels; the default patch in 3D is 57 x 57 x 80
TRAININGS = {  # task, options, batch size of train.py, what an epoch takes of an image or volume
    "ResNet-18": ("classification", "", 32, 1),
    "heart": ("detection", "", 32, 1),
    "U-Net 2D": ("segmentation", "--dims 2", 16, VOLUME[2]),
    "U-Net 3D": ("segmentation", "--dims 3", 2, 5),
}


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
    args = parser.parse_args(argv)
    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} threads, {vars(args)}")

    for name in args.only:
        task, options, batch_size, patches = TRAININGS[name]
        batch_size = args.batch_size or batch_size
        train = importlib.import_module(f"{task}.train")
        with tempfile.TemporaryDirectory() as folder:
            draw_cache(Path(folder) / "cache", task, max(1, args.steps * batch_size // patches))
            command = f"--data {folder}/cache --device {args.device} --amp {args.amp} {options}"
            command += f" --epochs 3 --workers {args.workers}"
            command += f" --batch-size {batch_size}" + " --compile" * args.compile
            words = [*command.split(), "--out"]
            steps, epoch = measure(train, args.device, [*words, f"{folder}/run"])
            _, resident = measure(train, args.device, [*words, f"{folder}/resident"], True)
        images = f"{steps * batch_size / epoch:.1f} images/s"
        times = f"{epoch / resident:.3f} times one resident batch"
        print(f"{name:10} epoch {epoch:8.3f} s, {images}, {times}", flush=True)


def draw_cache(cache: Path, task: str, count: int) -> None:
    """A cache with `count` images or volumes to train, and a quarter to validate."""
    total = count + max(1, count // 4)
    if task == "segmentation":
        draw_volumes(cache, total, VOLUME)
    else:
        draw_images(cache, task, total, SIZE)
    change_rows(cache, lambda k, row: row.update(fold="1" if k < count else "0"))


def measure(
    train: ModuleType, device: str, command: list[str], is_resident: bool = False
) -> tuple[int, float]:
    """Run a training, or its steps on one batch: the steps of an epoch, seconds of the fastest."""
    load = DataLoader.__iter__
    to_input = train.to_input
    batch = []  # the resident one, as it is loaded
    inputs = []  # the same, on the device and augmented
    epochs = []

    def iterate(loader: DataLoader) -> Iterator:
        if not hasattr(loader.sampler, "epoch"):  # this one is for the validation
            yield from load(loader)
            return
        if is_resident and not batch:
            images, targets = loader.dataset[next(iter(loader.sampler))]
            batch.extend([images, targets.to(device)])
        begin = time.perf_counter()
        yield from [batch] * len(loader) if is_resident else load(loader)
        if device.startswith("cuda"):
            torch.cuda.synchronize()  # the last steps are queued, not done
        epochs.append((len(loader), time.perf_counter() - begin))

    def prepare(images: Tensor, *rest: object) -> Tensor | tuple[Tensor, Tensor]:
        if not batch or images is not batch[0]:
            return to_input(images, *rest)
        if not inputs:
            inputs.append(to_input(images, *rest))
        return inputs[0]

    torch._dynamo.reset()  # what a run before has compiled is for its own model
    with (
        patch.object(DataLoader, "__iter__", iterate),
        patch.object(train, "to_input", prepare),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        train.main(command)
    return min(epochs[1:])


if __name__ == "__main__":
    main()
