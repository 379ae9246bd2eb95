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
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from nibabel.orientations import apply_orientation, inv_ornt_aff
from PIL import Image
from pydicom import uid

from segmentation import preprocess
from segmentation.preprocess import Volume, mask_to_grid, read_mask, read_volume, write_mask
from tests.caches import refusal
from tests.raw import dataset

SPACING = (1.0, 1.5, 2.5)
GRID = np.diag([*SPACING, 1.0])
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


# A dark volume with a bright block, 90 voxels of class 1 and 60 of class 2, and its mask
MASK = np.zeros((12, 10, 8), np.uint8)
MASK[2:7, 3:9, 1:6] = 1
MASK[2:4, 3:9, 1:6] = 2
NOISE = np.random.default_rng(0).integers(0, 99, MASK.shape)
IMAGE = (1000 * (MASK > 0) + NOISE).astype(np.int16)


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


def outcome(function: Callable, *arguments: object) -> str:
    """The notes of a reader, or "! " and the message of its refusal."""
    notes: list[tuple[str, str]] = []
    try:
        function(*arguments, notes)
    except preprocess.DataError as error:
        return f"! {error}"
    return "; ".join(" ".join(note) for note in notes)


# --- NIfTI ---


def odd(*patches: tuple, voxels: np.ndarray = IMAGE, spacing: tuple = SPACING, **more) -> Callable:
    """Write a file with `patches`, offset and numbers in the header (a letter: not float32).

    `length`: of the unpacked file; `flip`: bits of the checksum; others are fields of the header.
    Offsets of NIfTI-1: 40 dim, 80 pixdim, 112 slope, 252 codes, 256 quaternion, 268 qoffset, 280 sform.
    """
    length = more.pop("length", None)
    flip = more.pop("flip", 0)

    def write(path: Path) -> None:
        data = bytearray(gzip.decompress(save(path, voxels, spacing, **more).read_bytes()))
        for offset, *numbers in patches:
            kind = numbers.pop() if isinstance(numbers[-1], str) else "f"
            struct.pack_into(f"<{len(numbers)}{kind}", data, offset, *numbers)
        packed = bytearray(gzip.compress(data[:length]))
        packed[-6] ^= flip  # the voxels themselves unpack without an error
        path.write_bytes(packed)

    return write


SMALL = tuple(mm / 1000 for mm in SPACING)
LARGE = tuple(mm * 1000 for mm in SPACING)
UNIT = (280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)  # an sform of voxels of 1 x 1 x 1
SHEAR = (280, 1, 0, 2.5 * np.sin(0.3), 0, 0, 1.5, 0, 0, 0, 0, 2.5 * np.cos(0.3), 0)
NO_QFORM = {"qform_code": 0}
NO_SFORM = {"sform_code": 0}
NIFTI_FILES = {  # how it is written -> note, or "! " and refusal
    "metres": (odd(spacing=SMALL, xyzt_units=1), "^$"),
    "microns": (odd(spacing=LARGE, xyzt_units=3), "^$"),
    "millimetres": (odd(xyzt_units=2), "^$"),
    "slope and intercept": (odd((112, 0.5, -100), voxels=2 * IMAGE + np.int16(200)), "^$"),
    "no form": (odd((252, 0, 0, "h")), "no sform and no qform: axes point left, front and top"),
    "a code that nibabel does not know": (odd((254, 9, "h"), **NO_QFORM), "^$"),
    "sform never filled in": (odd(UNIT), r"the qform is taken sform \[1.0, 1.0, 1.0\], pixdim \[1.0, 1.5"),
    "pixdim never filled in": (odd((80, 1, 1, 1), **NO_QFORM), r"the sform is taken sform \[1.0, 1.5"),
    "moved": (odd((268, 7)), "sform and qform differ: the sform is taken by up to 7 voxels"),
    "broken quaternion": (odd((256, 1.3)), "the qform is unusable: the other form is taken"),
    "sform of one plane": (odd((280, 0, 0, 0)), "the sform is unusable: the other form is taken"),
    "unit not true": (odd(xyzt_units=1), r"! .*: 2e\+04 mm long by its header.*xyzt_unit"),
    "contradiction": (odd((80, 2, 3, 5)), r"! .*voxels by sform \[1.0, 1.5, 2.5\], pixdim \[2.0"),
    "unit sform alone": (odd(UNIT, **NO_QFORM), r"! .*voxels by sform \[1.0, 1.0, 1.0\], pixdim \[1"),
    "no quaternion left": (odd((256, 1.3), **NO_SFORM), "! .*no usable sform or qform"),
    "no size": (odd((80, 0, np.nan, 2.5)), r"! .*pixdim \[0.0, nan, 2.5\], expected the sizes"),
    "sheared": (odd(SHEAR, **NO_QFORM), "! .*sheared axes, expected right angles"),
    "claims gigabytes": (odd((40, 3, 2000, 1000, 1000, "h"), length=480), "! .*cut or damaged: 480 bytes, 4000000352 by its header"),
    "two axes": (odd((40, 2, "h")), r"! .*shape \(12, 10\) of int16, expected numbers in 3D"),
    "one flipped bit": (odd(flip=1), "! .*BadGzipFile: CRC"),
    "NaN": (odd(voxels=np.where(MASK == 2, np.nan, IMAGE)), "! .*60 voxels are NaN"),
    "constant": (odd(voxels=np.full((12, 10, 8), 7.0)), "! .*no contrast"),
    "a constant channel": (odd(voxels=np.stack([IMAGE, 0 * IMAGE], 3)), r"! .*no contrast.*\(of a"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "! .*Git LFS pointer .*formats"),
    "a page": (b"\r\n<!DOCTYPE html><html><head>", "! .*web page .*From other formats"),
    "NRRD": (b"NRRD0004\n# Complete NRRD", "! .*: NRRD, expected one .nii .*formats"),
    "MetaImage": (b"ObjectType = Image\nNDims = 3\n", "! .*: MetaImage, .*formats"),
    "text": (b"not a volume", "! .*: text, expected"),
    "empty": (b"", "! .*: zero bytes, expected"),
    "noise": (bytes(range(256)) * 4, r"! .*: no NIfTI, or of a pair \.hdr and \.img, or Ana"),
    "nothing": (lambda path: None, r"! .*a\.nii\.gz: not found"),
}  # fmt: skip


