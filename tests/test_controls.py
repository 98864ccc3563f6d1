"""ControlNets and T2I-adapters on tiny random weights: diffusers' own pipelines against ours, and the engines against torch."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from numpy.typing import NDArray
from PIL import Image
from tiny import make_tiny_controlnet, make_tiny_sd15, make_tiny_sdxl

from flashdiff import cli
from flashdiff.components import Components, Size
from flashdiff.config import parse_record
from flashdiff.controls import ControlRequest, steered, unsteered
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions, BuildRecipe
from flashdiff.engines.describe import describe, describe_errors
from flashdiff.engines.export import trace
from flashdiff.engines.parts import parts_of, random_inputs
from flashdiff.engines.plan import plan_build
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError, ModelError, RequestError
from flashdiff.families import family_of
from flashdiff.families.base import TorchModel
from flashdiff.families.control import check_control, with_controls
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.orders import Order, Pixels
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

THREE_LEVELS = {  # SDXL's own form: its adapter's fourth feature joins in the middle
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
PROMPT, SEED, STEPS = "a red dog", 3, 4
MAKE = {"sd15": make_tiny_sd15, "sdxl": make_tiny_sdxl}
CONTROLNET = {"sd15": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}
CONTROLNET_IMAGE = {"sd15": "StableDiffusionControlNetImg2ImgPipeline", "sdxl": "StableDiffusionXLControlNetImg2ImgPipeline"}
ADAPTER = {"sd15": "StableDiffusionAdapterPipeline", "sdxl": "StableDiffusionXLAdapterPipeline"}
T2I = [
    ("sd15", "t2i"),
    ("sd15", "t2i-grey"),
    ("sd15-even", "t2i-light"),
    ("sdxl-late", "t2i-xl"),
    ("sdxl-three", "t2i-xl-four"),
]
"""Bases and their adapters."""
_random = np.random.default_rng(0)
EDGES, POSE, IMAGE = (_random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3))
GREY: Pixels = np.repeat(_random.integers(0, 256, (32, 32, 1), dtype=np.uint8), 3, axis=2)


def _adapter(
    folder: Path, kind: str = "full_adapter", in_channels: int = 3, factor: int = 4, channels: Sequence[int] = (32, 64)
) -> Path:
    torch.manual_seed(1)
    T2IAdapter(in_channels, list(channels), num_res_blocks=1, downscale_factor=factor, adapter_type=kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    bases = {family: make(folder / family) for family, make in MAKE.items()}
    for family, base in bases.items():
        make_tiny_controlnet(folder / f"{family}-edges", base)
        make_tiny_controlnet(folder / f"{family}-pose", base, seed=5)
    # As SDXL's own UNet: its first level has no attention.
    late = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    make_tiny_sdxl(folder / "sdxl-late", **late)
    make_tiny_sdxl(folder / "sdxl-three", **THREE_LEVELS)
    make_tiny_sd15(folder / "sd15-even", block_out_channels=(32, 32))
    _adapter(folder / "t2i")
    _adapter(folder / "t2i-xl", "full_adapter_xl", factor=8)
    _adapter(folder / "t2i-xl-four", "full_adapter_xl", factor=8, channels=(32, 64, 64, 64))
    _adapter(folder / "t2i-grey", "light_adapter", in_channels=1)
    _adapter(folder / "t2i-light", "light_adapter", channels=(32,))
    return {**bases, **{path.name: path for path in folder.iterdir()}}


def _model(base: Path, guidance: float, **controls: Path) -> TorchModel:
    return with_controls(*load_fused(str(base), (), SamplingOptions(sampler="ddim", guidance=guidance)), controls)


def _order(model: Components, *controls: ControlRequest, **options: Any) -> Order:
    return check_order(model.spec, prompt=PROMPT, seed=SEED, steps=STEPS, controls=controls, **options)


def _made(model: Components, *controls: ControlRequest, **options: Any) -> tuple[NDArray[np.float32], Pixels]:
    """The latents [C, h, w] and the pixels of the first image."""
    row, pixels = generate_rows(model, [_order(model, *controls, **options)])[0][0]
    return row.latents, pixels


def _stock(kind: str, base: Path, guidance: float, networks: dict[str, Any], monkeypatch: Any, **call: Any) -> list[Any]:
    """The latents and the pixels of diffusers' pipeline, with our noise."""
    pipeline: Any = getattr(diffusers, kind).from_pretrained(base, **networks)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = torch.from_numpy(image_noise(SEED, 0, (4, 8, 8)))[None]
    if "Img2Img" in kind:
        module = inspect.getmodule(type(pipeline))
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
        take = module.retrieve_latents  # type: ignore[union-attr]
        monkeypatch.setattr(module, "retrieve_latents", lambda encoded, *_, **__: take(encoded, sample_mode="argmax"))
    else:
        call["latents"] = noise
    given = {"num_inference_steps": STEPS, "guidance_scale": guidance, "height": 32, "width": 32, **call}
    results = [pipeline(PROMPT, output_type=kind, **given).images[0] for kind in ("latent", "np")]
    return [results[0].numpy(), results[1]]


