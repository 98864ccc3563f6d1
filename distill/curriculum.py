"""Which times the student trains at: a mixture of narrow modes over the teacher's grid, changing by phase."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flashdiff.distill.config import Phase
from flashdiff.schedule import Grid

_MODE_WIDTH = 0.5  # v of arXiv 2406.02347, section 3.2: the exponent is -(i - mu)^2 / v


def start_probabilities(grid: Grid, mode_weights: Sequence[float]) -> NDArray[np.float64]:
    """pi(i) [K]: the probability that a sample starts at solver index i (arXiv 2406.02347, eq. 7)."""
    index = np.arange(grid.solver_steps)[:, None]
    modes = np.array(grid.mode_indices())[None, :]
    density = (np.asarray(mode_weights) * np.exp(-((index - modes) ** 2) / _MODE_WIDTH)).sum(axis=1)
    return np.asarray(density / density.sum())


def phase_at(phases: Sequence[Phase], update: int, ramp_updates: int = 0) -> Phase:
    """The phase of student update `update`, counted from 0; the last phase's values hold after its end.

    Over a phase's first `ramp_updates` updates, its loss weights move linearly from those of the phase before.
    """
    start, before = 0, phases[0]
    for phase in phases:
        if update < start + phase.updates or phase is phases[-1]:
            break
        start, before = start + phase.updates, phase
    share = (update - start + 1) / (ramp_updates + 1)
    if share >= 1:
        return phase
    old, new = before.weights, phase.weights
    return phase.model_copy(update={name: old[name] + share * (new[name] - old[name]) for name in new})
