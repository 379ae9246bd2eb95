"""detection/: boxes and pixels stay together, tables are read as written, and the real commands run."""

import functools
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from detection import dataset, preprocess, train
from detection import eval as evaluation
from detection.dataset import (
    augment,
    cut_out,
    draw_phantom,
    mirror,
    move_boxes,
    reach,
    to_input,
    write_demo,
    write_dicom,
)
from detection.model import build_model, edge_positions, narrow, smooth_l1_giou
from detection.preprocess import DataError
from tests.caches import (
    change_meta,
    change_rows,
    draw_images,
    evaluate,
    read_rows,
    small_network,
    write_index,
)
from tests.caches import train as train_small
from tests.conftest import assert_same_training, read_table, run_scripts
from tests.test_preprocess import dicom

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TINY = ["--epochs", "2", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_demo(folder, patients=40)
    return folder


@pytest.fixture(scope="module")
def cache(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "demo"
    options = ["--size", "64", "--site-regex", "[0-9]{2}(?=..[.])", "--test-fraction", "0.2"]
    preprocess.main(["--data", str(raw), "--out", str(out), *options])
    return out


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    train.main(["--data", str(cache), "--out", str(out), *TINY])
    return out


# --- preprocess.py ---


def boxes_csv(
    raw: Path, rows: str, files: str = "a.png b.png", header="image,xmin,ymin,xmax,ymax"
) -> Path:
    """Noise of 40 x 20 pixels (width x height) and a boxes.csv beside it."""
    raw.mkdir(parents=True)
    for k, name in enumerate(files.split()):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(raw / name)
    (raw / "boxes.csv").write_text("\n".join([header, *rows.split()]))
    return raw


def run(raw: Path, *options: str, out: str = "out") -> tuple[np.ndarray, list[dict], dict]:
    out = raw.parent / out
    preprocess.main(["--data", str(raw), "--out", str(out), *options])
    return (
        np.load(out / "images.npy"),
        read_table(out / "index.csv"),
        json.loads((out / "meta.json").read_text()),
    )


def test_a_table_gives_patient_site_fold_and_further_columns(tmp_path, capsys):
    header = "image,xmin,ymin,xmax,ymax,patient,site,fold,sex,source"
    rows = "a.png,1,1,9,9,p1,x,3,F,n b.png,1,1,9,9,p1,y,4,M,n c.png,1,1,9,9,p2,y,test,,n"
    _, index, _ = run(boxes_csv(tmp_path / "raw", rows, "a.png b.png c.png", header))
    assert [row["patient"] for row in index] == ["p1", "p1", "p2"]
    assert [row["site"] for row in index] == ["x", "y", "y"]
    assert [row["fold"] for row in index] == ["3", "4", "test"]
    assert [row["sex"] for row in index] == ["F", "M", ""]
    assert [row["table_source"] for row in index] == ["n", "n", "n"]
    assert [row["source"] for row in index] == ["a.png", "b.png", "c.png"]
    printed = capsys.readouterr().out
    assert "note: patients in several folds, as given: 1, such as p1; eval.py will" in printed
    assert "note: columns of the table that are called table_... now: source" in printed


def test_a_validation_fold_that_is_too_small_to_choose_by_is_noted(tmp_path, capsys):
    names = [f"{k}.png" for k in range(7)]
    folds = ("0", "1", "1", "1", "1", "1", "2")
    rows = " ".join(f"{name},1,1,9,9,{fold}" for name, fold in zip(names, folds, strict=True))
    header = "image,xmin,ymin,xmax,ymax,fold"
    run(boxes_csv(tmp_path / "raw", rows, " ".join(names), header))
    assert "note: fold 0 has, as given, only 1 of 7: too few" in capsys.readouterr().out


def test_a_split_of_the_table_is_kept_and_an_unknown_one_refused(tmp_path):
    header = "image,xmin,ymin,xmax,ymax,split"
    raw = boxes_csv(tmp_path / "raw", "a.png,1,1,9,9,Valid b.png,1,1,9,9,train", header=header)
    _, index, _ = run(raw)
    assert [row["fold"] for row in index] == ["0", "1"]
    with pytest.raises(DataError, match="its own folds, which --test-fraction cannot change"):
        run(raw, "--test-fraction", "0.1", out="b")
    other = boxes_csv(tmp_path / "other", "a.png,1,1,9,9,x", "a.png", header)
    with pytest.raises(DataError, match=r"boxes.csv:2: split 'x', expected train, val or test"):
        run(other)


def test_boxes_are_kept_in_original_pixels(tmp_path):
    raw = boxes_csv(tmp_path / "raw", "a.png,0,0,40,20 b.png,1.5,2,10,11")
    images, rows, meta = run(raw, "--size", "32")
    assert images.shape == (2, 32, 32) and images.dtype == np.uint8 and meta["size"] == 32
    assert [[row[k] for k in ("id", "xmin", "ymin", "xmax", "ymax", "height", "width")] for row in rows] == [
        ["a.png", "0.0", "0.0", "40.0", "20.0", "20", "40"],
        ["b.png", "1.5", "2.0", "10.0", "11.0", "20", "40"],
    ]  # fmt: skip


def test_images_are_stretched_to_the_whole_range():
    ramp = np.linspace(0.4, 0.5, 100, dtype=np.float32).repeat(100).reshape(100, 100)
    assert preprocess.prepare(ramp, 100)[:, 0].tolist()[::99] == [0, 255]
    assert (preprocess.prepare(ramp, 32) == preprocess.prepare(0.1 + 5 * ramp, 32)).mean() > 0.99
    levels = np.arange(100, 160, dtype=np.uint8).repeat(60).reshape(60, 60)
    floats = levels.astype(np.float32) / 255
    assert (preprocess.prepare(levels, 32) == preprocess.prepare(floats, 32)).mean() > 0.99


@pytest.mark.parametrize("row, reason", [
    ("a.png,5,5,5,9", "a.png: box (5.0, 5.0, 5.0, 9.0), expected 0 <= xmin < xmax <= 40"),  # empty
    ("a.png,9,5,5,9", "a.png: box (9.0"),  # inverted
    ("a.png,5,5,41,9", "a.png: box (5.0, 5.0, 41.0"),  # outside
    ("a.png,-1,5,9,9", "a.png: box (-1.0"),
    ("a.png,x,5,9,9", "a.png: box (nan"),
    ("a.png,,,,", "a.png: box (nan"),
    ("c.png,1,1,9,9", "boxes.csv:3: no image 'c.png'"),
    ("", "a.png: no box in boxes.csv"),
    ("b.png,1,1,9,9 a.png,1,1,9,9", "boxes.csv:3: a second box for b.png, first in line 2"),
])  # fmt: skip
def test_bad_boxes_are_named_and_skipped(tmp_path, capsys, row, reason):
    raw = boxes_csv(tmp_path / "raw", f"b.png,1,1,9,9 {row} d.png,1,1,9,9", "a.png b.png d.png")
    with pytest.raises(DataError, match="cannot be used"):
        run(raw)
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()
    _, rows, _ = run(raw, "--skip-bad")
    left = {"a.png", "d.png"} if "second" in reason else {"b.png", "d.png"}
    assert {row["id"] for row in rows} == left
    assert any(reason in row["reason"] for row in read_table(tmp_path / "out" / "skipped.csv"))


@pytest.mark.parametrize("header, reason", [("image,xmin", "no column ['xmax', 'ymax', 'ymin']")])
def test_a_table_of_another_kind_is_refused(tmp_path, header, reason):
    with pytest.raises(DataError, match=re.escape(reason)):
        run(boxes_csv(tmp_path / "raw", "a.png,1", header=header))
    with pytest.raises(DataError, match=r"expected boxes.csv or rsna_heart_detection.csv"):
        run(tmp_path)


def test_rsna_heart_boxes_are_in_224(tmp_path, capsys):
    folder = tmp_path / "raw" / "stage_2_train_images"
    folder.mkdir(parents=True)
    for name in ("p1", "p2", "unused"):
        write_dicom(folder / f"{name}.dcm", np.random.default_rng(len(name)).random((56, 112)))
    table = "label,x0,y0,w,h,name,img_shape_x,img_shape_y\nheart,56,112,112,56,p1,224,224\n"
    (tmp_path / "raw" / "rsna_heart_detection.csv").write_text(
        f"{table}heart,1,1,9,9,gone,224,224\n"
    )
    _, rows, meta = run(tmp_path / "raw")
    assert (
        "1 of 2 images named in rsna_heart_detection.csv are not here: gone"
        in capsys.readouterr().out
    )
    (row,) = rows
    assert [float(row[k]) for k in ("xmin", "ymin", "xmax", "ymax")] == [28, 28, 84, 42]
    assert (row["patient"], row["spacing"], meta["layout"]) == ("p1", "1.6 1.6", "RSNA heart boxes")


def test_boxes_are_in_the_coordinates_of_the_image_as_it_is_shown(tmp_path):
    raw = boxes_csv(tmp_path / "raw", "a.png,0,0,20,40")  # 40 x 20 as stored, shown 20 x 40
    exif = Image.Exif()
    exif[274] = 6
    Image.open(raw / "a.png").save(raw / "a.png", exif=exif)
    (raw / "b.png").unlink()
    (row,) = run(raw)[1]
    assert [row[k] for k in ("xmax", "ymax", "height", "width")] == ["20.0", "40.0", "40", "20"]


def test_an_unusable_pixel_spacing_never_stops_a_run(tmp_path, cache, trained, capsys):
    names = ("0.15\\0.14", "0,15\\0,14", "0.0\\0.000", "0.1500000", "1\\1\\1\\1\\1")
    rows = " ".join(f"{k}.dcm,1,1,20,20" for k in range(len(names)))
    raw = boxes_csv(tmp_path / "raw", rows, "")
    for k, written in enumerate(names):
        pixels = np.random.default_rng(k).integers(0, 256, (30, 40), dtype=np.uint8)
        dicom(raw / f"{k}.dcm", pixels, PixelSpacing=[0.15, 0.14], PatientID=f"p{k}")
        data = (raw / f"{k}.dcm").read_bytes()
        (raw / f"{k}.dcm").write_bytes(data.replace(b"0.15\\0.14", written.encode()))
    assert [row["spacing"] for row in run(raw, "--like", str(cache))[1]] == [
        "0.15 0.14",
        "",
        "",
        "",
        "",
    ]
    capsys.readouterr()
    checkpoint = str(trained / "best.pt")
    evaluation.main(
        ["--data", str(tmp_path / "out"), "--checkpoint", checkpoint, "--split", "test"]
    )
    printed = capsys.readouterr().out
    assert "note: the intervals rest on 5 patients and are too narrow" in printed
    figures = json.loads((trained / "eval_test" / "metrics.json").read_text())["summary"]
    assert figures["mae_mm"]["value"] > 0.5  # of the one image that says how large a pixel is


def test_patients_by_file_name(tmp_path):
    rows = "p1_a.png,1,1,9,9 p1_b.png,1,1,9,9 p2_a.png,1,1,9,9"
    raw = boxes_csv(tmp_path / "raw", rows, "p1_a.png p1_b.png p2_a.png")
    assert [row["patient"] for row in run(raw, "--patient-regex", "(p[0-9])_")[1]] == [
        "p1",
        "p1",
        "p2",
    ]
    with pytest.raises(DataError, match=r"--patient-regex 'p1' finds nothing in p2_a\.png"):
        run(raw, "--patient-regex", "p1", "--overwrite")


def test_files_are_found_by_their_content(tmp_path, capsys):
    raw = boxes_csv(tmp_path / "raw", "IM1,1,1,9,9 b.png,1,1,9,9", "b.png")
    dicom(raw / "IM1", np.random.default_rng(0).integers(0, 256, (20, 40), dtype=np.uint8))
    (raw / "notes.txt").write_text("x")
    (raw / "._b.png").write_text("x")
    assert [row["id"] for row in run(raw)[1]] == ["IM1", "b.png"]
    assert "note: left out: 1 .txt\n" in capsys.readouterr().out
    files = evaluation.list_images([raw])
    assert [path.name for path in files] == ["IM1", "b.png"]
    assert f"note: {raw}: passed over: 1 .csv, 1 .txt\n" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"raw: found b/; expected boxes\.csv or rsna_heart"):
        (tmp_path / "empty/raw/b").mkdir(parents=True)
        run(tmp_path / "empty/raw")
    with pytest.raises(DataError, match=r"one folder too high: raw holds boxes\.csv; use --data"):
        preprocess.main(["--data", str(tmp_path), "--out", str(tmp_path / "x")])


def test_two_files_of_one_name_are_told(tmp_path, capsys):
    raw = tmp_path / "raw"
    for name in ("x/a.dcm", "y/a.dcm", "x/b.dcm"):
        dicom(raw / name, np.random.default_rng(0).integers(0, 256, (20, 40), dtype=np.uint8))
    (raw / "rsna_heart_detection.csv").write_text("name,x0,y0,w,h\na,9,9,99,99\nb,9,9,99,99\n")
    assert [row["id"] for row in run(raw, "--skip-bad")[1]] == ["b"]
    assert "csv:2: 2 files for a: " in capsys.readouterr().err


def test_groups_and_like(raw, cache, tmp_path):
    assert {row["site"] for row in read_table(cache / "index.csv")} == {"00"}
    raw = boxes_csv(tmp_path / "raw", "a.png,1,1,9,9 b.png,1,1,9,9")
    _, rows, _ = run(raw, "--site-regex", "^[a-z]", "--test-site", "b")
    assert [(row["site"], row["fold"] == "test") for row in rows] == [("a", False), ("b", True)]
    images, rows, meta = run(raw, "--like", str(cache), out="like")
    assert images.shape[1:] == (64, 64) and {row["fold"] for row in rows} == {"test"}
    assert meta["mean"] == json.loads((cache / "meta.json").read_text())["mean"]
    with pytest.raises(DataError, match=r"found the sites \['a', 'b'\]"):
        run(raw, "--site-regex", "^[a-z]", "--test-site", "c")
    with pytest.raises(DataError, match="finds nothing in a"):
        run(raw, "--site-regex", "[0-9]")


# --- dataset.py and model.py ---


def heart(points: int = 720) -> np.ndarray:
    """The outline whose support function `reach` is, (points, 2), in a box from -1 to 1."""
    angle = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    across = torch.stack([angle.cos(), angle.sin()], 1)
    along = torch.stack([-angle.sin(), angle.cos()], 1)
    ahead, behind = (reach(across + step * along) for step in (1e-4, -1e-4))
    return (reach(across)[:, None] * across + ((ahead - behind) / 2e-4)[:, None] * along).numpy()


def test_box_and_pixels_stay_together(monkeypatch):
    monkeypatch.setattr(dataset, "cut_out", lambda images, *_: images)  # what it hides is not found
    size = 512  # finer than the networks' 128, so that what is found is not the raster
    for seed in range(20):
        rng = np.random.default_rng(seed)
        center, radius = rng.uniform(200, 312, 2), rng.uniform(60, 120, 2)
        picture = Image.new("L", (4 * size, 4 * size))
        outline = 4 * (center + radius * heart()) - 0.5
        ImageDraw.Draw(picture).polygon(outline.ravel().tolist(), fill=255)
        image = np.asarray(picture.reduce(4)) / np.float32(255)
        images = torch.from_numpy(image).expand(4, 1, -1, -1)
        box = np.concatenate([center - radius, center + radius]) / size
        boxes = torch.from_numpy(box).float().expand(4, -1)
        moved, boxes = augment(images, boxes, rng)
        for image, box in zip(moved[:, 0], boxes * size, strict=True):
            low, high = image.quantile(0.02), image.quantile(0.995)
            ys, xs = torch.nonzero(image > (low + high) / 2, as_tuple=True)
            found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (found - box).abs().max() < size / 256, (seed, found, box)  # half a pixel of 128


def test_a_box_turns_like_the_heart_in_it():
    degrees = 30
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[[cos, sin, 0], [-sin, cos, 0]]])  # the picture turns clockwise
    points = (
        np.array([0.3, 0.1]) * heart() @ np.array([[cos, sin], [-sin, cos]])
    )  # x to the right, y down
    found = move_boxes(torch.tensor([[0.2, 0.4, 0.8, 0.6]]), turn)[0].numpy()
    assert np.abs(found - 0.5 - [*points.min(0), *points.max(0)]).max() < 1e-3
    shift = torch.tensor(
        [[[1.0, 0, 0.4], [0, 1, -0.2]]]
    )  # theta moves the picture the other way, by half
    box = torch.tensor([[0.2, 0.4, 0.8, 0.6]])
    assert torch.allclose(move_boxes(box, shift), torch.tensor([[0.0, 0.5, 0.6, 0.7]]), atol=1e-6)


