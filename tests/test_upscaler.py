"""Stable Diffusion's x4 upscaler on tiny random weights: its own diffusers pipeline against ours, and what it refuses."""

import inspect
import itertools
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import make_tiny_upscaler

from flashdiff import cli
from flashdiff.components import Components, ModelSpec, Size
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.export import trace
from flashdiff.engines.parts import parts_of, random_inputs
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.stock import StockReference, run_stock
from flashdiff.errors import BundleError, FlashdiffError, ModelError, RequestError
from flashdiff.families import family_of
from flashdiff.generate import generate, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise, low_res_noise
from flashdiff.orders import Order, Pixels
from flashdiff.parts import LOW_RES_IMAGE, NOISE_LEVEL, Condition
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

PROMPT, SEED, STEPS, GUIDANCE = "a red dog", 3, 4, 9.0
SAMPLING = SamplingOptions(sampler="ddim", guidance=GUIDANCE)
IMAGE: Pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_upscaler(tmp_path_factory.mktemp("upscaler") / "tiny")


@pytest.fixture(scope="module")
def spec(base: Path) -> ModelSpec:
    return family_of(base).read_spec(base)


def _order(spec: ModelSpec, *, seed: int = SEED, count: int = 1, image: Pixels = IMAGE, **parameters: float) -> Order:
    return check_order(spec, prompt=PROMPT, seed=seed, steps=STEPS, count=count, inputs={"image": image}, parameters=parameters)


def _made(components: Components, *orders: Order) -> list[tuple[NDArray[np.float32], Pixels]]:
    """Latents and pixels of each image."""
    return [(row.latents, pixels) for of_order in generate_rows(components, orders) for row, pixels in of_order]