@pytest.mark.parametrize("name", NIFTI_FILES)
def test_an_odd_nifti_file_is_read_noted_or_refused(tmp_path, name):
    write, expected = NIFTI_FILES[name]
    path = tmp_path / "a.nii.gz"
    path.write_bytes(write) if isinstance(write, bytes) else write(path)
    tracemalloc.start()
    found = outcome(read_volume, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search(expected, found), found
    assert peak < 10**6
    if not found.startswith("!"):
        volume = read_volume(path, [])
        affine = nib.load(path).affine if "no sform and no qform" in found else GRID
        assert np.array_equal(volume.voxels[..., 0], IMAGE)
        assert np.allclose(volume.affine, affine, rtol=1e-6)


def test_nifti_by_content_version_and_suffix_and_channels_of_itk(tmp_path):
    pair = np.stack([IMAGE, 2 * IMAGE], -1)
    nib.save(nib.Nifti2Image(IMAGE, GRID), tmp_path / "two.nii.gz")
    save(tmp_path / "packed.nii.gz", IMAGE).rename(tmp_path / "packed.nii")
    files = {
        tmp_path / "two.nii.gz": IMAGE[..., None],
        tmp_path / "packed.nii": IMAGE[..., None],
        save(tmp_path / "A.NII.GZ", IMAGE): IMAGE[..., None],
        save(tmp_path / "one.nii.gz", IMAGE[..., None, None]): IMAGE[..., None],
        save(tmp_path / "four.nii.gz", pair): pair,
        save(tmp_path / "five.nii.gz", pair[:, :, :, None]): pair,
    }
    for path, expected in files.items():
        volume = read_volume(path, [])
        assert np.array_equal(volume.voxels, expected) and volume.voxels.dtype == np.int16
        assert np.array_equal(volume.affine, GRID)
    odd((112, 0.25, 0))(tmp_path / "slope.nii.gz")  # fractions are kept
    assert np.array_equal(read_volume(tmp_path / "slope.nii.gz", []).voxels[..., 0], IMAGE / 4)


# --- masks ---

MASKS = {  # values, spacing, header -> None for read, or the refusal
    "floats within a thousandth": (MASK + 4e-4, SPACING, {}, None),
    "between the integers": (MASK * 0.5, SPACING, {}, "0 voxels .* 90 no integers"),
    "NaN": (np.where(MASK == 2, np.nan, 1), SPACING, {}, "60 voxels of the mask are NaN, 0 no"),
    "above 255": (300 * MASK.astype(np.int16), SPACING, {}, "values 0 to 600: .* up to 255"),
    "negative": (-MASK.astype(np.int16), SPACING, {}, "mask values -2 to 0"),
    "another size": (MASK[:-1], SPACING, {}, r"shape \(11, 10, 8\), expected \(12, 10, 8\)"),
    "another spacing": (MASK, (1, 1.5, 2.53), {}, "affine .* as its image .* mm apart"),
    "time points": (np.stack([MASK] * 3, 3), SPACING, {}, r"3\), expected .* a file a time point"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_hold_classes_on_the_grid_of_their_image(tmp_path, name):
    values, spacing, header, message = MASKS[name]
    path = save(tmp_path / "m.nii.gz", values, spacing, **header)
    image = Volume(IMAGE[..., None], GRID)
    if message is None:
        mask = read_mask(path, image)
        assert mask.dtype == np.uint8 and np.array_equal(mask, MASK)
    else:
        assert re.search(rf"m\.nii\.gz: .*({message})", refusal(read_mask, path, image))


def oblique(spacing: tuple = SPACING) -> np.ndarray:
    """Axes turned about z and x, no two of the same length, an origin somewhere."""
    turn = euler2mat(z=np.radians(12), x=np.radians(-6))
    return from_matvec(turn * spacing, (-20, 31, 7))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("unit", "spacing"), [(2, SPACING), (1, SMALL), (3, LARGE)])
def test_a_written_mask_lies_on_its_image_without_its_texts(tmp_path, kind, unit, spacing):
    nifti = kind(IMAGE, oblique(spacing))
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension(2, b"Doe^Jane"))
    nifti.header.set_intent(1002, name="Doe^Jane")
    texts = {"descrip": b"Doe^Jane", "aux_file": b"colours.lut", "cal_max": 900, "xyzt_units": unit}
    for name, value in texts.items():
        nifti.header[name] = value
    if kind is nib.Nifti1Image:
        nifti.header["db_name"] = b"Doe^Jane"
    nib.save(nifti, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz", [])
    write_mask(tmp_path / "m.nii", MASK, volume.affine, volume.header, b"mark")
    written = nib.load(tmp_path / "m.nii")
    data = (tmp_path / "m.nii").read_bytes()
    assert b"Doe" not in data and b"lut" not in data and written.header["cal_max"] == 0
    assert bytes(written.header["descrip"]).startswith(b"mark")
    assert np.allclose(written.affine, nifti.affine, rtol=1e-4) and isinstance(written, kind)
    assert int(written.header["xyzt_units"]) == unit and np.array_equal(written.dataobj, MASK)


# --- grids ---


@pytest.mark.parametrize("resampled", [False, True])
def test_all_48_axis_orders_there_and_back(resampled):
    meta = META | ({"resample": True, "spacing": [1.3, 1.1, 1.7]} if resampled else {})
    expected = preprocess.to_grid(Path(), IMAGE[..., None], oblique(), meta)
    labels = mask_to_grid(MASK, oblique(), meta)
    chances = np.eye(3, dtype=np.float16)[labels].transpose(3, 0, 1, 2)
    back = preprocess.from_grid(chances, MASK.shape, oblique())
    assert resampled or np.array_equal(back, MASK)
    assert 2 * ((back > 0) & (MASK > 0)).sum() > 0.75 * ((back > 0).sum() + (MASK > 0).sum())
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turn = np.column_stack([order, signs])
            turned = apply_orientation(IMAGE, turn)
            affine = oblique() @ inv_ornt_aff(turn, IMAGE.shape)
            own = preprocess.to_grid(Path(), turned[..., None], affine, meta)
            assert np.allclose(own, expected, atol=2e-3) if resampled else (own == expected).all()
            own = mask_to_grid(apply_orientation(MASK, turn), affine, meta)
            assert np.array_equal(own, labels)
            own = preprocess.from_grid(chances, turned.shape, affine)
            assert np.array_equal(own, apply_orientation(back, turn))


def test_a_mask_of_several_slabs_is_whole():
    labels = (np.arange(40 * 3 * 2) % 3).reshape(40, 3, 2)
    chances = np.eye(3, dtype=np.float16)[labels].transpose(3, 0, 1, 2)
    assert np.array_equal(preprocess.from_grid(chances, labels.shape, np.eye(4)), labels)


def test_the_resampling_matrix_keeps_extent_and_ramps():
    assert np.array_equal(preprocess.resampling_matrix(5, 5), np.eye(5))
    assert preprocess.resampling_matrix(4, 2)[0].tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7, 0])
    for old, new in ((7, 13), (13, 7), (30, 11)):
        matrix = preprocess.resampling_matrix(old, new)
        ramp = matrix @ ((np.arange(old) + 0.5) / old)
        expected = (np.arange(new) + 0.5) / new
        assert ramp[2:-2] == pytest.approx(expected[2:-2], abs=1e-6 if new > old else 0.01)
    fine = np.random.default_rng(0).normal(size=(32, 4, 4)).astype(np.float32)
    assert (
        preprocess.resample(fine, (8, 4, 4)).std() < 0.7 * fine.std()
    )  # antialiased: noise is averaged


