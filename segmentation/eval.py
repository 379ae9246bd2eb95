"""Evaluate checkpoints of train.py on cases with masks, or outline the structures in new images.

  python segmentation/eval.py --data data/hippocampus --checkpoint runs/hippocampus/best.pt
  python segmentation/eval.py --data data/other --checkpoint a/best.pt b/best.pt --split test
  python segmentation/eval.py --data CACHE --checkpoint runs/fold_?/best.pt --by fold
  python segmentation/eval.py --checkpoint runs/a/best.pt --images scan.nii.gz dicom_folder

With masks, written to --out: metrics.json with 95 % bootstrap intervals (over patients), cases.csv,
predictions/ID.nii.gz, worst.png (image, truth, prediction on the slice with the most errors, worst
case first) and worst.gif. Metrics are taken on the grid of the original file, only dice_cache on
that of the cache: without --largest it is the score that train.py printed. dropped_ml is what
--largest dropped. The probabilities of several checkpoints are averaged; those of several folds
predict the fold that each left out, and the metrics are over all these cases.

New images (.nii, .nii.gz, pictures, DICOM series, or folders of them of any depth): masks,
volumes.csv and overlays. nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ... are the channels of one
image.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_segmentation_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    DataError,
    file_sha256,
    free_name,
    load_checkpoint,
    load_weights,
    new_folder,
    one_line,
    progress,
    refuse_trained_on,
    run_command,
    write_csv,
)
from common.metrics import (
    bootstrap,
    dice_scores,
    segmentation_metrics,
    summarise_by,
    write_report,
)
from segmentation.dataset import META, open_cache, open_case
from segmentation.model import build_model, patch_axes, predict_volume
from segmentation.preprocess import (
    PREDICTION,
    NewImage,
    explain,
    explaining,
    find_new,
    from_grid,
    read_new,
    read_nifti,
    write_mask,
)
from segmentation.train import AMP, check_finite, choose_device

TILE = 256  # pixels of the longer side of one picture in a gallery
GAP = 2  # pixels between two pictures of a tile
LINE = 20  # pixels of a line of text
CAPTION = 300  # smallest width of a tile in pixels
OVERLAYS = 100  # pictures of new images: the first ones
COLOURS = ("#ff4040", "#40c0ff", "#ffd040", "#60e060", "#d070ff", "#ff9040", "#40e0d0", "#ff80c0")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="best.pt or last.pt, one or more")
    add("--data", type=Path, metavar="CACHE", help="a cache of preprocess.py")
    split_help = "val (default): the folds that the runs left out; test: the test set"
    add("--split", choices=("val", "test"), default="val", help=split_help)
    images_help = "new images without masks: files and folders"
    add("--images", type=Path, nargs="+", metavar="PATH", help=images_help)
    largest_help = "keep only the largest connected part of each class, report the rest"
    add("--largest", action="store_true", help=largest_help)
    by_help = "metrics for each value of a column of index.csv (default for several folds: fold)"
    add("--by", metavar="COLUMN", help=by_help)
    out_help = "a new folder (default: eval_val, eval_test or predictions beside the run)"
    add("--out", type=Path, help=out_help)
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, help="mixed precision (default: as in the run)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (with masks) or --images PATH ... (new images)")
    if args.by and not args.data:
        parser.error("--by needs known cases: give --data")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = choose_device(args.device)
    runs = load_runs(args.checkpoint, device)
    name = f"eval_{args.split}" if args.data else "predictions"
    out = args.out or free_name(args.checkpoint[0].parent / name)
    bad = 0
    with new_folder(out) as folder:
        if args.data:
            result = evaluate_split(args, runs, device, folder)
        else:
            result, bad = predict_images(args, runs, device, folder)
    print(f"{result} in {out}")
    if bad:  # only now: the results of the other files are complete
        raise DataError(f"{bad} files could not be read (named above)")


# --- the models ---


class Run(NamedTuple):
    """A checkpoint with its network."""

    path: Path
    checkpoint: dict
    model: nn.Module
    meta: dict
    settings: dict
    fold: str  # the validation fold, "-1" for none


def load_runs(paths: list[Path], device: torch.device) -> list[Run]:
    """Checkpoints and their bare models. Raises DataError if they do not match each other."""
    runs = []
    for path in paths:
        checkpoint = load_checkpoint(path, "segmentation")
        meta = checkpoint["meta"]
        settings = checkpoint["settings"]
        model = build_model(meta, settings["channels"], settings["patch"])
        load_weights(model, checkpoint["model"], path)
        model = model.to(device).eval()
        runs.append(Run(path, checkpoint, model, meta, settings, str(settings["fold"])))
        check_same(meta, runs[0].meta, path, paths[0])
    return runs


def check_same(meta: dict, expected: dict, path: Path, expected_path: Path) -> None:
    """Raise DataError if two caches or checkpoints were not prepared in the same way."""
    for name in META:
        # Shape and slice axis may differ: they only decide the patches of a training.
        if name not in ("shape", "slice_axis", "n") and meta[name] != expected[name]:
            problem = f"{name} {meta[name]}, but {expected_path} has {expected[name]}"
            raise DataError(f"{path}: {problem}")


def predict(runs: list[Run], image: np.ndarray, device: torch.device, amp: str | None) -> Tensor:
    """Class probabilities float16 (K, X, Y, Z) of an image (C, X, Y, Z), averaged over the runs.

    `amp` None: the mixed precision of each run.
    """
    total = None
    for run in runs:
        settings = run.settings
        mode = AMP[amp or settings["amp"]]
        plan = (settings["patch"], run.meta["slice_axis"], device, mode, settings["batch_size"])
        part = predict_volume(run.model, image, *plan).cpu()
        part /= len(runs)  # in place: nothing else is as large
        total = part if total is None else total.add_(part)
    return total


@contextmanager
def name_memory_error(path: Path) -> Iterator[None]:
    """Turn an out-of-memory error of NumPy or torch into a DataError that names the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        # On a CPU torch has no exception type for it.
        if isinstance(error, RuntimeError) and "memory" not in reason:
            raise
        raise explain(path, MemoryError(reason)) from error


