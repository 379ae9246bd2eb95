"""Seconds to predict a volume by sliding windows, beside the windows' own forward passes.

  python tests/benchmarks/inference.py
  python tests/benchmarks/inference.py --device cuda --amp bf16 --shape 512 512 160

A 3D U-Net with random weights sees a random volume: what `predict_volume` takes longer than the
network on as many windows is cutting and adding up. The two take turns, and the fastest run of each
counts. Memory is what is needed beyond the result, for a volume and for one that is several times
as long.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from segmentation import model as unet
from tests.benchmarks.training import clear_peak, peak_memory

AMP = {"off": None, "bf16": torch.bfloat16}
LONGER = 4  # times as long is the second volume


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--amp", choices=AMP, default="off", help="default: %(default)s")
    add("--shape", type=int, nargs=3, default=[128, 128, 80], help="voxels (default: 128 128 80)")
    add("--patch", type=int, nargs=3, default=[57, 57, 80], help="voxels (default: 57 57 80)")
    add("--batch-size", type=int, default=2, help="windows at a time (default: %(default)s)")
    add("--repeat", type=int, default=3, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    meta = {"channels": ["MRI"], "classes": ["background", "organ"]}
    meta |= {"spacing": [1, 1, 1], "slice_axis": 2}
    torch.manual_seed(0)
    model = unet.build_model(meta, 16, args.patch).to(device).eval()
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *args.shape), np.float32).astype(np.float16)
    windows = 1
    for length, size in zip(args.shape, args.patch, strict=True):
        windows *= len(unet.window_weights(length, size))

    def here(volume: np.ndarray = image) -> Tensor:
        options = (args.patch, 2, device, AMP[args.amp], args.batch_size)
        return unet.predict_volume(model, volume, *options)

    @torch.no_grad()
    def network_alone() -> None:
        """As many windows as the volume has, all of them the same and on the device."""
        batch = torch.zeros(args.batch_size, 1, *args.patch, device=device)
        for start in range(0, windows, args.batch_size):
            unet.predict_batch(model, batch[: windows - start], AMP[args.amp], False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    ways = {"network alone": network_alone, "predict_volume": here}
    best = time_in_turn(ways, args.repeat)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {windows} windows")
    for name, (wall, cpu) in best.items():
        ratio = cpu / best["network alone"][1]
        if device.type == "cuda":
            ratio = wall / best["network alone"][0]
        print(f"{name:16}{wall:8.3f} s{cpu:8.3f} s CPU{ratio:7.3f} of the network alone")

    for times in (1, LONGER):
        volume = np.concatenate([image] * times, 1)
        clear_peak()
        before = peak_memory()
        result = here(volume)
        need = peak_memory() - before - result.nbytes / 2**20
        del result
        print(f"memory beyond the result, {times} x the volume: {need:.0f} MB")


def time_in_turn(ways: dict[str, Callable], repeat: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of the fastest run of each; the first, which warms up, does not count."""
    best = dict.fromkeys(ways, (float("inf"), float("inf")))
    for turn in range(repeat + 1):
        for name, way in ways.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            way()
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            if turn:
                best[name] = (min(best[name][0], wall), min(best[name][1], cpu))
    return best


if __name__ == "__main__":
    main()
