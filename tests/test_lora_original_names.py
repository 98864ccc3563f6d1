"""LoRAs in the names of the original code, whose queries, keys and values are one matrix; and unknown keys."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from tiny import FAMILIES, make_tiny_sd35
from torch import Tensor

from flashdiff.errors import LoraError
from flashdiff.families import load_base
from flashdiff.lora import fuse
from flashdiff.lora_names import LayerNames, aliases_of
from flashdiff.lora_original_names import FUSED, original_names

Fused = dict[str, Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name) for name, make in FAMILIES.items()} | {"sd35": make_tiny_sd35(folder / "sd35")}


def _names(model: Any) -> dict[str, list[str]]:
    """The modules of each name of the original code; XLabs' names for the same modules come after these."""
    own = {name for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    first: dict[str, str] = {}
    for original, modules in original_names(model, own):
        first.setdefault(modules, original)
    return {original: modules.split(FUSED) for modules, original in first.items()}


def _fused(base: Path, file: Path, tensors: dict[str, Tensor], weight: float = 1.0) -> tuple[Fused, Fused]:
    """The network's tensors before and after."""
    family, model = load_base(str(base))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    fuse(model, family, [(file, weight)])
    return before, dict(model.network.state_dict())


def _rows(network: Any, modules: list[str]) -> Tensor:
    return torch.cat([network.get_submodule(name).weight for name in modules])


def test_flux_double_blocks_are_fused_as_stock_diffusers_does(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock: Any = diffusers.FluxPipeline.from_pretrained(bases["flux"])
    tensors = {}
    layers = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    for original, modules in _names(stock.transformer).items():
        name = original.replace(".", "_")
        if name.startswith("double_blocks") and name.endswith(layers):
            weight = _rows(stock.transformer, modules)
            tensors[f"lora_unet_{name}.lora_down.weight"] = 0.3 * torch.randn(3, weight.shape[1])
            tensors[f"lora_unet_{name}.lora_up.weight"] = 0.3 * torch.randn(weight.shape[0], 3)
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    assert len(tensors) == 2 * 2 * len(layers) * 3
    before, after = _fused(bases["flux"], tmp_path / "a.safetensors", tensors, 0.8)
    stock.load_lora_weights(tmp_path / "a.safetensors")
    stock.fuse_lora(components=["transformer"], lora_scale=0.8)
    stock.unload_lora_weights()
    expected = stock.transformer.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(changed) == 2 * (2 * 3 + 2 * (len(layers) - 1))


def _in_original_names(transformer: Any, naming: str, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """LoRA layers for every matrix of the original code: kohya's for a prefix in underscores, else peft's."""
    is_kohya = naming.endswith("_")
    tensors = {}
    for original, modules in _names(transformer).items():
        weight = _rows(transformer, modules)
        if weight.ndim == 2 and not original.startswith(skip):
            name = naming + (original.replace(".", "_") if is_kohya else original)
            down, up = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
            tensors[f"{name}.{down}.weight"] = 0.3 * torch.randn(3, weight.shape[1])
            tensors[f"{name}.{up}.weight"] = 0.3 * torch.randn(weight.shape[0], 3)
            if is_kohya:
                tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


# What diffusers 0.42 leaves out of kohya's files, with a warning; tested by the formula below.
LEFT_OUT = ("double_stream_modulation", "single_stream_modulation")


@pytest.mark.parametrize(
    ("family", "naming", "skip"),
    [
        ("flux2-klein", "diffusion_model.", ()),
        ("flux2-klein", "base_model.model.", ()),
        ("flux2-klein", "lora_unet_", LEFT_OUT),
        ("z-image", "lora_unet_", ("x_embedder", "final_layer")),
    ],
)
def test_families_of_2026_are_fused_as_stock_diffusers_does(
    bases: dict[str, Path], tmp_path: Path, family: str, naming: str, skip: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(bases[family])
    tensors = _in_original_names(stock.transformer, naming, skip)
    assert any("qkv" in key for key in tensors)
    before, after = _fused(bases[family], tmp_path / "a.safetensors", tensors, 0.8)
    stock.load_lora_weights(tmp_path / "a.safetensors")
    stock.fuse_lora(components=["transformer"], lora_scale=0.8)
    stock.unload_lora_weights()
    expected = stock.transformer.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    matrices = {name for modules in _names(stock.transformer).values() for name in modules}
    whole = {f"{name}.weight" for name in matrices if stock.transformer.get_submodule(name).weight.ndim == 2}
    assert changed == {name for name in whole if not name.startswith((*skip, "all_x_embedder", "all_final_layer"))}


def test_sd3_layers_are_those_of_diffusers_conversion(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, model = load_base(str(bases["sd3"]))
    names = _names(model.network)
    full = {}
    for original, modules in names.items():
        for ending, tensors in (("weight", "weight"), ("bias", "bias")):
            parts = [getattr(model.network.get_submodule(name), tensors) for name in modules]
            if all(part is not None for part in parts):
                full[f"{original}.{ending}"] = torch.randn_like(torch.cat(parts))
    width = model.network.config.caption_projection_dim
    others = {  # what the conversion needs and we refuse
        "pos_embed": torch.zeros(1),
        "context_embedder.weight": torch.zeros(1),
        "context_embedder.bias": torch.zeros(1),
        "final_layer.adaLN_modulation.1.weight": torch.zeros(2 * width, width),
        "final_layer.adaLN_modulation.1.bias": torch.zeros(2 * width),
        "joint_blocks.1.context_block.adaLN_modulation.1.weight": torch.zeros(2 * width, width),
        "joint_blocks.1.context_block.adaLN_modulation.1.bias": torch.zeros(2 * width),
    }
    expected = convert_sd3_transformer_checkpoint_to_diffusers({**full, **others})
    endings = {"weight": "diff", "bias": "diff_b"}
    tensors = {f"{key.rpartition('.')[0]}.{endings[key.rpartition('.')[2]]}": value for key, value in full.items()}
    before, after = _fused(bases["sd3"], tmp_path / "a.safetensors", {f"diffusion_model.{k}": v for k, v in tensors.items()})
    checked = 0
    for name in after:
        if name in expected and not name.startswith(
            ("pos_embed.pos", "context_embedder", "norm_out", "transformer_blocks.1.norm1_c")
        ):
            torch.testing.assert_close(after[name] - before[name], expected[name], atol=1e-5, rtol=1e-5)
            checked += 1
    assert checked == sum(len(names[key.rpartition(".")[0]]) for key in full)


PREFIXES = ("lora_unet_", "diffusion_model.", "transformer.", "lora_transformer_", "")


@pytest.mark.parametrize("prefix", [PREFIXES[0], *(pytest.param(prefix, marks=pytest.mark.slow) for prefix in PREFIXES[1:])])
@pytest.mark.parametrize("family", ["flux", "flux2-klein", "z-image", "sd3", "sd35"])
def test_every_fused_layer_is_split_by_the_formula(bases: dict[str, Path], tmp_path: Path, family: str, prefix: str) -> None:
    torch.manual_seed(0)
    _, model = load_base(str(bases[family]))
    fused = {original: modules for original, modules in _names(model.network).items() if len(modules) > 1}
    # FLUX: XLabs' `qkv` of a single block is part of `linear1`.
    assert len(fused) == {"sd3": 4, "flux2-klein": 4, "z-image": 4, "flux": 6}.get(family, 5)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for original, modules in fused.items():
        rows, columns = _rows(model.network, modules).shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        name = original.replace(".", "_") if prefix.endswith("_") else original
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        sizes = [model.network.get_submodule(module).weight.shape[0] for module in modules]
        for module, part in zip(modules, (up @ down).split(sizes), strict=True):
            changes[module] = changes.get(module, torch.zeros(())) + part
    before, after = _fused(bases[family], tmp_path / "a.safetensors", tensors, 0.5)
    for name, value in after.items():
        change = changes.get(name.removesuffix(".weight"), torch.zeros(())) if name.endswith(".weight") else torch.zeros(())
        torch.testing.assert_close(value, before[name] + 0.5 * change, atol=1e-5, rtol=1e-5)


def _kind(kind: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tensors of a layer of this kind, what the weight becomes, and what is added to the bias."""
    rows, columns = weight.shape
    none = torch.zeros(rows)
    if kind == "loha":
        factors = {
            f"hada_w{n}_{side}": torch.randn(*shape) for n in (1, 2) for side, shape in (("a", (rows, 2)), ("b", (2, columns)))
        }
        change = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
        return factors, weight + change, none
    if kind == "diff":
        change, bias = torch.randn(rows, columns), torch.randn(rows)
        return {"diff": change, "diff_b": bias}, weight + change, bias
    down, up, scale = torch.randn(2, columns), torch.randn(rows, 2), torch.rand(rows, 1) + 0.5
    merged = weight + up @ down
    magnitudes = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
    return magnitudes, scale * merged / torch.linalg.vector_norm(merged, dim=1, keepdim=True), none


@pytest.mark.parametrize("kind", ["loha", "diff", "dora"])
@pytest.mark.parametrize(
    ("family", "layer"), [("flux", "single_blocks.0.linear1"), ("sd3", "joint_blocks.0.context_block.attn.qkv")]
)
def test_other_kinds_of_a_fused_layer(bases: dict[str, Path], tmp_path: Path, family: str, layer: str, kind: str) -> None:
    torch.manual_seed(0)
    _, model = load_base(str(bases[family]))
    modules = _names(model.network)[layer]
    tensors, weight, bias = _kind(kind, _rows(model.network, modules))
    before, after = _fused(bases[family], tmp_path / "a.safetensors", {f"{layer}.{ending}": v for ending, v in tensors.items()})
    torch.testing.assert_close(torch.cat([after[f"{name}.weight"] for name in modules]), weight, atol=1e-5, rtol=1e-5)
    of_bias = torch.cat([after[f"{name}.bias"] - before[f"{name}.bias"] for name in modules])
    torch.testing.assert_close(of_bias, bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "key", "rows"),
    [
        ("flux", "double_blocks.0.img_attn.qkv", 97),  # not 96 rows
        ("flux", "double_blocks.7.img_attn.qkv", 96),
        ("flux", "joint_blocks.0.x_block.attn.qkv", 96),
        ("sd3", "double_blocks.0.img_attn.qkv", 96),
        ("sd3", "joint_blocks.0.x_block.attn2.qkv", 96),  # of SD3.5 medium alone
        ("sd3", "final_layer.adaLN_modulation.1", 64),
        ("pixart", "double_blocks.0.img_attn.qkv", 96),
        ("sd15", "joint_blocks.0.x_block.attn.qkv", 96),
        ("flux2-klein", "double_blocks.0.img_attn.qkv", 97),
        ("flux2-klein", "single_blocks.7.linear1", 288),
        ("flux2-klein", "final_layer.adaLN_modulation.1", 64),
        ("z-image", "layers.9.attention.qkv", 96),
    ],
)
def test_a_fused_key_that_the_base_lacks_is_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, family: str, key: str, rows: int
) -> None:
    prefix = "diffusion_model." if key.startswith(("final", "layers")) else ""
    tensors = {f"{prefix}{key}.lora_A.weight": torch.randn(2, 32), f"{prefix}{key}.lora_B.weight": torch.randn(rows, 2)}
    with pytest.raises(LoraError, match=key.replace(".", r"\.")) as error:
        _fused(bases[family], tmp_path / "a.safetensors", tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_key_of_any_part_of_any_family_is_refused(bases: dict[str, Path], family: str) -> None:
    """A list of keys a family: those of its layers, in every naming, and no others."""
    kind, model = load_base(str(bases[family]))
    parts = {name: part for name, part in model.weights.items() if name.startswith(("text_encoder", kind.lora_prefix))}
    modules = {name: aliases_of(part, is_denoiser=name == kind.lora_prefix) for name, part in parts.items()}
    names = LayerNames(modules, kind.lora_prefix)
    for part, weights in parts.items():
        layers = [name for name, module in weights.named_modules() if getattr(module, "weight", None) is not None]
        for layer in layers:
            assert names.find(f"{part}.{layer}.lora_A.weight", "a").module == layer
        for wrong in (f"{layers[0]}.made_up", f"made_up.{layers[-1]}", layers[len(layers) // 2] + "x"):
            with pytest.raises(LoraError, match=f"the {part} of this base has no layer"):
                names.find(f"{part}.{wrong}.lora_A.weight", "a")
        with pytest.raises(LoraError, match="is of no kind that can be fused"):
            names.find(f"{part}.{layers[0]}.made_up_factor", "a")
