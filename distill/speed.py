"""Where a run's time goes, how many samples it trains on in a second, and how much memory it has taken: `speed.jsonl`.

Apart from log.jsonl, whose numbers are the same wherever and however often a run is interrupted.
"""

import json
import resource
from pathlib import Path

import torch

from flashdiff.distill import processes

SPEED = "speed.jsonl"


class Speed:
    """Adds up seconds by what took them, from one checkpoint to the next."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self._updates = batch_size, 0
        self._seconds: dict[str, float] = {}

    def took(self, what: str, seconds: float, *, updates: int = 0) -> None:
        """So many more seconds went to `what`, in which so many updates were made."""
        self._seconds[what] = self._seconds.get(what, 0.0) + seconds
        self._updates += updates

    def write(self, work: Path, update: int) -> dict[str, float]:
        """Append a line on the time since the last one, and begin anew; its numbers."""
        total = sum(self._seconds.values())
        numbers = {f"{what}_s": round(seconds, 3) for what, seconds in self._seconds.items()}
        numbers["samples_per_s"] = round(self._updates * self._batch_size / total, 3) if total else 0.0
        numbers["memory_gib"] = round(peak_memory() / 2**30, 3)
        with (work / SPEED).open("a") as file:
            file.write(json.dumps({"update": update, **numbers}) + "\n")
        self._seconds, self._updates = {}, 0
        return numbers


def peak_memory() -> int:
    """The most bytes that this process has taken: on the GPU where it runs on one, else of main memory."""
    if processes.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
