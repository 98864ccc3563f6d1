"""LoRA files in every naming and of every kind: fused as stock diffusers or the format's formula has it, or refused by name."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES
from torch import Tensor

from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import LoraError
from flashdiff.generate import decode_rows, generate_rows
from flashdiff.lora import load_fused
from flashdiff.lora_names import LayerNames, aliases_of, changes_text
from flashdiff.noise import image_noise
from flashdiff.samplers.options import SamplingOptions
from flashdiff.schedule import FlowSchedule
from flashdiff.tasks import check_order

PROMPT = "a red dog"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name) for name, make in FAMILIES.items()}


@cache
def _untouched(base: Path) -> Any:
    """The pipeline of a base, for tests that only read its weights."""
    return _stock(base)


def _stock(base: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _parts(pipeline: Any) -> dict[str, Any]:
    names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}


def _random(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


def _factors(weight: Tensor, rank: int = 3) -> dict[str, Tensor]:
    """Random A and B for a weight."""
    down, up = _random(rank, *weight.shape[1:]), _random(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}


def _same_weights(ours: Any, stock: Any, untouched: Any, parts: Iterable[str]) -> None:
    for part in parts:
        before = dict(_parts(untouched)[part].named_parameters())
        expected = dict(_parts(stock)[part].named_parameters())
        changed = 0
        for name, value in ours.weights[part].named_parameters():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
            changed += bool((value - before[name]).abs().max() > 1e-3)
        assert changed, part


def _ours_image(model: Any, steps: int = 2) -> Any:
    order = check_order(model.spec, prompt=PROMPT, seed=3, steps=steps)
    ((row, _),) = generate_rows(model, [order])[0]
    return np.clip(decode_rows(model, [row])[0] / 2 + 0.5, 0, 1)


def _stock_image(pipeline: Any, model: Any, steps: int = 2) -> Any:
    spec = model.spec
    latents = torch.from_numpy(image_noise(3, 0, spec.latent_shape(spec.sizes[0])))[None]
    settings: dict[str, Any] = {"guidance_scale": spec.sampler.guidance, "num_inference_steps": steps}
    if hasattr(pipeline.scheduler.config, "set_alpha_to_one"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    if isinstance(spec.sampler.schedule, FlowSchedule):
        settings |= {"height": 32, "width": 32}
    if spec.family == "flux":
        settings["guidance_scale"] = 3.5
        latents = pipeline._pack_latents(latents, *latents.shape)
    return pipeline(PROMPT, latents=latents, output_type="pt", **settings).images[0].numpy()


def _options(family: str) -> SamplingOptions:
    return SamplingOptions(sampler="flow-euler" if family in ("sd3", "flux") else "ddim", guidance=3.5 if family == "flux" else 0)


def _kohya(pipeline: Any, name: Callable[[str, str], str], **prefixes: str) -> dict[str, Tensor]:
    """Random LoRA layers for the matrices of these parts of a pipeline, kohya's way."""
    weights: dict[str, Tensor] = {}
    for part, prefix in prefixes.items():
        for module, layer in _parts(pipeline)[part].named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "embed" not in module:
                for ending, value in _factors(layer.weight).items():
                    weights[f"{prefix}{name(part, module)}.{ending}"] = value
    return weights


def _underscored(_: str, module: str) -> str:
    return module.replace(".", "_")


