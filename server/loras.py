"""A server's folder of LoRAs: their names, and the values of those that requests use, kept in memory."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.errors import LoraError, OverloadedError, RepositoryError, RequestError
from flashdiff.lora_files import FLASH, PEFT_CONFIG
from flashdiff.lora_requests import NAME
from flashdiff.lora_slots import SlotTable, find_weights, read_slot_lora
from flashdiff.reading import Witness, witness

_CACHE_BYTES = 1 << 30
_MOST_BYTES = 4 << 30
_RETRY_S = 1.0
_MOST_LISTED = 10
_ENDING = ".safetensors"

_log = logging.getLogger(__name__)

_Key = tuple[str, str]
"""The hash of a LoRA's files, and of the table that they were read for."""


class LoraFolder:
    """LoRAs by name: NAME.safetensors, or a folder NAME with one; a file that is replaced counts from the next request on.

    Safe to use from any thread; its methods read the disk. At least one LoRA, and otherwise at most `max_bytes` of values, are
    kept, those last used; a request keeps its own while it runs. All of them together take at most `most_bytes`, or what eight
    of the largest take.
    """

    def __init__(self, folder: Path, max_bytes: int = _CACHE_BYTES, most_bytes: int = _MOST_BYTES) -> None:
        self._folder, self._max_bytes, self._most_bytes, self.bytes = folder, max_bytes, most_bytes, 0
        self._hashes: dict[tuple[str, str], tuple[Witness, str]] = {}  # by name and table: the files as they were, their hash
        self._kept: OrderedDict[_Key, NDArray[np.float32]] = OrderedDict()
        self._used: WeakValueDictionary[_Key, NDArray[np.float32]] = WeakValueDictionary()  # those kept, and those of requests
        self._reading = 0  # bytes of values
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """What requests may call for, whether it fits a model or not; RepositoryError when the folder cannot be read."""
        try:
            found = {path.name.removesuffix(_ENDING) for path in self._folder.iterdir() if find_weights(path)}
        except OSError as error:
            raise RepositoryError(f"the folder of LoRAs cannot be read: {error.strerror or error}") from None
        return sorted(filter(_is_name, found))

    def read(self, name: str, table: SlotTable) -> NDArray[np.float32]:
        """The values of a slot for a LoRA; RequestError for a name that there is not, or a LoRA that does not fit the model.

        OverloadedError while the LoRAs of other requests take all of the memory.
        """
        file = self._find(name)
        target, files = table.key, witness(_files_of(file))
        with self._lock:
            known, weights_hash = self._hashes.get((name, target), (None, ""))
            if known == files and (values := self._used.get((weights_hash, target))) is not None:
                return self._keep((weights_hash, target), values)
        with self._room(4 * table.values):
            try:
                lora = read_slot_lora(file, table, name)
            except LoraError as error:
                raise RequestError("loras.name", name, str(error).removeprefix(f"{name}: ")) from None
            _log.info(
                "read LoRA %s (%s) for %s: rank %d, %d layers", name, lora.weights_hash[:12], table.base, lora.rank, lora.layers
            )
            lora.values.flags.writeable = False  # requests share them
            with self._lock:
                self._hashes[name, target] = files, lora.weights_hash
                return self._keep((lora.weights_hash, target), lora.values)

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Room for the values of a LoRA, of so many bytes, at the cost of those that no request needs now."""
        most = max(self._most_bytes, defaults.MAX_LORA_SLOTS * size)  # one request may bring as many
        with self._lock:
            while self._kept and self._taken + size > most:
                self._drop_oldest()
            if (taken := self._taken) + size > most:
                raise OverloadedError(
                    f"the LoRAs of pending requests take {taken >> 20} MiB, and all may take {most >> 20} MiB",
                    retry_after_s=_RETRY_S,
                )
            self._reading += size
        try:
            yield
        finally:
            with self._lock:
                self._reading -= size

    @property
    def _taken(self) -> int:
        return self._reading + sum(values.nbytes for values in self._used.values())

    def _find(self, name: str) -> Path:
        file = None
        if _is_name(name):
            places = (self._folder / name, self._folder / (name + _ENDING))
            file = next((found for found in map(find_weights, places) if found), None)
        if file is None:
            names = self.names()
            listed = ", ".join(names[:_MOST_LISTED]) or "none"
            more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
            raise RequestError("loras.name", name, f"this server has {listed}{more}")
        return file

    def _keep(self, key: _Key, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add to what is kept, and drop what was used longest ago beyond the limit; one LoRA under two names is kept once."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        values = self._used.setdefault(key, values)
        self._kept[key] = values
        self.bytes += values.nbytes
        while self.bytes > self._max_bytes and len(self._kept) > 1:
            self._drop_oldest()
        return values

    def _drop_oldest(self) -> None:
        self.bytes -= self._kept.popitem(last=False)[1].nbytes


def _is_name(text: str) -> bool:
    """Whether it may name a LoRA, which has no second name with the file's ending."""
    return bool(NAME.fullmatch(text)) and not text.endswith(_ENDING)


def _files_of(file: Path) -> list[Path]:
    """Those that decide what a LoRA is."""
    return [file, *(file.parent / name for name in (FLASH, PEFT_CONFIG))]
