"""What a recipe's `[loss]` table may set for each loss. Imports no torch, so that a recipe is checked at once."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flashdiff.config import Record

Share = Annotated[float, Field(ge=0, le=1)]
LatentDistance = Literal["l2", "pseudo_huber"]
DistillationKind = Literal["l2", "pseudo_huber", "perceptual"]
"""`perceptual` compares features of the frozen teacher (2401.00110), at two more evaluations per update."""
AdversarialKind = Literal["lsgan", "non_saturating", "relativistic"]


class AdversarialSettings(Record):
    kind: AdversarialKind = "relativistic"
    """`lsgan`, on the sigmoid, is the paper's; the other two keep a gradient when the discriminator is sure."""
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    """Of the discriminator's head."""
    r1_weight: float = Field(10.0, ge=0, le=1e6)
    r1_sigma: float = Field(0.1, gt=0, le=100)
    """Approximate R1: the penalty on how much the logits of real latents change under noise of this deviation."""
    times: tuple[Share, ...] = Field((0.01, 0.25, 0.5, 0.75), min_length=1, max_length=1000)
    """Noise levels at which the discriminator judges samples, as shares of the schedule; one is drawn per sample."""


class DistributionMatchingSettings(Record):
    fake_score: Literal["student", "lora"] = "student"
    """The score of the student's distribution: the student's own (the paper), or that of a LoRA trained on its samples."""
    critic_updates: int = Field(5, ge=1, le=1000)
    """Updates of that LoRA per update of the student (two time scales, DMD2, 2405.14867)."""
    critic_learning_rate: float = Field(1e-3, gt=0, lt=1)
    """Of that LoRA."""
    decoupled: bool = False
    """Take the guidance part of the gradient only at less noise than the student's input has (2511.22677)."""
    times: tuple[Share, Share] = (0.02, 0.98)
    """Range of the noise levels at which scores are compared, as shares of the schedule."""

    @model_validator(mode="after")
    def _times_rise(self) -> Self:
        if self.times[0] >= self.times[1]:
            raise ValueError(f"times must be two rising shares, not {self.times}")
        return self
