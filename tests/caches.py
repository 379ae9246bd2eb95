"""Small caches drawn without raw files, and the commands on them, to test train.py and eval.py."""

import csv
import importlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from torch import nn


def module(task: str, script: str) -> ModuleType:
    return importlib.import_module(f"{task}.{script}")


# --- caches: 24 images of 32 px of 12 patients, or 8 volumes of 8 x 8 x 8 voxels ---


def write_index(cache: Path, rows: list[dict]) -> None:
    with open(cache / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(cache: Path) -> list[dict]:
    with open(cache / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def change_rows(cache: Path, change: Callable) -> None:
    """Rewrite index.csv with `change(number, row)`, which alters a row."""
    rows = read_rows(cache)
    for k, row in enumerate(rows):
        change(k, row)
    write_index(cache, rows)


def change_meta(cache: Path, **values: object) -> None:
    meta = json.loads((cache / "meta.json").read_text())
    (cache / "meta.json").write_text(json.dumps(meta | values))


def draw_images(cache: Path, task: str) -> Path:
    """Noise with a bright square, low for label 1; two images a patient; folds 0, 1, 2 and test."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (24, 32, 32), dtype=np.uint8)
    rows = []
    for k in range(24):
        top = 18 if k % 2 else 4
        images[k, top : top + 8, 6:14] += 150
        fold = ("0", "1", "2", "test")[k // 2 % 4]
        row = {"id": f"i{k}", "patient": f"p{k // 2}", "fold": fold}
        if task == "classification":
            row |= {"label": k % 2, "source": f"i{k}.png"}
        else:
            row |= {"site": "ab"[k // 2 % 2], "xmin": 6, "ymin": top, "xmax": 14, "ymax": top + 8}
            row |= {"height": 32, "width": 32, "spacing": "", "source": f"i{k}.png"}
        rows.append(row)
    cache.mkdir(parents=True)
    np.save(cache / "images.npy", images)
    write_index(cache, rows)
    meta = {"size": 32, "mean": 0.2, "std": 0.2, "n": 24}
    if task == "classification":
        meta |= {"classes": ["no", "yes"], "fit": "squash"}
    (cache / "meta.json").write_text(json.dumps(meta))
    return cache


def draw_volumes(cache: Path, empty: bool = False) -> Path:
    """Noise with a bright cube of class 1 (2 in the file), or none; folds 0, 1, 2 and test."""
    (cache / "volumes").mkdir(parents=True)
    rows = []
    for k in range(8):
        rng, mask = np.random.default_rng(k), np.zeros((8, 8, 8), np.uint8)
        if not empty:
            mask[2:6, 1 : 4 + k % 3, 2:6] = 1
        image = (rng.normal(0, 0.3, mask.shape) + 2 * mask)[None].astype(np.float16)
        points = np.argwhere(mask)
        points = np.column_stack([np.ones(len(points), int), points]).astype(np.int16)
        for kind, array in (("image", image), ("mask", mask), ("points", points)):
            np.save(cache / "volumes" / f"v{k}.{kind}.npy", array)
        nib.save(nib.Nifti1Image(2 * mask, np.eye(4)), cache / "volumes" / f"v{k}.truth.nii.gz")
        fold = ("0", "1", "2", "test")[k % 4]
        rows.append({"id": f"v{k}", "group": f"g{k}", "fold": fold, "image": "", "mask": ""})
    write_index(cache, rows)
    meta = {
        "classes": ["background", "cube"],
        "values": [0, 2],
        "channels": ["MRI"],
        "resample": False,
        "spacing": [1, 1, 1],
        "slice_axis": 2,
        "shape": [8, 8, 8],
        "normalisation": [None],
    }
    (cache / "meta.json").write_text(json.dumps(meta))
    return cache


def draw_cache(cache: Path, task: str) -> Path:
    return draw_volumes(cache) if task == "segmentation" else draw_images(cache, task)


def train(task: str, cache: Path, out: Path, *options: str) -> None:
    small = {
        "classification": ["--batch-size", "6"],
        "detection": ["--batch-size", "6", "--channels", "16"],
        "segmentation": ["--batch-size", "8", "--channels", "2"],
    }[task]
    command = [
        "--data",
        str(cache),
        "--out",
        str(out),
        "--epochs",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    module(task, "train").main([*command, *small, *options])


def evaluate(task: str, cache: Path, *options: object) -> None:
    command = ["--data", cache, "--samples", "20", "--device", "cpu"]
    command += ["--workers", "0"] if task != "segmentation" else []
    module(task, "eval").main([str(word) for word in (*command, *options)])


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@contextmanager
def small_network() -> Iterator[None]:
    """In place of the ResNets for X-rays, networks of a thousandth of their weights."""

    def build_classifier(
        arch: str,
        num_classes: int,
        size: int,
        pretrained: bool = False,
        channels: int = 1,
        width: int = 64,
    ) -> nn.Module:
        layers = {
            "conv1": nn.Conv2d(channels, 16, 7, 4, 3),
            "bn1": nn.BatchNorm2d(16),
            "relu": nn.ReLU(),
        }
        layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers | {"fc": nn.Linear(16, num_classes)}))

    def build_detector(arch: str, head: str, channels: int, pretrained: bool = False) -> nn.Module:
        layers = {
            "conv1": nn.Conv2d(1, channels, 7, 4, 3),
            "bn1": nn.BatchNorm2d(channels),
            "relu": nn.ReLU(),
        }
        layers = {"backbone": nn.Sequential(OrderedDict(layers))}
        layers |= {"pool": nn.AdaptiveAvgPool2d(8)}  # for images of more than 32 px
        layers |= {"flatten": nn.Flatten(), "out": nn.Linear(64 * channels, 4)}
        if head == "linear":
            layers = {"norm": nn.BatchNorm2d(1)} | layers
        return nn.Sequential(OrderedDict(layers))

    builders = {"classification": build_classifier, "detection": build_detector}
    with pytest.MonkeyPatch.context() as patch:
        for task, build in builders.items():
            for script in ("train", "eval"):
                patch.setattr(module(task, script), "build_model", build)
        yield
