"""segmentation/preprocess.py reads NIfTI files, DICOM series and pictures, or says what is wrong with them."""

import gzip
import itertools
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff
from PIL import Image
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTDoseStorage,
    SegmentationStorage,
)

from segmentation import preprocess
from segmentation.preprocess import (
    DataError,
    Volume,
    find_new,
    from_grid,
    mask_to_grid,
    moments,
    normalise,
    read_mask,
    read_new,
    read_volume,
    resample,
    resampling_matrix,
    to_grid,
    write_mask,
)

SPACING = (1.0, 1.5, 2.5)
META = {
    "classes": ["background", "a", "b"],
    "values": [0, 1, 2],
    "channels": ["MRI"],
    "resample": False,
    "spacing": list(SPACING),
    "slice_axis": 2,
    "shape": [12, 10, 8],
    "normalisation": [None],
    "picture_unit": None,
}
UNIT = (280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)  # an sform of voxels of 1 x 1 x 1


def block(shape: tuple = (12, 10, 8)) -> tuple[np.ndarray, np.ndarray]:
    """A dark volume with a bright block, 150 voxels of class 1 and 60 of class 2, and its mask."""
    mask = np.zeros(shape, np.uint8)
    mask[2:7, 3:9, 1:6] = 1
    mask[2:4, 3:9, 1:6] = 2
    noise = np.random.default_rng(0).integers(0, 99, shape)
    return (1000 * (mask > 0) + noise).astype(np.int16), mask


def save(path: Path, voxels: np.ndarray, spacing: tuple = SPACING, **header: object) -> Path:
    """A NIfTI file with sform and qform code 1; `header` sets fields afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti = nib.Nifti1Image(voxels, np.diag([*spacing, 1.0]))
    nifti.set_sform(nifti.affine, 1)
    nifti.set_qform(nifti.affine, 1)
    for name, value in header.items():
        nifti.header[name] = value
    content = nifti.to_bytes()
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith("gz") else content)
    return path


def patch(path: Path, offset: int, *numbers: float, kind: str = "f") -> Path:
    """Write numbers into the header of a .nii.gz.

    Offsets of NIfTI-1: 40 dim, 80 pixdim, 252 codes, 256 quaternion, 268 qoffset, 280 sform.
    """
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{len(numbers)}{kind}", content, offset, *numbers)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def read(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Voxels, affine and what was noted."""
    notes: list[tuple[str, str]] = []
    volume = read_volume(path, notes)
    return volume.voxels, volume.affine, "; ".join(" ".join(note) for note in notes)


# --- NIfTI ---

