"""Euler's method in sigma / alpha, plain and ancestral (Karras et al. 2206.00364; k-diffusion).

The literature's latents are x_0 + s eps, s = sigma / alpha. Here they are divided by sqrt(1 + s^2), as the network reads them.
"""

from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flashdiff.prediction import Prediction
from flashdiff.samplers.base import SamplerKind, Walk, combined, walk_of, x0_weights
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.samplers.spacing import spaced_times
from flashdiff.schedule import Schedule

_LEAST_ALPHA_BAR = 2.0**-24  # a first sigma that is finite where the schedule ends at zero SNR: diffusers' value


def _noise_to_signal(schedule: Schedule, times: list[float]) -> NDArray[np.float64]:
    """s at times that may be fractions, and 0 after the last."""
    last = schedule.num_train_timesteps - 1
    below = [int(time) for time in times]
    alphas, _ = schedule.levels([*below, *(min(time + 1, last) for time in below)])
    alpha_bar = np.maximum(alphas**2, _LEAST_ALPHA_BAR)
    s = np.sqrt((1 - alpha_bar) / alpha_bar)
    at, above = s[: len(times)], s[len(times) :]
    return np.append(at + (np.array(times) - below) * (above - at), 0.0)


def _walk(
    settings: SamplerSettings, schedule: Schedule, prediction: Prediction, steps: int, tokens: int | None, *, is_ancestral: bool
) -> Walk:
    times = spaced_times(settings, schedule, steps)
    s = _noise_to_signal(schedule, times)
    alphas, sigmas = 1 / np.sqrt(1 + s**2), s / np.sqrt(1 + s**2)
    rows, x0 = [], []
    for step, (now, later) in enumerate(pairwise(s)):
        up = later * np.sqrt(1 - (later / now) ** 2) if is_ancestral else 0.0
        down = later**2 / now if is_ancestral else later  # sqrt(later^2 - up^2)
        clean, alpha = x0_weights(prediction, alphas[step], sigmas[step]), alphas[step + 1]
        # x_0 + (x / alpha - x_0) down / now, and the noise, at the next step's scale
        rows.append(combined(clean, alpha * (1 - down / now), (1 / alphas[step], 0.0), alpha * down / now, alpha * up))
        x0.append(clean)
    start = 1.0 if settings.spacing == "leading" else sigmas[0]
    return walk_of(times, alphas[:-1], sigmas[:-1], rows, x0, start)


def _kind(name: str, predictions: tuple[Prediction, ...], is_ancestral: bool) -> SamplerKind:
    return SamplerKind(
        name=name,
        predictions=predictions,
        spacings=("trailing", "leading", "linspace"),
        settings=("timesteps",),
        is_stochastic=is_ancestral,
        whole_times=lambda settings: settings.spacing != "linspace" or bool(settings.timesteps),
        times=lambda settings, schedule, steps, _: spaced_times(settings, schedule, steps),
        walk=partial(_walk, is_ancestral=is_ancestral),
    )


EULER = _kind("euler", ("epsilon", "v_prediction", "sample"), is_ancestral=False)
EULER_ANCESTRAL = _kind("euler-ancestral", ("epsilon", "v_prediction", "sample"), is_ancestral=True)
