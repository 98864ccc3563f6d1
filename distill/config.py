"""The recipe of a distillation run."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from flashdiff import defaults
from flashdiff.config import Name, Record
from flashdiff.controls import MAX_SCALE as MAX_CONTROL_SCALE
from flashdiff.controls import NAME as CONTROL_NAME
from flashdiff.distill.losses.settings import Share
from flashdiff.distill.terms import TERMS, Term
from flashdiff.grown import GrownRecord
from flashdiff.references import MAX_SCALE as MAX_REFERENCE_SCALE
from flashdiff.schedule import Grid

IMAGE, MASK, SOURCE, REFERENCE = "image", "mask", "source", "reference"
"""What a sample's images are called: its own, its mask, the one that was edited, and a reference."""
RESERVED = (IMAGE, MASK, SOURCE, REFERENCE)

Weight = Annotated[float, Field(ge=0, le=1e6)]
Updates = Annotated[int, Field(ge=1, le=10**9)]


class DataRecipe(GrownRecord):
    LATER: ClassVar[frozenset[str]] = frozenset({"image_column", "caption_column", "further_images"})

    source: Name
    """`avatars` for renders of the embedded world; a folder of images with captions in .txt or .json files or metadata.jsonl;
    webdataset shards (.tar) or parquet files, one or a folder of them, or the address of such files (`https://`, `s3://`,
    `hf://`); a folder that `datasets` wrote with `save_to_disk`; or a .txt file of prompts, one per line, without images."""
    image_column: Name | None = None
    """Column of a table that holds the images; None: `image`, or webdataset's `jpg`, `png`, `webp`."""
    caption_column: Name | None = None
    """Column or key that holds the captions, or a field within it (`json.caption`, `captions.0`); None: `text`, `caption` or
    `prompt`."""
    further_images: Mapping[Name, Name] = {}
    """What the data call a sample's further images, by what they are: `source`, `reference`, or a control's name. It is a table's
    column, or the word before a file's ending (`x.source.png`); by default each is called what it is."""
    images: int = Field(4000, ge=1, le=10**9)
    """How many images or prompts to use at most."""
    buckets: bool = False
    """Train each image at the nearest of several aspect ratios, one per batch, instead of cropping all to the base's size."""

    @property
    def is_prompts(self) -> bool:
        """Whether these are prompts alone, without images."""
        return self.source.endswith(".txt")

    @model_validator(mode="after")
    def _calls_images_apart(self) -> Self:
        if twice := called_twice(self.further_images.values()):
            raise ValueError(twice)
        for name in ("image_column", "caption_column", "further_images", "buckets"):
            if self.is_prompts and getattr(self, name):
                raise ValueError(f"data.{name}: '{self.source}' has one prompt a line, and nothing else; leave it out")
        return self


def called_twice(words: Iterable[str]) -> str | None:
    """What is wrong where two further images are called alike; case does not count, as in the names of files. None: nothing."""
    called = [word.lower() for word in words]
    if twice := next((word for word in called if called.count(word) > 1), None):
        return f"data.further_images calls two images '{twice}'; give each a name of its own"
    return None


class LoraRecipe(GrownRecord):
    LATER: ClassVar[frozenset[str]] = frozenset({"dora", "ranks"})

    rank: int = Field(ge=1, le=4096)
    alpha: float = Field(gt=0, le=1e6)
    """The LoRA's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field((), max_length=10_000)
    """Names, or endings of names, of the layers that get a LoRA; empty: the family's, which are the attention projections, and
    in transformers most other linear layers as well; `["all"]`: every linear layer and convolution."""
    ranks: Mapping[Name, Annotated[int, Field(ge=1, le=4096)]] = {}
    """Other ranks, of layers by their names or endings of names: `{ "ff.net.2" = 16 }`. Their outputs are scaled like others."""
    dora: bool = False
    """Train each layer's magnitudes as well (DoRA, 2402.09353): slower, and closer to training all weights."""

    @model_validator(mode="after")
    def _gives_a_layer_one_rank(self) -> Self:
        pairs = ((longer, ending) for longer, ending in permutations(self.ranks, 2) if longer.endswith(f".{ending}"))
        if pair := next(pairs, None):
            raise ValueError("lora.ranks: layers that end in '{}' also end in '{}'; give each layer one rank".format(*pair))
        return self


