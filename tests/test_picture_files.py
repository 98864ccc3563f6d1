"""What is decoded of a picture file is bounded, by its bytes and not by what it calls itself."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from flashdiff.components import Size
from flashdiff.errors import RequestError
from flashdiff.picture_files import UnreadableError, cut_down
from flashdiff.pictures import to_rgb
from flashdiff.server.images import MAX_PIXELS, decode_image

SIZE = Size(64, 64)


def _file(name: str, width: int = 60, height: int = 40, mode: str = "RGB", **options: object) -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).convert(mode).save(file, name, **options)
    return file.getvalue()


def _with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def _multi_picture(jpeg: bytes) -> bytes:
    """The JPEG, calling itself the first of two pictures: Pillow opens it as MPO."""
    entry = struct.pack(">IIIHH", 0x030000, 1000, 0, 0, 0)
    tags = struct.pack(">HHI4sHHIIHHII", 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50)
    return _with_segment(jpeg, 0xE2, b"MPF\0MM\0*" + struct.pack(">IH", 8, 3) + tags + bytes(4) + 2 * entry)


def _with_scans(jpeg: bytes, scans: int) -> bytes:
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + (scans - jpeg.count(b"\xff\xda")) * last + jpeg[-2:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_chunks(png: bytes, chunks: bytes) -> bytes:
    return png[:33] + chunks + png[33:]


def _tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    """An EXIF directory of (tag, type, count, value)."""
    packed = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + packed + bytes(4)


def test_a_jpeg_that_calls_itself_a_multi_picture_file_has_the_limits_of_any_other() -> None:
    jpeg = _file("JPEG", progressive=True)
    assert Image.open(io.BytesIO(_multi_picture(jpeg))).format == "MPO"
    np.testing.assert_array_equal(decode_image(_multi_picture(jpeg), SIZE), decode_image(jpeg, SIZE))
    with pytest.raises(RequestError, match="a JPEG may have 100 scans"):
        decode_image(_multi_picture(_with_scans(jpeg, 5010)), SIZE)


def test_scans_count_by_the_pixels_that_they_go_over() -> None:
    small, large = _file("JPEG", progressive=True), _file("JPEG", 4096, 4096, progressive=True)
    assert decode_image(_with_scans(small, 100), SIZE).shape == (64, 64, 3)
    with pytest.raises(RequestError, match="'40 scans of 4096x4096' is not allowed"):
        decode_image(_with_scans(large, 40), SIZE)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_the_picture_is_upright_as_pillow_would_turn_it(name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = _file(name, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    expected = np.asarray(ImageOps.fit(upright, SIZE, Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(decode_image(file, SIZE), expected)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_the_orientation_may_stand_in_xmp(name: str) -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    file = {
        "PNG": lambda: _with_chunks(_file("PNG"), _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        "JPEG": lambda: _with_segment(_file("JPEG"), 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp),
        "WEBP": lambda: _file("WEBP", xmp=xmp),
    }[name]()
    assert cut_down(file, MAX_PIXELS).orientation == 6


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "RGB", {"dpi": (72, 72), "compress_level": 0}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True, "comment": b"x" * 1000, "icc_profile": b"y" * 200_000}),
        ("JPEG", "RGB", {"restart_marker_blocks": 3}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"icc_profile": b"y" * 1000}),
    ],
)
def test_what_is_cut_away_changes_no_pixel(name: str, mode: str, options: dict[str, object]) -> None:
    file = _file(name, mode=mode, **options)
    image = to_rgb(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(decode_image(file, SIZE), ImageOps.fit(image, SIZE, Image.Resampling.LANCZOS))


@pytest.mark.parametrize("name", ["PNG", "WEBP", "MPO"])
def test_of_several_pictures_the_first_is_taken(name: str) -> None:
    file = io.BytesIO()
    others = [Image.new("RGB", (64, 64), color) for color in ("blue", "green")]
    Image.new("RGB", (64, 64), "red").save(file, name, save_all=True, append_images=others)
    seen = decode_image(file.getvalue(), SIZE).astype(int)
    assert np.abs(seen - (255, 0, 0)).max() < 5
    assert name != "MPO" or len(cut_down(file.getvalue(), MAX_PIXELS).file) < len(file.getvalue()) / 2


def test_metadata_is_never_unpacked() -> None:
    """An EXIF directory that names one megabyte 20,000 times would be copied 20,000 times."""
    entries = [(tag, 7, 1_000_000, 8) for tag in range(0x1000, 0x1000 + 20_000)]
    exif = _tiff(entries) + bytes(1_000_000)
    bomb = zlib.compress(bytes(10_000_000))
    texts = _chunk(b"zTXt", b"a\0\0" + bomb) + _chunk(b"iCCP", b"a\0\0" + bomb)
    png = _file("PNG")
    file = _with_chunks(png, _chunk(b"eXIf", exif) + 50 * texts)
    assert cut_down(file, MAX_PIXELS).file == png
    webp = _file("WEBP", exif=exif)
    assert cut_down(webp, MAX_PIXELS).orientation == 1


@pytest.mark.parametrize(
    "file",
    [
        _with_chunks(_file("PNG"), 20_000 * _chunk(b"abCd", b"")),
        _with_chunks(_file("PNG"), 20_000 * _chunk(b"IDAT", b"")),
        _file("JPEG")[:2] + 20_000 * b"\xff\xfe\0\2" + _file("JPEG")[2:],
    ],
    ids=["PNG", "PNG data", "JPEG"],
)
def test_a_file_of_very_many_pieces_is_refused(file: bytes) -> None:
    with pytest.raises(RequestError, match=r"may have 10000 (chunks|segments)"):
        decode_image(file, SIZE)


def test_a_webp_canvas_is_measured_before_it_is_made() -> None:
    header = b"RIFF" + bytes(4) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\xff\x3f\0" + b"\xff\x3f\0"
    with pytest.raises(UnreadableError, match="16384x16384"):
        cut_down(header, MAX_PIXELS)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_any_change_of_a_file_is_read_or_refused(name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rng, valid = random.Random(0), _file(name, exif=exif)
    read = 0
    for number in range(400):
        data = bytearray(valid)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data) if number % 2 else 100)] = rng.randrange(256)
        try:
            read += decode_image(bytes(data[: rng.randrange(len(data)) if number % 5 == 0 else None]), SIZE).shape == (64, 64, 3)
        except RequestError:
            continue
    assert read
