"""A third task, with inputs and a condition that no other task has, through every protocol: this file is all that it takes."""

import base64
import io
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from served import Running, serving

from flashdiff.components import ModelSpec, Tensors
from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.errors import RequestError
from flashdiff.generate import generate
from flashdiff.orders import Order, Pixels, Preparation
from flashdiff.parts import Condition, latent_diffusion
from flashdiff.sampling import Sampler
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.tasks import TASKS, check_order
from flashdiff.tasks.base import Parameter, Prepared, Task


class Repaint(Task):
    """Repaints an image where its mask is white."""

    name = "repaint"
    inputs = ("image", "mask")
    parameters = (Parameter(name="opacity", default=1.0, above=0, at_most=1),)

    def check(self, spec: ModelSpec, order: Order) -> None:
        if not order.inputs["mask"].any():
            raise RequestError("mask", "all black", "it must be white somewhere")

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        return {**super().preparations(spec, order), "image": Preparation("encoder", order.inputs["image"])}

    def conditions(self, spec: ModelSpec, order: Order, prepared: Prepared, text: Tensors) -> Tensors:
        cells = order.inputs["mask"][:: spec.latent_factor, :: spec.latent_factor, 0]
        return {**text, "mask": (cells > 127).astype(np.float32)[None]}

    def start(self, order: Order, prepared: Prepared) -> NDArray[np.float32]:
        return prepared["image"]["latents"]

    def finish(self, order: Order, pixels: Pixels) -> Pixels:
        share = (order.inputs["mask"][..., :1] > 127) * order.parameters["opacity"]
        mixed: Pixels = (share * pixels + (1 - share) * order.inputs["image"]).round().astype(np.uint8)
        return mixed


class MaskedFake(FakeComponents):
    """A model whose denoiser takes a mask; without one it makes the usual image."""

    def __init__(self, sampler: Sampler = GUIDED) -> None:
        super().__init__(sampler)
        self.spec = self.spec.model_copy(
            update={
                "parts": latent_diffusion(["input_ids"], ["color"], "mask"),
                "conditions": (*self.spec.conditions, Condition(name="mask", channels=1, absent="zeros")),
                "tasks": ("text_to_image", "image_to_image", Repaint.name),
            }
        )
        self.masks: list[float] = []

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        if part == "denoiser":
            self.masks.append(float(inputs["mask"].max()))
            inputs = {name: values for name, values in inputs.items() if name != "mask"}
        return super().call(part, inputs)


@pytest.fixture(autouse=True)
def repaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, Repaint.name, Repaint())


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(MaskedFake(), Listen(port=0, http_port=0)) as running:
        yield running


IMAGE = np.full((64, 64, 3), 40, dtype=np.uint8)
MASK = np.zeros((64, 64, 3), dtype=np.uint8)
MASK[:32] = 255


