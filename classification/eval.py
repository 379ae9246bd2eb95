"""Evaluate checkpoints of train.py on a labelled split, or predict new images.

  python classification/eval.py --data data/rsna --checkpoint runs/rsna/best.pt
  python classification/eval.py --data data/other --split test \\
      --checkpoint runs/a/best.pt runs/b/best.pt
  python classification/eval.py --data CACHE --checkpoint runs/fold_?/best.pt --by fold
  python classification/eval.py --checkpoint runs/rsna/best.pt --images scan.dcm folder_of_images

Labelled: metrics.json with 95 % bootstrap intervals (over patients), predictions.csv, roc.csv, and
pictures: confusion_matrix.png, roc.png, mistakes.png. New images: predictions.csv, overlays of
class activation maps. The probabilities of several checkpoints are averaged; those of several
folds predict the fold that they left out each, and the metrics are of all these images together.
Several labels an image have metrics each, and no confusion_matrix.png.
Batch size and mixed precision are those of the run, so that the score it printed comes out again.

In the shapes below N is the number of images, C that of classes, S the side of an image in pixels.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.dataset import (
    XrayDataset,
    choose_scale,
    fingerprints,
    in_batches,
    make_loader,
    open_cache,
    read_index,
    to_input,
)
from classification.model import (
    ARCHITECTURES,
    build_model,
    class_activation_maps,
    to_probabilities,
)
from classification.preprocess import (
    DataError,
    check_meta,
    check_outputs,
    count_files,
    find_images,
    in_threads,
    is_multi_label,
    list_files,
    one_line,
    positive_class,
    prepare_image,
    read_image,
    read_meta,
    report_bad,
    report_notes,
    run_command,
    show_label,
)
from classification.train import AMP, check_finite, choose_device, evaluate
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
    best_threshold,
    bootstrap,
    classification_metrics,
    confusion_matrix,
    roc_curve,
    split_by,
    tabulate,
    write_report,
)

TILE = 256  # pixels of one picture in a gallery
MOST_VALUES = 50  # of a column of --by
OVERLAYS = 100  # pictures of new images: the first ones
WORST = 12  # pictures in mistakes.png
WORST_OF_LABEL = 3  # where an image has several labels
# What a labelled split leaves in --out; metrics.json is written last.
RESULTS = (
    "metrics.json",
    "predictions.csv",
    "roc.csv",
    "roc.png",
    "confusion_matrix.png",
    "mistakes.png",
)
HEAT = (255.0, 60.0, 0.0)  # RGB of a class activation map
BLUE = (8, 60, 120)  # RGB of a cell of the confusion matrix that has all of its row
# Of the curves in roc.png
COLOURS = (
    "#1f4e9c",
    "#c0392b",
    "#2e8b57",
    "#8e44ad",
    "#d68910",
    "#117a8b",
    "#7b241c",
    "#5d6d7e",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="one or more of train.py's")
    add("--data", type=Path, metavar="CACHE", help="written by preprocess.py")
    split = "val (default): the validation fold of the run, of several all that they left out"
    add("--split", choices=("val", "test"), default="val", help=split)
    images = "new images without labels: files and folders"
    add("--images", type=Path, nargs="+", metavar="PATH", help=images)
    compare = "predictions.csv of another model for the same images"
    add("--compare", type=Path, metavar="CSV", help=compare)
    point = "threshold of the metrics called _tuned, such as sensitivity=0.95 (default: Youden's)"
    add("--operating-point", type=operating_point, metavar="NAME=VALUE", help=point)
    tune = "the cache of the training, where that threshold is chosen (default: --data)"
    add("--tune-on", type=Path, metavar="CACHE", help=tune)
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
        parser.error("give either --data CACHE (labelled) or --images PATH ... (new images)")
    if args.compare and not args.data:
        parser.error("--compare needs labels: give --data")
    if args.by and not args.data:
        parser.error("--by needs known cases: give --data")
    if (args.operating_point or args.tune_on) and not args.data:
        parser.error("--operating-point and --tune-on need labels: give --data")
    if args.workers < 0 or args.samples < 1:
        parser.error("expected --workers >= 0 and --samples >= 1")
    return args


def operating_point(text: str) -> tuple[str, float]:
    """An argparse type: sensitivity or specificity, and the least value it shall have."""
    name, _, value = text.partition("=")
    if name not in ("sensitivity", "specificity") or not 0 < float(value) <= 1:
        message = f"{text}, expected sensitivity=VALUE or specificity=VALUE, above 0 to 1"
        raise argparse.ArgumentTypeError(message)
    return name, float(value)


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
    checkpoints = [load_run(path, "classification", {"arch": str}, device) for path in paths]
    models = []
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        meta = checkpoint["meta"]
        settings = checkpoint["settings"]
        check_meta(meta, path)
        check_same(meta, checkpoints[0]["meta"], path, paths[0])
        width = settings.get("channels", 64)  # older checkpoints do not say
        is_known = settings["arch"] in ARCHITECTURES and settings["amp"] in AMP
        if not is_known or type(width) is not int or not 4 <= width <= 1024:
            problem = (
                f"settings {settings['amp']} {settings['arch']} {width}, of no run of train.py"
            )
            raise CheckpointError(f"{path}: {problem}")
        if settings["fold"] >= 0:  # -1: trained on all folds, no images to choose one on
            check_threshold(checkpoint.get("threshold"), meta, path)
        # Without pretrained weights, which the checkpoint replaces
        channels = meta.get("channels", 1)
        count = len(meta["classes"])
        model = build_model(settings["arch"], count, meta["size"], False, channels, width)
        load_weights(model, checkpoint, path)
        models.append(model.to(device, memory_format=torch.channels_last))
    return models, checkpoints


def check_threshold(threshold: object, meta: dict, path: Path) -> None:
    """Raise CheckpointError unless a run of two classes, or of each label, has its threshold."""
    count = len(meta["classes"])
    if is_multi_label(meta):
        types = [type(value) for value in threshold] if isinstance(threshold, list) else []
        if types != [float] * count:
            raise CheckpointError(f"{path}: threshold {threshold}, expected {count} numbers")
    elif count == 2 and type(threshold) is not float:
        raise CheckpointError(f"{path}: threshold {threshold}, expected a number")


def check_same(meta: dict, expected: dict, path: Path, other: Path) -> None:
    """Raise CheckpointError if images were not prepared in the same way."""
    usual = {"channels": 1, "multi_label": False, "fast_decode": False}  # what caches do not say
    for name in ("classes", "size", "fit", *usual):
        ours = meta.get(name, usual.get(name))
        theirs = expected.get(name, usual.get(name))
        if ours != theirs:
            raise CheckpointError(f"{path}: {name} {ours}, but {other} has {theirs}")


def name_results(args: argparse.Namespace, checkpoints: list[dict]) -> str:
    """The default folder of the results, beside the first checkpoint."""
    if not args.data:
        return "predictions"
    folds = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
    if args.split == "val" and len(folds) > 1:
        return "eval_folds"  # beside eval_val, which is that of the first fold alone
    return f"eval_{args.split}"


# --- a labelled split ---


def evaluate_split(
    args: argparse.Namespace,
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
    out: Path,
) -> None:
    """Metrics, tables and pictures of a labelled split."""
    # Predict the split: row k of everything below is row_numbers[k] of the cache
    meta = checkpoints[0]["meta"]
    classes = meta["classes"]
    multi_label = is_multi_label(meta)
    rows_by_fold = choose_rows(args.data, args.split, args.checkpoint, checkpoints)
    row_numbers = list(chain.from_iterable(rows_by_fold.values()))
    index = read_index(args.data)
    rows = [index[k] for k in row_numbers]
    by = choose_groups(rows if multi_label else name_labels(rows, classes), args.by)
    tunes = can_tune(args, checkpoints)  # refuses before the images are predicted
    probabilities, labels = predict_folds(args, rows_by_fold, models, checkpoints, device)
    predictions = decide(probabilities, multi_label)
    thresholds = None  # of every image, float64 (N,), or (N, C) for several labels
    tuned = None  # threshold, or one of each label, by fold
    if tunes:
        tuned = choose_thresholds(args, rows_by_fold, models, checkpoints, device)
        thresholds = torch.tensor([tuned[row["fold"]] for row in rows], dtype=torch.float64)
    cases = list_cases(rows, args.split, classes, labels, probabilities, predictions)
    if args.compare:  # a table that does not fit is refused before the bootstrap takes its time
        theirs = read_predictions(args.compare, cases, classes)

    # Metrics of the split, and of the bootstrap's samples of its patients
    metrics = partial(measure, labels, probabilities, thresholds, classes)
    patients = [case["patient"] for case in cases]
    folds = [case["fold"] for case in cases]
    summary = bootstrap(metrics, patients, args.samples)
    tables = tabulate(partial(measure_part, metrics, labels), folds, patients, by, args.samples)
    if args.compare:
        summary |= compare_models(labels, probabilities, theirs, patients, args.samples, classes)
    run = describe_run(args, len(row_numbers)) | describe_labels(meta, tuned)

    # Pictures
    wrong = (predictions != labels) & (labels >= 0)  # (N,) or (N, C)
    worst = choose_worst(labels, probabilities, predictions, classes)
    drawn = {fold: of_fold(fold, models, checkpoints)[0] for fold in rows_by_fold}
    mistakes = draw_mistakes(args.data, drawn, meta, row_numbers, cases, worst)

    # Results, in place of earlier ones
    with hold_folder(out):
        clear_results(out, RESULTS)
        write_csv(out / "predictions.csv", cases)
        write_pictures(out, labels, probabilities, predictions, classes, mistakes)
        shown = choose_shown(summary, classes, labels) if multi_label else None
        write_report(out, summary, patients, cases, run, tables, shown)
    what = f"{len(rows)} images"
    if multi_label:
        what += f", {int((labels >= 0).sum())} known labels"
    print(f"{what}, {int(wrong.sum())} wrong; metrics and pictures in {out}")


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


def name_labels(rows: list[dict[str, str]], classes: list[str]) -> list[dict[str, str]]:
    """The rows of index.csv with the name of the class in place of its number."""
    return [row | {"label": classes[int(row["label"])]} for row in rows]


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
    """Probabilities float32 (N, C), averaged over the models, and labels int64, on the CPU.

    `amp` None takes the mixed precision of each run. Raises DataError for NaN or infinite outputs.
    """
    probabilities = []  # of each model, (N, C)
    for number, (model, checkpoint) in enumerate(zip(models, checkpoints, strict=True), 1):
        meta = checkpoint["meta"]
        mode = amp or checkpoint["settings"]["amp"]
        logits, labels = evaluate(model, loader, device, mode, *choose_scale(meta))
        check_finite(logits, f"checkpoint {number}")
        probabilities.append(to_probabilities(logits, meta))
    return torch.stack(probabilities).mean(0), labels


def decide(probabilities: Tensor, multi_label: bool) -> Tensor:
    """Classes int64 (N,) from probabilities (N, C), or 0 and 1 (N, C) of several labels."""
    if multi_label:
        return (probabilities >= 0.5).long()
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= 0.5).long()  # argmax would make 0.5 negative
    return probabilities.argmax(1)


def can_tune(args: argparse.Namespace, checkpoints: list[dict]) -> bool:
    """Whether there is a threshold to choose, and a validation fold to choose it on.

    Raises DataError if --operating-point or --tune-on ask for one and there is not.
    """
    meta = checkpoints[0]["meta"]
    found = None
    if len(meta["classes"]) != 2 and not is_multi_label(meta):
        found = f"{len(meta['classes'])} classes, expected two or labels"
    elif any(checkpoint["settings"]["fold"] < 0 for checkpoint in checkpoints):
        found = "a checkpoint without validation images (--fold -1) to choose a threshold on"
        print("note: no tuned threshold: a checkpoint was trained on all folds")
    if found and (args.operating_point or args.tune_on):
        option = "--operating-point" if args.operating_point else "--tune-on"
        raise DataError(f"{option}: found {found}")
    return found is None


def choose_thresholds(
    args: argparse.Namespace,
    rows_by_fold: dict[str, list[int]],
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> dict[str, float]:
    """The threshold of the metrics called _tuned, for each fold.

    Of several folds each has the mean threshold of the checkpoints of the others.
    """
    if len(rows_by_fold) == 1:
        return dict.fromkeys(rows_by_fold, choose_threshold(args, models, checkpoints, device))
    # A checkpoint's own one was tuned on the very images that it predicts here.
    print("note: the tuned threshold of each fold is the mean of those of the other folds")
    thresholds = own_thresholds(args, models, checkpoints, device)
    tuned = {}
    for fold in rows_by_fold:
        others = []
        for checkpoint, threshold in zip(checkpoints, thresholds, strict=True):
            if str(checkpoint["settings"]["fold"]) != fold:
                others.append(threshold)
        tuned[fold] = mean_threshold(others)
    return tuned


def mean_threshold(thresholds: list) -> float | list[float]:
    """The mean of thresholds, or of each label of lists of them."""
    if isinstance(thresholds[0], list):
        return [mean_threshold(list(of_label)) for of_label in zip(*thresholds, strict=True)]
    return sum(thresholds) / len(thresholds)


def choose_threshold(
    args: argparse.Namespace,
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> float:
    """The threshold of the metrics called _tuned, chosen on the validation fold.

    One checkpoint has it. Of several their mean probability is tuned, if --tune-on or --data has
    the validation fold that they have in common; otherwise it is the mean of their own thresholds.
    """
    # Never on the split that is reported: the metrics at this threshold would be too good.
    cache = args.tune_on or args.data
    indexes = {checkpoint["settings"]["index"] for checkpoint in checkpoints}
    folds = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
    has_folds = indexes == {file_sha256(cache / "index.csv")}
    if args.tune_on and not has_folds:
        raise DataError(f"--tune-on {cache}: not the cache of the training")
    if len(checkpoints) > 1 and has_folds and len(folds) == 1:
        return tune_threshold(args, args.checkpoint, models, checkpoints, device)
    own = own_thresholds(args, models, checkpoints, device)
    if len(own) > 1:
        why = "no validation images in common"
        print(f"note: {why}: the tuned threshold is the mean of their own ones")
    return mean_threshold(own)


def own_thresholds(
    args: argparse.Namespace,
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> list:
    """The threshold of each checkpoint on its own validation fold, or those of each label.

    Youden's was stored by the training; that of --operating-point needs the images again.
    """
    if args.operating_point is None:
        return [checkpoint["threshold"] for checkpoint in checkpoints]
    runs = zip(args.checkpoint, models, checkpoints, strict=True)
    return [
        tune_threshold(args, [path], [model], [checkpoint], device)
        for path, model, checkpoint in runs
    ]


def tune_threshold(
    args: argparse.Namespace,
    paths: list[Path],
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
) -> float | list[float]:
    """The threshold of the mean probability on the validation fold that the runs have in common.

    Raises DataError if the cache is not that of the training.
    """
    cache = args.tune_on or args.data
    sha256 = file_sha256(cache / "index.csv")
    if any(checkpoint["settings"]["index"] != sha256 for checkpoint in checkpoints):
        raise DataError(
            f"{cache}: not the cache of the training, where the threshold of --operating-point is "
            "chosen; give that one as --tune-on"
        )
    rows_by_fold = choose_rows(cache, "val", paths, checkpoints)
    args = argparse.Namespace(**vars(args) | {"data": cache})
    probabilities, labels = predict_folds(args, rows_by_fold, models, checkpoints, device)
    return best_threshold(labels, probabilities, args.operating_point)


def list_cases(
    rows: list[dict[str, str]],
    split: str,
    classes: list[str],
    labels: Tensor,
    probabilities: Tensor,
    predictions: Tensor,
) -> list[dict]:
    """The rows of predictions.csv, one an image."""
    cases = []
    for k, row in enumerate(rows):
        case = {
            "id": row["id"],
            "patient": row["patient"],
            "fold": row["fold"],
        }
        case |= name_answers(classes, labels[k], predictions[k])
        case |= name_probabilities(classes, probabilities[k])
        case["split"] = split
        cases.append(case)
    return cases


def name_answers(classes: list[str], label: Tensor, prediction: Tensor) -> dict[str, str]:
    """Truth and prediction of an image: names of classes, or of several labels those that it has.

    The truth of several labels is a column for each: 1, 0, or nothing where it is unknown.
    """
    if label.ndim == 0:
        return {"label": classes[label], "prediction": classes[prediction]}
    answers = {}
    for name, value in zip(classes, label.tolist(), strict=True):
        answers[f"label_{name}"] = show_label(value)
    return answers | {"prediction": join_labels(classes, prediction)}


def join_labels(classes: list[str], prediction: Tensor) -> str:
    """The names of the labels that are 1 in (C,), joined by |."""
    return "|".join(name for name, value in zip(classes, prediction.tolist(), strict=True) if value)


def name_probabilities(classes: list[str], probabilities: Tensor) -> dict[str, float]:
    """probability_CLASS for each class; probabilities (C,)."""
    pairs = zip(classes, probabilities.tolist(), strict=True)
    return {f"probability_{name}": probability for name, probability in pairs}


def read_predictions(path: Path, cases: list[dict], classes: list[str]) -> Tensor:
    """Probabilities float64 (N, C) of another model's predictions.csv, in the order of `cases`.

    Raises DataError unless it has the same images, each once, with the same labels and of the same
    split.
    """
    if not path.is_file():
        raise DataError(f"{path}: not a file, expected predictions.csv of eval.py")
    columns = [name for name in cases[0] if name == "label" or name.startswith("label_")]
    table = {}  # probabilities by id
    labels = {}  # label and split by id; older tables have no split
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            table[row["id"]] = [float(row[f"probability_{name}"]) for name in classes]
            labels[row["id"]] = ([row[name] for name in columns], row.get("split"))
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        expected = f"predictions.csv of eval.py for the classes {classes}"
        raise DataError(f"{path}: expected {expected}") from error
    # A difference means something on the same images only.
    ids = {case["id"] for case in cases}
    missing = ids - table.keys()
    others = table.keys() - ids
    if missing or others:
        problem = f"{len(missing)} of {len(cases)} images are missing, and {len(others)} are others"
        example = min(missing | others)
        raise DataError(f"{path}: {problem}, such as {example}; expected the same images")
    if len(rows) != len(table):
        problem = f"{len(rows)} rows for {len(table)} images"
        raise DataError(f"{path}: {problem}, expected one for each")
    for case in cases:
        label, split = labels[case["id"]]
        expected = [case[name] for name in columns]
        if label != expected or split not in (case["split"], None):
            problem = f"{case['id']} is {', '.join(label)} of {split}"
            expected = f"{', '.join(expected)} of {case['split']}"
            raise DataError(f"{path}: {problem}, expected {expected}")
    rows = [table[case["id"]] for case in cases]
    probabilities = torch.tensor(rows, dtype=torch.float64)  # (N, C)
    # Older tables have six digits; a NaN is in no range.
    is_positive = (probabilities >= 0).all()  # false for NaN
    adds_up = ((probabilities.sum(1) - 1).abs() < 1e-4).all()
    if columns != ["label"]:  # several labels, each by itself
        adds_up = (probabilities <= 1).all()
    if not (is_positive and adds_up):
        raise DataError(f"{path}: expected probabilities from 0 to 1 that add up to 1")
    return probabilities


def choose_shown(summary: dict, classes: list[str], labels: Tensor) -> list[str]:
    """Of the metrics of several labels those to print: all means, and the AUROC of each label.

    Names the labels that the means leave out.
    """
    of_labels = {f"{name}_{label}" for name in summary for label in classes}
    constant = []
    for name, truth in zip(classes, labels.T, strict=True):
        if len(truth[truth >= 0].unique()) < 2:
            constant.append(name)
    if constant:
        print(f"note: one value only, left out of the means: {', '.join(constant)}")
    shown = [name for name in summary if name not in of_labels]
    return shown + [f"auroc_{label}" for label in classes if label not in constant]


def compare_models(
    labels: Tensor,
    probabilities: Tensor,
    others: Tensor,
    patients: list[str],
    samples: int,
    classes: list[str],
) -> dict[str, dict[str, float]]:
    """The difference in AUROC between two models, with its interval.

    Both have the same bootstrap samples: a hard sample is hard for both, so the difference varies
    less than either of them.
    """

    def difference(chosen: Tensor) -> dict[str, float]:
        truth = labels[chosen]
        ours = classification_metrics(truth, probabilities[chosen], names=classes)
        theirs = classification_metrics(truth, others[chosen], names=classes)
        return {"auroc_difference": ours["auroc"] - theirs["auroc"]}

    return bootstrap(difference, patients, samples)


def measure(
    labels: Tensor,
    probabilities: Tensor,
    thresholds: Tensor | None,
    classes: list[str],
    chosen: Tensor,
) -> dict[str, float]:
    """The metrics of the chosen rows, int64; the others are as in `classification_metrics`."""
    own = None if thresholds is None else thresholds[chosen]
    return classification_metrics(labels[chosen], probabilities[chosen], own, classes)


def measure_part(metrics: Callable, labels: Tensor, chosen: Tensor) -> dict[str, float]:
    """`metrics` of a fold or of a value of --by, which may have one class alone."""
    values = metrics(chosen)
    if len(labels[chosen].unique()) < 2:  # these then tell only which class it is
        for name in values:
            if name.startswith(("precision", "f1", "average_precision")):
                values[name] = math.nan
    return values


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


def describe_labels(meta: dict, tuned: dict | None) -> dict:
    """What metrics.json says of classes and thresholds; `tuned` has a threshold by fold."""
    positive = None if is_multi_label(meta) else positive_class(meta["classes"])
    if positive:
        print(f"positive class: {positive}")
    described = {"classes": meta["classes"], "positive_class": positive, "threshold_tuned": None}
    if tuned and len(tuned) == 1:
        (described["threshold_tuned"],) = tuned.values()
    elif tuned:  # several folds have no threshold in common
        described["thresholds_tuned"] = tuned
    return described


# --- pictures ---


def choose_worst(
    labels: Tensor, probabilities: Tensor, predictions: Tensor, classes: list[str]
) -> list[tuple[int, int, str]]:
    """The most confident mistakes: number of the image, number of the class, and a caption.

    Of several labels an image WORST_OF_LABEL for each.
    """
    worst = []
    if labels.ndim == 1:
        confidence = probabilities.amax(1)  # (N,)
        wrong = (predictions != labels).nonzero()[:, 0]  # numbers of images, (n,)
        for k in wrong[confidence[wrong].argsort(descending=True)][:WORST].tolist():
            answer = f"predicted {classes[predictions[k]]} {confidence[k]:.3f}"
            worst.append((k, int(predictions[k]), f"{classes[labels[k]]}, {answer}"))
        return worst
    for target, name in enumerate(classes):
        truth = labels[:, target]
        scores = probabilities[:, target]
        wrong = ((truth >= 0) & (predictions[:, target] != truth)).nonzero()[:, 0]
        error = (scores - truth).abs()  # (N,)
        for k in wrong[error[wrong].argsort(descending=True)][:WORST_OF_LABEL].tolist():
            worst.append((k, target, f"{name}: {int(truth[k])}, predicted {scores[k]:.3f}"))
    return worst


def draw_mistakes(
    cache: Path,
    models: dict[str, nn.Module],
    meta: dict,
    row_numbers: list[int],
    cases: list[dict],
    worst: list[tuple[int, int, str]],
) -> list[Tensor]:
    """The mistakes of `choose_worst` with what the model looked at: uint8 (3, H, W) each.

    `row_numbers` are the rows of `cases` in the cache, `models` the network of each fold.
    """
    dataset = XrayDataset(cache)
    tiles = []
    for k, target, caption in worst:
        case = cases[k]
        (image,), _ = dataset[[row_numbers[k]]]  # (1 or 3, S, S)
        lines = [case["id"], caption]
        tiles.append(draw_activation(models[case["fold"]], meta, image, target, lines))
    return tiles


def draw_activation(
    model: nn.Module, meta: dict, image: Tensor, target: int, caption: list[str]
) -> Tensor:
    """An image beside itself under the activation map of the class `target`, below its caption.

    `image` is uint8 (1 or 3, S, S); returns uint8 (3, H, 2 * TILE).
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        inputs = to_input(image[None], device, *choose_scale(meta))  # (1, 1 or 3, S, S)
        _, maps = class_activation_maps(model, inputs)  # (1, C, h, w)
    gray = resize(image.float(), [TILE, TILE]).expand(3, -1, -1)  # (3, TILE, TILE)
    # What speaks against the class is left out; the strongest place covers 60 % of the image.
    heat = maps[:, target].cpu().clamp(min=0)  # (1, h, w)
    heat = resize(heat, [TILE, TILE], antialias=False)  # (1, TILE, TILE)
    heat = 0.6 * heat / heat.max().clamp(min=1e-6)
    colour = torch.tensor(HEAT)[:, None, None]
    pair = torch.cat([gray, gray * (1 - heat) + colour * heat], 2)  # (3, TILE, 2 * TILE)
    # 20 pixels a line
    head = Image.new("RGB", (2 * TILE, 20 * len(caption)), "black")
    for k, line in enumerate(caption):
        ImageDraw.Draw(head).text((4, 20 * k + 2), shorten(line, 64), "white", font(14))
    return torch.cat([pil_to_tensor(head), pair.round().byte()], 1)


