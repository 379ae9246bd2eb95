"""The commands and code of the READMEs are understood and run, the first one from nothing to a score."""

import ast
import functools
import glob
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.caches import NAMES, ROOT, TASKS, module, small_network, write_raw
from tests.raw import dicom, draw, noise, table

README = (ROOT / "README.md").read_text(encoding="utf-8")
MANUALS = {task: (ROOT / task / "README.md").read_text(encoding="utf-8") for task in NAMES}
OTHERS = "other|left_atrium|acdc|HAM10000"  # people's data that no step before them has made


def unroll(text: str) -> str:
    """Loops of the shell over one command as that command for each word."""

    def repeat(loop: re.Match) -> str:
        name, words, command = loop.groups()
        return "\n".join(f"    {command}".replace(f"${name}", word) for word in words.split())

    text = re.sub(r" *\\\n +", " ", text)  # a command on several lines
    loop = r"^ {4}for (\w+) in ([\w ]+); do\n +(.*)\n {4}done$"
    return re.sub(loop, repeat, text, flags=re.MULTILINE)


def list_commands(manual: str) -> list[list[str]]:
    """Task, script and options of all commands in blocks."""
    lines = re.findall(r"^ {4}python (\w+)/(\w+)\.py(.*)$", unroll(manual), re.MULTILINE)
    return [[task, script, *shlex.split(options)] for task, script, options in lines]


def test_commands_are_understood_in_blocks_and_cells_of_tables():
    commands = []
    for text in (README, *MANUALS.values()):
        commands += list_commands(text)
        cells = re.findall(r"`python (\w+)/(\w+)\.py([^`\n]*)`", text)
        commands += [[task, script, *shlex.split(options)] for task, script, options in cells]
    for task, script, *options in commands:
        args = module(task, script).parse_args(options)
        assert script == "train" or args.data or args.images, options
    assert len(commands) > 50
    assert len([words for words in commands if "--fold" in words]) == 5  # a loop, unrolled


