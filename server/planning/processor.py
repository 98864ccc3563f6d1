"""A device that computes nothing: each call ends after the time that it takes, and calls under way at once slow each other."""

from collections.abc import Callable
from dataclasses import dataclass

from flashdiff.server.planning.timeline import Timeline

OVERLAP_SPEED = 0.58
"""How fast each of two calls under way at once proceeds, next to one alone.

Measured on an H200, decoding in parallel with the steps of other rows makes 1.19 (SD1.5) and 1.13 (SDXL) times as many images a
second as in turn: benchmarks/results/2026-11-28-sd15-latency-h200.json and 2026-11-28-sdxl-latency-h200.json. Half of their mean,
1.16.
"""


@dataclass(eq=False)
class _Running:
    left_s: float  # at full speed
    on_end: Callable[[], None]


class Processor:
    """One device's time, shared by the calls under way: one, or two where decoding is parallel."""

    def __init__(self, timeline: Timeline) -> None:
        self.busy_s = 0.0
        """With at least one call under way."""
        self._timeline = timeline
        self._running: list[_Running] = []
        self._since = 0.0
        self._changes = 0

    def start(self, seconds: float, on_end: Callable[[], None]) -> None:
        """Begin a call that takes so long alone; `on_end` is called when it is over."""
        self._proceed()
        self._running.append(_Running(seconds, on_end))
        self._schedule()

    @property
    def _speed(self) -> float:
        return 1.0 if len(self._running) == 1 else OVERLAP_SPEED

    def _proceed(self) -> None:
        """Take note of the time since the last change."""
        if self._running:
            spent = self._timeline.now - self._since
            self.busy_s += spent
            for running in self._running:
                running.left_s -= spent * self._speed
        self._since = self._timeline.now
        self._changes += 1

    def _schedule(self) -> None:
        """Let the call end that will be over first, unless another one begins before."""
        if self._running:
            first = min(self._running, key=lambda running: running.left_s)
            change = self._changes
            self._timeline.schedule(
                self._timeline.now + max(0.0, first.left_s) / self._speed,
                lambda: self._end(first) if self._changes == change else None,
            )

    def _end(self, first: _Running) -> None:
        self._proceed()
        self._running.remove(first)
        self._schedule()
        first.on_end()
