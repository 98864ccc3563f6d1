"""The table of `compare.py` over HTTP: requests, good and bad, that stock `tritonclient.http` sends."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

_KINDS: dict[str, Any] = {"BYTES": np.object_, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}
_TYPES = {"PROMPT": "BYTES", "FORMAT": "BYTES", "SEED": "UINT64", "STRENGTH": "FP32"}

# Where flashdiff answers otherwise: what, given Triton's answer, and why.
KNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no JSON": (lambda theirs: 400, "Triton says 500; it is the client's mistake"),
}


def _tensor(
    name: str, value: Any, shape: tuple[int, ...] = (1,), datatype: str | None = None, binary: bool = True
) -> triton.InferInput:
    datatype = datatype or _TYPES.get(name, "INT32")
    made = triton.InferInput(name, list(shape), datatype)
    made.set_data_from_numpy(np.full(shape, value, dtype=_KINDS[datatype]), binary_data=binary)
    return made


def _infer(*inputs: triton.InferInput, model: str = "fake", version: str = "", outputs: Any = None, **options: Any) -> Any:
    return lambda client: client.infer(model, list(inputs), model_version=version, outputs=outputs, **options)


def _post(path: str, body: bytes, **headers: str) -> Any:
    """The status of a body that the client would not send."""
    return lambda client: client._post(path, body, headers, None).status_code


def _prompt(binary: bool = True) -> triton.InferInput:
    return _tensor("PROMPT", b"a red car", binary=binary)


_SEEDS = (triton.InferRequestedOutput("SEEDS", binary_data=False), triton.InferRequestedOutput("IMAGES", binary_data=True))
_INFER = "v2/models/fake/infer"

TABLE: dict[str, Callable[[triton.InferenceServerClient], Any]] = {
    "live": lambda client: client.is_server_live(),
    "ready": lambda client: client.is_server_ready(),
    "model ready": lambda client: client.is_model_ready("fake"),
    "model ready, version": lambda client: client.is_model_ready("fake", "1"),
    "model ready, unknown": lambda client: client.is_model_ready("none"),
    "metadata, inputs": lambda client: sorted(
        (t["name"], t["datatype"], tuple(t["shape"])) for t in client.get_model_metadata("fake")["inputs"]
    ),
    "metadata, unknown": lambda client: client.get_model_metadata("none"),
    "metadata, unknown version": lambda client: client.get_model_metadata("fake", "7"),
    "config, optional inputs": lambda client: sorted(
        (i["name"], i["data_type"], tuple(i["dims"]), i["optional"]) for i in client.get_model_config("fake")["input"]
    ),
    "config, unknown": lambda client: client.get_model_config("none"),
    "plain": _infer(_prompt(), _tensor("SEED", 5)),
    "as JSON": _infer(_prompt(False), _tensor("SEED", 5, binary=False), outputs=_SEEDS),
    "version said": _infer(_prompt(), _tensor("SEED", 5), version="1"),
    "request id": _infer(_prompt(), _tensor("SEED", 5), request_id="mine"),
    "priority and timeout": _infer(_prompt(), _tensor("SEED", 5), priority=1, timeout=10_000_000),
    "own parameters": _infer(_prompt(), _tensor("SEED", 5), parameters={"team": "blue", "number": 3}),
    "largest seed": _infer(_prompt(), _tensor("SEED", 2**63)),
    "unknown model": _infer(_prompt(), model="none"),
    "unknown version": _infer(_prompt(), version="7"),
    "unknown input": _infer(_prompt(), _tensor("NAME", 2)),
    "wrong datatype": _infer(_tensor("PROMPT", 1.0, datatype="FP32")),
    "two elements": _infer(_tensor("PROMPT", b"x", (2,))),
    "no input": _infer(),
    "unknown output": _infer(_prompt(), outputs=[triton.InferRequestedOutput("NONE")]),
    "no JSON": _post(_INFER, b"{"),
    "no body": _post(_INFER, b""),
    "header longer than the body": _post(_INFER, b"{}", **{"Inference-Header-Content-Length": "99"}),
    "no such path": _post("v2/none", b"{}"),
    "statistics": lambda client: client.get_inference_statistics("fake")["model_stats"][0]["inference_stats"]["success"].keys(),
    "statistics, unknown": lambda client: client.get_inference_statistics("none"),
    "load, unknown": lambda client: client.load_model("none"),
    "unload, unknown": lambda client: client.unload_model("none"),
}


def answer(client: triton.InferenceServerClient, ask: Callable[[triton.InferenceServerClient], Any]) -> Any:
    """What is compared of an answer: the status of a refusal; names, types and shapes, and the seeds."""
    try:
        result = ask(client)
    except InferenceServerException as error:
        return error.status()
    if not isinstance(result, triton.InferResult):
        return result
    response = result.get_response()
    outputs = {o["name"]: (o["datatype"], tuple(o["shape"])) for o in response["outputs"]}
    seeds = result.as_numpy("SEEDS")
    return (
        response["model_name"],
        response["model_version"],
        response.get("id"),
        outputs,
        None if seeds is None else seeds.tobytes(),
    )
