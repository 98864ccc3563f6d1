"""Strategic stochastic sampling of trajectory consistency distillation (TCD, arXiv 2402.19159); its gamma is `eta` here."""

import numpy as np

from flashdiff.prediction import Prediction
from flashdiff.samplers.base import SamplerKind, Walk, combined, eps_weights, walk_of, x0_weights
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.samplers.spacing import solver_times
from flashdiff.schedule import Schedule


def _walk(settings: SamplerSettings, schedule: Schedule, prediction: Prediction, steps: int, tokens: int | None) -> Walk:
    times = solver_times(settings, schedule, steps)
    ends = [*times[1:], 0.0]
    # The network jumps to (1 - eta) of the next time, and noise brings it back there; float32 as diffusers multiplies.
    jumps = [float(np.floor(np.float32(1 - settings.eta) * np.float32(end))) for end in ends]
    alphas, sigmas = schedule.levels([*map(int, times)])
    end_alphas, _ = schedule.levels([*map(int, ends)])
    jump_alphas, jump_sigmas = schedule.levels([*map(int, jumps)])
    rows, x0 = [], []
    for step in range(len(times)):
        is_noised = settings.eta > 0 and step < len(times) - 1
        ratio = end_alphas[step] / jump_alphas[step] if is_noised else 1.0
        clean = x0_weights(prediction, alphas[step], sigmas[step])
        eps = eps_weights(prediction, alphas[step], sigmas[step])
        noise = np.sqrt(max(0.0, 1 - ratio**2))
        rows.append(combined(clean, ratio * jump_alphas[step], eps, ratio * jump_sigmas[step], noise))
        x0.append(clean)
    return walk_of(times, alphas, sigmas, rows, x0)


TCD = SamplerKind(
    name="tcd",
    predictions=("epsilon", "v_prediction", "sample"),
    settings=("timesteps", "eta", "original_steps"),
    defaults={"eta": 0.3},  # diffusers'
    max_steps=lambda settings: settings.original_steps,
    times=lambda settings, schedule, steps, _: solver_times(settings, schedule, steps),
    walk=_walk,
)
