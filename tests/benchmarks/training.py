"""Seconds of an epoch of each training, on random images and volumes.

  python tests/benchmarks/training.py
  python tests/benchmarks/training.py --device cuda --amp bf16 --compile --steps 100

Through train.py as it is, with its loader, augmentation and validation. The first epoch warms up and
does not count, of the others the fastest does.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.checkpoint import load_checkpoint
from tests.caches import change_rows, draw_images, draw_volumes

SIZE = 224  # pixels per side of an image
VOLUME = (128, 128, 80)  # voxels
# Task, options, batch size of train.py, and the patches that an epoch takes from a volume
TRAININGS = {
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
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}")
    for name in args.only:
        task, options, batch_size, patches = TRAININGS[name]
        with tempfile.TemporaryDirectory() as folder:
            draw_cache(Path(folder) / "cache", task, max(1, args.steps * batch_size // patches))
            command = f"--data {folder}/cache --out {folder}/run {options} --device {args.device}"
            command += f" --amp {args.amp} --workers {args.workers} --batch-size {batch_size}"
            command += " --epochs 3" + " --compile" * args.compile
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(f"{task}.train").main(command.split())
            log = load_checkpoint(Path(folder) / "run" / "last.pt")["log"]
        seconds = min(row["seconds"] for row in log[1:])
        speed = args.steps * batch_size / seconds
        print(f"{name:10} {seconds:8.2f} s with validation, {speed:.1f} images/s", flush=True)


def draw_cache(cache: Path, task: str, count: int) -> None:
    """A cache of `count` images or volumes to train on, and a quarter to validate."""
    total = count + max(1, count // 4)
    if task == "segmentation":
        draw_volumes(cache, total, VOLUME)
    else:
        draw_images(cache, task, total, SIZE)
    change_rows(cache, lambda k, row: row.update(fold="1" if k < count else "0"))


if __name__ == "__main__":
    main()