def _ldm(pipeline: Any) -> Callable[[str, str], str]:
    from flashdiff.lora_names import _ldm_blocks, _ldm_name

    blocks = _ldm_blocks(pipeline.unet)

    def name(part: str, module: str) -> str:
        if part != "unet":
            return ("" if module == "text_projection" else "text_model_") + module.replace(".", "_").removeprefix("text_model_")
        found = _ldm_name(module, blocks)
        assert found
        return found.replace(".", "_")

    return name


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_ldm_names_and_text_layers_are_fused_as_stock_diffusers_does(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    stock, untouched = _stock(bases[family]), _stock(bases[family])
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if family == "sdxl":
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    weights = _kohya(stock, _ldm(stock), **prefixes)
    assert any("input_blocks_2_0_op" in key for key in weights)
    # diffusers 0.42 takes an upsampler behind a block without attention for an attention, and leaves it out.
    weights = {key: value for key, value in weights.items() if "output_blocks_1_1_conv" not in key}
    file = tmp_path / "ldm.safetensors"
    save_file(weights, file)
    stock.load_lora_weights(file, **({"unet_config": stock.unet.config} if family == "sd15" else {}))
    stock.fuse_lora(components=list(prefixes), lora_scale=0.8)
    stock.unload_lora_weights()
    _, ours = load_fused(str(bases[family]), [(file, 0.8)], _options(family))
    _same_weights(ours, stock, untouched, prefixes)
    np.testing.assert_allclose(_ours_image(ours), _stock_image(stock, ours), atol=1e-4, rtol=0)
    assert np.abs(_ours_image(ours) - _stock_image(untouched, ours)).max() > 1e-2


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_diffusers_text_layers_are_fused_as_stock_diffusers_does(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    stock, untouched = _stock(bases[family]), _stock(bases[family])
    denoiser = "unet" if hasattr(stock, "unet") else "transformer"
    encoders = {"sd15": ["text_encoder"], "flux": ["text_encoder"]}.get(family, ["text_encoder", "text_encoder_2"])
    targets = ("to_q", "to_k", "q_proj", "v_proj", "out_proj")
    weights = {
        f"{part}.{module}.{side}.weight": value
        for part in (denoiser, *encoders)
        for module, layer in _parts(stock)[part].named_modules()
        if module.endswith(targets)
        for side, value in zip(("lora_A", "lora_B"), list(_factors(layer.weight).values())[:2], strict=True)
    }
    file = tmp_path / "diffusers.safetensors"
    save_file(weights, file)
    stock.load_lora_weights(file)
    stock.fuse_lora(components=[denoiser, *encoders])
    stock.unload_lora_weights()
    _, ours = load_fused(str(bases[family]), [(file, 1.0)], _options(family))
    _same_weights(ours, stock, untouched, [denoiser, *encoders])
    np.testing.assert_allclose(_ours_image(ours), _stock_image(stock, ours), atol=1e-4, rtol=0)
    assert np.abs(_ours_image(ours) - _stock_image(untouched, ours)).max() > 1e-3


@pytest.mark.parametrize(("family", "part"), [("sd3", "text_encoder_3"), ("flux", "text_encoder_2"), ("pixart", "text_encoder")])
def test_t5_layers_are_fused_by_the_formula(bases: dict[str, Path], tmp_path: Path, family: str, part: str) -> None:
    torch.manual_seed(0)
    module = "encoder.block.1.layer.0.SelfAttention.q"
    before = _parts(_stock(bases[family]))[part].get_submodule(module).weight
    factors = _factors(before)
    prefix = {"text_encoder": "lora_te1_"}.get(part, "lora_te3_")
    file = tmp_path / "t5.safetensors"
    save_file({f"{prefix}{module.replace('.', '_')}.{ending}": value for ending, value in factors.items()}, file)
    _, ours = load_fused(str(bases[family]), [(file, 0.5)], None)
    expected = before + 0.5 * 1.5 / 3 * factors["lora_up.weight"] @ factors["lora_down.weight"]
    torch.testing.assert_close(ours.weights[part].get_submodule(module).weight.data, expected.detach())


def test_the_blocks_of_sdxl_have_their_known_ldm_names() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    names = LayerNames({"unet": aliases_of(unet, is_denoiser=True)}, "unet")
    attention = "transformer_blocks_0_attn1_to_q"
    for ldm, module in {
        f"input_blocks_4_1_{attention}": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        f"middle_block_1_{attention}": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_1_proj_in": "up_blocks.1.attentions.2.proj_in",
        "output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
        "label_emb_0_2": "add_embedding.linear_2",
        "time_embed_0": "time_embedding.linear_1",
        "out_2": "conv_out",
    }.items():
        assert names.find(f"lora_unet_{ldm}.lora_down.weight", "f").module == module


def test_the_upsampler_of_a_block_without_attention_is_fused(bases: dict[str, Path], tmp_path: Path) -> None:
    module = "up_blocks.0.upsamplers.0.conv"
    before = _stock(bases["sd15"]).unet.get_submodule(module).weight.data
    diff = torch.randn_like(before)
    save_file({"lora_unet_output_blocks_1_1_conv.diff": diff}, tmp_path / "up.safetensors")
    _, ours = load_fused(str(bases["sd15"]), [(tmp_path / "up.safetensors", 1.0)], None)
    torch.testing.assert_close(ours.network.get_submodule(module).weight.data, before + diff)


def _scaled(alpha: float, rank: int, weight: float = 0.7) -> float:
    return weight * alpha / rank


def _loha(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    out, inner = weight.shape[0], weight[0].numel()
    w = {"w1_a": _random(out, 3), "w1_b": _random(3, inner), "w2_a": _random(out, 3), "w2_b": _random(3, inner)}
    change = ((w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])).reshape(weight.shape) * _scaled(2, 3)
    return {**{f"hada_{name}": value for name, value in w.items()}, "alpha": torch.tensor(2.0)}, lambda before: before + change


def _loha_tucker(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    out, inner, *kernel = weight.shape
    w = {f"w{n}_{side}": _random(3, size) for n in (1, 2) for side, size in (("a", out), ("b", inner))}
    t = {f"t{n}": _random(3, 3, *kernel) for n in (1, 2)}
    first, second = (torch.einsum("ij...,ip,jr->pr...", t[f"t{n}"], w[f"w{n}_a"], w[f"w{n}_b"]) for n in (1, 2))
    tensors = {**{f"hada_{name}": value for name, value in {**w, **t}.items()}, "alpha": torch.tensor(2.0)}
    return tensors, lambda before: before + first * second * _scaled(2, 3)


def _lokr(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    out, inner = weight.shape[0] // 4, weight[0].numel() // 2
    w = {"lokr_w1": _random(4, 2), "lokr_w2_a": _random(out, 3), "lokr_w2_b": _random(3, inner), "alpha": torch.tensor(2.0)}
    change = torch.kron(w["lokr_w1"], w["lokr_w2_a"] @ w["lokr_w2_b"]).reshape(weight.shape) * _scaled(2, 3)
    return w, lambda before: before + change


def _lokr_full(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    w = {"lokr_w1": _random(4, 2), "lokr_w2": _random(weight.shape[0] // 4, weight.shape[1] // 2, *weight.shape[2:])}
    first = w["lokr_w1"].reshape(4, 2, *[1] * (weight.ndim - 2))
    return {**w, "alpha": torch.tensor(9.0)}, lambda before: before + torch.kron(first, w["lokr_w2"]) * 0.7


def _tucker_lora(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    out, inner, *kernel = weight.shape
    w = {"lora_down.weight": _random(3, inner, 1, 1), "lora_up.weight": _random(out, 3, 1, 1)}
    w |= {"lora_mid.weight": _random(3, 3, *kernel), "alpha": torch.tensor(2.0)}
    change = torch.einsum(
        "or,rskl,si->oikl", w["lora_up.weight"][..., 0, 0], w["lora_mid.weight"], w["lora_down.weight"][..., 0, 0]
    )
    return w, lambda before: before + change * _scaled(2, 3)


def _dora(weight: Tensor, axis: int = 0) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    factors = _factors(weight)
    shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
    scale = torch.rand(weight.shape[axis]).reshape(shape) + 0.5
    others = [dim for dim in range(weight.ndim) if dim != axis]

    def fused(before: Tensor) -> Tensor:
        product = factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1)
        changed = before + product.reshape(weight.shape) * _scaled(1.5, 3)
        return changed * scale / changed.pow(2).sum(others, keepdim=True).sqrt()

    return {**factors, "dora_scale": scale}, fused


def _dora_by_input(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    return _dora(weight, axis=1)


def _diff(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    diff = _random(*weight.shape)
    return {"diff": diff}, lambda before: before + 0.7 * diff


@pytest.mark.parametrize("naming", ["kohya", "ldm", "lycoris", "diffusers", "comfyui"])
@pytest.mark.parametrize(
    ("kind", "module"),
    [
        *[(kind, Q) for kind in (_loha, _lokr, _lokr_full, _dora, _dora_by_input, _diff)],
        *[(kind, CONV) for kind in (_loha, _loha_tucker, _lokr, _lokr_full, _tucker_lora, _dora, _dora_by_input, _diff)],
        (_diff, NORM),
    ],
)
def test_a_layer_is_fused_by_its_formula(
    bases: dict[str, Path], tmp_path: Path, kind: Callable[[Tensor], Any], module: str, naming: str
) -> None:
    torch.manual_seed(0)
    stock = _untouched(bases["sd15"])
    before = stock.unet.get_submodule(module).weight.detach()
    tensors, fused = kind(before)
    layer = {
        "kohya": f"lora_unet_{module.replace('.', '_')}",
        "ldm": f"lora_unet_{_ldm(stock)('unet', module)}",
        "lycoris": f"lycoris_{module.replace('.', '_')}",
        "diffusers": f"unet.{module}",
        "comfyui": f"diffusion_model.{module}",
    }[naming]
    save_file({f"{layer}.{ending}": value for ending, value in tensors.items()}, tmp_path / "lora.safetensors")
    _, ours = load_fused(str(bases["sd15"]), [(tmp_path / "lora.safetensors", 0.7)], None)
    after = ours.network.get_submodule(module).weight.data
    torch.testing.assert_close(after, fused(before), atol=1e-6, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(("weight", "bias"), [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_norms_and_biases_are_added(bases: dict[str, Path], tmp_path: Path, weight: str, bias: str) -> None:
    norm = _untouched(bases["sd15"]).unet.get_submodule(NORM)
    changes = {weight: torch.randn(32), bias: torch.randn(32)}
    save_file({f"lora_unet_{NORM.replace('.', '_')}.{key}": value for key, value in changes.items()}, tmp_path / "n.safetensors")
    _, ours = load_fused(str(bases["sd15"]), [(tmp_path / "n.safetensors", 0.7)], None)
    after = ours.network.get_submodule(NORM)
    torch.testing.assert_close(after.weight.data, norm.weight.data + 0.7 * changes[weight])
    torch.testing.assert_close(after.bias.data, norm.bias.data + 0.7 * changes[bias])


@pytest.mark.parametrize("ending", ["diff_b", "b_norm"])
def test_a_bias_may_change_alone(bases: dict[str, Path], tmp_path: Path, ending: str) -> None:
    norm, change = _untouched(bases["sd15"]).unet.get_submodule(NORM), torch.randn(32)
    save_file({f"lora_unet_{NORM.replace('.', '_')}.{ending}": change}, tmp_path / "b.safetensors")
    _, ours = load_fused(str(bases["sd15"]), [(tmp_path / "b.safetensors", 0.7)], None)
    after = ours.network.get_submodule(NORM)
    torch.testing.assert_close(after.bias.data, norm.bias.data + 0.7 * change)
    assert torch.equal(after.weight.data, norm.weight.data)


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2], dtype=torch.int32), torch.tensor(2.0).bfloat16()])
def test_alpha_may_be_a_whole_number_as_kohyas_scripts_write_it(bases: dict[str, Path], tmp_path: Path, alpha: Tensor) -> None:
    torch.manual_seed(0)
    stock, untouched = _stock(bases["sd15"]), _stock(bases["sd15"])
    file = tmp_path / "alpha.safetensors"
    save_file({f"{LAYER}.{key}": value for key, value in {**_factors(torch.zeros(32, 32)), "alpha": alpha}.items()}, file)
    stock.load_lora_weights(file)
    stock.fuse_lora()
    stock.unload_lora_weights()
    _, ours = load_fused(str(bases["sd15"]), [(file, 1.0)], None)
    _same_weights(ours, stock, untouched, ["unet"])


def test_a_projection_that_a_clip_lacks_is_left_out(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ComfyUI's extracted LoRAs have one for every CLIP."""
    weights = {f"{LAYER}.{ending}": value for ending, value in _factors(torch.zeros(32, 32)).items()}
    save_file(weights, tmp_path / "plain.safetensors")
    more = {f"text_encoders.clip_l.transformer.text_projection.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    save_file({**weights, **more}, tmp_path / "extracted.safetensors")
    plain, extracted = (
        load_fused(str(bases["sd15"]), [(tmp_path / f"{name}.safetensors", 1.0)], None)[1] for name in ("plain", "extracted")
    )
    for one, other in zip(plain.network.parameters(), extracted.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "is left out: no text encoder of this base has a projection there" in caplog.text
    save_file(more, tmp_path / "nothing.safetensors")
    with pytest.raises(LoraError, match="holds no layer that this base has"):
        load_fused(str(bases["sd15"]), [(tmp_path / "nothing.safetensors", 1.0)], None)


def test_an_alpha_that_is_no_number_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    factors = _factors(torch.zeros(32, 32))
    for alpha in (torch.tensor(True), torch.ones(3), torch.ones(0)):
        save_file({f"{LAYER}.{key}": value for key, value in {**factors, "alpha": alpha}.items()}, tmp_path / "a.safetensors")
        with pytest.raises(LoraError, match=r"to_q\.alpha' has the type .* which no LoRA has"):
            load_fused(str(bases["sd15"]), [(tmp_path / "a.safetensors", 1.0)], None)


def test_xlabs_loras_of_flux_are_fused_as_stock_diffusers_does(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock, untouched = _stock(bases["flux"]), _stock(bases["flux"])
    weights: dict[str, Tensor] = {}
    for name, rows in (
        ("double_blocks.0.processor.qkv_lora1", 96),
        ("double_blocks.0.processor.qkv_lora2", 96),
        ("double_blocks.1.processor.proj_lora1", 32),
        ("double_blocks.1.processor.proj_lora2", 32),
        ("single_blocks.0.processor.qkv_lora", 96),
    ):
        weights |= {f"{name}.down.weight": _random(3, 32), f"{name}.up.weight": _random(rows, 3)}
    # proj_out of a single block reads the attention and the MLP.
    weights |= {f"single_blocks.0.processor.proj_lora.{key}.weight": _random(*shape) for key, shape in
                (("down", (3, 160)), ("up", (32, 3)))}  # fmt: skip
    file = tmp_path / "xlabs.safetensors"
    save_file(weights, file)
    stock.load_lora_weights(file)
    stock.fuse_lora()
    stock.unload_lora_weights()
    _, ours = load_fused(str(bases["flux"]), [(file, 1.0)], _options("flux"))
    _same_weights(ours, stock, untouched, ["transformer"])


@pytest.mark.parametrize(
    ("family", "part", "layer", "module"),
    [
        ("sd15", "unet", Q.replace("to_q", "processor.to_q_lora"), Q),  # without `unet.`, as diffusers' first LoRAs were
        (
            "sdxl",
            "text_encoder_2",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            "text_model.encoder.layers.0.self_attn.q_proj",
        ),
        ("sdxl", "text_encoder_2", "text_encoders.clip_g.transformer.text_projection", "text_projection"),
        (
            "sd3",
            "text_encoder_3",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            "encoder.block.0.layer.0.SelfAttention.q",
        ),
    ],
)
def test_names_of_diffusers_first_loras_and_comfyuis_text_encoders(
    bases: dict[str, Path], tmp_path: Path, family: str, part: str, layer: str, module: str
) -> None:
    before = _parts(_stock(bases[family]))[part].get_submodule(module).weight.detach()
    factors = _factors(before)
    down, up = factors["lora_down.weight"], factors["lora_up.weight"]
    names = ("down.weight", "up.weight") if "processor" in layer else ("lora_down.weight", "lora_up.weight")
    file = tmp_path / "names.safetensors"
    save_file({f"{layer}.{name}": value for name, value in zip(names, (down, up), strict=True)}, file)
    assert changes_text(load_file(file)) == (part != "unet")
    _, ours = load_fused(str(bases[family]), [(file, 1.0)], None)
    torch.testing.assert_close(ours.weights[part].get_submodule(module).weight.data, before + up @ down)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("others", [1, 2])
def test_dora_with_other_loras_is_that_of_stock_diffusers(bases: dict[str, Path], tmp_path: Path, others: int) -> None:
    torch.manual_seed(0)
    stock, untouched = _stock(bases["sd15"]), _stock(bases["sd15"])
    weight = stock.unet.get_submodule(Q).weight
    loras = []
    for index in range(1 + others):
        factors = _factors(weight)
        tensors = {"lora_A.weight": factors["lora_down.weight"], "lora_B.weight": factors["lora_up.weight"]}
        if index:
            tensors["lora_magnitude_vector"] = torch.rand(weight.shape[0]) + 0.5
        loras.append((tmp_path / f"{index}.safetensors", 0.5 + index))
        save_file({f"unet.{Q}.{ending}": value for ending, value in tensors.items()}, loras[-1][0])
        stock.load_lora_weights(loras[-1][0], adapter_name=str(index))
    names = [str(index) for index in range(1 + others)]
    stock.set_adapters(names, [weight for _, weight in loras])
    stock.fuse_lora(adapter_names=names)
    stock.unload_lora_weights()
    _, ours = load_fused(str(bases["sd15"]), loras, None)
    _same_weights(ours, stock, untouched, ["unet"])


LAYER = f"lora_unet_{Q.replace('.', '_')}"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_input_blocks_11_1_proj_in.lora_down.weight": (3, 32)}, "has no layer 'input_blocks_11_1_proj_in'"),
        ({"unet.down_blocks.0.attentions.5.proj_in.lora_A.weight": (3, 32)}, "'unet.down_blocks.0.attentions.5.proj_in.lora_A.w"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "names no part of this base"),
        ({"transformer.x.lora_A.weight": (3, 32)}, "names no part of this base"),
        ({f"{LAYER}.oft_blocks": (3, 3)}, "'.*oft_blocks' is of no kind that can be fused"),
        ({f"{LAYER}.lora_down.weight": (3, 32)}, "its up is missing"),
        ({f"{LAYER}.alpha": ()}, "no weights come with its alpha"),
        ({f"{LAYER}.dora_scale": (32, 1)}, "no weights come with its dora_scale"),
        ({f"{LAYER}.diff": (31, 32)}, r"to_q.diff': it is for a weight of \[31, 32\], the base's has \[32, 32\]"),
        ({f"{LAYER}.diff": (32, 32), f"{LAYER}.diff_b": (32,)}, "the base's layer has no bias to add to"),
        ({f"{LAYER}.diff": (32, 32), f"{LAYER}.alpha": ()}, "alpha belongs to another kind of change than diff"),
        ({f"{LAYER}.diff": (32, 32), f"unet.{Q}.diff": (32, 32)}, "another tensor are for the same place"),
        ({f"{LAYER}.lora_down.weight": (3, 16), f"{LAYER}.lora_up.weight": (32, 3)}, "it is for a weight of"),
        (
            {f"{LAYER}.lora_down.weight": (3, 32), f"{LAYER}.lora_up.weight": (32, 4)},
            "to_q.lora_.*.weight': mat1 and mat2 shapes",
        ),
        ({f"{LAYER}.lora_down.weight": (0, 32), f"{LAYER}.lora_up.weight": (32, 0), f"{LAYER}.alpha": ()}, "its rank is 0"),
        ({f"unet.{Q}.lora_A.weight": (0, 32), f"unet.{Q}.lora_B.weight": (32, 0)}, "its rank is 0"),
        (
            {
                f"{LAYER}.lora_down.weight": (3, 32),
                f"{LAYER}.lora_up.weight": (32, 3),
                f"{LAYER}.dora_scale": (32, 1),
                f"{LAYER}.lora_magnitude_vector": (32,),
            },
            "of magnitude and dora_scale it may have one",
        ),
        ({f"{LAYER}.set_weight": (32, 32)}, "'.*set_weight' is of no kind that can be fused"),
        ({f"lora_unet_{NORM.replace('.', '_')}.diff_b": (31,)}, r"it is for a bias of \[31\], the base's has \[32\]"),
        ({f"{LAYER}.hada_w1_a": (32, 3), f"{LAYER}.hada_w1_b": (3, 32)}, "its hada_w2_a, hada_w2_b is missing"),
        ({f"{LAYER}.lokr_w1": (4, 2)}, "lokr_w2, or the pair"),
    ],
)
def test_what_no_layer_takes_is_refused_by_file_and_key(
    bases: dict[str, Path], tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    file = tmp_path / "wrong.safetensors"
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, file)
    with pytest.raises(LoraError, match=said) as refused:
        load_fused(str(bases["sd15"]), [(file, 1.0)], None)
    assert "\n" not in str(refused.value)
    assert "wrong.safetensors" in str(refused.value)
    with pytest.raises(LoraError, match=said):
        build_engine(BuildOptions(base=str(bases["sd15"]), loras=((str(file), 1.0),), out=tmp_path / "b"), lambda _: None)
    assert not (tmp_path / "b").exists()


def test_one_unknown_key_among_known_ones_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    weights = {f"{LAYER}.{ending}": value for ending, value in _factors(torch.zeros(32, 32)).items()}
    save_file(weights, tmp_path / "known.safetensors")
    load_fused(str(bases["sd15"]), [(tmp_path / "known.safetensors", 1.0)], None)
    save_file({**weights, "lora_unet_new_thing.lora_up.weight": torch.ones(3, 3)}, tmp_path / "one.safetensors")
    with pytest.raises(LoraError, match="'lora_unet_new_thing"):
        load_fused(str(bases["sd15"]), [(tmp_path / "one.safetensors", 1.0)], None)
    save_file({**weights, f"{LAYER}.alpha": torch.tensor(float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(LoraError, match="what it adds is not finite"):
        load_fused(str(bases["sd15"]), [(tmp_path / "nan.safetensors", 1.0)], None)


def _text_lora(base: Path, file: Path, *, is_text: bool = True) -> Path:
    torch.manual_seed(1)
    pipeline = _stock(base)
    part, prefix = ("text_encoder", "lora_te_text_model_") if is_text else ("unet", "lora_unet_")
    weights = _kohya(pipeline, lambda _, module: module.replace(".", "_").removeprefix("text_model_"), **{part: prefix})
    assert changes_text(weights) == is_text
    save_file(weights, file)
    return file


def test_a_text_lora_decides_the_text_encoders_export_and_no_other_lora_does(bases: dict[str, Path], tmp_path: Path) -> None:
    def keys(*loras: Path) -> dict[str, str]:
        given = tuple((str(lora), 1.0) for lora in loras)
        plan = plan_build(BuildOptions(base=str(bases["sd15"]), loras=given, out=tmp_path / "b", backend="onnxruntime"))
        return {export.part: export.key for export in plan.exports}

    of_text = _text_lora(bases["sd15"], tmp_path / "text.safetensors")
    of_unet = _text_lora(bases["sd15"], tmp_path / "unet.safetensors", is_text=False)
    plain, unet, text = keys(), keys(of_unet), keys(of_text)
    assert plain["text_encoder"] == unet["text_encoder"] != text["text_encoder"]
    assert plain["denoiser"] not in (unet["denoiser"], text["denoiser"])
    assert plain["decoder"] == unet["decoder"] == text["decoder"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_bundle_with_a_text_lora_encodes_texts_as_stock_diffusers_does(
    bases: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    options: dict[str, Any] = {"base": str(bases["sd15"]), "backend": backend, "batch_sizes": (1, 2)}
    build_engine(BuildOptions(**options, out=tmp_path / "plain"), lambda _: None)  # fills the cache
    lora = _text_lora(bases["sd15"], tmp_path / "text.safetensors")
    build_engine(BuildOptions(**options, out=tmp_path / "text", loras=((str(lora), 1.0),)), lambda _: None)
    stock = _stock(bases["sd15"])
    plain, engine = open_bundle(tmp_path / "plain"), open_bundle(tmp_path / "text")
    ids = engine.tokenize([PROMPT])
    stock.load_lora_weights(lora)
    stock.fuse_lora(components=["text_encoder"])
    expected = stock.encode_prompt(PROMPT, "cpu", 1, False)[0].numpy()
    ours = engine.call("text_encoder", ids)["encoder_hidden_states"]
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(plain.call("text_encoder", ids)["encoder_hidden_states"] - expected).max() > 1e-2


def test_alphas_of_metadata_that_contradict_the_file_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    factors = _factors(torch.zeros(32, 32))
    tensors = {f"unet.{Q}.lora_A.weight": factors["lora_down.weight"], f"unet.{Q}.lora_B.weight": factors["lora_up.weight"]}
    file = tmp_path / "m.safetensors"
    for settings, said in (
        ('{"unet.r": 3, "unet.lora_alpha": 6}', None),
        ('{"unet.r": 4, "unet.lora_alpha": 6}', "the metadata says rank 4, the tensors have 3"),
        ('{"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": 5}', "m.safetensors does not fit"),
        ('{"unet.r": 3, "unet.lora_alpha": "x"}', "m.safetensors does not fit"),
        ("[1]", "m.safetensors is damaged"),
        ('{"unet.r": 3, "unet.lora_alpha": 3, "unet.init_lora_weights": "pissa"}', "init_lora_weights is 'pissa'"),
        ('{"unet.r": 3, "unet.lora_alpha": 3, "unet.layer_replication": [[0, 1]]}', "layer_replication is"),
    ):
        save_file(tensors, file, metadata={"lora_adapter_metadata": settings})
        if said is None:
            _, ours = load_fused(str(bases["sd15"]), [(file, 1.0)], None)
            before = load_file(bases["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")[f"{Q}.weight"]
            expected = before + 2 * factors["lora_up.weight"] @ factors["lora_down.weight"]
            torch.testing.assert_close(ours.network.get_submodule(Q).weight.data, expected)
        else:
            with pytest.raises(LoraError, match=said):
                load_fused(str(bases["sd15"]), [(file, 1.0)], None)


@pytest.mark.parametrize("naming", ["", "diffusion_model.", "lora_unet_"])
def test_loras_of_qwen_image_in_lightnings_comfyuis_and_kohyas_names(bases: dict[str, Path], tmp_path: Path, naming: str) -> None:
    stock, untouched = _stock(bases["qwen-image"]), _stock(bases["qwen-image"])
    weights = {}
    for module, layer in stock.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and module.startswith("transformer_blocks."):
            name = module.replace(".", "_") if naming == "lora_unet_" else module
            weights |= {f"{naming}{name}.{ending}": value for ending, value in _factors(layer.weight).items()}
    save_file(weights, tmp_path / "lightning.safetensors")
    _, model = load_fused(str(bases["qwen-image"]), [(tmp_path / "lightning.safetensors", 1.0)], SamplingOptions())
    stock.load_lora_weights(tmp_path / "lightning.safetensors")
    stock.fuse_lora()
    stock.unload_lora_weights()
    _same_weights(model, stock, untouched, ["transformer"])
