"""Train a ResNet to classify chest X-rays: cross entropy, best checkpoint by AUROC.

  python classification/train.py                          # without data: trains on a synthetic set
  python classification/train.py --data data/rsna --class-weights balanced
  python classification/train.py --data data/rsna --out runs/rsna --resume
  torchrun --nproc-per-node 4 classification/train.py --data data/rsna

--data is a cache of preprocess.py, or raw data, which are preprocessed first, to OUT_cache. Fold K
is the validation set, the others (--fold -1: all) are the training set. Written to --out, a new
folder: last.pt, best.pt, log.csv, log.png. On a CPU, the same settings and numbers of processes and
threads give bit-identical weights.
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification import dataset, preprocess
from classification import model as network
from classification.dataset import XrayDataset, in_batches, make_loader, to_input
from classification.model import ARCHITECTURES, LOSSES, build_model, class_weights
from common import checkpoint
from common.checkpoint import DataError, Run, free_name, new_folder, progress, run_command
from common.metrics import classification_metrics

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOGGED = ("accuracy", "balanced_accuracy", "auroc")  # the metrics in log.csv
DEMO = Path("data/demo/classification")
# Options that --resume may change, because they do not change the result
FREE = ("data", "out", "workers", "init", "device", "compile", "resume")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="a cache of preprocess.py, or raw data (default: synthetic)")
    add("--out", type=Path, help="new folder of the run (default: runs/classification, -2, ...)")
    add("--fold", type=within(int, -1, 4), default=0, help="to validate on, -1: none (default: 0)")
    add("--workers", type=within(int, 0, 256), default=2, help="loading processes (default: 2)")
    add = parser.add_argument_group("training").add_argument
    add("--arch", choices=ARCHITECTURES, default="resnet18", help="network (default: resnet18)")
    add("--channels", type=within(int, 16, 1024), default=64, help="of stage 1 (default: 64)")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from the weights of another run")
    add("--epochs", type=within(int, 1), help="passes over the data (default: 15; synthetic: 8)")
    add("--batch-size", type=within(int, 2), default=32, help="images per process (default: 32)")
    add("--lr", type=within(float, 1e-15, 1e9), default=1e-3, help="at its peak (default: 0.001)")
    add("--weight-decay", type=within(float, 0, 1e9), default=0.05, help="of AdamW (default: 0.05)")
    add("--loss", choices=LOSSES, default="ce", help="smooth_ce: smoothed labels (default: ce)")
    add("--class-weights", choices=("none", "balanced"), default="none", help="balanced: by rarity")
    add("--augment", type=within(float, 0, 10), default=1.0, help="strength, 0: none (default: 1)")
    add("--flip", action="store_true", help="also mirror half of the training images")
    add("--seed", type=within(int, 0, 2**64 - 1), default=0, help="of random draws (default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, default="off", help="mixed precision (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--resume", action="store_true", help="resume the interrupted run in --out, or the newest")
    args = parser.parse_args(argv)
    args.out = args.out or free_name(Path("runs/classification"), newest=args.resume)
    args.epochs = args.epochs or (15 if args.data else 8)
    if not args.resume and args.out.exists() and any(args.out.iterdir()):
        raise DataError(f"{args.out}: exists already; --resume it, or give another --out")
    if args.pretrained and args.channels != 64:
        parser.error(f"--channels {args.channels}, expected 64 with --pretrained")
    if args.init and args.pretrained:
        parser.error("--init and --pretrained both set the initial weights: choose one")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, rank, world_size = start_processes(args.device, args.amp)
    is_main = rank == 0  # the process that prints and saves

    # Data
    cache = prepare_cache(args, world_size)
    meta, index = dataset.open_cache(cache)
    train_rows = [k for k, row in enumerate(index) if row["fold"] not in ("test", str(args.fold))]
    val_rows = [k for k, row in enumerate(index) if row["fold"] == str(args.fold)]
    counts = dataset.count_classes(cache, args.fold, meta, index)  # training images of each class
    images = XrayDataset(cache, dataset.read_labels(index, meta))
    batches = dataset.EpochBatches(train_rows, args.batch_size, args.seed, rank, world_size)
    train_loader = make_loader(images, batches, args.workers, device)
    share = np.array_split(val_rows, world_size)[rank].tolist()  # each image exactly once
    val_loader = make_loader(images, in_batches(share, args.batch_size), args.workers, device)
    steps_per_epoch = len(train_loader)

    # Model, loss, optimizer
    torch.manual_seed(args.seed)  # initial weights
    model = build_model(args.arch, meta, args.channels, args.pretrained and not args.resume)
    model = model.to(device, memory_format=torch.channels_last)
    mean_std = network.PRETRAINED_MEAN_STD if args.pretrained else None
    weights = class_weights(args.class_weights, counts).to(device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    scaler = GradScaler(device.type, enabled=args.amp == "fp16")

    # A new run, or the state of the run to resume
    settings = collect_settings(args, cache, world_size)
    run = Run(args.out, "val_auroc", model, optimizer, scaler)
    saved = {"task": "classification", "meta": meta, "settings": settings, "metrics": {}}
    run.begin(args, settings, meta, index, is_main)
    if is_main:
        print(f"training on {device}, {dataset.describe_counts(counts, meta)}")
    train_model = wrap_model(model, device, world_size, args.compile)

    for epoch in range(run.epoch, args.epochs):
        start = time.perf_counter()
        loss_sum = torch.zeros((), device=device)  # kept on the device: .item() would synchronise
        train_loader.sampler.epoch = epoch  # decides the order
        model.train()  # evaluate() leaves eval mode on
        for step, (images, labels) in enumerate(train_loader, 1):
            # These four decide all random numbers, so a resumed run draws the same ones.
            rng = np.random.default_rng((args.seed, epoch, step, rank))
            labels = labels.to(device, non_blocking=True)
            images = to_input(images, device, mean_std, rng, args.augment, args.flip)
            lr = set_learning_rate(optimizer, args, epoch, step, steps_per_epoch)
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                logits = train_model(images)  # (B, C, S, S) to (B, classes)
            loss = LOSSES[args.loss](logits.float(), labels, weights)  # float32, whatever --amp is
            scaler.scale(loss).backward()  # fp16: scaled up, or small gradients become 0
            scaler.unscale_(optimizer)  # to clip the true gradients, not the scaled ones
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # limits the damage of a bad batch
            scaler.step(optimizer)  # skipped if fp16 overflowed
            scaler.update()  # adapts the scale of the fp16 loss
            optimizer.zero_grad()  # backward() would add to them
            loss_sum += loss.detach()
            if is_main and step % 20 == 0:  # every 20 steps: .item() synchronises
                where = f"epoch {epoch + 1}/{args.epochs}  {step}/{steps_per_epoch}"
                progress(f"{where}  loss {mean_loss(loss_sum, step, epoch):.4g}")

        # Validation on the whole fold, split among the processes
        train_loss = mean_loss(loss_sum, steps_per_epoch, epoch, world_size)
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss}
        if args.fold >= 0:
            logits, labels = evaluate(model, val_loader, device, args.amp, mean_std)
            check_finite(logits, f"epoch {epoch + 1}")
            probabilities = network.to_probabilities(logits, meta["multi_label"])  # (N, classes)
            metrics = classification_metrics(labels, probabilities, names=meta["classes"])
            row |= {"val_loss": LOSSES[args.loss](logits, labels, weights.cpu()).item()}
            row |= {f"val_{name}": metrics[name] for name in LOGGED}
            ids = [index[k]["id"] for k in val_rows]
            validation = {"ids": ids, "labels": labels, "probabilities": probabilities}
            saved |= {"metrics": metrics, "validation": validation}  # for thresholds in eval.py
        if is_main:
            row |= {"seconds": time.perf_counter() - start}
            run.save(row, saved["metrics"].get("auroc"), saved)
    finish(run, cache, args.fold, is_main, world_size)


def within(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}, expected {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its message
    return convert


def start_processes(device_name: str, amp: str) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; torchrun passes them in environment variables."""
    rank = int(os.environ.get("RANK", "0"))  # the number of this process
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # its number on this machine: which GPU
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # processes on all machines
    device = choose_device(device_name, local_rank)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL allocates its memory there
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":  # torch 2.9 warns of this name
        torch.set_float32_matmul_precision("high")  # TF32
    is_slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if amp == "bf16" and is_slow and rank == 0:
        print("note: this processor has no bf16 arithmetic, --amp off is many times faster here")
    return device, rank, world_size


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process; auto is cuda or cpu. Raises DataError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:  # works for every kind of device
        return torch.empty(0, device=name).device
    except Exception as error:  # the type depends on the build of torch
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error