def _file(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _expected(spec: ModelSpec, opacity: float = 1.0) -> Pixels:
    order = check_order(spec, prompt="x", seed=7, steps=3, inputs={"image": IMAGE, "mask": MASK}, parameters={"opacity": opacity})
    return generate(MaskedFake(), [order])[0][0]


def test_it_repaints_under_its_mask_alone() -> None:
    image = _expected(MaskedFake().spec)
    np.testing.assert_array_equal(image[32:], IMAGE[32:])
    assert (image[:32] != IMAGE[:32]).any()


def test_rows_with_and_without_the_condition_share_a_batch() -> None:
    fake = MaskedFake()
    plain = check_order(fake.spec, prompt="x", seed=7, steps=3)
    masked = check_order(fake.spec, prompt="x", seed=7, steps=3, inputs={"image": IMAGE, "mask": MASK})
    together = generate(fake, [plain, masked])
    np.testing.assert_array_equal(together[0][0], generate(MaskedFake(), [plain])[0][0])
    np.testing.assert_array_equal(together[1][0], _expected(fake.spec))
    assert ("denoiser", 4) in fake.calls
    assert set(fake.masks) == {0.0, 1.0} or set(fake.masks) == {1.0}


def test_our_client_sends_its_inputs_and_parameters_by_name(running: Running) -> None:
    inputs = {"image": _file(IMAGE), "mask": _file(MASK)}
    with Client(running.address) as client:
        result = client.generate("x", seed=7, steps=3, inputs=inputs, parameters={"opacity": 0.5}, timeout_s=10)
        made = np.asarray(Image.open(io.BytesIO(result.images[0])))
        np.testing.assert_array_equal(made, _expected(running.fake.spec, 0.5))
        assert result.part_timings.keys() == {"text_encoder", "encoder", "denoiser", "decoder"}
        for changes, message in (
            ({"parameters": {"opacity": 2.0}}, "opacity: 2.0 is not allowed; it must be above 0 and at most 1"),
            ({"inputs": {"mask": _file(MASK)}}, "inputs: 'mask' is not allowed; .*repaint takes image, mask"),
            ({"inputs": {**inputs, "mask": b"GIF89a"}}, "mask: '6 bytes' is not allowed"),
            ({"inputs": {**inputs, "mask": _file(0 * MASK)}}, "mask: 'all black' is not allowed; it must be white somewhere"),
            ({"image": inputs["image"], "inputs": inputs}, "image: .* is not allowed; it is given twice"),
            ({"inputs": {}, "parameters": {"opacity": 0.5}}, r"it needs an image and a mask \(repaint\)"),
        ):
            with pytest.raises(ServerError, match=message) as caught:
                client.generate("x", **{"seed": 7, "inputs": inputs, "timeout_s": 10, **changes})  # type: ignore[arg-type]
            assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_the_stock_triton_client_finds_and_sends_them(running: Running) -> None:
    client = triton.InferenceServerClient(running.address)
    listed = {tensor.name: tensor.datatype for tensor in client.get_model_metadata("fake").inputs}
    assert {"IMAGE": "BYTES", "MASK": "BYTES", "OPACITY": "FP32"}.items() <= listed.items()
    given = []
    for name, datatype, value in (
        ("PROMPT", "BYTES", np.array([b"x"], dtype=np.object_)),
        ("SEED", "UINT64", np.array([7], dtype=np.uint64)),
        ("STEPS", "INT32", np.array([3], dtype=np.int32)),
        ("IMAGE", "BYTES", np.array([_file(IMAGE)], dtype=np.object_)),
        ("MASK", "BYTES", np.array([_file(MASK)], dtype=np.object_)),
        ("OPACITY", "FP32", np.array([0.5], dtype=np.float32)),
    ):
        given.append(triton.InferInput(name, [1], datatype))
        given[-1].set_data_from_numpy(value)
    np.testing.assert_array_equal(client.infer("fake", given).as_numpy("IMAGES")[0], _expected(running.fake.spec, 0.5))
    client.close()


def test_the_stock_openai_client_sends_a_mask_that_is_transparent_where_the_image_is_edited(running: Running) -> None:
    transparent = _file(np.dstack([IMAGE, 255 - MASK[..., 0]]))
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        options = {"seed": 7, "steps": 3, "opacity": 0.5}
        answer = client.images.edit(image=_file(IMAGE), mask=transparent, prompt="x", extra_body=options)
        assert answer.data is not None
        made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))))
        np.testing.assert_array_equal(made, _expected(running.fake.spec, 0.5))
        for mask, message in (
            (_file(MASK), "mask: .* it must be transparent where the image is to be edited"),
            (b"GIF89a", "mask: '6 bytes' is not allowed"),
            (
                _file(np.dstack([IMAGE, 255 - MASK[..., 0]])[:, :32]),
                "mask: '32x64' is not allowed; it must be as large as the image, 64x64",
            ),
        ):
            with pytest.raises(openai.BadRequestError, match=message) as caught:
                client.images.edit(image=_file(IMAGE), mask=mask, prompt="x")
            assert caught.value.param == "mask"
