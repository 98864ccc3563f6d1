"""What a decoded picture of any mode is in RGB: the same for a server, for training and for evaluation."""

import numpy as np
from PIL import Image

_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Modes of 16-bit grey; Pillow opens such a PNG as "I" or as "I;16", by its version."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB.

    Transparent parts are put on white: what is stored behind them is not meant to be seen. 16 bits are scaled to 8, which
    Pillow would cut off. ValueError for floating-point pixels, whose range is not known.
    """
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if picture.mode in _GREY_16:
        levels = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