class MaskRecipe(GrownRecord):
    """Where masks come from, and how often each kind is drawn; the shares need not sum to one."""

    LATER: ClassVar[frozenset[str]] = frozenset({"image"})

    image: Literal["drawn", "further"] = "drawn"
    """Whether masks are drawn, or every sample brings one, `x.mask.png`: white where the image is made anew."""
    box: Weight = 0.25
    """Up to four boxes."""
    ellipse: Weight = 0.2
    strokes: Weight = 0.25
    """Of a brush."""
    half: Weight = 0.2
    """All beyond a line: the image is continued."""
    full: Weight = 0.1
    """All of the image: it is made from the prompt alone."""

    @model_validator(mode="after")
    def _has_a_kind(self) -> Self:
        if not any(self.shares.values()):
            raise ValueError(f"masks needs a kind that is drawn: {', '.join(self.shares)} are all 0")
        given = [name for name in self.shares if name in self.model_fields_set]
        if self.image == "further" and given:
            raise ValueError(f"masks.{given[0]}: no masks are drawn where masks.image is 'further'; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, write: SerializerFunctionWrapHandler) -> Any:
        """Without the shares, where no masks are drawn."""
        values: dict[str, Any] = super()._without_later_defaults(write)
        return {name: value for name, value in values.items() if self.image == "drawn" or name == "image"}

    @property
    def shares(self) -> dict[str, float]:
        """How often each kind is drawn, by its name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "image"}


class ControlRecipe(Record):
    """A frozen ControlNet or T2I-adapter that steers teacher and student alike."""

    name: Annotated[str, Field(pattern=f"^{CONTROL_NAME.pattern}$")]
    """Also the name of its images in the data: `x.canny.png` next to `x.png`."""
    network: Name
    """Its folder, or a hub id."""
    scale: float = Field(defaults.CONTROL_SCALE, gt=0, le=MAX_CONTROL_SCALE)
    """The same in teacher, student, fake score and discriminator; the paper has 0.8."""

    @model_validator(mode="after")
    def _has_a_name_of_its_own(self) -> Self:
        if self.name in RESERVED:
            raise ValueError(f"controls.name '{self.name}' is what data call other images; take another name")
        return self


class ReferenceRecipe(Record):
    """A frozen IP-Adapter, through which teacher and student read an image that goes with the prompt."""

    adapter: Name
    """Its .safetensors file, or `owner/name/file` on the hub."""
    encoder: Name | None = None
    """The folder of its image encoder; None: `image_encoder` next to the file."""
    scale: float = Field(defaults.REFERENCE_SCALE, gt=0, le=MAX_REFERENCE_SCALE)
    """The same in teacher, student, fake score and discriminator."""
    image: Literal["own", "further"] = "own"
    """Which image is read: the sample's own, or a further one, `x.reference.png`."""


class LossKeys(Record):
    """A record with a key for each registered loss in addition to its own; their values are its extra fields."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    @abstractmethod
    def loss_keys(cls) -> dict[str, tuple[Any, Any]]:
        """Type and default of each loss's key; a key whose default is None stays out of the record where it is not given."""

    @classmethod
    def key_types(cls) -> dict[str, Any]:
        """Its own keys and those of the losses, with their types."""
        return super().key_types() | {name: kind for name, (kind, _) in cls.loss_keys().items()}

    @model_validator(mode="before")
    @classmethod
    def _check_loss_keys(cls, values: Any) -> Any:
        """Check own keys and those of the losses registered now together, so that errors and unknown keys have their paths."""
        if not isinstance(values, Mapping):
            return values
        losses = cls.loss_keys()
        fields: dict[str, Any] = {name: (field.annotation, field) for name, field in cls.model_fields.items()} | losses
        record: type[Record] = create_model(cls.__name__, __base__=Record, **fields)
        checked = record.model_validate(values)
        kept = checked.model_fields_set | {name for name, (_, default) in losses.items() if default is not None}
        return {name: value for name, value in checked if name in kept}


class Phase(LossKeys):
    """Consecutive updates with their own mixture of start times and weights of the losses.

    The name of each loss in `terms.py` is a key here too: its weight, where 0 leaves the loss out.
    """

    updates: Updates
    mode_weights: tuple[float, ...] = Field(max_length=1000)
    """beta_j, one weight per mode, noisiest first; they need not sum to one."""
    backward_simulation: Share = 0.0
    """Share of the noisy inputs that come from the student's own earlier steps, as at inference, and not from an image."""

    @classmethod
    def loss_keys(cls) -> dict[str, tuple[Any, Any]]:
        return {name: (Weight, term.default_weight) for name, term in TERMS.items()}

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not any(self.weights.values()):
            *others, last = self.weights
            raise ValueError(f"a phase needs a loss: {', '.join(others)} and {last} are all 0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every registered loss by name, 0 where the phase leaves it out."""
        return {name: (self.model_extra or {}).get(name, 0.0) for name in TERMS}


class LossRecipe(LossKeys):
    """The settings of each loss, by its name: `losses/settings.py` declares their keys."""

    @classmethod
    def loss_keys(cls) -> dict[str, tuple[Any, Any]]:
        return {
            name: (term.settings, None if term.default_weight is None else term.default_settings)
            for name, term in TERMS.items()
            if term.settings
        }

    def settings(self, name: str) -> Any:
        """The settings of the loss `name`, or its defaults; their type is that of its `Term`."""
        return (self.model_extra or {}).get(name, TERMS[name].default_settings)


class Recipe(GrownRecord):
    LATER: ClassVar[frozenset[str]] = frozenset(
        {"negative_prompt", "guidance_rescale", "pool_batches", "target_batch", "learning_rate_decay", "skip_limit", "init_from"}
        | {"image_guidance", "noise_level", "masks", "controls", "reference", "student", "keep_best", "int8_base"}
    )

    base: Name
    """A diffusers directory, a hub id of one, or `avatars`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of all random numbers of the run."""
    data: DataRecipe
    grid: Grid
    """Its keys are in `flashdiff/schedule.py`."""
    student: Literal["lora", "full"] = "lora"
    """What learns: a LoRA on the base, or all weights of its denoiser (`full`), which takes a second copy of them for the teacher
    and five more for the optimizer."""
    lora: LoraRecipe | None = None
    """The student, and a fake score that is a LoRA; a full student without such a fake score has none."""
    loss: LossRecipe = LossRecipe()
    phases: tuple[Phase, ...] = Field(min_length=1, max_length=1000)
    ramp_updates: int = Field(0, ge=0, le=10**9)
    """Updates over which the loss weights move from the last phase's to the next one's; 0: at once, as in the paper."""
    guidance: tuple[float, float]
    """The teacher's guidance scale is drawn per sample between these two; up to 1 means none."""
    guidance_rescale: Share = 0.0
    """How far the teacher's guided output is brought back to the deviation of the unguided one (2305.08891, section 3.4; 0.7
    there): less contrast at high scales, and a target that varies less with the scale. 0: not."""
    image_guidance: float | None = Field(None, gt=0, le=100)
    """The teacher's guidance by the image, of a base that edits one and is guided by it; None: 1.5."""
    noise_level: tuple[int, int] | None = None
    """A noise level is drawn per sample and use, evenly, between these two and with them, of a base for super-resolution; None:
    from 0 to the highest that the base knows (`max_noise_level`)."""
    masks: MaskRecipe | None = None
    """What a base for inpainting trains on; None: masks are drawn, in the default mixture."""
    controls: tuple[ControlRecipe, ...] = Field((), max_length=16)
    """Networks that steer the base by an image of each sample."""
    reference: ReferenceRecipe | None = None
    """An IP-Adapter."""
    negative_prompt: str = Field("", max_length=10_000)
    """What the teacher's guidance contrasts prompts with, in place of the empty prompt."""
    target: Literal["solution", "consistency"] = "solution"
    """What the student is regressed on: the end of the teacher's ODE, or, as in LCM, its own answer one teacher step further."""
    batch_size: int = Field(ge=1, le=2**20)
    """Samples per update, over all processes; a multiple of their number times `accumulate`."""
    accumulate: int = Field(1, ge=1, le=2**20)
    """Micro-batches that each process splits its share of a batch into: more of them take less memory and more time, for the
    same result."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, a third more time."""
    shard_base: bool = False
    """Spread the frozen network over the processes (FSDP2), for a teacher that one device cannot hold; slower."""
    int8_base: bool = False
    """Keep the linear layers in the frozen network's blocks as int8: half the memory of bfloat16, and slower. Teacher and student
    then run on the rounded base; the LoRA is published for the base as it is."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """The student's; adamw_8bit keeps its moments in 8 bits and needs an NVIDIA GPU and bitsandbytes."""
    learning_rate: float = Field(gt=0, lt=1)
    """The student's highest."""
    learning_rate_decay: Share = 0.7
    """Share of the run, at its end, over which the learning rate falls linearly to 0; 0: it stays, as in the paper. Later phases
    then move the student less: with 0.7 and four equal phases by 1.00, 0.89, 0.54 and 0.18 of the rate."""
    warmup_updates: int = Field(100, ge=0, le=10**9)
    """Updates over which the learning rate rises to its highest."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the running average of the student's weights, which is what is published; 0 publishes the last weights."""
    target_uses: int = Field(1, ge=1, le=64)
    """Updates in which each of the teacher's targets is used. 1 is the paper's; more is cheaper where the teacher is most of the
    cost, and keeps 256 batches of targets in the memory of every process, which a resumed run solves again."""
    pool_batches: int | None = Field(None, ge=1, le=1_000_000)
    """Batches whose targets are solved at a time, by the student of that moment where they draw on it; None: 16, or 256 where
    targets are used again. Small pools are fresh, but with many uses the student memorises them."""
    target_batch: int | None = Field(None, ge=1, le=2**20)
    """Samples that the teacher solves at a time in each process; None: as many as the student trains on at a time. It takes no
    gradients, so more fit, and a GPU needs several to be busy; guidance doubles them."""
    skip_limit: int = Field(0, ge=0, le=10**9)
    """Updates of a run that may be skipped because a loss or gradient is not finite; the next one stops it."""
    init_from: Name | None = None
    """Where the student's first weights come from: a checkpoint (.pt), or the folder of a finished or stopped run with the same
    base and LoRA. Its optimizer, its schedule and its opponents start anew. None: the student starts as the base."""
    checkpoint_every: Updates = 100
    """Updates between checkpoints, and between previews."""
    checkpoints_keep: int = Field(1, ge=1, le=10_000)
    """How many of the latest checkpoints are kept; a run resumes from the last."""
    keep_best: int = Field(0, ge=0, le=1_000_000)
    """Samples, a multiple of batch_size, that are held out of the training: at each checkpoint the averaged student is compared
    with the teacher's solutions on them, and the nearest is published in OUT/best, next to the last. 0: none, the last alone."""
    tracker: Literal["tensorboard", "wandb"] = "tensorboard"
    """Where curves and previews go; log.jsonl has the same numbers."""
    preview_prompts: tuple[str, ...] = Field((), max_length=100)
    """Prompts that previews show; without any there are no previews."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for phase in self.phases:
            if len(phase.mode_weights) != self.grid.modes or min(phase.mode_weights) < 0 or not sum(phase.mode_weights):
                raise ValueError(
                    f"mode_weights must be {self.grid.modes} numbers, none negative and not all 0, not {phase.mode_weights}"
                )
        low, high = self.guidance
        if not 0 <= low <= high <= 100:
            raise ValueError(f"guidance must be two rising positive numbers up to 100 (up to 1: none), not {self.guidance}")
        if self.noise_level and not 0 <= self.noise_level[0] <= self.noise_level[1]:
            raise ValueError(f"noise_level must be two rising levels from 0 on, not {self.noise_level}")
        if self.keep_best % self.batch_size:
            raise ValueError(f"keep_best must be a multiple of batch_size ({self.batch_size}), not {self.keep_best}")
        if self.student == "lora" and self.lora is None:
            raise ValueError("lora is missing: give its rank and alpha, or student = 'full'")
        if self.student == "full" and self.shard_base:
            raise ValueError("shard_base spreads a frozen network, and student = 'full' trains all of it; leave one of them out")
        others = {
            "student = 'full'": self.student == "full",
            "shard_base": self.shard_base,
            "lora.dora": self.lora and self.lora.dora,
        }
        if self.int8_base and (other := next((name for name, is_given in others.items() if is_given), None)):
            raise ValueError(f"int8_base does not go together with {other}, which reads or trains the network's own weights")
        if later := [phase.updates for phase in self.phases[1:] if phase.updates < self.ramp_updates]:
            raise ValueError(
                f"ramp_updates must not be longer than a later phase ({later[0]} updates), and is {self.ramp_updates}"
            )
        matches = any(phase.weights["distribution_matching"] for phase in self.phases)
        if self.grid.modes == 1 and matches and not self.loss.settings("distribution_matching").first_step:
            raise ValueError(
                "loss.distribution_matching.first_step = false leaves a student of one step almost nothing to match: nine "
                "samples in ten start from pure noise"
            )
        if self.data.is_prompts and self.target == "consistency" and any(phase.weights["adversarial"] for phase in self.phases):
            raise ValueError(
                "target = 'consistency' of prompts alone gives the adversarial loss no real samples; set it to 'solution'"
            )
        names = [control.name for control in self.controls]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"controls.name '{twice}' is given twice")
        return self

    @property
    def updates(self) -> int:
        """Length of the run in student updates."""
        return sum(phase.updates for phase in self.phases)

    def terms(self) -> list[Term[Any]]:
        """The losses that some phase uses, in the registry's order."""
        weights = [phase.weights for phase in self.phases]
        return [term for name, term in TERMS.items() if any(by_name[name] for by_name in weights)]


def bundled_recipe(name: str) -> Path:
    """The path of a recipe that ships with flashdiff."""
    return Path(__file__).parent / "recipes" / name


def find_recipe(path: Path) -> Path:
    """The path itself, or where a bare file name is no file here, the recipe of that name that ships with flashdiff."""
    bundled = bundled_recipe(path.name)
    return bundled if path.parent == Path() and not path.exists() and bundled.exists() else path
