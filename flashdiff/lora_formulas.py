"""What the tensors of a LoRA file add to a layer's weight: the formulas of LoRA, DoRA, LoHa, LoKr and full differences.

As peft and LyCORIS have them: arXiv 2106.09685 (LoRA), 2402.09353 (DoRA), 2108.06098 (LoHa), 2309.14859 (LoKr, Tucker forms).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flashdiff.lora_kinds import Scaling

Layer = Mapping[str, Tensor]
"""The tensors of one layer by their roles, in float32."""


def check_rank(layer: Layer) -> str | None:
    """Why the factors of a layer make no change; None where they do."""
    is_empty = any(role.startswith(("down", "up", "hada", "lokr")) and not value.numel() for role, value in layer.items())
    return "its rank is 0" if is_empty else None


def weight_change(layer: Layer, shape: torch.Size, weight: float, scaling: Scaling) -> Tensor | None:
    """What a layer adds to a weight, in the weight's `shape` [out, in, ...], before DoRA; None where it changes the bias alone.

    It is multiplied by `weight` (1: as trained). ValueError where the shapes do not fit each other or the weight.
    """
    if "diff" in layer:
        change = layer["diff"] * weight
    elif "down" in layer:
        change = _low_rank(layer, len(shape)) * _scale(layer, layer["down"].shape[0], weight, scaling)
    elif "hada_w1_a" in layer:
        change = _hadamard(layer) * _scale(layer, layer["hada_w1_b"].shape[0], weight, scaling)
    elif any(role.startswith("lokr") for role in layer):
        change = _kronecker(layer) * _kronecker_scale(layer, weight, scaling)
    else:
        return None
    if _flat(change.shape) != _flat(shape) or (change.ndim > 2 and _squeezed(change.shape) != _squeezed(shape)):
        raise ValueError(f"it is for a weight of {list(change.shape)}, the base's has {list(shape)}")
    return change.reshape(shape)


def bias_change(layer: Layer, weight: float, scaling: Scaling) -> Tensor | None:
    """What a layer adds to the bias [out], multiplied by `weight` (1: as trained); None where it adds nothing."""
    change = layer["diff_b"] * weight if "diff_b" in layer else None
    if "up_bias" in layer:
        up = layer["up_bias"] * _scale(layer, layer["down"].shape[0], weight, scaling)
        change = up if change is None else change + up
    return change


def decomposed(current: Tensor, change: Tensor, layer: Layer, original: Tensor) -> Tensor:
    """DoRA's weight: each output's magnitude times its direction; each input's in the older form of LyCORIS, [1, inputs].

    The norm is that of the base's `original` weight with this change alone, as peft has it.
    """
    magnitude = layer["magnitude"] if "magnitude" in layer else layer["dora_scale"]
    axis = 1 if "dora_scale" in layer and magnitude.ndim > 1 and magnitude.shape[0] == 1 else 0
    if magnitude.numel() != current.shape[axis]:
        raise ValueError(f"its magnitudes are {magnitude.numel()}, the base's weight has {list(current.shape)}")
    others = [dim for dim in range(current.ndim) if dim != axis]
    factor = magnitude.flatten() / torch.linalg.vector_norm(original + change, dim=others)
    return factor.view([-1 if dim == axis else 1 for dim in range(current.ndim)]) * (current + change)


def _scale(layer: Layer, rank: int, weight: float, scaling: Scaling) -> float:
    return scaling.factor(float(layer["alpha"]) if "alpha" in layer else None, rank, weight)


def _kronecker_scale(layer: Layer, weight: float, scaling: Scaling) -> float:
    """alpha counts only where a factor has a rank."""
    inner = layer.get("lokr_w2_b", layer.get("lokr_w1_b"))
    if inner is None:
        if "alpha" not in layer and scaling.alpha is not None and scaling.rank is not None:
            return weight * scaling.alpha / scaling.rank  # peft divides by its setting
        return weight
    return _scale(layer, inner.shape[0], weight, scaling)


def _low_rank(layer: Layer, dims: int) -> Tensor:
    """B A, as matrices or as convolutions one after the other."""
    down, up = layer["down"], layer["up"]
    if "mid" in layer:
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), layer["mid"], down.flatten(1))
    if down.ndim == 4 and down.shape[2:] != (1, 1):
        # As peft has it, to the last bit.
        return torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    product = up.flatten(1) @ down.flatten(1)
    return product[:, :, None, None] if dims == 4 else product


def _hadamard(layer: Layer) -> Tensor:
    """(w1_a w1_b) * (w2_a w2_b), elementwise; with cores t1 and t2 in Tucker's form."""
    w1_a, w1_b, w2_a, w2_b = (layer[f"hada_{factor}"] for factor in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "hada_t1" in layer:
        return _tucker(layer["hada_t1"], w1_a, w1_b) * _tucker(layer["hada_t2"], w2_a, w2_b)
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def _kronecker(layer: Layer) -> Tensor:
    w1 = layer["lokr_w1"] if "lokr_w1" in layer else layer["lokr_w1_a"] @ layer["lokr_w1_b"]
    if "lokr_w2" in layer:
        w2 = layer["lokr_w2"]
    elif "lokr_t2" in layer:
        w2 = _tucker(layer["lokr_t2"], layer["lokr_w2_a"], layer["lokr_w2_b"])
    else:
        w2 = layer["lokr_w2_a"] @ layer["lokr_w2_b"]
    return torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2.contiguous())


def _tucker(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", core, inner, outer)


def _flat(shape: torch.Size) -> list[int]:
    """As a matrix: what is said of a convolution's weight may come as one."""
    return [*shape[:1], *([math.prod(shape[1:])] if len(shape) > 1 else [])]


def _squeezed(shape: torch.Size) -> list[int]:
    """Without the ones at its end: a 1x1 convolution is a matrix."""
    sides = list(shape)
    while len(sides) > 2 and sides[-1] == 1:
        sides.pop()
    return sides
