"""Euler's method along a rectified flow, with the shift of the image's size (arXiv 2403.03206)."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flashdiff.errors import ConfigError
from flashdiff.prediction import Prediction
from flashdiff.samplers.base import SamplerKind, Walk, walk_of, x0_weights
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.samplers.spacing import chosen_times
from flashdiff.schedule import FlowSchedule, Schedule


def _sigmas(settings: SamplerSettings, schedule: Schedule, steps: int, tokens: int | None) -> NDArray[np.float64]:
    """[steps], noisiest first."""
    assert isinstance(schedule, FlowSchedule)
    last, shift = schedule.num_train_timesteps, schedule.shift_at(tokens, steps)
    if settings.timesteps:
        unshifted = (np.array(chosen_times(settings.timesteps, steps)) + 1) / last
    elif settings.spacing == "trailing":
        unshifted = np.linspace(1.0, 1 / steps, steps)
    elif settings.spacing == "linspace":
        # As the scheduler does on its own: from its largest to its smallest sigma, which are shifted already, and then shifted.
        unshifted = np.linspace(1.0, schedule.least_sigma, steps)
    else:
        raise ConfigError("spacing 'leading' is not for a flow: take trailing or linspace")
    return schedule.stretched(shift * unshifted / (1 + (shift - 1) * unshifted))


def _times(settings: SamplerSettings, schedule: Schedule, steps: int, tokens: int | None) -> list[float]:
    return [float(sigma) for sigma in _sigmas(settings, schedule, steps, tokens) * schedule.num_train_timesteps]


def _walk(settings: SamplerSettings, schedule: Schedule, prediction: Prediction, steps: int, tokens: int | None) -> Walk:
    sigmas = np.append(_sigmas(settings, schedule, steps, tokens), 0.0)
    x0 = [x0_weights(prediction, 1 - sigma, sigma) for sigma in sigmas[:-1]]
    if settings.eta:  # (1 - s') x_0 + s' noise: diffusers' stochastic_sampling
        rows = [[(1 - later) * clean[0], (1 - later) * clean[1], later] for clean, later in zip(x0, sigmas[1:], strict=True)]
    else:
        rows = [[1.0, later - now, 0.0] for now, later in pairwise(sigmas)]
    return walk_of(_times(settings, schedule, steps, tokens), 1 - sigmas[:-1], sigmas[:-1], rows, x0)


FLOW_EULER = SamplerKind(
    name="flow-euler",
    predictions=("flow",),
    spacings=("trailing", "linspace"),
    settings=("timesteps", "eta"),
    whole_times=lambda _: False,
    times=_times,
    walk=_walk,
)