def prepare_cache(args: argparse.Namespace, world_size: int) -> Path:
    """The cache to train on: --data, or OUT_cache, which preprocess.py makes of raw data.

    The synthetic set is made once, at a fixed path. Raises DataError if OUT_cache exists.
    """
    if args.data and (args.data / "meta.json").exists():
        return args.data
    raw = args.data or DEMO / "raw"
    cache = args.out.with_name(f"{args.out.name}_cache") if args.data else DEMO / "cache"
    words = ["--data", str(raw), "--out", str(cache)]
    if args.data is None:
        print("no --data: a synthetic set.")
        print("Its structures are random blobs: the scores mean nothing medically.")
        if cache.exists():
            return cache
        words += ["--size", "96"]
    if world_size > 1:
        raise DataError(f"{raw}: several processes train on a cache: preprocess it first")
    checkpoint.refuse_existing(cache, f"train on it with --data {cache}, or remove it")
    if not args.data and not raw.exists():
        with new_folder(raw) as folder:
            dataset.write_demo(folder)
    print(f"first: {shlex.join(['python', 'classification/preprocess.py', *words])}")
    preprocess.preprocess(preprocess.parse_args(words))
    return cache


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019), without decay for biases and norms.

    `fused` does not read its step counters back, which would synchronise.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]  # filters and matrices
    undecayed = [p for p in model.parameters() if p.ndim <= 1]  # decay would switch norms off
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def collect_settings(args: argparse.Namespace, cache: Path, world_size: int) -> dict:
    """Everything that decides the result: options, number of processes, hash of the index."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    index = checkpoint.file_sha256(cache / "index.csv")
    return settings | {"world_size": world_size, "index": index}


def wrap_model(
    model: nn.Module, device: torch.device, world_size: int, compiled: bool
) -> nn.Module:
    """The model to call in training; the bare one is saved."""
    if world_size > 1:  # backward() then averages the gradients of all processes
        model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    if compiled:  # at the first step; it shares its weights with the bare model
        model = torch.compile(model, dynamic=False)  # all batches are of one size
    return model


def set_learning_rate(
    optimizer: Optimizer, args: argparse.Namespace, epoch: int, step: int, steps_per_epoch: int
) -> float:
    """Linear warm-up over 5 % of the steps, cosine to zero (Loshchilov & Hutter, ICLR 2017)."""
    done = epoch * steps_per_epoch + step - 1  # steps; epochs count from 0, steps from 1
    total = args.epochs * steps_per_epoch
    warm_up = max(1, total // 20)
    share = (done - warm_up) / max(1, total - warm_up)  # 0 to 1 after the warm-up
    lr = args.lr * 0.5 * (1 + math.cos(math.pi * share))
    if done < warm_up:  # AdamW has averaged few gradients so far
        lr = args.lr * (done + 1) / warm_up
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def mean_loss(loss_sum: Tensor, steps: int, epoch: int, world_size: int = 1) -> float:
    """Return the mean loss of the steps of all processes; DataError if it is NaN or infinite."""
    if world_size > 1:
        dist.all_reduce(loss_sum)  # the sum over the processes, on each of them
    loss = loss_sum.item() / (steps * world_size)
    if not math.isfinite(loss):
        raise DataError(f"epoch {epoch + 1}: the loss is {loss}; lower --lr, or try another --amp")
    return loss


def check_finite(outputs: Tensor, where: object) -> None:
    """Raise DataError if outputs are NaN or infinite: no score of them would mean anything."""
    # aminmax propagates NaN, so two values cover the tensor.
    if not all(value.isfinite() for value in outputs.aminmax()):
        hint = "lower --lr, or try another --amp"
        raise DataError(f"{where}: the network gives NaN or infinite values; {hint}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    amp: str,
    mean_std: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, C) and labels (N,) or (N, C) of the images of all processes, on the CPU.

    Takes the bare model: the wrapper expects the same number of batches on every process.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # or the score would not be that of the saved model
            dist.broadcast(buffer, 0)
    model.eval()
    logits = []
    labels = []
    for images, truth in loader:
        images = to_input(images, device, mean_std)
        with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
            logits.append(model(images).float().cpu())  # (B, C); waits for the device
        labels.append(truth)
    outputs = (torch.cat(logits), torch.cat(labels))
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, outputs)  # in the order of the ranks
        outputs = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return outputs


def finish(run: Run, cache: Path, fold: int, is_main: bool, world_size: int) -> None:
    """Leave the process group, and print the command to type next."""
    if world_size > 1:
        dist.barrier()  # a process that ends while gloo still holds tensors would abort
        dist.destroy_process_group()
    if is_main:
        name = "best.pt" if run.best_epoch else "last.pt"  # no best.pt without validation
        split = "val" if fold >= 0 else "test"
        words = ["--data", str(cache), "--checkpoint", f"{run.out}/{name}", "--split", split]
        print("next:", shlex.join(["python", "classification/eval.py", *words]))


if __name__ == "__main__":
    run_command(main)
