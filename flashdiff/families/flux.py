"""FLUX: a pooled CLIP vector and a T5, a transformer over packed latents, rectified flow; dev takes guidance as an input."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import GUIDANCE, ModelFamily, TorchModel
from flashdiff.families.codec import latent_factor
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
from flashdiff.families.settings import AUTOENCODERS, VAE
from flashdiff.schedule import FlowSchedule

_T5_TOKENS = 512
_PIXELS = 1024  # the pipeline's own size, where the autoencoder names none
_EMBEDDED_GUIDANCE = 3.5  # what the model's own pipeline feeds it


class _TextEncoder(nn.Module):
    """T5's states, CLIP's pooled vector, and the guidance scale that the network is given."""

    def __init__(self, clip: Any, t5: Any, guidance: float) -> None:
        super().__init__()
        self.clip, self.t5, self.guidance = clip, t5, guidance

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.clip(input_ids).pooler_output
        return self.t5(input_ids_2)[0], pooled, torch.full_like(pooled[:, 0], self.guidance)


class _Denoiser(nn.Module):
    """Latents [B, C, h, w] go in and out as they are; inside, each 2x2 patch is one token of 4 C values."""

    def __init__(self, transformer: Any, schedule: FlowSchedule) -> None:
        super().__init__()
        self.transformer = transformer
        _, sigmas = schedule.levels(list(range(schedule.num_train_timesteps)))
        self.register_buffer("sigmas", torch.from_numpy(sigmas).float())
        self.sigmas: Tensor
        # The network rounds times and guidance to its own precision before it embeds them: in bfloat16 333 would be 334.
        self._exact: tuple[Tensor, ...] = ()
        transformer.time_text_embed.register_forward_pre_hook(lambda _, given: (*self._exact, *given[len(self._exact) :]))

    def forward(
        self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, guidance: Tensor
    ) -> Tensor:
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        tokens = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        image_ids = torch.zeros(rows, columns, 3, dtype=latents.dtype, device=latents.device)
        image_ids[..., 1] += torch.arange(rows, device=latents.device)[:, None]
        image_ids[..., 2] += torch.arange(columns, device=latents.device)[None, :]
        is_guided = self.transformer.config.guidance_embeds
        sigmas = times / 1000 if times.is_floating_point() else self.sigmas[times]
        self._exact = tuple(1000 * values for values in (sigmas, *([guidance] if is_guided else [])))
        output = self.transformer(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=sigmas,
            guidance=guidance if is_guided else None,
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, dtype=latents.dtype, device=latents.device),
            img_ids=image_ids.reshape(rows * columns, 3),
            return_dict=False,
        )[0]
        self._exact = ()
        unpacked: Tensor = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(batch, channels, height, width)


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    if transformer.get("guidance_embeds"):
        sampling: dict[str, Any] = {"embedded_guidance": _EMBEDDED_GUIDANCE}
    else:  # schnell
        sampling = {"kind": "flow-euler", "default_steps": 4}
    side = vae.get("sample_size", _PIXELS) // latent_factor(vae)
    return spec_of(
        folder,
        FAMILY,
        prediction="flow",
        schedule=FlowSchedule.from_scheduler_config(
            scheduler_config(folder), source=f"{folder}/scheduler", tokens=(side // 2) ** 2
        ),
        network_channels=transformer["in_channels"] // 4,  # a token is a patch of 2x2
        latent_side=side,
        sampling=sampling,
        tokenizers=(
            tokenizer_spec(folder, "tokenizer", "input_ids"),
            tokenizer_spec(folder, "tokenizer_2", "input_ids_2", _T5_TOKENS),
        ),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import CLIPTextModel, T5EncoderModel

    vae = load_vae(folder)
    transformer = load_part(folder, "transformer", diffusers.FluxTransformer2DModel)
    clip, t5 = load_part(folder, "text_encoder", CLIPTextModel), load_part(folder, "text_encoder_2", T5EncoderModel)
    assert isinstance(spec.sampler.schedule, FlowSchedule)
    guidance = spec.sampler.embedded_guidance
    return torch_model(
        folder,
        spec,
        text_encoder=_TextEncoder(clip, t5, _EMBEDDED_GUIDANCE if guidance is None else guidance),
        denoiser=_Denoiser(transformer, spec.sampler.schedule),
        network=transformer,
        weights={"vae": vae, "transformer": transformer, "text_encoder": clip, "text_encoder_2": t5},
    )


FAMILY = ModelFamily(
    name="flux",
    pipeline_class="FluxPipeline",
    conditioning=("encoder_hidden_states", "pooled_projections", GUIDANCE),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("net.0.proj", "net.2", "proj_mlp", "proj_out"),
    ),
    feature_tap=lambda transformer: transformer.transformer_blocks[len(transformer.transformer_blocks) // 2],
    feature_blocks=lambda transformer: (*transformer.transformer_blocks, *transformer.single_transformer_blocks),
    lora_prefix="transformer",
    float32_inputs=(GUIDANCE,),
    size_step=lambda _: 2,  # a token is a patch of 2x2
    default_guidance=1.0,  # none but the embedded one
    default_steps=28,
    networks={
        "transformer": {"FluxTransformer2DModel": "FluxTransformer2DModel"},
        "vae": AUTOENCODERS,
        "text_encoder": "CLIPTextConfig",
        "text_encoder_2": "T5Config",
    },
    fixed={"vae": VAE},
    is_flow=True,
    read_spec=_read_spec,
    load=_load,
)
