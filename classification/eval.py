"""Evaluate checkpoints of train.py on a labelled split, or predict new images.

  python classification/eval.py --data data/rsna --checkpoint runs/rsna/best.pt
  python classification/eval.py --data data/other --split test \\
      --checkpoint runs/a/best.pt runs/b/best.pt
  python classification/eval.py --data CACHE --checkpoint runs/fold_?/best.pt --by fold
  python classification/eval.py --checkpoint runs/rsna/best.pt --images scan.dcm folder_of_images

Labelled: metrics.json with 95 % bootstrap intervals (over patients), predictions.csv, roc.csv, and
pictures: confusion_matrix.png, roc.png, mistakes.png. New images: predictions.csv, overlays of
occlusion maps, those of the first checkpoint. The probabilities of several checkpoints are
averaged; those of several folds predict the fold that each left out, and the metrics are over all
these images. With several labels per image each label has metrics, and there is no
confusion_matrix.png. Batch size and mixed precision are those of the run, so the score is the one
that train.py printed.

In the shapes below N is the number of images, C that of classes, S the side of an image in pixels.
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
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification import dataset, preprocess
from classification import model as network
from classification.dataset import XrayDataset, in_batches, make_loader, read_labels, to_input
from classification.train import AMP, check_finite, choose_device, evaluate
from common import metrics
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

TILE = 256  # pixels of one picture in a gallery
OVERLAYS = 50  # pictures of new images: the first ones; each takes 37 predictions
WORST = 12  # pictures in mistakes.png
WORST_OF_LABEL = 3  # pictures per label, if images have several
HEAT = (255.0, 60.0, 0.0)  # RGB of an occlusion map
BLUE = (8, 60, 120)  # RGB of a cell of the confusion matrix with 100 % of its row
# Colours of the curves in roc.png
COLOURS = ("#1f4e9c", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#117a8b", "#7b241c", "#5d6d7e")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="best.pt or last.pt, one or more")
    add("--data", type=Path, metavar="CACHE", help="a cache of preprocess.py")
    split = "val (default): the folds that the runs left out; test: the test set"
    add("--split", choices=("val", "test"), default="val", help=split)
    images = "new images without labels: files and folders"
    add("--images", type=Path, nargs="+", metavar="PATH", help=images)
    point = (
        "choose the threshold of the metrics called _tuned by this value on the validation folds "
        "of the runs, such as sensitivity=0.95 (default: Youden's); on other images the value "
        "may differ"
    )
    add("--operating-point", type=operating_point, metavar="NAME=VALUE", help=point)
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
        parser.error("give either --data CACHE (labelled) or --images PATH ... (new images)")
    if args.images and (args.by or args.operating_point):
        parser.error("--by and --operating-point need labels: give --data")
    if not 0 <= args.workers <= 256:
        parser.error(f"--workers {args.workers}, expected 0 to 256")
    return args


def operating_point(text: str) -> tuple[str, float]:
    """An argparse type: sensitivity or specificity, and its smallest allowed value."""
    name, _, value = text.partition("=")
    if name not in ("sensitivity", "specificity") or not 0 < float(value) <= 1:
        message = f"{text}, expected sensitivity=VALUE or specificity=VALUE, above 0 to 1"
        raise argparse.ArgumentTypeError(message)
    return name, float(value)


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
        checkpoint = load_checkpoint(path, "classification")
        meta = checkpoint["meta"]
        settings = checkpoint["settings"]
        model = network.build_model(settings["arch"], meta, settings["channels"])
        load_weights(model, checkpoint["model"], path)
        model = model.to(device, memory_format=torch.channels_last)
        runs.append(Run(path, checkpoint, model, meta, settings, str(settings["fold"])))
        check_same(meta, runs[0].meta, path, paths[0])
    return runs


def check_same(meta: dict, expected: dict, path: Path, expected_path: Path) -> None:
    """Raise DataError if two caches or checkpoints were not prepared in the same way."""
    for name in ("classes", "multi_label", "size", "fit", "channels"):
        if meta[name] != expected[name]:
            problem = f"{name} {meta[name]}, but {expected_path} has {expected[name]}"
            raise DataError(f"{path}: {problem}")


# --- a labelled split: first the table of predictions, then everything that is measured from it ---


def evaluate_split(
    args: argparse.Namespace, runs: list[Run], device: torch.device, folder: Path
) -> str:
    """Predict a split and write predictions.csv; from it metrics.json, roc.csv and pictures."""
    # The rows to predict; row k of everything below is row_numbers[k] of the cache.
    meta, index = dataset.open_cache(args.data)
    classes = meta["classes"]
    check_same(meta, runs[0].meta, args.data, args.checkpoint[0])
    folds = choose_folds(args, runs, index)
    row_numbers = [k for k, row in enumerate(index) if row["fold"] in folds]
    rows = [index[k] for k in row_numbers]
    by = args.by or ("fold" if len(folds) > 1 else None)
    if by and by not in index[0]:
        raise DataError(f"--by {by}: no column in index.csv, expected one of {', '.join(index[0])}")
    thresholds = choose_thresholds(args, runs, folds)  # by fold

    # The table
    images = XrayDataset(args.data, read_labels(index, meta))
    labels = images.labels[row_numbers]  # (N,) or (N, C)
    probabilities = torch.empty(len(rows), len(classes))  # (N, C)
    for fold in folds:
        in_fold = [k for k, row in enumerate(rows) if row["fold"] == fold]
        # Another batch size may round differently.
        batches = in_batches([row_numbers[k] for k in in_fold], runs[0].settings["batch_size"])
        loader = make_loader(images, batches, args.workers, device)
        probabilities[in_fold] = predict(left_out(fold, runs), loader, device, args.amp)
    predictions = decide(probabilities, meta["multi_label"])  # (N,) or (N, C)
    cases = list_cases(rows, args.split, meta, probabilities, predictions)
    write_csv(folder / "predictions.csv", cases)

    # The metrics of all rows, of those of each value of --by, and of bootstrap samples
    tuned = None
    if thresholds:
        tuned = torch.tensor([thresholds[row["fold"]] for row in rows], dtype=torch.float64)

    def measure(k: Tensor) -> dict[str, float]:
        cutoffs = None if tuned is None else tuned[k]
        return metrics.classification_metrics(labels[k], probabilities[k], cutoffs, classes)

    patients = [row["patient"] for row in rows]
    summary = metrics.bootstrap(measure, patients)
    if by:
        values = [row[by] for row in rows]
        by = {"column": by, "values": metrics.summarise_by(measure, values, patients)}

    # Report and pictures
    if meta["positive_class"]:
        print(f"positive class: {meta['positive_class']}")
    run = describe_run(args, len(rows)) | {"classes": classes, "thresholds_tuned": thresholds}
    run["positive_class"] = meta["positive_class"]
    names = choose_printed(summary, meta, labels, predictions)
    metrics.write_report(folder, summary, patients, cases, run, by, names)
    if not meta["multi_label"]:
        counts = metrics.confusion_matrix(labels, predictions, len(classes))
        draw_confusion_matrix(counts, meta).save(folder / "confusion_matrix.png")
    write_roc(folder, labels, probabilities, classes)
    worst = choose_worst(labels, probabilities, predictions, meta)
    write_mistakes(folder / "mistakes.png", worst, images, row_numbers, rows, runs)
    wrong = int(((predictions != labels) & (labels >= 0)).sum())
    return f"{len(rows)} images, {wrong} wrong; metrics and pictures"


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


def choose_thresholds(args: argparse.Namespace, runs: list[Run], folds: list[str]) -> dict:
    """The threshold of the metrics called _tuned by fold, {} for none.

    Each run chooses one by the predictions of its validation fold; they are averaged. A run that
    validated on the fold itself is left out: its threshold would make the metrics too good.
    """
    problem = "no other fold to choose it on; give runs of other folds, or --split test"
    thresholds = {}
    if len(runs[0].meta["classes"]) > 2 and not runs[0].meta["multi_label"]:
        problem = "expected two classes, or several labels"
        folds = []
    for fold in folds:
        chosen = []
        for run in runs:
            if run.fold not in ("-1", fold):
                validation = run.checkpoint["validation"]
                pair = (validation["labels"], validation["probabilities"])
                chosen.append(metrics.best_threshold(*pair, args.operating_point))
        if chosen:
            thresholds[fold] = np.mean(chosen, 0).tolist()
    if args.operating_point and not thresholds:
        raise DataError(f"--operating-point: {problem}")
    return thresholds


def predict(runs: list[Run], loader: Iterable, device: torch.device, amp: str | None) -> Tensor:
    """Probabilities float32 (N, C) of the images of a loader, averaged over the runs.

    `amp` None: the mixed precision of each run.
    """
    probabilities = []  # (N, C) of each run
    for run in runs:
        mode = amp or run.settings["amp"]
        logits, _ = evaluate(run.model, loader, device, mode, choose_mean_std(run))
        check_finite(logits, run.path)
        probabilities.append(network.to_probabilities(logits, run.meta["multi_label"]))
    return torch.stack(probabilities).mean(0)


def choose_mean_std(run: Run) -> tuple[float, float] | None:
    """The normalisation of a run's images, for `to_input`."""
    return network.PRETRAINED_MEAN_STD if run.settings["pretrained"] else None


