"""Exact rewrites of a part's network before it is exported or run: the same function with fewer multiplications."""

from typing import Any, TypeGuard

import torch
from torch import nn

from flashdiff.engines.parts import Part
from flashdiff.families.base import TorchModel
from flashdiff.parts import Phase


def fold_decoder(model: TorchModel, part: Part) -> None:
    """`fold_upsampling` in a part that makes images; other parts stay, because denoisers were no faster with it."""
    if model.spec.part(part.name).phase == Phase.FINISH:
        fold_upsampling(part.module)


def fold_upsampling(network: nn.Module) -> int:
    """Make every nearest-neighbour doubling and the 3x3 convolution after it one transposed convolution, in place.

    Each pixel of the doubled image lies over 2x2 pixels of the original, so that the nine products become four. Zeros around
    the doubled image are zeros around the original: borders stay exact. A module that is called with an `output_size`, as in a
    UNet, would need more: decoders pass none. Returns how many pairs became one.
    """
    from diffusers.models.upsampling import Upsample2D

    count = 0
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Upsample2D) and _only_doubles(child) and _keeps_size(child.conv):
                module.register_module(name, transposed(child.conv))
                count += 1
        if isinstance(module, nn.Sequential):
            for index, (first, second) in enumerate(zip(module, list(module)[1:], strict=False)):
                if isinstance(first, nn.Upsample) and _doubles(first) and _keeps_size(second):
                    module[index], module[index + 1] = transposed(second), nn.Identity()
                    count += 1
    return count


def transposed(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """What makes [B, C, 2h, 2w] of [B, c, h, w] as doubling by nearest neighbours and then this 3x3 convolution do."""
    weight = conv.weight
    taps = weight.new_zeros(*weight.shape[:2], 4, 4)
    for y in range(2):  # every pixel is four of the doubled image, each of which the kernel meets
        for x in range(2):
            taps[..., y : y + 3, x : x + 3] += weight.detach().flip(2, 3)
    with torch.device("meta"):
        folded = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1, bias=False)
    folded.weight = nn.Parameter(taps.transpose(0, 1).contiguous(), requires_grad=False)
    folded.bias = conv.bias
    return folded.train(conv.training)


def _only_doubles(module: Any) -> bool:
    """Whether one of diffusers' upsampling modules does nothing else: no norm before it, no transposed convolution."""
    return bool(module.interpolate and module.name == "conv" and module.norm is None and not module.use_conv_transpose)


def _doubles(module: nn.Upsample) -> bool:
    return module.mode in ("nearest", "nearest-exact") and module.scale_factor in (2, (2, 2))


def _keeps_size(module: object) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain 3x3 convolution with zeros around the image."""
    return isinstance(module, nn.Conv2d) and (
        (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and module.groups == 1
        and module.padding_mode == "zeros"
    )