def test_the_class_of_the_largest_share_wins_and_of_equal_ones_the_first():
    mask = np.tile(np.array([0, 1, 2, 1], np.uint8)[:, None, None], (1, 2, 2))
    for length, spacing, expected in ((4, 4, 1), (2, 2, 0)):
        meta = META | {"resample": True, "spacing": [spacing, 1, 1]}
        assert mask_to_grid(mask[:length], np.eye(4), meta).tolist() == [[[expected] * 2] * 2]


def test_rounding_in_the_header_does_not_change_the_number_of_voxels():
    meta = META | {"resample": True, "spacing": [1, 1, 1]}
    shape = preprocess.grid_shape((10, 10, 10), np.array([0.9999, 1.0499, 1.048]), meta)
    assert shape == (10, 11, 10)
    assert preprocess.grid_shape((1, 1, 1), np.array([0.2, 1, 1]), meta) == (1, 1, 1)


def test_air_does_not_count_for_mean_and_deviation():
    image = np.array([0, 0, 0, 0, 0, 2, 4], np.float32).reshape(7, 1, 1)
    assert preprocess.moments(image) == {"mean": 3, "std": 1}
    assert preprocess.moments(image[4:]) == pytest.approx({"mean": 2, "std": (8 / 3) ** 0.5})
    drawn = np.random.default_rng(0).normal(500, 3, (9, 8, 7)).astype(np.float32)
    expected = {"mean": drawn.mean(dtype=float), "std": drawn.std(dtype=float)}
    for volume in (drawn, drawn.T[::-1], np.asfortranarray(drawn)):
        assert preprocess.moments(volume) == pytest.approx(expected)
    constants = {"low": 0, "high": 10, "mean": 5, "std": 5}
    ct = np.array([-100, 5, 100], np.int16).reshape(3, 1, 1)
    assert preprocess.normalise(ct, constants).ravel().tolist() == [-1, 0, 1]


