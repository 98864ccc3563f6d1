"""A replica of the Ray Serve application: the services and the gate of `flashdiff serve`, on contexts that came through Ray."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2_grpc

from flashdiff.errors import BackendError, BundleError
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.app import freeze_loaded
from flashdiff.server.auth import Tokens
from flashdiff.server.calls import Calls
from flashdiff.server.gate import Gate
from flashdiff.server.health import Health
from flashdiff.server.models import Models
from flashdiff.server.ray_proxy import REMAINING
from flashdiff.server.requests import Requests
from flashdiff.server.service import ImageService
from flashdiff.server.worker import Worker

_IMAGES = image_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name
_HEALTH = "grpc.health.v1.Health"
_LAST_S = 5.0  # for the device thread, when all calls are answered

_log = logging.getLogger(__name__)


class ImageReplica:
    """Ray calls the methods by the names of the RPCs, on one event loop, with the message and a `RayServegRPCContext`."""

    _worker: Worker | None = None

    def __init__(self, opener: Callable[[], Models], tokens: Path | None = None) -> None:
        _log_as_ray_does()
        calls = Calls(Tokens(tokens) if tokens else None)
        models = opener()
        self._worker = worker = Worker()
        self._gate = Gate(calls)
        self._handlers = _Handlers()
        image_pb2_grpc.add_ImageServiceServicer_to_server(ImageService(Requests(worker, models)), self._handlers)
        health_pb2_grpc.add_HealthServicer_to_server(Health(worker, models, (_IMAGES,)), self._handlers)
        freeze_loaded()
        for name, model in models.served.items():
            _log.info("serving %s (bundle %s, %s)", name, model.identity.bundle_hash[:12], model.identity.backend)

    # --- the calls ---------------------------------------------------------------------------------------------------

    async def Generate(self, request: Any, grpc_context: Any) -> Any:
        return await self._reply(f"/{_IMAGES}/Generate", request, grpc_context)

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for message in self._replies(f"/{_IMAGES}/GenerateStream", request, grpc_context):
            yield message

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:
        return await self._reply(f"/{_IMAGES}/ListModels", request, grpc_context)

    async def Estimate(self, request: Any, grpc_context: Any) -> Any:
        return await self._reply(f"/{_IMAGES}/Estimate", request, grpc_context)

    async def Check(self, request: Any, grpc_context: Any) -> Any:
        return await self._reply(f"/{_HEALTH}/Check", request, grpc_context)

    async def List(self, request: Any, grpc_context: Any) -> Any:
        return await self._reply(f"/{_HEALTH}/List", request, grpc_context)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Refused: a watch would follow one replica alone. Clients that balance then count the server as healthy."""
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details("with Ray Serve, health cannot be watched; call Check, or Ray's RayServeAPIService/Healthz")
        yield _StatusOnly()

    async def __call__(self, request: Any) -> Any:
        """Refuse a request over HTTP."""
        from starlette.responses import PlainTextResponse  # Ray brings it

        return PlainTextResponse("with Ray Serve, flashdiff speaks gRPC only; flashdiff serve --http-port has HTTP", 501)

    # --- what Ray asks -----------------------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raise when the device thread has stopped or hangs, so that Ray starts another replica."""
        assert self._worker
        self._worker.check_alive()
        if self._worker.failure:
            raise BackendError(f"the device thread has stopped: {self._worker.failure}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `ray_app.PendingWork`."""
        assert self._worker
        return {"pending_s": self._worker.pending_s, "pending_images": float(self._worker.pending_images)}

    def __del__(self) -> None:
        """Called by Ray when the calls are answered, within the deployment's `graceful_shutdown_timeout_s`."""
        if self._worker:
            self._worker.drain()
            self._worker.join(_LAST_S)

    # --- through the gate --------------------------------------------------------------------------------------------

    async def _reply(self, method: str, request: Any, given: Any) -> Any:
        context = _Context(request, given)
        handler = await self._admitted(method, context)
        try:
            return await handler.stream_unary(None, context)
        except _EndedError:
            return _StatusOnly()

    async def _replies(self, method: str, request: Any, given: Any) -> AsyncIterator[Any]:
        context = _Context(request, given)
        handler = await self._admitted(method, context)
        answering = asyncio.ensure_future(handler.stream_stream(None, context))
        answering.add_done_callback(lambda _: context.written.put_nowait(None))
        try:
            while (message := await context.written.get()) is not None:
                yield message
            try:
                await answering
            except _EndedError:
                yield _StatusOnly()
        finally:
            answering.cancel()
            await asyncio.wait([answering])

    async def _admitted(self, method: str, context: "_Context") -> Any:
        details = SimpleNamespace(method=method, invocation_metadata=context.invocation_metadata())
        return await self._gate.intercept_service(self._handlers.find, details)


class _StatusOnly:
    """In the place of a reply, for Ray to serialize: the call's context has its status, and trailing metadata.

    An exception would carry the status too, but Ray drops the metadata then.
    """

    def SerializeToString(self) -> bytes:
        return b""


class _EndedError(grpc.aio.AbortError):
    """The call's status is set; it goes on no further."""


class _Context:
    """What the gate and the services need of a `grpc.aio.ServicerContext`."""

    def __init__(self, request: Any, given: Any) -> None:
        self._request, self._given, self._arrived = request, given, time.monotonic()
        self.written: asyncio.Queue[Any] = asyncio.Queue()
        """Messages of a stream; None is the last."""

    def peer(self) -> str:
        return str(self._given.peer())

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return list(self._given.invocation_metadata())

    def code(self) -> Any:
        return self._given.code()

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None without one."""
        given = dict(self.invocation_metadata()).get(REMAINING)
        return None if given is None else float(given) / 1000 - (time.monotonic() - self._arrived)

    async def read(self) -> Any:
        return self._request

    async def write(self, message: Any) -> None:
        self.written.put_nowait(message)  # Ray holds what the client does not read

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        self._given.set_code(code)
        self._given.set_details(details)
        self._given.set_trailing_metadata(list(trailing_metadata))
        raise _EndedError(details)


class _Handlers:
    """Collects the handlers of services by method, as a server would."""

    def __init__(self) -> None:
        self._by_method: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Not needed: registered handlers come as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._by_method |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    async def find(self, details: Any) -> Any:
        return self._by_method[details.method]


def check_hashes(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """BundleError for a bundle of another hash than expected, so that a pool has one set of pixels."""
    for name, wanted in expected.items():
        if found[name] != wanted:
            raise BundleError(
                f"{name}: this replica has bundle {found[name]}, but the application was deployed with {wanted}; "
                "deploy it again, or allow_other_bundles"
            )


def _log_as_ray_does() -> None:
    """Write this package's lines where Ray writes the replica's own."""
    logger = logging.getLogger("flashdiff")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = logging.getLogger("ray.serve").handlers, False
