"""The X-ray reader on files as scanners, archives and phones write them: the right picture or plain words.

`RAMP` is 24 rows of 0, 100, ..., 3100; a window of 0..3100 shows it as RAMP / 3100. Every file is written by
its test, most of them with one attribute that real files have and the standard does not want.
"""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

from classification import preprocess
from classification.eval import load_image
from classification.preprocess import (
    DataError,
    count_pixels,
    decode_gray_jpeg,
    find_images,
    image_kind,
    percentiles,
    read_image,
)
from tests.conftest import read_table
from tests.test_preprocess import dicom, shown

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom|PIL")
RAMP = np.tile(np.arange(32, dtype=np.uint16) * 100, (24, 1))
SHOWN = RAMP / 3100
WINDOW = {"WindowCenter": 1550.5, "WindowWidth": 3101}  # LINEAR: 0 is black, 3100 is white
SIXTEEN = {"BitsStored": 16, "HighBit": 15}


def element(keyword: str, vr: str, value: object) -> pydicom.DataElement:
    """An element with a VR that pydicom would not choose."""
    return pydicom.DataElement(pydicom.datadict.tag_for_keyword(keyword), vr, value)


def lut(
    descriptor: list[int], data: object, vr: str = "US", first_vr: str = "US"
) -> pydicom.Sequence:
    """A LUT sequence of one item: descriptor = entries, first input, bits."""
    item = pydicom.Dataset()
    item.add(element("LUTDescriptor", first_vr, descriptor))
    item.add(element("LUTData", vr, data))
    return pydicom.Sequence([item])


