"""How a model is sampled, and the two samplers of our own as pure functions with per-row levels.

The samplers of published students are in `flashdiff.samplers`. Arrays here are numpy or torch, levels broadcast against the
latents. Both samplers walk noise levels (alpha, sigma) from the noisiest to the clean end (1, 0) and see the network only through
its x_0: the student's re-noises x_0 at each level, the teacher's follows the probability-flow ODE.
"""

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flashdiff.prediction import Array, Prediction
from flashdiff.samplers import SAMPLERS
from flashdiff.samplers.base import SamplerKind, Walk
from flashdiff.samplers.settings import SamplerSettings
from flashdiff.schedule import FlowSchedule, Grid, Schedule, trailing_times

MAX_ODE_STEPS = 100
_MOST_KNOWN_TIMES = 32
"""Of a student with more times than that, the network keeps its time embedding instead of a table of their values."""


def renoise(x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """x_t = alpha x_0 + sigma eps; with fresh noise this is one step of multistep consistency sampling (2310.04378, alg. 3).

    `x0` and `noise` are [B, C, h, w], or [C, h, w] for one row; the levels broadcast against them.
    """
    return alpha * x0 + sigma * noise


def ode_step(x_t: Array, x0: Array, alpha: Array, sigma: Array, next_alpha: Array, next_sigma: Array) -> Array:
    """From level (alpha, sigma) to the next along the straight line to x_0: DDIM (2010.02502, eq. 12 with eta = 0).

    `x_t` and `x0` are [B, C, h, w], or [C, h, w] for one row; the levels broadcast against them.
    """
    return next_alpha * x0 + next_sigma / sigma * (x_t - alpha * x0)


def extrapolate(x0: Array, previous_x0: Array, weight: Array) -> Array:
    """The x_0 that makes `ode_step` second order, DPM-Solver++(2M) (2211.01095, alg. 2); `ode_weights` gives the weight.

    The estimates `x0` and `previous_x0` are [C, h, w] or [B, C, h, w]; the weight broadcasts against them.
    """
    return x0 + weight * (x0 - previous_x0)


class Sampler(SamplerSettings):
    """How images are made with a model: which steps it may take, at which times, and with what guidance."""

    kind: Literal["flash", "ode", "lcm", "euler", "euler-ancestral", "ddim", "tcd", "flow-euler", "scm"]
    """Our own two, or a name in `SAMPLERS`."""
    schedule: Schedule
    grid: Grid | None = None
    """The trained grid of a flash student; None for all others."""
    guidance: float = Field(1.0, ge=0, le=100)
    """Classifier-free guidance scale w; up to 1 means one network evaluation a step without guidance, above it two."""
    keeps_norm: bool = False
    """Whether guided outputs keep the lengths of the conditional ones: see `with_norm_of`."""
    embedded_guidance: float | None = Field(None, ge=0, le=100)
    """The guidance scale that the network is given as an input; None: it takes none."""
    default_steps: int = Field(ge=1, le=1000)

    @model_validator(mode="after")
    def _grid_belongs_to_flash(self) -> Self:
        if (self.kind == "flash") != (self.grid is not None):
            raise ValueError("a flash sampler needs its grid, and only a flash sampler has one")
        return self

    @property
    def published(self) -> SamplerKind | None:
        """The sampler of a published student; None for our own two."""
        return SAMPLERS.get(self.kind)

    @property
    def max_steps(self) -> int:
        """The most steps that a request may ask for."""
        if self.grid:
            return self.grid.modes
        known = self.most_steps or len(self.timesteps)
        return known or (self.published.max_steps(self) if self.published else MAX_ODE_STEPS)

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations per step and image: 2 with guidance, else 1."""
        return 1 if self.guidance <= 1 else 2

    @property
    def is_stochastic(self) -> bool:
        """Whether some step after the first adds fresh noise."""
        if self.published is None:
            return self.kind == "flash"
        return self.published.is_stochastic or self.eta > 0

    @property
    def whole_times(self) -> bool:
        """Whether the network is given whole times, indices into the schedule; else its own kind of time, as a float."""
        if self.published:
            return self.published.whole_times(self)
        # An ODE whose shift follows the size or the steps has other levels, and so other times, at each.
        return not (self.kind == "ode" and isinstance(self.schedule, FlowSchedule) and self.schedule.varies)

    @property
    def time_type(self) -> Literal["int64", "float32"]:
        """How the network is given its times."""
        return "int64" if self.whole_times else "float32"

    @property
    def known_times(self) -> list[int]:
        """The only times at which a few-step student is ever evaluated, noisiest first; empty where any may come."""
        if self.grid:
            return self.grid.inference_times(self.grid.modes)
        if self.published is None or not self.whole_times or self.max_steps > _MOST_KNOWN_TIMES:
            return []
        times = {int(time) for steps in range(1, self.max_steps + 1) for time in self.times(steps)}
        return sorted(times, reverse=True) if len(times) <= _MOST_KNOWN_TIMES else []

    def times(self, steps: int, tokens: int | None = None) -> list[int] | list[float]:
        """What the network is given in a `steps`-step image, noisiest first; `tokens` where that depends on the size."""
        if self.grid:
            return self.grid.inference_times(steps)
        if self.published is None:
            whole = trailing_times(self.schedule.num_train_timesteps, steps)
            if self.whole_times:
                return whole
            assert isinstance(self.schedule, FlowSchedule)
            _, sigmas = self.schedule.levels(whole, tokens, steps)
            return [float(sigma) for sigma in self.schedule.stretched(sigmas) * self.schedule.num_train_timesteps]
        times = self.published.times(self, self.schedule, steps, tokens)
        return [int(time) for time in times] if self.whole_times else times

    def levels(self, times: list[int] | list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """alpha and sigma at `times` and at the clean end after them, [len(times) + 1] each, for our own two samplers."""
        if self.whole_times:
            return self.schedule.levels([*(int(time) for time in times), -1])
        sigmas = np.append(np.array(times) / self.schedule.num_train_timesteps, 0.0)
        return 1 - sigmas, sigmas

    def walk(self, prediction: Prediction, steps: int, tokens: int) -> Walk | None:
        """The steps of an image of so many tokens, worked out; None for our own two samplers."""
        return self.published.walk(self, self.schedule, prediction, steps, tokens) if self.published else None


def flash_student(base: Sampler, grid: Grid) -> Sampler:
    """The sampler of a flash student of a base."""
    return Sampler(
        kind="flash",
        schedule=base.schedule,
        grid=grid,
        embedded_guidance=base.embedded_guidance,
        default_steps=min(4, grid.modes),
    )


def ode_weights(alphas: NDArray[np.float64], sigmas: NDArray[np.float64]) -> list[float]:
    """Weights for `extrapolate` at each of the levels `alphas`, `sigmas` [K]: h_next / (2 h_previous) in log-SNR, 0 at both ends.

    The last step is first order because it ends at infinite log-SNR; the first has no x_0 before it.
    """
    with np.errstate(divide="ignore"):
        lam = np.log(alphas / sigmas)  # minus infinity where a flow starts: the step after it is first order too
    return [
        0.0 if step in (0, len(lam) - 1) else float((lam[step + 1] - lam[step]) / (2 * (lam[step] - lam[step - 1])))
        for step in range(len(lam))
    ]
