"""A deeper UNet that computes what the one it came from computes, so that training goes on where it stood."""

from typing import Any

import torch


def grow(unet: Any, layers_per_block: int) -> Any:
    """The UNet with `layers_per_block` layers in every block, equal to `unet` as a function; `unet` itself for its own depth.

    A new layer begins as the identity: its residual branches end in zeros, and a new resnet of an up block, which sees the
    features and a skip connection side by side, passes the features on.
    """
    before = unet.config.layers_per_block
    if layers_per_block == before:
        return unet
    if not isinstance(before, int) or layers_per_block < before:
        raise ValueError(f"a UNet of {before} layers a block cannot grow to {layers_per_block}")
    grown = type(unet).from_config({**unet.config, "layers_per_block": layers_per_block})
    new = layers_per_block - before
    for old_block, block in zip(unet.down_blocks, grown.down_blocks, strict=True):
        _fill(old_block, block, list(range(before)))
    for old_block, block in zip(unet.up_blocks, grown.up_blocks, strict=True):
        # The first takes the deepest skip connection, which the new layers repeat; the others keep their distance from the end.
        _fill(old_block, block, [0, *range(1 + new, 1 + new + before)])
    for name, part in grown.named_children():
        if name not in ("down_blocks", "up_blocks"):
            part.load_state_dict(getattr(unet, name).state_dict())
    return grown


@torch.no_grad()
def _fill(old_block: Any, block: Any, places: list[int]) -> None:
    """Put the old block's layer i at place `places[i]` of the new one and make its other layers identities."""
    for name, part in block.named_children():
        if name not in ("resnets", "attentions"):  # what samples down or up
            part.load_state_dict(getattr(old_block, name).state_dict())
    for kind, make_identity in (("resnets", _make_resnet_identity), ("attentions", _make_attention_identity)):
        layers = getattr(block, kind, None) or ()
        for place, layer in enumerate(layers):
            if place in places:
                layer.load_state_dict(getattr(old_block, kind)[places.index(place)].state_dict())
            else:
                make_identity(layer)


def _make_resnet_identity(resnet: Any) -> None:
    torch.nn.init.zeros_(resnet.conv2.weight)
    torch.nn.init.zeros_(resnet.conv2.bias)
    if resnet.conv_shortcut is not None:
        torch.nn.init.zeros_(resnet.conv_shortcut.bias)
        torch.nn.init.dirac_(resnet.conv_shortcut.weight)


def _make_attention_identity(attention: Any) -> None:
    torch.nn.init.zeros_(attention.proj_out.weight)
    torch.nn.init.zeros_(attention.proj_out.bias)
