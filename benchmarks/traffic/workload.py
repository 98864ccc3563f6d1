"""The workload: how many requests of which kind a server gets, and for how long."""

import random
from dataclasses import dataclass

STEPS = (2, 4)
"""The numbers of steps that requests mix."""
DEADLINE_S = 1.0
BATCHES_IN_FLIGHT = 4
"""Batches of requests in flight that saturate a server."""

_THINGS = ("monster", "robot", "planet", "face", "person")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a server is measured with: a saturated phase for its capacity, then open loops at shares of that capacity."""

    rounds: int
    """Repeats of the saturated phase."""
    saturated_s: float
    loads: tuple[float, ...]
    """Offered rates as shares of the capacity."""
    open_loop_s: float


def random_prompt(rng: random.Random) -> str:
    """A prompt that is short, so that it fits any model, and hardly ever occurs twice."""
    return f"{rng.choice(_THINGS)} {rng.randrange(10**5)}"