def _assert_equal(ours: tuple[NDArray[np.float32], Pixels], stock: Sequence[Any]) -> None:
    np.testing.assert_allclose(ours[0], stock[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours[1], 255 * stock[1], atol=0.51)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("family", MAKE)
def test_a_controlnet_steers_as_in_the_stock_pipeline(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, guidance: float
) -> None:
    model = _model(bases[family], guidance, edges=bases[f"{family}-edges"])
    control = ControlRequest(name="edges", image=EDGES, scale=0.7, start=0.25, end=0.75)
    network = ControlNetModel.from_pretrained(bases[f"{family}-edges"])
    stock = _stock(
        CONTROLNET[family], bases[family], guidance, {"controlnet": network}, monkeypatch, image=Image.fromarray(EDGES),
        controlnet_conditioning_scale=0.7, control_guidance_start=0.25, control_guidance_end=0.75,
    )  # fmt: skip
    ours = _made(model, control)
    _assert_equal(ours, stock)
    assert np.abs(ours[0] - _made(model)[0]).max() > 0.05


@pytest.mark.parametrize("family", MAKE)
def test_two_controlnets_add_up_and_start_from_an_image(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    places = {name: bases[f"{family}-{name}"] for name in ("edges", "pose")}
    model = _model(bases[family], 3.0, **places)
    networks = [ControlNetModel.from_pretrained(place) for place in places.values()]
    scales = {
        "controlnet_conditioning_scale": [0.5, 1.0],
        "control_guidance_start": [0.0, 0.5],
        "control_guidance_end": [1.0, 1.0],
    }
    controls = (
        ControlRequest(name="pose", image=POSE, start=0.5),
        ControlRequest(name="edges", image=EDGES, scale=0.5),
    )
    images = [Image.fromarray(EDGES), Image.fromarray(POSE)]
    stock = _stock(CONTROLNET[family], bases[family], 3.0, {"controlnet": networks}, monkeypatch, image=images, **scales)
    _assert_equal(_made(model, *controls), stock)
    stock = _stock(
        CONTROLNET_IMAGE[family], bases[family], 3.0, {"controlnet": networks}, monkeypatch, image=Image.fromarray(IMAGE),
        control_image=images, strength=0.5, **scales,
    )  # fmt: skip
    _assert_equal(_made(model, *controls, inputs={"image": IMAGE}, parameters={"strength": 0.5}), stock)


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@pytest.mark.parametrize("guidance", [3.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("base", "kind"), T2I)
def test_a_t2i_adapter_steers_as_in_the_stock_pipeline(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, base: str, kind: str, guidance: float
) -> None:
    family = base.partition("-")[0]
    model, pixels = _model(bases[base], guidance, sketch=bases[kind]), GREY if kind == "t2i-grey" else EDGES
    adapter = T2IAdapter.from_pretrained(bases[kind])
    image = Image.fromarray(pixels).convert("L" if kind == "t2i-grey" else "RGB")
    stock = _stock(
        ADAPTER[family], bases[base], guidance, {"adapter": adapter}, monkeypatch, image=image, adapter_conditioning_scale=0.8,
        **({"adapter_conditioning_factor": 0.5} if family == "sdxl" else {}),
    )  # fmt: skip
    ours = _made(model, ControlRequest(name="sketch", image=pixels, scale=0.8, end=0.5 if family == "sdxl" else 1.0))
    _assert_equal(ours, stock)
    assert np.abs(ours[0] - _made(model)[0]).max() > 0.02


def test_no_network_makes_a_tensor_in_a_step(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph cannot capture one: it is copied from the host."""
    model = _model(bases["sd15"], 3.0, edges=bases["sd15-edges"], sketch=bases["t2i-grey"])
    family, spec = family_of(bases["sd15"]), model.spec
    part = next(part for part in parts_of(family, model) if part.name == "denoiser_control")
    inputs = random_inputs(model, part, 1, spec.sizes[0], torch.Generator().manual_seed(3))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor from Python's numbers")

    monkeypatch.setattr(torch, "tensor", refuse)
    with torch.no_grad():
        part.module(*inputs)


def test_rows_with_and_without_controls_share_no_step_and_have_the_pixels_that_they_have_alone(bases: dict[str, Path]) -> None:
    model = _model(bases["sd15"], 3.0, edges=bases["sd15-edges"], sketch=bases["t2i"])
    orders = [
        _order(model),
        _order(model, ControlRequest(name="edges", image=EDGES)),
        _order(model, ControlRequest(name="sketch", image=EDGES, end=0.5)),
        _order(model, ControlRequest(name="edges", image=EDGES, scale=0)),
    ]
    calls: list[tuple[str, int]] = []
    call = model.call

    def count(part: str, inputs: Any) -> Any:
        calls.append((part, len(next(iter(inputs.values())))))
        return call(part, inputs)

    model.call = count  # type: ignore[method-assign]
    together = [pixels for (pixels,) in generate(model, orders)]
    assert calls.count(("denoiser", 2)) == STEPS
    assert calls.count(("denoiser_control", 6)) == STEPS
    for order, pixels in zip(orders, together, strict=True):
        np.testing.assert_allclose(pixels.astype(float), generate(model, [order])[0][0].astype(float), atol=1)
    np.testing.assert_allclose(together[3].astype(float), together[0].astype(float), atol=1)
    assert len({pixels.tobytes() for pixels in together[:3]}) == 3


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ([{"name": "depth"}], r"controls.name: 'depth' is not allowed; this model takes edges"),
        ([{}, {}], r"controls.name: 'edges' is not allowed; it is given twice"),
        ([{"image": None}], r"controls.edges.image: None is not allowed; a control needs an image"),
        ([{"scale": float("nan")}], r"controls.edges.scale: nan is not allowed; it must be between 0 and 2"),
        ([{"scale": 2.5}], r"controls.edges.scale: 2.5 is not allowed; it must be between 0 and 2"),
        ([{"scale": 10**400}], r"controls.edges.scale: inf is not allowed; it must be between 0 and 2"),
        ([{"start": -(10**400)}], r"controls.edges.start: -inf is not allowed; it must be between 0 and 1"),
        ([{"scale": -1}], r"controls.edges.scale: -1 is not allowed; it must be between 0 and 2"),
        ([{"start": -0.5}], r"controls.edges.start: -0.5 is not allowed; it must be between 0 and 1"),
        ([{"end": float("inf")}], r"controls.edges.end: inf is not allowed; it must be between 0 and 1"),
        ([{"start": 0.5, "end": 0.5}], r"controls.edges.start: 0.5 is not allowed; it must be below the end, 0.5"),
        ([{"image": EDGES[:16]}], r"controls.edges.image: '32x16' is not allowed; it must have 32x32 pixels"),
    ],
)
def test_a_control_that_makes_no_sense_is_refused(bases: dict[str, Path], controls: list[Any], message: str) -> None:
    spec = steered(family_of(bases["sd15"]).read_spec(bases["sd15"]), ["edges"])
    given = [ControlRequest(**{"name": "edges", "image": EDGES, **control}) for control in controls]
    with pytest.raises(RequestError, match=message):
        check_order(spec, prompt=PROMPT, controls=given)


def test_a_control_that_counts_in_no_step_is_refused(bases: dict[str, Path]) -> None:
    spec = steered(family_of(bases["sd15"]).read_spec(bases["sd15"]), ["edges"])
    control = ControlRequest(name="edges", image=EDGES, start=0.3, end=0.45)
    with pytest.raises(RequestError, match=r"controls.edges.end: 0.4.* no step of the 4 lies between 0.3 and 0.45"):
        check_order(spec, prompt=PROMPT, steps=4, controls=[control])
    assert check_order(spec, prompt=PROMPT, steps=20, controls=[control]).controls


def test_a_model_without_controls_refuses_them(bases: dict[str, Path]) -> None:
    spec = family_of(bases["sd15"]).read_spec(bases["sd15"])
    with pytest.raises(RequestError, match="controls: 'edges' is not allowed; this model takes none"):
        check_order(spec, prompt=PROMPT, controls=[ControlRequest(name="edges", image=EDGES)])


def test_a_control_of_another_base_is_refused_at_build(bases: dict[str, Path], tmp_path: Path) -> None:
    def plan(base: str, control: Path) -> None:
        plan_build(
            BuildOptions(base=str(bases[base]), out=tmp_path / "out", backend="torch", controls=(("edges", str(control)),))
        )

    with pytest.raises(ModelError, match=r"edges=.*another base: its cross_attention_dim is 64, sd15 needs 32 \(the control is "):
        plan("sd15", bases["sdxl-edges"])
    with pytest.raises(ModelError, match=r"another base: its cross_attention_dim is 32, sdxl needs 64"):
        plan("sdxl", bases["sd15-edges"])
    T2IAdapter(3, [32, 32], num_res_blocks=1, downscale_factor=4).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match=r"another base: its channels is \[32, 32\], sd15 needs \[32, 64\]"):
        plan("sd15", tmp_path / "narrow")
    T2IAdapter(3, [32, 64], num_res_blocks=1, downscale_factor=8).save_pretrained(tmp_path / "coarse")
    with pytest.raises(ModelError, match=r"another base: its downscale_factor is 8, sd15 needs 4"):
        plan("sd15", tmp_path / "coarse")
    with pytest.raises(ModelError, match="it is a UNet2DConditionModel; sd15 can be steered by ControlNetModel and T2IAdapter"):
        plan("sd15", bases["sd15"] / "unet")
    pooled = make_tiny_controlnet(tmp_path / "pooled", bases["sd15"])
    config = json.loads((pooled / "config.json").read_text())
    (pooled / "config.json").write_text(json.dumps(config | {"global_pool_conditions": True}))
    with pytest.raises(ModelError, match="'global_pool_conditions' is true, which is not supported; false or null is"):
        plan("sd15", pooled)
    with pytest.raises(ModelError, match=r"=nowhere: there is no such folder; .* 'avatars-edges', .* or a hub id"):
        plan("sd15", Path("nowhere"))
    with pytest.raises(ModelError, match=r"its adapter_type is full_adapter_xl, sd15 needs full_adapter or light_adapter"):
        plan("sd15", bases["t2i-xl"])
    with pytest.raises(ModelError, match=r"its adapter_type is full_adapter, sdxl-late needs full_adapter_xl"):
        plan("sdxl-late", bases["t2i"])
    with pytest.raises(ModelError, match=r"its channels with the level that it adds is \[32, 32\], sd15 needs \[32, 64\]"):
        plan("sd15", bases["t2i-light"])
    with pytest.raises(ModelError, match=r"its further levels .* is \[\(64, 16\), \(64, 16\)\], sdxl-late needs \[\(64, 8\)\]"):
        plan("sdxl-late", bases["t2i-xl-four"])
    for base, kind in T2I:
        family = family_of(bases[base])
        spec = family.read_spec(bases[base])
        assert check_control("sketch", bases[kind], family, bases[base], spec) == "T2IAdapter"


def test_the_command_line_reads_controls(tmp_path: Path) -> None:
    from flashdiff.cli.generate import _control

    for name in ("edges.png", "a:0.5"):
        Image.fromarray(EDGES).save(tmp_path / name, "PNG")
    for text, numbers in (
        ("edges.png", (1, 0, 1)),
        ("edges.png:0.8", (0.8, 0, 1)),
        ("edges.png:0.8:0.25", (0.8, 0.25, 1)),
        ("edges.png:0.8:0.25:0.75", (0.8, 0.25, 0.75)),
        ("a:0.5", (1, 0, 1)),
        ("a:0.5:2", (2, 0, 1)),
    ):
        control = _control(f"edges={tmp_path / text}")
        assert (control.name, control.scale, control.start, control.end) == ("edges", *numbers)
        assert callable(control.image)
        np.testing.assert_array_equal(control.image(Size(32, 32)), EDGES)
    with pytest.raises(ConfigError, match=r"--control 'edges': give NAME=FILE"):
        _control("edges")
    with pytest.raises(ConfigError, match=r"--control edges=nowhere.png:0.5: there is no such file"):
        _control("edges=nowhere.png:0.5")


def test_a_base_is_not_built_for_controls_that_it_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(EDGES).save(tmp_path / "edges.png")
    command = ["generate", "--base", "nowhere", "x", "-o", str(tmp_path / "x.png"), "--control", f"edges={tmp_path}/edges.png"]
    assert cli.main(command) == 2
    assert "build a bundle with build-engine --control first" in capsys.readouterr().err


def test_a_number_too_large_for_a_float_is_refused(bases: dict[str, Path]) -> None:
    spec = family_of(bases["sd15"]).read_spec(bases["sd15"])
    with pytest.raises(RequestError, match="strength: inf is not allowed"):
        check_order(spec, prompt=PROMPT, inputs={"image": IMAGE}, parameters={"strength": 10**400})


def test_names_of_controls_are_checked() -> None:
    for names, message in ((("Edges",), "'Edges' is no name: give up to 32 lowercase"), (("a", "a"), "'a' is the name of two")):
        with pytest.raises(ConfigError, match=message):
            parse_record({"base": "b", "controls": [(name, "c") for name in names]}, BuildRecipe, source="build-engine")


def test_the_error_at_scale_0_is_named_with_what_it_is_measured_from(bases: dict[str, Path]) -> None:
    spec = steered(family_of(bases["sd15"]).read_spec(bases["sd15"]), ["edges"])
    errors = {"denoiser": 1e-6, "denoiser_control": 2e-6, "denoiser_control at scale 0": 0.0, "image": 1e-7}
    assert describe_errors(spec, errors) == (
        "denoiser 1.0e-06, denoiser_control 2.0e-06, image 1.0e-07 off torch; "
        "denoiser_control at scale 0 0.0e+00 off the bundle's own denoiser"
    )
    assert describe_errors(unsteered(spec), {"image": 1e-7}) == "image 1.0e-07 off torch"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("sd15", "openvino"), ("sdxl", "onnxruntime"), ("sd15", "torch")])
def test_engines_steer_as_torch_does(bases: dict[str, Path], tmp_path: Path, family: str, backend: str) -> None:
    places = {"edges": bases[f"{family}-edges"], "sketch": bases["t2i"]}
    options = BuildOptions(
        base=str(bases[family]), out=tmp_path / "out", backend=backend, batch_sizes=(1, 4), sampler="ddim", guidance=3,
        controls=tuple((name, str(place)) for name, place in places.items()),
    )  # fmt: skip
    manifest = build_engine(options, print)
    assert manifest.max_error["denoiser_control"] <= 1e-4
    assert manifest.max_error["denoiser_control at scale 0"] <= 1e-4
    lines = [line for line in describe(tmp_path / "out", manifest) if line.startswith("off ") and "(allowed" in line]
    assert any(line.startswith("off denoiser denoiser_control at scale 0 ") for line in lines)
    assert len({line.index(" (allowed") for line in lines}) == 1
    assert [(control.name, control.kind) for control in manifest.controls] == [
        ("edges", "ControlNetModel"),
        ("sketch", "T2IAdapter"),
    ]
    assert plan_build(options).changes == []
    other = options.model_copy(update={"controls": (*options.controls[:1], ("sketch", str(bases["t2i-grey"])))})
    assert [change.partition(":")[0] for change in plan_build(other).changes] == ["control sketch changed"]
    engine, model = open_bundle(tmp_path / "out"), _model(bases[family], 3.0, **places)
    controls = ControlRequest(name="edges", image=EDGES, scale=0.7), ControlRequest(name="sketch", image=POSE, end=0.5)
    np.testing.assert_allclose(_made(engine, *controls)[0], _made(model, *controls)[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_an_adapter_of_sdxls_own_form_steers_an_engine_at_two_sizes(bases: dict[str, Path], tmp_path: Path) -> None:
    sizes = Size(32, 32), Size(48, 32)
    options = BuildOptions(
        base=str(bases["sdxl-three"]), out=tmp_path / "out", backend="openvino", batch_sizes=(1, 2), sizes=sizes, sampler="ddim",
        guidance=3, compare_stock=False, controls=(("sketch", str(bases["t2i-xl-four"])),),
    )  # fmt: skip
    build_engine(options, print)
    engine, model = open_bundle(tmp_path / "out"), _model(bases["sdxl-three"], 3.0, sketch=bases["t2i-xl-four"])
    model = replace(model, spec=model.spec.model_copy(update={"sizes": sizes}))
    for size in sizes:
        image = np.resize(EDGES, (size.height, size.width, 3))
        control = ControlRequest(name="sketch", image=image, end=0.5)
        latents = [_made(components, control, size=size)[0] for components in (engine, model)]
        np.testing.assert_allclose(*latents, atol=1e-4, rtol=0)
        assert np.abs(latents[0] - _made(engine, size=size)[0]).max() > 0.02


@pytest.mark.slow
def test_the_table_of_known_times_takes_no_control_image_for_a_time(bases: dict[str, Path]) -> None:
    sampling = SamplingOptions(sampler="lcm", timesteps=(999, 499), guidance=1)
    family, model = load_fused(str(bases["sd15"]), (), sampling)
    model = with_controls(family, model, {"edges": bases["sd15-edges"]})
    assert model.spec.sampler.known_times
    part = next(part for part in parts_of(family, model) if part.name == "denoiser_control")
    inputs = random_inputs(model, part, 3, model.spec.sizes[0], torch.Generator().manual_seed(3))
    traced = trace(model, part, model.spec.sizes[0], "fp32").module()
    with torch.no_grad():
        expected = part.module(*inputs)
        torch.testing.assert_close(traced(*inputs), expected, atol=1e-5, rtol=0)
        images = [*inputs[:-2], inputs[-2].flip(0), inputs[-1]]
        torch.testing.assert_close(traced(*images), part.module(*images), atol=1e-5, rtol=0)
        assert (part.module(*images) - expected)[::2].abs().max() > 1e-3
