"""FLUX.2-klein: a Qwen3 read in three layers, a transformer over packed latents that a batch norm scales, rectified flow."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.codec import Decoder, Encoder, latent_factor
from flashdiff.families.loading import (
    explain_bad_settings,
    load_part,
    read_config,
    scheduler_config,
    spec_of,
    tokenizer_spec,
    torch_model,
)
from flashdiff.schedule import FlowSchedule, ShiftBySizeAndSteps

_TOKENS = 512
_BEFORE = "<|im_start|>user\n"  # one turn in the chat template, and an answer without a thought
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_LAYERS = (9, 18, 27)
_MOST_SINGLE_BLOCKS = 48  # FLUX.2-dev's; klein has 20 and 24


class _TextEncoder(nn.Module):
    """Three layers' states side by side. The network sees the padding's states too, which follow from the prompt's alone."""

    def __init__(self, qwen: Any, pad_id: int) -> None:
        super().__init__()
        self.qwen, self.pad_id = qwen, pad_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = (places * (input_ids != self.pad_id)).amax(dim=1, keepdim=True)  # a prompt may name the padding token itself
        states = self.qwen.model(
            input_ids, attention_mask=(places <= ends).long(), output_hidden_states=True, use_cache=False
        ).hidden_states
        return (torch.cat([states[layer] for layer in _LAYERS], dim=2),)


class _Denoiser(nn.Module):
    """Latents [B, C, h, w] go in and out as they are; inside, each 2x2 patch is one token of 4 C values."""

    def __init__(self, transformer: Any, schedule: FlowSchedule) -> None:
        super().__init__()
        self.transformer = transformer
        _, sigmas = schedule.levels(list(range(schedule.num_train_timesteps)))
        self.register_buffer("sigmas", torch.from_numpy(sigmas).float())
        self.sigmas: Tensor
        # The network rounds times to its own precision before it embeds them: in bfloat16 333 would be 334.
        self._exact: tuple[Tensor, ...] = ()
        transformer.time_guidance_embed.time_proj.register_forward_pre_hook(
            lambda _, given: (*self._exact, *given[len(self._exact) :])
        )

    def forward(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        tokens = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        image_ids = torch.zeros(rows, columns, 4, device=latents.device)
        image_ids[..., 1] += torch.arange(rows, device=latents.device)[:, None]
        image_ids[..., 2] += torch.arange(columns, device=latents.device)[None, :]
        length = encoder_hidden_states.shape[1]
        text_ids = torch.zeros(length, 4, device=latents.device)
        text_ids[:, 3] += torch.arange(length, device=latents.device)
        sigmas = times / 1000 if times.is_floating_point() else self.sigmas[times]
        self._exact = (1000 * sigmas,)
        output = self.transformer(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=sigmas,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=image_ids.reshape(rows * columns, 4),
            return_dict=False,
        )[0]
        self._exact = ()
        unpacked: Tensor = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(batch, channels, height, width)


class _Encoder(Encoder):
    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        encoded = self.vae.encode(images).latent_dist
        latents = _patched(encoded.mode() if generator is None else encoded.sample(generator))
        mean, deviation = _statistics(self.vae, latents.dtype)
        return _joined((latents - mean) / deviation)


class _Decoder(Decoder):
    def forward(self, latents: Tensor) -> Tensor:
        mean, deviation = _statistics(self.vae, latents.dtype)
        images: Tensor = self.vae.decode(_joined(_patched(latents) * deviation + mean), return_dict=False)[0]
        return images


def _statistics(vae: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, C, 1, 2, 1, 2] of latents in patches: an autoencoder's running statistics."""
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    mean, deviation = (values.view(1, -1, 1, 2, 1, 2).to(dtype) for values in (vae.bn.running_mean, deviation))
    return mean, deviation


def _patched(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as [B, C, h / 2, 2, w / 2, 2]."""
    batch, channels, height, width = latents.shape
    return latents.reshape(batch, channels, height // 2, 2, width // 2, 2)


def _joined(patches: Tensor) -> Tensor:
    """The inverse of `_patched`."""
    latents: Tensor = patches.flatten(4, 5).flatten(2, 3)
    return latents


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    side = vae["sample_size"] // latent_factor(vae)
    schedule = FlowSchedule.from_scheduler_config(scheduler_config(folder), source=f"{folder}/scheduler", tokens=(side // 2) ** 2)
    sampling: dict[str, Any] = {}
    if read_config(folder, ".", "model_index.json").get("is_distilled"):
        sampling = {"kind": "flow-euler", "guidance": 1.0, "default_steps": 4}
    by_size = ShiftBySizeAndSteps(measured="flux2", usual_steps=sampling.get("default_steps", FAMILY.default_steps))
    return spec_of(
        folder,
        FAMILY,
        prediction="flow",
        # The pipeline's own, in the place of the scheduler's lines.
        schedule=schedule.model_copy(update={"by_size": by_size, "shift": by_size.at((side // 2) ** 2)}),
        network_channels=transformer["in_channels"] // 4,  # a token is a patch of 2x2
        latent_side=side,
        sampling=sampling,
        tokenizers=(tokenizer_spec(folder, "tokenizer", "input_ids", _TOKENS, before=_BEFORE, after=_AFTER),),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import Qwen3ForCausalLM

    vae = load_part(folder, "vae", diffusers.AutoencoderKLFlux2)
    transformer = load_part(folder, "transformer", diffusers.Flux2Transformer2DModel)
    qwen = load_part(folder, "text_encoder", Qwen3ForCausalLM)
    assert isinstance(spec.sampler.schedule, FlowSchedule)
    return torch_model(
        folder,
        spec,
        text_encoder=_TextEncoder(qwen, spec.tokenizers[0].pad_id),
        denoiser=_Denoiser(transformer, spec.sampler.schedule),
        network=transformer,
        weights={"vae": vae, "transformer": transformer, "text_encoder": qwen},
        encoder=_Encoder(vae),
        decoder=_Decoder(vae),
    )


FAMILY = ModelFamily(
    name="flux2-klein",
    pipeline_class="Flux2KleinPipeline",
    conditioning=("encoder_hidden_states",),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("linear_in", "linear_out", "to_qkv_mlp_proj"),
        # Blocks of both streams have a list of that name.
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(_MOST_SINGLE_BLOCKS)),
    ),
    feature_tap=lambda transformer: transformer.transformer_blocks[len(transformer.transformer_blocks) // 2],
    feature_blocks=lambda transformer: transformer.transformer_blocks,
    lora_prefix="transformer",
    size_step=lambda _: 2,  # a token is a patch of 2x2
    default_guidance=4.0,
    default_steps=50,
    part_weights={
        "text_encoder": ("text_encoder", ("",)),
        "encoder": ("vae", ("encoder.", "quant_conv.", "bn.")),
        "decoder": ("vae", ("decoder.", "post_quant_conv.", "bn.")),
    },
    networks={
        "transformer": {"Flux2Transformer2DModel": "Flux2Transformer2DModel"},
        "vae": {"AutoencoderKLFlux2": "AutoencoderKLFlux2"},
        "text_encoder": "Qwen3Config",
    },
    fixed={"transformer": {"guidance_embeds": (False,), "patch_size": (1,)}, "vae": {"patch_size": ([2, 2],)}},
    is_flow=True,
    read_spec=_read_spec,
    load=_load,
)
