"""What runs in Ray's gRPC proxies: our services, and what their calls need on the way to a replica and back.

Ray passes a replica neither the deadline of a call nor a way to end a stream with trailing metadata, answers errors in a form
that clients do not retry, and calls the death of a replica INTERNAL. So every call gets its remaining time as metadata, a message
that only carries a status is not sent on, and what fails between proxy and replica is UNAVAILABLE.
"""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from flashdiff.errors import BackendError, first_line
from flashdiff.proto.v1 import image_pb2_grpc

REMAINING = "x-request-timeout-ms"
"""Metadata of a call in a replica: milliseconds until the client's deadline, when the call reached the proxy."""


def add_to_server(servicer: Any, server: Any) -> None:
    """Add our services to a proxy: Ray's option `grpc_servicer_functions` names this function."""
    make = getattr(server, "service_handler_factory", None)
    if make is None:
        raise BackendError("this version of Ray has another kind of gRPC proxy than 2.60, which flashdiff was tested with")
    server.service_handler_factory = lambda *args, **options: _followed(make(*args, **options))
    try:
        image_pb2_grpc.add_ImageServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    finally:
        server.service_handler_factory = make


class _Call:
    """A call's context, as Ray gets it."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        remaining_s = self._context.time_remaining()
        given = [(key, value) for key, value in self._context.invocation_metadata() or () if key != REMAINING]
        return given if remaining_s is None else [*given, (REMAINING, f"{1000 * remaining_s:.0f}")]

    async def end(self) -> None:
        """Abort a call that has not ended well, since clients do not retry after a message, be it empty, or headers.

        A status that no replica gave becomes one that they retry, if Ray says no more than INTERNAL.
        """
        context = self._context
        code, details, trailers = context.code(), context.details(), context.trailing_metadata() or ()
        if code == grpc.StatusCode.INTERNAL and not trailers:  # a replica's reply has a request id
            code, details = grpc.StatusCode.UNAVAILABLE, f"the replica did not answer: {first_line(Exception(details))}"
        if code and code != grpc.StatusCode.OK:
            await context.abort(code, details, tuple(trailers))


def _followed(handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A handler of the same kind around one of Ray's."""

    async def unary(request: Any, context: Any) -> bytes:
        call = _Call(context)
        reply: bytes = await handler(request, call)
        await call.end()
        return reply

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        call = _Call(context)
        async with aclosing(handler(request, call)) as messages:
            async for message in messages:
                if message or not call.code():
                    yield message
        await call.end()

    return stream if inspect.isasyncgenfunction(handler) else unary