def decide(probabilities: Tensor, multi_label: bool) -> Tensor:
    """Classes int64 (N,) from probabilities (N, C), or 0 and 1 (N, C) of several labels."""
    if multi_label:
        return (probabilities >= 0.5).long()
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= 0.5).long()  # argmax would make 0.5 negative
    return probabilities.argmax(1)


def list_cases(
    rows: list[dict[str, str]], split: str, meta: dict, probabilities: Tensor, predictions: Tensor
) -> list[dict]:
    """The rows of predictions.csv, one per image.

    Several labels have a column each: 1, 0, or empty for unknown.
    """
    cases = []
    for k, row in enumerate(rows):
        case = {name: row[name] for name in ("id", "patient", "fold")}
        if meta["multi_label"]:
            case |= {f"label_{name}": row[name] for name in meta["classes"]}
        else:
            case["label"] = row["label"]
        case |= name_outputs(predictions[k], probabilities[k], meta)
        cases.append(case | {"split": split})
    return cases


def name_outputs(prediction: Tensor, probabilities: Tensor, meta: dict) -> dict[str, str | float]:
    """The columns prediction and probability_CLASS of an image, from () or (C,), and (C,).

    The prediction is a class, or, of several labels, those that are 1, joined by |.
    """
    classes = meta["classes"]
    numbers = prediction.nonzero()[:, 0] if meta["multi_label"] else prediction[None]
    outputs = {"prediction": "|".join(classes[k] for k in numbers)}
    for name, probability in zip(classes, probabilities.tolist(), strict=True):
        outputs[f"probability_{name}"] = probability
    return outputs


