"""Where a run's time goes, how many samples it trains on in a second, and how much memory it has taken: `speed.jsonl`.

Apart from log.jsonl, whose numbers are the same wherever and however often a run is interrupted. A summary reads both.
"""

import json
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flashdiff.distill import processes
from flashdiff.distill.progress import shown_time
from flashdiff.errors import TrainingError, first_line
from flashdiff.reading import parse_json, read_text

LOG, SPEED = "log.jsonl", "speed.jsonl"


class Speed:
    """Adds up seconds by what took them, from one checkpoint to the next."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self._updates = batch_size, 0
        self._seconds: dict[str, float] = {}
        self._parts: dict[str, float] = {}

    def took(self, what: str, seconds: float, *, updates: int = 0) -> None:
        """So many more seconds went to `what`, in which so many updates were made."""
        self._seconds[what] = self._seconds.get(what, 0.0) + seconds
        self._updates += updates

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """Count the block's seconds as those of `what`, which is a part of something that `took` counts."""
        started = _settled()
        yield
        self._parts[what] = self._parts.get(what, 0.0) + _settled() - started

    def write(self, work: Path, update: int) -> dict[str, float]:
        """Append a line on the time since the last one, and begin anew; its numbers."""
        total = sum(self._seconds.values())
        numbers = {f"{what}_s": round(seconds, 3) for what, seconds in {**self._seconds, **self._parts}.items()}
        numbers["samples_per_s"] = round(self._updates * self._batch_size / total, 3) if total else 0.0
        numbers["memory_gib"] = round(peak_memory() / 2**30, 3)
        with (work / SPEED).open("a") as file:
            file.write(json.dumps({"update": update, **numbers}) + "\n")
        self._seconds, self._parts, self._updates = {}, {}, 0
        return numbers


def _settled() -> float:
    """The time in seconds when all that was launched on a GPU is done: a launch returns at once."""
    if processes.device().type == "cuda":
        torch.cuda.synchronize(processes.device())
    return time.perf_counter()


def peak_memory() -> int:
    """The most bytes that this process has taken: on the GPU where it runs on one, else of main memory."""
    if processes.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_WHOLE = ("targets_s", "updates_s", "checkpoints_s")
"""What the time of a run is split into; other times are parts of these."""


def summary(work: Path) -> Iterator[str]:
    """A finished run in lines, by the files in its working folder; TrainingError where they are damaged."""
    log, speed = (_lines(work / name) for name in (LOG, SPEED))
    if not log or not speed:
        return
    spent = {name: sum(line.get(name, 0.0) for line in speed) for name in (*_WHOLE, "opponents_s")}
    total = sum(spent[name] for name in _WHOLE) or 1.0
    samples = sum(line["samples_per_s"] * sum(line.get(name, 0.0) for name in _WHOLE) for line in speed)
    spent["updates_s"] -= spent["opponents_s"]
    shares = ", ".join(f"{title} {spent[name] / total:.0%}" for name, title in _TITLES.items() if spent[name])
    yield f"time     {shown_time(total)} for {len(log):,} updates, {samples / total:.3g} samples/s: {shares}"
    yield f"memory   {max(line['memory_gib'] for line in speed):.2f} GiB at the peak"
    tenth = max(1, len(log) // 10)
    for name in dict.fromkeys(name for line in log for name in line):
        first, last = (_mean(lines, name) for lines in (log[:tenth], log[-tenth:]))
        if name not in ("update", "skipped", "held_out") and last is not None:
            before = "" if first is None or tenth == len(log) else f"{first:.4g} at first, "
            yield f"         {name.replace('_', ' ')}: {before}{last:.4g} at the end"
    if held := [line for line in log if "held_out" in line]:
        best = min(held, key=lambda line: float(line["held_out"]))
        place, last = work.parent / "best", held[-1]["held_out"]
        yield f"held out {best['held_out']:.4g} after {best['update'] + 1:,} updates, in {place}; {last:.4g} at the end"


_TITLES = {
    "targets_s": "targets",
    "updates_s": "student",
    "opponents_s": "opponents",
    "checkpoints_s": "checkpoints and previews",
}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [dict(parse_json(line)) for line in read_text(file).splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{file} is damaged ({first_line(error)})") from None


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [float(line[name]) for line in lines if name in line]
    return statistics.mean(values) if values else None
