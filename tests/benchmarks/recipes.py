"""The recipes of a task folder's README, trained on every fold: the rows of its tables.

  python tests/benchmarks/recipes.py --raw FOLDER --task detection
  python tests/benchmarks/recipes.py --raw FOLDER --task classification --only mnist --folds 0 --seeds 0 1 2

Runs the commands of the section "Recipes" as they stand there, but for paths: `--data heart_xray` is
FOLDER/heart_xray, caches and runs lie in --out. Every training is repeated for each fold and seed, and
its folds are evaluated together, by last.pt, which no validation has chosen; then as the README does.
An interrupted call resumes.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("classification", "detection", "segmentation")


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="the folder in which the data sets lie")
    add("--task", choices=TASKS, required=True, help="whose README")
    add("--only", nargs="+", default=[""], metavar="WORD", help="caches with a WORD in their name")
    add("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: all five)")
    add("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    add("--amp", help="of trainings whose command does not say it, such as bf16")
    add("--out", type=Path, default=ROOT / "runs" / "recipes", help="(default: runs/recipes)")
    args = parser.parse_args(argv)
    plain = []  # the evaluations that every training gets
    for script, options in read_recipes(args.task):
        words = relocate(options, args.raw, args.out)
        data = Path(value_of(words, "--data"))
        cache = Path(value_of(words, "--out")) if script == "preprocess" else data
        if not any(word in cache.name for word in args.only):
            continue
        if not data.exists():
            print(f"{data}: not there, so left out: {script} {options}")
        elif script == "preprocess" and not cache.exists():
            run(args.task, script, words)
        for seed in args.seeds if data.exists() else []:
            if script == "train":
                for fold in args.folds:
                    run(args.task, script, repeat(words, fold, seed, args.amp))
                checkpoint = f"{value_of(words, '--out')}/last.pt"
                plain.append(["--data", str(data), "--checkpoint", checkpoint])
                run(args.task, "eval", pool(plain[-1], args.folds, seed))
            if script == "eval" and words not in plain:
                run(args.task, script, pool(words, args.folds, seed))


def read_recipes(task: str) -> list[tuple[str, str]]:
    """The script and the options of each command between the headings "Recipe..." and "Copy it"."""
    manual = (ROOT / task / "README.md").read_text(encoding="utf-8")
    recipes = manual.partition("\n## Recipe")[2].partition("\n## Copy it")[0]
    recipes = recipes.replace("\\\n", "")  # a command over two lines
    return re.findall(rf"^ {{4}}python {task}/(\w+)\.py (.*)$", recipes, re.MULTILINE)


def relocate(options: str, raw: Path, out: Path) -> list[str]:
    """The options with data/... and runs/... below `out`, and data sets below `raw`."""
    words = shlex.split(options)
    for k, word in enumerate(words):
        if word.startswith(("data/", "runs/")):
            words[k] = str(out / word)
        elif words[k - 1] == "--data":
            words[k] = str(raw / word)
    return words


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def repeat(words: list[str], fold: int, seed: int, amp: str | None) -> list[str]:
    """The options of a training for another fold and seed, in a folder of its own."""
    run = value_of(words, "--out")
    out = f"{run}_fold{fold}_seed{seed}"
    words = [out if word == run else word for word in words]
    words += ["--fold", str(fold), "--seed", str(seed)]
    words += ["--amp", amp] if amp and "--amp" not in words else []
    return words + (["--resume"] if Path(out, "last.pt").exists() else [])


def pool(words: list[str], folds: list[int], seed: int) -> list[str]:
    """The options of an evaluation of the last.pt of all folds, of each run that it names."""
    pooled = []
    for word in words:
        if word.endswith(".pt"):
            pooled += [f"{Path(word).parent}_fold{fold}_seed{seed}/last.pt" for fold in folds]
        else:
            pooled.append(word)
    return pooled


def run(task: str, script: str, words: list[str]) -> None:
    print(shlex.join([script, *words]), flush=True)
    subprocess.run([sys.executable, str(ROOT / task / f"{script}.py"), *words], check=True)


if __name__ == "__main__":
    main()
