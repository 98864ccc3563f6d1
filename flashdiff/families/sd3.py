"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5 or none, a transformer over text and image, rectified flow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.control_transformer import SD3_CONTROLS, spread_evenly
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

_T5_TOKENS = 256


class _TextEncoder(nn.Module):
    """CLIP states side by side, padded to T5's width and followed by T5's; and both CLIPs' projections."""

    def __init__(self, first: Any, second: Any, width: int) -> None:
        super().__init__()
        self.first, self.second, self.width = first, second, width

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """For a base without T5, whose states the stock pipeline replaces by zeros."""
        zeros = torch.zeros(input_ids.shape[0], _T5_TOKENS, self.width, device=input_ids.device)
        return self._joined(input_ids, input_ids_2, zeros)

    def _joined(self, input_ids: Tensor, input_ids_2: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return torch.cat([clip, long.to(clip.dtype)], dim=1), pooled


class _TextEncoderWithT5(_TextEncoder):
    def __init__(self, first: Any, second: Any, width: int, third: Any) -> None:
        super().__init__(first, second, width)
        self.third = third

    def forward(self, input_ids: Tensor, input_ids_2: Tensor, input_ids_3: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._joined(input_ids, input_ids_2, self.third(input_ids_3)[0])


class _Denoiser(nn.Module):
    def __init__(self, transformer: Any, schedule: FlowSchedule) -> None:
        super().__init__()
        self.transformer = transformer
        _, sigmas = schedule.levels(list(range(schedule.num_train_timesteps)))
        self.register_buffer("network_times", torch.from_numpy(1000 * sigmas).float())
        self.network_times: Tensor

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        residuals: Mapping[str, list[Tensor]] | None = None,
    ) -> Tensor:
        """`residuals`: of control networks."""
        output: Tensor = self.transformer(
            hidden_states=latents,
            timestep=self._times(times),
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
            **(residuals or {}),
        )[0]
        return output

    def adopt(self, network: Any) -> None:
        """A control network is used as it is."""

    def residuals_of(
        self, network: Any, latents: Tensor, times: Tensor, conditions: Sequence[Tensor], image: Tensor, scale: Tensor
    ) -> dict[str, list[Tensor]]:
        """What a control network adds behind each block, for the latents of an image."""
        texts, pooled = conditions
        made = network(
            # SD3.5's own have no places of their own: they take the base's.
            hidden_states=latents if network.config.use_pos_embed else self.transformer.pos_embed(latents),
            timestep=self._times(times),
            encoder_hidden_states=None if network.context_embedder is None else texts,
            pooled_projections=torch.zeros_like(pooled) if network.config.force_zeros_for_pooled_projection else pooled,
            controlnet_cond=image,
            conditioning_scale=scale[:, None, None],
            return_dict=False,
        )[0]
        return {"block_controlnet_hidden_states": spread_evenly(made, len(self.transformer.transformer_blocks))}

    def _times(self, times: Tensor) -> Tensor:
        return times if times.is_floating_point() else self.network_times[times]


def _has_t5(folder: Path) -> bool:
    """Whether model_index.json names a third text encoder; `[null, null]` says that there is none."""
    return any(read_config(folder, ".", "model_index.json").get("text_encoder_3") or ())


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    transformer = read_config(folder, "transformer")
    side = transformer["sample_size"]
    tokens = (side // transformer["patch_size"]) ** 2
    return spec_of(
        folder,
        FAMILY,
        prediction="flow",
        schedule=FlowSchedule.from_scheduler_config(scheduler_config(folder), source=f"{folder}/scheduler", tokens=tokens),
        network_channels=transformer["in_channels"],
        latent_side=side,
        sampling={"spacing": "linspace"},
        tokenizers=(
            tokenizer_spec(folder, "tokenizer", "input_ids"),
            tokenizer_spec(folder, "tokenizer_2", "input_ids_2"),
            *([tokenizer_spec(folder, "tokenizer_3", "input_ids_3", _T5_TOKENS)] if _has_t5(folder) else []),
        ),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    vae = load_vae(folder)
    transformer = load_part(folder, "transformer", diffusers.SD3Transformer2DModel)
    first, second = (load_part(folder, part, CLIPTextModelWithProjection) for part in ("text_encoder", "text_encoder_2"))
    weights = {"vae": vae, "transformer": transformer, "text_encoder": first, "text_encoder_2": second}
    width = transformer.config.joint_attention_dim
    if _has_t5(folder):
        weights["text_encoder_3"] = load_part(folder, "text_encoder_3", T5EncoderModel)
        text_encoder: _TextEncoder = _TextEncoderWithT5(first, second, width, weights["text_encoder_3"])
    else:
        text_encoder = _TextEncoder(first, second, width)
    assert isinstance(spec.sampler.schedule, FlowSchedule)
    return torch_model(
        folder,
        spec,
        text_encoder=text_encoder,
        denoiser=_Denoiser(transformer, spec.sampler.schedule),
        network=transformer,
        weights=weights,
    )


FAMILY = ModelFamily(
    name="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    conditioning=("encoder_hidden_states", "pooled_projections"),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("net.0.proj", "net.2"),
    ),
    feature_tap=lambda transformer: transformer.transformer_blocks[len(transformer.transformer_blocks) // 2],
    feature_blocks=lambda transformer: transformer.transformer_blocks,
    lora_prefix="transformer",
    controls=SD3_CONTROLS,
    size_step=lambda transformer: int(transformer["patch_size"]),
    largest_side=lambda transformer: int(transformer["pos_embed_max_size"] * transformer["patch_size"]),
    default_guidance=7.0,
    small_vae="madebyollin/taesd3",
    default_steps=28,
    networks={
        "transformer": {"SD3Transformer2DModel": "SD3Transformer2DModel"},
        "vae": AUTOENCODERS,
        "text_encoder": "CLIPTextConfig",
        "text_encoder_2": "CLIPTextConfig",
        "text_encoder_3": "T5Config",
    },
    optional=("text_encoder_3",),
    fixed={"vae": VAE},
    is_flow=True,
    read_spec=_read_spec,
    load=_load,
)
