"""CPU cores: dividing them between engine and client, and keeping them awake."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flashdiff.errors import FlashdiffError

_SPIN = """
import os, sys
parent, core = map(int, sys.argv[1:])
os.sched_setaffinity(0, {core})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    pass
"""


def split_cores() -> tuple[set[int], set[int]]:
    """(cores for the engine, cores for client and server): halves of those this process may use, so that they do not compete.

    A single core is in both halves.
    """
    cores = sorted(os.sched_getaffinity(0))
    middle = max(1, len(cores) // 2)
    return set(cores[:middle]), set(cores[middle:] or cores)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Confine this thread, and the threads it starts, to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def awake(cores: set[int]) -> Iterator[None]:
    """Keep these cores from idling: a process of the lowest priority spins on each."""
    spinners: list[subprocess.Popen[bytes]] = []
    try:
        for core in cores:
            spinners.append(subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid()), str(core)]))
        yield
        if any(spinner.poll() is not None for spinner in spinners):
            raise FlashdiffError("the cores were not kept awake: a process that spins on one of them has ended")
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
