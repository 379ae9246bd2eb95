"""The commands of the READMEs are understood and run, the first one from nothing to a score."""

import ast
import glob
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.caches import small_network

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MANUALS = [
    (ROOT / task / "README.md").read_text(encoding="utf-8")
    for task in ("classification", "detection", "segmentation")
]


def unroll(text: str, most: int = 9) -> str:
    """Loops of the shell over one command as that command for each word, for the first ones."""

    def repeat(loop: re.Match) -> str:
        name, words, command = loop.groups()
        words = words.split()[:most]
        return "\n".join(f"    {command}".replace(f"${name}", word) for word in words)

    text = re.sub(r" *\\\n +", " ", text)  # a command on several lines
    loop = r"^ {4}for (\w+) in ([\w ]+); do\n +(.*)\n {4}done$"
    return re.sub(loop, repeat, text, flags=re.MULTILINE)


# In a block of their own, or in a cell of a table
COMMANDS = re.findall(
    r"(?:^ {4}|`)python (\w+)/(\w+)\.py([^`\n]*)(?:`|$)",
    unroll("\n".join([README, *MANUALS])),
    re.MULTILINE,
)


def test_loops_are_unrolled():
    loop = (
        "    for k in 0 1; do\n        python a.py --fold $k --out r_$k\n    done\n    python b.py"
    )
    first = "    python a.py --fold 0 --out r_0"
    assert unroll(loop) == f"{first}\n{first.replace('0', '1')}\n    python b.py"
    assert unroll(loop, most=1) == f"{first}\n    python b.py"
    trainings = [options for _, script, options in COMMANDS if script == "train"]
    assert sum("--fold 4" in options for options in trainings) == 1


@pytest.mark.parametrize(("task", "script", "options"), COMMANDS)
def test_readme_commands_are_understood(task, script, options):
    arguments = importlib.import_module(f"{task}.{script}").parse_args(shlex.split(options))
    assert script == "train" or arguments.data or arguments.images


def test_the_tree_of_files_is_that_of_the_repository():
    """Every script is listed, with its length to 10 %."""
    listed = re.findall(r"^ {6}(\w+\.py) +(\d+) ", README, re.MULTILINE)
    scripts = ("preprocess.py", "dataset.py", "model.py", "train.py", "eval.py")
    paths = [
        ROOT / task / name
        for task in ("classification", "detection", "segmentation")
        for name in scripts
    ]
    paths += [ROOT / "common" / name for name in ("checkpoint.py", "metrics.py")]
    assert [name for name, _ in listed] == [path.name for path in paths]
    for path, (_, length) in zip(paths, listed, strict=True):
        assert len(path.read_text().splitlines()) == pytest.approx(int(length), rel=0.1), path


