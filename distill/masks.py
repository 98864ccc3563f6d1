"""Masks that a model for inpainting trains on: boxes, ellipses, strokes of a brush, halves of the image, and all of it.

The mixture is the usual one of such models: LaMa (arXiv 2109.07161) has boxes and strokes; a half is outpainting, and under a
full mask the model draws from the prompt alone.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flashdiff.components import Size
from flashdiff.distill.config import MaskRecipe
from flashdiff.orders import Pixels

_MOST_BOXES, _MOST_STROKES, _MOST_CORNERS = 4, 4, 8
_SIDES, _DIAMETERS = (0.15, 0.6), (0.25, 0.9)
"""Of a box and of an ellipse, as shares of the image's sides."""
_BRUSH, _STRETCH = (0.04, 0.16), (0.05, 0.3)
"""Width of a stroke, and its way from one corner to the next, as shares of the shorter side."""
_TURN = np.pi / 2
_HALF = (0.25, 0.75)
"""Share of the image that is made anew where it is continued beyond an edge."""


def draw_mask(size: Size, cell: int, recipe: MaskRecipe, rng: np.random.Generator) -> Pixels:
    """A mask [H, W, 3], white where the image is made anew, of a kind drawn by its share.

    It covers one latent cell, of `cell` x `cell` pixels, at least.
    """
    kinds = {name: share for name, share in recipe.shares.items() if share}
    weights = np.array(list(kinds.values()))
    kind = rng.choice(list(kinds), p=weights / weights.sum())
    covered = _DRAW[kind](size, cell, rng)
    return np.where(covered[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)


def _boxes(size: Size, cell: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    covered = np.zeros((size.height, size.width), dtype=bool)
    for _ in range(rng.integers(1, _MOST_BOXES + 1)):
        width, height = (_length(rng, side, cell, _SIDES) for side in size)
        left, top = rng.integers(size.width - width + 1), rng.integers(size.height - height + 1)
        covered[top : top + height, left : left + width] = True
    return covered


def _ellipse(size: Size, cell: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """At any angle."""
    radii = [_length(rng, side, 2 * cell, _DIAMETERS) / 2 for side in size]
    x, y = (np.arange(side) - rng.uniform(cell, max(cell, side - cell)) for side in size)
    angle = rng.uniform(0, np.pi)
    along = x[None] * np.cos(angle) + y[:, None] * np.sin(angle)
    across = y[:, None] * np.cos(angle) - x[None] * np.sin(angle)
    covered: NDArray[np.bool_] = (along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1
    return covered


def _strokes(size: Size, cell: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    picture = Image.new("1", size)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, _MOST_STROKES + 1)):
        width, angle = _length(rng, min(size), 2 * cell, _BRUSH), rng.uniform(0, 2 * np.pi)
        corners = [tuple(rng.uniform(cell, max(cell, side - cell)) for side in size)]
        for _ in range(rng.integers(2, _MOST_CORNERS + 1)):
            angle += rng.uniform(-_TURN, _TURN)
            length = min(size) * rng.uniform(*_STRETCH)
            corners.append((corners[-1][0] + length * np.cos(angle), corners[-1][1] + length * np.sin(angle)))
        pen.line(corners, fill=1, width=width)
        for x, y in corners:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
    return np.array(picture)


def _half(size: Size, cell: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """All beyond a straight line, on one of four sides."""
    covered = np.zeros((size.height, size.width), dtype=bool)
    is_wide, is_far = rng.integers(2, size=2)
    lines = covered.T if is_wide else covered
    length = _length(rng, len(lines), cell, _HALF)
    lines[len(lines) - length if is_far else 0 :][:length] = True
    return covered


def _full(size: Size, cell: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    return np.ones((size.height, size.width), dtype=bool)


_DRAW: dict[str, Callable[[Size, int, np.random.Generator], NDArray[np.bool_]]] = {
    "box": _boxes,
    "ellipse": _ellipse,
    "strokes": _strokes,
    "half": _half,
    "full": _full,
}


def _length(rng: np.random.Generator, side: int, least: int, shares: tuple[float, float]) -> int:
    """Pixels of a share of a side, drawn between two, and at least `least` where the side has so many."""
    return min(side, max(least, round(side * rng.uniform(*shares))))
