"""Requests, good and bad, sent by stock tritonclient over gRPC and HTTP to real Triton and to flashdiff: the answers must agree.

    python tests/conformance/compare.py ORACLE_PYTHON

ORACLE_PYTHON is the interpreter of an environment with nvidia-pytriton (`make conformance` makes one). What is compared: the
status of every refusal, and names, types, shapes and the bytes of SEEDS of every answer. Where flashdiff means to
answer otherwise, KNOWN says what and why.
"""

import queue
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import http_table
from served import model_of, serving

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server.app import Listen
from flashdiff.server.images import encode_image
from flashdiff.server.models import Models

_KEY, _REGION = "/flashdiff-conformance", 4096  # a shared memory object and its bytes
_PORTS = (18001, 18000, 18002)
_KINDS: dict[str, Any] = {"BYTES": np.object_, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}
_TYPES = {
    "PROMPT": "BYTES",
    "FORMAT": "BYTES",
    "NEGATIVE_PROMPT": "BYTES",
    "IMAGE": "BYTES",
    "STRENGTH": "FP32",
    "SEED": "UINT64",
}

# Where flashdiff answers otherwise: what, given Triton's answer, and why.
KNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "metadata": (
        lambda theirs: [theirs[0], sorted([*theirs[1], ("PREVIEW", "UINT8", ("-1", "-1", "3"))])],
        "PREVIEW is an output of streams, which the oracle's model has not",
    ),
    "missing input": (
        lambda theirs: "StatusCode.INVALID_ARGUMENT",
        "Triton counts inputs, so an optional one can stand for the required one; flashdiff names the missing one",
    ),
}


def _tensor(name: str, value: Any, shape: tuple[int, ...] = (1,), datatype: str | None = None) -> triton.InferInput:
    datatype = datatype or _TYPES.get(name, "INT32")
    made = triton.InferInput(name, list(shape), datatype)
    made.set_data_from_numpy(np.full(shape, value, dtype=_KINDS[datatype]))
    return made


def _infer(
    *inputs: triton.InferInput, model: str = "fake", version: str = "", outputs: tuple[str, ...] = (), **options: Any
) -> Any:
    wanted = [triton.InferRequestedOutput(name) for name in outputs] or None
    return lambda client: client.infer(model, list(inputs), model_version=version, outputs=wanted, **options)


def _prompt() -> triton.InferInput:
    return _tensor("PROMPT", b"a red car")


def _file() -> bytes:
    """A PNG."""
    return encode_image(np.zeros((64, 64, 3), dtype=np.uint8), "png")


def _short(name: str) -> triton.InferInput:
    """An input whose raw bytes are fewer than its shape says."""
    made = triton.InferInput(name, [1], "INT32")
    made._raw_content = b"\x01\x02"
    return made


