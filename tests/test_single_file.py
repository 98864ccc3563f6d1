"""Single-file checkpoints: converted to the directory that they were made of, and refused in one line where they cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from original_layout import original_vae
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flashdiff.errors import ModelError
from flashdiff.families import family_of, find_base, load_base
from flashdiff.families.prints import prints_of
from flashdiff.lora import load_fused

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _checkpoint(base: Path, file: Path, *, without: str = "none", dtype: torch.dtype = torch.float32) -> Path:
    """The tiny SD1.5 or SDXL in the naming of its original code; for SDXL without its text encoders."""
    tensors: dict[str, torch.Tensor] = {}
    for name, values in load_file(base / "unet" / "diffusion_pytorch_model.safetensors").items():
        place = next(place for place in _UNET if name.startswith(f"{place}."))
        rest = name.removeprefix(place)
        if "resnets" in place:
            old = next(old for old in _RESNET if rest.startswith(f".{old}."))
            rest = rest.replace(old, _RESNET[old])
        tensors[f"model.diffusion_model.{_UNET[place]}{rest}"] = values
    tensors |= original_vae(base, "first_stage_model.")
    for name, values in load_file(base / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = values
    kept = {name: values.to(dtype).contiguous() for name, values in tensors.items() if not name.startswith(without)}
    save_file(kept, file)
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["sd15"](tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Path:
    """The configuration of the base, without weights."""
    return Path(shutil.copytree(base, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors")))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    model = load_base(str(folder))[1]
    return {f"{part}.{name}": values for part, module in model.weights.items() for name, values in module.named_parameters()}


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(values, other[name]) for name, values in one.items())


def test_a_checkpoint_is_the_directory_it_was_made_of(base: Path, settings: Path, tmp_path: Path) -> None:
    file = _checkpoint(base, tmp_path / "my-model.safetensors")
    found = find_base(str(file), config=str(settings))
    assert found.name == "my-model"
    _assert_same(_weights(base), _weights(found))
    before = (found / "model_index.json").stat().st_mtime_ns
    assert find_base(str(file), config=str(settings)) == found
    assert (found / "model_index.json").stat().st_mtime_ns == before  # converted once


def test_evaluate_reads_a_checkpoint_with_another_autoencoder(base: Path, settings: Path, tmp_path: Path) -> None:
    file = _checkpoint(base, tmp_path / "model.safetensors")
    other = FAMILIES["pixart"](tmp_path / "pixart") / "vae"
    _, model = load_fused(str(file), (), None, config=str(settings), vae=str(other))
    expected = load_file(other / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(values, expected[name]) for name, values in model.weights["vae"].state_dict().items())
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(values, unet[name]) for name, values in model.network.state_dict().items())


def test_a_checkpoint_keeps_its_precision(base: Path, settings: Path, tmp_path: Path) -> None:
    found = find_base(str(_checkpoint(base, tmp_path / "half.safetensors", dtype=torch.float16)), config=str(settings))
    stored = load_file(found / "unet" / "diffusion_pytorch_model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.float16}
    whole = find_base(str(_checkpoint(base, tmp_path / "whole.safetensors")), config=str(settings))
    assert prints_of(found)["float16"] == prints_of(whole)["float16"]


def test_parts_that_a_checkpoint_lacks_come_with_its_configuration(base: Path, settings: Path, tmp_path: Path) -> None:
    file = _checkpoint(base, tmp_path / "bare.safetensors", without="cond_stage_model")
    _assert_same(_weights(base), _weights(find_base(str(file), config=str(base))))
    with pytest.raises(ModelError, match=f"{file} has no text_encoder, and neither has {settings}: give --config"):
        find_base(str(file), config=str(settings))


def test_a_part_that_a_checkpoint_lacks_may_be_a_variant(base: Path, tmp_path: Path) -> None:
    file = _checkpoint(base, tmp_path / "bare.safetensors", without="cond_stage_model")
    variant = Path(shutil.copytree(base, tmp_path / "variant"))
    for weights in variant.glob("*/*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    _assert_same(_weights(base), _weights(find_base(str(file), config=str(variant))))


@pytest.mark.parametrize(
    ("tensors", "metadata", "name"),
    [
        (("v_pred",), {}, "prediction_type"),
        ((), {"modelspec.prediction_type": "v"}, "prediction_type"),
        (("v_pred", "ztsnr"), {}, "rescale_betas_zero_snr"),
    ],
)
def test_a_checkpoint_that_predicts_velocities_needs_a_scheduler_that_says_so(
    tensors: tuple[str, ...], metadata: dict[str, str], name: str, base: Path, settings: Path, tmp_path: Path
) -> None:
    file = _checkpoint(base, tmp_path / "velocity.safetensors")
    save_file({**load_file(file), **{tensor: torch.zeros(0) for tensor in tensors}}, file, metadata)
    scheduler = settings / "scheduler" / "scheduler_config.json"
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in tensors}
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **wanted, name: "epsilon"}))
    with pytest.raises(ModelError, match=f"it says that its scheduler's {name} is .*, which that of .* is not; give --config"):
        find_base(str(file), config=str(settings))
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **wanted}))
    assert family_of(found := find_base(str(file), config=str(settings))).read_spec(found).prediction == "v_prediction"


def test_an_sdxl_is_read_with_the_text_encoders_of_its_configuration(tmp_path: Path) -> None:
    base = FAMILIES["sdxl"](tmp_path / "sdxl")
    file = _checkpoint(base, tmp_path / "xl.safetensors", without="cond_stage_model")
    _assert_same(_weights(base), _weights(find_base(str(file), config=str(base))))


def test_what_cannot_be_read_is_refused_in_one_line(base: Path, settings: Path, tmp_path: Path) -> None:
    def refused(file: Path, config: object = None) -> str:
        with pytest.raises(ModelError) as error:
            find_base(str(file), config=config and str(config))
        assert "\n" not in str(error.value)
        return str(error.value)

    file = _checkpoint(base, tmp_path / "model.safetensors")
    assert "with --config FOLDER, a diffusers model directory" in refused(file)  # offline: the hub is not to be had
    assert "--config nothing: there is no such directory" in refused(file, "nothing")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"never read")
    assert "must be a .safetensors checkpoint; .ckpt and .bin files are pickles" in refused(pickled, settings)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"garbage")
    assert "damaged" in refused(damaged, settings)
    assert "not a checkpoint that diffusers knows" in refused(damaged)
    other = FAMILIES["pixart"](tmp_path / "pixart")
    assert "is a PixArtAlphaPipeline; single files are read of StableDiffusionPipeline" in refused(file, other)
    assert "diffusers cannot read it with the configuration" in refused(file, FAMILIES["sdxl"](tmp_path / "sdxl"))
    assert f"--config {settings}: it is for a base that is a single file" in refused(base, settings)
