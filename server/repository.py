"""Reads the model repository and loads from it, off the event loop and in bounded time: a disk or an engine may hang."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from flashdiff.errors import BackendError, OverloadedError, RepositoryError
from flashdiff.server.models import Models

_READ_S = 10.0  # for the names in the repository
_LOAD_S = 900.0  # compiling a large model takes minutes
_MOST_HUNG = 3  # loads given up that still hold their thread and memory
_Made = TypeVar("_Made")

_log = logging.getLogger(__name__)


class Repository:
    """The repository of `models`; an event loop calls the methods."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._turn = asyncio.Lock()
        self._reading: asyncio.Future[list[str]] | None = None
        self._loads = set[asyncio.Future[Any]]()
        self._hung = 0

    async def available(self) -> list[str]:
        """The names in it; RepositoryError when it cannot be read, or not in time. Callers share one reading."""
        if self._reading is None or self._reading.done():
            self._reading = in_thread(self._models.available)
        try:
            async with asyncio.timeout(_READ_S):
                return await asyncio.shield(self._reading)
        except TimeoutError:
            raise RepositoryError(f"the repository could not be read within {_READ_S:g} s") from None

    async def load(self, name: str) -> None:
        """Load a model when the loads before are done; a load that hangs is given up with a BackendError.

        A load goes on when its caller leaves.
        """
        loading = asyncio.ensure_future(self._load(name))
        self._loads.add(loading)
        loading.add_done_callback(self._loads.discard)
        loading.add_done_callback(_retrieve)
        await asyncio.shield(loading)

    async def _load(self, name: str) -> None:
        async with self._turn:  # one at a time: each takes memory and the processor
            if self._hung >= _MOST_HUNG:
                raise OverloadedError(f"{self._hung} loads hang already: restart the server")
            given_up = threading.Event()
            loading = in_thread(partial(self._models.load, name, given_up.is_set))
            try:
                async with asyncio.timeout(_LOAD_S):
                    await asyncio.shield(loading)
            except TimeoutError:
                given_up.set()
                self._hung += 1
                loading.add_done_callback(self._came_back)
                _log.error("loading a model has not come back for %.0f s: it is given up", _LOAD_S)
                raise BackendError(f"it has not come back for {_LOAD_S:g} s and is given up") from None

    def _came_back(self, _: object) -> None:
        self._hung -= 1


def in_thread(function: Callable[[], _Made]) -> "asyncio.Future[_Made]":
    """The function's result, from a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[_Made] = loop.create_future()
    made.add_done_callback(_retrieve)

    def run() -> None:
        try:
            settle: Callable[[], None] = partial(made.set_result, function())
        except BaseException as error:
            settle = partial(made.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name="flashdiff-repository", daemon=True).start()
    return made


def _retrieve(made: "asyncio.Future[Any]") -> None:
    """Take note of the error, which asyncio would log if the caller has left."""
    if not made.cancelled():
        made.exception()