TABLE: dict[str, Callable[[triton.InferenceServerClient], Any]] = {
    "live": lambda client: client.is_server_live(),
    "ready": lambda client: client.is_server_ready(),
    "model ready": lambda client: client.is_model_ready("fake"),
    "model ready, version": lambda client: client.is_model_ready("fake", "1"),
    "model ready, unknown version": lambda client: client.is_model_ready("fake", "7"),
    "model ready, unknown": lambda client: client.is_model_ready("none"),
    "metadata": lambda client: [
        sorted((t["name"], t["datatype"], tuple(t["shape"])) for t in client.get_model_metadata("fake", as_json=True)[side])
        for side in ("inputs", "outputs")
    ],
    "metadata, unknown": lambda client: client.get_model_metadata("none"),
    "metadata, unknown version": lambda client: client.get_model_metadata("fake", "7"),
    "config, unknown": lambda client: client.get_model_config("none"),
    "config, optional inputs": lambda client: sorted(
        (i["name"], i["data_type"], i.get("optional", False))
        for i in client.get_model_config("fake", as_json=True)["config"]["input"]
    ),
    "plain": _infer(_prompt(), _tensor("SEED", 5)),
    "all inputs": _infer(
        _prompt(), *(_tensor(n, v) for n, v in (("SEED", 7), ("STEPS", 2), ("WIDTH", 128), ("HEIGHT", 64), ("COUNT", 3)))
    ),
    "an image to start from": _infer(_prompt(), _tensor("SEED", 7), _tensor("IMAGE", _file()), _tensor("STRENGTH", 0.5)),
    "version said": _infer(_prompt(), _tensor("SEED", 5), version="1"),
    "one output": _infer(_prompt(), _tensor("SEED", 5), outputs=("SEEDS",)),
    "outputs in another order": _infer(_prompt(), _tensor("SEED", 5), outputs=("SEEDS", "IMAGES")),
    "request id": _infer(_prompt(), _tensor("SEED", 5), request_id="mine"),
    "priority and timeout": _infer(_prompt(), _tensor("SEED", 5), priority=1, timeout=10_000_000),
    "own parameters": _infer(_prompt(), _tensor("SEED", 5), parameters={"who": "me", "number": 3}),
    "largest seed": _infer(_prompt(), _tensor("SEED", 2**63)),
    "unknown model": _infer(_prompt(), model="none"),
    "unknown version": _infer(_prompt(), version="7"),
    "missing input": _infer(_tensor("STEPS", 2)),
    "no input": _infer(),
    "unknown input": _infer(_prompt(), _tensor("NAME", 2)),
    "wrong datatype": _infer(_tensor("PROMPT", 1.0, datatype="FP32")),
    "wrong datatype of an optional input": _infer(_prompt(), _tensor("STEPS", 1.0, datatype="FP32")),
    "two elements": _infer(_tensor("PROMPT", b"x", (2,))),
    "two dimensions": _infer(_tensor("PROMPT", b"x", (1, 1))),
    "no element": _infer(_tensor("PROMPT", b"x", (0,))),
    "too few bytes": _infer(_prompt(), _short("STEPS")),
    "unknown output": _infer(_prompt(), outputs=("NONE",)),
    "deadline passed": _infer(_prompt(), client_timeout=1e-4),
    "region, object not there": lambda client: client.register_system_shared_memory("none", "/flashdiff-none", 64),
    "region": lambda client: client.register_system_shared_memory("table", _KEY, _REGION),
    "region, name taken": lambda client: client.register_system_shared_memory("table", _KEY, _REGION),
    "region, larger than its object": lambda client: client.register_system_shared_memory("large", _KEY, 2**30),
    "regions": lambda client: sorted(client.get_system_shared_memory_status(as_json=True).get("regions", {})),
    "region status, unknown": lambda client: client.get_system_shared_memory_status("none"),
    "through shared memory": lambda client: _through_memory(client),
    "input in an unknown region": lambda client: _through_memory(client, region="none"),
    "input beyond its region": lambda client: _through_memory(client, offset=_REGION - 4),
    "output larger than its place": lambda client: _through_memory(client, room=4),
    "unregister": lambda client: client.unregister_system_shared_memory("table"),
    "unregister, unknown": lambda client: client.unregister_system_shared_memory("table"),
    "load, unknown": lambda client: client.load_model("none"),
    "unload, unknown": lambda client: client.unload_model("none"),
    "statistics": lambda client: _counted(client),
    "statistics, unknown": lambda client: client.get_inference_statistics("none"),
    "statistics, unknown version": lambda client: client.get_inference_statistics("fake", "7"),
    "cancelled on the way": lambda client: _cancelled(client),
    "stream": lambda client: _streamed(client, "fake"),
    "stream, unknown model": lambda client: _streamed(client, "none"),
}


