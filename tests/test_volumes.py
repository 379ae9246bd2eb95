"""What segmentation/ reads, refuses and never overwrites: NIfTI, DICOM series, names, patients."""

import csv
import gzip
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTDoseStorage,
    SegmentationStorage,
)

from segmentation import eval as evaluation
from segmentation import preprocess
from segmentation.dataset import read_index
from segmentation.preprocess import DataError, main, read_mask, read_volume, write_mask

SPACING = (1.0, 1.5, 2.5)
META = {
    "classes": ["background", "a"],
    "values": [0, 1],
    "channels": ["MRI"],
    "resample": True,
    "spacing": list(SPACING),
    "slice_axis": 2,
    "shape": [12, 10, 8],
    "normalisation": [None],
}


def block() -> tuple[np.ndarray, np.ndarray]:
    """A dark volume with a bright block of 5 x 6 x 4 = 120 voxels (450 mm3), and its mask."""
    mask = np.zeros((12, 10, 8), np.uint8)
    mask[2:7, 3:9, 1:5] = 1
    noise = np.random.default_rng(0).integers(0, 20, mask.shape)
    return (1000 * mask.astype(np.int16) + noise).astype(np.int16), mask


def save(path: Path, voxels: np.ndarray, spacing: tuple = SPACING, **header: object) -> Path:
    """A NIfTI file with sform and qform code 1; `header` sets fields afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti = nib.Nifti1Image(voxels, np.diag([*spacing, 1.0]))
    nifti.set_sform(nifti.affine, 1)
    nifti.set_qform(nifti.affine, 1)
    for name, value in header.items():
        nifti.header[name] = value
    plain = path.with_name("plain.nii.gz")
    nib.save(nifti, plain)
    plain.rename(path)
    return path


def patch(path: Path, offset: int, *numbers: float, kind: str = "f") -> Path:
    """Write numbers into the header of a .nii.gz.

    Offsets of NIfTI-1: 80 pixdim, 252 codes, 256 quaternion, 268 qoffset, 280 sform.
    """
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{len(numbers)}{kind}", content, offset, *numbers)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def read_noting(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Volume, affine and what was noted."""
    notes: list[tuple[str, str]] = []
    volume, affine, _ = read_volume(path, notes)
    return volume, affine, " ".join(f"{what} {detail}" for what, detail in notes)


# --- NIfTI headers ---


@pytest.mark.parametrize(("unit", "factor"), [(1, 0.001), (3, 1000)])
def test_metres_and_microns_are_read_as_millimetres(tmp_path, unit, factor):
    image, mask = block()
    path = save(tmp_path / "a.nii.gz", image, tuple(s * factor for s in SPACING), xyzt_units=unit)
    _, affine, header = read_volume(path)
    assert np.allclose(affine, np.diag([*SPACING, 1]), rtol=1e-6)
    write_mask(tmp_path / "mask.nii.gz", mask, affine, header)  # it lies on its image in any viewer
    written = nib.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(written.affine, nib.load(path).affine)
    assert int(written.header["xyzt_units"]) == unit
    unitless = save(tmp_path / "other.nii.gz", mask, tuple(s * factor for s in SPACING))
    assert np.array_equal(read_mask(unitless, mask.shape, affine), mask)


@pytest.mark.parametrize("unit", [1, 3])
def test_a_unit_that_cannot_be_true_is_refused(tmp_path, unit):
    with pytest.raises(DataError, match=r"a\.nii\.gz: .* mm long by its header.*xyzt_units"):
        read_volume(save(tmp_path / "a.nii.gz", block()[0], xyzt_units=unit))


def test_a_form_of_unit_voxels_gives_way_to_the_other_one(tmp_path):
    unit_sform = patch(
        save(tmp_path / "a.nii.gz", block()[0]), 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0
    )
    _, affine, notes = read_noting(unit_sform)
    assert np.allclose(affine, np.diag([*SPACING, 1]))
    assert "the qform is taken sform 1 x 1 x 1, pixdim 1 x 1.5 x 2.5" in notes
    unit_pixdim = patch(save(tmp_path / "b.nii.gz", block()[0], qform_code=0), 80, 1, 1, 1)
    _, affine, notes = read_noting(unit_pixdim)
    assert np.allclose(affine, np.diag([*SPACING, 1])) and "the sform is taken" in notes


def test_forms_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.nii\.gz: .*sform 1 x 1\.5 x 2\.5, pixdim 2 x 3 x 5"):
        read_volume(patch(save(tmp_path / "a.nii.gz", block()[0]), 80, 2, 3, 5))
    lone = save(tmp_path / "b.nii.gz", block()[0], qform_code=0)
    with pytest.raises(DataError, match=r"sform 1 x 1 x 1, pixdim 1 x 1\.5 x 2\.5"):
        read_volume(patch(lone, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0))


def test_what_is_odd_in_a_header_is_noted(tmp_path):
    image, _ = block()
    moved = patch(save(tmp_path / "a.nii.gz", image), 268, 7.0)  # qoffset_x
    assert "sform and qform differ: the sform is taken by up to 7 voxels" in read_noting(moved)[2]
    neither = patch(save(tmp_path / "b.nii.gz", image), 252, 0, 0, kind="h")
    assert "no sform and no qform" in read_noting(neither)[2]
    sheared = save(tmp_path / "c.nii.gz", image, qform_code=0)
    sheared = patch(
        sheared, 280, 1, 0, 2.5 * np.sin(0.3), 0, 0, 1.5, 0, 0, 0, 0, 2.5 * np.cos(0.3), 0
    )
    assert (
        "sheared axes: the voxels are taken for boxes 72.8 instead of 90 degrees"
        in read_noting(sheared)[2]
    )
    assert read_noting(save(tmp_path / "d.nii.gz", image))[2] == ""


def test_a_broken_quaternion_counts_only_without_an_sform(tmp_path):
    path = patch(save(tmp_path / "a.nii.gz", block()[0]), 256, 1.3)
    assert "the sform is taken" in read_noting(path)[2]
    path = patch(save(tmp_path / "b.nii.gz", block()[0], sform_code=0), 256, 1.3)
    with pytest.raises(DataError, match=r"b\.nii\.gz: qform with a broken quaternion"):
        read_volume(path)


def test_a_size_that_is_lacking_is_taken_from_the_sform_and_written_into_the_mask(tmp_path):
    image, mask = block()
    path = patch(save(tmp_path / "a.nii.gz", image), 80, 0, float("nan"), 2.5)
    _, affine, header = read_volume(path)
    write_mask(tmp_path / "mask.nii.gz", mask, affine, header)
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", mask.shape, affine), mask)
    assert nib.load(tmp_path / "mask.nii.gz").header.get_zooms() == SPACING
    with pytest.raises(DataError, match="expected the size of a voxel"):
        read_volume(patch(save(tmp_path / "b.nii.gz", image, sform_code=0), 80, 0))


