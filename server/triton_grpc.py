"""Triton's protocol over gRPC, for stock `tritonclient.grpc`."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import message_factory

from flashdiff.errors import FlashdiffError, OutOfMemoryError, TensorError
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.gate import Malformed, client_of, texts
from flashdiff.server.reply_size import MAX_MESSAGE_BYTES, stated_limit
from flashdiff.server.status import abort
from flashdiff.server.triton import TritonService
from flashdiff.server.triton_convert import MAX_ID
from flashdiff.server.unread import end_of_call, when_answered

TRITON_SERVICE = "inference.GRPCInferenceService"
_IN_STREAM = 32  # requests of one stream that are worked on at once; the next is read when one is answered

_log = logging.getLogger(__name__)


def triton_handler(service: TritonService) -> grpc.GenericRpcHandler:
    """The service under Triton's name."""
    inference = _Inference(service)
    handlers = {}
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        make = grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
        read = message_factory.GetMessageClass(method.input_type).FromString
        write: Callable[[Any], bytes] = message_factory.GetMessageClass(method.output_type).SerializeToString
        behaviour = getattr(inference, method.name, None) or _unary(getattr(service, method.name))
        handlers[method.name] = make(behaviour, read, write)
    return grpc.method_handlers_generic_handler(TRITON_SERVICE, handlers)


def _unary(call: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """A call that has one response, whose errors end it with their status."""

    async def answer(request: Any, context: Any) -> Any:
        try:
            return await call(request)
        except FlashdiffError as error:
            await abort(context, error)

    return answer


class _Inference:
    """The calls that make images, by their names in `proto/v1/triton.proto`."""

    def __init__(self, service: TritonService) -> None:
        self._service = service

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        try:
            limit = stated_limit(texts(context.invocation_metadata()))
            updates = self._service.infer(
                request,
                context.time_remaining(),
                client_of(context),
                stream=False,
                on_unread=end_of_call(),
                max_message_bytes=limit or MAX_MESSAGE_BYTES,
            )
            when_answered(updates.aclose)
            return await anext(updates)
        except FlashdiffError as error:
            await abort(context, error)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Requests of one stream run concurrently; an error is a response in the stream, which continues."""
        # Both are bounded, so that a client that sends without reading blocks only itself, and its unread replies hold its room.
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(1)
        room = asyncio.Semaphore(_IN_STREAM)
        client, end_call, metadata = client_of(context), end_of_call(), texts(context.invocation_metadata())

        async def answer(request: pb.ModelInferRequest | Malformed) -> None:
            try:
                if isinstance(request, Malformed):
                    raise TensorError(request.message)
                limit, remaining_s = stated_limit(metadata) or MAX_MESSAGE_BYTES, context.time_remaining()
                updates = self._service.infer(
                    request, remaining_s, client, stream=True, on_unread=end_call, max_message_bytes=limit
                )
                async for response in updates:
                    await responses.put(pb.ModelStreamInferResponse(infer_response=response))
            except Exception as error:
                if isinstance(error, MemoryError):
                    error = OutOfMemoryError("there is not enough memory for this now")
                if not isinstance(error, FlashdiffError):
                    _log.exception("a request of a stream failed")
                message = str(error) if isinstance(error, FlashdiffError) else "internal error"
                failed = pb.ModelInferResponse()
                if not isinstance(request, Malformed):
                    failed.model_name, failed.id = request.model_name[:MAX_ID], request.id[:MAX_ID]
                await responses.put(pb.ModelStreamInferResponse(error_message=message, infer_response=failed))
            finally:
                room.release()

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    async for request in requests:
                        await room.acquire()
                        group.create_task(answer(request))
            except Exception:
                await responses.put(None)
                raise
            await responses.put(None)  # not when cancelled: then the responses are not read any more

        reading = asyncio.ensure_future(read())
        try:
            while (response := await responses.get()) is not None:
                yield response
            await reading
        finally:
            reading.cancel()
