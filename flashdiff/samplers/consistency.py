"""Multistep consistency sampling: x_0, noised anew to the next time (LCM, arXiv 2310.04378; DMD2, 2405.14867, at other times)."""

from flashdiff.prediction import Prediction
from flashdiff.samplers.base import SamplerKind, Walk, combined, walk_of, x0_weights
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.samplers.spacing import solver_times
from flashdiff.schedule import Schedule

_SIGMA_DATA = 0.5


def boundary(time: float, timestep_scaling: float) -> tuple[float, float]:
    """c_skip and c_out at `time`, an index into the schedule: f(x, t) = c_skip x + c_out x_0 is x itself at t = 0."""
    scaled = time * timestep_scaling
    return (_SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2), scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5)


def _walk(settings: SamplerSettings, schedule: Schedule, prediction: Prediction, steps: int, tokens: int | None) -> Walk:
    times = solver_times(settings, schedule, steps)
    alphas, sigmas = schedule.levels([*map(int, times)])
    rows, x0 = [], []
    for step, time in enumerate(times):
        c_skip, c_out = boundary(time, settings.timestep_scaling)
        denoised = combined(x0_weights(prediction, alphas[step], sigmas[step]), c_out, (1.0, 0.0), c_skip)[:2]
        is_last = step == len(times) - 1
        alpha, sigma = (1.0, 0.0) if is_last else (alphas[step + 1], sigmas[step + 1])
        rows.append(combined((denoised[0], denoised[1]), alpha, noise=sigma))
        x0.append(denoised)
    return walk_of(times, alphas, sigmas, rows, x0)


LCM = SamplerKind(
    name="lcm",
    predictions=("epsilon", "v_prediction", "sample"),
    settings=("timesteps", "original_steps", "timestep_scaling"),
    is_stochastic=True,
    max_steps=lambda settings: settings.original_steps,
    times=lambda settings, schedule, steps, _: solver_times(settings, schedule, steps),
    walk=_walk,
)
