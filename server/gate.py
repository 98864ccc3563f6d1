"""What every gRPC call passes before its service: it is authenticated, gets a place among the calls at once, and is watched."""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from flashdiff.errors import BackendError, DeadlineError, FlashdiffError, OutOfMemoryError, TensorError
from flashdiff.server.calls import Calls
from flashdiff.server.caps import Place
from flashdiff.server.requests import sending_s
from flashdiff.server.status import abort, code_of
from flashdiff.server.unread import end_of_call

_HEALTH, _REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection."  # not logged: supervisors call every second
_OPEN_TO_ALL, _WATCH = _HEALTH + "Check", _HEALTH + "Watch"
_FIRST_S = 15.0  # for the first message of a call, of 4 MiB at most
# Of the call whose task this is. Never reset: a stream that is left unread is closed in another context.
_client: ContextVar[str] = ContextVar("client", default="")

_log = logging.getLogger(__name__)


def client_of(context: Any) -> str:
    """The client of a call: the name of its token, else its address."""
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
        if method not in self._watched:
            watched = _Watched(handler, method, self._calls, self._admit)
            self._watched[method] = _handler_like(handler, watched.answer, watched.read)
        return self._watched[method]

    def _admit(self, metadata: Any) -> None:
        _client.set(self._calls.admit(texts(metadata).get("authorization", "")))


def texts(metadata: Any) -> dict[str, str]:
    """The metadata of a call by key."""
    return {key: str(value) for key, value in metadata or ()}


class _Watched:
    """The calls of one method: capped, traced, counted and logged, and each ended with a status.

    Bytes that are no message are answered INVALID_ARGUMENT. Each further message of a stream is admitted like a call: one that
    is refused ends it, when those before are answered.
    """

    def __init__(self, handler: Any, method: str, calls: Calls, admit: Callable[[Any], None]) -> None:
        self._handler, self._method, self._calls, self._admit = handler, method, calls, admit
        self._behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self._is_health, self._is_quiet = method.startswith(_HEALTH), method.startswith((_HEALTH, _REFLECTION))

    def read(self, data: bytes) -> Any:
        """The message in these bytes, or a `Malformed`."""
        try:
            return self._handler.request_deserializer(data)
        except DecodeError:
            return Malformed(f"{len(data)} bytes that are no request of {self._method}")

    async def answer(self, _: Any, context: Any) -> Any:
        """Answer a call, whatever happens, with a response or a status."""
        client = client_of(context)  # now: gRPC hangs when a cancelled call is asked for its peer
        with self._watch(client, context):
            try:
                with self._calls.placed(client, is_health=self._is_health) as place:
                    return await self._answer_in(place, context)
            except grpc.aio.BaseError:
                raise
            except FlashdiffError as error:
                await abort(context, error)
            except MemoryError:
                await abort(context, OutOfMemoryError("there is not enough memory for this now"))
            except Exception:  # a mistake of ours: the log gets its traceback, and the client nothing of it
                _log.exception("method=%s failed", self._method)
                await abort(context, BackendError("internal error"))

    @contextmanager
    def _watch(self, client: str, context: Any) -> Iterator[None]:
        if self._is_quiet:
            yield
            return
        with self._calls.watch(self._method, client, texts(context.invocation_metadata()), "OK") as call:
            try:
                yield
            except BaseException as error:  # an abort, mostly, which has left its code
                has_left = isinstance(error, asyncio.CancelledError | GeneratorExit)
                call.fail(context.code().name if context.code() else "CANCELLED" if has_left else "UNKNOWN")
                raise

    async def _answer_in(self, place: Place, context: Any) -> Any:
        request = await _first_message(context)
        place.is_waiting = self._method == _WATCH
        if not self._handler.request_streaming:
            if request is grpc.aio.EOF:
                raise TensorError("the call has no message")
            if isinstance(request, Malformed):
                raise TensorError(request.message)
        refusals: list[FlashdiffError] = []
        given = self._messages(request, context, place, refusals) if self._handler.request_streaming else request
        if not inspect.isasyncgenfunction(self._behaviour):  # it has one response, or writes its responses itself
            return await self._behaviour(given, context)
        await _write_all(self._behaviour(given, context), context)
        if refusals:
            raise refusals[0]
        return None

    async def _messages(self, first: Any, context: Any, place: Place, refusals: list[FlashdiffError]) -> AsyncIterator[Any]:
        """The messages of a stream; why it ends early is added to the refusals."""
        metadata, request = context.invocation_metadata(), first
        while request is not grpc.aio.EOF:
            if isinstance(request, Malformed) and self._is_quiet:
                refusals.append(TensorError(request.message))
                return
            yield request
            place.is_waiting = True
            request = await context.read()
            place.is_waiting = False
            try:
                if request is not grpc.aio.EOF:
                    self._admit(metadata)
            except FlashdiffError as error:
                refusals.append(error)
                return


async def _write_all(responses: AsyncGenerator[Any, None], context: Any) -> None:
    """Write a call's responses; one that is not read in its time ends the call."""
    end_call, loop = end_of_call(), asyncio.get_running_loop()
    async with aclosing(responses):
        async for response in responses:
            unread = loop.call_later(sending_s(response.ByteSize()), end_call)
            try:
                await context.write(response)
            finally:
                unread.cancel()


async def _first_message(context: Any) -> Any:
    """The first message of a call, or EOF; a DeadlineError when neither comes in time."""
    try:
        async with asyncio.timeout(_FIRST_S):
            return await context.read()
    except TimeoutError:
        raise DeadlineError(f"the call's message did not come within {_FIRST_S:g} s") from None


def _refusing(handler: Any, error: FlashdiffError) -> Any:
    """A handler of the same kind that ends every call with the error, before its message is read."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    return _handler_like(handler, refuse, lambda data: data)


def _handler_like(handler: Any, behaviour: Callable[..., Any], read: Callable[[bytes], Any]) -> Any:
    """Of the same kind of response. Its requests are a stream, which gRPC leaves for the behaviour to read."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(behaviour, read, handler.response_serializer)
