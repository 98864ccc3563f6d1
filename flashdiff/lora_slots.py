"""LoRA slots: which layers of a denoiser take LoRAs at run time, and a LoRA file as the values of a slot. It needs no torch.

A slot is one vector: for every layer in order A [rank, inputs], then for every layer B [rank, outputs], already multiplied by the
file's own scale. A LoRA of a lower rank leaves the last rows 0.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flashdiff import defaults
from flashdiff.config import Record
from flashdiff.errors import LoraError
from flashdiff.lora_files import (
    FLASH_KEY,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    SETTINGS_KEY,
    WEIGHTS,
    check_peft_settings,
    flash_file,
    peft_settings,
)
from flashdiff.lora_kinds import DECOMPOSED, check_layer, scaling_of
from flashdiff.lora_names import LayerNames, changes_text
from flashdiff.lora_original_names import FUSED
from flashdiff.reading import parse_json, read_file
from flashdiff.tensor_file import UnreadTypeError, parse_tensors

_FUSE = "fuse it into a bundle with build-engine --lora"
_MAX_BYTES = 2 << 30
_OTHER_KINDS = {
    **dict.fromkeys(DECOMPOSED, "DoRA"),
    "mid": "a LoRA with a core (Tucker form)",
    "hada": "LoHa",
    "lokr": "LoKr",
    "diff": "a full difference",
    "up_bias": "a LoRA with a bias",
}
"""By the first letters of a role: what a slot does not hold."""

Layers = dict[str, dict[str, NDArray[np.float32]]]
"""A file's tensors by role, by module or by the modules (see `FUSED`) that share a matrix."""


class SlotLayer(Record):
    """A layer that takes LoRAs: a linear one, or a convolution of 1x1."""

    name: str
    inputs: int = Field(ge=1, le=2**20)
    outputs: int = Field(ge=1, le=2**20)


class SlotTable(Record):
    """What a bundle knows about its slots: enough to read a LoRA file without the model."""

    base: str
    base_hash: str
    rank: int = Field(ge=1, le=defaults.MAX_LORA_RANK)
    layers: tuple[SlotLayer, ...] = Field(min_length=1, max_length=10_000)
    denoiser: str
    """The denoiser's folder in the base, as LoRA files name it."""
    aliases: dict[str, dict[str, str]]
    """See `lora_names.LayerNames`; of text encoders, which slots do not reach, the names alone."""

    @cached_property
    def key(self) -> str:
        """Names what a LoRA becomes by this table."""
        return self.content_hash

    @cached_property
    def values(self) -> int:
        """How many values a slot has."""
        return self.rank * sum(layer.inputs + layer.outputs for layer in self.layers)

    @cached_property
    def places(self) -> dict[str, tuple[SlotLayer, int, int]]:
        """Each layer by name, with where its A and its B start."""
        found, down, up = {}, 0, self.rank * sum(layer.inputs for layer in self.layers)
        for layer in self.layers:
            found[layer.name] = layer, down, up
            down, up = down + self.rank * layer.inputs, up + self.rank * layer.outputs
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotLora:
    """A LoRA that fits a table."""

    values: NDArray[np.float32] = field(repr=False)
    rank: int
    """The largest of its layers."""
    layers: int
    weights_hash: str


def slot_layers(shapes: Mapping[str, Sequence[int]], targets: Sequence[str], blocks: Sequence[str]) -> tuple[SlotLayer, ...]:
    """The layers that take LoRAs, in order, of those whose weights have these shapes.

    They are those whose names end in one of `targets`, and all that lie in a module called one of `blocks`.
    """
    layers = []
    for name in sorted(shapes):
        is_target = any(name == target or name.endswith(f".{target}") for target in targets)
        if not is_target and not set(blocks) & set(name.split(".")):
            continue
        match [*shapes[name]]:
            case [outputs, inputs] | [outputs, inputs, 1, 1]:
                layers.append(SlotLayer(name=name, inputs=inputs, outputs=outputs))
    return tuple(layers)


def find_weights(place: Path) -> Path | None:
    """The file with the tensors of a LoRA at `place`, which is that file or a folder; None where there is none."""
    if place.suffix == ".safetensors" and _is_file(place):
        return place
    return next((place / name for name in (WEIGHTS, PEFT_WEIGHTS) if _is_file(place / name)), None)


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except OSError:  # a folder that cannot be read
        return False


def read_slot_lora(file: Path, table: SlotTable, source: str) -> SlotLora:
    """The values of a slot for a LoRA file; LoraError, which begins with `source`, for one that does not fit."""
    try:
        content = read_file(file, _MAX_BYTES)
    except OSError as error:
        raise LoraError(f"{source}: cannot be read: {error.strerror}") from None
    try:
        tensors, metadata = parse_tensors(content)
        settings = dict(parse_json(metadata.get(SETTINGS_KEY, "{}")) or {})
        flash = _flash_info(file, metadata)
    except UnreadTypeError as error:
        raise LoraError(f"{source}: {error}") from None
    except (ValueError, TypeError) as error:
        raise LoraError(f"{source} is damaged: {error}") from None
    digest = hashlib.sha256(content)
    if file.name == PEFT_WEIGHTS:
        own = _peft_settings(file.parent / PEFT_CONFIG, source)
        settings = {f"{table.denoiser}.{key}": value for key, value in own.items()}
        digest.update(repr(sorted(map(str, own.items()))).encode())
    else:
        _check_settings(file, settings, source)
    _check_flash(flash, table, source)
    layers, keys = _by_layer(tensors, table, source)
    values, rank = np.zeros(table.values, dtype=np.float32), 0
    filled: set[str] = set()
    for modules, layer in layers.items():
        try:
            rank = max(rank, _fill(values, table, modules.split(FUSED), layer, settings, filled))
        except (ValueError, TypeError, OverflowError, AttributeError) as error:  # senseless settings have several
            raise LoraError(f"{source}: '{keys[modules]}': {error}") from None
    return SlotLora(values=values, rank=rank, layers=len(filled), weights_hash=digest.hexdigest())


