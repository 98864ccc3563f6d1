"""Stable Diffusion 1.x and models of its form: one CLIP text encoder, a UNet with cross-attention, a 2-D autoencoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.control_unet import UNET_CONTROLS, SteerableUnet, as_unet_takes
from flashdiff.families.entrance import Joined
from flashdiff.families.guidance import guidance_embedding
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
from flashdiff.families.readers import UNET_READER, Reading
from flashdiff.families.settings import AUTOENCODERS, UNET, UNSHIFTED_VAE

_LCM_GUIDANCE = 8.5  # what LatentConsistencyModelPipeline feeds its UNet


class TextEncoder(nn.Module):
    """The last states of a CLIP text model [B, T, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.model(input_ids).last_hidden_state,)


class _Denoiser(SteerableUnet, nn.Module):
    def __init__(self, unet: Any, vae: Any, guidance: float | None) -> None:
        super().__init__()
        self.unet, self.join = unet, Joined(vae.config.scaling_factor)
        self.embedding: Tensor | None
        width = unet.config.time_cond_proj_dim
        self.register_buffer("embedding", None if guidance is None else guidance_embedding(guidance, width))

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        image: Tensor | None = None,
        masked_image: Tensor | None = None,
        residuals: Mapping[str, list[Tensor]] | None = None,
        reference: Reading | None = None,
    ) -> Tensor:
        """`image`: one to edit, or a mask together with `masked_image`; `residuals`: of control networks; `reference`: what an
        IP-Adapter made of one."""
        latents = self.join(latents, image, masked_image)
        guidance = None if self.embedding is None else self.embedding.to(latents.dtype).expand(latents.shape[0], -1)
        texts, steering = self.texts(latents, encoder_hidden_states), as_unet_takes(residuals or {})
        if reference:
            texts = reference.next_to(texts)
        output: Tensor = self.unet(latents, times, timestep_cond=guidance, return_dict=False, **texts, **steering)[0]
        return output

    def texts(self, latents: Tensor, encoder_hidden_states: Tensor, *_: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": encoder_hidden_states}


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    pipeline = read_config(folder, ".", "model_index.json").get("_class_name")
    guidance = _LCM_GUIDANCE if pipeline == "LatentConsistencyModelPipeline" else None
    return unet_spec(folder, FAMILY, (tokenizer_spec(folder, "tokenizer", "input_ids"),), guidance=guidance)


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import CLIPTextModel

    vae = load_vae(folder)
    unet = load_part(folder, "unet", diffusers.UNet2DConditionModel)
    clip = load_part(folder, "text_encoder", CLIPTextModel)
    return torch_model(
        folder,
        spec,
        text_encoder=TextEncoder(clip),
        denoiser=_Denoiser(unet, vae, spec.sampler.embedded_guidance),
        network=unet,
        weights={"vae": vae, "unet": unet, "text_encoder": clip},
    )


FAMILY = ModelFamily(
    name="sd15",
    pipeline_class="StableDiffusionPipeline",
    conditioning=("encoder_hidden_states",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    slot_blocks=("attentions",),  # the projections and feed-forward layers that kohya's scripts train as well
    feature_tap=lambda unet: unet.mid_block,
    lora_prefix="unet",
    controls=UNET_CONTROLS,
    references=UNET_READER,
    size_step=unet_size_step,
    default_guidance=7.5,
    small_vae="madebyollin/taesd",
    default_steps=50,
    networks={
        "unet": {"UNet2DConditionModel": "UNet2DConditionModel"},
        "vae": AUTOENCODERS,
        "text_encoder": "CLIPTextConfig",
    },
    fixed={"unet": {**UNET, "addition_embed_type": (None,)}, "vae": UNSHIFTED_VAE},
    read_spec=_read_spec,
    load=_load,
)
