"""What a model is made of, as data: its parts, when each runs, and the inputs of its denoiser."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flashdiff.config import Record
from flashdiff.grown import GrownRecord
from flashdiff.schedule import NoiseSchedule

MASK, MASKED_IMAGE, EDITED_IMAGE = "mask", "masked_image_latents", "image_latents"
"""The conditions of networks for inpainting and for edits, as their pipelines name them."""
LOW_RES_IMAGE, NOISE_LEVEL = "low_res_image", "noise_level"
"""The conditions of networks for super-resolution: a small image with noise, and how much of it, as a class."""


class Phase(StrEnum):
    """When a part runs for an image."""

    PREPARE = "prepare"
    """Once, before the first step: text and image encoders."""
    STEP = "step"
    """In every step: the denoiser, and what runs in front of it."""
    FINISH = "finish"
    """Once, after the last step: the decoder."""


class PartSpec(Record):
    """One network of a model, with the names of its tensors in order.

    A part that is prepared takes either the token ids of every tokenizer or one batch of images. Parts of a step share their
    tensors by name: `latents`, `times` and the conditions go in, the outputs of a part are inputs of later ones, and the last
    one returns `output`. A part that finishes takes `latents` and returns `images`.
    """

    name: str
    phase: Phase
    inputs: tuple[str, ...] = Field(min_length=1, max_length=64)
    outputs: tuple[str, ...] = Field(min_length=1, max_length=64)
    side: int | None = Field(None, ge=1, le=4096)
    """Pixels of each side of the images that it reads; None: they have the size of the request's images."""
    replaces: str | None = None
    """The part of a step in whose place it runs, for rows with a condition that only this one takes."""


class Condition(GrownRecord):
    """An input of the denoiser other than latents and times."""

    LATER: ClassVar[frozenset[str]] = frozenset({"classes", "noised"})

    name: str
    part: str | None = None
    """The part that makes it; None: the task makes it from the request's own images."""
    unconditional: Literal["empty_prompt", "zeros", "empty_image"] = "empty_prompt"
    """What it is in the branches of guidance without the prompt: of a text that of the empty prompt, or zeros; of an image that
    goes with the prompt what the part makes of none."""
    enters: Literal["tokens", "concat", "residual", "sequence", "label", "weights"] = "tokens"
    """How it enters the network: as tokens and vectors that attention and embeddings read, joined to the latents' channels, by
    another network whose outputs are added to the denoiser's, as a part of the denoised sequence, as a class, or as what is
    added to the network's own weights."""
    channels: int = Field(0, ge=0, le=4096)
    """Of an image, see `is_of_pixel_size`; else 0."""
    encoded: bool = False
    """Whether the other network reads the image's latents, of latent size, in the place of its pixels."""
    tokens: tuple[Annotated[int, Field(ge=1, le=2**16)], Annotated[int, Field(ge=1, le=2**16)]] | None = None
    """Of tokens that may be absent: their number, and the width of each."""
    values: int = Field(0, ge=0, le=2**31)
    """Of a vector that is added to weights; else 0."""
    classes: int = Field(0, ge=0, le=2**31)
    """Of a label, which is a whole number from 0 on, how many there are; else 0."""
    noised: NoiseSchedule | None = None
    """Where its image gets noise before it enters: the schedule of which the noise level is a time."""
    scaled: bool = False
    """Whether the network takes a scale [B] with it, which may change from step to step: see `scale_name`."""
    absent: Literal["refused", "zeros", "ones", "grey_image"] = "refused"
    """A request without it is refused, or gets zeros, ones, or the latents of a grey image, so that it can share batches with
    requests that have it."""

    @model_validator(mode="after")
    def _stand_ins_have_a_shape(self) -> Self:
        if self.absent != "refused" and not (self.channels or self.values or self.tokens):
            raise ValueError(f"condition '{self.name}' has neither channels, tokens nor values, so nothing can stand in for it")
        return self

    @property
    def is_of_pixel_size(self) -> bool:
        """Whether it is an image of the result's size, and not of that of its latents."""
        return self.enters == "residual" and not self.encoded

    @property
    def scale_name(self) -> str:
        """The network's input for its scale."""
        return f"scale_of_{self.name}"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The network's inputs for it: itself, and its scale where it has one."""
        return (self.name, self.scale_name) if self.scaled else (self.name,)


def latent_diffusion(token_inputs: Sequence[str], text_conditions: Sequence[str], *others: str) -> tuple[PartSpec, ...]:
    """The parts of a latent diffusion model: text encoder, image encoder, denoiser and decoder.

    `others` names conditions that the text encoder does not make.
    """
    return (
        PartSpec(name="text_encoder", phase=Phase.PREPARE, inputs=tuple(token_inputs), outputs=tuple(text_conditions)),
        PartSpec(name="encoder", phase=Phase.PREPARE, inputs=("images",), outputs=("latents",)),
        PartSpec(name="denoiser", phase=Phase.STEP, inputs=("latents", "times", *text_conditions, *others), outputs=("output",)),
        PartSpec(name="decoder", phase=Phase.FINISH, inputs=("latents",), outputs=("images",)),
    )