SMALL = tuple(mm / 1000 for mm in SPACING)
LARGE = tuple(mm * 1000 for mm in SPACING)
SHEAR = (280, 1, 0, 2.5 * np.sin(0.3), 0, 0, 1.5, 0, 0, 0, 0, 2.5 * np.cos(0.3), 0)
NO_QFORM = {"qform_code": 0}
NO_SFORM = {"sform_code": 0}
ODD_HEADERS = {  # spacing, header fields, patches -> note, or refusal
    "healthy": (SPACING, {}, [], ""),
    "metres": (SMALL, {"xyzt_units": 1}, [], ""),
    "microns": (LARGE, {"xyzt_units": 3}, [], ""),
    "no unit": (SPACING, {"xyzt_units": 0}, [], ""),
    "a code that nibabel does not know": (SPACING, NO_QFORM, [(254, 9, "h")], ""),
    "sform never filled in": (SPACING, {}, [UNIT], r"the qform is taken sform \[1.0, 1.0, 1.0\], pixdim \[1.0, 1.5"),
    "pixdim never filled in": (SPACING, NO_QFORM, [(80, 1, 1, 1)], r"the sform is taken sform \[1.0, 1.5"),
    "moved": (SPACING, {}, [(268, 7)], "sform and qform differ: the sform is taken by up to 7 vox"),
    "no size, but an sform": (SPACING, {}, [(80, 0, np.nan, 2.5)], "the qform is unus"),
    "broken quaternion": (SPACING, {}, [(256, 1.3)], "the qform is unusable: the other form is t"),
    "sform of one plane": (SPACING, {}, [(280, 0, 0, 0)], "the sform is unusable: the other form"),
    "unit not true": (SPACING, {"xyzt_units": 1}, [], r"! 2e\+04 mm long by its header.*xyzt_unit"),
    "contradiction": (SPACING, {}, [(80, 2, 3, 5)], r"! voxels by sform \[1.0, 1.5, 2.5\], pixdim \[2.0"),
    "unit sform alone": (SPACING, NO_QFORM, [UNIT], r"! voxels by sform \[1.0, 1.0, 1.0\], pixdim \[1"),
    "no quaternion left": (SPACING, NO_SFORM, [(256, 1.3)], "! no usable sform or qform, pixdim"),
    "no size at all": (SPACING, NO_SFORM, [(80, 0)], r"! no usable sform or qform, pixdim \[0.0, .*: set them"),
    "sheared": (SPACING, NO_QFORM, [SHEAR], "! sheared axes, expected right angles"),
    "claims more": (SPACING, {}, [(42, 12, 10, 99, "h")], "! cut or damaged: .* by its header"),

    "two axes": (SPACING, {}, [(40, 2, "h")], r"! shape \(12, 10\) of int16, expected numbers in 3D"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_an_odd_header_is_read_noted_or_refused(tmp_path, name):
    spacing, fields, patches, expected = ODD_HEADERS[name]
    path = save(tmp_path / "a.nii.gz", block()[0], spacing, **fields)
    for offset, *numbers in patches:
        kind = numbers.pop() if isinstance(numbers[-1], str) else "f"
        patch(path, offset, *numbers, kind=kind)
    if expected.startswith("! "):
        with pytest.raises(DataError, match=rf"/a\.nii\.gz: {expected[2:]}"):
            read(path)
        return
    voxels, affine, notes = read(path)
    assert np.array_equal(voxels[..., 0], block()[0])
    assert np.allclose(affine, np.diag([*SPACING, 1]), rtol=1e-6)
    assert re.search(expected, notes) and bool(expected) == bool(notes)


def test_without_any_form_the_axes_are_taken_as_they_come_and_the_note_says_so(tmp_path):
    path = patch(save(tmp_path / "a.nii.gz", block()[0]), 252, 0, 0, kind="h")
    _, affine, notes = read(path)
    assert np.array_equal(affine, nib.load(path).affine) and "no sform and no qform" in notes


def test_a_size_that_is_lacking_is_written_into_the_mask(tmp_path):
    path = patch(save(tmp_path / "a.nii.gz", block()[0]), 80, 0, np.nan, 2.5)
    volume = read_volume(path, [])
    write_mask(tmp_path / "m.nii.gz", block()[1], volume.affine, volume.header)
    assert nib.load(tmp_path / "m.nii.gz").header.get_zooms() == SPACING


def test_nifti_by_content_version_and_suffix(tmp_path):
    image, _ = block()
    nib.save(nib.Nifti2Image(image, np.diag([*SPACING, 1])), tmp_path / "two.nii.gz")
    save(tmp_path / "A.NII.GZ", image)
    save(tmp_path / "packed.nii.gz", image).rename(tmp_path / "packed.nii")
    for name in ("two.nii.gz", "A.NII.GZ", "packed.nii"):
        voxels, affine, _ = read(tmp_path / name)
        assert np.array_equal(voxels[..., 0], image) and voxels.dtype == np.int16
        assert np.array_equal(affine, np.diag([*SPACING, 1]))


def test_channels_are_the_last_axis_also_in_the_way_of_itk(tmp_path):
    pair = np.stack([block()[0], 2 * block()[0]], -1)
    for name, voxels in (("four", pair), ("five", pair[:, :, :, None])):
        assert np.array_equal(read(save(tmp_path / f"{name}.nii.gz", voxels))[0], pair)
    one = save(tmp_path / "one.nii.gz", block()[0][..., None, None])
    assert read(one)[0].shape == (12, 10, 8, 1)


OTHER_FORMATS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "web page": b"\r\n<!DOCTYPE html><html><head><title>Virus scan warning</title>",
    "NRRD": b"NRRD0004\n# Complete NRRD",
    "MetaImage": b"ObjectType = Image\nNDims = 3\n",
    "text": b"not a volume",
    "zero bytes": b"",
    "no NIfTI": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_another_format_is_named_by_its_first_bytes(tmp_path, kind):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(OTHER_FORMATS[kind])
    with pytest.raises(DataError, match=rf"a\.nii\.gz: {kind}.*From other formats"):
        read(path)


def test_pairs_analyze_and_missing_files_are_refused(tmp_path):
    nib.save(nib.AnalyzeImage(block()[0], np.eye(4)), tmp_path / "old.hdr")
    nib.save(nib.Nifti1Pair(block()[0], np.eye(4)), tmp_path / "pair.hdr")
    for name in ("old.hdr", "pair.hdr"):
        with pytest.raises(DataError, match=r"of a pair \.hdr and \.img, or Analyze, expected one"):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.nii: not found"):
        read(tmp_path / "gone.nii")


def test_one_flipped_bit_of_a_packed_file_is_found(tmp_path):
    path = save(tmp_path / "a.nii.gz", block()[0])
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum: the voxels themselves unpack without an error
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.nii\.gz: cut or damaged \(CRC"):
        read(path)


def test_a_small_file_that_claims_gigabytes_takes_no_memory(tmp_path):
    path = save(tmp_path / "a.nii", block()[0])
    content = bytearray(path.read_bytes()[:480])
    struct.pack_into("<4h", content, 40, 3, 2000, 1000, 1000)
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="480 bytes, 4000000352 by its header"):
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.where(np.arange(960).reshape(12, 10, 8) == 5, np.nan, 1.0), "1 voxels are NaN"),
        (np.full((12, 10, 8), 7.0), "no contrast"),
        (np.stack([block()[0], 0 * block()[0]], 3), r"no contrast, all voxels \(of a channel\)"),
    ],
)
def test_an_image_without_content_is_refused(tmp_path, voxels, message):
    with pytest.raises(DataError, match=rf"a\.nii\.gz: {message}"):
        read(save(tmp_path / "a.nii.gz", voxels))


def test_voxels_get_the_smallest_type_that_holds_them():
    table = {
        np.uint8: (0, 255),
        np.int16: (-1, 255),
        np.float32: (0, 32768),
        np.float64: (0, 0.5),
    }
    for dtype, ends in table.items():
        small = preprocess.compact(np.array([*ends, 3.0]))
        assert small.dtype == (np.float32 if dtype is np.float64 else dtype)
        assert np.array_equal(small, [*ends, 3.0])


# --- masks ---

