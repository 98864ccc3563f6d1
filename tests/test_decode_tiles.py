"""Decoding large images in tiles."""

from pathlib import Path

import numpy as np
import pytest

from flashdiff.components import Size
from flashdiff.engines.build import BuildOptions, build_engine
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BundleError
from flashdiff.generate import generate, generate_rows, to_pixels
from flashdiff.tasks import check_order
from flashdiff.tiles import decode_tiling

WIDE = Size(128, 64)


@pytest.mark.parametrize("count", [1, 3])
def test_a_decoder_that_sees_no_neighbours_gives_the_same_image_in_tiles(count: int) -> None:
    fake = FakeComponents()
    order = check_order(fake.spec, prompt="x", seed=7, size=WIDE, count=count)
    expected = generate(fake, [order])[0]
    fake.spec = fake.spec.model_copy(update={"decode_tile": 64})
    fake.calls.clear()
    np.testing.assert_allclose(np.stack(generate(fake, [order])[0]).astype(int), expected, atol=1)
    # Three tiles of 64x64 an image, in calls of at most four, which have no more pixels than the images.
    assert [rows for part, rows in fake.calls if part == "decoder"] == {1: [2, 1], 3: [4, 4, 1]}[count]


def test_what_fits_in_a_tile_is_decoded_at_once() -> None:
    spec = FakeComponents().spec.model_copy(update={"decode_tile": 64})
    assert decode_tiling(spec, Size(64, 64)) is None
    assert (spec.sizes_of("decoder"), spec.sizes_of("denoiser")) == ((Size(64, 64),), (Size(64, 64), WIDE))


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (0, "--decode-tile 0: give a multiple of 8 pixels for sd15, at least 32"),
        (-32, "--decode-tile -32: give a multiple of 8"),
        (16, "--decode-tile 16: give a multiple of 8 pixels for sd15, at least 32"),
        (36, "--decode-tile 36: give a multiple of 8"),
        (64, "--decode-tile 64: no image has a longer side than 64; leave it out"),
        (10**9, "--decode-tile 1000000000: no image has a longer side than 64"),
    ],
)
def test_a_tile_that_cannot_be_is_refused_by_its_option(tiny_base: Path, tmp_path: Path, tile: int, message: str) -> None:
    sizes = (Size(32, 32), Size(64, 48))
    with pytest.raises(BundleError, match=f"^{message}"):
        plan_build(BuildOptions(base=str(tiny_base), out=tmp_path / "x", backend="torch", sizes=sizes, decode_tile=tile))


@pytest.mark.slow
def test_a_bundle_decodes_in_tiles_and_knows_what_they_take(tiny_base: Path, tmp_path: Path) -> None:
    sizes = (Size(32, 32), Size(64, 48))
    options = BuildOptions(
        base=str(tiny_base), out=tmp_path / "tiled", backend="torch", sizes=sizes, batch_sizes=(2, 4), decode_tile=32
    )
    manifest = build_engine(options, print)  # compared with torch, and at 32x32 with the stock pipeline
    assert manifest.model.decode_tile == 32
    engine = open_bundle(tmp_path / "tiled")
    costs = engine.measure_costs()
    one = costs["decoder", Size(32, 32)]
    assert costs["decoder", sizes[1]] == {2: 3 * one[4], 4: 6 * one[4]}  # of six tiles an image
    ((row, image),) = generate_rows(engine, [check_order(engine.spec, prompt="x", seed=1, steps=2, size=sizes[1])])[0]
    assert image.shape == (48, 64, 3)
    first = engine.call("decoder", {"latents": row.latents[None, :, :8, :8]})["images"]
    np.testing.assert_allclose(image[:16, :16].astype(int), to_pixels(first)[0][:16, :16], atol=1)  # where no other one reaches
