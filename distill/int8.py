"""A frozen network in 8 bits: the weights of its blocks' linear layers, made float again for each product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdiff.errors import ConfigError


def round_to_int8(network: Any) -> None:
    """Round the linear layers in the blocks of a network of diffusers, in place; ConfigError where it has none.

    Layers outside of the blocks are few, and some of diffusers' code reads the type of their weights.
    """
    kinds = set(network._no_split_modules or ())
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    places = {
        (parent, name): layer
        for block in blocks
        for parent in block.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    }
    if not places:
        raise ConfigError("int8_base: this network has no blocks of linear layers; leave it out")
    for (parent, name), layer in places.items():
        setattr(parent, name, Int8Linear(layer))


class Int8Linear(nn.Linear):
    """A frozen linear layer [in] to [out]: int8 weights with a scale for each output, at which the largest is 127."""

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        values = layer.weight.detach().float()
        scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("scale", scale)  # [out, 1]
        self.weight = nn.Parameter((values / scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, values: Tensor) -> Tensor:
        """[..., in] to [..., out], in the precision that the pass computes in."""
        kind = values.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = _Product.apply(values.to(dtype), self.weight, self.scale)
        return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    """Keeps the int8 weights for the backward pass, where autograd would keep the float ones."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return linear(values, (weight * scale).to(values.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ (weight * scale).to(gradient.dtype), None, None
