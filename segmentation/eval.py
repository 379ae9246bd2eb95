"""Evaluate checkpoints of train.py on cases with masks, or outline the structures in new images.

  python segmentation/eval.py --data data/hippocampus --checkpoint runs/hippocampus/best.pt
  python segmentation/eval.py --data data/other --checkpoint a/best.pt b/best.pt --split test
  python segmentation/eval.py --data CACHE --checkpoint runs/fold_?/best.pt --by fold
  python segmentation/eval.py --checkpoint runs/a/best.pt --images scan.nii.gz dicom_folder

With masks, written to --out: metrics.json with 95 % bootstrap intervals (over patients), cases.csv,
predictions/ID.nii.gz, worst.png (image, truth, prediction on the slice with the most errors, worst
case first) and worst.gif. All metrics are taken on the grid of the original file, but for
dice_cache, on the grid of the cache: it is the score that train.py printed, unless --largest has
dropped something, which is told for each case as dropped_ml. The probabilities of
several checkpoints are averaged; those of several folds predict the fold that they left out each,
and the metrics are of all these cases together.

New images (.nii, .nii.gz, pictures, or folders of them and of DICOM series, as deep as an archive
exports them): masks, volumes.csv and overlays. nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ...
are the channels of one image. Nothing is written onto an image, or onto a file that is no earlier
result.
"""

import argparse
import csv
import math
import os
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_segmentation_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    CheckpointError,
    clear_results,
    count_trained_on,
    file_sha256,
    hold_folder,
    load_run,
    load_weights,
    write_csv,
    written,
)
from common.metrics import (
    bootstrap,
    dice_scores,
    segmentation_metrics,
    split_by,
    tabulate,
    write_report,
)
from segmentation.dataset import (
    check_case,
    fingerprints,
    open_cache,
    open_case,
    patch_axes,
    read_index,
)
from segmentation.model import build_model, predict_volume
from segmentation.preprocess import (
    META,
    PICTURE_KINDS,
    DataError,
    Notes,
    check_channels,
    check_grid,
    check_meta,
    check_outputs,
    check_range,
    explain,
    fit_picture,
    from_grid,
    image_name,
    is_dicom,
    is_picture,
    list_volumes,
    note_others,
    one_line,
    orient,
    print_note,
    progress,
    ras_shape,
    read_channels,
    read_dataset,
    read_header,
    read_meta,
    read_nifti,
    reading,
    run_command,
    split_channel,
    to_grid,
    volume_name,
    write_mask,
)
from segmentation.train import AMP, check_finite, choose_device

