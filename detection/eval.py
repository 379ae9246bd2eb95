"""Evaluate checkpoints of train.py on images with known boxes, or predict new images.

  python detection/eval.py --data data/heart --checkpoint runs/heart/best.pt
  python detection/eval.py --data data/other --split test \\
      --checkpoint runs/a/best.pt runs/b/best.pt
  python detection/eval.py --data CACHE --checkpoint runs/fold_?/best.pt --by fold
  python detection/eval.py --checkpoint runs/heart/best.pt --images scan.dcm folder_of_images

Known boxes: metrics.json with 95 % bootstrap intervals (over patients), predictions.csv in pixels
of the original images, and gallery.png with the worst boxes first. New images: predictions.csv, and
every image with its box. The boxes of several checkpoints are averaged; those of several folds
predict the fold that they left out each, and the metrics are of all these images together. Batch
size and mixed precision are those of the run, so that the score it printed comes out again.
--calibrate CACHE shifts all boxes by their mean offset on some labelled images of the new site.

In the shapes below N is the number of images, S their side in pixels. Boxes are xmin, ymin, xmax,
ymax in fractions of the image unless they are said to be in pixels.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    CheckpointError,
    clear_results,
    count_trained_on,
    file_sha256,
    hold_folder,
    list_trained_on,
    load_run,
    load_weights,
    write_csv,
    written,
)
from common.metrics import (
    bootstrap,
    box_iou,
    detection_metrics,
    split_by,
    tabulate,
    write_report,
)
from detection.dataset import (
    BOX,
    XrayDataset,
    fingerprints,
    in_batches,
    make_loader,
    open_cache,
    read_boxes,
    read_index,
)
from detection.model import ARCHITECTURES, HEADS, build_model
from detection.preprocess import (
    DataError,
    check_meta,
    check_outputs,
    count_files,
    find_images,
    in_threads,
    list_files,
    one_line,
    prepare,
    read_image,
    read_meta,
    report_bad,
    report_notes,
    run_command,
)
from detection.train import AMP, check_finite, choose_device, evaluate

TILE = 384  # pixels of one picture in a gallery
MOST_VALUES = 50  # of a column of --by
OVERLAYS = 100  # pictures of new images: the first ones
WORST = 24  # pictures in gallery.png
FEWEST = 5  # images of --calibrate: with fewer the offset is mostly noise
DOUBTFUL = 0.5  # IoU below which a label may be that of something else
# What a split leaves in --out; metrics.json is written last.
RESULTS = ("metrics.json", "predictions.csv", "gallery.png")
TRUTH = "#30d158"  # green
PREDICTION = "#ff9f0a"  # orange


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="one or more of train.py's")
    add("--data", type=Path, metavar="CACHE", help="written by preprocess.py")
    split = "val (default): the validation fold of the run, of several all that they left out"
    add("--split", choices=("val", "test"), default="val", help=split)
    images = "new images without boxes: files and folders"
    add("--images", type=Path, nargs="+", metavar="PATH", help=images)
    add("--calibrate", type=Path, metavar="CACHE", help="a few labelled images of the new site")
    by = "metrics for each value of a column of index.csv, such as fold"
    add("--by", metavar="COLUMN", help=by)
    out = "(default: eval_val, eval_folds, eval_test or predictions, beside the first run)"
    add("--out", type=Path, help=out)
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, help="mixed precision (default: as in the run)")
    add("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    add("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (known boxes) or --images PATH ... (new images)")
    if args.by and not args.data:
        parser.error("--by needs known cases: give --data")
    if args.workers < 0 or args.samples < 1:
        parser.error("expected --workers >= 0 and --samples >= 1")
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


def load_models(paths: list[Path], device: torch.device) -> tuple[list[nn.Module], list[dict]]:
    """Bare models and their checkpoints. Raises CheckpointError if they do not go together."""
    types = {"arch": str, "head": str, "channels": int}
    checkpoints = [load_run(path, "detection", types, device) for path in paths]
    models = []
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        meta = checkpoint["meta"]
        settings = checkpoint["settings"]
        check_meta(meta, path)
        check_same(meta, checkpoints[0]["meta"], path, paths[0])
        is_known = settings["arch"] in ARCHITECTURES and settings["head"] in HEADS
        if not is_known or settings["amp"] not in AMP or not 4 <= settings["channels"] <= 1024:
            raise CheckpointError(f"{path}: settings {settings}, of no run of train.py")
        # Without pretrained weights, which the checkpoint replaces
        model = build_model(settings["arch"], settings["head"], settings["channels"])
        load_weights(model, checkpoint, path)
        models.append(model.to(device, memory_format=torch.channels_last))
    return models, checkpoints


def check_same(meta: dict, expected: dict, path: Path, other: Path) -> None:
    """Raise CheckpointError if images were not prepared in the same way."""
    if meta["size"] != expected["size"]:
        sizes = f"size {meta['size']}, but {other} has {expected['size']}"
        raise CheckpointError(f"{path}: {sizes}")


def name_results(args: argparse.Namespace, checkpoints: list[dict]) -> str:
    """The default folder of the results, beside the first checkpoint."""
    if not args.data:
        return "predictions"
    folds = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
    if args.split == "val" and len(folds) > 1:
        return "eval_folds"  # beside eval_val, which is that of the first fold alone
    return f"eval_{args.split}"


# --- images with known boxes ---


def evaluate_split(
    args: argparse.Namespace,
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
    out: Path,
) -> None:
    """Metrics, table and gallery of images with known boxes."""
    # Predict the split: row k of everything below is row_numbers[k] of the cache
    rows_by_fold = choose_rows(args.data, args.split, args.checkpoint, checkpoints)
    row_numbers = list(chain.from_iterable(rows_by_fold.values()))
    index = read_index(args.data)
    rows = [index[k] for k in row_numbers]
    by = choose_groups(rows, args.by)
    calibration = calibrate(args, rows_by_fold, models, checkpoints, device)
    pred, boxes = predict_folds(args, rows_by_fold, models, checkpoints, device)  # (N, 4)
    pred = shift_boxes(pred, calibration)
    _, scale = read_boxes(rows)  # (N, 4): pixels
    iou = box_iou(pred, boxes)  # (N,)
    error_px = ((pred - boxes) * scale).abs()  # (N, 4)
    error_mm = error_px * read_spacing(rows)  # (N, 4), NaN where the file does not say
    cases = list_cases(rows, iou, pred * scale, boxes * scale)
    members = group_by_site(rows)

    # Metrics of the split, and of the bootstrap's samples of its patients
    def metrics(chosen: Tensor) -> dict[str, float]:
        values = detection_metrics(pred[chosen], boxes[chosen])
        values["mae_px"] = error_px[chosen].mean().item()
        if error_mm.isfinite().any():
            values["mae_mm"] = error_mm[chosen].nanmean().item()
        return values

    def metrics_by_site(chosen: Tensor) -> dict[str, float]:
        values = {}
        for suffix, is_member in members.items():
            of_site = metrics(chosen[is_member[chosen]])  # of the sample, those of the site
            values |= {f"{name}{suffix}": value for name, value in of_site.items()}
        return values

    patients = [row["patient"] for row in rows]
    folds = [row["fold"] for row in rows]
    summary = bootstrap(metrics_by_site, patients, args.samples)
    tables = tabulate(metrics, folds, patients, by, args.samples)
    run = describe_run(args, len(rows)) | {"calibration": calibration}

    gallery = draw_worst(XrayDataset(args.data), row_numbers, cases, pred, boxes)

    # Results, in place of earlier ones
    with hold_folder(out):
        clear_results(out, RESULTS)
        write_csv(out / "predictions.csv", cases)
        save_picture(out / "gallery.png", gallery)
        write_report(out, summary, patients, cases, run, tables)
    print_doubtful(cases)
    print(f"{len(rows)} images; metrics and pictures in {out}")


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


def calibrate(
    args: argparse.Namespace,
    rows_by_fold: dict[str, list[int]],
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> dict | None:
    """What `shift_boxes` adds to the edges, by the images of --calibrate; None without it.

    Raises DataError if they are few, or were trained on, or are in `rows_by_fold` of --data.
    """
    cache = args.calibrate
    if cache is None:
        return None
    meta, index = open_cache(cache)
    check_same(meta, checkpoints[0]["meta"], cache, args.checkpoint[0])
    rows = list(range(len(index)))
    if len(rows) < FEWEST:
        raise DataError(f"--calibrate {cache}: {len(rows)} images, expected {FEWEST} or more")
    if len(rows_by_fold) > 1:  # networks of different training sets, each with its own offset
        raise DataError("--calibrate: give the checkpoints of one fold, or --split test")
    check_leakage(cache, rows, args.checkpoint, checkpoints)
    for evaluated in rows_by_fold.values():
        known = list_trained_on(*fingerprints(args.data, evaluated))
        shared = count_trained_on(known, *fingerprints(cache, rows))
        if shared:
            found = f"{len(shared)} of its images or patients ({index[shared[0]]['id']})"
            again = "take others, or, if only names are alike, change them in index.csv"
            raise DataError(f"--calibrate {cache}: {found} are evaluated in {args.data}; {again}")
    batches = in_batches(rows, checkpoints[0]["settings"]["batch_size"])
    loader = make_loader(cache, batches, args.workers, device)
    pred, boxes = predict(models, checkpoints, loader, device, args.amp)
    difference = 224 * (boxes - pred)  # (N, 4), pixels of the image squashed to 224x224
    offset = name_edges(difference.sum(0) / (len(rows) + 1))  # as if one more had none
    error = name_edges(difference.std(0) / math.sqrt(len(rows)))
    edges = ", ".join(f"{name} {offset[name]:+.1f} (+-{error[name]:.1f})" for name in BOX)
    print(f"added, by {len(rows)} images: {edges} pixels of 224 (+- standard error)")
    sha256 = file_sha256(cache / "index.csv")
    return {"index_sha256": sha256, "n": len(rows), "offset_224": offset, "error_224": error}


def shift_boxes(pred: Tensor, calibration: dict | None) -> Tensor:
    """Boxes (N, 4) with the offset of `calibrate`, in the image, not empty; as they are without."""
    if calibration is None:
        return pred
    pixels = [calibration["offset_224"][name] for name in BOX]
    boxes = (pred + torch.tensor(pixels) / 224).clamp(0, 1)
    top_left = boxes[:, :2].clamp(max=1 - 1 / 224)  # at least a pixel of 224 is left
    return torch.cat([top_left, boxes[:, 2:].maximum(top_left + 1 / 224)], dim=1)


def predict_folds(
    args: argparse.Namespace,
    rows_by_fold: dict[str, list[int]],
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`predict_rows` of one fold after the other, each by the models that left it out."""
    outputs = []
    targets = []
    for fold, row_numbers in rows_by_fold.items():
        own_models = of_fold(fold, models, checkpoints)
        own = of_fold(fold, checkpoints, checkpoints)
        output, target = predict_rows(args, row_numbers, own_models, own, device)
        outputs.append(output)
        targets.append(target)
    return torch.cat(outputs), torch.cat(targets)


