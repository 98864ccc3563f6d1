"""LoRA files in kohya's naming, which ComfyUI and its kin read: `lora_unet_down_blocks_0_..._to_q.lora_down.weight` and `.alpha`.

Diffusers' form names the same tensors `unet.down_blocks.0...to_q.lora_A.weight` and keeps alpha in the file's metadata.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flashdiff.errors import LoraError

_SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file's tensors are named kohya's way."""
    return all(key.startswith("lora_") for key in keys)


def to_kohya(weights: Mapping[str, Tensor], prefix: str, alpha: float) -> dict[str, Tensor]:
    """Diffusers' tensors `PREFIX.module.lora_A.weight` in kohya's names, with an alpha for each layer."""
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, side, _ = key.removeprefix(f"{prefix}.").rsplit(".", 2)
        layer = f"lora_{prefix}_{module.replace('.', '_')}"
        converted[f"{layer}.{_SIDES[side]}.weight"] = value
        converted[f"{layer}.alpha"] = torch.tensor(alpha)
    return converted


def from_kohya(
    weights: Mapping[str, Tensor], prefix: str, modules: Iterable[str], source: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Kohya's tensors in diffusers' names, and alpha by `PREFIX.module.alpha`.

    Underscores stand for dots in kohya's names, so a module is found among the network's `modules`. LoraError for a layer
    that the network does not have, or of another part (a text encoder), which would be left out without a word.
    """
    known = {f"lora_{prefix}_{name.replace('.', '_')}": name for name in modules}
    sides = {kohya: peft for peft, kohya in _SIDES.items()}
    converted: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in weights.items():
        layer, _, rest = key.partition(".")
        if layer not in known:
            raise LoraError(f"{source}: this base has no layer for '{layer}'")
        side = rest.removesuffix(".weight")
        if rest == "alpha":
            alphas[f"{prefix}.{known[layer]}.alpha"] = float(value)
        elif side in sides:
            converted[f"{prefix}.{known[layer]}.{sides[side]}.weight"] = value
        else:
            raise LoraError(f"{source}: '{key}' is not a plain LoRA's; LoCon, LoHa and DoRA cannot be fused")
    return converted, alphas
