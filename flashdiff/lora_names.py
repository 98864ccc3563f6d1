"""Names of a LoRA file's tensors: the layer of which model each is for, and its role there, in every naming in use.

Diffusers writes `unet.down_blocks.0...to_q.lora_A.weight`, kohya's scripts `lora_unet_down_blocks_0_..._to_q.lora_down.weight`
or, with the blocks of the original code, `lora_unet_input_blocks_1_1_...` (LDM) and `lora_unet_double_blocks_0_...` (FLUX);
LyCORIS writes `lycoris_...`, ComfyUI `diffusion_model....` and `text_encoders.clip_l.transformer....`, peft
`base_model.model....`; Qwen-Image-Lightning, XLabs and diffusers' oldest files write the denoiser's layers with nothing in front.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashdiff.errors import LoraError
from flashdiff.lora_original_names import BARE, original_names

if TYPE_CHECKING:
    from torch import nn

_ROLES = {
    "down": ("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "up": ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "up_bias": ("lora_B.bias",),
    "mid": ("lora_mid.weight",),
    "alpha": ("alpha",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "dora_scale": ("dora_scale",),
    **{f"hada_{factor}": (f"hada_{factor}",) for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{factor}": (f"lokr_{factor}",) for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": ("diff", "w_norm"),
    "diff_b": ("diff_b", "b_norm"),
}
_ENDINGS = {f".{ending}": role for role, endings in _ROLES.items() for ending in endings}
_OLD_ENDINGS = {"_lora.down.weight": "down", "_lora.up.weight": "up"}  # diffusers until 0.20: `to_q_lora.down.weight`
_XLABS_ENDINGS = {".down.weight": "down", ".up.weight": "up"}  # XLabs' FLUX: `double_blocks.0.processor.qkv_lora1.down.weight`
_LDM_LAYERS = {
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}
_LDM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of a LoRA file belongs."""

    part: str
    """The model's folder within the base: `unet`, `text_encoder_2`."""
    module: str
    """Or several, by `FUSED`, whose weights are the rows of one matrix."""
    role: str
    """What the tensor is in its layer's formula: a key of `_ROLES`."""


class LayerNames:
    """Every name under which a LoRA file may speak of a layer of these models."""

    def __init__(self, modules: Mapping[str, Mapping[str, str]], denoiser: str, comfyui: Mapping[str, str] | None = None) -> None:
        """`modules` are the `aliases_of` the models that LoRAs may change, by their folders; `denoiser` is one of them.

        `comfyui` are their `comfyui_names`.
        """
        self._denoiser = denoiser
        encoders = [name for name in modules if name != denoiser]
        numbered = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
        # kohya numbers FLUX's T5 as SD3's, though it is the second encoder.
        numbered["lora_te3_"] = "text_encoder_3" if "text_encoder_3" in encoders else "text_encoder_2"
        numbered |= {f"text_encoders.{name}.transformer.": part for name, part in (comfyui or {}).items()}
        self._prefixes = {
            **{f"{name}.": name for name in modules},
            **dict.fromkeys((f"lora_{denoiser}_", "lora_unet_", "lycoris_", "diffusion_model.", "base_model.model."), denoiser),
            **{prefix: name for prefix, name in numbered.items() if name in encoders},
        }
        self._modules = modules

    def find(self, key: str, file: str) -> Place:
        """The place of a tensor; LoraError where its ending, its prefix or its layer is unknown."""
        layer, role = _split(key)
        if role is None:
            raise LoraError(f"{file}: '{key}' is of no kind that can be fused (LoRA, DoRA, LoHa, LoKr, diff)")
        layer = layer.replace(".processor.", ".")
        prefix = max((prefix for prefix in self._prefixes if layer.startswith(prefix)), key=len, default=None)
        if prefix is None and (layer.startswith(BARE) or layer.replace(".", "_") in self._modules[self._denoiser]):
            prefix = ""
        if prefix is None:
            known = ", ".join(f"'{prefix}'" for prefix in self._prefixes)
            raise LoraError(f"{file}: '{key}' names no part of this base; its LoRAs' names start with {known}")
        part = self._prefixes.get(prefix, self._denoiser)
        module = self._modules[part].get(layer.removeprefix(prefix).replace(".", "_"))
        if module is None:
            raise LoraError(f"{file}: '{key}': the {part} of this base has no layer '{layer.removeprefix(prefix)}'")
        return Place(part=part, module=module, role=role)


