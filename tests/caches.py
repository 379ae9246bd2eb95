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
from PIL import Image
from torch import nn

from common import checkpoint
from common.checkpoint import FORMAT

ROOT = Path(__file__).resolve().parents[1]
FOLDS = ("0", "1", "2", "test")
NAMES = ("classification", "detection", "segmentation")
TASKS = pytest.mark.parametrize("task", NAMES)
XRAYS = pytest.mark.parametrize("task", NAMES[:2])
# What log.csv has with the prefix val_, and what decides which checkpoint is the best
SCORES = {"classification": "auroc", "detection": "mean_iou", "segmentation": "dice"}
SMALL = {
    "classification": "--batch-size 6 --channels 16",
    "detection": "--batch-size 6 --channels 16",
    "segmentation": "--batch-size 8 --channels 2",
}


def module(task: str, script: str) -> ModuleType:
    return importlib.import_module(f"{task}.{script}")


# --- caches: 24 images of 32 px of 12 patients, or 8 volumes of 8 x 8 x 8 voxels ---


def write_index(cache: Path, rows: list[dict]) -> None:
    checkpoint.write_csv(cache / "index.csv", rows)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(cache: Path) -> list[dict[str, str]]:
    return read_table(cache / "index.csv")


def change_rows(cache: Path, change: Callable) -> None:
    """Rewrite index.csv with `change(number, row)`, which alters a row."""
    rows = read_rows(cache)
    for k, row in enumerate(rows):
        change(k, row)
    write_index(cache, rows)


def change_meta(cache: Path, **values: object) -> None:
    meta = json.loads((cache / "meta.json").read_text())
    (cache / "meta.json").write_text(json.dumps(meta | values))


