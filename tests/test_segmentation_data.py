"""segmentation/preprocess.py, dataset.py and model.py: tiny files, values made by hand."""

import csv
import gzip
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from torch import nn

from segmentation import preprocess
from segmentation.dataset import EpochBatches, PatchDataset, augment, cut, open_case, read_index
from segmentation.model import (
    UNet,
    build_model,
    default_patch,
    plan_stages,
    predict_volume,
    segmentation_loss,
    window_weights,
)
from segmentation.preprocess import (
    DataError,
    from_grid,
    main,
    mask_to_grid,
    normalise,
    read_volume,
    resample,
    resampling_matrix,
    to_grid,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
META = {
    "classes": ["background", "a", "b"],
    "values": [0, 1, 2],
    "channels": ["MRI"],
    "resample": False,
    "spacing": [1.0, 1.0, 1.0],
    "slice_axis": 2,
    "shape": [9, 8, 7],
    "normalisation": [None],
}
# Every way to order and to flip three axes, as nibabel writes it: (axis, 1 or -1) for each.
ORDERS = itertools.permutations(range(3))
SIGNS = itertools.product((1, -1), repeat=3)
ORIENTATIONS = [np.column_stack(pair) for pair in itertools.product(ORDERS, SIGNS)]


def oblique(spacing: tuple = (1.0, 1.5, 2.5), degrees: float = 12) -> np.ndarray:
    """Axes turned about z and x, no two of the same length, an origin somewhere."""
    a, b = np.radians([degrees, -degrees / 2])
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = z @ x * spacing
    affine[:3, 3] = (-20, 31, 7)
    return affine


def block(shape: tuple = (12, 10, 8)) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a brighter block of two classes that lies off the middle."""
    mask = np.zeros(shape, np.uint8)
    mask[2:7, 3:9, 1:5] = 1
    mask[2:4, 3:9, 1:5] = 2
    return (np.random.default_rng(sum(shape)).normal(0, 0.2, shape) + mask).astype(np.float32), mask


def write(
    raw: Path, name: str, image: np.ndarray, mask: np.ndarray | None, affine: object = None
) -> None:
    affine = oblique() if affine is None else affine
    for folder, voxels in (("imagesTr", image), ("labelsTr", mask)):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        if voxels is not None:
            nib.save(nib.Nifti1Image(voxels, affine), raw / folder / f"{name}.nii.gz")


def describe(raw: Path, **changes: object) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    labels = {"0": "background", "1": "a", "2": "b"}
    (raw / "dataset.json").write_text(
        json.dumps({"labels": labels, "modality": {"0": "MRI"}} | changes)
    )


def make(raw: Path, cases: int = 6) -> Path:
    describe(raw)
    for k in range(cases):
        image, mask = block((12 + k % 2, 10, 8))
        write(raw, f"c{k}", image + k, mask)
    return raw


def run(raw: Path, out: Path, *options: str) -> tuple[dict, list[dict]]:
    main(["--data", str(raw), "--out", str(out), "--workers", "2", *options])
    return json.loads((out / "meta.json").read_text()), read_index(out)


# --- grids ---


@pytest.mark.parametrize("resampled", [False, True])
def test_all_48_axis_orders_there_and_back(resampled):
    image, mask = block()
    meta = META | ({"resample": True, "spacing": [1.3, 1.1, 1.7]} if resampled else {})
    expected = to_grid(image[..., None], oblique(), meta)
    labels = mask_to_grid(mask, oblique(), meta)
    chances = np.eye(3, dtype=np.float16)[labels].transpose(3, 0, 1, 2)
    back = from_grid(chances, mask.shape, oblique())
    assert resampled or np.array_equal(back, mask)
    assert 2 * ((back > 0) & (mask > 0)).sum() > 0.75 * ((back > 0).sum() + (mask > 0).sum())
    for orientation in ORIENTATIONS:
        turned = apply_orientation(image, orientation)
        affine = oblique() @ inv_ornt_aff(orientation, image.shape)
        assert np.array_equal(to_grid(turned[..., None], affine, meta), expected)
        assert np.array_equal(
            mask_to_grid(apply_orientation(mask, orientation), affine, meta), labels
        )
        assert np.array_equal(
            from_grid(chances, turned.shape, affine), apply_orientation(back, orientation)
        )


def test_resampling_matrix_keeps_extent_and_ramps():
    assert np.array_equal(resampling_matrix(5, 5), np.eye(5))
    assert resampling_matrix(4, 2)[0].tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7, 0])
    for old, new in ((7, 13), (13, 7), (1, 4), (30, 11)):
        matrix = resampling_matrix(old, new)
        assert matrix.sum(1) == pytest.approx(1) and matrix.dtype == np.float32
        ramp = matrix @ ((np.arange(old) + 0.5) / old)
        inner = slice(2, -2) if old > 1 else slice(0)
        expected = ((np.arange(new) + 0.5) / new)[inner]
        assert ramp[inner] == pytest.approx(expected, abs=1e-6 if new > old else 0.01)
    fine = np.random.default_rng(0).normal(size=(32, 4, 4)).astype(np.float32)
    assert resample(fine, (8, 4, 4)).std() < 0.7 * fine.std()  # antialiased: noise is averaged


def test_normalise():
    image = np.array([0, 0, 0, 0, 0, 2, 4], np.float32)  # air
    assert normalise(image, None).tolist() == pytest.approx([-3] * 5 + [-1, 1])
    assert normalise(np.array([1, 2, 3, 4], np.float32), None).std() == pytest.approx(1)
    constants = {"low": 0, "high": 10, "mean": 5, "std": 5}
    assert normalise(np.array([-100, 5, 100], np.float32), constants).tolist() == [-1, 0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_product_of_matrices_starts_no_threads():
    code = (
        "import os, segmentation.preprocess as p; p.resample(p.np.ones([300] * 3, 'f'), [200] * 3)"
    )
    command = [sys.executable, "-c", f"{code}; print(len(os.listdir('/proc/self/task')))"]
    environment = {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
    assert subprocess.check_output(command, cwd=ROOT, env=environment) == b"1\n"


def test_the_last_axis_becomes_innermost_whatever_was():
    drawn = np.random.default_rng(0).integers(0, 99, (5, 6, 7)).astype(np.int16)
    for axes in itertools.permutations(range(3)):
        for step in (1, -1):
            volume = drawn.transpose(axes)[::step, :, ::-step]
            result = preprocess.z_innermost(volume)
            assert result.flags.c_contiguous and result.dtype == np.int16
            assert np.array_equal(result, volume)
    assert preprocess.z_innermost(drawn) is drawn


@pytest.mark.parametrize("low, high", [(0, 256), (-1024, 3000), (5, 9)])
@pytest.mark.parametrize("constants", [None, {"low": 7.5, "high": 200, "mean": 31.7, "std": 11.3}])
def test_whole_numbers_are_normalised_by_a_table_to_the_same_bits(low, high, constants):
    rng = np.random.default_rng(0)
    volume = rng.integers(low, high, (70, 60, 50)).astype(np.float32)  # several chunks
    for air in (False, True):
        if air:
            volume[:40] = low
        whole = preprocess.compact(volume)
        assert whole.dtype == (np.uint8 if low >= 0 else np.int16)
        for dtype in (np.float32, np.float16):
            expected = normalise(volume, constants).astype(dtype)
            assert np.array_equal(normalise(whole, constants, dtype), expected)
            turned = whole.transpose(2, 0, 1)[::-1]
            result = normalise(turned, constants, dtype)
            assert np.array_equal(result, expected.transpose(2, 0, 1)[::-1])


def test_voxels_get_the_smallest_type_that_holds_them():
    for low, high, expected in (
        (0, 255, np.uint8),
        (-1, 255, np.int16),
        (0, 32767, np.int16),
        (0, 32768, np.float32),
        (0, 0.5, np.float32),
        (-1, np.nan, np.float32),
    ):
        volume = np.array([low, high, 3.0])
        small = preprocess.compact(volume)
        assert small.dtype == expected and np.array_equal(small, volume, equal_nan=True)
    assert preprocess.compact(np.array([3, 40000], np.uint16)).tolist() == [3, 40000]


# --- preprocess.py ---


def test_cache(tmp_path):
    meta, _ = run(make(tmp_path / "raw"), tmp_path / "cache")
    assert meta["classes"] == ["background", "a", "b"] and meta["spacing"] == [1, 1.5, 2.5]
    assert meta["slice_axis"] == 2 and meta["n"] == 6 and meta["shape"] == [12, 10, 8]
    image, mask = open_case(tmp_path / "cache", "c1")
    assert (
        isinstance(image, np.memmap) and image.dtype == np.float16 and image.shape == (1, 13, 10, 8)
    )
    assert abs(float(image.mean())) < 1e-3 and float(image.astype(float).std()) == pytest.approx(
        1, abs=1e-3
    )
    assert np.array_equal(mask, block((13, 10, 8))[1])
    points = np.load(tmp_path / "cache" / "volumes" / "c1.points.npy")
    assert (mask[tuple(points[:, 1:].T)] == points[:, 0]).all() and len(points) == (mask > 0).sum()
    truth = nib.load(tmp_path / "cache" / "volumes" / "c1.truth.nii.gz")
    assert truth.get_data_dtype() == np.uint8 and np.allclose(truth.affine, oblique())
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path / "raw", tmp_path / "cache")
    assert not list(tmp_path.glob(".*"))


def test_spacing_by_value_keep_and_like(tmp_path):
    raw = make(tmp_path / "raw")
    meta, _ = run(raw, tmp_path / "coarse", "--spacing", "2", "3", "2.5")
    assert open_case(tmp_path / "coarse", "c0")[1].shape == (6, 5, 8) and meta["spacing"] == [
        2,
        3,
        2.5,
    ]
    image, mask = block()
    write(tmp_path / "other", "d0", image, mask, oblique((2, 3, 2.5)))
    write(tmp_path / "other", "d1", image, mask)
    like, index = run(tmp_path / "other", tmp_path / "like", "--like", str(tmp_path / "coarse"))
    assert {row["fold"] for row in index} == {"test"} and like["spacing"] == [2, 3, 2.5]
    assert open_case(tmp_path / "like", "d0")[1].shape == (12, 10, 8)
    assert open_case(tmp_path / "like", "d1")[1].shape == (6, 5, 8)
    kept, _ = run(tmp_path / "other", tmp_path / "keep", "--spacing", "keep")
    assert {open_case(tmp_path / "keep", name)[1].shape for name in ("d0", "d1")} == {(12, 10, 8)}
    assert not kept["resample"] and kept["classes"] == ["background", "1", "2"]


def test_identical_images_share_a_fold_and_are_named(tmp_path, capsys):
    raw = make(tmp_path / "raw", 8)
    image, mask = block((12, 10, 8))
    write(raw, "copy", image + 2, np.roll(mask, 1, 2))
    meta, index = run(raw, tmp_path / "cache")
    folds = {row["id"]: (row["fold"], row["group"]) for row in index}
    assert folds["copy"] == folds["c2"] and folds["copy"][1] == "c2"
    assert "c2 and copy are one image with different masks" in capsys.readouterr().out
    assert meta["copies"][0]["cases"] == ["c2", "copy"]


def test_ct_values_are_clipped_to_the_foreground_of_the_training_cases(tmp_path):
    describe(tmp_path / "raw", modality={"0": "CT"})
    image, mask = block()
    write(tmp_path / "raw", "c0", 100 * image, mask)
    meta, _ = run(tmp_path / "raw", tmp_path / "cache")
    inside = (100 * image)[mask > 0]
    low, high = np.percentile(inside, (0.5, 99.5))
    (found,) = meta["normalisation"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-5)
    expected = ((100 * image).clip(low, high) - inside.clip(low, high).mean()) / inside.clip(
        low, high
    ).std()
    assert np.allclose(open_case(tmp_path / "cache", "c0")[0][0], expected, atol=5e-3)


def test_label_styles_channels_and_official_test_cases(tmp_path):
    labels = {"background": 0, "edema": 2, "core": 4}
    describe(tmp_path / "raw", labels=labels, channel_names={"0": "T1", "1": "FLAIR"})
    image, mask = block()
    pair = np.stack([image, image.T.reshape(image.shape)], -1)
    write(tmp_path / "raw", "c0", pair, 2 * mask.astype(np.float32) + 4e-4)
    for folder in ("images", "labels"):
        (tmp_path / "raw" / f"{folder}Ts").mkdir()
        source = tmp_path / "raw" / f"{folder}Tr" / "c0.nii.gz"
        (tmp_path / "raw" / f"{folder}Ts" / "t0.nii.gz").write_bytes(source.read_bytes())
    (tmp_path / "raw" / "imagesTr" / "._c0.nii.gz").write_text("of a Mac")
    meta, index = run(tmp_path / "raw", tmp_path / "cache")
    assert meta["values"] == [0, 2, 4] and meta["classes"] == ["background", "edema", "core"]
    assert np.array_equal(open_case(tmp_path / "cache", "c0")[1], mask)
    assert open_case(tmp_path / "cache", "c0")[0].shape == (2, 12, 10, 8)
    assert [row["fold"] == "test" for row in index] == [False, True]


def bad_cases(raw: Path) -> dict[str, str]:
    """One case for each thing that can be wrong, and a part of its message."""
    image, mask = block()
    nan = image.copy()
    scaled = 255 * (mask > 0).astype(np.uint8)
    turned = oblique()
    nan[3, 3, 3] = np.nan
    turned[0, 3] += 2
    write(raw, "nan", nan, mask)
    write(raw, "flat", np.ones_like(image), mask)
    write(raw, "shape", image, mask[:-1])
    write(raw, "values", image, scaled)
    write(raw, "between", image, mask * 0.5)
    write(raw, "alone", image, None)
    write(raw, "two", np.stack([image, image], -1), mask)
    write(raw, "plane", image[:, :, 0], mask[:, :, 0])
    write(raw, "moved", image, mask)
    nib.save(nib.Nifti1Image(mask, turned), raw / "labelsTr" / "moved.nii.gz")
    for name, content in {"zero": b"", "text": b"no volume", "short": b""}.items():
        write(raw, name, image, mask)
        path = raw / "imagesTr" / f"{name}.nii.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if name == "short" else content)
    (raw / "labelsTr" / "lost.nii.gz").write_bytes(gzip.compress(b""))
    return {
        "nan": "1 voxels are NaN",
        "flat": "no contrast",
        "shape": "shape (11, 10, 8), expected (12, 10, 8)",
        "values": "mask values [0, 255], expected [0, 1, 2]",
        "between": "between the integers",
        "alone": "no file of that name in labelsTr",
        "two": "2 channels, expected ['MRI']",
        "plane": "expected 3D",
        "moved": "2 mm apart",
        "zero": "zero bytes",
        "text": "text.nii.gz",
        "short": "short.nii.gz",
        "lost": "no file of that name in imagesTr",
    }


def test_every_bad_case_is_named_in_one_run(tmp_path, capsys):
    raw = make(tmp_path / "raw")
    expected = bad_cases(raw)
    with pytest.raises(DataError, match=f"{len(expected)} cases or files"):
        run(raw, tmp_path / "cache")
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == len(expected)
        and not (tmp_path / "cache").exists()
        and not list(tmp_path.glob(".*"))
    )
    for name, reason in expected.items():
        assert any(f"/{name}.nii.gz" in line and reason in line for line in lines), (name, lines)
    meta, index = run(raw, tmp_path / "cache", "--skip-bad")
    assert meta["skipped"] == len(expected) and [row["id"] for row in index] == [
        f"c{k}" for k in range(6)
    ]
    with open(tmp_path / "cache" / "skipped.csv", newline="") as file:
        assert len(list(csv.reader(file))) == len(expected) + 1


def test_without_description_gaps_in_the_values_are_refused(tmp_path):
    raw = make(tmp_path / "raw")
    (raw / "dataset.json").unlink()
    image, mask = block()
    write(raw, "odd", image, 255 * (mask > 0).astype(np.uint8))
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    (raw / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json: .*expected labels"):
        run(raw, tmp_path / "cache")
    with pytest.raises(DataError, match="nowhere: found no folder, expected imagesTr"):
        run(Path("nowhere"), tmp_path / "cache")


def series(folder: Path, volume: np.ndarray, affine: np.ndarray) -> Path:
    """A CT series, int16 with an intercept, file names against the order of the slices."""
    folder.mkdir()
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    for k in range(volume.shape[2]):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = f"1.2.{k + 1}"
        ds.SeriesInstanceUID = "1.2"
        ds.ImageOrientationPatient = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
        ds.ImagePositionPatient = list(lps[:3] @ [0, 0, k, 1])
        ds.PixelSpacing = [spacing[1], spacing[0]]
        ds.RescaleSlope = 1
        ds.RescaleIntercept = -1024
        pixels = np.rint(volume[:, :, k].T + 1024).astype(np.uint16)
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.PixelRepresentation = 0
        ds.BitsAllocated = 16
        ds.BitsStored = 16
        ds.HighBit = 15
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW"
        ds.save_as(folder / f"{99 - k}.dcm", enforce_file_format=True)
    return folder


def test_a_dicom_series_is_the_volume_it_was_made_of(tmp_path):
    volume = np.random.default_rng(0).integers(-900, 900, (6, 5, 4)).astype(np.float32)
    affine = oblique()
    found, own, _ = read_volume(series(tmp_path / "dicom", volume, affine))
    assert np.array_equal(found[..., 0], volume) and np.allclose(own, affine, atol=1e-4)
    (tmp_path / "dicom" / "98.dcm").unlink()
    with pytest.raises(DataError, match="missing"):
        read_volume(tmp_path / "dicom")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 DICOM series"):
        read_volume(tmp_path / "empty")


# --- dataset.py ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run(make(folder / "raw"), folder / "cache")
    return folder / "cache"


def test_cut_pads_with_zeros():
    volume = np.arange(1, 9).reshape(1, 2, 2, 2)
    assert cut(volume, [0, 0, 0], [2, 2, 2]).tolist() == volume.tolist()
    assert cut(volume, [-1, 1, 0], [2, 2, 1])[0, :, :, 0].tolist() == [[0, 0], [3, 0]]
    assert not cut(volume, [5, -9, 0], [2, 2, 2]).any()


@pytest.mark.parametrize("patch, slice_axis", [
    ([8, 8], 2), ([8, 6], 0), ([8, 6], 1), ([8, 6, 5], 2), ([16, 16, 16], 2)
])  # fmt: skip
def test_patches(cache, patch, slice_axis):
    dataset = PatchDataset(cache, patch, slice_axis)
    images, masks = dataset[[(1, 2, 1, 3), (0, -2, 0, 0)]]
    assert images.shape == (2, 1, *patch) and masks.shape == (2, *patch)
    assert images.dtype == torch.float16 and masks.dtype == torch.uint8
    _, mask = open_case(cache, "c1")
    size = list(patch)
    if len(patch) == 2:
        size.insert(slice_axis, 1)
    assert np.array_equal(masks[0].numpy().reshape(size), cut(mask, [2, 1, 3], size))
    assert len(pickle.dumps(dataset)) < 10_000


@pytest.mark.parametrize("patch", [[8, 8], [8, 6, 5], [16, 16, 16]])
def test_epochs(cache, patch):
    def batches(epoch: int, **options: int) -> list:
        sampler = EpochBatches(cache, patch, 2, [0, 1, 3], 2, 5, **options)
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    first = batches(0)
    assert first == batches(0) and first != batches(1)
    both = [batches(0, rank=k, world_size=2) for k in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*both, strict=True)] == [
        sorted(a + b) for a, b in zip(first[::2], first[1::2], strict=False)
    ]
    shapes = {row: open_case(cache, f"c{row}")[1].shape for row in (0, 1, 3)}
    size = patch if len(patch) == 3 else [*patch, 1]
    for row, *corner in itertools.chain(*first):
        for start, n, s in zip(corner, shapes[row], size, strict=True):
            assert 0 <= start <= n - s if n >= s else start == (n - s) // 2
    if patch == [8, 8]:  # as many slices as fit into the volumes: 12x10x8, 13x10x8, 13x10x8
        assert len(first) == (round(960 / 64) + 2 * round(1040 / 64)) // 2


@pytest.mark.parametrize("shape", [(24, 20), (14, 16, 12)])
def test_augment_moves_image_and_mask_together(shape):
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    mask = torch.from_numpy((np.abs(grid - 0.1).max(0) < 0.5).astype(np.uint8)).expand(8, *shape)
    images = mask[:, None].float() * 4 - 2
    spacing = [1.0, 2.0, 1.5][: len(shape)]
    moved, masks = augment(images, mask, np.random.default_rng(0), spacing, 1.0, True)
    assert masks.dtype == torch.uint8 and moved.shape == images.shape
    changed = (masks != mask).flatten(1).any(1)
    assert 2 < changed.sum() <= 8
    for image, one in zip(
        moved[:, 0], masks, strict=True
    ):  # inside brighter than outside wherever it went
        assert image[one == 1].mean() > image[one == 0].mean() + 1
    again = augment(images, mask, np.random.default_rng(0), spacing, 1.0, True)
    assert torch.equal(again[0], moved) and torch.equal(again[1], masks)
    still = augment(images, mask, np.random.default_rng(0), spacing, 0.0, False)
    assert torch.equal(still[0], images) and torch.equal(still[1], mask)


def test_rotation_is_in_millimetres():
    """A disc stays a disc in mm, though it is an ellipse in voxels."""
    spacing = [1.0, 3.0]
    shape = (60, 20)
    x, y = (np.arange(n) * s - (n - 1) * s / 2 for n, s in zip(shape, spacing, strict=True))
    disc = torch.from_numpy((x[:, None] ** 2 + y**2 < 20**2).astype(np.uint8)).expand(32, *shape)

    class OnlyTurns:
        def uniform(self, low: float, high: float, size: tuple) -> np.ndarray:
            draws = np.zeros(size)
            draws[5] = np.linspace(low, high, size[1])
            return draws

        def random(self, n: int) -> np.ndarray:
            return np.zeros(n)

        def integers(self, n: int) -> int:
            return 0

    _, turned = augment(disc[:, None].float(), disc, OnlyTurns(), spacing, 1.0, False)
    assert (turned != disc).flatten(1).float().mean(1).max() < 0.04  # in voxels it would be 0.1


# --- model.py ---


def test_plan():
    strides = [stride for _, stride in plan_stages([35, 50, 36], [1.0, 1.0, 1.0])]
    assert strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    stages = plan_stages([64, 64, 16], [1.0, 1.0, 4.0])
    assert stages[0] == ([3, 3, 1], [1, 1, 1]) and stages[1] == ([3, 3, 1], [2, 2, 1])
    assert stages[2][1] == [2, 2, 1] and stages[3] == ([3, 3, 3], [2, 2, 2])
    assert len(plan_stages([4, 4], [1.0, 1.0])) == 1
    assert default_patch(2, META | {"shape": [1000, 900, 5]}) == [512, 512]
    assert np.prod(default_patch(3, META | {"shape": [500, 500, 90]})) <= 2**18


@pytest.mark.parametrize("size", [(17, 22), (16, 13, 11)])
def test_unet_takes_any_size(size):
    model = UNet(2, 3, 8, [16] * len(size), [1.0] * len(size))
    assert model(torch.randn(2, 2, *size)).shape == (2, 3, *size)


def test_loss_by_hand():
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1] = torch.tensor([[30.0, 30.0], [-30.0, -30.0]])
    masks = torch.tensor([[[1, 0], [0, 0]]])
    assert segmentation_loss(logits, masks, "dice").item() == pytest.approx(1 - 2 / 3, abs=1e-5)
    assert segmentation_loss(logits, 0 * masks, "dice").item() == pytest.approx(
        0.5, abs=1e-5
    )  # absent
    assert segmentation_loss(logits, masks, "dice_ce").item() == pytest.approx(
        1 / 3 + 30 / 4, abs=1e-4
    )


@pytest.mark.parametrize(("length", "size"), [(20, 8), (21, 8), (8, 8), (5, 8), (30, 7), (9, 1)])
def test_window_weights_add_up_to_one(length, size):
    total = torch.zeros(length + 2 * size)
    for start, weights in window_weights(length, size):
        assert 0 <= start <= length - size or length <= size
        total[start + size : start + 2 * size] += weights
    assert total[size : size + length].allclose(torch.ones(length), atol=1e-6)


@pytest.mark.parametrize("patch", [[8, 8, 8], [7, 5, 30], [16, 8]])
@pytest.mark.parametrize("axis", [0, 2])
def test_windows_of_a_pointwise_network_are_the_whole(patch, axis):
    torch.manual_seed(0)
    model = (nn.Conv2d if len(patch) == 2 else nn.Conv3d)(2, 3, 1)
    image = np.random.default_rng(0).normal(size=(2, 19, 9, 11)).astype(np.float16)
    whole = torch.einsum("kc,cxyz->kxyz", model.weight.flatten(1), torch.from_numpy(image).float())
    whole = (whole + model.bias.view(-1, 1, 1, 1)).softmax(0)
    for mirror in (False, True):
        found = predict_volume(model, image, patch, axis, CPU, None, 3, mirror)
        assert found.dtype == torch.float16 and (found.float() - whole).abs().max() < 2e-3


def test_one_window_is_the_network_itself(cache):
    meta = preprocess.read_meta(cache)
    model = build_model(meta, 8, [13, 10, 8]).eval()
    image, _ = open_case(cache, "c1")
    with torch.no_grad():
        expected = model(torch.from_numpy(np.array(image)).float()[None]).softmax(1)[0].half()
    assert torch.equal(predict_volume(model, image, [13, 10, 8], 2, CPU, None, 2), expected)


def test_points_are_different_voxels_of_every_class():
    labels = np.zeros((30, 20, 10), np.uint8)
    labels[:20] = 1  # 4,000 voxels
    labels[25, 3:6, 7] = 3  # and none of class 2
    points = preprocess.draw_points(labels, 4)
    classes, counts = np.unique(points[:, 0], return_counts=True)
    assert classes.tolist() == [1, 3] and counts.tolist() == [preprocess.POINTS, 3]
    assert len(np.unique(points, axis=0)) == len(points)  # none twice
    assert (labels[tuple(points[:, 1:].T)] == points[:, 0]).all()
