"""Control images of the embedded world: a picture's edges, its silhouette, or itself with less detail, by numpy and PIL alone.

    python -m flashdiff.zoo.control_images edges picture.png edges.png

They read the picture only, so that a render and a generated image are measured alike.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from flashdiff.errors import first_line
from flashdiff.orders import Pixels
from flashdiff.pictures import read_rgb
from flashdiff.reading import MAX_BYTES, read_file

_EDGE = 40.0
"""Levels of 255 that a step must have to be an edge: the shadows of figures have less."""
_FIGURE = 24
"""Levels of 255 by which a figure differs from its background in some channel."""
_FILLED, _REACHED = 255, 128
TILE = "tile"
"""The control whose image is a small picture, enlarged."""


def edges(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The edges [H, W] of a picture [H, W, 3], one pixel wide.

    Sobel's gradient in each channel; of each pixel the channel with the largest counts. A pixel is an edge where that is above
    the threshold and the largest of three along the axis on which the picture changes more.
    """
    levels = np.pad(picture.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    down, across = (_smoothed_difference(levels, axis) for axis in (0, 1))
    channel = np.hypot(down, across).argmax(2)[..., None]
    down, across = (np.take_along_axis(of, channel, 2)[..., 0] for of in (down, across))
    strength = np.hypot(down, across)
    around = np.pad(strength, 1)
    height, width = strength.shape
    is_peak = np.where(
        abs(down) > abs(across),
        (strength > around[:height, 1:-1]) & (strength >= around[2:, 1:-1]),
        (strength > around[1:-1, :width]) & (strength >= around[1:-1, 2:]),
    )
    return is_peak & (strength > _EDGE)


def _smoothed_difference(levels: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Sobel's filter along an axis of padded levels [H + 2, W + 2, C], in levels a step."""
    along = np.moveaxis(levels, axis, 0)
    difference = along[2:] - along[:-2]
    smoothed = (difference[:, :-2] + 2 * difference[:, 1:-1] + difference[:, 2:]) / 4
    return np.moveaxis(smoothed, 0, axis)


def silhouette(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The figure [H, W] of a picture [H, W, 3], without holes and without specks such as stars.

    It is what cannot be reached from the border over pixels of the background's colour: the median of the upper border, which
    no figure fills.
    """
    half = len(picture) // 2
    border = np.concatenate([picture[0], picture[:half, 0], picture[:half, -1]])
    distance = abs(picture.astype(np.float32) - np.median(border, axis=0)).max(2)
    page = Image.fromarray(np.pad((distance > _FIGURE).astype(np.uint8) * _FILLED, 1)).filter(ImageFilter.MedianFilter(3))
    ImageDraw.floodfill(page, (0, 0), _REACHED)
    return np.asarray(page)[1:-1, 1:-1] != _REACHED


def tile(
    picture: Pixels,
    shrink: Image.Resampling = Image.Resampling.LANCZOS,
    enlarge: Image.Resampling = Image.Resampling.BICUBIC,
    noise: NDArray[np.float32] | None = None,
) -> Pixels:
    """What half the size leaves of a picture [H, W, 3] of even sides: it is made small and enlarged again, with these filters.

    `noise` [H / 2, W / 2, 3], in levels of 255, is added to the small picture.
    """
    height, width, _ = picture.shape
    small = Image.fromarray(picture).resize((width // 2, height // 2), shrink)
    if noise is not None:
        small = Image.fromarray((np.asarray(small) + noise).round().clip(0, 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), enlarge))


def _white_on_black(drawn: NDArray[np.bool_]) -> Pixels:
    return drawn[..., None].repeat(3, 2).astype(np.uint8) * 255


CONTROLS: dict[str, Callable[[Pixels], Pixels]] = {
    "edges": lambda picture: _white_on_black(edges(picture)),
    "silhouettes": lambda picture: _white_on_black(silhouette(picture)),
    TILE: tile,
}
"""How a control's image [H, W, 3] is drawn from a picture [H, W, 3], by the control's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("control", choices=tuple(CONTROLS))
    parser.add_argument("picture", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    at_fault = options.picture
    try:
        picture = np.asarray(read_rgb(read_file(options.picture, MAX_BYTES)))
        at_fault = options.out
        Image.fromarray(CONTROLS[options.control](picture)).save(options.out)
    except Exception as error:  # pillow raises many kinds for damaged files and unknown suffixes
        raise SystemExit(f"control_images: error: {at_fault}: {first_line(error)}") from None


if __name__ == "__main__":
    main()
