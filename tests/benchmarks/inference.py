"""Seconds to predict a volume by sliding windows, beside the windows' own forward passes.

  python tests/benchmarks/inference.py
  python tests/benchmarks/inference.py --device cuda --amp bf16 --shape 512 512 160

A 3D U-Net with random weights and a random volume: what `predict_volume` takes longer than the network
on as many windows is cutting and adding up. The two take turns, the fastest of three runs counts.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from segmentation import model as unet

AMP = {"off": None, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--amp", choices=AMP, default="off", help="default: %(default)s")
    add("--shape", type=int, nargs=3, default=[128, 128, 80], help="voxels (default: 128 128 80)")
    add("--patch", type=int, nargs=3, default=[57, 57, 80], help="voxels (default: 57 57 80)")
    add("--batch-size", type=int, default=2, help="windows at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    meta = {"channels": ["MRI"], "classes": ["background", "organ"]}
    meta |= {"spacing": [1, 1, 1], "slice_axis": 2}
    model = unet.build_model(meta, 16, args.patch).to(device).eval()
    image = np.random.default_rng(0).standard_normal((1, *args.shape)).astype(np.float16)
    windows = 1
    for length, size in zip(args.shape, args.patch, strict=True):
        windows *= len(unet.window_weights(length, size))

    def predict_volume() -> None:
        unet.predict_volume(model, image, args.patch, 2, device, AMP[args.amp], args.batch_size)

    @torch.no_grad()
    def network_alone() -> None:
        batch = torch.zeros(args.batch_size, 1, *args.patch, device=device)
        for start in range(0, windows, args.batch_size):
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                model(batch[: windows - start]).float().softmax(1)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {windows} windows")
    best = {network_alone: float("inf"), predict_volume: float("inf")}
    for turn in range(4):
        for way in best:
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                best[way] = min(best[way], time.perf_counter() - start)
    for way, seconds in best.items():
        ratio = seconds / best[network_alone]
        print(f"{way.__name__:16}{seconds:8.3f} s{ratio:7.3f} of the network alone")


if __name__ == "__main__":
    main()