def test_the_tree_of_files_is_that_of_the_repository():
    scripts = ("preprocess.py", "dataset.py", "model.py", "train.py", "eval.py")
    paths = [ROOT / task / name for task in NAMES for name in scripts]
    paths += [ROOT / "common" / name for name in ("checkpoint.py", "metrics.py")]
    listed = re.findall(r"^ {6}(\w+\.py) +(\d+) ", README, re.MULTILINE)
    for path, (name, length) in zip(paths, listed, strict=True):
        assert name == path.name
        assert len(path.read_text().splitlines()) == pytest.approx(int(length), rel=0.1), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options", "score", "low", "picture"),
    [
        ("classification", "--epochs 8 --augment 0", "auroc", 0.8, "mistakes"),
        ("detection", "--epochs 6", "mean_iou", 0.6, "gallery"),
    ],
)
def test_a_training_without_data_learns_and_names_the_next_command(
    task, options, score, low, picture, tmp_path, monkeypatch, capsys
):
    first = next(line for line in README.splitlines() if line.startswith("    "))
    assert first.endswith(" && python classification/train.py")
    monkeypatch.chdir(tmp_path)
    script = module(task, "train")
    write_demo = functools.partial(script.dataset.write_demo, patients=90)
    monkeypatch.setattr(script.dataset, "write_demo", write_demo)
    script.main([*options.split(), *["--batch-size", "12", "--channels", "16", "--workers", "0"]])
    output = capsys.readouterr().out
    scores = [float(text) for text in re.findall(rf"val_{score} ([\d.]+)", output)]
    losses = [float(text) for text in re.findall(r"train_loss (\S+)", output)]
    assert low < max(scores) and min(losses) < losses[0] / 2
    python, path, *words = shlex.split(output.rsplit("next: ", 1)[1])
    assert (python, path) == ("python", f"{task}/eval.py")
    module(task, "eval").main(words)
    again = re.search(rf"^{score} +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert float(again[1]) == max(scores)
    assert Path("runs", task, "eval_val", f"{picture}.png").is_file()


# --- the steps and the recipes of the manuals, on small data ---


def write_set(raw: Path, task: str) -> None:
    """A small set in the layout of the one that a command names."""
    if raw.suffix == ".npz":
        arrays = {}
        for split, count in (("train", 30), ("val", 10)):
            arrays[f"{split}_images"] = noise(split, count, 32, 32)
            arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
        np.savez(raw, **arrays)
        return
    layouts = {
        "chest_xray": ("NORMAL/IM-{}-0001", "PNEUMONIA/person{}_virus_1"),
        "kermany": ("train/IM-{}-0001", "train/person{}_virus_1"),
        "heart_xray": ("jsrt{}", "wingspan{}"),
        "lesions": ("images/a{}", "images/b{}"),
    }
    if raw.name not in layouts:
        write_raw(raw, task)
        return
    names = [layouts[raw.name][k % 2].format(k) for k in range(40)]
    draw(raw, " ".join(names))
    if raw.name == "kermany":
        rows = [f"{name},{k % 2},{k // 2 % 2},{1 - k // 2 % 2}" for k, name in enumerate(names)]
        table(raw, " ".join(["image,pneumonia,bacteria,virus", *rows]), "")
    if raw.name == "heart_xray":
        rows = [f"{name},2,2,8,{8 + k % 4}" for k, name in enumerate(names)]
        table(raw, " ".join(["image,xmin,ymin,xmax,ymax", *rows]), "", "boxes.csv")
    if raw.name == "lesions":
        (raw / "masks").mkdir()
        for name in names:
            mask = np.where(noise(name) > 128, 255, 0).astype(np.uint8)
            Image.fromarray(mask).save(raw / f"{name}.png".replace("images", "masks"))


def run_small(commands: list[list[str]]) -> None:
    """The commands one after another, in the working folder, with options that save time."""
    with small_network():
        for task, script, *options in commands:
            words = []
            for word in options:
                words += sorted(glob.glob(word)) if "?" in word else [word]
            if script == "preprocess":
                write_set(Path(options[options.index("--data") + 1]), task)
                words += [] if task == "segmentation" else ["--size", "32"]
            if script == "train":
                words += ["--epochs", "1", "--batch-size", "4", "--workers", "0"]
                words += ["--channels", "2"] if task == "segmentation" else []
            if "--patch" in options:
                words += ["--patch", "8", "8", "8"]
            module(task, script).main(words)


@pytest.mark.slow
@TASKS
def test_the_recipes_of_a_manual_run_on_small_data(task, tmp_path, monkeypatch):
    """All commands between the headings "Recipe..." and "Copy it", in their order."""
    monkeypatch.chdir(tmp_path)
    commands = list_commands(MANUALS[task].split("## Recipe")[1].split("## Copy it")[0])
    run_small(commands)
    trainings = [words for words in commands if words[1] == "train"]
    outs = {Path(words[words.index("--out") + 1]) for words in trainings}
    assert outs and {path.parent for path in Path("runs").glob("*/best.pt")} == outs


@pytest.mark.slow
@TASKS
def test_the_steps_of_a_manual_run_as_they_stand(task, tmp_path, monkeypatch):
    """From the raw set to predictions, with one epoch; other people's data are left out."""
    monkeypatch.chdir(tmp_path)
    for name in ("scan.dcm", "more_scans/IM0001"):
        dicom(Path(name), noise(name, 40, 40))
    for name in ("dicom_folder", "new_pictures"):
        write_set(
            tmp_path / "lesions" if name == "new_pictures" else tmp_path / name, "segmentation"
        )
    Path("dicom_folder/imagesTr/v0.nii.gz").rename("scan.nii.gz")
    Path("new_pictures").symlink_to("lesions/images")
    commands = list_commands(MANUALS[task].split("Recipe")[0])
    commands = [words for words in commands if not re.search(OTHERS, str(words))]
    run_small(commands)
    scripts = [script for _, script, *_ in commands]
    assert scripts[0] == "preprocess" and scripts[-2:] == ["eval", "eval"] and "train" in scripts
    assert list(tmp_path.glob("runs/*/eval_val/metrics.json"))
    assert list(tmp_path.glob("runs/*/predictions/*.csv"))
    if task == "segmentation":
        loop = [words for words in list_commands(README) if "--fold" in words or "?" in words[-1]]
        run_small([*loop[:2], loop[-1]])
        assert list(tmp_path.glob("runs/*_0/eval_val/metrics.json"))


# --- code in the manuals ---


def python_block(task: str, begin: str) -> str:
    """The indented block after the line of a manual that begins so."""
    lines = rf"^{begin}[^\n]*(?:\n\S[^\n]*)*\n\n((?: {{4}}[^\n]*\n|\n)+)"
    return textwrap.dedent(re.search(lines, MANUALS[task], re.MULTILINE)[1])


def write_rows(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(rows))


def test_two_models_are_compared_by_their_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    truth = [k % 2 for k in range(24)]
    for name, scores in (("rsna", truth), ("other", [0.5] * 24)):
        rows = ["id,patient,label,probability_pneumonia"]
        for k, score in enumerate(scores):
            rows.append(f"i{k},p{k // 2},{('no', 'pneumonia')[truth[k]]},{score}")
        write_rows(Path("runs", name, "eval_test", "predictions.csv"), *rows)
    exec(python_block("classification", "Two models"), {})
    printed = capsys.readouterr().out.strip().replace("nan", "None")
    difference = ast.literal_eval(printed)["auroc"]
    assert difference["value"] == 0.5  # 1 for the first, and ties for the second
    assert difference["low"] is None  # the same in all samples


def test_boxes_are_shifted_by_the_offsets_of_labelled_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    head = "xmin,ymin,xmax,ymax,true_xmin,true_ymin,true_xmax,true_ymax"
    other = ["10,10,50,50,10,16,50,50", "10,10,50,50,10,20,50,50"]  # 8 lower on average
    write_rows(Path("runs/heart/other/predictions.csv"), head, *other)
    new = ["image,xmin,ymin,xmax,ymax", "a.png,1,2,30,40"]
    write_rows(Path("runs/heart/new/predictions.csv"), *new)
    exec(python_block("detection", "The mean offset"), {})
    offsets, boxes = capsys.readouterr().out.strip().split("\n")
    assert "+- [0." in offsets
    found = [float(value) for value in re.findall(r"[\d.]+(?=[,\])])", boxes.split("png")[1])]
    assert found == pytest.approx([1, 2 + 8 * 2 / 3, 30, 40])


@pytest.mark.parametrize(
    ("task", "side", "shape", "targets"),
    [
        ("classification", (64, 64), (2, 2), (torch.tensor([0, 1]), None)),
        ("detection", (64, 64), (2, 4), (torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 2),)),
        ("segmentation", (16,) * 3, (2, 2, 16, 16, 16), (torch.ones(2, 16, 16, 16).long(),)),
    ],
)
def test_another_network_and_another_loss_as_the_manual_has_them(task, side, shape, targets):
    names = vars(module(task, "model")).copy()
    names |= {"num_classes": 2, "meta": {"channels": ["MR"], "classes": ["background", "organ"]}}
    body = textwrap.indent(python_block(task, "Another network"), "    ")
    exec(f"def build():\n{body}\n", names)
    loss = python_block(task, "Another loss")
    exec(loss, names)
    output = names["build"]().eval()(torch.rand(2, 1, *side))
    assert output.shape == shape
    names[re.search(r"def (\w+)", loss)[1]](output, *targets).backward()
