"""What a recipe's `[loss]` table may set for each loss. Imports no torch, so that a recipe is checked at once."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from flashdiff.config import Record
from flashdiff.grown import GrownRecord

Share = Annotated[float, Field(ge=0, le=1)]
LatentDistance = Literal["l2", "pseudo_huber"]
DistillationKind = Literal["l2", "pseudo_huber", "whitened", "perceptual", "decoded", "lpips"]
"""`l2` and `pseudo_huber` compare latents; so does `whitened`, whose squared errors are divided by the variance of their channel:
else the channels that vary most decide alone. `perceptual` compares features of the frozen teacher (2401.00110), at two more
evaluations per update. `decoded` (pseudo-Huber) and `lpips` (1801.03924, the paper's) compare images."""
AdversarialKind = Literal["lsgan", "non_saturating", "relativistic"]


class DistillationSettings(Record):
    """A kind alone may stand in its place: `distillation = "l2"`."""

    kind: DistillationKind = "l2"
    decoder: str | None = None
    """Of `decoded` and `lpips`: a smaller autoencoder of the same latents that decodes them, such as TAESD (a folder, or a hub
    id); None: the base's own."""
    crop: int | None = Field(None, ge=1, le=10_000)
    """Of the same: decode only so many latent cells on a side, the central ones; None: all."""
    network: str | None = None
    """Of `lpips`: a TorchScript file that maps two batches of images [B, 3, H, W] in [-1, 1] to distances [B], or the hub's
    `owner/name/file`; None: VGG's of the package lpips."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_kind(cls, values: Any) -> Any:
        return {"kind": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        kinds = {"decoder": ("decoded", "lpips"), "crop": ("decoded", "lpips"), "network": ("lpips",)}
        for name, needed in kinds.items():
            if getattr(self, name) is not None and self.kind not in needed:
                raise ValueError(f"loss.distillation.{name} is for {' and '.join(needed)}, not for '{self.kind}'; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _as_it_was_given(self, write: SerializerFunctionWrapHandler) -> Any:
        values: Mapping[str, Any] = {name: value for name, value in write(self).items() if value is not None}
        return self.kind if len(values) == 1 else values


class AdversarialSettings(GrownRecord):
    LATER: ClassVar[frozenset[str]] = frozenset({"taps"})

    kind: AdversarialKind = "relativistic"
    """`lsgan`, on the sigmoid, is the paper's; the other two keep a gradient when the discriminator is sure."""
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    """Of the discriminator's head."""
    r1_weight: float = Field(10.0, ge=0, le=1e6)
    r1_sigma: float = Field(0.1, gt=0, le=100)
    """Approximate R1: the penalty on how much the logits of real latents change under noise of this deviation."""
    times: tuple[Share, ...] = Field((0.01, 0.25, 0.5, 0.75), min_length=1, max_length=1000)
    """Noise levels at which the discriminator judges samples, as shares of the schedule; one is drawn per sample."""
    taps: tuple[Share, ...] = Field((), max_length=10)
    """Transformer blocks whose outputs the discriminator sees, each with a head of its own, as shares of their number: 0.5, 0.75
    and 0.99 are usual. Empty: the block in the middle, which alone is there in a UNet."""

    @model_validator(mode="after")
    def _has_what_its_penalty_needs(self) -> Self:
        if not self.r1_weight and self.r1_sigma != type(self).model_fields["r1_sigma"].default:
            raise ValueError("loss.adversarial.r1_sigma does nothing where r1_weight is 0; leave it out")
        return self


class DistributionMatchingSettings(GrownRecord):
    LATER: ClassVar[frozenset[str]] = frozenset({"first_step", "guidance", "own_step"})

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
    own_step: bool = False
    """Compare them only between a sample's start and the next inference step, where sampling goes on from it, so that every step
    learns its own part (trajectory distribution matching, 2503.06674)."""
    first_step: bool = True
    """Whether samples that start from pure noise are matched too. Without them the first step, which settles what an image shows,
    keeps the teacher's variety, and the later ones its quality (role-separated matching, 2602.03139)."""
    guidance: tuple[float, float] | None = None
    """The teacher's guidance here, drawn per sample between these two; None: that of its targets."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        if self.times[0] >= self.times[1]:
            raise ValueError(f"loss.distribution_matching.times must be two rising shares, not {self.times}")
        if self.own_step and self.times != type(self).model_fields["times"].default:
            raise ValueError("loss.distribution_matching.times: own_step settles it; leave it out")
        for name in ("critic_updates", "critic_learning_rate"):
            if self.fake_score == "student" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"loss.distribution_matching.{name} is for fake_score = 'lora'; leave it out")
        if self.guidance and not 0 <= self.guidance[0] <= self.guidance[1] <= 100:
            raise ValueError(
                f"loss.distribution_matching.guidance must be two rising positive numbers up to 100, not {self.guidance}"
            )
        return self
