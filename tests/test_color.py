"""Colour: what the reader finds in every kind of file, and --color from the cache to a prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification import eval as evaluation
from classification.dataset import XrayDataset, augment
from classification.model import build_model
from classification.preprocess import main as preprocess
from classification.preprocess import read_image
from classification.train import main as train
from common.checkpoint import CheckpointError
from detection import preprocess as detection
from tests.caches import small_network
from tests.conftest import read_table
from tests.test_dataset_classification import Given, imagenet  # noqa: F401, a fixture
from tests.test_preprocess import dicom, folders, noise, refused, run
from tests.test_reader import png

pytestmark = pytest.mark.slow

RGB = noise("rgb", 6, 8, 3)


def picture(path: Path, mode: str = "RGB", **options: object) -> Path:
    """The colours of RGB as a file of this mode of Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(RGB)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise("alpha", 6, 8)))
    elif mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "tif")]
)
def test_colours_of_pictures(tmp_path, mode, suffix):
    found = read_image(picture(tmp_path / f"a.{suffix}", mode))
    np.testing.assert_allclose(found.colour, RGB / 255, atol=1e-6)
    assert found.colour.dtype == np.float32 and found.notes == ("colour turned gray",)
    again = detection.read_image(tmp_path / f"a.{suffix}")
    assert (again.colour == found.colour).all() and (again.gray == found.gray).all()


def test_colours_of_dicom(tmp_path):
    found = read_image(dicom(tmp_path / "a.dcm", RGB))
    np.testing.assert_allclose(found.colour, RGB / 255, atol=1e-6)
    deep = np.uint16([[[4095, 0, 0], [0, 819, 4095]]])
    np.testing.assert_allclose(
        read_image(dicom(tmp_path / "b.dcm", deep)).colour, [[[1, 0, 0], [0, 0.2, 1]]], atol=1e-6
    )
    ybr = {"PhotometricInterpretation": "YBR_FULL"}  # PS3.3 C.7.6.3.1.2: (254, 0, 0)
    found = read_image(dicom(tmp_path / "c.dcm", np.uint8([[[76, 85, 255], [0, 128, 128]]]), **ybr))
    np.testing.assert_allclose(found.colour, [[[254 / 255, 0, 0], [0, 0, 0]]], atol=1e-6)


def test_colours_of_16_bits_keep_their_proportions(tmp_path):
    samples = np.zeros((1, 1001, 3), np.uint16)
    samples[0, :, 0] = np.arange(1001)
    samples[0, :, 1] = 2 * np.arange(1001)
    found = read_image(png(tmp_path / "a.png", samples))
    black, white = np.percentile(samples[0] @ [0.299, 0.587, 0.114], (0.5, 99.5))
    expected = ((samples - black) / (white - black)).clip(0, 1)
    np.testing.assert_allclose(found.colour, expected, atol=2e-5)


def test_a_gray_picture_in_three_channels_has_no_colour(tmp_path):
    gray = np.stack([noise("g")] * 3, -1)
    gray[0, 0] = (100, 104, 107)  # as JPEG leaves it
    Image.fromarray(gray).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.colour is None and found.notes == ()