def replace(path: Path, old: bytes, new: bytes) -> Path:
    """Overwrite bytes of a file: for values that pydicom refuses to write."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def assert_shows(path: Path, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(shown(path), expected, atol=tolerance)


PADDED = RAMP.copy()
PADDED[:4] = 65535
SIGNED = RAMP.astype(np.int16) - 1500
SIGNED[:4] = -2000
IN_RANGE = np.where(PADDED == 65535, 0, SHOWN)
STRETCHED = ((RAMP - np.percentile(RAMP, 0.5)) / np.ptp(np.percentile(RAMP, (0.5, 99.5)))).clip(
    0, 1
)
SQUARES = np.arange(4096) ** 2 // 4096  # 0..4094
WORDS = SQUARES.astype("<u2").tobytes()


@pytest.mark.parametrize("pixels, expected, header", [
    # the padding value has the VR "US or SS": the same bits, with the sign of the pixels
    (PADDED, IN_RANGE, {**WINDOW, **SIXTEEN, "a": element("PixelPaddingValue", "SS", -1)}),
    (PADDED, IN_RANGE, {**WINDOW, **SIXTEEN, "a": element("PixelPaddingValue", "US", 65535)}),
    (SIGNED, np.where(SIGNED == -2000, 0, 1 - SHOWN),
     {**SIXTEEN, "WindowCenter": 50.5, "WindowWidth": 3101, "PhotometricInterpretation": "MONOCHROME1",
      "a": element("PixelPaddingValue", "US", 63536)}),
    (PADDED, IN_RANGE, {**WINDOW, **SIXTEEN, "a": element("PixelPaddingValue", "SS", -9),
                        "b": element("PixelPaddingRangeLimit", "SS", -1)}),
    (PADDED, IN_RANGE, {**WINDOW, **SIXTEEN, "PixelPaddingValue": 65535, "PixelPaddingRangeLimit": None}),
    (PADDED, np.where(PADDED == 65535, 0, SHOWN), {**WINDOW, "PixelPaddingValue": 65535}),  # 12 bits of 16
    # bits that are no image, and bits that are further left
    (RAMP | 0xF000, SHOWN, WINDOW),
    (RAMP * 16, SHOWN, {**WINDOW, "HighBit": 15}),
    (RAMP * 4 + 1, SHOWN, {**WINDOW, "HighBit": 13}),
    (SIGNED[4:] * 16, SHOWN[4:], {"HighBit": 15, "WindowCenter": 50.5, "WindowWidth": 3101}),
    (RAMP, SHOWN, {**WINDOW, "HighBit": None}),
    # what is optional and empty or no number is absent
    (RAMP, SHOWN, {**WINDOW, "RescaleSlope": None, "RescaleIntercept": None}),
    (RAMP, SHOWN, {**WINDOW, "RescaleSlope": "2", "WindowCenter": 3100.5, "WindowWidth": 6201,
                   "RescaleIntercept": None}),
    (RAMP, SHOWN, {**WINDOW, "VOILUTSequence": lut(None, None)}),
    (RAMP, SHOWN, {**WINDOW, "VOILUTSequence": pydicom.Sequence([pydicom.Dataset()])}),
    (RAMP, SHOWN, {**WINDOW, "ModalityLUTSequence": lut(None, None)}),
    (RAMP, SHOWN, {**WINDOW, "VOILUTFunction": "linear "}),
    (RAMP, STRETCHED, {"WindowCenter": ["", "5"], "WindowWidth": ["", "9"]}),
    (RAMP, STRETCHED, {"WindowCenter": 5, "WindowWidth": None}),
    # lookup tables as they are found
    (RAMP, SQUARES[RAMP] / 4094, {"VOILUTSequence": lut([4096, 0, 12], SQUARES.tolist())}),
    (RAMP, SQUARES[RAMP] / 4094, {"VOILUTSequence": lut([4096, 0, 12], WORDS, "OW")}),
    (RAMP, SQUARES[RAMP] / 4094, {"VOILUTSequence": lut([4096, 0, 12], WORDS, "UN")}),
    (RAMP, SQUARES[RAMP] / 4094, {"VOILUTSequence": lut([4097, 0, 12], SQUARES.tolist())}),  # one short
    (RAMP, (SQUARES[RAMP] >> 4) / 255,
     {"VOILUTSequence": lut([4096, 0, 8], (SQUARES >> 4).astype("u1").tobytes(), "OW")}),  # two a word
    (RAMP, (SQUARES[RAMP] >> 4) / 255,
     {"VOILUTSequence": lut([4096, 0, 8], (SQUARES >> 4).astype("u1").view("<u2").tolist())}),
    (RAMP, SHOWN, {**WINDOW, "VOILUTSequence": lut([4096, 0, 12], SQUARES[:99].tolist())}),  # far too short
    (RAMP, SQUARES[RAMP] / 4094, {"ModalityLUTSequence": lut([4096, 0, 12], SQUARES.tolist()),
                                  "WindowCenter": 2047.5, "WindowWidth": 4095}),
    (SIGNED[4:], SQUARES[RAMP[4:]] / SQUARES[3100],
     {"VOILUTSequence": lut([3101, 64036, 12], SQUARES[:3101].tolist())}),  # first input -1500, written as US
    (RAMP, SQUARES[RAMP] / 4094, {"RescaleIntercept": -1500, "RescaleSlope": 1,
                                  "VOILUTSequence": lut([4096, 64036, 12], SQUARES.tolist())}),
    # a table that falls and rises: its range is that of all entries, not of the two ends
    (np.uint8(RAMP // 16), np.abs(RAMP // 16 - 100.0) / 155,
     {"ModalityLUTSequence": lut([256, 0, 8], np.abs(np.arange(256) - 100).tolist())}),
    (RAMP, 1 - SHOWN, {**WINDOW, "PhotometricInterpretation": " monochrome1"}),
])  # fmt: skip
def test_gray_dicom(tmp_path, pixels, expected, header):
    assert_shows(dicom(tmp_path / "a.dcm", pixels, **header), expected)


@pytest.mark.parametrize(
    "center, width", [("1550,5", "3101,0"), ("mittel", "breit!"), ("      ", "      ")]
)
def test_a_window_that_is_no_number_is_passed_over_with_a_note(tmp_path, center, width):
    path = dicom(tmp_path / "a.dcm", RAMP, WindowCenter="1550.5", WindowWidth="3101.0")
    replace(path, b"1550.5", center.encode())
    replace(path, b"3101.0", width.encode())
    assert_shows(path, STRETCHED)
    assert center.strip() == "" or read_image(path).notes == (
        "window passed over: no number, or too narrow",
    )


@pytest.mark.parametrize("written, spacing", [
    ("0.143\\0.144", (0.143, 0.144)),
    ("0,143\\0,144", ()), ("0.143000000", ()), ("abc\\defghij", ()), ("0.0\\0.00000", ()),
    ("-0.1\\-0.100", ()), ("0.1\\0.1\\0.1", ()), ("    \\      ", ()), ("1e9\\1000000", ()),
    ("0.143\\     ", ()), ("nan\\nan    ", ()),
])  # fmt: skip
def test_pixel_spacing_is_two_lengths_or_absent(tmp_path, written, spacing):
    path = dicom(tmp_path / "a.dcm", RAMP, PixelSpacing=[0.143, 0.144], **WINDOW)
    replace(path, b"0.143\\0.144", written.encode())
    picture = read_image(path)
    assert picture.spacing == spacing
    np.testing.assert_allclose(shown(path), SHOWN, atol=1e-6)


def test_spacing_at_the_detector_stands_in_for_an_unusable_one(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, PixelSpacing=[0, 0], ImagerPixelSpacing=[0.2, 0.1])
    assert read_image(path).spacing == (0.2, 0.1)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_high_bit_of_a_jpeg_2000_stream_are_no_image(tmp_path, signed):
    values = SIGNED[4:] if signed else RAMP
    stored = (values.astype(np.uint16) & 0x0FFF) | np.where(np.arange(32) % 2, 0x5000, 0).astype(
        np.uint16
    )
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "JPEG2000", no_jp2=True, irreversible=False)
    ds = pydicom.dcmread(
        dicom(tmp_path / "a.dcm", values, WindowCenter=1550.5 - 1500 * signed, WindowWidth=3101)
    )
    ds.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds["PixelData"].VR = "OB"
    ds.HighBit = 15  # of a compressed image: ignored
    ds.save_as(tmp_path / "a.dcm")
    assert_shows(tmp_path / "a.dcm", SHOWN[4:] if signed else SHOWN)


@pytest.mark.parametrize("bits, scale", [(8, 1), (16, 257), (16, 1)])
def test_palette_colour(tmp_path, bits, scale):
    red, green, blue = np.uint16([[0, 50, 100, 9], [0, 50, 200, 9], [0, 50, 250, 9]]) * scale
    header = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in (("Red", red), ("Green", green), ("Blue", blue)):
        header[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        header[f"{name}PaletteColorLookupTableData"] = entries.astype(
            "u1" if bits == 8 else "<u2"
        ).tobytes()
    path = dicom(tmp_path / "a.dcm", np.uint8([[0, 1, 2, 1]]), **header)
    assert_shows(path, [[0, 50 / 255, (0.299 * 100 + 0.587 * 200 + 0.114 * 250) / 255, 50 / 255]])
    assert read_image(path).notes == ("colour turned gray",)


def test_dicom_without_preamble_or_meta_header(tmp_path):
    ds = pydicom.dcmread(dicom(tmp_path / "whole.dcm", RAMP, **WINDOW))
    whole = (tmp_path / "whole.dcm").read_bytes()
    for name, implicit, little in (("i", True, True), ("e", False, True), ("b", False, False)):
        if name == "b":
            ds["PixelData"].value = RAMP.astype(">u2").tobytes()
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_implicit_VR = implicit
        buffer.is_little_endian = little
        pydicom.filewriter.write_dataset(buffer, ds.copy())
        (tmp_path / name).write_bytes(buffer.getvalue())
        assert_shows(tmp_path / name, SHOWN)
    (tmp_path / "prefix").write_bytes(whole[128:])  # begins with DICM
    (tmp_path / "meta").write_bytes(whole[132:])  # begins with the meta header
    (tmp_path / "no_meta").write_bytes(bytes(128) + b"DICM" + (tmp_path / "e").read_bytes())
    assert_shows(tmp_path / "no_meta", SHOWN)
    assert_shows(tmp_path / "prefix", SHOWN)
    assert_shows(tmp_path / "meta", SHOWN)


# --- pictures ---

GRAY = np.uint8([[0, 51, 102], [153, 204, 255]])
TURNS = {1: GRAY, 2: GRAY[:, ::-1], 3: GRAY[::-1, ::-1], 4: GRAY[::-1],
         5: GRAY.T, 6: np.rot90(GRAY, -1), 7: np.rot90(GRAY, 2).T, 8: np.rot90(GRAY)}  # fmt: skip


def png(path: Path, samples: np.ndarray, chunks: dict[bytes, bytes] | None = None) -> Path:
    """A 16-bit PNG of 1 to 4 channels, by the bytes: Pillow writes gray alone with 16 bits."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in {
        b"IHDR": header,
        **(chunks or {}),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }.items():
        data += struct.pack(">I", len(content)) + name + content
        data += struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)
    return path