GRID = np.diag([*SPACING, 1.0])
MASKS = {  # values, spacing, header -> None for read, or the refusal
    "floats within a thousandth": (block()[1] + 4e-4, SPACING, {}, None),
    "a unit that was dropped": (block()[1], LARGE, {"xyzt_units": 0}, "affine .* mm apart"),
    "between the integers": (block()[1] * 0.5, SPACING, {}, "0 voxels .* 120 no integers|, 90 no"),
    "NaN": (np.where(block()[1] == 2, np.nan, 1), SPACING, {}, "60 voxels of the mask are NaN, "),
    "above 255": (300 * block()[1].astype(np.int16), SPACING, {}, "values 0 to 600: .* up to 255"),
    "negative": (-block()[1].astype(np.int16), SPACING, {}, "mask values -2 to 0"),
    "another size": (block()[1][:-1], SPACING, {}, r"shape \(11, 10, 8\), expected \(12, 10, 8\)"),
    "another spacing": (block()[1], (1, 1.5, 3), {}, "affine .* as its image .* mm apart"),
    "time points": (
        np.stack([block()[1]] * 3, 3),
        SPACING,
        {},
        "shape .* 3., expected .* a file a time point",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_hold_classes_on_the_grid_of_their_image(tmp_path, name):
    values, spacing, header, message = MASKS[name]
    path = save(tmp_path / "m.nii.gz", values, spacing, **header)
    image = Volume(block()[0][..., None], GRID)
    if message is None:
        mask = read_mask(path, image)
        assert mask.dtype == np.uint8 and np.array_equal(mask, block()[1])
        return
    with pytest.raises(DataError, match=rf"m\.nii\.gz: .*({message})"):
        read_mask(path, image)


def test_a_mask_along_other_axes_is_turned(tmp_path):
    _, mask = block()
    turn = [[1, -1], [0, 1], [2, -1]]
    affine = GRID @ inv_ornt_aff(turn, mask.shape)
    nib.save(nib.Nifti1Image(apply_orientation(mask, turn), affine), tmp_path / "m.nii.gz")
    assert np.array_equal(read_mask(tmp_path / "m.nii.gz", Volume(mask[..., None], GRID)), mask)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_written_mask_lies_on_its_image_and_has_nothing_of_its_texts(tmp_path, kind):
    nifti = kind(block()[0], GRID)
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension(2, b"Doe^Jane"))
    nifti.header["descrip"] = b"Doe^Jane"
    nifti.header["aux_file"] = b"colours.lut"
    nifti.header["cal_max"] = 900
    nifti.header.set_intent(1002, name="Doe^Jane")
    if kind is nib.Nifti1Image:
        nifti.header["db_name"] = b"Doe^Jane"
    nib.save(nifti, tmp_path / "a.nii.gz")
    notes: list = []
    volume = read_volume(tmp_path / "a.nii.gz", notes)
    write_mask(tmp_path / "m.nii", block()[1], volume.affine, volume.header, b"mark")
    written = nib.load(tmp_path / "m.nii")
    content = (tmp_path / "m.nii").read_bytes()
    assert b"Doe" not in content and b"lut" not in content and written.header["cal_max"] == 0
    assert bytes(written.header["descrip"]).startswith(b"mark")
    assert np.array_equal(written.affine, GRID) and isinstance(written, kind)


@pytest.mark.parametrize("unit", [1, 3])
def test_a_written_mask_keeps_the_unit_of_its_image(tmp_path, unit):
    spacing = SMALL if unit == 1 else LARGE
    volume = read_volume(save(tmp_path / "a.nii.gz", block()[0], spacing, xyzt_units=unit), [])
    write_mask(tmp_path / "m.nii.gz", block()[1], volume.affine, volume.header)
    written = nib.load(tmp_path / "m.nii.gz")
    assert np.allclose(np.diag(written.affine)[:3], spacing)
    assert int(written.header["xyzt_units"]) == unit


# --- grids ---


def oblique(spacing: tuple = SPACING) -> np.ndarray:
    """Axes turned about z and x, no two of the same length, an origin somewhere."""
    a, b = np.radians([12, -6])
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = z @ x * spacing
    affine[:3, 3] = (-20, 31, 7)
    return affine


@pytest.mark.parametrize("resampled", [False, True])
def test_all_48_axis_orders_there_and_back(resampled):
    image, mask = block()
    meta = META | ({"resample": True, "spacing": [1.3, 1.1, 1.7]} if resampled else {})
    expected = to_grid(Path(), image[..., None], oblique(), meta)
    labels = mask_to_grid(mask, oblique(), meta)
    chances = np.eye(3, dtype=np.float16)[labels].transpose(3, 0, 1, 2)
    back = from_grid(chances, mask.shape, oblique())
    assert resampled or np.array_equal(back, mask)
    assert 2 * ((back > 0) & (mask > 0)).sum() > 0.75 * ((back > 0).sum() + (mask > 0).sum())
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turn = np.column_stack([order, signs])
            turned = apply_orientation(image, turn)
            affine = oblique() @ inv_ornt_aff(turn, image.shape)
            own = to_grid(Path(), turned[..., None], affine, meta)
            assert np.allclose(own, expected, atol=2e-3) if resampled else (own == expected).all()
            own = mask_to_grid(apply_orientation(mask, turn), affine, meta)
            assert np.array_equal(own, labels)
            own = from_grid(chances, turned.shape, affine)
            assert np.array_equal(own, apply_orientation(back, turn))


def test_the_resampling_matrix_keeps_extent_and_ramps():
    assert np.array_equal(resampling_matrix(5, 5), np.eye(5))
    assert resampling_matrix(4, 2)[0].tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7, 0])
    for old, new in ((7, 13), (13, 7), (30, 11)):
        matrix = resampling_matrix(old, new)
        ramp = matrix @ ((np.arange(old) + 0.5) / old)
        expected = (np.arange(new) + 0.5) / new
        assert ramp[2:-2] == pytest.approx(expected[2:-2], abs=1e-6 if new > old else 0.01)
    fine = np.random.default_rng(0).normal(size=(32, 4, 4)).astype(np.float32)
    assert resample(fine, (8, 4, 4)).std() < 0.7 * fine.std()  # antialiased: noise is averaged


def test_of_equal_shares_the_first_class_wins():
    mask = np.tile(np.array([0, 1, 2, 1], np.uint8)[:, None, None], (1, 2, 2))
    meta = META | {"resample": True, "spacing": [4, 1, 1]}
    coarse = mask_to_grid(mask, np.eye(4), meta)  # of one voxel: half is 1
    assert coarse.tolist() == [[[1, 1], [1, 1]]]
    assert mask_to_grid(mask[:2], np.eye(4), meta | {"spacing": [2, 1, 1]}).tolist() == [
        [[0, 0]] * 2
    ]


def test_rounding_in_the_header_does_not_change_the_number_of_voxels():
    meta = META | {"resample": True, "spacing": [1, 1, 1]}
    assert preprocess.grid_shape((10, 10, 10), np.array([0.9999, 1.0499, 1.048]), meta) == (
        10,
        11,
        10,
    )
    assert preprocess.grid_shape((1, 1, 1), np.array([0.2, 1, 1]), meta) == (1, 1, 1)


def test_air_does_not_count_for_mean_and_deviation():
    image = np.array([0, 0, 0, 0, 0, 2, 4], np.float32).reshape(7, 1, 1)
    assert moments(image) == {"mean": 3, "std": 1}
    assert moments(image[4:]) == pytest.approx({"mean": 2, "std": (8 / 3) ** 0.5})
    drawn = np.random.default_rng(0).normal(500, 3, (9, 8, 7)).astype(np.float32)
    expected = {"mean": drawn.mean(dtype=float), "std": drawn.std(dtype=float)}
    for volume in (drawn, drawn.T[::-1], np.asfortranarray(drawn)):
        assert moments(volume) == pytest.approx(expected)
    constants = {"low": 0, "high": 10, "mean": 5, "std": 5}
    ct = np.array([-100, 5, 100], np.int16).reshape(3, 1, 1)
    assert normalise(ct, constants).ravel().tolist() == [-1, 0, 1]