def choose_printed(summary: dict, meta: dict, labels: Tensor, predictions: Tensor) -> list[str]:
    """The metrics to print: those over all classes, and the AUROC of each class.

    Prints which classes have undefined metrics.
    """
    classes = meta["classes"]
    one_sided = []  # without positives, or without negatives
    never_predicted = []
    for k, name in enumerate(classes):
        truth = labels[:, k] if meta["multi_label"] else (labels == k).long()
        if len(truth[truth >= 0].unique()) < 2:
            one_sided.append(name)
        if not (predictions[:, k] if meta["multi_label"] else predictions == k).any():
            never_predicted.append(name)
    if one_sided:
        print(f"note: images of one kind only, left out of the means: {', '.join(one_sided)}")
    if never_predicted:
        print(f"note: never predicted, so without precision: {', '.join(never_predicted)}")
    by_class = {f"{name}_{label}" for name in summary for label in classes}
    names = [name for name in summary if name not in by_class]
    return names + [name for name in summary if name in by_class and name.startswith("auroc_")]


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


def choose_worst(
    labels: Tensor, probabilities: Tensor, predictions: Tensor, meta: dict
) -> list[tuple[int, int, str]]:
    """The most confident mistakes: number of the image, class of its map, and a caption.

    With two classes the map is that of the positive one. With several labels there are
    WORST_OF_LABEL mistakes for each.
    """
    classes = meta["classes"]
    worst = []
    if not meta["multi_label"]:
        confidence = probabilities.amax(1)  # (N,)
        for k in rank(predictions != labels, confidence)[:WORST]:
            answer = f"predicted {classes[predictions[k]]} {confidence[k]:.3f}"
            target = 1 if len(classes) == 2 else int(predictions[k])
            worst.append((k, target, f"{classes[labels[k]]}, {answer}"))
        return worst
    for target, name in enumerate(classes):
        truth = labels[:, target]
        scores = probabilities[:, target]
        wrong = (truth >= 0) & (predictions[:, target] != truth)
        for k in rank(wrong, (scores - truth).abs())[:WORST_OF_LABEL]:
            worst.append((k, target, f"{name}: {int(truth[k])}, predicted {scores[k]:.3f}"))
    return worst


