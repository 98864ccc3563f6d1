"""Super-resolution through every protocol, against a live server whose model is a fake that upscales."""

import base64
import io
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import grpc
import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from served import Running, serving, triton_image

from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.generate import generate
from flashdiff.orders import Pixels
from flashdiff.parts import LOW_RES_IMAGE, NOISE_LEVEL, Condition, latent_diffusion
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.schedule import NoiseSchedule
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.tasks import check_order, tasks_for

SMALL: Pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
SCHEDULE = NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")


class UpscalingFake(FakeComponents):
    """A model whose image shows what it was given: the small image with its noise, and the noise level."""

    def __init__(self) -> None:
        super().__init__(GUIDED)
        added = (
            Condition(name=LOW_RES_IMAGE, enters="concat", channels=3, noised=SCHEDULE),
            Condition(name=NOISE_LEVEL, enters="label", classes=351),
        )
        parts = latent_diffusion(["input_ids"], ["color"], *(condition.name for condition in added))
        self.spec = self.spec.model_copy(
            update={
                "parts": tuple(part for part in parts if part.name != "encoder"),
                "conditions": (*self.spec.conditions, *added),
                "tasks": tasks_for(added),
            }
        )

    @property
    def costs(self) -> Any:
        return {(part, size): ms for (part, size), ms in super().costs.items() if part != "encoder"}

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        if part != "denoiser":
            return super().call(part, inputs)
        plain = super().call(part, {name: inputs[name] for name in ("latents", "times", "color")})["output"]
        assert inputs[NOISE_LEVEL].dtype == np.int64
        level = inputs[NOISE_LEVEL].astype(np.float32)[:, None, None, None] / 351
        return {"output": plain + np.float32(0.2) * inputs[LOW_RES_IMAGE] + np.float32(0.2) * level}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(UpscalingFake(), Listen(port=0, http_port=0)) as running:
        yield running


def _file(pixels: Pixels = SMALL) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _expected(**parameters: float) -> Pixels:
    fake = UpscalingFake()
    order = check_order(fake.spec, prompt="x", seed=7, steps=3, inputs={"image": SMALL}, parameters=parameters)
    return generate(fake, [order])[0][0]


def _read(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)))


def test_our_client_sends_an_image_and_a_noise_level(running: Running) -> None:
    with Client(running.address) as client:
        made = {
            level: _read(client.generate("x", seed=7, steps=3, image=_file(), noise_level=level, timeout_s=10).images[0])
            for level in (None, 0, 350)
        }
        by_name = client.generate("x", seed=7, steps=3, image=_file(), parameters={"noise_level": 350}, timeout_s=10)
    for level, pixels in made.items():
        np.testing.assert_array_equal(pixels, _expected(**({} if level is None else {"noise_level": level})))
    np.testing.assert_array_equal(_read(by_name.images[0]), made[350])
    np.testing.assert_array_equal(_expected(), _expected(noise_level=20))
    assert (made[0] != made[350]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"image: None is not allowed; this model makes no image without it \(super_resolution\)"),
        ({"noise_level": 20}, "image: None is not allowed"),
        ({"image": _file(), "noise_level": -1}, "noise_level: -1.0 is not allowed; it must be a whole number between 0 and 350"),
        (
            {"image": _file(), "noise_level": 351},
            "noise_level: 351.0 is not allowed; it must be a whole number between 0 and 350",
        ),
        ({"image": _file(), "noise_level": 0.5}, "noise_level: 0.5 is not allowed; it must be a whole number between 0 and 350"),
        ({"image": _file(), "noise_level": float("nan")}, "noise_level: nan is not allowed"),
        ({"image": _file(), "noise_level": float("-inf")}, "noise_level: -inf is not allowed"),
        (
            {"image": _file(), "noise_level": 1, "parameters": {"noise_level": 1}},
            "noise_level: 1.0 is not allowed; it is given twice",
        ),
        ({"image": _file(), "strength": 0.5}, "strength: 0.5 is not allowed; no task of this model takes it"),
        ({"inputs": {"image": _file(), "mask": _file()}}, "inputs: .* super_resolution takes image"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(running: Running, options: Any, message: str) -> None:
    with Client(running.address) as client, pytest.raises(ServerError, match=message) as caught:
        client.generate("x", timeout_s=10, **options)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_that_upscales_nothing_refuses_a_noise_level() -> None:
    refused = pytest.raises(ServerError, match=r"noise_level: 0.0 is not allowed; no task of this model takes it")
    with serving(FakeComponents()) as running, Client(running.address) as client:
        with refused:
            client.generate("x", noise_level=0, timeout_s=10)
        with grpc.insecure_channel(running.address) as channel:
            (model,) = image_pb2_grpc.ImageServiceStub(channel).ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    assert not model.HasField("max_noise_level")


def test_listed_models_say_what_they_take(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        (model,) = image_pb2_grpc.ImageServiceStub(channel).ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    assert (list(model.tasks), model.max_noise_level) == (["super_resolution"], 350)
    (listed,) = httpx.get(f"{running.url}/v1/models").json()["data"]
    level = {"default": 20, "at_least": 0, "at_most": 350, "is_whole": True}
    assert listed["flashdiff"]["tasks"] == {"super_resolution": {"inputs": ["image"], "parameters": {"noise_level": level}}}


def test_previews_are_streamed(running: Running) -> None:
    with Client(running.address) as client:
        *previews, result = client.stream("x", seed=7, steps=3, image=_file(), timeout_s=10)
    assert [preview.step for preview in previews] == [1, 2, 3]  # type: ignore[union-attr]
    np.testing.assert_array_equal(_read(result.images[0]), _expected())  # type: ignore[union-attr]


def test_the_stock_triton_client_finds_and_sends_one(running: Running) -> None:
    client = triton.InferenceServerClient(running.address)
    listed = {tensor.name: tensor.datatype for tensor in client.get_model_metadata("fake").inputs}
    assert {"IMAGE": "BYTES", "NOISE_LEVEL": "FP32"}.items() <= listed.items()
    infer = partial(triton_image, client)
    np.testing.assert_array_equal(infer(IMAGE=_file(), NOISE_LEVEL=np.float32(350)), _expected(noise_level=350))
    np.testing.assert_array_equal(infer(IMAGE=_file()), _expected())
    for values, message in (
        ({"NOISE_LEVEL": np.float32(1)}, "image: None is not allowed"),
        ({"IMAGE": _file(), "NOISE_LEVEL": np.float32(20.5)}, "noise_level: 20.5 is not allowed"),
        ({"IMAGE": _file(), "NOISE_LEVEL": np.float32("nan")}, "noise_level: nan is not allowed"),
        ({"IMAGE": _file(), "NOISE_LEVEL": np.uint64(20)}, "data-type is 'UINT64'"),
    ):
        with pytest.raises(triton.InferenceServerException, match=message):
            infer(**values)
    client.close()


def test_the_images_api_takes_it_in_a_form(running: Running) -> None:
    def post(**fields: str) -> httpx.Response:
        form = {"prompt": "x", "seed": "7", "steps": "3", **fields}
        return httpx.post(f"{running.url}/v1/images/edits", data=form, files={"image": ("a.png", _file())})

    made = _read(base64.b64decode(post(noise_level="350").json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(made, _expected(noise_level=350))
    for value in ("20.5", "-1", "nan", "1e999", "many"):
        refused = post(noise_level=value)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "noise_level"), refused.text
    plain = httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x"})
    assert (plain.status_code, plain.json()["error"]["param"]) == (400, "image"), plain.text
