"""segmentation/train.py and eval.py: the real commands at a tiny setting."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from segmentation import dataset, preprocess, train
from segmentation import eval as evaluation
from segmentation.preprocess import DataError
from tests.caches import write_index
from tests.conftest import assert_same_training, read_table, run_scripts

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TINY = ["--epochs", "2", "--workers", "0", "--device", "cpu", "--channels", "4"]
DIMS = pytest.mark.parametrize("dims", ["2", "3"])


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw3")
    dataset.write_demo(folder, cases=8)
    return folder


@pytest.fixture(scope="session")
def cache(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache3") / "demo"
    preprocess.main(["--data", str(raw), "--out", str(out), "--spacing", "4", "4", "5"])
    return out


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("runs3")
    for dims in "23":
        train.main(["--data", str(cache), "--out", str(out / dims), "--dims", dims, *TINY])
    return {dims: out / dims for dims in "23"}


# --- train.py ---


@DIMS
def test_stop_and_resume_equal_the_straight_run(cache, trained, tmp_path, dims):
    command = ["--data", str(cache), "--out", str(tmp_path), "--dims", dims, *TINY]
    train.main([*command, "--stop-after", "1"])
    train.main([*command, "--resume", "--workers", "2"])  # workers change nothing either
    assert_same_training(trained[dims], tmp_path)
    assert [row["epoch"] for row in read_table(tmp_path / "log.csv")] == ["1", "2"]


def test_resume_refuses_other_settings(cache, trained):
    command = ["--data", str(cache), "--out", str(trained["2"]), *TINY]
    with pytest.raises(CheckpointError, match=r"loss dice_ce \(now dice\)"):
        train.main([*command, "--resume", "--loss", "dice"])
    with pytest.raises(CheckpointError, match="--resume, --overwrite"):
        train.main(command)


def test_two_processes_and_eval(cache, tmp_path):
    script = ROOT / "segmentation" / "train.py"
    options = ["--data", str(cache), *TINY]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(script), *options, "--out", "a"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 ") == 1  # only rank 0 speaks
    for more in (["--stop-after", "1"], ["--resume"]):  # and without the launcher
        done = run_scripts(script, *options, "--out", "b", *more, cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "a", tmp_path / "b")
    printed = load_checkpoint(tmp_path / "a" / "last.pt")["figures"]["dice"]
    evaluation.main(
        ["--data", str(cache), "--checkpoint", str(tmp_path / "a" / "last.pt"), "--samples", "2"]
    )
    assert read_metrics(tmp_path / "a" / "eval_val")["summary"]["dice_cache"]["value"] == printed


@DIMS
def test_overfits_two_volumes(cache, tmp_path, dims):
    (tmp_path / "volumes").mkdir()
    for k in range(4):  # validated on what it has seen
        rng = np.random.default_rng(k % 2)
        mask = np.zeros((16, 14, 12), np.uint8)
        x, y, z = rng.integers(1, 4, 3)
        mask[x : x + 9, y : y + 8, z : z + 6] = 1
        mask[x + 2 : x + 6, y + 2 : y + 6, z : z + 4] = 2
        image = rng.normal(0, 0.3, mask.shape) + np.array([0, 2, 1])[mask]
        points = np.argwhere(mask)
        points = np.column_stack([mask[tuple(points.T)], points])
        for kind, array in (
            ("mask", mask),
            ("image", image[None].astype(np.float16)),
            ("points", points),
        ):
            np.save(tmp_path / "volumes" / f"{k}.{kind}.npy", array)
    rows = [("id", "group", "fold"), *((k, k, k // 2) for k in range(4))]
    (tmp_path / "index.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    meta = preprocess.read_meta(cache) | {"shape": [16, 14, 12], "spacing": [1, 1, 1]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    options = ["--augment", "0", "--workers", "0", "--lr", "5e-3", "--dims", dims]
    options += ["--epochs", "40", "--batch-size", "6"] if dims == "2" else ["--epochs", "80"]
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    log = load_checkpoint(tmp_path / "run" / "last.pt")["log"]
    assert log[0]["val_dice"] < 0.6 and log[-1]["val_dice"] > 0.95


def test_compile_has_no_graph_breaks(cache, trained, tmp_path, monkeypatch):
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    options = [*TINY, "--epochs", "1", "--compile"]
    train.main(["--data", str(cache), "--out", str(tmp_path), *options])
    names = [set(load_checkpoint(path / "last.pt")["model"]) for path in (tmp_path, trained["2"])]
    assert names[0] == names[1]


@DIMS
def test_two_channels_small_volumes_and_mirroring(raw, tmp_path, dims):
    for path in sorted(raw.glob("*Tr/*.nii.gz")):
        nifti = nib.load(path)
        voxels = np.asanyarray(nifti.dataobj)
        voxels = voxels if path.parent.name == "labelsTr" else np.stack([voxels, voxels[::-1]], -1)
        out = tmp_path / "raw" / path.parent.name / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, nifti.affine), out)
    command = ["--data", str(tmp_path / "raw"), "--out", str(tmp_path / "cache")]
    preprocess.main([*command, "--spacing", "6", "6", "6"])
    patch = ["--patch", *["16"] * int(dims), "--mirror", "--loss", "dice"]  # more than the volume
    train.main(
        ["--data", str(tmp_path / "cache"), "--out", str(tmp_path), "--dims", dims, *TINY, *patch]
    )
    command = [
        "--data",
        str(tmp_path / "cache"),
        "--checkpoint",
        str(tmp_path / "best.pt"),
        "--samples",
        "2",
    ]
    evaluation.main([*command, "--tta"])
    evaluation.main([*command, "--out", str(tmp_path / "plain")])
    printed = load_checkpoint(tmp_path / "best.pt")["figures"]["dice"]
    assert read_metrics(tmp_path / "plain")["summary"]["dice_cache"]["value"] == printed


def test_a_loss_that_is_not_finite_stops(cache, tmp_path):
    with pytest.raises(DataError, match=r"epoch 1: the loss is .*lower --lr"):
        options = [*TINY, "--lr", "1e9", "--weight-decay", "1e9"]
        train.main(["--data", str(cache), "--out", str(tmp_path), *options])
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "4000"], "less than one batch"),
        (["--init", "nowhere.pt"], "nowhere.pt: no checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(cache, tmp_path, options, message):
    with pytest.raises((DataError, CheckpointError), match=re.escape(message)):
        train.main(["--data", str(cache), "--out", str(tmp_path), "--workers", "0", *options])


def test_a_fold_without_cases_is_refused(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    rows = read_table(cache / "index.csv")
    for row in rows:
        row["fold"] = row["fold"].replace("1", "2")
    write_index(tmp_path / "cache", rows)
    with pytest.raises(DataError, match="fold 1 leaves no validation cases"):
        train.main(["--data", str(tmp_path / "cache"), "--out", str(tmp_path), "--fold", "1"])


@pytest.mark.parametrize(
    "options",
    [["--epochs", "0"], ["--patch", "8"], ["--dims", "4"], ["--lr", "0"], ["--fold", "5"]],
)
def test_impossible_options_exit_with_status_2(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", "x", *options])
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err


# --- eval.py ---


@DIMS
def test_eval_gives_the_score_that_train_printed(cache, raw, trained, dims):
    path = trained[dims] / "best.pt"
    evaluation.main(["--data", str(cache), "--checkpoint", str(path), "--samples", "20"])
    out = trained[dims] / "eval_val"
    result = read_metrics(out)
    printed = load_checkpoint(path)["figures"]
    assert result["summary"]["dice_cache"]["value"] == printed["dice"]
    names = {"dice", "iou", "hd95_mm", "assd_mm", "volume_error_ml", "dice_wall", "dice_core"}
    assert names <= result["summary"].keys() and result["run"]["n"] == len(result["cases"]) == 2
    assert (
        Image.open(out / "worst.png").size[0] > 500 and Image.open(out / "worst.gif").n_frames > 10
    )
    for row in read_table(out / "cases.csv"):
        image, truth, found = (
            nib.load(folder / f"{row['id']}.nii.gz")
            for folder in (raw / "imagesTr", raw / "labelsTr", out / "predictions")
        )
        assert found.get_data_dtype() == np.uint8 and found.shape == image.shape
        assert np.array_equal(found.affine, image.affine)
        a, b = (np.asanyarray(nifti.dataobj) == 1 for nifti in (truth, found))
        assert float(row["dice_wall"]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_eval_on_the_own_grid_is_the_score_itself(raw, tmp_path):
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "cache"), "--spacing", "keep"])
    train.main(["--data", str(tmp_path / "cache"), "--out", str(tmp_path), *TINY, "--epochs", "1"])
    command = [
        "--data",
        str(tmp_path / "cache"),
        "--checkpoint",
        str(tmp_path / "best.pt"),
        "--samples",
        "2",
    ]
    evaluation.main(command)
    summary = read_metrics(tmp_path / "eval_val")["summary"]
    for name, value in load_checkpoint(tmp_path / "best.pt")["figures"].items():
        assert summary[name]["value"] == (None if np.isnan(value) else value), name


def test_new_images_get_the_masks_of_the_labelled_run(cache, raw, trained, tmp_path, capsys):
    path = trained["3"] / "best.pt"
    command = ["--data", str(cache), "--checkpoint", str(path), "--samples", "2"]
    evaluation.main([*command, "--out", str(tmp_path / "a")])
    known = sorted((tmp_path / "a" / "predictions").glob("*.nii.gz"))
    (tmp_path / "new").mkdir()
    for file in known:
        (tmp_path / "new" / file.name).write_bytes((raw / "imagesTr" / file.name).read_bytes())
    command = [
        "--checkpoint",
        str(path),
        "--out",
        str(tmp_path / "b"),
        "--images",
        str(tmp_path / "new"),
    ]
    evaluation.main(command)
    for file in known:
        first = nib.load(file)
        second = nib.load(tmp_path / "b" / file.name)
        assert np.array_equal(np.asanyarray(first.dataobj), np.asanyarray(second.dataobj))
        assert np.array_equal(first.affine, second.affine)
    assert len(read_table(tmp_path / "b" / "volumes.csv")) == len(known) == 2
    (tmp_path / "bad.nii.gz").write_text("no volume")
    with pytest.raises(DataError, match="1 of 3 images"):
        evaluation.main([*command, str(tmp_path / "bad.nii.gz")])
    assert "bad.nii.gz" in capsys.readouterr().err


def test_the_prediction_lies_on_its_image_in_the_world(raw, cache, tmp_path, monkeypatch):
    """By a network that outlines what is bright: the centers of mask and bright voxels, in mm."""
    nifti = nib.load(raw / "imagesTr" / "demo_002.nii.gz")
    cube = np.zeros(nifti.shape, np.float32)
    cube[5:14, 8:20, 20:30] = 1
    volume = cube + np.random.default_rng(0).normal(0, 0.02, cube.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, nifti.affine), tmp_path / "cube.nii.gz")
    meta = preprocess.read_meta(cache)
    checkpoint = {"settings": {"patch": [16, 16, 16], "batch_size": 2, "amp": "off"}, "meta": meta}

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([1 - x, x - 1, -9 + 0 * x], 1)

    monkeypatch.setattr(evaluation, "load_models", lambda *_: ([Bright()], [checkpoint]))
    options = [
        "--checkpoint",
        "none",
        "--images",
        str(tmp_path / "cube.nii.gz"),
        "--out",
        str(tmp_path),
    ]
    evaluation.main([*options[:-1], str(tmp_path / "out")])
    found = nib.load(tmp_path / "out" / "cube.nii.gz")
    centers = [
        nib.affines.apply_affine(n.affine, np.argwhere(v > 0)).mean(0)
        for n, v in ((nifti, cube), (found, np.asanyarray(found.dataobj)))
    ]
    assert np.abs(centers[0] - centers[1]).max() < 1  # a fifth of a voxel of the coarse grid


def test_the_largest_part_of_each_class_is_kept():
    """Drawn by hand, two slices: parts of class 1 have 5, 2 and 1 voxels, of class 2 two and 3."""
    labels = np.array(
        [
            [[1, 1, 0, 1], [1, 0, 2, 1], [0, 1, 2, 0], [2, 0, 0, 0]],
            [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0]],
        ],
        np.uint8,
    )
    expected = np.array(
        [
            [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]],
            [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0]],
        ]
    )
    kept, dropped = evaluation.keep_largest(labels)
    assert np.array_equal(kept, expected) and dropped == 5
    backwards, dropped = evaluation.keep_largest(labels[::-1, :, ::-1])
    assert np.array_equal(backwards, expected[::-1, :, ::-1]) and dropped == 5
    flat, dropped = evaluation.keep_largest(labels[:1])  # a picture: now 3, 2 and 1 of class 1
    assert flat.tolist() == [[[1, 1, 0, 0], [1, 0, 2, 0], [0, 0, 2, 0], [0, 0, 0, 0]]]
    assert dropped == 4
    empty, dropped = evaluation.keep_largest(np.zeros_like(labels))
    assert not empty.any() and dropped == 0


def test_winding_parts_are_one():
    """A path of one voxel's width through all lines of a plane, beside a straight one."""
    labels = np.zeros((1, 41, 40), np.uint8)
    labels[0, ::2] = 1
    labels[0, 1:-2:4, 39] = 1
    labels[0, 3:-2:4, 0] = 1  # the last line, 40, stays apart
    kept, dropped = evaluation.keep_largest(labels)
    assert dropped == 40 and np.array_equal(kept[0, :39], labels[0, :39]) and not kept[0, 40].any()


