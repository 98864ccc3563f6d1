"""Write LoRAs in kohya's naming, which ComfyUI reads: `lora_unet_down_blocks_0_..._to_q.lora_down.weight` and `.alpha`.

Diffusers' form names the same tensors `unet.down_blocks.0...to_q.lora_A.weight` and keeps alpha in the file's metadata.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}
_MAGNITUDES = "lora_magnitude_vector"
"""DoRA's, one an output; kohya's form has the axes of the layer's weight."""


def to_kohya(weights: Mapping[str, Tensor], prefix: str, scale: float) -> dict[str, Tensor]:
    """diffusers' LoRA in kohya's names: `PREFIX.module.lora_A.weight` [rank, in, ...] and `lora_B` [out, rank, ...], unchanged.

    Every layer also gets `alpha`, a scalar: kohya's loaders multiply the product of the two by alpha / rank, which is `scale`.
    """
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix(f"{prefix}.").removesuffix(".weight")
        module, _, side = name.rpartition(".")
        layer = f"lora_{prefix}_{module.replace('.', '_')}"
        if side == _MAGNITUDES:
            axes = weights[f"{prefix}.{module}.lora_B.weight"].ndim
            converted[f"{layer}.dora_scale"] = value.reshape(-1, *(1,) * (axes - 1))
            continue
        converted[f"{layer}.{_SIDES[side]}.weight"] = value
        converted[f"{layer}.alpha"] = torch.tensor(scale * len(weights[f"{prefix}.{module}.lora_A.weight"]))
    return converted