def test_the_outline_of_a_heart_touches_its_box_and_points_to_the_apex():
    axes = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert torch.equal(reach(axes), torch.ones(4))
    assert torch.allclose(reach(3 * axes), 3 * torch.ones(4))
    diagonals = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]]) / math.sqrt(2)
    assert reach(diagonals).tolist() == pytest.approx([1.219, 1.041, 1.001, 0.739], abs=1e-3)


def test_a_mirrored_image_takes_its_box_along():
    images, boxes = torch.zeros(2, 1, 8, 8), torch.tensor([[0.125, 0.25, 0.5, 1.0]]).repeat(2, 1)
    images[:, :, 2:8, 1:4] = 1
    mirrored, moved = mirror(images, boxes, torch.tensor([False, True]))
    assert torch.equal(mirrored[0], images[0]) and torch.equal(moved[0], boxes[0])
    assert moved[1].tolist() == [0.5, 0.25, 0.875, 1.0]
    assert mirrored[1, 0, 2:8, 4:7].all() and mirrored.sum() == images.sum()


def test_one_image_in_twenty_is_mirrored(monkeypatch):
    chosen = []
    monkeypatch.setattr(dataset, "mirror", lambda images, boxes, some: chosen.append(some))
    for strength in (1.0, 0.5):
        images, boxes = torch.rand(4000, 1, 8, 8), torch.tensor([[0.3, 0.3, 0.7, 0.7]] * 4000)
        augment(images, boxes, np.random.default_rng(0), strength)
    shares = [some.float().mean().item() for some in chosen]
    assert shares == pytest.approx([0.05, 0.025], abs=0.01)


