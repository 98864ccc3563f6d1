"""The recipe of the embedded model, a table a stage: `avatars.toml` is the one that ships."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from flashdiff.config import Record
from flashdiff.zoo.fit import StageRecipe
from flashdiff.zoo.world import KINDS


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"'{kind}' is none of {', '.join(KINDS)}")
    return kind


KindName = Annotated[str, AfterValidator(_known)]


class WorldRecipe(Record):
    kinds: tuple[KindName, ...] = Field(tuple(KINDS), min_length=1)
    image_size: int = Field(64, ge=8)
    train_images: int = Field(40_000, ge=1)


class VaeRecipe(StageRecipe):
    channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    """Residual blocks per resolution; the decoder runs in every request, the encoder only where one brings an image."""
    latent_channels: int
    latent_noise: float = 0.05
    """Noise on the latents while training, the fixed variance of this autoencoder: it keeps the latent space smooth."""
    crop: int = 32
    """Side of the random crops seen in the first seven eighths: the network is convolutional and has no norms, so
    small crops teach it as much per pixel and give four times the updates."""


class TextRecipe(StageRecipe):
    """The text encoder; its `images` are captions."""

    width: int = 128
    layers: int = 2
    tokens: int = 32
    vocabulary: int = 1000


class DenoiserRecipe(StageRecipe):
    block_out_channels: tuple[int, ...]
    caption_dropout: float = 0.1
    ema_decay: float = 0.999


class ZooRecipe(Record):
    seed: int = 0
    world: WorldRecipe
    vae: VaeRecipe
    text: TextRecipe
    denoiser: DenoiserRecipe

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        if not 1 <= self.vae.crop <= self.world.image_size:
            raise ValueError(f"vae.crop must be at most world.image_size ({self.world.image_size}), not {self.vae.crop}")
        return self
