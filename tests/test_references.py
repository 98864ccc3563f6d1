"""IP-Adapters on tiny random weights: diffusers' own pipelines against ours, and the engines against torch."""

import functools
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Once
from numpy.typing import NDArray
from PIL import Image
from tiny import (
    IMAGE_SIDE,
    MODELS,
    make_tiny_controlnet,
    make_tiny_image_encoder,
    make_tiny_ip_adapter,
    make_tiny_sd15,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flashdiff import cli
from flashdiff.cli.generate import _reference
from flashdiff.components import Components, Size
from flashdiff.config import parse_record
from flashdiff.controls import ControlRequest
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.config import BuildOptions, BuildRecipe
from flashdiff.engines.describe import describe
from flashdiff.engines.export import trace
from flashdiff.engines.parts import parts_of, random_inputs
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.shapes import bucket_shapes, dimensions_of
from flashdiff.errors import ConfigError, ModelError, RequestError
from flashdiff.families import family_of, sdxl
from flashdiff.families.base import TorchModel
from flashdiff.families.control import with_controls
from flashdiff.families.ip_adapter import as_clip_normalizes, find_adapter, with_adapter
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.orders import Order, Pixels
from flashdiff.pictures import as_clip_reads
from flashdiff.references import ReferenceRequest, referred, unreferred
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

PROMPT, SEED, STEPS = "a red dog", 3, 4
FAMILIES = ("sd15", "sdxl")
PIPELINES = {
    "sd15": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}
_random = np.random.default_rng(0)
FACE, OTHER = (_random.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8) for _ in range(2))
IMAGE = _random.integers(0, 256, (32, 32, 3), dtype=np.uint8)


NOISE = torch.from_numpy(image_noise(SEED, 0, (4, 8, 8)))[None]


