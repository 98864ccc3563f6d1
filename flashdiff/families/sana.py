"""Sana: a Gemma 2 behind a written instruction, a transformer with linear attention, latents of 32 pixels, rectified flow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.errors import ModelError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.codec import Decoder, Encoder
from flashdiff.families.loading import (
    explain_bad_settings,
    load_part,
    load_tokenizers,
    read_config,
    scheduler_config,
    spec_of,
    tokenizer_spec,
    torch_model,
)
from flashdiff.schedule import FlowSchedule
from flashdiff.text import PromptTokenizer, TokenizerSpec

_TOKENS = 300  # of them the network sees: the first, and the last of the instruction with the prompt
_INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
        "generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships "
        "to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on "
        "a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a "
        "diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or "
        "evaluations:",
        "User Prompt: ",
    )
)
"""The pipelines' default, which Gemma reads in front of every prompt."""
_MOST_TOKENS = 2048  # while the instruction is counted


class TextEncoder(nn.Module):
    """The last layer's states of the first token and of the prompt, and which of them are the prompt's.

    The padding follows the prompt and attention is causal, so the prompt's states need no mask. The empty prompt is the first
    token alone: the pipeline contrasts with an empty text that has no instruction in front.
    """

    def __init__(self, gemma: Any, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self.gemma, self.pad_id = gemma, tokenizer.specs[0].pad_id
        self.register_buffer("empty", torch.from_numpy(tokenizer([""])["input_ids"]))
        self.empty: Tensor  # [1, T]

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T, D] and mask [B, T], 1 at the prompt's places, of `input_ids` [B, length]; T is what the network reads."""
        states = self.gemma(input_ids, use_cache=False)[0]
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = (places * (input_ids != self.pad_id)).amax(dim=1, keepdim=True)  # a prompt may name the padding token itself
        is_empty = (input_ids == self.empty).all(dim=1, keepdim=True)
        mask = (places <= torch.where(is_empty, 1, ends)).float()
        return _seen(states), _seen(mask)


def _seen(values: Tensor) -> Tensor:
    """What the network sees of values [B, T, ...]."""
    return torch.cat([values[:, :1], values[:, 1 - _TOKENS :]], dim=1)


class _LinearAttention:
    """diffusers' processor with `_linear_attention`."""

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (x.transpose(1, 2).unflatten(1, (attn.heads, -1)).float() for x in (query, key, value))
        mixed = _linear_attention(nn.functional.relu(query), nn.functional.relu(key), value)
        output: Tensor = attn.to_out[0](mixed.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype))
        return output.clip(-65504, 65504) if output.dtype == torch.float16 else output


