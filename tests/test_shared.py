"""What the task folders share is written the same in each: the loop can be read side by side, and copied."""

import ast
import difflib
import re
from itertools import combinations

import pytest

from tests.caches import NAMES, ROOT

# Functions and classes that may differ although folders call them the same: what the task is about.
OWN = {
    "preprocess": {"Case", "find_cases", "parse_args", "load"}
    | {"write_index", "preprocess", "main"},
    "dataset": {"open_cache", "XrayDataset", "EpochBatches", "augment", "to_input"}
    | {"draw_phantom", "write_dicom", "write_demo"},
    "model": {"build_model", "LOSSES"},
    "train": {"parse_args", "prepare_cache", "make_loaders", "evaluate", "main"},
    "eval": {"parse_args", "load_runs", "check_same", "predict", "list_cases", "load_image"}
    | {"evaluate_split", "predict_images", "describe_run"},
}

# How many of them two folders share at least: a pair of X-rays, and one of an X-ray and a volume
LEAST = {
    "preprocess": (50, 4),
    "dataset": (8, 5),
    "model": (3, 0),
    "train": (10, 10),
    "eval": (4, 4),
}


def definitions(task: str, script: str) -> dict[str, str]:
    """The text of every function and class of a script, and of LOSSES, by its name."""
    text = (ROOT / task / f"{script}.py").read_text().replace(task, "TASK")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.Assign) and script == "model":
            name = getattr(node.targets[0], "id", "")
        if name:
            found[name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("script", OWN)
def test_functions_of_the_same_name_are_the_same(script):
    for a, b in combinations(NAMES, 2):
        first, second = definitions(a, script), definitions(b, script)
        shared = first.keys() & second.keys() - OWN[script]
        assert [name for name in shared if first[name] != second[name]] == [], (a, b)
        assert len(shared) >= LEAST[script][b == "segmentation"], (a, b, sorted(shared))


def test_training_scripts_can_be_compared_line_by_line():
    for a, b in combinations(NAMES, 2):
        lines = [(ROOT / task / "train.py").read_text().splitlines() for task in (a, b)]
        assert difflib.SequenceMatcher(None, *lines, autojunk=False).ratio() >= 0.75, (a, b)


def test_nothing_is_written_twice_in_a_folder():
    for task in NAMES:
        names = [name for script in OWN for name in definitions(task, script)]
        assert {n for n in names if names.count(n) > 1} <= {"parse_args", "main"}
        seen = {}  # the name of a function by its body, without docstring
        for script in OWN:
            for node in ast.walk(ast.parse((ROOT / task / f"{script}.py").read_text())):
                if isinstance(node, ast.FunctionDef):
                    body = node.body[1:] if ast.get_docstring(node) else node.body
                    text = "\n".join(map(ast.dump, body))
                    assert len(body) < 2 or text not in seen, (task, node.name, seen.get(text))
                    seen[text] = node.name


# Phrases that a native engineer would not write, each rewritten at least once
PHRASES = """
to tell classes of X-rays apart | raw data that get one | stays there: reading it would wait
a bad batch moves little | in its own place | no number to go on with | none is left over
speaks for all | are the features of its first stage | As torchvision starts
Nothing of another hospital | which nobody can report | What tells copies | what public sets have
is to be taken for this run | Go on from last.pt | promises more than it holds
What of meta.json goes | nibabel's way to say | in parts of it | Say what the unit
Weights are bells | which is told for each case | that is all there is | that load as well
No fold left out | All that decides the result | For scale: | For whom it fails
What depends on the order | What is left is mostly | Where a patch begins | a mean by some
a metric of nothing | are known by | are not to be had | are what the maps replace
as long as no case | averages are those of few | be it a | beside each other for
called by the number | comes out again | does not cost the results | few images are enough to learn
has come to its end | hardly meet | how they arose | is that of all pairs
it reaches what it reaches | look whether | no place in the order | no type of its own
no way to tell | nothing can get smaller | nothing there and nothing found | of a split arose
on purpose about | one question that every | removed since | share a maker | stays behind
takes the memory it needs | than all else | the best one there is | the squared way
these then tell | too narrow to be told | trained by nothing | what lies where | what speaks for
where it lies wrongly | which only suggests | with its name at the end | with their names at the end
writers look at the suffix |   # a note |   # of a column
"""


def test_phrases_that_were_rewritten_do_not_come_back():
    paths = [ROOT / "README.md"]
    for name in (*NAMES, "common"):
        paths += [*(ROOT / name).glob("*.py"), *(ROOT / name).glob("*.md")]
    assert len(paths) > 20
    phrases = re.split(r" \| |\n", PHRASES.strip())
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert [phrase for phrase in phrases if phrase in text] == [], path
