"""Evaluate checkpoints of train.py on a labelled split, or predict new images.

  python classification/eval.py --data data/rsna --checkpoint runs/classification/best.pt --split val
  python classification/eval.py --data data/other --checkpoint runs/a/best.pt runs/b/best.pt --split test
  python classification/eval.py --checkpoint runs/classification/best.pt --images scan.dcm folder_of_images

Labelled: metrics.json with 95 % bootstrap intervals (over patients), predictions.csv, roc.csv, and pictures:
confusion_matrix.png, roc.png, mistakes.png. New images: predictions.csv, overlays of class activation maps.
The probabilities of several checkpoints are averaged. Batch size and mixed precision are those of the
training, so that the score it printed comes out again.
"""

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification import preprocess
from classification.dataset import (
    XrayDataset,
    fingerprints,
    in_batches,
    make_loader,
    open_cache,
    read_index,
    to_input,
)
from classification.model import ARCHITECTURES, build_model, class_activation_maps
from classification.preprocess import (
    DataError,
    check_meta,
    check_outputs,
    count_files,
    find_images,
    in_threads,
    list_files,
    one_line,
    positive_class,
    read_image,
    read_meta,
    report_bad,
    report_notes,
    run_command,
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
    write_json,
    written,
)
from common.metrics import (
    bootstrap,
    classification_metrics,
    confusion_matrix,
    print_summary,
    roc_curve,
    youden_threshold,
)

TILE = 256  # pixels of one picture in a gallery
# What a labelled split leaves in --out; metrics.json is written last.
RESULTS = (
    "metrics.json",
    "predictions.csv",
    "roc.csv",
    "roc.png",
    "confusion_matrix.png",
    "mistakes.png",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="one or more of train.py's")
    add("--data", type=Path, metavar="CACHE", help="what preprocess.py wrote")
    add(
        "--split",
        choices=("val", "test"),
        default="val",
        help="val (default): the fold left out in training",
    )
    add(
        "--images",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="new images without labels: files and folders",
    )
    add(
        "--compare",
        type=Path,
        metavar="CSV",
        help="predictions.csv of another model for the same images",
    )
    add(
        "--out",
        type=Path,
        help="(default: eval_val, eval_test or predictions beside the checkpoint)",
    )
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, help="mixed precision (default: as in the training)")
    add("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    add("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (labelled) or --images PATH ... (new images)")
    if args.compare and not args.data:
        parser.error("--compare needs labels: give --data")
    if args.workers < 0 or args.samples < 1:
        parser.error("expected --workers >= 0 and --samples >= 1")
    return args


def load_models(
    paths: list[Path], device: torch.device
) -> tuple[list[torch.nn.Module], list[dict]]:
    """Bare models and their checkpoints. Raises CheckpointError if they do not go together."""
    types = {"arch": str}
    checkpoints = [load_run(path, "classification", types, device) for path in paths]
    models = []
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        check_meta(checkpoint["meta"], path)
        check_same(checkpoint["meta"], checkpoints[0]["meta"], path, paths[0])
        meta, settings = checkpoint["meta"], checkpoint["settings"]
        if settings["amp"] not in AMP or settings["arch"] not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: settings {settings['amp']} {settings['arch']}, of no training"
            )
        if len(meta["classes"]) == 2 and type(checkpoint.get("threshold")) is not float:
            raise CheckpointError(
                f"{path}: threshold {checkpoint.get('threshold')}, expected a number"
            )
        model = build_model(settings["arch"], len(meta["classes"]), meta["size"])
        load_weights(model, checkpoint, path)
        models.append(model.to(device, memory_format=torch.channels_last))
    return models, checkpoints


def check_same(meta: dict, expected: dict, path: Path, other: Path) -> None:
    """Raise CheckpointError if images were not prepared in the same way."""
    for name in ("classes", "size", "fit"):
        if meta[name] != expected[name]:
            raise CheckpointError(f"{path}: {name} {meta[name]}, but {other} has {expected[name]}")