def tiff(
    path: Path,
    samples: np.ndarray,
    order: str = "<",
    planar: bool = False,
    strip: bytes = b"",
    **tags: int,
) -> Path:
    """A TIFF of (H, W, C) by the bytes, uncompressed or with this one strip; tags as tTAG=value."""
    height, width, channels = samples.shape
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    stored = samples.astype(samples.dtype.newbyteorder(order))
    stored = strip or (stored.transpose(2, 0, 1).tobytes() if planar else stored.tobytes())
    strips = channels if planar else 1
    entries = {256: [width], 257: [height], 258: [samples.itemsize * 8] * channels, 259: [1],
               262: [2 if channels > 2 else 1], 273: [8 + len(stored) // strips * k for k in range(strips)],
               277: [channels], 278: [height], 279: [len(stored) // strips] * strips, 284: [1 + planar],
               339: [kind] * channels} | {int(tag[1:]): [value] for tag, value in tags.items()}  # fmt: skip
    if channels in (2, 4):
        entries[338] = [2]
    start = 8 + len(stored)
    extra = start + 2 + 12 * len(entries) + 4
    directory = struct.pack(f"{order}H", len(entries))
    tail = b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, tail = struct.pack(f"{order}I", extra + len(tail)), tail + packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(magic + struct.pack(f"{order}I", start) + stored + directory + bytes(4) + tail)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "tiff"])
