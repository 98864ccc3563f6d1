"""The recipe of the embedded model, a table a stage: `avatars.toml` is the one that ships."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from flashdiff.config import Record
from flashdiff.grown import GrownRecord
from flashdiff.zoo.fit import StageRecipe
from flashdiff.zoo.world import KINDS


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"'{kind}' is none of {', '.join(KINDS)}")
    return kind


KindName = Annotated[str, AfterValidator(_known)]
Width = Annotated[int, Field(ge=1, le=65536)]
Blocks = Annotated[tuple[Annotated[int, Field(ge=0, le=100)], ...], Field(min_length=1, max_length=8)]


class WorldRecipe(Record):
    kinds: tuple[KindName, ...] = Field(tuple(KINDS), min_length=1)
    image_size: int = Field(64, ge=8, le=4096)
    train_images: int = Field(40_000, ge=1, le=10**7)


class VaeRecipe(StageRecipe):
    channels: Width
    encoder_blocks: Blocks
    decoder_blocks: Blocks
    """Residual blocks per resolution; the decoder runs in every request, the encoder only where one brings an image."""
    latent_channels: Width
    latent_noise: float = Field(0.05, ge=0, le=100)
    """Noise on the latents while training, the fixed variance of this autoencoder: it keeps the latent space smooth."""
    crop: int = 32
    """Side of the random crops seen in the first seven eighths: the network is convolutional and has no norms, so
    small crops teach it as much per pixel and give four times the updates."""


class TextRecipe(StageRecipe):
    """The text encoder; its `images` are captions."""

    width: Width = 128
    layers: int = Field(2, ge=1, le=100)
    tokens: int = Field(32, ge=3, le=1024)
    vocabulary: int = Field(1000, ge=600, le=10**6)


class DenoiserRecipe(StageRecipe, GrownRecord):
    LATER: ClassVar[frozenset[str]] = frozenset(
        {"init_from", "layers_per_block", "channel_weights", "detail_weight", "kind_weights", "focus", "precision"}
    )

    block_out_channels: tuple[Width, ...] = Field(min_length=1, max_length=8)
    layers_per_block: int = Field(1, ge=1, le=8)
    init_from: str | None = Field(None, min_length=1)
    """A model of this recipe's widths, `avatars` or a directory: its denoiser, grown to `layers_per_block`, is where training
    starts, and its autoencoder and text encoder are kept, so the tables of those only say how they were made."""
    channel_weights: Literal["equal", "whitened"] = "equal"
    """`whitened` divides the squared errors of a latent channel by its variance, so that faint channels count as much."""
    detail_weight: float = Field(1, ge=1, le=1000)
    """How much more errors count where an image shows, or could show, a pattern, a surface, a ring or a beard."""
    kind_weights: Mapping[KindName, Annotated[float, Field(gt=0, le=1000)]] = {}
    """How often scenes of a kind are drawn, relative to the others; 1 for kinds not named."""
    focus: tuple[Annotated[int, Field(ge=0, le=999)], Annotated[int, Field(ge=0, le=999)]] | None = None
    """Half of the times are drawn from this range, both ends included; None: all times are equally likely."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` compiles the network and multiplies in bfloat16, weights and averages staying in float32: 1.4 times as fast on
    two cores with AMX, and slower on cores without it."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    ema_decay: float = Field(0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _focus_rises(self) -> Self:
        if self.focus and self.focus[0] > self.focus[1]:
            raise ValueError(f"denoiser.focus must be two rising times, not {self.focus}")
        return self


class ZooRecipe(Record):
    seed: int = Field(0, ge=0, lt=2**31)
    world: WorldRecipe
    vae: VaeRecipe
    text: TextRecipe
    denoiser: DenoiserRecipe

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if unknown := next((kind for kind in self.denoiser.kind_weights if kind not in self.world.kinds), None):
            raise ValueError(
                f"denoiser.kind_weights has '{unknown}', which is not one of world.kinds ({', '.join(self.world.kinds)})"
            )
        if not 1 <= self.vae.crop <= self.world.image_size:
            raise ValueError(f"vae.crop must be at most world.image_size ({self.world.image_size}), not {self.vae.crop}")
        return self
