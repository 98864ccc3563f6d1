"""The options of a build, and their parsing from the command line; importing it needs neither torch nor diffusers."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from flashdiff import defaults
from flashdiff.components import MAX_SIDE, Size
from flashdiff.config import Name
from flashdiff.controls import NAME
from flashdiff.engines.backends import best_backend
from flashdiff.engines.bundle import MAX_BATCH, QUANTIZED, BackendName
from flashdiff.errors import BundleError
from flashdiff.samplers.options import SamplingOptions

PrecisionChoice = Literal["fp32", "fp16", "bf16", "int8", "fp8", "auto"]
"""What a build may be asked for; a backend says why it lacks one. `auto` measures those of the machine and chooses."""


class BuildRecipe(SamplingOptions):
    """What is built and how it is sampled: the options of `build-engine`, or a TOML file of them."""

    base: Name
    loras: tuple[tuple[str, float], ...] = ()
    """Folder, file, shipped name or hub id, and weight."""
    variant: Name | None = None
    """Which of the base's weights, such as fp16; None: the plain ones, else the only ones."""
    config: Name | None = None
    """Of a base that is a single file: a model directory or hub id with its configuration; None: what diffusers takes it for."""
    vae: Name | None = None
    """Folder or hub id of an autoencoder in the place of the base's own, or `tiny`: the family's small one."""
    controls: tuple[tuple[str, str], ...] = Field((), max_length=8)
    """Name, and folder or hub id, of ControlNets and T2I-adapters that requests may use."""
    reference: str | None = None
    """File, or owner/name/file on the hub, of an IP-Adapter, with which requests may bring a reference."""
    reference_encoder: str | None = None
    """Folder or hub id of its image encoder; None: the folder `image_encoder` next to the file."""
    lora_slots: int = 0
    """How many LoRAs a request may bring."""
    lora_rank: int | None = None
    """Up to which rank each; None: the default, where there are slots."""
    backend: BackendName = Field(default_factory=best_backend)
    precision: PrecisionChoice = defaults.PRECISION
    calibration_prompts: Path | None = None
    """For int8, fp8 and auto: a text file with a prompt a line; None: the embedded world's, where the base is its model."""
    sizes: tuple[Size, ...] = ()
    """Empty: the size the base was trained at."""
    decode_tile: int | None = None
    """Pixels of the longest side that is decoded at once; None: any."""
    batch_sizes: tuple[int, ...] = defaults.BATCH_SIZES
    version_compatible: bool = False
    """TensorRT plans that run on later versions too, more slowly."""
    compile: bool = False
    """Whether torch's parts are compiled to machine code, of this machine's kind."""
    compare_stock: bool = True
    """Whether an image is compared with the stock diffusers pipeline of the model before publishing."""

    @model_validator(mode="after")
    def _batch_sizes_rise(self) -> Self:
        if not self.batch_sizes or self.batch_sizes[0] < 1 or [*self.batch_sizes] != sorted({*self.batch_sizes}):
            raise ValueError(f"batch_sizes must rise from 1 or more, not {list(self.batch_sizes)}")
        if self.batch_sizes[-1] > MAX_BATCH:
            raise ValueError(f"batch_sizes go up to {MAX_BATCH}, not {self.batch_sizes[-1]}")
        return self

    @field_validator("sizes")
    @classmethod
    def _sizes_differ(cls, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
        return tuple(dict.fromkeys(sizes))

    @model_validator(mode="after")
    def _prompts_calibrate(self) -> Self:
        if self.calibration_prompts is not None and self.precision not in (*QUANTIZED, "auto"):
            raise ValueError(
                f"calibration_prompts '{self.calibration_prompts}' is for the precisions int8, fp8 and auto, not {self.precision}"
            )
        return self

    @model_validator(mode="after")
    def _slots_have_a_rank(self) -> Self:
        if not 0 <= self.lora_slots <= defaults.MAX_LORA_SLOTS:
            raise ValueError(f"lora_slots {self.lora_slots}: a request may bring 0 to {defaults.MAX_LORA_SLOTS} LoRAs")
        if self.lora_rank is not None and not self.lora_slots:
            raise ValueError(f"lora_rank {self.lora_rank}: it is the rank of slots, and there are none without lora_slots")
        if self.lora_rank is not None and not 1 <= self.lora_rank <= defaults.MAX_LORA_RANK:
            raise ValueError(f"lora_rank {self.lora_rank}: it must be 1 to {defaults.MAX_LORA_RANK}")
        return self

    @model_validator(mode="after")
    def _controls_have_names(self) -> Self:
        names = [name for name, _ in self.controls]
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"controls: '{name}' is no name: give up to 32 lowercase letters, digits and _, a letter first")
            if names.count(name) > 1:
                raise ValueError(f"controls: '{name}' is the name of two")
        return self

    @model_validator(mode="after")
    def _encoder_has_an_adapter(self) -> Self:
        if self.reference_encoder is not None and self.reference is None:
            raise ValueError(f"reference_encoder is {self.reference_encoder}: it is for an IP-Adapter, and reference names none")
        return self


class BuildOptions(BuildRecipe):
    out: Path


def parse_sizes(text: str) -> tuple[Size, ...]:
    """`512x512,768x768` as sizes; BundleError for anything else."""
    try:
        sizes = tuple(Size(*(int(side) for side in item.split("x", 1))) for item in text.split(","))
    except (ValueError, TypeError):
        raise BundleError(f"--size '{text}': give WIDTHxHEIGHT, several with commas") from None
    if max(max(size) for size in sizes) > MAX_SIDE:
        raise BundleError(f"--size '{text}': sides go up to {MAX_SIDE}")
    return sizes


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,2,4,8` as rising batch sizes; BundleError for anything else."""
    try:
        sizes = sorted({int(item) for item in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1 or sizes[-1] > MAX_BATCH:
        raise BundleError(f"--batch '{text}': give numbers from 1 to {MAX_BATCH} with commas")
    return tuple(sizes)
