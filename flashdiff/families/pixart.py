"""PixArt-alpha: a T5 with a mask, and a transformer with cross-attention that also predicts a variance, which is dropped."""

from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.loading import (
    explain_bad_settings,
    load_part,
    load_vae,
    read_config,
    scheduler_config,
    spec_of,
    tokenizer_spec,
    torch_model,
)
from flashdiff.families.settings import AUTOENCODERS, UNSHIFTED_VAE
from flashdiff.schedule import NoiseSchedule

_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("proj_in", "proj_out", "net.0.proj", "net.2", "proj"),
    *("linear", "linear_1", "linear_2"),
)


class _Transformer(PixArtTransformer2DModel, PeftAdapterMixin):
    """diffusers' network, which lacks the adapter methods that its siblings have."""


class _TextEncoder(nn.Module):
    def __init__(self, t5: Any, pad_id: int) -> None:
        super().__init__()
        self.t5, self.pad_id = t5, pad_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = (input_ids != self.pad_id).float()
        return self.t5(input_ids, attention_mask=mask)[0], mask


class _Denoiser(nn.Module):
    def __init__(self, transformer: Any, factor: int) -> None:
        super().__init__()
        self.transformer, self.factor = transformer, factor

    def forward(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        batch, channels, rows, columns = latents.shape
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:  # alpha's at 1024 pixels, and never Sigma's
            height, width = rows * self.factor, columns * self.factor
            resolution = torch.tensor([[height, width]], dtype=latents.dtype, device=latents.device)
            proportions = torch.tensor([[height / width]], dtype=latents.dtype, device=latents.device)
            added = {"resolution": resolution.expand(batch, -1), "aspect_ratio": proportions.expand(batch, -1)}
        output: Tensor = self.transformer(
            latents,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=times,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output[:, :channels]  # the rest is the variance


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    from transformers import T5EncoderModel

    vae = load_vae(folder)
    transformer = load_part(folder, "transformer", _Transformer)
    t5 = load_part(folder, "text_encoder", T5EncoderModel)
    return torch_model(
        folder,
        spec,
        text_encoder=_TextEncoder(t5, spec.tokenizers[0].pad_id),
        denoiser=_Denoiser(transformer, spec.latent_factor),
        network=transformer,
        weights={"vae": vae, "transformer": transformer, "text_encoder": t5},
    )


def pixart_family(name: str, pipeline_class: str, *, tokens: int, small_vae: str) -> ModelFamily:
    """A family of PixArt's form, whose pipeline reads so many tokens of a prompt."""

    @explain_bad_settings
    def read_spec(folder: Path) -> ModelSpec:
        transformer = read_config(folder, "transformer")
        return spec_of(
            folder,
            family,
            prediction="epsilon",
            schedule=NoiseSchedule.from_scheduler_config(scheduler_config(folder), source=f"{folder}/scheduler"),
            network_channels=transformer["in_channels"],
            latent_side=transformer["sample_size"],
            tokenizers=(tokenizer_spec(folder, "tokenizer", "input_ids", tokens, lowercase=True),),
        )

    family = ModelFamily(
        name=name,
        pipeline_class=pipeline_class,
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        lora_targets=_LORA_TARGETS,
        feature_tap=lambda transformer: transformer.transformer_blocks[len(transformer.transformer_blocks) // 2],
        feature_blocks=lambda transformer: transformer.transformer_blocks,
        lora_prefix="transformer",
        fixed_size=True,
        size_step=lambda transformer: int(transformer["patch_size"]),
        lora_writer="StableDiffusion3Pipeline",  # the same file layout; PixArt's own pipeline has no writer
        default_guidance=4.5,
        small_vae=small_vae,
        default_steps=20,
        networks={
            "transformer": dict.fromkeys(("PixArtTransformer2DModel", "Transformer2DModel"), "PixArtTransformer2DModel"),
            "vae": AUTOENCODERS,
            "text_encoder": "T5Config",
        },
        fixed={"vae": UNSHIFTED_VAE},
        read_spec=read_spec,
        load=_load,
    )
    return family


FAMILY = pixart_family("pixart", "PixArtAlphaPipeline", tokens=120, small_vae="madebyollin/taesd")
