"""The stock `openai` Python client against the server."""

import asyncio
import base64
import io
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image
from served import FakeComponents, Gate, Running, serving, set_cost, until

from flashdiff.components import Size
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.images import encode_image

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


def _png(color: int = 40) -> bytes:
    return encode_image(np.full((64, 64, 3), color, dtype=np.uint8), "png")


def test_an_edit_starts_from_the_image_as_over_grpc(running: Running, stock: openai.OpenAI) -> None:
    options = {"seed": 5, "steps": 4, "strength": 0.5}
    answer = stock.images.edit(image=("a.png", _png()), prompt="a red car", extra_body=options)
    with Client(running.address) as client:
        expected = client.generate("a red car", seed=5, steps=4, image=_png(), strength=0.5, timeout_s=10).images
    assert answer.data is not None
    assert base64.b64decode(answer.data[0].b64_json or "") == expected[0]
    (listed,) = stock.images.edit(image=[("a.png", _png())], prompt="a red car", extra_body=options).data or ()
    assert listed.b64_json == answer.data[0].b64_json
    events = list(stock.images.edit(image=_png(), prompt="a red car", stream=True, partial_images=3, extra_body=options))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]  # two of four steps are taken
    assert events[-1].b64_json == answer.data[0].b64_json


def test_several_images_and_a_mask_are_refused_by_name_where_no_task_takes_them(stock: openai.OpenAI) -> None:
    for files, param in (
        ({"image": [("a.png", _png()), ("b.png", _png())]}, "image"),
        ({"image": _png(), "mask": _png()}, "mask"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            stock.images.edit(prompt="x", **files)  # type: ignore[call-overload]
        assert caught.value.param == param


def test_formats_and_compression(stock: openai.OpenAI) -> None:
    for output_format in ("png", "jpeg", "webp"):
        answer = stock.images.generate(prompt="x", output_format=output_format, output_compression=50)  # type: ignore[arg-type]
        assert answer.data is not None
        image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
        assert (image.format, answer.output_format) == (output_format.upper(), output_format)


def test_models_and_aliases_are_listed_and_answer(stock: openai.OpenAI) -> None:
    assert [model.id for model in stock.models.list()] == ["fake", "gpt-image-1"]
    assert stock.models.retrieve("gpt-image-1").id == "gpt-image-1"
    assert stock.images.generate(model="gpt-image-1", prompt="x").data
    with pytest.raises(openai.NotFoundError) as caught:
        stock.images.generate(model="dall-e-3", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        stock.models.retrieve("none")


def test_a_stream_of_several_images_says_which_each_event_shows(stock: openai.OpenAI) -> None:
    events = list(stock.images.generate(prompt="x", n=2, stream=True, partial_images=1, extra_body={"steps": 2, "seed": 3}))
    shown = [(event.type.rpartition(".")[2], event.to_dict()["flashdiff"]["image"]) for event in events]  # type: ignore[index]
    assert sorted(shown) == [("completed", 0), ("completed", 1), ("partial_image", 0), ("partial_image", 1)]


def test_a_full_queue_is_a_rate_limit_and_a_deadline_that_cannot_be_kept_is_not_tried_again(
    running: Running, stock: openai.OpenAI
) -> None:
    set_cost(running.server.models.get(), "denoiser", 5000.0)
    retrying = stock.with_options(max_retries=5)  # would take long, but for x-should-retry
    with pytest.raises(openai.InternalServerError) as late:
        retrying.images.generate(prompt="x", extra_headers={"x-request-timeout-ms": "1000"})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    assert late.value.response.headers["x-should-retry"] == "false"
    assert late.value.request.headers["x-stainless-retry-count"] == "0"
    running.server.worker.admission._max_pending_images = 0
    with pytest.raises(openai.RateLimitError) as full:
        stock.images.generate(prompt="x")
    assert full.value.code == "rate_limit_exceeded"


def test_an_error_after_the_stream_has_begun_is_its_last_event(running: Running, stock: openai.OpenAI) -> None:
    running.fake.fail_on = "decoder"
    events = stock.images.generate(prompt="x", stream=True, partial_images=1)
    assert next(events).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match="the fake decoder failed"):
        next(events)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_at_the_next_step(running: Running, stream: bool) -> None:
    gate = Gate(running.fake, "denoiser", after=1)
    with httpx.Client() as client, ThreadPoolExecutor(1) as threads:
        body = {"prompt": "x", "n": 4, "stream": stream, "partial_images": 3}

        def ask() -> None:
            with client.stream("POST", f"{running.url}/v1/images/generations", json=body) as response:
                response.read()

        asking = threads.submit(ask)
        assert gate.entered.wait(600)
        _close_connections(client)
        until(lambda: bool(running.server.worker.admission._released))
        gate.open()
        until(lambda: running.server.worker.pending_images == 0)
        assert asking.exception(60) is not None
    assert "decoder" not in {part for part, _ in running.fake.calls}


def _close_connections(client: httpx.Client) -> None:
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        connection._connection._network_stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def test_open_webui_and_librechat_get_what_they_ask_for(running: Running) -> None:
    """The bodies that these two send; see docs/http.md."""
    with httpx.Client(base_url=running.url) as client:
        open_webui = {"model": "fake", "prompt": "x", "n": 1, "size": "64x64", "response_format": "b64_json", "steps": 2}
        libre_chat = {
            "model": "gpt-image-1",
            "prompt": "x",
            "n": 1,
            "size": "auto",
            "quality": "auto",
            "background": "auto",
            "output_format": "png",
            "output_compression": 100,
            "moderation": "auto",
            "user": "user-1",
        }
        for body in (open_webui, libre_chat):
            answer = client.post("/v1/images/generations", json=body, headers={"authorization": "Bearer none"})
            assert Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).size == (64, 64)
        file = ("image.png", _png(), "image/png")
        for name, model in (("image", "fake"), ("image[]", "gpt-image-1")):
            answer = client.post("/v1/images/edits", data={"model": model, "prompt": "x", "n": "1"}, files={name: file})
            assert answer.json()["data"][0]["b64_json"]


def test_a_long_prompt_is_cut_where_a_field_says_so(stock: openai.OpenAI) -> None:
    def data(prompt: str, **fields: object) -> object:
        return stock.images.generate(prompt=prompt, extra_body={"seed": 1, **fields}).data

    assert data("w " * 1000, truncate_prompt=True) == data(" ".join(["w"] * 32))
    with pytest.raises(openai.BadRequestError, match="at most 32 words fit"):
        data("w " * 1000, truncate_prompt=False)
    with pytest.raises(openai.BadRequestError, match="truncate_prompt: 'yes' is not allowed; it must be true or false"):
        data("w " * 1000, truncate_prompt="yes")
