"""tests/benchmarks/recipes.py: the commands of a manual, trained on every fold and pooled."""

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import recipes
from tests.caches import draw_cache, module, report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def test_folds_are_trained_and_pooled_and_an_interrupted_call_resumes(tmp_path, monkeypatch):
    manual = [
        ("preprocess", "--data raw --out data/heart"),
        ("train", "--data data/heart --out runs/heart --epochs 1 --batch-size 6 --channels 16"),
        ("eval", "--data data/heart --checkpoint runs/heart/last.pt"),
        ("eval", "--data data/heart --checkpoint runs/heart/last.pt --split test"),
    ]
    commands = []

    def run_here(command: list[str], **options: object) -> None:
        commands.append(command[2:])
        module("detection", Path(command[1]).stem).main(command[2:])

    monkeypatch.setattr(recipes, "read_recipes", lambda task: manual)
    monkeypatch.setattr(subprocess, "run", run_here)
    (tmp_path / "raw").mkdir()
    draw_cache(tmp_path / "data" / "heart", "detection")
    call = f"--raw {tmp_path} --task detection --out {tmp_path} --amp fp16 --folds".split()
    recipes.main([*call, "0"])
    recipes.main([*call, "0", "1"])
    first, _, _, again, second, evaluation, test = commands
    assert recipes.value_of(first, "--amp") == "fp16" and "--resume" not in first
    assert again == [*first, "--resume"]
    assert recipes.value_of(second, "--fold") == "1"
    runs = [f"{tmp_path}/runs/heart_fold{fold}_seed0" for fold in (0, 1)]
    checkpoints = [f"{run}/last.pt" for run in runs]
    assert [word for word in evaluation if word.endswith(".pt")] == checkpoints
    assert test == [*evaluation, "--split", "test"]
    by = report(Path(runs[0]) / "eval_val-2")["by"]
    assert [row["value"] for row in by["values"]] == ["0", "1"]
