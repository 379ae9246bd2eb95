"""The three dataset.py: batches, their order, augmentation, and the synthetic sets."""

import math
import pickle
from functools import partial
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import classification.dataset as xrays
import detection.dataset as boxes_of
import segmentation.dataset as volumes
from classification.dataset import EpochBatches, augment, to_input
from detection.dataset import cut_out, move_boxes, reach
from tests.caches import TASKS, copy, draw_volumes, module

CPU = torch.device("cpu")
# The rows of augment's draws, in their order
DRAWS = ("angle", "scale", "aspect", "shear", "dx", "dy")
DRAWS += ("gamma", "contrast", "brightness", "sigma", "noise")


# --- batches ---


@TASKS
def test_batches_equal_the_arrays_also_of_a_pickled_dataset(caches, task):
    cache = caches[task]
    script = module(task, "dataset")
    meta, index = script.open_cache(cache)
    rows = [7, 3, 3, 20]
    if task == "classification":
        data = script.XrayDataset(cache, script.read_labels(index, meta))
        truth = [1, 1, 1, 0]
    elif task == "detection":
        data = script.XrayDataset(cache, script.read_boxes(index)[0])
        truth = np.array([[6, top, 14, top + 8] for top in (18, 18, 18, 4)]) / 32
    else:
        data = script.PatchDataset(cache, [row["id"] for row in index], [8, 8], 2)
        rows = [(1, 0, 0, 3)]
        truth = np.load(cache / "volumes/v1.mask.npy")[None, ..., 3]
    batch = data[rows]
    assert np.array_equal(batch[1].numpy(), truth)
    if task == "segmentation":
        expected = np.load(cache / "volumes/v1.image.npy")[None, ..., 3]
    else:
        expected = np.load(cache / "images.npy")[rows][:, None]
    assert np.array_equal(batch[0].numpy(), expected)
    assert len(pickle.dumps(data)) < 10_000  # without its images
    assert torch.equal(pickle.loads(pickle.dumps(data))[rows][0], batch[0])
    loader = script.make_loader(data, [rows], 1, CPU)
    assert pickle.dumps(loader.worker_init_fn)  # workers may be spawned
    batch[0].zero_()  # a batch is a copy: the file stays as it is
    assert np.array_equal(data[rows][0].numpy(), expected)


