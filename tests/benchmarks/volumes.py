"""CPU seconds from volumes to the cache, of one core, beside reading the same files by nibabel.

  python tests/benchmarks/volumes.py --data left_atrium [--spacing 1.5 1.5 1.5]

The folder is one that segmentation/preprocess.py takes, of NIfTI files. Both ways read every image
and every mask, several times over in turn; the best CPU time counts. Ratios within a run mean more
than the figures, which differ between machines.
"""

import argparse
import contextlib
import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from segmentation.preprocess import find_cases
from segmentation.preprocess import main as preprocess


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="a folder of volumes and masks")
    parser.add_argument("--spacing", nargs="+", default=["median"], help="default: median")
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cases, _ = find_cases(args.data)
    files = []
    for case in cases:
        files += [*case.images, case.mask]
    command = ["--data", args.data, "--workers", 1, "--spacing", *args.spacing]
    ways = {"reading": partial(read_plainly, files), "writing": partial(run, command)}
    # A process each: preprocess.py makes the C library keep its memory, by itself it does not.
    context = get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, context) for name in ways}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(args.repeat):
        for name, way in ways.items():  # in turn: other work on the machine hits both of them
            best[name] = min(best[name], pools[name].submit(measure, way).result())
    for pool in pools.values():
        pool.shutdown()
    reading = best["reading"]
    writing = best["writing"]
    print(f"nibabel reads {len(files)} files        {reading:7.2f} s")
    print(f"{len(cases)} cases to the cache   {writing:7.2f} s, {writing / reading:.2f} times that")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # KiB on Linux
    print(f"peak memory {peak:.0f} MB")


def measure(way: Callable) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    way()
    return time.process_time() - start


def read_plainly(files: list[Path]) -> None:
    for path in files:
        np.asanyarray(nib.load(path).dataobj)


def run(command: list) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        preprocess([str(word) for word in [*command, "--out", f"{folder}/cache"]])


if __name__ == "__main__":
    main()