def _use_noise(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a pipeline draw our noise, and take the mean of what its autoencoder gives."""
    module = inspect.getmodule(type(pipeline))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: NOISE)
    take = module.retrieve_latents  # type: ignore[union-attr]
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, *_, **__: take(encoded, sample_mode="argmax"))


@pytest.fixture(scope="module")
def bases(once: Once) -> dict[str, Path]:
    return {family: once(f"families/{family}", MODELS[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(once: Once, bases: dict[str, Path]) -> dict[str, Path]:
    """By family, and `family-plus`."""

    def make(folder: Path) -> None:
        for family, base in bases.items():
            make_tiny_ip_adapter(folder / f"{family}.safetensors", base)
            make_tiny_ip_adapter(folder / f"{family}-plus.safetensors", base, plus=True)

    folder = once("ip-adapters", make)
    return {file.stem: file for file in folder.glob("*.safetensors")}


def _model(base: Path, guidance: float, adapter: Path) -> TorchModel:
    family, model = load_fused(str(base), (), SamplingOptions(sampler="ddim", guidance=guidance))
    return with_adapter(family, model, find_adapter(str(adapter), None))


def _order(model: Components, reference: Pixels | None = None, scale: float = 1.0, **options: Any) -> Order:
    given = None if reference is None else ReferenceRequest(image=reference, scale=scale)
    return check_order(model.spec, prompt=PROMPT, seed=SEED, steps=STEPS, reference=given, **options)


def _made(model: Components, *reference: Any, **options: Any) -> tuple[NDArray[np.float32], Pixels]:
    """The latents [C, h, w] and the pixels of the first image."""
    row, pixels = generate_rows(model, [_order(model, *reference, **options)])[0][0]
    return row.latents, pixels


@pytest.fixture(scope="module")
def stock(bases: dict[str, Path], adapters: dict[str, Path]) -> Callable[..., Any]:
    """Makes the latents of diffusers' pipeline, with our noise; the pipelines are opened once."""

    @functools.cache
    def opened(adapter: str) -> Any:
        family, file = adapter.partition("-")[0], adapters[adapter]
        pipeline: Any = getattr(diffusers, PIPELINES[family][0]).from_pretrained(bases[family])
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        pipeline.load_ip_adapter(file.parent, subfolder="", weight_name=file.name)
        return pipeline

    def made(adapter: str, kind: int, scale: float, guidance: float, monkeypatch: Any, **call: Any) -> Any:
        pipeline = opened(adapter)
        if kind:
            pipeline = getattr(diffusers, PIPELINES[adapter.partition("-")[0]][kind])(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
            _use_noise(pipeline, monkeypatch)
        else:
            call["latents"] = NOISE
        if kind != 1:
            call |= {"height": 32, "width": 32}
        pipeline.set_ip_adapter_scale(scale)
        given = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent", **call}
        return pipeline(PROMPT, ip_adapter_image=Image.fromarray(FACE), **given).images[0].numpy()

    return made


@pytest.mark.parametrize(
    "adapter",
    ["sd15", pytest.param("sd15-plus", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow), "sdxl-plus"],
)
def test_a_reference_is_read_as_in_the_stock_pipeline(
    bases: dict[str, Path],
    adapters: dict[str, Path],
    stock: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
) -> None:
    model = _model(bases[adapter.partition("-")[0]], 3.0, adapters[adapter])
    for scale, guidance in ((0.0, 3.0), (0.5, 3.0), (1.0, 3.0), (1.0, 1.0)):
        sampler = model.spec.sampler.model_copy(update={"guidance": guidance})
        model.spec = model.spec.model_copy(update={"sampler": sampler})
        found = _made(model, FACE, scale)[0]
        np.testing.assert_allclose(found, stock(adapter, 0, scale, guidance, monkeypatch), atol=1e-4, rtol=0)
        change = np.abs(found - _made(model)[0]).max()
        assert change > 0.05 if scale else change == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_goes_with_an_image_and_with_a_mask(
    bases: dict[str, Path],
    adapters: dict[str, Path],
    stock: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    model, image = _model(bases[family], 3.0, adapters[family]), Image.fromarray(IMAGE)
    found = _made(model, FACE, 0.5, inputs={"image": IMAGE}, parameters={"strength": 0.5})[0]
    expected = stock(family, 1, 0.5, 3.0, monkeypatch, image=image, strength=0.5)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    mask = np.zeros((32, 32, 3), dtype=np.uint8)
    mask[:16] = 255
    found = _made(model, FACE, 0.5, inputs={"image": IMAGE, "mask": mask}, parameters={"strength": 0.5})[0]
    expected = stock(family, 2, 0.5, 3.0, monkeypatch, image=image, mask_image=Image.fromarray(mask), strength=0.5)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_rows_with_and_without_a_reference_share_steps_and_have_the_pixels_that_they_have_alone(
    bases: dict[str, Path], adapters: dict[str, Path]
) -> None:
    model = _model(bases["sd15"], 3.0, adapters["sd15-plus"])
    orders = [_order(model), _order(model, FACE), _order(model, OTHER, 0.5), _order(model, FACE, 0.0)]
    calls: list[tuple[str, int]] = []
    call = model.call

    def count(part: str, inputs: Any) -> Any:
        calls.append((part, len(next(iter(inputs.values())))))
        return call(part, inputs)

    model.call = count  # type: ignore[method-assign]
    together = [pixels for (pixels,) in generate(model, orders)]
    assert calls.count(("denoiser", 8)) == STEPS
    for order, pixels in zip(orders, together, strict=True):
        np.testing.assert_allclose(pixels.astype(float), generate(model, [order])[0][0].astype(float), atol=1)
    assert len({pixels.tobytes() for pixels in together[:3]}) == 3
    np.testing.assert_array_equal(together[0], together[3])
    plain = load_fused(str(bases["sd15"]), (), SamplingOptions(sampler="ddim", guidance=3.0))[1]
    np.testing.assert_allclose(together[0].astype(float), generate(plain, [_order(plain)])[0][0].astype(float), atol=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_goes_with_a_control(bases: dict[str, Path], adapters: dict[str, Path], once: Once, family: str) -> None:
    edges = once(f"edges-{family}", lambda folder: make_tiny_controlnet(folder, bases[family]))
    model = with_controls(family_of(bases[family]), _model(bases[family], 3.0, adapters[family]), {"edges": edges})
    network = diffusers.ControlNetModel.from_pretrained(edges)
    kind = {"sd15": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}[family]
    pipeline: Any = getattr(diffusers, kind).from_pretrained(bases[family], controlnet=network)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.load_ip_adapter(adapters[family].parent, subfolder="", weight_name=adapters[family].name)
    pipeline.set_ip_adapter_scale(0.5)
    expected = pipeline(
        PROMPT, image=Image.fromarray(IMAGE), ip_adapter_image=Image.fromarray(FACE), controlnet_conditioning_scale=0.7,
        latents=NOISE, num_inference_steps=STEPS, guidance_scale=3.0,
        height=32, width=32, output_type="latent",
    ).images[0]  # fmt: skip
    control = ControlRequest(name="edges", image=IMAGE, scale=0.7)
    found = _made(model, FACE, 0.5, controls=[control])[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)
    assert np.abs(found - _made(model, FACE, 0.5)[0]).max() > 0.05
    assert np.abs(found - _made(model, controls=[control])[0]).max() > 0.05


@pytest.mark.parametrize(("task", "channels"), [("inpainting", 9), ("edit", 8)])
def test_a_reference_goes_with_the_inputs_of_networks_that_were_trained_for_a_task(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, channels: int
) -> None:
    base = make_tiny_sd15(tmp_path / "base", in_channels=channels)
    kind = {"inpainting": "StableDiffusionInpaintPipeline", "edit": "StableDiffusionInstructPix2PixPipeline"}[task]
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.load_ip_adapter(adapters["sd15"].parent, subfolder="", weight_name="sd15.safetensors")
    pipeline.set_ip_adapter_scale(0.5)
    _use_noise(pipeline, monkeypatch)
    mask = np.zeros((32, 32, 3), dtype=np.uint8)
    mask[5:27, 9:20] = 255
    images = {"image": IMAGE, "mask": mask} if task == "inpainting" else {"image": IMAGE}
    given: dict[str, Any] = {"mask_image": Image.fromarray(mask), "height": 32, "width": 32} if "mask" in images else {}
    expected = pipeline(
        PROMPT, image=Image.fromarray(IMAGE), ip_adapter_image=Image.fromarray(FACE), num_inference_steps=STEPS,
        guidance_scale=3.0, output_type="latent", **given,
    ).images[0]  # fmt: skip
    found = _made(_model(base, 3.0, adapters["sd15"]), FACE, 0.5, inputs=images)[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (40, 31), (31, 40), (7, 9), (16, 300), (700, 16), (33, 33)])
def test_images_are_read_as_clips_image_processor_reads_them(size: tuple[int, int]) -> None:
    width, height = size
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8))
    wanted = CLIPImageProcessorPil(size=IMAGE_SIDE, crop_size=IMAGE_SIDE)(picture, return_tensors="np").pixel_values[0]
    factor, offset = (values.numpy()[0] for values in as_clip_normalizes())
    images = as_clip_reads(picture, IMAGE_SIDE).transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1
    # A picture many times as long as it is high is scaled without the parts that are cut off: a level may differ.
    atol = 1e-5 if max(size) <= 16 * min(size) else 1.01 / 255 / 0.26
    np.testing.assert_allclose(images * factor + offset, wanted, atol=atol, rtol=0)


def test_no_part_makes_a_tensor_in_a_call(
    bases: dict[str, Path], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph cannot capture one: it is copied from the host."""
    model = _model(bases["sd15"], 3.0, adapters["sd15-plus"])
    parts = [p for p in parts_of(family_of(bases["sd15"]), model) if p.name in ("reference_encoder", "denoiser")]
    inputs = [random_inputs(model, part, 1, model.spec.sizes[0], torch.Generator().manual_seed(3)) for part in parts]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor from Python's numbers")

    monkeypatch.setattr(torch, "tensor", refuse)
    with torch.no_grad():
        for part, given in zip(parts, inputs, strict=True):
            part.module(*given)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"image": None}, r"reference.image: None is not allowed; a reference needs an image"),
        ({"scale": float("nan")}, r"reference.scale: nan is not allowed; it must be between 0 and 2"),
        ({"scale": 2.5}, r"reference.scale: 2.5 is not allowed; it must be between 0 and 2"),
        ({"scale": -0.5}, r"reference.scale: -0.5 is not allowed; it must be between 0 and 2"),
        ({"scale": 10**400}, r"reference.scale: inf is not allowed; it must be between 0 and 2"),
        ({"image": FACE[:8]}, r"reference.image: '16x8' is not allowed; it must have 16x16 pixels"),
    ],
)
def test_a_reference_that_makes_no_sense_is_refused(bases: dict[str, Path], reference: Any, message: str) -> None:
    spec = referred(family_of(bases["sd15"]).read_spec(bases["sd15"]), (4, 32), IMAGE_SIDE)
    with pytest.raises(RequestError, match=message):
        check_order(spec, prompt=PROMPT, reference=ReferenceRequest(**{"image": FACE, **reference}))


def test_a_model_without_an_adapter_refuses_a_reference(bases: dict[str, Path]) -> None:
    spec = family_of(bases["sd15"]).read_spec(bases["sd15"])
    with pytest.raises(RequestError, match=r"reference: 'an image' is not allowed; this model takes none: build-engine --refer"):
        check_order(spec, prompt=PROMPT, reference=ReferenceRequest(image=FACE))


def test_a_spec_without_its_reference_is_the_one_it_was(bases: dict[str, Path]) -> None:
    spec = family_of(bases["sd15"]).read_spec(bases["sd15"])
    assert unreferred(referred(spec, (4, 32), IMAGE_SIDE)) == spec


def test_an_adapter_that_does_not_fit_is_refused_when_the_build_is_planned(
    bases: dict[str, Path], adapters: dict[str, Path], once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(base: Path, adapter: Path | str, encoder: Path | str | None = None) -> None:
        plan_build(
            BuildOptions(
                base=str(base), out=tmp_path / "out", backend="torch", reference=str(adapter),
                reference_encoder=encoder and str(encoder),
            )
        )  # fmt: skip

    def edited(name: str, change: Callable[[dict[str, torch.Tensor]], object], source: str = "sd15") -> Path:
        tensors = safetensors.torch.load_file(adapters[source])
        change(tensors)
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    encoder = adapters["sd15"].parent / "image_encoder"
    sd15 = bases["sd15"]
    with pytest.raises(ModelError, match=r"its ip_adapter.1.to_k_ip.weight is \[32, 64\], sd15 needs \[32, 32\] \(the ada"):
        plan(sd15, adapters["sdxl"])
    with pytest.raises(ModelError, match=r"its ip_adapter.1.to_k_ip.weight is \[32, 32\], sdxl needs \[32, 64\]"):
        plan(bases["sdxl"], adapters["sd15-plus"])
    other = make_tiny_image_encoder(tmp_path / "other", projection_dim=20, hidden_size=16)
    with pytest.raises(ModelError, match=r"image_proj.proj.weight is \[128, 24\], sd15 with other .* needs \[128, 20\]"):
        plan(sd15, adapters["sd15"], other)
    with pytest.raises(ModelError, match=r"proj_in.weight is \[64, 32\], other \(the image encoder\) needs \[64, 16\]"):
        plan(sd15, adapters["sd15-plus"], other)
    with pytest.raises(ModelError, match=r"its ip_adapter.3.to_v_ip.weight is not there, sd15 needs \[32, 32\]"):
        plan(sd15, edited("short", lambda tensors: tensors.pop("ip_adapter.3.to_v_ip.weight")), encoder)
    with pytest.raises(ModelError, match=r"sd15 has no layer for its ip_adapter.99.to_k_ip.weight"):
        plan(sd15, edited("long", lambda tensors: tensors.update({"ip_adapter.99.to_k_ip.weight": torch.ones(2)})), encoder)
    deep = edited("deep", lambda tensors: tensors.update({"image_proj.layers.4.1.0.weight": torch.ones(2)}), "sd15-plus")
    with pytest.raises(ModelError, match=r"its Resampler has 5 blocks; 4 are supported"):
        plan(sd15, deep, encoder)
    with pytest.raises(ModelError, match=r"its image_proj.norm.weight is not there, sd15 needs \[32\]"):
        plan(sd15, edited("bare", lambda tensors: tensors.pop("image_proj.norm.weight")), encoder)

    def projected(name: str, first: str, *shape: int) -> Path:
        layers = {f"image_proj.{first}.weight": torch.ones(shape), "image_proj.proj.2.weight": torch.ones(8, shape[0])}
        return edited(name, lambda tensors: (tensors.pop("image_proj.proj.weight"), tensors.update(layers)))

    for face in (projected("face", "proj.0", 4, 512), projected("face-plus", "perceiver_resampler.proj_in", 4, 24)):
        with pytest.raises(ModelError, match=r"a FaceID adapter, which reads a face network's features; the plain form and"):
            plan(sd15, face, encoder)
    with pytest.raises(ModelError, match=r"it makes its tokens by several layers .* InstantX's adapter of FLUX .*; the plain"):
        plan(sd15, projected("instantx", "proj.0", 48, 24), encoder)
    with pytest.raises(ModelError, match=r"no IP-Adapter: it needs tensors image_proj.\* and ip_adapter.\*, and has "):
        plan(sd15, sd15 / "unet" / "diffusion_pytorch_model.safetensors", encoder)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"noise.safetensors: damaged, or no safetensors file"):
        plan(sd15, tmp_path / "noise.safetensors", encoder)
    with pytest.raises(
        ModelError, match=r"--reference ip-adapter_sd15.bin: a pickle, which may run any program; take the .safete"
    ):
        plan(sd15, "ip-adapter_sd15.bin")
    with pytest.raises(ModelError, match=r"--reference nowhere.safetensors: there is no such file"):
        plan(sd15, "nowhere.safetensors")
    with pytest.raises(ModelError, match=r"a folder; give the adapter's .safetensors file in it"):
        plan(sd15, adapters["sd15"].parent)
    with pytest.raises(ModelError, match=r"name the image encoder's folder with --reference-encoder"):
        plan(sd15, edited("alone", lambda tensors: None))
    with pytest.raises(ModelError, match=r"'model_type' is 'clip_text_model'; an IP-Adapter's image encoder is a CLIPV"):
        plan(sd15, adapters["sd15"], sd15 / "text_encoder")
    with pytest.raises(ModelError, match=r"--reference-encoder nowhere: there is no such folder"):
        plan(sd15, adapters["sd15"], "nowhere")
    with pytest.raises(ModelError, match=r"models of the family pixart take no IP-Adapter; those that do: sd15, sdxl, flux$"):
        plan(once("families/pixart", MODELS["pixart"]), adapters["sd15"])
    monkeypatch.setattr(sdxl, "FAMILY", replace(sdxl.FAMILY, references=None))
    with pytest.raises(ModelError, match=r"; those that do: sd15, flux$"):
        plan(once("families/pixart", MODELS["pixart"]), adapters["sd15"])
    assert plan_build(BuildOptions(base=str(sd15), out=tmp_path / "out", backend="torch", reference=str(adapters["sd15"]))).inputs


def test_an_image_encoder_without_an_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reference_encoder is folder: it is for an IP-Adapter, and reference names none"):
        parse_record({"base": "b", "reference_encoder": "folder"}, BuildRecipe, source="build-engine")


@pytest.mark.parametrize(
    ("adapter", "backend"),
    [
        pytest.param("sd15", "openvino", marks=pytest.mark.long),
        pytest.param("sdxl-plus", "onnxruntime", marks=pytest.mark.long),
        pytest.param("sd15-plus", "torch", marks=pytest.mark.slow),
    ],
)
def test_engines_read_a_reference_as_torch_does(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, adapter: str, backend: str
) -> None:
    family = adapter.partition("-")[0]
    options = BuildOptions(
        base=str(bases[family]), out=tmp_path / "out", backend=backend, batch_sizes=(1, 4), sampler="ddim", guidance=3,
        reference=str(adapters[adapter]),
    )  # fmt: skip
    manifest = build_engine(options, print)
    assert manifest.max_error["reference_encoder"] <= 1e-4
    assert manifest.max_error["denoiser"] <= 1e-4
    assert manifest.max_error["denoiser at scale 0"] <= 1e-4
    assert not isinstance(manifest.stock, str)
    assert manifest.stock.error <= 1e-4
    assert manifest.reference
    assert manifest.reference.kind == ("plus" if "plus" in adapter else "plain")
    lines = [*describe(tmp_path / "out", manifest)]
    assert any(line.startswith(f"reference    {adapter}.safetensors ({manifest.reference.kind} IP-Adapter, ") for line in lines)
    assert any(line.startswith("             read by ip-adapters/image_encoder (") for line in lines)
    assert plan_build(options).changes == []
    again = make_tiny_ip_adapter(tmp_path / "new" / "again.safetensors", bases[family], plus="plus" in adapter, seed=6)
    changes = plan_build(options.model_copy(update={"reference": str(again)})).changes
    assert [change.partition(":")[0] for change in changes] == ["the IP-Adapter changed"]
    changes = plan_build(options.model_copy(update={"reference": None})).changes
    assert changes == [f"the IP-Adapter {adapter}.safetensors was removed"]
    engine, model = open_bundle(tmp_path / "out"), _model(bases[family], 3.0, adapters[adapter])
    for given in ((), (FACE, 0.7), (OTHER, 1.0)):
        np.testing.assert_allclose(_made(engine, *given)[0], _made(model, *given)[0], atol=1e-4, rtol=0)
    if backend == "onnxruntime" and importlib.util.find_spec("tensorrt_rtx"):
        _build_plans(tmp_path / "out", tmp_path)


def _build_plans(bundle: Path, place: Path) -> None:
    """TensorRT-RTX takes the graphs of the parts that a reference changes."""
    from flashdiff.engines.backends.tensorrt_builder import build_plan

    manifest = read_manifest(bundle)
    dimensions = dimensions_of(manifest.model, manifest.sizes[0], 2)
    for name in ("reference_encoder", "denoiser"):
        part, plan = manifest.parts[name], place / f"{name}.plan"
        graph, shapes = bundle / part.file_for(manifest.sizes[0], 2), bucket_shapes(part.inputs, dimensions)
        build_plan("tensorrt-rtx", graph, shapes, plan, timings=place / "timings", version_compatible=False, report=print)
        assert plan.stat().st_size > 10_000


def test_the_command_line_reads_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("face.png", "a:0.5"):
        Image.fromarray(FACE).save(tmp_path / name, "PNG")
    for text, scale in (("face.png", 1), ("face.png:0.8", 0.8), ("a:0.5", 1), ("a:0.5:2", 2), ("face.png:nan", float("nan"))):
        reference = _reference(f"{tmp_path / text}")
        np.testing.assert_equal(reference.scale, scale)
        assert callable(reference.image)
        np.testing.assert_array_equal(reference.image(Size(IMAGE_SIDE, IMAGE_SIDE)), FACE)
    for text in ("", "nowhere.png:0.5", "nowhere.png:x"):
        with pytest.raises((ConfigError, OSError), match=r"give FILE\[:SCALE\]|there is no such file"):
            _reference(text)
    command = ["generate", "--base", "nowhere", "x", "-o", str(tmp_path / "x.png"), "--reference", str(tmp_path / "face.png")]
    assert cli.main(command) == 2
    assert "build a bundle with build-engine --reference first" in capsys.readouterr().err
    assert cli.main(["serve", "avatars", "--reference", "adapter.safetensors"]) == 2
    assert "--reference is settled when a bundle is built" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_known_times_takes_no_scale_for_a_time(bases: dict[str, Path], adapters: dict[str, Path]) -> None:
    sampling = SamplingOptions(sampler="lcm", timesteps=(999, 499), guidance=1)
    family, model = load_fused(str(bases["sd15"]), (), sampling)
    model = with_adapter(family, model, find_adapter(str(adapters["sd15"]), None))
    assert model.spec.sampler.known_times
    part = next(part for part in parts_of(family, model) if part.name == "denoiser")
    *own, tokens, scale = random_inputs(model, part, 3, model.spec.sizes[0], torch.Generator().manual_seed(3))
    traced = trace(model, part, model.spec.sizes[0], "fp32").module()
    with torch.no_grad():
        expected = part.module(*own, tokens, scale)
        for inputs in ((*own, tokens, scale), (*own, tokens.flip(0), scale), (*own, tokens, 1 - scale)):
            torch.testing.assert_close(traced(*inputs), part.module(*inputs), atol=1e-5, rtol=0)
        assert (part.module(*own, tokens, 1 - scale) - expected).abs().max() > 1e-3
