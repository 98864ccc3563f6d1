"""A server with fake components, in a thread of its own, for clients that talk to it over a real port."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.proto.v1 import image_pb2, triton_pb2
from flashdiff.server.app import Listen, Server, start
from flashdiff.server.models import Model, ModelIdentity, Models

MODEL = ModelIdentity(name="fake", bundle_hash="0" * 64, family="fake", backend="fake", precision="fp32")
SIZE = Size(64, 64)
"""Of an order that names none."""
_IMAGES, _TRITON = "flashdiff.v1.ImageService", "inference.GRPCInferenceService"
METHODS = (f"{_IMAGES}/Generate", f"{_IMAGES}/GenerateStream", f"{_TRITON}/ModelInfer", f"{_TRITON}/ModelStreamInfer")
"""All that make images."""


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


@dataclass
class Running:
    fake: FakeComponents
    loop: asyncio.AbstractEventLoop
    server: Server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def stop(self, grace_s: float = 10.0) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace_s), self.loop).result(20)


@contextmanager
def serving(fake: FakeComponents, listen: Listen = Listen(port=0), models: Models | None = None) -> Iterator[Running]:  # noqa: B008
    models = models or Models({"fake": model_of(fake)})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(start(models, listen), loop).result(10)
        running = Running(fake, loop, server)
        yield running
        running.stop(0.0)
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_what_is_left(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _cancel_what_is_left() -> None:
    """As `asyncio.run` does: calls whose clients have just left may not have been told yet."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
