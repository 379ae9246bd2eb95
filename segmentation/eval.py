"""Evaluate checkpoints of train.py on cases with masks, or outline the structures in new images.

  python segmentation/eval.py --data data/hippocampus --checkpoint runs/segmentation/best.pt --split val
  python segmentation/eval.py --data data/other --checkpoint runs/a/best.pt runs/b/best.pt --split test
  python segmentation/eval.py --checkpoint runs/segmentation/best.pt --images scan.nii.gz dicom_folder

With masks: metrics.json with 95 % bootstrap intervals (over patients), cases.csv, predictions/ID.nii.gz on
the grid of the original file, where all figures but dice_cache are taken, and pictures: worst.png (image,
truth, prediction on the slice with the most errors, worst case first), worst.gif. dice_cache, on the grid of
the cache, is the score that train.py printed. The probabilities of several checkpoints are averaged.

New images (.nii, .nii.gz, folders of them, or a folder with one DICOM series): NIfTI masks, volumes.csv and
pictures. nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ... are the channels of one image. Nothing is written
onto an image, or onto a file that is no earlier result.
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
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
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
    write_json,
    written,
)
from common.metrics import bootstrap, dice_scores, print_summary, segmentation_metrics
from segmentation.dataset import check_case, fingerprints, open_cache, open_case, read_index
from segmentation.model import build_model, predict_volume
from segmentation.preprocess import (
    DataError,
    check_grid,
    check_meta,
    check_outputs,
    check_range,
    count_kinds,
    explain,
    from_grid,
    list_volumes,
    one_line,
    orient,
    progress,
    read_channels,
    read_header,
    read_meta,
    read_nifti,
    run_command,
    split_channel,
    to_grid,
    volume_name,
    write_mask,
)
from segmentation.train import AMP, check_finite, choose_device

PREDICTION = (
    b"prediction of segmentation/eval.py"  # stands in the header of masks: they may be replaced
)
TILE = 256  # pixels of one picture in a gallery
COLOURS = ("#ff4040", "#40c0ff", "#ffd040", "#60e060", "#d070ff", "#ff9040", "#40e0d0", "#ff80c0")


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
        help="new images without masks: files and folders",
    )
    add(
        "--tta",
        action="store_true",
        help="average over mirrored copies; for trainings with --mirror",
    )
    add(
        "--out",
        type=Path,
        help="(default: eval_val, eval_test or predictions beside the checkpoint)",
    )
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, help="mixed precision (default: as in the training)")
    add("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give either --data CACHE (with masks) or --images PATH ... (new images)")
    if args.samples < 1:
        parser.error("expected --samples >= 1")
    return args


def load_models(
    paths: list[Path], device: torch.device
) -> tuple[list[torch.nn.Module], list[dict]]:
    """Bare models and their checkpoints. Raises CheckpointError if they do not go together."""
    types = {"channels": int, "patch": list, "mirror": bool}
    checkpoints = [load_run(path, "segmentation", types, device) for path in paths]
    models = []
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        check_meta(checkpoint["meta"], path)
        check_same(checkpoint["meta"], checkpoints[0]["meta"], path, paths[0])
        settings = checkpoint["settings"]
        if settings["amp"] not in AMP or not 2 <= settings["channels"] <= 1024:
            raise CheckpointError(f"{path}: settings {settings}, of no training")
        patch = settings["patch"]
        if len(patch) not in (2, 3) or not all(
            type(side) is int and 1 <= side <= 4096 for side in patch
        ):
            raise CheckpointError(f"{path}: patch {patch}, expected two or three numbers of voxels")
        model = build_model(checkpoint["meta"], settings["channels"], patch)
        load_weights(model, checkpoint, path)
        models.append(model.to(device).eval())
    return models, checkpoints


def check_same(meta: dict, expected: dict, path: Path, other: Path) -> None:
    """Raise CheckpointError if images were not prepared in the same way."""
    for name in (
        "classes",
        "values",
        "channels",
        "resample",
        "spacing",
        "slice_axis",
        "normalisation",
    ):
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


def draw_panels(
    image: np.ndarray,
    maps: dict[str, np.ndarray | None],
    meta: dict,
    position: int,
    caption: list[str],
) -> Tensor:
    """A slice of an image (C, X, Y, Z) once for each map of classes (X, Y, Z), side by side: uint8 (3, H, W).

    The axes of RAS go to the right and up, with the proportions they have in mm; the names of the maps above.
    """
    axis = meta["slice_axis"]
    plane = np.take(image[0], position, axis).astype(np.float32).T[::-1]
    low, high = np.percentile(plane, (0.5, 99.5))
    gray = (
        torch.from_numpy(255 * ((plane - low) / (high - low or 1)).clip(0, 1))
        .byte()
        .expand(3, -1, -1)
    )
    across, up = (s for k, s in enumerate(meta["spacing"]) if k != axis)
    mm = (gray.shape[1] * up, gray.shape[2] * across)
    size = [max(1, round(TILE * length / max(mm))) for length in mm]
    panels = []
    for labels in maps.values():
        panel = resize(gray, size)
        if labels is not None:
            cut = torch.from_numpy(np.take(labels, position, axis).T[::-1].copy())[None]
            cut = resize(cut, size, InterpolationMode.NEAREST)
            masks = torch.cat([cut == k for k in range(1, len(meta["classes"]))])
            colours = [COLOURS[k % len(COLOURS)] for k in range(len(masks))]
            panel = draw_segmentation_masks(panel, masks, alpha=0.45, colors=colours)
        panels += [panel, torch.zeros(3, size[0], 2, dtype=torch.uint8)]
    pair = torch.cat(panels[:-1], 2)
    head = Image.new("RGB", (pair.shape[2], 20 * (len(caption) + 1)), "black")
    for k, line in enumerate(caption):
        ImageDraw.Draw(head).text(
            (4, 20 * k + 2), shorten(line, pair.shape[2] // 8), "white", font(14)
        )
    for k, name in enumerate(maps):
        ImageDraw.Draw(head).text(
            (k * (size[1] + 2) + 4, head.height - 18), name, "white", font(14)
        )
    return torch.cat([pil_to_tensor(head), pair], 1)


def fullest(marked: np.ndarray, axis: int) -> int:
    """The slice with the most marked voxels of (X, Y, Z)."""
    return int(marked.sum(tuple(k for k in range(3) if k != axis)).argmax())


def write_gif(path: Path, image: np.ndarray, maps: dict, meta: dict, caption: str) -> None:
    """All slices of a volume as an animation, at most some 100 of them."""
    count = image.shape[meta["slice_axis"] + 1]
    frames = [
        to_pil_image(draw_panels(image, maps, meta, k, [f"{caption}  slice {k + 1}/{count}"]))
        for k in range(0, count, math.ceil(count / 100))
    ]
    with written(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=100, loop=0)


def write_gallery(path: Path, tiles: list[Tensor]) -> None:
    """Tiles of different sizes below each other in three columns."""
    height, width = max(tile.shape[1] for tile in tiles), max(tile.shape[2] for tile in tiles)
    tiles = [
        torch.nn.functional.pad(t, [0, width - t.shape[2], 0, height - t.shape[1]]) for t in tiles
    ]
    save_picture(path, to_pil_image(torchvision.utils.make_grid(tiles, nrow=3)))


# --- the two modes ---


def predict(
    models: list,
    checkpoints: list[dict],
    image: np.ndarray,
    device: torch.device,
    amp: str | None,
    tta: bool,
) -> Tensor:
    """Class probabilities float16 (K, X, Y, Z) of an image (C, X, Y, Z), averaged over the models.

    Raises DataError if it shall be mirrored (`tta`) and a training was not.
    """
    if tta and not all(checkpoint["settings"]["mirror"] for checkpoint in checkpoints):
        raise DataError(
            "--tta: a checkpoint has not seen mirrored images, expected trainings with --mirror"
        )
    total = None
    for model, checkpoint in zip(models, checkpoints, strict=True):
        settings, axis = checkpoint["settings"], checkpoint["meta"]["slice_axis"]
        mode = AMP[amp or settings["amp"]]
        part = predict_volume(
            model, image, settings["patch"], axis, device, mode, settings["batch_size"], tta
        )
        part /= len(models)
        total = part if total is None else total.add_(part)
    return total


def save_picture(path: Path, picture: Image.Image) -> None:
    with written(path) as temporary:
        picture.save(temporary)


@contextmanager
def named_memory(path: Path) -> Iterator[None]:
    """Turn a lack of memory, of NumPy or of torch, into a DataError that names the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        if (
            isinstance(error, RuntimeError) and "memory" not in reason
        ):  # on a CPU torch has no type for it
            raise
        raise explain(path, MemoryError(reason)) from error


