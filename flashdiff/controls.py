"""Controls: images that steer the steps of a request, each by a network of its own that a build fused in.

A control has a name, which the build gave it, an image, a scale, and the share of the steps in which it counts.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size, Tensors
from flashdiff.errors import RequestError
from flashdiff.orders import Control, Pixels, Preparation, as_float32, checked_scale
from flashdiff.parts import Condition, PartSpec

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
"""What a control may be called: it becomes a part of tensors' names."""
MAX_SCALE = 2.0
DENOISER = "denoiser_control"
"""The part that denoises rows with controls."""

_PREFIX = "control_"
_ROUNDED = 1e-6  # shares of steps came as float32


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlRequest:
    """A control as a request gives it; nothing is checked yet."""

    name: str
    image: Pixels | Callable[[Size], Pixels] | None = field(repr=False)
    """Or a function that reads it at a size; None: the request lacks it."""
    scale: float = defaults.CONTROL_SCALE
    start: float = 0.0
    end: float = 1.0


def _condition(spec: ModelSpec, name: str, *, is_encoded: bool) -> Condition:
    """The denoiser's input for a control."""
    channels = spec.latent_channels if is_encoded else 3
    return Condition(name=_PREFIX + name, enters="residual", channels=channels, encoded=is_encoded, scaled=True, absent="zeros")


def steered(spec: ModelSpec, names: Sequence[str], latents: Collection[str] = ()) -> ModelSpec:
    """A model with these controls: a second denoiser in one graph with their networks, for the rows that use any of them.

    `latents` names those whose networks read the latents of an image, and not its pixels.
    """
    if not names:
        return spec
    (denoiser,), added = spec.step_parts(), tuple(_condition(spec, name, is_encoded=name in latents) for name in names)
    tensors = [tensor for condition in added for tensor in condition.tensors]
    part = PartSpec(
        name=DENOISER, phase=denoiser.phase, inputs=(*denoiser.inputs, *tensors), outputs=denoiser.outputs, replaces=denoiser.name
    )
    place = spec.parts.index(denoiser) + 1
    return spec.model_copy(
        update={"parts": (*spec.parts[:place], part, *spec.parts[place:]), "conditions": (*spec.conditions, *added)}
    )


def unsteered(spec: ModelSpec) -> ModelSpec:
    """A model without its controls."""
    return spec.model_copy(
        update={
            "parts": tuple(part for part in spec.parts if part.name != DENOISER),
            "conditions": tuple(condition for condition in spec.conditions if condition.enters != "residual"),
        }
    )


def controls_of(spec: ModelSpec) -> tuple[str, ...]:
    """The names of the controls that a model takes."""
    return tuple(c.name.removeprefix(_PREFIX) for c in spec.conditions if c.enters == "residual")


def check_controls(spec: ModelSpec, given: Sequence[ControlRequest]) -> None:
    """RequestError names the field that is wrong, the value and what is allowed; no image is read yet."""
    allowed, taken = controls_of(spec), set[str]()
    if given and not allowed:
        raise RequestError("controls", given[0].name, "this model takes none: they are fused in by build-engine --control")
    for control in given:
        if control.name not in allowed:
            raise RequestError("controls.name", control.name, f"this model takes {', '.join(allowed)}")
        if control.name in taken:
            raise RequestError("controls.name", control.name, "it is given twice")
        taken.add(control.name)
    for control in given:
        _check(control)


def _numbers(control: ControlRequest) -> tuple[float, float, float]:
    return as_float32(control.scale), as_float32(control.start), as_float32(control.end)


def _check(control: ControlRequest) -> None:
    field_name = f"controls.{control.name}"
    checked_scale(f"{field_name}.scale", control.scale, 0, MAX_SCALE)
    _, start, end = _numbers(control)
    for name, share in (("start", start), ("end", end)):
        if not 0 <= share <= 1:
            raise RequestError(f"{field_name}.{name}", float(f"{share:g}"), "it must be between 0 and 1")
    if start >= end:
        raise RequestError(f"{field_name}.start", control.start, f"it must be below the end, {control.end:g}")
    if control.image is None:
        raise RequestError(f"{field_name}.image", None, "a control needs an image")


def read_control(control: ControlRequest, size: Size) -> Control:
    """A checked control with its image; RequestError for one that cannot be read or has another size."""
    assert control.image is not None
    scale, start, end = _numbers(control)
    pixels = control.image(size) if callable(control.image) else control.image
    height, width, _ = pixels.shape
    if (width, height) != size:
        raise RequestError(f"controls.{control.name}.image", f"{width}x{height}", f"it must have {size} pixels")
    return Control(pixels=pixels, scale=scale, start=start, end=end)


def preparations_of(spec: ModelSpec, controls: Mapping[str, Control]) -> dict[str, Preparation]:
    """The images that the encoder has to read, by condition."""
    encoded = {condition.name for condition in spec.conditions if condition.encoded}
    given = {_PREFIX + name: control.pixels for name, control in controls.items()}
    return {name: Preparation("encoder", pixels) for name, pixels in given.items() if name in encoded}


def images_of(controls: Mapping[str, Control], prepared: Mapping[str, Tensors]) -> Tensors:
    """The networks' images, by condition: what was prepared of them [C, h, w], or pixels [3, H, W] in [-1, 1]."""
    return {
        _PREFIX + name: prepared[_PREFIX + name]["latents"]
        if _PREFIX + name in prepared
        else np.ascontiguousarray(control.pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - 1
        for name, control in controls.items()
    }


def check_steps(controls: Mapping[str, Control], steps: int) -> None:
    """RequestError for a control that counts in none of the steps that are taken: it would cost time without effect."""
    for name, control in controls.items():
        if not _counts(control, steps).any():
            share = f"{control.start:g} and {control.end:g}"
            raise RequestError(f"controls.{name}.end", float(f"{control.end:g}"), f"no step of the {steps} lies between {share}")


def _counts(control: Control, steps: int) -> NDArray[np.bool_]:
    """In which of the steps [steps] a control counts: those that lie wholly within its share."""
    shares = np.arange(steps + 1) / steps
    return (shares[:-1] >= control.start - _ROUNDED) & (shares[1:] <= control.end + _ROUNDED)


def scales_of(controls: Mapping[str, Control], steps: int) -> dict[str, NDArray[np.float32]]:
    """The scale at each of the steps that are taken [steps], by condition: 0 in those outside a control's share of them."""
    scales = {name: np.where(_counts(control, steps), control.scale, 0) for name, control in controls.items()}
    return {_PREFIX + name: values.astype(np.float32) for name, values in scales.items()}
