"""The export cache: folders of files, named by the hash of everything that decides their content."""

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashdiff.errors import BackendError
from flashdiff.files import cache_folder, copy_hashed, hash_file, new_folder, write_whole
from flashdiff.reading import read_json

_HASHES = "hashes.json"


def key_of(name: str, deciding: dict[str, Any]) -> str:
    """A cache key for what these values decide."""
    return f"{name}-{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:24]}"


def is_cached(key: str) -> bool:
    """Whether the files of a key are there and unchanged."""
    folder = cache_folder() / key
    try:
        hashes: dict[str, str] = read_json(folder / _HASHES)
        return all(hash_file(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def cached(key: str, make: Callable[[Path], None], target: Path) -> bool:
    """Fill the folder `target` with the files of a key; `make` writes them into a folder where the cache lacks them.

    True when nothing had to be made. An interrupted `make` leaves nothing; damaged files are made again.
    """
    if _take(key, target):
        return True
    with new_folder(cache_folder() / key, BackendError, replace=True) as folder:
        make(folder)
        hashes = {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        write_whole(folder / _HASHES, json.dumps(hashes, indent=2) + "\n")
    if not _take(key, target):
        raise BackendError(f"{cache_folder() / key} is changed by another program; start again when it stays as it is")
    return False


def _take(key: str, target: Path) -> bool:
    """Copy the files of a key into the folder `target`; False, and no file stays, when one is missing or damaged."""
    folder, taken = cache_folder() / key, list[Path]()
    try:
        hashes: dict[str, str] = read_json(folder / _HASHES)
        for name, expected in hashes.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(name)
            taken.append(target / name)
            if copy_hashed(folder / name, taken[-1]) != expected:
                raise ValueError(name)
    except FileExistsError:
        raise BackendError(f"{taken[-1]} is in the way of a file from the cache") from None
    except (OSError, ValueError, AttributeError) as error:
        for path in taken:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        return False
    return True