def _through_memory(client: triton.InferenceServerClient, region: str = "table", offset: int = 0, room: int = 8) -> Any:
    """A prompt read from the region and a seed written behind it, as the bytes that were there then."""
    written = serialize_byte_tensor(np.array([b"a red car"], dtype=np.object_)).item()
    with open(f"/dev/shm{_KEY}", "r+b") as memory:
        memory.write(written)
    prompt, seeds = triton.InferInput("PROMPT", [1], "BYTES"), triton.InferRequestedOutput("SEEDS")
    prompt.set_shared_memory(region, len(written), offset)
    seeds.set_shared_memory("table", room, _REGION // 2)
    outputs = client.infer("fake", [prompt, _tensor("SEED", 5)], outputs=[seeds]).get_response().outputs
    with open(f"/dev/shm{_KEY}", "rb") as memory:
        memory.seek(_REGION // 2)
        return [(o.name, o.datatype, tuple(o.shape)) for o in outputs], memory.read(room)


def _counted(client: triton.InferenceServerClient) -> Any:
    """What one more request adds to the counts, and which durations there are."""

    def counts() -> dict[str, Any]:
        (stats,) = client.get_inference_statistics("fake", as_json=True)["model_stats"]
        return {"name": stats["name"], "version": stats["version"], "success": int(stats["inference_stats"]["success"]["count"])}

    before = counts()
    client.infer("fake", [_prompt(), _tensor("SEED", 5)])
    after = counts()
    return {**after, "success": after["success"] - before["success"]}


def _cancelled(client: triton.InferenceServerClient) -> Any:
    """What the callback of a request gets that is cancelled at once."""
    answers: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("fake", [_prompt()], callback=lambda result, error: answers.put(error and error.status()))
    call.cancel()
    return answers.get(timeout=600)


def _streamed(client: triton.InferenceServerClient, model: str) -> Any:
    """What the callback gets: the result, or that there was an error."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put("an error in the stream" if error else result))
    wanted = [triton.InferRequestedOutput(name) for name in ("IMAGES", "SEEDS")]
    client.async_stream_infer(model, [_prompt(), _tensor("SEED", 5)], outputs=wanted, request_id="mine")
    answer = answers.get(timeout=600)
    client.stop_stream()
    return answer


def _answer(client: triton.InferenceServerClient, ask: Callable[[triton.InferenceServerClient], Any]) -> Any:
    try:
        result = ask(client)
    except InferenceServerException as error:
        return error.status()
    if not isinstance(result, triton.InferResult):
        return result
    response = result.get_response()
    outputs = {o.name: (o.datatype, tuple(o.shape)) for o in response.outputs}
    seeds = result.as_numpy("SEEDS")
    return response.model_name, response.model_version, response.id, outputs, None if seeds is None else seeds.tobytes()


def _wait(client: triton.InferenceServerClient) -> None:
    for _ in range(120):
        try:
            if client.is_model_ready("fake"):
                return
        except InferenceServerException:
            pass
        time.sleep(0.5)
    raise SystemExit("the oracle did not become ready within a minute")


def _compare(protocol: str, table: Any, known: Any, ask: Callable[[Any], tuple[Any, Any]]) -> int:
    """Print a line a request; how many differences have no reason."""
    unexplained = 0
    for name, request in table.items():
        theirs, own = ask(request)
        if theirs == own:
            print(f"agree  {protocol} {name}")
            continue
        meant, why = known.get(name, (lambda theirs: theirs, ""))
        if own != meant(theirs):
            why = "NOT EXPLAINED"
            unexplained += 1
        print(f"differ {protocol} {name}: {why}\n    Triton:    {theirs}\n    flashdiff: {own}")
    return unexplained


def main() -> None:
    oracle_process = subprocess.Popen(
        [sys.argv[1], str(Path(__file__).with_name("oracle.py")), *map(str, _PORTS)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        oracle = triton.InferenceServerClient(f"127.0.0.1:{_PORTS[0]}")
        http_oracle = triton_http.InferenceServerClient(f"127.0.0.1:{_PORTS[1]}")
        _wait(oracle)
        Path(f"/dev/shm{_KEY}").write_bytes(bytes(_REGION))
        fake = FakeComponents()
        models = Models({"fake": model_of(fake)}, Path(__file__).parent, opener=lambda _: model_of(fake), identify=str)
        with serving(fake, Listen(port=0, http_port=0, shared_memory=True), models) as running:
            ours = triton.InferenceServerClient(running.address)
            http_ours = triton_http.InferenceServerClient(f"127.0.0.1:{running.server.http_port}")
            unexplained = _compare("gRPC", TABLE, KNOWN, lambda ask: (_answer(oracle, ask), _answer(ours, ask)))
            unexplained += _compare(
                "HTTP",
                http_table.TABLE,
                http_table.KNOWN,
                lambda ask: (http_table.answer(http_oracle, ask), http_table.answer(http_ours, ask)),
            )
            ours.close()
            http_ours.close()
        oracle.close()
        http_oracle.close()
    finally:
        oracle_process.terminate()
        oracle_process.wait(600)
        Path(f"/dev/shm{_KEY}").unlink(missing_ok=True)
    print(f"{len(TABLE)} requests over gRPC, {len(http_table.TABLE)} over HTTP, {unexplained} unexplained differences")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