def test_values_that_float16_cannot_hold_are_refused():
    image = np.zeros((12, 10, 8, 1), np.float32)
    image[2:7, 3:9, 1:5, 0] = 1e6 + np.random.default_rng(0).random((5, 6, 4))
    found = refusal(preprocess.to_grid, Path("a.nii"), image, GRID, META)
    assert found.startswith("a.nii: normalised values beyond 65504")


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


def make_slices(count: int = 12, **attributes: object) -> list[pydicom.Dataset]:
    """A CT series: 6 rows of 1.5 mm, 5 columns of 1 mm, a slice every 2.5 mm.

    The first pixel of slice k is 10 k, and the others count on from there.
    """
    shared = {
        "SOPClassUID": uid.CTImageStorage,
        "SeriesInstanceUID": "1.2",
        "Modality": "CT",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1.5, 1],
        "RescaleSlope": 2,
        "RescaleIntercept": -1024,
    }
    slices = []
    for k in range(count):
        own = {"SOPInstanceUID": f"1.2.{k + 1}", "ImagePositionPatient": [-10, -12, 2.5 * k]}
        pixels = np.arange(30).reshape(6, 5) + 10 * k
        slices.append(dataset(pixels, **own, **shared | attributes))
    return slices


def set_pixels(ds: pydicom.Dataset, pixels: np.ndarray) -> None:
    ds.Rows, ds.Columns = pixels.shape
    ds.PixelData = pixels.astype(np.uint16).tobytes()
    ds["PixelData"].VR = "OW"


def save_series(folder: Path, slices: list[pydicom.Dataset], name: str = "{:02d}.dcm") -> Path:
    for k, ds in enumerate(slices):
        path = folder / name.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
    return folder


def make_item(ds: pydicom.Dataset, *keywords: str) -> pydicom.Dataset:
    item = pydicom.Dataset()
    for keyword in keywords:
        setattr(item, keyword, ds.get(keyword))
    return item