def test_suffixes_in_any_case_and_nifti_2_and_pairs_are_read(tmp_path):
    image, _ = block()
    for name in ("a.NII.GZ", "Mixed.Nii.gz"):
        assert np.array_equal(read_volume(save(tmp_path / name, image))[0][..., 0], image)
    nib.save(nib.Nifti2Image(image, np.diag([*SPACING, 1])), tmp_path / "two.nii.gz")
    nib.save(nib.Nifti1Pair(image, np.diag([*SPACING, 1])), tmp_path / "pair.hdr")
    for name in ("two.nii.gz", "pair.hdr", "pair.img"):
        volume, affine, header = read_volume(tmp_path / name)
        assert np.array_equal(volume[..., 0], image)
        write_mask(tmp_path / "mask.nii.gz", block()[1], affine, header)
        written = nib.load(tmp_path / "mask.nii.gz")
        assert np.array_equal(written.affine, np.diag([*SPACING, 1]))
        assert isinstance(written, nib.Nifti2Image) == (name == "two.nii.gz")


def test_other_formats_are_named_with_the_file_and_what_to_do(tmp_path):
    image, _ = block()
    nib.save(nib.AnalyzeImage(image, np.diag([*SPACING, 1])), tmp_path / "old.hdr")
    save(tmp_path / "Cifti.Nii.gz", image, intent_code=3006)
    (tmp_path / "text.nii").write_text("not a volume")
    messages = {"old.hdr": "Analyze 7.5", "Cifti.Nii.gz": "CIFTI", "text.nii": "no NIfTI header",
                "gone.nii.gz": "not found"}  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_volume(tmp_path / name)


