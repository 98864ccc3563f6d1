"""Whole images of tiny random models: a stock diffusers pipeline with its own scheduler, and the same noise, against ours."""

import inspect
import math
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import (
    FAMILIES,
    make_tiny_flux,
    make_tiny_flux2_klein,
    make_tiny_qwen_image,
    make_tiny_sana_sprint,
    make_tiny_sd3,
    make_tiny_sd15,
    make_tiny_sdxl,
)

from flashdiff.components import Components
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.generate import decode_rows, generate_rows
from flashdiff.lora import load_fused
from flashdiff.noise import image_noise
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own code

PROMPT, SEED = "a red dog", 3
TOLERANCE = 1e-4
STUDENTS: dict[str, tuple[SamplingOptions, str, dict[str, Any], dict[str, Any]]] = {
    # options, diffusers' scheduler, its settings, the pipeline's settings
    "lcm": (SamplingOptions(sampler="lcm", guidance=0), "LCMScheduler", {}, {"guidance_scale": 0}),
    "lcm guided": (SamplingOptions(sampler="lcm", guidance=1.5), "LCMScheduler", {}, {"guidance_scale": 1.5}),
    "lightning": (
        SamplingOptions(sampler="euler", spacing="trailing", guidance=0),
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"guidance_scale": 0},
    ),
    "linspace": (
        SamplingOptions(sampler="euler", spacing="linspace", guidance=3),
        "EulerDiscreteScheduler",
        {"timestep_spacing": "linspace"},
        {"guidance_scale": 3},
    ),
    "turbo": (
        SamplingOptions(sampler="euler-ancestral", guidance=0),
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"guidance_scale": 0},
    ),
    "hyper": (
        SamplingOptions(sampler="ddim", guidance=0),
        "DDIMScheduler",
        {"timestep_spacing": "trailing"},
        {"guidance_scale": 0},
    ),
    "tcd": (SamplingOptions(sampler="tcd", eta=0.3, guidance=0), "TCDScheduler", {}, {"guidance_scale": 0, "eta": 0.3}),
}


