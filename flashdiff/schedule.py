"""Noise schedules, and the one `Grid` that training, sampling and the manifest share."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flashdiff.config import Record, parse_record
from flashdiff.errors import ConfigError

MAX_TIMESTEPS = 100_000
"""Longest schedule: a table of it is made for every model."""


class NoiseSchedule(Record):
    """A variance-preserving schedule: x_t = alpha_t x_0 + sigma_t eps for t = 0 .. T - 1 (Ho et al. 2020, eq. 4)."""

    num_train_timesteps: int = Field(1000, ge=1, le=MAX_TIMESTEPS)
    beta_start: float = Field(gt=0, lt=1)
    beta_end: float = Field(gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"]
    rescale_betas_zero_snr: bool = False
    """Whether the last time is noise alone, alpha = 0 (2305.08891, algorithm 1)."""
    steps_offset: int = Field(0, ge=0)
    """Added to times of `leading` spacing."""
    set_alpha_to_one: bool = True
    """Whether DDIM's last step ends at alpha = 1; else at the alpha of time 0."""

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], source: str) -> Self:
        """From a diffusers scheduler's config; ConfigError names `source` when it is of another kind."""
        if config.get("trained_betas"):
            raise ConfigError(f"{source}: the scheduler's trained_betas is not supported")
        if config.get("beta_start") is None:
            kind = config.get("_class_name", "scheduler")
            raise ConfigError(f"{source}: this {kind} has no beta_start; schedulers without betas are not supported")
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()} - {"num_train_timesteps"}
        given = {name: config.get(name) for name in cls.model_fields if name in config or name not in optional}
        return parse_record(given, cls, source=source)

    def levels(self, times: NDArray[np.integer[Any]] | list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """alpha_t and sigma_t [len(times)]; t = -1 stands for the clean end, where alpha = 1 and sigma = 0."""
        alphas, sigmas = _levels(self)
        return alphas[times], sigmas[times]


class ShiftBySize(Record):
    """A shift that is exponential in the number of an image's tokens, by two points: FLUX's dynamic shifting."""

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def at(self, tokens: int, steps: int | None = None) -> float:
        """The shift for an image of so many tokens, whatever the number of its steps."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return math.exp(self.base_shift + slope * (tokens - self.base_image_seq_len))


class ShiftBySizeAndSteps(Record):
    """A shift that follows the number of steps as well, by measured lines for 10 and for 200 of them: FLUX.2's."""

    measured: Literal["flux2"]
    usual_steps: int = Field(50, ge=1)
    """Where the caller does not say."""

    def at(self, tokens: int, steps: int | None = None) -> float:
        """The shift for an image of so many tokens in so many steps."""
        at_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return math.exp(at_200)
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        return math.exp(at_200 + (at_200 - at_10) / 190 * ((steps or self.usual_steps) - 200))


class FlowSchedule(Record):
    """Rectified flow: x_t = (1 - sigma_t) x_0 + sigma_t eps, with t = 0 .. T - 1 spread over (0, 1] and shifted (2403.03206).

    sigma = shift s / (1 + (shift - 1) s), s = (t + 1) / T (eq. 23): larger images need more of the noisy end.
    """

    num_train_timesteps: int = Field(1000, ge=1, le=MAX_TIMESTEPS)
    shift: float = Field(gt=0, le=1000)
    """At the default size."""
    by_size: ShiftBySize | ShiftBySizeAndSteps | None = None
    """How the shift follows the size, for samplers that ask; None: it does not."""
    terminal: float | None = Field(None, gt=0, lt=1)
    """The last noise level of sampling in several steps, to which the others are stretched; None: they are not."""

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], source: str, *, tokens: int, may_stretch: bool = False) -> Self:
        """From a FlowMatchEulerDiscreteScheduler's config, or a solver's with flow sigmas.

        `tokens` is the length of the default image, for dynamic shifting; `may_stretch` where the family knows a terminal level.

        ConfigError names `source` when its shift is of an unsupported kind.
        """
        if config.get("shift_terminal") and not may_stretch:
            raise ConfigError(f"{source}: the scheduler's shift_terminal is not supported")
        if config.get("use_dynamic_shifting") and config.get("time_shift_type", "exponential") != "exponential":
            raise ConfigError(f"{source}: the scheduler's time_shift_type = {config['time_shift_type']!r} is not supported")
        if config.get("use_dynamic_shifting"):
            given = {name: config[name] for name in ShiftBySize.model_fields if name in config}
            by_size = parse_record(given, ShiftBySize, source=source)
            shift = by_size.at(tokens)
        else:
            by_size, shift = None, config.get("shift", config.get("flow_shift", 1.0))
        values = {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": shift, "by_size": by_size}
        values["terminal"] = config.get("shift_terminal") or None
        return parse_record(values, cls, source=source)

    def shift_at(self, tokens: int | None, steps: int | None = None) -> float:
        """The shift for an image of so many tokens, in so many steps; None: of the default size."""
        return self.by_size.at(tokens, steps) if self.by_size and tokens is not None else self.shift

    def stretched(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """The noise levels [steps] of an image's steps, noisiest first, scaled so that the last is `terminal`.

        A single step stays at its level.
        """
        if self.terminal is None or sigmas[-1] == 1:
            return sigmas
        return 1 - (1 - sigmas) * (1 - self.terminal) / (1 - sigmas[-1])

    @property
    def varies(self) -> bool:
        """Whether the levels depend on more than the times: on the size, or on the number of steps."""
        return self.by_size is not None or self.terminal is not None

    @property
    def least_sigma(self) -> float:
        """That of time 0, where sizes do not matter; a shift by size has no part in it, as in diffusers."""
        s = 1 / self.num_train_timesteps
        shift = 1.0 if self.by_size else self.shift
        return shift * s / (1 + (shift - 1) * s)

    def levels(
        self, times: NDArray[np.integer[Any]] | list[int], tokens: int | None = None, steps: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """alpha_t = 1 - sigma_t and sigma_t [len(times)] of an image of so many tokens and steps, or of the default size.

        t = -1 stands for the clean end.
        """
        s, shift = (np.asarray(times) + 1) / self.num_train_timesteps, self.shift_at(tokens, steps)
        sigma = shift * s / (1 + (shift - 1) * s)
        return 1 - sigma, sigma


Schedule = NoiseSchedule | FlowSchedule


@cache
def _levels(schedule: NoiseSchedule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    betas = np.linspace(schedule.beta_start**power, schedule.beta_end**power, schedule.num_train_timesteps) ** (1 / power)
    alpha_bar = np.cumprod(1 - betas)
    if schedule.rescale_betas_zero_snr:
        root = np.sqrt(alpha_bar)
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alpha_bar = np.append(alpha_bar, 1.0)  # index -1 is the clean end
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def trailing_times(num_train_timesteps: int, steps: int) -> list[int]:
    """`steps` times from T - 1 down, evenly spaced: t_i = round(T - i T / steps) - 1 (Lin et al. 2024, "trailing")."""
    return [round(num_train_timesteps - i * num_train_timesteps / steps) - 1 for i in range(steps)]


class Grid(Record):
    """The times of few-step training and inference.

    The teacher's solver walks K trailing times. M of them, K / M apart, are the modes: the student is trained mostly
    there, and inference uses nothing else (Flash Diffusion, arXiv 2406.02347, section 3.2).
    """

    num_train_timesteps: int = Field(1000, ge=1, le=MAX_TIMESTEPS)
    solver_steps: int = Field(ge=1, le=1000)
    """K, the steps of the teacher's solver from pure noise to the image."""
    modes: int = Field(4, ge=1, le=1000)
    """M, the largest number of inference steps."""

    @model_validator(mode="after")
    def _modes_lie_on_the_grid(self) -> Self:
        if self.solver_steps % self.modes or self.solver_steps > self.num_train_timesteps:
            raise ValueError(
                f"solver_steps must be a multiple of modes ({self.modes}), <= {self.num_train_timesteps}, not {self.solver_steps}"
            )
        return self

    def solver_times(self) -> list[int]:
        """[K], noisiest first."""
        return trailing_times(self.num_train_timesteps, self.solver_steps)

    def mode_indices(self) -> list[int]:
        """[M] indices of the modes within `solver_times`: mu_j = j K / M."""
        return [mode * self.solver_steps // self.modes for mode in range(self.modes)]

    def inference_times(self, steps: int) -> list[int]:
        """The times of a `steps`-step image, 1 <= steps <= M: every one a mode, spread evenly, noisiest first."""
        times, indices = self.solver_times(), self.mode_indices()
        return [times[indices[round(step * self.modes / steps)]] for step in range(steps)]
