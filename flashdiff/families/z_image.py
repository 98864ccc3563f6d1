"""Z-Image and Z-Image-Turbo: a Qwen3 behind its chat template, a transformer over image and text as one, rectified flow."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from flashdiff.components import MAX_SIDE, ModelSpec
from flashdiff.families.base import ModelFamily, TorchModel
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

_TOKENS = 512  # a multiple of _BLOCK
_PIXELS = 1024  # the pipeline's own size, where the autoencoder names none
_BEFORE, _AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # one turn in the chat template
_BLOCK = 32  # image and text are each padded to a multiple, with tokens that attention sees
_PATCH = "2-1"  # the network's layers for patches of 2x2 in one frame


class _TextEncoder(nn.Module):
    """The last-but-one layer's states, and which of them are the prompt's.

    The padding follows the prompt and attention is causal, so the prompt's states need no mask.
    """

    def __init__(self, qwen: Any, pad_id: int) -> None:
        super().__init__()
        self.qwen, self.pad_id = qwen, pad_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.qwen(input_ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = (places * (input_ids != self.pad_id)).amax(dim=1, keepdim=True)  # a prompt may name the padding token itself
        return states, (places <= ends).float()


class _Attention:
    """diffusers' processor with real numbers for its complex ones, which engines lack."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, freqs_cis: Tensor | None = None, **_: Any
    ) -> Tensor:
        query, key, value = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        assert freqs_cis is not None
        query, key = (
            _rotated(x if norm is None else norm(x), freqs_cis) for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        output: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(query.dtype))
        return output


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """[B, S, heads, D], whose pairs are complex numbers, times unit numbers [B, S, D / 2, 2]; in float32."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns[:, :, None].unbind(-1)
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(3).type_as(x)


class _Transformer(ZImageTransformer2DModel):
    """diffusers' network on tensors: its own takes lists of prompts, each cut to its length, which an exported graph cannot."""

    features: nn.Module
    """Passes the image's tokens on, half-way through the layers."""

    def forward(self: Any, latents: Tensor, t: Tensor, text: Tensor, is_prompt: Tensor, tables: list[Tensor]) -> Tensor:
        """[B, C, h, w] of latents [B, C, h, w], 1 - sigma [B], states [B, T, D], which are the prompt's [B, T], and rotations
        [positions, D_i / 2, 2] along each axis."""
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        # By comparison, because the division of whole numbers does not always round down in OpenVINO.
        blocks = torch.arange(0, text.shape[1], _BLOCK, device=text.device).repeat_interleave(_BLOCK)
        is_text = blocks < is_prompt.sum(dim=1, keepdim=True)  # the prompt with its padding
        rotations = _Rotations(tables)
        text_turns = rotations.of_text(text.shape[1]).expand(batch, -1, -1, -1)
        padding = -rows * columns % _BLOCK
        image_turns = rotations.of_image(is_text.sum(dim=1) + 1, rows, columns, padding)
        adaln = self.t_embedder(t * self.t_scale).type_as(latents)

        patches = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
        image = self.all_x_embedder[_PATCH](patches.reshape(batch, rows * columns, 4 * channels))
        image = torch.cat([image, self.x_pad_token.to(image.dtype).expand(batch, padding, -1)], dim=1)
        for layer in self.noise_refiner:
            image = self._run(layer, image, None, image_turns, adaln)
        text = self.cap_embedder(text)
        text = torch.where(is_prompt[..., None], text, self.cap_pad_token.to(text.dtype))
        for layer in self.context_refiner:
            text = self._run(layer, text, is_text, text_turns)
        tokens, turns = torch.cat([image, text], dim=1), torch.cat([image_turns, text_turns], dim=1)
        is_seen = torch.cat([torch.ones_like(is_text[:, :1]).expand(-1, image.shape[1]), is_text], dim=1)
        for index, layer in enumerate(self.layers):
            tokens = self._run(layer, tokens, is_seen, turns, adaln)
            if index == len(self.layers) // 2:
                tokens = torch.cat([self.features(tokens[:, : rows * columns]), tokens[:, rows * columns :]], dim=1)
        output = self.all_final_layer[_PATCH](tokens[:, : rows * columns], c=adaln)
        unpacked: Tensor = output.reshape(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        return unpacked.reshape(batch, channels, height, width)

    def _run(self: Any, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        keeps_little = torch.is_grad_enabled() and self.gradient_checkpointing
        output: Tensor = self._gradient_checkpointing_func(layer, *inputs) if keeps_little else layer(*inputs)
        return output


class _Rotations:
    """Unit numbers [B, S, D / 2, 2] for positions along three axes: the place in the text, the row and the column."""

    def __init__(self, tables: list[Tensor]) -> None:
        self._tables = tables

    def of_text(self, length: int) -> Tensor:
        """[1, length, ...]: from 1 on, in row and column 0."""
        places, row, column = self._tables
        zeros = [table[:1].expand(length, -1, -1) for table in (row, column)]
        return torch.cat([places[1 : length + 1], *zeros], dim=1)[None]

    def of_image(self, starts: Tensor, rows: int, columns: int, padding: int) -> Tensor:
        """At the places `starts` [B], after the text; the padding is at 0 of every axis."""
        places, row, column = self._tables
        batch = starts.shape[0]  # not len(), which would export the example's batch as a number
        image = [places[starts][:, None, None], row[None, :rows, None], column[None, None, :columns]]
        joined = torch.cat([values.expand(batch, rows, columns, -1, -1) for values in image], dim=3).flatten(1, 2)
        rest = torch.cat([table[:1] for table in self._tables], dim=1)
        return torch.cat([joined, rest.expand(batch, padding, -1, -1)], dim=1)


class _Denoiser(nn.Module):
    def __init__(self, transformer: Any, schedule: FlowSchedule) -> None:
        super().__init__()
        self.transformer = transformer
        _, sigmas = schedule.levels(list(range(schedule.num_train_timesteps)))
        self.register_buffer("sigmas", torch.from_numpy(sigmas).float())
        self.sigmas: Tensor
        embedder = transformer.rope_embedder
        lengths = [min(length, MAX_SIDE // 2) for length in embedder.axes_lens]
        tables = embedder.precompute_freqs_cis(embedder.axes_dims, lengths, embedder.theta)
        for axis, table in enumerate(tables):
            self.register_buffer(f"rotations_{axis}", torch.view_as_real(table))

    def forward(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        sigmas = times / 1000 if times.is_floating_point() else self.sigmas[times]
        tables = [self.get_buffer(f"rotations_{axis}") for axis in range(3)]
        output: Tensor = self.transformer(latents, 1 - sigmas, encoder_hidden_states, encoder_attention_mask > 0.5, tables)
        return -output


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    side = vae.get("sample_size", _PIXELS) // latent_factor(vae)
    return spec_of(
        folder,
        FAMILY,
        prediction="flow",
        schedule=FlowSchedule.from_scheduler_config(
            scheduler_config(folder), source=f"{folder}/scheduler", tokens=(side // 2) ** 2
        ),
        network_channels=transformer["in_channels"],
        latent_side=side,
        tokenizers=(tokenizer_spec(folder, "tokenizer", "input_ids", _TOKENS, before=_BEFORE, after=_AFTER),),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    from transformers import Qwen3Model

    vae = load_vae(folder)
    transformer = load_part(folder, "transformer", _Transformer)
    transformer.features = nn.Identity()
    for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
        block.attention.set_processor(_Attention())
    qwen = load_part(folder, "text_encoder", Qwen3Model)
    assert isinstance(spec.sampler.schedule, FlowSchedule)
    return torch_model(
        folder,
        spec,
        text_encoder=_TextEncoder(qwen, spec.tokenizers[0].pad_id),
        denoiser=_Denoiser(transformer, spec.sampler.schedule),
        network=transformer,
        weights={"vae": vae, "transformer": transformer, "text_encoder": qwen},
    )


FAMILY = ModelFamily(
    name="z-image",
    pipeline_class="ZImagePipeline",
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "cap_embedder.1"),
    feature_tap=lambda transformer: transformer.features,
    lora_prefix="transformer",
    fixed_size=True,  # the number of padding tokens follows the size
    size_step=lambda _: 2,  # a token is a patch of 2x2
    largest_side=lambda transformer: 2 * min(transformer["axes_lens"][1:]),
    stock_call=lambda guidance: {"guidance_scale": guidance - 1},  # it counts from 0
    default_guidance=6.0,  # the stock pipeline counts it from 0: its 5
    small_vae="madebyollin/taef1",
    default_steps=50,
    networks={
        "transformer": {"ZImageTransformer2DModel": "ZImageTransformer2DModel"},
        "vae": AUTOENCODERS,
        "text_encoder": "Qwen3Config",
    },
    fixed={"vae": VAE, "transformer": {"siglip_feat_dim": (None,)}},
    is_flow=True,
    read_spec=_read_spec,
    load=_load,
)
