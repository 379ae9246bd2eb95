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
    found = [line.strip() for line in README.splitlines() if line.endswith("python -m pytest")]
    assert len(found) == 1 and "pip install -r requirements.txt" in found[0]
    assert "grep -m 1 'python -m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_first_command_is_a_training_without_data():
    assert "pip install -r requirements.txt && python classification/train.py\n" in README


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