def test_cutout_paints_a_rectangle_in_the_mean_gray():
    images = torch.rand(2, 1, 40, 40)
    draws = torch.tensor([[0.5, 1.0], [0.25, 1.0], [0.0, 1.0], [1.0, 1.0]])  # x, y, width, height
    cut = cut_out(images, draws, 1.0)
    changed = (cut != images)[:, 0]
    assert changed[0].nonzero().tolist() == [[y, x] for y in range(2, 18) for x in range(18, 22)]
    assert changed[1].nonzero().tolist() == [[y, x] for y in range(32, 40) for x in range(32, 40)]
    assert torch.allclose(cut[0, 0, 10, 20], images[0].mean())
    half = cut_out(images, draws, 0.5) != images
    assert half[0].sum() == 8 * 2 and half[1].sum() == 4 * 4


def test_generalized_iou_is_that_of_torchvision():
    corners = torch.rand(50, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    pred, boxes = torch.cat([corners.amin(2), corners.amax(2)], 2).unbind(1)
    giou = torchvision.ops.generalized_box_iou_loss(pred, boxes, reduction="mean")
    expected = giou + F.smooth_l1_loss(pred, boxes, beta=0.02)
    assert torch.allclose(smooth_l1_giou(pred, boxes), expected)
    nothing = torch.zeros(1, 4, requires_grad=True)  # no side: the loss stays finite
    smooth_l1_giou(nothing, nothing.detach()).backward()
    assert nothing.grad.isfinite().all()


def test_augmentation_is_a_function_of_its_rng():
    images, boxes = torch.rand(4, 1, 32, 32), torch.tensor([[0.3, 0.3, 0.7, 0.7]] * 4)
    first, second, other = (
        augment(images, boxes, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1]) and len({box[0].item() for box in first[1]}) == 4
    assert all(
        map(torch.equal, augment(images, boxes, np.random.default_rng(1), 0.0), (images, boxes))
    )


def test_edge_positions_are_means_under_the_softmax():
    maps = torch.full((1, 4, 8, 16), -50.0)
    maps[0, 0, 3, 2] = maps[0, 1, 5, 9] = maps[0, 2, 3, 12] = maps[0, 3, 6, 1] = maps[
        0, 3, 7, 1
    ] = 50
    assert torch.allclose(
        edge_positions(maps), torch.tensor([[2.5 / 16, 5.5 / 8, 12.5 / 16, 7 / 8]])
    )


@pytest.mark.parametrize(
    "arch, head, channels",
    [("resnet18", "edges", 32), ("resnet50", "edges", 64), ("resnet34", "linear", 20)],
)
def test_the_first_box_lies_inside_the_image(arch, head, channels):
    torch.manual_seed(0)
    model = build_model(arch, head, channels)
    boxes = model(torch.randn(2, 1, 64, 64))
    assert boxes.shape == (2, 4) and (boxes > 0).all() and (boxes < 1).all()
    assert model.backbone.layer4[0].conv1.out_channels == 8 * channels


def test_all_channels_give_the_torchvision_network():
    torch.manual_seed(0)
    network, narrowed, images = (
        torchvision.models.resnet18(),
        torchvision.models.resnet18(),
        torch.randn(2, 3, 64, 64),
    )
    narrow(narrowed, 1.0)
    assert not torch.equal(network.eval()(images), narrowed.eval()(images))  # weights of its own
    narrowed.load_state_dict(network.state_dict())
    assert torch.equal(network(images), narrowed(images))


def test_pretrained_takes_the_weights_and_their_scale(cache, tmp_path, monkeypatch):
    torch.manual_seed(0)
    rgb = torchvision.models.resnet18()
    state = {name: weight.clone() for name, weight in rgb.state_dict().items()}
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    model = build_model("resnet18", "edges", 64, pretrained=True)
    assert torch.equal(model.backbone.conv1.weight, rgb.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(model.backbone.layer3[1].conv2.weight, rgb.layer3[1].conv2.weight)
    options = ["--pretrained", "--epochs", "1", "--lr", "1e-12", "--weight-decay", "0"]
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, *options])
    trained = load_checkpoint(tmp_path / "last.pt")
    assert trained["settings"]["channels"] == 64
    assert (trained["meta"]["mean"], trained["meta"]["std"]) == (0.449, 0.226)
    kept = trained["model"]["backbone.layer3.1.conv2.weight"]
    assert torch.allclose(kept, state["layer3.1.conv2.weight"], atol=1e-6)


