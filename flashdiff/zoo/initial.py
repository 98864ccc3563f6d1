"""The model that a recipe's `denoiser.init_from` names: its parts are kept, and its denoiser is where training starts."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashdiff.errors import ConfigError
from flashdiff.families import family_of, find_base
from flashdiff.families.loading import load_part, load_vae, scheduler_config
from flashdiff.zoo.growth import grow
from flashdiff.zoo.recipe import ZooRecipe


class Parts(NamedTuple):
    """What a model directory is written from."""

    vae: Any
    tokenizer: Any
    text_encoder: Any
    unet: Any


def initial_parts(recipe: ZooRecipe) -> Parts:
    """The parts of the model in float32, the denoiser grown; ConfigError for a model of another form than the recipe's."""
    assert recipe.denoiser.init_from
    folder = find_base(recipe.denoiser.init_from)
    family = family_of(folder)
    if family.name != "sd15":
        raise ConfigError(f"denoiser.init_from '{recipe.denoiser.init_from}': it must be of family sd15, and is of {family.name}")
    parts = load_parts(folder)
    parts.unet.requires_grad_(True)
    _check_form(parts, folder, recipe)
    torch.manual_seed(recipe.seed + 1)  # the new layers' weights
    return parts._replace(unet=grow(parts.unet, recipe.denoiser.layers_per_block))


def load_parts(folder: Path) -> Parts:
    """The parts of an SD1.5 directory in float32, frozen."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return Parts(
        load_vae(folder),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        load_part(folder, "text_encoder", CLIPTextModel),
        load_part(folder, "unet", UNet2DConditionModel),
    )


def _check_form(parts: Parts, folder: Path, recipe: ZooRecipe) -> None:
    unet, vae, asked = parts.unet.config, parts.vae.config, recipe.denoiser
    levels = len(recipe.vae.decoder_blocks)
    forms = {
        "the autoencoder": ("AutoencoderTiny", type(parts.vae).__name__),
        "the autoencoder's widths": ((recipe.vae.channels,) * levels, tuple(vae.get("decoder_block_out_channels", ()))),
        "vae.latent_channels": (recipe.vae.latent_channels, vae.latent_channels),
        "text.width": (recipe.text.width, parts.text_encoder.config.hidden_size),
        "text.tokens": (recipe.text.tokens, parts.tokenizer.model_max_length),
        "denoiser.block_out_channels": (asked.block_out_channels, tuple(unet.block_out_channels)),
        "world.image_size": (recipe.world.image_size, unet.sample_size * 2 ** (levels - 1)),
        "the prediction": ("v_prediction", scheduler_config(folder).get("prediction_type")),
    }
    for what, (wanted, found) in forms.items():
        if wanted != found:
            raise ConfigError(f"denoiser.init_from '{asked.init_from}': {what} must be {wanted}, and is {found} there")
    layers = unet.layers_per_block
    if not isinstance(layers, int) or layers > asked.layers_per_block:
        raise ConfigError(
            f"denoiser.layers_per_block {asked.layers_per_block}: it must be at least that of '{asked.init_from}', {layers}"
        )
