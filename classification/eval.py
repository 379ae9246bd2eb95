"""Evaluate checkpoints of train.py on a labelled split, or predict new images.

  python classification/eval.py --data data/rsna --checkpoint runs/classification/best.pt --split val
  python classification/eval.py --data data/other --checkpoint runs/a/best.pt runs/b/best.pt --split test
  python classification/eval.py --checkpoint runs/classification/best.pt --images scan.dcm folder_of_images

Several checkpoints: their probabilities are averaged. Labelled: metrics.json (95 % bootstrap intervals over patients),
predictions.csv, roc.csv, confusion_matrix.png, roc.png, mistakes.png. New images: predictions.csv and overlays of the
class activation maps. Batch size and mixed precision are those of the training, so its score comes out again.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.dataset import XrayDataset, in_batches, make_loader, read_index, to_input
from classification.model import build_model, class_activation_maps
from classification.preprocess import SUFFIXES, DataError, in_threads, read_image, read_meta, resize
from classification.train import AMP, choose_device, evaluate
from common.checkpoint import CheckpointError, file_sha256, load_checkpoint, load_weights
from common.metrics import bootstrap, classification_metrics, confusion_matrix, roc_curve

TILE = 256  # pixels of one picture in a gallery


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw_help = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw_help)
    data = parser.add_argument_group("data")
    data.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="one or more of train.py's")
    data.add_argument("--data", type=Path, metavar="CACHE", help="what preprocess.py wrote")
    data.add_argument(
        "--split", choices=("val", "test"), default="val", help="val: the fold the training kept for it"
    )
    data.add_argument("--images", type=Path, nargs="+", help="new images without labels: files and folders")
    data.add_argument(
        "--compare", type=Path, metavar="CSV", help="predictions.csv of another model on the same images"
    )
    data.add_argument(
        "--out", type=Path, help="(default: eval_val, eval_test or predictions beside the checkpoint)"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    run.add_argument("--amp", choices=AMP, help="mixed precision (default: as in the training)")
    run.add_argument("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    run.add_argument("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (labelled) or --images FILE|FOLDER ... (new images)")
    if args.workers < 0 or args.samples < 1:
        parser.error("expected --workers >= 0 and --samples >= 1")
    return args


def load_models(paths: list[Path], device: torch.device) -> tuple[list[torch.nn.Module], list[dict]]:
    """Bare models in evaluation mode, and their checkpoints. Raises CheckpointError if they do not belong together."""
    checkpoints = [load_checkpoint(path, device) for path in paths]
    models = []
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        meta = checkpoint["meta"]
        for name in ("classes", "size", "fit"):
            if meta[name] != checkpoints[0]["meta"][name]:
                raise CheckpointError(
                    f"{path}: {name} {meta[name]}, but {paths[0]} has {checkpoints[0]['meta'][name]}"
                )
        model = build_model(checkpoint["settings"]["arch"], len(meta["classes"]), meta["size"])
        load_weights(model, checkpoint, path)
        models.append(model.to(device, memory_format=torch.channels_last).eval())
    return models, checkpoints


def choose_rows(
    cache: Path, index: list[dict[str, str]], split: str, paths: list[Path], checkpoints: list[dict]
):
    """Row numbers of the split, after checking that the checkpoints have not seen them and fit the cache."""
    meta = read_meta(cache)
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        for name in ("classes", "size", "fit"):
            if meta[name] != checkpoint["meta"][name]:
                raise DataError(f"{cache}: {name} {meta[name]}, but {path} was trained with {checkpoint['meta'][name]}; "
                                "prepare the images by preprocess.py --like TRAIN_CACHE")  # fmt: skip
    folds = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
    if split == "val":
        if any(c["settings"]["index"] != file_sha256(cache / "index.csv") for c in checkpoints):
            raise DataError(
                f"{cache}: not the cache of the training, whose folds are unknown here; use --split test"
            )
        if len(folds) > 1:
            raise DataError(
                f"checkpoints of folds {sorted(folds)} have trained on each other's validation images; use --split test"
            )
    wanted = "test" if split == "test" else str(folds.pop())
    rows = [k for k, row in enumerate(index) if row["fold"] == wanted]
    if not rows:
        raise DataError(
            f"{cache}: no rows in the {split} split; preprocess.py makes test rows by --test-fraction or --like"
        )
    return rows


# ------------------------------------------------------------------------------------------ pictures


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_confusion_matrix(counts: Tensor, classes: list[str]) -> Image.Image:
    """Counts and row percentages, darker blue for a larger share of the row."""
    cell, margin = 130, 150
    side = margin + cell * len(classes)
    picture = Image.new("RGB", (side + 20, side + 20), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((margin + cell * len(classes) / 2, 20), "predicted", "black", font(18), anchor="mm")
    draw.text((10, margin - 20), "truth", "black", font(18), anchor="lm")
    for i, name in enumerate(classes):
        middle = margin + (i + 0.5) * cell
        draw.text((middle, margin - 35), name[:14], "black", font(16), anchor="mm")
        draw.text((margin - 10, middle), name[:14], "black", font(16), anchor="rm")
        for j, count in enumerate(counts[i].tolist()):
            share = count / max(1, int(counts[i].sum()))
            x, y = margin + j * cell, margin + i * cell
            colour = tuple(round(255 - share * (255 - c)) for c in (8, 60, 120))
            draw.rectangle((x, y, x + cell, y + cell), fill=colour, outline="white", width=2)
            ink = "white" if share > 0.5 else "black"
            draw.text((x + cell / 2, y + cell / 2 - 12), str(count), ink, font(26), anchor="mm")
            draw.text((x + cell / 2, y + cell / 2 + 20), f"{share:.1%}", ink, font(16), anchor="mm")
    return picture


def draw_roc(curves: dict[str, tuple[Tensor, Tensor]]) -> Image.Image:
    """ROC curves (false positive rate, true positive rate) with a grid; the names say what each is."""
    side, margin = 480, 60
    picture = Image.new("RGB", (side + 2 * margin, side + 2 * margin), "white")
    draw = ImageDraw.Draw(picture)
    for k in range(6):
        at = margin + side * k / 5
        draw.line((at, margin, at, margin + side), "#dddddd")
        draw.line((margin, at, margin + side, at), "#dddddd")
        draw.text((at, margin + side + 14), f"{k / 5:.1f}", "black", font(14), anchor="mm")
        draw.text((margin - 8, margin + side - side * k / 5), f"{k / 5:.1f}", "black", font(14), anchor="rm")
    draw.line((margin, margin + side, margin + side, margin), "#aaaaaa")
    draw.text((margin + side / 2, margin + side + 40), "1 - specificity", "black", font(16), anchor="mm")
    draw.text((margin, margin - 20), "sensitivity", "black", font(16), anchor="lm")
    colours = ("#1f4e9c", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#117a8b", "#7b241c", "#5d6d7e")
    for k, (name, (fpr, tpr)) in enumerate(curves.items()):
        colour = colours[k % len(colours)]
        points = [
            (margin + side * x, margin + side * (1 - y))
            for x, y in zip(fpr.tolist(), tpr.tolist(), strict=True)
        ]
        draw.line(points, colour, 3)
        draw.text(
            (margin + side - 10, margin + side - 20 * (len(curves) - k)), name, colour, font(16), anchor="rm"
        )
    return picture


def draw_activation(image: Tensor, activation: Tensor, caption: list[str]) -> Tensor:
    """uint8 (1, S, S) and its activation map (h, w) side by side under a caption: uint8 (3, H, 2 * TILE)."""
    gray = torch.nn.functional.interpolate(image[None].float(), (TILE, TILE), mode="bilinear")[0].expand(
        3, -1, -1
    )
    heat = torch.nn.functional.interpolate(activation[None, None].float(), (TILE, TILE), mode="bicubic")[
        0
    ].clamp(min=0)
    heat = 0.6 * heat / heat.max().clamp(min=1e-6)
    red = torch.tensor([255.0, 60.0, 0.0])[:, None, None]
    pair = torch.cat([gray, gray * (1 - heat) + red * heat], 2)
    head = Image.new("RGB", (2 * TILE, 20 * len(caption)), "black")
    for k, line in enumerate(caption):
        ImageDraw.Draw(head).text((4, 20 * k + 2), line[-60:], "white", font(14))
    head = torchvision.transforms.functional.pil_to_tensor(head)
    return torch.cat([head, pair.round().clamp(0, 255).byte()], 1)


def activation_of(
    model: torch.nn.Module, meta: dict, image: Tensor, target: int, device: torch.device
) -> Tensor:
    """Class activation map (h, w) of one uint8 image (1, S, S) on the CPU."""
    with torch.inference_mode():
        _, maps = class_activation_maps(model, to_input(image[None], device, meta["mean"], meta["std"]))
    return maps[0, target].cpu()


# ------------------------------------------------------------------------------------------ the two modes


def average_probabilities(
    models: list, checkpoints: list[dict], loader: Iterable, device: torch.device, amp: str | None
):
    """Mean over the models of the softmax, float32 (N, C), and labels int64 (N,)."""
    total = 0
    for model, checkpoint in zip(models, checkpoints, strict=True):
        meta, mode = checkpoint["meta"], amp or checkpoint["settings"]["amp"]
        logits, labels = evaluate(model, loader, device, mode, meta["mean"], meta["std"])
        total = total + logits.softmax(1)
    return total / len(models), labels


def tuned_threshold(checkpoints: list[dict]) -> float:
    """Youden's threshold of the validation fold; 0.5 for more than two classes; the mean for several checkpoints."""
    thresholds = [0.5 if c["threshold"] is None else c["threshold"] for c in checkpoints]
    return sum(thresholds) / len(thresholds)


