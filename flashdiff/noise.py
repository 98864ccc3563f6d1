"""One random stream per image: a seed gives the same noise alone or in any batch, on any machine."""

from collections.abc import Sequence

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from flashdiff.tiles import ORIGIN, Place

SEED_LIMIT = 2**64
_LOW_RES_STREAM = 2**32
"""In the place of a step: no sampler takes so many."""


class _Key(ISeedSequence):
    """A Philox key as it is. (`Philox(key=...)` gives the same, after asking the system for entropy that it does not use.)"""

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> NDArray[np.uint64]:
        return self._words


def image_noise(seed: int, step: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal noise of `shape`, [C, h, w] without B, for one image before its denoise step `step` (0: the start)."""
    return _block(seed, step, shape, ORIGIN)


class Plane:
    """An image's plane of noise, from which its tiles are cut; tiles that overlap share it there.

    It consists of blocks of a tile's shape, each a stream of its own, so a tile needs those alone that it touches. The first
    block is `image_noise`. Those of the last step are kept for the other tiles.
    """

    def __init__(self, seed: int, shape: tuple[int, int, int]) -> None:
        self.seed, self._shape = seed, shape
        self._step, self._blocks = 0, dict[Place, NDArray[np.float32]]()

    def tile(self, step: int, place: Place) -> NDArray[np.float32]:
        """The part [C, h, w] where a tile lies, of the noise before denoise step `step` (0: the start)."""
        if step != self._step:
            self._step, self._blocks = step, {}
        if place == ORIGIN:
            return self._block(ORIGIN)
        _, height, width = self._shape
        (row, top), (column, left) = divmod(place.top, height), divmod(place.left, width)
        blocks = [
            [self._block(Place(y, x)) for x in range(column, column + 1 + (left > 0))] for y in range(row, row + 1 + (top > 0))
        ]
        return np.block(blocks)[:, top : top + height, left : left + width]

    def _block(self, place: Place) -> NDArray[np.float32]:
        if place not in self._blocks:
            self._blocks[place] = _block(self.seed, self._step, self._shape, place)
        return self._blocks[place]


def _block(seed: int, step: int, shape: Sequence[int], place: Place) -> NDArray[np.float32]:
    """A block of a plane of noise; the place counts blocks."""
    # Philox is counter-based: the key (seed, step) names a stream, so no draw depends on an earlier one. A block starts so far
    # into it that no other one gets there.
    philox = np.random.Philox(_Key(seed, step))  # type: ignore[arg-type]  # numpy's types forget ISeedSequence
    if place != ORIGIN:
        philox.advance(((place.top << 32) + place.left) << 128)
    return np.random.Generator(philox).standard_normal(tuple(shape), dtype=np.float32)


def low_res_noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal noise of `shape`, [C, h, w] without B, for the low-resolution image that one image is made from.

    It is a stream of its own, so it has nothing in common with the noise of the latents.
    """
    return image_noise(seed, _LOW_RES_STREAM, shape)


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a request: consecutive, so any one image can be made again alone."""
    return (seed + index) % SEED_LIMIT
