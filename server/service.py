"""flashdiff.v1.ImageService over a worker."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from flashdiff.errors import FlashdiffError
from flashdiff.generate import Order, Pixels
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.proto.v1 import image_pb2_grpc
from flashdiff.server.convert import (
    Wish,
    read_request,
    write_estimate,
    write_models,
    write_preview,
    write_response,
    write_result,
)
from flashdiff.server.gate import client_of, describe_call
from flashdiff.server.images import ImageFormat, encode_image
from flashdiff.server.models import Model, Models
from flashdiff.server.status import code_of, trailers_of
from flashdiff.server.worker import Finished, Job, Step, Worker


class ImageEncoders:
    """Image files off the event loop and off the device thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="flashdiff-images")

    async def encode(self, images: list[Pixels], image_format: ImageFormat, quality: int | None = None) -> list[bytes]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(loop.run_in_executor(self._threads, encode_image, image, image_format, quality) for image in images)
        )


async def finish(worker: Worker, job: Job) -> Finished:
    """The job's answer; a caller that is cancelled gives the job's place up."""
    try:
        finished = await asyncio.wrap_future(job.answer)
    except asyncio.CancelledError:  # the client has left or its deadline has passed
        worker.cancel(job)
        raise
    describe_call(
        model=job.model.identity.name, steps=job.order.steps, **{f"{k}_ms": v for k, v in vars(finished.timings).items()}
    )
    return finished


async def abort(context: Any, error: FlashdiffError) -> NoReturn:
    """End the call with the status of the error."""
    await context.abort(code_of(error), str(error), trailers_of(error))
    raise error  # abort has raised already


class ImageService(image_pb2_grpc.ImageServiceServicer):
    """Every call ends in one reply or one status; a client that leaves frees its place at the next step."""

    def __init__(self, worker: Worker, models: Models, encoders: ImageEncoders) -> None:
        self._worker, self._models, self._encoders = worker, models, encoders

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        try:
            model, order, wish = self._read(request)
            timeout_s, client = context.time_remaining(), client_of(context)
            job = self._worker.submit(model, order, timeout_s, client=client, priority=wish.priority)
            return await self._respond(model, order, wish, await finish(self._worker, job))
        except FlashdiffError as error:
            await abort(context, error)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateUpdate]:
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | None] = asyncio.Queue()

        def tell(step: Step | None) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        try:
            model, order, wish = self._read(request)
            timeout_s, client = context.time_remaining(), client_of(context)
            job = self._worker.submit(model, order, timeout_s, client=client, priority=wish.priority, on_step=tell)
            job.answer.add_done_callback(lambda _: tell(None))
            try:
                while (step := await steps.get()) is not None:
                    png = (await self._encoders.encode([step.picture], "png"))[0]
                    yield write_preview(step, png)
                yield write_result(await self._respond(model, order, wish, await finish(self._worker, job)))
            finally:
                self._worker.cancel(job)  # the client may have left; nothing to free otherwise
        except FlashdiffError as error:
            await abort(context, error)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return write_models(self._models.served)

    async def Estimate(self, request: pb.GenerateRequest, context: Any) -> pb.EstimateResponse:
        try:
            model, order, wish = self._read(request)
        except FlashdiffError as error:
            await abort(context, error)
        return write_estimate(self._worker.estimate_ms(model, order, wish.priority), self._worker.pending_images)

    def _read(self, request: pb.GenerateRequest) -> tuple[Model, Order, Wish]:
        model = self._models.get(request.model)
        return model, *read_request(request, model.components.spec)

    async def _respond(self, model: Model, order: Order, wish: Wish, finished: Finished) -> pb.GenerateResponse:
        started = time.perf_counter()
        encoded = await self._encoders.encode(finished.images, wish.format, wish.quality)
        encoding_ms = 1000 * (time.perf_counter() - started)
        return write_response(order, wish, encoded, finished.timings, encoding_ms, finished.batches, model.identity)
