"""LoRAs of requests: names and scales, for models that a build gave slots; what the denoiser takes of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import ModelSpec, Tensors
from flashdiff.errors import RequestError
from flashdiff.orders import Lora, as_float32, checked_scale
from flashdiff.parts import Condition, PartSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a LoRA may be called: never a path."""

_PREFIX, _SUFFIX = "lora_", "_lora"
_BUILD = "build it with build-engine --lora-slots"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraRequest:
    """A LoRA as a request gives it; nothing is checked yet."""

    name: str
    scale: float = defaults.LORA_SCALE
    values: NDArray[np.float32] | None = field(default=None, repr=False)
    """Of a slot, see `lora_slots`; None: not read yet."""


def slotted(spec: ModelSpec, slots: int, values: int) -> ModelSpec:
    """A model with slots of so many values: another denoiser for each that it has, for the rows that use LoRAs."""
    if not slots:
        return spec
    added = tuple(
        Condition(name=f"{_PREFIX}{index + 1}", enters="weights", values=values, scaled=True, absent="zeros")
        for index in range(slots)
    )
    tensors = [tensor for condition in added for tensor in (condition.name, condition.scale_name)]
    usual, *others = spec.denoisers
    parts = [
        PartSpec(
            name=part.name + _SUFFIX,
            phase=part.phase,
            inputs=(*part.inputs, *tensors),
            outputs=part.outputs,
            replaces=usual.name,
        )
        for part in (usual, *others)
    ]
    place = 1 + max(spec.parts.index(part) for part in spec.denoisers)
    return spec.model_copy(
        update={"parts": (*spec.parts[:place], *parts, *spec.parts[place:]), "conditions": (*spec.conditions, *added)}
    )


def unslotted(spec: ModelSpec) -> ModelSpec:
    """A model without its slots."""
    names = {condition.name for condition in slots_of(spec)}
    return spec.model_copy(
        update={
            "parts": tuple(part for part in spec.parts if not names & set(part.inputs)),
            "conditions": tuple(condition for condition in spec.conditions if condition.name not in names),
        }
    )


def slots_of(spec: ModelSpec) -> tuple[Condition, ...]:
    """The conditions that hold LoRAs."""
    return tuple(condition for condition in spec.conditions if condition.enters == "weights")


def check_loras(spec: ModelSpec, given: Sequence[LoraRequest]) -> None:
    """RequestError names the field that is wrong, the value and what is allowed; no file is read yet."""
    slots, taken = len(slots_of(spec)), set[str]()
    if given and not slots:
        raise RequestError("loras", given[0].name, f"this model takes none: {_BUILD}, or fuse the LoRA in with --lora")
    if len(given) > slots:
        raise RequestError("loras", f"{len(given)} LoRAs", f"this model takes {slots} at once")
    for lora in given:
        if not NAME.fullmatch(lora.name):
            raise RequestError(
                "loras.name", lora.name, "give up to 100 letters, digits, '.', '_' and '-', a letter or digit first"
            )
        if lora.name in taken:
            raise RequestError("loras.name", lora.name, "it is given twice")
        taken.add(lora.name)
        checked_scale(f"loras.{lora.name}.scale", lora.scale, -defaults.MAX_LORA_SCALE, defaults.MAX_LORA_SCALE)


def read_loras(spec: ModelSpec, given: Sequence[LoraRequest]) -> dict[str, Lora]:
    """Checked LoRAs by name, in the order of the slots that they take."""
    loras = {}
    for slot, lora in zip(slots_of(spec), given, strict=False):
        assert lora.values is not None
        assert lora.values.shape == (slot.values,)
        loras[lora.name] = Lora(values=lora.values, scale=as_float32(lora.scale))
    return loras


def vectors_of(loras: Mapping[str, Lora]) -> Tensors:
    """The slots' values, by condition."""
    return {f"{_PREFIX}{index + 1}": lora.values for index, lora in enumerate(loras.values())}


def scales_of(loras: Mapping[str, Lora], steps: int) -> dict[str, NDArray[np.float32]]:
    """The scale at each of the steps that are taken [steps], by condition."""
    return {f"{_PREFIX}{index + 1}": np.full(steps, lora.scale, dtype=np.float32) for index, lora in enumerate(loras.values())}
