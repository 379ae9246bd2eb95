"""The X-ray reader on files as scanners, archives and phones write them: the right picture or plain words.

RAMP is 24 rows of 0, 100, ..., 3100; a window of 0..3100 shows it as RAMP / 3100.
"""

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Sequence, uid
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array

from classification import preprocess
from classification.preprocess import DataError, read_image, resize
from tests.raw import dicom, element, noise

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom|PIL")
RAMP = np.tile(np.arange(32, dtype=np.uint16) * 100, (24, 1))
SHOWN = RAMP / 3100
SIGNED = RAMP.astype(np.int16) - 1500


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0.5, 99.5))
    return ((values - low) / (high - low)).clip(0, 1)


def window(center: object, width: object, **header: object) -> dict:
    return {"WindowCenter": center, "WindowWidth": width, **header}


def item(**values: object) -> Sequence:
    """A sequence of one data set; a value may be an element."""
    ds = pydicom.Dataset()
    for keyword, value in values.items():
        ds.add(value) if isinstance(value, pydicom.DataElement) else setattr(ds, keyword, value)
    return Sequence([ds])


def lut(descriptor: list[int] | None, data: object, vr: str = "US") -> Sequence:
    """A LUT sequence of one item: descriptor = entries, first input, bits."""
    first_vr = "SS" if descriptor and descriptor[1] < 0 else "US"
    return item(a=element("LUTDescriptor", first_vr, descriptor), b=element("LUTData", vr, data))


def palette(bits: int, scale: int) -> dict:
    """A header of PALETTE COLOR: black, gray 50, (100, 200, 250)."""
    header = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, last in (("Red", 100), ("Green", 200), ("Blue", 250)):
        data = (np.uint16([0, 50, last, 9]) * scale).astype("u1" if bits == 8 else "<u2").tobytes()
        header[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        header[f"{name}PaletteColorLookupTableData"] = data
    return header


def group(name: str) -> dict:
    """What an Enhanced file has in a functional group: a falling slope, a window and a spacing."""
    return {name: item(
        PixelValueTransformationSequence=item(RescaleSlope=-1, RescaleIntercept=3100),
        FrameVOILUTSequence=item(**WINDOW), PixelMeasuresSequence=item(PixelSpacing=[0.2, 0.1]))}  # fmt: skip


def shown(path: Path) -> np.ndarray:
    """The gray of a file in 0..1, whether it is read as bytes or as floats."""
    gray = read_image(path).gray
    assert gray.dtype in (np.uint8, np.float32)
    return gray / 255 if gray.dtype == np.uint8 else gray


WINDOW = window(1550.5, 3101)  # LINEAR: 0 is black, 3100 is white
SIXTEEN = {"BitsStored": 16, "HighBit": 15}
INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}
PADDED = RAMP.copy()
PADDED[:4] = 65535
IN_RANGE = np.where(PADDED == 65535, 0, SHOWN)
SIGNED_PADDED = SIGNED.copy()
SIGNED_PADDED[:4] = -2000
SQUARES = np.arange(4096) ** 2 // 4096  # 0..4094
SQUARED = SQUARES[RAMP] / 4094
WORDS = SQUARES.astype("<u2").tobytes()
BYTES = np.uint8([[0, 51, 102]])
INDICES = np.uint8([[0, 1, 2, 1]])
COLOURS = [[0, 50 / 255, (0.299 * 100 + 0.587 * 200 + 0.114 * 250) / 255, 50 / 255]]
XA = {"SOPClassUID": uid.XRayAngiographicImageStorage}