# --- a split of a cache ---


def evaluate_split(
    args: argparse.Namespace, runs: list[Run], device: torch.device, out: Path
) -> str:
    """Predict the cases of a split: masks, pictures, cases.csv, and from it metrics.json."""
    meta, index = open_cache(args.data)
    check_same(meta, runs[0].meta, args.data, args.checkpoint[0])
    folds = choose_folds(args, runs, index)
    rows = [row for row in index if row["fold"] in folds]
    by = args.by or ("fold" if len(folds) > 1 else None)
    if by and by not in index[0]:
        raise DataError(f"--by {by}: no column in index.csv, expected one of {', '.join(index[0])}")

    # The table with a row per case, and a mask and a picture of each
    (out / "predictions").mkdir()
    cases = []
    tiles = []
    worst_dice = math.nan  # until a case has a Dice
    for number, row in enumerate(rows, 1):
        # Image and mask are on the grid of the cache, the truth is on that of its file.
        name = row["id"]
        image, mask = open_case(args.data, name)
        truth, affine, header = read_truth(args.data, name, meta["values"])
        with name_memory_error(args.data / "volumes" / f"{name}.image.npy"):
            probabilities = predict(left_out(row["fold"], runs), image, device, args.amp)
            check_finite(probabilities, name)
            prediction = from_grid(probabilities.numpy(), truth.shape, affine)
        on_grid = probabilities.argmax(0).byte().numpy()
        metrics = {}
        if args.largest:
            prediction, dropped = keep_largest(prediction)
            on_grid, _ = keep_largest(on_grid)
            metrics["dropped_ml"] = dropped * voxel_ml(affine)
        write_prediction(out / "predictions", name, prediction, affine, header, meta)
        metrics = measure_case(truth, prediction, affine, meta["classes"]) | metrics
        true_grid = torch.from_numpy(np.array(mask))
        scores = dice_scores(true_grid, torch.from_numpy(on_grid), len(meta["classes"]))
        metrics["dice_cache"] = scores.nanmean().item()
        case = {key: row[key] for key in ("id", "patient", "fold")}
        cases.append(case | metrics)
        maps = {"truth": mask, "prediction": on_grid}
        tiles.append(draw_case(image, maps, meta, name, metrics))
        if math.isnan(worst_dice) or metrics["dice"] < worst_dice:
            worst_dice = metrics["dice"]
            worst = (image, maps, meta, name)
        progress(f"{number}/{len(rows)}  {name}  dice {metrics['dice']:.3f}")
    progress("")
    write_csv(out / "cases.csv", cases)
    write_metrics(args, cases, rows, by, meta, out)

    dice = torch.tensor([case["dice"] for case in cases])
    order = dice.nan_to_num(2.0).argsort()[:12]  # NaN, both masks empty: last
    write_gallery(out / "worst.png", [tiles[k] for k in order.tolist()])
    write_gif(out / "worst.gif", *worst)
    return f"{len(rows)} cases; tables, masks and pictures"


