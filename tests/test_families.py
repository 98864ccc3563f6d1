"""Base models that are not what they should be: one clear error each."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flashdiff.components import ModelSpec
from flashdiff.errors import ConfigError, ModelError
from flashdiff.families import family_of, find_base, load_base
from flashdiff.parts import Condition, latent_diffusion


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def _edit(file: Path, **changes: object) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**config, **changes}.items() if value is not None}))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_spec_is_read_from_the_configuration(copy: Path, prediction: str) -> None:
    _edit(copy / "scheduler" / "scheduler_config.json", prediction_type=prediction)
    spec = family_of(copy).read_spec(copy)
    assert (spec.family, spec.prediction, spec.latent_channels, spec.latent_factor, spec.prompt_tokens) == (
        "sd15",
        prediction,
        4,
        4,
        16,
    )
    assert spec.sizes == ((32, 32),)


def test_the_hash_names_the_content_and_not_the_place(tiny_base: Path, copy: Path) -> None:
    assert load_base(str(tiny_base))[1].base_hash == load_base(str(copy))[1].base_hash
    (copy / "README.md").write_text("a card does not count")
    assert load_base(str(tiny_base))[1].base_hash == load_base(str(copy))[1].base_hash
    _edit(copy / "vae" / "config.json", scaling_factor=0.25)
    assert load_base(str(tiny_base))[1].base_hash != load_base(str(copy))[1].base_hash


def test_damage_is_named(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file({name: values for name, values in whole.items() if name != "conv_out.weight"}, weights)
    with pytest.raises(ModelError, match=r"unet lacks weights, conv_out\.weight among them"):
        load_base(str(copy))
    save_file({**whole, "up_blocks.9.resnets.0.conv1.weight": whole["conv_out.bias"].clone()}, weights)
    with pytest.raises(ModelError, match=r"no layer for some of its weights, up_blocks\.9\.resnets\.0\.conv1\.weight among"):
        load_base(str(copy))
    weights.write_bytes(b"garbage")
    with pytest.raises(ModelError, match="cannot load unet"):
        load_base(str(copy))
    _edit(copy / "unet" / "config.json", in_channels=None)
    with pytest.raises(ModelError, match="lacks or misstates 'in_channels'"):
        load_base(str(copy))
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_base(str(copy))
    (copy / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"not a complete model directory, unet/config\.json is missing"):
        load_base(str(copy))


def test_what_the_family_cannot_do_is_refused(copy: Path) -> None:
    scheduler = copy / "scheduler" / "scheduler_config.json"
    _edit(scheduler, prediction_type="flow_prediction")
    with pytest.raises(ModelError, match="prediction_type 'flow_prediction' is not supported"):
        load_base(str(copy))
    _edit(scheduler, prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr is not supported"):
        load_base(str(copy))
    _edit(copy / "model_index.json", _class_name="OtherPipeline")
    with pytest.raises(ModelError, match="no family for a OtherPipeline; supported: StableDiffusionPipeline"):
        load_base(str(copy))


@pytest.mark.parametrize(
    ("pipeline", "nearest"),
    [
        ("QwenImageEditPipeline", "QwenImagePipeline"),
        ("Flux2Pipeline", "FluxPipeline"),
        ("SanaControlNetPipeline", "SanaPipeline"),
        ("ZImageImg2ImgPipeline", "ZImagePipeline"),
        ("StableDiffusion3ControlNetPipeline", "StableDiffusion3Pipeline"),
    ],
)
def test_a_pipeline_that_is_near_a_supported_one_names_it(copy: Path, pipeline: str, nearest: str) -> None:
    _edit(copy / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelError, match=f"no family for a {pipeline}; the nearest of those supported is {nearest}; all: Stable"):
        family_of(copy)


@pytest.mark.parametrize("name", ["z-image", "sana", "qwen-image", "flux2-klein"])
def test_a_missing_text_encoder_is_named(name: str, tmp_path: Path) -> None:
    base = FAMILIES[name](tmp_path / name)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    with pytest.raises(ModelError, match=r"model_index\.json names no text_encoder, which .* needs"):
        load_base(str(base))
    (base / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(base / "text_encoder")
    with pytest.raises(ModelError, match=r"text_encoder has no weights: model\.safetensors is missing"):
        load_base(str(base))


def test_a_base_is_a_directory_a_shipped_name_or_a_hub_id(tiny_base: Path) -> None:
    assert find_base(str(tiny_base)) == tiny_base
    assert (find_base("avatars") / "unet").is_dir()
    with pytest.raises(ModelError, match="no base model 'avatar'"):
        find_base("avatar")
    with pytest.raises(ModelError, match="no base model 'nobody/nothing': not a directory, and the hub did not give it"):
        find_base("nobody/nothing")


@pytest.mark.parametrize(("part", "key", "value"), [("unet", "in_channels", 10), ("vae", "latent_channels", 8)])
def test_a_network_whose_entrance_does_not_fit_its_latents_is_refused_by_name(
    copy: Path, part: str, key: str, value: int
) -> None:
    _edit(copy / part / "config.json", **{key: value})
    widths = r"the unet takes (10|4) channels, the autoencoder's latents have (4|8); .* take (4 or 9|8 or 17)"
    with pytest.raises(ModelError, match=widths):
        family_of(copy).read_spec(copy)


def test_a_spec_whose_parts_do_not_make_what_the_denoiser_takes_is_no_spec(tiny_base: Path) -> None:
    spec = family_of(tiny_base).read_spec(tiny_base)
    unmade = latent_diffusion(["input_ids"], ["encoder_hidden_states"], "mask")
    with pytest.raises(ValueError, match="part 'denoiser' takes 'mask', which no condition and no part before it is"):
        ModelSpec.model_validate({**dict(spec), "parts": unmade})
    conditions = (*spec.conditions, Condition(name="mask", part="encoder"))
    with pytest.raises(ValueError, match="part 'encoder' does not make the condition 'mask'"):
        ModelSpec.model_validate({**dict(spec), "conditions": conditions})
    with pytest.raises(ValueError, match="condition 'mask' has neither channels, tokens nor values, so nothing can stand"):
        Condition(name="mask", absent="zeros")