def _stock(base: Path, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, *, level: int, guidance: float, kind: str) -> Any:
    pipeline: Any = diffusers.StableDiffusionUpscalePipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    shape = spec.latent_shape(spec.sizes[0])
    drawn = {4: image_noise(SEED, 0, shape), 3: low_res_noise(SEED, (3, *shape[1:]))}  # by channels
    module = inspect.getmodule(type(pipeline))
    monkeypatch.setattr(module, "randn_tensor", lambda wanted, **_: torch.from_numpy(drawn[wanted[1]])[None])
    return pipeline(
        PROMPT, image=Image.fromarray(IMAGE), num_inference_steps=STEPS, guidance_scale=guidance, noise_level=level,
        output_type=kind,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(("level", "guidance"), [(20, GUIDANCE), (350, GUIDANCE), (0, 1.0)])
def test_latents_and_image_are_those_of_the_stock_pipeline(
    base: Path, monkeypatch: pytest.MonkeyPatch, level: int, guidance: float
) -> None:
    _, model = load_fused(str(base), (), SAMPLING.model_copy(update={"guidance": guidance}))
    ((latents, pixels),) = _made(model, _order(model.spec, noise_level=level))
    expected = {
        kind: np.asarray(_stock(base, monkeypatch, model.spec, level=level, guidance=guidance, kind=kind))
        for kind in ("latent", "np")
    }
    np.testing.assert_allclose(latents, expected["latent"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(pixels, 255 * expected["np"], atol=0.51, rtol=0)
    assert pixels.shape == (32, 32, 3)
    assert latents.std() > 0.1


def test_the_second_gate_compares_with_the_upscale_pipeline(base: Path) -> None:
    found, model = load_fused(str(base), (), SAMPLING)
    stock = run_stock(found, model, base, parts_of(found, model))
    assert isinstance(stock, StockReference)
    assert stock.made_by == "StableDiffusionUpscalePipeline with DDIMScheduler"
    assert stock.torch_error < 1e-5


def test_an_image_is_the_same_whatever_is_made_with_it(base: Path) -> None:
    _, model = load_fused(str(base), (), SAMPLING)
    other = np.ascontiguousarray(IMAGE[::-1])
    orders = [_order(model.spec, noise_level=0), _order(model.spec, image=other, noise_level=350), _order(model.spec, count=2)]
    together = [latents for latents, _ in _made(model, *orders)]
    alone = [
        latents
        for order in (*orders[:2], _order(model.spec), _order(model.spec, seed=SEED + 1))
        for latents, _ in _made(model, order)
    ]
    for one, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-4, rtol=0)
    assert min(np.abs(one - two).max() for one, two in itertools.pairwise(alone)) > 0.05


def test_each_image_draws_noise_of_its_own_for_what_it_is_made_of(spec: ModelSpec) -> None:
    order = _order(spec, count=2, noise_level=350)
    drawn = [order.task.drawn(spec, order, seed) for seed in (SEED, SEED + 1, SEED)]
    assert np.array_equal(drawn[0][LOW_RES_IMAGE], drawn[2][LOW_RES_IMAGE])
    assert not np.array_equal(drawn[0][LOW_RES_IMAGE], drawn[1][LOW_RES_IMAGE])
    assert [values[NOISE_LEVEL] for values in drawn] == [350] * 3
    steps = [image_noise(SEED, step, (3, 8, 8)) for step in range(100)]
    assert max(abs(np.corrcoef(low_res_noise(SEED, (3, 8, 8)).ravel(), noise.ravel())[0, 1]) for noise in steps) < 0.35


@pytest.mark.slow
def test_the_table_of_known_times_takes_no_noise_level_for_a_time(base: Path) -> None:
    sampling = SamplingOptions(sampler="lcm", timesteps=(999, 499), guidance=1)
    family, model = load_fused(str(base), (), sampling)
    assert model.spec.sampler.known_times == [999, 499]
    part = next(part for part in parts_of(family, model) if part.name == "denoiser")
    assert [(tensor.name, tensor.dtype) for tensor in part.inputs[-2:]] == [(LOW_RES_IMAGE, "float32"), (NOISE_LEVEL, "int64")]
    inputs = random_inputs(model, part, 3, model.spec.sizes[0], torch.Generator().manual_seed(3))
    traced = trace(model, part, model.spec.sizes[0], "fp32").module()
    with torch.no_grad():
        expected = part.module(*inputs)
        torch.testing.assert_close(traced(*inputs), expected, atol=1e-5, rtol=0)
        others = [*inputs[:-1], inputs[-1].flip(0)]
        torch.testing.assert_close(traced(*others), part.module(*others), atol=1e-5, rtol=0)
        assert (part.module(*others) - expected).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_engines_give_torchs_latents(base: Path, tmp_path: Path, backend: Any) -> None:
    sizes = (Size(32, 32), Size(48, 32))
    options = BuildOptions(
        base=str(base), out=tmp_path / "out", backend=backend, sizes=sizes, batch_sizes=(2, 6), sampler="ddim", guidance=9
    )
    build_engine(options, print)
    engine = open_bundle(tmp_path / "out")
    assert "encoder" not in engine.manifest.parts
    _, model = load_fused(str(base), (), SAMPLING)
    levels = {level: _order(model.spec, noise_level=level) for level in (0, 20, 350)}
    torchs = {level: _made(model, order)[0][0] for level, order in levels.items()}
    together = [latents for latents, _ in _made(engine, *(_order(engine.spec, noise_level=level) for level in levels))]
    for latents, level in zip(together, levels, strict=True):
        np.testing.assert_allclose(latents, torchs[level], atol=1e-4, rtol=0)
    if engine.manifest.rows_are_exact:
        np.testing.assert_array_equal(together[1], _made(engine, _order(engine.spec, noise_level=20))[0][0])
    wide = check_order(engine.spec, prompt=PROMPT, steps=2, size=sizes[1], inputs={"image": np.resize(IMAGE, (8, 12, 3))})
    assert generate(engine, [wide])[0][0].shape == (32, 48, 3)
    Image.fromarray(IMAGE).save(tmp_path / "small.png")
    arguments = [
        "--image",
        tmp_path / "small.png",
        "--noise-level",
        350,
        "--steps",
        STEPS,
        "--seed",
        SEED,
        "-o",
        tmp_path / "large.png",
    ]
    assert cli.main(["generate", *map(str, (tmp_path / "out", PROMPT, *arguments))]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "large.png")), _made(engine, levels[350])[0][1])


@pytest.mark.parametrize(
    ("image", "parameters", "message"),
    [
        (None, {}, "image: None is not allowed; this model makes no image without it (super_resolution)"),
        (None, {"noise_level": 20}, "image: None is not allowed; this model makes no image without it (super_resolution)"),
        (np.zeros((32, 32, 3), dtype=np.uint8), {}, "image: '32x32' is not allowed; it must have 8x8 pixels"),
        (IMAGE, {"noise_level": -1}, "noise_level: -1.0 is not allowed; it must be a whole number between 0 and 350"),
        (IMAGE, {"noise_level": 351}, "noise_level: 351.0 is not allowed; it must be a whole number between 0 and 350"),
        (IMAGE, {"noise_level": 20.5}, "noise_level: 20.5 is not allowed; it must be a whole number between 0 and 350"),
        (IMAGE, {"noise_level": 1e-9}, "noise_level: 1e-09 is not allowed; it must be a whole number between 0 and 350"),
        (IMAGE, {"noise_level": math.nan}, "noise_level: nan is not allowed; it must be a whole number between 0 and 350"),
        (IMAGE, {"noise_level": 10**400}, "noise_level: inf is not allowed; it must be a whole number between 0 and 350"),
        (IMAGE, {"strength": 0.5}, "strength: 0.5 is not allowed; no task of this model takes it"),
    ],
)
def test_a_request_that_the_model_cannot_fill_is_refused_by_field(
    spec: ModelSpec, image: Pixels | None, parameters: dict[str, float], message: str
) -> None:
    inputs = {} if image is None else {"image": image}
    with pytest.raises(RequestError) as refused:
        check_order(spec, prompt=PROMPT, inputs=inputs, parameters=parameters)
    assert str(refused.value) == message


