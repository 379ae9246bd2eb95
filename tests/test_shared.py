"""What the task folders share is written the same in each: the loop can be read side by side, and copied."""

import ast
import difflib
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("classification", "detection", "segmentation")
# Functions and classes that may differ although folders call them the same: what the task is about.
OWN = {
    "preprocess": {"Case", "check_meta", "find_cases", "recognise_layout", "parse_args", "load"}
    | {"write_index", "main"},
    "dataset": {"read_index", "check_row", "XrayDataset", "augment", "to_input"}
    | {"draw_phantom", "write_dicom", "write_demo"},
    "model": {"build_model"},
    "train": {"parse_args", "make_demo", "load_data", "evaluate", "main"},
    "eval": {"parse_args", "load_models", "check_same", "predict", "named"}
    | {"evaluate_split", "predict_images"},
}  # fmt: skip
PATCHES = {
    "open_cache",
    "fingerprints",
    "make_loader",
    "EpochBatches",
}  # segmentation draws places in volumes, the others whole images


def definitions(task: str, script: str) -> dict[str, str]:
    text = (ROOT / task / f"{script}.py").read_text()
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node).replace(task, "TASK") for node in nodes}


@pytest.mark.parametrize("script", OWN)
def test_functions_of_the_same_name_are_the_same(script):
    for a, b in combinations(TASKS, 2):
        first, second = definitions(a, script), definitions(b, script)
        shared = first.keys() & second.keys() - OWN[script] - (PATCHES if b == "segmentation" else set())
        assert [name for name in shared if first[name] != second[name]] == [], (a, b)
        assert len(shared) >= {"preprocess": 8, "train": 6, "eval": 3}.get(script, 0)


def test_training_scripts_can_be_compared_line_by_line():
    for a, b in combinations(TASKS, 2):
        lines = [(ROOT / task / "train.py").read_text().splitlines() for task in (a, b)]
        assert difflib.SequenceMatcher(None, *lines, autojunk=False).ratio() >= 0.75, (a, b)


def test_no_function_is_written_twice_in_a_folder():
    for task in TASKS:
        names = [name for script in OWN for name in definitions(task, script)]
        assert {n for n in names if names.count(n) > 1} <= {"parse_args", "main"}