def write_metrics(
    args: argparse.Namespace,
    cases: list[dict],
    rows: list[dict[str, str]],
    by: str | None,
    meta: dict,
    out: Path,
) -> None:
    """Write metrics.json: means over all cases and for each value of --by, with intervals."""
    names = [name for name in cases[0] if name not in ("id", "patient", "fold")]
    values = [[case[name] for name in names] for case in cases]
    table = torch.tensor(values, dtype=torch.float64)  # (cases, metrics)

    def measure(sample: Tensor) -> dict[str, float]:
        means = table[sample].nanmean(0)  # NaN: a structure that neither mask has
        return dict(zip(names, means.tolist(), strict=True))

    patients = [case["patient"] for case in cases]
    summary = bootstrap(measure, patients)
    if by:
        values = [row[by] for row in rows]
        by = {"column": by, "values": summarise_by(measure, values, patients)}
    unit = meta["picture_unit"]
    run = describe_run(args, len(cases)) | {"classes": meta["classes"], "unit": unit or "mm"}
    write_report(out, summary, patients, cases, run, by)
    absent = sum(math.isnan(case["dice"]) for case in cases)
    if absent:
        print(f"note: {absent} cases where neither mask has anything: left out of the means")
    if args.largest:
        largest = max(cases, key=lambda case: case["dropped_ml"])
        count = sum(case["dropped_ml"] > 0 for case in cases)
        worst = f"at most {largest['dropped_ml']:.3f} ml, of {largest['id']}"
        print(f"note: --largest dropped parts of {count} of {len(cases)} cases, {worst}")
    if unit == "px":
        print("note: the pictures have no resolution: distances are in pixels, in metrics.json")
        print("      and cases.csv too, and volume_error_ml is in thousands of pixels")


def describe_run(args: argparse.Namespace, count: int) -> dict:
    """The evaluation for metrics.json: command, versions, hashes, number of images."""
    return {
        "command": " ".join(sys.argv),
        "versions": {module.__name__: module.__version__ for module in (torch, nib)},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint],
        "index_sha256": file_sha256(args.data / "index.csv"),
        "split": args.split,
        "n": count,
    }