def test_pictures_are_turned_as_every_viewer_shows_them(tmp_path, suffix, orientation):
    big = np.kron(GRAY, np.ones((8, 8), np.uint8))  # blocks as large as JPEG's
    shown = np.kron(TURNS[orientation], np.ones((8, 8), np.uint8))
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tiff(path, big[..., None], t274=orientation)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(big).save(path, exif=exif, quality=95)
    assert_shows(path, shown / 255, 0.02)


DEEP = RAMP[..., None]  # 12 of 16 bits
COLOURS = np.concatenate([DEEP, DEEP // 2, DEEP // 4], 2)  # its luma is a multiple of RAMP
OPAQUE = np.full_like(DEEP, 65535)


@pytest.mark.parametrize("name, samples, options", [
    ("gray.png", DEEP, {}), ("rgb.png", COLOURS, {}), ("la.png", np.concatenate([DEEP, OPAQUE], 2), {}),
    ("rgba.png", np.concatenate([COLOURS, OPAQUE], 2), {}),
    ("gray.tif", DEEP, {}), ("rgb.tif", COLOURS, {}), ("big.tif", COLOURS, {"order": ">"}),
    ("planar.tif", COLOURS, {"planar": True}), ("rgba.tif", np.concatenate([COLOURS, OPAQUE], 2), {}),
    ("int8.tif", (DEEP // 16 - 97).astype(np.int8), {}), ("int16.tif", DEEP.astype(np.int16) - 1000, {}),
    ("uint32.tif", DEEP.astype(np.uint32) * 1000000, {}), ("float32.tif", DEEP.astype(np.float32), {}),
])  # fmt: skip
def test_no_bit_is_lost_before_the_range_is_looked_at(tmp_path, name, samples, options):
    write = png if name.endswith("png") else tiff
    assert_shows(
        write(tmp_path / name, samples, **options), STRETCHED, 0.006
    )  # int8 has 194 levels
    assert ("colour turned gray" in read_image(tmp_path / name).notes) == (
        "rgb" in name or samples is COLOURS
    )


def test_deep_colour_is_turned_too(tmp_path):
    turned = np.rot90(STRETCHED, -1)
    assert_shows(tiff(tmp_path / "a.tif", COLOURS, t274=6), turned, 0.001)
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 3, 1, 6) + bytes(4)
    assert_shows(png(tmp_path / "a.png", COLOURS, {b"eXIf": exif}), turned, 0.001)


def test_deep_colour_in_a_compressed_tiff_is_read_whole(tmp_path):
    tiff(tmp_path / "a.tif", COLOURS, t259=8, strip=zlib.compress(COLOURS.astype("<u2").tobytes()))
    assert_shows(tmp_path / "a.tif", STRETCHED, 0.001)


def test_previews_behind_a_picture_are_passed_over(tmp_path):
    picture, preview = (
        Image.fromarray(np.kron(GRAY, np.ones((8, 8), np.uint8))),
        Image.new("L", (4, 4)),
    )
    picture.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview], quality=95)
    assert_shows(tmp_path / "phone.jpg", np.asarray(picture) / 255, 0.02)
    preview.encoderinfo, preview.encoderconfig = {"tiffinfo": {254: 1}}, ()
    picture.save(tmp_path / "scan.tif", save_all=True, append_images=[preview])
    assert_shows(tmp_path / "scan.tif", np.asarray(picture) / 255)


def test_a_gray_picture_saved_as_colour_has_no_note(tmp_path):
    gray = Image.fromarray(np.tile(np.uint8(RAMP[0] // 13), (24, 1)))
    for name in ("a.png", "a.jpg", "a.tif"):
        gray.convert("RGB").save(tmp_path / name)
        assert read_image(tmp_path / name).notes == ()
    Image.merge("RGB", [gray, gray, gray.point(lambda v: v // 2)]).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").notes == ("colour turned gray",)


# --- what a file is ---


def test_files_are_known_by_their_content(tmp_path):
    dicom(tmp_path / "IM0001", RAMP)
    dicom(tmp_path / "a.dicom", RAMP)
    dicom(tmp_path / "b.img", RAMP)
    dicom(tmp_path / "DICOMDIR", RAMP)
    dicom(tmp_path / "c.png", RAMP)
    Image.fromarray(GRAY).save(tmp_path / "d.jfif", "JPEG")
    for name in (".DS_Store", "._a.dcm", ".hidden/a.dcm", "notes", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("2 of 3")
    assert [path.name for path in find_images(tmp_path)] == [
        "IM0001",
        "a.dicom",
        "b.img",
        "c.png",
        "d.jfif",
    ]
    assert [image_kind(path) for path in find_images(tmp_path)] == ["DICOM"] * 4 + ["JPEG"]
    assert_shows(tmp_path / "c.png", STRETCHED)


@pytest.mark.parametrize("name, content, words", [
    ("a.dcm", "JPEG", "holds a JPEG picture, not DICOM: rename it to .jpeg"),
    ("a.DCM", "PNG", "holds a PNG picture, not DICOM: rename it to .png"),
    ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "neither DICOM nor JPEG, PNG or TIFF"),
    ("a.dcm", b"patient,label\n1,0\n", "neither DICOM nor JPEG, PNG or TIFF"),
    ("a.jpg", b"", "zero bytes"),
    ("a.tif", b"II*\0" + bytes(99), "a TIFF picture that Pillow cannot read"),
])  # fmt: skip
def test_what_is_no_image_is_told_in_plain_words(tmp_path, name, content, words):
    if isinstance(content, str):
        Image.fromarray(GRAY).save(tmp_path / name, content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path / name}: {words}"):
        read_image(tmp_path / name)
    with pytest.raises(DataError, match="not a file"):
        read_image(tmp_path)


def test_the_hash_of_the_stored_pixels_does_not_depend_on_the_file(tmp_path):
    a = read_image(dicom(tmp_path / "a.dcm", RAMP))
    b = read_image(dicom(tmp_path / "b", RAMP, **WINDOW))
    assert a.notes == b.notes == ()
    assert a.digest == b.digest == hashlib.sha256(b"(24, 32)" + RAMP.tobytes()).hexdigest()


def test_the_hash_does_not_depend_on_the_byte_order(tmp_path):
    deep = np.arange(768, dtype=np.uint16).reshape(24, 32) * 80
    digests = set()
    for order in "<>":
        ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", deep, **WINDOW))
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit = 15
        ds.PixelData = deep.astype(f"{order}u2").tobytes()
        if order == ">":
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        path = tmp_path / f"{order}.dcm"
        pydicom.dcmwrite(path, ds, little_endian=order == "<", implicit_vr=False)
        digests.add(read_image(path).digest)
    assert len(digests) == 1


def test_signed_values_are_looked_up_with_their_sign(tmp_path):
    signed = np.array([[-2048, -1, 0, 2047]], np.int16)
    header = {"PixelRepresentation": 1, "BitsStored": 12, "HighBit": 11, "BitsAllocated": 16}
    window = {"WindowCenter": 0, "WindowWidth": 4096, "VOILUTFunction": "LINEAR_EXACT"}
    path = dicom(tmp_path / "a.dcm", signed, **header, **window)
    expected = [[0, 2047 / 4096, 0.5, 4095 / 4096]]
    np.testing.assert_allclose(shown(path), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 199, 200, 201, 60_000])
def test_percentiles_are_those_of_numpy_to_the_last_bit(size):
    rng = np.random.default_rng(size)
    for pixels in (
        rng.integers(-2000, 2000, size).astype(np.int16),
        rng.integers(0, 65536, size).astype(np.uint16),
        rng.integers(0, 3, size).astype(np.uint8),
    ):
        numbers, counts = count_pixels(pixels[None])
        for percents in ((0.5, 99.5), (99.5, 0.5)):
            expected = np.percentile(pixels, percents).tolist()
            assert percentiles(numbers, counts, percents).tolist() == expected
        falling = -0.3 * numbers + 7  # as a modality LUT may fall
        expected = np.percentile(-0.3 * pixels + 7, percents).tolist()
        assert percentiles(falling, counts, percents).tolist() == expected


def gray_jpeg(path: Path, pixels: np.ndarray, **header: object) -> pydicom.Dataset:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    ds = pydicom.dcmread(dicom(path, pixels.astype(np.uint16)))
    ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = encapsulate([stream.getvalue()])
    ds["PixelData"].VR = "OB"
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    return ds


def test_gray_jpeg_is_decoded_as_pydicom_does_by_pillow_or_left_to_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32)).astype(np.uint8)
    ds = gray_jpeg(tmp_path / "a.dcm", pixels)
    expected = pydicom.pixels.pixel_array(ds, decoding_plugin="pillow")
    assert np.array_equal(decode_gray_jpeg(ds), expected)
    assert decode_gray_jpeg(gray_jpeg(tmp_path / "a.dcm", pixels, Rows=23)) is None
    assert decode_gray_jpeg(gray_jpeg(tmp_path / "a.dcm", pixels, PixelRepresentation=1)) is None
    colour = gray_jpeg(tmp_path / "a.dcm", pixels)
    stream = io.BytesIO()
    Image.new("RGB", (32, 24)).save(stream, "JPEG")
    colour.PixelData = encapsulate([stream.getvalue()])
    assert decode_gray_jpeg(colour) is None
    for damaged in (encapsulate([b"\xff\xd8\xff nothing"]), b"nothing"):
        ds.PixelData = damaged
        assert decode_gray_jpeg(ds) is None


def test_fast_decode_is_near_the_full_path_and_eval_does_the_same(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        x, y = np.mgrid[:256, :256] / 40
        shape = 128 + 60 * np.sin(x + k) * np.cos(y) + rng.normal(0, 2, (256, 256))
        folder = tmp_path / "raw" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = shape.clip(0, 255).astype(np.uint8)
        ds = gray_jpeg(folder / f"{k}.dcm", pixels, PatientID=f"p{k}")
        if k == 5:
            ds.add(element("PixelPaddingValue", "US", 0))
        ds.save_as(folder / f"{k}.dcm")
    images = {}
    for size in (128, 129):
        for options in ([], ["--fast-decode"]):
            cache = tmp_path / f"cache{size}{len(options)}"
            command = ["--data", tmp_path / "raw", "--out", cache, "--size", size, *options]
            preprocess.main([str(word) for word in command])
            images[size, len(options)] = np.load(cache / "images.npy").astype(float)
    apart = np.sqrt(np.square(images[128, 1] - images[128, 0]).mean((1, 2)))  # gray levels
    sources = [row["source"] for row in read_table(tmp_path / "cache1281" / "index.csv")]
    padded = sources.index("b/5.dcm")
    assert apart[padded] == 0 and np.delete(apart, padded).min() > 0 and apart.max() < 0.6
    assert np.array_equal(images[129, 1], images[129, 0])  # half would be less than 129

    fast = tmp_path / "cache1281"
    meta = preprocess.read_meta(fast)
    assert meta["fast_decode"] is True
    assert "fast_decode" not in preprocess.read_meta(tmp_path / "cache1280")
    image, _ = load_image(tmp_path / "raw" / "a" / "0.dcm", meta)
    assert np.array_equal(image[0], images[128, 1][sources.index("a/0.dcm")])
    command = ["--data", tmp_path / "raw", "--out", tmp_path / "other", "--like", fast]
    preprocess.main([str(word) for word in command])
    assert np.array_equal(np.load(tmp_path / "other" / "images.npy"), np.load(fast / "images.npy"))
    assert preprocess.read_meta(tmp_path / "other")["fast_decode"] is True
