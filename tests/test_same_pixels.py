"""A hundred requests of every kind give the pixels that `tests/same_pixels.json` holds, alone and among each other.

The hashes were made before the requests' inputs, the model's parts and the worker were restructured: a change that claims to
alter nothing reproduces them. A change that means to alter pixels writes them anew: `python tests/test_same_pixels.py`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from orders import from_image
from served import model_of

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FLASH, GUIDED, FakeComponents
from flashdiff.generate import generate
from flashdiff.orders import Order, Pixels
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order

HASHES = Path(__file__).with_suffix("").with_name("same_pixels.json")
SAMPLERS = {"flash": FLASH, "guided": GUIDED}


def _orders(fake: FakeComponents) -> list[Order]:
    """Fifty: sizes, counts, steps, seeds, prompts with and without a negative one, with an image to start from in two of five."""
    orders = []
    is_guided = fake.spec.sampler.evaluations_per_step > 1
    for number in range(50):
        order = check_order(
            fake.spec,
            prompt=f"prompt {number % 17}",
            negative_prompt="dull" if is_guided and number % 3 == 1 else "",
            seed=(2**64 - 2 + number) % 2**64,
            steps=1 + number % fake.spec.sampler.max_steps % 12,
            size=(Size(64, 64), Size(128, 64))[number % 2],
            count=1 + number % 3,
        )
        if number % 5 > 2:
            rows, columns = np.mgrid[: order.size.height, : order.size.width]
            picture = np.stack([rows * 3 + number, columns * 5, rows + columns], axis=-1).astype(np.uint8)
            order = from_image(order, picture, (0.3, 0.8, 1.0)[number % 3])
        orders.append(order)
    return orders


def _hash(images: Sequence[Pixels]) -> str:
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_alone_gives_the_pixels_of_before(name: str) -> None:
    fake = FakeComponents(SAMPLERS[name])
    assert [_hash(generate(fake, [order])[0]) for order in _orders(fake)] == json.loads(HASHES.read_text())[name]


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_at_once_give_the_pixels_of_before(name: str) -> None:
    fake = FakeComponents(SAMPLERS[name])
    model, worker = model_of(fake), Worker(max_pending_images=1000)
    jobs = [worker.submit(model, order) for order in _orders(fake)]
    assert [_hash(job.answer.result(600).images) for job in jobs] == json.loads(HASHES.read_text())[name]
    worker.drain()
    assert worker.join(600)
    assert max(rows for _, rows in fake.calls) == fake.max_batch


def _write() -> None:
    hashes = {}
    for name, sampler in SAMPLERS.items():
        fake = FakeComponents(sampler)
        hashes[name] = [_hash(images) for (images,) in (generate(fake, [order]) for order in _orders(fake))]
    HASHES.write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    _write()