def rank(chosen: Tensor, scores: Tensor) -> list[int]:
    """The indices at which `chosen` (N,) is true, the highest score first."""
    numbers = chosen.nonzero()[:, 0]
    return numbers[scores[numbers].argsort(descending=True)].tolist()


def write_mistakes(
    path: Path,
    worst: list[tuple[int, int, str]],
    images: XrayDataset,
    row_numbers: list[int],
    rows: list[dict[str, str]],
    runs: list[Run],
) -> None:
    """The images of `choose_worst` in rows of three, with maps by a run that left them out."""
    tiles = []
    for k, target, caption in worst:
        (image,), _ = images[[row_numbers[k]]]  # (1 or 3, S, S)
        run = left_out(rows[k]["fold"], runs)[0]
        tiles.append(draw_map(run, image, target, [rows[k]["id"], caption]))
    if tiles:
        to_pil_image(torchvision.utils.make_grid(tiles, nrow=3)).save(path)


def draw_map(
    run: Run, image: Tensor, target: int, caption: list[str], aspect: float = 1.0
) -> Tensor:
    """Caption, image, and beside it the image with the occlusion map of the class `target`.

    `image` is uint8 (1 or 3, S, S), `aspect` the height of the original divided by its width.
    Returns uint8 (3, H, 2 * W); the longer side of an image is TILE pixels.
    """
    height = round(TILE * min(1, aspect))
    width = round(TILE * min(1, 1 / aspect))
    gray = resize(image.float(), [height, width]).expand(3, -1, -1)  # (3, height, width)
    device = next(run.model.parameters()).device
    inputs = to_input(image[None], device, choose_mean_std(run))
    loss = network.occlusion_map(run.model, inputs, target, run.meta["multi_label"])  # (6, 6)
    # Evidence against the class is omitted; the strongest evidence hides 60 % of the image.
    heat = resize(loss[None].clamp(min=0), [height, width], antialias=False)
    heat = 0.6 * heat / heat.max().clamp(min=1e-6)
    colour = torch.tensor(HEAT)[:, None, None]
    strip = torch.cat([gray, gray * (1 - heat) + colour * heat], 2)  # (3, height, 2 * width)
    name = run.meta["classes"][target]
    caption = [*caption, f"red: evidence for {name}, up to {loss.max():.1f} in log-odds"]
    tile = Image.new("RGB", (2 * TILE, 20 * len(caption) + TILE), "black")
    for k, line in enumerate(caption):
        text = line if len(line) <= 64 else f"{line[:30]}...{line[-31:]}"
        ImageDraw.Draw(tile).text((4, 20 * k + 2), text, "white", font_size=14)
    tile.paste(to_pil_image(strip.round().byte()), (0, 20 * len(caption)))
    return pil_to_tensor(tile)