def comfyui_names(models: Mapping[str, Any]) -> dict[str, str]:
    """The text encoders among these models by the names that ComfyUI has for them."""
    encoders = {name: type(model).__name__ for name, model in models.items() if name.startswith("text_encoder")}
    clips = [name for name, kind in encoders.items() if kind.startswith("CLIP")]
    t5s = [name for name, kind in encoders.items() if kind.startswith("T5")]
    # OpenCLIP's large model, of SD2, is the only one there where it is there.
    names = [*zip(("clip_l", "clip_g"), clips, strict=False), *zip(("t5xxl",), t5s, strict=False)]
    return dict([*names, ("clip_h", clips[0])] if len(clips) == 1 else names)


def aliases_of(model: "nn.Module", *, is_denoiser: bool) -> dict[str, str]:
    """Every name of a model's layers, with underscores for dots, and the module or modules (by `FUSED`) that it means."""
    return {alias.replace(".", "_"): module for alias, module in _aliases(model, is_denoiser=is_denoiser)}


def changes_text(keys: Iterable[str]) -> bool:
    """Whether a file with these keys changes a text encoder."""
    return any(key.startswith(("text_encoder", "lora_te")) for key in keys)


def _split(key: str) -> tuple[str, str | None]:
    """A key's layer, and its tensor's role there; None where the role is unknown."""
    for endings in (_ENDINGS, _OLD_ENDINGS, _XLABS_ENDINGS):
        key = key.replace(".default.", ".")  # an adapter's name in peft's own files
        ending = max((ending for ending in endings if key.endswith(ending)), key=len, default=None)
        if ending:
            return key.removesuffix(ending), endings[ending]
    return key, None


def _aliases(model: "nn.Module", *, is_denoiser: bool) -> Iterator[tuple[str, str]]:
    """All names of a model's layers in diffusers' dots, each with the layer's own name; own names come last, and so win."""
    own = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for name in own:
        if is_denoiser:
            yield name.replace("to_out.0", "to_out"), name
        else:
            old = name
            for now, before in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                old = old.replace(f"self_attn.{now}", f"self_attn.{before}")
            # transformers 5 has CLIP's layers without the level `text_model` that files speak of.
            yield from ((f"{level}{alias}", name) for alias in (old, name) for level in ("", "text_model."))
    if is_denoiser and hasattr(model, "down_blocks"):
        yield from ((ldm, name) for name in own if (ldm := _ldm_name(name, _ldm_blocks(model))))
    if is_denoiser:
        yield from original_names(model, set(own))
    yield from ((name, name) for name in own)


def _ldm_name(name: str, blocks: Mapping[str, str]) -> str | None:
    """A UNet's layer in the names of the original code; None where it has none."""
    if name in _LDM_ENDS:
        return _LDM_ENDS[name]
    block = next((block for block in blocks if name.startswith(f"{block}.")), None)
    if block is None:
        return None
    rest = name.removeprefix(f"{block}.")
    layers = next((layers for kind, layers in _LDM_LAYERS.items() if f".{kind}." in block), {})
    return f"{blocks[block]}.{layers.get(rest, rest)}"


def _ldm_blocks(unet: Any) -> dict[str, str]:
    """The original code's numbers of a UNet's blocks: it counts them through, where diffusers counts by level."""
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    blocks["mid_block.resnets.1"] = "middle_block.2"
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if getattr(block, "downsamplers", None):
            blocks[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if getattr(block, "upsamplers", None):
            place = 2 if getattr(block, "attentions", None) else 1
            blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{place}"
    return blocks
