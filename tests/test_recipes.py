"""tests/benchmarks/recipes.py: which commands of the manuals it runs, and what it makes of them."""

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import recipes
from tests.caches import NAMES, draw_cache, module, report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def test_the_commands_are_those_of_the_manuals(tmp_path):
    for task in NAMES:
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
        ("eval", "--data data/heart --checkpoint runs/heart/last.pt"),
    ]
    commands = []

    def run_here(command: list[str], **options: object) -> None:
        commands.append(command)
        module("detection", Path(command[1]).stem).main(command[2:])

    monkeypatch.setattr(recipes, "read_recipes", lambda task: manual)
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "recipes"
    draw_cache(out / "data" / "heart", "detection")
    call = ["--raw", str(tmp_path), "--task", "detection", "--out", str(out), "--amp", "fp16"]
    recipes.main([*call, "--folds", "0"])
    recipes.main([*call, "--folds", "0", "1"])
    trained = [command for command in commands if command[1].endswith("train.py")]
    folds = [recipes.value_of(command, "--fold") for command in trained]
    assert folds == ["0", "1"]  # the second call has found fold 0
    assert all(recipes.value_of(command, "--amp") == "fp16" for command in trained)
    table = (out / "detection.md").read_text()
    assert table.startswith("| heart, seed 0 | cases | mean_iou |")
    assert table in capsys.readouterr().out
    result = report(out / "evals" / "heart_seed0")
    for row in result["by"]["values"]:
        score = row["summary"]["mean_iou"]["value"]
        assert f"| fold {row['value']} | {row['n']} | {score:.4f} |" in table
    score = result["summary"]["mean_iou"]["value"]
    assert f"| all | {len(result['cases'])} | {score:.4f} " in table
