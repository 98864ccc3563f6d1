"""A simulated clock: time jumps from one event to the next."""

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    """A clock in seconds, and the events to come; events of one time happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        return self.now

    def schedule(self, at: float, happen: Callable[[], None]) -> None:
        """Let something happen at a time that is not past."""
        heapq.heappush(self._events, (at, next(self._numbers), happen))

    def stop(self) -> None:
        """Forget what was to come."""
        self._events.clear()

    def run(self) -> None:
        """Let everything happen, until no event is left."""
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
