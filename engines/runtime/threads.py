"""How many threads an engine gets: as many as this process may keep busy."""

import os
from collections.abc import Callable
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cpu_threads() -> int:
    """The cores that this process may run on, the processor time that its container has, or OMP_NUM_THREADS: the least of them.

    More threads than a container has processor time are stopped in the middle of a step, all of them, until the next period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota() or cores, _asked_for() or cores))


def _quota() -> int | None:
    """Whole processors of the container's quota, for cgroup 2 and 1; None where there is none."""
    return _ratio(lambda: (_CGROUP / "cpu.max").read_text().split()) or _ratio(
        lambda: [(_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
    )


def _ratio(read: Callable[[], list[str]]) -> int | None:
    try:
        quota, period = map(int, read())
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None
    return max(1, quota // period) if quota > 0 and period > 0 else None


def _asked_for() -> int | None:
    """The first number of OMP_NUM_THREADS, which may have one for each level of nesting."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
