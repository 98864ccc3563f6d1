"""Reading what the user names: regular files alone, and JSON whose every flaw is a ValueError."""

import json
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
"""Longest text or picture that is read as a whole: far above any tokenizer, far below what would fill the memory."""


def open_file(path: Path) -> BufferedReader:
    """The file, opened for reading; OSError for a pipe, a device or a folder, which might never end or have no end."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(22, "a pipe or device, where a file is needed", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file; OSError also for one that is longer than `limit` bytes."""
    with open_file(path) as file:
        if limit is None:
            return file.read()
        # A file may be sparse, or grow while it is read.
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise OSError(27, f"larger than {limit >> 20} MiB", str(path))
    return content


def read_text(path: Path) -> str:
    """The content of a regular UTF-8 file, less a byte order mark; OSError or UnicodeDecodeError (a ValueError) otherwise."""
    return read_file(path, MAX_BYTES).decode("utf-8-sig")


def lines_of(text: str) -> list[str]:
    """The lines of a text, stripped. Only a newline ends one: `splitlines` would end it at U+2028 and others as well."""
    return [line.strip() for line in text.split("\n")]


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text holds; ValueError for any other text, nested too deeply included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """`parse_json` of a file; OSError where it cannot be read."""
    return parse_json(read_text(path))


Witness = dict[Path, tuple[int, ...] | None]


def witness(paths: Iterable[Path]) -> Witness:
    """The identity of files now: where two are equal, no file was edited or replaced between them."""
    return {path: _identity(path) for path in sorted(paths)}


def first_change(before: Witness, now: Witness) -> Path | None:
    """The first file that two witnesses differ in."""
    return next((path for path in sorted({*before, *now}) if before.get(path) != now.get(path)), None)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
