"""Shards that lie elsewhere: `https://`, `s3://`, `hf://` and all that fsspec opens, one at a time on this machine's disk."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashdiff.errors import TrainingError, first_line, install

SHARDS = (".tar", ".parquet", ".arrow")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000
_BUFFER = 1 << 20


def is_remote(source: str) -> bool:
    """Whether a source is an address and no path."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*(://|::)", source))


def remote_shards(source: str) -> list[str]:
    """The addresses that a source stands for: itself, a range as in `{000..127}`, or what its pattern (`*`) finds.

    TrainingError where it cannot be read, finds nothing, or names no shard.
    """
    found = list(_expanded(source))
    if any(mark in source for mark in "*?["):
        found = [address for pattern in found for address in _matching(pattern, source)]
    if wrong := next((address for address in found if not address.split("?")[0].endswith(SHARDS)), None):
        raise TrainingError(f"data.source '{source}': {wrong} is no shard; remote shards end in {', '.join(SHARDS)}")
    if not found:
        raise TrainingError(f"data.source '{source}': there is no such shard")
    return found


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """The shard on disk while the context lasts; OSError where it cannot be read whole."""
    fsspec = _fsspec(address)
    with tempfile.TemporaryDirectory(prefix="flashdiff-shard-") as folder:
        path = Path(folder, address.split("?")[0].rsplit("/", 1)[-1])
        try:
            with fsspec.open(address, "rb") as remote, path.open("wb") as local:
                size = getattr(remote, "size", None)
                shutil.copyfileobj(remote, local, _BUFFER)
        except Exception as error:  # every protocol has errors of its own
            reason = error.__cause__ or error  # the first names the address alone where there is no connection
            if isinstance(reason, FileNotFoundError):  # whose message is the address
                raise OSError("there is no such file") from None
            raise OSError(first_line(reason) or type(reason).__name__) from None
        if isinstance(size, int) and path.stat().st_size != size:
            raise OSError(f"{path.stat().st_size} of {size} bytes came")
        yield path


def _expanded(source: str) -> Iterator[str]:
    """A source for every number of its first range, `{000..127}`, as webdataset writes them; zeros in front stay."""
    found = _RANGE.search(source)
    if not found:
        yield source
        return
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < _MOST_SHARDS:
        raise TrainingError(f"data.source '{source}': the range {found[0]} must rise, by less than {_MOST_SHARDS}")
    for number in range(int(first), int(last) + 1):
        yield from _expanded(source[: found.start()] + f"{number:0{len(first)}}" + source[found.end() :])


def _matching(pattern: str, source: str) -> list[str]:
    fsspec = _fsspec(source)
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        names = sorted(name for name in system.glob(path) if not name.rsplit("/", 1)[-1].startswith("."))
        return [system.unstrip_protocol(name) for name in names]
    except Exception as error:
        raise TrainingError(f"data.source '{source}': cannot list it: {first_line(error)}") from None


def _fsspec(address: str) -> Any:
    """The library, with what it needs for this address."""
    try:
        import fsspec

        fsspec.get_filesystem_class(re.split("://|::", address)[0])
    except (ImportError, ValueError) as error:
        raise TrainingError(f"data.source '{address}': {first_line(error)}: {install('data')}") from None
    return fsspec
