"""Pictures out of PNG, JPEG and WebP files: the same for a server, for training and for evaluation."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashdiff.components import Size
from flashdiff.picture_files import cut_down

Background = Literal["white", "black"]
"""What is seen where a picture is transparent: white, as a page shows it; black, where a mask or a control has nothing."""

MAX_PIXELS = 16_384 * 16_384
"""Of a picture in a file of one's own."""

# What turns a picture upright, by EXIF's orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)  # upright, width and height change places
_MOST_SIDES = 16  # of a scaled picture's longer side
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Modes of 16-bit grey; Pillow opens such a PNG as "I" or as "I;16", by its version."""


def to_rgb(picture: Image.Image, behind: Background = "white") -> Image.Image:
    """The picture in 8-bit RGB.

    Transparent parts are put on the color `behind` them: what is stored there is not meant to be seen. 16 bits are scaled
    to 8, which Pillow would cut off. ValueError for floating-point pixels, whose range is not known.
    """
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if picture.mode in _GREY_16:
        levels = np.asarray(picture).astype(np.int64).clip(0, 65535)
        grey = ((levels + 128) // 257).astype(np.uint8)
        if isinstance(transparent := picture.info.get("transparency"), int):
            grey[levels == transparent] = 255 if behind == "white" else 0
        return Image.fromarray(grey).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, behind), picture).convert("RGB")
    return picture.convert("RGB")


def as_clip_reads(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """An RGB picture as [side, side, 3]: its shorter side scaled to `side` (bicubic), and cropped at the centre.

    Pixel for pixel what transformers' CLIPImageProcessor makes of it before it rescales and normalizes.
    """
    short, long = min(picture.size), int(side * max(picture.size) / min(picture.size))
    is_upright = picture.height >= picture.width
    left, top = (0, (long - side) // 2) if is_upright else ((long - side) // 2, 0)
    if long <= _MOST_SIDES * side:
        scaled = picture.resize((side, long) if is_upright else (long, side), Image.Resampling.BICUBIC)
        return np.array(scaled.crop((left, top, left + side, top + side)))
    # Scaled as a whole, a line of a few pixels would take gigabytes: the part that is kept is scaled alone.
    start = (long - side) // 2 * max(picture.size) / long
    end = start + side * max(picture.size) / long
    box = (0, start, short, end) if is_upright else (start, 0, end, short)
    return np.array(picture.resize((side, side), Image.Resampling.BICUBIC, box=box))


@contextmanager
def opened(file: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The first picture of a file, decoded and upright.

    UnreadableError (a ValueError) for what is no such file or takes too much to decode, Pillow's errors for what is damaged.
    """
    with _header(file, max_pixels) as (image, orientation):
        image.load()
        yield image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def size_of(file: bytes, max_pixels: int = MAX_PIXELS) -> Size:
    """Width and height of the picture, upright, by its header alone; errors as in `opened`."""
    with _header(file, max_pixels) as (image, orientation):
        width, height = image.size
    return Size(height, width) if orientation in _ON_THEIR_SIDE else Size(width, height)


def read_rgb(file: bytes, behind: Background = "white") -> Image.Image:
    """The first picture of a file of one's own, upright, in RGB; errors as in `opened` and `to_rgb`."""
    with opened(file) as image:
        return to_rgb(image, behind)


@contextmanager
def _header(file: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, int]]:
    """The picture before it is decoded, and its orientation."""
    picture = cut_down(file, max_pixels)
    with Image.open(io.BytesIO(picture.file), formats=(picture.format,)) as image:
        picture.check_work(image.width, image.height, max_pixels)
        yield image, picture.orientation
