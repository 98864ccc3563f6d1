"""Checkpoints of SD3 and FLUX in one file, in the naming of their original code, made of diffusers directories."""

import json
from collections.abc import Collection
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdiff.lora_original_names import FUSED, original_names

_VAE = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "down_blocks": "down",
    **{f"up_blocks.{level}": f"up.{2 - level}" for level in range(3)},
}
_TEXT = {
    "StableDiffusion3Pipeline": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "FluxPipeline": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
}


def original_vae(base: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a tiny AutoencoderKL, whose three levels `_VAE` has."""
    tensors = {}
    for name, values in load_file(base / "vae" / "diffusion_pytorch_model.safetensors").items():
        old = name
        for now, then in _VAE.items():
            old = old.replace(now, then)
        tensors[prefix + old] = values[:, :, None, None] if ".attn_1." in old and values.ndim == 2 else values
    return tensors


def original_transformer(base: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a transformer of SD3 or FLUX."""
    index = json.loads((base / "model_index.json").read_text())
    model = getattr(diffusers, index["transformer"][1]).from_pretrained(base / "transformer")
    weights = model.state_dict()
    left = {*weights}
    tensors = {}
    is_flux = index["_class_name"] == "FluxPipeline"
    for original, modules in original_names(model, {name.rpartition(".")[0] for name in weights}):
        for ending in ("weight", "bias"):
            names = [f"{module}.{ending}" for module in modules.split(FUSED)]
            if names[0] in left:  # XLabs' names are second ones of the same layers
                left -= {*names}
                is_scale = is_flux and original.endswith("_norm")
                tensors[f"{original}.{'scale' if is_scale else ending}"] = torch.cat([weights[name] for name in names])
    last = len(model.transformer_blocks) - 1
    # The original code has shift before scale there, diffusers scale before shift.
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    if not is_flux:
        swapped[f"transformer_blocks.{last}.norm1_context.linear"] = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
        tensors["pos_embed"] = weights["pos_embed.pos_embed"]
        tensors |= {f"context_embedder.{ending}": weights[f"context_embedder.{ending}"] for ending in ("weight", "bias")}
        left -= {"pos_embed.pos_embed", "context_embedder.weight", "context_embedder.bias"}
    for module, original in swapped.items():
        for ending in ("weight", "bias"):
            scale, shift = weights[f"{module}.{ending}"].chunk(2)
            tensors[f"{original}.{ending}"] = torch.cat([shift, scale])
            left.remove(f"{module}.{ending}")
    assert not left, left
    return {prefix + name: values for name, values in tensors.items()}


def original_texts(base: Path) -> dict[str, Tensor]:
    """The tensors of the text encoders, as in the files that hold all parts."""
    index = json.loads((base / "model_index.json").read_text())
    tensors = {}
    for part, short in _TEXT[index["_class_name"]].items():
        if index[part] == [None, None]:
            continue
        for name, values in load_file(base / part / "model.safetensors").items():
            # transformers writes CLIPTextModel without this prefix, CLIPTextModelWithProjection with it.
            is_bare = short == "clip_l" and name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
            tensors[f"text_encoders.{short}.transformer.{'text_model.' if is_bare else ''}{name}"] = values
    return tensors


def write_checkpoint(
    base: Path,
    file: Path,
    *,
    without: Collection[str] = (),
    prefix: str = "model.diffusion_model.",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The base in one file, `without` tensors that start with these texts; `prefix` stands before the denoiser's names."""
    is_flux = json.loads((base / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    tensors = original_transformer(base, prefix) | original_texts(base)
    tensors |= original_vae(base, "vae." if is_flux else "first_stage_model.")
    kept = {name: values.to(dtype).contiguous() for name, values in tensors.items() if not name.startswith(tuple(without) or "-")}
    save_file(kept, file)
    return file
