"""What may lie where a file is expected: makers of hostile files, shared by the tests of the command line and of the parsers."""

import os
from collections.abc import Callable
from pathlib import Path


def _link_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": _device,
    "link loop": _link_loop,
    "dangling link": lambda path: path.symlink_to("nowhere"),
}
"""What is no regular file."""

NO_CONTENT: dict[str, Callable[[Path], object]] = {
    "empty": _bytes(b""),
    "zeros": _bytes(bytes(4096)),
    "noise": _bytes(bytes(range(256)) * 64),
    "not UTF-8": _bytes(b'{"a": "\xff\xfe"}'),
    "half an object": _bytes(b'{"schema_version": 5, "mod'),
    "null": _bytes(b"null"),
    "list": _bytes(b"[1, 2, 3]"),
    "text": _bytes(b'"text"'),
    "deep": _bytes(b"[" * 200_000),
    "deep and whole": _bytes(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": _bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "huge integer": _bytes(b'{"schema_version": ' + b"9" * 10_000 + b"}"),
    "huge exponent": _bytes(b'{"schema_version": 1e400000}'),
    "lone surrogate": _bytes(b'{"schema_version": "\\ud800"}'),
    "header of a terabyte": _bytes(b"\xff\xff\xff\xff\xff\x00\x00\x00{}"),
}
"""Files that hold nothing that any of our formats allows."""

HOSTILE = NO_FILES | NO_CONTENT


def replace(path: Path, kind: str) -> Path:
    """`path`, with what it was gone and a hostile file of that kind in its place."""
    path.unlink(missing_ok=True)
    HOSTILE[kind](path)
    return path