def predict_rows(
    args: argparse.Namespace,
    row_numbers: list[int],
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What `predict` gives for these rows of --data, in batches of the size of the run."""
    # Sums in a batch of another size may round differently, and the score would not come out again.
    batches = in_batches(row_numbers, checkpoints[0]["settings"]["batch_size"])
    loader = make_loader(args.data, batches, args.workers, device)
    return predict(models, checkpoints, loader, device, args.amp)


def predict(
    models: list[nn.Module],
    checkpoints: list[dict],
    loader: Iterable,
    device: torch.device,
    amp: str | None,
) -> tuple[Tensor, Tensor]:
    """Boxes float32 (N, 4) in fractions, averaged over the models, and the true ones, on the CPU.

    `amp` None takes the mixed precision of each run. Raises DataError for NaN or infinite outputs.
    """
    predictions = []  # of each model, (N, 4)
    for number, (model, checkpoint) in enumerate(zip(models, checkpoints, strict=True), 1):
        meta = checkpoint["meta"]
        mode = amp or checkpoint["settings"]["amp"]
        pred, boxes = evaluate(model, loader, device, mode, meta["mean"], meta["std"])
        check_finite(pred, f"checkpoint {number}")
        predictions.append(pred)
    return torch.stack(predictions).mean(0), boxes


def read_spacing(rows: list[dict[str, str]]) -> Tensor:
    """Mm per pixel along x, y, x, y, float32 (N, 4), for the edges of a box; NaN where unknown."""
    spacing = []
    for row in rows:
        down_across = [float(mm) for mm in row["spacing"].split()] or [math.nan, math.nan]
        down, across = down_across  # as in DICOM: rows first
        spacing.append([across, down, across, down])
    return torch.tensor(spacing)


def list_cases(
    rows: list[dict[str, str]], iou: Tensor, pred_px: Tensor, boxes_px: Tensor
) -> list[dict]:
    """The rows of predictions.csv, one an image: IoU, predicted and true box (N, 4) in pixels."""
    cases = []
    for k, row in enumerate(rows):
        case = {
            "id": row["id"],
            "patient": row["patient"],
            "fold": row["fold"],
            "site": row["site"],
            "iou": round(iou[k].item(), 4),
        }
        case |= name_edges(pred_px[k])
        for name, value in name_edges(boxes_px[k]).items():
            case[f"true_{name}"] = value
        cases.append(case)
    return cases


def name_edges(box: Tensor) -> dict[str, float]:
    """xmin, ymin, xmax and ymax of a box (4,), to a hundredth of a pixel."""
    values = [round(value, 2) for value in box.tolist()]
    return dict(zip(BOX, values, strict=True))


def group_by_site(rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Which rows a metric is taken of, bool (N,), by the suffix of its name.

    All of them, and with several sites those of each.
    """
    members = {"": torch.ones(len(rows), dtype=torch.bool)}
    sites = sorted({row["site"] for row in rows} - {""})  # "" where --site-regex was not given
    if len(sites) > 1:
        for site in sites:
            members[f"_{site}"] = torch.tensor([row["site"] == site for row in rows])
    return members


def draw_worst(
    dataset: XrayDataset,
    row_numbers: list[int],
    cases: list[dict],
    pred: Tensor,
    boxes: Tensor,
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


def print_doubtful(cases: list[dict]) -> None:
    """Name the images whose boxes hardly meet, the worst first: wrong labels are among them."""
    doubtful = sorted((case for case in cases if case["iou"] < DOUBTFUL), key=itemgetter("iou"))
    if not doubtful:
        return
    print(f"{len(doubtful)} with an IoU below {DOUBTFUL}: look whether the label is right")
    for case in doubtful[:WORST]:
        print(f"  {case['iou']:.3f}  {one_line(case['id'])}")
    if len(doubtful) > WORST:
        print(f"  and {len(doubtful) - WORST} more, in predictions.csv")


def describe_run(args: argparse.Namespace, count: int) -> dict:
    """How the metrics of a split arose: command, versions, hashes, number of images."""
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

    `boxes` (4,) in fractions by their colour; one that is inside out is not drawn.
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
    font = ImageFont.load_default(size=14)
    for k, line in enumerate(caption):
        ImageDraw.Draw(tile).text((4, 20 * k + 2), shorten(line, 48), "white", font)
    return tile


def shorten(text: str, length: int) -> str:
    """The beginning and the end of a text that is too long for its line."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def save_picture(path: Path, picture: Image.Image) -> None:
    with written(path) as temporary:
        picture.save(temporary)


# --- new images ---


def predict_images(
    args: argparse.Namespace,
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
    out: Path,
) -> None:
    """Boxes of images without known ones, and overlays.

    Raises DataError at the end if some could not be read.
    """
    # Everything that can be refused is, before anything is read or written.
    files = list_images(args.images)
    overlays = name_overlays(out, args.images, files)
    calibration = calibrate(args, {}, models, checkpoints, device)
    size = checkpoints[0]["meta"]["size"]
    bad = []
    batch_size = checkpoints[0]["settings"]["batch_size"]
    batches = read_batches(files, partial(load_image, size=size), args.workers, batch_size, bad)
    first = next(batches, None)
    if first:
        with hold_folder(out), written(out / "predictions.csv") as table:
            # Pictures of an earlier run would be taken for those of this one.
            clear_results(out, list_predictions(out))
            done = 0
            for batch in chain([first], batches):  # one in memory at a time
                images = torch.stack([image for image, _ in batch.values()])  # (B, 1, S, S)
                # `evaluate` takes images with boxes; these have none.
                loader = [(images, torch.zeros(len(batch), 4))]
                pred, _ = predict(models, checkpoints, loader, device, args.amp)
                pred = shift_boxes(pred, calibration)
                for (path, (image, (height, width))), box in zip(batch.items(), pred, strict=True):
                    overlay = overlays[path] if done < OVERLAYS else None
                    edges = name_edges(box * torch.tensor([width, height, width, height]))
                    row = {"image": str(path), **edges, "overlay": overlay.name if overlay else ""}
                    append_row(table, row, is_first=done == 0)
                    done += 1
                    answer = " ".join(f"{name} {value:.0f}" for name, value in edges.items())
                    print(one_line(f"{path}: {answer}"))
                    if overlay:
                        # From what the network saw back to the proportions of the original
                        picture = Image.fromarray(image[0].numpy()).resize((width, height))
                        boxes = {PREDICTION: box}
                        caption = [str(path), answer]
                        save_picture(overlay, draw_boxes(np.asarray(picture), boxes, caption))
        print(f"{done} images; predictions.csv and overlays in {out}")
        if done > OVERLAYS:
            print(f"note: overlays of the first {OVERLAYS} images only")
    if bad:  # one bad file does not cost the results of the others, but the exit status says so
        raise DataError(f"{len(bad)} of {len(files)} files could not be read (named above)")


def list_images(paths: list[Path]) -> list[Path]:
    """The files, and all images below the folders. Raises DataError for a folder without any."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        images = find_images(path)
        others = sorted(set(list_files(path)) - set(images))  # nothing is dropped in silence
        if not images:
            content = count_files(others, path) or "nothing"
            expected = "DICOM, JPEG, PNG or TIFF"
            raise DataError(f"{path}: no image in it, found {content}, expected {expected}")
        if others:
            print(f"note: {path}: passed over: {count_files(others, path)}")
        files += images
    return list(dict.fromkeys(files))  # each once


def name_overlays(out: Path, inputs: list[Path], files: list[Path]) -> dict[Path, Path]:
    """The picture that belongs to each file.

    Raises DataError if a result could be taken for an image later, because --out lies in a folder
    of --images, or would be written onto an image.
    """
    for folder in inputs:
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            problem = f"lies in {folder}, where it would be read as images"
            raise DataError(f"--out {out}: {problem}; choose another")
    overlays = {}  # numbered, because files of several folders may share a name
    for k, path in enumerate(files):
        stem = path.stem[:100]  # file systems end at 255 letters
        overlays[path] = out / f"{k:04d}_{stem}.png"
    check_outputs([out / "predictions.csv", *overlays.values()], files)
    return overlays


def read_batches(
    files: list[Path], load_file: Callable, workers: int, size: int, bad: list[tuple[str, str]]
) -> Iterator[dict]:
    """What `load_file(path)` gives for the files, by their paths, `size` files at a time.

    It gives a result and notes, or the DataError that says why not. Unusable files go to `bad`;
    they and the notes are printed at the end.
    """
    batch = {}
    notes = []
    results = in_threads(load_file, files, workers)
    for path, result in zip(files, results, strict=True):
        if isinstance(result, DataError):
            bad.append((str(path), str(result)))
            continue
        batch[path], file_notes = result
        notes.extend((str(path), note) for note in file_notes)
        if len(batch) == size:
            yield batch
            batch = {}
    if batch:
        yield batch
    report_bad(bad)
    report_notes(notes)


def load_image(path: Path, size: int) -> tuple[tuple[Tensor, tuple[int, int]], tuple] | DataError:
    """One image as in the cache of the run, uint8 (1, S, S), with its height and width in pixels.

    And its notes; or the DataError that says why it is unusable.
    """
    try:
        picture = read_image(path)
    except DataError as error:
        return error
    image = torch.from_numpy(prepare(picture.gray, size))[None]
    return (image, picture.gray.shape), picture.notes


def append_row(path: Path, row: dict, is_first: bool) -> None:
    """Add a row to a CSV file; the first one replaces the file and writes the header."""
    mode = "w" if is_first else "a"
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_first:
            writer.writeheader()
        writer.writerow(row)


def list_predictions(out: Path) -> list[str]:
    """The files that an earlier prediction left in the folder, by its table."""
    table = out / "predictions.csv"
    if not table.is_file():
        return []
    names = [table.name]
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("overlay"):
                names.append(Path(row["overlay"]).name)  # a name only: nothing outside the folder
    return names


if __name__ == "__main__":
    run_command(main, CheckpointError)
