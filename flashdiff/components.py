"""The seam between the code that makes images and the engine that runs the networks.

`Components` is implemented by a torch model, by an opened bundle and by the fake model; generate, the server's
scheduler, training previews and the benchmarks use nothing else of them. Arrays handed out belong to the caller: an
implementation never writes to them again.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flashdiff.grown import GrownRecord
from flashdiff.parts import Condition, PartSpec, Phase
from flashdiff.prediction import Prediction
from flashdiff.sampling import Sampler
from flashdiff.text import TokenizerSpec

Tensors = Mapping[str, NDArray[np.float32]]
"""Named outputs of a part, [B, ...] each for a batch, such as encoder_hidden_states [B, T, D]; without B for one row."""


MAX_SIDE = 16384
"""Pixels of the longest side of an image that any record takes."""

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Size(NamedTuple):
    """Pixels; a record that holds one checks its sides."""

    width: Side
    height: Side

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


Costs = dict[tuple[str, Size | None], dict[int, float]]
"""Milliseconds of a call by part and image size (None for parts whose tensors do not depend on it), then by batch size."""


class ModelSpec(GrownRecord):
    """The description of a model, without its weights."""

    LATER: ClassVar[frozenset[str]] = frozenset({"decode_tile"})

    name: str
    family: str
    prediction: Prediction
    sampler: Sampler
    latent_channels: int = Field(ge=1, le=4096)
    """Of the autoencoder; the denoiser's entrance may be wider by its conditions' channels."""
    latent_factor: int = Field(ge=1, le=256)
    """Pixels per latent cell, along each side."""
    sizes: tuple[Size, ...] = Field(min_length=1, max_length=64)
    """The default first."""
    tokenizers: tuple[TokenizerSpec, ...] = Field(min_length=1, max_length=16)
    parts: tuple[PartSpec, ...] = Field(min_length=1, max_length=64)
    conditions: tuple[Condition, ...] = Field(max_length=64)
    decode_tile: int | None = Field(None, ge=1, le=MAX_SIDE)
    """Pixels of the longest side that is decoded at once; None: any. A larger image is decoded in tiles."""
    tasks: tuple[str, ...] = ("text_to_image", "image_to_image", "inpainting")
    """Names of the tasks it can do; of two that take the same inputs the first is meant."""

    @model_validator(mode="after")
    def _parts_make_what_the_denoiser_takes(self) -> Self:
        made = {"latents", "times"} | {condition.name for condition in self.conditions}
        made |= {condition.scale_name for condition in self.conditions if condition.scaled}
        for condition in self.conditions:
            if condition.part and condition.name not in self.part(condition.part).outputs:
                raise ValueError(f"part '{condition.part}' does not make the condition '{condition.name}'")
        for part in self.parts_in(Phase.STEP):
            if unknown := set(part.inputs) - made:
                raise ValueError(f"part '{part.name}' takes '{min(unknown)}', which no condition and no part before it is")
            if part.replaces is not None and part.replaces not in {other.name for other in self.parts_in(Phase.STEP)}:
                raise ValueError(f"part '{part.name}' replaces '{part.replaces}', which is no part of a step")
            made |= set(part.outputs)
        if self.decode_tile is not None and self.decode_tile % self.latent_factor:
            raise ValueError(f"decode_tile {self.decode_tile} is no multiple of the {self.latent_factor} pixels of a latent cell")
        tokens = tuple(tokenizer.name for tokenizer in self.tokenizers)
        if not any(part.inputs == tokens for part in self.parts_in(Phase.PREPARE)):
            raise ValueError(f"no part that prepares takes {', '.join(tokens)}")
        if not self.step_parts():
            raise ValueError(f"no part has the phase '{Phase.STEP}'")
        if not self.parts_in(Phase.FINISH):
            raise ValueError(f"no part has the phase '{Phase.FINISH}'")
        return self

    def part(self, name: str) -> PartSpec:
        """The part of that name; ValueError when there is none."""
        found = next((part for part in self.parts if part.name == name), None)
        if found is None:
            raise ValueError(f"there is no part '{name}'")
        return found

    def condition(self, name: str) -> Condition:
        """The condition of that name, which there is."""
        return next(condition for condition in self.conditions if condition.name == name)

    def parts_in(self, phase: Phase) -> tuple[PartSpec, ...]:
        """The parts of a phase, in the order in which they run."""
        return tuple(part for part in self.parts if part.phase == phase)

    def step_parts(self, replacing: str | None = None) -> tuple[PartSpec, ...]:
        """The parts of a step, in their order; with the part `replacing` in the place of the one that it replaces."""
        usual = tuple(part for part in self.parts_in(Phase.STEP) if part.replaces is None)
        if replacing is None:
            return usual
        other = self.part(replacing)
        return tuple(other if part.name == other.replaces else part for part in usual)

    @property
    def denoisers(self) -> tuple[PartSpec, ...]:
        """The parts that end a step: the usual one and those that replace it."""
        last = self.step_parts()[-1]
        return last, *(part for part in self.replacements if part.replaces == last.name)

    @property
    def replacements(self) -> tuple[PartSpec, ...]:
        """The parts of a step that replace others."""
        return tuple(part for part in self.parts_in(Phase.STEP) if part.replaces is not None)

    def taken_by(self, replacing: str | None = None) -> tuple[Condition, ...]:
        """The conditions that a step takes; `replacing` as in `step_parts`."""
        inputs = {name for part in self.step_parts(replacing) for name in part.inputs}
        return tuple(condition for condition in self.conditions if condition.name in inputs)

    @property
    def text_part(self) -> PartSpec:
        """The part that reads prompts."""
        names = tuple(tokenizer.name for tokenizer in self.tokenizers)
        return next(part for part in self.parts_in(Phase.PREPARE) if part.inputs == names)

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt, in tokens, end marks included."""
        return max(tokenizer.length for tokenizer in self.tokenizers)

    def tokens(self, size: Size) -> int:
        """What a transformer sees of an image: patches of 2x2 latent cells."""
        _, height, width = self.latent_shape(size)
        return (height // 2) * (width // 2)

    def decode_size(self, size: Size) -> Size:
        """What is decoded at once of an image of `size`."""
        most = self.decode_tile or MAX_SIDE
        return Size(min(size.width, most), min(size.height, most))

    def sizes_of(self, part: str) -> tuple[Size, ...]:
        """At which a part is called, of those whose tensors depend on the size."""
        if self.part(part).phase != Phase.FINISH:
            return self.sizes
        return tuple(dict.fromkeys(self.decode_size(size) for size in self.sizes))

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of an image of `size`."""
        return self.latent_channels, size.height // self.latent_factor, size.width // self.latent_factor


class Components(Protocol):
    """A model that runs. Batches up to `max_batch`; images of the sizes in `spec`."""

    spec: ModelSpec
    max_batch: int
    parallel_decode: bool
    """Whether another thread may call the parts that finish while a call runs, because the device gains by it."""

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Token ids [B, length] of every tokenizer; RequestError for a prompt that is too long."""
        ...

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """The outputs [B, ...] of a part, by name, for its inputs [B, ...]; BackendError when the engine fails."""
        ...
