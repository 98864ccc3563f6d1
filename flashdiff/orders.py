"""Orders: checked requests."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Size
from flashdiff.errors import RequestError
from flashdiff.tiles import ORIGIN, Place, Tiling

if TYPE_CHECKING:
    from flashdiff.tasks.base import Task

Pixels = NDArray[np.uint8]
"""[H, W, 3] RGB."""


def as_float32(value: float) -> float:
    """A request's number as the protocols carry it; an integer that is too large for a float is not finite."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def checked_scale(field_name: str, scale: float, least: float, most: float) -> float:
    """A request's scale as the protocols carry it; RequestError for one that is not finite, or not between the bounds."""
    carried = as_float32(scale)
    if not least <= carried <= most:
        shown = scale if math.isfinite(carried) else carried
        raise RequestError(field_name, shown, f"it must be between {least:g} and {most:g}")
    return carried


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """An image that steers the steps from `start` to `end`, shares of those that are taken: see `flashdiff.controls`."""

    pixels: Pixels = field(repr=False)
    scale: float
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """An image that goes with the prompt: see `flashdiff.references`."""

    pixels: Pixels = field(repr=False)
    """Of the size that the model's image encoder reads."""
    scale: float
    digest: bytes
    """Of the pixels: images with the same are encoded once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """What is added to the denoiser's weights for an order's images: see `flashdiff.lora_requests`."""

    values: NDArray[np.float32] = field(repr=False)
    """Of a slot. Orders share them."""
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """A request that its model can fill: see `flashdiff.tasks.check_order`."""

    task: "Task"
    prompt: str
    seed: int
    steps: int
    size: Size
    count: int = 1
    negative_prompt: str = ""
    """What guidance steers away from; empty: what the model was trained to contrast with."""
    truncate_prompt: bool = False
    """Whether prompts are cut to the tokens that fit; else a longer one is refused."""
    inputs: Mapping[str, Pixels] = field(default_factory=dict, repr=False)
    """The request's own images, of `size`, by the names that its task gives them."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """The task's numbers, defaults filled in."""
    controls: Mapping[str, Control] = field(default_factory=dict)
    """By the names that the model's build gave them."""
    reference: Reference | None = None
    loras: Mapping[str, Lora] = field(default_factory=dict)
    """By name, in the order of the slots that they take."""
    tiling: Tiling | None = None
    """How each of its images is made of tiles of `size`, a row each; None: a row makes a whole image."""

    @property
    def whole_size(self) -> Size:
        """Of its images; `size` is that of a row."""
        return self.tiling.size if self.tiling else self.size

    @property
    def places(self) -> list[Place]:
        """Where the rows of each image lie in it."""
        return self.tiling.places if self.tiling else [ORIGIN]

    @property
    def rows(self) -> int:
        """How many rows make its images: those of the first image, then those of the next."""
        return self.count * len(self.places)

    @property
    def steps_taken(self) -> int:
        """How many of its steps it takes: the last ones."""
        return self.task.steps_taken(self)

    @property
    def input_pixels(self) -> int:
        """Of all its inputs, of its controls and of its reference."""
        images = [*self.inputs.values(), *(control.pixels for control in self.controls.values())]
        if self.reference:
            images.append(self.reference.pixels)
        return sum(pixels.shape[0] * pixels.shape[1] for pixels in images)


@dataclass(frozen=True, eq=False)
class Preparation:
    """Something that a part has to read before the first step: a text, or an image of the size that the part reads."""

    part: str
    value: str | Pixels | NDArray[np.float32]
    """Of an image the levels from 0 to 255, [H, W, 3]; as floats where grey, 127.5, has to be exact."""
    digest: bytes | None = None
    """Of an image that may come again."""

    @property
    def key(self) -> str | bytes | None:
        """Equal for values of which a part makes the same: the text itself, or an image's digest; None: it is not kept."""
        return self.value if isinstance(self.value, str) else self.digest
