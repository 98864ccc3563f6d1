"""Every family against its own diffusers pipeline: same prompt, same latents, same steps, same image."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from orders import from_image
from PIL import Image
from tiny import FAMILIES, MEMBERS, MODELS, STUDENTS, open_stock

from flashdiff.families import family_of, load_base
from flashdiff.generate import generate, generate_rows, to_pixels
from flashdiff.noise import image_noise
from flashdiff.schedule import FlowSchedule
from flashdiff.tasks import check_order

PROMPT = " A Red dog"


@pytest.fixture(scope="module", params=[*MODELS, *STUDENTS])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return (MODELS | STUDENTS)[request.param](tmp_path_factory.mktemp("families") / request.param)


@pytest.mark.parametrize("is_guided", [True, False])
def test_two_steps_are_those_of_the_stock_pipeline(base: Path, is_guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = load_base(str(base))
    assert family.name == MEMBERS.get(base.name, base.name)
    if not is_guided:
        model.spec = model.spec.model_copy(update={"sampler": model.spec.sampler.model_copy(update={"guidance": 1.0})})
    spec = model.spec
    order = check_order(spec, prompt=PROMPT, seed=3, steps=2)
    ((_, ours),) = generate_rows(model, [order])[0]

    pipeline = open_stock(getattr(diffusers, family.pipeline_class), base)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline.scheduler.config, "set_alpha_to_one"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    latents = torch.from_numpy(image_noise(3, 0, spec.latent_shape(spec.sizes[0])))[None]
    settings: dict[str, Any] = {"guidance_scale": spec.sampler.guidance, "num_inference_steps": 2, "output_type": "np"}
    if spec.prediction == "flow":
        settings["sigmas"] = [1.0, 0.5]
    if family.name == "sana":  # its own scheduler's first step is not noise alone
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    if family.name == "sana-sprint":
        settings["guidance_scale"] = spec.sampler.embedded_guidance
        fresh = torch.from_numpy(image_noise(3, 1, spec.latent_shape(spec.sizes[0])))[None]
        monkeypatch.setattr(inspect.getmodule(type(pipeline.scheduler)), "randn_tensor", lambda *_, **__: fresh)
    if family.name == "flux":
        settings["guidance_scale"] = 3.5
        latents = pipeline._pack_latents(latents, *latents.shape)
    if family.name == "qwen-image":
        settings |= {"true_cfg_scale": settings.pop("guidance_scale"), "negative_prompt": ""}
        latents = pipeline._pack_latents(latents, *latents.shape)
    if family.name == "flux2-klein":
        latents = pipeline._patchify_latents(latents)
    if family.name == "z-image":
        settings["guidance_scale"] -= 1  # its pipeline counts it from 0
    takes = inspect.signature(pipeline.__call__).parameters
    settings |= {
        name: value for name, value in {"use_resolution_binning": False, "height": 32, "width": 32}.items() if name in takes
    }
    stock = pipeline(prompt=PROMPT, latents=latents, **settings).images[0]
    np.testing.assert_allclose(ours.astype(float), 255 * stock, atol=0.51)
    assert ours.std() > 5


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (4, 0.7), (2, 0.8)])
def test_image_to_image_is_that_of_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, strength: float
) -> None:
    base = FAMILIES["sd15"](tmp_path / "sd15")
    _, model = load_base(str(base))
    spec = model.spec
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = generate(model, [from_image(check_order(spec, prompt=PROMPT, seed=3, steps=steps), picture, strength)])[0][0]

    pipeline: Any = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    module = inspect.getmodule(type(pipeline))
    noise = torch.from_numpy(image_noise(3, 0, spec.latent_shape(spec.sizes[0])))[None]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    settings = {"strength": strength, "num_inference_steps": steps, "guidance_scale": spec.sampler.guidance, "output_type": "np"}
    stock = pipeline(PROMPT, image=Image.fromarray(picture), **settings).images[0]
    np.testing.assert_allclose(ours.astype(float), 255 * stock, atol=0.51)
    assert ours.std() > 5


INPAINTING = {
    "sd15": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
    "sd3": diffusers.StableDiffusion3InpaintPipeline,
    "flux": diffusers.FluxInpaintPipeline,
}


@pytest.mark.parametrize(("steps", "strength"), [(2, 1.0), (4, 0.5)])
@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_is_that_of_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, steps: int, strength: float
) -> None:
    base = FAMILIES[name](tmp_path / name)
    _, model = load_base(str(base))
    spec, rng = model.spec, np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32, 3), dtype=np.uint8)
    mask[5:27, 9:20] = 255
    order = check_order(
        spec, prompt=PROMPT, seed=3, steps=steps, inputs={"image": picture, "mask": mask}, parameters={"strength": strength}
    )
    assert order.task.name == "inpainting"
    ((row, ours),) = generate_rows(model, [order])[0]

    pipeline: Any = INPAINTING[name].from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline.scheduler.config, "set_alpha_to_one"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    module = inspect.getmodule(type(pipeline))
    noise = torch.from_numpy(image_noise(3, 0, spec.latent_shape(spec.sizes[0])))[None]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    settings: dict[str, Any] = {"guidance_scale": 3.5 if name == "flux" else spec.sampler.guidance, "height": 32, "width": 32}
    if isinstance(spec.sampler.schedule, FlowSchedule):
        settings["sigmas"] = [1 - step / steps for step in range(steps)]
    stock = pipeline(
        PROMPT,
        image=Image.fromarray(picture),
        mask_image=Image.fromarray(mask),
        strength=strength,
        num_inference_steps=steps,
        output_type="latent" if name == "sd3" else "np",  # diffusers 0.42's decodes without the autoencoder's shift
        **settings,
    ).images[0]
    decoded = to_pixels(model.call("decoder", {"latents": row.latents[None]})["images"])[0]
    if name == "sd3":
        np.testing.assert_allclose(row.latents, stock, atol=1e-4)
    else:
        np.testing.assert_allclose(decoded.astype(float), 255 * stock, atol=0.51)
    is_masked = mask > 127
    np.testing.assert_array_equal(ours, np.where(is_masked, decoded, picture))
    assert decoded[is_masked].std() > 5


def test_specs_say_what_the_pipelines_do(base: Path) -> None:
    spec = family_of(base).read_spec(base)
    assert spec.sizes == ((32, 32),)
    assert spec.latent_factor == 4
    assert (spec.prediction in ("flow", "trigflow")) == isinstance(spec.sampler.schedule, FlowSchedule)
    assert {condition.unconditional for condition in spec.conditions} == {"zeros" if base.name == "sdxl" else "empty_prompt"}


def test_latents_survive_the_codec_as_the_pipeline_scales_them(base: Path) -> None:
    family, model = load_base(str(base))
    if "AutoencoderKL" not in family.networks["vae"]:
        pytest.skip("tests/test_family_parts.py has the codecs that differ")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        latents = model.encoder(images, torch.Generator().manual_seed(0))
        expected = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
        shift = vae.config.shift_factor or 0
        torch.testing.assert_close(latents, (expected - shift) * vae.config.scaling_factor)
        torch.testing.assert_close(model.decoder(latents), vae.decode(expected).sample, atol=1e-4, rtol=1e-4)
        mean = (vae.encode(images).latent_dist.mean - shift) * vae.config.scaling_factor
        torch.testing.assert_close(torch.from_numpy(model.call("encoder", {"images": images.numpy()})["latents"]), mean)
