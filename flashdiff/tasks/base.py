"""Tasks: what a request can ask of a model. A task is one file: its inputs, and how they become conditions, starts and images.

The base class has what all tasks share, and makes images from a prompt; a subclass overrides what differs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashdiff import controls, references
from flashdiff.components import ModelSpec, Size, Tensors
from flashdiff.errors import RequestError
from flashdiff.orders import Order, Pixels, Preparation, as_float32
from flashdiff.text import CutText

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", float, "Tensor")

GREY = 127.5
"""The level in the middle: 0 in the encoder's range of -1 to 1."""

Prepared = Mapping[str, Tensors]
"""What the parts made of an order's preparations, without the batch dimension, by the preparation's name."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that a request may give."""

    name: str
    default: float | None
    """None: a request for this task gives it, which tells the task from another one that takes the same images."""
    above: float = 0.0
    at_least: float | None = None
    """In the place of `above`."""
    at_most: float
    is_whole: bool = False

    def check(self, value: float | None) -> float:
        """The value, or the default for None, rounded to float32; RequestError outside the bounds, or for a fraction of one that
        has to be whole."""
        given = self.default if value is None else value
        assert given is not None  # or it would be another task
        carried = as_float32(given)
        is_enough = self.above < carried if self.at_least is None else self.at_least <= carried
        if not (is_enough and carried <= self.at_most) or (self.is_whole and given != int(given)):
            raise RequestError(self.name, float(given) if math.isfinite(carried) else carried, self._allowed)
        return carried

    @property
    def _allowed(self) -> str:
        if self.at_least is None:
            return f"it must be above {self.above:g} and at most {self.at_most:g}"
        return f"it must be {'a whole number ' if self.is_whole else ''}between {self.at_least:g} and {self.at_most:g}"


@dataclass(frozen=True, eq=False)
class Branch:
    """One network evaluation of a guided step: its conditions, without the batch dimension, and its weight in the sum.

    The weights of a row's branches add up to 1. Classifier-free guidance at scale w is (prompt, w), (unconditional, 1 - w).
    """

    conditions: Mapping[str, NDArray[Any]]
    weight: float
    has_prompt: bool = True
    """Whether it reads the prompt, and with it the reference."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What every step of a row leaves as it is."""

    latents: NDArray[np.float32]  # [C, h, w], without noise
    cells: NDArray[np.bool_]  # [1, h, w]


def steps_from(strength: float, steps: int) -> int:
    """How many of the steps an image that is noised to `strength` takes: the last ones, at least one."""
    return max(1, int(strength * steps + 1e-4))  # 1e-4: a strength came as float32


def _grey(spec: ModelSpec) -> list[str]:
    """The conditions that are latents of a grey image where a request does not give them."""
    return [condition.name for condition in spec.conditions if condition.absent == "grey_image"]


class Task:
    """Images of a prompt, from noise. Tasks have no state: one instance serves all requests."""

    name: ClassVar[str] = "text_to_image"
    inputs: ClassVar[tuple[str, ...]] = ()
    """The images that a request must bring, by name."""
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    conditions_made: ClassVar[tuple[str, ...]] = ()
    """The conditions that it makes from these images, for models that were trained for the task."""

    @property
    def telling(self) -> set[str]:
        """Its parameters that a request must give."""
        return {parameter.name for parameter in self.parameters if parameter.default is None}

    def parameters_of(self, spec: ModelSpec) -> tuple[Parameter, ...]:
        """Those of its parameters that mean something to a model."""
        return self.parameters

    def input_size(self, spec: ModelSpec, name: str, size: Size) -> Size | None:
        """The size that an input has to have for a result of `size`; None: it may have any."""
        return size

    def check(self, spec: ModelSpec, order: Order) -> None:
        """RequestError for an order that passed all general checks and still cannot be filled."""

    def laid_out(self, spec: ModelSpec, order: Order) -> Order:
        """The order as its rows will make it; RequestError where they cannot."""
        return order

    def steps_taken(self, order: Order) -> int:
        """How many of the order's steps are taken: the last ones, at least one."""
        return order.steps

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        """What the model's parts have to read before the first step, by any name."""
        part, texts = spec.text_part.name, {"prompt": order.prompt}
        if order.negative_prompt:
            texts["negative_prompt"] = order.negative_prompt
        shape = order.size.height, order.size.width, 3
        stand_ins = {name: Preparation("encoder", np.full(shape, GREY, dtype=np.float32)) for name in _grey(spec)}
        given = {name: Preparation(part, CutText(text) if order.truncate_prompt else text) for name, text in texts.items()}
        return {
            **given,
            **stand_ins,
            **controls.preparations_of(spec, order.controls),
            **references.preparations_of(order),
        }

    def conditions(self, spec: ModelSpec, order: Order, prepared: Prepared, text: Tensors) -> Tensors:
        """The denoiser's conditions of the branch that reads `text`, by name; without B, such as [T, D]."""
        return {**text, **{name: prepared[name]["latents"] for name in _grey(spec)}}

    def evaluations_per_step(self, spec: ModelSpec) -> int:
        """How many branches each step has."""
        return spec.sampler.evaluations_per_step

    def weights(self, guidance: Number, parameters: Mapping[str, float]) -> tuple[Number, ...]:
        """The weights of a guided step's branches at the guidance scale of the prompt, in their order; they add up to 1.

        Classifier-free guidance as this project has it: w cond + (1 - w) uncond, where w = 1 is none (Ho & Salimans 2022 with
        w = their w + 1). Network outputs and x_0 may be guided alike, both being linear in the other.
        """
        return guidance, 1 - guidance

    def branches(self, spec: ModelSpec, order: Order, prepared: Prepared, unconditional: Tensors | None) -> tuple[Branch, ...]:
        """A step's evaluations, weighted; `unconditional` [T, D] is `generate.unconditional_of`: None without guidance."""
        prompt = self.conditions(spec, order, prepared, prepared["prompt"])
        if unconditional is None:
            return (Branch(prompt, 1.0),)
        contrast = prepared.get("negative_prompt", unconditional)
        weight, weight_without, *_ = self.weights(spec.sampler.guidance, order.parameters)
        without = Branch(self.conditions(spec, order, prepared, contrast), weight_without, has_prompt=False)
        return Branch(prompt, weight), without

    def drawn(self, spec: ModelSpec, order: Order, seed: int) -> Mapping[str, NDArray[Any]]:
        """The conditions that one image of an order draws from its seed, by name, without B; all its branches have them."""
        return {}

    def start(self, order: Order, prepared: Prepared) -> NDArray[np.float32] | None:
        """The latents [C, h, w] that the first noise is added to; None: pure noise."""
        return None

    def starts(self, order: Order, prepared: Prepared) -> list[NDArray[np.float32] | None]:
        """`start` of each row of an image."""
        return [self.start(order, prepared)]

    def kept(self, spec: ModelSpec, order: Order, prepared: Prepared) -> Kept | None:
        """What of the latents no step changes; None: nothing."""
        return None

    def finish(self, order: Order, pixels: Pixels) -> Pixels:
        """What a decoded image [H, W, 3] becomes."""
        return pixels

    def whole_images(self, order: Order, pixels: list[Pixels]) -> list[Pixels]:
        """The images [H, W, 3] that an order's finished rows make; those of tiles take a while."""
        return pixels
