"""FLUX: a pooled CLIP vector and a T5, a transformer over packed latents, rectified flow; dev takes guidance as an input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import GUIDANCE, ModelFamily, TorchModel
from flashdiff.families.codec import latent_factor
from flashdiff.families.control_transformer import FLUX_CONTROLS, spread_in_runs
from flashdiff.families.entrance import flux_entrances
from flashdiff.families.loading import (
    explain_bad_settings,
    load_part,
    load_vae,
    pipeline_class_of,
    read_config,
    scheduler_config,
    spec_of,
    tokenizer_spec,
    torch_model,
)
from flashdiff.families.readers import FLUX_READER, Reading
from flashdiff.families.settings import AUTOENCODERS, VAE
from flashdiff.schedule import FlowSchedule

_T5_TOKENS = 512
_PIXELS = 1024  # the pipeline's own size, where the autoencoder names none


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What differs between the pipelines of the family."""

    denoiser: "type[_Denoiser]"
    guidance: float = 3.5
    """The embedded scale, where the pipeline's call names none."""
    steps: int = 28


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
        self._exact: tuple[Tensor, ...] = ()
        self.adopt(transformer)

    def adopt(self, network: Any) -> None:
        """Let `run` give a network the times and the guidance unrounded.

        It rounds them to its own precision before it embeds them: in bfloat16 333 would be 334.
        """
        network.time_text_embed.register_forward_pre_hook(lambda _, given: (*self._exact, *given[len(self._exact) :]))

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor,
        residuals: Mapping[str, Any] | None = None,
        reference: Reading | None = None,
    ) -> Tensor:
        """`residuals`: of control networks; `reference`: what an IP-Adapter made of one."""
        texts = encoder_hidden_states, pooled_projections, guidance
        others = {**(residuals or {}), "joint_attention_kwargs": {"ip_hidden_states": reference}}
        (output,) = self.run(self.transformer, packed(latents), image_ids(latents), times, *texts, **others)
        return unpacked(output, latents)

    def residuals_of(
        self, network: Any, latents: Tensor, times: Tensor, conditions: Sequence[Tensor], image: Tensor, scale: Tensor
    ) -> dict[str, list[Tensor]]:
        """What a control network adds behind each block, for the latents of an image."""
        given = {"controlnet_cond": packed(image), "conditioning_scale": scale[:, None, None]}
        double, single = self.run(network, packed(latents), image_ids(latents), times, *conditions, **given)
        blocks = {
            "controlnet_block_samples": (double, len(self.transformer.transformer_blocks)),
            "controlnet_single_block_samples": (single, len(self.transformer.single_transformer_blocks)),
        }
        return {place: spread_in_runs(made, count) for place, (made, count) in blocks.items() if made and count}

    def run(
        self,
        network: Any,
        tokens: Tensor,
        ids: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor,
        **others: Any,
    ) -> Any:
        """What a network that was adopted gives for tokens [B, S, ...] at the places `ids` [S, 3]."""
        is_guided = network.config.guidance_embeds
        sigmas = times / 1000 if times.is_floating_point() else self.sigmas[times]
        self._exact = tuple(1000 * values for values in (sigmas, *([guidance] if is_guided else [])))
        outputs = network(
            hidden_states=tokens,
            timestep=sigmas,
            guidance=guidance if is_guided else None,
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, dtype=tokens.dtype, device=tokens.device),
            img_ids=ids,
            return_dict=False,
            **others,
        )
        self._exact = ()
        return outputs


class _Fill(_Denoiser):
    """FLUX Fill: the rest of an image and a mask are joined to the channels of every token."""

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor,
        masked_image: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """`masked_image`: latents [B, C, h, w] of the image without what the mask covers; `mask`: [B, pixels of a cell, h, w]."""
        texts = encoder_hidden_states, pooled_projections, guidance
        tokens = packed(torch.cat([latents, masked_image, mask], dim=1))
        (output,) = self.run(self.transformer, tokens, image_ids(latents), times, *texts)
        return unpacked(output, latents)


class _Kontext(_Denoiser):
    """FLUX Kontext: the tokens of the image to edit follow those of the new one; a row without one does not attend to them."""

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor,
        image: Tensor,
        is_given: Tensor,
        reference: Reading | None = None,
    ) -> Tensor:
        """`image`: latents [B, C, h, w] of the one to edit; `is_given` [B]: 1 for a row that has one, 0 for one without;
        `reference`: what an IP-Adapter made of one."""
        own, edited = packed(latents), packed(image)
        ids = torch.cat([image_ids(latents), image_ids(latents, source=1)])
        texts = encoder_hidden_states, pooled_projections, guidance
        always = torch.ones_like(torch.cat([encoder_hidden_states[..., 0], own[..., 0]], dim=1), dtype=torch.bool)
        seen = torch.cat([always, (is_given > 0.5)[:, None].expand(-1, edited.shape[1])], dim=1)
        attention = {"attention_mask": seen[:, None, None], "ip_hidden_states": reference}
        tokens = torch.cat([own, edited], dim=1)
        (output,) = self.run(self.transformer, tokens, ids, times, *texts, joint_attention_kwargs=attention)
        return unpacked(output[:, : own.shape[1]], latents)


def packed(latents: Tensor) -> Tensor:
    """[B, C, h, w] as tokens [B, h w / 4, 4 C], one for each patch of 2x2 cells."""
    batch, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, rows * columns, 4 * channels)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `packed`, for latents of the shape of `like`."""
    batch, channels, height, width = like.shape
    latents = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, channels, height, width)


def image_ids(latents: Tensor, source: int = 0) -> Tensor:
    """Places [S, 3] of the tokens of latents [B, C, h, w]: which image they are of (0: the one that is made), row and column."""
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    ids = torch.zeros(rows, columns, 3, dtype=latents.dtype, device=latents.device)
    if source:
        ids[..., 0] += source
    ids[..., 1] += torch.arange(rows, device=latents.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=latents.device)[None, :]
    return ids.reshape(rows * columns, 3)


_KINDS = {
    "FluxPipeline": _Kind(denoiser=_Denoiser),
    "FluxFillPipeline": _Kind(denoiser=_Fill, guidance=30.0, steps=50),
    "FluxKontextPipeline": _Kind(denoiser=_Kontext),
}


def _kind_of(folder: Path) -> _Kind:
    return _KINDS[pipeline_class_of(folder)]


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    kind = _kind_of(folder)
    if transformer.get("guidance_embeds"):
        sampling: dict[str, Any] = {"embedded_guidance": kind.guidance, "default_steps": kind.steps}
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
        entrances=flux_entrances(pipeline_class_of(folder), vae["latent_channels"], latent_factor(vae)),
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
    kind, guidance = _kind_of(folder), spec.sampler.embedded_guidance
    return torch_model(
        folder,
        spec,
        text_encoder=_TextEncoder(clip, t5, kind.guidance if guidance is None else guidance),
        denoiser=kind.denoiser(transformer, spec.sampler.schedule),
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
    controls=FLUX_CONTROLS,
    references=FLUX_READER,
    float32_inputs=(GUIDANCE,),
    size_step=lambda _: 2,  # a token is a patch of 2x2
    default_guidance=1.0,  # none but the embedded one
    small_vae="madebyollin/taef1",
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