def make_enhanced(slices: list[pydicom.Dataset]) -> pydicom.Dataset:
    """The slices as frames of an enhanced file: position and rescale per frame, all else shared."""
    rescale = ("RescaleSlope", "RescaleIntercept")
    moved = dict.fromkeys(["ImageOrientationPatient", "PixelSpacing", *rescale])  # None here
    enhanced = make_slices(1, NumberOfFrames=len(slices), **moved)[0]
    enhanced.SOPClassUID = uid.EnhancedCTImageStorage
    enhanced.PixelData = b"".join(ds.PixelData for ds in slices)
    enhanced["PixelData"].VR = "OW"
    shared = pydicom.Dataset()
    shared.PlaneOrientationSequence = [make_item(slices[0], "ImageOrientationPatient")]
    shared.PixelMeasuresSequence = [make_item(slices[0], "PixelSpacing")]
    enhanced.SharedFunctionalGroupsSequence = [shared]
    enhanced.PerFrameFunctionalGroupsSequence = []
    for ds in slices:
        group = pydicom.Dataset()
        group.PlanePositionSequence = [make_item(ds, "ImagePositionPatient")]
        group.PixelValueTransformationSequence = [make_item(ds, *rescale)]
        enhanced.PerFrameFunctionalGroupsSequence.append(group)
    return enhanced


def put(keyword: str, value: object, *numbers: int) -> Callable:
    """Set an attribute of these slices, or of all; `value` may be a function of slice and number."""

    def edit(slices: list[pydicom.Dataset]) -> None:
        for number in numbers or range(len(slices)):
            own = value(slices[number], number) if callable(value) else value
            setattr(slices[number], keyword, own)

    return edit


POSITION = "ImagePositionPatient"


def frame_aside(slices: list[pydicom.Dataset]) -> None:
    put(POSITION, [-7, -12, 12.5], 5)(slices)
    slices[:] = [make_enhanced(slices)]