def test_the_phantoms_box_lies_on_its_heart():
    picture, (xmin, ymin, xmax, ymax) = draw_phantom(np.random.default_rng(3))
    inside = picture[ymin:ymax, xmin:xmax]
    assert picture.shape == (256, 256) and 30 < xmax - xmin < 130 and 30 < ymax - ymin < 130
    assert inside.mean() > picture[ymin:ymax, 40:60].mean()  # lung on the left


# --- train.py and eval.py ---


def test_stop_and_resume_equal_the_straight_run_with_any_workers(cache, trained, tmp_path):
    command = ["--data", str(cache), "--out", str(tmp_path), *TINY]
    train.main([*command, "--stop-after", "1", "--workers", "2"])
    train.main([*command, "--resume"])
    assert_same_training(trained, tmp_path)
    with pytest.raises(CheckpointError, match=r"loss mse \(now smooth_l1\)"):
        train.main([*command, "--resume", "--loss", "smooth_l1"])


def test_two_processes(cache, tmp_path):
    script = ROOT / "detection" / "train.py"
    options = ["--data", str(cache), *TINY, "--batch-size", "4", "--out", "a"]
    done = run_scripts(script, *options, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 ") == 1  # only rank 0 speaks
    printed = load_checkpoint(tmp_path / "a" / "last.pt")["figures"]
    evaluation.main(
        ["--data", str(cache), "--checkpoint", str(tmp_path / "a" / "last.pt"), "--samples", "2"]
    )
    summary = json.loads((tmp_path / "a" / "eval_val" / "metrics.json").read_text())["summary"]
    assert summary["mean_iou"]["value"] == pytest.approx(printed["mean_iou"], abs=1e-6)


@pytest.mark.parametrize(
    "options", [[], ["--amp", "bf16", "--head", "linear", "--loss", "smooth_l1"]]
)
def test_eval_gives_the_score_that_train_printed(cache, tmp_path, options):
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--epochs", "1", *options])
    printed = load_checkpoint(tmp_path / "best.pt")["figures"]
    evaluation.main(
        ["--data", str(cache), "--checkpoint", str(tmp_path / "best.pt"), "--samples", "20"]
    )
    result = json.loads((tmp_path / "eval_val" / "metrics.json").read_text())
    for name, value in printed.items():
        assert result["summary"][name]["value"] == value, name
    mm, px = (result["summary"][name]["value"] for name in ("mae_mm", "mae_px"))
    assert mm == pytest.approx(1.6 * px) and result["run"]["n"] == len(result["cases"])
    assert Image.open(tmp_path / "eval_val" / "gallery.png").size[0] > evaluation.TILE
    rows = read_table(tmp_path / "eval_val" / "predictions.csv")
    truth = {row["image"]: row for row in read_table(Path(json.loads((cache / "meta.json").read_text())
             ["options"]["data"]) / "boxes.csv")}  # fmt: skip
    assert all(float(row["true_xmax"]) == float(truth[row["id"]]["xmax"]) for row in rows)


def test_boxes_that_hardly_meet_are_named_the_worst_first(capsys):
    ious = {"half": 0.5, "poor": 0.31, "missed\n": 0.0, "good": 0.9}
    evaluation.print_doubtful([{"id": name, "iou": iou} for name, iou in ious.items()])
    assert capsys.readouterr().out.splitlines()[1:] == ["  0.000  missed", "  0.310  poor"]
    evaluation.print_doubtful([{"id": str(k), "iou": 0.1} for k in range(30)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("30 with an IoU below 0.5") and len(lines) == 26
    assert lines[-1] == "  and 6 more, in predictions.csv"
    evaluation.print_doubtful([{"id": "good", "iou": 0.9}])
    assert capsys.readouterr().out == ""


def test_compile_has_no_graph_breaks(cache, tmp_path, monkeypatch):
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    train.main(["--data", str(cache), "--out", str(tmp_path), *TINY, "--epochs", "1", "--compile"])
    assert all(
        not name.startswith("_orig_mod") for name in load_checkpoint(tmp_path / "last.pt")["model"]
    )


def test_overfits_eight_images(cache, tmp_path):
    rows = read_table(cache / "index.csv")[:8]
    images = np.load(cache / "images.npy")[:8]
    np.save(tmp_path / "images.npy", np.concatenate([images] * 6))
    index = []
    for fold in ("1", "1", "1", "1", "1", "0"):  # the validation set is what the network has seen
        index += [row | {"fold": fold} for row in rows]
    write_index(tmp_path, index)
    (tmp_path / "meta.json").write_text((cache / "meta.json").read_text())
    options = [
        "--epochs",
        "18",
        "--augment",
        "0",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--channels",
        "16",
    ]
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    log = load_checkpoint(tmp_path / "run" / "last.pt")["log"]
    assert log[-1]["val_mean_iou"] > 0.95 > log[0]["val_mean_iou"]


def test_new_images_get_the_boxes_of_the_labelled_run(cache, raw, trained, tmp_path, capsys):
    checkpoint = ["--checkpoint", str(trained / "best.pt")]
    evaluation.main(["--data", str(cache), *checkpoint, "--samples", "2", "--split", "test"])
    known = {row["id"]: row for row in read_table(trained / "eval_test" / "predictions.csv")}
    (tmp_path / "new").mkdir()
    for name in known:
        (tmp_path / "new" / name).write_bytes((raw / "images" / name).read_bytes())
    evaluation.main(
        [*checkpoint, "--out", str(tmp_path / "out"), "--images", str(tmp_path / "new")]
    )
    rows = read_table(tmp_path / "out" / "predictions.csv")
    assert len(rows) == len(known) == len(list((tmp_path / "out").glob("*.png")))
    for row in rows:
        for name in ("xmin", "ymin", "xmax", "ymax"):
            assert float(row[name]) == pytest.approx(
                float(known[Path(row["image"]).name][name]), abs=0.02
            )
    (tmp_path / "new" / "bad.png").write_text("no picture")
    with pytest.raises(DataError, match=f"1 of {len(known) + 1} files"):
        evaluation.main(
            [*checkpoint, "--out", str(tmp_path / "out"), "--images", str(tmp_path / "new")]
        )
    assert "bad.png" in capsys.readouterr().err


def test_eval_refuses_what_was_trained_on(cache, raw, trained, tmp_path):
    other = load_checkpoint(trained / "best.pt")
    other["settings"]["fold"] = 1
    save_checkpoint(tmp_path / "fold1.pt", other)
    paths = [str(trained / "best.pt"), str(tmp_path / "fold1.pt")]
    with pytest.raises(DataError, match=r"fold1.pt: trained on"):
        evaluation.main(["--data", str(cache), "--checkpoint", *paths])
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "like"), "--like", str(cache)])
    with pytest.raises(DataError, match="not the cache of the training"):
        evaluation.main(["--data", str(tmp_path / "like"), "--checkpoint", paths[0]])
    with pytest.raises(DataError, match=r"trained on \d+ of these 40 images or patients"):
        evaluation.main(
            ["--data", str(tmp_path / "like"), "--checkpoint", *paths, "--split", "test"]
        )
    preprocess.main(["--data", str(raw), "--out", str(tmp_path / "small"), "--size", "40"])
    with pytest.raises(CheckpointError, match="size 40"):
        evaluation.main(["--data", str(tmp_path / "small"), "--checkpoint", paths[0]])


