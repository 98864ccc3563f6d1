"""flashdiff.v1.ImageService over a worker."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from flashdiff.errors import FlashdiffError, OverloadedError
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
from flashdiff.server.scheduler import Priority
from flashdiff.server.status import abort
from flashdiff.server.worker import Finished, Step, Worker

_SENDING_S = 30.0
_MAX_READING = 16  # images of requests at once: nothing has been promised to these yet
_MAX_READING_OF_ONE = 12  # of these for one client, so that none fills it alone
_READING_RETRY_S = 0.1
_SPEED_KNOWN_S = 10.0  # after a file was written, how fast that was
_SMALL_BYTES = 64 * 1024  # of pixels: to encode these takes less than to change threads and back
_Made = TypeVar("_Made")


class ImageEncoders:
    """Image files, read and written, and other long work, off the event loop and off the device thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="flashdiff-images")
        self._readers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flashdiff-readers")
        self._reading = Counter[str]()
        # When last seen, and seconds a pixel of late, by format and whether it is without a quality.
        self._speeds: dict[tuple[ImageFormat, bool], tuple[float, float]] = {}

    async def run(self, function: Callable[..., _Made], *args: object) -> _Made:
        """Any work that is too long for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def read(self, client: str, function: Callable[..., _Made], *args: object) -> _Made:
        """Read a client's request with an image; replies do not wait behind it. OverloadedError when too many are being read."""
        for count, limit, whose in (
            (self._reading.total(), _MAX_READING, ""),
            (self._reading[client], _MAX_READING_OF_ONE, " of yours"),
        ):
            if count >= limit:
                raise OverloadedError(f"{limit} images{whose} are being read already", retry_after_s=_READING_RETRY_S)
        self._reading[client] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)
        finally:
            self._reading[client] -= 1
            self._reading += Counter()  # forgets who has none

    async def encode(self, images: list[Pixels], image_format: ImageFormat, quality: int | None = None) -> list[bytes]:
        """The files of an order's images; how long it takes is remembered."""
        started = time.monotonic()
        files = await self._encoded(images, image_format, quality)
        now = time.monotonic()
        s_per_pixel = 3 * (now - started) / sum(image.size for image in images)
        usual = self._s_per_pixel(image_format, quality) or s_per_pixel
        # One stall among others must not refuse the next.
        self._speeds[image_format, quality is None] = now, usual + 0.2 * (min(s_per_pixel, 3 * usual) - usual)
        return files

    def expected_s(self, order: Order, image_format: ImageFormat, quality: int | None = None) -> float:
        """How long `encode` will take for the order's images, to go by what it took of late."""
        return order.count * order.size.width * order.size.height * self._s_per_pixel(image_format, quality)

    async def encode_preview(self, picture: Pixels) -> bytes:
        return (await self._encoded([picture], "png", None))[0]

    def _s_per_pixel(self, image_format: ImageFormat, quality: int | None) -> float:
        """0 where it is not known any more: refusing measures nothing, so a slow past would refuse for ever."""
        at, s_per_pixel = self._speeds.get((image_format, quality is None), (-math.inf, 0.0))
        return s_per_pixel if time.monotonic() - at < _SPEED_KNOWN_S else 0.0

    async def _encoded(self, images: list[Pixels], image_format: ImageFormat, quality: int | None) -> list[bytes]:
        if image_format in ("png", "raw") and sum(image.nbytes for image in images) <= _SMALL_BYTES:
            return [encode_image(image, image_format) for image in images]
        return await asyncio.gather(*(self.run(encode_image, image, image_format, quality) for image in images))


