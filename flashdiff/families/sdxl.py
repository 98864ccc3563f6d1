"""Stable Diffusion XL: two CLIP text encoders, a UNet that also takes a pooled text embedding and the image's size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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


class _TextEncoder(nn.Module):
    """Both encoders' last-but-one layers side by side, and the second one's projection."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


class _Denoiser(SteerableUnet, nn.Module):
    def __init__(self, unet: Any, vae: Any, factor: int, guidance: float | None) -> None:
        super().__init__()
        self.unet, self.factor, self.join = unet, factor, Joined(vae.config.scaling_factor)
        self.embedding: Tensor | None
        width = unet.config.time_cond_proj_dim
        self.register_buffer("embedding", None if guidance is None else guidance_embedding(guidance, width))

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        image: Tensor | None = None,
        masked_image: Tensor | None = None,
        residuals: Mapping[str, list[Tensor]] | None = None,
        reference: Reading | None = None,
    ) -> Tensor:
        """`image`: one to edit, or a mask together with `masked_image`; `residuals`: of control networks; `reference`: what an
        IP-Adapter made of one."""
        latents = self.join(latents, image, masked_image)
        guidance = None if self.embedding is None else self.embedding.to(latents.dtype).expand(latents.shape[0], -1)
        texts, steering = self.texts(latents, encoder_hidden_states, text_embeds), as_unet_takes(residuals or {})
        if reference:
            texts = reference.next_to(texts)
        output: Tensor = self.unet(latents, times, timestep_cond=guidance, return_dict=False, **texts, **steering)[0]
        return output

    def texts(self, latents: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, *_: Tensor) -> dict[str, Any]:
        """What the UNet and its control networks take of the text, and of the image's size, alike."""
        # The UNet takes original size, crop and target size: those of an uncropped image of the size that it makes.
        # Filled and joined, because an exported torch.tensor would keep the size of the example it was traced with.
        height, width, zero = (
            torch.full((latents.shape[0], 1), pixels, dtype=torch.float32, device=latents.device)
            for pixels in (latents.shape[2] * self.factor, latents.shape[3] * self.factor, 0)
        )
        added = {"text_embeds": text_embeds, "time_ids": torch.cat([height, width, zero, zero, height, width], dim=1)}
        return {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added}


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    tokenizers = (tokenizer_spec(folder, "tokenizer", "input_ids"), tokenizer_spec(folder, "tokenizer_2", "input_ids_2"))
    zeros = read_config(folder, ".", "model_index.json").get("force_zeros_for_empty_prompt", True)
    return unet_spec(folder, FAMILY, tokenizers, unconditional="zeros" if zeros else "empty_prompt")


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    vae = load_vae(folder)
    unet = load_part(folder, "unet", diffusers.UNet2DConditionModel)
    first = load_part(folder, "text_encoder", CLIPTextModel)
    second = load_part(folder, "text_encoder_2", CLIPTextModelWithProjection)
    return torch_model(
        folder,
        spec,
        text_encoder=_TextEncoder(first, second),
        denoiser=_Denoiser(unet, vae, spec.latent_factor, spec.sampler.embedded_guidance),
        network=unet,
        weights={"vae": vae, "unet": unet, "text_encoder": first, "text_encoder_2": second},
    )


FAMILY = ModelFamily(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    conditioning=("encoder_hidden_states", "text_embeds"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    slot_blocks=("attentions",),  # the projections and feed-forward layers that kohya's scripts train as well
    feature_tap=lambda unet: unet.mid_block,
    lora_prefix="unet",
    float32_inputs=("text_embeds",),  # the UNet joins it to sinusoids in float32, and casts both afterwards
    controls=UNET_CONTROLS,
    references=UNET_READER,
    size_step=unet_size_step,
    default_guidance=5.0,
    small_vae="madebyollin/taesdxl",
    upcasts_vae=True,
    default_steps=50,
    networks={
        "unet": {"UNet2DConditionModel": "UNet2DConditionModel"},
        "vae": AUTOENCODERS,
        "text_encoder": "CLIPTextConfig",
        "text_encoder_2": "CLIPTextConfig",
    },
    fixed={"unet": {**UNET, "addition_embed_type": ("text_time",)}, "vae": UNSHIFTED_VAE},
    read_spec=_read_spec,
    load=_load,
)
