"""What every protocol shares: a request in no protocol's terms, how it is served, and its reply. Protocols only translate."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flashdiff.components import Size
from flashdiff.controls import ControlRequest
from flashdiff.errors import DeadlineError
from flashdiff.lora_requests import LoraRequest
from flashdiff.orders import Order, Pixels
from flashdiff.references import ReferenceRequest
from flashdiff.server.caps import network_of
from flashdiff.server.image_threads import ImageThreads
from flashdiff.server.images import readers
from flashdiff.server.jobs import Finished, Step, Timings, pixel_bytes
from flashdiff.server.lora_reads import LoraReads
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ImageFormat, Priority
from flashdiff.server.reply_size import ReplyLimit
from flashdiff.server.submitter import DeviceState, Submitter
from flashdiff.server.tracing import describe_call, note_device, note_model
from flashdiff.tasks import check_order

_SENDING_S = 30.0  # how long a reply that the client does not read keeps its room,
_SENDING_BYTES_PER_S = 1e6  # and a second more for so many bytes
_JOINING_S = 1e-7  # what a pixel of an image takes that is joined from tiles, on a busy core


def sending_s(size: int) -> float:
    """How long sending that many bytes may take a client that reads."""
    return _SENDING_S + size / _SENDING_BYTES_PER_S


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One request for images, as a protocol reads it; nothing is checked against the model yet."""

    prompt: str
    negative_prompt: str = ""
    truncate_prompt: bool = False
    """Whether prompts are cut to what the model takes; else longer ones are refused."""
    seed: int | None = None
    """None: drawn."""
    steps: int | None = None
    size: Size | None = None
    count: int = 1
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """PNG, JPEG or WebP files of the task's inputs, by name."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """The task's numbers, by name."""
    controls: Sequence[ControlRequest] = ()
    reference: ReferenceRequest | None = None
    loras: Sequence[LoraRequest] = ()
    """Without their values, which the server reads."""
    format: ImageFormat = "png"
    quality: int | None = None
    priority: Priority = "normal"
    timeout_s: float | None = None
    """Seconds from when the request was read."""
    wants_steps: bool = False
    wants_files: bool = True
    """Whether the images are wanted as files, or as pixels alone."""
    limit: ReplyLimit | None = None
    """None: a reply may have any size."""

    @property
    def has_images(self) -> bool:
        """Whether the request brings images, which take a while to read."""
        return bool(self.files or self.controls or self.reference)

    @property
    def has_files(self) -> bool:
        """Whether anything is to be read for it."""
        return self.has_images or bool(self.loras)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to a request."""

    model: Model
    order: Order
    images: list[Pixels]
    files: list[bytes]
    """Empty where no files are wanted."""
    format: ImageFormat
    timings: Timings
    stages_ms: Mapping[str, float]
    """The device's time by stage, see `Timings.by_stage`."""
    encoding_ms: float
    """Joining tiles, and writing the files."""
    batches: list[int]
    """Slots of each denoise call that the request took part in."""


@dataclass(frozen=True)
class Estimate:
    """How long a request would take if it were sent now, waiting included, and how many images are pending."""

    expected_ms: float
    pending_images: int