def test_values_that_float16_cannot_hold_are_refused():
    image = np.zeros((12, 10, 8, 1), np.float32)
    image[2:7, 3:9, 1:5, 0] = 1e6 + np.random.default_rng(0).random((5, 6, 4))
    with pytest.raises(DataError, match=r"a\.nii: normalised values beyond 65504"):
        to_grid(Path("a.nii"), image, GRID, META)


def test_points_are_different_voxels_of_every_class():
    labels = np.zeros((30, 20, 10), np.uint8)
    labels[:20] = 1  # 4,000 voxels
    labels[25, 3:6, 7] = 3  # and none of class 2
    points = preprocess.draw_points(labels, 4)
    classes, counts = np.unique(points[:, 0], return_counts=True)
    assert classes.tolist() == [1, 3] and counts.tolist() == [preprocess.POINTS, 3]
    assert len(np.unique(points, axis=0)) == len(points)
    assert (labels[tuple(points[:, 1:].T)] == points[:, 0]).all()


# --- DICOM series ---


def make_slices(count: int = 12) -> list[pydicom.Dataset]:
    """A CT series: 6 rows of 1.5 mm, 5 columns of 1 mm, a slice every 2.5 mm.

    The first pixel of slice k is 10 k, and the others count on from there.
    """
    slices = []
    for k in range(count):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = f"1.2.{k + 1}"
        ds.SeriesInstanceUID = "1.2"
        ds.Modality = "CT"
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-10, -12, 2.5 * k]
        ds.PixelSpacing = [1.5, 1]
        ds.SliceThickness = 2.5
        ds.RescaleSlope = 2
        ds.RescaleIntercept = -1024
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.PixelRepresentation = 0
        ds.BitsAllocated = 16
        ds.BitsStored = 12
        ds.HighBit = 11
        set_pixels(ds, np.arange(30).reshape(6, 5) + 10 * k)
        slices.append(ds)
    return slices


def set_pixels(ds: pydicom.Dataset, pixels: np.ndarray) -> None:
    ds.Rows, ds.Columns = pixels.shape
    ds.PixelData = pixels.astype(np.uint16).tobytes()
    ds["PixelData"].VR = "OW"


def save_series(folder: Path, slices: list[pydicom.Dataset], name: str = "{:02d}.dcm") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, ds in enumerate(slices):
        ds.save_as(folder / name.format(k), enforce_file_format=True)
    return folder


def shift(number: int, axis: int, mm: float) -> Callable:
    """Move a slice by `mm` along an axis of the patient."""

    def edit(slices: list[pydicom.Dataset]) -> None:
        slices[number].ImagePositionPatient[axis] += mm

    return edit


def tilt(degrees: float) -> Callable:
    """Move each slice along y as a gantry of this tilt does."""

    def edit(slices: list[pydicom.Dataset]) -> None:
        for ds in slices:
            ds.ImagePositionPatient[1] += ds.ImagePositionPatient[2] * np.tan(np.radians(degrees))

    return edit


def put(numbers: list[int], keyword: str, value: object) -> Callable:
    def edit(slices: list[pydicom.Dataset]) -> None:
        for number in numbers:
            setattr(slices[number], keyword, value)

    return edit


