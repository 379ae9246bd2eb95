"""The README's commands: each is understood by its script, and the first one runs from nothing to a score."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}python (\w+)/(\w+)\.py(.*)$", README, re.MULTILINE)


@pytest.mark.parametrize(("task", "script", "options"), COMMANDS)
def test_readme_commands_are_understood(task, script, options):
    arguments = importlib.import_module(f"{task}.{script}").parse_args(shlex.split(options))
    assert arguments.data or arguments.images


def test_ci_runs_the_readmes_test_command():
    """What .ci/run would evaluate: everything up to pytest itself, which would be this run once more."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (evaluated,) = [line.removeprefix("eval ").strip('"') for line in lines if line.startswith("eval ")]
    command = subprocess.run(
        ["bash", "-c", f"echo {evaluated}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *install, test = command.stdout.strip().split(" && ")
    assert [words.split()[0] for words in install] == ["python3", ".", "pip"]
    assert (ROOT / install[-1].split()[-1]).is_file()
    python, *options = test.split()
    assert python == "python"
    subprocess.run([sys.executable, *options, "--version"], cwd=ROOT, capture_output=True, check=True)


def test_the_first_command_is_the_training_that_is_tested_below():
    first = next(line.strip() for line in README.splitlines() if line.startswith("    "))
    assert first.split(" && ")[-1].split() == ["python", "classification/train.py"]


@pytest.mark.parametrize("task, options, figure, low, picture", [
    ("classification", "", "auroc", 0.8, "mistakes"),
    ("detection", "--epochs 4", "mean_iou", 0.6, "gallery"),  # a part of what it takes without options
])  # fmt: skip
def test_a_training_without_data_names_the_next_command(task, options, figure, low, picture, tmp_path):
    def run(command: str) -> str:
        words = shlex.split(command)
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(words, check=False, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = run(f"python {task}/train.py {options}")
    assert "synthetic" in output
    scores = [float(score) for score in re.findall(rf"val_{figure} ([\d.]+)", output)]
    assert low < max(scores) < 1 and scores[0] < max(scores)
    again = re.search(rf"^{figure} +([\d.]+)", run(output.rsplit("next: ", 1)[1]), re.MULTILINE)
    assert float(again[1]) == max(scores)
    assert (tmp_path / "data" / "demo" / task / "raw").is_dir()
    assert (tmp_path / "runs" / task / "eval_val" / f"{picture}.png").is_file()
