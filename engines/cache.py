"""The export cache: folders of files, named by the hash of everything that decides their content."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashdiff.errors import BackendError
from flashdiff.files import cache_folder, hash_file, new_folder, write_whole

_HASHES = "hashes.json"


def key_of(name: str, deciding: dict[str, Any]) -> str:
    """A cache key for what these values decide."""
    return f"{name}-{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:24]}"


def is_cached(key: str) -> bool:
    """Whether the files of a key are there and unchanged."""
    folder = cache_folder() / key
    try:
        hashes: dict[str, str] = json.loads((folder / _HASHES).read_text("utf-8"))
        return all(hash_file(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def cached(key: str, make: Callable[[Path], None], target: Path) -> bool:
    """Fill the folder `target` with the files of a key; `make` writes them into a folder where the cache lacks them.

    True when nothing had to be made. An interrupted `make` leaves nothing; damaged files are made again.
    """
    folder, was_there = cache_folder() / key, is_cached(key)
    if not was_there:
        with new_folder(folder, BackendError, replace=True) as beside:
            make(beside)
            hashes = {p.relative_to(beside).as_posix(): hash_file(p) for p in sorted(beside.rglob("*")) if p.is_file()}
            write_whole(beside / _HASHES, json.dumps(hashes, indent=2) + "\n")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(_HASHES), dirs_exist_ok=True)
    return was_there
