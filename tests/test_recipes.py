"""tests/benchmarks/recipes.py: which commands of the manuals it runs, and what it makes of them."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import recipes
from tests.caches import draw_cache, module, small_network

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", recipes.TASKS)
def test_the_commands_are_those_of_the_manual(task, tmp_path):
    commands = recipes.read_recipes(task)
    text = (recipes.ROOT / task / "README.md").read_text(encoding="utf-8")
    for script, options in commands:
        assert f"python {task}/{script}.py {options}" in text.replace("\\\n", "")
        words = recipes.relocate(options, Path("/raw"), tmp_path)
        assert not any(word.startswith(("data/", "runs/")) for word in words)
        module(task, script).parse_args(words)
    assert {script for script, _ in commands} >= {"preprocess", "train"}


def test_folds_are_trained_and_pooled_and_an_interrupted_call_goes_on(
    tmp_path, monkeypatch, capsys
):
    manual = [
        ("preprocess", "--data raw --out data/heart"),
        ("train", "--data data/heart --out runs/heart --epochs 1 --batch-size 6 --channels 16"),
        ("eval", "--data data/heart --checkpoint runs/heart/last.pt --samples 20"),
    ]
    monkeypatch.setattr(recipes, "read_recipes", lambda task: manual)
    trained = []

    def run_here(words: list[str], table: Path) -> bool:
        trained.append(words)
        module("detection", "train").main(words[2:])
        recipes.append_row(table, (recipes.show(words), Path(words[-1]).name, "1.0", "1.0"))
        return False

    def evaluate_here(words: list[str], **options: object) -> None:
        module("detection", "eval").main(words[2:])

    monkeypatch.setattr(recipes, "run_one", run_here)
    monkeypatch.setattr(subprocess, "run", evaluate_here)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "recipes"
    draw_cache(out / "data" / "heart", "detection")
    call = ["--raw", str(tmp_path), "--task", "detection", "--out", str(out), "--amp", "fp16"]
    with small_network():
        recipes.main([*call, "--folds", "0"])
        recipes.main([*call, "--folds", "0", "1"])
    folds = [recipes.value_of(words, "--fold") for words in trained]
    assert folds == ["0", "1"]  # the second call has found fold 0
    assert all(recipes.value_of(words, "--amp") == "fp16" for words in trained)
    table = (out / "detection.md").read_text()
    assert (
        table.startswith("| heart, seed 0 | cases | mean_iou |")
        and table in capsys.readouterr().out
    )
    report = json.loads((out / "evals" / "heart_seed0" / "metrics.json").read_text())
    for row in report["folds"]:
        assert f"| fold {row['fold']} | {row['n']} | {row['mean_iou']:.4f} |" in table
    assert (
        f"| all | {len(report['cases'])} | {report['summary']['mean_iou']['value']:.4f} " in table
    )
