"""References: an image that goes with the prompt, read by an IP-Adapter (arXiv 2308.06721) that a build added to the denoiser.

An image encoder makes tokens of it, once. Every cross-attention reads them next to the prompt's, and adds what it finds, times a
scale. At scale 0 nothing is added, so requests with a reference and without share batches.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size, Tensors
from flashdiff.errors import RequestError
from flashdiff.orders import Order, Pixels, Preparation, Reference, as_float32, checked_scale
from flashdiff.parts import Condition, PartSpec, Phase

MAX_SCALE = 2.0
ENCODER = "reference_encoder"
"""The part that makes tokens of an image."""
TOKENS, IMAGES = "reference", "reference_images"
"""The condition, and the input of the part that makes it."""

_EMPTY_TOKENS = "empty_reference"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceRequest:
    """A reference as a request gives it; nothing is checked yet."""

    image: Pixels | Callable[[Size], Pixels] | None = field(repr=False)
    """Or a function that reads it at a size; None: the request lacks it."""
    scale: float = defaults.REFERENCE_SCALE


def referred(spec: ModelSpec, tokens: tuple[int, int], side: int) -> ModelSpec:
    """A model whose denoiser reads a reference as `tokens` (number, width), made of an image of `side` x `side` pixels."""
    (denoiser,) = spec.step_parts()
    condition = Condition(name=TOKENS, part=ENCODER, unconditional="empty_image", tokens=tokens, scaled=True, absent="zeros")
    part = PartSpec(name=ENCODER, phase=Phase.PREPARE, inputs=(IMAGES,), outputs=(TOKENS, _EMPTY_TOKENS), side=side)
    reading = denoiser.model_copy(update={"inputs": (*denoiser.inputs, condition.name, condition.scale_name)})
    parts = tuple(reading if other is denoiser else other for other in spec.parts)
    place = parts.index(reading)
    return spec.model_copy(update={"parts": (*parts[:place], part, *parts[place:]), "conditions": (*spec.conditions, condition)})


def unreferred(spec: ModelSpec) -> ModelSpec:
    """A model without what reads a reference."""
    scales = {condition.scale_name for condition in spec.conditions if condition.name == TOKENS}
    parts = tuple(
        part.model_copy(update={"inputs": tuple(name for name in part.inputs if name not in {TOKENS, *scales})})
        for part in spec.parts
        if part.name != ENCODER
    )
    conditions = tuple(condition for condition in spec.conditions if condition.name != TOKENS)
    return spec.model_copy(update={"parts": parts, "conditions": conditions})


def takes_reference(spec: ModelSpec) -> bool:
    """Whether requests may bring a reference."""
    return any(condition.name == TOKENS for condition in spec.conditions)


def check_reference(spec: ModelSpec, given: ReferenceRequest | None) -> None:
    """RequestError names the field that is wrong, the value and what is allowed; no image is read yet."""
    if given is None:
        return
    if not takes_reference(spec):
        raise RequestError("reference", "an image", "this model takes none: build-engine --reference adds an IP-Adapter")
    checked_scale("reference.scale", given.scale, 0, MAX_SCALE)
    if given.image is None:
        raise RequestError("reference.image", None, "a reference needs an image")


def read_reference(spec: ModelSpec, given: ReferenceRequest | None) -> Reference | None:
    """A checked reference with its image; RequestError for one that cannot be read or has another size."""
    if given is None:
        return None
    assert given.image is not None
    side = spec.part(ENCODER).side
    assert side
    pixels = given.image(Size(side, side)) if callable(given.image) else given.image
    height, width, _ = pixels.shape
    if (height, width) != (side, side):
        raise RequestError("reference.image", f"{width}x{height}", f"it must have {side}x{side} pixels")
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()
    return Reference(pixels=pixels, scale=as_float32(given.scale), digest=digest)


def preparations_of(order: Order) -> dict[str, Preparation]:
    """What has to be read for an order's reference, by name."""
    given = order.reference
    return {TOKENS: Preparation(ENCODER, given.pixels, given.digest)} if given else {}


def tokens_of(prepared: Mapping[str, Tensors], *, has_prompt: bool) -> Tensors:
    """The denoiser's condition in a branch with the prompt, or in one without, [T, D] by name; empty without a reference."""
    if TOKENS not in prepared:
        return {}
    return {TOKENS: prepared[TOKENS][TOKENS if has_prompt else _EMPTY_TOKENS]}


def scales_of(order: Order) -> dict[str, NDArray[np.float32]]:
    """The scale at each of the steps that are taken [steps], by condition; empty without a reference."""
    return {TOKENS: np.full(order.steps_taken, order.reference.scale, dtype=np.float32)} if order.reference else {}
