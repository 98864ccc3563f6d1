"""Consistency sampling in continuous time, x_t = cos(t) x_0 + sin(t) z (sCM, arXiv 2410.11081; SANA-Sprint, 2503.09641)."""

import numpy as np

from flashdiff.prediction import Prediction
from flashdiff.samplers.base import SamplerKind, Walk, combined, walk_of, x0_weights
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.schedule import Schedule

_FIRST, _SECOND_OF_TWO = 1.57080, 1.3  # SANA-Sprint's
_SIGMA_DATA = 0.5


def _times(steps: int) -> list[float]:
    return [_FIRST, _SECOND_OF_TWO] if steps == 2 else [float(time) for time in np.linspace(_FIRST, 0, steps + 1)[:-1]]


def _walk(settings: SamplerSettings, schedule: Schedule, prediction: Prediction, steps: int, tokens: int | None) -> Walk:
    times = _times(steps)
    alphas, sigmas = np.cos(times), np.sin(times)
    x0 = [x0_weights(prediction, alpha, sigma) for alpha, sigma in zip(alphas, sigmas, strict=True)]
    ends = [*times[1:], 0.0]
    rows = [combined(clean, np.cos(end), noise=np.sin(end) * _SIGMA_DATA) for clean, end in zip(x0, ends, strict=True)]
    return walk_of(times, alphas, sigmas * _SIGMA_DATA, rows, x0, _SIGMA_DATA)


SCM = SamplerKind(
    name="scm",
    predictions=("trigflow",),
    is_stochastic=True,
    whole_times=lambda _: False,
    times=lambda _settings, _schedule, steps, _tokens: _times(steps),
    walk=_walk,
)