def test_largest_tells_what_it_drops(cache, raw, trained, tmp_path, capsys, monkeypatch):
    """By a network that takes what is bright for class 1 and what is dark for class 2."""

    def outline(models: list, checkpoints: list, image: np.ndarray, *_: object) -> torch.Tensor:
        gray = torch.from_numpy(np.array(image))
        return torch.cat([0 * gray + 1, gray, -gray])  # (3, X, Y, Z)

    monkeypatch.setattr(evaluation, "predict", outline)
    path = str(trained["3"] / "best.pt")
    command = ["--checkpoint", path, "--data", str(cache), "--samples", "2"]
    evaluation.main([*command, "--out", str(tmp_path / "all")])
    evaluation.main([*command, "--largest", "--out", str(tmp_path / "one")])
    rows = read_table(tmp_path / "one" / "cases.csv")
    new = [str(raw / "imagesTr" / f"{row['id']}.nii.gz") for row in rows]
    evaluation.main(
        ["--checkpoint", path, "--largest", "--out", str(tmp_path / "b"), "--images", *new]
    )
    assert f"dropped parts of {len(rows)} of {len(rows)} cases" in capsys.readouterr().out
    table = read_table(tmp_path / "b" / "volumes.csv")
    for row, image in zip(rows, table, strict=True):
        masks = []
        for folder in (
            tmp_path / "all" / "predictions",
            tmp_path / "one" / "predictions",
            tmp_path / "b",
        ):
            masks.append(nib.load(folder / f"{row['id']}.nii.gz"))
        everything, kept, of_image = [np.asanyarray(mask.dataobj) for mask in masks]
        voxel = abs(np.linalg.det(masks[0].affine)) / 1000  # ml
        lost = voxel * ((everything > 0).sum() - (kept > 0).sum())
        assert np.array_equal(kept, of_image) and set(kept[kept != everything]) == {0}
        assert lost > 0 and float(row["dropped_ml"]) == pytest.approx(lost)
        assert float(image["ml_dropped"]) == pytest.approx(lost, abs=5e-4)