def four_positions(slices: list[pydicom.Dataset]) -> None:
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient[2] = 2.5 * (k // 3)
        ds.EchoTime = 10 * (k % 3)


def own_series(slices: list[pydicom.Dataset]) -> None:
    for k, ds in enumerate(slices):
        ds.SeriesInstanceUID = f"1.2.{k}"


ALL = list(range(12))
BOX = "12 slices at 12 positions are no box: "
DEFECTS = {
    "tilted by 18 degrees": (tilt(18), f"{BOX}.*dcm are 2.5 mm apart and 0.8123 mm aside"),
    "tilted by 4 degrees": (tilt(-4), f"{BOX}.*dcm are 2.5 mm apart and 0.1748 mm aside"),
    "first one aside": (shift(0, 1, 3), f"{BOX}00.dcm and 01.dcm are 2.5 mm apart and 3 mm aside"),
    "one slightly aside": (shift(5, 0, -0.4), f"{BOX}0[45].dcm and 0[56].dcm are 2.5 .* 0.4 mm aside"),
    "one along the normal": (shift(6, 2, 1), f"{BOX}0[56].dcm and 0[67].dcm are (1|3).5 mm apart"),
    "doubled": (shift(6, 2, -2.5), "12 slices at 11 positions are no box: .* mostly 2.5 mm apart"),
    "one missing": (lambda s: s.pop(7), "11 slices at 11 .* 06.dcm and 07.dcm are 5 mm apart"),
    "four missing": (lambda s: [s.pop(3) for _ in range(4)], "02.dcm and 03.dcm are 12.5 mm apart"),
    "echoes": (four_positions, "12 slices at 4 positions are no box: .* or echoes"),
    "all in one place": (put(ALL, "ImagePositionPatient", [0, 0, 0]), "12 slices at 1 positions are"),
    "other spacing": (put([4], "PixelSpacing", [1.5, 1.3]), r"\[1.5, 1.0\] in 00.dcm, \[1.5, 1.3\] in 04.dcm, 1 of"),
    "half of other spacing": (put(ALL[6:], "PixelSpacing", [2, 1]), r"PixelSpacing .* \[2.0, 1.0\] in 06.dcm, 6 of 12 differ"),
    "one turned": (put([9], "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), "ImageOrient.* 09.dcm,"),
    "other size": (put([0], "Rows", 3), r"Rows \[3.0\] in 00.dcm"),
    "no position": (put([11], "ImagePositionPatient", None), "no ImagePositionPatient of 3 numbers in 11.dcm"),
    "no spacing": (put(ALL, "PixelSpacing", None), "no PixelSpacing of 2 numbers in 00.dcm"),
    "spacing 0": (put(ALL, "PixelSpacing", [0, 0]), r"no box: .* PixelSpacing \[0. 0.\]"),
    "no directions": (put(ALL, "ImageOrientationPatient", [0] * 6), r"no box: ImageOrientationPatient \[0. 0"),
    "two series": (put([2], "SeriesInstanceUID", "1.9"), "2 DICOM series, .* 02.dcm; "),
    "a UID for each slice": (own_series, "12 DICOM series, .*; a UID for each slice"),
    "mosaics": (put(ALL, "ImagePositionPatient", [-99, -99, 3]), "12 slices at 1 positions .* mosaics, a time"),
    "frames": (put([0], "NumberOfFrames", 4), r"00.dcm is no slice \(CT Image Storage, MONOCHROME2, 4 fr"),
    "dose": (put([0], "SOPClassUID", RTDoseStorage), r"00.dcm is no slice \(RT Dose Storage"),
    "segments": (put([0], "SOPClassUID", SegmentationStorage), r"00.dcm is no slice \(Segmentation"),
    "colour": (put([0], "PhotometricInterpretation", "RGB"), r"00.dcm is no slice \(CT Image Storage, RGB"),
    "inverted": (put([7], "PhotometricInterpretation", "MONOCHROME1"), "07.dcm is no slice .*, MONOCHROME1"),
    "localizer": (put(ALL, "ImageType", ["DERIVED", "X", "LOCALIZER"]), r"a localizer \(scout\)"),
    "slope 0": (put([5], "RescaleSlope", 0), "05.dcm: RescaleSlope 0.* gives no values"),
    "no pixels": (lambda s: s[11].__delattr__("PixelData"), "1 of 12 files are cut, .* 11.dcm"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_series_that_is_no_box_of_slices_is_refused_and_the_file_named(tmp_path, name):
    edit, message = DEFECTS[name]
    slices = make_slices()
    edit(slices)
    with pytest.raises(DataError, match=f"/ct.*{message}"):
        read(save_series(tmp_path / "ct", slices))


def test_a_healthy_series_is_read_whatever_its_files_are_called(tmp_path):
    volume, affine, notes = read(save_series(tmp_path / "ct", make_slices()[::-1]))
    assert volume.shape == (5, 6, 12, 1) and notes == ""
    assert volume[0, 0, :, 0].tolist() == [20 * k - 1024 for k in range(12)]
    assert volume[1, 0, 0, 0] == 2 - 1024 and volume[0, 1, 0, 0] == 2 * 5 - 1024
    expected = [[-1, 0, 0, 10], [0, -1.5, 0, 12], [0, 0, 2.5, 0], [0, 0, 0, 1]]
    assert np.allclose(affine, expected)
    assert read_volume(tmp_path / "ct", []).modality == "CT"
    with pytest.raises(DataError, match=r"03\.dcm: one DICOM slice, expected the folder"):
        read(tmp_path / "ct" / "03.dcm")


def test_sagittal_slices_are_put_in_order_along_their_normal(tmp_path):
    slices = make_slices()
    for ds in slices:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        ds.ImagePositionPatient = [-ds.ImagePositionPatient[2], -10, 12]
    volume, affine, _ = read(save_series(tmp_path / "mr", slices[::-1]))
    assert volume[0, 0, :, 0].tolist() == [20 * k - 1024 for k in range(12)]
    assert np.allclose(affine[:3], [[0, 0, 2.5, 0], [-1, 0, 0, 10], [0, -1.5, 0, 12]])


def test_positions_rounded_in_the_header_are_equal_distances(tmp_path):
    slices = make_slices(4)
    for ds, z in zip(slices, (0, 0.6, 1.2, 1.9), strict=True):
        ds.ImagePositionPatient[2] = z
    _, affine, _ = read(save_series(tmp_path / "ct", slices))
    assert affine[2, 2] == pytest.approx(0.63)  # the line through the four
    assert affine[2, 3] == pytest.approx(-0.02)


@pytest.mark.parametrize("name", ["{:02d}.dcm", "1.2.840.{}", "IM{:04d}"])
@pytest.mark.parametrize("length", [0, 50, 100, 140, 280, 300, 350, 500, -1])
def test_a_file_that_is_cut_anywhere_is_named_however_it_is_called(tmp_path, name, length):
    folder = save_series(tmp_path / "ct", make_slices(), name)
    for number in (0, 11):
        path = folder / name.format(number)
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"ct.*{path.name}"):
            read(folder)
        path.write_bytes(whole[200:])
        with pytest.raises(
            DataError, match=rf"1 of 12 files are cut, empty or damaged: {path.name}"
        ):
            read(folder)
        path.write_bytes(whole)


def test_files_that_are_no_images_are_left_out_with_a_note(tmp_path):
    folder = save_series(tmp_path / "ct", make_slices(), "1.2.840.{}")
    (folder / "LICENSE").write_text("CC BY 3.0, as download tools leave it")
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    report = make_slices(1)[0]
    del report.PixelData, report.Rows, report.Columns
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.SeriesInstanceUID = "1.7"
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    volume, _, notes = read(folder)
    assert volume.shape[2] == 12 and "no images are left out" in notes
    assert "2, such as LICENSE" in notes


def test_empty_rescale_is_one_and_zero(tmp_path):
    slices = make_slices()
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        put(ALL, keyword, None)(slices)
    volume, _, _ = read(save_series(tmp_path / "ct", slices))
    assert volume[0, 0, :, 0].tolist() == [10 * k for k in range(12)]


@pytest.mark.parametrize(("value", "signed"), [(3000, 0), (-2000, 1), (63536, 1)])
def test_padding_gets_the_lowest_value_of_the_others(tmp_path, value, signed):
    slices = make_slices()
    for ds in slices:
        ds.PixelRepresentation = signed
        ds.BitsStored = 16
        ds.HighBit = 15
        pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(6, 5).astype(np.int64)
        set_pixels(ds, np.where(np.eye(6, 5), value % 2**16, pixels + 7))
        ds.add_new("PixelPaddingValue", "US" if value >= 0 else "SS", value)
    volume, _, notes = read(save_series(tmp_path / "ct", slices))
    assert volume[0, 0, :, 0].tolist() == [2 * 8 - 1024] * 12  # stored 8: beside the first corner
    assert "60 voxels" in notes and volume.max() == 2 * (7 + 110 + 29) - 1024


def test_two_acquisitions_in_one_volume_are_noted(tmp_path):
    slices = make_slices()
    put(ALL[::2], "AcquisitionNumber", 1)(slices)
    put(ALL[1::2], "AcquisitionNumber", 2)(slices)
    _, _, notes = read(save_series(tmp_path / "ct", slices))
    assert "several acquisitions, by AcquisitionNumber 6 of 1, 6 of 2" in notes


def make_enhanced(slices: list[pydicom.Dataset]) -> pydicom.Dataset:
    """The slices as frames of an enhanced file: position and rescale per frame, all else shared."""
    enhanced = make_slices(1)[0]
    enhanced.SOPClassUID = EnhancedCTImageStorage
    enhanced.NumberOfFrames = len(slices)
    enhanced.PixelData = b"".join(ds.PixelData for ds in slices)
    enhanced["PixelData"].VR = "OW"
    macros = {
        "PlaneOrientationSequence": ["ImageOrientationPatient"],
        "PixelMeasuresSequence": ["PixelSpacing"],
        "PlanePositionSequence": ["ImagePositionPatient"],
        "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"],
    }
    shared = pydicom.Dataset()
    groups = [pydicom.Dataset() for _ in slices]
    for macro, keywords in macros.items():
        is_shared = macro in ("PlaneOrientationSequence", "PixelMeasuresSequence")
        for ds, group in zip(slices, [shared] if is_shared else groups, strict=False):
            item = pydicom.Dataset()
            for keyword in keywords:
                setattr(item, keyword, ds.get(keyword))
            setattr(group, macro, [item])
        for keyword in keywords:
            delattr(enhanced, keyword)
    enhanced.SharedFunctionalGroupsSequence = [shared]
    enhanced.PerFrameFunctionalGroupsSequence = groups
    return enhanced


def test_an_enhanced_file_is_the_volume_of_its_frames(tmp_path):
    """Also one of Siemens XA30 that still says MOSAIC, and with private sequences (Philips)."""
    slices = make_slices()
    for k, ds in enumerate(slices):
        ds.RescaleSlope = 1 + k
    expected, affine, _ = read(save_series(tmp_path / "ct", slices))
    order = np.random.default_rng(0).permutation(12)
    enhanced = make_enhanced([slices[k] for k in order])
    enhanced.ImageType = ["ORIGINAL", "PRIMARY", "MOSAIC"]
    for group in enhanced.PerFrameFunctionalGroupsSequence:
        item = pydicom.Dataset()
        item.ImagePositionPatient = [0, 0, 0]
        item.PixelSpacing = [9, 9]
        item.RescaleSlope = 5
        group.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(
            0xF, "SQ", [item]
        )
    folder = save_series(tmp_path / "enhanced", [enhanced])
    for path in (folder, folder / "00.dcm"):
        volume, own, _ = read(path)
        assert np.array_equal(volume, expected) and np.allclose(own, affine)


def test_frames_are_checked_as_slices_are(tmp_path):
    for name, edit in {
        "0.8123 mm aside": tilt(18),
        "frame 6 .*are 2.5 .* 3 mm aside": shift(5, 0, 3),
    }.items():
        slices = make_slices()
        edit(slices)
        with pytest.raises(DataError, match=name):
            read(save_series(tmp_path / name[:3], [make_enhanced(slices)]))


def test_masks_of_a_series_have_both_forms_and_millimetres(tmp_path):
    volume = read_volume(save_series(tmp_path / "ct", make_slices()), [])
    write_mask(
        tmp_path / "mask.nii.gz", np.zeros((5, 6, 12), np.uint8), volume.affine, volume.header
    )
    written = nib.load(tmp_path / "mask.nii.gz")
    assert np.allclose(written.get_qform(), volume.affine) and written.header["qform_code"] == 1
    assert np.allclose(written.get_sform(), volume.affine) and written.header["sform_code"] == 1
    assert written.header.get_xyzt_units()[0] == "mm"


# --- pictures ---


def draw(colour: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A dark picture of 24 rows and 32 columns with a bright block, and its mask."""
    mask = np.zeros((24, 32), np.uint8)
    mask[5:13, 12:24] = 1
    noise = np.random.default_rng(0).integers(0, 60, mask.shape)
    picture = (150 * mask + noise).astype(np.uint8)
    return np.stack([picture, 255 - picture, picture // 2], 2) if colour else picture, mask


def save_picture(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_a_picture_is_a_volume_of_one_slice_with_three_channels(tmp_path):
    colour, _ = draw(colour=True)
    gray, _ = draw()
    volume, affine, _ = read(save_picture(tmp_path / "c.png", colour, dpi=(254, 254)))
    assert volume.shape == (32, 24, 1, 3) and np.array_equal(volume[:, :, 0].swapaxes(0, 1), colour)
    assert np.array_equal(affine, np.diag([1, -1, 1, 1]))  # pixels, whatever the file says
    volume, _, _ = read(save_picture(tmp_path / "g.tif", gray))
    assert np.array_equal(volume[:, :, 0].swapaxes(0, 1), np.stack([gray] * 3, 2))
    deep, _, _ = read(save_picture(tmp_path / "d.png", gray.astype(np.uint16) * 200))
    assert np.array_equal(deep[:, :, 0, 0].T, gray.astype(np.int64) * 200)
    one = preprocess.read_channels([tmp_path / "g.tif"], 1, [])
    assert np.array_equal(one.voxels[:, :, 0, 0].T, gray)
    with pytest.raises(DataError, match=r"c\.png: several channels in a channel file"):
        preprocess.read_channels([tmp_path / "g.tif", tmp_path / "c.png"], 2, [])


def test_orientation_tags_turn_picture_and_mask(tmp_path):
    """Tag 6: the first row of the file is the right side of what is shown."""
    picture, mask = draw(colour=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "tif"):
        path = save_picture(tmp_path / f"a.{suffix}", np.rot90(picture).copy(), exif=exif)
        assert np.array_equal(read(path)[0][:, :, 0].swapaxes(0, 1), picture)
    image = Volume(*read(path)[:2])
    turned = save_picture(tmp_path / "mask.png", np.rot90(mask).copy(), exif=exif)
    assert np.array_equal(read_mask(turned, image)[..., 0].T, mask)
    plain = save_picture(tmp_path / "plain.png", np.rot90(mask).copy())
    with pytest.raises(DataError, match=r"plain\.png: shape \(24, 32, 1\), expected \(32, 24, 1\)"):
        read_mask(plain, image)


def test_masks_of_pictures_are_gray_values_or_numbers_of_a_palette(tmp_path):
    image = Volume(np.zeros((32, 24, 1, 3)), preprocess.PICTURE_TO_RAS)
    _, mask = draw()
    palette = Image.fromarray(mask)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png")
    opaque = np.stack([mask, mask, mask, np.full_like(mask, 255)], 2)
    paths = [
        tmp_path / "palette.png",
        save_picture(tmp_path / "gray.png", mask),
        save_picture(tmp_path / "rgb.png", np.stack([mask] * 3, 2)),
        save_picture(tmp_path / "opaque.png", opaque),
        save_picture(tmp_path / "bit.png", mask.astype(bool)),
        save_picture(tmp_path / "deep.tif", mask.astype(np.uint16)),
    ]
    for path in paths:
        assert np.array_equal(read_mask(path, image)[..., 0].T, mask), path.name


def test_pictures_that_would_be_read_wrongly_are_refused(tmp_path):
    image = Volume(np.zeros((32, 24, 1, 3)), preprocess.PICTURE_TO_RAS)
    picture, mask = draw()
    drawn = np.stack([0 * mask] * 3 + [255 * mask], 2)  # in the transparency alone
    save_picture(tmp_path / "alpha.png", drawn)
    save_picture(tmp_path / "colours.png", np.stack([255 * mask, 0 * mask, 0 * mask], 2))
    save_picture(tmp_path / "blurred.jpg", 255 * mask)
    save_picture(tmp_path / "deep.png", 300 * mask.astype(np.uint16))
    pages = [Image.fromarray(picture), Image.fromarray(picture)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    messages = {
        "alpha.png": "transparent pixels, expected none",
        "colours.png": r"PNG of shape \(32, 24, 3\), expected class numbers",
        "blurred.jpg": r"JPEG of shape \(32, 24, 1\), expected .* no JPEG",
        "deep.png": "mask values 0 to 300: give the classes numbers up to 255",
        "pages.tif": "2 pages, expected a single picture",
    }
    for name, message in messages.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_mask(tmp_path / name, image)


# --- new images ---


def names_of(paths: list[Path], **meta: object) -> list[str]:
    return [image.name for image in find_new(paths, META | meta)]


def test_linked_folders_are_followed_but_for_links_upwards(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), GRID), tmp_path / "scan.nii")
    for name in ("a", "b", "store"):
        (tmp_path / "top" / name).mkdir(parents=True)
    (tmp_path / "scan.nii").rename(tmp_path / "top" / "store" / "scan.nii")
    for link, target in (("a/store", "store"), ("a/b", "b"), ("b/a", "a"), ("a/top", ".")):
        (tmp_path / "top" / link).symlink_to(tmp_path / "top" / target)
    images = find_new([tmp_path / "top"], META)
    assert [image.name for image in images] == ["a_store_scan", "b_a_store_scan", "store_scan"]


def test_an_export_is_read_series_by_series(tmp_path, capsys):
    """PATIENT/STUDY/SERIES, two series in a folder, one in two, a scout, a cut file, DICOMDIR."""

    def write(folder: str, number: int, edit: Callable = len, count: int = 12) -> list[Path]:
        slices = make_slices(count)
        edit(slices)
        for ds in slices:
            ds.SeriesInstanceUID = f"1.2.{number}"
            ds.SeriesNumber = number
        save_series(export / folder, slices, f"IM{number:02d}{{:02d}}")
        return sorted((export / folder).glob(f"IM{number:02d}*"))

    export = tmp_path / "export"
    write("p1/ct/axial", 1)
    write("p1/ct/scout", 2, put([0], "ImageType", ["X", "X", "LOCALIZER"]), 1)
    write("p2/ct/all", 3)
    write("p2/ct/all", 4)
    cut = write("p3/ct/axial", 5)[6]
    cut.write_bytes(cut.read_bytes()[:300])
    parts = write("p4/part1", 6)
    (export / "p4" / "part2").mkdir()
    for path in parts[6:]:
        path.rename(export / "p4" / "part2" / path.name)
    for part in ("part1", "part2"):
        (export / "p4" / part / "license.txt").write_text("CC BY")
    write("p5", 7, lambda slices: None)
    save(export / "p6" / "scan.nii.gz", block()[0])
    (export / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (export / "readme.txt").write_text("exported on Monday")
    images = {image.name: image for image in find_new([export], META)}
    names = ["p1_ct_axial", "p2_ct_all_3", "p2_ct_all_4", "p3_ct_axial", "p4", "p5", "p6_scan"]
    assert list(images) == names
    for name in ("p1_ct_axial", "p2_ct_all_3", "p4", "p5"):
        on_grid, affine, header, shape, notes = read_new(images[name], META)
        assert on_grid.shape == (1, 5, 6, 12) and shape == (5, 6, 12) and header is None
        left_out = (
            [("files that are no images are left out", "2, such as license.txt")]
            if name == "p4"
            else []
        )
        assert notes == left_out and np.allclose(affine[2], [0, 0, 2.5, 0])
    with pytest.raises(DataError, match=r"1 of 12 files are cut, .* IM0506"):
        read_new(images["p3_ct_axial"], META)
    printed = capsys.readouterr().out
    assert "left out, no images as in training: 1, such as" in printed
    assert re.search(r"left out, single DICOM slices .*: 1, such as .*/scout/IM0200", printed)


@pytest.mark.parametrize("name", ["ct/{:02d}.dcm", "{0}/slice{0}.dcm"])
def test_a_uid_for_each_slice_is_no_volume_each(tmp_path, capsys, name):
    slices = make_slices()
    own_series(slices)
    for k, ds in enumerate(slices):
        path = tmp_path / "export" / name.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
    with pytest.raises(DataError, match="export: no image in it as in training"):
        find_new([tmp_path / "export"], META)
    printed = capsys.readouterr().out
    assert re.search(r"left out, single DICOM slices .* a UID for each .*\): 12, such as", printed)


def test_a_cut_file_of_a_series_in_two_folders_is_missed_by_it_alone(tmp_path):
    slices = make_slices()
    save_series(tmp_path / "a" / "1", slices[:6])
    save_series(tmp_path / "a" / "2", slices[6:])
    cut = tmp_path / "a" / "2" / "03.dcm"
    cut.write_bytes(cut.read_bytes()[:200])
    lone = save_series(tmp_path / "b", slices[:1]) / "00.dcm"
    lone.write_bytes(lone.read_bytes()[:200])
    images = find_new([tmp_path], META)
    assert [image.name for image in images] == ["a", "b"]
    for image, message in zip(
        images, ("1 of 12 files are cut", "1 of 1 files are cut"), strict=True
    ):
        with pytest.raises(DataError, match=message):
            read_new(image, META)


def test_enhanced_files_in_one_folder_are_an_image_each(tmp_path):
    for k in range(4):
        enhanced = make_enhanced(make_slices())
        enhanced.SeriesInstanceUID = f"1.3.{k}"
        enhanced.SeriesNumber = 7  # of all of them: then the UID tells them apart
        save_series(tmp_path / "mr", [enhanced], f"{k}{{}}")
    images = find_new([tmp_path / "mr"], META)
    assert [image.name for image in images] == [f"mr_1.3.{k}" for k in range(4)]
    assert read_new(images[3], META)[3] == (5, 6, 12)


def test_masks_are_never_images(tmp_path, capsys):
    """By their values, or our mark; beside images, and beside DICOM files."""
    image, mask = block()
    save_series(tmp_path / "case1", make_slices())
    save(tmp_path / "case1" / "segmentation.nii.gz", mask)
    save(tmp_path / "case2" / "imaging.nii.gz", image)
    save(tmp_path / "case2" / "segments" / "liver.nii.gz", 255 * (mask > 0).astype(np.float32))
    write_mask(tmp_path / "case2" / "pred.nii.gz", mask, GRID, None, preprocess.PREDICTION)
    save(tmp_path / "old" / "a.nii.gz", image)
    (tmp_path / "old" / "volumes.csv").write_text("image,mask,ml_a\n")
    assert names_of([tmp_path]) == ["case1", "case2_imaging"]
    printed = capsys.readouterr().out
    assert "left out, masks: 3, such as" in printed and "left out, results: 2, such as" in printed
    with pytest.raises(DataError, match="no image in it as in training"):
        names_of([tmp_path / "case1" / "segmentation.nii.gz"])


def test_two_images_of_one_name_are_refused(tmp_path):
    for name in ("p1/a.nii", "p1/A.nii.gz", "p2/ct.nii.gz", "p3/ct.nii.gz"):
        save(tmp_path / name, block()[0])
    with pytest.raises(DataError, match=r"p1/A\.nii\.gz and .*p1/a\.nii would both be called a"):
        names_of([tmp_path / "p1"])
    with pytest.raises(DataError, match="give the folder above them"):
        names_of([tmp_path / "p2", tmp_path / "p3"])


def test_the_working_folder_has_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(save_series(tmp_path / "p1" / "ct", make_slices()))
    assert names_of([Path(".")]) == ["ct"]


def test_channel_files_are_one_image_in_the_order_of_their_numbers(tmp_path):
    image, _ = block()
    meta = META | {"channels": ["T1", "T2"], "normalisation": [None, None]}
    for number, voxels in (("0000", image), ("0001", -image)):
        save(tmp_path / f"c0_{number}.nii.gz", voxels)
    save(tmp_path / "c1_0001.nii.gz", image)
    save(tmp_path / "scan_2024.nii.gz", np.stack([image, image], 3))
    images = {one.name: one for one in find_new([tmp_path], meta)}
    assert sorted(images) == ["c0", "c1", "scan_2024"]
    first, second = read_new(images["c0"], meta)[0]
    assert np.allclose(first, -second, atol=0.01) and first.max() > 0
    assert len(read_new(images["scan_2024"], meta)[0]) == 2
    with pytest.raises(DataError, match=r"c1_0001\.nii\.gz: 1 channels, expected \['T1', 'T2'\]"):
        read_new(images["c1"], meta)
    for number in (1, 2):  # two channels, but not the first two
        save(tmp_path / "more" / f"c2_000{number}.nii.gz", image)
    with pytest.raises(DataError, match=r"c2_0001\.nii\.gz: channel files \[1, 2\], expected 0, 1"):
        read_new(find_new([tmp_path / "more"], meta)[0], meta)
    save(tmp_path / "more" / "c2_0000.nii.gz", image)
    with pytest.raises(DataError, match=r"c2_0000\.nii\.gz: 3 channels, expected"):
        read_new(find_new([tmp_path / "more"], meta)[0], meta)
    assert len(find_new([tmp_path], META)) == 7  # to a network of one channel
    bright, dark = (tmp_path / f"c0_000{number}.nii.gz" for number in range(2))
    for paths in ([bright, dark], [dark, bright], [dark, tmp_path, bright]):
        image = next(image for image in find_new(paths, meta) if image.name == "c0")
        assert np.array_equal(read_new(image, meta)[0], np.stack([first, second]))


def test_new_pictures_below_folders_are_called_by_their_path(tmp_path, capsys):
    picture, mask = draw(colour=True)
    for name in ("a/1.png", "b/left/1.png", "2.TIF", "e_0000.png"):
        save_picture(tmp_path / name, picture)
    save_picture(tmp_path / "a" / "2_mask.png", mask)
    meta = {"picture_unit": "px", "channels": ["red", "green", "blue"], "normalisation": [None] * 3}
    names = names_of([tmp_path], **meta)
    assert sorted(names) == ["2", "a_1", "b_left_1", "e_0000"]
    assert "left out, masks: 1, such as" in capsys.readouterr().out
    (image,) = find_new([tmp_path / "a" / "1.png"], META | meta)
    assert read_new(image, META | meta)[0].shape == (3, 32, 24, 1)
    with pytest.raises(DataError, match="a picture, expected a volume"):
        read_new(image, META | {"channels": ["a"] * 3, "normalisation": [None] * 3})


def test_a_gray_file_a_channel_is_read_as_in_training(tmp_path):
    picture, _ = draw()
    for number in range(2):
        save_picture(tmp_path / f"eye_000{number}.png", picture + np.uint8(number))
    meta = META | {
        "picture_unit": "px",
        "channels": ["green", "filtered"],
        "normalisation": [None] * 2,
    }
    (image,) = find_new([tmp_path], meta)
    assert read_new(image, meta)[0].shape == (2, 32, 24, 1) and image.name == "eye"
