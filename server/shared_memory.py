"""Regions of system shared memory that Triton clients on this machine register, to pass tensors without copies over the wire."""

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from flashdiff.errors import RequestError

_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class Region:
    """`byte_size` bytes from `offset` on of the POSIX shared memory object `key`."""

    name: str
    key: str
    offset: int
    byte_size: int
    memory: mmap.mmap


class Regions:
    """The registered regions by name; safe to use from any thread."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}
        self._changing = threading.Lock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map an object that is there; RequestError says what is wrong with it."""
        with self._changing:
            if name in self._regions:
                raise RequestError("name", name, "a region of that name is registered already")
            if not key.strip("/") or "/" in key.strip("/") or key.strip("/") in (".", ".."):
                raise RequestError("key", key, "it must be the name of a shared memory object")
            try:
                handle = os.open(_FOLDER / key.strip("/"), os.O_RDWR | os.O_NOFOLLOW)
            except OSError:
                raise RequestError("key", key, "there is no such shared memory object here") from None
            try:
                size = os.fstat(handle).st_size
                if byte_size == 0 or offset + byte_size > size:
                    raise RequestError("byte_size", byte_size, f"the object has {size} bytes and the region starts at {offset}")
                memory = mmap.mmap(handle, offset + byte_size)
            finally:
                os.close(handle)
            self._regions = {**self._regions, name: Region(name, key, offset, byte_size, memory)}

    def unregister(self, name: str) -> None:
        """Forget one region, or all of them without a name; an unknown name is no error, as with Triton."""
        with self._changing:
            self._regions = {kept: region for kept, region in self._regions.items() if name and kept != name}

    def find(self, name: str = "") -> list[Region]:
        """All regions, or the one of that name; RequestError when it is not there."""
        regions = self._regions
        if name and name not in regions:
            raise RequestError("shared_memory_region", name, "register it first")
        return [regions[name]] if name else list(regions.values())

    def read(self, name: str, offset: int, byte_size: int) -> bytes:
        region, start = self._place(name, offset, byte_size)
        return region.memory[start : start + byte_size]

    def write(self, name: str, offset: int, data: bytes, room: int) -> None:
        """Put `data` where the client made `room` for it."""
        if len(data) > room:
            raise RequestError("shared_memory_byte_size", room, f"this output takes {len(data)} bytes")
        region, start = self._place(name, offset, len(data))
        region.memory[start : start + len(data)] = data

    def _place(self, name: str, offset: int, byte_size: int) -> tuple[Region, int]:
        (region,) = self.find(name)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise RequestError("shared_memory_offset", offset, f"region '{name}' has {region.byte_size} bytes for {byte_size}")
        return region, region.offset + offset
