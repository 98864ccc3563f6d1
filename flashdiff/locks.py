"""Locks that the kernel releases when their process ends, however it ends: flock, on a file or a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]


def take_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file for as long as the descriptor is open; False when another process has it and we do not `wait`.

    OSError on file systems without locks, such as some network shares.
    """
    if fcntl is None:
        raise OSError(95, "this system has no flock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def sole_user(lock: Path, busy: Exception) -> Iterator[None]:
    """Within the block no other process is within one of the same lock file; raises `busy` when one is.

    Where the file system has no locks the block runs without one.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            is_ours = take_lock(descriptor)
        except OSError:
            is_ours = True
        if not is_ours:
            raise busy
        yield
    finally:
        os.close(descriptor)
