"""Masks that training draws: each kind, the mixture, and that every one can be asked of a model."""

from itertools import product

import numpy as np
import pytest

from flashdiff.components import Size
from flashdiff.distill.config import MaskRecipe
from flashdiff.distill.masks import draw_mask
from flashdiff.orders import Pixels

KINDS = tuple(MaskRecipe().shares)
SIZES = (Size(32, 32), Size(8, 8), Size(24, 64), Size(512, 384))


def _only(kind: str) -> MaskRecipe:
    return MaskRecipe(**{name: float(name == kind) for name in KINDS})


def _drawn(kind: str, size: Size = SIZES[3], cell: int = 8, count: int = 40) -> list[Pixels]:
    return [draw_mask(size, cell, _only(kind), np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_is_black_and_white_and_covers_a_latent_cell(kind: str) -> None:
    for size, cell in product(SIZES, (4, 8)):
        if min(size) < 2 * cell:
            continue
        for mask in _drawn(kind, size, cell, count=60):
            assert mask.shape == (size.height, size.width, 3)
            assert mask.dtype == np.uint8
            assert set(np.unique(mask)) <= {0, 255}
            assert mask[::cell, ::cell].any()  # the nearest pixel decides


def test_masks_are_of_their_kind() -> None:
    assert all(mask.all() for mask in _drawn("full"))
    for mask in _drawn("half"):
        covered = mask[..., 0] > 0
        (lines,) = [axis for axis in (0, 1) if (covered.all(axis=axis) == covered.any(axis=axis)).all()]
        straight = covered.any(axis=lines)
        assert straight[0] != straight[-1]
        assert (np.diff(straight.astype(int)) != 0).sum() == 1
        assert 0.2 < straight.mean() < 0.8
    shares = {kind: np.mean([mask.mean() / 255 for mask in _drawn(kind)]) for kind in KINDS}
    assert all(0.05 < shares[kind] < 0.7 for kind in ("box", "ellipse", "strokes", "half")), shares
    boxes = [mask for mask in _drawn("box") if mask.any()]
    assert len({mask.tobytes() for mask in boxes}) == len(boxes)


def test_kinds_come_as_often_as_their_shares_say_and_a_seed_always_gives_the_same() -> None:
    shares = MaskRecipe(box=0, ellipse=0, strokes=0, half=3, full=1)
    masks = [draw_mask(Size(16, 16), 4, shares, np.random.default_rng([seed, 7])) for seed in range(400)]
    assert np.mean([mask.all() for mask in masks]) == pytest.approx(0.25, abs=0.06)
    again = [draw_mask(Size(16, 16), 4, shares, np.random.default_rng([seed, 7])) for seed in range(400)]
    assert all((mask == other).all() for mask, other in zip(masks, again, strict=True))
