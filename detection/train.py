"""Train a ResNet to put a box around the heart: squared error, best checkpoint by mean IoU.

  python detection/train.py                          # without data: a synthetic set
  python detection/train.py --data data/heart --loss smooth_l1
  python detection/train.py --data data/heart --resume
  torchrun --nproc-per-node 4 detection/train.py --data data/heart

--data is a cache of preprocess.py, or raw data that get one: fold K is the validation set, the
others (--fold -1: all) the training set. Written to --out: last.pt, best.pt, log.csv, log.png. On a
CPU, the same settings and numbers of processes and threads give bit-identical weights.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import checkpoint
from common.checkpoint import CheckpointError, Run
from common.metrics import detection_metrics
from detection import dataset, preprocess
from detection import model as network
from detection.dataset import in_batches, make_loader, to_input
from detection.model import ARCHITECTURES, HEAD, HEADS, build_model
from detection.preprocess import DataError, is_raw, progress, run_command

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = {
    "mse": F.mse_loss,
    "smooth_l1": network.smooth_l1,
    "smooth_l1_giou": network.smooth_l1_giou,
}
LOGGED = ("mean_iou", "iou_75", "mse_224")  # of the metrics, in log.csv
DEMO = Path("data/demo/detection")
# What may differ between a run and its --resume, because it does not change the result
FREE = ("data", "out", "workers", "init", "device", "compile", "resume", "stop_after", "overwrite")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="a cache of preprocess.py, or raw data (default: synthetic)")
    add("--out", type=Path, default=Path("runs/detection"), help="(default: %(default)s)")
    add("--fold", type=within(int, -1, 4), default=0, help="to validate on, -1: none (default: 0)")
    add("--workers", type=within(int, 0), default=2, help="loading processes (default: 2)")
    add = parser.add_argument_group("training").add_argument
    add("--arch", choices=ARCHITECTURES, default="resnet18", help="(default: %(default)s)")
    add("--head", choices=HEADS, default="edges", help="(default: %(default)s)")
    add("--channels", type=within(int, 16), help="first stage (default: 32; --pretrained: 64)")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from the weights of another run")
    add("--freeze", action="store_true", help="train the head alone, leave the rest as it came")
    add("--epochs", type=within(int, 1), help="(default: 15; synthetic set: 30)")
    add("--batch-size", type=within(int, 2), default=32, help="per process (default: %(default)s)")
    add("--lr", type=within(float, 1e-15, 1e9), default=1e-3, help="peak (default: %(default)s)")
    add("--weight-decay", type=within(float, 0, 1e9), default=0.05, help="(default: %(default)s)")
    add("--loss", choices=LOSSES, default="mse", help="in fractions of the image (default: mse)")
    add("--augment", type=within(float, 0, 10), default=1.0, help="strength (default: %(default)s)")
    add("--seed", type=within(int, 0, 2**64 - 1), default=0, help="(default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--amp", choices=AMP, default="off", help="mixed precision (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--resume", action="store_true", help="resume the interrupted run in --out")
    add("--stop-after", type=within(int, 1), metavar="N", help="stop after epoch N of --epochs")
    add("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (15 if args.data else 30)
    args.channels = args.channels or (64 if args.pretrained else 32)
    if args.pretrained and args.channels != 64:
        parser.error(f"--channels {args.channels}, expected 64 with --pretrained")
    if args.init and args.pretrained:
        parser.error("--init and --pretrained both set the first weights: choose one")
    if args.freeze and not (args.init or args.pretrained or args.resume):
        parser.error("--freeze needs --init or --pretrained: it keeps the weights from there")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, rank, world_size = start_processes(args.device, args.amp)
    is_main = rank == 0  # the process that prints and saves

    # Data
    cache = prepare_cache(args, is_main, world_size)
    meta, train_loader, val_loader, count = load_data(cache, args, device, rank, world_size)
    steps_per_epoch = len(train_loader)
    total_steps = args.epochs * steps_per_epoch  # of the learning rate's schedule

    # Model, loss, optimizer
    torch.manual_seed(args.seed)  # the first weights
    model = build_model(args.arch, args.head, args.channels, args.pretrained and not args.resume)
    model = model.to(device, memory_format=torch.channels_last)
    init = checkpoint.load_init(args, model, device, is_main, HEAD)
    mean_std = (meta["mean"], meta["std"])
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    scaler = GradScaler(device.type, enabled=args.amp == "fp16")

    # A new run, or the state of the one to resume
    settings = collect_settings(args, cache, world_size)
    run = Run(args.out, "val_mean_iou")
    if args.resume:
        run.restore(settings, meta, model, optimizer, scaler)
    if is_main:
        run.claim(args, settings)
        run.trained_on = run.trained_on or record_training(cache, args.fold, init)
        print_setup(settings, f"{count} training images", device)
    saved = {"task": "detection", "meta": meta, "settings": settings, "figures": {}}
    train_model = wrap_model(model, device, world_size, args.compile)

    for epoch in range(run.epoch, min(args.epochs, args.stop_after or args.epochs)):
        start = time.perf_counter()
        loss_sum = torch.zeros((), device=device)  # stays there: reading it would wait
        train_loader.sampler.epoch = epoch  # decides the order
        checkpoint.set_training(model)  # evaluate() has set the other mode
        for step, (images, boxes) in enumerate(train_loader, 1):
            # These four decide all random numbers, so a resumed run draws the same ones.
            rng = np.random.default_rng((args.seed, epoch, step, rank))
            # To the device and augmented: float32 (B, 1, S, S) and (B, 4)
            images, boxes = to_input(images, boxes, device, *mean_std, rng, args.augment)
            lr = learning_rate(epoch * steps_per_epoch + step - 1, total_steps, args.lr)
            set_learning_rate(optimizer, lr)
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                pred = train_model(images)  # (B, 4) in fractions of the image
            loss = LOSSES[args.loss](pred.float(), boxes)  # float32, whatever --amp is
            scaler.scale(loss).backward()  # fp16: a larger loss, or small gradients would be 0
            scaler.unscale_(optimizer)  # to clip the true gradients, not the scaled ones
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a bad batch moves little
            scaler.step(optimizer)  # left out if fp16 overflowed
            scaler.update()  # the factor of the fp16 loss
            optimizer.zero_grad()  # backward() adds to what is there
            loss_sum += loss.detach()
            if step % 20 == 0:  # seldom: .item() waits for the device
                mean_loss = check_loss(loss_sum.item() / step, epoch)
                show_progress(args, epoch, step, steps_per_epoch, mean_loss, start)

        # Validation on the whole fold, shared out among the processes
        train_loss = mean_over_processes(loss_sum, steps_per_epoch, world_size, epoch)
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss}
        if args.fold >= 0:
            pred, boxes = evaluate(model, val_loader, device, args.amp, *mean_std)
            check_finite(pred, f"epoch {epoch + 1}")
            metrics = detection_metrics(pred, boxes)
            row |= {"val_loss": LOSSES[args.loss](pred, boxes).item()}
            row |= {f"val_{name}": metrics[name] for name in LOGGED}
            saved |= {"figures": metrics}
        if is_main:
            row |= {"seconds": time.perf_counter() - start}
            run.save(row, saved["figures"].get("mean_iou"), saved, model, optimizer, scaler)
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
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # on its machine: which GPU is its own
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # processes on all machines
    device = choose_device(device_name, local_rank)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL takes the memory it needs
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
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
    try:  # the one question that every kind of device answers
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by build of torch
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error


def prepare_cache(args: argparse.Namespace, is_main: bool, world_size: int) -> Path:
    """The cache to train on: --data, or what preprocess.py makes of the raw data in it.

    That one lies beside --out, and the one of the synthetic set in its own place.
    """
    if args.data and not is_raw(args.data):
        return args.data
    cache = Path(f"{args.out}_cache") if args.data else DEMO / "cache"
    try:
        if world_size > 1:  # with a clock of its own: the others' patience ends after 10 minutes
            waiting = dist.new_group(timeout=timedelta(days=7), backend="gloo")
        if is_main and args.data:
            if not args.resume:
                checkpoint.refuse_overwriting(args.out, args.overwrite)  # before what takes long
            make_cache(args.data, cache, [])
        elif is_main:
            make_cache(DEMO / "raw", cache, make_demo())
        if world_size > 1:
            dist.barrier(waiting)
    except RuntimeError as error:
        if is_main:
            raise
        # The connection is closed, maybe before it was complete.
        raise DataError("process 0 has stopped; the reason is its message") from error
    return cache


def make_cache(raw: Path, cache: Path, options: list[str]) -> None:
    """Preprocess with the defaults but for `options`, unless the cache is there already.

    Raises DataError if it was made from other files or in another way: it is never replaced.
    """
    words = ["--data", str(raw), "--out", str(cache), *options]
    command = shlex.join(["python", "detection/preprocess.py", *words])
    if (cache / "meta.json").exists() and "--overwrite" not in options:
        source = preprocess.describe_source(preprocess.parse_args(words))
        difference = preprocess.compare_source(preprocess.read_meta(cache), source, raw)
        if difference:
            # A user may have trained on it for days: only --overwrite replaces it.
            use = f"train on it as it is with --data {cache}"
            again = f"make it again: {command} --overwrite"
            raise DataError(f"{cache}: made {difference}; {use}, or {again}")
        print(f"reusing {cache}, made from the same files with the same options")
        return
    print(f"{raw} is not a cache of preprocess.py, so first: {command}")
    try:
        preprocess.main(words)
    except DataError as error:
        if "--skip-bad" in str(error):
            raise DataError(f"{error}: {command} --skip-bad") from error
        if "--" in str(error):  # train.py has no such options
            raise DataError(f"{error}; the command: {command}") from error
        raise


def make_demo() -> list[str]:
    """Write the synthetic raw set; returns options of preprocess.py for it."""
    print("no --data: a synthetic set.")
    print("Its hearts are drawn: the scores mean nothing medically.")
    dataset.write_demo(DEMO / "raw")
    return ["--overwrite", "--size", "96"]


def load_data(
    cache: Path, args: argparse.Namespace, device: torch.device, rank: int, world_size: int
) -> tuple[dict, DataLoader, DataLoader, int]:
    """What the model needs of meta.json, both loaders of this process, number of training images.

    Raises DataError if the fold leaves nothing on either side, or less than one batch.
    """
    meta, index = dataset.open_cache(cache)
    meta = {name: meta[name] for name in ("size", "mean", "std")}
    if args.pretrained:  # normalised as the images that those weights were trained on
        meta |= {"mean": network.PRETRAINED_MEAN, "std": network.PRETRAINED_STD}
    train_rows, val_rows = split_rows(index, args.fold)
    for side, row_numbers in (("training", train_rows), ("validation", val_rows)):
        if not row_numbers and (side == "training" or args.fold >= 0):
            raise DataError(f"{cache}: fold {args.fold} leaves no {side} images")
    batches = dataset.EpochBatches(train_rows, args.batch_size, args.seed, rank, world_size)
    if len(batches) == 0:
        raise DataError(
            f"{cache}: {len(train_rows)} training images, less than one batch of --batch-size"
        )
    train_loader = make_loader(cache, batches, args.workers, device)
    # Every process validates a share; no image twice, and none is left over.
    val_batches = in_batches(val_rows[rank::world_size], args.batch_size)
    val_loader = make_loader(cache, val_batches, args.workers, device)
    return meta, train_loader, val_loader, len(train_rows)


def split_rows(index: list[dict[str, str]], fold: int) -> tuple[list[int], list[int]]:
    """Row numbers of the training set and of the validation set."""
    train_rows = []
    val_rows = []
    for row_number, row in enumerate(index):
        if row["fold"] == str(fold):
            val_rows.append(row_number)
        elif row["fold"] != "test":  # kept for the end
            train_rows.append(row_number)
    return train_rows, val_rows


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019), without decay for biases and norms.

    `fused` does not read its step counters back, which would wait for the device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]  # without what --freeze holds
    decayed = [p for p in trained if p.ndim > 1]  # filters and matrices
    others = [p for p in trained if p.ndim <= 1]  # pulled to zero, a norm would switch layers off
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, fused=True)


def collect_settings(args: argparse.Namespace, cache: Path, world_size: int) -> dict:
    """All that decides the result: options, number of processes, and which cache it is."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    return settings | checkpoint.identify_run(cache, world_size)