@cache
def _pipeline(base: Path) -> tuple[Any, Any]:
    """Stock diffusers' pipeline of a base, and the configuration of its own scheduler."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


@cache
def _student(base: Path, student: str) -> Components:
    return load_fused(str(base), (), STUDENTS[student][0])[1]


def _ours(components: Components, steps: int) -> NDArray[np.float32]:
    """The image [3, H, W] in [0, 1], before it becomes bytes."""
    order = check_order(components.spec, prompt=PROMPT, seed=SEED, steps=steps)
    ((row, _),) = generate_rows(components, [order])[0]
    return np.clip(decode_rows(components, [row])[0] / 2 + 0.5, 0, 1)


def _stock(
    monkeypatch: pytest.MonkeyPatch, base: Path, kind: str, scheduler: dict[str, Any], shape: tuple[int, ...], **settings: Any
) -> NDArray[np.float32]:
    pipeline, own = _pipeline(base)
    pipeline.scheduler = getattr(diffusers, kind).from_config(own, **scheduler)
    steps = iter(range(1, 1000))
    monkeypatch.setattr(
        inspect.getmodule(type(pipeline.scheduler)),
        "randn_tensor",
        lambda *_, **__: torch.from_numpy(image_noise(SEED, next(steps), shape))[None],
    )
    latents = torch.from_numpy(image_noise(SEED, 0, shape))[None]
    if isinstance(pipeline, diffusers.FluxPipeline | diffusers.QwenImagePipeline):
        latents = pipeline._pack_latents(latents, *latents.shape)
    if isinstance(pipeline, diffusers.Flux2KleinPipeline):
        latents = pipeline._patchify_latents(latents)
    takes = inspect.signature(pipeline.__call__).parameters
    settings |= {name: 32 for name in ("height", "width") if name in takes}
    image: NDArray[np.float32] = pipeline(prompt=PROMPT, latents=latents, output_type="pt", **settings).images[0].numpy()
    return image


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {name: FAMILIES[name](folder / name) for name in ("sd15", "sdxl", "sd3", "flux")}
    return made | {
        "lcm": make_tiny_sd15(folder / "lcm", time_cond_proj_dim=32),
        "lcm sdxl": make_tiny_sdxl(folder / "lcm-sdxl", time_cond_proj_dim=32),
        "schnell": make_tiny_flux(folder / "schnell", guidance_embeds=False),
        "sd3": make_tiny_sd3(folder / "sd3-again"),
    }


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("student", list(STUDENTS))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_published_students_image_is_that_of_the_stock_pipeline(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, student: str, steps: int
) -> None:
    _, kind, scheduler, settings = STUDENTS[student]
    model = _student(bases[family], student)
    ours = _ours(model, steps)
    shape = model.spec.latent_shape(model.spec.sizes[0])
    stock = _stock(monkeypatch, bases[family], kind, scheduler, shape, num_inference_steps=steps, **settings)
    np.testing.assert_allclose(ours, stock, atol=TOLERANCE, rtol=0)
    assert ours.std() > 0.02


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_dmd2_at_its_own_times(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    times = (999, 749, 499, 249)
    _, model = load_fused(str(bases[family]), (), SamplingOptions(sampler="lcm", timesteps=times, guidance=0))
    shape = model.spec.latent_shape(model.spec.sizes[0])
    stock = _stock(monkeypatch, bases[family], "LCMScheduler", {}, shape, timesteps=list(times), guidance_scale=0)
    np.testing.assert_allclose(_ours(model, 4), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("base", ["sd3", "flux", "schnell"])
def test_flow_euler_is_that_of_the_stock_pipeline(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, base: str, steps: int
) -> None:
    """SD3 with its scheduler's own times, FLUX with its pipeline's and a shift by size, and its embedded guidance."""
    guidance = 3.0 if base == "flux" else 0
    _, model = load_fused(str(bases[base]), (), SamplingOptions(sampler="flow-euler", guidance=guidance))
    shape = model.spec.latent_shape(model.spec.sizes[0])
    stock = _stock(
        monkeypatch, bases[base], "FlowMatchEulerDiscreteScheduler", {}, shape, num_inference_steps=steps, guidance_scale=guidance
    )
    ours = _ours(model, steps)
    np.testing.assert_allclose(ours, stock, atol=TOLERANCE, rtol=0)
    assert ours.std() > 0.02


@pytest.mark.parametrize("steps", [4, 8])
def test_lightning_of_qwen_image_is_that_of_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    base = make_tiny_qwen_image(tmp_path / "qwen-image")
    _, model = load_fused(str(base), (), SamplingOptions(preset=f"qwen-image-lightning-{steps}"))
    shape, kind = model.spec.latent_shape(model.spec.sizes[0]), "FlowMatchEulerDiscreteScheduler"
    published = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    stock = _stock(monkeypatch, base, kind, published, shape, num_inference_steps=steps, true_cfg_scale=1.0)
    np.testing.assert_allclose(_ours(model, steps), stock, atol=TOLERANCE, rtol=0)


def test_qwen_image_as_published_is_that_of_the_stock_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shift by size, levels stretched to the terminal one, and guided outputs of the conditional ones' lengths."""
    base = make_tiny_qwen_image(tmp_path / "qwen-image")
    _, model = load_fused(str(base), (), SamplingOptions(sampler="flow-euler", guidance=4))
    shape, kind = model.spec.latent_shape(model.spec.sizes[0]), "FlowMatchEulerDiscreteScheduler"
    stock = _stock(monkeypatch, base, kind, {}, shape, num_inference_steps=5, true_cfg_scale=4.0, negative_prompt="")
    np.testing.assert_allclose(_ours(model, 5), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_distilled_flux2_klein_is_that_of_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    base = make_tiny_flux2_klein(tmp_path / "klein", is_distilled=True)
    _, model = load_fused(str(base), (), SamplingOptions())
    assert (model.spec.sampler.default_steps, model.spec.sampler.evaluations_per_step) == (4, 1)
    shape, kind = model.spec.latent_shape(model.spec.sizes[0]), "FlowMatchEulerDiscreteScheduler"
    stock = _stock(monkeypatch, base, kind, {}, shape, num_inference_steps=steps)
    np.testing.assert_allclose(_ours(model, steps), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_sana_sprint_is_that_of_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, guidance: float | None
) -> None:
    base = make_tiny_sana_sprint(tmp_path / "sprint")
    _, model = load_fused(str(base), (), SamplingOptions(guidance=guidance))
    settings = {"intermediate_timesteps": 1.3 if steps == 2 else None, "use_resolution_binning": False}
    shape = model.spec.latent_shape(model.spec.sizes[0])
    stock = _stock(
        monkeypatch, base, "SCMScheduler", {}, shape, num_inference_steps=steps, guidance_scale=guidance or 4.5, **settings
    )
    np.testing.assert_allclose(_ours(model, steps), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("base", ["lcm", "lcm sdxl"])
@pytest.mark.parametrize("guidance", [0.0, 8.0])
def test_a_unet_that_takes_its_guidance_as_an_input_is_given_it(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, base: str, guidance: float
) -> None:
    _, model = load_fused(str(bases[base]), (), SamplingOptions(sampler="lcm", guidance=guidance))
    assert model.spec.sampler.evaluations_per_step == 1
    shape = model.spec.latent_shape(model.spec.sizes[0])
    stock = _stock(monkeypatch, bases[base], "LCMScheduler", {}, shape, num_inference_steps=4, guidance_scale=guidance)
    np.testing.assert_allclose(_ours(model, 4), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_up_to_one_is_the_unguided_image_of_the_stock_pipeline(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    _, model = load_fused(str(bases["sd15"]), (), SamplingOptions(sampler="ddim", guidance=guidance))
    assert model.spec.sampler.evaluations_per_step == 1
    shape = model.spec.latent_shape(model.spec.sizes[0])
    scheduler = {"timestep_spacing": "trailing"}
    stock = _stock(monkeypatch, bases["sd15"], "DDIMScheduler", scheduler, shape, num_inference_steps=3, guidance_scale=guidance)
    np.testing.assert_allclose(_ours(model, 3), stock, atol=TOLERANCE, rtol=0)


def _built(base: Path, out: Path, backend: str, **sampling: Any) -> Components:
    options = BuildOptions(base=str(base), out=out, backend=backend, batch_sizes=(1, 2), **sampling)
    build_engine(options, lambda _: None)
    return open_bundle(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "backend"),
    [("lcm", "onnxruntime"), ("lightning", "onnxruntime"), ("linspace", "openvino"), ("tcd", "openvino")],
)
def test_a_built_engine_gives_the_image_of_the_stock_pipeline(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, backend: str
) -> None:
    options, kind, scheduler, settings = STUDENTS[student]
    family = "sdxl" if student in ("lightning", "tcd") else "sd15"
    engine = _built(bases[family], tmp_path / "bundle", backend, **options.model_dump())
    shape = engine.spec.latent_shape(engine.spec.sizes[0])
    for steps in (1, 3, 4, 8):
        stock = _stock(monkeypatch, bases[family], kind, scheduler, shape, num_inference_steps=steps, **settings)
        np.testing.assert_allclose(_ours(engine, steps), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_a_built_student_with_known_times_and_embedded_guidance_gives_the_image_of_the_stock_pipeline(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (999, 749, 499, 249)
    engine = _built(bases["lcm"], tmp_path / "bundle", "onnxruntime", sampler="lcm", timesteps=times, guidance=8.0)
    assert engine.spec.sampler.known_times == [*times]
    shape = engine.spec.latent_shape(engine.spec.sizes[0])
    stock = _stock(monkeypatch, bases["lcm"], "LCMScheduler", {}, shape, timesteps=list(times), guidance_scale=8.0)
    np.testing.assert_allclose(_ours(engine, 4), stock, atol=TOLERANCE, rtol=0)
    other = _stock(monkeypatch, bases["lcm"], "LCMScheduler", {}, shape, timesteps=list(times), guidance_scale=1.0)
    assert np.abs(stock - other).max() > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_a_built_flow_gives_the_image_of_the_stock_pipeline(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    engine = _built(bases[base], tmp_path / "bundle", "onnxruntime", sampler="flow-euler", guidance=0)
    shape = engine.spec.latent_shape(engine.spec.sizes[0])
    settings = {"num_inference_steps": 4, "guidance_scale": 0}
    stock = _stock(monkeypatch, bases[base], "FlowMatchEulerDiscreteScheduler", {}, shape, **settings)
    np.testing.assert_allclose(_ours(engine, 4), stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("student", ["lcm", "lightning", "linspace", "turbo", "hyper"])
def test_inpainting_with_a_published_student_is_that_of_the_stock_pipeline(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, student: str, steps: int
) -> None:
    _, kind, scheduler, settings = STUDENTS[student]
    model = _student(bases["sd15"], student)
    spec = model.spec
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros_like(image)
    mask[5:27, 9:20] = 255
    order = check_order(spec, prompt=PROMPT, seed=SEED, steps=steps, inputs={"image": image, "mask": mask})
    ((row, _),) = generate_rows(model, [order])[0]

    pipeline: Any = diffusers.StableDiffusionInpaintPipeline.from_pretrained(bases["sd15"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **scheduler)
    shape = spec.latent_shape(spec.sizes[0])
    first, later = torch.from_numpy(image_noise(SEED, 0, shape))[None], iter(range(1, 1000))
    module, scheduling = inspect.getmodule(type(pipeline)), inspect.getmodule(type(pipeline.scheduler))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: first)
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    monkeypatch.setattr(
        scheduling, "randn_tensor", lambda *_, **__: torch.from_numpy(image_noise(SEED, next(later), shape))[None]
    )
    stock = pipeline(
        PROMPT,
        image=Image.fromarray(image),
        mask_image=Image.fromarray(mask),
        strength=1.0,
        num_inference_steps=steps,
        output_type="latent",
        **settings,
    ).images[0]
    np.testing.assert_allclose(row.latents, stock, atol=TOLERANCE, rtol=0)
