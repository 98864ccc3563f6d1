"""Image files, read and written on threads of their own: off the event loop and off the device thread."""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from flashdiff.errors import OverloadedError
from flashdiff.orders import Order, Pixels
from flashdiff.server.images import LARGE_BYTES, encode_image
from flashdiff.server.names import ImageFormat

THREADS = 2
"""That write files, of one server, whatever the number of its devices; and as many for large pictures, behind which the files
of others are not to wait."""
_MAX_READING = 16  # images of requests at once: nothing has been promised to these yet
_MAX_READING_OF_ONE = 12  # of these for one client, so that one client cannot take all of them
_READING_RETRY_S = 0.1
_SPEED_KNOWN_S = 10.0  # after a file was written, how fast that was
_SMALL_BYTES = 64 * 1024  # of pixels: encoding these takes less time than switching threads
_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class _Reading:
    """A file to be read, and the future of the caller's event loop that gets its content."""

    read: Callable[[], Any]
    content: "asyncio.Future[Any]"


class _Reader:
    """A thread that reads files for clients in turn, one of each; an event loop calls the methods.

    If the caller gives up, the reading or its content is dropped. The interpreter does not wait for the thread at exit.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Reading]] = {}  # by client, the next one first
        self._given: queue.SimpleQueue[_Reading] = queue.SimpleQueue()
        self._current: _Reading | None = None
        self._thread: threading.Thread | None = None

    def read(self, client: str, read: Callable[[], Any]) -> "asyncio.Future[Any]":
        """The content, when it is this client's turn; cancel it to give up."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flashdiff-reader", daemon=True)
            self._thread.start()
        reading = _Reading(read, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(client, deque()).append(reading)
        self._give_next()
        return reading.content

    def _give_next(self) -> None:
        while self._waiting and self._current is None:
            client = next(iter(self._waiting))
            of_client = self._waiting.pop(client)
            reading = of_client.popleft()
            if of_client:
                self._waiting[client] = of_client  # behind the others
            if not reading.content.done():
                self._current = reading
                self._given.put(reading)

    def _end(self, reading: _Reading, content: Any, error: BaseException | None) -> None:
        self._current = None
        if reading.content.done():
            pass
        elif error:
            reading.content.set_exception(error)
        else:
            reading.content.set_result(content)
        self._give_next()

    def _run(self) -> None:
        while True:
            reading = self._given.get()
            content, error = None, None
            try:
                content = reading.read()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is closed
                reading.content.get_loop().call_soon_threadsafe(self._end, reading, content, error)
            del reading, content, error  # not kept until the next


class ImageThreads:
    """What reads, writes and measures; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._threads, self._large_threads = (
            ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix=f"flashdiff-{what}") for what in ("images", "large-images")
        )
        self._reader = _Reader()
        self._reading = Counter[str]()
        # When a file was last written, and seconds a pixel, by format and whether it has the default quality.
        self._speeds: dict[tuple[ImageFormat, bool], tuple[float, float]] = {}

    async def run(self, function: Callable[..., _Made], *args: object, size: int = 0) -> _Made:
        """Any work that is too long for the event loop; `size` is that of the pictures it makes or writes, in bytes of pixels."""
        threads = self._large_threads if size > LARGE_BYTES else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    async def read(self, client: str, function: Callable[..., _Made], *args: object) -> _Made:
        """Read a client's request with images; replies do not wait behind it, and clients take turns.

        OverloadedError when too many are being read. A caller that is cancelled is free at once, whatever the thread does then.
        """
        for count, limit, whose in (
            (self._reading.total(), _MAX_READING, ""),
            (self._reading[client], _MAX_READING_OF_ONE, " of yours"),
        ):
            if count >= limit:
                raise OverloadedError(f"{limit} images{whose} are being read already", retry_after_s=_READING_RETRY_S)
        self._reading[client] += 1
        try:
            return await self._reader.read(client, partial(function, *args))
        finally:
            self._reading[client] -= 1
            self._reading += Counter()  # forgets the clients that have none

    async def encode(self, images: list[Pixels], image_format: ImageFormat, quality: int | None = None) -> list[bytes]:
        """The files of an order's images [H, W, 3]; measures how long it takes."""
        started = self._clock()
        files = await self.encode_files(images, image_format, quality)
        now = self._clock()
        s_per_pixel = 3 * (now - started) / sum(image.size for image in images)
        usual = self._s_per_pixel(image_format, quality) or s_per_pixel
        # One stall among others must not refuse the next.
        self._speeds[image_format, quality is None] = now, usual + 0.2 * (min(s_per_pixel, 3 * usual) - usual)
        return files

    def expected_s(self, order: Order, image_format: ImageFormat, quality: int | None = None) -> float:
        """How long `encode` will take for the order's images, by what it took in the last seconds."""
        return order.count * order.whole_size.width * order.whole_size.height * self._s_per_pixel(image_format, quality)

    async def encode_preview(self, picture: Pixels) -> bytes:
        """A preview [h, w, 3] as a PNG file."""
        return (await self.encode_files([picture], "png"))[0]

    def _s_per_pixel(self, image_format: ImageFormat, quality: int | None) -> float:
        """0 when no file was written of late: refusing measures nothing, so a slow past would refuse for ever."""
        at, s_per_pixel = self._speeds.get((image_format, quality is None), (-math.inf, 0.0))
        return s_per_pixel if self._clock() - at < _SPEED_KNOWN_S else 0.0

    async def encode_files(self, images: list[Pixels], image_format: ImageFormat, quality: int | None = None) -> list[bytes]:
        """The files of pictures [H, W, 3], in their order; measures nothing."""
        if image_format in ("png", "raw") and sum(image.nbytes for image in images) <= _SMALL_BYTES:
            return [encode_image(image, image_format) for image in images]
        return await asyncio.gather(*(self.run(encode_image, image, image_format, quality, size=image.size) for image in images))
