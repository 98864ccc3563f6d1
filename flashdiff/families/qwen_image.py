"""Qwen-Image: a Qwen2.5-VL behind its chat template, a transformer over text and image, a video autoencoder, rectified flow."""

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
from flashdiff.schedule import FlowSchedule

_BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_DROPPED = 34  # tokens of `_BEFORE`, which the network does not see
_TOKENS = 512  # that it sees


class _TextEncoder(nn.Module):
    """The last layer's states behind the system's turn, and which of them are the prompt's.

    The padding follows the prompt and attention is causal, so the prompt's states need no mask.
    """

    def __init__(self, qwen: Any, pad_id: int) -> None:
        super().__init__()
        self.qwen, self.pad_id = qwen, pad_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.qwen.model.language_model(input_ids, use_cache=False).last_hidden_state
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        ends = (places * (input_ids != self.pad_id)).amax(dim=1, keepdim=True)  # a prompt may name the padding token itself
        return states[:, _DROPPED:], (places <= ends).float()[:, _DROPPED:]


class _Attention:
    """diffusers' processor with real numbers for its complex ones, which engines lack."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        image_turns, text_turns = image_rotary_emb
        text = _projected(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.heads)
        image = _projected(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.heads)
        query = torch.cat([_rotated(attn.norm_added_q(text[0]), text_turns), _rotated(attn.norm_q(image[0]), image_turns)], dim=1)
        key = torch.cat([_rotated(attn.norm_added_k(text[1]), text_turns), _rotated(attn.norm_k(image[1]), image_turns)], dim=1)
        value = torch.cat([text[2], image[2]], dim=1)
        is_seen = torch.cat([encoder_hidden_states_mask, torch.ones_like(image[0][..., 0, 0], dtype=torch.bool)], dim=1)
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=is_seen[:, None, None]
        )
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])


def _projected(x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module, heads: int) -> list[Tensor]:
    return [layer(x).unflatten(-1, (heads, -1)) for layer in (to_q, to_k, to_v)]


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """[B, S, heads, D], whose pairs are complex numbers, times unit numbers [S, D / 2, 2]; in float32."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns[:, None].unbind(-1)
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(3).type_as(x)


