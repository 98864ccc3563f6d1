"""Enlarging an image in tiles: what the rows make, what is refused, and every protocol."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import openai
import pytest
from orders import from_image
from PIL import Image
from served import Gate, Running, intercept, serving, triton_image, until

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FLASH, GUIDED, FakeComponents
from flashdiff.errors import RequestError
from flashdiff.generate import generate
from flashdiff.orders import Order, Pixels
from flashdiff.sampling import Sampler
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.server.images import encode_image
from flashdiff.server.reply_size import LIMIT_KEY
from flashdiff.tasks import check_order

PICTURE = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
FILE = encode_image(PICTURE, "png")


def _order(fake: FakeComponents, picture: Pixels = PICTURE, **changes: Any) -> Order:
    options = {"prompt": "x", "seed": 7, "steps": 4, **changes}
    parameters = {name: options.pop(name) for name in ("upscale", "strength") if name in options}
    return check_order(fake.spec, inputs={"image": picture}, parameters={"upscale": 2, **parameters}, **options)


def _seeing(sampler: Sampler = FLASH) -> FakeComponents:
    """Its images show what they start from, and their noise."""
    fake = FakeComponents(sampler)
    intercept(fake, "denoiser", lambda call, inputs: {"output": 0 * inputs["latents"]})
    return fake


@pytest.mark.parametrize(
    ("width", "height", "upscale", "size"),
    [
        (70, 45, 1, (70, 45)),
        (70, 45, 2, (140, 90)),
        (70, 45, 3.7, (259, 167)),
        (70, 45, 3.3, (231, 149)),
        (1, 1, 1, (1, 1)),
        (1, 1, 8, (8, 8)),
        (1, 130, 2, (2, 260)),
    ],
)
def test_the_result_has_exactly_the_enlarged_size(width: int, height: int, upscale: float, size: tuple[int, int]) -> None:
    order = _order(FakeComponents(), np.full((height, width, 3), 90, dtype=np.uint8), upscale=upscale)
    (image,) = generate(FakeComponents(), [order])[0]
    assert (image.shape[1], image.shape[0]) == order.whole_size == size
    assert np.ptp(image, axis=(0, 1)).max() <= 1  # every tile of the fake has the prompt's color, up to rounding


@pytest.mark.parametrize("sampler", [FLASH, GUIDED])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_one_tile_that_covers_all_is_image_to_image_of_the_enlarged_image(sampler: Sampler, strength: float) -> None:
    fake, small = _seeing(sampler), PICTURE[:32, :32]
    enlarged = np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.LANCZOS))
    plain = from_image(check_order(fake.spec, prompt="x", seed=7, steps=4, count=2), enlarged, strength)
    upscale = _order(fake, small, count=2, strength=strength)
    np.testing.assert_array_equal(generate(fake, [upscale])[0], generate(fake, [plain])[0])


@pytest.mark.parametrize("sampler", [FLASH, GUIDED])
def test_images_do_not_depend_on_their_company_and_image_i_has_seed_plus_i(sampler: Sampler) -> None:
    fake = _seeing(sampler)
    orders = [_order(fake, count=2), check_order(fake.spec, prompt="y", seed=1), _order(fake, seed=8)]
    (first, second), _, (alone,) = generate(fake, orders)
    np.testing.assert_array_equal(second, alone)
    np.testing.assert_array_equal(first, generate(fake, [_order(fake)])[0][0])
    assert (first != second).any()


def test_tiles_have_the_same_noise_where_they_overlap_at_every_step() -> None:
    fake, seen = FakeComponents(), []

    def record(call: object, inputs: Any) -> Any:
        seen.append(inputs["latents"])
        return {"output": 0 * inputs["latents"]}

    intercept(fake, "denoiser", record)
    order = _order(fake, np.full_like(PICTURE, 128), upscale=3, strength=0.5)
    generate(fake, [order])
    assert (order.steps_taken, len(order.places)) == (2, 12)
    for step in range(2):
        plane = np.full((3, 64, 64), np.nan, dtype=np.float32)
        for place, latents in zip(order.places, np.concatenate(seen[step::2]), strict=True):
            part = plane[:, place.top : place.top + 8, place.left : place.left + 8]
            assert (np.isnan(part) | (part == latents)).all()
            part[:] = latents


@pytest.mark.parametrize(
    ("picture", "changes", "message"),
    [
        (PICTURE, {"upscale": 0.5}, "upscale: 0.5 is not allowed; it must be between 1 and 8"),
        (PICTURE, {"upscale": -1}, "upscale: -1.0 is not allowed; it must be between 1 and 8"),
        (PICTURE, {"upscale": 8.5}, "upscale: 8.5 is not allowed; it must be between 1 and 8"),
        (PICTURE, {"upscale": float("nan")}, "upscale: nan is not allowed; it must be between 1 and 8"),
        (PICTURE, {"upscale": 10**400}, "upscale: inf is not allowed; it must be between 1 and 8"),
        (PICTURE, {"strength": 0.0}, "strength: 0.0 is not allowed; it must be above 0"),
        (PICTURE, {"size": Size(32, 32)}, "size: '32x32' is not allowed; this model was built for 64x64"),
        (
            PICTURE,
            {"upscale": 6, "count": 3},
            "upscale: 6.0 is not allowed; 70x45 would become 420x270, 120 tiles of 64x64; a request has at most 96",
        ),
        (
            np.zeros((2100, 2000, 3), dtype=np.uint8),
            {},
            "upscale: 2.0 is not allowed; 2000x2100 would become 4000x4200; at most 16777216 pixels are made",
        ),
        (
            np.zeros((2, 4096, 3), dtype=np.uint8),
            {"upscale": 4},
            "upscale: 4.0 is not allowed; 4096x2 would become 16384x8; .* and 16383 a side",
        ),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(picture: Pixels, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        _order(FakeComponents(), picture, **changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), r"it needs an image \(upscaling\)"),
        (("image", "mask"), r"it needs an image alone \(upscaling\)"),
    ],
)
def test_an_upscale_takes_an_image_and_no_other(inputs: tuple[str, ...], message: str) -> None:
    images = {name: np.full((64, 64, 3), 255, dtype=np.uint8) for name in inputs}
    with pytest.raises(RequestError, match=rf"^upscale: 2 is not allowed; {message}"):
        check_order(FakeComponents().spec, prompt="x", inputs=images, parameters={"upscale": 2})


def test_a_model_that_cannot_start_from_an_image_refuses_it() -> None:
    spec = FakeComponents().spec.model_copy(update={"tasks": ("text_to_image",)})
    with pytest.raises(RequestError, match=r"^upscale: 2 is not allowed; no task of this model takes it"):
        check_order(spec, prompt="x", parameters={"upscale": 2})


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(_seeing(), Listen(port=0, http_port=0)) as running:
        yield running


def _pixels(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)))


def test_every_protocol_enlarges(running: Running) -> None:
    expected = generate(_seeing(), [_order(running.fake, strength=0.5)])[0][0]
    options = {"seed": 7, "steps": 4, "strength": 0.5, "upscale": 2.0}
    with Client(running.address) as client:
        result = client.generate("x", image=FILE, timeout_s=60, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(_pixels(result.images[0]), expected)
        assert (result.size, result.steps, len(result.images)) == ((140, 90), 4, 1)
        assert result.part_timings.keys() == {"text_encoder", "encoder", "denoiser", "decoder"}
        by_name = {"upscale": 2.0, "strength": 0.5}
        assert client.generate("x", seed=7, steps=4, inputs={"image": FILE}, parameters=by_name).images == result.images
        assert [update.images for update in client.stream("x", image=FILE, **options)] == [result.images]  # type: ignore[arg-type, union-attr]
        assert client.estimate("x", image=FILE, **options).expected_ms >= 0  # type: ignore[arg-type]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as stock:
        answer = stock.images.edit(image=FILE, prompt="x", extra_body=options)
        assert answer.data is not None
        np.testing.assert_array_equal(_pixels(base64.b64decode(answer.data[0].b64_json or "")), expected)
        assert answer.size == "140x90"
        events = list(stock.images.edit(image=FILE, prompt="x", stream=True, partial_images=2, extra_body=options))
        assert [(event.type, event.size) for event in events] == [("image_edit.completed", "140x90")]
        (listed,) = stock.models.list().data
        assert listed.flashdiff["tasks"]["upscaling"] == {  # type: ignore[attr-defined]
            "inputs": ["image"],
            "parameters": {
                "upscale": {"default": None, "at_least": 1, "at_most": 8},
                "strength": {"default": 0.3, "above": 0, "at_most": 1},
            },
        }
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(running.address)
    given = {"IMAGE": FILE, "UPSCALE": np.float32(2), "STRENGTH": np.float32(0.5)}
    np.testing.assert_array_equal(triton_image(client, SEED=np.uint64(7), STEPS=np.int32(4), **given), expected)
    client.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscale": float("inf")}, "upscale: inf is not allowed; it must be between 1 and 8"),
        ({"upscale": 0.0}, "upscale: 0.0 is not allowed; it must be between 1 and 8"),
        ({"upscale": 2.0, "parameters": {"upscale": 3.0}}, "upscale: 2.0 is not allowed; it is given twice"),
        ({"upscale": 2.0, "image": None}, "upscale: 2.0 is not allowed; it needs an image"),
        ({"upscale": 2.0, "image": b"GIF89a"}, "image: '6 bytes' is not allowed"),
        ({"upscale": 2.0, "inputs": {"mask": FILE}}, "upscale: 2.0 is not allowed; it needs an image alone"),
    ],
)
def test_the_server_refuses_by_name(running: Running, options: dict[str, Any], message: str) -> None:
    with Client(running.address) as client, pytest.raises(ServerError, match=message) as caught:
        client.generate("x", **{"image": FILE, "timeout_s": 60, **options})  # type: ignore[arg-type]
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert not running.fake.calls


def test_the_client_refuses_what_is_no_number(running: Running) -> None:
    with Client(running.address) as client, pytest.raises(RequestError, match=r"^upscale: 'big' is not allowed"):
        client.generate("x", image=FILE, upscale="big")  # type: ignore[arg-type]


def test_tiles_count_as_images_and_share_batches(running: Running) -> None:
    gate = Gate(running.fake)
    with Client(running.address) as client:
        call = client._stub.Generate.future(_message(seed=7))
        assert gate.entered.wait(600)
        until(lambda: running.server.worker.pending_images == 6)
        gate.open()
        assert call.result(600).width == 140
    assert max(rows for part, rows in running.fake.calls if part == "encoder") == 4


def test_the_reply_may_be_as_large_as_the_whole_image(running: Running) -> None:
    with Client(running.address) as client, pytest.raises(grpc.RpcError) as caught:
        client._stub.Generate(_message(seed=7), metadata=((LIMIT_KEY, "40000"),))
    assert caught.value.details().startswith("upscale: 2.0 is not allowed; 1 image of 140x90 as png may take")


def _message(**options: Any) -> Any:
    from flashdiff.server.replies import write_request

    return write_request("x", image=FILE, upscale=2, **options)
