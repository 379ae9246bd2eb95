"""The recipes of the task folders' READMEs, trained on every fold: the rows of their tables.

  python tests/benchmarks/recipes.py --raw FOLDER --task detection
  python tests/benchmarks/recipes.py --raw FOLDER --task classification --only mnist --folds 0 --seeds 0 1 2

Runs the commands of the sections "Recipe..." as they stand there, but for paths: `--data heart_xray`
is FOLDER/heart_xray, caches and runs lie in --out. Every training is repeated for each fold and seed
and scored by its last epoch, which no validation has chosen: the pooled metrics count each case
once, predicted by the network that did not see it. An interrupted call goes on where it was.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of metrics.json's summary: what the READMEs' tables show
SHOWN = {
    "classification": ("auroc", "accuracy", "sensitivity", "specificity", "accuracy_tuned"),
    "detection": ("mean_iou", "median_iou", "iou_75", "mse_224", "median_se_224"),
    "segmentation": ("dice", "iou", "hd95_mm", "assd_mm"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="the folder in which the data sets lie")
    add("--task", choices=SHOWN, required=True, help="whose README")
    add("--only", nargs="+", default=[""], metavar="WORD", help="caches with a WORD in their name")
    add("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: all five)")
    add("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    add("--amp", help="of trainings whose command does not say it, such as bf16")
    add("--out", type=Path, default=ROOT / "runs" / "recipes", help="(default: runs/recipes)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    steps = {"preprocess": [], "train": [], "eval": []}
    for script, options in read_recipes(args.task):
        words = relocate(options, args.raw, args.out)
        cache = value_of(words, "--out" if script == "preprocess" else "--data")
        if any(word in Path(cache).name for word in args.only):
            steps[script].append(words)

    for words in steps["preprocess"]:
        if not Path(value_of(words, "--out")).exists():
            if Path(value_of(words, "--data")).exists():
                run_once(args, "preprocess", words)
            else:
                print(f"{value_of(words, '--data')}: not there, its recipes are left out")

    usable = [words for words in steps["train"] if Path(value_of(words, "--data")).exists()]
    for words in usable:
        for seed in args.seeds:
            for fold in args.folds:
                run_once(args, "train", repeat(words, fold, seed, args.amp))

    lines = []
    for runs, words in list_evaluations(usable, steps["eval"]):
        for seed in args.seeds:
            lines += evaluate(args, runs, words, seed)
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
    moved = []
    before = ""
    for word in shlex.split(options):
        if word.startswith(("data/", "runs/")):
            moved.append(str(out / word))
        elif before == "--data":
            moved.append(str(raw / word))
        else:
            moved.append(word)
        before = word
    return moved


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def name_run(out: str, fold: int, seed: int) -> str:
    return f"{out}_fold{fold}_seed{seed}"


def repeat(words: list[str], fold: int, seed: int, amp: str | None) -> list[str]:
    """The options of a training for another fold and seed, in a folder of its own."""
    run = value_of(words, "--out")
    words = [name_run(run, fold, seed) if word == run else word for word in words]
    words += ["--fold", str(fold), "--seed", str(seed)]
    return [*words, "--amp", amp] if amp and "--amp" not in words else words


def list_evaluations(
    trainings: list[list[str]], evaluations: list[list[str]]
) -> list[tuple[tuple[str, ...], list[str]]]:
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
    return list(plans.items())


# --- running them ---


def run_once(args: argparse.Namespace, script: str, words: list[str]) -> None:
    """Run a command, unless commands.txt says that it has run; its output beside its folder."""
    line = shlex.join([script, *words])
    path = args.out / "commands.txt"
    if path.exists() and line in path.read_text(encoding="utf-8").splitlines():
        print(f"has run: {line}", flush=True)
        return
    out = value_of(words, "--out")
    resume = ["--resume"] if (Path(out) / "last.pt").exists() else []
    start = time.perf_counter()
    run(args.task, script, [*words, *resume])
    print(f"{(time.perf_counter() - start) / 60:.1f} min: {line}", flush=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def run(task: str, script: str, words: list[str]) -> None:
    out = Path(value_of(words, "--out"))
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / task / f"{script}.py"), *words]
    with open(f"{out}.txt", "a", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True)


def evaluate(args: argparse.Namespace, runs: tuple, words: list[str], seed: int) -> list[str]:
    """The rows of a Markdown table: each fold, then all cases pooled."""
    folders = [name_run(path, fold, seed) for path in runs for fold in args.folds]
    names = [Path(path).name for path in runs]
    out = args.out / "evals" / f"{'_'.join(names)}_seed{seed}"
    if out.exists():  # of other folds, maybe
        shutil.rmtree(out)
    checkpoints = [f"{folder}/last.pt" for folder in folders]
    run(args.task, "eval", ["--checkpoint", *checkpoints, *words, "--out", str(out)])
    report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    columns = [name for name in SHOWN[args.task] if name in report["summary"]]
    lines = [row_of(f"{' + '.join(names)}, seed {seed}", "cases", columns)]
    lines.append("| --- " * (2 + len(columns)) + "|")
    for row in report["by"]["values"] if report["by"] else []:
        cells = [f"{row['summary'][name]['value']:.4f}" for name in columns]
        lines.append(row_of(f"fold {row['value']}", row["n"], cells))
    cells = [with_interval(report["summary"][name]) for name in columns]
    return [*lines, row_of("all", len(report["cases"]), cells), ""]


def row_of(*cells: object) -> str:
    *first, rest = cells
    return f"| {' | '.join(map(str, [*first, *rest]))} |"


def with_interval(metric: dict) -> str:
    if metric["low"] is None:
        return f"{metric['value']:.4f}"
    return "{value:.4f} ({low:.4f} to {high:.4f})".format(**metric)


if __name__ == "__main__":
    main()
