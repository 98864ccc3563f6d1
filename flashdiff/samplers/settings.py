"""The numbers in which the sampling of published students differs."""

from typing import Literal, Self

from pydantic import Field, model_validator

from flashdiff.config import Record

Spacing = Literal["leading", "linspace", "trailing"]


class SamplerSettings(Record):
    """What a few-step sampler reads in addition to the noise schedule; each kind of sampler reads what its paper has."""

    spacing: Spacing = "trailing"
    """How times are spread (2305.08891, table 2); for a flow: `trailing` as FLUX's pipeline has it, `linspace` as SD3's."""
    timesteps: tuple[int, ...] = ()
    """The only times the student was trained at, noisiest first; empty: times by `spacing`."""
    eta: float = Field(0.0, ge=0, le=1)
    """Share of fresh noise: DDIM's eta, TCD's gamma; 1 for a flow that is noised anew in every step."""
    original_steps: int = Field(50, ge=1)
    """Steps of the solver that a consistency student was trained along, whose times it takes (LCM, TCD)."""
    timestep_scaling: float = Field(10.0, gt=0)
    """LCM's boundary: c_skip and c_out at a time are those of time * timestep_scaling."""
    most_steps: int | None = Field(None, ge=1)
    """Where the student is known to take no more; None: as many as its kind takes."""

    @model_validator(mode="after")
    def _timesteps_fall(self) -> Self:
        if any(later >= earlier for earlier, later in zip(self.timesteps, self.timesteps[1:], strict=False)) or any(
            time < 0 for time in self.timesteps
        ):
            raise ValueError(f"timesteps {list(self.timesteps)}: give falling whole numbers from 0 on, such as 999,749,499,249")
        return self
