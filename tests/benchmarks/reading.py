"""CPU seconds from raw files to the cache on one core, beside plain reading of the same files.

  python tests/benchmarks/reading.py --task classification --data FOLDER_OF_DICOM_CLASSES
  python tests/benchmarks/reading.py --task segmentation --data left_atrium

preprocess.py runs with its defaults and one worker. Plain reading is pydicom's pixel_array, or
nibabel's, of every file. Both run several times in turn, each in a process of its own; the best
CPU time counts. Ratios within a run mean more than seconds, which differ between machines.
"""

import argparse
import importlib
import io
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
TASKS = ("classification", "detection", "segmentation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a raw set")
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    best = {read_plainly: float("inf"), preprocess: float("inf")}
    for _ in range(args.repeat):
        for way in best:  # in turn: other work on the machine hits both of them
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds, memory = pool.submit(measure, way, args.task, args.data).result()
            best[way] = min(best[way], seconds)
            print(f"{way.__name__:16}{seconds:8.2f} s{memory:7.0f} MB", flush=True)
    print(f"preprocess.py takes {best[preprocess] / best[read_plainly]:.2f} times plain reading")


def measure(way: Callable, task: str, data: Path) -> tuple[float, float]:
    """CPU seconds of a call, and peak memory in MB of its process."""
    warnings.simplefilter("ignore")
    start = time.process_time()
    way(task, data)
    seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_plainly(task: str, data: Path) -> None:
    for path in data.rglob("*"):
        if path.suffix == ".dcm":
            _ = pydicom.dcmread(path).pixel_array
        elif task == "segmentation" and path.name.endswith((".nii", ".nii.gz")):
            np.asanyarray(nib.load(path).dataobj)


def preprocess(task: str, data: Path) -> None:
    script = importlib.import_module(f"{task}.preprocess")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        script.main(["--data", str(data), "--out", f"{folder}/cache", "--workers", "1"])


if __name__ == "__main__":
    main()