# A gantry that is tilted by 18 degrees: 2.5 mm * tan 18 = 0.8123 mm
TILTED = put(POSITION, lambda ds, k: [-10, -12 + 0.8123 * k, 2.5 * k])
BOX = "12 slices at 12 positions are no box: "
SERIES = {  # what is odd -> note, or "! " and refusal
    "two acquisitions": (put("AcquisitionNumber", lambda ds, k: 1 + k % 2), "several acquisitions, by AcquisitionNumber 6 of 1, 6 of 2"),
    "tilted by 18 degrees": (TILTED, f"! .*{BOX}.*dcm are 2.5 mm apart and 0.8123 mm aside"),
    "one slightly aside": (put(POSITION, [-10.12, -12, 12.5], 5), f"! .*{BOX}"),
    "one hardly aside": (put(POSITION, [-10.08, -12, 12.5], 5), "^$"),
    "one along the normal": (put(POSITION, [-10, -12, 16], 6), f"! .*{BOX}0[56].dcm and 0[67].dcm are (1|3).5 mm apart"),
    "doubled": (put(POSITION, [-10, -12, 12.5], 6), "! .*12 slices at 11 positions are no box: .* mostly 2.5 mm apart"),
    "one missing": (lambda s: s.pop(7), "! .*11 slices at 11 .* 06.dcm and 07.dcm are 5 mm apart"),
    "mosaics": (put(POSITION, [0, 0, 0]), "! .*12 slices at 1 positions .* mosaics, a time"),
    "other spacing": (put("PixelSpacing", [1.5, 1.3], 4), r"! .*\[1.5, 1.0\] in 00.dcm, \[1.5, 1.3\] in 04.dcm, 1 of"),
    "one turned": (put("ImageOrientationPatient", [0, 1, 0, 0, 0, -1], 9), "! .*ImageOrient.* 09.dcm,"),
    "other size": (put("Rows", 3, 0), r"! .*Rows \[3.0\] in 00.dcm"),
    "no position": (put(POSITION, None, 11), "! .*no ImagePositionPatient of 3 numbers in 11.dcm"),
    "no spacing": (put("PixelSpacing", None), "! .*no PixelSpacing of 2 numbers in 00.dcm"),
    "spacing 0": (put("PixelSpacing", [0, 0]), r"! .*no box: .* PixelSpacing \[0. 0.\]"),
    "no directions": (put("ImageOrientationPatient", [0] * 6), r"! .*no box: ImageOrientationPatient \[0. 0"),
    "two series": (put("SeriesInstanceUID", "1.9", 2), "! .*2 DICOM series, .* 02.dcm; leave one in the folder"),
    "shifted bits": (lambda s: [put("BitsStored", 12)(s), put("HighBit", 15, 3)(s)], "! .*03.dcm: HighBit 15, expected 11"),
    "a UID for each slice": (put("SeriesInstanceUID", lambda ds, k: f"1.2.{k}"), "! .*12 DICOM series, .*; a UID for each slice"),
    "frames": (put("NumberOfFrames", 4, 0), r"! .*00.dcm is no slice \(CT Image Storage, MONOCHROME2, 4 fr"),
    "dose": (put("SOPClassUID", uid.RTDoseStorage, 0), r"! .*00.dcm is no slice \(RT Dose Storage"),
    "colour": (put("PhotometricInterpretation", "RGB", 0), r"! .*00.dcm is no slice \(CT Image Storage, RGB"),
    "inverted": (put("PhotometricInterpretation", "MONOCHROME1", 7), "! .*07.dcm is no slice .*, MONOCHROME1"),
    "localizer": (put("ImageType", ["DERIVED", "X", "LOCALIZER"]), r"! .*a localizer \(scout\)"),
    "slope 0": (put("RescaleSlope", 0, 5), "! .*05.dcm: RescaleSlope 0.* gives no values"),
    "no pixels": (lambda s: s[11].__delattr__("PixelData"), "! .*11 of 12 files are DICOM images, 1 are cut, .* 11.dcm"),
    "one slice": (lambda s: s.__delitem__(slice(1, None)), "! .*one DICOM slice, expected the folder"),
    "a frame aside": (frame_aside, "! .*frame 6 .*are 2.5 .* 3 mm aside"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERIES)
def test_a_series_is_a_box_of_slices_or_refused_and_the_file_named(tmp_path, name):
    edit, expected = SERIES[name]
    slices = make_slices()
    edit(slices)
    found = outcome(read_volume, save_series(tmp_path / "ct", slices))
    assert re.search(expected, found), found


def test_segments_and_files_of_windows_beside_slices_are_left_out(tmp_path):
    slices = make_slices()
    folder = save_series(tmp_path / "ct", slices)
    expected = read_volume(folder, []).voxels
    slices[0].SOPClassUID = uid.SegmentationStorage
    slices[0].SeriesInstanceUID = "1.9"
    slices[0].NumberOfFrames = 3
    slices[0].save_as(folder / "seg.dcm")
    for k, head in enumerate((b"\xd0\xcf\x11\xe0", b"PK\3\4", b"MZ", b"BM", b"\xff\xfe")):
        (folder / f"{k}.x").write_bytes(head + bytes(range(256)))
    notes = []
    assert np.array_equal(read_volume(folder, notes).voxels, expected)
    assert [detail for _, detail in notes] == ["6, such as 0.x"]
    assert len(preprocess.find_new([folder], META)) == 1


def test_slices_without_a_meta_header_are_read(tmp_path):
    slices = make_slices()
    expected = read_volume(save_series(tmp_path / "ct", slices), []).voxels
    for implicit in (True, False):
        folder = tmp_path / f"old{implicit}"
        folder.mkdir()
        for k, ds in enumerate(slices):
            ds.__dict__.pop("file_meta", None)
            ds.save_as(folder / f"{k:02d}", implicit_vr=implicit, little_endian=True)
        assert np.array_equal(read_volume(folder, []).voxels, expected)


def four_rounded(slices: list[pydicom.Dataset]) -> None:
    del slices[4:]
    put(POSITION, lambda ds, k: [-10, -12, (0, 0.6, 1.2, 1.9)[k]])(slices)


def sagittal(slices: list[pydicom.Dataset]) -> None:
    put("ImageOrientationPatient", [0, 1, 0, 0, 0, -1])(slices)
    put(POSITION, lambda ds, k: [-2.5 * k, -10, 12])(slices)


AXIAL = [[-1, 0, 0, 10], [0, -1.5, 0, 12]]
HEALTHY = {  # edit -> affine, stored value 0 and its step
    "sagittal": (sagittal, [[0, 0, 2.5, 0], [-1, 0, 0, 10], [0, -1.5, 0, 12]], (-1024, 2)),
    "rounded": (four_rounded, [*AXIAL, [0, 0, 0.63, -0.02]], (-1024, 2)),  # a line through four
    "empty slope": (put("RescaleSlope", None), [*AXIAL, [0, 0, 2.5, 0]], (-1024, 1)),
    "empty intercept": (put("RescaleIntercept", None), [*AXIAL, [0, 0, 2.5, 0]], (0, 2)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_slices_are_put_in_order_along_their_normal_and_scaled(tmp_path, name):
    edit, affine, (zero, step) = HEALTHY[name]
    slices = make_slices()
    edit(slices)
    volume = read_volume(save_series(tmp_path / "ct", slices[::-1]), [])
    count = len(slices)
    assert volume.voxels.shape == (5, 6, count, 1) and volume.modality == "CT"
    assert volume.voxels[0, 0, :, 0].tolist() == [zero + step * 10 * k for k in range(count)]
    corner = [[zero, zero + 5 * step], [zero + step, zero + 6 * step]]
    assert volume.voxels[:2, :2, 0, 0].tolist() == corner
    affine = np.vstack([affine, [0, 0, 0, 1]])
    assert np.allclose(volume.affine, affine)
    # Its masks have both forms, in millimetres.
    write_mask(tmp_path / "m.nii.gz", np.uint8(volume.voxels[..., 0] > 0), volume.affine, None)
    header = nib.load(tmp_path / "m.nii.gz").header
    forms = [header.get_qform(coded=True), header.get_sform(coded=True)]
    assert all(np.allclose(form, affine, atol=1e-5) and code == 1 for form, code in forms)
    assert header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("name", ["{:02d}.dcm", "1.2.840.{}", "IM{:04d}"])
@pytest.mark.parametrize("length", [0, 50, 100, 140, 280, 300, 350, 500, -1])
def test_a_file_that_is_cut_anywhere_is_named_however_it_is_called(tmp_path, name, length):
    folder = save_series(tmp_path / "ct", make_slices(), name)
    for number in (0, 11):
        path = folder / name.format(number)
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        assert re.search(rf"! .*ct.*{path.name}", outcome(read_volume, folder))
        path.write_bytes(whole[200:])
        assert f"1 are cut, empty or damaged: {path.name}" in outcome(read_volume, folder)
        path.write_bytes(whole)


@pytest.mark.parametrize(("value", "signed"), [(3000, 0), (-2000, 1), (63536, 1)])
def test_padding_gets_the_lowest_value_of_the_others(tmp_path, value, signed):
    slices = make_slices(PixelRepresentation=signed, BitsStored=16, HighBit=15)
    for ds in slices:
        set_pixels(ds, np.where(np.eye(6, 5), np.uint16(value % 2**16), ds.pixel_array + 7))
        ds.add_new("PixelPaddingValue", "US" if value >= 0 else "SS", value)
    folder = save_series(tmp_path / "ct", slices)
    voxels = read_volume(folder, []).voxels
    assert voxels[0, 0, :, 0].tolist() == [2 * 8 - 1024] * 12  # stored 8: beside the first corner
    assert "60 voxels" in outcome(read_volume, folder) and voxels.max() == 2 * (7 + 110 + 29) - 1024


def test_an_enhanced_file_is_the_volume_of_its_frames(tmp_path):
    slices = make_slices()
    put("RescaleSlope", lambda ds, k: 1 + k)(slices)
    expected = read_volume(save_series(tmp_path / "ct", slices), [])
    enhanced = make_enhanced(slices[6:] + slices[:6])
    enhanced.ImageType = ["ORIGINAL", "PRIMARY", "MOSAIC"]  # as Siemens XA30 still says
    shared = enhanced.SharedFunctionalGroupsSequence[0]
    shared.PixelValueTransformationSequence = [pydicom.Dataset()]
    shared.PixelValueTransformationSequence[0].RescaleSlope = 7  # the frames have their own
    for group in enhanced.PerFrameFunctionalGroupsSequence:
        item = pydicom.Dataset()
        item.ImagePositionPatient = [0, 0, 0]
        item.PixelSpacing = [9, 9]
        item.RescaleSlope = 5
        private = group.private_block(0x2005, "Philips MR Imaging DD 005", create=True)
        private.add_new(0xF, "SQ", [item])
    folder = save_series(tmp_path / "enhanced", [enhanced])
    for path in (folder, folder / "00.dcm"):
        volume = read_volume(path, [])
        assert np.array_equal(volume.voxels, expected.voxels)
        assert np.allclose(volume.affine, expected.affine)
    enhanced.RescaleSlope = 2  # outside of the groups, as some scanners write it
    enhanced.RescaleIntercept = -1024
    for group in (shared, *enhanced.PerFrameFunctionalGroupsSequence):
        del group.PixelValueTransformationSequence
    plain = read_volume(save_series(tmp_path / "plain", make_slices()), [])
    outside = read_volume(save_series(tmp_path / "outside", [enhanced]), [])
    assert np.array_equal(outside.voxels, plain.voxels)


# --- pictures ---


# A dark picture of 24 rows and 32 columns with a bright block: gray, in colour, and its mask
DRAWN = np.zeros((24, 32), np.uint8)
DRAWN[5:13, 12:24] = 1
GRAY = 150 * DRAWN + np.random.default_rng(0).integers(0, 60, DRAWN.shape, np.uint8)
COLOUR = np.stack([GRAY, 255 - GRAY, GRAY // 2], 2)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # the first row of the file is the right side of what is shown
TURNED = {"exif": EXIF}


def save_picture(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


PICTURES = {  # file -> pixels, options, rows x columns x channels as they are read
    "c.png": (COLOUR, {"dpi": (254, 254)}, COLOUR),  # pixels, whatever the file says
    "g.tif": (GRAY, {}, np.stack([GRAY] * 3, 2)),
    "d.png": (GRAY.astype(np.uint16) * 200, {}, np.stack([GRAY * 200.0] * 3, 2)),
    "t.png": (np.rot90(COLOUR).copy(), TURNED, COLOUR),
    "t.tif": (np.rot90(COLOUR).copy(), TURNED, COLOUR),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_volume_of_one_slice_with_three_channels(tmp_path, name):
    pixels, options, expected = PICTURES[name]
    volume = read_volume(save_picture(tmp_path / name, pixels, **options), [])
    assert np.array_equal(volume.voxels[:, :, 0].swapaxes(0, 1), expected)
    assert np.array_equal(volume.affine, np.diag([1, -1, 1, 1]))
    channels = 1 if name in ("g.tif", "d.png") else 3  # where one is wanted
    assert preprocess.read_channels([tmp_path / name], 1, []).voxels.shape[3] == channels
    two = preprocess.read_channels([tmp_path / name] * 2, 2, [])  # a file a channel
    assert two.voxels.shape[3] == 2 * channels


OPAQUE = np.full_like(DRAWN, 255)
PALETTE = Image.fromarray(DRAWN)
PALETTE.putpalette([0, 0, 0, 0, 200, 0])
WHITE_FIRST = Image.fromarray(1 - DRAWN)
WHITE_FIRST.putpalette([255, 255, 255, 0, 0, 0])
PICTURE_MASKS = {  # file -> pixels, options, refusal if any
    "palette.png": (PALETTE, {}, None),
    "white.png": (WHITE_FIRST, {}, "black is number 1 of its palette: save it as gray"),
    "rgb.png": (np.stack([DRAWN] * 3, 2), {}, None),
    "opaque.png": (np.stack([DRAWN, DRAWN, DRAWN, OPAQUE], 2), {}, None),
    "bit.png": (DRAWN.astype(bool), {}, None),
    "deep.tif": (DRAWN.astype(np.uint16), {}, None),
    "turned.png": (np.rot90(DRAWN).copy(), TURNED, None),
    "plain.png": (np.rot90(DRAWN).copy(), {}, r"shape \(24, 32, 1\), expected \(32, 24, 1\)"),
    "alpha.png": (np.stack([0 * DRAWN] * 3 + [255 * DRAWN], 2), {}, "transparent pixels, expected no"),
    "colours.png": (np.stack([255 * DRAWN, 0 * DRAWN, 0 * DRAWN], 2), {}, r"PNG of shape \(32, 24, 3\), expected class"),
    "blurred.jpg": (255 * DRAWN, {}, r"JPEG of shape \(32, 24, 1\), expected .* no JPEG"),
    "deep.png": (300 * DRAWN.astype(np.uint16), {}, "mask values 0 to 300: give the classes numb"),
    "pages.tif": (GRAY, {"save_all": True, "append_images": [Image.fromarray(GRAY)]}, "2 pages, expected a single"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURE_MASKS)
def test_masks_of_pictures_are_gray_values_or_refused(tmp_path, name):
    pixels, options, message = PICTURE_MASKS[name]
    path = save_picture(tmp_path / name, pixels, **options)
    image = Volume(np.zeros((32, 24, 1, 3)), preprocess.PICTURE_TO_RAS)
    if message is None:
        assert np.array_equal(read_mask(path, image)[..., 0].T, DRAWN)
    else:
        assert re.search(f"{name}: {message}", refusal(read_mask, path, image))
