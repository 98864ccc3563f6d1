"""How many threads an engine gets: all the processor cores this process may run on."""

import os


def cpu_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