# --- eval.py --calibrate ---


def keep_rows(cache: Path, out: Path, count: int, **values: object) -> Path:
    """The first rows of a cache as one of their own, inverted images unlike those of any other."""
    out.mkdir()
    np.save(out / "images.npy", 255 - np.load(cache / "images.npy")[:count])
    rows = [row | {"patient": f"{out.name}{k}"} for k, row in enumerate(read_rows(cache)[:count])]
    write_index(out, [row | values for row in rows])
    (out / "meta.json").write_text((cache / "meta.json").read_text())
    return out


@pytest.fixture
def site(tmp_path) -> dict[str, Path]:
    """Caches of 32 px and a network that puts every box at 8, 8, 16, 16 pixels.

    `new` has seven images, whose box is at 0, 12, 24, 16, but for two upper edges (9 and 15).
    """
    cache = draw_images(tmp_path / "cache", "detection")
    new = keep_rows(cache, tmp_path / "new", 7, xmin=0, ymin=12, xmax=24, ymax=16)
    change_rows(new, lambda k, row: row.update(ymin={0: 9, 1: 15}.get(k, 12)))
    with small_network():
        train_small("detection", cache, tmp_path / "run")
        checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
        model = checkpoint["model"]
        model["out.weight"].zero_()
        model["out.bias"] = torch.tensor([0.25, 0.25, 0.5, 0.5])
        save_checkpoint(tmp_path / "constant.pt", checkpoint)
        yield {"cache": cache, "new": new, "checkpoint": tmp_path / "constant.pt"}