def choose_rows(cache: Path, split: str, paths: list[Path], checkpoints: list[dict]) -> list[int]:
    """Row numbers of the split. Raises DataError if it is empty, or if a checkpoint was trained on it."""
    meta, index = open_cache(cache)
    check_same(meta, checkpoints[0]["meta"], cache, paths[0])
    folds = {checkpoint["settings"]["fold"] for checkpoint in checkpoints}
    if split == "val":
        sha256 = file_sha256(cache / "index.csv")
        if any(checkpoint["settings"]["index"] != sha256 for checkpoint in checkpoints):
            raise DataError(
                f"{cache}: not the cache of the training, so its folds differ; use --split test"
            )
        if len(folds) > 1:
            raise DataError(
                f"checkpoints of folds {sorted(folds)}: they trained on each other's validation images"
            )
    wanted = "test" if split == "test" else str(folds.pop())
    rows = [k for k, row in enumerate(index) if row["fold"] == wanted]
    if not rows:
        raise DataError(
            f"{cache}: no {split} rows; preprocess.py makes them by --test-fraction or --like"
        )
    check_leakage(cache, rows, paths, checkpoints)
    return rows


def check_leakage(cache: Path, rows: list[int], paths: list[Path], checkpoints: list[dict]) -> None:
    """Raise DataError if a checkpoint, or its --init, was trained on images or patients of these rows.

    Patients whom an official split has on both sides are only counted: such splits are kept as they are.
    """
    index, overlaps = read_index(cache), read_meta(cache).get("overlaps", {})
    patients, images = fingerprints(cache, rows)
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if not checkpoint.get("trained_on"):
            print(
                f"note: {path} does not say what it was trained on: make sure that it was on other images"
            )
            continue
        settings, official = checkpoint["settings"], set()
        of_this_cache = settings["index"] == file_sha256(cache / "index.csv")
        if of_this_cache and overlaps.get("patients on both sides of an official split"):
            others = [
                k
                for k, row in enumerate(index)
                if row["fold"] not in ("test", str(settings["fold"]))
            ]
            official = set(fingerprints(cache, others)[0])
        seen = count_trained_on(checkpoint["trained_on"], patients, images)
        refused = [k for k in seen if patients[k] not in official]
        if len(seen) > len(refused):
            count = len(seen) - len(refused)
            print(
                f"note: {count} of {len(rows)} images are of patients in training, by the official split"
            )
        if refused:
            name = index[rows[refused[0]]]["id"]
            found = f"{path}: trained on {len(refused)} of these {len(rows)} images or patients ({name})"
            raise DataError(
                f"{found}; take others, or, if only names are alike, change them in index.csv"
            )


# --- pictures ---