@pytest.mark.parametrize("pixels, expected, header", [
    # windows: half a pixel, the first of several, what is no window, functions
    (RAMP, SHOWN, WINDOW),
    (RAMP, 1 - SHOWN, WINDOW | INVERTED),
    (RAMP, SHOWN, window([1550.5, 9], [3101, 9], VOILUTFunction="linear ")),
    (RAMP, RAMP / 3100, window(1550, 3100, VOILUTFunction="LINEAR_EXACT")),
    (RAMP, 1 / (1 + np.exp(-4 * (RAMP - 1550.0) / 1000)), window(1550, 1000, VOILUTFunction="SIGMOID")),
    (RAMP, stretched(RAMP), window(["", "5"], ["", "9"])),
    (RAMP, stretched(RAMP), window(1550, 1)),
    (BYTES, BYTES / 255, window(5, 0)),
    # rescale: before the window, falling, empty, of the range, and in a functional group
    (RAMP, SHOWN, window(3100.5, 6201, RescaleSlope="2", RescaleIntercept="")),
    (RAMP, 1 - SHOWN, window(1550.5, 3101, RescaleSlope=-1, RescaleIntercept=3100)),
    (RAMP, SHOWN, {**WINDOW, "RescaleSlope": "", "RescaleIntercept": ""}),
    (BYTES, 1 - BYTES / 255, {"RescaleSlope": -1}),
    (BYTES, BYTES / 255, {}),
    (BYTES, 1 - BYTES / 255, INVERTED),
    (RAMP, 1 - SHOWN, group("SharedFunctionalGroupsSequence")),
    (RAMP, 1 - SHOWN, group("PerFrameFunctionalGroupsSequence")),
    # padding, whose VR is "US or SS": the same bits, with the sign of the pixels
    (PADDED, IN_RANGE, {**WINDOW, **SIXTEEN, "a": element("PixelPaddingValue", "SS", -1)}),
    (PADDED, IN_RANGE, {**WINDOW, "PixelPaddingValue": 65535}),  # 12 bits of 16
    (PADDED, IN_RANGE, {**WINDOW, **SIXTEEN, "a": element("PixelPaddingValue", "SS", -9),
                        "b": element("PixelPaddingRangeLimit", "SS", -1)}),
    (SIGNED_PADDED, np.where(SIGNED_PADDED == -2000, 0, 1 - SHOWN),
     {**window(50.5, 3101), **SIXTEEN, **INVERTED, "a": element("PixelPaddingValue", "US", 63536)}),
    (PADDED, np.where(PADDED == 65535, 0, stretched(RAMP)), {**SIXTEEN, "PixelPaddingValue": 65535}),
    (BYTES, [[0, 0.8, 0.6]], INVERTED | {"PixelPaddingValue": 0}),
    # bits that are no image, and bits that are further left
    (RAMP | 0xF000, SHOWN, WINDOW),
    (RAMP * 4 + 1, SHOWN, {**WINDOW, "HighBit": 13}),
    (SIGNED * 16, SHOWN, {**window(50.5, 3101), "HighBit": 15}),
    (RAMP, SHOWN, {**WINDOW, "HighBit": None}),
    # lookup tables as they are found
    (RAMP, SHOWN, {**WINDOW, "VOILUTSequence": lut(None, None)}),
    (RAMP, SHOWN, {**WINDOW, "VOILUTSequence": Sequence([])}),
    (RAMP, SQUARED, {**WINDOW, "VOILUTSequence": lut([4096, 0, 12], SQUARES.tolist())}),
    (RAMP, SQUARED, {"VOILUTSequence": lut([4096, 0, 12], WORDS, "OW")}),
    (RAMP, SQUARED, {"VOILUTSequence": lut([4097, 0, 12], SQUARES.tolist())}),  # one short
    (RAMP, (SQUARES[RAMP] >> 4) / 255,  # two entries a word
     {"VOILUTSequence": lut([4096, 0, 8], (SQUARES >> 4).astype("u1").tobytes(), "OW")}),
    (RAMP, (SQUARES[RAMP] >> 4) / 255, {"VOILUTSequence": lut([4096, 0, 8], (SQUARES >> 4).tolist())}),
    (SIGNED, SQUARES[RAMP] / SQUARES[3100],  # the first input is -1500, written as US
     {"VOILUTSequence": lut([3101, 64036, 12], SQUARES[:3101].tolist())}),
    (RAMP, SQUARED, {**window(2047.5, 4095), "ModalityLUTSequence": lut([4096, 0, 12], WORDS, "OW")}),
    (RAMP, SHOWN, {**WINDOW, **XA, "ModalityLUTSequence": lut([4096, 0, 12], WORDS, "OW")}),
    (np.uint8(RAMP // 16), np.abs(RAMP // 16 - 100.0) / 155,  # falls and rises
     {"ModalityLUTSequence": lut([256, 0, 8], np.abs(np.arange(256) - 100).tolist())}),
    (INDICES, COLOURS, palette(8, 1)), (INDICES, COLOURS, palette(16, 257)), (INDICES, COLOURS, palette(16, 1)),
])  # fmt: skip
def test_dicom_is_shown_as_its_header_says(tmp_path, pixels, expected, header):
    path = dicom(tmp_path / "a.dcm", pixels, **header)
    np.testing.assert_allclose(shown(path), expected, atol=2e-6)


PRIMARY = np.uint16([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])
LUMA = [[0.299, 0.587, 0.114]]
YBR = {"PhotometricInterpretation": "YBR_FULL"}


@pytest.mark.parametrize("pixels, gray, colour, header", [
    (np.uint8(PRIMARY), LUMA, PRIMARY / 255, {}), (PRIMARY // 255 * 4095, LUMA, PRIMARY / 255, {}),
    (np.uint8([[[76, 85, 255], [200, 128, 128]]]), [[0.299 * 254 / 255, 200 / 255]],  # PS3.3 C.7.6.3.1.2
     [[[254 / 255, 0, 0], [200 / 255] * 3]], YBR),
])  # fmt: skip
def test_colour_dicom(tmp_path, pixels, gray, colour, header):
    picture = read_image(dicom(tmp_path / "a.png", pixels, **header))
    scale = 255 if picture.colour.dtype == np.uint8 else 1
    np.testing.assert_allclose(picture.gray, gray, atol=1e-6)
    np.testing.assert_allclose(picture.colour / scale, colour, atol=1e-6)
    assert picture.notes == ("colour turned gray",)


FULL = np.tile(np.arange(4096, dtype=np.uint16), (2, 1))


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("name, expected, pixels, header", [
    ("notes", ("window 32768/65536 leaves 16 gray levels of 4096",), FULL, window(32768, 65536)),
    ("notes", (), FULL, window(2048, 4096)),
    ("notes", (), FULL // 512, window(4, 8)),  # the picture itself has eight
    ("notes", ("window passed over: no number, or too narrow",), FULL, {"a": element("WindowCenter", "LO", "5,5"), "WindowWidth": 9}),
    ("spacing", (0.2, 0.1), RAMP, {"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.1]}),
    ("spacing", (0.2, 0.1), RAMP, group("SharedFunctionalGroupsSequence")),
    ("patient", hashed("Doe"), RAMP, {"PatientID": "Doe "}), ("patient", hashed("0"), RAMP, {"PatientID": "0.0"}),
    ("patient", hashed("0"), RAMP, {"PatientID": "0"}), ("patient", "", RAMP, {"PatientID": ""}),
    ("digest", hashlib.sha256(b"(24, 32)" + RAMP.tobytes()).hexdigest()[:16], RAMP, WINDOW),
])  # fmt: skip
def test_what_else_a_file_says(tmp_path, name, expected, pixels, header):
    assert getattr(read_image(dicom(tmp_path / "a.dcm", pixels, **header)), name) == expected


@pytest.mark.parametrize("written, spacing", [
    ("0.143\\0.144", (0.143, 0.144)), ("0,143\\0,144", ()), ("0.143000000", ()), ("abc\\defghij", ()),
    ("0.0\\0.00000", ()), ("-0.1\\-0.100", ()), ("0.1\\0.1\\0.1", ()), ("    \\      ", ()),
    ("1e9\\1000000", ()), ("nan\\nan    ", ()),
])  # fmt: skip
def test_pixel_spacing_is_two_lengths_or_absent(tmp_path, written, spacing):
    path = dicom(tmp_path / "a.dcm", RAMP, PixelSpacing=[0.143, 0.144], **WINDOW)
    path.write_bytes(path.read_bytes().replace(b"0.143\\0.144", written.encode()))
    assert read_image(path).spacing == spacing


def test_dicom_without_preamble_or_meta_header(tmp_path):
    whole = dicom(tmp_path / "whole.dcm", RAMP, **WINDOW)
    ds = pydicom.dcmread(whole)
    data = whole.read_bytes()
    files = {"prefix": data[128:], "meta": data[132:], "tiff": b"II*\0" + data[4:]}
    for name, implicit, little in (("i", True, True), ("e", False, True), ("b", False, False)):
        ds["PixelData"].value = RAMP.astype("<u2" if little else ">u2").tobytes()
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_implicit_VR = implicit
        buffer.is_little_endian = little
        pydicom.filewriter.write_dataset(buffer, ds.copy())
        files[name] = buffer.getvalue()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_allclose(shown(tmp_path / name), SHOWN, atol=2e-6)


def encode(path: Path, syntax: str, data: bytes, vr: str = "OB", little: bool = True) -> Path:
    """Replace the pixels of a DICOM by encoded ones."""
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = data
    ds["PixelData"].VR = vr
    pydicom.dcmwrite(path, ds, little_endian=little, implicit_vr=False)
    return path


def test_bits_above_bits_stored_of_a_jpeg_2000_stream_are_no_image(tmp_path):
    stored = RAMP | np.where(np.arange(32) % 2, 0x5000, 0).astype(np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, HighBit=15, **WINDOW)
    stream = save(Image.fromarray(stored), "JPEG2000", no_jp2=True, irreversible=False)
    encode(path, uid.JPEG2000Lossless, encapsulate([stream]))
    np.testing.assert_allclose(shown(path), SHOWN, atol=2e-6)


@pytest.mark.parametrize("planar", [None, 1])
def test_a_stream_says_itself_in_what_order_its_colours_are(tmp_path, planar):
    pixels = noise("c", 16, 24, 3)
    path = dicom(tmp_path / "a.dcm", pixels)
    stream = save(Image.fromarray(pixels), "JPEG2000", no_jp2=True, irreversible=False, mct=0)
    encode(path, uid.JPEG2000Lossless, encapsulate([stream]))
    ds = pydicom.dcmread(path)
    del ds.PlanarConfiguration
    if planar:
        ds.PlanarConfiguration = planar
    ds.save_as(path)
    assert np.array_equal(read_image(path).colour, pixels)


def test_gray_jpeg_is_decoded_by_pillow_whatever_is_installed(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", noise("j", 24, 32))
    stream = save(Image.fromarray(noise("j", 24, 32)), "JPEG")
    encode(path, uid.JPEGBaseline8Bit, encapsulate([stream]))
    expected = pixel_array(pydicom.dcmread(path), decoding_plugin="pillow")
    decode = Mock(side_effect=pixel_array)
    monkeypatch.setattr(preprocess, "pixel_array", decode)
    assert np.array_equal(read_image(path).gray, expected)
    read_image(dicom(tmp_path / "b.dcm", RAMP))
    assert [call.kwargs["decoding_plugin"] for call in decode.mock_calls] == ["pillow", ""]


def test_big_endian_pixels_have_the_same_digest_and_palettes_are_refused(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, **SIXTEEN)
    digest = read_image(path).digest
    encode(path, uid.ExplicitVRBigEndian, RAMP.astype(">u2").tobytes(), "OW", little=False)
    assert read_image(path).digest == digest
    dicom(path, INDICES, PhotometricInterpretation="PALETTE COLOR")
    encode(path, uid.ExplicitVRBigEndian, INDICES.tobytes(), little=False)
    with pytest.raises(DataError, match="'PALETTE COLOR in big endian', expected one of"):
        read_image(path)


GRAY = np.uint8([[0, 51, 102], [153, 204, 255]])
BLOCKS = np.kron(GRAY, np.ones((8, 8), np.uint8))  # as large as JPEG's
TURNS = {1: GRAY, 2: GRAY[:, ::-1], 3: GRAY[::-1, ::-1], 4: GRAY[::-1],
         5: GRAY.T, 6: np.rot90(GRAY, -1), 7: np.rot90(GRAY, 2).T, 8: np.rot90(GRAY)}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_pictures_are_turned_as_every_viewer_shows_them(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": exif, "quality": 95}
    Image.fromarray(BLOCKS).save(tmp_path / f"a.{suffix}", **options)
    expected = np.kron(TURNS[orientation], np.ones((8, 8), np.uint8)) / 255
    np.testing.assert_allclose(shown(tmp_path / f"a.{suffix}"), expected, atol=0.02)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


SMALL = Image.fromarray(GRAY)


@pytest.mark.parametrize("content, expected", [
    (save(SMALL, "PNG"), GRAY / 255), (save(SMALL.convert("RGBA"), "TIFF"), GRAY / 255), (save(SMALL.convert("P"), "PNG"), GRAY / 255),
    (save(Image.fromarray(GRAY > 60), "PNG"), GRAY > 60),
    (save(Image.fromarray(np.uint8(PRIMARY)), "PNG"), [[76 / 255, 150 / 255, 29 / 255]]),
    (save(Image.fromarray(RAMP), "PNG"), stretched(RAMP)), (save(Image.fromarray(RAMP), "TIFF"), stretched(RAMP)),
    (save(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0}), 1 - stretched(RAMP)),  # WhiteIsZero
    (save(Image.fromarray(np.float32(RAMP)), "TIFF"), stretched(RAMP)),
    (save(Image.fromarray(BLOCKS), "MPO", quality=100, save_all=True, append_images=[Image.new("L", (4, 4))]), BLOCKS / 255),  # as phones write it
])  # fmt: skip
def test_pictures(tmp_path, content, expected):
    (tmp_path / "a.dcm").write_bytes(content)  # which its name does not say
    np.testing.assert_allclose(shown(tmp_path / "a.dcm"), expected, atol=2e-6)


def test_what_is_transparent_is_black_and_small_differences_are_no_colour(tmp_path):
    rgb = noise("rgb", 6, 8, 3)
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[0] = 0
    alpha[1] = 100
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert (picture.gray[0] == 0).all() and (picture.colour[0] == 0).all()
    assert (picture.colour[1:] == rgb[1:]).all() and picture.colour.dtype == np.uint8
    assert picture.notes == ("colour turned gray", "transparent pixels made black")
    gray = np.stack([noise("g")] * 3, -1)
    gray[0, 0] = (100, 104, 107)  # as JPEG leaves it
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[2:] == (None, "", (), ())


def claimed(width: int, height: int, bits: int, colour: int) -> bytes:
    """A PNG whose header claims another size or depth than Pillow has written."""
    data = bytearray(save(SMALL, "PNG"))
    data[16:26] = struct.pack(">IIBB", width, height, bits, colour)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("words, content", [
    ("2 frames", {"NumberOfFrames": 2}),
    ("YBR_PARTIAL_420", {"PhotometricInterpretation": "YBR_PARTIAL_420"}),
    ("DICOM .no modality. without PixelData, expected an image", {"PixelData": None}),
    ("without BitsStored, expected", {"BitsStored": None}),
    ("without PixelRepresentation, expected", {"PixelRepresentation": None}),
    ("RescaleSlope 0", {"RescaleSlope": 0}),
    ("expected a single image", {"Rows": 1}),  # pixels of a second frame that the header does not count
    ("bytes of pixel data is less", {"Rows": 9}),
    ("40000 x 40000 pixels, expected at most", {"Rows": 40000, "Columns": 40000}),
    ("VOILUTSequence has 99 entries, expected 4096", {"VOILUTSequence": lut([4096, 0, 12], SQUARES[:99].tolist())}),
    ("window 9999/2 shows none of 1 to 4$", window(9999, 2)),
    ("PNG with RGB of 16 bits .*, expected 8, or 16 of gray", claimed(3, 2, 16, 2)),
    ("expected 8, or 16 of gray", save(SMALL, "TIFF", tiffinfo={339: 2})),  # int8
    ("169000000 pixels. exceeds limit", claimed(13000, 13000, 8, 0)),
    ("2 frames", save(SMALL, "TIFF", save_all=True, append_images=[SMALL])),
    ("no contrast", save(Image.fromarray(np.float32([[1, np.nan]])), "TIFF")),
    ("no contrast", save(Image.new("L", (9, 9), 7), "PNG")),
    ("truncated", save(Image.fromarray(noise("j", 64, 64)), "JPEG")[:-1000]),
    ("neither DICOM nor JPEG, PNG or TIFF", b"%!PS-Adobe-3.0 EPSF-3.0\n"),  # Ghostscript stays off
    ("neither DICOM nor JPEG, PNG or TIFF", b"patient,label\n1,0\n"), ("neither DICOM nor JPEG", b""),
    ("UnidentifiedImageError: cannot identify", b"II*\0" + bytes(99)), ("not a file", None),  # a pipe
])  # fmt: skip
def test_what_is_refused_is_told_in_plain_words(tmp_path, words, content):
    path = tmp_path / "a"
    if content is None:
        os.mkfifo(path)
    elif isinstance(content, dict):
        dicom(path, [[1, 2], [3, 4]], **content)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: .*{words}"):
        read_image(path)


def test_files_of_pydicom():
    """Odd files of real devices: a picture or a DataError that begins with the path, nothing else."""
    pictures = []
    for path in sorted((Path(pydicom.__file__).parent / "data").rglob("*.dcm")):
        try:
            pictures.append(shown(path))
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
    assert len(pictures) > 40
    assert all(0 <= p.min() < p.max() <= 1.000001 for p in pictures)


def test_crop_takes_the_middle_square_pad_keeps_all_and_squash_the_proportions_not():
    picture = np.zeros((4, 12), np.uint8)
    picture[:, 4:8] = 255  # the middle square
    assert (resize(picture, 8, "crop") == 255).all()
    padded = resize(picture, 12, "pad")
    assert (padded[4:8] == picture).all() and padded[:4].max() == padded[8:].max() == 0
    assert (resize(picture, 12, "squash") == picture[:1]).all()
    wide = np.zeros((5, 8), np.uint8)
    wide[:, 1:6] = noise("middle", 5, 5)  # as MedMNIST cuts: the short side from the middle
    for picture in (wide, wide.T):
        middle = picture[:5, 1:6] if picture is wide else picture[1:6, :5]
        assert (resize(picture, 5, "crop") == middle).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_bytes_and_floats_are_resized_alike_and_rounded_once(fit):
    levels = noise("levels", 90, 70)
    floats = resize(levels.astype(np.float32) / 255, 31, fit)
    assert (resize(levels, 31, fit) != floats).mean() < 0.001
    rounded = Image.fromarray(levels).resize((31, 31), Image.Resampling.BILINEAR)
    assert fit != "squash" or (np.asarray(rounded) != floats).mean() > 0.01  # what is not done
    assert resize(np.eye(64, dtype=np.float32), 8, fit).max() < 64  # thin lines grow faint