def _linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, D, N] of the same, in time linear in N.

    The smallest sum of weights is a floor where diffusers adds 1e-15: the ONNX exporter takes that for an addition of 0, and a
    token whose query has no positive value would not be a number.
    """
    value = nn.functional.pad(value, (0, 0, 0, 1), value=1.0)
    mixed = torch.matmul(torch.matmul(value, key.transpose(-1, -2)), query).float()
    return mixed[:, :, :-1] / mixed[:, :, -1:].clamp(min=1e-15)


class _PatchEmbedding(nn.Module):
    """diffusers' with sinusoids of the places, as models for 2K and 4K have it; sizes are tensors, so that a graph serves all.

    The places of every size span the same range.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.proj = embedding.proj
        width = embedding.proj.out_channels // 4  # sines and cosines of columns, then of rows
        frequencies = 10000.0 ** -(torch.arange(width).double() / width)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.span = embedding.base_size / embedding.interpolation_scale

    def forward(self, latents: Tensor) -> Tensor:
        cells = self.proj(latents)
        shape = cells.shape[2:]
        rows, columns = (self._sinusoids(torch.arange(side, device=cells.device).float()) for side in shape)
        places = torch.cat([columns[None].expand(*shape, -1), rows[:, None].expand(*shape, -1)], dim=2)
        embedded: Tensor = cells.flatten(2).transpose(1, 2)
        return (embedded + places.flatten(0, 1)).to(cells.dtype)

    def _sinusoids(self, places: Tensor) -> Tensor:
        """[N, D / 2] of the places 0 to N - 1."""
        angles = torch.outer(places / (places[-1] + 1) * self.span, self.get_buffer("frequencies"))
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class _Denoiser(nn.Module):
    def __init__(self, transformer: Any, schedule: FlowSchedule) -> None:
        super().__init__()
        self.transformer = transformer
        _, sigmas = schedule.levels(list(range(schedule.num_train_timesteps)))
        self.register_buffer("network_times", torch.from_numpy(1000 * sigmas * transformer.config.timestep_scale).float())
        self.network_times: Tensor

    def forward(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        is_own = times.is_floating_point()
        output: Tensor = self.transformer(
            latents,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=times * self.transformer.config.timestep_scale if is_own else self.network_times[times],
            return_dict=False,
        )[0]
        return output


def sana_tokenizer(folder: Path) -> TokenizerSpec:
    """Gemma's, with room for the instruction in front of as many tokens as the network sees."""
    spec = tokenizer_spec(folder, "tokenizer", "input_ids", _MOST_TOKENS, before=_INSTRUCTION, lowercase=True)
    ids = load_tokenizers(folder, (spec,))([""])["input_ids"]
    instruction = int((ids != spec.pad_id).sum())
    return spec.model_copy(update={"length": instruction + _TOKENS - 2})


def load_sana(
    folder: Path,
    spec: ModelSpec,
    *,
    text_encoder: Callable[[Any, PromptTokenizer], nn.Module],
    denoiser: Callable[[Any], nn.Module],
    scale: float = 1.0,
) -> TorchModel:
    """A base of Sana's form; its latents are multiplied by `scale` after the autoencoder's own scaling."""
    import diffusers
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
    from transformers import Gemma2Model

    vae = load_part(folder, "vae", diffusers.AutoencoderDC)
    transformer = load_part(folder, "transformer", diffusers.SanaTransformer2DModel)
    for module in vae.modules():
        if isinstance(module, SanaMultiscaleLinearAttention):
            module.apply_linear_attention = _linear_attention  # type: ignore[method-assign]
    if transformer.config.interpolation_scale is not None:
        transformer.patch_embed = _PatchEmbedding(transformer.patch_embed)
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(_LinearAttention())
    gemma = load_part(folder, "text_encoder", Gemma2Model)
    tokenizer = load_tokenizers(folder, spec.tokenizers)
    return torch_model(
        folder,
        spec,
        text_encoder=text_encoder(gemma, tokenizer),
        denoiser=denoiser(transformer),
        network=transformer,
        weights={"vae": vae, "transformer": transformer, "text_encoder": gemma},
        encoder=Encoder(vae, scale),
        decoder=Decoder(vae, scale),
        tokenizer=tokenizer,
    )


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    transformer = read_config(folder, "transformer")
    side, scale = transformer["sample_size"], transformer.get("interpolation_scale")
    if scale is not None and not scale > 0:
        raise ModelError(f"{folder}/transformer/config.json: 'interpolation_scale' is {scale}; give a number above 0, or null")
    return spec_of(
        folder,
        FAMILY,
        prediction="flow",
        schedule=FlowSchedule.from_scheduler_config(scheduler_config(folder), source=f"{folder}/scheduler", tokens=side**2),
        network_channels=transformer["in_channels"],
        latent_side=side,
        tokenizers=(sana_tokenizer(folder),),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    schedule = spec.sampler.schedule
    assert isinstance(schedule, FlowSchedule)
    return load_sana(folder, spec, text_encoder=TextEncoder, denoiser=lambda transformer: _Denoiser(transformer, schedule))


FAMILY = ModelFamily(
    name="sana",
    pipeline_class="SanaPipeline",
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("conv_inverted", "conv_point", "patch_embed.proj", "proj_out"),
        *("linear", "linear_1", "linear_2"),
    ),
    feature_tap=lambda transformer: transformer.transformer_blocks[len(transformer.transformer_blocks) // 2],
    feature_blocks=lambda transformer: transformer.transformer_blocks,
    lora_prefix="transformer",
    size_step=lambda transformer: int(transformer["patch_size"]),
    default_guidance=4.5,
    default_steps=20,
    networks={
        "transformer": {"SanaTransformer2DModel": "SanaTransformer2DModel"},
        "vae": {"AutoencoderDC": "AutoencoderDC"},
        "text_encoder": "Gemma2Config",
    },
    fixed={"transformer": {"guidance_embeds": (False,)}},
    is_flow=True,
    read_spec=_read_spec,
    load=_load,
)
