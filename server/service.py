"""flashdiff.v1.ImageService: the calls of `proto/v1/image.proto`, translated for `requests`."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from flashdiff.errors import FlashdiffError
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.proto.v1 import image_pb2_grpc
from flashdiff.server.convert import (
    read_request,
    write_estimate,
    write_models,
    write_preview,
    write_response,
    write_result,
)
from flashdiff.server.gate import client_of, texts
from flashdiff.server.jobs import Step
from flashdiff.server.reply_size import stated_limit
from flashdiff.server.requests import Requests
from flashdiff.server.status import abort
from flashdiff.server.unread import end_of_call, when_answered


class ImageService(image_pb2_grpc.ImageServiceServicer):
    """Every call ends in one reply or one status; a client that leaves frees its place at the next step."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        updates = self._updates(request, context, end_of_call(), previews=False)
        when_answered(updates.aclose)
        return (await anext(updates)).result

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateUpdate]:
        async with aclosing(self._updates(request, context, end_of_call(), previews=True)) as updates:
            async for update in updates:
                yield update

    async def _updates(
        self, message: pb.GenerateRequest, context: Any, end_call: Callable[[], None], *, previews: bool
    ) -> AsyncGenerator[pb.GenerateUpdate, None]:
        """The previews where they are wanted, then the result; an error ends the call."""
        try:
            model = self._requests.models.get(message.model)
            limit = stated_limit(texts(context.invocation_metadata()))
            request = read_request(message, context.time_remaining(), stated_limit=limit, wants_steps=previews)
            async with aclosing(self._requests.serve(model, request, client_of(context), end_call)) as updates:
                async for update in updates:
                    if isinstance(update, Step):
                        yield write_preview(update, await self._requests.threads.encode_preview(update.picture))
                    else:
                        for result in write_result(write_response(update), limit if previews else None):
                            yield result
        except FlashdiffError as error:
            await abort(context, error)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        try:
            loras = await self._requests.loras.names()
        except FlashdiffError as error:
            await abort(context, error)
        return write_models(self._requests.models.served, self._requests.devices, loras)

    async def Estimate(self, request: pb.GenerateRequest, context: Any) -> pb.EstimateResponse:
        client = client_of(context)
        try:
            model = self._requests.models.get(request.model)
            limit = stated_limit(texts(context.invocation_metadata()))
            return write_estimate(await self._requests.estimate(model, read_request(request, stated_limit=limit), client))
        except FlashdiffError as error:
            await abort(context, error)