def shorten(text: str, length: int) -> str:
    """The beginning and the end of a text that is too long for its line."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_confusion_matrix(counts: Tensor, classes: list[str]) -> Image.Image:
    """Counts and row percentages, darker blue for a larger share of the row."""
    cell, margin = 130, 150
    side = margin + cell * len(classes)
    picture = Image.new("RGB", (side + 20, side + 20), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((margin + cell * len(classes) / 2, 80), "predicted", "black", font(18), anchor="mm")
    draw.text((10, margin - 30), "truth", "black", font(18), anchor="lm")
    if positive := positive_class(classes):
        draw.text((10, 30), f"positive: {positive[:32]}", "black", font(18), anchor="lm")
    for i, name in enumerate(classes):
        middle = margin + (i + 0.5) * cell
        draw.text((middle, margin - 30), name[:14], "black", font(16), anchor="mm")
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
        draw.text(
            (margin - 8, margin + side - side * k / 5),
            f"{k / 5:.1f}",
            "black",
            font(14),
            anchor="rm",
        )
    draw.line((margin, margin + side, margin + side, margin), "#aaaaaa")
    draw.text(
        (margin + side / 2, margin + side + 40), "1 - specificity", "black", font(16), anchor="mm"
    )
    draw.text((margin, margin - 20), "sensitivity", "black", font(16), anchor="lm")
    colours = (
        "#1f4e9c",
        "#c0392b",
        "#2e8b57",
        "#8e44ad",
        "#d68910",
        "#117a8b",
        "#7b241c",
        "#5d6d7e",
    )
    for k, (name, (fpr, tpr)) in enumerate(curves.items()):
        colour = colours[k % len(colours)]
        points = [
            (margin + side * x, margin + side * (1 - y))
            for x, y in zip(fpr.tolist(), tpr.tolist(), strict=True)
        ]
        draw.line(points, colour, 3)
        draw.text(
            (margin + side - 10, margin + side - 20 * (len(curves) - k)),
            name,
            colour,
            font(16),
            anchor="rm",
        )
    return picture


def draw_activation(
    model: torch.nn.Module,
    meta: dict,
    image: Tensor,
    target: int,
    caption: list[str],
    device: torch.device,
) -> Tensor:
    """An image, uint8 (1, S, S), beside itself under its class activation map: uint8 (3, H, 2 * TILE)."""
    with torch.no_grad():
        _, maps = class_activation_maps(
            model, to_input(image[None], device, meta["mean"], meta["std"])
        )
    gray = resize(image.float(), [TILE, TILE]).expand(3, -1, -1)
    heat = resize(maps[:, target].cpu().clamp(min=0), [TILE, TILE], antialias=False)
    heat = 0.6 * heat / heat.max().clamp(min=1e-6)
    red = torch.tensor([255.0, 60.0, 0.0])[:, None, None]
    head = Image.new("RGB", (2 * TILE, 20 * len(caption)), "black")
    for k, line in enumerate(caption):
        ImageDraw.Draw(head).text((4, 20 * k + 2), shorten(line, 64), "white", font(14))
    pair = torch.cat([gray, gray * (1 - heat) + red * heat], 2)
    return torch.cat([pil_to_tensor(head), pair.round().byte()], 1)


# --- the two modes ---


def predict(
    models: list, checkpoints: list[dict], loader: Iterable, device: torch.device, amp: str | None
) -> tuple[Tensor, Tensor]:
    """Softmax float32 (N, C), averaged over the models, and labels int64 (N,)."""
    probabilities = []
    for model, checkpoint in zip(models, checkpoints, strict=True):
        meta, mode = checkpoint["meta"], amp or checkpoint["settings"]["amp"]
        logits, labels = evaluate(model, loader, device, mode, meta["mean"], meta["std"])
        check_finite(logits, f"checkpoint {len(probabilities) + 1}")
        probabilities.append(logits.softmax(1))
    return torch.stack(probabilities).mean(0), labels


def named(classes: list[str], probabilities: Tensor) -> dict[str, float]:
    pairs = zip(classes, probabilities.tolist(), strict=True)
    return {f"probability_{name}": probability for name, probability in pairs}


def save_picture(path: Path, picture: Image.Image) -> None:
    with written(path) as temporary:
        picture.save(temporary)


def write_table(path: Path, rows: list[dict]) -> None:
    with written(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_predictions(path: Path, cases: list[dict], classes: list[str]) -> Tensor:
    """Probabilities float64 (N, C) of another model's predictions.csv, in the order of `cases`.

    Raises DataError unless it has the same images, each once, with the same labels and of the same split.
    """
    if not path.is_file():
        raise DataError(f"{path}: not a file, expected predictions.csv of eval.py")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        table = {row["id"]: [float(row[f"probability_{name}"]) for name in classes] for row in rows}
        labels = {row["id"]: (row["label"], row.get("split")) for row in rows}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{path}: expected predictions.csv of eval.py for the classes {classes}"
        ) from error
    expected = {case["id"]: case for case in cases}
    missing, others = expected.keys() - table.keys(), table.keys() - expected.keys()
    if missing or others:
        found = f"{path}: {len(missing)} of {len(cases)} images are missing, and {len(others)} are others"
        raise DataError(f"{found}, such as {min(missing | others)}; expected the same images")
    if len(rows) != len(table):
        raise DataError(f"{path}: {len(rows)} rows for {len(table)} images, expected one for each")
    for name, (label, split) in labels.items():
        if label != expected[name]["label"] or split not in (expected[name]["split"], None):
            found = f"{path}: {name} is {label} of {split}"
            raise DataError(
                f"{found}, expected {expected[name]['label']} of {expected[name]['split']}"
            )
    probabilities = torch.tensor([table[case["id"]] for case in cases], dtype=torch.float64)
    # older tables have six digits; a NaN is in no range
    if not ((probabilities >= 0).all() and ((probabilities.sum(1) - 1).abs() < 1e-4).all()):
        raise DataError(f"{path}: expected probabilities from 0 to 1 that add up to 1")
    return probabilities


def choose_threshold(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device
) -> float:
    """The threshold of the tuned figures: Youden's on the validation fold.

    One checkpoint has it. Of several their mean probability is tuned, if --data has the validation fold that
    they have in common; otherwise it is the mean of their own thresholds.
    """
    own = [checkpoint["threshold"] for checkpoint in checkpoints]
    settings = [checkpoint["settings"] for checkpoint in checkpoints]
    of_this_cache = {one["index"] for one in settings} == {file_sha256(args.data / "index.csv")}
    if len(own) > 1 and of_this_cache and len({one["fold"] for one in settings}) == 1:
        rows = choose_rows(args.data, "val", args.checkpoint, checkpoints)
        loader = make_loader(
            args.data, in_batches(rows, settings[0]["batch_size"]), args.workers, device
        )
        probabilities, labels = predict(models, checkpoints, loader, device, args.amp)
        return youden_threshold(labels, probabilities[:, 1])
    if len(own) > 1:
        print(
            "note: no validation images in common: the tuned threshold is the mean of their own ones"
        )
    return sum(own) / len(own)


def evaluate_split(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Figures, tables and pictures of a labelled split."""
    settings, classes = checkpoints[0]["settings"], checkpoints[0]["meta"]["classes"]
    rows = choose_rows(args.data, args.split, args.checkpoint, checkpoints)
    loader = make_loader(args.data, in_batches(rows, settings["batch_size"]), args.workers, device)
    probabilities, labels = predict(models, checkpoints, loader, device, args.amp)
    threshold = None
    predictions = probabilities.argmax(1)
    if len(classes) == 2:
        threshold = choose_threshold(args, models, checkpoints, device)
        predictions = (probabilities[:, 1] >= 0.5).long()
    index = read_index(args.data)
    cases = [
        {"id": index[row]["id"], "patient": index[row]["patient"], "label": classes[labels[k]]}
        | {"prediction": classes[predictions[k]]}
        | named(classes, probabilities[k])
        | {"split": args.split}
        for k, row in enumerate(rows)
    ]
    theirs = read_predictions(args.compare, cases, classes) if args.compare else None

    def figures(chosen: Tensor) -> dict[str, float]:
        return classification_metrics(labels[chosen], probabilities[chosen], threshold)

    def difference(chosen: Tensor) -> dict[str, float]:
        ours, other = (
            classification_metrics(labels[chosen], p[chosen])["auroc"]
            for p in (probabilities, theirs)
        )
        return {"auroc_difference": ours - other}

    patients = [case["patient"] for case in cases]
    summary = bootstrap(figures, patients, args.samples)
    if theirs is not None:
        summary |= bootstrap(difference, patients, args.samples)
    positive = positive_class(classes)
    if positive:
        print(f"positive class: {positive}")
    print_summary(summary, patients)
    run = {
        "command": " ".join(sys.argv), "versions": {m.__name__: m.__version__ for m in (torch, torchvision)},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint],
        "index_sha256": file_sha256(args.data / "index.csv"), "split": args.split, "n": len(rows),
        "classes": classes, "positive_class": positive, "threshold_tuned": threshold,
    }  # fmt: skip

    wrong = (predictions != labels).nonzero()[:, 0]
    worst = wrong[probabilities[wrong].amax(1).argsort(descending=True)][:12].tolist()
    tiles, dataset = [], XrayDataset(args.data)
    for k in worst:  # the most confident mistakes, with what the first model looked at
        (image,), _ = dataset[[rows[k]]]
        answer = f"predicted {cases[k]['prediction']} {probabilities[k].max():.3f}"
        caption = [cases[k]["id"], f"{cases[k]['label']}, {answer}"]
        tiles.append(
            draw_activation(
                models[0], checkpoints[0]["meta"], image, int(predictions[k]), caption, device
            )
        )
    counts = confusion_matrix(labels, predictions, len(classes))
    with hold_folder(out):
        clear_results(out, RESULTS)
        write_table(out / "predictions.csv", cases)
        save_picture(out / "confusion_matrix.png", draw_confusion_matrix(counts, classes))
        write_roc(out, labels, probabilities, classes)
        if tiles:
            save_picture(
                out / "mistakes.png", to_pil_image(torchvision.utils.make_grid(tiles, nrow=3))
            )
        write_json(out / "metrics.json", {"summary": summary, "cases": cases, "run": run})
    print(f"{len(rows)} images, {len(wrong)} wrong; figures and pictures in {out}")