def test_one_flipped_bit_of_a_packed_file_is_found(tmp_path):
    path = save(tmp_path / "a.nii.gz", block()[0])
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum: the voxels themselves unpack without an error
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.nii\.gz: cut or damaged \(CRC"):
        read_volume(path)


def test_packed_files_of_every_kind_are_read(tmp_path, monkeypatch):
    """At once if sound, of one stream and as long as the header says; the others by GzipFile."""
    path = save(tmp_path / "a.nii.gz", block()[0])
    expected, *_ = read_volume(path)
    content = gzip.decompress(path.read_bytes())
    streams = gzip.compress(content[:999]) + gzip.compress(content[999:])  # as bgzip writes
    kinds = {
        "two streams": streams,
        "padded": gzip.compress(content) + bytes(512),
        "longer than its header says": gzip.compress(content + bytes(10**6)),
    }
    for name, packed in kinds.items():
        path.write_bytes(packed)
        assert np.array_equal(read_volume(path)[0], expected), name
        assert preprocess.decompress(packed, len(content)) is None, name
    path.write_bytes(gzip.compress(content))
    monkeypatch.setattr(gzip.GzipFile, "readinto", lambda *_: pytest.fail("by small pieces"))
    assert np.array_equal(read_volume(path)[0], expected)


def test_a_file_cannot_unpack_to_more_than_its_header_says():
    packed = gzip.compress(bytes(10**8))
    tracemalloc.start()
    assert preprocess.decompress(packed, 1000) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


def test_a_mask_has_nothing_of_what_its_image_says_of_values(tmp_path):
    image, mask = block()
    fields = {
        "intent_code": 1002,
        "intent_name": b"labels",
        "aux_file": b"colours.lut",
        "cal_max": 900,
    }
    _, affine, header = read_volume(save(tmp_path / "a.nii.gz", image, **fields))
    write_mask(tmp_path / "mask.nii.gz", mask, affine, header)
    written = nib.load(tmp_path / "mask.nii.gz").header
    assert not any(written[name].tolist() for name in fields)


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
        pixels = np.arange(30, dtype=np.uint16).reshape(6, 5) + 10 * k
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.PixelRepresentation = 0
        ds.BitsAllocated = 16
        ds.BitsStored = 12
        ds.HighBit = 11
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW"
        slices.append(ds)
    return slices


def save_series(folder: Path, slices: list[pydicom.Dataset]) -> Path:
    """Files 00.dcm, 01.dcm, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, ds in enumerate(slices):
        ds.save_as(folder / f"{k:02d}.dcm", enforce_file_format=True)
    return folder


def change(folder: Path, edit: Callable[[list[pydicom.Dataset]], object], count: int = 12) -> Path:
    """A series with one defect."""
    slices = make_slices(count)
    edit(slices)
    return save_series(folder, slices)


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


def set_value(numbers: list[int], keyword: str, value: object) -> Callable:
    def edit(slices: list[pydicom.Dataset]) -> None:
        for number in numbers:
            setattr(slices[number], keyword, value)

    return edit


ALL = list(range(12))
DEFECTS = [
    (tilt(18), r"drift by 8\.935 mm .*tilt of 18\.0 degrees.*dcm2niix"),  # 11 x 2.5 mm x tan 18
    (tilt(-4), r"drift by 1\.923 mm .*tilt of 4\.0 degrees"),
    (shift(0, 1, 3), r"00\.dcm lies 3 mm aside"),
    (shift(5, 0, -0.4), r"05\.dcm lies 0\.4 mm aside"),
    (shift(11, 0, 20), r"11\.dcm lies 20 mm aside"),
    (shift(6, 2, 1), r"distances from 1\.5 to 3\.5 mm: 05\.dcm and 06\.dcm are 3\.5 mm apart"),
    (shift(6, 2, -2.5), r"1 of 11 positions .* 05\.dcm and 06\.dcm lie in one place, 12\.5"),
    (lambda s: s.pop(7), r"missing slices: 1; 06\.dcm and 07\.dcm are 5 mm apart, .* 2\.5 mm"),
    (lambda s: [s.pop(3) for _ in range(4)], r"missing slices: 4; 02\.dcm and 03\.dcm are 12\.5"),
    (set_value([4], "PixelSpacing", [1.5, 1.3]), r"\[1\.5, 1\.3\] in 04\.dcm, \[1\.5, 1\.0\]"),
    (set_value(ALL[6:], "PixelSpacing", [2, 1]), r"PixelSpacing \[2\.0, 1\.0\] in 06\.dcm and 5"),
    (set_value([9], "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), r"ImageOrient.* 09\.dcm,"),
    (set_value([0], "Rows", 3), r"Rows, Columns \[3\.0, 5\.0\] in 00\.dcm"),
    (set_value([11], "ImagePositionPatient", None), r"1 of 12 .* no ImagePosition.* 11\.dcm"),
    (set_value(ALL, "ImagePositionPatient", None), r"12 of 12 images have no ImagePositionPatient"),
    (set_value(ALL, "PixelSpacing", None), "12 of 12 images have no PixelSpacing of 2 numbers"),
    (set_value(ALL, "PixelSpacing", [0, 0]), r"PixelSpacing 0\.0, expected more than 0"),
    (set_value(ALL, "ImageOrientationPatient", [0] * 6), "expected two perpendicular unit vectors"),
    (set_value([2], "SeriesInstanceUID", "1.9"), r"2 DICOM series: .*\(11 CT .*\(1 CT .*02\.dcm"),
    (set_value([3], "ImageType", ["ORIGINAL", "M", "MOSAIC"]), r"03\.dcm is a Siemens mosaic"),
    (set_value([0], "NumberOfFrames", 4), r"00\.dcm .* multi-frame file \(CT Image Storage, 4 f"),
    (set_value([0], "SOPClassUID", RTDoseStorage), r"00\.dcm is an RT dose grid"),
    (set_value([0], "SOPClassUID", SegmentationStorage), r"00\.dcm is a segmentation"),
    (set_value([0], "PhotometricInterpretation", "RGB"), r"00\.dcm is a colour image \(RGB\)"),
    (set_value([5], "RescaleSlope", 0), r"05\.dcm: RescaleSlope 0"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), DEFECTS)
def test_a_series_that_is_no_box_of_slices_is_refused_and_the_file_named(tmp_path, edit, message):
    folder = change(tmp_path / "ct", edit)
    with pytest.raises(DataError, match=f"/ct.*{message}"):
        read_volume(folder)


def test_a_healthy_series_is_read_whatever_its_files_are_called(tmp_path):
    volume, affine, notes = read_noting(save_series(tmp_path / "ct", make_slices()[::-1]))
    assert volume.shape == (5, 6, 12, 1) and notes == ""
    assert volume[0, 0, :, 0].tolist() == [20 * k - 1024 for k in range(12)]
    assert volume[1, 0, 0, 0] == 2 - 1024 and volume[0, 1, 0, 0] == 2 * 5 - 1024
    expected = [[-1, 0, 0, 10], [0, -1.5, 0, 12], [0, 0, 2.5, 0], [0, 0, 0, 1]]
    assert np.allclose(affine, expected)


def test_positions_rounded_in_the_header_are_equal_distances(tmp_path):
    def round_positions(slices: list[pydicom.Dataset]) -> None:
        for ds, z in zip(slices, (0, 0.6, 1.2, 1.9), strict=True):
            ds.ImagePositionPatient[2] = z

    _, affine, _ = read_noting(change(tmp_path / "ct", round_positions, 4))
    assert affine[2, 2] == pytest.approx(0.63)  # the line through the four
    assert affine[2, 3] == pytest.approx(-0.02)


@pytest.mark.parametrize("number", [0, 6, 11])
@pytest.mark.parametrize("length", [0, 50, 500, -1])
def test_a_file_that_is_cut_anywhere_is_named(tmp_path, number, length):
    folder = save_series(tmp_path / "ct", make_slices())
    path = folder / f"{number:02d}.dcm"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=f"{path.name}"):
        read_volume(folder)


def test_a_file_that_has_lost_its_beginning_is_named(tmp_path):
    folder = save_series(tmp_path / "ct", make_slices())
    (folder / "00.dcm").write_bytes((folder / "00.dcm").read_bytes()[200:])
    with pytest.raises(DataError, match=r"1 of 12 files are cut, empty or damaged: 00\.dcm"):
        read_volume(folder)


def test_a_cut_file_is_known_by_its_series_or_its_name(tmp_path):
    """Archives number their files, and what is left of one may lack its class or its series."""
    for length in (0, 100, 280, 300, 350):
        folder = tmp_path / str(length)
        folder.mkdir()
        for k, ds in enumerate(make_slices()):
            ds.save_as(folder / f"1.2.840.{k}", enforce_file_format=True)
        path = folder / "1.2.840.11"
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(
            DataError, match=r"1 of 12 files are cut, empty or damaged: 1\.2\.840\.11"
        ):
            read_volume(folder)


def test_an_image_without_pixels_is_named_whatever_its_series(tmp_path):
    slices = make_slices()
    del slices[11].PixelData
    slices[11].SeriesInstanceUID = "1.9"
    with pytest.raises(DataError, match=r"1 of 12 files are cut, empty or damaged: 11\.dcm"):
        read_volume(save_series(tmp_path / "ct", slices))


def test_files_that_are_no_images_are_left_out_with_a_note(tmp_path):
    folder = save_series(tmp_path / "ct", make_slices())
    (folder / "readme.txt").write_text("exported on Monday")
    (folder / ".DS_Store").write_bytes(b"")
    report = make_slices(1)[0]
    del report.PixelData, report.Rows, report.Columns
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.SeriesInstanceUID = "1.7"
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    volume, _, notes = read_noting(folder)
    assert volume.shape[2] == 12
    assert "no images are left out 1 .txt, 1 Basic Text SR Storage" in notes


def test_the_message_of_a_folder_without_images_counts_what_lies_there(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"0 DICOM series \(1 \.txt, 1 folders\)"):
        read_volume(tmp_path)


def test_several_images_at_each_position_are_named_with_what_differs(tmp_path):
    def four_positions(slices: list[pydicom.Dataset]) -> None:
        for k, ds in enumerate(slices):
            ds.ImagePositionPatient[2] = 2.5 * (k // 3)
            ds.EchoTime = 10 * (k % 3)

    folder = change(tmp_path / "mr", four_positions)
    with pytest.raises(DataError, match="4 positions with 3 images each that differ in EchoTime"):
        read_volume(folder)


def test_empty_rescale_is_one_and_zero(tmp_path):
    def empty(slices: list[pydicom.Dataset]) -> None:
        for ds in slices:
            ds.RescaleSlope = ds.RescaleIntercept = None

    volume, _, _ = read_noting(change(tmp_path / "ct", empty))
    assert volume[0, 0, :, 0].tolist() == [10 * k for k in range(12)]


def test_monochrome1_is_inverted_with_a_note(tmp_path):
    def invert(slices: list[pydicom.Dataset]) -> None:
        for ds in slices:
            ds.PhotometricInterpretation = "MONOCHROME1"
            ds.PixelData = (4095 - np.frombuffer(ds.PixelData, np.uint16)).tobytes()
            ds["PixelData"].VR = "OW"

    expected, _, _ = read_noting(save_series(tmp_path / "ct", make_slices()))
    volume, _, notes = read_noting(change(tmp_path / "inverted", invert))
    assert np.array_equal(volume, expected) and "MONOCHROME1" in notes


def test_a_tilt_that_the_positions_do_not_show_is_noted(tmp_path):
    _, _, notes = read_noting(change(tmp_path / "ct", set_value(ALL, "GantryDetectorTilt", 12)))
    assert (
        "GantryDetectorTilt, but the positions are a box: the positions are believed 12 degrees"
        in notes
    )


def make_enhanced(slices: list[pydicom.Dataset]) -> pydicom.Dataset:
    """The slices as frames of an enhanced file: position and rescale per frame, all else shared."""
    enhanced = make_slices(1)[0]
    enhanced.SOPClassUID = EnhancedCTImageStorage
    enhanced.NumberOfFrames = len(slices)
    enhanced.PixelData = b"".join(ds.PixelData for ds in slices)
    enhanced["PixelData"].VR = "OW"
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
        "SliceThickness",
    ):
        delattr(enhanced, keyword)
    macros = {"PlaneOrientationSequence": ["ImageOrientationPatient"],
              "PixelMeasuresSequence": ["PixelSpacing"],
              "PlanePositionSequence": ["ImagePositionPatient"],
              "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"]}  # fmt: skip
    shared = pydicom.Dataset()
    groups = [pydicom.Dataset() for _ in slices]
    for number, (macro, keywords) in enumerate(macros.items()):
        for ds, group in zip(slices, [shared] if number < 2 else groups, strict=False):
            item = pydicom.Dataset()
            for keyword in keywords:
                setattr(item, keyword, ds.get(keyword))
            setattr(group, macro, [item])
    enhanced.SharedFunctionalGroupsSequence = [shared]
    enhanced.PerFrameFunctionalGroupsSequence = groups
    return enhanced


def test_an_enhanced_file_is_the_volume_of_its_frames(tmp_path):
    slices = make_slices()
    for k, ds in enumerate(slices):
        ds.RescaleSlope = 1 + k
    expected, affine, _ = read_noting(save_series(tmp_path / "ct", slices))
    order = np.random.default_rng(0).permutation(12)
    folder = save_series(tmp_path / "enhanced", [make_enhanced([slices[k] for k in order])])
    for path in (folder, folder / "00.dcm"):
        volume, own, _ = read_noting(path)
        assert np.array_equal(volume, expected) and np.allclose(own, affine)


def test_frames_are_checked_as_slices_are(tmp_path):
    slices = make_slices()
    tilt(18)(slices)
    with pytest.raises(DataError, match=r"tilt of 18\.0 degrees"):
        read_volume(save_series(tmp_path / "tilted", [make_enhanced(slices)]))
    slices = make_slices()
    shift(5, 0, 3)(slices)
    with pytest.raises(DataError, match=r"00\.dcm frame 6 lies 3 mm aside"):
        read_volume(save_series(tmp_path / "aside", [make_enhanced(slices)]))


def test_one_file_of_a_series_is_told_from_the_series(tmp_path):
    folder = save_series(tmp_path / "ct", make_slices())
    with pytest.raises(DataError, match=r"03\.dcm: one DICOM slice, .*give the folder"):
        read_volume(folder / "03.dcm")


def test_masks_of_a_series_have_both_forms_and_millimetres(tmp_path):
    volume, affine, header = read_volume(save_series(tmp_path / "ct", make_slices()))
    write_mask(tmp_path / "mask.nii.gz", np.zeros(volume.shape[:3], np.uint8), affine, header)
    written = nib.load(tmp_path / "mask.nii.gz")
    assert int(written.header["sform_code"]) == int(written.header["qform_code"]) == 1
    assert np.allclose(written.get_qform(), affine) and np.allclose(written.get_sform(), affine)
    assert written.header.get_xyzt_units()[0] == "mm"


# --- preprocess.py: the set ---


def make_set(raw: Path, names: list[str], labels: object = None, **description: object) -> Path:
    """imagesTr and labelsTr with these cases, and a dataset.json unless `labels` is None."""
    image, mask = block()
    for k, name in enumerate(names):
        save(raw / "imagesTr" / f"{name}.nii.gz", image + np.int16(k))
        save(raw / "labelsTr" / f"{name}.nii.gz", mask)
    if labels is not None:
        text = json.dumps({"labels": labels, "modality": {"0": "MRI"}} | description)
        (raw / "dataset.json").write_text(text)
    return raw


def run(raw: Path, out: Path, *options: str) -> tuple[dict, list[dict]]:
    main(["--data", str(raw), "--out", str(out), "--workers", "1", *options])
    return json.loads((out / "meta.json").read_text()), read_index(out)


def draw_series(number: int) -> tuple[list[pydicom.Dataset], np.ndarray]:
    """A series with a bright block of 3 x 4 x 5 voxels, and its mask (X, Y, Z)."""
    slices = make_slices()
    mask = np.zeros((5, 6, 12), np.uint8)
    mask[1:4, 1:5, 3:8] = 1
    for k, ds in enumerate(slices):
        pixels = (
            np.arange(30, dtype=np.uint16).reshape(6, 5) + number + np.uint16(500) * mask[..., k].T
        )
        ds.PixelData = pixels.astype(np.uint16).tobytes()
        ds["PixelData"].VR = "OW"
        ds.SeriesInstanceUID = f"1.2.{number}"
    return slices, mask


def test_series_and_enhanced_files_are_training_images(tmp_path, capsys):
    """Masks lie as a program keeps them that reads the series, or turned as dcm2niix does it."""
    raw = tmp_path / "raw"
    for k in range(6):
        slices, mask = draw_series(k)
        if k == 5:
            enhanced = make_enhanced(slices)
            path = raw / "imagesTr" / "c5.dcm"
            enhanced.save_as(path, enforce_file_format=True)
        else:
            path = save_series(raw / "imagesTr" / f"c{k}", slices)
        _, affine, _ = read_volume(path)
        if k % 2:  # the rows from below
            mask = mask[:, ::-1]
            affine = affine @ nib.orientations.inv_ornt_aff([[0, 1], [1, -1], [2, 1]], mask.shape)
        (raw / "labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(mask, affine), raw / "labelsTr" / f"c{k}.nii.gz")
    (raw / "imagesTr" / "notes").mkdir()
    meta, rows = run(raw, tmp_path / "cache", "--spacing", "keep")
    assert "left out, because no .nii or .nii.gz: 1 without suffix, such as notes" in (
        capsys.readouterr().out
    )
    assert [row["id"] for row in rows] == ["c0", "c1", "c2", "c3", "c4", "c5"]
    assert [row["image"] for row in rows][4:] == ["imagesTr/c4", "imagesTr/c5.dcm"]
    assert meta["slice_axis"] == 2
    for row in rows:
        image = np.load(tmp_path / "cache" / "volumes" / f"{row['id']}.image.npy")[0]
        mask = np.load(tmp_path / "cache" / "volumes" / f"{row['id']}.mask.npy")
        assert mask.sum() == 60 and image[mask > 0].min() > image[mask == 0].max()
        truth = nib.load(tmp_path / "cache" / "volumes" / f"{row['id']}.truth.nii.gz")
        assert np.allclose(truth.affine, read_volume(raw / row["image"])[1])

    nib.save(nib.Nifti1Image(mask, np.eye(4)), raw / "labelsTr" / "c0.nii.gz")
    (raw / "imagesTr" / "c1" / "03.dcm").unlink()
    with pytest.raises(DataError, match="2 cases or files"):
        run(raw, tmp_path / "bad")
    printed = capsys.readouterr().err
    assert "labelsTr/c0.nii.gz: affine" in printed and "as its image" in printed
    assert "imagesTr/c1: missing slices: 1; 02.dcm and 04.dcm" in printed


def test_scans_of_one_patient_share_a_fold(tmp_path, capsys):
    names = []
    for k in range(8):
        names += [f"patient{k:03d}_frame01", f"patient{k:03d}_frame12"]
    raw = make_set(tmp_path / "raw", names)
    _, rows = run(raw, tmp_path / "apart")
    assert len({row["group"] for row in rows}) == 16
    assert "16 cases look like 8 patients, such as patient000" in capsys.readouterr().out
    _, rows = run(raw, tmp_path / "cache", "--patient-regex", "(patient[0-9]+)_")
    folds = {(row["group"], row["fold"]) for row in rows}
    assert len(folds) == 8 and ("patient003" in dict(folds))
    assert all(row["id"].startswith(row["group"]) for row in rows)
    with pytest.raises(
        DataError, match=r"--patient-regex 'person' finds nothing in 16 names: patient000_"
    ):
        run(raw, tmp_path / "none", "--patient-regex", "person")


NAMES = [f"c{k}" for k in range(6)]


def write_splits(raw: Path, *val: list[str]) -> None:
    """nnU-Net's splits_final.json: each split validates these cases and trains on the others."""
    splits = [{"train": [n for n in NAMES if n not in names], "val": names} for names in val]
    (raw / "splits_final.json").write_text(json.dumps(splits))


def test_the_folds_are_those_of_splits_final(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    write_splits(raw, ["c4", "c0"], ["c1"], ["c5", "c2", "c3"])
    _, rows = run(raw, tmp_path / "cache")
    assert [row["fold"] for row in rows] == ["0", "1", "2", "2", "0", "2"]
    assert "the folds are those of splits_final.json" in capsys.readouterr().out
    write_splits(raw, ["c1", "c5"])  # of a single split the others are for training
    _, rows = run(raw, tmp_path / "single")
    assert [row["id"] for row in rows if row["fold"] == "0"] == ["c1", "c5"]
    _, rows = run(raw, tmp_path / "test", "--like", str(tmp_path / "single"))
    assert {row["fold"] for row in rows} == {"test"}


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (([*NAMES[:5]], ["c0"]), r"c0 is validated in the splits 0, 1, expected one"),
        ((["c0", "c1"], ["c2", "c3", "c4"]), r"c5 is validated in no split, expected one"),
        ((NAMES, ["c9"]), r"1 names of no case, such as c9, expected names such as c0"),
        ([["c0"]] * 6, r"6 splits, expected 1 to 5"),
    ],
)
def test_a_splits_final_that_does_not_fit_is_refused(tmp_path, val, message):
    raw = make_set(tmp_path / "raw", NAMES)
    write_splits(raw, *val)
    with pytest.raises(DataError, match=f"splits_final.json: {message}"):
        run(raw, tmp_path / "cache")


