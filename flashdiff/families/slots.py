"""LoRA slots in torch: a denoiser that adds low-rank matrices, which it takes as inputs, to its layers' outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from flashdiff.errors import ModelError, first_line
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.files import base_files
from flashdiff.lora_names import aliases_of
from flashdiff.lora_requests import slots_of, slotted, unslotted
from flashdiff.lora_slots import SlotLayer, SlotTable, slot_layers


def layers_of_base(folder: Path, family: ModelFamily) -> tuple[SlotLayer, ...]:
    """The layers of a base that take LoRAs, read off the headers of its weights; ModelError where it has none."""
    shapes: dict[str, Sequence[int]] = {}
    files = [file for file in base_files(folder) if file.parent.name == family.lora_prefix and file.suffix == ".safetensors"]
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118  # no mapping
                    if key.endswith(".weight"):
                        shapes[key.removesuffix(".weight")] = opened.get_slice(key).get_shape()
        except Exception as error:  # safetensors' own kinds
            raise ModelError(f"{file} is damaged: {first_line(error)}") from None
    layers = slot_layers(shapes, family.lora_targets, family.slot_blocks)
    if not layers:
        raise ModelError(f"{folder}: no layer of its {family.lora_prefix} takes LoRAs at run time; leave --lora-slots out")
    return layers


def with_slots(model: TorchModel, family: ModelFamily, slots: int, rank: int) -> TorchModel:
    """The model with so many slots of that rank, which requests may fill."""
    if not slots:
        return model
    plain, layers = unslotted(model.spec), layers_of(model, family)
    matrices = _Matrices(layers, rank)
    for layer in layers:
        model.network.get_submodule(layer.name).register_forward_hook(matrices.add_to(layer.name))
    spec = slotted(plain, slots, matrices.values)
    parts = [part for part in spec.denoisers if {c.name for c in slots_of(spec)} & set(part.inputs)]
    denoisers = [SlottedDenoiser(model.module(part.name), matrices, slots).eval() for part in plain.denoisers]
    return replace(model, spec=spec, slotted={part.name: module for part, module in zip(parts, denoisers, strict=True)})


def table_of(model: TorchModel, family: ModelFamily, rank: int) -> SlotTable:
    """What reads LoRA files for a model's slots."""
    encoders = [name for name in model.weights if name.startswith("text_encoder")]
    return SlotTable(
        base=model.spec.name,
        base_hash=model.base_hash,
        rank=rank,
        layers=layers_of(model, family),
        denoiser=family.lora_prefix,
        aliases={family.lora_prefix: aliases_of(model.network, is_denoiser=True), **{name: {} for name in encoders}},
    )


def layers_of(model: TorchModel, family: ModelFamily) -> tuple[SlotLayer, ...]:
    """The layers of a model that take LoRAs."""
    modules = {name: module for name, module in model.network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    shapes = {name: module.weight.shape for name, module in modules.items()}
    return slot_layers(shapes, family.lora_targets, family.slot_blocks)


class _Matrices:
    """The matrices of the rows that run now, by layer; without any, the network is as it was."""

    def __init__(self, layers: Sequence[SlotLayer], rank: int) -> None:
        self._layers, self._rank = layers, rank
        self._now: Mapping[str, tuple[Tensor, Tensor]] = {}
        self._downs = rank * sum(layer.inputs for layer in layers)
        self.values = self._downs + rank * sum(layer.outputs for layer in layers)

    def take(self, vectors: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        """Use the slots' values [B, values], each at its scale [B], until `drop`."""
        joined = torch.stack([*vectors], dim=1) if len(vectors) > 1 else vectors[0][:, None]  # [B, slots, values]
        scale = torch.stack([*scales], dim=1)[:, :, None]
        downs, ups = joined[:, :, : self._downs], joined[:, :, self._downs :] * scale
        now, batch, rank = {}, joined.shape[0], len(vectors) * self._rank
        down, up = 0, 0
        for layer in self._layers:
            inputs, outputs = self._rank * layer.inputs, self._rank * layer.outputs
            # The slots' ranks, one after the other.
            a = downs[:, :, down : down + inputs].reshape(batch, rank, layer.inputs)
            b = ups[:, :, up : up + outputs].reshape(batch, rank, layer.outputs)
            now[layer.name] = a, b
            down, up = down + inputs, up + outputs
        self._now = now

    def drop(self) -> None:
        self._now = {}

    def add_to(self, name: str) -> Any:
        """A hook for a layer: it adds B A x to what the layer makes of x."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if name not in self._now:
                return None
            (x, *_), (a, b) = inputs, self._now[name]
            if isinstance(module, nn.Conv2d):  # [B, C, H, W]
                change = b.transpose(1, 2) @ (a @ x.flatten(2))
            else:
                change = (x.reshape(x.shape[0], -1, x.shape[-1]) @ a.transpose(1, 2)) @ b
            return output + change.reshape(output.shape)

        return add


class SlottedDenoiser(nn.Module):
    """A denoiser, with its control networks or without, whose rows each have LoRAs of their own."""

    def __init__(self, denoiser: nn.Module, matrices: _Matrices, slots: int) -> None:
        super().__init__()
        self.denoiser, self._matrices, self._slots = denoiser, matrices, slots

    def forward(self, *inputs: Tensor) -> Tensor:
        """`inputs`: the denoiser's own; then the values [B, values] and the scale [B] of each slot."""
        own, slots = inputs[: -2 * self._slots], inputs[-2 * self._slots :]
        self._matrices.take(slots[::2], slots[1::2])
        try:
            output: Tensor = self.denoiser(*own)
        finally:
            self._matrices.drop()
        return output
