"""`--vae`: every family with another autoencoder makes the images of its stock pipeline with that autoencoder."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tiny import FAMILIES, open_stock

from flashdiff import cli
from flashdiff.components import Size
from flashdiff.engines.build import build_engine
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.describe import describe
from flashdiff.engines.plan import plan_build
from flashdiff.engines.reference import sample_image
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ModelError
from flashdiff.families import autoencoders, family_of, load_base
from flashdiff.families.autoencoders import check_vae, find_vae, with_vae
from flashdiff.generate import generate, generate_rows
from flashdiff.noise import image_noise
from flashdiff.schedule import FlowSchedule
from flashdiff.tasks import check_order

PROMPT = "a red dog"
OWN = {"sana", "qwen-image", "flux2-klein"}
"""Families whose autoencoder nothing can replace."""
CHANNELS = dict.fromkeys(FAMILIES, 4) | dict.fromkeys(("sd3", "flux", "z-image"), 16)


def _make(folder: Path, kind: str, channels: int, *, levels: int = 3) -> Path:
    torch.manual_seed(7)
    if kind == "tiny":
        blocks = {"num_encoder_blocks": (1,) * levels, "num_decoder_blocks": (1,) * levels}
        widths = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
        AutoencoderTiny(latent_channels=channels, **blocks, **widths).save_pretrained(folder)
    else:
        AutoencoderKL(
            block_out_channels=(8, 8, 16)[-levels:],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.7,
            shift_factor=0.2 if channels == 16 else None,
        ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OWN))
def test_images_are_those_of_the_stock_pipeline_with_that_autoencoder(tmp_path: Path, name: str, kind: str) -> None:
    base = FAMILIES[name](tmp_path / name)
    folder = find_vae(str(_make(tmp_path / "other", kind, CHANNELS[name])))
    family, model = load_base(str(base))
    check_vae(folder, family, model.spec, base)
    spec = model.spec
    ours = generate_rows(with_vae(model, folder), [check_order(spec, prompt=PROMPT, seed=3, steps=2)])[0][0][1]

    pipeline: Any = open_stock(getattr(diffusers, family.pipeline_class), base)
    pipeline.vae = {"kl": AutoencoderKL, "tiny": AutoencoderTiny}[kind].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline.scheduler.config, "set_alpha_to_one"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    latents = torch.from_numpy(image_noise(3, 0, spec.latent_shape(spec.sizes[0])))[None]
    settings: dict[str, Any] = {"guidance_scale": spec.sampler.guidance, "num_inference_steps": 2, "output_type": "np"}
    if isinstance(spec.sampler.schedule, FlowSchedule):
        settings["sigmas"] = [1.0, 0.5]
    if name == "flux":
        settings["guidance_scale"] = 3.5
        latents = pipeline._pack_latents(latents, *latents.shape)
    if name == "z-image":
        settings["guidance_scale"] -= 1  # its pipeline counts it from 0
    takes = inspect.signature(pipeline.__call__).parameters
    settings |= {
        key: value for key, value in {"use_resolution_binning": False, "height": 32, "width": 32}.items() if key in takes
    }
    stock = pipeline(PROMPT, latents=latents, **settings).images[0]
    np.testing.assert_allclose(ours.astype(float), 255 * stock, atol=0.51)
    assert ours.std() > 1

    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        encoded = pipeline.vae.encode(pixels)
        raw = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
        expected = (raw - (pipeline.vae.config.shift_factor or 0)) * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(with_vae(model, folder).encoder(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_base_may_come_with_a_tiny_autoencoder(tmp_path: Path, name: str) -> None:
    base = FAMILIES[name](tmp_path / name)
    shutil.rmtree(base / "vae")
    _make(base / "vae", "tiny", CHANNELS[name])
    _, model = load_base(str(base))
    assert family_of(base).read_spec(base).sizes == ((Size(1024, 1024),) if name == "flux" else (Size(32, 32),))
    order = check_order(model.spec.model_copy(update={"sizes": (Size(32, 32),)}), prompt=PROMPT, seed=3, steps=1)
    assert generate(model, [order])[0][0].shape == (32, 32, 3)


def test_an_autoencoder_is_found_in_a_base_and_by_its_fp16_files_alone(tmp_path: Path) -> None:
    base = FAMILIES["sd15"](tmp_path / "base")
    assert find_vae(str(base)) == base / "vae"
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = find_vae(str(base / "vae"))
    assert (found / weights.name).resolve() == weights.with_name("diffusion_pytorch_model.fp16.safetensors")


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_family_with_an_autoencoder_of_its_own_refuses_others(tmp_path: Path, name: str) -> None:
    base, vae = FAMILIES[name](tmp_path / name), _make(tmp_path / "other", "kl", 4)
    with pytest.raises(ModelError, match=rf"--vae .*other: a model of the family {name} runs with its own autoencoder alone"):
        plan_build(BuildOptions(base=str(base), out=tmp_path / "out", vae=str(vae)))


def test_what_does_not_fit_is_refused_by_option_and_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = FAMILIES["sd15"](tmp_path / "base")

    def refused(vae: object) -> str:
        with pytest.raises(ModelError) as error:
            plan_build(BuildOptions(base=str(base), out=tmp_path / "out", vae=str(vae)))
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "--vae nothing: there is no such folder" in refused("nothing")
    assert "it holds no autoencoder of diffusers" in refused(tmp_path / "empty")
    said = "its latents have 8 channels and 4 pixels a cell, those of base have 4 and 4"
    assert said in refused(_make(tmp_path / "wide", "kl", 8))
    said = "its latents have 4 channels and 2 pixels a cell, those of base have 4 and 4"
    assert said in refused(_make(tmp_path / "short", "tiny", 4, levels=2))
    scaled = Path(shutil.copytree(base / "vae", tmp_path / "scaled"))
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    plan_build(BuildOptions(base=str(base), out=tmp_path / "out", vae=str(scaled)))
    assert f"its scaling_factor is 0.13025, that of base is {config['scaling_factor']:g}; where it was made for" in caplog.text
    (tmp_path / "wide" / "config.json").write_text('{"_class_name": "VQModel"}')
    assert "'_class_name' is 'VQModel'" in refused(tmp_path / "wide")


@pytest.mark.parametrize(("name", "small"), [("sd15", "taesd"), ("sdxl", "taesdxl"), ("sd3", "taesd3"), ("flux", "taef1")])
def test_tiny_is_the_familys_small_autoencoder(
    name: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, named = FAMILIES[name](tmp_path / "base"), list[str]()
    other = _make(tmp_path / "other", "tiny", CHANNELS[name])

    def find(option: str, found: str, **_: object) -> Path:
        named.append(found)
        return other

    monkeypatch.setattr(autoencoders, "find_network", find)
    command = ["build-engine", str(base), "--decoder", "tiny", "--batch", "2", "--dry-run", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert named == [f"madebyollin/{small}"]
    assert f"autoencoder  {other}" in capsys.readouterr().out
    shutil.rmtree(base / "vae")
    other.rename(base / "vae")
    assert cli.main(command) == 2
    assert "--vae tiny: the base's own is an AutoencoderTiny already; leave it out" in capsys.readouterr().err


def test_tiny_is_refused_where_none_is_known(tmp_path: Path) -> None:
    base = FAMILIES["sana"](tmp_path / "base")
    with pytest.raises(ModelError, match="--vae tiny: none is known for the family sana; give a folder or a hub id"):
        plan_build(BuildOptions(base=str(base), vae="tiny", out=tmp_path / "out"))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_torch_bundle_keeps_it_with_its_own_settings(tmp_path: Path, kind: str) -> None:
    base, vae = FAMILIES["sd15"](tmp_path / "base"), _make(tmp_path / "other-vae", kind, 4)
    options = BuildOptions(base=str(base), vae=str(vae), out=tmp_path / "out", backend="torch", batch_sizes=(2,))
    build_engine(options, lambda _: None)
    _, model = load_base(str(base))
    order = check_order(model.spec, prompt=PROMPT, seed=3, steps=2)
    ours = generate(open_bundle(tmp_path / "out"), [order])[0][0]
    np.testing.assert_allclose(ours.astype(float), generate(with_vae(model, vae), [order])[0][0].astype(float), atol=1)


@pytest.mark.slow
def test_the_bundle_names_it_and_exports_nothing_else_anew(tmp_path: Path) -> None:
    base, vae = FAMILIES["sd15"](tmp_path / "base"), _make(tmp_path / "other-vae", "tiny", 4)
    plain = BuildOptions(base=str(base), out=tmp_path / "out", backend="onnxruntime", batch_sizes=(2,))
    build_engine(plain, lambda _: None)
    with_other = plain.model_copy(update={"vae": str(vae)})
    plan = plan_build(with_other)
    (change,) = plan.changes
    assert change.startswith("the autoencoder changed: the base's own -> other-vae ")
    assert {export.part: export.is_cached for export in plan.exports} == {
        "text_encoder": True,
        "denoiser": True,
        "encoder": False,
        "decoder": False,
    }
    manifest = build_engine(with_other, lambda _: None)
    assert manifest.vae is not None
    assert manifest.vae.name == "other-vae"
    assert manifest.latent_codec.scale == 1
    _, model = load_base(str(base))
    size = model.spec.sizes[0]
    images = [sample_image(of, model.spec, size)[0].transpose(1, 2, 0) for of in (model, with_vae(model, vae))]
    levels = [np.round((np.clip(image, -1, 1) + 1) * 127.5) for image in images]
    psnr = 10 * np.log10(255**2 / np.mean(np.square(levels[0] - levels[1])))
    assert manifest.vae_psnr == pytest.approx(psnr, abs=0.01)
    (line,) = (line for line in describe(tmp_path / "out", manifest) if line.startswith("autoencoder  other-vae"))
    assert line.endswith(f", {psnr:.1f} dB from the base's own decoder")
    order = check_order(model.spec, prompt=PROMPT, seed=3, steps=2)
    ours = generate(open_bundle(tmp_path / "out"), [order])[0][0]
    expected = generate(with_vae(model, vae), [order])[0][0]
    np.testing.assert_allclose(ours.astype(float), expected.astype(float), atol=1)
    assert not plan_build(with_other).changes
