"""Train a ResNet to tell classes of X-rays apart: cross entropy, best checkpoint by validation AUROC.

  python classification/train.py                                    # no data at hand: a synthetic set
  python classification/train.py --data data/rsna --epochs 15 --amp bf16 --class-weights balanced
  python classification/train.py --data data/rsna --resume           # go on where it was stopped
  torchrun --nproc-per-node 4 classification/train.py --data data/rsna

--data is a cache of preprocess.py. Fold K is validated on, the others are trained on. Written to --out: last.pt and
best.pt, log.csv. On the CPU the result is the same to the bit for the same settings, processes and threads.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification import preprocess
from classification.dataset import EpochBatches, in_batches, make_loader, read_index, to_input, write_demo
from classification.model import ARCHITECTURES, PRETRAINED_MEAN, PRETRAINED_STD, build_model
from classification.preprocess import DataError, progress, read_meta
from common.checkpoint import (
    CheckpointError,
    check_settings,
    file_sha256,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from common.metrics import classification_metrics, youden_threshold

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROCESS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
DEMO = Path("data/demo/classification")
# What may change between a training and its --resume without changing the result.
FREE = ("data", "out", "workers", "init", "device", "compile", "resume", "stop_after", "overwrite")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw_help = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw_help)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, metavar="CACHE", help="what preprocess.py wrote (default: a synthetic set)"
    )
    data.add_argument("--out", type=Path, default=Path("runs/classification"), help="(default: %(default)s)")
    data.add_argument("--fold", type=int, default=0, help="fold to validate on (default: %(default)s)")
    data.add_argument("--workers", type=int, default=2, help="loading processes (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--arch", choices=ARCHITECTURES, default="resnet18", help="(default: %(default)s)")
    training.add_argument(
        "--pretrained", action="store_true", help="start from torchvision's ImageNet weights"
    )
    training.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from the weights of another training"
    )
    training.add_argument("--epochs", type=int, default=15, help="(default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=32, help="per process (default: %(default)s)")
    training.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    training.add_argument("--weight-decay", type=float, default=0.05, help="(default: %(default)s)")
    training.add_argument("--label-smoothing", type=float, default=0.0, help="(default: %(default)s)")
    training.add_argument(
        "--class-weights", choices=("none", "balanced"), default="none", help="(default: %(default)s)"
    )
    training.add_argument(
        "--augment", type=float, default=1.0, help="strength, 0 = off (default: %(default)s)"
    )
    training.add_argument("--flip", action="store_true", help="mirror every other image")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    run.add_argument("--amp", choices=AMP, default="off", help="mixed precision (default: %(default)s)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    run.add_argument(
        "--stop-after", type=int, metavar="N", help="stop after N epochs; the schedule stays that of --epochs"
    )
    run.add_argument("--overwrite", action="store_true", help="replace the training in --out")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.set_defaults(epochs=8, overwrite=not args.resume)
        args = parser.parse_args(argv)
    for name, low in {
        "epochs": 1,
        "batch_size": 2,
        "workers": 0,
        "fold": 0,
        "seed": 0,
        "augment": 0,
        "stop_after": 1,
    }.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}, expected {low} or more")
    if not args.lr > 0 or not 0 <= args.label_smoothing < 1 or args.weight_decay < 0:
        parser.error("expected --lr > 0, --weight-decay >= 0 and 0 <= --label-smoothing < 1")
    if args.init and args.pretrained:
        parser.error("--init and --pretrained both set the first weights: choose one")
    return args


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process. Raises DataError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by build of torch
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; torchrun says by environment variables which one this is."""
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in PROCESS.items())
    device = choose_device(device_name, local_rank)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world_size


def make_demo() -> None:
    """Write the synthetic raw set and send it through preprocess.py."""
    print(
        "no --data: a synthetic set. Its opacities are blobs drawn at random, so scores mean nothing medically."
    )
    write_demo(DEMO / "raw")
    preprocess.main(["--data", f"{DEMO}/raw", "--out", f"{DEMO}/cache", "--size", "96", "--overwrite"])


