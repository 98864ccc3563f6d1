"""IP-Adapters of FLUX on tiny random weights: diffusers' own pipelines against ours, and the engines against torch."""

import functools
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Once
from diffusers import FluxControlNetModel
from numpy.typing import NDArray
from PIL import Image
from tiny import (
    IMAGE_SIDE,
    make_tiny_flux,
    make_tiny_flux_controlnet,
    make_tiny_flux_fill,
    make_tiny_flux_ip_adapter,
    make_tiny_flux_kontext,
    make_tiny_ip_adapter,
    make_tiny_sd15,
)
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from flashdiff.components import Components, Size
from flashdiff.controls import ControlRequest
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.plan import plan_build
from flashdiff.engines.requirements import count_parameters
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ModelError
from flashdiff.families import family_of
from flashdiff.families.base import TorchModel
from flashdiff.families.control import with_controls
from flashdiff.families.ip_adapter import check_adapter, find_adapter, with_adapter
from flashdiff.generate import generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.orders import Pixels
from flashdiff.references import ReferenceRequest
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

PROMPT, SEED, STEPS = "a red dog", 3, 4
SIZE = Size(48, 32)
SAMPLING = SamplingOptions(sampler="flow-euler")
_random = np.random.default_rng(0)
FACE = _random.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
IMAGE = _random.integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8)
NOISE = torch.from_numpy(image_noise(SEED, 0, (16, SIZE.height // 4, SIZE.width // 4)))[None]
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # of diffusers' own code
TOKENS = {"wide": 16}
"""Of an adapter where there are not 4: as many as diffusers reads off a projection to 16 tokens of 4096 values."""


def _make_all(folder: Path) -> None:
    make_tiny_flux(folder / "dev", num_layers=3)
    make_tiny_flux(folder / "schnell", guidance_embeds=False, num_layers=1)
    make_tiny_flux(folder / "wide", text_width=4096, num_layers=1)
    make_tiny_flux_kontext(folder / "kontext")
    make_tiny_flux_fill(folder / "fill")
    for name in ("dev", "schnell", "wide", "kontext", "fill"):
        make_tiny_flux_ip_adapter(folder / "adapters" / f"{name}.safetensors", folder / name, tokens=TOKENS.get(name, 4))
    make_tiny_flux_controlnet(folder / "edges")


@pytest.fixture(scope="module")
def bases(once: Once) -> Path:
    return once("flux-references", _make_all)


def _adapter(bases: Path, name: str) -> Path:
    return bases / "adapters" / f"{name}.safetensors"


@functools.cache
def _model(bases: Path, name: str, adapter: Path | None = None) -> TorchModel:
    family, model = load_fused(str(bases / name), (), SAMPLING)
    model = replace(model, spec=model.spec.model_copy(update={"sizes": (*model.spec.sizes, SIZE)}))
    return with_adapter(family, model, find_adapter(str(adapter or _adapter(bases, name)), None))


def _made(model: Components, scale: float | None = None, **options: Any) -> NDArray[np.float32]:
    """The latents [C, h, w], with the reference at a scale, or without."""
    given = None if scale is None else ReferenceRequest(image=FACE, scale=scale)
    order = check_order(model.spec, prompt=PROMPT, seed=SEED, steps=STEPS, size=SIZE, reference=given, **options)
    return generate_rows(model, [order])[0][0][0].latents


def _stock(bases: Path, name: str, scale: float, kind: str = "FluxPipeline", **call: Any) -> NDArray[np.float32]:
    """The latents [C, h, w] of diffusers' pipeline with the adapter that it loads itself."""
    parts = {name: call.pop(name) for name in ("controlnet",) if name in call}
    pipeline: Any = getattr(diffusers, kind).from_pretrained(bases / name, **parts)
    pipeline.set_progress_bar_config(disable=True)
    file = _adapter(bases, name)
    pipeline.load_ip_adapter(
        file.parent, weight_name=file.name, image_encoder_pretrained_model_name_or_path=file.parent / "image_encoder",
        image_encoder_dtype=torch.float32,
    )  # fmt: skip
    pipeline.set_ip_adapter_scale(scale)
    module = inspect.getmodule(type(pipeline))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: NOISE)
        if hasattr(module, "retrieve_latents"):
            patch.setattr(module, "retrieve_latents", lambda encoded, *_, **__: encoded.latent_dist.mode())
        tokens = pipeline(
            prompt=PROMPT, ip_adapter_image=Image.fromarray(FACE), height=SIZE.height, width=SIZE.width,
            num_inference_steps=STEPS, output_type="latent", **call,
        ).images  # fmt: skip
    latents: NDArray[np.float32] = pipeline._unpack_latents(tokens, SIZE.height, SIZE.width, 4)[0].numpy()
    return latents


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["dev", "schnell", "wide"])
def test_a_reference_is_read_as_in_the_stock_pipeline(bases: Path, name: str, scale: float) -> None:
    model = _model(bases, name)
    assert model.spec.condition("reference").tokens == (TOKENS.get(name, 4), 4096 if name == "wide" else 32)
    found, without = _made(model, scale), _made(model)
    np.testing.assert_allclose(found, _stock(bases, name, scale), atol=1e-4, rtol=0)
    assert np.abs(found - without).max() > 0.05 if scale else np.array_equal(found, without)
    plain = load_fused(str(bases / name), (), SAMPLING)[1]
    plain = replace(plain, spec=plain.spec.model_copy(update={"sizes": (SIZE,)}))
    np.testing.assert_allclose(without, _made(plain), atol=1e-5, rtol=0)


def test_the_queries_of_an_image_are_computed_once(bases: Path) -> None:
    model, called = _model(bases, "dev"), list[str]()
    hooks = [
        block.attn.to_q.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, block in model.network.transformer_blocks.named_children()
    ]
    _made(model, 0.5)
    for hook in hooks:
        hook.remove()
    assert called == ["0", "1", "2"] * STEPS


def test_tensors_in_diffusers_names_are_the_same_adapter(bases: Path, tmp_path: Path) -> None:
    tensors = {}
    for name, values in safetensors.torch.load_file(_adapter(bases, "dev")).items():
        _, *words = name.replace(".processor", "").replace("ip_adapter_double_stream_", "").split(".")
        own = ".".join(words).replace("k_proj", "to_k_ip").replace("v_proj", "to_v_ip")
        tensors[f"{'image_proj' if name.startswith('ip_') else 'ip_adapter'}.{own}"] = values
    assert {"image_proj.proj.weight", "ip_adapter.2.to_v_ip.bias"} <= set(tensors)
    (tmp_path / "image_encoder").symlink_to(_adapter(bases, "dev").parent / "image_encoder")
    safetensors.torch.save_file(tensors, tmp_path / "same.safetensors")
    np.testing.assert_array_equal(
        _made(_model(bases, "dev"), 0.5), _made(_model(bases, "dev", tmp_path / "same.safetensors"), 0.5)
    )


def _mask() -> Pixels:
    mask = np.zeros_like(IMAGE)
    mask[5:27, 9:40] = 255
    return mask


@pytest.mark.parametrize("task", ["image_to_image", "inpainting", "edit"])
def test_a_reference_goes_with_the_images_of_every_task(bases: Path, task: str) -> None:
    inputs: dict[str, Pixels] = {"image": IMAGE}
    call: dict[str, Any] = {"image": Image.fromarray(IMAGE)}
    parameters: Mapping[str, float] = {} if task == "edit" else {"strength": 0.5}
    if task == "inpainting":
        inputs["mask"] = _mask()
        call["mask_image"] = Image.fromarray(_mask())
    if task == "edit":
        call |= {"max_area": SIZE.width * SIZE.height, "_auto_resize": False}
    else:
        call |= {"strength": 0.5, "guidance_scale": 3.5, "sigmas": [1 - step / STEPS for step in range(STEPS)]}
    kinds = {"image_to_image": "FluxImg2ImgPipeline", "inpainting": "FluxInpaintPipeline", "edit": "FluxKontextPipeline"}
    name = "kontext" if task == "edit" else "dev"
    model = _model(bases, name)
    found = _made(model, 0.7, inputs=inputs, parameters=parameters)
    np.testing.assert_allclose(found, _stock(bases, name, 0.7, kinds[task], **call), atol=1e-4, rtol=0)
    assert np.abs(found - _made(model, inputs=inputs, parameters=parameters)).max() > 0.05


def test_a_reference_goes_with_a_control(bases: Path) -> None:
    model = with_controls(family_of(bases / "dev"), _model(bases, "dev"), {"edges": bases / "edges"})
    control = ControlRequest(name="edges", image=IMAGE, scale=0.6)
    found = _made(model, 0.7, controls=[control])
    expected = _stock(
        bases, "dev", 0.7, "FluxControlNetPipeline", controlnet=FluxControlNetModel.from_pretrained(bases / "edges"),
        control_image=Image.fromarray(IMAGE), controlnet_conditioning_scale=0.6, guidance_scale=3.5,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    for other in (_made(model, 0.7), _made(model, controls=[control])):
        assert np.abs(found - other).max() > 0.05


def test_all_of_clip_serves_as_the_image_encoder(bases: Path, tmp_path: Path) -> None:
    """As published next to no FLUX adapter: its authors take the vision half of openai/clip-vit-large-patch14."""
    encoder = _adapter(bases, "dev").parent / "image_encoder"
    vision = CLIPVisionModelWithProjection.from_pretrained(encoder)
    text = CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.config.to_dict(), projection_dim=vision.config.projection_dim
    )
    clip = CLIPModel(config)
    clip.load_state_dict(vision.state_dict(), strict=False)
    clip.save_pretrained(tmp_path / "clip")
    written = json.loads((tmp_path / "clip" / "config.json").read_text())
    assert written["model_type"] == "clip"
    # Of the days when transformers wrote all that it knows.
    written["vision_config"] |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_encoder_decoder": False}
    (tmp_path / "clip" / "config.json").write_text(json.dumps({**written, "vision_config_dict": {"hidden_size": 32}}))
    found = find_adapter(str(_adapter(bases, "dev")), str(tmp_path / "clip"))
    family, model = load_fused(str(bases / "dev"), (), SAMPLING)
    check_adapter(found, family, bases / "dev", model.spec)
    model = with_adapter(family, model, found)
    model = replace(model, spec=model.spec.model_copy(update={"sizes": (SIZE,)}))
    np.testing.assert_allclose(_made(model, 0.5), _made(_model(bases, "dev"), 0.5), atol=1e-5, rtol=0)
    counts = count_parameters(bases / "dev", family, model.spec, adapter=found)
    for part in ("denoiser", "reference_encoder"):
        assert counts[part] == sum(parameter.numel() for parameter in model.module(part).parameters())


def test_an_adapter_that_does_not_fit_is_refused_when_the_build_is_planned(bases: Path, tmp_path: Path) -> None:
    encoder = _adapter(bases, "dev").parent / "image_encoder"

    def refused(base: Path, adapter: Path) -> str:
        with pytest.raises(ModelError) as error:
            plan_build(
                BuildOptions(
                    base=str(base), out=tmp_path / "out", backend="torch", reference=str(adapter), reference_encoder=str(encoder)
                )
            )
        assert "\n" not in str(error.value)
        return str(error.value)

    def edited(change: Any) -> Path:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(_adapter(bases, "dev"))
        change(tensors)
        safetensors.torch.save_file(tensors, tmp_path / "edited.safetensors")
        return tmp_path / "edited.safetensors"

    assert "models of the class FluxFillPipeline take no IP-Adapter" in refused(bases / "fill", _adapter(bases, "fill"))
    said = refused(bases / "dev", _adapter(bases, "schnell"))
    assert "its ip_adapter.1.to_k_ip.weight is not there, dev needs [32, 32]" in said
    said = refused(bases / "schnell", _adapter(bases, "dev"))
    assert "schnell has no layer for its ip_adapter.1.to_k_ip.bias" in said
    assert "is [32, 4096], dev needs [32, 32]" in refused(bases / "dev", _adapter(bases, "wide"))
    bias = "double_blocks.1.processor.ip_adapter_double_stream_v_proj.bias"
    assert "its ip_adapter.1.to_v_ip.bias is not there, dev needs [32]" in refused(bases / "dev", edited(lambda t: t.pop(bias)))
    halved = edited(lambda t: t.update({"ip_adapter_proj_model.proj.weight": torch.ones(64, 24)}))
    said = refused(bases / "dev", halved)
    assert "its image_proj.proj.weight is [64, 24], dev with image_encoder (the image encoder) needs [128, 24]" in said
    scalar = edited(lambda t: t.update({"ip_adapter_proj_model.proj.weight": torch.ones(())}))
    assert "its image_proj.proj.weight is [], dev with image_encoder" in refused(bases / "dev", scalar)
    sd15 = make_tiny_sd15(tmp_path / "sd15")
    assert "its ip_adapter.3.to_k_ip.weight is not there, sd15 needs [32, 32]" in refused(sd15, _adapter(bases, "dev"))
    plus = make_tiny_ip_adapter(tmp_path / "plus.safetensors", sd15, plus=True)
    assert "it is of the form plus; for models of the family flux plain is supported" in refused(bases / "dev", plus)
    plain = make_tiny_ip_adapter(tmp_path / "plain.safetensors", sd15)
    assert "was made for another base or image encoder: its ip_adapter.0.to_k_ip.weight is not there" in refused(
        bases / "dev", plain
    )


@pytest.mark.parametrize(
    "backend", [pytest.param("openvino", marks=pytest.mark.slow), pytest.param("onnxruntime", marks=pytest.mark.long)]
)
def test_engines_read_a_reference_as_torch_does(bases: Path, tmp_path: Path, backend: Any) -> None:
    options = BuildOptions(
        base=str(bases / "schnell"), out=tmp_path / "out", backend=backend, batch_sizes=(1, 2), sizes=(SIZE,),
        sampler="flow-euler", reference=str(_adapter(bases, "schnell")),
    )  # fmt: skip
    manifest = build_engine(options, print)
    for part in ("reference_encoder", "denoiser", "denoiser at scale 0"):
        assert manifest.max_error[part] <= 1e-4
    assert not isinstance(manifest.stock, str)
    assert manifest.stock.error <= 1e-4
    engine, model = open_bundle(tmp_path / "out"), _model(bases, "schnell")
    for scale in (None, 0.0, 0.7):
        np.testing.assert_allclose(_made(engine, scale), _made(model, scale), atol=1e-4, rtol=0)


def test_the_settings_of_an_image_encoder_within_clip_are_checked(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    config = {"model_type": "clip", "vision_config": {**CLIPVisionConfig().to_dict(), "made_up": 7}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors.torch.save({"x": torch.ones(1)}))
    found = find_adapter(str(_adapter(bases, "dev")), str(folder))
    family = family_of(bases / "dev")
    with pytest.raises(ModelError, match=r"config.json: vision_config: nothing reads the setting 'made_up' = 7"):
        check_adapter(found, family, bases / "dev", family.read_spec(bases / "dev"))