def test_slices_of_another_plane_see_it_and_are_averaged_with_the_usual_ones(
    cache, trained, tmp_path, capsys
):
    sagittal = tmp_path / "sagittal"
    words = ["--data", str(cache), "--out", str(sagittal), "--plane", "sagittal", *TINY]
    train.main(words)
    checkpoint = load_checkpoint(sagittal / "last.pt")
    meta = preprocess.read_meta(cache)
    assert meta["slice_axis"] == 2  # the coarsest of 4, 4 and 5 mm
    assert checkpoint["meta"]["slice_axis"] == 0
    assert checkpoint["settings"]["patch"] == meta["shape"][1:]
    for runs in ([sagittal], [trained["2"], sagittal, trained["3"]]):
        paths = [str(run / "last.pt") for run in runs]
        out = tmp_path / f"of{len(runs)}"
        call = ["--data", str(cache), "--checkpoint", *paths, "--out", str(out), "--samples", "20"]
        evaluation.main(call)
    of_last_epoch = checkpoint["figures"]["dice"]
    assert read_metrics(tmp_path / "of1")["summary"]["dice_cache"]["value"] == pytest.approx(
        of_last_epoch
    )
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(["--dims", "3", "--plane", "sagittal"])
    assert "--plane sagittal needs slices" in capsys.readouterr().err


