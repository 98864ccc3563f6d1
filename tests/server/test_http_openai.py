"""The stock `openai` Python client against the server."""

import asyncio
import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image
from served import Running, serving

from flashdiff.components import Size
from flashdiff.engines.runtime.fake_backend import FakeComponents
from flashdiff.server.app import Listen
from flashdiff.server.client import Client

LISTEN = Listen(port=0, http_port=0, aliases=(("gpt-image-1", "fake"),))


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents(), LISTEN) as running:
        yield running


@pytest.fixture
def stock(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_image_has_the_pixels_that_grpc_gives(running: Running, stock: openai.OpenAI) -> None:
    answer = stock.images.generate(model="fake", prompt="a red car", n=2, size="128x64", extra_body={"seed": 5, "steps": 2})
    with Client(running.address) as client:
        expected = client.generate("a red car", seed=5, steps=2, count=2, size=Size(128, 64), timeout_s=10).images
    assert answer.data is not None
    assert [base64.b64decode(image.b64_json or "") for image in answer.data] == list(expected)
    assert (answer.size, answer.output_format) == ("128x64", "png")


def test_a_stream_has_partial_images_of_full_size_and_then_the_image(stock: openai.OpenAI) -> None:
    options = {"seed": 5, "steps": 4}
    plain = stock.images.generate(prompt="a red car", extra_body=options)
    events = list(stock.images.generate(prompt="a red car", stream=True, partial_images=2, extra_body=options))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [e.partial_image_index for e in events if e.type == "image_generation.partial_image"] == [0, 1]
    assert plain.data is not None
    assert events[-1].b64_json == plain.data[0].b64_json
    for event in events:
        assert event.size == "64x64"
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (64, 64)


def test_the_asyncio_client_does_the_same(running: Running, stock: openai.OpenAI) -> None:
    expected = stock.images.generate(prompt="x", extra_body={"seed": 7}).data

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            assert (await client.images.generate(prompt="x", extra_body={"seed": 7})).data == expected
            stream = await client.images.generate(prompt="x", stream=True, partial_images=1, extra_body={"seed": 7})
            events = [event async for event in stream]
            assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]

    asyncio.run(scenario())