def write_table(path: Path, rows: list[dict]) -> None:
    with written(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def judge(
    truth: np.ndarray, prediction: np.ndarray, affine: np.ndarray, classes: list[str]
) -> dict[str, float]:
    """Every figure of a case as NAME_CLASS for each foreground class; NAME is the mean over the classes."""
    spacing = nib.affines.voxel_sizes(affine).tolist()
    found = {}
    for k, name in enumerate(classes[1:], 1):
        masks = torch.from_numpy(truth == k), torch.from_numpy(prediction == k)
        found[name] = segmentation_metrics(*masks, spacing)
    names, means = list(found[classes[1]]), {}
    for n in names:
        means[n] = (
            torch.tensor([one[n] for one in found.values()], dtype=torch.float64).nanmean().item()
        )
    return means | {f"{n}_{name}": one[n] for n in names for name, one in found.items()}


def list_results(out: Path) -> list[str]:
    """The files that an evaluation of a split left in the folder."""
    names = ["metrics.json", "cases.csv", "worst.png", "worst.gif"]
    if (out / "cases.csv").is_file():
        with open(out / "cases.csv", newline="", encoding="utf-8") as file:
            names += [f"predictions/{Path(row['id']).name}.nii.gz" for row in csv.DictReader(file)]
    return names


def read_truth(
    cache: Path, name: str, values: list[int]
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Class numbers uint8 (X, Y, Z) of a case's mask as it was, and the affine and header of its file."""
    path = cache / "volumes" / f"{name}.truth.nii.gz"
    try:
        mask, affine, header = read_nifti(path)
    except DataError:
        raise
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        raise explain(path, error) from error
    if mask.ndim != 3 or not np.isin(mask, values).all():
        raise DataError(f"{path}: expected a volume of the values {values}; preprocess again")
    return np.searchsorted(values, mask).astype(np.uint8), affine, header


def evaluate_split(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Figures, tables, masks and pictures of a split."""
    meta = checkpoints[0]["meta"]
    classes = meta["classes"]
    rows, index = (
        choose_rows(args.data, args.split, args.checkpoint, checkpoints),
        read_index(args.data),
    )
    names = [index[row]["id"] for row in rows]
    results = [out / "predictions" / f"{name}.nii.gz" for name in names]
    inputs = [args.data / "volumes" / f"{name}.truth.nii.gz" for name in names]
    check_outputs([*results, out / "metrics.json", out / "cases.csv"], [*inputs, *args.checkpoint])
    for name in names:
        check_case(args.data, name, meta)
    cases, tiles, worst, empty = [], [], None, Counter()
    with hold_folder(out):
        clear_results(out, list_results(out))
        (out / "predictions").mkdir(exist_ok=True)
        for k, row in enumerate(rows, 1):
            name = index[row]["id"]
            image, mask = open_case(args.data, name)
            truth, affine, header = read_truth(args.data, name, meta["values"])
            with named_memory(args.data / "volumes" / f"{name}.image.npy"):
                probabilities = predict(models, checkpoints, image, device, args.amp, args.tta)
                check_finite(probabilities, name)
                labels = from_grid(probabilities.numpy(), truth.shape, affine)
            with written(out / "predictions" / f"{name}.nii.gz") as path:
                write_mask(path, np.array(meta["values"], np.uint8)[labels], affine, header)
            figures = judge(truth, labels, affine, classes)
            for c in range(1, len(classes)):
                empty[int((truth == c).any()) + int((labels == c).any())] += 1

            on_grid = probabilities.argmax(0).byte()
            cached = (
                dice_scores(torch.from_numpy(np.array(mask)), on_grid, len(classes))
                .nanmean()
                .item()
            )
            cases.append(
                {"id": name, "group": index[row]["group"]} | figures | {"dice_cache": cached}
            )
            on_grid = on_grid.numpy()
            position = fullest(mask != on_grid, meta["slice_axis"])
            caption = [name, f"dice {figures['dice']:.3f}  hd95 {figures['hd95_mm']:.1f} mm"]
            maps = {"truth": mask, "prediction": on_grid}
            tiles.append(draw_panels(image, {"image": None} | maps, meta, position, caption))
            if worst is None or figures["dice"] < worst[0] or math.isnan(worst[0]):
                worst = figures["dice"], image, maps, name
            progress(f"{k}/{len(rows)}  {name}  dice {figures['dice']:.3f}")
        progress("")
        order = (
            torch.tensor([case["dice"] for case in cases]).nan_to_num(2.0).argsort()[:12].tolist()
        )
        write_gallery(out / "worst.png", [tiles[k] for k in order])
        _, image, maps, name = worst
        write_gif(out / "worst.gif", image, maps, meta, name)
        write_report(args, cases, classes, empty, out)
    print(
        f"{len(rows)} cases; {empty[0]} structures absent in both, {empty[1]} in one; all of it in {out}"
    )


def write_report(
    args: argparse.Namespace, cases: list[dict], classes: list[str], empty: Counter, out: Path
) -> None:
    """cases.csv, and the summary with its intervals, printed and in metrics.json."""
    write_table(out / "cases.csv", cases)
    names = [name for name in cases[0] if name not in ("id", "group")]
    table = torch.tensor([[case[name] for name in names] for case in cases], dtype=torch.float64)

    def figures_of(chosen: Tensor) -> dict[str, float]:
        return dict(zip(names, table[chosen].nanmean(0).tolist(), strict=True))

    groups = [case["group"] for case in cases]
    summary = bootstrap(figures_of, groups, args.samples)
    print_summary(summary, groups)
    run = {
        "command": " ".join(sys.argv), "versions": {m.__name__: m.__version__ for m in (torch, nib)},
        "checkpoint_sha256": [file_sha256(path) for path in args.checkpoint],
        "index_sha256": file_sha256(args.data / "index.csv"), "split": args.split, "n": len(cases),
        "classes": classes, "tta": args.tta, "both_empty": empty[0], "one_empty": empty[1],
    }  # fmt: skip
    write_json(out / "metrics.json", {"summary": summary, "cases": cases, "run": run})


@dataclass
class NewImage:
    """A new image, and the name of its mask."""

    name: str
    paths: list[Path]  # one file or DICOM folder with all channels, or one file a channel
    numbers: list[int]  # which channels the files are, if they are one each


def list_files(paths: list[Path]) -> list[Path]:
    """Files as they are; of a folder its .nii and .nii.gz files, or the folder itself as a DICOM series."""
    files = []
    for path in paths:
        volumes, others = list_volumes(path) if path.is_dir() else ([], [])
        if volumes and others:
            found = count_kinds(dict.fromkeys(others))
            print(
                f"note: {path}: left out, because no .nii or .nii.gz: {found}, such as {others[0].name}"
            )
        files += volumes or [path]
    return list({os.path.abspath(path): path for path in files}.values())  # each once


def find_images(paths: list[Path], channels: int) -> list[NewImage]:
    """The images among files and folders, with names of masks that do not collide.

    For a network of several channels NAME_0000, NAME_0001, ... (nnU-Net) of one folder are one image.
    """
    images: dict[Path, NewImage] = {}
    for path in list_files(paths):
        place = Path(os.path.abspath(path))
        name = place.stem if path.is_file() and not is_volume(path) else volume_name(place)
        stem, number = split_channel(name)
        if number is None or channels == 1 or not is_one_channel(path):
            images[place] = NewImage(name or "image", [path], [])
        else:
            one = images.setdefault(place.with_name(stem), NewImage(stem, [], []))
            one.paths.append(path)
            one.numbers.append(number)
    if channels == 1:
        note_channels({image.name for image in images.values()})
    name_outputs(list(images.values()))
    return list(images.values())


def note_channels(names: set[str]) -> None:
    """Note names like nnU-Net's channel files, which a network of one channel takes for an image each."""
    pairs = sorted(name for name in names if name.endswith("_0000") and f"{name[:-1]}1" in names)
    if pairs:
        print(f"note: {pairs[0]} and {pairs[0][:-1]}1 are two images to a network of one channel")


def is_volume(path: Path) -> bool:
    """Whether a path is called .nii or .nii.gz."""
    return volume_name(path) != path.name


def is_one_channel(path: Path) -> bool:
    """Whether a file can be one channel of nnU-Net: it is not 4D itself (or cannot be read, and is named)."""
    try:
        return path.is_file() and len(read_header(path).get_data_shape()) < 4
    except (DataError, OSError, EOFError, zlib.error):
        return True


def name_outputs(images: list[NewImage]) -> None:
    """Make the names differ, even without case: by their folders' names, and where those do not, a number.

    Of a.nii and a.nii.gz the latter has the mask a.nii.gz, or people would take it for the other's.
    """
    same_name = defaultdict(list)
    for image in sorted(images, key=lambda image: image.paths[0].name != f"{image.name}.nii.gz"):
        same_name[image.name.casefold()].append(image)
    taken = {name for name, group in same_name.items() if len(group) == 1}
    for group in same_name.values():
        folders = [image.paths[0].resolve().parent.name for image in group]
        for image, folder in zip(group, folders, strict=True):
            if len(set(folders)) > 1:
                image.name = f"{folder}_{image.name}"
            if len(group) > 1:
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


def check_results(out: Path, images: list[NewImage]) -> None:
    """Raise DataError if an image, or a file that is no earlier result, would be overwritten."""
    inputs = [path for image in images for path in image.paths]
    masks = [out / f"{image.name}.nii.gz" for image in images]
    table = out / "volumes.csv"
    check_outputs([*masks, table, out / "overlays.png", out / "first.gif"], inputs)
    if out.resolve() in [path.resolve() for path in inputs]:
        raise DataError(f"{out}: is the folder of a DICOM series that is read; give another --out")
    foreign = [mask for mask in masks if mask.exists() and not is_prediction(mask)]
    if table.exists() and not table.read_bytes().startswith(b"image,mask,"):
        foreign.append(table)
    if foreign:
        raise DataError(
            f"{foreign[0]}: exists and is no earlier result of this script; give another --out"
        )


def is_prediction(path: Path) -> bool:
    """Whether a file is a mask written by this script."""
    try:
        return bytes(read_header(path)["descrip"]).startswith(PREDICTION)
    except (DataError, OSError, EOFError, zlib.error):
        return False


def read_image(
    image: NewImage, meta: dict
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header | None, tuple]:
    """An image on the common grid, float16 (C, X, Y, Z); affine, header and shape of its file.

    Prints what is odd. Raises DataError if the model cannot take it.
    """
    notes: list[tuple[str, str]] = []
    path = image.paths[0]
    if image.numbers and sorted(image.numbers) != list(range(len(meta["channels"]))):
        found = ", ".join(f"{number:04d}" for number in sorted(image.numbers))
        raise DataError(
            f"{path}: channel files {found}, expected one for each of {meta['channels']}"
        )
    volume, affine, header = read_channels(image.paths, notes)
    for what, detail in notes:
        print(f"note: {path}: {what}" + (f" ({detail})" if detail else ""))
    if volume.shape[3] != len(meta["channels"]):
        hint = "; time is no channel" if volume.shape[3] > len(meta["channels"]) else ""
        raise DataError(f"{path}: {volume.shape[3]} channels, expected {meta['channels']}{hint}")
    shape = volume.shape[:3]
    orientation, spacing = orient(affine)
    in_ras = tuple(shape[axis] for axis in np.argsort(orientation[:, 0]))
    check_grid(path, in_ras, spacing, meta)
    on_grid = to_grid(volume, affine, meta)
    check_range(path, on_grid)
    return on_grid, affine, header, shape


def predict_images(
    args: argparse.Namespace, models: list, checkpoints: list[dict], device: torch.device, out: Path
) -> None:
    """Masks and pictures of images without masks. DataError at the end if some cannot be predicted."""
    meta = checkpoints[0]["meta"]
    warnings.filterwarnings("ignore", module="pydicom")  # harmless header slips, one line per file
    images = find_images(args.images, len(meta["channels"]))
    check_results(out, images)
    tiles, bad, done = [], 0, 0
    with hold_folder(out):
        for image in images:
            try:
                row, on_grid, labels = predict_image(image, args, models, checkpoints, device, out)
            except DataError as error:
                bad += 1
                print(error, file=sys.stderr)
                continue
            append_row(
                out / "volumes.csv", row, is_first=done == 0
            )  # what a stopped run has done stays
            done += 1
            maps = {"image": None, "prediction": labels}
            if done <= 30:
                position = fullest(labels > 0, meta["slice_axis"])
                tiles.append(draw_panels(on_grid, maps, meta, position, [image.name]))
            if done == 1:
                write_gif(out / "first.gif", on_grid, maps, meta, image.name)
            volumes = [f"{name} {row[f'ml_{name}']} ml" for name in meta["classes"][1:]]
            print(one_line(f"{row['image']}: {'  '.join(volumes)}"))
        if done:
            write_gallery(out / "overlays.png", tiles)
            print(f"{done} images; masks, volumes.csv and pictures in {out}")
    if bad:
        raise DataError(f"{bad} of {len(images)} images could not be read (named above)")


def append_row(path: Path, row: dict, is_first: bool) -> None:
    """Add a row to a CSV file; the first one replaces the file and writes the header."""
    with open(path, "w" if is_first else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_first:
            writer.writeheader()
        writer.writerow(row)


def predict_image(
    image: NewImage,
    args: argparse.Namespace,
    models: list,
    checkpoints: list[dict],
    device: torch.device,
    out: Path,
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Write the mask of an image: its row of volumes.csv, image (C, X, Y, Z) and classes on the grid.

    Raises DataError if it cannot be read or needs more memory than there is.
    """
    meta = checkpoints[0]["meta"]
    with named_memory(image.paths[0]):
        on_grid, affine, header, shape = read_image(image, meta)
        probabilities = predict(models, checkpoints, on_grid, device, args.amp, args.tta)
        check_finite(probabilities, image.paths[0])
        labels = from_grid(probabilities.numpy(), shape, affine)
    mask = f"{image.name}.nii.gz"
    with written(out / mask) as path:
        write_mask(path, np.array(meta["values"], np.uint8)[labels], affine, header, PREDICTION)
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000  # ml
    counts = np.bincount(labels.reshape(-1), minlength=len(meta["classes"]))
    row = {"image": ";".join(map(str, image.paths)), "mask": mask}
    for name, count in zip(meta["classes"][1:], counts[1:], strict=True):
        row[f"ml_{name}"] = round(float(voxel * count), 3)
    return row, on_grid, probabilities.argmax(0).byte().numpy()


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
