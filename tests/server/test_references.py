"""References through every protocol, against a live server whose model is a fake with an IP-Adapter."""

import base64
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from served import Running, model_of, serving, triton_image

from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.generate import generate
from flashdiff.orders import Pixels
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.references import ReferenceRequest, referred
from flashdiff.server.admission import work_of
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.server.jobs import pixel_bytes
from flashdiff.server.replies import Reference
from flashdiff.tasks import check_order

FACE, OTHER = (np.full((32, 32, 3), color, dtype=np.uint8) for color in ((250, 10, 10), (10, 10, 250)))


class ReadingFake(FakeComponents):
    """A model whose image takes up the mean color of its reference, as much as the scale says."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(GUIDED, delay_s=delay_s)
        self.spec = referred(self.spec, (1, 3), 32)

    @property
    def costs(self) -> Any:
        return {**super().costs, ("reference_encoder", None): {self.max_batch: 1000 * self.delay_s + 1}}

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        if part == "reference_encoder":
            images = inputs["reference_images"]
            self._called(part, len(images))
            tokens = images.mean((2, 3), dtype=np.float32)[:, None]
            return {"reference": tokens, "empty_reference": np.zeros_like(tokens)}
        if part != "denoiser":
            return super().call(part, inputs)
        plain = super().call(part, {name: inputs[name] for name in ("latents", "times", "color")})["output"]
        seen = inputs["scale_of_reference"][:, None] * inputs["reference"][:, 0]
        return {"output": plain + np.float32(0.25) * seen[:, :, None, None]}


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(ReadingFake()) as running:
        yield running


@pytest.fixture
def running_http() -> Iterator[Running]:
    with serving(ReadingFake(), Listen(port=0, http_port=0)) as running:
        yield running


def _file(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _expected(image: Pixels | None = None, scale: float = 1.0) -> Pixels:
    fake = ReadingFake()
    reference = None if image is None else ReferenceRequest(image=image, scale=scale)
    return generate(fake, [check_order(fake.spec, prompt="x", seed=7, steps=3, reference=reference)])[0][0]


def _read(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)))


def _encoded(running: Running) -> int:
    """How many images the image encoder has read."""
    return sum(rows for part, rows in running.fake.calls if part == "reference_encoder")


def test_our_client_sends_a_reference(running: Running) -> None:
    with Client(running.address) as client:
        reference = Reference(image=_file(FACE), scale=0.5)
        result = client.generate("x", seed=7, steps=3, reference=reference, timeout_s=10)
        np.testing.assert_array_equal(_read(result.images[0]), _expected(FACE, 0.5))
        assert {"reference_encoder", "denoiser"} <= result.part_timings.keys()
        assert result.timings["input_image"] >= result.part_timings["reference_encoder"]
        assert client.estimate("x", steps=3, reference=reference).expected_ms > 0
        plain = client.generate("x", seed=7, steps=3, timeout_s=10)
        np.testing.assert_array_equal(_read(plain.images[0]), _expected())
        assert (_read(plain.images[0]) != _read(result.images[0])).any()


def test_an_image_is_encoded_once_whatever_its_scale_and_its_prompt(running: Running) -> None:
    with Client(running.address) as client:
        for prompt, scale, image in (("x", 1.0, FACE), ("x", 0.5, FACE), ("y", 1.0, FACE), ("x", 1.0, OTHER), ("x", 0.0, FACE)):
            reference = Reference(image=_file(image), scale=scale)
            result = client.generate(prompt, seed=7, steps=3, reference=reference, timeout_s=10)
            if prompt == "x":
                np.testing.assert_array_equal(_read(result.images[0]), _expected(image, scale))
    assert _encoded(running) == 2


def test_a_prompt_never_stands_for_an_image_that_is_kept(running: Running) -> None:
    """The cache knows texts by themselves and images by their digests."""
    order = check_order(running.fake.spec, prompt="x", reference=ReferenceRequest(image=FACE))
    assert order.reference
    with Client(running.address) as client:
        client.generate("x", seed=7, steps=3, reference=Reference(image=_file(FACE)), timeout_s=10)
        for prompt in (order.reference.digest.hex(), repr(order.reference.digest), order.reference.digest.decode("latin-1")):
            client.generate(prompt, seed=7, steps=3, timeout_s=10)


def test_admission_counts_an_image_until_it_is_kept() -> None:
    fake = ReadingFake(delay_s=0.01)
    model = model_of(fake)
    order = check_order(fake.spec, prompt="x", reference=ReferenceRequest(image=FACE))
    assert order.reference
    preparations = order.task.preparations(fake.spec, order)
    assert work_of(model, order, preparations).prepare == {"text_encoder": 1, "reference_encoder": 1}
    model.embeddings.put(order.reference.digest, {"reference": np.zeros((1, 3), dtype=np.float32)})
    assert work_of(model, order, preparations).prepare == {"text_encoder": 1}
    plain = check_order(fake.spec, prompt="x")
    assert pixel_bytes(order) == pixel_bytes(plain) + FACE.nbytes


def test_rows_with_and_without_a_reference_share_steps(running: Running) -> None:
    plain, face = _expected(), _expected(FACE)
    with Client(running.address) as client, ThreadPoolExecutor(8) as pool:
        options = [{"reference": Reference(image=_file(FACE))} if index % 2 else {} for index in range(8)]
        results = list(pool.map(lambda given: client.generate("x", seed=7, steps=3, timeout_s=30, **given), options))
    for given, result in zip(options, results, strict=True):
        np.testing.assert_array_equal(_read(result.images[0]), face if given else plain)
    assert sum(rows for part, rows in running.fake.calls if part == "denoiser") == 2 * 3 * 8
    assert _encoded(running) <= 4


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"image": b""}, r"reference.image: None is not allowed; a reference needs an image"),
        ({"scale": float("inf")}, r"reference.scale: inf is not allowed; it must be between 0 and 2"),
        ({"scale": float("nan")}, r"reference.scale: nan is not allowed; it must be between 0 and 2"),
        ({"scale": -1e-9}, r"reference.scale: -1e-09 is not allowed; it must be between 0 and 2"),
        ({"image": b"GIF89a"}, r"reference.image: '6 bytes' is not allowed"),
    ],
)
def test_a_reference_that_makes_no_sense_is_refused_by_its_field(running: Running, reference: Any, message: str) -> None:
    given = Reference(**{"image": _file(FACE), **reference})
    with Client(running.address) as client, pytest.raises(ServerError, match=message) as caught:
        client.generate("x", reference=given, timeout_s=10)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_without_an_adapter_refuses_a_reference() -> None:
    refused = pytest.raises(ServerError, match="reference: 'an image' is not allowed; this model takes none")
    with serving(FakeComponents()) as running, Client(running.address) as client, refused:
        client.generate("x", reference=Reference(image=_file(FACE)), timeout_s=10)


def test_listed_models_say_whether_they_take_a_reference(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        (model,) = image_pb2_grpc.ImageServiceStub(channel).ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    assert model.takes_reference


def test_the_stock_triton_client_finds_and_sends_one(running: Running) -> None:
    client = triton.InferenceServerClient(running.address)
    listed = {tensor.name: tensor.datatype for tensor in client.get_model_metadata("fake").inputs}
    assert {"REFERENCE": "BYTES", "REFERENCE_SCALE": "FP32"}.items() <= listed.items()

    infer = partial(triton_image, client)
    np.testing.assert_array_equal(infer(REFERENCE=_file(FACE), REFERENCE_SCALE=np.float32(0.5)), _expected(FACE, 0.5))
    np.testing.assert_array_equal(infer(REFERENCE=_file(FACE)), _expected(FACE))
    for values in ({"REFERENCE_SCALE": np.float32(1)}, {"REFERENCE": b""}):
        with pytest.raises(triton.InferenceServerException, match=r"reference.image: None is not allowed"):
            infer(**values)
    client.close()


def test_the_images_api_takes_it_as_base64(running_http: Running) -> None:
    def post(reference: Any) -> httpx.Response:
        body = {"prompt": "x", "seed": 7, "steps": 3, "reference": reference}
        return httpx.post(f"{running_http.url}/v1/images/generations", json=body)

    image = base64.b64encode(_file(FACE)).decode()
    made = _read(base64.b64decode(post({"image": image, "scale": 0.5}).json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(made, _expected(FACE, 0.5))
    form = {"prompt": "x", "seed": "7", "steps": "3", "reference": json.dumps({"image": image, "scale": 0.5})}
    edited = httpx.post(f"{running_http.url}/v1/images/edits", data=form, files={"image": ("a.png", _file(OTHER))})
    assert edited.status_code == 200, edited.text
    (model,) = httpx.get(f"{running_http.url}/v1/models").json()["data"]
    assert model["flashdiff"]["takes_reference"] is True
    for reference, message in (
        ("face", "reference: 'face' is not allowed; it must be an object with image and scale"),
        ([{"image": image}], "reference: "),
        ({}, "reference.image: None is not allowed; a reference needs an image"),
        ({"image": "?"}, "reference.image: 'text' is not allowed; it must be a file in base64"),
        ({"image": image, "scale": "1"}, "reference.scale: '1' is not allowed; it must be a number"),
        ({"image": image, "scale": -1}, "reference.scale: -1 is not allowed; it must be between 0 and 2"),
        ({"image": image, "weight": 1}, "reference.weight: 1 is not allowed; a reference has image, scale"),
    ):
        refused = post(reference)
        assert (refused.status_code, message in refused.json()["error"]["message"]) == (400, True), refused.text


def test_kserves_http_takes_it(running_http: Running) -> None:
    def infer(**values: Any) -> httpx.Response:
        kinds = {str: "BYTES", float: "FP32", int: "INT32"}
        inputs = [
            {"name": name, "shape": [1], "datatype": "UINT64" if name == "SEED" else kinds[type(value)], "data": [value]}
            for name, value in {"PROMPT": "x", "SEED": 7, "STEPS": 3, **values}.items()
        ]
        return httpx.post(f"{running_http.url}/v2/models/fake/infer", json={"inputs": inputs})

    refused = infer(REFERENCE_SCALE=0.5)
    assert (refused.status_code, "reference.image: None is not allowed" in refused.text) == (400, True), refused.text
    metadata = httpx.get(f"{running_http.url}/v2/models/fake").json()
    assert {"REFERENCE", "REFERENCE_SCALE"} <= {tensor["name"] for tensor in metadata["inputs"]}