def _peft_settings(file: Path, source: str) -> dict[str, Any]:
    try:
        settings = peft_settings(file)
    except LoraError as error:  # a server's clients learn none of its paths
        raise LoraError(f"{source}: {str(error).replace(f'{file.parent}/', '')}") from None
    _check_settings(file, settings, source)
    return settings


def _check_settings(file: Path, settings: Mapping[str, Any], source: str) -> None:
    try:
        check_peft_settings(file, settings)
    except LoraError as error:  # as above
        raise LoraError(f"{source}: {str(error).replace(f'{file.parent}/', '')}") from None


def _flash_info(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """flash.json, from next to the file or out of its metadata; ValueError where it is neither."""
    own = flash_file(file)
    if own.is_file():
        try:
            return dict(parse_json(read_file(own, 1 << 20)))
        except OSError as error:
            raise ValueError(f"{own.name} cannot be read: {error.strerror}") from None
    return dict(parse_json(metadata[FLASH_KEY])) if FLASH_KEY in metadata else None


def _check_flash(flash: Mapping[str, Any] | None, table: SlotTable, source: str) -> None:
    if flash is None:
        return
    if flash.get("base_hash") != table.base_hash:
        named, found = str(flash.get("base"))[:80], str(flash.get("base_hash"))[:12]
        own = f"this model's base {table.base} has {table.base_hash[:12]}"
        raise LoraError(f"{source}: it was trained on '{named}' with hash {found}, and {own}")
    raise LoraError(f"{source}: it is a flash student, which decides how a model is sampled: {_FUSE}")


def _by_layer(tensors: Mapping[str, NDArray[np.float32]], table: SlotTable, source: str) -> tuple[Layers, dict[str, str]]:
    """The tensors by layer and role, and one of each layer's names in the file."""
    if not tensors:
        raise LoraError(f"{source} holds no layer")
    for key in tensors:
        if changes_text([key]):
            raise LoraError(f"{source}: '{key}' changes a text encoder, which slots do not reach: {_FUSE}")
    names = LayerNames(table.aliases, table.denoiser)
    layers: Layers = {}
    keys: dict[str, str] = {}
    for key, tensor in tensors.items():
        place = names.find(key, source)
        layer = layers.setdefault(place.module, {})
        if place.role in layer:
            raise LoraError(f"{source}: '{key}' and another tensor are for the same place")
        if other := next((kind for role, kind in _OTHER_KINDS.items() if place.role.startswith(role)), None):
            raise LoraError(f"{source}: '{key}' is {other}; slots take plain LoRA layers: {_FUSE}")
        layer[place.role] = tensor
        keys.setdefault(place.module, key)
    for modules, layer in layers.items():
        if problem := check_layer(layer):
            raise LoraError(f"{source}: '{keys[modules]}': {problem}")
    return layers, keys


def _fill(
    values: NDArray[np.float32],
    table: SlotTable,
    modules: Sequence[str],
    layer: Mapping[str, NDArray[np.float32]],
    settings: Mapping[str, Any],
    filled: set[str],
) -> int:
    """Write a layer of a file, which may be for several modules; its rank. ValueError where it does not fit."""
    for module in modules:
        if module not in table.places:
            raise ValueError(f"slots do not reach the layer {module}: {_FUSE}")
        if module in filled:
            raise ValueError(f"another tensor is for the layer {module} as well")
    down, up = (_matrix(layer[role]) for role in ("down", "up"))
    rank, outputs = down.shape[0], [table.places[module][0].outputs for module in modules]
    inputs = {table.places[module][0].inputs for module in modules}
    if {down.shape[1]} != inputs or up.shape != (sum(outputs), rank) or not rank:
        wanted = f"{sum(outputs)} outputs of {' and '.join(map(str, sorted(inputs)))} inputs"
        raise ValueError(f"it has matrices of {list(down.shape)} and {list(up.shape)}, the layer {wanted}: it is another base's")
    if rank > table.rank:
        raise ValueError(
            f"it has rank {rank}, and this model's slots take up to {table.rank}: build with --lora-rank {rank}, or {_FUSE}"
        )
    scaling = scaling_of(settings, table.denoiser, modules[0])
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = up * np.float32(scaling.factor(float(layer["alpha"].item()) if "alpha" in layer else None, rank))
    if not (np.isfinite(down).all() and np.isfinite(scaled).all()):
        raise ValueError("it has values that are not finite")
    for module, part in zip(modules, np.split(scaled, np.cumsum(outputs)[:-1]), strict=True):
        own, first, second = table.places[module]
        values[first : first + rank * own.inputs] = down.ravel()
        values[second : second + rank * own.outputs] = part.T.ravel()
        filled.add(module)
    return rank


def _matrix(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix, which convolutions of 1x1 have as [out, in, 1, 1]."""
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    if tensor.ndim != 2:
        raise ValueError(f"it has the shape {list(tensor.shape)}; slots take linear layers and convolutions of 1x1: {_FUSE}")
    return tensor
