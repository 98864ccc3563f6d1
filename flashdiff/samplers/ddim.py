"""DDIM with eta (Song et al., arXiv 2010.02502, eq. 12 and 16)."""

import numpy as np

from flashdiff.prediction import Prediction
from flashdiff.samplers.base import SamplerKind, Walk, combined, eps_weights, walk_of, x0_weights
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.samplers.spacing import spaced_times
from flashdiff.schedule import NoiseSchedule, Schedule


def _times(settings: SamplerSettings, schedule: Schedule, steps: int) -> list[float]:
    return [float(np.round(time)) for time in spaced_times(settings, schedule, steps)]


def _walk(settings: SamplerSettings, schedule: Schedule, prediction: Prediction, steps: int, tokens: int | None) -> Walk:
    assert isinstance(schedule, NoiseSchedule)
    times = _times(settings, schedule, steps)
    # diffusers ends a step T // steps below its time, which with rounded times is not always the time of the next one.
    ends = [int(time) - schedule.num_train_timesteps // steps for time in times]
    if settings.timesteps:
        ends = [*map(int, times[1:]), -1]
    alphas, sigmas = schedule.levels([*map(int, times)])
    final = -1 if schedule.set_alpha_to_one else 0
    next_alphas, next_sigmas = schedule.levels([end if end >= 0 else final for end in ends])
    rows, x0 = [], []
    for step in range(len(times)):
        alpha, sigma, next_alpha, next_sigma = alphas[step], sigmas[step], next_alphas[step], next_sigmas[step]
        clean = x0_weights(prediction, alpha, sigma)
        deviation = settings.eta * next_sigma / sigma * np.sqrt(max(0.0, 1 - (alpha / next_alpha) ** 2))
        direction = np.sqrt(max(0.0, next_sigma**2 - deviation**2))
        rows.append(combined(clean, next_alpha, eps_weights(prediction, alpha, sigma), direction, deviation))
        x0.append(clean)
    return walk_of(times, alphas, sigmas, rows, x0)


DDIM = SamplerKind(
    name="ddim",
    predictions=("epsilon", "v_prediction", "sample"),
    spacings=("trailing", "leading", "linspace"),
    settings=("timesteps", "eta"),
    times=lambda settings, schedule, steps, _: _times(settings, schedule, steps),
    walk=_walk,
)
