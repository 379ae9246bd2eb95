"""Evaluate checkpoints of train.py on images with known boxes, or predict new images.

  python detection/eval.py --data data/heart --checkpoint runs/detection/best.pt --split val
  python detection/eval.py --data data/other --checkpoint runs/a/best.pt runs/b/best.pt --split test
  python detection/eval.py --checkpoint runs/detection/best.pt --images scan.dcm folder_of_images

Known boxes: metrics.json with 95 % bootstrap intervals (over patients), predictions.csv in pixels of the
original images, and gallery.png with the worst boxes first. New images: predictions.csv, and every image with
its box. The boxes of several checkpoints are averaged. Batch size and mixed precision are those of the
training, so that the score it printed comes out again.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
from common.metrics import bootstrap, box_iou, detection_metrics, print_summary
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
RESULTS = (
    "metrics.json",
    "predictions.csv",
    "gallery.png",
)  # of a split; metrics.json is written last
TRUTH, PREDICTION = "#30d158", "#ff9f0a"


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
        help="new images without boxes: files and folders",
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
        parser.error("give either --data CACHE (known boxes) or --images PATH ... (new images)")
    if args.workers < 0 or args.samples < 1:
        parser.error("expected --workers >= 0 and --samples >= 1")
    return args


def load_models(
    paths: list[Path], device: torch.device
) -> tuple[list[torch.nn.Module], list[dict]]:
    """Bare models and their checkpoints. Raises CheckpointError if they do not go together."""
    types = {"arch": str, "head": str, "channels": int}
    checkpoints = [load_run(path, "detection", types, device) for path in paths]
    models = []
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        check_meta(checkpoint["meta"], path)
        check_same(checkpoint["meta"], checkpoints[0]["meta"], path, paths[0])
        settings = checkpoint["settings"]
        known = (
            settings["arch"] in ARCHITECTURES
            and settings["head"] in HEADS
            and settings["amp"] in AMP
        )
        if not known or not 4 <= settings["channels"] <= 1024:
            raise CheckpointError(f"{path}: settings {settings}, of no training")
        model = build_model(settings["arch"], settings["head"], settings["channels"])
        load_weights(model, checkpoint, path)
        models.append(model.to(device, memory_format=torch.channels_last))
    return models, checkpoints


def check_same(meta: dict, expected: dict, path: Path, other: Path) -> None:
    """Raise CheckpointError if images were not prepared in the same way."""
    for name in ("size",):
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


def draw_boxes(
    image: np.ndarray | Tensor, boxes: dict[str, Tensor], caption: list[str]
) -> Image.Image:
    """A gray image uint8 (H, W), scaled to TILE pixels, with boxes by their colour, under its caption."""
    picture = Image.fromarray(np.asarray(image)).convert("RGB")
    scale = TILE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    size = torch.tensor(picture.size * 2)
    pixels = pil_to_tensor(picture)
    for colour, box in boxes.items():
        corners = (box * size).round()[None]
        if (corners[:, 2:] >= corners[:, :2]).all():
            pixels = torchvision.utils.draw_bounding_boxes(pixels, corners, colors=colour, width=2)
    tile = Image.new("RGB", (TILE, TILE + 20 * len(caption)), "black")
    tile.paste(to_pil_image(pixels), ((TILE - picture.width) // 2, 20 * len(caption)))
    for k, line in enumerate(caption):
        ImageDraw.Draw(tile).text((4, 20 * k + 2), shorten(line, 48), "white", font(14))
    return tile


# --- the two modes ---


def predict(
    models: list, checkpoints: list[dict], loader: Iterable, device: torch.device, amp: str | None
) -> tuple[Tensor, Tensor]:
    """Boxes float32 (N, 4) in fractions, averaged over the models, and the true ones."""
    found = []
    for model, checkpoint in zip(models, checkpoints, strict=True):
        meta, mode = checkpoint["meta"], amp or checkpoint["settings"]["amp"]
        pred, boxes = evaluate(model, loader, device, mode, meta["mean"], meta["std"])
        check_finite(pred, f"checkpoint {len(found) + 1}")
        found.append(pred)
    return torch.stack(found).mean(0), boxes


def named(box: Tensor) -> dict[str, float]:
    return dict(zip(BOX, (round(value, 2) for value in box.tolist()), strict=True))


def save_picture(path: Path, picture: Image.Image) -> None:
    with written(path) as temporary:
        picture.save(temporary)


def write_table(path: Path, rows: list[dict]) -> None:
    with written(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def evaluate_split(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Figures, table and gallery of images with known boxes."""
    settings = checkpoints[0]["settings"]
    rows = choose_rows(args.data, args.split, args.checkpoint, checkpoints)
    loader = make_loader(args.data, in_batches(rows, settings["batch_size"]), args.workers, device)
    pred, boxes = predict(models, checkpoints, loader, device, args.amp)
    table = read_index(args.data)
    index = [table[row] for row in rows]
    _, scale = read_boxes(index)
    iou, error = box_iou(pred, boxes), ((pred - boxes) * scale).abs()
    spacing = [
        [float(mm) for mm in row["spacing"].split()[::-1]] or [math.nan] * 2 for row in index
    ]
    error_mm = error * torch.tensor(spacing).repeat(1, 2)
    cases = [
        {
            "id": row["id"],
            "patient": row["patient"],
            "site": row["site"],
            "iou": round(iou[k].item(), 4),
        }
        | named(pred[k] * scale[k])
        | {f"true_{name}": value for name, value in named(boxes[k] * scale[k]).items()}
        for k, row in enumerate(index)
    ]
    groups = sorted({row["site"] for row in index} - {""})
    members = {f"_{name}": torch.tensor([row["site"] == name for row in index]) for name in groups}
    members = {"": torch.ones(len(rows), dtype=torch.bool)} | (members if len(groups) > 1 else {})

    def figures(chosen: Tensor) -> dict[str, float]:
        found = {}
        for name, member in members.items():
            k = chosen[member[chosen]]
            one = detection_metrics(pred[k], boxes[k]) | {"mae_px": error[k].mean().item()}
            if error_mm.isfinite().any():
                one["mae_mm"] = error_mm[k].nanmean().item()
            found |= {f"{figure}{name}": value for figure, value in one.items()}
        return found

    patients = [row["patient"] for row in index]
    summary = bootstrap(figures, patients, args.samples)
    print_summary(summary, patients)
    run = {
        "command": " ".join(sys.argv), "versions": {m.__name__: m.__version__ for m in (torch, torchvision)},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint],
        "index_sha256": file_sha256(args.data / "index.csv"), "split": args.split, "n": len(rows),
    }  # fmt: skip

    tiles, dataset = [], XrayDataset(args.data)
    for k in iou.argsort()[:24].tolist():  # the worst first
        (image,), _ = dataset[[rows[k]]]
        caption = [cases[k]["id"], f"IoU {iou[k]:.3f}   green: truth, orange: prediction"]
        tile = draw_boxes(image[0], {TRUTH: boxes[k], PREDICTION: pred[k]}, caption)
        tiles.append(pil_to_tensor(tile))
    with hold_folder(out):
        clear_results(out, RESULTS)
        write_table(out / "predictions.csv", cases)
        save_picture(out / "gallery.png", to_pil_image(torchvision.utils.make_grid(tiles, nrow=6)))
        write_json(out / "metrics.json", {"summary": summary, "cases": cases, "run": run})
    print(f"{len(rows)} images; figures and pictures in {out}")


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
    """Boxes of images without known ones, and overlays. DataError at the end if some are unreadable."""
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

    def load(path: Path) -> tuple[Tensor, tuple[int, int], tuple[str, ...]] | DataError:
        try:
            picture = read_image(path)
        except DataError as error:
            return error
        image = prepare(picture.gray, meta["size"])
        return torch.from_numpy(image)[None], picture.gray.shape, picture.notes

    good, bad, notes = {}, [], []
    for path, result in zip(files, in_threads(load, files, args.workers), strict=True):
        if isinstance(result, DataError):
            bad.append((str(path), str(result)))
            continue
        image, shape, image_notes = result
        good[path] = (image, shape)
        notes.extend((str(path), note) for note in image_notes)
    report_bad(bad)
    report_notes(notes)
    if good:
        batches = torch.stack([image for image, _ in good.values()]).split(settings["batch_size"])
        loader = [(batch, torch.zeros(len(batch), 4)) for batch in batches]
        pred, _ = predict(models, checkpoints, loader, device, args.amp)
        rows = []
        with hold_folder(out):
            clear_results(out, list_predictions(out))
            for k, (path, (image, (height, width))) in enumerate(good.items()):
                rows.append(
                    {"image": str(path)} | named(pred[k] * torch.tensor([width, height] * 2))
                )
                rows[-1]["overlay"] = overlays[path].name
                answer = " ".join(f"{name} {rows[-1][name]:.0f}" for name in BOX)
                picture = Image.fromarray(image[0].numpy()).resize((width, height))
                overlay = draw_boxes(picture, {PREDICTION: pred[k]}, [str(path), answer])
                save_picture(overlays[path], overlay)
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