def color_set(raw: Path) -> Path:
    """Two colours that have one gray, and a picture of no colour in either class."""
    for k in range(24):
        name = "red" if k % 2 else "blue"
        base = noise(f"{k}", 32, 32, 3) // 4
        base[..., 0 if k % 2 else 2] += 150 if k % 2 else 0
        base[..., 1] += 0 if k % 2 else 57
        base[..., 2] += 0 if k % 2 else 99
        (raw / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(base).save(raw / name / f"p{k}.png")
    return folders(raw, "red/gray blue/gray2")


def test_color_keeps_the_channels_and_says_what_has_none(tmp_path, capsys):
    raw = color_set(tmp_path / "raw")
    images, rows, meta = run_color(raw, "--color", "--size", "32")
    assert images.shape == (26, 32, 32, 3) and meta["channels"] == 3
    shown = np.asarray(Image.open(raw / rows[3]["source"]))
    assert (images[3] == shown).all()
    printed = capsys.readouterr().out
    assert "note: 2 images: gray, kept as three equal channels, such as blue/gray2.png\n" in printed
    assert "colour turned gray" not in printed and "(squash, color)" in printed
    assert meta["mean"] == pytest.approx((images / 255).mean())
    assert meta["std"] == pytest.approx((images / 255).std())
    _, _, external = run_color(raw, "--like", str(tmp_path / "out"), out="like")
    assert external["channels"] == 3 and external["mean"] == meta["mean"]
    _, _, gray = run(raw, "--size", "32", out="gray")
    assert "channels" not in gray
    with pytest.raises(SystemExit):
        run(raw, "--like", str(tmp_path / "gray"), "--color", out="x")


def run_color(raw: Path, *options: str, out: str = "out") -> tuple[np.ndarray, list[dict], dict]:
    preprocess(["--data", str(raw), "--out", str(raw.parent / out), *options])
    meta = json.loads((raw.parent / out / "meta.json").read_text())
    return (
        np.load(raw.parent / out / "images.npy"),
        read_table(raw.parent / out / "index.csv"),
        meta,
    )


def test_all_channels_are_augmented_alike():
    draws = {"angle": 0.5, "dx": 0.5, "gamma": 1, "contrast": 1, "brightness": -0.5, "sigma": 1}
    gray = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = augment(gray, Given(batch=2, **draws))
    changed = augment(gray.expand(-1, 3, -1, -1), Given(batch=2, **draws))
    assert torch.allclose(changed, expected.expand(-1, 3, -1, -1), atol=1e-5)
    tinted = (0.3 + 0.2 * gray) * torch.tensor([1.5, 1, 0.5])[:, None, None]
    more = augment(tinted, Given(batch=2, moves=False, contrast=1)).mean((0, 2, 3))
    tint = tinted.mean((0, 2, 3))  # contrast is about the mean of all channels
    assert (more[0] - more[2]).item() == pytest.approx(
        np.exp(0.4) * (tint[0] - tint[2]).item(), rel=1e-4
    )


def test_pretrained_colour_is_the_rgb_network(imagenet):  # noqa: F811
    model = build_model("resnet18", 2, 96, pretrained=True, channels=3).eval()
    imagenet.fc = model.fc
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model(images), imagenet(images))


def test_colour_alone_tells_the_classes_from_training_to_prediction(tmp_path):
    raw = color_set(tmp_path / "raw")
    for name in ("red/gray.png", "blue/gray2.png"):
        (raw / name).unlink()
    run_color(raw, "--color", "--size", "32")
    images, labels = XrayDataset(tmp_path / "out")[[0, 23]]
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [0, 1]
    command = ["--data", str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]
    with small_network():
        train(
            [
                *command,
                "--out",
                str(tmp_path / "run"),
                "--epochs",
                "6",
                "--batch-size",
                "6",
                "--lr",
                "0.02",
            ]
        )
        best = str(tmp_path / "run" / "best.pt")
        evaluation.main([*command, "--checkpoint", best, "--samples", "5"])
        summary = json.loads((tmp_path / "run/eval_val/metrics.json").read_text())["summary"]
        assert summary["auroc"]["value"] == 1
        new = ["--images", str(raw), "--device", "cpu", "--out", str(tmp_path / "new")]
        evaluation.main(["--checkpoint", best, *new])
        rows = read_table(tmp_path / "new/predictions.csv")
        known = read_table(tmp_path / "run/eval_val/predictions.csv")
        of_image = {row["image"]: float(row["probability_red"]) for row in rows}
        for row in known:
            found = of_image[str(raw / row["id"])]
            assert found == pytest.approx(float(row["probability_red"]), abs=1e-5)
        overlay = np.asarray(Image.open(tmp_path / "new" / rows[-1]["overlay"])).astype(int)
        assert (overlay[40:, :200, 0] - overlay[40:, :200, 2]).mean() > 50  # the picture is red
        run(raw, "--size", "32", out="gray")
        with pytest.raises(CheckpointError, match=r"channels 1, but .* has 3"):
            evaluation.main(["--data", str(tmp_path / "gray"), *command[2:], "--checkpoint", best])


def test_a_cache_whose_channels_are_not_those_of_meta_is_refused(tmp_path):
    raw = color_set(tmp_path / "raw")
    run(raw, "--size", "32")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    (tmp_path / "out/meta.json").write_text(json.dumps(meta | {"channels": 2}))
    refused("channels 2, which is not that of", raw, "--like", str(tmp_path / "out"), out="x")
