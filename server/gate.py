"""What every gRPC call passes before its service: it is authenticated and watched, and bytes that are no message are refused."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from flashdiff.errors import FlashdiffError
from flashdiff.server.calls import Calls
from flashdiff.server.status import abort, code_of

_UNWATCHED = ("/grpc.health.v1.Health/", "/grpc.reflection.")  # asked every second, by who supervises
_OPEN_TO_ALL = "/grpc.health.v1.Health/Check"
# Of the call whose task this is. Never reset: a stream that is left unread is closed in another context.
_client: ContextVar[str] = ContextVar("client", default="")


def client_of(context: Any) -> str:
    """Whose call this is: the name of its token, else the address it comes from."""
    return _client.get() or context.peer().rpartition(":")[0]


@dataclass(frozen=True)
class Malformed:
    """In the place of a message that could not be read."""

    message: str


class Gate(grpc.aio.ServerInterceptor):
    """Admits and watches gRPC calls; health checks need no token."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._watched: dict[str, Any] = {}  # handlers by method

    async def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler, method = await continuation(details), details.method
        if handler is None:
            return handler
        if method != _OPEN_TO_ALL:
            try:
                self._admit(details.invocation_metadata)
            except FlashdiffError as error:
                self._calls.refused(method, code_of(error).name)
                return _refusing(handler, error)
        if method.startswith(_UNWATCHED):
            return handler
        if method not in self._watched:
            self._watched[method] = _watched(handler, method, self._calls, self._admit)
        return self._watched[method]

    def _admit(self, metadata: Any) -> None:
        _client.set(self._calls.admit(_texts(metadata).get("authorization", "")))


def _texts(metadata: Any) -> dict[str, str]:
    return {key: str(value) for key, value in metadata or ()}


def _watched(handler: Any, method: str, calls: Calls, admit: Callable[[Any], None]) -> Any:
    """The handler, its calls traced, counted and logged, and bytes that are no message answered INVALID_ARGUMENT.

    Each further message of a stream is admitted like a call: one that is refused ends it, when those before are answered.
    """

    def read(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            return Malformed(f"{len(data)} bytes that are no request of {method}")

    @contextmanager
    def watch(context: Any) -> Iterator[None]:
        client = client_of(context)  # now: gRPC hangs when a cancelled call is asked for its peer
        with calls.watch(method, client, _texts(context.invocation_metadata()), "OK") as call:
            try:
                yield
            except BaseException as error:  # an abort, mostly, which has left its code
                has_left = isinstance(error, asyncio.CancelledError | GeneratorExit)
                call.fail(context.code().name if context.code() else "CANCELLED" if has_left else "UNKNOWN")
                raise

    async def admitted(requests: AsyncIterator[Any], metadata: Any, refusals: list[FlashdiffError]) -> AsyncIterator[Any]:
        first = True
        async for request in requests:
            try:
                if not first:
                    admit(metadata)
            except FlashdiffError as error:
                refusals.append(error)
                return
            first = False
            yield request

    async def answer(request: Any, context: Any) -> Any:
        with watch(context):
            if isinstance(request, Malformed):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.message)
            return await handler.unary_unary(request, context)

    async def answer_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        with watch(context):
            if isinstance(request, Malformed):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.message)
            refusals: list[FlashdiffError] = []
            given = admitted(request, context.invocation_metadata(), refusals) if handler.request_streaming else request
            async for response in (handler.unary_stream or handler.stream_stream)(given, context):
                yield response
            for error in refusals:
                await abort(context, error)

    return _handler_like(handler, answer_stream if handler.response_streaming else answer, read)


def _refusing(handler: Any, error: FlashdiffError) -> Any:
    """A handler of the same kind that ends every call with the error."""

    async def refuse(_: Any, context: Any) -> None:  # of a stream as well: gRPC takes one that writes by itself, or not at all
        await abort(context, error)

    return _handler_like(handler, refuse, lambda data: data)


def _handler_like(handler: Any, behaviour: Callable[..., Any], read: Callable[[bytes], Any]) -> Any:
    makers: dict[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return makers[handler.request_streaming, handler.response_streaming](behaviour, read, handler.response_serializer)
