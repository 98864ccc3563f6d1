"""flashdiff.v1.ImageService over a worker."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flashdiff.errors import FlashdiffError
from flashdiff.generate import Order
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.proto.v1 import image_pb2_grpc
from flashdiff.server.convert import ModelIdentity, read_request, write_response
from flashdiff.server.images import encode_image
from flashdiff.server.status import code_of
from flashdiff.server.worker import Finished, Worker


class ImageService(image_pb2_grpc.ImageServiceServicer):
    """Every call ends in one reply or one status; a client that leaves frees its place at the next step."""

    def __init__(self, worker: Worker, model: ModelIdentity) -> None:
        self._worker, self._model = worker, model
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="flashdiff-images")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:  # noqa: N802
        try:
            order, image_format = read_request(request, self._worker.components.spec)
            finished = await self._finish(order, context.time_remaining())
        except FlashdiffError as error:
            await context.abort(code_of(error), str(error))
            raise  # abort has raised already
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        encoded = await asyncio.gather(
            *(loop.run_in_executor(self._encoders, encode_image, image, image_format) for image in finished.images)
        )
        encoding_ms = 1000 * (time.perf_counter() - started)
        return write_response(order, encoded, image_format, finished.timings, encoding_ms, self._model)

    async def _finish(self, order: Order, timeout_s: float | None) -> Finished:
        job = self._worker.submit(order, timeout_s)
        try:
            return await asyncio.wrap_future(job.answer)
        except asyncio.CancelledError:  # the client has left or its deadline has passed
            self._worker.cancel(job)
            raise
