"""The layers of FLUX and SD3 in the names of their original code, where one matrix is queries, keys and values together."""

from collections.abc import Collection, Iterator
from typing import Any

FUSED = "+"
"""Between the modules that share the rows of one matrix of the original code."""

_BLOCK = {
    "FLUX": {
        "transformer_blocks": {
            "img_attn.qkv": "attn.to_q+attn.to_k+attn.to_v",
            "txt_attn.qkv": "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
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
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
            "modulation.lin": "norm.linear",
        },
    },
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
    "SD3": {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
}
_BLOCKS = {
    "FLUX": {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"},
    "SD3": {"transformer_blocks": "joint_blocks"},
}
BARE = ("double_blocks", "single_blocks", "joint_blocks")
"""First parts of names that need no prefix in front of them: no other model has them."""


def original_names(model: Any, own: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names in the original code of the layers `own` of a transformer, each with the layer's own name, or several by `FUSED`.

    Left out are the layers whose rows diffusers has in another order: the modulation of the final layer and, in SD3, that of
    the last block's text.
    """
    kind = _kind(model, own)
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


def _kind(model: Any, own: Collection[str]) -> str | None:
    if not any(name.endswith(".attn.add_q_proj") for name in own):
        return None
    return {"FluxTransformer2DModel": "FLUX", "SD3Transformer2DModel": "SD3"}.get(type(model).__name__)
