"""What enters a network together with the latents: nothing, a mask and the rest of an image, or an image to edit.

Data for the families; a mask is one value a latent cell, or one for each of its pixels.
"""

import torch
from torch import Tensor, nn

from flashdiff.parts import EDITED_IMAGE, MASK, MASKED_IMAGE, Condition

Entrance = tuple[Condition, ...]
"""Conditions that are joined to the latents' channels, or follow them in the sequence."""


def unet_entrances(pipeline_class: str, latent_channels: int) -> tuple[Entrance, ...]:
    """The entrances that Stable Diffusion's UNets of a pipeline class may have; a UNet's number of channels says which it has."""
    if "InstructPix2Pix" in pipeline_class:
        # Training dropped the image: it put zeros in its place.
        image = Condition(name=EDITED_IMAGE, enters="concat", channels=latent_channels, absent="zeros")
        return ((image,),)
    mask = Condition(name=MASK, enters="concat", channels=1, absent="ones")  # all is replaced
    masked_image = Condition(name=MASKED_IMAGE, enters="concat", channels=latent_channels, absent="grey_image")
    return (), (mask, masked_image)


def flux_entrances(pipeline_class: str, latent_channels: int, latent_factor: int) -> tuple[Entrance, ...]:
    """The only entrance that a transformer of a pipeline class of FLUX may have."""
    masked_image = Condition(name=MASKED_IMAGE, enters="concat", channels=latent_channels, absent="grey_image")
    pixels = Condition(name=MASK, enters="concat", channels=latent_factor**2, absent="ones")
    # Its scale says whether a row has one: a row without does not attend to its tokens.
    reference = Condition(name=EDITED_IMAGE, enters="sequence", channels=latent_channels, scaled=True, absent="zeros")
    by_class: dict[str, Entrance] = {"FluxFillPipeline": (masked_image, pixels), "FluxKontextPipeline": (reference,)}
    return (by_class.get(pipeline_class, ()),)


class Joined(nn.Module):
    """Latents [B, C, h, w], joined to what enters the network with them."""

    def __init__(self, scaling_factor: float) -> None:
        super().__init__()
        self.scaling_factor = scaling_factor

    def forward(self, latents: Tensor, image: Tensor | None, masked_image: Tensor | None) -> Tensor:
        """The network's input [B, C + joined, h, w]: `latents` [B, C, h, w] with what is joined to their channels.

        `image` alone holds the latents [B, C, h, w] of an image to edit. With `masked_image`, the latents [B, C, h, w] of an
        image without its masked part, it holds the mask [B, 1, h, w].
        """
        if image is None:
            return latents
        if masked_image is None:
            return torch.cat([latents, image / self.scaling_factor], dim=1)  # these networks were trained on unscaled latents
        return torch.cat([latents, image, masked_image], dim=1)