def test_several_checkpoints_are_averaged(cache, trained, tmp_path):
    paths = [str(path / "last.pt") for path in trained.values()]  # slices and volumes together
    evaluation.main(
        ["--data", str(cache), "--checkpoint", *paths, "--samples", "2", "--out", str(tmp_path)]
    )
    assert len(read_metrics(tmp_path)["run"]["checkpoint_sha256"]) == 2


def test_eval_refuses_what_was_trained_on(cache, raw, trained, tmp_path):
    other = load_checkpoint(trained["2"] / "best.pt")
    other["settings"]["fold"] = 1
    save_checkpoint(tmp_path / "fold1.pt", other)
    paths = [str(trained["2"] / "best.pt"), str(tmp_path / "fold1.pt")]
    with pytest.raises(DataError, match=r"fold1.pt: trained on"):
        evaluation.main(["--data", str(cache), "--checkpoint", *paths])
    with pytest.raises(DataError, match="--mirror"):
        evaluation.main(["--data", str(cache), "--checkpoint", paths[0], "--tta"])
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "like"), "--like", str(cache)])
    with pytest.raises(DataError, match="not the cache of the training"):
        evaluation.main(["--data", str(tmp_path / "like"), "--checkpoint", paths[0]])
    options = [
        "--checkpoint",
        *paths,
        "--split",
        "test",
        "--samples",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(DataError, match="trained on 6 of these 8 images or patients"):
        evaluation.main(["--data", str(tmp_path / "like"), *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["preprocess", "eval"])  # train.py is run above
def test_errors_of_the_command_line(script, tmp_path):
    path = ROOT / "segmentation" / f"{script}.py"
    options = {
        "preprocess": ["--data", "nowhere", "--out", "cache"],
        "eval": ["--data", "nowhere", "--checkpoint", "nowhere.pt"],
    }[script]
    done = run_scripts(path, *options, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1
