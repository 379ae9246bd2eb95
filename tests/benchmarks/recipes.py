"""The recipes of the task folders' READMEs, trained on every fold: the rows of their tables.

  python tests/benchmarks/recipes.py --raw FOLDER --task detection
  python tests/benchmarks/recipes.py --raw FOLDER --task classification --only mnist --folds 0 --seeds 0 1 2

Runs the commands of the sections "Recipe..." as they stand there, but for paths: `--data heart_xray`
is FOLDER/heart_xray, caches and runs lie in --out. Every training is repeated for each fold and seed
and scored by its last epoch, which no validation has chosen: the pooled figure counts each case
once, predicted by the network that did not see it. An interrupted call goes on where it was.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("classification", "detection", "segmentation")
# Of metrics.json's summary: what the READMEs' tables show
SHOWN = {
    "classification": ("auroc", "accuracy", "sensitivity", "specificity", "accuracy_tuned"),
    "detection": ("mean_iou", "median_iou", "iou_75", "mse_224", "median_se_224"),
    "segmentation": ("dice", "iou", "hd95_mm", "assd_mm"),
}
COLUMNS = ("command", "run", "minutes", "cpu_minutes")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="the folder in which the data sets lie")
    add("--task", choices=TASKS, required=True, help="whose README")
    add("--only", nargs="+", default=[""], metavar="WORD", help="caches with a WORD in their name")
    add("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: all five)")
    add("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    add("--amp", help="of trainings whose command does not say it, such as bf16")
    add("--jobs", type=int, default=1, help="trainings at a time (default: %(default)s)")
    add("--threads", type=int, help="of each training (default: the cores, divided by --jobs)")
    add("--out", type=Path, default=ROOT / "runs" / "recipes", help="(default: runs/recipes)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)

    steps = {"preprocess": [], "train": [], "eval": []}
    for script, options in read_recipes(args.task):
        words = relocate(options, args.raw, args.out)
        if any(word in Path(value_of(words, cache_option(script))).name for word in args.only):
            steps[script].append(words)

    for words in steps["preprocess"]:
        cache = Path(value_of(words, "--out"))
        source = Path(value_of(words, "--data"))
        if (cache / "meta.json").exists():
            print(f"{cache}: is there", flush=True)
        elif source.exists():
            run_all([command(args.task, "preprocess", words)], 1, args.out)
        else:
            print(f"{source}: not there, its recipes are left out", flush=True)

    usable = [words for words in steps["train"] if Path(value_of(words, "--data")).exists()]
    trainings = []
    for words in usable:
        for seed in args.seeds:
            for fold in args.folds:
                options = repeat(words, fold, seed, args.amp)
                trainings.append(command(args.task, "train", options))
    run_all(trainings, args.jobs, args.out)

    lines = []
    for checkpoints, words in list_evaluations(usable, steps["eval"]):
        for seed in args.seeds:
            lines += evaluate(args, checkpoints, words, seed)
    table = "\n".join(lines)
    print(table)
    (args.out / f"{args.task}.md").write_text(table + "\n", encoding="utf-8")


# --- the commands ---


def read_recipes(task: str) -> list[tuple[str, str]]:
    """The script and the options of each command in the sections "Recipe..." of a manual.

    What follows up to "## Copy it" belongs to them.
    """
    manual = (ROOT / task / "README.md").read_text(encoding="utf-8")
    recipes = manual.partition("\n## Recipe")[2].partition("\n## Copy it")[0]
    recipes = recipes.replace("\\\n", "")  # a command over two lines
    return re.findall(rf"^ {{4}}python {task}/(\w+)\.py (.*)$", recipes, re.MULTILINE)


def relocate(options: str, raw: Path, out: Path) -> list[str]:
    """The options with data/... and runs/... below `out`, and data sets below `raw`."""
    words = shlex.split(options)
    moved = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith(("data/", "runs/")):
            moved.append(str(out / word))
        elif before == "--data":
            moved.append(str(raw / word))
        else:
            moved.append(word)
    return moved


def value_of(words: list[str], option: str) -> str:
    """What follows `option`."""
    return words[words.index(option) + 1]


def cache_option(script: str) -> str:
    return "--out" if script == "preprocess" else "--data"


def command(task: str, script: str, words: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / task / f"{script}.py"), *words]


def repeat(words: list[str], fold: int, seed: int, amp: str | None) -> list[str]:
    """The options of a training for another fold and seed, in a folder of its own."""
    run = value_of(words, "--out")
    out = name_run(run, fold, seed)
    words = [out if word == run else word for word in words]
    words += ["--fold", str(fold), "--seed", str(seed)]
    if amp and "--amp" not in words:
        words += ["--amp", amp]
    return [*words, "--resume"] if (Path(out) / "last.pt").exists() else words


def name_run(out: str, fold: int, seed: int) -> str:
    return f"{out}_fold{fold}_seed{seed}"


def list_evaluations(
    trainings: list[list[str]], evaluations: list[list[str]]
) -> list[tuple[list[str], list[str]]]:
    """The runs to average and further options: each training alone, then what the manual averages.

    An evaluation of the manual that names one run replaces the plain one of that run.
    """
    plans = {}
    for words in trainings:
        run = value_of(words, "--out")
        plans[(run,)] = ["--data", value_of(words, "--data"), "--split", "val"]
    for words in evaluations:
        runs = tuple(str(Path(word).parent) for word in words if word.endswith(".pt"))
        if all((run,) in plans for run in runs):
            plans[runs] = [word for word in words if word != "--checkpoint" and word[-3:] != ".pt"]
    return [(list(runs), words) for runs, words in plans.items()]


# --- running them ---


def run_all(commands: list[list[str]], jobs: int, out: Path) -> None:
    """Run the commands, `jobs` at a time, and note their minutes in trainings.csv.

    What is listed there has run. Ends the script when all are through and one has failed.
    """
    table = out / "trainings.csv"
    if not table.exists():
        append_row(table, COLUMNS)
    with open(table, newline="", encoding="utf-8") as file:
        done = {row["command"] for row in csv.DictReader(file)}
    waiting = [words for words in commands if show(words) not in done]
    print(f"{len(commands)} commands, {len(commands) - len(waiting)} of them have run", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        failures = list(pool.map(run_one, waiting, [table] * len(waiting)))
    if any(failures):
        sys.exit(f"{sum(failures)} commands failed, see above")


def run_one(words: list[str], table: Path) -> bool:
    """Run a command, its output in a file beside its folder. Returns whether it failed."""
    out = Path(value_of(words, "--out"))
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(f"{out}.txt", "a", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    minutes = (time.perf_counter() - start) / 60
    cpu_minutes = (usage.ru_utime + usage.ru_stime) / 60
    if status:
        print(f"FAILED, see {out}.txt: {show(words)}", flush=True)
        return True
    print(f"{minutes:.1f} min, of the processor {cpu_minutes:.1f}: {show(words)}", flush=True)
    append_row(table, (show(words), out.name, f"{minutes:.2f}", f"{cpu_minutes:.2f}"))
    return False


def show(words: list[str]) -> str:
    """A command as trainings.csv knows it: resumed or not, it is the same."""
    return shlex.join(word for word in words[1:] if word != "--resume")


def append_row(table: Path, row: tuple) -> None:
    with open(table, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)


# --- what came out ---


def evaluate(args: argparse.Namespace, runs: list[str], words: list[str], seed: int) -> list[str]:
    """The rows of a Markdown table: each fold, then all cases pooled."""
    checkpoints = [
        str(Path(name_run(run, fold, seed)) / "last.pt") for run in runs for fold in args.folds
    ]
    names = " + ".join(Path(run).name for run in runs)
    out = args.out / "evals" / f"{names.replace(' + ', '_')}_seed{seed}"
    out.parent.mkdir(exist_ok=True)
    words = ["--checkpoint", *checkpoints, *words, "--out", str(out)]
    with open(f"{out}.txt", "w", encoding="utf-8") as file:
        subprocess.run(command(args.task, "eval", words), stdout=file, stderr=file, check=True)
    report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    columns = [name for name in SHOWN[args.task] if name in report["summary"]]
    lines = [f"| {names}, seed {seed} | cases | " + " | ".join(columns) + " |"]
    lines.append("| --- " * (2 + len(columns)) + "|")
    for row in report.get("folds", []):
        cells = [f"{row[name]:.4f}" for name in columns]
        lines.append(f"| fold {row['fold']} | {row['n']} | " + " | ".join(cells) + " |")
    cells = [with_interval(report["summary"][name]) for name in columns]
    lines.append(f"| all | {len(report['cases'])} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def with_interval(metric: dict) -> str:
    if metric["low"] is None:
        return f"{metric['value']:.4f}"
    return "{value:.4f} ({low:.4f} to {high:.4f})".format(**metric)


if __name__ == "__main__":
    main()