def test_calibration_adds_the_mean_offset_as_if_one_more_image_had_none(site, tmp_path, capsys):
    command = ["--checkpoint", site["checkpoint"], "--out", tmp_path / "out"]
    evaluate("detection", site["cache"], *command, "--split", "test", "--calibrate", site["new"])
    # Seven of eight times -8, 4, 8 and 0 pixels
    expected = {"xmin": 8 - 7, "ymin": 8 + 3.5, "xmax": 16 + 7, "ymax": 16}
    for row in read_table(tmp_path / "out" / "predictions.csv"):
        assert {name: float(row[name]) for name in expected} == expected
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    calibration = report["run"]["calibration"]
    assert calibration["n"] == 7
    assert calibration["offset_224"] == {"xmin": -49, "ymin": 24.5, "xmax": 49, "ymax": 0}
    error = 7 * math.sqrt((3**2 + 3**2) / 6 / 7)  # of the mean, 224 / 32 pixels each
    assert calibration["error_224"]["ymin"] == pytest.approx(error, abs=0.01)
    assert "by 7 images: xmin -49.0 (+-0.0), ymin +24.5 (+-4.6)" in capsys.readouterr().out
    evaluate("detection", site["cache"], *command, "--split", "test")
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["run"]["calibration"] is None
    assert float(read_table(tmp_path / "out" / "predictions.csv")[0]["ymin"]) == 8


