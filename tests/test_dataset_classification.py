"""classification/dataset.py and model.py: the parts that train.py puts together."""

import copy
import csv
import json
import math
import pickle
import sys
from itertools import chain
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from classification import dataset
from classification.dataset import (
    EpochBatches,
    XrayDataset,
    apply_curve,
    augment,
    blur,
    borrow_histogram,
    choose_scale,
    draw_phantom,
    in_batches,
    make_loader,
    read_index,
    to_input,
    write_demo,
    write_dicom,
)
from classification.model import PRETRAINED_MEAN, PRETRAINED_STD, build_model, class_activation_maps
from classification.preprocess import DataError
from classification.train import make_optimizer

CPU = torch.device("cpu")
N, SIZE = 50, 16
# The rows of augment's draws, in their order.
DRAWS = (
    "angle",
    "scale",
    "aspect",
    "shear",
    "dx",
    "dy",
    "gamma",
    "contrast",
    "brightness",
    "sigma",
    "noise",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    images = np.random.default_rng(0).integers(256, size=(N, SIZE, SIZE), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    with open(folder / "index.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "fold", "label", "source"))
        writer.writerows(
            (f"i{k}", f"p{k // 2}", k // 2 % 5, k % 3 % 2, f"raw/i{k}.png") for k in range(N)
        )
    meta = {"classes": ["no", "yes"], "size": SIZE, "fit": "pad", "mean": 0.5, "std": 0.25}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, patients=16)
    return folder


# --- the cache ---


def test_batches_equal_the_array_and_the_index(cache):
    array, rows = np.load(cache / "images.npy"), [7, 3, 3, 49]
    images, labels = XrayDataset(cache)[rows]
    assert images.shape == (4, 1, SIZE, SIZE) and images.dtype == torch.uint8
    assert np.array_equal(images[:, 0].numpy(), array[rows])
    assert labels.tolist() == [1, 0, 0, 1] and labels.dtype == torch.int64
    assert read_index(cache)[3] == {
        "id": "i3",
        "patient": "p1",
        "fold": "1",
        "label": "0",
        "source": "raw/i3.png",
    }
    images.zero_()  # a batch is a copy: the file stays as it is
    assert np.array_equal(np.load(cache / "images.npy"), array)


def test_the_dataset_pickles_as_its_path(cache):
    assert (cache / "images.npy").stat().st_size > 10_000
    data = XrayDataset(cache)
    assert len(pickle.dumps(data)) < 10_000
    expected = data[[5, 6]][0]
    assert len(pickle.dumps(data)) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(data))[[5, 6]][0], expected)


def test_evaluation_batches_keep_every_row_in_order():
    assert in_batches([4, 2, 9, 1, 0], 2) == [[4, 2], [9, 1], [0]]
    assert in_batches([], 2) == []


def epoch_batches(epoch: int, *args: int) -> list[list[int]]:
    batches = EpochBatches([k * k for k in range(23)], *args)
    batches.epoch = epoch
    assert len(batches) == len(list(batches))
    return list(batches)


def test_the_order_is_a_function_of_seed_and_epoch():
    assert epoch_batches(1, 4, 0) == epoch_batches(1, 4, 0)
    others = [epoch_batches(epoch, 4, seed) for epoch in (0, 1, 2) for seed in (0, 1, 2)]
    assert len({str(order) for order in others}) == 9


def test_an_epoch_drops_the_remainder_only():
    rows = list(chain(*epoch_batches(3, 4, 0)))
    assert len(rows) == len(set(rows)) == 20 and set(rows) < {k * k for k in range(23)}
    kept = {frozenset(chain(*epoch_batches(epoch, 4, 0))) for epoch in range(4)}
    assert len(kept) > 1  # not always the same three are dropped


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batch_of_one_process(world_size):
    single = epoch_batches(1, 2 * world_size, 7)
    ranks = [epoch_batches(1, 2, 7, rank, world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(single)} == {23 // (2 * world_size)}
    for batch, *parts in zip(single, *ranks, strict=True):
        assert all(len(part) == 2 for part in parts)
        assert sorted(chain(*parts)) == sorted(batch)


def two_epochs(cache: Path, workers: int, context: str | None = None) -> list[tuple]:
    batches = EpochBatches(list(range(N)), 8, seed=0)
    loader = make_loader(cache, batches, workers, CPU)
    loader.multiprocessing_context = context
    assert loader.persistent_workers == (workers > 0)
    fetched = []
    for batches.epoch in range(2):
        fetched += loader
    return fetched


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "context"), [(2, None), (1, "spawn")])
def test_workers_give_the_same_batches(cache, workers, context):
    expected, got = two_epochs(cache, 0), two_epochs(cache, workers, context)
    assert len(expected) == len(got) == 2 * (N // 8)
    assert all(
        torch.equal(a, b)
        for x, y in zip(expected, got, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not torch.equal(got[0][0], got[N // 8][0])  # workers that stay see the new epoch


# --- augmentation ---


class Given:
    """In place of the random generator: the named draws are as given, all others are zero."""

    def __init__(
        self, batch: int = 1, noise_seed: int = 0, moves: bool = True, **draws: float
    ) -> None:
        self.noise_seed, self.moves, self.draws = noise_seed, moves, np.zeros((len(DRAWS), batch))
        self.look = np.array([[draws.pop(name, 0.0)] * batch for name in ("share", "amount")])
        self.bend = draws.pop("bend", 0.0)  # of the darkest eighth of the gray scale
        for name, value in draws.items():
            self.draws[DRAWS.index(name)] = value

    def uniform(self, low: float, high: float, shape: tuple | int) -> np.ndarray:
        if isinstance(shape, int):
            return np.full(shape, high)
        given = self.draws if shape == self.draws.shape else self.look
        assert (low, high) == (-1, 1) and shape == given.shape
        return given.copy()

    def normal(self, mean: float, std: float, shape: tuple) -> np.ndarray:
        return np.array([[self.bend] + [0.0] * (shape[1] - 1)] * shape[0])

    def random(self, batch: int) -> np.ndarray:
        return np.full(batch, 0.499 if self.moves else 0.5)

    def integers(self, high: int) -> int:
        return self.noise_seed


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def spots(x: float, y: float, batch: int = 1, size: int = 64) -> torch.Tensor:
    """A round spot at (x, y) pixels from the middle, on black."""
    at = torch.arange(size) - (size - 1) / 2
    spot = torch.exp(-0.5 * ((at - x).square() + (at[:, None] - y).square()) / 2**2)
    return spot.expand(batch, 1, size, size)


def centers(images: torch.Tensor, cut: float = 0.5) -> torch.Tensor:
    """The (x, y) of the spots from the middle, (B, 2); what is below `cut` of the maximum is left out."""
    at = torch.arange(images.shape[-1]) - (images.shape[-1] - 1) / 2
    mass = images[:, 0] - images.amin((1, 2, 3))[:, None, None]
    mass = (mass - cut * mass.amax((1, 2), keepdim=True)).clamp(min=0)
    total = mass.sum((1, 2))
    return torch.stack([(mass.sum(1) * at).sum(1) / total, (mass.sum(2) * at).sum(1) / total], 1)


def test_augmentation_depends_on_its_rng_alone():
    images = torch.rand(4, 1, 32, 32)
    torch.manual_seed(1)
    first = augment(images, rng(0, 1, 2, 3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(augment(images, rng(0, 1, 2, 3)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(images, rng(0, 1, 2, 4)), first)


@pytest.mark.parametrize("fill", [0.0, 1.0, None])
def test_augmentation_keeps_shape_and_type_and_stays_finite(fill):
    images = torch.rand(6, 1, 29, 29) if fill is None else torch.full((6, 1, 29, 29), fill)
    before = images.clone()
    for seed in range(5):
        out = augment(images, rng(seed), flip=True)
        assert out.shape == images.shape and out.dtype == torch.float32 and out.isfinite().all()
    assert torch.equal(images, before)


def test_strength_0_is_the_identity():
    images = torch.rand(3, 1, 16, 16)
    assert torch.equal(augment(images, rng(0), 0.0), images)
    faint = augment(images, rng(0), 1e-4)  # no jump on the way there
    assert (faint - images).abs().max() < 0.01


def test_flip_mirrors_half_the_images():
    images = torch.rand(64, 1, 16, 16)
    out = augment(images, rng(0), 0.0, flip=True)
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (out - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(same, ~mirrored) and 20 < same.sum() < 44


def test_images_of_a_batch_are_moved_differently_and_as_far_as_meant():
    moved = centers(augment(spots(0, 0, batch=512), rng(0)))
    still = (
        moved.norm(dim=1) < 0.3
    )  # half keep their place; noise and contrast shift the measured center a little
    assert 200 < still.sum() < 312
    moved = moved[~still]
    assert torch.pdist(moved).median() > 3
    # dx and dy are uniform up to 0.1 of 64 px: the mean length is 0.765 * 6.4 px, no direction preferred
    assert moved.norm(dim=1).mean().item() == pytest.approx(4.9, abs=0.4)
    assert moved.mean(0).abs().max() < 0.6


def test_images_that_keep_their_place_keep_their_pixels():
    images = torch.rand(1, 1, 16, 16)
    assert torch.allclose(
        augment(images, Given(moves=False, dx=1, angle=1, scale=1)), images, atol=1e-4
    )


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ({}, (16, -8)),
        ({"dx": 1}, (16 - 6.4, -8)),
        ({"dy": 0.5}, (16, -8 - 3.2)),
        ({"scale": 1}, (16 * math.exp(-0.2), -8 * math.exp(-0.2))),
        ({"aspect": 1}, (16 * math.exp(-0.1), -8 * math.exp(0.1))),
        ({"shear": 1}, (16 + 0.1 * 8, -8)),  # the output at (x, y) comes from (x + 0.1 y, y)
        # 15 degrees counterclockwise on the screen: x cos + y sin, y cos - x sin
        ({"angle": 1}, (16 * 0.9659 - 8 * 0.2588, -8 * 0.9659 - 16 * 0.2588)),  # 13.38, -11.87
        ({"angle": 1, "shear": 1}, (13.38 + 0.1 * 11.87, -11.87)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_movement_by_itself(draws, expected):
    moved = centers(augment(spots(16, -8), Given(**draws)), cut=0)[0]
    assert moved.tolist() == pytest.approx(expected, abs=0.02)
    half = augment(spots(16, -8), Given(**draws), strength=0.5)
    weaker = Given(**{name: value / 2 for name, value in draws.items()})
    assert torch.allclose(half, augment(spots(16, -8), weaker), atol=1e-6)


def test_each_change_of_gray_by_itself():
    images = 0.2 + 0.6 * torch.rand(2, 1, 32, 32)
    mean = images.mean((2, 3), keepdim=True)

    def changed(**draws: float) -> torch.Tensor:
        return augment(images, Given(batch=2, **draws))

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, atol=1e-4)

    assert close(changed(), images)
    assert close(changed(gamma=1), images ** math.exp(0.5))
    assert close(changed(contrast=-1), mean + (images - mean) * math.exp(-0.4))
    assert close(changed(brightness=1), images + 0.2)
    assert close(changed(sigma=1), blur(images, torch.full((2,), 0.012 * 32)))
    assert close(changed(sigma=-1), images)  # half stay sharp,
    assert close(changed(noise=-1), images)  # half clean
    assert (changed(noise=1) - images).std().item() == pytest.approx(0.05, abs=0.005)
    assert not close(changed(noise=1), changed(noise=1, noise_seed=1))


def test_each_change_of_the_look_by_itself():
    images = torch.rand(2, 1, 64, 64) ** torch.tensor([0.8, 1.3])[:, None, None, None]
    inner = 0.3 + 0.4 * images

    def changed(images: torch.Tensor, **draws: float) -> torch.Tensor:
        return augment(images, Given(batch=2, **draws))

    def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> bool:
        return torch.allclose(a, b, atol=atol)

    # Each gets the histogram of the other, to a gray value, and keeps the order of its own
    swapped = changed(images, share=1)
    shares = torch.linspace(0.02, 0.98, 9)
    expected = images.flip(0).flatten(1).quantile(shares, 1)
    assert close(swapped.flatten(1).quantile(shares, 1), expected, 0.006)
    order = images.flatten(1).argsort(1)
    assert (swapped.flatten(1).gather(1, order).diff(dim=1) > -1e-4).all()
    assert close(changed(images, share=0.5), (images + swapped) / 2)
    assert close(changed(images, share=-1), images)  # half keep theirs
    # The darkest eighth of the gray scale takes e**0.6 times the range of each of the others
    dark = math.exp(0.6) / (math.exp(0.6) + 7)
    bent = changed(torch.tensor([1 / 16, 1 / 8, 1]).view(1, 1, 1, 3).expand(2, -1, -1, -1), bend=1)
    assert bent[0, 0, 0].tolist() == pytest.approx([dark / 2, dark, 1], abs=0.005)
    fine = inner - blur(inner, torch.full((2,), 0.018 * 64))
    assert close(changed(inner, amount=1), (inner + 2 * fine).clamp(1e-4, 1))
    assert close(changed(inner, amount=-1), inner - fine)
    assert close(changed(inner, amount=-5), inner - fine)  # not turned over


def test_the_histogram_of_the_one_before():
    images = torch.tensor([[0.0, 0.2, 0.2, 1.0], [0.4, 0.6, 0.8, 0.6]]).view(2, 1, 2, 2)
    out = apply_curve(images, borrow_histogram(images)).flatten(1)
    assert out[1].tolist() == pytest.approx([0, 0.2, 1, 0.2], abs=1e-6)
    assert out[0].tolist() == pytest.approx([0.4, 0.6, 0.6, 0.8], abs=1e-6)


def test_blur_is_a_gaussian():
    sigma = torch.tensor([0.05, 0.8, 1.3])
    impulse = torch.zeros(3, 1, 15, 17)
    impulse[:, :, 7, 8] = 1
    out = blur(impulse, sigma)
    assert out.shape == impulse.shape
    assert torch.allclose(out[0], impulse[0], atol=1e-6)
    for k in (1, 2):  # one sigma for each image
        weights = [math.exp(-(d**2) / (2 * sigma[k].item() ** 2)) for d in range(-4, 5)]
        line = torch.tensor(weights) / sum(weights)
        assert torch.allclose(out[k, 0, 3:12, 4:13], line[:, None] * line, atol=1e-6)
        assert out[k].sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(
        blur(torch.full((3, 1, 8, 8), 0.7), sigma), torch.tensor(0.7)
    )  # no dark rim


def test_to_input_normalises():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    out = to_input(images, CPU, 0.45, 0.25)
    assert out.dtype == torch.float32 and out.shape == (3, 1, 4, 4)
    # 51 / 255 = 0.2
    assert out[:, 0, 0, 0].tolist() == pytest.approx(
        [-0.45 / 0.25, (0.2 - 0.45) / 0.25, 0.55 / 0.25]
    )
    augmented = (augment(images / 255, rng(1), 0.5, True) - 0.45) / 0.25
    assert torch.equal(to_input(images, CPU, 0.45, 0.25, rng(1), 0.5, True), augmented)


def test_images_are_normalised_one_by_one():
    """A gain and an offset are gone, and what older checkpoints and --pretrained know stays."""
    images = torch.randint(20, 60, (2, 1, 16, 16), dtype=torch.uint8)
    images[1] = 2 * images[0] + 40
    assert choose_scale({"mean": 0.4, "std": 0.2, "per_image": True}) == (None, None)
    assert choose_scale({"mean": 0.4, "std": 0.2, "per_image": False}) == (0.4, 0.2)
    assert choose_scale({"mean": 0.4, "std": 0.2}) == (0.4, 0.2)
    out = to_input(images, CPU, None, None)
    assert out.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert out.std((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.03)
    assert torch.allclose(out[0], out[1], atol=0.05)
    flat = to_input(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8), CPU, None, None)
    assert flat.abs().max() < 1e-3


# --- the synthetic raw set ---


def read_table(raw: Path) -> list[dict[str, str]]:
    with open(raw / "stage_2_train_labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_demo_files_decode(demo):
    paths = sorted((demo / "stage_2_train_images").glob("*.dcm"))
    files = [pydicom.dcmread(path) for path in paths]  # raises for what is not DICOM
    assert {ds.file_meta.TransferSyntaxUID.name for ds in files} == {
        "JPEG Baseline (Process 1)",
        "Explicit VR Little Endian",
    }
    assert (
        len({ds.SOPInstanceUID for ds in files})
        == 16
        == len({ds.pixel_array.tobytes() for ds in files})
    )
    for ds, path in zip(files, paths, strict=True):
        pixels = ds.pixel_array
        assert pixels.shape == (256, 256) and pixels.max() < 2**ds.BitsStored
        assert pixels.std() > 0.05 * 2**ds.BitsStored
        assert (
            ds.PatientID == path.stem
            and ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        )


def test_both_kinds_of_file_show_the_same_picture(tmp_path):
    picture, _ = draw_phantom(rng(5), 1)
    write_dicom(tmp_path / "a.dcm", picture, jpeg=True)
    write_dicom(tmp_path / "b.dcm", picture, jpeg=False)
    jpeg, plain = (pydicom.dcmread(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    assert (
        jpeg.PhotometricInterpretation == "MONOCHROME2"
        and plain.PhotometricInterpretation == "MONOCHROME1"
    )
    assert np.abs(plain.pixel_array / 4095 + picture - 1).max() < 1e-3  # MONOCHROME1: 0 is white
    assert np.abs(jpeg.pixel_array / 255 - picture).mean() < 0.02


def test_demo_table_has_a_row_per_box(demo):
    rows = read_table(demo)
    names = [row["patientId"] for row in rows]
    assert set(names) == {path.stem for path in (demo / "stage_2_train_images").iterdir()}
    assert len(names) > len(set(names))
    positive = [row for row in rows if row["Target"] == "1"]
    assert 0 < len(positive) < len(rows)
    for row in positive:
        x, y, width, height = (int(row[k]) for k in ("x", "y", "width", "height"))
        assert 0 <= x < x + width <= 256 and 0 <= y < y + height <= 256 and min(width, height) > 10
    negative = [row for row in rows if row["Target"] == "0"]
    assert all(row["x"] == row["height"] == "" for row in negative)
    assert not {row["patientId"] for row in negative} & {row["patientId"] for row in positive}


@pytest.mark.slow
def test_boxes_lie_on_the_opacities():
    rise = []
    for seed in range(12):
        (with_box, [(x, y, width, height)]), (without, none) = (
            draw_phantom(rng(seed), n) for n in (1, 0)
        )
        assert none == [] and with_box.min() >= 0 and with_box.max() <= 1
        difference = with_box - without
        inside = np.zeros_like(difference, bool)
        inside[y : y + height, x : x + width] = True
        rise.append(difference[inside].mean() - difference[~inside].mean())
    assert np.mean(rise) > 0.05


def test_demo_is_a_function_of_its_seed(demo, tmp_path):
    write_demo(tmp_path / "same", patients=3)
    write_demo(tmp_path / "other", patients=3, seed=1)
    for path in sorted((tmp_path / "same/stage_2_train_images").iterdir()):
        assert path.read_bytes() == (demo / "stage_2_train_images" / path.name).read_bytes()
        assert (
            path.read_bytes() != (tmp_path / "other/stage_2_train_images" / path.name).read_bytes()
        )
    same = read_table(tmp_path / "same")
    assert same == read_table(demo)[: len(same)]


# --- the model ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "stem", "side"),
    [
        ("resnet18", 28, 3, 4),  # 28, 14, 7, 4
        ("resnet18", 64, 3, 8),
        ("resnet34", 65, 7, 3),  # 65, 33, 17, 9, 5, 3
        ("resnet50", 96, 7, 3),
        ("resnet50", 32, 3, 4),
    ],
)
def test_stem_feature_maps_and_activation_maps(arch, size, stem, side):
    torch.manual_seed(0)
    model = build_model(arch, 3, size).eval()
    assert model.conv1.weight.shape == (64, 1, stem, stem)
    assert isinstance(model.maxpool, torch.nn.Identity) == (stem == 3)
    images = torch.randn(2, 1, size, size)
    with torch.no_grad():
        logits, maps = class_activation_maps(model, images)
        assert maps.shape == (2, 3, side, side)
        assert torch.allclose(logits, model(images), atol=1e-5)
        assert logits.std() > 1e-3


@pytest.fixture
def imagenet(monkeypatch) -> torch.nn.Module:
    """A random RGB ResNet-18 whose weights torchvision hands out instead of downloading."""
    torch.manual_seed(0)
    rgb = torchvision.models.resnet18().eval()
    for name, buffer in rgb.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            buffer.normal_(0, 0.1)
    state = copy.deepcopy(rgb.state_dict())
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    return rgb


def test_the_summed_stem_equals_the_rgb_network(imagenet):
    model = build_model("resnet18", 2, 96, pretrained=True).eval()
    assert model.conv1.weight.shape == (64, 1, 7, 7) and model.fc.weight.shape == (2, 512)
    imagenet.fc = model.fc
    images = (torch.rand(2, 1, 96, 96) - PRETRAINED_MEAN) / PRETRAINED_STD
    assert (PRETRAINED_MEAN, PRETRAINED_STD) == (0.449, 0.226)
    with torch.no_grad():
        expected = imagenet(images.expand(-1, 3, -1, -1))
        assert (
            expected[0] - expected[1]
        ).abs().max() > 1e-2  # the images matter, not only the biases
        assert torch.allclose(model(images), expected, atol=1e-4)
        untrained = build_model("resnet18", 2, 96).eval()
        untrained.fc = model.fc
        assert not torch.allclose(untrained(images), expected, atol=1e-2)


def test_pretrained_refuses_small_images_and_says_when_there_is_no_network(monkeypatch):
    def offline(*_: object, **__: object) -> dict:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(DataError, match="64"):
        build_model("resnet18", 2, 64, pretrained=True)
    with pytest.raises(DataError, match=r"resnet18.*no route to host"):
        build_model("resnet18", 2, 65, pretrained=True)
    build_model("resnet18", 2, 65)  # needs no network


# --- nothing reads the device back ---


class NoReads(TorchDispatchMode):
    """Inside it, every .item(), .tolist() or `if tensor` raises."""

    def __torch_dispatch__(
        self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a read")
        return func(*args, **(kwargs or {}))


def training_step(
    device: torch.device, size: int, strength: float, make: object = make_optimizer
) -> torch.Tensor:
    model = build_model("resnet18", 2, size).to(device)
    optimizer = make(model, 1e-3, 0.05)
    images, labels = (
        torch.zeros(4, 1, size, size, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.long),
    )
    logits = model(to_input(images, device, 0.5, 0.25, rng(0), strength, True))
    loss = F.cross_entropy(logits.float(), labels.to(device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))
    return loss.detach()


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 96])
def test_a_training_step_runs_without_values(size, monkeypatch):
    # device meta has no values to read; AdamW's list of devices with a fused kernel does not name it
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None, raising=False)
    loss = training_step(torch.device("meta"), size, 0.0)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@pytest.mark.slow
def test_a_training_step_reads_no_scalar():
    with NoReads():
        training_step(CPU, 32, 1.0)
    with NoReads(), pytest.raises(RuntimeError, match="a read"):  # what `fused` is for
        training_step(
            CPU, 32, 1.0, lambda model, lr, decay: torch.optim.AdamW(model.parameters(), lr)
        )


def test_augmentation_runs_without_values(monkeypatch):
    images = torch.zeros(4, 1, 32, 32, device="meta")
    with pytest.raises(RuntimeError):  # there is no random generator for this device
        augment(images, rng(0), flip=True)
    generator = torch.Generator()
    monkeypatch.setattr(dataset.torch, "Generator", lambda device: generator)
    assert augment(images, rng(0), flip=True).shape == images.shape  # and nothing else is missing
