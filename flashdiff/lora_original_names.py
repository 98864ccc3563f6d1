"""The layers of transformers in the names of their original code, where one matrix is queries, keys and values together."""

from collections.abc import Collection, Iterator
from typing import Any

FUSED = "+"
"""Between the modules that share the rows of one matrix of the original code."""

_FLUX_ATTENTION = {
    "img_attn.qkv": "attn.to_q+attn.to_k+attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_XLABS_ATTENTION = {
    "qkv_lora1": _FLUX_ATTENTION["img_attn.qkv"],
    "qkv_lora2": _FLUX_ATTENTION["txt_attn.qkv"],
    "proj_lora1": _FLUX_ATTENTION["img_attn.proj"],
    "proj_lora2": _FLUX_ATTENTION["txt_attn.proj"],
}
"""The names of XLabs, whose processors of attention have two LoRAs: for the image and for the text."""
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q+attention.to_k+attention.to_v",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
_BLOCK = {
    "FLUX": {
        "transformer_blocks": {
            **_FLUX_ATTENTION,
            **_XLABS_ATTENTION,
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
        "single_transformer_blocks": {
            "linear1": "attn.to_q+attn.to_k+attn.to_v+proj_mlp",
            "linear2": "proj_out",
            "qkv": "attn.to_q+attn.to_k+attn.to_v",  # XLabs'
            "proj": "proj_out",  # XLabs'
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
            "modulation.lin": "norm.linear",
        },
    },
    "FLUX.2": {
        "transformer_blocks": {
            **_FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        "single_transformer_blocks": {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    },
    "Z-Image": dict.fromkeys(("layers", "noise_refiner", "context_refiner"), _Z_IMAGE_BLOCK),
    "SD3": {
        "transformer_blocks": {
            "x_block.attn.qkv": "attn.to_q+attn.to_k+attn.to_v",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.qkv": "attn2.to_q+attn2.to_k+attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        }
    },
}
_ENDS = {
    "FLUX": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
    "FLUX.2": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
    },
    "Z-Image": {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    "SD3": {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
}
_FLUX_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
_BLOCKS = {
    "FLUX": _FLUX_BLOCKS,
    "FLUX.2": _FLUX_BLOCKS,
    "Z-Image": {blocks: blocks for blocks in _BLOCK["Z-Image"]},
    "SD3": {"transformer_blocks": "joint_blocks"},
}
_KINDS = {
    "FluxTransformer2DModel": "FLUX",
    "Flux2Transformer2DModel": "FLUX.2",
    "ZImageTransformer2DModel": "Z-Image",
    "SD3Transformer2DModel": "SD3",
}
BARE = ("double_blocks", "single_blocks", "joint_blocks")
"""First parts of names that need no prefix in front of them: no other model has them."""


def original_names(model: Any, own: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names in the original code of the layers `own` of a transformer, each with the layer's own name, or several by `FUSED`.

    Left out are the layers whose rows diffusers has in another order: the modulation of the final layer, but for Z-Image's,
    and, in SD3, that of the last block's text.
    """
    kind = next((_KINDS[base.__name__] for base in type(model).__mro__ if base.__name__ in _KINDS), None)
    if kind is None:
        return
    for original, name in _ENDS[kind].items():
        if name in own:
            yield original, name
    for blocks, short in _BLOCKS[kind].items():
        last = len(getattr(model, blocks)) - 1
        for index in range(last + 1):
            for original, names in _BLOCK[kind][blocks].items():
                whole = [f"{blocks}.{index}.{name}" for name in names.split(FUSED)]
                if kind == "SD3" and index == last and original == "context_block.adaLN_modulation.1":
                    continue
                if all(name in own for name in whole):
                    yield f"{short}.{index}.{original}", FUSED.join(whole)