def keep_largest(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Class numbers uint8 (X, Y, Z) with the largest part of each class, connected by faces.

    The others become 0; also returns how many voxels. Of two equal parts the first is kept.
    """
    volume = torch.from_numpy(labels.copy())  # torch has no negative strides
    inside = volume > 0
    classes = volume[inside]  # (N,), the foreground voxels
    part = connected_parts(volume)  # (N,)
    sizes = torch.bincount(part, minlength=len(part))  # (N,), at the first voxel of each part
    kept = torch.zeros_like(classes)
    for k in classes.unique():
        in_class = classes == k
        largest = torch.where(in_class, sizes, 0).argmax()  # the first voxel of the part
        kept[part == largest] = k
    volume[inside] = kept
    return volume.numpy(), int((kept == 0).sum())


def connected_parts(labels: Tensor) -> Tensor:
    """The connected part (N,) of each foreground voxel of class numbers (X, Y, Z), in voxel order.

    A part is named by the number of its first voxel. Neighbours hook the root of one tree onto that
    of the other, then each voxel jumps to its root (Shiloach & Vishkin, J. Algorithms 1982): about
    ten rounds, whatever the shape of the parts.
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
        connected = (below == above) & (below > 0)
        firsts.append(number.narrow(axis, 0, length - 1)[connected])
        seconds.append(number.narrow(axis, 1, length - 1)[connected])
    first = torch.cat(firsts).long()  # (pairs,)
    second = torch.cat(seconds).long()

    root = torch.arange(count)
    while len(first):
        a = root[first]
        b = root[second]
        root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
        unmerged = root[first] != root[second]
        first = first[unmerged]
        second = second[unmerged]
    return root


def voxel_ml(affine: np.ndarray) -> float:
    """Volume of a voxel in ml by an affine (4, 4) in mm."""
    return float(abs(np.linalg.det(affine[:3, :3])) / 1000)


def draw_case(
    image: np.ndarray,
    maps: dict[str, np.ndarray],
    meta: dict,
    name: str,
    metrics: dict[str, float],
) -> Tensor:
    """Image, truth and prediction on the slice with the most errors, with the case's metrics."""
    errors = maps["truth"] != maps["prediction"]
    position = fullest(errors if errors.any() else maps["truth"] > 0, meta["slice_axis"])
    unit = meta["picture_unit"] or "mm"
    caption = f"dice {metrics['dice']:.3f}  hd95 {metrics['hd95_mm']:.1f} {unit}"
    return draw_panels(image, {"image": None} | maps, meta, position, [name, caption])


def choose_folds(args: argparse.Namespace, runs: list[Run], index: list[dict]) -> list[str]:
    """The folds to predict: "test", or those that the runs left out.

    Raises DataError if a fold has no rows, or if a run that predicts it was trained on some.
    """
    folds = ["test"]
    sha256 = file_sha256(args.data / "index.csv")
    if args.split == "val":
        if any(run.fold == "-1" for run in runs):
            raise DataError("a checkpoint left no fold out (--fold -1); use --split test")
        if any(run.settings["index"] != sha256 for run in runs):
            problem = "not the cache of the training, so its folds differ"
            raise DataError(f"{args.data}: {problem}; use --split test")
        folds = sorted({run.fold for run in runs})
        missing = [row for row in index if row["fold"] not in ("test", *folds)]
        if len(folds) > 1 and missing:
            names = ", ".join(sorted({row["fold"] for row in missing}))
            print(f"note: no checkpoint of fold {names}: {len(missing)} rows are left out")
    for fold in folds:
        rows = [row for row in index if row["fold"] == fold]
        if not rows:
            hint = "preprocess.py makes them by --test-fraction or --like"
            raise DataError(f"{args.data}: no {args.split} rows; {hint}")
        for run in left_out(fold, runs):
            is_own_cache = run.settings["index"] == sha256
            refuse_trained_on(run.path, run.checkpoint, index, rows, is_own_cache)
    return folds


def left_out(fold: str, runs: list[Run]) -> list[Run]:
    """The runs that predict a fold: those whose training left it out; for "test" all."""
    return [run for run in runs if fold in ("test", run.fold)]


def read_truth(
    cache: Path, name: str, values: list[int]
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """A mask as class numbers uint8 (X, Y, Z) on the grid of its file, affine and header."""
    path = cache / "volumes" / f"{name}.truth.nii.gz"
    with explaining(path):
        mask, affine, header = read_nifti(path, [])
    if mask.ndim != 3 or not np.isin(mask, values).all():
        raise DataError(f"{path}: expected a volume of the values {values}; preprocess again")
    return np.searchsorted(values, mask).astype(np.uint8), affine, header


def write_prediction(
    folder: Path,
    name: str,
    labels: np.ndarray,
    affine: np.ndarray,
    header: nib.Nifti1Header | None,
    meta: dict,
    description: bytes = b"",
) -> str:
    """Write class numbers (X, Y, Z) with the values of the masks; return the file's name."""
    mask = np.array(meta["values"], np.uint8)[labels]
    if meta["picture_unit"] is None:
        file_name = f"{name}.nii.gz"
        write_mask(folder / file_name, mask, affine, header, description)
        return file_name
    text = PngInfo()
    text.add_text("Software", description.decode())
    Image.fromarray(mask[:, :, 0].T).save(folder / f"{name}.png", pnginfo=text)
    return f"{name}.png"


def measure_case(
    truth: np.ndarray, prediction: np.ndarray, affine: np.ndarray, classes: list[str]
) -> dict[str, float]:
    """Every metric of a case: NAME is the mean over the foreground classes, NAME_CLASS one class.

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
    # NaN, a structure that neither mask has, is left out of the mean.
    for name in by_class[classes[1]]:
        values = [metrics[name] for metrics in by_class.values()]
        means[name] = torch.tensor(values, dtype=torch.float64).nanmean().item()
        for class_name, value in zip(by_class, values, strict=True):
            details[f"{name}_{class_name}"] = value
    return means | details


# --- pictures ---


def fullest(marked: np.ndarray, axis: int) -> int:
    """The slice with the most marked voxels of a bool volume (X, Y, Z)."""
    other_axes = tuple(k for k in range(3) if k != axis)
    return int(marked.sum(other_axes).argmax())


def draw_panels(
    image: np.ndarray,
    maps: dict[str, np.ndarray | None],
    meta: dict,
    position: int,
    caption: list[str],
) -> Tensor:
    """A slice of an image (C, X, Y, Z), once for each map of classes (X, Y, Z), side by side.

    Returns uint8 (3, H, W), in proportions of mm. A map None is the bare image.
    """
    axis = meta["slice_axis"]
    is_colour = meta["picture_unit"] and len(image) == 3
    channels = image if is_colour else image[:1]
    planes = [take_slice(channel, axis, position) for channel in channels]
    plane = np.stack(planes).astype(np.float32)  # (1 or 3, H, W)
    low, high = np.percentile(plane, (0.5, 99.5))  # a few voxels are far brighter than the rest
    contrast = (high - low) or 1  # 0 for a constant slice
    gray = torch.from_numpy(255 * ((plane - low) / contrast).clip(0, 1)).byte()

    across, up = patch_axes(meta["spacing"], 2, axis)
    lengths = (gray.shape[1] * up, gray.shape[2] * across)  # mm
    size = [max(1, round(TILE * length / max(lengths))) for length in lengths]  # pixels
    gray = resize(gray.expand(3, -1, -1), size)  # (3, *size), pictures keep their colours

    gap = torch.zeros(3, size[0], GAP, dtype=torch.uint8)  # black
    panels = []
    for labels in maps.values():
        panel = gray
        if labels is not None:
            plane = take_slice(labels, axis, position)
            panel = overlay(gray, plane, len(meta["classes"]))
        panels += [panel, gap]
    strip = torch.cat(panels[:-1], 2)  # (3, H, W)
    margin = max(0, CAPTION - strip.shape[2])  # or the caption of a narrow image would be cut
    strip = torch.nn.functional.pad(strip, [0, margin])
    head = draw_caption(caption, list(maps), size[1] + GAP, strip.shape[2])
    return torch.cat([pil_to_tensor(head), strip], 1)


def take_slice(volume: np.ndarray, axis: int, position: int) -> np.ndarray:
    """A slice of (X, Y, Z) as a picture: its first axis points right, its second up."""
    return np.take(volume, position, axis).T[::-1]


def overlay(picture: Tensor, labels: np.ndarray, classes: int) -> Tensor:
    """Colour a picture uint8 (3, H, W) by a map of class numbers (h, w), except the background."""
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
    font = ImageFont.load_default(size=14)
    for k, line in enumerate(lines):
        text = shorten(line, width // 8)  # a letter is about 8 pixels wide
        draw.text((4, LINE * k + 2), text, "white", font)
    for k, name in enumerate(names):
        draw.text((step * k + 4, LINE * len(lines) + 2), name, "white", font)
    return head


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and end if it is longer than `length`."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def write_gallery(path: Path, tiles: list[Tensor]) -> None:
    """Tiles of different sizes in rows of three."""
    height = max(tile.shape[1] for tile in tiles)
    width = max(tile.shape[2] for tile in tiles)
    padded = []
    for tile in tiles:
        margins = [0, width - tile.shape[2], 0, height - tile.shape[1]]  # left, right, top, bottom
        padded.append(torch.nn.functional.pad(tile, margins))
    to_pil_image(torchvision.utils.make_grid(padded, nrow=3)).save(path)


def write_gif(path: Path, image: np.ndarray, maps: dict, meta: dict, name: str) -> None:
    """Animate the slices of a volume (C, X, Y, Z), at most 100; a picture gets no file."""
    count = image.shape[meta["slice_axis"] + 1]
    if count == 1:
        return
    step = math.ceil(count / 100)
    frames = []
    for k in range(0, count, step):
        caption = f"{name}  slice {k + 1}/{count}"
        frames.append(to_pil_image(draw_panels(image, maps, meta, k, [caption])))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


# --- new images ---


def predict_images(
    args: argparse.Namespace, runs: list[Run], device: torch.device, out: Path
) -> tuple[str, int]:
    """Write masks, volumes.csv and pictures of new images; a summary, and how many had errors."""
    meta = runs[0].meta
    images = find_new(args.images, meta)
    tiles = []  # a picture for each of the first images
    rows = []
    for image in images:
        try:
            row, on_grid, labels = predict_image(image, args, runs, device, out)
        except DataError as error:
            print(error, file=sys.stderr)
            continue
        rows.append(row)
        write_csv(out / "volumes.csv", rows)  # an interrupted run keeps its rows
        maps = {"image": None, "prediction": labels}
        if len(rows) <= OVERLAYS:
            position = fullest(labels > 0, meta["slice_axis"])
            tiles.append(draw_panels(on_grid, maps, meta, position, [image.name]))
        if len(rows) == 1:
            write_gif(out / "first.gif", on_grid, maps, meta, image.name)
        unit = "px" if meta["picture_unit"] else "ml"
        sizes = list(row.items())[2:]  # after image and mask, ml_NAME or px_NAME
        volumes = [f"{name[3:]} {value} {unit}" for name, value in sizes]
        print(one_line(f"{row['image']}: {'  '.join(volumes)}"))
    if not rows:
        raise DataError(f"none of {len(images)} images could be predicted")
    write_gallery(out / "overlays.png", tiles)
    if len(rows) > OVERLAYS:
        print(f"note: overlays of the first {OVERLAYS} images only")
    if meta["picture_unit"]:
        numbers = f"the numbers {meta['values']}; small ones look black in a viewer"
        print(f"masks are PNG files of the pictures' sizes with {numbers}")
    return f"{len(rows)} images; masks, volumes.csv and pictures", len(images) - len(rows)


def predict_image(
    image: NewImage, args: argparse.Namespace, runs: list[Run], device: torch.device, out: Path
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Write the mask of an image; its row of volumes.csv, image and class numbers on the grid.

    Raises DataError if the image cannot be read or needs too much memory.
    """
    meta = runs[0].meta
    with name_memory_error(image.path):
        on_grid, affine, header, shape, notes = read_new(image, meta)
        for what, detail in notes:
            print(one_line(f"note: {image.path}: {what} {detail}".rstrip()))
        probabilities = predict(runs, on_grid, device, args.amp)
        check_finite(probabilities, image.path)
        labels = from_grid(probabilities.numpy(), shape, affine)  # (X, Y, Z) of the file
        labels_on_grid = probabilities.argmax(0).byte().numpy()
    dropped = 0
    if args.largest:
        labels, dropped = keep_largest(labels)
        labels_on_grid, _ = keep_largest(labels_on_grid)
    mask_name = write_prediction(out, image.name, labels, affine, header, meta, PREDICTION)
    counts = np.bincount(labels.ravel(), minlength=len(meta["classes"]))
    source = [image.path] if image.is_series else image.files
    row = {"image": ";".join(map(str, source)), "mask": mask_name}
    voxels = dict(zip(meta["classes"][1:], counts[1:].tolist(), strict=True))
    if args.largest:
        voxels["dropped"] = dropped
    for name, count in voxels.items():
        if meta["picture_unit"]:
            row[f"px_{name}"] = count  # pixels of the file
        else:
            row[f"ml_{name}"] = round(voxel_ml(affine) * count, 3)
    return row, on_grid, labels_on_grid


if __name__ == "__main__":
    run_command(main)
