"""Break the code on purpose, one place at a time, and list what the tests do not notice.

  python tests/mutants.py                                  # a sample of 10 places of every module
  python tests/mutants.py common/metrics.py --sample 50
  python tests/mutants.py segmentation/eval.py --line 320  # all places of that line

Run by hand: it takes from seconds to minutes a place. A place is an operator, a number, a
condition, a keyword argument or a statement; it is exchanged, dropped or negated in a copy of the
repository, where the tests of the module run until the first one fails. Those that compare the text
of the folders are left out, because they fail for any change; so are messages.
"""

import argparse
import ast
import copy
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The tests that say something about a module, the quick ones first.
TESTS = {
    "common/checkpoint.py": ["test_checkpoint", "test_safety"],
    "common/metrics.py": ["test_metrics", "test_folds", "test_multi_label"],
    "classification/preprocess.py": [
        "test_reader",
        "test_preprocess",
        "test_label_tables",
        "test_multi_label",
        "test_color",
    ],
    "classification/dataset.py": ["test_dataset_classification", "test_multi_label", "test_safety"],
    "classification/model.py": ["test_dataset_classification", "test_multi_label"],
    "classification/train.py": ["test_training", "test_safety", "test_classification"],
    "classification/eval.py": [
        "test_folds",
        "test_multi_label",
        "test_safety",
        "test_classification",
    ],
    "detection/preprocess.py": ["test_detection", "test_reader"],
    "detection/dataset.py": ["test_safety", "test_detection"],
    "detection/model.py": ["test_detection"],
    "detection/train.py": ["test_training", "test_safety", "test_detection"],
    "detection/eval.py": ["test_folds", "test_safety", "test_detection"],
    "segmentation/preprocess.py": ["test_segmentation_data", "test_volumes"],
    "segmentation/dataset.py": ["test_segmentation_data", "test_safety"],
    "segmentation/model.py": ["test_segmentation_data"],
    "segmentation/train.py": ["test_training", "test_safety", "test_segmentation"],
    "segmentation/eval.py": ["test_folds", "test_safety", "test_segmentation", "test_volumes"],
}
OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="(default: all)")
    parser.add_argument(
        "--sample", type=int, default=10, help="places a module (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--line", type=int, help="all places of this line instead of a sample")
    parser.add_argument(
        "--timeout", type=int, default=600, help="seconds a place (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    unknown = [module for module in args.modules if module not in TESTS]
    if unknown:
        parser.error(f"{unknown[0]}, expected some of {' '.join(TESTS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    total, survived = 0, 0
    for module in args.modules or TESTS:
        source = (ROOT / module).read_text(encoding="utf-8")
        mutants = list(find_mutants(source))
        if args.line:
            mutants = [mutant for mutant in mutants if mutant[0] == args.line]
        else:
            random.Random(args.seed).shuffle(mutants)
            mutants = mutants[: args.sample]
        count = 0
        for line, what, mutated in mutants:
            if not is_noticed(module, mutated, args.timeout):
                count += 1
                print(f"  survives: {module}:{line}  {what}", flush=True)
        print(f"{module}: {count} of {len(mutants)} survive", flush=True)
        total, survived = total + len(mutants), survived + count
    print(f"{survived} of {total} survive")


def find_mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line number, what was done, and the whole text, for every place that can be broken."""
    tree = ast.parse(source)
    messages = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    passed_over = {id(part) for message in messages for part in ast.walk(message)}
    for node in ast.walk(tree):
        if id(node) not in passed_over:
            for what, replacement in break_node(node):
                yield node.lineno, what, replace(source, node, replacement)


def break_node(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What can be done to a node, and the text to put in its place."""
    text = ast.unparse(node).split("\n")[0][:60] if isinstance(node, (ast.expr, ast.stmt)) else ""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OTHER_OPERATOR:
        changed = copy.deepcopy(node)
        changed.op = OTHER_OPERATOR[type(node.op)]()
        yield f"{text}  ->  {type(changed.op).__name__}", ast.unparse(changed)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER_OPERATOR:
        changed = copy.deepcopy(node)
        changed.ops[0] = OTHER_OPERATOR[type(node.ops[0])]()
        yield f"{text}  ->  {type(changed.ops[0]).__name__}", f"({ast.unparse(changed)})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"{text}  ->  without {type(node.op).__name__}", f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{text}  ->  {not node.value}", str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        other = node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.1
        yield f"{text}  ->  {other}", str(other)
    if isinstance(node, ast.Call):
        for k, keyword in enumerate(node.keywords):
            if keyword.arg not in ("help", "metavar", "strict", "encoding"):
                changed = copy.deepcopy(node)
                del changed.keywords[k]
                yield f"{text}  ->  without {keyword.arg}", ast.unparse(changed)
    if isinstance(node, (ast.If, ast.IfExp)):
        condition = ast.unparse(node.test)
        for value in ("True", "False"):
            if isinstance(node, ast.IfExp):
                changed = copy.deepcopy(node)
                changed.test = ast.Constant(value == "True")
                yield f"{text}  ->  {value}", f"({ast.unparse(changed)})"
            else:
                yield f"if {condition[:60]}  ->  {value}", f"if {value}"
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)):
        yield f"{text}  ->  dropped", "pass"


def replace(source: str, node: ast.AST, text: str) -> str:
    """The source with other text in the place of a node; of an `if` only its head."""
    lines = source.encode().splitlines(keepends=True)  # columns of ast are bytes
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    start = starts[node.lineno - 1] + node.col_offset
    last = node.test if isinstance(node, ast.If) else node
    end = starts[last.end_lineno - 1] + last.end_col_offset
    if isinstance(node, ast.If):
        head = source.encode()[start:end].decode()
        text = text if not head.startswith("elif") else f"el{text}"
        rest = source.encode()[end:]
        end += len(rest) - len(rest.lstrip(b" \n)"))  # the brackets of a long condition
    return (source.encode()[:start] + text.encode() + source.encode()[end:]).decode()


def is_noticed(module: str, mutated: str, timeout: int) -> bool:
    """Whether the tests of a module fail in a copy of the repository with this text in place."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        shutil.copytree(
            ROOT, work, ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__")
        )
        (work / module).write_text(mutated, encoding="utf-8")
        tests = [
            f"tests/{name}.py" for name in TESTS[module] if (work / "tests" / f"{name}.py").exists()
        ]
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not two_processes and not compile_has",
        ]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        try:
            done = subprocess.run(
                command, cwd=work, capture_output=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return True
        return done.returncode != 0


if __name__ == "__main__":
    main()