async def progress(
    worker: Worker,
    model: Model,
    order: Order,
    timeout_s: float | None,
    client: str,
    priority: Priority,
    *,
    steps: bool,
    reading_s: float = 0.0,
    files_s: float = 0.0,
) -> AsyncGenerator[Step | Finished, None]:
    """Submit an order and tell how it goes: every step where `steps` are wanted, then what was made.

    `reading_s`, what reading its image took, counts in the timings; `files_s`, what writing its files will take, in the
    timeout.

    It keeps its place, and its pixels count as pending, until the iterator is closed: close it, by `contextlib.aclosing`, when
    they are sent. Who does not read them for `_SENDING_S` keeps no room from others.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[Step | None] = asyncio.Queue()
    unread: asyncio.TimerHandle | None = None

    def tell(step: Step) -> None:
        loop.call_soon_threadsafe(told.put_nowait, step)

    def end() -> None:
        nonlocal unread
        told.put_nowait(None)
        if not job.departed:  # from now on, whether the steps before have been read or not
            unread = loop.call_later(_SENDING_S, worker.release, job)

    on_step = tell if steps else None
    job = worker.submit(model, order, timeout_s, client=client, priority=priority, on_step=on_step, files_s=files_s)
    try:
        job.answer.add_done_callback(lambda _: loop.call_soon_threadsafe(end))
        while (step := await told.get()) is not None:
            yield step
        finished = job.answer.result()
        finished.timings.input_image += 1000 * reading_s
        finished.timings.total += 1000 * reading_s
        describe_call(model=model.identity.name, steps=order.steps, **{f"{k}_ms": v for k, v in vars(finished.timings).items()})
        yield finished
    finally:
        if unread:
            unread.cancel()  # or it would keep the pixels as long
        worker.release(job)  # the client may have left or its deadline have passed


class ImageService(image_pb2_grpc.ImageServiceServicer):
    """Every call ends in one reply or one status; a client that leaves frees its place at the next step."""

    def __init__(self, worker: Worker, models: Models, encoders: ImageEncoders) -> None:
        self._worker, self._models, self._encoders = worker, models, encoders

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        updates, loop = self._updates(request, context, previews=False), asyncio.get_running_loop()
        context.add_done_callback(lambda _: loop.create_task(updates.aclose()))  # when the reply is sent
        return (await anext(updates)).result

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateUpdate]:
        async with aclosing(self._updates(request, context, previews=True)) as updates:
            async for update in updates:
                yield update

    async def _updates(
        self, request: pb.GenerateRequest, context: Any, *, previews: bool
    ) -> AsyncGenerator[pb.GenerateUpdate, None]:
        """The previews where they are wanted, then the result; an error ends the call."""
        try:
            started = time.perf_counter()
            client = client_of(context)
            model, order, wish = await self._read(request, client)
            reading_s = time.perf_counter() - started if request.image else 0.0
            updates = progress(
                self._worker,
                model,
                order,
                context.time_remaining(),
                client,
                wish.priority,
                steps=previews,
                reading_s=reading_s,
                files_s=self._encoders.expected_s(order, wish.format, wish.quality),
            )
            async with aclosing(updates):
                async for update in updates:
                    if isinstance(update, Step):
                        yield write_preview(update, await self._encoders.encode_preview(update.picture))
                    else:
                        yield write_result(await self._respond(model, order, wish, update))
        except FlashdiffError as error:
            await abort(context, error)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return write_models(self._models.served)

    async def Estimate(self, request: pb.GenerateRequest, context: Any) -> pb.EstimateResponse:
        client = client_of(context)
        try:
            model, order, wish = await self._read(request, client)
        except FlashdiffError as error:
            await abort(context, error)
        estimate_ms = self._worker.estimate_ms(model, order, client=client, priority=wish.priority)
        estimate_ms += 1000 * self._encoders.expected_s(order, wish.format, wish.quality)
        return write_estimate(estimate_ms, self._worker.pending_images)

    async def _read(self, request: pb.GenerateRequest, client: str) -> tuple[Model, Order, Wish]:
        model = self._models.get(request.model)
        if request.image:
            return model, *await self._encoders.read(client, read_request, request, model.components.spec)
        return model, *read_request(request, model.components.spec)

    async def _respond(self, model: Model, order: Order, wish: Wish, finished: Finished) -> pb.GenerateResponse:
        started = time.perf_counter()
        encoded = await self._encoders.encode(finished.images, wish.format, wish.quality)
        encoding_ms = 1000 * (time.perf_counter() - started)
        return write_response(order, wish, encoded, finished.timings, encoding_ms, finished.batches, model.identity)
