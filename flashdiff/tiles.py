"""A large picture as overlapping tiles: where they lie, how it or its latents are cut, and how tiles are blended into one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec, Size

Picture = NDArray[np.uint8]
"""[H, W, 3]."""
_Pixels = TypeVar("_Pixels", NDArray[np.uint8], NDArray[np.float32])


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
    overlap: int = 8
    """Neighbours share at least one in so many of a tile's cells, along each axis: docs/tasks.md says what that is good for."""

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

    def cut_latents(self, latents: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The tiles [C, h, w] of a picture's latents, which end where its tiles do."""
        height, width = self.tile.height // self.factor, self.tile.width // self.factor
        return [latents[:, place.top : place.top + height, place.left : place.left + width] for place in self.places]

    def blend(self, tiles: Sequence[_Pixels], first_axis: int = 0) -> _Pixels:
        """The picture of its tiles: where two overlap, the weight of the later one rises evenly from 0 to 1.

        The first axis is the height and the next one the width.
        """
        lefts, tops = ([self.factor * start for start in starts] for starts in (self._lefts, self._tops))
        rows = [tiles[start : start + len(lefts)] for start in range(0, len(tiles), len(lefts))]
        whole = _joined([_joined(row, lefts, first_axis + 1) for row in rows], tops, first_axis)
        inside = (slice(None),) * first_axis + (slice(self.size.height), slice(self.size.width))
        return np.ascontiguousarray(whole[inside])

    @property
    def _tops(self) -> list[int]:
        return self._starts(self.size.height, self.tile.height)

    @property
    def _lefts(self) -> list[int]:
        return self._starts(self.size.width, self.tile.width)

    def _starts(self, length: int, tile: int) -> list[int]:
        """Where tiles begin along an axis, in cells: as few as overlap enough, spread evenly."""
        cells, own = -(-length // self.factor), tile // self.factor
        if cells <= own:
            return [0]
        gaps = -(-(cells - own) // max(1, own - -(-own // self.overlap)))  # a tile of one cell overlaps none
        return [(cells - own) * gap // gaps for gap in range(gaps + 1)]


def decode_tiling(spec: ModelSpec, size: Size) -> Tiling | None:
    """How a model decodes images of a size in tiles; None: at once."""
    tile = spec.decode_size(size)
    return None if tile == size else Tiling(size=size, tile=tile, factor=spec.latent_factor, overlap=4)


def _joined(parts: Sequence[_Pixels], starts: Sequence[int], axis: int) -> _Pixels:
    """Parts of one size that overlap along an axis as one picture; they begin at these pixels."""
    shape = list(parts[0].shape)
    length, shape[axis] = shape[axis], starts[-1] + shape[axis]
    joined = np.empty(shape, dtype=parts[0].dtype)
    whole, end = joined.swapaxes(0, axis), 0
    for part, start in zip((part.swapaxes(0, axis) for part in parts), starts, strict=True):
        shared = end - start
        if shared > 0:
            whole[start:end] = _faded(whole[start:end], part[:shared])
        whole[end : start + length] = part[shared:]
        end = start + length
    return joined


def _faded(before: _Pixels, after: _Pixels) -> _Pixels:
    """One picture turning into another along the first axis, in weights of 256ths: whole numbers, whose sum is exactly 1."""
    length, is_whole = len(before), before.dtype == np.uint8
    rising = ((np.arange(length) + 0.5) * (256 / length)).round()[:, None, None]
    weights: Any = rising.astype(np.uint16 if is_whole else np.float32)
    mixed = (256 - weights) * before + weights * after
    faded: _Pixels = ((mixed + 128) >> 8).astype(np.uint8) if is_whole else mixed / np.float32(256)
    return faded


def tiles_at_once(tiling: Tiling, images: int, max_batch: int) -> int:
    """How many tiles of so many images are decoded in a call: never more pixels than the images have, or tiles would save no
    memory."""
    (tile_width, tile_height), (width, height) = tiling.tile, tiling.size
    return max(1, min(max_batch, images * width * height // (tile_width * tile_height)))
