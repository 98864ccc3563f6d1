"""A server with fake components, in a thread of its own, for clients that talk to it over a real port."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.proto.v1 import image_pb2, triton_pb2
from flashdiff.server.app import Listen, Server, start
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity

MODEL = ModelIdentity(name="fake", bundle_hash="0" * 64, family="fake", backend="fake", precision="fp32")
SIZE = Size(64, 64)
"""Of an order that names none."""
_IMAGES, _TRITON = "flashdiff.v1.ImageService", "inference.GRPCInferenceService"
METHODS = (f"{_IMAGES}/Generate", f"{_IMAGES}/GenerateStream", f"{_TRITON}/ModelInfer", f"{_TRITON}/ModelStreamInfer")
"""All that make images."""

PATIENCE_S = 600.0
"""How long a busy machine may take for what takes a moment."""


def triton_image(client: Any, **values: Any) -> Any:
    """The first image that a stock Triton client gets for these inputs; prompt, seed and steps have values of their own."""
    import tritonclient.grpc as triton

    given = []
    for name, value in {"PROMPT": b"x", "SEED": np.uint64(7), "STEPS": np.int32(3), **values}.items():
        kind = {bytes: "BYTES", np.uint64: "UINT64", np.int32: "INT32", np.float32: "FP32"}[type(value)]
        given.append(triton.InferInput(name, [1], kind))
        given[-1].set_data_from_numpy(np.array([value], dtype=np.object_ if kind == "BYTES" else None))
    return client.infer(MODEL.name, given).as_numpy("IMAGES")[0]


def message(method: str, prompt: str = "x") -> bytes:
    """A request for one of `METHODS`, as it is on the wire."""
    if method.startswith(_IMAGES):
        return image_pb2.GenerateRequest(prompt=prompt).SerializeToString()
    request = triton_pb2.ModelInferRequest(model_name=MODEL.name)
    request.inputs.add(name="PROMPT", datatype="BYTES", shape=[1]).contents.bytes_contents.append(prompt.encode())
    return request.SerializeToString()


def model_of(fake: FakeComponents, identity: ModelIdentity = MODEL) -> Model:
    model = Model(identity, fake, fake.costs)
    fake.calls.clear()  # those of opening it
    return model


class Clock:
    """A worker's clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def set_cost(model: Model, part: str, ms: float, size: Size = SIZE) -> None:
    """What every call of a part counts as from now on."""
    model.costs.replace(part, size, dict.fromkeys(model.costs.current[size][part], ms))


def set_costs(model: Model, ms: float) -> None:
    """The same for all parts at all sizes."""
    for size in model.components.spec.sizes:
        for part in model.components.spec.parts:
            set_cost(model, part.name, ms, size)


Tensors = dict[str, NDArray[Any]]


def intercept(fake: FakeComponents, part: str, around: Callable[[Callable[[Tensors], Tensors], Tensors], Any]) -> None:
    """From now on calls of a part go to `around`, which gets what would have been called and its inputs."""
    call = fake.call

    def intercepted(name: str, inputs: Any) -> Any:
        return around(lambda given: call(part, given), inputs) if name == part else call(name, inputs)

    fake.call = intercepted  # type: ignore[method-assign]


class Gate:
    """Holds the fake model in its next call until opened, so that tests decide what happens meanwhile.

    With a `part`, in that part's next call, once `after` of them are through.
    """

    def __init__(self, fake: FakeComponents, part: str | None = None, after: int = 0) -> None:
        self._open, self.entered, self._after = threading.Event(), threading.Event(), after
        called = fake._called

        def gated(name: str, rows: int) -> None:
            if part in (None, name):
                self._after -= 1
                if self._after < 0:
                    self.entered.set()
                    assert self._open.wait(PATIENCE_S)
            called(name, rows)

        fake._called = gated  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()


@dataclass
class Running:
    fake: FakeComponents
    loop: asyncio.AbstractEventLoop
    server: Server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    def stop(self, grace_s: float = 60.0) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace_s), self.loop).result(PATIENCE_S)


@contextmanager
def serving(fake: FakeComponents, listen: Listen = Listen(port=0), models: Models | None = None) -> Iterator[Running]:  # noqa: B008
    models = models or Models({"fake": model_of(fake)})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(start(models, listen), loop).result(PATIENCE_S)
        running = Running(fake, loop, server)
        yield running
        running.stop(0.0)
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_what_is_left(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


async def _cancel_what_is_left() -> None:
    """As `asyncio.run` does: calls of clients that have just left may still be running."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


class Process:
    """A `flashdiff serve` of fake models in a process of its own; `setup` is code that may change `fake`, `listen` or modules."""

    def __init__(self, setup: str = "", **popen: Any) -> None:
        code = f"""
import logging, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from served import Listen, Models, model_of, FakeComponents
from flashdiff.server import app
from flashdiff.server.process import run_server
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
logging.getLogger("flashdiff").setLevel(logging.INFO)
fake, listen = FakeComponents(), Listen(port=0)
opener = lambda: Models({{"fake": model_of(fake)}})
{setup}
run_server(lambda: opener(), listen)
"""
        options = {"stderr": subprocess.PIPE, "text": True, **popen}
        self.process = subprocess.Popen([sys.executable, "-c", code], **options)
        self.lines: list[str] = []

    def read_until(self, text: str) -> str:
        """The next line of the log that has the text."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"it ended without '{text}': {''.join(self.lines)}")

    def address(self) -> str:
        """Where it listens, once it does."""
        return "127.0.0.1:" + self.read_until("serving fake").rpartition(":")[2].strip()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """The exit status; what was logged until then is in `lines`."""
        if self.process.stderr:
            self.lines += self.process.communicate(timeout=PATIENCE_S)[1].splitlines(keepends=True)
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        if self.process.stderr:
            self.process.stderr.close()


def until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait for what must come; so long without it is a hang, on any machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.01)
