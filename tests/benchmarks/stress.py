"""Copies of a classification cache whose validation images break what a network may cheat by.

  python tests/benchmarks/stress.py --data data/chest --out data/chest_stress
  python classification/eval.py --data data/chest_stress/both --checkpoint runs/chest/best.pt

Brightness, contrast and sharpness go with the class where sick and healthy patients had other
machines, and a network learns them first. In these copies they point to the other class: every
image of the fold takes them from a random image of another class in it. The rest of the cache stays
as it is, index.csv to the byte, so that eval.py takes the copy for that of the training.

  histogram   the gray value histogram of the other image
  sharpness   its share of fine structure, by blurring or unsharp masking
  both        first sharpness, then histogram
  jpeg        compressed again, with a quality of 30 to 95
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from classification.dataset import open_cache
from classification.preprocess import is_multi_label

COPIES = ("histogram", "sharpness", "both", "jpeg")
FINE = 1.0  # sigma in pixels of the blur that tells fine structure from coarse
MOST_BLUR = 4.0  # sigma in pixels
MOST_SHARPENING = 6.0  # times the fine structure, added to the image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--data", type=Path, required=True, help="a cache, gray, one label an image"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the copies, new")
    parser.add_argument("--fold", default="0", help="the images to change (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    meta, index = open_cache(args.data)
    if is_multi_label(meta) or meta.get("channels") == 3:
        sys.exit(f"{args.data}: several labels or colours, expected one label an image, and gray")
    rows = [k for k, row in enumerate(index) if row["fold"] == args.fold]
    labels = np.array([int(index[k]["label"]) for k in rows])
    if len(set(labels.tolist())) < 2:
        sys.exit(f"{args.data}: {len(rows)} images of fold {args.fold}, expected two classes there")
    images = np.load(args.data / "images.npy")[rows]  # (N, S, S)
    donors = choose_donors(labels, args.seed)  # (N,)
    for name in COPIES:
        changed = np.empty_like(images)
        for k, donor in enumerate(donors):
            changed[k] = change(name, images[k], images[donor], (args.seed, k))
        write_copy(args.data, args.out / name, rows, changed)
        print(f"{args.out / name}: {len(rows)} images of fold {args.fold} changed")


def choose_donors(labels: np.ndarray, seed: int) -> np.ndarray:
    """For each of N images the number of a random one of another class, int64 (N,)."""
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(np.flatnonzero(labels != label)) for label in labels])


def change(name: str, image: np.ndarray, donor: np.ndarray, seed: tuple) -> np.ndarray:
    """An image uint8 (S, S) of the copy `name`."""
    if name == "jpeg":
        return compress(image, int(np.random.default_rng(seed).integers(30, 96)))
    if name in ("sharpness", "both"):
        image = match_sharpness(image, donor)
    if name in ("histogram", "both"):
        image = match_histogram(image, donor)
    return image


def match_histogram(image: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """The image uint8 (S, S) by the rising gray curve that gives it the donor's histogram."""
    counts = np.bincount(image.ravel(), minlength=256)
    rank = (np.cumsum(counts) - counts / 2) / image.size  # of each gray value, 0..1
    return np.rint(np.quantile(donor, rank)).astype(np.uint8)[image]


def match_sharpness(image: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """The image uint8 (S, S), blurred or sharpened to the donor's share of fine structure."""
    target = sharpness(donor.astype(np.float64))
    image = image.astype(np.float64)
    soften = sharpness(image) > target
    low = 0.0
    high = MOST_BLUR if soften else MOST_SHARPENING
    for _ in range(10):  # bisection: sharpness rises with one amount and falls with the other
        amount = (low + high) / 2
        changed = blur(image, amount) if soften else sharpen(image, amount)
        if (sharpness(changed) > target) == soften:
            low = amount
        else:
            high = amount
    return np.rint(changed).astype(np.uint8)


def sharpness(image: np.ndarray) -> float:
    """Deviation of the fine structure as a share of that of the image, float (S, S)."""
    return (image - blur(image, FINE)).std() / max(1e-9, image.std())


def sharpen(image: np.ndarray, amount: float) -> np.ndarray:
    """Unsharp masking of float (S, S) in 0..255."""
    return (image + amount * (image - blur(image, FINE))).clip(0, 255)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float (S, S) with a sigma in pixels, edges repeated."""
    radius = int(4 * sigma + 1)
    x = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (x / max(sigma, 1e-3)) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):  # down, then across
        padded = np.pad(image, ((radius, radius), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(x), axis=0)  # (S, S, taps)
        image = (windows @ kernel).T
    return image


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    """The image uint8 (S, S) after a JPEG file of this quality."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer, formats=["JPEG"]))


def write_copy(cache: Path, out: Path, rows: list[int], changed: np.ndarray) -> None:
    """The cache with other images (N, S, S) in these rows."""
    out.mkdir(parents=True)
    for name in ("index.csv", "meta.json"):
        shutil.copyfile(cache / name, out / name)
    images = np.load(cache / "images.npy")
    images[rows] = changed
    np.save(out / "images.npy", images)


if __name__ == "__main__":
    main()