def open_run(out: Path, overwrite: bool) -> None:
    """Make the output folder. Raises DataError if it holds a training that nobody said may go."""
    if (out / "last.pt").exists() and not overwrite:
        raise DataError(f"{out}: holds a training; use --resume, --overwrite, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("last.pt", "best.pt", "log.csv"):
        (out / name).unlink(missing_ok=True)


def write_log(path: Path, log: list[dict]) -> None:
    """log.csv as a whole, from the checkpoint's copy: after --resume it has no rows of lost epochs."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        writer.writerows(log)


def split_rows(index: list[dict[str, str]], fold: int, classes: list[str]) -> tuple[list[int], list[int]]:
    """Row numbers for training and for validation. Raises DataError if a class is missing on either side."""
    val = [k for k, row in enumerate(index) if row["fold"] == str(fold)]
    train = [k for k, row in enumerate(index) if row["fold"] not in ("test", str(fold))]
    for name, rows in (("training", train), ("validation", val)):
        missing = [c for k, c in enumerate(classes) if not any(index[row]["label"] == str(k) for row in rows)]
        if missing:
            raise DataError(
                f"--fold {fold}: no {name} images of class {', '.join(missing)}; choose another fold"
            )
    return train, val


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine to zero (Loshchilov & Hutter, ICLR 2017)."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019); no decay for biases and norms. Fused: no reads of the device."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, loader: DataLoader, device: torch.device, amp: str, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, C) and labels int64 (N,) of the images of all processes' loaders, on the CPU.

    Takes the bare model: the wrapper would wait for the same number of batches on every process.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # otherwise the score is not that of the model rank 0 saves
            dist.broadcast(buffer, 0)
    model.eval()
    logits, labels = [], []
    for images, truth in loader:
        images = to_input(images, device, mean, std)
        with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
            logits.append(model(images).float().cpu())
        labels.append(truth)
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (logits, labels))
        logits, labels = ([batch for part in parts for batch in part[k]] for k in (0, 1))
    return torch.cat(logits), torch.cat(labels)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # device and processes
    device, rank, world_size = start_processes(args.device)
    say = print if rank == 0 else lambda *_: None
    torch.set_float32_matmul_precision("high")  # TF32 where there is any

    # data
    cache = args.data or DEMO / "cache"
    if args.data is None and rank == 0:
        make_demo()
    if world_size > 1:
        dist.barrier()
    meta = {k: v for k, v in read_meta(cache).items() if k in ("classes", "size", "fit", "mean", "std")}
    if args.pretrained:
        meta |= {"mean": PRETRAINED_MEAN, "std": PRETRAINED_STD}
    index = read_index(cache)
    train_rows, val_rows = split_rows(index, args.fold, meta["classes"])
    batches = EpochBatches(train_rows, args.batch_size, args.seed, rank, world_size)
    if len(batches) == 0:
        raise DataError(
            f"{cache}: {len(train_rows)} training images are less than one batch; lower --batch-size"
        )
    train_loader = make_loader(cache, batches, args.workers, device)
    val_loader = make_loader(
        cache, in_batches(val_rows[rank::world_size], args.batch_size), args.workers, device
    )
    steps = args.epochs * len(batches)

    # model, loss weights, optimizer
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(meta["classes"]), meta["size"], args.pretrained and not args.resume)
    model = model.to(device, memory_format=torch.channels_last)
    if args.init and not args.resume:
        load_weights(model, load_checkpoint(args.init, device), args.init)
    counts = torch.bincount(torch.tensor([int(index[row]["label"]) for row in train_rows]))
    balanced = len(train_rows) / (
        len(counts) * counts
    )  # mean 1 over the training set, so that the loss is a mean
    weights = (balanced if args.class_weights == "balanced" else torch.ones(len(counts))).to(device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # resume
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"world_size": world_size, "index": file_sha256(cache / "index.csv")}
    start, best, log, last = 0, -math.inf, [], args.out / "last.pt"
    if args.resume:
        checkpoint = load_checkpoint(last, device)
        check_settings(checkpoint["settings"], settings, last)
        load_weights(model, checkpoint, last)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start, best, log = checkpoint["epoch"], checkpoint["best"], checkpoint["log"]
    elif rank == 0:
        open_run(args.out, args.overwrite)
    train_model = model
    if world_size > 1:
        train_model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    if args.compile:
        train_model = torch.compile(train_model)
    say(f"torch {torch.__version__}, torchvision {torchvision.__version__}, settings {json.dumps(settings)}")
    say(
        f"{len(train_rows)} training, {len(val_rows)} validation images (fold {args.fold}), {steps} steps, {device}"
    )

    # training
    for epoch in range(start, min(args.epochs, args.stop_after or args.epochs)):
        began, total, batches.epoch = time.perf_counter(), torch.zeros((), device=device), epoch
        model.train()
        for step, (images, labels) in enumerate(train_loader, 1):
            rng = np.random.default_rng((args.seed, epoch, step, rank))
            images = to_input(images, device, meta["mean"], meta["std"], rng, args.augment, args.flip)
            labels = labels.to(device, non_blocking=True)
            lr = learning_rate(epoch * len(batches) + step - 1, steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                logits = train_model(images)
            loss = F.cross_entropy(
                logits.float(), labels, reduction="none", label_smoothing=args.label_smoothing
            )
            loss = (loss * weights[labels]).mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += loss.detach()
            if step % 20 == 0 and rank == 0 and sys.stdout.isatty():  # .item() waits for the device
                rate = step / (time.perf_counter() - began)
                eta = timedelta(seconds=int((steps - epoch * len(batches) - step) / rate))
                speed = f"{rate * args.batch_size * world_size:.0f} img/s  eta {eta}"
                progress(
                    f"epoch {epoch + 1}/{args.epochs}  {step}/{len(batches)}  loss {total.item() / step:.3f}  {speed}"
                )

        # validation and checkpoints
        if world_size > 1:
            dist.all_reduce(total)
        train_loss = total.item() / (step * world_size)
        if not math.isfinite(train_loss):
            raise DataError(
                f"epoch {epoch + 1}: the loss is {train_loss}; lower --lr, or use another --amp than {args.amp}"
            )
        logits, labels = evaluate(model, val_loader, device, args.amp, meta["mean"], meta["std"])
        figures = classification_metrics(labels, logits.softmax(1))
        log.append({
            "epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "val_loss": F.cross_entropy(logits, labels).item(),
            "val_accuracy": figures["accuracy"], "val_auroc": figures["auroc"], "seconds": time.perf_counter() - began,
        })  # fmt: skip
        if rank == 0:
            progress("")
            say("  ".join(f"{k} {v:.4g}" for k, v in log[-1].items()))
            binary = len(meta["classes"]) == 2
            threshold = youden_threshold(labels, logits.softmax(1)[:, 1]) if binary else None
            checkpoint = {"model": model.state_dict(), "meta": meta, "settings": settings, "epoch": epoch + 1,
                          "figures": figures, "threshold": threshold}  # fmt: skip
            if figures["auroc"] >= best:  # of equals the later one: its learning rate is lower
                best = figures["auroc"]
                save_checkpoint(args.out / "best.pt", checkpoint)
            state = {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "best": best,
                "log": log,
            }
            save_checkpoint(last, checkpoint | state)
            write_log(args.out / "log.csv", log)
    if world_size > 1:
        dist.destroy_process_group()
    say(f"next: python classification/eval.py --data {cache} --checkpoint {args.out}/best.pt --split val")


if __name__ == "__main__":
    try:
        main()
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
