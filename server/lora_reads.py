"""Reads LoRAs for requests, off the event loop and in bounded time: a disk may hang."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flashdiff.errors import OverloadedError, RepositoryError, RequestError
from flashdiff.lora_requests import LoraRequest, check_loras
from flashdiff.server.loras import LoraFolder
from flashdiff.server.models import Model
from flashdiff.server.repository import in_thread

_READ_S = 60.0  # a large LoRA from a slow disk
_MOST_READING = 8  # LoRAs at once, those that hang included
_RETRY_S = 0.5

_Values = NDArray[np.float32]


class LoraReads:
    """The LoRAs of `folder`, None where a server has none; an event loop calls the methods."""

    def __init__(self, folder: LoraFolder | None) -> None:
        self._folder = folder
        self._listing: asyncio.Future[list[str]] | None = None
        self._reading: dict[tuple[str, str], asyncio.Future[_Values]] = {}  # by name and table

    async def names(self) -> list[str]:
        """The names in the folder; RepositoryError when it cannot be read, or not in time. Callers share one listing."""
        if self._folder is None:
            return []
        if self._listing is None or self._listing.done():
            self._listing = in_thread(self._folder.names)
        try:
            async with asyncio.timeout(_READ_S):
                return await asyncio.shield(self._listing)
        except TimeoutError:
            raise RepositoryError(f"the folder of LoRAs could not be read within {_READ_S:g} s") from None

    async def read(self, model: Model, given: Sequence[LoraRequest]) -> list[LoraRequest]:
        """The LoRAs of a request with their values; RequestError for what `check_loras` or `LoraFolder.read` refuse."""
        check_loras(model.components.spec, given)
        return [replace(lora, values=await self._values(model, lora.name)) for lora in given]

    async def _values(self, model: Model, name: str) -> _Values:
        """Requests for one LoRA share a reading."""
        if self._folder is None or model.slots is None:
            raise RequestError("loras.name", name, "this server was started without --loras")
        key = name, model.slots.key
        if (reading := self._reading.get(key)) is None:
            if len(self._reading) >= _MOST_READING:
                raise OverloadedError(f"{len(self._reading)} LoRAs are being read already", retry_after_s=_RETRY_S)
            reading = self._reading[key] = in_thread(partial(self._folder.read, name, model.slots))
            reading.add_done_callback(lambda _: self._reading.pop(key))
        try:
            async with asyncio.timeout(_READ_S):
                return await asyncio.shield(reading)
        except TimeoutError:
            raise RepositoryError(f"LoRA '{name}' could not be read within {_READ_S:g} s") from None
