"""A masked part of an image is made anew, the rest stays as it is; test_family_parity.py compares with diffusers."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from served import Running, serving

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import RequestError
from flashdiff.generate import generate
from flashdiff.orders import Order, Pixels
from flashdiff.server.client import Client, ServerError
from flashdiff.server.images import encode_image
from flashdiff.tasks import check_order

FAKE = FakeComponents()
SIZE = FAKE.spec.sizes[0]
IMAGE: Pixels = np.random.default_rng(0).integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8)


def _mask(rows: slice, columns: slice = slice(None)) -> Pixels:
    mask = np.zeros_like(IMAGE)
    mask[rows, columns] = 255
    return mask


MASK = _mask(slice(SIZE.height // 2))


def _order(mask: Pixels = MASK, *, steps: int = 4, seed: int = 3, strength: float = 1.0, count: int = 1) -> Order:
    inputs = {"image": IMAGE, "mask": mask}
    return check_order(
        FAKE.spec, prompt="p", seed=seed, steps=steps, count=count, inputs=inputs, parameters={"strength": strength}
    )


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_pixels_outside_the_mask_are_the_images_own(steps: int, strength: float) -> None:
    made = generate(FAKE, [_order(steps=steps, strength=strength)])[0][0]
    outside = MASK == 0
    np.testing.assert_array_equal(made[outside], IMAGE[outside])
    assert (made[~outside] != IMAGE[~outside]).mean() > 0.9


def test_a_white_mask_at_full_strength_is_text_to_image() -> None:
    whole = generate(FAKE, [_order(_mask(slice(None)))])[0][0]
    np.testing.assert_array_equal(whole, generate(FAKE, [check_order(FAKE.spec, prompt="p", seed=3, steps=4)])[0][0])


def test_the_same_request_gives_the_same_pixels_alone_and_among_others() -> None:
    orders = [
        _order(),
        check_order(FAKE.spec, prompt="p", seed=3, steps=2),
        _order(_mask(slice(None), slice(8)), seed=4, count=3),
        _order(steps=3, strength=0.7),
    ]
    alone = [generate(FAKE, [order])[0] for order in orders]
    np.testing.assert_equal(generate(FAKE, orders), alone)


@pytest.mark.parametrize(
    ("mask", "value"),
    [
        (np.zeros_like(IMAGE), "all black"),
        (_mask(slice(1, 2), slice(1, 2)), "thin lines"),
        (_mask(slice(None)) // 3, "all black"),
    ],
)
def test_a_mask_that_selects_nothing_is_refused(mask: Pixels, value: str) -> None:
    with pytest.raises(RequestError, match=f"mask.*{value}"):
        _order(mask)


def test_a_mask_without_an_image_is_refused() -> None:
    with pytest.raises(RequestError, match="inputs"):
        check_order(FAKE.spec, prompt="p", inputs={"mask": MASK})


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(FakeComponents()) as running:
        yield running


def test_a_server_takes_masks_by_name_and_refuses_one_of_another_size(server: Running) -> None:
    with Client(server.address) as client:
        files = {"image": encode_image(IMAGE, "png"), "mask": encode_image(MASK, "png")}
        made = client.generate("p", seed=3, steps=4, inputs=files)
        pixels = np.array(Image.open(io.BytesIO(made.images[0])))
        np.testing.assert_array_equal(pixels, generate(FAKE, [_order()])[0][0])
        for mask, problem in ((MASK[:-1], "it must be as large as the image"), (0 * MASK, "all black"), (MASK[:0, :0], "")):
            with pytest.raises(ServerError, match=f"INVALID_ARGUMENT.*mask.*{problem}"):
                client.generate("p", inputs={**files, "mask": encode_image(mask, "png") if mask.size else b"no picture"})