class _Rotations(nn.Module):
    """Unit numbers [S, D / 2, 2] for the frame, row and column of tokens, rows and columns counted from the image's middle.

    The text follows on the diagonal. Sizes are counted by tensors, so that a graph serves all.
    """

    def __init__(self, widths: tuple[int, ...], theta: float) -> None:
        super().__init__()
        for axis, width in enumerate(widths):
            powers = torch.arange(0, width, 2).float().div(width)
            self.register_buffer(f"frequencies_{axis}", 1.0 / torch.pow(theta, powers), persistent=False)

    def forward(
        self, img_shapes: list[list[tuple[int, int, int]]], max_txt_seq_len: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        (_, height, width) = img_shapes[0][0]
        rows, columns = (torch.arange(side, device=device).float() for side in (height, width))
        halves = [torch.floor((places[-1] + 1) / 2) for places in (rows, columns)]
        rows, columns = (places - (places[-1] + 1 - half) for places, half in zip((rows, columns), halves, strict=True))
        shape = (height, width)
        image = [
            self._turns(0, torch.zeros(1, device=device))[:, None].expand(*shape, -1, -1),
            self._turns(1, rows)[:, None].expand(*shape, -1, -1),
            self._turns(2, columns)[None].expand(*shape, -1, -1),
        ]
        diagonal = torch.maximum(*halves) + torch.arange(max_txt_seq_len, device=device).float()
        text = [self._turns(axis, diagonal) for axis in range(3)]
        return torch.cat(image, dim=2).flatten(0, 1), torch.cat(text, dim=1)

    def _turns(self, axis: int, places: Tensor) -> Tensor:
        """[S, D_i / 2, 2] of places [S] along an axis."""
        angles = torch.outer(places, self.get_buffer(f"frequencies_{axis}"))
        return torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1)


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
        transformer.time_text_embed.register_forward_pre_hook(lambda _, given: (*self._exact, *given[len(self._exact) :]))

    def forward(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        tokens = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        sigmas = times / 1000 if times.is_floating_point() else self.sigmas[times]
        self._exact = (sigmas,)
        output = self.transformer(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=sigmas,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_mask=encoder_attention_mask > 0.5,
            img_shapes=[[(1, rows, columns)]],  # times the batch, it would fix the batch of an exported graph
            return_dict=False,
        )[0]
        self._exact = ()
        unpacked: Tensor = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(batch, channels, height, width)


class _Statistics(nn.Module):
    """Mean and deviation [1, C, 1, 1] of latents, channel by channel."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(vae.config, f"latents_{name}"))
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """In the precision of the latents."""
        return self.get_buffer("mean").to(latents.dtype), self.get_buffer("std").to(latents.dtype)


class _Encoder(Encoder):
    """A video autoencoder's, for one frame."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.statistics = _Statistics(vae)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        encoded = DiagonalGaussianDistribution(self.vae.quant_conv(self.vae.encoder(images[:, :, None])))
        latents = encoded.mode() if generator is None else encoded.sample(generator)
        latents = latents[:, :, 0]
        mean, std = self.statistics(latents)
        scaled: Tensor = (latents - mean) / std
        return scaled


class _Decoder(Decoder):
    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.statistics = _Statistics(vae)

    def forward(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics(latents)
        images: Tensor = self.vae.decoder(self.vae.post_quant_conv((latents * std + mean)[:, :, None]))[:, :, 0]
        return images


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    side = vae.get("sample_size", 1024) // latent_factor(vae)
    return spec_of(
        folder,
        FAMILY,
        prediction="flow",
        schedule=FlowSchedule.from_scheduler_config(
            scheduler_config(folder), source=f"{folder}/scheduler", tokens=(side // 2) ** 2, may_stretch=True
        ),
        network_channels=transformer["in_channels"] // 4,  # a token is a patch of 2x2
        latent_side=side,
        sampling={"keeps_norm": True},
        tokenizers=(tokenizer_spec(folder, "tokenizer", "input_ids", _DROPPED + _TOKENS, before=_BEFORE, after=_AFTER),),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import Qwen2_5_VLForConditionalGeneration

    vae = load_part(folder, "vae", diffusers.AutoencoderKLQwenImage)
    for module in vae.modules():
        if isinstance(module, nn.Upsample):
            module.mode = "nearest"  # the same as its nearest-exact for a factor of 2, and engines have it
    transformer = load_part(folder, "transformer", diffusers.QwenImageTransformer2DModel)
    transformer.pos_embed = _Rotations(tuple(transformer.config.axes_dims_rope), transformer.pos_embed.theta)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(_Attention())
    qwen = load_part(folder, "text_encoder", Qwen2_5_VLForConditionalGeneration)
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
    name="qwen-image",
    pipeline_class="QwenImagePipeline",
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("net.0.proj", "net.2"),
    ),
    feature_tap=lambda transformer: transformer.transformer_blocks[len(transformer.transformer_blocks) // 2],
    feature_blocks=lambda transformer: transformer.transformer_blocks,
    lora_prefix="transformer",
    size_step=lambda _: 2,  # a token is a patch of 2x2
    stock_call=lambda guidance: {"true_cfg_scale": guidance, "negative_prompt": ""},
    default_guidance=4.0,
    default_steps=50,
    networks={
        "transformer": {"QwenImageTransformer2DModel": "QwenImageTransformer2DModel"},
        "vae": {"AutoencoderKLQwenImage": "AutoencoderKLQwenImage"},
        "text_encoder": "Qwen2_5_VLConfig",
    },
    # Other values are those of models for edits and layers.
    fixed={
        "transformer": {
            "patch_size": (2,),
            "guidance_embeds": (False,),
            "zero_cond_t": (False,),
            "use_additional_t_cond": (False,),
            "use_layer3d_rope": (False,),
        },
        "vae": {"input_channels": (3,)},
    },
    is_flow=True,
    read_spec=_read_spec,
    load=_load,
)