def test_colour_comes_first_in_a_batch(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    images, _ = xrays.XrayDataset(tmp_path, torch.zeros(3))[[2, 0]]
    assert np.array_equal(images.numpy(), pixels[[2, 0]].transpose(0, 3, 1, 2))


def epoch_batches(epoch: int, *args: int) -> list[list[int]]:
    batches = EpochBatches([k * k for k in range(23)], *args)
    batches.epoch = epoch
    assert len(batches) == len(list(batches))
    return list(batches)


def test_the_order_is_that_of_seed_and_epoch_and_drops_the_remainder_only():
    assert epoch_batches(1, 4, 0) == epoch_batches(1, 4, 0)
    others = [epoch_batches(epoch, 4, seed) for epoch in (0, 1, 2) for seed in (0, 1, 2)]
    assert len({str(order) for order in others}) == 9
    kept = {frozenset(chain(*order)) for order in others}
    assert len(kept) > 1  # not always the same three are dropped
    assert all(len(rows) == 20 and rows < {k * k for k in range(23)} for rows in kept)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batch_of_one_process(world_size):
    single = epoch_batches(1, 2 * world_size, 7)
    ranks = [epoch_batches(1, 2, 7, rank, world_size) for rank in range(world_size)]
    for batch, *parts in zip(single, *ranks, strict=True):
        assert all(len(part) == 2 for part in parts)
        assert sorted(chain(*parts)) == sorted(batch)


# --- augmentation of X-rays ---


class Given:
    """In place of the random generator: the named draws are as given, all others are zero."""

    def __init__(self, batch: int = 1, seed: int = 0, **draws: float) -> None:
        self.noise_seed = seed
        self.draws = np.array([[draws.pop(name, 0.0)] * batch for name in DRAWS])
        assert not draws

    def uniform(self, low: float, high: float, shape: tuple) -> np.ndarray:
        assert (low, high) == (-1, 1) and shape == self.draws.shape
        return self.draws.copy()

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
    boxes = torch.tensor([[0.3, 0.3, 0.7, 0.7]] * 4)
    ways = (
        lambda seed, strength: (augment(images, rng(seed), strength),),
        lambda seed, strength: boxes_of.augment(images, boxes, rng(seed), strength),
    )
    for way in ways:
        first = way(1, 1.0)
        state = torch.get_rng_state()
        assert all(map(torch.equal, way(1, 1.0), first))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(way(2, 1.0)[-1], first[-1])
        assert all(map(torch.equal, way(1, 0.0), (images, boxes)))  # strength 0: the identity
    faint = augment(images, rng(0), 1e-4)  # no jump on the way there
    assert (faint - images).abs().max() < 0.01


def test_flip_mirrors_half_the_images():
    images = torch.rand(64, 1, 16, 16)
    out = augment(images, rng(0), 0.0, flip=True)
    same = (out - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (out - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(same, ~mirrored) and 20 < same.sum() < 44


def test_all_images_are_moved_differently_and_as_far_as_meant():
    moved = centers(augment(spots(0, 0, batch=512), rng(0)))
    assert (moved.norm(dim=1) < 0.3).sum() < 10
    assert torch.pdist(moved).median() > 3
    # dx and dy are uniform up to 0.1 of 64 px: a mean length of 0.765 * 6.4 px, in any direction.
    assert moved.norm(dim=1).mean().item() == pytest.approx(4.9, abs=0.4)
    assert moved.mean(0).abs().max() < 0.6


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ({}, (16, -8)),
        ({"dx": 1}, (16 - 6.4, -8)),
        ({"dy": 0.5}, (16, -8 - 3.2)),
        ({"scale": 1}, (16 * math.exp(-0.2), -8 * math.exp(-0.2))),
        ({"aspect": 1}, (16 * math.exp(-0.2), -8 * math.exp(0.2))),
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


def test_neither_movement_nor_blur_makes_a_black_rim():
    for gray in (0.0, 0.7, 1.0):
        flat = torch.full((8, 1, 17, 17), gray)
        moved = changed_by(flat, scale=1, angle=1, dx=1, gamma=1, sigma=1)
        assert close(moved, flat ** math.exp(0.5))


def changed_by(images: torch.Tensor, **draws: float) -> torch.Tensor:
    return augment(images, Given(batch=len(images), **draws))


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> bool:
    return torch.allclose(a, b, atol=atol)


def test_each_change_of_gray_by_itself():
    images = 0.2 + 0.6 * torch.rand(2, 1, 32, 32)
    changed = partial(changed_by, images)
    assert close(changed(), images)
    assert close(changed(gamma=1), images ** math.exp(0.5))
    mean = images.mean((2, 3), keepdim=True)
    assert close(changed(contrast=-1), mean + (images - mean) * math.exp(-0.4))
    assert close(changed(brightness=1), images + 0.2)
    assert close(changed(sigma=-1), images)  # half stay sharp,
    assert close(changed(noise=-1), images)  # half clean
    assert (changed(noise=1) - images).std().item() == pytest.approx(0.05, abs=0.005)
    assert not close(changed(noise=1), changed(noise=1, seed=1))


def test_blur_is_a_gaussian_of_each_image():
    impulse = torch.zeros(2, 1, 100, 100)
    impulse[:, :, 50, 60] = 1
    given = Given(batch=2)
    given.draws[DRAWS.index("sigma")] = (1, 0.5)
    out = augment(impulse, given)
    for k, sigma in enumerate((1.2, 0.6)):  # 1.2 % of the side, and half of it
        line = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma) ** 2)
        line /= line.sum()
        assert close(out[k, 0, 46:55, 56:65], line[:, None] * line)


def test_all_channels_are_augmented_alike():
    draws = {"angle": 0.5, "dx": 0.5, "gamma": 1, "brightness": -0.5, "sigma": 1}
    gray = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = changed_by(gray, **draws).expand(-1, 3, -1, -1)
    assert close(changed_by(gray.expand(-1, 3, -1, -1), **draws), expected, 1e-5)
    tinted = (0.3 + 0.2 * gray) * torch.tensor([1.5, 1, 0.5])[:, None, None]
    more = changed_by(tinted, contrast=1).mean((0, 2, 3))
    tint = tinted.mean((0, 2, 3))  # contrast is about the mean of all channels
    difference = math.exp(0.4) * (tint[0] - tint[2]).item()
    assert (more[0] - more[2]).item() == pytest.approx(difference, rel=1e-4)


def test_to_input_normalises():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    out = to_input(images, CPU, (0.45, 0.25))
    assert out.dtype == torch.float32 and out.shape == (3, 1, 4, 4)
    expected = [-0.45 / 0.25, (0.2 - 0.45) / 0.25, 0.55 / 0.25]  # 51 / 255 = 0.2
    assert out[:, 0, 0, 0].tolist() == pytest.approx(expected)
    augmented = (augment(images / 255, rng(1), 0.5, True) - 0.45) / 0.25
    assert torch.equal(to_input(images, CPU, (0.45, 0.25), rng(1), 0.5, True), augmented)


def test_images_are_normalised_one_by_one():
    """A gain and an offset are gone."""
    images = torch.randint(20, 60, (2, 1, 16, 16), dtype=torch.uint8)
    images[1] = 2 * images[0] + 40
    out = to_input(images, CPU, None)
    assert out.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert out.std((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.03)
    assert torch.allclose(out[0], out[1], atol=0.05)
    flat = to_input(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8), CPU, None)
    assert flat.abs().max() < 1e-3


# --- augmentation of images with boxes ---


def heart(points: int = 720) -> np.ndarray:
    """The outline whose support function `reach` is, (points, 2), in a box from -1 to 1."""
    angle = np.arange(points) * 2 * math.pi / points
    across = np.stack([np.cos(angle), np.sin(angle)], 1)
    along = np.stack([-np.sin(angle), np.cos(angle)], 1)
    slope = (reach(across + 1e-4 * along) - reach(across - 1e-4 * along)) / 2e-4
    return reach(across)[:, None] * across + slope[:, None] * along


def test_box_and_pixels_stay_together(monkeypatch):
    monkeypatch.setattr(boxes_of, "cut_out", lambda images, *_: images)  # it would hide an edge
    size = 512  # finer than the networks' 128, so that what is found is not the raster
    for seed in range(12):
        rng = np.random.default_rng(seed)
        center = rng.uniform(200, 312, 2)
        radius = rng.uniform(60, 120, 2)
        picture = Image.new("L", (4 * size, 4 * size))
        outline = 4 * (center + radius * heart()) - 0.5
        ImageDraw.Draw(picture).polygon(outline.ravel().tolist(), fill=255)
        image = np.asarray(picture.reduce(4)) / np.float32(255)
        images = torch.from_numpy(image).expand(4, 1, -1, -1)
        box = np.concatenate([center - radius, center + radius]) / size
        boxes = torch.from_numpy(box).float().expand(4, -1)
        moved, boxes = boxes_of.augment(images, boxes, rng)
        for image, box in zip(moved[:, 0], boxes * size, strict=True):
            low, high = image.quantile(0.02), image.quantile(0.995)
            ys, xs = torch.nonzero(image > (low + high) / 2, as_tuple=True)
            found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (found - box).abs().max() < size / 256, (seed, found, box)  # half a pixel of 128


def test_a_box_is_shifted_and_cut_off_at_the_edge():
    shift = np.array([[[1.0, 0, 0.6], [0, 1, -0.2]]])  # moves the picture the other way, by half
    found = move_boxes(np.array([[0.2, 0.4, 0.8, 0.6]]), shift)
    assert found[0].tolist() == pytest.approx([0, 0.5, 0.5, 0.7])


def test_the_outline_of_a_heart_touches_its_box_and_points_to_the_apex():
    axes = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert reach(3 * axes).tolist() == [3, 3, 3, 3]
    diagonals = np.array([[1.0, 1], [-1, 1], [-1, -1], [1, -1]]) / math.sqrt(2)
    assert reach(diagonals).tolist() == pytest.approx([1.219, 1.041, 1.001, 0.739], abs=1e-3)


def test_one_image_in_twenty_is_mirrored_with_its_box(monkeypatch):
    monkeypatch.setattr(boxes_of, "cut_out", lambda images, *_: images)
    images = torch.zeros(4000, 1, 16, 16)
    images[..., 12:16] = 1
    boxes = torch.tensor([[0.75, 0.0, 1.0, 1.0]] * 4000)
    for strength in (1.0, 0.5):
        moved, boxes_moved = boxes_of.augment(images, boxes, rng(0), strength)
        is_left = boxes_moved[:, 0] < 0.4
        assert is_left.float().mean().item() == pytest.approx(0.05 * strength, abs=0.01)
        brightest = moved.mean((1, 2)).argmax(1)  # column
        assert torch.equal(brightest < 8, is_left)


def test_cutout_paints_rectangles_in_the_mean_gray():
    images = torch.rand(2, 1, 40, 40)
    draws = np.array([[0.5, 1.0], [0.25, 1.0], [0.0, 1.0], [1.0, 1.0]])  # x, y, width, height
    cut = cut_out(images, draws[:, None], 1.0)
    changed = (cut != images)[:, 0]
    assert changed[0].nonzero().tolist() == [[y, x] for y in range(2, 18) for x in range(18, 22)]
    assert changed[1].nonzero().tolist() == [[y, x] for y in range(32, 40) for x in range(32, 40)]
    assert torch.allclose(cut[0, 0, 10, 20], images[0].mean())
    half = cut_out(images, draws[:, None], 0.5) != images
    assert half[0].sum() == 8 * 2 and half[1].sum() == 4 * 4
    both = cut_out(images, np.stack([draws, draws[:, ::-1]], 1), 1.0) != images
    assert both[0].sum() == both[1].sum() == changed.sum()


# --- patches of volumes ---


@pytest.fixture(scope="module")
def volume_cache(tmp_path_factory) -> Path:
    return draw_volumes(tmp_path_factory.mktemp("volumes") / "cache", 4, (13, 10, 8))


def make_patches(cache: Path, patch: list[int], slice_axis: int) -> volumes.PatchDataset:
    return volumes.PatchDataset(cache, ["v0", "v1", "v2", "v3"], patch, slice_axis)


@pytest.mark.parametrize(
    ("patch", "slice_axis"),
    [([8, 8], 2), ([8, 6], 0), ([8, 6], 1), ([8, 6, 5], 2), ([16, 16, 16], 2)],
)
def test_patches_are_padded_with_zeros(volume_cache, patch, slice_axis):
    places = [(1, 2, 1, 3), (0, -2, 0, 0), (3, 30, -30, 0)]  # case, x, y, z
    images, masks = make_patches(volume_cache, patch, slice_axis)[places]
    assert images.dtype == torch.float16 and masks.dtype == torch.uint8
    size = list(patch)
    if len(patch) == 2:
        size.insert(slice_axis, 1)
    for k, (case, *corner) in enumerate(places):
        inside = tuple(slice(50 + c, 50 + c + s) for c, s in zip(corner, size, strict=True))
        image, mask = volumes.open_case(volume_cache, f"v{case}")
        assert np.array_equal(images[k, 0].numpy(), np.pad(image[0], 50)[inside].reshape(patch))
        assert np.array_equal(masks[k].numpy(), np.pad(mask, 50)[inside].reshape(patch))


@pytest.mark.parametrize("patch", [[8, 8], [8, 6, 5], [16, 16, 16]])
def test_epochs(volume_cache, patch):
    def batches(epoch: int, **options: int) -> list:
        patches = make_patches(volume_cache, patch, 2)
        sampler = volumes.EpochBatches(patches, [0, 1, 2, 3], 2, 5, **options)
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    first = batches(0)
    assert first == batches(0) and first != batches(1)
    ranks = [batches(0, rank=k, world_size=2) for k in (0, 1)]
    for k, (one, other) in enumerate(zip(*ranks, strict=True)):
        assert sorted(one + other) == sorted(first[2 * k] + first[2 * k + 1])
    size = patch if len(patch) == 3 else [*patch, 1]
    for _, *corner in chain(*first):
        for start, n, s in zip(corner, (13, 10, 8), size, strict=True):
            assert 0 <= start <= n - s if n >= s else start == (n - s) // 2
    if patch == [8, 8]:  # as many slices as fit into the four volumes, two at a time
        assert len(first) == 4 * round(13 * 10 * 8 / 64) // 2


def test_half_the_patches_lie_about_the_foreground(volume_cache, tmp_path):
    cache = copy(volume_cache, tmp_path / "cache")
    for path in cache.glob("volumes/*.points.npy"):
        np.save(path, np.array([[1, 9, 7, 4]], np.int16))  # class, x, y, z
    batches = volumes.EpochBatches(make_patches(cache, [3, 3, 3], 2), [0, 1, 2, 3], 2, 5)
    about = [corner == [8, 6, 3] for _, *corner in chain(*batches)]
    assert len(about) > 100 and 0.4 < np.mean(about) < 0.6


@pytest.mark.parametrize("shape", [(24, 20), (14, 16, 12)])
def test_augmentation_moves_image_and_mask_together(shape):
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    inside = torch.from_numpy(np.abs(grid - 0.1).max(0) < 0.5).expand(8, *shape)
    mask = 3 * inside.byte()
    images = inside[:, None].float() * 4 - 2
    spacing = [1.0, 2.0, 1.5][: len(shape)]
    moved, masks = volumes.augment(images, mask, np.random.default_rng(1), spacing, 1.0)
    assert masks.dtype == torch.int64 and moved.shape == images.shape
    assert masks.unique().tolist() == [0, 3]  # no class between two others
    changed = (masks != mask).flatten(1).any(1)
    assert 2 < changed.sum() <= 8
    for image, one in zip(moved[:, 0], masks, strict=True):
        assert image[one == 3].mean() > image[one == 0].mean() + 1  # wherever it went
    again = volumes.augment(images, mask, np.random.default_rng(1), spacing, 1.0)
    assert torch.equal(again[0], moved) and torch.equal(again[1], masks)
    still = volumes.augment(images, mask, np.random.default_rng(1), spacing, 0.0)
    assert torch.equal(still[0], images) and torch.equal(still[1], mask.long())


@pytest.mark.parametrize("size", [(5, 8), (4, 6, 3)])
def test_grids_are_those_of_affine_grid(size):
    dims = len(size)
    theta = torch.randn(2, dims, dims + 1, generator=torch.Generator().manual_seed(0))
    expected = F.affine_grid(theta, [2, 1, *size], align_corners=False)
    assert close(volumes.make_grid(theta, size), expected, 1e-5)


def test_rotation_is_in_millimetres():
    """In the coordinates of grid_sample, -1 to 1, of 90 x 60 mm; the last axis first."""
    draws = np.zeros((6, 1))
    draws[5] = 1
    theta = volumes.random_affine(draws, np.array([90.0, 60.0]))[0, :, :2]
    cos = math.cos(math.radians(20))
    sin = math.sin(math.radians(20))
    assert theta.flatten().tolist() == pytest.approx([cos, 1.5 * sin, -sin / 1.5, cos])
    draws = np.array([[1.0], [1], [0], [0], [0], [0]])  # all axes are scaled, and the first one
    theta = volumes.random_affine(draws, np.array([90.0, 60.0]))[0, :, :2]
    assert theta.flatten().tolist() == pytest.approx([math.exp(0.2), 0, 0, math.exp(0.3)])


def test_the_synthetic_sets_are_functions_of_their_seeds(tmp_path):
    for script, options in ((xrays, {"patients": 2}), (volumes, {"cases": 2, "size": 24})):
        contents = []
        for more in ({}, {}, {next(iter(options)): 3}, {"seed": 1}):
            folder = tmp_path / f"{script.__name__}{len(contents)}"
            script.write_demo(folder, **options | more)
            pixels = {path.name: path.read_bytes() for path in folder.rglob("*.dcm")}
            for path in folder.rglob("*.nii.gz"):  # gzip keeps the time
                pixels[path.name, path.parent.name] = nib.load(path).get_fdata().tobytes()
            contents.append(pixels)
        first, same, longer, other = contents  # a longer one begins with a shorter one
        assert first == same and first.items() < longer.items()
        assert first.keys() == other.keys() and not first.items() & other.items()