def test_the_noise_level_is_that_of_the_pipeline_unless_the_base_allows_less(base: Path, spec: ModelSpec) -> None:
    assert _order(spec).parameters == {"noise_level": 20}
    low = _spec_with(base, "model_index.json", max_noise_level=10)
    assert _order(low).parameters == {"noise_level": 10}
    with pytest.raises(RequestError, match=r"noise_level: 20.0 is not allowed; it must be a whole number between 0 and 10"):
        _order(low, noise_level=20)


def test_models_of_other_tasks_take_no_noise_level(tiny_base: Path) -> None:
    other = family_of(tiny_base).read_spec(tiny_base)
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    for inputs in ({}, {"image": image}):
        with pytest.raises(RequestError, match=r"noise_level: 20 is not allowed; no task of this model takes it"):
            check_order(other, prompt=PROMPT, inputs=inputs, parameters={"noise_level": 20})


def _spec_with(base: Path, path: str, **settings: Any) -> ModelSpec:
    """The spec of a base with these settings in one file, which is as before afterwards; ... takes one out."""
    file = base / path
    before = file.read_text()
    config = {**json.loads(before), **settings}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    try:
        return family_of(base).read_spec(base)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("unet/config.json", {"num_class_embeds": None}, "'num_class_embeds' is None"),
        ("unet/config.json", {"num_class_embeds": 100}, "'max_noise_level' is 350; this UNet has the levels 0 to 99"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "'class_embed_type' is \"timestep\""),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "'time_cond_proj_dim' is 8"),
        ("unet/config.json", {"in_channels": 8}, "the unet takes 8 channels, .* networks that take 7"),
        ("vae/config.json", {"scaling_factor": 0.18215}, "'scaling_factor' is 0.18215, which is not supported; 0.08333 is"),
        ("vae/config.json", {"scaling_factor": ...}, "'scaling_factor' is 0.18215, the default that counts"),
        ("model_index.json", {"max_noise_level": -1}, "'max_noise_level' is -1"),
        ("model_index.json", {"max_noise_level": "350"}, "'max_noise_level' is '350'"),
        ("low_res_scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ("low_res_scheduler/scheduler_config.json", {"made_up": 7}, "nothing reads the setting 'made_up' = 7"),
        ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("low_res_scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("low_res_scheduler/scheduler_config.json", {"num_train_timesteps": 50}, "levels 0 to 49"),
    ],
)
def test_a_base_that_is_no_such_upscaler_is_refused_by_file_and_setting(
    base: Path, path: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlashdiffError, match=message) as refused:
        _spec_with(base, path, **settings)
    assert "\n" not in str(refused.value)
    assert str(base) in str(refused.value)


def test_the_schedule_of_the_small_image_is_part_of_the_base(base: Path, spec: ModelSpec) -> None:
    from flashdiff.families.files import base_files

    assert base / "low_res_scheduler" / "scheduler_config.json" in base_files(base)
    changed = _spec_with(base, "low_res_scheduler/scheduler_config.json", beta_end=0.01)
    assert changed.condition(LOW_RES_IMAGE).noised != spec.condition(LOW_RES_IMAGE).noised
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.usefixtures("any_processor")
def test_what_is_not_made_for_it_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    from flashdiff.families.control import check_control

    family, spec = family_of(base), family_of(base).read_spec(base)
    with pytest.raises(ModelError, match=r"--control edges=.*: models of the family sd-upscaler are not steered"):
        check_control("edges", base / "unet", family, base, spec)
    options = BuildOptions(base=str(base), out=tmp_path / "out", batch_sizes=(2,))
    needed = "--precision int8, fp8 and auto need images of prompts, and tiny makes no image of a prompt alone"
    for changes, message in (
        ({"precision": "int8"}, needed),
        ({"precision": "auto"}, needed),
        ({"sizes": (Size(36, 32),)}, "--size 36x32: sd-upscaler needs width and height in multiples of 8"),
        ({"batch_sizes": (1,)}, "--batch must reach 2: guidance evaluates the network twice a step"),
    ):
        with pytest.raises(BundleError, match=message):
            build_engine(options.model_copy(update=changes), print)


def test_conditions_of_other_models_are_written_as_before() -> None:
    """Their bundles' checksums are those of manifests that knew neither classes nor noise."""
    assert not {"classes", "noised"} & Condition(name="mask", channels=1, absent="ones").model_dump().keys()
    label = Condition(name=NOISE_LEVEL, enters="label", classes=351)
    assert label.model_dump()["classes"] == 351