# Stands in the header of masks of new images: they may be replaced, other files may not.
PREDICTION = b"prediction of segmentation/eval.py"
MOST_VALUES = 50  # of a column of --by
TILE = 256  # pixels of the longer side of one picture in a gallery
GAP = 2  # pixels between two pictures of a tile
LINE = 20  # pixels of a line of text
OVERLAYS = 100  # pictures of new images: the first ones
COLOURS = ("#ff4040", "#40c0ff", "#ffd040", "#60e060", "#d070ff", "#ff9040", "#40e0d0", "#ff80c0")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="one or more of train.py's")
    add("--data", type=Path, metavar="CACHE", help="what preprocess.py wrote")
    split_help = "val (default): the fold left out in training, of several runs all of them"
    add("--split", choices=("val", "test"), default="val", help=split_help)
    images_help = "new images without masks: files and folders"
    add("--images", type=Path, nargs="+", metavar="PATH", help=images_help)
    add("--tta", action="store_true", help="average over mirrored copies; for runs with --mirror")
    largest_help = "keep the largest connected part of each class, tell what is dropped"
    add("--largest", action="store_true", help=largest_help)
    by_help = "metrics for each value of a column of index.csv, such as fold"
    add("--by", metavar="COLUMN", help=by_help)
    out_help = "(default: eval_val, eval_folds, eval_test or predictions, beside the first run)"
    add("--out", type=Path, help=out_help)
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, help="mixed precision (default: as in training)")
    add("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (with masks) or --images PATH ... (new images)")
    if args.by and not args.data:
        parser.error("--by needs known cases: give --data")
    if args.samples < 1:
        parser.error("expected --samples >= 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = choose_device(args.device)
    models, checkpoints = load_models(args.checkpoint, device)
    out = args.out or args.checkpoint[0].parent / name_results(args, checkpoints)
    if args.data:
        evaluate_split(args, models, checkpoints, device, out)
    else:
        predict_images(args, models, checkpoints, device, out)


# --- the models ---


def load_models(
    paths: list[Path], device: torch.device
) -> tuple[list[torch.nn.Module], list[dict]]:
    """Bare models and their checkpoints. Raises CheckpointError if they do not go together."""
    types = {"channels": int, "patch": list, "mirror": bool}
    checkpoints = [load_run(path, "segmentation", types, device) for path in paths]
    models = []
    # A file may hold anything: what decides about sizes and loops is checked before it is used.
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        meta = checkpoint["meta"]
        settings = checkpoint["settings"]
        check_meta(meta, path)
        check_same(meta, checkpoints[0]["meta"], path, paths[0])
        check_sizes(settings, path)
        model = build_model(meta, settings["channels"], settings["patch"])
        load_weights(model, checkpoint, path)
        models.append(model.to(device).eval())
    return models, checkpoints


def check_same(meta: dict, expected: dict, path: Path, other: Path) -> None:
    """Raise CheckpointError if images were not prepared in the same way."""
    for name in META:
        # The median shape may differ, which only suggests the size of a patch, and the plane.
        found = meta.get(name)
        if name not in ("shape", "slice_axis") and found != expected.get(name):
            raise CheckpointError(f"{path}: {name} {found}, but {other} has {expected.get(name)}")


def check_sizes(settings: dict, path: Path) -> None:
    """Raise CheckpointError if no run can have these settings: a file may claim any size."""
    if settings["amp"] not in AMP or not 2 <= settings["channels"] <= 1024:
        raise CheckpointError(f"{path}: settings {settings}, of no training")
    patch = settings["patch"]
    sides_are_good = all(type(side) is int and 1 <= side <= 4096 for side in patch)
    if len(patch) not in (2, 3) or not sides_are_good:
        expected = "two or three numbers of voxels"
        raise CheckpointError(f"{path}: patch {patch}, expected {expected}")


def predict(
    models: list,
    checkpoints: list[dict],
    image: np.ndarray,
    device: torch.device,
    amp: str | None,
    tta: bool,
) -> Tensor:
    """Class probabilities float16 (K, X, Y, Z) of an image (C, X, Y, Z), averaged over the models.

    `amp` None is the precision of each training. Raises DataError if the image shall be mirrored
    (`tta`) and a model was not trained on mirrored images.
    """
    if tta and not all(checkpoint["settings"]["mirror"] for checkpoint in checkpoints):
        reason = "a checkpoint has not seen mirrored images, expected runs with --mirror"
        raise DataError(f"--tta: {reason}")
    total = None
    for model, checkpoint in zip(models, checkpoints, strict=True):
        settings = checkpoint["settings"]
        part = predict_volume(
            model,
            image,
            settings["patch"],
            checkpoint["meta"]["slice_axis"],
            device,
            AMP[amp or settings["amp"]],
            settings["batch_size"],
            tta,
        ).cpu()
        part /= len(models)  # in place: the array can be larger than all else
        if total is None:
            total = part
        else:
            total += part
    return total


@contextmanager
def name_memory_error(path: Path) -> Iterator[None]:
    """Turn a lack of memory, of NumPy or of torch, into a DataError that names the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        # On a CPU torch has no type of its own for it.
        if isinstance(error, RuntimeError) and "memory" not in reason:
            raise
        raise explain(path, MemoryError(reason)) from error


def name_results(args: argparse.Namespace, checkpoints: list[dict]) -> str:
    """The default folder of the results, beside the first checkpoint."""
    if not args.data:
        return "predictions"
    folds = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
    if args.split == "val" and len(folds) > 1:
        return "eval_folds"  # beside eval_val, which is that of the first fold alone
    return f"eval_{args.split}"


# --- a split of a cache ---


def evaluate_split(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Metrics, tables, masks and pictures of a split."""
    meta = checkpoints[0]["meta"]
    classes = meta["classes"]
    rows_by_fold = choose_rows(args.data, args.split, args.checkpoint, checkpoints)
    index = read_index(args.data)
    rows = [index[k] for k in chain.from_iterable(rows_by_fold.values())]
    by = choose_groups(rows, args.by)
    names = [row["id"] for row in rows]
    check_split_outputs(out, args, names, suffix_of(meta))
    for name in names:
        check_case(args.data, name, meta)

    cases = []
    tiles = []  # a picture for each case
    worst_dice = math.nan  # as long as no case has a Dice
    structures = Counter()  # by in how many of truth and prediction they are: 0, 1 or 2
    with hold_folder(out):
        clear_results(out, list_results(out))
        (out / "predictions").mkdir(exist_ok=True)
        for number, row in enumerate(rows, 1):
            # The image and its mask are on the grid of the cache, the truth on that of its file.
            name = row["id"]
            own_models = of_fold(row["fold"], models, checkpoints)
            own = of_fold(row["fold"], checkpoints, checkpoints)
            image, mask = open_case(args.data, name)
            truth, affine, header = read_truth(args.data, name, meta["values"])
            grid = (truth.shape, affine)
            result = predict_case(args, name, own_models, own, image, grid, device)
            on_grid, prediction, dropped = result
            values = np.array(meta["values"], np.uint8)
            with written(out / "predictions" / f"{name}{suffix_of(meta)}") as path:
                write_prediction(path, values[prediction], affine, header)

            metrics = measure_case(truth, prediction, affine, classes)
            for k in range(1, len(classes)):
                present = int((truth == k).any()) + int((prediction == k).any())
                structures[present] += 1
            scores = dice_scores(torch.from_numpy(np.array(mask)), on_grid, len(classes))
            metrics["dice_cache"] = scores.nanmean().item()
            if args.largest:
                metrics["dropped_ml"] = dropped * voxel_ml(affine)
            cases.append({"id": name, "group": row["group"], "fold": row["fold"]} | metrics)

            maps = {"truth": mask, "prediction": on_grid.numpy()}
            tiles.append(draw_case(image, maps, meta, name, metrics))
            if math.isnan(worst_dice) or metrics["dice"] < worst_dice:
                worst_dice = metrics["dice"]
                worst = (image, maps, meta, name)
            progress(f"{number}/{len(rows)}  {name}  dice {metrics['dice']:.3f}")
        progress("")
        dice = torch.tensor([case["dice"] for case in cases])
        order = dice.nan_to_num(2.0).argsort()[:12]  # NaN, nothing there and nothing found: last
        write_gallery(out / "worst.png", [tiles[k] for k in order.tolist()])
        write_gif(out / "worst.gif", *worst)
        summarise(args, cases, by, meta, structures, out)
    absent = f"{structures[0]} structures absent in both, {structures[1]} in one"
    print(f"{len(rows)} cases; {absent}; all of it in {out}")


def predict_case(
    args: argparse.Namespace,
    name: str,
    models: list,
    checkpoints: list[dict],
    image: np.ndarray,
    grid: tuple[tuple[int, ...], np.ndarray],
    device: torch.device,
) -> tuple[Tensor, np.ndarray, int]:
    """Class numbers on the grid of the cache, uint8 (X, Y, Z), and on that of the file.

    `grid` are shape and affine of the file. Also returns how many voxels of it --largest dropped.
    Raises DataError for what is not finite.
    """
    with name_memory_error(args.data / "volumes" / f"{name}.image.npy"):
        probabilities = predict(models, checkpoints, image, device, args.amp, args.tta)
        check_finite(probabilities, name)
        prediction = from_grid(probabilities.numpy(), *grid)
    on_grid = probabilities.argmax(0).byte()
    dropped = 0
    if args.largest:
        prediction, dropped = keep_largest(prediction)
        on_grid = torch.from_numpy(keep_largest(on_grid.numpy())[0])
    return on_grid, prediction, dropped


def keep_largest(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Class numbers uint8 (X, Y, Z) with the largest connected part of each class, the others 0.

    Voxels are connected if they share a face. Of two parts of one size the first is kept. Also
    returns how many voxels were dropped.
    """
    volume = torch.from_numpy(labels.copy())  # the axes of a file may run backwards in memory
    inside = volume > 0
    classes = volume[inside]  # (N,), of the voxels that are not background
    part = connected_parts(volume)  # (N,)
    sizes = torch.bincount(part, minlength=len(part))  # (N,), 0 but at the first voxel of a part
    kept = torch.zeros_like(classes)
    for k in classes.unique():
        of_class = classes == k
        largest = torch.where(of_class, sizes, 0).argmax()  # a part is called by its first voxel
        kept[part == largest] = k
    volume[inside] = kept
    return volume.numpy(), int((kept == 0).sum())


def connected_parts(labels: Tensor) -> Tensor:
    """The connected part of each voxel above 0 of class numbers (X, Y, Z), in their order: (N,).

    A part is called by the number of its first voxel. Neighbours hook the root of one tree onto
    that of the other, then each voxel jumps to its root (Shiloach & Vishkin, J. Algorithms 1982):
    some ten rounds, however winding the parts are.
    """
    inside = labels > 0
    count = int(inside.sum())
    number = torch.zeros(labels.shape, dtype=torch.int32)
    number[inside] = torch.arange(count, dtype=torch.int32)
    firsts = []
    seconds = []
    for axis, length in enumerate(labels.shape):
        below = labels.narrow(axis, 0, length - 1)
        above = labels.narrow(axis, 1, length - 1)
        joined = (below == above) & (below > 0)
        firsts.append(number.narrow(axis, 0, length - 1)[joined])
        seconds.append(number.narrow(axis, 1, length - 1)[joined])
    first = torch.cat(firsts).long()  # (pairs,)
    second = torch.cat(seconds).long()

    root = torch.arange(count)
    while len(first):
        a = root[first]
        b = root[second]
        root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
        apart = root[first] != root[second]
        first = first[apart]
        second = second[apart]
    return root


def voxel_ml(affine: np.ndarray) -> float:
    """The volume of a voxel by an affine (4, 4) in mm."""
    return float(abs(np.linalg.det(affine[:3, :3])) / 1000)


def draw_case(
    image: np.ndarray,
    maps: dict[str, np.ndarray],
    meta: dict,
    name: str,
    metrics: dict[str, float],
) -> Tensor:
    """Image, truth and prediction where these two differ most, with the case's metrics."""
    position = fullest(maps["truth"] != maps["prediction"], meta["slice_axis"])
    unit = meta.get("picture_unit", "mm")
    caption = f"dice {metrics['dice']:.3f}  hd95 {metrics['hd95_mm']:.1f} {unit}"
    return draw_panels(image, {"image": None} | maps, meta, position, [name, caption])


def choose_rows(
    cache: Path, split: str, paths: list[Path], checkpoints: list[dict]
) -> dict[str, list[int]]:
    """Row numbers of the split by fold: of "test", or of each fold that a checkpoint left out.

    Raises DataError if there are none, or if one that predicts them was trained on one of them.
    """
    meta, index = open_cache(cache)
    check_same(meta, checkpoints[0]["meta"], cache, paths[0])
    folds = ["test"]
    if split == "val":
        left_out = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
        if -1 in left_out:
            raise DataError("a checkpoint left no fold out (--fold -1); use --split test")
        folds = [str(fold) for fold in sorted(left_out)]
        sha256 = file_sha256(cache / "index.csv")
        if any(checkpoint["settings"]["index"] != sha256 for checkpoint in checkpoints):
            raise DataError(
                f"{cache}: not the cache of the training, so its folds differ; use --split test"
            )
    rows_by_fold = {}
    for fold in folds:
        rows = [k for k, row in enumerate(index) if row["fold"] == fold]
        if not rows:
            raise DataError(
                f"{cache}: no {split} rows; preprocess.py makes them by --test-fraction or --like"
            )
        own = of_fold(fold, checkpoints, checkpoints)
        check_leakage(cache, rows, of_fold(fold, paths, checkpoints), own)
        rows_by_fold[fold] = rows
    missing = [row["fold"] for row in index if row["fold"] not in ("test", *folds)]
    if len(folds) > 1 and missing:
        names = ", ".join(sorted(set(missing)))
        print(f"note: no checkpoint of fold {names}: {len(missing)} rows are left out")
    return rows_by_fold


def of_fold(fold: str, items: list, checkpoints: list[dict]) -> list:
    """Of items that belong to a checkpoint each, those whose training left the fold out.

    All of them for the fold "test".
    """
    chosen = []
    for item, checkpoint in zip(items, checkpoints, strict=True):
        if fold in ("test", str(checkpoint["settings"]["fold"])):
            chosen.append(item)
    return chosen


def check_leakage(cache: Path, rows: list[int], paths: list[Path], checkpoints: list[dict]) -> None:
    """Raise DataError if a checkpoint, or its --init, was trained on some of these rows.

    Images and patients count. Patients whom an official split has on both sides are told, but not
    refused: such splits are kept as they are.
    """
    index = read_index(cache)
    overlaps = read_meta(cache).get("overlaps", {})
    patients, images = fingerprints(cache, rows)
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        trained_on = checkpoint.get("trained_on")
        if not trained_on:
            print(
                f"note: {path} does not say what it was trained on: keep that out of the test set"
            )
            continue
        settings = checkpoint["settings"]
        official = set()  # hashes of training patients, where the split is an official one
        of_this_cache = settings["index"] == file_sha256(cache / "index.csv")
        if of_this_cache and overlaps.get("patients on both sides of an official split"):
            held_out = ("test", str(settings["fold"]))
            others = [k for k, row in enumerate(index) if row["fold"] not in held_out]
            official = set(fingerprints(cache, others)[0])
        seen = count_trained_on(trained_on, patients, images)
        refused = [k for k in seen if patients[k] not in official]
        kept = len(seen) - len(refused)
        if kept:
            print(
                f"note: {kept} of {len(rows)} images are of patients in training, "
                "by the official split"
            )
        if refused:
            name = index[rows[refused[0]]]["id"]
            count = f"{len(refused)} of these {len(rows)} images or patients ({name})"
            raise DataError(
                f"{path}: trained on {count}; "
                "take others, or, if only names are alike, change them in index.csv"
            )


def choose_groups(
    rows: list[dict[str, str]], column: str | None
) -> tuple[str, dict[str, list[int]]] | None:
    """--by as `tabulate` takes it: the column, and the numbers of the rows that have each value.

    Raises DataError without such a column, or if it has too many values to be one of groups.
    """
    if column is None:
        return None
    names = ", ".join(rows[0])
    if column not in rows[0]:
        raise DataError(f"--by {column}: no such column in index.csv, expected one of {names}")
    rows_of = split_by([row[column] for row in rows], bands=column != "fold")
    if len(rows_of) > MOST_VALUES:
        found = f"{len(rows_of)} values in {len(rows)} rows"
        raise DataError(
            f"--by {column}: {found}, expected at most {MOST_VALUES}; the columns are {names}"
        )
    return column, rows_of


def suffix_of(meta: dict) -> str:
    """What masks are called: those of pictures are pictures."""
    return ".png" if "picture_unit" in meta else ".nii.gz"


def check_split_outputs(out: Path, args: argparse.Namespace, names: list[str], suffix: str) -> None:
    """Raise DataError if a result would be written onto a mask of the cache or a checkpoint."""
    outputs = [out / "metrics.json", out / "cases.csv"]
    inputs = list(args.checkpoint)
    for name in names:
        outputs.append(out / "predictions" / f"{name}{suffix}")
        inputs.append(args.data / "volumes" / f"{name}.truth.nii.gz")
    check_outputs(outputs, inputs)


def list_results(out: Path) -> list[str]:
    """The files that an evaluation of a split left in the folder."""
    names = ["metrics.json", "cases.csv", "worst.png", "worst.gif"]
    if (out / "cases.csv").is_file():
        with open(out / "cases.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for suffix in (".nii.gz", ".png"):
                    names.append(f"predictions/{Path(row['id']).name}{suffix}")
    return names


def read_truth(
    cache: Path, name: str, values: list[int]
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Class numbers uint8 (X, Y, Z) of a mask on the grid of its file, affine and header."""
    path = cache / "volumes" / f"{name}.truth.nii.gz"
    with reading(path):
        mask, affine, header = read_nifti(path, [])
    if mask.ndim != 3 or not np.isin(mask, values).all():
        raise DataError(f"{path}: expected a volume of the values {values}; preprocess again")
    return np.searchsorted(values, mask).astype(np.uint8), affine, header


def write_prediction(
    path: Path,
    mask: np.ndarray,
    affine: np.ndarray,
    header: nib.Nifti1Header | None,
    description: bytes = b"",
) -> None:
    """Write uint8 (X, Y, Z) as NIfTI, or as the PNG of a picture, by the suffix of the file."""
    if path.suffix != ".png":
        write_mask(path, mask, affine, header, description)
        return
    info = PngInfo()
    info.add_text("Software", description.decode())
    Image.fromarray(mask[:, :, 0].T).save(path, pnginfo=info)


def measure_case(
    truth: np.ndarray, prediction: np.ndarray, affine: np.ndarray, classes: list[str]
) -> dict[str, float]:
    """Every metric of a case: NAME, the mean over the foreground classes, and NAME_CLASS, of each.

    `truth` and `prediction` are class numbers (X, Y, Z) on one grid.
    """
    spacing = nib.affines.voxel_sizes(affine).tolist()  # mm
    by_class = {}
    for k, class_name in enumerate(classes[1:], 1):
        true_mask = torch.from_numpy(truth == k)
        predicted_mask = torch.from_numpy(prediction == k)
        by_class[class_name] = segmentation_metrics(true_mask, predicted_mask, spacing)
    means = {}
    details = {}
    # NaN, a structure that neither of them has, is left out of the mean.
    for name in by_class[classes[1]]:
        values = [metrics[name] for metrics in by_class.values()]
        means[name] = torch.tensor(values, dtype=torch.float64).nanmean().item()
        for class_name, value in zip(by_class, values, strict=True):
            details[f"{name}_{class_name}"] = value
    return means | details


def summarise(
    args: argparse.Namespace,
    cases: list[dict],
    by: tuple[str, dict[str, list[int]]] | None,
    meta: dict,
    structures: Counter,
    out: Path,
) -> None:
    """Write cases.csv and metrics.json, and print the means over the cases with their intervals."""
    write_csv(out / "cases.csv", cases)
    names = [name for name in cases[0] if name not in ("id", "group", "fold")]
    values = []
    for case in cases:
        values.append([case[name] for name in names])
    table = torch.tensor(values, dtype=torch.float64)  # (cases, metrics)

    def mean_metrics(rows: Tensor) -> dict[str, float]:
        means = table[rows].nanmean(0)
        return dict(zip(names, means.tolist(), strict=True))

    groups = [case["group"] for case in cases]
    folds = [case["fold"] for case in cases]
    summary = bootstrap(mean_metrics, groups, args.samples)
    tables = tabulate(mean_metrics, folds, groups, by, args.samples)
    run = {
        "command": " ".join(sys.argv),
        "versions": {module.__name__: module.__version__ for module in (torch, nib)},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint],
        "index_sha256": file_sha256(args.data / "index.csv"),
        "split": args.split,
        "n": len(cases),
        "classes": meta["classes"],
        "tta": args.tta,
        "largest": args.largest,
        "both_empty": structures[0],
        "one_empty": structures[1],
    }
    unit = meta.get("picture_unit")
    if unit:
        run["unit"] = unit
    write_report(out, summary, groups, cases, run, tables)
    if args.largest:
        most = max(cases, key=lambda case: case["dropped_ml"])
        count = sum(case["dropped_ml"] > 0 for case in cases)
        worst = f"at most {most['dropped_ml']:.3f} ml, of {most['id']}"
        print(f"note: --largest dropped parts of {count} of {len(cases)} cases, {worst}")
    if unit == "px":
        print("note: the pictures say no resolution: distances are in pixels, in metrics.json")
        print("      and cases.csv too, and volume_error_ml is in thousands of pixels")
    elif unit == "mm":
        print("note: volume_error_ml is that of slices of 1 mm: the area in mm2 by 1000")


# --- pictures ---


def fullest(marked: np.ndarray, axis: int) -> int:
    """The slice with the most marked voxels of a bool volume (X, Y, Z)."""
    others = tuple(k for k in range(3) if k != axis)
    return int(marked.sum(others).argmax())


def draw_panels(
    image: np.ndarray,
    maps: dict[str, np.ndarray | None],
    meta: dict,
    position: int,
    caption: list[str],
) -> Tensor:
    """A slice of an image (C, X, Y, Z), once for each map of classes (X, Y, Z), side by side.

    Gives uint8 (3, H, W). The axes of RAS go to the right and up, with the proportions that they
    have in mm. The lines of the caption and the names of the maps stand above; a map None is the
    bare image.
    """
    axis = meta["slice_axis"]
    is_colour = "picture_unit" in meta and len(image) == 3
    shown = image if is_colour else image[:1]
    plane = np.stack([take_slice(one, axis, position) for one in shown])  # (1 or 3, H, W)
    plane = plane.astype(np.float32)
    low, high = np.percentile(plane, (0.5, 99.5))  # some voxels are far brighter than all others
    contrast = high - low
    if contrast == 0:  # a slice of air
        contrast = 1
    gray = torch.from_numpy(255 * ((plane - low) / contrast).clip(0, 1)).byte()

    across, up = patch_axes(meta["spacing"], 2, axis)
    height = gray.shape[1] * up  # mm
    width = gray.shape[2] * across  # mm
    scale = max(height, width)
    size = [max(1, round(TILE * length / scale)) for length in (height, width)]  # pixels
    gray = resize(gray.expand(3, -1, -1), size)  # (3, *size), of pictures in colour

    gap = torch.zeros(3, size[0], GAP, dtype=torch.uint8)  # black
    panels = []
    for labels in maps.values():
        panel = gray
        if labels is not None:
            plane = take_slice(labels, axis, position)
            panel = overlay(gray, plane, len(meta["classes"]))
        panels += [panel, gap]
    strip = torch.cat(panels[:-1], 2)  # (3, H, W)
    head = draw_caption(caption, list(maps), size[1] + GAP, strip.shape[2])
    return torch.cat([pil_to_tensor(head), strip], 1)


def take_slice(volume: np.ndarray, axis: int, position: int) -> np.ndarray:
    """A slice of (X, Y, Z) as a picture: its first axis to the right, its second one up."""
    return np.take(volume, position, axis).T[::-1]


def overlay(picture: Tensor, labels: np.ndarray, classes: int) -> Tensor:
    """Colour a picture uint8 (3, H, W) by class numbers of any size, but for the background."""
    size = list(picture.shape[1:])
    labels = torch.from_numpy(labels.copy())[None]  # torch has no negative strides
    labels = resize(labels, size, InterpolationMode.NEAREST)  # (1, H, W)
    masks = torch.cat([labels == k for k in range(1, classes)])  # bool (K - 1, H, W)
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(masks))]
    return draw_segmentation_masks(picture, masks, alpha=0.45, colors=colours)


def draw_caption(lines: list[str], names: list[str], step: int, width: int) -> Image.Image:
    """White text on black: the lines, then the names side by side, `step` pixels apart."""
    head = Image.new("RGB", (width, LINE * (len(lines) + 1)), "black")
    draw = ImageDraw.Draw(head)
    for k, line in enumerate(lines):
        text = shorten(line, width // 8)  # a letter has some 8 pixels
        draw.text((4, LINE * k + 2), text, "white", font(14))
    for k, name in enumerate(names):
        draw.text((step * k + 4, LINE * len(lines) + 2), name, "white", font(14))
    return head


def shorten(text: str, length: int) -> str:
    """The beginning and the end of a text that is too long for its line."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def write_gallery(path: Path, tiles: list[Tensor]) -> None:
    """Tiles of different sizes below each other in three columns."""
    height = max(tile.shape[1] for tile in tiles)
    width = max(tile.shape[2] for tile in tiles)
    padded = []
    for tile in tiles:
        margins = [0, width - tile.shape[2], 0, height - tile.shape[1]]  # left, right, top, bottom
        padded.append(torch.nn.functional.pad(tile, margins))
    save_picture(path, to_pil_image(torchvision.utils.make_grid(padded, nrow=3)))


def save_picture(path: Path, picture: Image.Image) -> None:
    with written(path) as temporary:
        picture.save(temporary)


def write_gif(path: Path, image: np.ndarray, maps: dict, meta: dict, name: str) -> None:
    """The slices of a volume (C, X, Y, Z) as an animation, at most some 100; none of a picture."""
    count = image.shape[meta["slice_axis"] + 1]
    if count == 1:
        return
    step = math.ceil(count / 100)
    frames = []
    for k in range(0, count, step):
        caption = f"{name}  slice {k + 1}/{count}"
        frames.append(to_pil_image(draw_panels(image, maps, meta, k, [caption])))
    with written(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=100, loop=0)


# --- new images ---


@dataclass
class NewImage:
    """A new image, and the name of its mask."""

    name: str
    paths: list[Path]  # one file or DICOM folder with all channels, or one file a channel
    numbers: list[int]  # which channels the files are, if they are one each
    files: list[Path] = field(default_factory=list)  # those of a series that shares its folder


def predict_images(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Masks and pictures of new images. Raises DataError at the end if some cannot be predicted."""
    meta = checkpoints[0]["meta"]
    warnings.filterwarnings("ignore", module="pydicom")  # harmless header slips, one line per file
    images = find_images(args.images, meta)
    check_place(out, args.images)
    check_results(out, images, suffix_of(meta))
    tiles = []  # a picture for each of the first images
    bad = 0
    done = 0
    with hold_folder(out):
        for image in images:
            try:
                row, on_grid, labels = predict_image(image, args, models, checkpoints, device, out)
            except DataError as error:
                bad += 1
                print(error, file=sys.stderr)
                continue
            # Row by row: what a stopped run has done stays.
            append_row(out / "volumes.csv", row, is_first=done == 0)
            done += 1
            maps = {"image": None, "prediction": labels}
            if done <= OVERLAYS:
                position = fullest(labels > 0, meta["slice_axis"])
                tiles.append(draw_panels(on_grid, maps, meta, position, [image.name]))
            if done == 1:
                write_gif(out / "first.gif", on_grid, maps, meta, image.name)
            unit = "px" if "picture_unit" in meta else "ml"
            volumes = [f"{name} {row[f'{unit}_{name}']} {unit}" for name in meta["classes"][1:]]
            if args.largest:
                volumes.append(f"dropped {row[f'{unit}_dropped']} {unit}")
            print(one_line(f"{row['image']}: {'  '.join(volumes)}"))
        if done:
            write_gallery(out / "overlays.png", tiles)
            print(f"{done} images; masks, volumes.csv and pictures in {out}")
            if done > OVERLAYS:
                print(f"note: overlays of the first {OVERLAYS} images only")
            if "picture_unit" in meta:
                numbers = f"the numbers {meta['values']}; small ones look black in a viewer"
                print(f"masks are PNG files of the pictures' sizes with {numbers}")
    if bad:
        raise DataError(f"{bad} of {len(images)} images could not be read (named above)")


def find_images(paths: list[Path], meta: dict) -> list[NewImage]:
    """The images among files and folders, with names of masks that do not collide.

    For a network of several channels NAME_0000, NAME_0001, ... (nnU-Net) of one folder are one
    image.
    """
    channels = len(meta["channels"])
    by_place: dict[Path, NewImage] = {}
    for image in list_new(paths, "picture_unit" in meta):
        path = image.paths[0]
        place = Path(os.path.abspath(path))
        stem, number = split_channel(image.name)
        if number is None or channels == 1 or not is_one_channel(path):
            by_place[place / image.name if image.files else place] = image
        else:
            # The first channel file makes the image, the others join it.
            image = by_place.setdefault(place.with_name(stem), NewImage(stem, [], []))
            image.paths.append(path)
            image.numbers.append(number)
    images = list(by_place.values())
    if channels == 1:
        note_channels({image.name for image in images})
    name_outputs(images)
    return images


def list_new(paths: list[Path], pictures: bool) -> list[NewImage]:
    """Files as they are; of a folder, all that is below it; a DICOM series is one image.

    What lies deeper is called by its path. Raises DataError for a folder without pictures, if
    those are wanted.
    """
    images = []
    for path in paths:
        name = image_name(Path(os.path.abspath(path)))  # "." has no name of its own
        below = []
        for folder in list_folders(path):
            inside = list_pictures(folder) if pictures else list_scans(folder)
            parts = folder.relative_to(path).parts
            for image in inside:
                # The folder of a series has given its name to the image itself.
                names = parts[:-1] if image.paths[0] == folder else parts
                image.name = shorten_name("_".join([*names, image.name]))
            below += inside
        if pictures and path.is_dir() and not below:
            raise DataError(f"{path}: no picture in it, expected {PICTURE_KINDS}, as in training")
        images += below or [NewImage(name or "image", [path], [])]
    return images


def list_folders(top: Path) -> list[Path]:
    """A folder and all folders below it, but hidden ones, in the order of their names."""
    folders = []
    for folder, names, _ in os.walk(top):
        names[:] = sorted(name for name in names if not name.startswith("."))
        folders.append(Path(folder))
    return folders


def list_pictures(folder: Path) -> list[NewImage]:
    """The pictures of a folder; what else lies there is noted."""
    volumes, others = list_volumes(folder)
    pictures = [path for path in others if is_picture(path)]
    left_out = [path for path in volumes + others if path.is_file() and path not in pictures]
    note_others(folder, left_out, f"neither {PICTURE_KINDS}")
    return [NewImage(image_name(path), [path], []) for path in pictures]


def list_scans(folder: Path) -> list[NewImage]:
    """The volumes of a folder, what else lies there is noted; or its DICOM series."""
    volumes, others = list_volumes(folder)
    others = [path for path in others if path.is_file()]
    if volumes:
        note_others(folder, others)
        return [NewImage(volume_name(path), [path], []) for path in volumes]
    name = Path(os.path.abspath(folder)).name
    series, no_images = split_series(others)
    if len(series) > 1:
        images = []
        for number, files in series.items():
            # Each with the files that are no images: a cut one may be of any of the series.
            images.append(NewImage(f"{name}_{number}", [folder], [], files + no_images))
        return images
    # Cut ones are named when the folder is read; a DICOMDIR is the table of contents of a disc.
    cut = [path for path in no_images if not path.name.upper().startswith("DICOMDIR")]
    if series or any(is_dicom(path) for path in cut):
        return [NewImage(name or "image", [folder], [])]
    return []


def split_series(paths: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The DICOM images among files, by the number of their series, and the other files.

    Two series of one number, which echoes may have, are number and number_2.
    """
    by_uid = defaultdict(list)
    numbers = {}
    others = []
    for path in paths:
        ds = read_dataset(path, stop_before_pixels=True)
        if ds is None or not ds.get("Rows"):
            others.append(path)
            continue
        uid = str(ds.get("SeriesInstanceUID"))
        by_uid[uid].append(path)
        numbers.setdefault(uid, str(ds.get("SeriesNumber") or "series"))
    taken: set[str] = set()
    series = {choose_free(numbers[uid], taken): files for uid, files in by_uid.items()}
    return series, others


def shorten_name(name: str) -> str:
    """The end of a name that would be too long for a file: folders may be called by UIDs."""
    return name if len(name) <= 150 else name[-150:].lstrip(".")


def is_one_channel(path: Path) -> bool:
    """Whether a file can be one channel of nnU-Net: it is not 4D itself.

    So can one that cannot be read: then the message names it with its channel.
    """
    if is_picture(path):
        return False
    try:
        return path.is_file() and len(read_header(path).get_data_shape()) < 4
    except (DataError, OSError, EOFError, zlib.error):
        return True


def note_channels(names: set[str]) -> None:
    """Note names like nnU-Net's channel files, which with one channel are an image each."""
    for first in sorted(names):
        second = f"{first[:-1]}1"
        if first.endswith("_0000") and second in names:
            print(f"note: {first} and {second} are two images to a network of one channel")
            return


def name_outputs(images: list[NewImage]) -> None:
    """Make the names differ, even without case: by their folders' names, and else by a number.

    Of a.nii and a.nii.gz the latter has the mask a.nii.gz, or people would take it for the other's.
    """
    # Those come first, and so get the name, whose mask would be called as they are.
    first_choice = sorted(images, key=lambda image: image.paths[0].name != f"{image.name}.nii.gz")
    same_name = defaultdict(list)
    for image in first_choice:
        same_name[image.name.casefold()].append(image)
    taken = {name for name, members in same_name.items() if len(members) == 1}
    for members in same_name.values():
        if len(members) == 1:
            continue
        # Two ct folders of p1 and p2 become p1_ct and p2_ct; what still is alike gets a number.
        folders = [image.paths[0].resolve().parent.name for image in members]
        for image, folder in zip(members, folders, strict=True):
            if len(set(folders)) > 1:
                image.name = f"{folder}_{image.name}"
            image.name = choose_free(image.name, taken)


def choose_free(base: str, taken: set[str]) -> str:
    """`base`, or base_2, base_3, ... if that is taken; the choice is taken from now on."""
    name = base
    number = 2
    while name.casefold() in taken:
        name = f"{base}_{number}"
        number += 1
    taken.add(name.casefold())
    return name


def check_place(out: Path, paths: list[Path]) -> None:
    """Raise DataError if --out lies below a folder of --images, where masks would be read."""
    for folder in paths:
        if folder.resolve() in out.resolve().parents:
            problem = f"lies in {folder}, where it would be read as images"
            raise DataError(f"--out {out}: {problem}; choose another")


def check_results(out: Path, images: list[NewImage], suffix: str) -> None:
    """Raise DataError if an image, or a file that is no earlier result, would be overwritten."""
    masks = [out / f"{image.name}{suffix}" for image in images]
    inputs = []
    for image in images:
        inputs += image.paths
    table = out / "volumes.csv"
    check_outputs([*masks, table, out / "overlays.png", out / "first.gif"], inputs)
    if out.resolve() in [path.resolve() for path in inputs]:
        reason = "is the folder of a DICOM series that is read"
        raise DataError(f"{out}: {reason}; give another --out")
    foreign = [mask for mask in masks if mask.exists() and not is_prediction(mask)]
    # By its first columns a table is known to be one of ours.
    if table.exists() and not table.read_bytes().startswith(b"image,mask,"):
        foreign.append(table)
    if foreign:
        reason = "exists and is no earlier result of this script"
        raise DataError(f"{foreign[0]}: {reason}; give another --out")


def is_prediction(path: Path) -> bool:
    """Whether a file is a mask written by this script."""
    if path.suffix == ".png":
        with reading(path), Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software", "").encode().startswith(PREDICTION)
    try:
        return bytes(read_header(path)["descrip"]).startswith(PREDICTION)
    except (DataError, OSError, EOFError, zlib.error):
        return False


def predict_image(
    image: NewImage,
    args: argparse.Namespace,
    models: list,
    checkpoints: list[dict],
    device: torch.device,
    out: Path,
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Write the mask of an image. Its row of volumes.csv; image and class numbers on the grid.

    Raises DataError if it cannot be read or needs more memory than there is.
    """
    meta = checkpoints[0]["meta"]
    with name_memory_error(image.paths[0]):
        on_grid, affine, header, shape = read_image(image, meta)
        probabilities = predict(models, checkpoints, on_grid, device, args.amp, args.tta)
        check_finite(probabilities, image.paths[0])
        labels = from_grid(probabilities.numpy(), shape, affine)  # (X, Y, Z) of the file
        labels_on_grid = probabilities.argmax(0).byte().numpy()
    if args.largest:
        labels, dropped = keep_largest(labels)
        labels_on_grid, _ = keep_largest(labels_on_grid)
    mask_name = f"{image.name}{suffix_of(meta)}"
    with written(out / mask_name) as path:
        values = np.array(meta["values"], np.uint8)
        write_prediction(path, values[labels], affine, header, PREDICTION)

    voxel = voxel_ml(affine)
    counts = np.bincount(labels.reshape(-1), minlength=len(meta["classes"]))
    source = image.files[:1] or image.paths  # of a series beside others its first file
    row = {"image": ";".join(map(str, source)), "mask": mask_name}
    for name, count in zip(meta["classes"][1:], counts[1:], strict=True):
        if "picture_unit" in meta:
            row[f"px_{name}"] = int(count)  # pixels of the file
        else:
            row[f"ml_{name}"] = round(voxel * int(count), 3)
    if args.largest:
        if "picture_unit" in meta:
            row["px_dropped"] = dropped
        else:
            row["ml_dropped"] = round(voxel * dropped, 3)
    return row, on_grid, labels_on_grid


def read_image(
    image: NewImage, meta: dict
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header | None, tuple[int, ...]]:
    """An image on the common grid, float16 (C, X, Y, Z); affine, header and shape of its file.

    Prints what is odd. Raises DataError if the model cannot take it.
    """
    notes: Notes = []
    path = image.paths[0]
    paths = image.paths
    if image.numbers:
        numbers = sorted(image.numbers)
        if numbers != list(range(len(meta["channels"]))):
            given = ", ".join(f"{number:04d}" for number in numbers)
            expected = f"one for each of {meta['channels']}"
            raise DataError(f"{path}: channel files {given}, expected {expected}")
        paths = [image.paths[image.numbers.index(number)] for number in numbers]
    volume, affine, header = fit_picture(path, read_channels(paths, notes, image.files), meta)
    for what, detail in notes:
        print_note(path, what, detail)
    check_channels(path, volume.shape[3], meta["channels"])
    shape = volume.shape[:3]
    _, spacing = orient(affine)
    check_grid(path, ras_shape(shape, affine), spacing, meta)
    on_grid = to_grid(volume, affine, meta)
    check_range(path, on_grid)
    return on_grid, affine, header, shape


def append_row(path: Path, row: dict, is_first: bool) -> None:
    """Add a row to a CSV file; the first one replaces the file and writes the header."""
    mode = "w" if is_first else "a"
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_first:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    run_command(main, CheckpointError)