def test_calibration_shifts_the_boxes_of_new_images(site, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "new.png")
    command = ["--checkpoint", site["checkpoint"], "--images", tmp_path / "new.png"]
    command += ["--out", tmp_path / "out", "--calibrate", site["new"], "--device", "cpu"]
    evaluation.main([str(word) for word in command])
    (row,) = read_table(tmp_path / "out" / "predictions.csv")
    edges = [float(row[name]) for name in ("xmin", "ymin", "xmax", "ymax")]
    assert edges == [40 * 1 / 32, pytest.approx(20 * 11.5 / 32, abs=0.01), 40 * 23 / 32, 10]


def test_shifted_boxes_are_inside_the_image_and_not_empty():
    pred = torch.tensor([[0.2, 0.2, 0.6, 0.6], [0.9, 0.9, 1.0, 1.0], [0.5, 0.5, 0.4, 0.4]])
    for shift in (-300, -100, 0, 100, 300):
        offset = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), shift)
        boxes = evaluation.shift_boxes(pred, {"offset_224": offset})
        assert (boxes >= 0).all() and (boxes <= 1).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 0.99 / 224).all()
    assert torch.equal(evaluation.shift_boxes(pred, None), pred)


@pytest.mark.parametrize("patient, error", [
    ("p3", r"--calibrate .*new: 1 of its images or patients \(i0\) are evaluated in .*cache; take"),
    ("p1", r"constant.pt: trained on 1 of these 7 images or patients \(i0\); take others"),
])  # fmt: skip
def test_calibration_refuses_patients_of_training_and_evaluation(site, tmp_path, patient, error):
    change_rows(site["new"], lambda k, row: row.update({} if k else {"patient": patient}))
    command = ["--checkpoint", site["checkpoint"], "--out", tmp_path / "out"]
    with pytest.raises(DataError, match=error):
        evaluate(
            "detection", site["cache"], *command, "--split", "test", "--calibrate", site["new"]
        )
    assert not (tmp_path / "out").exists()


