"""Hashes of caches and weights, to tell whether a change of the code changes any result. Not run by pytest.

  python tests/fingerprint.py > before.txt      # then change the code
  python tests/fingerprint.py | diff before.txt -

Synthetic sets of every task are preprocessed, trained for two epochs (stopped and resumed in the middle, one
by two processes) and evaluated, with one thread on the CPU: some two minutes. Processors round differently,
which changes every hash: compare on one machine.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.dataset import write_demo as write_classification
from detection.dataset import write_demo as write_detection
from segmentation.dataset import write_demo as write_segmentation

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "classification": ["classification", "--label-smoothing", "0.1", "--class-weights", "balanced"],
    "detection": ["detection", "--loss", "smooth_l1"],
    "segmentation 2D": ["segmentation", "--dims", "2"],
    "segmentation 3D": ["segmentation", "--dims", "3", "--patch", "16", "16", "16"],
}


def run(*command: object) -> None:
    """Run a script with one thread; its output is shown if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def hash_cache(cache: Path) -> str:
    """Everything in a cache but meta.json, which holds paths and versions."""
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != "meta.json")
    return digest(*(path.name.encode() + path.read_bytes() for path in files))


def hash_weights(path: Path) -> str:
    model = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return digest(
        *(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(model.items()))
    )


def hash_log(path: Path) -> str:
    """log.csv without the columns that measure time."""
    with open(path, newline="") as file:
        rows = [
            {k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)
        ]
    return digest(json.dumps(rows).encode())


def hash_metrics(path: Path) -> str:
    """The values of metrics.json; their intervals depend on the bootstrap alone."""
    summary = json.loads(path.read_text())["summary"]
    return digest(
        json.dumps({name: metric["value"] for name, metric in sorted(summary.items())}).encode()
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_classification(work / "classification/raw", patients=120)
        write_detection(work / "detection/raw", patients=60)
        write_segmentation(work / "segmentation/raw", cases=12, size=36)
        for task, options in (("classification", ["--size", "64"]), ("detection", ["--size", "64"]),
                              ("segmentation", [])):  # fmt: skip
            cache = work / task / "cache"
            run(f"{task}/preprocess.py", "--data", work / task / "raw", "--out", cache, *options)
            print(f"{task:16} cache    {hash_cache(cache)}", flush=True)
        for name, (task, *options) in RUNS.items():
            cache = work / task / "cache"
            out = work / name.replace(" ", "_")
            train = [f"{task}/train.py", "--data", cache, "--out", out, "--epochs", 2, "--batch-size", 4,
                     "--workers", 0, *options]  # fmt: skip
            run(*train, "--stop-after", 1)
            run(*train, "--resume")
            run(f"{task}/eval.py", "--data", cache, "--checkpoint", out / "last.pt", "--samples", 2)
            print(f"{name:16} weights  {hash_weights(out / 'last.pt')}")
            print(f"{name:16} log      {hash_log(out / 'log.csv')}")
            print(f"{name:16} metrics  {hash_metrics(out / 'eval_val/metrics.json')}", flush=True)
        cache = work / "detection/cache"
        out = work / "two_processes"
        train = [
            "detection/train.py",
            "--data",
            cache,
            "--out",
            out,
            "--epochs",
            2,
            "--batch-size",
            4,
        ]
        run(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            2,
            *train,
            "--workers",
            0,
        )
        print(f"{'two processes':16} weights  {hash_weights(out / 'last.pt')}")


if __name__ == "__main__":
    main()