def record_training(cache: Path, fold: int, init: dict) -> dict:
    """Hashes of what is trained on, with those of --init: eval.py refuses to be tested on it."""
    train_rows, val_rows = split_rows(dataset.read_index(cache), fold)
    if init and not init.get("trained_on"):
        print("note: --init does not say what it was trained on: keep that out of the test set")
    elif init:
        known = init["trained_on"]
        seen = checkpoint.count_trained_on(known, *dataset.fingerprints(cache, val_rows))
        if seen:
            print(
                f"note: --init was trained on {len(seen)} of {len(val_rows)} validation images: "
                "the scores below are too high, and eval.py will refuse them"
            )
    return checkpoint.list_trained_on(*dataset.fingerprints(cache, train_rows), init)


def print_setup(settings: dict, data: str, device: torch.device) -> None:
    """Versions, settings and data, once at the start of a run."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{versions}, {json.dumps(settings)}")
    print(f"training on {device}, {data}")


def wrap_model(
    model: nn.Module, device: torch.device, world_size: int, compiled: bool
) -> nn.Module:
    """The model to call in training; the bare one is what is saved."""
    if world_size > 1:  # backward() then averages the gradients of all processes
        model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    if compiled:  # by the first step; the weights stay those of the bare model
        model = torch.compile(model, dynamic=False)  # all batches are of one size
    return model


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, cosine to zero (Loshchilov & Hutter, ICLR 2017)."""
    warm_up = max(1, total_steps // 20)
    if step < warm_up:  # AdamW's averages are those of few gradients yet
        return peak * (step + 1) / warm_up
    angle = math.pi * (step - warm_up) / max(1, total_steps - warm_up)  # 0 to pi
    return peak * 0.5 * (1 + math.cos(angle))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_loss(loss: float, epoch: int) -> float:
    """The loss, or DataError if it is no number to go on with."""
    if not math.isfinite(loss):
        raise DataError(f"epoch {epoch + 1}: the loss is {loss}; lower --lr, or try another --amp")
    return loss


def check_finite(outputs: Tensor, where: object) -> None:
    """Raise DataError if a network gave NaN or infinity: no score of it would mean anything."""
    # One NaN makes both ends NaN, so that two numbers answer for all.
    if not all(value.isfinite() for value in outputs.aminmax()):
        raise DataError(
            f"{where}: the network gives NaN or infinite values; lower --lr, or try another --amp"
        )


def show_progress(
    args: argparse.Namespace, epoch: int, step: int, steps_per_epoch: int, loss: float, start: float
) -> None:
    """One line that overwrites itself: mean loss, images a second of all processes, time left."""
    if dist.is_initialized() and dist.get_rank() > 0:  # process 0 speaks for all
        return
    rate = step / (time.perf_counter() - start)  # steps a second
    steps_left = (args.epochs - epoch) * steps_per_epoch - step
    eta = timedelta(seconds=int(steps_left / rate))
    image_rate = rate * args.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    where = f"epoch {epoch + 1}/{args.epochs}  {step}/{steps_per_epoch}"
    progress(f"{where}  loss {loss:.4g}  {image_rate:.0f} img/s  eta {eta}")


def mean_over_processes(
    loss_sum: Tensor, steps_per_epoch: int, world_size: int, epoch: int
) -> float:
    """The mean loss of the steps of all processes, checked by `check_loss`."""
    if world_size > 1:
        dist.all_reduce(loss_sum)  # the sum over the processes, on each of them
    return check_loss(loss_sum.item() / (steps_per_epoch * world_size), epoch)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, device: torch.device, amp: str, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """Predicted and true boxes float32 (N, 4) of the images of all processes, on the CPU.

    Takes the bare model: the wrapper would wait for the same number of batches on every process.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # otherwise the score is not that of the model that is saved
            dist.broadcast(buffer, 0)
    model.eval()  # BatchNorm by its running averages
    pred = []
    boxes = []
    for images, truth in loader:
        images, _ = to_input(images, truth, device, mean, std)
        with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
            pred.append(model(images).float().cpu())  # (B, 4); waits for the device
        boxes.append(truth)
    if dist.is_initialized():  # a list of the batches of all, in place of one's own
        pred = gather(pred)
        boxes = gather(boxes)
    return torch.cat(pred), torch.cat(boxes)


def gather(batches: list[Tensor]) -> list[Tensor]:
    """The batches of all processes, in the order of their ranks."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, batches)
    return [batch for part in parts for batch in part]


def finish(run: Run, cache: Path, fold: int, is_main: bool, world_size: int) -> None:
    """Leave the process group and the folder, and print the command to type next."""
    if world_size > 1:
        dist.barrier()  # gloo's threads may still hold tensors, which aborts a process that ends
        dist.destroy_process_group()
    if is_main:
        checkpoint.unlock_folder(run.lock)
        name = "best.pt" if run.best_epoch else "last.pt"  # without validation there is no best
        split = "val" if fold >= 0 else "test"
        words = f"--data {cache} --checkpoint {run.out}/{name} --split {split}"
        print(f"next: python detection/eval.py {words}")


if __name__ == "__main__":
    run_command(main, CheckpointError)