def write_predictions(path: Path, classes: list[str], cases: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, cases[0])
        writer.writeheader()
        writer.writerows(cases)


def compare(
    path: Path,
    index: list[dict[str, str]],
    classes: list[str],
    labels: Tensor,
    probabilities: Tensor,
    samples: int,
):
    """Paired bootstrap of the AUROC difference to another model's predictions.csv (this one minus that one)."""
    columns = [f"probability_{name}" for name in classes]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            other = {row["id"]: [float(row[c]) for c in columns] for row in csv.DictReader(file)}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: expected predictions.csv of eval.py with id and {columns}") from error
    missing = [row["id"] for row in index if row["id"] not in other]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(index)} images are not in it, the first {missing[0]}"
        )
    theirs = torch.tensor([other[row["id"]] for row in index])

    def difference(rows: Tensor) -> dict[str, float]:
        ours, others = (
            classification_metrics(labels[rows], p[rows])["auroc"] for p in (probabilities, theirs)
        )
        return {"auroc_difference": ours - others}

    return bootstrap(difference, [row["patient"] for row in index], samples)


def evaluate_split(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
):
    """Figures, tables and pictures of a labelled split."""
    meta = checkpoints[0]["meta"]
    classes, index = meta["classes"], read_index(args.data)
    rows = choose_rows(args.data, index, args.split, args.checkpoint, checkpoints)
    index = [index[row] for row in rows]
    batch_size = checkpoints[0]["settings"]["batch_size"]
    loader = make_loader(args.data, in_batches(rows, batch_size), args.workers, device)
    probabilities, labels = average_probabilities(models, checkpoints, loader, device, args.amp)
    threshold = tuned_threshold(checkpoints)
    binary = len(classes) == 2

    def figures(chosen: Tensor) -> dict[str, float]:
        return classification_metrics(labels[chosen], probabilities[chosen], threshold if binary else None)

    summary = bootstrap(figures, [row["patient"] for row in index], args.samples)
    if args.compare:
        summary |= compare(args.compare, index, classes, labels, probabilities, args.samples)
    predictions = (probabilities[:, 1] >= 0.5).long() if binary else probabilities.argmax(1)
    cases = [
        {
            "id": row["id"],
            "patient": row["patient"],
            "label": classes[label],
            "prediction": classes[prediction],
        }
        | {f"probability_{name}": round(p, 6) for name, p in zip(classes, values, strict=True)}
        for row, label, prediction, values in zip(
            index, labels.tolist(), predictions.tolist(), probabilities.tolist(), strict=True
        )
    ]
    run = {
        "command": " ".join(sys.argv), "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint], "threshold": threshold if binary else None,
        "index_sha256": file_sha256(args.data / "index.csv"), "n": len(rows), "split": args.split,
    }  # fmt: skip
    finite = {k: {n: None if math.isnan(v) else v for n, v in s.items()} for k, s in summary.items()}
    (out / "metrics.json").write_text(json.dumps({"summary": finite, "cases": cases, "run": run}, indent=1))
    write_predictions(out / "predictions.csv", classes, cases)
    for name, s in summary.items():
        print(f"{name:32} {s['value']:.4f}  ({s['low']:.4f} to {s['high']:.4f})")

    counts = confusion_matrix(labels, predictions, len(classes))
    draw_confusion_matrix(counts, classes).save(out / "confusion_matrix.png")
    curves = {}
    with open(out / "roc.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "threshold", "false_positive_rate", "true_positive_rate"))
        for k, name in enumerate(classes):
            if binary and k == 0:
                continue
            truth = (labels == k).long()
            fpr, tpr, thresholds = roc_curve(truth, probabilities[:, k])
            writer.writerows((name, *map(float, row)) for row in zip(thresholds, fpr, tpr, strict=True))
            if fpr.isfinite().all() and tpr.isfinite().all():
                curves[f"{name}  AUROC {torch.trapezoid(tpr, fpr):.3f}"] = (fpr, tpr)
    draw_roc(curves).save(out / "roc.png")

    # the most confident mistakes, with what the first model looked at
    confidence = probabilities.gather(1, predictions[:, None])[:, 0]
    wrong = [k for k in confidence.argsort(descending=True).tolist() if predictions[k] != labels[k]][:12]
    tiles = []
    for k in wrong:
        image = XrayDataset(args.data).__getitems__([rows[k]])[0][0]
        caption = [
            cases[k]["id"],
            f"{cases[k]['label']}, predicted {cases[k]['prediction']} {confidence[k]:.3f}",
        ]
        activation = activation_of(models[0], checkpoints[0]["meta"], image, int(predictions[k]), device)
        tiles.append(draw_activation(image, activation, caption))
    if tiles:
        to_pil_image(torchvision.utils.make_grid(tiles, nrow=3)).save(out / "mistakes.png")
    print(
        f"{len(rows)} images, {int((predictions != labels).sum())} wrong at 0.5; figures and pictures in {out}"
    )


def predict_images(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
):
    """Probabilities and overlays for images without labels. Raises DataError at the end if files could not be read."""
    meta = checkpoints[0]["meta"]
    classes = meta["classes"]
    files = []
    for path in args.images:
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not inside:
            raise DataError(f"{path}: no image in it, expected {' '.join(sorted(SUFFIXES))}")
        files += inside

    def load(path: Path) -> Tensor | DataError:
        try:
            return torch.from_numpy(resize(read_image(path)[0], meta["size"], meta["fit"]))[None]
        except DataError as error:
            return error

    loaded = list(in_threads(load, files, max(1, args.workers)))
    bad = [image for image in loaded if isinstance(image, DataError)]
    for error in bad:
        print(error, file=sys.stderr)
    good = [
        (path, image) for path, image in zip(files, loaded, strict=True) if not isinstance(image, DataError)
    ]
    if good:
        images = torch.stack([image for _, image in good])
        batches = images.split(checkpoints[0]["settings"]["batch_size"])
        unknown = torch.zeros(len(images), dtype=torch.long).split(checkpoints[0]["settings"]["batch_size"])
        loader = list(zip(batches, unknown, strict=True))
        probabilities, _ = average_probabilities(models, checkpoints, loader, device, args.amp)
        cases = []
        for k, ((path, image), values) in enumerate(zip(good, probabilities, strict=True)):
            best = int(values.argmax())
            cases.append({"image": str(path), "prediction": classes[best]})
            cases[-1] |= {
                f"probability_{name}": round(float(p), 6) for name, p in zip(classes, values, strict=True)
            }
            activation = activation_of(models[0], meta, image, best, device)
            overlay = draw_activation(image, activation, [str(path), f"{classes[best]} {values[best]:.3f}"])
            to_pil_image(overlay).save(out / f"{k:04d}_{path.stem}.png")
            print(f"{path}: {classes[best]} {values[best]:.3f}")
        write_predictions(out / "predictions.csv", classes, cases)
        print(f"{len(good)} images; predictions.csv and overlays in {out}")
    if bad:
        raise DataError(f"{len(bad)} of {len(files)} files could not be read (named above)")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = choose_device(args.device)
    models, checkpoints = load_models(args.checkpoint, device)
    out = args.out or args.checkpoint[0].parent / (f"eval_{args.split}" if args.data else "predictions")
    out.mkdir(parents=True, exist_ok=True)
    if args.data:
        evaluate_split(args, models, checkpoints, device, out)
    else:
        predict_images(args, models, checkpoints, device, out)


if __name__ == "__main__":
    try:
        main()
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
