"""What all few-step samplers have in common: a step is a weighted sum of latents, network output and fresh noise.

The weights depend on the schedule and the times alone. A sampler is the function that works them out, in float64, before the
first step; taking a step is then the same three products for every sampler, each row by its own weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.prediction import Prediction
from flashdiff.samplers.settings import SamplerSettings, Spacing
from flashdiff.schedule import Schedule

Weights = tuple[float, float]
"""Of the latents and of the network's output."""


@dataclass(frozen=True, eq=False)
class Walk:
    """The steps of one image, worked out. Latents have the scale alpha x_0 + sigma eps, which is what the network reads."""

    times: list[float]  # what the network is given
    alphas: NDArray[np.float64]  # [steps], of the latents before each step
    sigmas: NDArray[np.float64]
    start: float
    """What the first noise is multiplied by."""
    next: NDArray[np.float64]  # [steps, 3]: weights of latents, output and noise in the next latents
    x0: NDArray[np.float64]  # [steps, 2]: weights of latents and output in the estimate of the finished latents

    def last(self, count: int) -> "Walk":
        """Its last `count` steps."""
        first = len(self.times) - count
        return Walk(self.times[first:], self.alphas[first:], self.sigmas[first:], self.start, self.next[first:], self.x0[first:])

    def needs_noise(self, step: int) -> bool:
        """Whether a step adds fresh noise."""
        return bool(self.next[step, 2] != 0)

    def clean(self, step: int, latents: NDArray[np.float32], output: NDArray[np.float32]) -> NDArray[np.float32]:
        """The estimate of the finished latents before a step, from `latents` and the network's `output`; all [C, h, w]."""
        return _sum(self.x0[step], latents, output)

    def advance(
        self, step: int, latents: NDArray[np.float32], output: NDArray[np.float32], noise: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """The latents [C, h, w] after a step; `output` and `noise` have their shape.

        `noise` may be None for steps that `needs_noise` excludes.
        """
        return _sum(self.next[step], latents, output, *([] if noise is None else [noise]))


def _sum(weights: NDArray[np.float64], *values: NDArray[np.float32]) -> NDArray[np.float32]:
    """In float64: where alpha is small, large terms cancel."""
    total = sum(weight * value for weight, value in zip(weights, values, strict=False) if weight != 0)
    return np.asarray(total, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """A sampler's entry in `SAMPLERS`."""

    name: str
    predictions: tuple[Prediction, ...]
    """What the network may predict."""
    spacings: tuple[Spacing, ...] = ()
    """Those it reads; empty: its times are its own."""
    settings: tuple[str, ...] = ()
    """The other settings it reads."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Its settings where none are given."""
    is_stochastic: bool = False
    """Whether its steps add fresh noise whatever the settings."""
    max_steps: Callable[[SamplerSettings], int] = lambda _: 100
    whole_times: Callable[[SamplerSettings], bool] = lambda _: True
    """Whether the network is given whole numbers, whatever the number of steps."""
    times: Callable[[SamplerSettings, Schedule, int, int | None], list[float]]
    """Settings, schedule, number of steps, and an image's tokens, to what the network is given, noisiest first."""
    walk: Callable[[SamplerSettings, Schedule, Prediction, int, int | None], Walk]


def x0_weights(prediction: Prediction, alpha: float, sigma: float) -> Weights:
    """`prediction.to_x0` as weights, at the signal level `alpha` and the noise level `sigma`."""
    match prediction:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return 0.0, 1.0
        case "flow":
            return 1.0, -sigma
        case "v_prediction" | "trigflow":
            return alpha, -sigma


def eps_weights(prediction: Prediction, alpha: float, sigma: float) -> Weights:
    """The noise that latents and x_0 imply, (x_t - alpha x_0) / sigma, as weights at the levels `alpha` and `sigma`."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return sigma, alpha
    of_latents, of_output = x0_weights(prediction, alpha, sigma)
    return (1 - alpha * of_latents) / sigma, -alpha * of_output / sigma


def combined(x0: Weights, to_x0: float, other: Weights = (0.0, 0.0), to_other: float = 0.0, noise: float = 0.0) -> list[float]:
    """A row of `Walk.next`: to_x0 x_0 + to_other `other` + noise."""
    return [to_x0 * x0[0] + to_other * other[0], to_x0 * x0[1] + to_other * other[1], noise]


def walk_of(
    times: Sequence[float],
    alphas: NDArray[Any],
    sigmas: NDArray[Any],
    rows: Sequence[Sequence[float]],
    x0: Sequence[Sequence[float]],
    start: float = 1.0,
) -> Walk:
    """A `Walk` of lists: `times`, `alphas` and `sigmas` [steps], `rows` [steps, 3] for its `next`, and `x0` [steps, 2]."""
    return Walk(
        [float(time) for time in times],
        np.asarray(alphas, dtype=np.float64),
        np.asarray(sigmas, dtype=np.float64),
        float(start),
        np.array(rows, dtype=np.float64),
        np.array(x0, dtype=np.float64),
    )
