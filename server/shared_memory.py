"""Regions of system shared memory that Triton clients on this machine register, to pass tensors without the wire.

A client can name any object that this server's user may open, so the server offers it only with --shared-memory.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from flashdiff.errors import BackendError, ExistsError, NotFoundError, OverloadedError, RequestError, TensorError

_FOLDER = Path("/dev/shm")
_MAX_REGIONS = 64


@dataclass(frozen=True)
class Region:
    """`byte_size` bytes from `offset` on of the POSIX shared memory object `key`; `file` is open."""

    name: str
    key: str
    offset: int
    byte_size: int
    file: int


class Regions:
    """The registered regions by name; safe to use from any thread.

    Read and written through the file and not through a mapping: if its owner truncates the object, a mapping ends the process
    with SIGBUS, where a read fails with an error.
    """

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}
        self._changing = threading.Lock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open an object that is there; an error says what is wrong with it, with Triton's status."""
        with self._changing:
            if name in self._regions:
                raise ExistsError("name", name, "a region of that name is registered already")
            if len(self._regions) >= _MAX_REGIONS:
                raise OverloadedError(f"{_MAX_REGIONS} regions are registered; unregister one first")
            plain = key.strip("/")
            if not name or plain in ("", ".", "..") or "/" in plain or "\0" in plain:
                raise RequestError("key", key, "it must be the name of a shared memory object, and the region must have a name")
            try:
                file = os.open(_FOLDER / plain, os.O_RDWR | os.O_NOFOLLOW)
            except OSError as error:
                raise BackendError(f"cannot open the shared memory object '{key[:80]}': {error.strerror}") from None
            size = os.fstat(file).st_size
            if byte_size == 0 or offset + byte_size > size:
                os.close(file)
                raise BackendError(f"a region of {byte_size} bytes from {offset} on does not fit '{key[:80]}', which has {size}")
            self._regions = {**self._regions, name: Region(name, key, offset, byte_size, file)}

    def unregister(self, name: str) -> None:
        """Forget one region, or all of them without a name; an unknown name is no error, as with Triton."""
        with self._changing:
            gone = [region for region in self._regions.values() if not name or region.name == name]
            self._regions = {kept: region for kept, region in self._regions.items() if region not in gone}
            for region in gone:
                os.close(region.file)

    def find(self, name: str = "") -> list[Region]:
        """All regions, or the one of that name; NotFoundError when it is not there."""
        regions = self._regions
        if name and name not in regions:
            raise NotFoundError("shared_memory_region", name, "register it first")
        return [regions[name]] if name else list(regions.values())

    def find_one(self, name: str) -> Region:
        """The region of that name; NotFoundError when it is not there, or none is named."""
        if not name:
            raise NotFoundError("shared_memory_region", name, "name one")
        return self.find(name)[0]

    def read(self, name: str, offset: int, byte_size: int) -> bytes:
        """The bytes at an offset in a region; NotFoundError, RequestError or BackendError where they are not within it."""
        with self._changing:  # or the file could be closed, and its number be another's
            region = self._place(name, offset, byte_size)
            data = os.pread(region.file, byte_size, region.offset + offset)
        if len(data) < byte_size:
            raise RequestError("shared_memory_region", name, "its object has become shorter")
        return data

    def write(self, name: str, offset: int, data: bytes, room: int) -> None:
        """Put `data` where the client made `room` for it."""
        if len(data) > room:
            raise BackendError(f"shared_memory_byte_size: the output takes {len(data)} bytes, there is room for {room}")
        with self._changing:
            region = self._place(name, offset, len(data))
            if os.fstat(region.file).st_size < region.offset + offset + len(data):
                raise RequestError("shared_memory_region", name, "its object has become shorter")
            try:
                os.pwrite(region.file, data, region.offset + offset)
            except OSError as error:  # a sparse object, and no memory left for it
                raise BackendError(f"cannot write to the shared memory region '{name}': {error.strerror}") from None

    def _place(self, name: str, offset: int, byte_size: int) -> Region:
        region = self.find_one(name)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise RequestError("shared_memory_offset", offset, f"region '{name}' has {region.byte_size} bytes for {byte_size}")
        return region


def offered(regions: Regions | None) -> Regions:
    """The regions; TensorError from a server without them."""
    if regions is None:
        raise TensorError("this server was started without --shared-memory")
    return regions