def write_roc(out: Path, labels: Tensor, probabilities: Tensor, classes: list[str]) -> None:
    """roc.csv and roc.png: the curve of the positive class, or of every class against the rest."""
    points, curves = [], {}
    for k in range(1 if len(classes) == 2 else 0, len(classes)):
        fpr, tpr, thresholds = roc_curve((labels == k).long(), probabilities[:, k])
        for point in zip(thresholds.tolist(), fpr.tolist(), tpr.tolist(), strict=True):
            points.append(
                dict(zip(("class", "threshold", "fpr", "tpr"), (classes[k], *point), strict=True))
            )
        if fpr.isfinite().all() and tpr.isfinite().all():  # not with one class only
            role = "positive class " if len(classes) == 2 else ""
            curves[f"{role}{classes[k]}  AUROC {torch.trapezoid(tpr, fpr):.3f}"] = (fpr, tpr)
    write_table(out / "roc.csv", points)
    save_picture(out / "roc.png", draw_roc(curves))


def list_images(paths: list[Path]) -> list[Path]:
    """The files, and the images anywhere in the folders. Raises DataError for a folder without any."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        images = find_images(path)
        others = sorted(set(list_files(path)) - set(images))
        if not images:
            found = count_files(others, path) or "nothing"
            raise DataError(
                f"{path}: no image in it, found {found}, expected DICOM, JPEG, PNG or TIFF"
            )
        if others:
            print(f"note: {path}: passed over: {count_files(others, path)}")
        files += images
    return files


def list_predictions(out: Path) -> list[str]:
    """The files that an earlier prediction left in the folder, by its table."""
    if not (out / "predictions.csv").is_file():
        return []
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        overlays = [row.get("overlay") or "" for row in csv.DictReader(file)]
    return ["predictions.csv", *(Path(overlay).name for overlay in overlays if overlay)]


def predict_images(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Probabilities and overlays of images without labels. DataError at the end if some are unreadable."""
    meta, settings = checkpoints[0]["meta"], checkpoints[0]["settings"]
    files = list_images(args.images)
    for folder in args.images:
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise DataError(
                f"--out {out}: lies in {folder}, where it would be read as images; choose another"
            )
    # long names are cut: file systems end at 255 letters
    overlays = {path: out / f"{k:04d}_{path.stem[:100]}.png" for k, path in enumerate(files)}
    check_outputs([out / "predictions.csv", *overlays.values()], files)

    def load(path: Path) -> tuple[Tensor, tuple[str, ...]] | DataError:
        try:
            picture = read_image(path)
        except DataError as error:
            return error
        image = preprocess.resize(picture.gray, meta["size"], meta["fit"])
        return torch.from_numpy(image)[None], picture.notes

    good, bad, notes = {}, [], []
    for path, result in zip(files, in_threads(load, files, args.workers), strict=True):
        if isinstance(result, DataError):
            bad.append((str(path), str(result)))
            continue
        good[path], image_notes = result
        notes.extend((str(path), note) for note in image_notes)
    report_bad(bad)
    report_notes(notes)
    if good:
        batches = torch.stack(list(good.values())).split(settings["batch_size"])
        loader = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
        probabilities, _ = predict(models, checkpoints, loader, device, args.amp)
        rows = []
        with hold_folder(out):
            clear_results(out, list_predictions(out))
            for k, (path, image) in enumerate(good.items()):
                best = int(probabilities[k].argmax())
                answer = f"{meta['classes'][best]} {probabilities[k, best]:.3f}"
                overlay = draw_activation(models[0], meta, image, best, [str(path), answer], device)
                save_picture(overlays[path], to_pil_image(overlay))
                row = {"image": str(path), "prediction": meta["classes"][best]}
                rows.append(
                    row
                    | named(meta["classes"], probabilities[k])
                    | {"overlay": overlays[path].name}
                )
                print(one_line(f"{path}: {answer}"))
            write_table(out / "predictions.csv", rows)
        print(f"{len(good)} images; predictions.csv and overlays in {out}")
    if bad:
        raise DataError(f"{len(bad)} of {len(files)} files could not be read (named above)")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = choose_device(args.device)
    models, checkpoints = load_models(args.checkpoint, device)
    out = args.out or args.checkpoint[0].parent / (
        f"eval_{args.split}" if args.data else "predictions"
    )
    (evaluate_split if args.data else predict_images)(args, models, checkpoints, device, out)


if __name__ == "__main__":
    run_command(main, CheckpointError)