class Requests:
    """Serves requests of any protocol."""

    def __init__(self, worker: Submitter, models: Models) -> None:
        self._worker, self._clock = worker, worker.clock
        self.models = models
        self.threads, self.loras = ImageThreads(worker.clock), LoraReads(models.loras)

    async def serve(
        self, model: Model, request: ImageRequest, client: str, on_unread: Callable[[], None] | None = None
    ) -> AsyncGenerator[Step | Reply, None]:
        """Yield each step where steps are wanted, then the reply; a request that fails raises its FlashdiffError.

        The request keeps its place, and its pixels their room, until the generator is closed: close it, by
        `contextlib.aclosing`, when the reply is sent. A reply that is not read for 30 s and longer gives its room back, and
        `on_unread` is called, to give its memory back as well.
        """
        note_model(model.identity.name)
        started = self._clock()
        order = await self._order(model, request, client)
        reading_s = self._clock() - started if request.has_files else 0.0
        worker, loop = self._worker, asyncio.get_running_loop()
        steps: asyncio.Queue[Step | None] = asyncio.Queue()
        unread: asyncio.TimerHandle | None = None

        def end() -> None:
            nonlocal unread
            steps.put_nowait(None)
            if not is_closed:  # from now on, whether the steps before have been read or not
                unread = loop.call_later(sending_s(pixel_bytes(order)), take_back)

        def take_back() -> None:
            worker.release(job)
            if on_unread:
                on_unread()

        def on_step(step: Step) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        is_closed = False
        job = worker.submit(
            model,
            order,
            None if request.timeout_s is None else request.timeout_s - reading_s,
            client=network_of(client),
            priority=request.priority,
            on_step=on_step if request.wants_steps and not order.tiling else None,  # a step of a tile shows no image
            files_s=self._files_s(order, request),
        )
        try:
            job.answer.add_done_callback(lambda _: loop.call_soon_threadsafe(end))
            while (step := await steps.get()) is not None:
                yield step
            yield await self._reply(model, order, request, job.answer.result(), reading_s)
        finally:
            is_closed = True
            if unread:
                unread.cancel()  # or it would keep the pixels as long
            worker.release(job)  # the client may have left, or its deadline have passed

    @property
    def devices(self) -> Sequence[DeviceState]:
        """The devices that have names."""
        return self._worker.devices

    async def estimate(self, model: Model, request: ImageRequest, client: str) -> Estimate:
        """What the request would take now."""
        order = await self._order(model, request, client)
        own_ms = self._worker.estimate_ms(model, order, client=network_of(client), priority=request.priority)
        return Estimate(own_ms + 1000 * self._files_s(order, request), self._worker.pending_images)

    async def _order(self, model: Model, request: ImageRequest, client: str) -> Order:
        if not request.has_files:
            return _read_order(model, request)
        try:
            async with asyncio.timeout(request.timeout_s):
                if request.loras:
                    request = replace(request, loras=await self.loras.read(model, request.loras))
                if not request.has_images:
                    return _read_order(model, request)
                return await self.threads.read(client, _read_order, model, request)
        except TimeoutError:
            read = "images" if request.has_images else "LoRAs"
            raise DeadlineError(f"the deadline passed while the {read} were being read") from None

    def _files_s(self, order: Order, request: ImageRequest) -> float:
        pixels = order.count * order.whole_size.width * order.whole_size.height
        joining_s = pixels * _JOINING_S if order.tiling else 0.0
        return joining_s + (self.threads.expected_s(order, request.format, request.quality) if request.wants_files else 0.0)

    async def _reply(self, model: Model, order: Order, request: ImageRequest, finished: Finished, reading_s: float) -> Reply:
        timings, started = finished.timings, self._clock()
        if reading_s:
            timings = replace(timings, reading=1000 * reading_s, total=timings.total + 1000 * reading_s)
        images = finished.images
        if order.tiling:
            size = 3 * order.count * order.whole_size.width * order.whole_size.height
            images = await self.threads.run(order.task.whole_images, order, images, size=size)
        files = await self.threads.encode(images, request.format, request.quality) if request.wants_files else []
        reply = Reply(
            model=model,
            order=order,
            images=images,
            files=files,
            format=request.format,
            timings=timings,
            stages_ms=timings.by_stage(model.stages),
            encoding_ms=1000 * (self._clock() - started),
            batches=finished.batches,
        )
        spent = {"queue": timings.queue, "total": timings.total, **reply.stages_ms}
        describe_call(model=model.identity.name, steps=order.steps, **{f"{name}_ms": ms for name, ms in spent.items()})
        if finished.device:
            note_device(finished.device)
        return reply


def _read_order(model: Model, request: ImageRequest) -> Order:
    """The order, its files decoded; that takes a while."""
    order = check_order(
        model.components.spec,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        truncate_prompt=request.truncate_prompt,
        seed=secrets.randbits(32) if request.seed is None else request.seed,
        steps=request.steps,
        size=request.size,
        count=request.count,
        inputs=readers(request.files),
        parameters=request.parameters,
        controls=request.controls,
        reference=request.reference,
        loras=request.loras,
    )
    if request.limit:
        request.limit.check(order, request.quality)
    return order
