"""Controls through every protocol, against a live server whose model is a fake with two of them."""

import base64
import io
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
from served import Running, serving, triton_image

from flashdiff.controls import ControlRequest, steered
from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.generate import generate
from flashdiff.orders import Pixels
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.server.replies import Control
from flashdiff.tasks import check_order

EDGES = np.zeros((64, 64, 3), dtype=np.uint8)
EDGES[:, :32] = 255


class SteeredFake(FakeComponents):
    """A model whose control images show in its own, as much as their scale says."""

    def __init__(self) -> None:
        super().__init__(GUIDED)
        self.spec = steered(self.spec, ["edges", "pose"])

    @property
    def costs(self) -> Any:
        own = [("denoiser_control", size) for size in self.spec.sizes]
        return {**super().costs, **{key: {self.max_batch: 1.0} for key in own}}

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        if part != "denoiser_control":
            return super().call(part, inputs)
        plain = super().call("denoiser", {name: inputs[name] for name in self.spec.part("denoiser").inputs})["output"]
        self.calls[-1] = ("denoiser_control", len(plain))
        cells = [
            inputs[f"scale_of_control_{name}"][:, None, None, None] * self._encode(inputs[f"control_{name}"])
            for name in ("edges", "pose")
        ]
        return {"output": plain + np.float32(0.5) * sum(cells)}


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(SteeredFake()) as running:
        yield running


@pytest.fixture
def running_http() -> Iterator[Running]:
    with serving(SteeredFake(), Listen(port=0, http_port=0)) as running:
        yield running


def _file(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _expected(*controls: ControlRequest) -> Pixels:
    fake = SteeredFake()
    return generate(fake, [check_order(fake.spec, prompt="x", seed=7, steps=3, controls=controls)])[0][0]


def _read(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)))


EXPECTED = {"scale": 0.5, "end": 0.7}


def test_our_client_sends_controls(running: Running) -> None:
    with Client(running.address) as client:
        control = Control(name="edges", image=_file(EDGES), **EXPECTED)
        result = client.generate("x", seed=7, steps=3, controls=[control], timeout_s=10)
        np.testing.assert_array_equal(_read(result.images[0]), _expected(ControlRequest(name="edges", image=EDGES, **EXPECTED)))
        assert "denoiser_control" in result.part_timings
        assert "denoiser" not in result.part_timings
        assert result.timings["denoise"] == result.part_timings["denoiser_control"]
        assert client.estimate("x", steps=3, controls=[control]).expected_ms > 0
        plain = client.generate("x", seed=7, steps=3, timeout_s=10)
        np.testing.assert_array_equal(_read(plain.images[0]), _expected())
        assert (_read(plain.images[0]) != _read(result.images[0])).any()


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ([{"name": "depth"}], "controls.name: 'depth' is not allowed; this model takes edges, pose"),
        ([{"image": b""}], "controls.edges.image: None is not allowed; a control needs an image"),
        ([{}, {}], "controls.name: 'edges' is not allowed; it is given twice"),
        ([{"scale": float("inf")}], "controls.edges.scale: inf is not allowed; it must be between 0 and 2"),
        ([{"start": 0.5, "end": 0.25}], "controls.edges.start: 0.5 is not allowed; it must be below the end, 0.25"),
        ([{"image": b"GIF89a"}], "controls.edges.image: '6 bytes' is not allowed"),
    ],
)
def test_a_control_that_makes_no_sense_is_refused_by_its_field(running: Running, controls: list[Any], message: str) -> None:
    given = [Control(**{"name": "edges", "image": _file(EDGES), **control}) for control in controls]
    with Client(running.address) as client, pytest.raises(ServerError, match=message) as caught:
        client.generate("x", controls=given, timeout_s=10)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_without_controls_refuses_them() -> None:
    refused = pytest.raises(ServerError, match="controls: 'edges' is not allowed; this model takes none")
    with serving(FakeComponents()) as running, Client(running.address) as client, refused:
        client.generate("x", controls=[Control(name="edges", image=_file(EDGES))], timeout_s=10)


def test_listed_models_name_their_controls(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        (model,) = image_pb2_grpc.ImageServiceStub(channel).ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    assert list(model.controls) == ["edges", "pose"]


def test_the_stock_triton_client_finds_and_sends_them(running: Running) -> None:
    client = triton.InferenceServerClient(running.address)
    listed = {tensor.name: tensor.datatype for tensor in client.get_model_metadata("fake").inputs}
    assert {"CONTROL_EDGES": "BYTES", "SCALE_EDGES": "FP32", "START_POSE": "FP32", "END_POSE": "FP32"}.items() <= listed.items()

    infer = partial(triton_image, client)
    made = infer(CONTROL_EDGES=_file(EDGES), SCALE_EDGES=np.float32(0.5), END_EDGES=np.float32(0.7))
    np.testing.assert_array_equal(made, _expected(ControlRequest(name="edges", image=EDGES, **EXPECTED)))
    message = r"controls.pose.image: None is not allowed; a control needs an image"
    with pytest.raises(triton.InferenceServerException, match=message):
        infer(SCALE_POSE=np.float32(1))
    with pytest.raises(triton.InferenceServerException, match=message):
        infer(CONTROL_POSE=b"")
    client.close()


def test_rows_with_controls_never_pad_plain_ones(running: Running) -> None:
    plain, edges = _expected(), _expected(ControlRequest(name="edges", image=EDGES))
    control = Control(name="edges", image=_file(EDGES))
    with Client(running.address) as client, ThreadPoolExecutor(8) as pool:
        options = [{"controls": [control]} if index % 2 else {} for index in range(8)]
        results = list(pool.map(lambda given: client.generate("x", seed=7, steps=3, timeout_s=30, **given), options))
    for given, result in zip(options, results, strict=True):
        np.testing.assert_array_equal(_read(result.images[0]), edges if given else plain)
    assert sum(rows for part, rows in running.fake.calls if part == "denoiser") == 2 * 3 * 4
    assert sum(rows for part, rows in running.fake.calls if part == "denoiser_control") == 2 * 3 * 4


def test_the_images_api_takes_them_as_base64(running_http: Running) -> None:
    def post(**fields: Any) -> httpx.Response:
        return httpx.post(f"{running_http.url}/v1/images/generations", json={"prompt": "x", "seed": 7, "steps": 3, **fields})

    image = base64.b64encode(_file(EDGES)).decode()
    answer = post(controls=[{"name": "edges", "image": image, **EXPECTED}])
    made = _read(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(made, _expected(ControlRequest(name="edges", image=EDGES, **EXPECTED)))
    (model,) = httpx.get(f"{running_http.url}/v1/models").json()["data"]
    assert model["flashdiff"]["controls"] == ["edges", "pose"]
    for controls, message in (
        ("edges", "controls: 'edges' is not allowed; it must be a list of objects"),
        ([{"name": "edges"}], "controls.edges.image: None is not allowed; a control needs an image"),
        ([{"name": "edges", "image": "?"}], "controls.image: 'text' is not allowed; it must be a file in base64"),
        ([{"name": "edges", "image": image, "scale": "1"}], "controls.scale: '1' is not allowed; it must be a number"),
        ([{"name": "edges", "image": image, "weight": 1}], "controls.weight: 1 is not allowed; a control has name, image, scale"),
    ):
        refused = post(controls=controls)
        assert (refused.status_code, message in refused.json()["error"]["message"]) == (400, True), refused.text
