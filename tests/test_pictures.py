"""Pictures of every mode become the RGB that a viewer shows."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from flashdiff.components import Size
from flashdiff.distill.sources import decoded, fitted, image_size, opened_rgb
from flashdiff.evaluation.images import read_images
from flashdiff.pictures import to_rgb
from flashdiff.server.images import control_request, decode_image, readers

SIZE = Size(8, 8)
STROKES = np.zeros((8, 8), dtype=np.uint8)
STROKES[2:4] = 255


def _file(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_16(values: np.ndarray, color_type: int, *transparent: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write for color."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return _png(values.shape[:2], 16, color_type, lines, *transparent)


def _png(shape: tuple[int, ...], depth: int, color_type: int, lines: bytes, *transparent: int) -> bytes:
    """With `transparent`, the level or color that is."""
    height, width = shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    see_through = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    body = see_through + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def _all(color: tuple[int, int, int]) -> np.ndarray:
    return np.full((8, 8, 3), color, dtype=np.uint8)


def _palette_with_transparency() -> bytes:
    picture = Image.new("P", SIZE, 0)
    picture.putpalette([200, 10, 10, 0, 0, 0])
    return _file(picture, transparency=0)


@pytest.mark.parametrize(
    ("file", "color"),
    [
        (_png_16(np.full((8, 8), 32896), 0), (128, 128, 128)),  # 16-bit grey
        (_png_16(np.full((8, 8), 65535), 0), (255, 255, 255)),
        (_png_16(np.full((8, 8), 127), 0), (0, 0, 0)),
        (_png_16(np.full((8, 8, 3), (65535, 32896, 0)), 2), (255, 128, 0)),
        (_png_16(np.full((8, 8, 4), (65535, 0, 0, 0)), 6), (255, 255, 255)),  # red, and transparent
        (_png_16(np.full((8, 8, 2), (0, 0)), 4), (255, 255, 255)),
        (_file(Image.new("RGBA", SIZE, (200, 10, 10, 0))), (255, 255, 255)),
        (_file(Image.new("RGBA", SIZE, (0, 0, 0, 128))), (127, 127, 127)),
        (_file(Image.new("RGBA", SIZE, (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
        (_file(Image.new("LA", SIZE, (0, 0))), (255, 255, 255)),
        (_palette_with_transparency(), (255, 255, 255)),
        (_file(Image.new("RGB", SIZE, (200, 10, 10)), transparency=(200, 10, 10)), (255, 255, 255)),
        (_file(Image.new("L", SIZE, 7), transparency=7), (255, 255, 255)),
        (_png_16(np.full((8, 8), 32896), 0, 32896), (255, 255, 255)),
        (_png_16(np.full((8, 8), 32896), 0, 32897), (128, 128, 128)),
        (_png_16(np.full((8, 8, 3), (32896, 16448, 0)), 2, 32896, 16448, 0), (255, 255, 255)),
        (_png_16(np.full((8, 8, 3), (32896, 16448, 0)), 2, 128, 16448, 0), (128, 64, 0)),  # the same low byte alone
        (_png((8, 8), 2, 0, b"\0\xaa\xaa" * 8, 2), (255, 255, 255)),  # four levels, the third transparent
        (_png((8, 8), 4, 0, b"\0\x88\x88\x88\x88" * 8, 8), (255, 255, 255)),
        (_png((8, 8), 4, 0, b"\0\x88\x88\x88\x88" * 8, 7), (136, 136, 136)),
        (_file(Image.new("1", SIZE, 1)), (255, 255, 255)),
        (_file(Image.new("L", SIZE, 90)), (90, 90, 90)),
        (_file(Image.new("CMYK", SIZE, (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        (_file(Image.new("CMYK", SIZE, (0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
    ],
)  # fmt: skip
def test_all_readers_see_what_a_viewer_shows(file: bytes, color: tuple[int, int, int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file)
    (evaluated,) = read_images(tmp_path).pixels
    for pixels in (decode_image(file, SIZE), decoded(file, SIZE), evaluated):
        np.testing.assert_allclose(pixels.astype(int), _all(color), atol=1)


@pytest.mark.parametrize(
    "strokes",
    [
        _file(Image.fromarray(np.dstack([np.full((8, 8, 3), 255), STROKES]).astype(np.uint8))),
        _file(Image.fromarray(np.dstack([np.full((8, 8), 255), STROKES]).astype(np.uint8), "LA"), "WEBP", lossless=True),
        _png_16(np.where(STROKES > 0, 65535, 7), 0, 7),
    ],
)
def test_white_strokes_on_a_transparent_canvas_are_a_mask_and_a_control(strokes: bytes) -> None:
    """As where a page draws a mask: stock pipelines read what a canvas stores behind transparency, which is black."""
    wanted = np.repeat(STROKES[:, :, None], 3, 2)
    steered = control_request("edges", strokes).image
    assert steered
    for pixels in (readers({"mask": strokes})["mask"](SIZE), steered(SIZE), fitted(opened_rgb(strokes, "black"), SIZE)):
        np.testing.assert_array_equal(pixels, wanted)
    np.testing.assert_array_equal(readers({"image": strokes})["image"](SIZE), 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_readers_turn_a_picture_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = _file(picture, kind, exif=exif)
    (tmp_path / "a.png").write_bytes(file)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    size = Size(expected.shape[1], expected.shape[0])
    assert image_size(file) == size
    for pixels in (decode_image(file, size), decoded(file, size), read_images(tmp_path).pixels[0]):
        np.testing.assert_array_equal(pixels, expected)


def test_all_readers_take_the_first_of_several_pictures_without_the_work_of_the_others(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", SIZE, color) for color in ("red", "blue", "green")]
    file = _file(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    (tmp_path / "a.jpg").write_bytes(file)
    for pixels in (decode_image(file, SIZE), decoded(file, SIZE), read_images(tmp_path).pixels[0]):
        np.testing.assert_allclose(pixels.astype(int), _all((255, 0, 0)), atol=3)


def test_every_level_of_16_bits_is_the_nearest_of_8() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    ours = np.asarray(to_rgb(Image.open(io.BytesIO(_png_16(levels, 0)))))[..., 0]
    np.testing.assert_array_equal(ours, np.round(levels / 257).astype(np.uint8))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", SIZE))
