"""The latent codec: the two halves of an autoencoder as modules whose latents are shifted and scaled to about unit variance."""

from typing import Any

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to scaled latents: the autoencoder's encoder, then the latent codec."""

    def __init__(self, vae: Any, scale: float = 1.0) -> None:
        """`scale` comes on top of the autoencoder's own scaling."""
        super().__init__()
        self.vae, self.scale = vae, scale

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, C, h, w] of `images`: the mean where the autoencoder is variational, or a draw of `generator`."""
        encoded = self.vae.encode(images)
        if not hasattr(encoded, "latent_dist"):
            latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        elif generator is None:
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latent_dist.sample(generator)
        scaled: Tensor = (latents - shift_of(self.vae)) * (self.vae.config.scaling_factor * self.scale)
        return scaled


class Decoder(nn.Module):
    """Scaled latents [B, C, h, w] to images [B, 3, H, W] in [-1, 1]: the inverse of the latent codec, then the decoder."""

    def __init__(self, vae: Any, scale: float = 1.0) -> None:
        super().__init__()
        self.vae, self.scale = vae, scale

    def forward(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents [B, C, h, w]."""
        unscaled = latents / (self.vae.config.scaling_factor * self.scale) + shift_of(self.vae)
        images: Tensor = self.vae.decode(unscaled, return_dict=False)[0]
        return images


def shift_of(vae: Any) -> float:
    """What is taken off latents before scaling; 0 for all but the 16-channel autoencoders."""
    return getattr(vae.config, "shift_factor", None) or 0.0


def latent_factor(vae: dict[str, Any]) -> int:
    """Pixels per latent cell. AutoencoderKL names its levels block_out_channels, AutoencoderTiny and AutoencoderDC
    decoder_block_out_channels; AutoencoderKLQwenImage says which of its halvings are temporal too."""
    if "temperal_downsample" in vae:
        halvings: int = 2 ** len(vae["temperal_downsample"])
        return halvings
    factor: int = 2 ** (len(vae.get("block_out_channels") or vae["decoder_block_out_channels"]) - 1)
    return factor
