"""A large picture as overlapping tiles: where they lie, how the picture is cut into them, and how they are blended into one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Size

Picture = NDArray[np.uint8]
"""[H, W, 3]."""

_OVERLAP_SHARE = 8
"""Neighbours share at least one in so many of a tile's cells, along each axis: see docs/tasks.md for what that is good for."""


class Place(NamedTuple):
    """Where a tile begins, in latent cells."""

    top: int
    left: int


ORIGIN = Place(0, 0)
"""Of an image that is no tile."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The tiles of a picture of `size`, row by row; the last ones of each axis may reach over its edge."""

    size: Size
    tile: Size
    factor: int
    """Pixels of a latent cell, along each side: tiles begin between cells, so that those that overlap share their noise."""

    @property
    def places(self) -> list[Place]:
        return [Place(top, left) for top in self._tops for left in self._lefts]

    def cut(self, picture: Picture) -> list[Picture]:
        """The tiles [h, w, 3] of a picture; what lies over its edge is its mirror image."""
        beyond = (
            max(0, self.factor * self._tops[-1] + self.tile.height - self.size.height),
            max(0, self.factor * self._lefts[-1] + self.tile.width - self.size.width),
        )
        if any(beyond):
            picture = np.pad(picture, ((0, beyond[0]), (0, beyond[1]), (0, 0)), mode="symmetric")
        corners = [(self.factor * place.top, self.factor * place.left) for place in self.places]
        return [picture[top : top + self.tile.height, left : left + self.tile.width] for top, left in corners]

    def blend(self, tiles: Sequence[Picture]) -> Picture:
        """The picture of its tiles: where two overlap, the weight of the later one rises evenly from 0 to 1."""
        lefts, tops = ([self.factor * start for start in starts] for starts in (self._lefts, self._tops))
        rows = [tiles[start : start + len(lefts)] for start in range(0, len(tiles), len(lefts))]
        whole = _joined([_joined(row, lefts, axis=1) for row in rows], tops, axis=0)
        return np.ascontiguousarray(whole[: self.size.height, : self.size.width])

    @property
    def _tops(self) -> list[int]:
        return _starts(self.size.height, self.tile.height, self.factor)

    @property
    def _lefts(self) -> list[int]:
        return _starts(self.size.width, self.tile.width, self.factor)


def _starts(length: int, tile: int, factor: int) -> list[int]:
    """Where tiles begin along an axis, in cells: as few as overlap enough, spread evenly."""
    cells, own = -(-length // factor), tile // factor
    if cells <= own:
        return [0]
    gaps = -(-(cells - own) // (own - -(-own // _OVERLAP_SHARE)))
    return [(cells - own) * gap // gaps for gap in range(gaps + 1)]


def _joined(parts: Sequence[Picture], starts: Sequence[int], axis: int) -> Picture:
    """Parts of one size that overlap along an axis as one picture; they begin at these pixels."""
    shape = list(parts[0].shape)
    length, shape[axis] = shape[axis], starts[-1] + shape[axis]
    joined = np.empty(shape, dtype=np.uint8)
    whole, end = joined.swapaxes(0, axis), 0
    for part, start in zip((part.swapaxes(0, axis) for part in parts), starts, strict=True):
        shared = end - start
        if shared > 0:
            whole[start:end] = _faded(whole[start:end], part[:shared])
        whole[end : start + length] = part[shared:]
        end = start + length
    return joined


def _faded(before: Picture, after: Picture) -> Picture:
    """One picture turning into another along the first axis, in weights of 256ths: whole numbers, whose sum is exactly 1."""
    length = len(before)
    rising = ((np.arange(length) + 0.5) * (256 / length)).round().astype(np.uint16)[:, None, None]
    mixed = (256 - rising) * before + rising * after
    return ((mixed + 128) >> 8).astype(np.uint8)