def test_a_splits_final_of_another_form_is_refused(tmp_path):
    raw = make_set(tmp_path / "raw", NAMES)
    for text in ('{"train": ["c0"]}', "[1]", '[{"train": []}]', "{"):
        (raw / "splits_final.json").write_text(text)
        with pytest.raises(DataError, match=r"splits_final\.json: .*, expected a list of up to 5"):
            run(raw, tmp_path / "cache")


def test_a_table_of_cases_gives_patients_folds_and_columns(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", NAMES)
    rows = [
        "id;patient;fold;site;mask",
        "c0;p1;3;A;x",
        "c1.nii.gz;p1;3;B;",
        "c9;p9;;A;",
        "c3;;test;;",
    ]
    (raw / "cases.csv").write_text("\n".join(rows))
    _, rows = run(raw, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert [row["group"] for row in rows] == ["p1", "p1", "c2", "c3", "c4", "c5"]
    assert [rows[k]["fold"] for k in (0, 1, 3)] == ["3", "3", "test"]
    assert [row["site"] for row in rows] == ["A", "B", "", "", "", ""]
    assert rows[0]["table_mask"] == "x" and rows[0]["mask"] == "labelsTr/c0.nii.gz"
    assert "3 cases without a row in cases.csv, such as c2" in printed
    assert "1 rows of cases.csv without a case left out, such as c9" in printed
    write_splits(raw, ["c0"], NAMES[1:])  # overrules the table
    _, rows = run(raw, tmp_path / "both")
    assert [row["fold"] for row in rows] == ["0", "1", "1", "1", "1", "1"]
    assert "patients in several folds, as given: 1, such as p1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,site\nc0,A", r"no column \['id'\]"),
        ("id,fold\nc0,7", r"cases\.csv:2: fold '7', expected 0 to 4 or test"),
        ("id,fold\nc0,1\nc0,2", r"cases\.csv:3: c0 stands in .*cases\.csv:2 already"),
        ("id,fold\nx,1", r"no id of its 1 rows is a case, expected names such as c0"),
    ],
)
def test_a_table_of_cases_that_does_not_fit_is_refused(tmp_path, text, message):
    raw = make_set(tmp_path / "raw", NAMES)
    (raw / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        run(raw, tmp_path / "cache")


def test_a_patient_on_both_sides_of_the_official_split_is_noted(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["p1_a", "p2_a"])
    for folder in ("images", "labels"):
        (raw / f"{folder}Ts").mkdir()
        content = (raw / f"{folder}Tr" / "p1_a.nii.gz").read_bytes()
        (raw / f"{folder}Ts" / "p1_b.nii.gz").write_bytes(content)
    save(raw / "imagesTs" / "p1_b.nii.gz", block()[0] + np.int16(9))
    run(raw, tmp_path / "cache", "--patient-regex", "p[0-9]")
    assert "patients on both sides of the official split: 1, such as p1" in capsys.readouterr().out


def test_names_in_upper_case_are_cases(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0", "c1"])
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder / "c1.nii.gz").rename(raw / folder / "c1.NII.GZ")
    _, rows = run(raw, tmp_path / "cache")
    assert [row["id"] for row in rows] == ["c0", "c1"]


def test_what_looks_like_a_case_and_is_none_is_named(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0", "c1", "c2"])
    save(raw / "imagesTr" / "c0.nii_old.nii.gz", block()[0] + np.int16(50))
    (raw / "imagesTr" / "c9.nii.gz").mkdir()
    (raw / "labelsTr" / "c2.nii").write_bytes(
        gzip.decompress((raw / "labelsTr" / "c2.nii.gz").read_bytes())
    )
    (raw / "imagesTr" / "c0.nrrd").write_text("another format")
    with pytest.raises(DataError, match="5 cases or files"):
        run(raw, tmp_path / "cache")
    printed = capsys.readouterr()
    for message in (
        "c0.nii_old.nii.gz: no file of that name in labelsTr",
        "c9.nii.gz: a folder",
        "labelsTr/c2.nii: one of 2 files of this name",
        "c2.nii.gz: one of 2 files of this name",
        "imagesTr/c2.nii.gz: no file of that name",
    ):
        assert message in printed.err
    assert "left out, because no .nii or .nii.gz: 1 .nrrd, such as c0.nrrd" in printed.out
    _, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [(row["id"], row["image"]) for row in rows] == [
        ("c0", "imagesTr/c0.nii.gz"), ("c1", "imagesTr/c1.nii.gz")]  # fmt: skip
    with open(tmp_path / "cache" / "skipped.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 6


def test_nnunet_names_are_channels(tmp_path):
    raw = make_set(
        tmp_path / "raw",
        ["c0", "c1"],
        {"background": 0, "a": 1},
        channel_names={"0": "T1", "1": "T2"},
    )
    for name in ("c0", "c1"):
        image = raw / "imagesTr" / f"{name}.nii.gz"
        save(raw / "imagesTr" / f"{name}_0001.nii.gz", -block()[0])
        image.rename(raw / "imagesTr" / f"{name}_0000.nii.gz")
    meta, rows = run(raw, tmp_path / "cache")
    assert meta["channels"] == ["T1", "T2"] and [row["id"] for row in rows] == ["c0", "c1"]
    assert rows[0]["image"] == "imagesTr/c0_0000.nii.gz;imagesTr/c0_0001.nii.gz"
    first, second = np.load(tmp_path / "cache" / "volumes" / "c0.image.npy")
    assert np.allclose(first, -second, atol=0.01)  # both normalised: a volume and its negative


def test_a_missing_channel_file_is_named(tmp_path, capsys):
    raw = make_set(
        tmp_path / "raw",
        ["c0", "c1", "c2"],
        {"background": 0, "a": 1},
        channel_names={"0": "A", "1": "B"},
    )
    for name, numbers in (("c0", "01"), ("c1", "1"), ("c2", "0")):
        content = (raw / "imagesTr" / f"{name}.nii.gz").read_bytes()
        (raw / "imagesTr" / f"{name}.nii.gz").unlink()
        for number in numbers:
            (raw / "imagesTr" / f"{name}_000{number}.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match="2 cases or files"):
        run(raw, tmp_path / "cache")
    printed = capsys.readouterr().err
    assert "c1_0001.nii.gz: channel c1_0000 is missing" in printed
    assert "c2_0000.nii.gz: 1 channels, expected ['A', 'B']" in printed


def test_channels_on_different_grids_are_refused(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0"])
    (raw / "imagesTr" / "c0.nii.gz").rename(raw / "imagesTr" / "c0_0000.nii.gz")
    save(raw / "imagesTr" / "c0_0001.nii.gz", block()[0], (1, 1.5, 3))
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert "c0_0001.nii.gz: affine" in capsys.readouterr().err


def test_masks_of_0_and_255_are_class_1_with_a_note(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0", "c1"])
    for name in ("c0", "c1"):
        save(raw / "labelsTr" / f"{name}.nii.gz", 255 * block()[1])
    meta, _ = run(raw, tmp_path / "cache")
    assert meta["values"] == [0, 255] and meta["classes"] == ["background", "1"]
    assert np.array_equal(np.load(tmp_path / "cache" / "volumes" / "c0.mask.npy"), block()[1])
    assert "255 is taken as class 1" in capsys.readouterr().out


REFUSED = [
    ({"0": "background", "1": "a", "2": "a"}, "another label has this name"),
    ({"background": 0, "a": 1, "b": 1}, "another label has .* this number"),
    ({"background": 0, "whole": [1, 2], "core": [2]}, "overlapping regions are not supported"),
    (
        {"background": 0, "a": 1, "ignore": 2},
        r"voxels that do not count \(nnU-Net\) are not supported",
    ),
    ({"0": "background", "1": "a", "2": "Ignore"}, "voxels that do not count"),
]


@pytest.mark.parametrize(("labels", "message"), REFUSED)
def test_labels_that_leave_a_class_out_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=rf"dataset\.json: .*{message}"):
        run(make_set(tmp_path / "raw", ["c0"], labels), tmp_path / "cache")


def test_a_key_that_stands_twice_in_the_labels_is_refused(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0"])
    (raw / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "a": 2}}')
    with pytest.raises(DataError, match=r"dataset\.json: 'a' stands there twice"):
        run(raw, tmp_path / "cache")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_and_a_modality_without_numbers_are_read(tmp_path, encoding):
    raw = make_set(tmp_path / "raw", ["c0"])
    text = json.dumps(
        {"labels": {"0": "background", "1": "Hüfte"}, "modality": "MRI"}, ensure_ascii=False
    )
    (raw / "dataset.json").write_text(text, encoding=encoding)
    meta, _ = run(raw, tmp_path / "cache")
    assert meta["classes"] == ["background", "Hüfte"] and meta["channels"] == ["MRI"]


def test_ct_by_its_many_names():
    names = (
        "CT",
        "ct",
        "CT scan",
        "CTA",
        "CBCT",
        "contrast-enhanced CT",
        "Computed Tomography",
        "CT_portal",
    )
    assert all(preprocess.is_ct(name) for name in names)
    assert not any(
        preprocess.is_ct(name) for name in ("MRI", "T1", "CT1", "PET", "PET/CT", "ADC", "SPECT")
    )


def test_the_printed_line_says_how_each_channel_is_normalised(tmp_path, capsys):
    raw = make_set(
        tmp_path / "raw", ["c0"], {"background": 0, "a": 1}, modality={"0": "CT scan", "1": "MRI"}
    )
    save(raw / "imagesTr" / "c0.nii.gz", np.stack([block()[0]] * 2, 3))
    run(raw, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert "channels CT scan (as CT: clipped to 1" in printed
    assert "MRI (each image to mean 0, deviation 1)" in printed


@pytest.mark.parametrize("spacing", ["0.01", "90"])
def test_a_grid_that_is_impossible_is_refused_before_it_is_made(tmp_path, capsys, spacing):
    raw = make_set(tmp_path / "raw", ["c0"])
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache", "--spacing", spacing, spacing, spacing)
    assert (
        "c0.nii.gz: 12 x 10 x 8 voxels of 1 x 1.5 x 2.5 mm would become" in capsys.readouterr().err
    )


def test_files_are_decompressed_once_and_nothing_of_them_is_left(tmp_path, monkeypatch):
    raw = make_set(tmp_path / "raw", ["c0", "c1", "c2"])
    read = []

    def note(path: Path, *more: object) -> tuple:
        read.append(path.parent.name + "/" + path.name)
        return original(path, *more)

    original = preprocess.read_nifti
    monkeypatch.setattr(preprocess, "read_nifti", note)
    run(raw, tmp_path / "cache")
    assert len(read) == len(set(read)) == 6
    inside = {path.name for path in (tmp_path / "cache").iterdir()}
    assert inside == {"volumes", "index.csv", "meta.json"}


def test_copies_are_found_whatever_type_stores_them(tmp_path):
    raw = make_set(tmp_path / "raw", ["c0", "c1", "c2"])
    image = nib.load(raw / "imagesTr" / "c0.nii.gz").get_fdata()
    for name, dtype in (("c3", np.float64), ("c4", np.int32)):
        save(raw / "imagesTr" / f"{name}.nii.gz", image.astype(dtype))
        save(raw / "labelsTr" / f"{name}.nii.gz", block()[1].astype(dtype))
    meta, _ = run(raw, tmp_path / "cache")
    assert [copies["cases"] for copies in meta["copies"]] == [["c0", "c3", "c4"]]
    assert meta["copies"][0]["masks"] == "the same"


def test_too_little_memory_is_named_and_skipped_in_every_step(tmp_path, capsys, monkeypatch):
    raw = make_set(tmp_path / "raw", ["c0", "c1", "c2", "c3"])
    read = preprocess.read_volume
    resample = preprocess.to_grid

    def fail_to_read(path: Path, *more: list | None) -> tuple:
        if path.name == "c1.nii.gz":
            raise MemoryError
        return read(path, *more)

    def fail_to_resample(volume: np.ndarray, affine: np.ndarray, meta: dict) -> np.ndarray:
        if volume.min() == 3:
            raise MemoryError("Unable to allocate 52 TiB")
        return resample(volume, affine, meta)

    monkeypatch.setattr(preprocess, "read_volume", fail_to_read)
    monkeypatch.setattr(preprocess, "to_grid", fail_to_resample)
    meta, rows = run(raw, tmp_path / "cache", "--skip-bad")
    assert [row["id"] for row in rows] == ["c0", "c2"] and meta["n"] == meta["skipped"] == 2
    printed = capsys.readouterr().err
    assert (
        "c1.nii.gz: not enough memory" in printed
        and "c3.nii.gz: not enough memory for it (Unable" in printed
    )
    assert not list((tmp_path / "cache" / "volumes").glob("c3*"))


def test_values_that_float16_cannot_hold_are_named(tmp_path, capsys):
    raw = make_set(tmp_path / "raw", ["c0"])
    image = np.zeros((12, 10, 8), np.float32)
    image[2:7, 3:9, 1:5] = 1e6 + np.random.default_rng(0).random((5, 6, 4))
    save(raw / "imagesTr" / "c0.nii.gz", image)
    with pytest.raises(DataError, match="1 cases"):
        run(raw, tmp_path / "cache")
    assert "c0.nii.gz: normalised values beyond 65504" in capsys.readouterr().err


def test_overwriting_a_cache_never_deletes_the_raw_data(tmp_path):
    run(make_set(tmp_path / "raw", ["c0"]), tmp_path / "cache")
    inside = make_set(tmp_path / "cache" / "volumes" / "raw", ["c0"])
    with pytest.raises(DataError, match=r"c0\.nii\.gz: would be overwritten"):
        run(inside, tmp_path / "cache", "--overwrite")
    assert len(list(inside.rglob("*.nii.gz"))) == 2


# --- eval.py: new images ---


class Bright(torch.nn.Module):
    """Outlines what is brighter than the mean of its first channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([-x[:, :1], x[:, :1]], 1)


@pytest.fixture
def predict(monkeypatch) -> Callable:
    """eval.py --images with a network that needs no training."""

    def call(images: list, out: Path, channels: int = 1) -> list[dict]:
        meta = META | {"channels": ["MRI"] * channels, "normalisation": [None] * channels}
        checkpoint = {
            "settings": {"patch": [12, 10, 8], "batch_size": 1, "amp": "off"},
            "meta": meta,
        }
        monkeypatch.setattr(evaluation, "load_models", lambda *_: ([Bright()], [checkpoint]))
        options = ["--checkpoint", "none", "--device", "cpu", "--out", str(out)]
        evaluation.main([*options, "--images", *map(str, images)])
        with open(out / "volumes.csv", newline="") as file:
            return list(csv.DictReader(file))

    return call


def test_masks_never_replace_images(tmp_path, predict):
    scans = tmp_path / "scans"
    first = save(scans / "a.nii.gz", block()[0])
    save(scans / "b.nii.gz", block()[0])
    (tmp_path / "link").symlink_to(scans)
    (tmp_path / "hard").mkdir()
    os.link(first, tmp_path / "hard" / "a.nii.gz")
    content = first.read_bytes()
    for out in (scans, tmp_path / "link", tmp_path / "hard", scans / ".." / "scans"):
        with pytest.raises(
            DataError, match=r"a\.nii\.gz: would be overwritten by a result; give another --out"
        ):
            predict([scans], out)
    assert first.read_bytes() == content and len(list(scans.iterdir())) == 2


def test_files_that_are_no_results_are_never_replaced(tmp_path, predict):
    scans = tmp_path / "scans"
    save(scans / "a.nii", block()[0])
    save(tmp_path / "labels" / "a.nii.gz", block()[1])
    with pytest.raises(DataError, match=r"labels/a\.nii\.gz: exists and is no earlier result"):
        predict([scans], tmp_path / "labels")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "volumes.csv").write_text("patient,age\n")
    with pytest.raises(DataError, match=r"volumes\.csv: exists and is no earlier result"):
        predict([scans], tmp_path / "tables")
    for _ in range(2):  # results may be
        assert [row["mask"] for row in predict([scans], tmp_path / "out")] == ["a.nii.gz"]


def test_names_of_masks_do_not_collide(tmp_path, predict, monkeypatch):
    for name in ("p1/a.nii", "p1/a.nii.gz", "p2/b.nii.gz", "p3/B.NII.GZ", "p2/p1_a.nii.gz"):
        save(tmp_path / name, block()[0])
    rows = predict([tmp_path / "p1", tmp_path / "p2", tmp_path / "p3"], tmp_path / "out")
    masks = [row["mask"] for row in rows]
    assert masks == ["a_2.nii.gz", "a.nii.gz", "p2_b.nii.gz", "p1_a.nii.gz", "p3_B.nii.gz"]
    assert all((tmp_path / "out" / mask).is_file() for mask in masks)


def test_dicom_folders_of_one_name_and_the_working_folder(tmp_path, predict, monkeypatch):
    for patient in ("p1", "p2"):
        save_series(tmp_path / patient / "ct", make_slices())
    rows = predict([tmp_path / "p1" / "ct", tmp_path / "p2" / "ct"], tmp_path / "out")
    assert [row["mask"] for row in rows] == ["p1_ct.nii.gz", "p2_ct.nii.gz"]
    monkeypatch.chdir(tmp_path / "p1" / "ct")
    assert [row["mask"] for row in predict(["."], tmp_path / "here")] == ["ct.nii.gz"]
    with pytest.raises(DataError, match="is the folder of a DICOM series"):
        predict(["."], tmp_path / "p1" / "ct")


def test_micron_gives_the_millilitres_of_millimetres(tmp_path, predict):
    image, _ = block()
    save(tmp_path / "mm.nii.gz", image)
    save(tmp_path / "um.nii.gz", image, tuple(1000 * s for s in SPACING), xyzt_units=3)
    rows = predict([tmp_path / "mm.nii.gz", tmp_path / "um.nii.gz"], tmp_path / "out")
    assert [row["ml_a"] for row in rows] == ["0.45", "0.45"]  # 120 voxels of 3.75 mm3


def test_a_broken_image_does_not_end_the_batch(tmp_path, predict, monkeypatch, capsys):
    for name in ("a", "b", "c", "d"):
        save(tmp_path / "scans" / f"{name}.nii.gz", block()[0])
    (tmp_path / "scans" / "a.nii.gz").write_bytes(b"")
    grid = evaluation.to_grid
    count = iter(range(9))

    def fail(*args: object) -> np.ndarray:
        if next(count) == 1:
            raise MemoryError("Unable to allocate 52 TiB")
        return grid(*args)

    monkeypatch.setattr(evaluation, "to_grid", fail)
    with pytest.raises(DataError, match="2 of 4 images"):
        predict([tmp_path / "scans"], tmp_path / "out")
    printed = capsys.readouterr().err
    assert (
        "a.nii.gz: zero bytes" in printed
        and "c.nii.gz: not enough memory for it (Unable" in printed
    )
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        assert [row["mask"] for row in csv.DictReader(file)] == ["b.nii.gz", "d.nii.gz"]


@pytest.mark.parametrize(
    "error", [MemoryError("8 GiB"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_too_little_memory_for_the_network_names_the_image(
    tmp_path, predict, monkeypatch, capsys, error
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(evaluation, "predict_volume", fail)
    with pytest.raises(DataError, match="1 of 1 images"):
        predict([save(tmp_path / "a.nii.gz", block()[0])], tmp_path / "out")
    assert "a.nii.gz: not enough memory for it" in capsys.readouterr().err


def test_the_table_has_the_rows_of_a_run_that_was_stopped(tmp_path, predict, monkeypatch):
    for name in ("a", "b", "c"):
        save(tmp_path / "scans" / f"{name}.nii.gz", block()[0])
    write = evaluation.write_mask
    written = []

    def stop(path: Path, *args: object) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, *args)

    monkeypatch.setattr(evaluation, "write_mask", stop)
    with pytest.raises(KeyboardInterrupt):
        predict([tmp_path / "scans"], tmp_path / "out")
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_channel_files_are_one_image(tmp_path, predict, capsys):
    for name in ("c0_0000", "c0_0001", "c1_0001"):
        save(tmp_path / "scans" / f"{name}.nii.gz", block()[0])
    save(tmp_path / "scans" / "scan_2024.nii.gz", np.stack([block()[0]] * 2, 3))
    with pytest.raises(DataError, match="1 of 3 images"):
        predict([tmp_path / "scans"], tmp_path / "out", channels=2)
    assert "c1_0001.nii.gz: channel files 0001, expected one for each of" in capsys.readouterr().err
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        assert [row["mask"] for row in csv.DictReader(file)] == ["c0.nii.gz", "scan_2024.nii.gz"]


def test_channel_files_are_read_in_the_order_of_their_numbers(tmp_path, predict):
    image, mask = block()
    bright = save(tmp_path / "c0_0000.nii.gz", image)
    dark = save(tmp_path / "c0_0001.nii.gz", -image)
    for k, paths in enumerate(([bright, dark], [dark, bright])):
        (row,) = predict(paths, tmp_path / str(k), channels=2)
        found = np.asanyarray(nib.load(tmp_path / str(k) / row["mask"]).dataobj)
        assert np.array_equal(found, mask)  # the network looks at the first channel


def test_an_export_is_read_series_by_series(tmp_path, predict, capsys):
    """PATIENT/STUDY/SERIES, two series in one folder, a scout, a cut file, DICOMDIR, no suffixes."""

    def write(folder: str, number: int, edit: Callable = len, count: int = 12) -> list[Path]:
        slices = make_slices(count)
        edit(slices)
        files = []
        for k, ds in enumerate(slices):
            ds.SeriesInstanceUID = f"1.2.{number}"
            ds.SeriesNumber = number
            files.append(export / folder / f"IM{number:02d}{k:02d}")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            ds.save_as(files[-1], enforce_file_format=True)
        return files

    export = tmp_path / "export"
    scout = set_value([0], "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write("p1/ct/axial", 1)
    write("p1/ct/scout", 2, scout, 1)
    write("p2/ct/all", 3)
    write("p2/ct/all", 4)
    cut = write("p3/ct/axial", 5)[6]
    cut.write_bytes(cut.read_bytes()[:300])
    save(export / "p4" / "scan.nii.gz", block()[0])
    save(export / "p5" / "scan.nii.gz", block()[0])
    (export / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (export / "p1" / ".DS_Store").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 7 images could not be read"):
        predict([export], tmp_path / "out")
    printed = capsys.readouterr()
    assert "p1/ct/scout: a localizer (scout), expected CT or MR slices" in printed.err
    assert "p3/ct/axial: 1 of 12 files are cut, empty or damaged: IM0506" in printed.err
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        masks = [row["mask"] for row in csv.DictReader(file)]
    expected = ["p1_ct_axial", "p2_ct_all_3", "p2_ct_all_4", "p4_scan", "p5_scan"]
    assert masks == [f"{name}.nii.gz" for name in expected]
    alone, *_ = read_volume(export / "p1" / "ct" / "axial")
    assert nib.load(tmp_path / "out" / masks[1]).shape == alone.shape[:3]
    with pytest.raises(DataError, match=r"--out .* lies in .*, where it would be read as images"):
        predict([export], export / "masks")


def test_a_cut_file_beside_several_series_is_missed_by_each(tmp_path, predict, capsys):
    for number in (1, 2):
        slices = make_slices()
        for k, ds in enumerate(slices):
            ds.SeriesInstanceUID = f"1.2.{number}"
            ds.save_as(tmp_path / f"{number}_{k}.dcm", enforce_file_format=True)
            (tmp_path / "ct").mkdir(exist_ok=True)
            (tmp_path / f"{number}_{k}.dcm").rename(tmp_path / "ct" / f"{number}_{k}.dcm")
    (tmp_path / "ct" / "1_3.dcm").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 2 images"):
        predict([tmp_path / "ct"], tmp_path / "out")
    assert "are cut, empty or damaged: 1_3.dcm" in capsys.readouterr().err


def test_other_files_beside_volumes_are_noted(tmp_path, predict, capsys):
    save(tmp_path / "scans" / "a.nii.gz", block()[0])
    save_series(tmp_path / "scans", make_slices(2))
    predict([tmp_path / "scans"], tmp_path / "out")
    assert (
        "scans: left out, because no .nii or .nii.gz: 2 .dcm, such as 00.dcm"
        in capsys.readouterr().out
    )
