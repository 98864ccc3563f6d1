"""Requests in no protocol's terms, on a clock that the tests set."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest
from served import Clock, model_of

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import DeadlineError
from flashdiff.orders import Pixels
from flashdiff.server import image_threads
from flashdiff.server.models import Models
from flashdiff.server.requests import ImageRequest, Reply, Requests
from flashdiff.server.worker import Worker

JPEG = ImageRequest(prompt="x", format="jpeg")


class Asking:
    """Requests to one worker with the fake model."""

    def __init__(self) -> None:
        self.fake, self.clock = FakeComponents(), Clock()
        self.worker = Worker(clock=self.clock)
        self.model = model_of(self.fake)
        self.requests = Requests(self.worker, Models({"fake": self.model}))

    async def reply(self, request: ImageRequest) -> Reply:
        async with aclosing(self.requests.serve(self.model, request, "")) as updates:
            reply = [update async for update in updates][-1]
        assert isinstance(reply, Reply)
        return reply

    async def estimate_ms(self, request: ImageRequest) -> float:
        return (await self.requests.estimate(self.model, request, "")).expected_ms


@pytest.fixture
def asking() -> Iterator[Asking]:
    asking = Asking()
    yield asking
    asking.worker.drain()
    assert asking.worker.join(600)


def test_what_files_take_counts_against_the_deadline_while_it_is_known(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(pixels: Pixels, image_format: str, quality: int | None = None) -> bytes:
        asking.clock.now += 0.8 if image_format == "jpeg" else 0.0
        return b"a file"

    monkeypatch.setattr(image_threads, "encode_image", slow)

    async def scenario() -> None:
        assert await asking.estimate_ms(JPEG) == 0
        assert (await asking.reply(JPEG)).encoding_ms == pytest.approx(800)
        assert await asking.estimate_ms(JPEG) == pytest.approx(800)
        assert await asking.estimate_ms(ImageRequest(prompt="x", format="jpeg", count=2)) == pytest.approx(1600)
        asking.fake.calls.clear()
        with pytest.raises(DeadlineError, match="promised in about 800 ms, the deadline is 700 ms away"):
            await asking.reply(ImageRequest(prompt="x", format="jpeg", timeout_s=0.7))
        assert not asking.fake.calls  # refused at once
        assert (await asking.reply(ImageRequest(prompt="x", timeout_s=0.7))).files
        asking.clock.now += image_threads._SPEED_KNOWN_S
        assert await asking.estimate_ms(JPEG) == 0

    asyncio.run(scenario())


def test_reading_an_image_counts_in_the_timings_and_against_the_deadline(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_read(file: bytes, size: object, name: str, behind: str) -> Pixels:
        asking.clock.now += 0.5
        return np.zeros((64, 64, 3), dtype=np.uint8)

    monkeypatch.setattr("flashdiff.server.images.decode_image", slow_read)

    async def scenario() -> None:
        reply = await asking.reply(ImageRequest(prompt="x", files={"image": b"a file"}, timeout_s=0.6))
        assert reply.timings.reading == pytest.approx(500)
        assert reply.timings.total == pytest.approx(500)
        with pytest.raises(DeadlineError):
            await asking.reply(ImageRequest(prompt="x", files={"image": b"a file"}, timeout_s=0.4))

    asyncio.run(scenario())


def test_a_deadline_that_passes_while_images_are_read_ends_the_request(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def held(file: bytes, size: object, name: str, behind: str) -> Pixels:
        assert go.wait(600)
        return np.zeros((64, 64, 3), dtype=np.uint8)

    monkeypatch.setattr("flashdiff.server.images.decode_image", held)

    async def scenario() -> None:
        for _ in range(2):  # the one that is being read, and one behind it
            with pytest.raises(DeadlineError, match="the deadline passed while the images were being read"):
                await asking.reply(ImageRequest(prompt="x", files={"image": b"a file"}, timeout_s=0.01))
        go.set()
        assert (await asking.reply(ImageRequest(prompt="x", files={"image": b"a file"}))).images

    asyncio.run(scenario())