def shorten(text: str, length: int) -> str:
    """The beginning and the end of a text that is too long for its line."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def write_pictures(
    out: Path,
    labels: Tensor,
    probabilities: Tensor,
    predictions: Tensor,
    classes: list[str],
    mistakes: list[Tensor],
) -> None:
    """ROC, mistakes, and the confusion matrix where an image has one label."""
    if labels.ndim == 1:
        counts = confusion_matrix(labels, predictions, len(classes))
        save_picture(out / "confusion_matrix.png", draw_confusion_matrix(counts, classes))
    write_roc(out, labels, probabilities, classes)
    if mistakes:
        grid = torchvision.utils.make_grid(mistakes, nrow=3)
        save_picture(out / "mistakes.png", to_pil_image(grid))


def draw_confusion_matrix(counts: Tensor, classes: list[str]) -> Image.Image:
    """Counts int (C, C) and row percentages, darker blue for a larger share of the row."""
    cell = 130  # pixels
    margin = 150
    side = margin + cell * len(classes)
    picture = Image.new("RGB", (side + 20, side + 20), "white")
    draw = ImageDraw.Draw(picture)
    # Names of classes along the top and the left, as in scikit-learn: truth down, prediction across
    middle = margin + cell * len(classes) / 2
    draw.text((middle, 80), "predicted", "black", font(18), anchor="mm")
    draw.text((10, margin - 30), "truth", "black", font(18), anchor="lm")
    positive = positive_class(classes)
    if positive:
        draw.text((10, 30), f"positive: {positive[:32]}", "black", font(18), anchor="lm")
    for i, name in enumerate(classes):
        y = margin + i * cell
        middle = margin + (i + 0.5) * cell
        draw.text((middle, margin - 30), name[:14], "black", font(16), anchor="mm")
        draw.text((margin - 10, middle), name[:14], "black", font(16), anchor="rm")
        for j, count in enumerate(counts[i].tolist()):
            x = margin + j * cell
            share = count / max(1, int(counts[i].sum()))  # a class may have no images
            colour = tuple(round(255 - share * (255 - c)) for c in BLUE)
            draw.rectangle((x, y, x + cell, y + cell), fill=colour, outline="white", width=2)
            ink = "white" if share > 0.5 else "black"
            center_x = x + cell / 2
            center_y = y + cell / 2
            draw.text((center_x, center_y - 12), str(count), ink, font(26), anchor="mm")
            draw.text((center_x, center_y + 20), f"{share:.1%}", ink, font(16), anchor="mm")
    return picture


def save_picture(path: Path, picture: Image.Image) -> None:
    with written(path) as temporary:
        picture.save(temporary)


def write_roc(out: Path, labels: Tensor, probabilities: Tensor, classes: list[str]) -> None:
    """roc.csv and roc.png: of the positive class, each class against the others, or each label."""
    points = []
    curves = {}
    is_binary = len(classes) == 2 and labels.ndim == 1
    # The curve of the other class of two is the same one, turned.
    for k in range(1 if is_binary else 0, len(classes)):
        scores = probabilities[:, k]
        if labels.ndim == 2:
            known = labels[:, k] >= 0
            truth = labels[known, k]
            scores = scores[known]
        else:
            truth = (labels == k).long()
        fpr, tpr, thresholds = roc_curve(truth, scores)
        columns = (thresholds.tolist(), fpr.tolist(), tpr.tolist())
        for threshold, x, y in zip(*columns, strict=True):
            points.append({"class": classes[k], "threshold": threshold, "fpr": x, "tpr": y})
        if fpr.isfinite().all() and tpr.isfinite().all():  # not with one class only
            role = "positive class " if is_binary else ""
            area = torch.trapezoid(tpr, fpr)  # exact: ties are one step
            curves[f"{role}{classes[k]}  AUROC {area:.3f}"] = (fpr, tpr)
    write_csv(out / "roc.csv", points)
    save_picture(out / "roc.png", draw_roc(curves))


def draw_roc(curves: dict[str, tuple[Tensor, Tensor]]) -> Image.Image:
    """ROC curves (false positive rate, true positive rate) by their names, on a grid."""
    side = 480  # pixels
    low = 60  # left and upper end of the axes, the margin
    high = low + side  # right and lower end
    picture = Image.new("RGB", (high + low, high + low), "white")
    draw = ImageDraw.Draw(picture)
    for k in range(6):  # a grid at 0.0, 0.2, ..., 1.0
        label = f"{k / 5:.1f}"
        at = low + side * k / 5
        draw.line((at, low, at, high), "#dddddd")
        draw.line((low, at, high, at), "#dddddd")
        draw.text((at, high + 14), label, "black", font(14), anchor="mm")
        draw.text((low - 8, high - side * k / 5), label, "black", font(14), anchor="rm")
    draw.line((low, high, high, low), "#aaaaaa")  # chance
    draw.text((low + side / 2, high + 40), "1 - specificity", "black", font(16), anchor="mm")
    draw.text((low, low - 20), "sensitivity", "black", font(16), anchor="lm")
    for k, (name, (fpr, tpr)) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        points = []
        for x, y in zip(fpr.tolist(), tpr.tolist(), strict=True):
            points.append((low + side * x, low + side * (1 - y)))
        draw.line(points, colour, 3)
        line = high - 20 * (len(curves) - k)  # the legend, below the curves
        draw.text((high - 10, line), name, colour, font(16), anchor="rm")
    return picture


# --- new images ---


def predict_images(
    args: argparse.Namespace,
    models: list[nn.Module],
    checkpoints: list[dict],
    device: torch.device,
    out: Path,
) -> None:
    """Probabilities and overlays of images without labels.

    Raises DataError at the end if some could not be read.
    """
    meta = checkpoints[0]["meta"]
    classes = meta["classes"]
    # Everything that can be refused is, before anything is read or written.
    files = list_images(args.images)
    overlays = name_overlays(out, args.images, files)
    bad = []
    batch_size = checkpoints[0]["settings"]["batch_size"]
    batches = read_batches(files, partial(load_image, meta=meta), args.workers, batch_size, bad)
    first = next(batches, None)
    if first:
        with hold_folder(out), written(out / "predictions.csv") as table:
            # Pictures of an earlier run would be taken for those of this one.
            clear_results(out, list_predictions(out))
            done = 0
            for batch in chain([first], batches):  # one in memory at a time
                images = torch.stack(list(batch.values()))  # (B, 1 or 3, S, S)
                # `evaluate` takes images with labels; these have none.
                loader = [(images, torch.zeros(len(batch), dtype=torch.long))]
                probabilities, _ = predict(models, checkpoints, loader, device, args.amp)
                for path, image, chances in zip(batch, images, probabilities, strict=True):
                    overlay = overlays[path] if done < OVERLAYS else None
                    row = {"image": str(path), "prediction": name_prediction(chances, meta)}
                    row |= name_probabilities(classes, chances)
                    row["overlay"] = overlay.name if overlay else ""
                    append_row(table, row, is_first=done == 0)
                    done += 1
                    targets = choose_targets(chances, meta)
                    answers = [f"{classes[target]} {chances[target]:.3f}" for target in targets]
                    print(one_line(f"{path}: {', '.join(answers)}"))
                    if overlay:
                        maps = []  # one below the other
                        for target, answer in zip(targets, answers, strict=True):
                            caption = [str(path), answer]
                            maps.append(draw_activation(models[0], meta, image, target, caption))
                        save_picture(overlay, to_pil_image(torch.cat(maps, 1)))
        print(f"{done} images; predictions.csv and overlays in {out}")
        if done > OVERLAYS:
            print(f"note: overlays of the first {OVERLAYS} images only")
    if bad:  # one bad file does not cost the results of the others, but the exit status says so
        raise DataError(f"{len(bad)} of {len(files)} files could not be read (named above)")


def choose_targets(probabilities: Tensor, meta: dict) -> list[int]:
    """The class of an image, or its labels from 0.5 on, or the likeliest; probabilities (C,)."""
    likely = (probabilities >= 0.5).nonzero()[:, 0].tolist()
    if is_multi_label(meta) and likely:
        return likely
    return [int(probabilities.argmax())]


def name_prediction(probabilities: Tensor, meta: dict) -> str:
    """The class of an image, or its labels from 0.5 on, joined by |, by probabilities (C,)."""
    if is_multi_label(meta):
        return join_labels(meta["classes"], decide(probabilities, True))
    return meta["classes"][int(probabilities.argmax())]


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


def load_image(path: Path, meta: dict) -> tuple[Tensor, tuple[str, ...]] | DataError:
    """One image as in the cache of the run, uint8 (1 or 3, S, S), and notes; or why not."""
    try:
        # As its training images were decoded
        picture = read_image(path, meta["size"] if meta.get("fast_decode") else 0)
    except DataError as error:
        return error
    image, notes = prepare_image(picture, meta["size"], meta["fit"], meta.get("channels", 1))
    image = torch.from_numpy(image)
    return (image[None] if image.ndim == 2 else image.permute(2, 0, 1)), notes


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
