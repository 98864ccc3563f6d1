"""Running out of memory fails the request that needed it, and no others."""

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from served import FakeComponents, Gate, Running, intercept, model_of, serving
from tritonclient.grpc import InferenceServerClient

from flashdiff.engines.runtime.engine import _library_error
from flashdiff.errors import BackendError, OutOfMemoryError
from flashdiff.server import jobs, loop
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, ServerError
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order

TORCH_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory: you tried to allocate 9 bytes."
OPENVINO = "Exception from core.cpp:117:\nCheck 'ptr' failed at cpu_memory.cpp:257:\nFailed to allocate 9 bytes"
ONNX_RUNTIME = "[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 9"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(TORCH_CPU),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),  # torch.OutOfMemoryError is a RuntimeError
        RuntimeError(OPENVINO),
        RuntimeError("std::bad_alloc"),
        Exception(ONNX_RUNTIME),
        BackendError("CUDA: cudaErrorMemoryAllocation"),
    ],
)
def test_what_the_libraries_say_is_recognized(error: Exception) -> None:
    assert isinstance(_library_error("torch failed in decoder", error), OutOfMemoryError)


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not isinstance(_library_error("torch failed in decoder", RuntimeError("Invalid graph")), OutOfMemoryError)


def test_torch_and_numpy_really_say_so() -> None:
    torch = pytest.importorskip("torch")
    for allocate in (lambda: torch.empty(2**46), lambda: np.empty(2**46)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert isinstance(_library_error("x", caught.value), OutOfMemoryError)


@pytest.mark.parametrize("part", ["text_encoder", "denoiser", "decoder"])
def test_a_batch_that_does_not_fit_is_tried_again_one_job_at_a_time(part: str) -> None:
    fake = FakeComponents()
    gate = Gate(fake)

    def around(call: Any, inputs: Any) -> Any:
        if len(next(iter(inputs.values()))) > 1:
            raise MemoryError
        return call(inputs)

    intercept(fake, part, around)
    model, worker = model_of(FakeComponents()), Worker()
    model.components = fake
    first = worker.submit(model, check_order(fake.spec, prompt="first", steps=1))
    assert gate.entered.wait(600)
    others = [worker.submit(model, check_order(fake.spec, prompt=f"{number}", steps=1)) for number in range(2)]
    gate.open()
    assert all(job.answer.result(600).images for job in (first, *others))
    assert worker.failure is None
    worker.drain()
    assert worker.join(600)


@pytest.mark.parametrize("where", ["noise", "rows", "outputs"])
def test_memory_that_lacks_outside_an_engine_fails_one_job(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeComponents()
    model, worker = model_of(fake), Worker()

    def short(*_: Any, **__: Any) -> Any:
        raise MemoryError

    module, name = {"noise": (jobs, "start_rows"), "rows": (loop, "denoise_rows"), "outputs": (model.embeddings, "put")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, short)
        failed = worker.submit(model, check_order(fake.spec, prompt="x", steps=1))
        assert isinstance(failed.answer.exception(60), OutOfMemoryError)
    assert worker.submit(model, check_order(fake.spec, prompt="y", steps=1)).answer.result(600).images
    worker.drain()
    assert worker.join(600)


def test_a_failed_parallel_decode_fails_one_job_too() -> None:
    fake = FakeComponents(parallel_decode=True)
    model, worker = model_of(fake), Worker()
    decode = fake.call

    def short(call: Any, inputs: Any) -> Any:
        raise MemoryError

    intercept(fake, "decoder", short)
    failed = worker.submit(model, check_order(fake.spec, prompt="x", steps=1))
    assert isinstance(failed.answer.exception(60), OutOfMemoryError)
    fake.call = decode  # type: ignore[method-assign]
    assert worker.submit(model, check_order(fake.spec, prompt="x", steps=1)).answer.result(600).images
    worker.drain()
    assert worker.join(600)


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents(), Listen(port=0, http_port=0)) as running:
        yield running


def test_every_protocol_answers_it_as_a_lack_of_room(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    def short(call: Any, inputs: Any) -> Any:
        raise MemoryError

    intercept(running.fake, "denoiser", short)
    with Client(running.address, retries=False) as client, pytest.raises(ServerError, match=r"RESOURCE_EXHAUSTED.*enough memory"):
        client.generate("x", timeout_s=60)
    answer = httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    with InferenceServerClient(running.address) as stock:
        assert stock.is_server_ready()
    assert not [record for record in caplog.records if record.exc_info]
