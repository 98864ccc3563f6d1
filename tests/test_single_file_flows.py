"""Single-file checkpoints of SD3 and FLUX: the weights and images of diffusers' own `from_single_file`."""

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_model, single_file_utils
from original_layout import write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import make_tiny_flux, make_tiny_flux_fill, make_tiny_flux_kontext, make_tiny_sd3, make_tiny_sd35
from transformers import CLIPTextModelWithProjection

from flashdiff.errors import ModelError
from flashdiff.families import family_of, find_base, load_base
from flashdiff.generate import generate_rows
from flashdiff.noise import image_noise
from flashdiff.tasks import check_order

_PROMPT = "a red dog"
_T5 = "text_encoders.t5xxl."


def _with_two_kinds_of_clip(base: Path) -> Path:
    """diffusers tells SD3's CLIPs apart by their width, and gives the first a projection that changes nothing."""
    torch.manual_seed(1)
    first: Any = CLIPTextModelWithProjection.from_pretrained(base / "text_encoder")
    torch.nn.init.eye_(first.text_projection.weight)
    first.save_pretrained(base / "text_encoder")
    config = first.config
    config.hidden_size = 48
    CLIPTextModelWithProjection(config).save_pretrained(base / "text_encoder_2")
    return base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd3": _with_two_kinds_of_clip(make_tiny_sd3(folder / "sd3")),
        "sd35": _with_two_kinds_of_clip(make_tiny_sd35(folder / "sd35")),
        "flux": make_tiny_flux(folder / "flux"),
        "schnell": make_tiny_flux(folder / "schnell", guidance_embeds=False),
    }


@pytest.fixture(scope="module", autouse=True)
def narrow_flux() -> Iterator[None]:
    """diffusers' converter of FLUX has the published width written in it: 3072, where the tiny model has 32."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    narrow: dict[str, Any] = {}
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), vars(single_file_utils) | {}, narrow)
    kinds: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kinds, "checkpoint_mapping_fn", narrow["convert_flux_transformer_checkpoint_to_diffusers"])
        yield


def _settings(base: Path, tmp_path: Path) -> Path:
    """The configuration of the base, without weights."""
    return Path(shutil.copytree(base, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors")))


def _stock(base: Path, file: Path, **given: Any) -> Any:
    """diffusers' own reading of the file.

    T5's embedding, which the file has once, is tied as in older transformers, and T5 set to evaluate, which diffusers forgets.
    """
    kind = diffusers.FluxPipeline if (base.name in ("flux", "schnell")) else diffusers.StableDiffusion3Pipeline
    pipeline: Any = kind.from_single_file(str(file), config=str(base), torch_dtype=torch.float32, **given)
    for model in pipeline.components.values():
        if hasattr(model, "tie_weights"):
            model.eval().tie_weights()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _image(pipeline: Any, latents: torch.Tensor) -> np.ndarray[Any, Any]:
    settings: dict[str, Any] = {"guidance_scale": 7.0}
    if isinstance(pipeline, diffusers.FluxPipeline):
        latents, settings = pipeline._pack_latents(latents, *latents.shape), {"guidance_scale": 3.5}
    settings |= {"sigmas": [1.0, 0.5], "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    image: np.ndarray[Any, Any] = pipeline(prompt=_PROMPT, latents=latents, **settings).images[0]
    return image


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "schnell"])
def test_a_checkpoint_is_what_stock_diffusers_reads(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    base = bases[name]
    file = write_checkpoint(base, tmp_path / "whole.safetensors")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd35" else {}
    stock = _stock(base, file, **absent)
    found = find_base(str(file), config=str(_settings(base, tmp_path)))
    model, made_of = load_base(str(found))[1], load_base(str(base))[1]
    for part, module in model.weights.items():
        for other in (getattr(stock, part), made_of.weights[part]):
            expected = other.state_dict()
            assert expected.keys() == module.state_dict().keys()
            assert all(torch.equal(values, expected[key]) for key, values in module.state_dict().items()), part

    spec = model.spec
    steps = {"sampler": spec.sampler.model_copy(update={"kind": "ode", "default_steps": 2})}
    model.spec = spec = spec.model_copy(update=steps)
    ((_, ours),) = generate_rows(model, [check_order(spec, prompt=_PROMPT, seed=3, steps=2)])[0]
    image = _image(stock, torch.from_numpy(image_noise(3, 0, spec.latent_shape(spec.sizes[0])))[None])
    np.testing.assert_allclose(ours.astype(float), 255 * image, atol=0.51)
    assert ours.std() > 5


@pytest.mark.parametrize(("make", "task"), [(make_tiny_flux_fill, "inpainting"), (make_tiny_flux_kontext, "edit")])
def test_a_checkpoint_of_fill_or_kontext_keeps_its_pipeline(tmp_path: Path, make: Any, task: str) -> None:
    base = make(tmp_path / "flux")
    index = base / "model_index.json"
    own = index.read_text()
    index.write_text(json.dumps(json.loads(own) | {"_class_name": "FluxPipeline"}))  # whose layout the checkpoint has
    file = write_checkpoint(base, tmp_path / "whole.safetensors")
    index.write_text(own)
    found = find_base(str(file), config=str(_settings(base, tmp_path)))
    spec = family_of(found).read_spec(found)
    assert task in spec.tasks
    assert spec.conditions == family_of(base).read_spec(base).conditions


def test_sd3_without_t5_in_the_file_or_its_configuration(bases: dict[str, Path], tmp_path: Path) -> None:
    file = write_checkpoint(bases["sd3"], tmp_path / "incl-clips.safetensors", without=[_T5])
    bare = load_base(str(find_base(str(file), config=str(_settings(bases["sd3"], tmp_path)))))[1]
    assert "text_encoder_3" not in bare.weights
    assert [tokenizer.name for tokenizer in bare.spec.tokenizers] == ["input_ids", "input_ids_2"]
    whole = load_base(str(find_base(str(file), config=str(bases["sd3"]))))[1]  # T5 lies in the configuration's folder
    expected = load_base(str(bases["sd3"]))[1].weights["text_encoder_3"].state_dict()
    assert all(torch.equal(values, expected[key]) for key, values in whole.weights["text_encoder_3"].state_dict().items())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_denoiser_alone_takes_the_other_parts_of_its_configuration(bases: dict[str, Path], tmp_path: Path, prefix: str) -> None:
    for name in ("flux", "sd35"):
        base = bases[name]
        others = ("vae.", "first_stage_model.", "text_encoders.")
        file = write_checkpoint(base, tmp_path / f"{name}.safetensors", without=others, prefix=prefix, dtype=torch.bfloat16)
        found = find_base(str(file), config=str(base))
        stored = {part: load_file(next((found / part).glob("*.safetensors"))) for part in ("transformer", "vae")}
        assert {values.dtype for values in stored["transformer"].values()} == {torch.bfloat16}
        own = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(values, own[key]) for key, values in stored["vae"].items())
        lacking = _settings(base, tmp_path / name)
        with pytest.raises(ModelError, match=f"{file} has no vae, and neither has {lacking}: give --config"):
            find_base(str(file), config=str(lacking))


def test_half_precisions_of_two_kinds_are_kept_exactly(bases: dict[str, Path], tmp_path: Path) -> None:
    file = write_checkpoint(bases["sd35"], tmp_path / "mixed.safetensors")
    tensors = load_file(file)
    kinds = {name: torch.float16 if name.startswith("first_stage_model.") else torch.bfloat16 for name in tensors}
    save_file({name: values.to(kinds[name]) for name, values in tensors.items()}, file)
    found = find_base(str(file), config=str(bases["sd35"]))
    vae = load_file(found / "vae" / "diffusion_pytorch_model.safetensors")
    own = load_file(bases["sd35"] / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(values, own[key].half().float()) for key, values in vae.items())


def _shallow(base: Path, tmp_path: Path) -> Path:
    """The base's configuration with one block in place of two."""
    config = Path(shutil.copytree(base, tmp_path / "shallow")) / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    return tmp_path / "shallow"


