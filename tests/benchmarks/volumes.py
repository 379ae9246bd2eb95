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
    reading = float("inf")
    writing = float("inf")
    for _ in range(args.repeat):  # in turn: other work on the machine hits both of them
        start = time.process_time()
        for path in files:
            np.asanyarray(nib.load(path).dataobj)
        reading = min(reading, time.process_time() - start)
        with tempfile.TemporaryDirectory() as folder:
            command = ["--data", args.data, "--out", f"{folder}/cache", "--workers", 1]
            command += ["--spacing", *args.spacing]
            start = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                preprocess([str(word) for word in command])
            writing = min(writing, time.process_time() - start)
    print(f"nibabel reads {len(files)} files        {reading:7.2f} s")
    print(f"{len(cases)} cases to the cache   {writing:7.2f} s, {writing / reading:.2f} times that")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(f"peak memory of both {peak:.0f} MB")


if __name__ == "__main__":
    main()
