"""Evaluate checkpoints of train.py on images with known boxes, or predict new images.

  python detection/eval.py --data data/heart --checkpoint runs/heart/best.pt
  python detection/eval.py --data data/other --split test \\
      --checkpoint runs/a/best.pt runs/b/best.pt
  python detection/eval.py --data CACHE --checkpoint runs/fold_?/best.pt --by fold
  python detection/eval.py --checkpoint runs/heart/best.pt --images scan.dcm folder_of_images

Known boxes: metrics.json with 95 % bootstrap intervals (over patients), predictions.csv in pixels
of the original images, and gallery.png with the worst boxes first. New images: predictions.csv, and
every image with its box. The boxes of several checkpoints are averaged; those of several folds
predict the fold that each left out, and the metrics are over all these images. Batch size and
mixed precision are those of the run, so the score is the one that train.py printed.

In the shapes below N is the number of images, S their side in pixels. Boxes are xmin, ymin, xmax,
ymax in fractions of the image unless stated otherwise.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    DataError,
    file_sha256,
    free_name,
    load_checkpoint,
    load_weights,
    new_folder,
    one_line,
    refuse_trained_on,
    run_command,
    write_csv,
)
from common.metrics import bootstrap, box_iou, detection_metrics, summarise_by, write_report
from detection import preprocess
from detection.dataset import BOX, XrayDataset, in_batches, make_loader, open_cache, read_boxes
from detection.model import PRETRAINED_MEAN_STD, build_model
from detection.train import AMP, check_finite, choose_device, evaluate

TILE = 384  # pixels of one picture in a gallery
OVERLAYS = 100  # pictures of new images: the first ones
WORST = 24  # pictures in gallery.png
DOUBTFUL = 0.5  # IoU below which the label may be wrong
TRUTH = "#30d158"  # green
PREDICTION = "#ff9f0a"  # orange


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="best.pt or last.pt, one or more")
    add("--data", type=Path, metavar="CACHE", help="a cache of preprocess.py")
    split = "val (default): the folds that the runs left out; test: the test set"
    add("--split", choices=("val", "test"), default="val", help=split)
    images = "new images without boxes: files and folders"
    add("--images", type=Path, nargs="+", metavar="PATH", help=images)
    by = "metrics for each value of a column of index.csv (default for several folds: fold)"
    add("--by", metavar="COLUMN", help=by)
    out = "a new folder (default: eval_val, eval_test or predictions beside the run)"
    add("--out", type=Path, help=out)
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, help="mixed precision (default: as in the run)")
    add("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (known boxes) or --images PATH ... (new images)")
    if args.images and args.by:
        parser.error("--by needs known cases: give --data")
    if not 0 <= args.workers <= 256:
        parser.error(f"--workers {args.workers}, expected 0 to 256")
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
        checkpoint = load_checkpoint(path, "detection")
        meta = checkpoint["meta"]
        settings = checkpoint["settings"]
        model = build_model(settings["arch"], settings["channels"])
        load_weights(model, checkpoint["model"], path)
        model = model.to(device, memory_format=torch.channels_last)
        runs.append(Run(path, checkpoint, model, meta, settings, str(settings["fold"])))
        check_same(meta, runs[0].meta, path, paths[0])
    return runs


def check_same(meta: dict, expected: dict, path: Path, expected_path: Path) -> None:
    """Raise DataError if two caches or checkpoints were not prepared in the same way."""
    if meta["size"] != expected["size"]:
        raise DataError(f"{path}: size {meta['size']}, but {expected_path} has {expected['size']}")


# --- known boxes: first the table of predictions, then everything that is measured from it ---


def evaluate_split(
    args: argparse.Namespace, runs: list[Run], device: torch.device, folder: Path
) -> str:
    """Predict a split and write predictions.csv; from it metrics.json and the gallery."""
    # The rows to predict; row k of everything below is row_numbers[k] of the cache.
    meta, index = open_cache(args.data)
    check_same(meta, runs[0].meta, args.data, args.checkpoint[0])
    folds = choose_folds(args, runs, index)
    row_numbers = [k for k, row in enumerate(index) if row["fold"] in folds]
    rows = [index[k] for k in row_numbers]
    by = args.by or ("fold" if len(folds) > 1 else None)
    if by and by not in index[0]:
        raise DataError(f"--by {by}: no column in index.csv, expected one of {', '.join(index[0])}")

    # The table
    dataset = XrayDataset(args.data, read_boxes(index)[0])
    boxes, scale = read_boxes(rows)  # (N, 4): fractions, and pixels of the whole image
    pred = torch.empty(len(rows), 4)
    for fold in folds:
        in_fold = [k for k, row in enumerate(rows) if row["fold"] == fold]
        # Another batch size may round differently.
        batches = in_batches([row_numbers[k] for k in in_fold], runs[0].settings["batch_size"])
        loader = make_loader(dataset, batches, args.workers, device)
        pred[in_fold] = predict(left_out(fold, runs), loader, device, args.amp)
    iou = box_iou(pred, boxes)  # (N,)
    cases = list_cases(rows, iou, pred * scale, boxes * scale)
    write_csv(folder / "predictions.csv", cases)

    # The metrics of all rows, of those of each value of --by, and of bootstrap samples
    error_px = ((pred - boxes) * scale).abs()  # (N, 4)
    error_mm = error_px * read_spacing(rows)  # (N, 4), NaN where the file does not say

    def measure(sample: Tensor) -> dict[str, float]:
        metrics = detection_metrics(pred[sample], boxes[sample])
        metrics["mae_px"] = error_px[sample].mean().item()
        if error_mm.isfinite().any():
            metrics["mae_mm"] = error_mm[sample].nanmean().item()
        return metrics

    patients = [row["patient"] for row in rows]
    summary = bootstrap(measure, patients)
    if by:
        values = [row[by] for row in rows]
        by = {"column": by, "values": summarise_by(measure, values, patients)}

    # Report and pictures
    write_report(folder, summary, patients, cases, describe_run(args, len(rows)), by)
    draw_worst(dataset, row_numbers, cases, pred, boxes).save(folder / "gallery.png")
    doubtful = [case for case in cases if case["iou"] < DOUBTFUL]  # wrong labels are among them
    if doubtful:
        print(f"{len(doubtful)} with an IoU below {DOUBTFUL}: check their labels")
    for case in sorted(doubtful, key=lambda case: case["iou"])[:WORST]:
        print(f"  {case['iou']:.3f}  {one_line(case['id'])}")
    return f"{len(rows)} images; metrics and pictures"


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


def predict(runs: list[Run], loader: Iterable, device: torch.device, amp: str | None) -> Tensor:
    """Boxes float32 (N, 4) of the images of a loader, in fractions, averaged over the runs.

    `amp` None: the mixed precision of each run.
    """
    boxes = []  # (N, 4) of each run
    for run in runs:
        mean_std = (run.meta["mean"], run.meta["std"])
        if run.settings["pretrained"]:
            mean_std = PRETRAINED_MEAN_STD
        pred, _ = evaluate(run.model, loader, device, amp or run.settings["amp"], mean_std)
        check_finite(pred, run.path)
        boxes.append(pred)
    return torch.stack(boxes).mean(0)


def read_spacing(rows: list[dict[str, str]]) -> Tensor:
    """Mm per pixel along x, y, x, y, float32 (N, 4), for the edges of a box; NaN where unknown."""
    spacing = []
    for row in rows:
        down, across = map(float, (row["spacing"] or "nan nan").split())  # as DICOM: rows first
        spacing.append([across, down, across, down])
    return torch.tensor(spacing)


def list_cases(
    rows: list[dict[str, str]], iou: Tensor, pred_px: Tensor, boxes_px: Tensor
) -> list[dict]:
    """The rows of predictions.csv, one per image: IoU, predicted and true box (N, 4) in pixels."""
    cases = []
    for k, row in enumerate(rows):
        case = {name: row[name] for name in ("id", "patient", "fold", "site")}
        case |= {"iou": round(iou[k].item(), 4), **name_edges(pred_px[k])}
        for name, value in name_edges(boxes_px[k]).items():
            case[f"true_{name}"] = value
        cases.append(case)
    return cases


def name_edges(box: Tensor) -> dict[str, float]:
    """xmin, ymin, xmax and ymax of a box (4,), to a hundredth of a pixel."""
    values = [round(value, 2) for value in box.tolist()]
    return dict(zip(BOX, values, strict=True))


def draw_worst(
    dataset: XrayDataset, row_numbers: list[int], cases: list[dict], pred: Tensor, boxes: Tensor
) -> Image.Image:
    """The images of the lowest IoU with their boxes (N, 4) in fractions, the worst first."""
    order = sorted(range(len(cases)), key=lambda k: cases[k]["iou"])
    tiles = []
    for k in order[:WORST]:
        (image,), _ = dataset[[row_numbers[k]]]  # (1, S, S)
        caption = [cases[k]["id"], f"IoU {cases[k]['iou']:.3f}   green: truth, orange: prediction"]
        tile = draw_boxes(image[0].numpy(), {TRUTH: boxes[k], PREDICTION: pred[k]}, caption)
        tiles.append(pil_to_tensor(tile))
    return to_pil_image(torchvision.utils.make_grid(tiles, nrow=6))


def describe_run(args: argparse.Namespace, count: int) -> dict:
    """The evaluation for metrics.json: command, versions, hashes, number of images."""
    return {
        "command": " ".join(sys.argv),
        "versions": {module.__name__: module.__version__ for module in (torch, torchvision)},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint],
        "index_sha256": file_sha256(args.data / "index.csv"),
        "split": args.split,
        "n": count,
    }


# --- pictures ---


def draw_boxes(image: np.ndarray, boxes: dict[str, Tensor], caption: list[str]) -> Image.Image:
    """A gray image uint8 (H, W), scaled to TILE pixels, with its boxes, under its caption.

    `boxes` are (4,) in fractions, by their colour; an inverted one is not drawn.
    """
    picture = Image.fromarray(image).convert("RGB")
    scale = TILE / max(picture.size)  # the longer side fills the tile
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    draw = ImageDraw.Draw(picture)
    for colour, box in boxes.items():
        corners = box * torch.tensor(picture.size * 2)
        xmin, ymin, xmax, ymax = corners.round().long().tolist()
        if xmin <= xmax and ymin <= ymax:
            draw.rectangle((xmin, ymin, xmax, ymax), outline=colour, width=2)
    head = 20 * len(caption)  # pixels
    tile = Image.new("RGB", (TILE, TILE + head), "black")
    tile.paste(picture, ((TILE - picture.width) // 2, head))
    for k, line in enumerate(caption):
        text = line if len(line) <= 48 else f"{line[:22]}...{line[-23:]}"
        ImageDraw.Draw(tile).text((4, 20 * k + 2), text, "white", font_size=14)
    return tile


# --- new images ---


def predict_images(
    args: argparse.Namespace, runs: list[Run], device: torch.device, folder: Path
) -> tuple[str, int]:
    """Write predictions.csv and overlays of images without known boxes.

    Returns a summary, and how many files could not be read; the reasons are printed.
    """
    files = preprocess.list_images(args.images)  # paths by name
    load = partial(load_image, size=runs[0].meta["size"])
    results = preprocess.in_threads(load, list(files.values()), args.workers)
    bad = []
    notes = []
    rows = []
    for name, result in zip(files, results, strict=True):
        if isinstance(result, DataError):
            bad.append((name, str(result)))
            continue
        image, (height, width), image_notes = result  # uint8 (1, S, S)
        notes += [(name, note) for note in image_notes]
        # `evaluate` takes images with boxes; this one has none.
        batch = (image[None], torch.zeros(1, 4))
        (box,) = predict(runs, [batch], device, args.amp)  # (4,)
        edges = name_edges(box * torch.tensor([width, height, width, height]))
        answer = " ".join(f"{edge} {value:.0f}" for edge, value in edges.items())
        row = {"image": name, **edges, "overlay": ""}
        if len(rows) < OVERLAYS:
            row["overlay"] = f"{len(rows):04d}_{Path(name).stem[:100]}.png"
            # Back to the proportions of the original
            picture = Image.fromarray(image[0].numpy()).resize((width, height))
            tile = draw_boxes(np.asarray(picture), {PREDICTION: box}, [name, answer])
            tile.save(folder / row["overlay"])
        rows.append(row)
        print(one_line(f"{name}: {answer}"))
    preprocess.report_bad(bad)
    preprocess.report_notes(notes)
    if not rows:
        raise DataError(f"none of {len(files)} files could be read")
    write_csv(folder / "predictions.csv", rows)
    if len(rows) > OVERLAYS:
        print(f"note: overlays of the first {OVERLAYS} images only")
    return f"{len(rows)} images; predictions.csv and overlays", len(bad)


def load_image(path: Path, size: int) -> tuple[Tensor, tuple[int, int], tuple] | DataError:
    """An image prepared like those of the cache, uint8 (1, S, S), its original size, and notes.

    The size is height and width in pixels. Returns the error if the file cannot be read.
    """
    try:
        picture = preprocess.read_image(path)
    except DataError as error:
        return error
    image = torch.from_numpy(preprocess.prepare(picture.gray, size))[None]
    return image, picture.gray.shape, picture.notes


if __name__ == "__main__":
    run_command(main)
