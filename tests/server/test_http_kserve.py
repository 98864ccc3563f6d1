"""The stock `tritonclient.http` against the server, and the JSON that curl would send."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from PIL import Image
from served import FakeComponents, Running, model_of, serving, set_cost
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

from flashdiff.server.app import Listen
from flashdiff.server.images import encode_image
from flashdiff.server.models import Models


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents(), Listen(port=0, http_port=0, shared_memory=True)) as running:
        yield running


@pytest.fixture
def stock(running: Running) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(running.url.removeprefix("http://"))
    yield client
    client.close()


def _inputs(module: Any, **values: Any) -> list[Any]:
    kinds = {bytes: ("BYTES", np.object_), int: ("INT32", np.int32), float: ("FP32", np.float32)}
    made = []
    for name, value in values.items():
        datatype, dtype = ("UINT64", np.uint64) if name == "SEED" else kinds[type(value)]
        made.append(module.InferInput(name, [1], datatype))
        made[-1].set_data_from_numpy(np.array([value], dtype=dtype))
    return made


def test_the_answer_is_that_of_grpc(running: Running, stock: triton.InferenceServerClient) -> None:
    image = encode_image(np.full((64, 64, 3), 40, dtype=np.uint8), "png")
    given = {"PROMPT": b"a red car", "SEED": 5, "STEPS": 4, "COUNT": 2, "IMAGE": image, "STRENGTH": 0.5}
    result = stock.infer("fake", _inputs(triton, **given), model_version="1", request_id="mine")
    with triton_grpc.InferenceServerClient(running.address) as other:
        expected = other.infer("fake", _inputs(triton_grpc, **given))
    for name in ("IMAGES", "SEEDS", "ENCODED"):
        np.testing.assert_array_equal(result.as_numpy(name), expected.as_numpy(name))
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("fake", "1", "mine")
    assert response["parameters"]["steps"] == 4


def test_tensors_go_as_json_too(stock: triton.InferenceServerClient) -> None:
    prompt, seed = triton.InferInput("PROMPT", [1], "BYTES"), triton.InferInput("SEED", [1], "UINT64")
    prompt.set_data_from_numpy(np.array([b"a red car"], dtype=np.object_), binary_data=False)
    seed.set_data_from_numpy(np.array([2**63], dtype=np.uint64), binary_data=False)
    outputs = [triton.InferRequestedOutput(name, binary_data=False) for name in ("SEEDS", "IMAGES")]
    as_json = stock.infer("fake", [prompt, seed], outputs=outputs)
    as_bytes = stock.infer("fake", _inputs(triton, PROMPT=b"a red car", SEED=2**63))
    for name in ("SEEDS", "IMAGES"):
        np.testing.assert_array_equal(as_json.as_numpy(name), as_bytes.as_numpy(name))
    with pytest.raises(InferenceServerException, match="output 'ENCODED' is files, which are no JSON"):
        stock.infer("fake", [prompt], outputs=[triton.InferRequestedOutput("ENCODED", binary_data=False)])


def test_curl_needs_a_prompt_only(running: Running) -> None:
    body = {"inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["a red car"]}]}
    response = httpx.post(f"{running.url}/v2/models/fake/infer", json=body)
    assert response.status_code == 200
    assert [(output["name"], output["shape"]) for output in response.json()["outputs"]] == [
        ("IMAGES", [1, 64, 64, 3]),
        ("SEEDS", [1]),
    ]


def test_health_metadata_config_and_statistics(stock: triton.InferenceServerClient) -> None:
    assert stock.is_server_live()
    assert stock.is_server_ready()
    assert stock.is_model_ready("fake")
    assert stock.is_model_ready("fake", "1")
    assert not stock.is_model_ready("none")
    assert not stock.is_model_ready("fake", "7")
    assert stock.get_server_metadata()["name"] == "flashdiff"
    metadata = stock.get_model_metadata("fake")
    assert {"name": "SEED", "datatype": "UINT64", "shape": [1]} in metadata["inputs"]
    config = stock.get_model_config("fake")
    assert {"name": "PROMPT", "data_type": "TYPE_STRING", "dims": [1], "optional": False} in config["input"]
    stock.infer("fake", _inputs(triton, PROMPT=b"x"))
    for statistics in (stock.get_inference_statistics("fake"), stock.get_inference_statistics()):
        assert statistics["model_stats"][0]["inference_stats"]["success"]["count"] == 1


@pytest.mark.parametrize(
    ("inputs", "options", "status", "message"),
    [
        ({"PROMPT": b"x"}, {"model_name": "none"}, "404", "model: 'none'"),
        ({"PROMPT": b"x"}, {"model_version": "7"}, "404", "version"),
        ({"STEPS": 2}, {}, "400", "expected input 'PROMPT'"),
        ({"PROMPT": b"x", "STEPS": 99}, {}, "400", "steps: 99"),
        ({"PROMPT": b"x", "NAME": 2}, {}, "400", "unexpected inference input 'NAME'"),
        ({"PROMPT": b"x"}, {"timeout": 1_000_000}, "504", "promised"),
    ],
)
def test_refusals_have_their_status(
    running: Running, stock: triton.InferenceServerClient, inputs: Any, options: Any, status: str, message: str
) -> None:
    set_cost(running.server.models.get(), "denoiser", 5000.0)
    with pytest.raises(InferenceServerException, match=message) as caught:
        stock.infer(**{"model_name": "fake", "inputs": _inputs(triton, **inputs), **options})
    assert caught.value.status() == status


def test_models_are_listed_loaded_and_unloaded(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "manifest.json").write_text("{}")
    fake = FakeComponents()
    models = Models({"fake": model_of(fake)}, tmp_path, opener=lambda _: model_of(fake), identify=str)
    with serving(fake, Listen(port=0, http_port=0), models) as running:
        client = triton.InferenceServerClient(running.url.removeprefix("http://"))
        assert [(model["name"], model["state"]) for model in client.get_model_repository_index()] == [
            ("fake", "READY"),
            ("more", ""),
        ]
        client.load_model("more")
        assert client.infer("more", _inputs(triton, PROMPT=b"x")).as_numpy("IMAGES").shape == (1, 64, 64, 3)
        client.unload_model("more")
        assert not client.is_model_ready("more")
        for refused in (lambda: client.load_model("none"), lambda: client.load_model("more", config="{}")):
            with pytest.raises(InferenceServerException, match="failed to load"):
                refused()
        client.close()


def test_tensors_pass_through_shared_memory(stock: triton.InferenceServerClient) -> None:
    written = serialize_byte_tensor(np.array([b"a red car"], dtype=np.object_)).item()
    region = shm.create_shared_memory_region("region", "/flashdiff-http", 4096)
    try:
        shm.set_shared_memory_region(region, [np.frombuffer(written, dtype=np.uint8)])
        stock.register_system_shared_memory("region", "/flashdiff-http", 4096)
        assert [r["name"] for r in stock.get_system_shared_memory_status()] == ["region"]
        prompt, seeds = triton.InferInput("PROMPT", [1], "BYTES"), triton.InferRequestedOutput("SEEDS", binary_data=True)
        prompt.set_shared_memory("region", len(written))
        seeds.set_shared_memory("region", 8, 2048)
        stock.infer("fake", [prompt, *_inputs(triton, SEED=5)], outputs=[seeds])
        assert shm.get_contents_as_numpy(region, np.uint64, [1], 2048).tolist() == [5]
        stock.unregister_system_shared_memory()
        assert stock.get_system_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(region)


_GOOD = {"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["x"]}


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (b"", None),
        (b"[]", None),
        (b"{", None),
        (json.dumps({"inputs": 1}).encode(), None),
        (json.dumps({"inputs": [1]}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "shape": ["1"]}]}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "shape": [1] * 99}]}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "data": [1]}]}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "data": [["x"]]}]}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "data": ["x", "y"]}]}).encode(), None),
        (json.dumps({"inputs": [_GOOD, {**_GOOD, "name": "SEED", "datatype": "UINT64", "data": [-1]}]}).encode(), None),
        (json.dumps({"inputs": [_GOOD], "parameters": {"a": {}}}).encode(), None),
        (json.dumps({"inputs": [_GOOD], "parameters": {"binary_data_output": 1}}).encode(), None),
        (json.dumps({"inputs": [_GOOD], "outputs": [{"name": "IMAGES", "parameters": {"binary_data": 1}}]}).encode(), None),
        (json.dumps({"inputs": [_GOOD], "id": "\ud800"}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "parameters": {"binary_data_size": 99}}]}).encode(), None),
        (json.dumps({"inputs": [{**_GOOD, "parameters": {"binary_data_size": -1}}]}).encode(), None),
        (json.dumps({"inputs": [_GOOD]}).encode(), "99999"),
        (json.dumps({"inputs": [_GOOD]}).encode(), "-1"),
        (json.dumps({"inputs": [_GOOD]}).encode() + b"rest", str(len(json.dumps({"inputs": [_GOOD]})))),
        (b"[" * 100_000, None),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    running: Running, caplog: pytest.LogCaptureFixture, body: bytes, header: str | None
) -> None:
    headers = {"inference-header-content-length": header} if header else {}
    response = httpx.post(f"{running.url}/v2/models/fake/infer", content=body, headers=headers)
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("parameters", [5, ["x"], "x"])
def test_parameters_that_are_no_object_are_refused(running: Running, parameters: object) -> None:
    response = httpx.post(f"{running.url}/v2/repository/models/fake/load", json={"parameters": parameters})
    assert (response.status_code, response.json()) == (400, {"error": "parameters must be an object"})


def test_files_are_those_of_the_format(stock: triton.InferenceServerClient) -> None:
    result = stock.infer("fake", _inputs(triton, PROMPT=b"x", FORMAT=b"webp"))
    assert Image.open(io.BytesIO(result.as_numpy("ENCODED")[0])).format == "WEBP"