def draw_confusion_matrix(counts: Tensor, meta: dict) -> Image.Image:
    """Counts int (C, C) and row percentages, darker blue for a larger share of the row."""
    classes = meta["classes"]
    cell = 130  # pixels
    margin = 150
    side = margin + cell * len(classes)
    picture = Image.new("RGB", (side + 20, side + 20), "white")
    draw = ImageDraw.Draw(picture)
    # As in scikit-learn: truth down, prediction across
    middle = margin + cell * len(classes) / 2
    draw.text((middle, 80), "predicted", "black", anchor="mm", font_size=18)
    draw.text((10, margin - 30), "truth", "black", anchor="lm", font_size=18)
    if meta["positive_class"]:
        text = f"positive: {meta['positive_class'][:32]}"
        draw.text((10, 30), text, "black", anchor="lm", font_size=18)
    for i, name in enumerate(classes):
        y = margin + i * cell
        middle = margin + (i + 0.5) * cell
        draw.text((middle, margin - 30), name[:14], "black", anchor="mm", font_size=16)
        draw.text((margin - 10, middle), name[:14], "black", anchor="rm", font_size=16)
        for j, count in enumerate(counts[i].tolist()):
            x = margin + j * cell
            share = count / max(1, int(counts[i].sum()))  # a class may have no images
            colour = tuple(round(255 - share * (255 - c)) for c in BLUE)
            draw.rectangle((x, y, x + cell, y + cell), fill=colour, outline="white", width=2)
            ink = "white" if share > 0.5 else "black"
            center = (x + cell / 2, y + cell / 2)
            text = f"{count}\n{share:.1%}"
            draw.text(center, text, ink, anchor="mm", align="center", font_size=20)
    return picture


def write_roc(folder: Path, labels: Tensor, probabilities: Tensor, classes: list[str]) -> None:
    """roc.csv and roc.png: of the positive class, each class against the others, or each label."""
    points = []
    curves = {}
    is_binary = len(classes) == 2 and labels.ndim == 1
    # With two classes the curve of the other class is the same one, mirrored.
    for k in range(1 if is_binary else 0, len(classes)):
        truth = labels[:, k] if labels.ndim == 2 else (labels == k).long()
        is_known = truth >= 0
        fpr, tpr, thresholds = metrics.roc_curve(truth[is_known], probabilities[is_known, k])
        curve = list(zip(fpr.tolist(), tpr.tolist(), strict=True))
        for threshold, (x, y) in zip(thresholds.tolist(), curve, strict=True):
            points.append({"class": classes[k], "threshold": threshold, "fpr": x, "tpr": y})
        if fpr.isfinite().all() and tpr.isfinite().all():  # not with one class only
            area = torch.trapezoid(tpr, fpr)  # exact: ties are one step
            curves[f"{classes[k]}  AUROC {area:.3f}"] = curve
    write_csv(folder / "roc.csv", points)
    draw_roc(curves).save(folder / "roc.png")


