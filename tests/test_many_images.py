"""eval.py --images of many files: in batches, rows as they come, pictures of the first ones."""

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from tests.caches import draw_cache, module, small_network, train
from tests.conftest import read_table

pytestmark = pytest.mark.slow

TABLES = {
    "classification": "predictions.csv",
    "detection": "predictions.csv",
    "segmentation": "volumes.csv",
}


@pytest.fixture(scope="module", params=TABLES)
def trained(request, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A task, and a run of one epoch that it can predict with."""
    folder = tmp_path_factory.mktemp(request.param)
    with small_network():
        train(request.param, draw_cache(folder / "cache", request.param), folder / "run")
        yield request.param, folder / "run" / "best.pt"


def write_images(folder: Path, task: str, count: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for k in range(count):
        if task == "segmentation":
            path = folder / f"i{k:02d}.nii.gz"
            nib.save(nib.Nifti1Image(rng.random((8, 8, 8), np.float32), np.eye(4)), path)
        else:
            path = folder / f"i{k:02d}.png"
            Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(path)
        paths.append(path)
    return paths


def predict(task: str, checkpoint: Path, out: Path, *images: Path) -> list[dict]:
    options = ["--checkpoint", checkpoint, "--out", out, "--device", "cpu", "--images", *images]
    module(task, "eval").main([str(word) for word in options])
    return read_table(out / TABLES[task])


def test_only_the_first_images_get_an_overlay_and_all_a_row(trained, tmp_path, monkeypatch, capsys):
    """14 images in batches of 6 or 8; the constant of 100 pictures is lowered to 3."""
    task, checkpoint = trained
    paths = write_images(tmp_path / "new", task, 14)
    evaluation = module(task, "eval")
    drawn = []
    draw = {"classification": "draw_activation", "detection": "draw_boxes"}
    name = draw.get(task, "draw_panels")
    original = getattr(evaluation, name)
    monkeypatch.setattr(evaluation, "write_gif", lambda *_: None, raising=False)
    monkeypatch.setattr(evaluation, name, lambda *args: drawn.append(1) or original(*args))
    monkeypatch.setattr(evaluation, "OVERLAYS", 3)
    rows = predict(task, checkpoint, tmp_path / "out", tmp_path / "new")
    assert [Path(row["image"]).name for row in rows] == [path.name for path in paths]
    assert "note: overlays of the first 3 images only" in capsys.readouterr().out
    assert len(drawn) == 3
    if task != "segmentation":
        names = [f"{k:04d}_i{k:02d}.png" for k in range(3)]
        assert [row["overlay"] for row in rows] == names + [""] * 11
        assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names

    (alone,) = predict(task, checkpoint, tmp_path / "alone", paths[9])
    for key, value in alone.items():
        if key not in ("image", "overlay", "prediction", "mask"):
            assert float(rows[9][key]) == pytest.approx(float(value), abs=1e-3), key


def test_a_file_given_twice_has_one_row_and_a_bad_one_none(trained, tmp_path, capsys):
    task, checkpoint = trained
    paths = write_images(tmp_path / "new", task, 8)
    paths[2].write_bytes(b"nothing")
    with pytest.raises(module(task, "preprocess").DataError, match="1 of 8"):
        predict(task, checkpoint, tmp_path / "out", *paths, paths[0], tmp_path / "new")
    rows = read_table(tmp_path / "out" / TABLES[task])
    kept = [path.name for path in paths if path != paths[2]]
    assert [Path(row["image"]).name for row in rows] == kept
    assert paths[2].name in capsys.readouterr().err


def test_batches_are_full_but_for_the_last(trained):
    task, _ = trained
    if task == "segmentation":
        pytest.skip("reads one volume at a time")
    evaluation = module(task, "eval")
    files = [Path(f"{k}.png") for k in range(20)]
    bad: list = []

    def load(path: Path) -> tuple:
        return (torch.zeros(1), ()) if path.stem != "7" else evaluation.DataError("7.png: broken")

    batches = evaluation.read_batches(files, load, 1, 4, bad)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 3]
    assert bad == [("7.png", "7.png: broken")]
