"""Samplers as pure functions with per-row levels; arrays are numpy or torch, levels broadcast against the latents.

Both samplers walk noise levels (alpha, sigma) from the noisiest to the clean end (1, 0) and see the network only through
its x_0: the student's re-noises x_0 at each level, the teacher's follows the probability-flow ODE.
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from flashdiff.config import Record
from flashdiff.prediction import Array
from flashdiff.schedule import Grid, Schedule, trailing_times

MAX_ODE_STEPS = 100


def renoise(x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """x_t = alpha x_0 + sigma eps; with fresh noise this is one step of multistep consistency sampling (2310.04378, alg. 3)."""
    return alpha * x0 + sigma * noise


def ode_step(x_t: Array, x0: Array, alpha: Array, sigma: Array, next_alpha: Array, next_sigma: Array) -> Array:
    """From level (alpha, sigma) to the next along the straight line to x_0: DDIM (2010.02502, eq. 12 with eta = 0)."""
    return next_alpha * x0 + next_sigma / sigma * (x_t - alpha * x0)


def extrapolate(x0: Array, previous_x0: Array, weight: Array) -> Array:
    """The x_0 that makes `ode_step` second order, DPM-Solver++(2M) (2211.01095, alg. 2); `ode_weights` gives the weight."""
    return x0 + weight * (x0 - previous_x0)


class Sampler(Record):
    """How images are made with a model: which steps it may take, at which times, and with what guidance."""

    kind: Literal["flash", "ode"]
    schedule: Schedule
    grid: Grid | None = None
    """The trained grid of a flash student; None for the ODE, which takes any trailing times."""
    guidance: float = Field(1.0, ge=0, le=100)
    """Classifier-free guidance scale w; 1 means one network evaluation a step, anything else two."""
    default_steps: int = Field(ge=1, le=1000)

    @model_validator(mode="after")
    def _grid_belongs_to_flash(self) -> Self:
        if (self.kind == "flash") != (self.grid is not None):
            raise ValueError("a flash sampler needs its grid, and only a flash sampler has one")
        return self

    @property
    def max_steps(self) -> int:
        return self.grid.modes if self.grid else MAX_ODE_STEPS

    @property
    def evaluations_per_step(self) -> int:
        return 1 if self.guidance == 1.0 else 2

    @property
    def known_times(self) -> list[int]:
        """The only times at which a few-step student is ever evaluated; empty where any may come."""
        return self.grid.inference_times(self.grid.modes) if self.grid else []

    def times(self, steps: int) -> list[int]:
        """The times of a `steps`-step image, noisiest first."""
        return self.grid.inference_times(steps) if self.grid else trailing_times(self.schedule.num_train_timesteps, steps)


def ode_weights(schedule: Schedule, times: list[int]) -> list[float]:
    """Weights for `extrapolate` at each time: h_next / (2 h_previous) in log-SNR, 0 (first order) at both ends.

    The last step is first order because it ends at infinite log-SNR; the first has no x_0 before it.
    """
    alphas, sigmas = schedule.levels(times)
    with np.errstate(divide="ignore"):
        lam = np.log(alphas / sigmas)  # minus infinity where a flow starts: the step after it is first order too
    return [
        0.0 if step in (0, len(times) - 1) else float((lam[step + 1] - lam[step]) / (2 * (lam[step] - lam[step - 1])))
        for step in range(len(times))
    ]
