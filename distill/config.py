"""The recipe of a distillation run."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flashdiff.config import Record
from flashdiff.schedule import Grid

LatentDistance = Literal["l2", "pseudo_huber"]
AdversarialKind = Literal["lsgan", "non_saturating", "relativistic"]
Share = Annotated[float, Field(ge=0, le=1)]


class DataRecipe(Record):
    source: str
    """`avatars` for renders of the embedded world; a folder of images with captions in .txt files or metadata.jsonl; webdataset
    shards (.tar) or parquet files, one or a folder of them; or a .txt file of prompts, one a line, without images."""
    images: int = Field(4000, ge=1)
    """How many images or prompts to use at most."""
    buckets: bool = False
    """Train images at the nearest of several proportions, each batch at one, instead of cropping all to the base's size."""


class LoraRecipe(Record):
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    """What it adds is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers that take it, or their ends; empty: the family's, which are the attention projections, and in PixArt
    most linear layers."""


class Phase(Record):
    """A stretch of training with its own mixture of start times and weights of the losses; 0 leaves a loss out."""

    updates: int = Field(ge=1)
    mode_weights: tuple[float, ...]
    """beta_j, one weight a mode, noisiest first; they need not sum to one."""
    distillation: float = Field(1.0, ge=0)
    adversarial: float = Field(0.0, ge=0)
    distribution_matching: float = Field(0.0, ge=0)
    backward_simulation: Share = 0.0
    """Share of the noisy inputs that come from the student's own earlier steps, as at inference, and not from an image."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not self.distillation + self.adversarial + self.distribution_matching:
            raise ValueError("a phase needs a loss: distillation, adversarial and distribution_matching are all 0")
        return self


class AdversarialRecipe(Record):
    kind: AdversarialKind = "relativistic"
    """`lsgan`, on the sigmoid, is the paper's; the other two keep a gradient when the discriminator is sure."""
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    """Of the discriminator's head."""
    r1_weight: float = Field(10.0, ge=0)
    r1_sigma: float = Field(0.1, gt=0)
    """Approximate R1: the penalty on how much the logits of real latents change under noise of this size."""
    times: tuple[Share, ...] = Field((0.01, 0.25, 0.5, 0.75), min_length=1)
    """Where samples are noised before they are judged, as shares of the schedule; drawn per sample."""


class DistributionMatchingRecipe(Record):
    fake_score: Literal["student", "lora"] = "student"
    """Whose score stands for the student's distribution: the student's own (the paper), or a LoRA trained on its samples."""
    critic_updates: int = Field(5, ge=1)
    """Updates of that LoRA per update of the student (two time scales, DMD2, 2405.14867)."""
    critic_learning_rate: float = Field(1e-3, gt=0, lt=1)
    """Of that LoRA."""
    decoupled: bool = False
    """Take the guidance part of the gradient at less noise than the student's input only (2511.22677)."""
    times: tuple[Share, Share] = (0.02, 0.98)
    """Range of the noise that scores are compared at, as shares of the schedule."""

    @model_validator(mode="after")
    def _times_rise(self) -> Self:
        if self.times[0] >= self.times[1]:
            raise ValueError(f"times must be two rising shares, not {self.times}")
        return self


class LossRecipe(Record):
    distillation: Literal["l2", "pseudo_huber", "perceptual"] = "l2"
    """`perceptual` compares features of the frozen teacher (2401.00110), at two more evaluations an update."""
    adversarial: AdversarialRecipe = AdversarialRecipe()
    distribution_matching: DistributionMatchingRecipe = DistributionMatchingRecipe()


class Recipe(Record):
    base: str
    """A diffusers directory, a hub id of one, or `avatars`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of every random number of the run."""
    data: DataRecipe
    grid: Grid
    """Its keys are in `flashdiff/schedule.py`."""
    lora: LoraRecipe
    loss: LossRecipe = LossRecipe()
    phases: tuple[Phase, ...] = Field(min_length=1)
    ramp_updates: int = Field(0, ge=0)
    """Updates over which a phase's loss weights are reached; 0 steps to them, as the paper does."""
    guidance: tuple[float, float]
    """The teacher's guidance scale is drawn per sample between these two."""
    target: Literal["solution", "consistency"] = "solution"
    """What the student is regressed on: the end of the teacher's ODE, or, as in LCM, its own answer one step further."""
    batch_size: int = Field(ge=1)
    """Samples an update, over all processes."""
    accumulate: int = Field(1, ge=1)
    """Parts that each process takes its share of a batch in: more need less memory and more time, for the same result."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    shard_base: bool = False
    """Spread the frozen network over the processes (FSDP2), for a teacher that one device cannot hold; slower."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """Of the student; the second keeps its moments in 8 bits and needs a GPU and bitsandbytes."""
    learning_rate: float = Field(gt=0, lt=1)
    """Of the student, at its highest: it falls to 0 over the last seven tenths of the run."""
    warmup_updates: int = Field(100, ge=0)
    """Over which it rises to that."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Of the student that is published; 0 publishes the last weights."""
    target_uses: int = Field(1, ge=1)
    """How many updates see one target of the teacher. 1 is the paper; more is cheaper where the teacher is most of the cost, and
    keeps 256 batches of targets in the memory of every process, which a run that goes on solves again."""
    checkpoint_every: int = Field(100, ge=1)
    """Updates between checkpoints, and between previews."""
    checkpoints_keep: int = Field(1, ge=1)
    """How many of the latest checkpoints stay; a run goes on from the last."""
    tracker: Literal["tensorboard", "wandb"] = "tensorboard"
    """Who draws the curves; log.jsonl has the same numbers."""
    preview_prompts: tuple[str, ...] = ()
    """What previews show; none are drawn without."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for phase in self.phases:
            if len(phase.mode_weights) != self.grid.modes or min(phase.mode_weights) < 0 or not sum(phase.mode_weights):
                raise ValueError(
                    f"mode_weights must be {self.grid.modes} numbers, none negative and not all 0, not {phase.mode_weights}"
                )
        low, high = self.guidance
        if not 0 < low <= high:
            raise ValueError(f"guidance must be two rising positive numbers, not {self.guidance}")
        return self

    @property
    def updates(self) -> int:
        """Length of the run in student updates."""
        return sum(phase.updates for phase in self.phases)


def bundled_recipe(name: str) -> Path:
    """The path of a recipe that ships with flashdiff."""
    return Path(__file__).parent / "recipes" / name


def find_recipe(path: Path) -> Path:
    """The path itself, or where a bare file name is no file here, the recipe of that name that ships with flashdiff."""
    bundled = bundled_recipe(path.name)
    return bundled if path.parent == Path() and not path.exists() and bundled.exists() else path
