"""Train a U-Net to outline structures: Dice and cross entropy, best checkpoint by Dice of whole volumes.

  python segmentation/train.py                                # no data at hand: a synthetic set
  python segmentation/train.py --data data/hippocampus --dims 3
  python segmentation/train.py --data data/hippocampus --dims 3 --resume     # go on where it was stopped
  torchrun --nproc-per-node 4 segmentation/train.py --data data/hippocampus

--data is a cache of preprocess.py: fold K is validated on, the other folds are trained on. Written to --out:
last.pt, best.pt, log.csv. The same settings, processes and threads give the same result to the bit on a CPU.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import (
    CheckpointError,
    array_bytes,
    count_trained_on,
    file_sha256,
    hold_folder,
    list_trained_on,
    load_checkpoint,
    load_fitting_weights,
    open_run,
    restore,
    save_checkpoint,
    trained_on_index,
    written,
)
from common.metrics import dice_figures, dice_scores
from segmentation import preprocess
from segmentation.dataset import (
    EpochBatches,
    check_case,
    fingerprints,
    make_loader,
    open_cache,
    open_case,
    read_index,
    to_input,
    write_demo,
)
from segmentation.model import build_model, default_patch, predict_volume, segmentation_loss
from segmentation.preprocess import META, DataError, progress, run_command

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEMO = Path("data/demo/segmentation")
# What may differ between a training and its --resume, because it does not change the result.
FREE = ("data", "out", "workers", "init", "device", "compile", "resume", "stop_after", "overwrite")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, metavar="CACHE", help="what preprocess.py wrote (default: a synthetic set)")
    add("--out", type=Path, default=Path("runs/segmentation"), help="(default: %(default)s)")
    add("--fold", type=int, default=0, help="the fold to validate on (default: %(default)s)")
    add("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--dims", type=int, choices=(2, 3), default=2, help="slices or volumes (default: %(default)s)")
    add("--channels", type=int, default=16, help="of the first residual unit (default: %(default)s)")
    add("--patch", type=int, nargs="+", metavar="N", help="voxels (default: the median, up to 2^18 in all)")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from the weights of another training")
    add("--epochs", type=int, default=100, help="(default: %(default)s; synthetic set: 12, 3D: 60)")
    add("--batch-size", type=int, help="per process (default: 16 slices or 2 volumes)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="(default: %(default)s)")
    add("--loss", choices=("dice_ce", "dice"), default="dice_ce", help="(default: %(default)s)")
    add("--augment", type=float, default=1.0, help="strength, 0 = off (default: %(default)s)")
    add("--mirror", action="store_true", help="also mirror along every axis")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, default="off", help="mixed precision (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    add("--stop-after", type=int, metavar="N", help="stop after N epochs, on the schedule of --epochs")
    add("--overwrite", action="store_true", help="replace the training in --out")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.set_defaults(epochs=12 if args.dims == 2 else 60)
        args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = {2: 16, 3: 2}[args.dims]
    least = {"fold": 0, "workers": 0, "epochs": 1, "batch_size": 1, "augment": 0, "seed": 0, "stop_after": 1}
    for name, low in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}, expected {low} or more")
    if args.seed >= 2**64 or args.augment > 10:
        parser.error("expected --seed below 2^64 and --augment of at most 10")
    if not (0 < args.lr < math.inf and 0 <= args.weight_decay < math.inf and args.channels >= 2):
        parser.error("expected --lr > 0, --weight-decay >= 0 and --channels >= 2")
    if args.patch and (len(args.patch) != args.dims or min(args.patch) < 4):
        parser.error(f"--patch {args.patch}, expected one number for each of the --dims, 4 or more")
    return args


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process; auto is cuda or cpu. Raises DataError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by build of torch
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; torchrun says by environment variables which one this is."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size, device = int(os.environ.get("WORLD_SIZE", "1")), choose_device(device_name, local_rank)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world_size


def make_demo() -> None:
    """Write the synthetic raw set and send it through preprocess.py."""
    print("no --data: a synthetic set. Its organs are random blobs: the scores mean nothing medically.")
    write_demo(DEMO / "raw")
    preprocess.main(["--data", f"{DEMO}/raw", "--out", f"{DEMO}/cache", "--overwrite"])


def write_log(path: Path, log: list[dict]) -> None:
    """log.csv as a whole, from the checkpoint's copy: after --resume it has no rows of lost epochs."""
    with written(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        writer.writerows(log)


def load_data(
    cache: Path, args: argparse.Namespace, device: torch.device, rank: int, world_size: int
) -> tuple[dict, DataLoader, list[str]]:
    """What the model needs of meta.json, the loader of this process, and the names of its validation cases.

    Sets the default of --patch. Raises DataError if a side has no cases, or less than one batch to train on.
    """
    meta, index = open_cache(cache)
    meta = {k: v for k, v in meta.items() if k in META}
    rows = {"training": [], "validation": []}
    for k, row in enumerate(index):
        if row["fold"] != "test":
            rows["validation" if row["fold"] == str(args.fold) else "training"].append(k)
    for side in rows:
        if not rows[side]:
            raise DataError(f"{cache}: fold {args.fold} leaves no {side} cases")
        for k in rows[side]:
            check_case(cache, index[k]["id"], meta)
    args.patch = args.patch or default_patch(args.dims, meta)
    batches = EpochBatches(cache, args.patch, rows["training"], args.batch_size, args.seed, rank, world_size)
    if len(batches) == 0:
        raise DataError(
            f"{cache}: {len(batches.draws)} training patches, less than one batch of --batch-size"
        )
    train_loader = make_loader(cache, args.patch, batches, args.workers, device)
    return meta, train_loader, [index[k]["id"] for k in rows["validation"]]


def finite(loss: float, epoch: int) -> float:
    """The loss, or DataError if it is not a number to go on with."""
    if not math.isfinite(loss):
        raise DataError(f"epoch {epoch + 1}: the loss is {loss}; lower --lr, or try another --amp")
    return loss


def check_finite(outputs: Tensor, where: object) -> None:
    """Raise DataError if a network gave NaN or infinite values: no score of them would mean anything."""
    if not all(value.isfinite() for value in outputs.aminmax()):
        found = f"{where}: the network gives NaN or infinite values"
        raise DataError(f"{found}; lower --lr, or try another --amp")


def record_training(cache: Path, fold: int, init: dict) -> dict:
    """Hashes of the patients and images that are trained on, with those of --init: eval.py refuses them."""
    sides = {"training": [], "validation": []}
    for k, row in enumerate(read_index(cache)):
        if row["fold"] != "test":
            sides["validation" if row["fold"] == str(fold) else "training"].append(k)
    if init and not init.get("trained_on"):
        print("note: --init does not say what it was trained on: make sure that it was not on the test set")
    elif init:
        seen = count_trained_on(init["trained_on"], *fingerprints(cache, sides["validation"]))
        if seen:
            print(f"note: --init was trained on {len(seen)} of {len(sides['validation'])} validation images: "
                  "the scores below are too high, and eval.py will refuse them")  # fmt: skip
    return list_trained_on(*fingerprints(cache, sides["training"]), init)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero (Loshchilov & Hutter, ICLR 2017)."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019) without decay for biases and norms; fused: never reads back."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, fused=True)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, cache: Path, names: list[str], device: torch.device, settings: dict, meta: dict
) -> Tensor:
    """Dice float64 (N, classes - 1) of the cases on the cache's grid, shared out among the processes.

    Takes the bare model: the wrapper would wait for the same number of batches on every process.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # otherwise the score is not that of the model rank 0 saves
            dist.broadcast(buffer, 0)
    model.eval()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scores = {}
    for name in names[rank::world_size]:
        image, mask = open_case(cache, name)
        probabilities = predict_volume(model, image, settings["patch"], meta["slice_axis"], device,
                                       AMP[settings["amp"]], settings["batch_size"])  # fmt: skip
        check_finite(probabilities, name)
        truth, prediction = torch.from_numpy(np.array(mask)), probabilities.argmax(0)
        scores[name] = dice_scores(truth, prediction, len(meta["classes"]))
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, scores)
        scores = {name: score for part in parts for name, score in part.items()}
    return torch.stack([scores[name] for name in names])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # device and processes
    device, rank, world_size = start_processes(args.device)
    say, show = (print, progress) if rank == 0 else (lambda _: None,) * 2
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    if args.amp == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        say("note: this processor has no bf16 arithmetic, --amp off is many times faster here")

    # data
    cache = args.data or DEMO / "cache"
    if args.data is None and rank == 0:
        make_demo()
    if world_size > 1:
        dist.barrier()
    meta, train_loader, val_names = load_data(cache, args, device, rank, world_size)
    spacing = train_loader.dataset.spacing
    steps_per_epoch = len(train_loader)
    steps = args.epochs * steps_per_epoch

    # model, optimizer
    torch.manual_seed(args.seed)
    model = build_model(meta, args.channels, args.patch).to(device)
    init = load_checkpoint(args.init, device) if args.init and not args.resume else {}
    if init and (random := load_fitting_weights(model, init, args.init)):
        say(f"note: {args.init} lacks or has in other shapes: {', '.join(random)}; these start at random")
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    scaler = GradScaler(device.type, enabled=args.amp == "fp16")

    # resume
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"world_size": world_size, "index": file_sha256(cache / "index.csv")}
    settings |= {"array_bytes": array_bytes(cache)}
    start, best, log, trained_on, last = 0, -math.inf, [], None, args.out / "last.pt"
    if args.resume:
        start, best, log, trained_on = restore(last, settings, meta, model, optimizer, scaler)
    if rank == 0 and trained_on is None:
        trained_on = record_training(cache, args.fold, init)
    train_model = model
    if world_size > 1:
        train_model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    if args.compile:
        train_model = torch.compile(train_model)
    say(f"torch {torch.__version__}, {json.dumps(settings)}")
    say(f"{steps_per_epoch} steps an epoch, {len(val_names)} validation cases, {device}")

    # training; rank 0 keeps other runs out of the folder it saves to
    with hold_folder(args.out) if rank == 0 else nullcontext():
        if rank == 0 and not args.resume:
            of_demo = args.data is None and trained_on_index(last, settings["index"])  # which nobody misses
            open_run(args.out, args.overwrite or of_demo)
        for epoch in range(start, min(args.epochs, args.stop_after or args.epochs)):
            train_loader.batch_sampler.epoch = epoch
            began, total = time.perf_counter(), torch.zeros((), device=device)
            model.train()
            for step, (images, masks) in enumerate(train_loader, 1):
                rng = np.random.default_rng((args.seed, epoch, step, rank))
                images, masks = to_input(images, masks, device, rng, spacing, args.augment, args.mirror)
                lr = learning_rate(epoch * steps_per_epoch + step - 1, steps, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                    logits = train_model(images)
                loss = segmentation_loss(logits.float(), masks, args.loss)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                total += loss.detach()
                if step % 20 == 0:  # seldom, because it waits for the device
                    mean_loss = finite(total.item() / step, epoch)
                    rate = step / (time.perf_counter() - began)
                    eta = timedelta(seconds=int((steps - epoch * steps_per_epoch - step) / rate))
                    at = f"epoch {epoch + 1}/{args.epochs}  {step}/{steps_per_epoch}  loss {mean_loss:.3f}"
                    show(f"{at}  {rate * args.batch_size * world_size:.0f} img/s  eta {eta}")

            # validation and checkpoints
            if world_size > 1:
                dist.all_reduce(total)
            train_loss = finite(total.item() / (steps_per_epoch * world_size), epoch)
            trained = time.perf_counter() - began
            figures = dice_figures(evaluate(model, cache, val_names, device, settings, meta), meta["classes"])
            log.append({"epoch": epoch + 1, "lr": lr, "train_loss": train_loss}
                       | {f"val_{name}": value for name, value in figures.items()}
                       | {"train_seconds": trained, "seconds": time.perf_counter() - began})  # fmt: skip
            if rank == 0:
                show("")
                say("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items()))
                checkpoint = {"task": "segmentation", "model": model.state_dict(), "meta": meta,
                              "settings": settings, "epoch": epoch + 1, "trained_on": trained_on,
                              "figures": figures}  # fmt: skip
                # NaN: there is no structure in any mask and none was found, which is all right
                score = 1.0 if math.isnan(figures["dice"]) else figures["dice"]
                if score >= best:  # of equals the later one, whose learning rate is lower
                    best = score
                    save_checkpoint(args.out / "best.pt", checkpoint)
                if epoch == 0:
                    last.unlink(missing_ok=True)  # of a training that is replaced: its best.pt is gone now
                checkpoint |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                save_checkpoint(last, checkpoint | {"best": best, "log": log})
                write_log(args.out / "log.csv", log)
    if world_size > 1:
        dist.destroy_process_group()
    say(f"next: python segmentation/eval.py --data {cache} --checkpoint {args.out}/best.pt --split val")


if __name__ == "__main__":
    run_command(main, CheckpointError)