def test_calibration_refuses_an_evaluated_image_of_another_name(site, tmp_path):
    images = np.load(site["new"] / "images.npy")
    images[4] = np.load(site["cache"] / "images.npy")[6]
    np.save(site["new"] / "images.npy", images)
    command = ["--checkpoint", site["checkpoint"], "--split", "test", "--calibrate", site["new"]]
    with pytest.raises(DataError, match=r"1 of its images or patients \(i4\) are evaluated"):
        evaluate("detection", site["cache"], *command, "--out", tmp_path / "out")


def test_calibration_refuses_few_images_another_size_and_several_folds(site, tmp_path):
    command = ["--checkpoint", site["checkpoint"], "--out", tmp_path / "out", "--calibrate"]
    few = keep_rows(site["cache"], tmp_path / "few", 4)
    with pytest.raises(DataError, match="few: 4 images, expected 5 or more"):
        evaluate("detection", site["cache"], *command, few)
    checkpoint = load_checkpoint(site["checkpoint"])
    checkpoint["settings"]["fold"] = 1
    checkpoint["trained_on"] = {"patients": [], "images": []}
    save_checkpoint(tmp_path / "fold1.pt", checkpoint)
    command.insert(1, tmp_path / "fold1.pt")
    with pytest.raises(DataError, match="give the checkpoints of one fold, or --split test"):
        evaluate("detection", site["cache"], *command, site["new"])
    change_meta(few, size=64)
    np.save(few / "images.npy", np.zeros((4, 64, 64), np.uint8))
    with pytest.raises(CheckpointError, match="few: size 64, but"):
        evaluate("detection", site["cache"], *command, few)


def test_to_input_normalises():
    images, boxes = to_input(
        torch.full((1, 1, 8, 8), 255, dtype=torch.uint8), torch.rand(1, 4), CPU, 0.5, 0.25
    )
    assert images.dtype == boxes.dtype == torch.float32 and (images == 2).all()


@pytest.mark.parametrize("script", ["preprocess", "train", "eval"])
def test_help_and_errors_of_the_command_line(script, tmp_path, capsys):
    path = ROOT / "detection" / f"{script}.py"
    options = {
        "preprocess": ["--data", "nowhere", "--out", "cache"],
        "train": ["--data", "nowhere"],
        "eval": ["--data", "nowhere", "--checkpoint", "nowhere.pt"],
    }[script]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"detection.{script}").main(["--help"])
    assert stop.value.code == 0 and f"python detection/{script}.py" in capsys.readouterr().out
    done = run_scripts(path, *options, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1


def test_new_images_are_never_overwritten(trained, tmp_path):
    checkpoint = ["--checkpoint", str(trained / "best.pt")]
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a.png", "0000_a.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(
            scans / name
        )
    before = {path.name: path.read_bytes() for path in scans.iterdir()}
    for out in (scans, scans / "new"):
        with pytest.raises(DataError, match=r"lies in .*scans, where it would be read as images"):
            evaluation.main([*checkpoint, "--out", str(out), "--images", str(scans)])
    with pytest.raises(DataError, match=r"0000_a\.png: would be overwritten by a result"):
        files = [str(scans / "a.png"), str(scans / "0000_a.png")]
        evaluation.main([*checkpoint, "--out", str(scans), "--images", *files])
    assert {path.name: path.read_bytes() for path in scans.iterdir()} == before