def test_what_no_layer_takes_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    def refused(name: str, config: Path, change: Any) -> str:
        file = write_checkpoint(bases[name], tmp_path / "model.safetensors")
        save_file(change(load_file(file)), file)
        with pytest.raises(ModelError) as error:
            find_base(str(file), config=str(config))
        assert "\n" not in str(error.value)
        return str(error.value)

    prefix = "model.diffusion_model."
    assert "norm1.linear.weight expected shape" in refused("sd35", bases["sd3"], dict)
    for config in (bases["schnell"], _shallow(bases["flux"], tmp_path)):
        message = refused("flux", config, dict)
        assert re.search(
            f"its denoiser has [\\d,]+ values, of which the transformer of {config} takes [\\d,]+; give --conf", message
        )
    assert "it lacks weights that this asks for; give --config" in refused("schnell", bases["flux"], dict)
    scaled = {f"{prefix}double_blocks.0.img_mod.lin.scale_weight": torch.ones(1)}
    assert "is a scale of 8-bit weights" in refused("flux", bases["flux"], lambda tensors: tensors | scaled)
    for lost in ("pos_embed", "joint_blocks.1.x_block.mlp.fc1.weight"):
        assert lost in refused("sd3", bases["sd3"], lambda t, lost=lost: {k: v for k, v in t.items() if not k.endswith(lost)})
    lost = f"{_T5}transformer.encoder.final_layer_norm.weight"
    message = refused("sd3", bases["sd3"], lambda tensors: {key: value for key, value in tensors.items() if key != lost})
    assert "its text_encoder_3 lacks encoder.final_layer_norm.weight" in message


@pytest.mark.slow
def test_flux_at_its_published_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of each kind, by diffusers' converter as it is."""
    kinds: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(kinds, "checkpoint_mapping_fn", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    base = make_tiny_flux(tmp_path / "flux")
    shutil.rmtree(base / "transformer")
    sizes: dict[str, Any] = {"in_channels": 64, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    with torch.device("meta"):
        model: Any = diffusers.FluxTransformer2DModel(**sizes, num_layers=1, num_single_layers=1, guidance_embeds=True)
    rows = {name: (torch.arange(len(values)) % 251).bfloat16() for name, values in model.state_dict().items()}  # cheap, all exact
    values = {name: rows[name].view(-1, *[1] * (old.ndim - 1)).expand_as(old) for name, old in model.state_dict().items()}
    model.load_state_dict({name: value.contiguous() for name, value in values.items()}, assign=True)
    model.save_pretrained(base / "transformer")
    file = write_checkpoint(base, tmp_path / "wide.safetensors", without=("vae.", "text_encoders."), dtype=torch.bfloat16)
    found = find_base(str(file), config=str(base))
    stored = load_file(found / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = model.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(values, expected[key]) for key, values in stored.items())
