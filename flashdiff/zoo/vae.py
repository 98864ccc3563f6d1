"""The embedded model's autoencoder: made, trained on renders, measured and used."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.checkpoint import step_generator
from flashdiff.zoo.fit import device, fit
from flashdiff.zoo.images import to_input
from flashdiff.zoo.recipe import ZooRecipe


def make_vae(recipe: ZooRecipe) -> Any:
    """AutoencoderTiny, the architecture of TAESD: at two steps a request, the decoder is a third of the time."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(recipe.seed)
    vae = recipe.vae
    return AutoencoderTiny(
        encoder_block_out_channels=(vae.channels,) * len(vae.encoder_blocks),
        decoder_block_out_channels=(vae.channels,) * len(vae.decoder_blocks),
        num_encoder_blocks=vae.encoder_blocks,
        num_decoder_blocks=vae.decoder_blocks,
        latent_channels=vae.latent_channels,
    )


def train_vae(vae: Any, images: NDArray[np.uint8], held_back: NDArray[np.uint8], recipe: ZooRecipe, out: Path) -> None:
    """Train in place, on images [N, H, W, 3]: reconstruction (L1 + 2 L2) through noisy latents."""
    stage = recipe.vae
    full_from = 7 * (stage.images // stage.batch_size) // 8

    def loss_of(step: int) -> Tensor:
        rng, generator = step_generator(recipe.seed, step)
        pixels = to_input(images[rng.integers(0, len(images), stage.batch_size)]).to(device())
        if step < full_from:
            top, left = rng.integers(0, pixels.shape[-1] - stage.crop + 1, 2)
            pixels = pixels[:, :, top : top + stage.crop, left : left + stage.crop]
        latents = vae.encode(pixels).latents
        noisy = latents + stage.latent_noise * torch.randn(latents.shape, generator=generator).to(device())
        error = vae.decode(noisy).sample - pixels
        return error.abs().mean() + 2 * error.square().mean() + 1e-3 * latents.square().mean()

    fit("vae", vae, loss_of, stage, out, ema_decay=None, report=lambda: f"{reconstruction_psnr(vae, held_back[:128]):.2f} dB")


@torch.no_grad()
def encode_all(vae: Any, images: NDArray[np.uint8]) -> Tensor:
    """Unscaled latents [N, C, h, w] of all images."""
    return torch.cat([vae.encode(to_input(images[i : i + 256])).latents for i in range(0, len(images), 256)])


@torch.no_grad()
def reconstruction_psnr(vae: Any, images: NDArray[np.uint8]) -> float:
    """PSNR in dB of encode and decode, over all pixels of images [N, H, W, 3]."""
    pixels = to_input(images).to(vae.device)
    decoded = torch.cat([vae.decode(vae.encode(part).latents).sample for part in pixels.split(128)])
    return float(-10 * torch.log10(((decoded.clamp(-1, 1) - pixels) / 2).square().mean()))
