"""Images per second from files to the cache, of one core, beside plainer ways to read the same.

  python tests/benchmarks/xrays.py --data FOLDER_OF_DICOM_FILES
  python tests/benchmarks/xrays.py --data FOLDER_OF_DICOM_FILES --counts 500 4000 --workers 1 2

Every way reads every file in turn, several times over; its best CPU time counts. Ratios within a
run mean more than the figures, which differ between machines. With --counts the whole of
classification/preprocess.py runs on so many links to the files, by so many processes: seconds on
the clock, CPU time an image, and peak memory.
"""

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import pixel_array
from pydicom.uid import JPEGBaseline8Bit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from classification.preprocess import Case, find_images, keep_memory, load
from classification.preprocess import main as preprocess

RSNA = 26_684  # images of the RSNA challenge


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="a folder of DICOM files")
    parser.add_argument("--size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--counts", type=int, nargs="+", help="sizes of sets, in rising order")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="with --counts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    paths = find_images(args.data)
    if args.counts:
        for count in args.counts:
            for workers in args.workers:
                measure_set(paths, count, workers)
        return
    ways = {
        "this project": partial(read_as_here, raw=args.data, size=args.size, least=0),
        "this project, --fast-decode": partial(
            read_as_here, raw=args.data, size=args.size, least=args.size
        ),
        "bare decode": decode,
        "decode, float64, resize": partial(read_plainly, size=args.size),
    }
    best = dict.fromkeys(ways, float("inf"))
    # preprocess.py makes Pillow and the C library keep their memory; by themselves they do not.
    context = get_context("spawn")
    ours = ProcessPoolExecutor(1, context, initializer=keep_memory)
    plain = ProcessPoolExecutor(1, context, initializer=Image.core.set_blocks_max, initargs=(0,))
    for _ in range(args.repeat):
        for name, read in ways.items():  # in turn: other work on the machine hits all of them
            pool = ours if "this project" in name else plain
            best[name] = min(best[name], pool.submit(measure, read, paths).result())
    ours.shutdown()
    plain.shutdown()
    for name, seconds in best.items():
        rate = len(paths) / seconds
        ratio = best["bare decode"] / seconds
        print(f"{name:28}{rate:7.1f} images/s{ratio:6.2f} of bare decode{RSNA / rate:7.0f} s RSNA")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # KiB on Linux
    print(f"peak memory {peak:.0f} MB")


def measure(read: Callable, paths: list[Path]) -> float:
    """CPU seconds that it takes to read all the files."""
    warnings.simplefilter("ignore")
    start = time.process_time()
    for path in paths:
        read(path)
    return time.process_time() - start


def measure_set(paths: list[Path], count: int, workers: int) -> None:
    """Print what preprocessing a set of `count` links to the files takes."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k in range(count):
            source = k % len(paths)
            link = folder / "raw" / "ab"[source % 2] / f"{k:06d}.dcm"  # copies have one class
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(paths[source].resolve())
        command = ["--data", f"{folder}/raw", "--out", f"{folder}/cache", "--workers", str(workers)]
        before = os.times()
        with contextlib.redirect_stdout(io.StringIO()):
            preprocess(command)
        for process in active_children():
            process.join()  # then its CPU time is known
        after = os.times()
    elapsed = after.elapsed - before.elapsed
    seconds = (sum(after[:4]) - sum(before[:4])) / count  # of the CPU, processes included
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    line = f"{count:6} images by {workers}{elapsed:8.2f} s{1000 * seconds:8.2f} ms of the CPU each"
    print(f"{line}, peak memory of the first process {peak:.0f} MB", flush=True)


def read_as_here(path: Path, raw: Path, size: int, least: int) -> np.ndarray:
    source = path.relative_to(raw).as_posix()
    result = load(Case(source, source, 0, ""), raw, size, "squash", 1, least)
    if isinstance(result, Exception):
        raise result
    return result[0]


def decode(path: Path) -> np.ndarray:
    """The pixels, by Pillow if they are JPEG Baseline: pydicom may prefer a slower decoder."""
    ds = pydicom.dcmread(path)
    is_baseline = ds.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
    return pixel_array(ds, decoding_plugin="pillow" if is_baseline else "")


def read_plainly(path: Path, size: int) -> np.ndarray:
    gray = (decode(path) / 255).astype(np.float32)
    small = Image.fromarray(gray).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(small).astype(np.float16)


if __name__ == "__main__":
    main()
