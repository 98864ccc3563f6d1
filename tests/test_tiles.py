import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashdiff import noise
from flashdiff.components import Size
from flashdiff.noise import Plane, image_noise
from flashdiff.tiles import ORIGIN, Place, Tiling

SIDES = st.integers(1, 400)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    factor = draw(st.sampled_from([1, 4, 8]))
    tile = Size(*(factor * draw(st.integers(8, 20)) for _ in "wh"))
    return Tiling(size=Size(draw(SIDES), draw(SIDES)), tile=tile, factor=factor)


def _picture(size: Size) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)


@given(tilings())
def test_tiles_that_agree_are_the_picture_again(tiling: Tiling) -> None:
    """So the weights of every pixel add up to exactly 1, whatever its level."""
    picture = _picture(tiling.size)
    tiles = tiling.cut(picture)
    assert {tile.shape for tile in tiles} == {(tiling.tile.height, tiling.tile.width, 3)}
    np.testing.assert_array_equal(tiling.blend(tiles), picture)


@given(tilings())
def test_tiles_cover_the_picture_and_overlap_by_an_eighth_at_least(tiling: Tiling) -> None:
    for axis, length, tile in ((0, tiling.size.height, tiling.tile.height), (1, tiling.size.width, tiling.tile.width)):
        starts = sorted({tiling.factor * place[axis] for place in tiling.places})
        assert starts[0] == 0
        assert starts[-1] + tile >= length  # and over the edge by less than a cell, unless the picture is smaller than a tile
        assert len(starts) == 1 or starts[-1] + tile < length + tiling.factor
        assert all(later - start <= tile - tile / 8 for start, later in itertools.pairwise(starts))


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (64, 1), (65, 2), (120, 2), (121, 3), (128, 3), (176, 3), (192, 4), (4096, 73)]
)
def test_there_are_as_few_tiles_as_overlap_enough(length: int, count: int) -> None:
    assert len(Tiling(size=Size(length, 10), tile=Size(64, 64), factor=1).places) == count


def test_tiles_of_one_cell_lie_next_to_each_other() -> None:
    picture = _picture(Size(40, 20))
    tiling = Tiling(size=Size(40, 20), tile=Size(8, 8), factor=8)
    assert len(tiling.places) == 15
    np.testing.assert_array_equal(tiling.blend(tiling.cut(picture)), picture)


def test_one_tile_turns_evenly_into_the_next() -> None:
    tiling = Tiling(size=Size(112, 64), tile=Size(64, 64), factor=8)
    first, second = (np.full((64, 64, 3), level, dtype=np.uint8) for level in (0, 255))
    line = tiling.blend([first, second])[5, :, 0].astype(int)
    assert (line[:48] == 0).all()
    assert (line[64:] == 255).all()
    np.testing.assert_allclose(line[48:64], 255 * (np.arange(16) + 0.5) / 16, atol=0.5)
    np.testing.assert_array_equal(line, 255 - line[::-1])


def test_what_lies_over_the_edge_is_the_mirror_image() -> None:
    picture = _picture(Size(60, 10))
    (tile,) = Tiling(size=Size(60, 10), tile=Size(64, 64), factor=8).cut(picture)
    np.testing.assert_array_equal(tile[:10, 60:], picture[:, :-5:-1])
    np.testing.assert_array_equal(tile[10:20, :60], picture[::-1])


@pytest.mark.parametrize("other", [Place(5, 0), Place(0, 3), Place(5, 3), Place(8, 4), Place(17, 30)])
def test_the_noise_of_tiles_agrees_where_they_overlap(other: Place) -> None:
    """Shown on a plane that tiles at every place fill."""
    shape = (2, 8, 4)
    plane = np.full((2, 8 + other.top, 4 + other.left), np.nan, dtype=np.float32)
    for top in range(other.top + 1):
        for left in range(other.left + 1):
            part = plane[:, top : top + 8, left : left + 4]
            tile = Plane(7, shape).tile(3, Place(top, left))
            assert ((part == tile) | np.isnan(part)).all()
            part[:] = tile
    np.testing.assert_array_equal(plane[:, :8, :4], image_noise(7, 3, shape))
    assert len(np.unique(plane)) == plane.size  # nothing comes again


def test_tiles_that_share_a_plane_get_the_noise_that_they_get_alone_and_draw_each_block_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, draw = list[tuple[int, Place]](), noise._block

    def counted(seed: int, step: int, shape: tuple[int, int, int], place: Place) -> NDArray[np.float32]:
        drawn.append((step, place))
        return draw(seed, step, shape, place)

    monkeypatch.setattr(noise, "_block", counted)
    plane, places = Plane(7, (2, 8, 4)), [Place(top, left) for top in (0, 5, 8, 11) for left in (0, 3, 4)]
    tiles = [plane.tile(step, place) for step in (0, 1) for place in places]
    assert sorted(drawn) == [(step, Place(row, column)) for step in (0, 1) for row in range(3) for column in range(2)]
    for tile, (step, place) in zip(tiles, itertools.product((0, 1), places), strict=True):
        np.testing.assert_array_equal(tile, Plane(7, (2, 8, 4)).tile(step, place))


def test_a_plane_of_noise_is_standard_normal_and_has_no_pattern() -> None:
    plane = Plane(0, (4, 32, 32))
    blocks = [plane.tile(1, Place(32 * row, 32 * column)).ravel() for row in range(4) for column in range(4)]
    assert np.abs(np.mean(blocks)) < 0.02
    assert abs(np.std(blocks) - 1) < 0.02
    correlation = np.corrcoef(blocks) - np.eye(16)
    assert np.abs(correlation).max() < 0.08
    assert (plane.tile(1, ORIGIN) != Plane(1, (4, 32, 32)).tile(1, ORIGIN)).all()


@given(tilings())
def test_tiles_of_floats_that_agree_are_the_picture_again(tiling: Tiling) -> None:
    height, width = (-(-side // tiling.factor) * tiling.factor for side in (tiling.size.height, tiling.size.width))
    picture = np.random.default_rng(0).standard_normal((3, height, width), dtype=np.float32)
    padded = np.pad(picture, ((0, 0), (0, max(0, tiling.tile.height - height)), (0, max(0, tiling.tile.width - width))))
    corners = [(tiling.factor * place.top, tiling.factor * place.left) for place in tiling.places]
    tiles = [padded[:, top : top + tiling.tile.height, left : left + tiling.tile.width] for top, left in corners]
    expected = picture[:, : tiling.size.height, : tiling.size.width]
    np.testing.assert_allclose(tiling.blend(tiles, first_axis=1), expected, atol=1e-6)
