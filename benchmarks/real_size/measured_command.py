"""The peak memory and time of a `flashdiff` command."""

import os
import subprocess
import sys
import time
from pathlib import Path

from flashdiff.errors import FlashdiffError

GIB = 2**30


def run_measured(folder: Path, *arguments: str) -> tuple[float, float, str]:
    """(peak GiB of main memory as the kernel counts it, seconds, output) of a `flashdiff` command; FlashdiffError if it fails.

    The command's cache is in `folder`.
    """
    started = time.monotonic()
    with open(folder / "output.txt", "w+") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "flashdiff", *arguments],
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
            stdout=file,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise FlashdiffError(f"flashdiff {' '.join(arguments)} ended with status {process.returncode}")
    return usage.ru_maxrss * 1024 / GIB, time.monotonic() - started, output