def test_ci_runs_the_readmes_test_command():
    """What .ci/run would evaluate: everything up to pytest, which would be this run once more."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (evaluated,) = [
        line.removeprefix("eval ").strip('"') for line in lines if line.startswith("eval ")
    ]
    command = subprocess.run(
        ["bash", "-c", f"echo {evaluated}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *install, test = command.stdout.strip().split(" && ")
    assert [words.split()[0] for words in install] == ["python3", ".", "pip"]
    assert (ROOT / install[-1].split()[-1]).is_file()
    python, *options = test.split()
    assert python == "python"
    subprocess.run(
        [sys.executable, *options, "--version"], cwd=ROOT, capture_output=True, check=True
    )


def test_the_first_command_is_the_training_that_is_tested_below():
    first = next(line.strip() for line in README.splitlines() if line.startswith("    "))
    assert first.split(" && ")[-1].split() == ["python", "classification/train.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options", "figure", "low", "picture"),
    [
        ("classification", "--epochs 7 --channels 16 --lr 2e-3", "auroc", 0.8, "mistakes"),
        ("detection", "--epochs 4 --channels 16", "mean_iou", 0.6, "gallery"),
    ],
)
def test_a_training_without_data_names_the_next_command(
    task, options, figure, low, picture, tmp_path
):
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


def small_raw(task: str) -> None:
    """The raw set and the new images that the manual's commands name, in the working folder."""
    dataset = importlib.import_module(f"{task}.dataset")
    if task == "segmentation":
        dataset.write_demo(Path("Task04_Hippocampus"), cases=10, size=36)
        image = next(Path("Task04_Hippocampus/imagesTr").iterdir())
        shutil.copy(image, "scan.nii.gz")
        Path("dicom_folder").mkdir()
        shutil.copy(image, "dicom_folder/other.nii.gz")
        for k in range(10):
            mask = np.zeros((24, 24), np.uint8)
            mask[k : k + 8, 4:20] = 255
            for name, pixels in (("images", mask // 2 + k), ("masks", mask)):
                Path("lesions", name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(f"lesions/{name}/{k}.png")
        shutil.copytree("lesions/images", "new_pictures")
        return
    raw = {"classification": "rsna-pneumonia-detection-challenge", "detection": "heart_xray"}[task]
    dataset.write_demo(Path(raw), patients=40)
    image = next(Path(raw).rglob("*.dcm"))
    shutil.copy(image, "scan.dcm")
    Path("more_scans").mkdir()
    shutil.copy(image, "more_scans/IM0001")


def list_commands(manual: str) -> list[list[str]]:
    """Task, script and options of all commands in blocks, of a loop the first two."""
    lines = re.findall(r"^ {4}python (\w+)/(\w+)\.py(.*)$", unroll(manual, 2), re.MULTILINE)
    return [[task, script, *shlex.split(options)] for task, script, options in lines]


def run_small(commands: list[list[str]]) -> None:
    """The commands one after another, in the working folder, with options that save time."""
    with small_network():
        for task, script, *options in commands:
            words = []
            for word in options:
                words += sorted(glob.glob(word)) if "?" in word else [word]
            if script == "preprocess" and task != "segmentation":
                words += ["--size", "32"]
            if script == "train":
                words += ["--epochs", "1", "--batch-size", "4", "--workers", "0"]
            if script == "train" and task == "segmentation":
                words += ["--channels", "2"]
            if "--patch" in options:
                words += [
                    "--patch",
                    *["8"] * (3 if options[options.index("--dims") + 1] == "3" else 2),
                ]
            importlib.import_module(f"{task}.{script}").main(words)


def write_recipe_data(task: str, raw: Path) -> None:
    """A small set in the layout of the one that a recipe names."""
    rng = np.random.default_rng(0)
    if task == "segmentation":
        importlib.import_module("segmentation.dataset").write_demo(raw, cases=10, size=36)
        return
    pictures = rng.integers(0, 256, (40, 32, 32), dtype=np.uint8)
    if raw.suffix == ".npz":
        labels = np.arange(40)[:, None] % 2
        train = {"train_images": pictures[:30], "train_labels": labels[:30]}
        np.savez(raw, **train, val_images=pictures[30:], val_labels=labels[30:])
        return
    labels = ["image,pneumonia,bacteria,virus"]
    boxes = ["image,xmin,ymin,xmax,ymax"]
    for k, picture in enumerate(pictures):
        names = {
            "chest_xray": (f"NORMAL/IM-{k}-0001.png", f"PNEUMONIA/person{k}_virus_1.png"),
            "kermany": (f"train/IM-{k}-0001.png", f"train/person{k}_virus_1.png"),
            "heart_xray": (f"jsrt{k}.png", f"wingspan{k}.png"),
        }[raw.name]
        name = names[k % 2]
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(raw / name)
        labels.append(f"{name},1,{k // 2 % 2},{1 - k // 2 % 2}" if k % 2 else f"{name},0,,")
        boxes.append(f"{name},4,4,20,{20 + k % 8}")
    if raw.name == "kermany":
        (raw / "labels.csv").write_text("\n".join(labels))
    if task == "detection":
        (raw / "boxes.csv").write_text("\n".join(boxes))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_the_recipes_of_a_manual_run_on_small_data(task, tmp_path, monkeypatch):
    """All commands between the headings "Recipe..." and "Copy it", in their order."""
    monkeypatch.chdir(tmp_path)
    manual = (ROOT / task / "README.md").read_text(encoding="utf-8")
    commands = list_commands(manual.split("## Recipe")[1].split("## Copy it")[0])
    preparations = [words for words in commands if words[1] == "preprocess"]
    for raw in {words[words.index("--data") + 1] for words in preparations}:
        write_recipe_data(task, Path(raw))
    run_small(commands)
    trainings = [words for words in commands if words[1] == "train"]
    assert preparations and trainings
    outs = {Path(words[words.index("--out") + 1]) for words in trainings}
    assert {path.parent for path in Path("runs").glob("*/best.pt")} == outs


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_the_steps_of_a_manual_run_as_they_stand(task, tmp_path, monkeypatch):
    """From the raw set to predictions, with one epoch; other people's data are left out."""
    monkeypatch.chdir(tmp_path)
    small_raw(task)
    manual = (ROOT / task / "README.md").read_text(encoding="utf-8").split("Recipe")[0]
    commands = list_commands(manual)
    other = "other|atrium|acdc|lesions|HAM10000"
    own = [words for words in commands if not re.search(other, str(words))]
    run_small(own)
    done = [script for _, script, *_ in own]
    assert done[0] == "preprocess" and done[-2:] == ["eval", "eval"] and "train" in done
    assert list(tmp_path.glob("runs/*/eval_val/metrics.json"))
    assert list(tmp_path.glob("runs/*/predictions/*.csv"))
    if task == "segmentation":
        loop = [words for words in list_commands(README) if "--fold" in words or "?" in words[-1]]
        run_small(loop)
        assert list(tmp_path.glob("runs/*_0/eval_val/metrics.json"))


def python_block(task: str, begin: str) -> str:
    """The indented block after the line of a manual that begins so."""
    manual = (ROOT / task / "README.md").read_text(encoding="utf-8")
    block = re.search(
        rf"^{begin}[^\n]*(?:\n\S[^\n]*)*\n\n((?: {{4}}[^\n]*\n|\n)+)", manual, re.MULTILINE
    )
    return textwrap.dedent(block[1])


def test_two_models_are_compared_by_their_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    truth = [k % 2 for k in range(24)]
    for name, scores in (("rsna", truth), ("other", [0.5] * 24)):
        folder = Path("runs", name, "eval_test")
        folder.mkdir(parents=True)
        rows = ["id,patient,label,probability_pneumonia"]
        for k, score in enumerate(scores):
            rows.append(f"i{k},p{k // 2},{('no', 'pneumonia')[truth[k]]},{score}")
        (folder / "predictions.csv").write_text("\n".join(rows))
    exec(python_block("classification", "Two models"), {})
    printed = capsys.readouterr().out.strip().replace("nan", "None")
    difference = ast.literal_eval(printed)["auroc"]
    assert difference["value"] == 0.5  # 1 for the first, and ties for the second
    assert difference["low"] is None  # the same in all samples


def test_boxes_are_shifted_by_the_offsets_of_labelled_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edges = ("xmin", "ymin", "xmax", "ymax")
    rows = {"other": [",".join([*edges, *(f"true_{edge}" for edge in edges)])]}
    rows["other"] += ["10,10,50,50,10,16,50,50", "10,10,50,50,10,20,50,50"]  # 8 lower on average
    rows["new"] = [",".join(["image", *edges]), "a.png,1,2,30,40"]
    for name, lines in rows.items():
        folder = Path("runs", "heart", name)
        folder.mkdir(parents=True)
        (folder / "predictions.csv").write_text("\n".join(lines))
    exec(python_block("detection", "The mean offset"), {})
    offsets, boxes = capsys.readouterr().out.strip().split("\n")
    assert "+- [0." in offsets
    found = [float(value) for value in re.findall(r"[\d.]+(?=[,\])])", boxes.split("png")[1])]
    assert found == pytest.approx([1, 2 + 8 * 2 / 3, 30, 40])


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_another_network_and_another_loss_as_the_manual_has_them(task):
    names = vars(importlib.import_module(f"{task}.model")).copy()
    names |= {"num_classes": 2, "meta": {"channels": ["MR"], "classes": ["background", "organ"]}}
    body = textwrap.indent(python_block(task, "Another network"), "    ")
    exec(f"def build():\n{body}\n", names)
    exec(python_block(task, "Another loss"), names)
    images = torch.rand(2, 1, 16, 16, 16) if task == "segmentation" else torch.rand(2, 1, 64, 64)
    output = names["build"]().eval()(images)
    expected = {"classification": (2, 2), "detection": (2, 4)}
    assert output.shape == expected.get(task, (2, 2, 16, 16, 16))
    targets = {
        "classification": (torch.tensor([0, 1]), None),
        "detection": (torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.1, 0.9, 0.8]]),),
    }
    default = (torch.ones(2, 16, 16, 16, dtype=torch.long),)
    (loss,) = [
        value
        for value in map(names.get, ("focal_loss", "complete_iou", "heavy_cross_entropy"))
        if value
    ]
    loss(output, *targets.get(task, default)).backward()
