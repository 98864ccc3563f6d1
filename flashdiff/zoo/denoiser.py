"""The embedded model's UNet: made, and trained on the latents and captions of renders."""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.checkpoint import step_generator
from flashdiff.schedule import NoiseSchedule
from flashdiff.zoo.fit import device, fit
from flashdiff.zoo.recipe import ZooRecipe
from flashdiff.zoo.text_encoder import token_ids
from flashdiff.zoo.world import Scene, caption

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's


def make_unet(recipe: ZooRecipe) -> Any:
    """The untrained UNet, in the recipe's widths."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(recipe.seed + 1)
    denoiser = recipe.denoiser
    inner = len(denoiser.block_out_channels) - 1
    return UNet2DConditionModel(
        sample_size=recipe.world.image_size // 2 ** (len(recipe.vae.decoder_blocks) - 1),
        in_channels=recipe.vae.latent_channels,
        out_channels=recipe.vae.latent_channels,
        block_out_channels=denoiser.block_out_channels,
        # Attention only inside: on the largest map it would cost more than all the rest.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * inner),
        up_block_types=(*("CrossAttnUpBlock2D",) * inner, "UpBlock2D"),
        layers_per_block=denoiser.layers_per_block,
        cross_attention_dim=recipe.text.width,
        attention_head_dim=4,
    )


def channel_weights(latents: Tensor) -> Tensor:
    """Weights [C, 1, 1] that divide by the variance of each channel of latents [N, C, h, w]; their mean is 1."""
    weights = 1 / latents.var((0, 2, 3))
    return (weights / weights.mean())[:, None, None]


def place_weights(details: Tensor, weight: float) -> Tensor:
    """Weights [N, 1, h, w] of places, those of details [N, h, w] `weight` times the others; their mean is 1."""
    weights = 1 + (weight - 1) * details.float()
    return (weights / weights.mean())[:, None]


class Batch(NamedTuple):
    """What one update regresses: v-prediction (Salimans & Ho 2022, eq. 9) of text-conditioned latents."""

    rows: Tensor
    """Which scenes these are [B], on the CPU."""
    x_t: Tensor
    t: Tensor
    hidden: Tensor
    """The captions' hidden states [B, tokens, width]."""
    v: Tensor


@dataclass(frozen=True)
class Batches:
    """Draws the batches of a training of the denoiser, or of a network that steers it, on `fit.device()`."""

    text_encoder: Any
    """On that device."""
    tokenizer: Any
    latents: Tensor
    """Of the scenes [N, C, h, w]."""
    scale: float
    """The factor that gives them unit variance."""
    scenes: Sequence[Scene]
    seed: int
    size: int
    caption_dropout: float
    caption_of: Callable[[Scene, random.Random], str] = caption
    shares: NDArray[np.float64] | None = None
    """How likely each scene is drawn [N]; None: all are equally likely."""
    focus: tuple[int, int] | None = None
    """Half of the times are drawn from this range, both ends included; None: all times are equally likely."""

    def draw(self, step: int) -> Batch:
        """The batch of an update: a function of the seed and the update alone."""
        rng, generator = step_generator(self.seed, step)
        words = random.Random(int(rng.integers(2**62)))
        chosen = rng.choice(len(self.scenes), self.size, p=self.shares)
        texts = ["" if words.random() < self.caption_dropout else self.caption_of(self.scenes[index], words) for index in chosen]
        hidden = self.text_encoder(token_ids(self.tokenizer, texts).to(device())).last_hidden_state

        rows = torch.from_numpy(chosen)
        x0 = self.latents[rows] * self.scale
        noise = torch.randn(x0.shape, generator=generator)
        alphas, sigmas = _levels()
        t = torch.randint(0, len(alphas), (len(chosen),), generator=generator)
        if self.focus:
            narrow = torch.randint(self.focus[0], self.focus[1] + 1, t.shape, generator=generator)
            t = torch.where(torch.rand(t.shape, generator=generator) < 0.5, narrow, t)
        alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
        x_t, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        return Batch(rows, x_t.to(device()), t.to(device()), hidden, v.to(device()))


@cache
def _levels() -> tuple[Tensor, Tensor]:
    alphas, sigmas = (torch.from_numpy(values).float() for values in SCHEDULE.levels(list(range(SCHEDULE.num_train_timesteps))))
    return alphas, sigmas


def _shares(scenes: Sequence[Scene], kind_weights: Mapping[str, float]) -> NDArray[np.float64] | None:
    if not kind_weights:
        return None
    weights = np.array([kind_weights.get(scene.kind, 1.0) for scene in scenes])
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def train_unet(
    unet: Any,
    text_encoder: Any,
    tokenizer: Any,
    latents: Tensor,
    scale: float,
    scenes: Sequence[Scene],
    details: Tensor,
    recipe: ZooRecipe,
    out: Path,
) -> None:
    """Train on v-prediction, in place; the EMA's weights remain.

    `latents` [N, C, h, w] are those of the scenes, `scale` is the factor that gives them unit variance, and `details` [N, h, w]
    says where `detail_weight` counts.
    """
    stage = recipe.denoiser
    of_channels = (channel_weights(latents) if stage.channel_weights == "whitened" else torch.ones(1)).to(device())
    of_places = place_weights(details, stage.detail_weight)
    in_bfloat16 = stage.precision == "bfloat16"
    network = torch.compile(unet) if in_bfloat16 else unet
    rounded = partial(torch.autocast, device().type, torch.bfloat16) if in_bfloat16 else nullcontext
    batches = Batches(
        text_encoder.to(device()), tokenizer, latents, scale, scenes, seed=recipe.seed + 1, size=stage.batch_size,
        caption_dropout=stage.caption_dropout, shares=_shares(scenes, stage.kind_weights), focus=stage.focus,
    )  # fmt: skip

    def loss_of(step: int) -> Tensor:
        batch = batches.draw(step)
        with rounded():
            output = network(batch.x_t, batch.t, batch.hidden).sample
        error = output.float() - batch.v
        return (of_channels * of_places[batch.rows].to(device()) * error.square()).mean()

    fit("denoiser", unet, loss_of, stage, out, ema_decay=stage.ema_decay, report=lambda: "")
    text_encoder.cpu()