def draw_images(cache: Path, task: str, count: int = 24, size: int = 32) -> Path:
    """Noise with a bright square, low for label 1; two images a patient; folds 0, 1, 2 and test."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (count, size, size), dtype=np.uint8)
    rows = []
    for k in range(count):
        top = 18 if k % 2 else 4
        images[k, top : top + 8, 6:14] += 150
        row = {"id": f"i{k}", "patient": f"p{k // 2}", "fold": FOLDS[k // 2 % 4]}
        row |= {"split": "", "digest": f"digest{k}", "source": f"i{k}.png"}
        if task == "classification":
            row |= {"label": ("no", "yes")[k % 2]}
        else:
            row |= {"site": "ab"[k // 2 % 2], "xmin": 6, "ymin": top, "xmax": 14, "ymax": top + 8}
            row |= {"height": size, "width": size, "spacing": ""}
        rows.append(row)
    cache.mkdir(parents=True)
    np.save(cache / "images.npy", images)
    write_index(cache, rows)
    meta = {"format": FORMAT, "task": task, "size": size, "n": count, "mean": 0.2, "std": 0.2}
    meta |= {"classes": ["no", "yes"], "positive_class": "yes", "multi_label": False}
    meta |= {"fit": "squash", "channels": 1}
    (cache / "meta.json").write_text(json.dumps(meta))
    return cache


def draw_volumes(
    cache: Path, count: int = 8, shape: tuple[int, ...] = (8, 8, 8), empty: bool = False
) -> Path:
    """Noise with a bright cube of class 1 (2 in the file), or none; folds 0, 1, 2 and test."""
    (cache / "volumes").mkdir(parents=True)
    rows = []
    for k in range(count):
        mask = np.zeros(shape, np.uint8)
        mask[2:6, 1 : 4 + k % 3, 2:6] = not empty
        image = np.random.default_rng(k).normal(0, 0.3, mask.shape) + 2 * mask
        points = np.argwhere(mask)
        points = np.insert(points, 0, 1, axis=1).astype(np.int16)  # class, x, y, z
        arrays = {"image": image[None].astype(np.float16), "mask": mask, "points": points}
        for kind, array in arrays.items():
            np.save(cache / "volumes" / f"v{k}.{kind}.npy", array)
        nib.save(nib.Nifti1Image(2 * mask, np.eye(4)), cache / "volumes" / f"v{k}.truth.nii.gz")
        row = {"id": f"v{k}", "patient": f"p{k}", "fold": FOLDS[k % 4], "split": ""}
        rows.append(row | {"digest": f"digest{k}", "image": "", "mask": ""})
    write_index(cache, rows)
    meta = {"format": FORMAT, "task": "segmentation", "n": count, "picture_unit": None}
    meta |= {"classes": ["background", "cube"], "values": [0, 2], "channels": ["MRI"]}
    meta |= {"resample": False, "spacing": [1, 1, 1], "slice_axis": 2, "shape": list(shape)}
    (cache / "meta.json").write_text(json.dumps(meta | {"normalisation": [None]}))
    return cache


def draw_cache(cache: Path, task: str) -> Path:
    return draw_volumes(cache) if task == "segmentation" else draw_images(cache, task)


def write_raw(raw: Path, task: str) -> Path:
    """Noise: 40 pictures in two class folders or with boxes, or 8 volumes with a cube."""
    rng = np.random.default_rng(0)
    names = {"classification": "no yes", "detection": "images images"}
    folders = [raw / name for name in names.get(task, "imagesTr labelsTr").split()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if task == "segmentation":
        mask = np.zeros((8, 8, 8), np.uint8)
        mask[2:6, 2:6, 2:6] = 1
        for k in range(8):
            volume = rng.normal(0, 0.3, mask.shape) + 2 * mask
            for folder, array in zip(folders, (volume, mask), strict=True):
                nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"v{k}.nii.gz")
        return raw
    lines = ["image,xmin,ymin,xmax,ymax"]
    for k in range(40):
        pixels = rng.integers(0, 256, (32, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(folders[k % 2] / f"i{k}.png")
        lines.append(f"i{k}.png,4,4,20,{20 + k % 8}")
    if task == "detection":
        (raw / "boxes.csv").write_text("\n".join(lines))
    return raw


# --- the commands: options are words, or texts of several words ---


def split_words(*options: object) -> list[str]:
    return " ".join(map(str, options)).split()


def preprocess(task: str, raw: Path, out: Path, *options: object) -> None:
    words = split_words("--data", raw, "--out", out, "--workers 1", *options)
    module(task, "preprocess").main(words)


def train(task: str, cache: Path, out: Path, *options: object) -> None:
    words = split_words("--data", cache, "--out", out, "--epochs 1 --workers 0 --device cpu")
    module(task, "train").main([*words, *split_words(SMALL[task], *options)])


def evaluate(task: str, cache: Path, *options: object) -> None:
    workers = "" if task == "segmentation" else "--workers 0"
    words = split_words("--data", cache, "--device cpu", workers, *options)
    module(task, "eval").main(words)


def predict(task: str, checkpoint: Path, out: Path, *images: object) -> None:
    words = split_words("--checkpoint", checkpoint, "--device cpu --out", out, "--images", *images)
    module(task, "eval").main(words)


def report(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def assert_evaluated_as_trained(metrics: dict, out: Path, most: float) -> None:
    """metrics.json has the metrics of the checkpoint, to an error of `most`."""
    summary = report(out)["summary"]
    for name in ["dice"] if "dice" in metrics else metrics:
        evaluated = summary["dice_cache" if name == "dice" else name]["value"]
        assert evaluated == pytest.approx(metrics[name], abs=most, nan_ok=True), name


class Stopped(Exception):
    """In place of a power cut."""


def train_until(epoch: int, task: str, cache: Path, out: Path, *options: object) -> None:
    """A training that stops when this epoch is saved."""

    class StoppingRun(checkpoint.Run):
        def save(self, *args: object) -> None:
            super().save(*args)
            if self.epoch == epoch:
                raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(task, "train"), "Run", StoppingRun)
        with pytest.raises(Stopped):
            train(task, cache, out, *options)


def refusal(call: Callable, *args: object) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(checkpoint.DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


copy = shutil.copytree  # it returns the copy


@contextmanager
def small_network() -> Iterator[None]:
    """In place of the ResNets for X-rays, networks of a thousandth of their weights."""

    def stem(inputs: int, channels: int) -> dict[str, nn.Module]:
        return {"conv1": nn.Conv2d(inputs, channels, 7, 4, 3), "bn1": nn.BatchNorm2d(channels)}

    def build_classifier(arch: str, meta: dict, width: int, pretrained: bool = False) -> nn.Module:
        layers = stem(meta["channels"], 16) | {"relu": nn.ReLU()}
        layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers, fc=nn.Linear(16, len(meta["classes"]))))

    def build_detector(arch: str, channels: int, pretrained: bool = False) -> nn.Module:
        backbone = nn.Sequential(OrderedDict(stem(1, channels), relu=nn.ReLU()))
        layers = {"backbone": backbone, "pool": nn.AdaptiveAvgPool2d(8), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers, out=nn.Linear(64 * channels, 4)))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("classification.train", "classification.model"):
            patch.setattr(f"{name}.build_model", build_classifier)
        for name in ("detection.train", "detection.eval"):
            patch.setattr(f"{name}.build_model", build_detector)
        yield
