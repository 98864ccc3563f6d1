"""Stable Diffusion's x4 upscaler: a UNet that reads an image of latent size in pixels, with noise, and the noise's level."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff import defaults
from flashdiff.components import ModelSpec
from flashdiff.errors import ModelError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.entrance import Entrance
from flashdiff.families.loading import (
    explain_bad_settings,
    load_part,
    load_vae,
    read_config,
    tokenizer_spec,
    torch_model,
    unet_size_step,
    unet_spec,
)
from flashdiff.families.sd15 import TextEncoder
from flashdiff.families.settings import AUTOENCODERS, UNET, UNSHIFTED_VAE, check_config
from flashdiff.parts import LOW_RES_IMAGE, NOISE_LEVEL, Condition
from flashdiff.schedule import NoiseSchedule

_SCALE = 0.08333
"""Of the latents: the pipeline puts it in the place of any other that the autoencoder's file has."""
_LOW_RES_SCHEDULER = "low_res_scheduler"


class _Denoiser(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, low_res_image: Tensor, noise_level: Tensor
    ) -> Tensor:
        """`low_res_image` [B, 3, h, w] has the noise of `noise_level` [B], a class."""
        joined = torch.cat([latents, low_res_image], dim=1)
        output: Tensor = self.unet(joined, times, encoder_hidden_states, class_labels=noise_level, return_dict=False)[0]
        return output


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    spec = unet_spec(folder, FAMILY, (tokenizer_spec(folder, "tokenizer", "input_ids"),), entrances=[_entrance(folder)])
    # No task of it reads the latents of an image.
    return spec.model_copy(update={"parts": tuple(part for part in spec.parts if part.name != "encoder")})


def _entrance(folder: Path) -> Entrance:
    """The low-resolution image and its noise level; ModelError for levels that the UNet or the schedule does not have."""
    path = f"{folder}/{_LOW_RES_SCHEDULER}/scheduler_config.json"
    config = read_config(folder, _LOW_RES_SCHEDULER, "scheduler_config.json")
    if config.get("_class_name") != "DDPMScheduler":
        raise ModelError(f"{path}: '_class_name' is {config.get('_class_name')!r}; images get their noise from a DDPMScheduler")
    check_config(path, config, "DDPMScheduler", {})
    schedule = NoiseSchedule.from_scheduler_config(config, source=path)
    most = read_config(folder, ".", "model_index.json").get("max_noise_level", defaults.MAX_NOISE_LEVEL)
    classes = read_config(folder, "unet").get("num_class_embeds")
    if type(classes) is not int or classes < 1:
        raise ModelError(
            f"{folder}/unet/config.json: 'num_class_embeds' is {classes!r}; an upscaler's UNet has a class a noise level"
        )
    levels = min(classes, schedule.num_train_timesteps)
    if type(most) is not int or not 0 <= most < levels:
        raise ModelError(f"{folder}/model_index.json: 'max_noise_level' is {most!r}; this UNet has the levels 0 to {levels - 1}")
    image = Condition(name=LOW_RES_IMAGE, enters="concat", channels=3, noised=schedule)
    return image, Condition(name=NOISE_LEVEL, enters="label", classes=most + 1)


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import CLIPTextModel

    unet = load_part(folder, "unet", diffusers.UNet2DConditionModel)
    clip = load_part(folder, "text_encoder", CLIPTextModel)
    return torch_model(
        folder,
        spec,
        text_encoder=TextEncoder(clip),
        denoiser=_Denoiser(unet),
        network=unet,
        weights={"vae": load_vae(folder), "unet": unet, "text_encoder": clip},
    )


FAMILY = ModelFamily(
    name="sd-upscaler",
    pipeline_class="StableDiffusionUpscalePipeline",
    conditioning=("encoder_hidden_states",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    slot_blocks=("attentions",),
    feature_tap=lambda unet: unet.mid_block,
    lora_prefix="unet",
    size_step=unet_size_step,
    default_guidance=9.0,
    default_steps=75,
    networks={
        "unet": {"UNet2DConditionModel": "UNet2DConditionModel"},
        "vae": AUTOENCODERS,
        "text_encoder": "CLIPTextConfig",
    },
    further_files=(f"{_LOW_RES_SCHEDULER}/scheduler_config.json",),
    pipeline_settings=("max_noise_level",),
    upcasts_vae=True,
    fixed={
        "unet": {
            **{name: values for name, values in UNET.items() if name != "num_class_embeds"},
            "addition_embed_type": (None,),
            "time_cond_proj_dim": (None,),
        },
        "vae": {**UNSHIFTED_VAE, "scaling_factor": (_SCALE,)},
    },
    read_spec=_read_spec,
    load=_load,
)