def draw_roc(curves: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """ROC curves, (false positive rate, true positive rate) by their names, on a grid."""
    side = 480  # pixels
    low = 60  # left and upper end of the axes, the margin
    high = low + side  # right and lower end
    picture = Image.new("RGB", (high + low, high + low), "white")
    draw = ImageDraw.Draw(picture)
    for k in range(6):  # a grid at 0.0, 0.2, ..., 1.0
        at = low + side * k / 5
        draw.line((at, low, at, high), "#dddddd")
        draw.line((low, at, high, at), "#dddddd")
        draw.text((at, high + 14), f"{k / 5:.1f}", "black", anchor="mm", font_size=14)
        draw.text((low - 8, at), f"{1 - k / 5:.1f}", "black", anchor="rm", font_size=14)
    draw.line((low, high, high, low), "#aaaaaa")  # chance
    draw.text((low + side / 2, high + 40), "1 - specificity", "black", anchor="mm", font_size=16)
    draw.text((low, low - 20), "sensitivity", "black", anchor="lm", font_size=16)
    for k, (name, points) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        draw.line([(low + side * x, high - side * y) for x, y in points], colour, 3)
        line = high - 20 * (len(curves) - k)  # the legend, below the curves
        draw.text((high - 10, line), name, colour, anchor="rm", font_size=16)
    return picture


# --- new images ---


def predict_images(
    args: argparse.Namespace, runs: list[Run], device: torch.device, folder: Path
) -> tuple[str, int]:
    """Write predictions.csv and overlays of images without labels.

    Returns a summary, and how many files could not be read; the reasons are printed.
    """
    meta = runs[0].meta
    classes = meta["classes"]
    files = preprocess.list_images(args.images)  # paths by name
    load = partial(load_image, meta=meta)
    results = preprocess.in_threads(load, list(files.values()), args.workers)
    bad = []
    notes = []
    rows = []
    for name, result in zip(files, results, strict=True):
        if isinstance(result, DataError):
            bad.append((name, str(result)))
            continue
        image, aspect, image_notes = result  # uint8 (1 or 3, S, S)
        notes += [(name, note) for note in image_notes]
        # `evaluate` takes images with labels; this one has none.
        batch = (image[None], torch.zeros(1))
        (probabilities,) = predict(runs, [batch], device, args.amp)  # (C,)
        (prediction,) = decide(probabilities[None], meta["multi_label"])  # () or (C,)
        row = {"image": name, **name_outputs(prediction, probabilities, meta), "overlay": ""}
        targets = choose_targets(probabilities, meta)
        answers = {target: f"{classes[target]} {probabilities[target]:.3f}" for target in targets}
        if len(rows) < OVERLAYS:
            row["overlay"] = f"{len(rows):04d}_{Path(name).stem[:100]}.png"
            maps = []  # one below the other
            for target, answer in answers.items():
                maps.append(draw_map(runs[0], image, target, [name, answer], aspect))
            to_pil_image(torch.cat(maps, 1)).save(folder / row["overlay"])
        rows.append(row)
        print(one_line(f"{name}: {row['prediction'] or '-'} ({', '.join(answers.values())})"))
    preprocess.report_bad(bad)
    preprocess.report_notes(notes)
    if not rows:
        raise DataError(f"none of {len(files)} files could be read")
    write_csv(folder / "predictions.csv", rows)
    if len(rows) > OVERLAYS:
        print(f"note: overlays of the first {OVERLAYS} images only")
    return f"{len(rows)} images; predictions.csv and overlays", len(bad)


def choose_targets(probabilities: Tensor, meta: dict) -> list[int]:
    """The classes whose maps are drawn; probabilities (C,).

    Two classes: the positive one; more: the likeliest; several labels: all from 0.5 on, if any.
    """
    likely = (probabilities >= 0.5).nonzero()[:, 0].tolist()
    if meta["multi_label"] and likely:
        return likely
    return [1] if meta["positive_class"] else [int(probabilities.argmax())]


def load_image(path: Path, meta: dict) -> tuple[Tensor, float, tuple[str, ...]] | DataError:
    """An image prepared like those of the cache, uint8 (1 or 3, S, S), its aspect, and notes.

    The aspect is height divided by width. Returns the error if the file cannot be read.
    """
    try:
        picture = preprocess.read_image(path)
    except DataError as error:
        return error
    image, notes = preprocess.prepare_image(picture, meta["size"], meta["fit"], meta["channels"])
    image = torch.from_numpy(image)
    height, width = picture.gray.shape
    aspect = height / width if meta["fit"] == "squash" else 1
    return (image[None] if image.ndim == 2 else image.permute(2, 0, 1)), aspect, notes


if __name__ == "__main__":
    run_command(main)
