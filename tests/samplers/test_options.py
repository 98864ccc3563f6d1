"""How a model comes to be sampled: presets, options, a base's own scheduler, a LoRA's metadata, and what is said of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
from tiny import make_tiny_flux, make_tiny_qwen_image, make_tiny_sd15, make_tiny_sdxl

from flashdiff import cli, defaults
from flashdiff.components import ModelSpec
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.describe import describe_sampler
from flashdiff.engines.plan import describe, plan_build
from flashdiff.errors import ConfigError, LoraError
from flashdiff.families import family_of
from flashdiff.lora import fused_spec, read_flash_info
from flashdiff.lora_files import FLASH, KOHYA, WEIGHTS
from flashdiff.presets import PRESETS
from flashdiff.samplers import SAMPLERS
from flashdiff.samplers.options import SamplingOptions, sampled_as
from flashdiff.samplers.recognise import few_step_hint
from flashdiff.samplers.settings import Spacing
from flashdiff.sampling import Sampler
from flashdiff.schedule import FlowSchedule


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl")


def _spec(base: Path) -> ModelSpec:
    return family_of(base).read_spec(base)


def _edit_scheduler(base: Path, **changes: Any) -> None:
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl, tmp_path / "copy"))


def test_the_command_line_names_every_sampler_that_a_family_can_use() -> None:
    assert set(defaults.SAMPLERS) == {"ode", *SAMPLERS}
    assert set(get_args(Sampler.model_fields["kind"].annotation)) == {"flash", "ode", *SAMPLERS}
    assert get_args(Spacing) == defaults.SPACINGS


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_sampler_of_its_family_and_names_its_source(name: str, sdxl: Path) -> None:
    preset = PRESETS[name]
    assert preset.source.count("/") == 1
    if preset.family == "sdxl":
        sampler = sampled_as(_spec(sdxl), SamplingOptions(preset=name)).sampler
        assert (sampler.kind, sampler.default_steps) == (preset.sampler, preset.steps)
        assert sampler.evaluations_per_step == (2 if preset.guidance > 1 else 1)
        assert len(sampler.times(preset.steps)) == preset.steps


def test_known_presets_take_the_times_their_authors_give(sdxl: Path) -> None:
    def times(preset: str) -> list[float]:
        spec = sampled_as(_spec(sdxl), SamplingOptions(preset=preset))
        return [*spec.sampler.times(spec.sampler.default_steps)]

    assert times("sdxl-lightning-4") == [999, 749, 499, 249]
    assert times("sdxl-lightning-1") == [999]
    assert times("dmd2-sdxl-4") == [999, 749, 499, 249]
    assert times("dmd2-sdxl-1") == [399]
    assert times("hyper-sdxl-1-unet") == [800]
    assert times("lcm-lora-sdxl") == [999, 759, 499, 259]
    assert sampled_as(_spec(sdxl), SamplingOptions(preset="sdxl-lightning-1")).prediction == "sample"


def test_lightnings_shift_is_its_own_at_every_size(tmp_path: Path) -> None:
    spec = _spec(make_tiny_qwen_image(tmp_path / "qwen-image"))
    assert isinstance(spec.sampler.schedule, FlowSchedule)
    assert (spec.sampler.schedule.terminal, spec.sampler.evaluations_per_step) == (0.02, 2)
    sampler = sampled_as(spec, SamplingOptions(preset="qwen-image-lightning-4")).sampler
    assert sampler.schedule == FlowSchedule(shift=3.0)
    assert (sampler.max_steps, sampler.evaluations_per_step) == (4, 1)
    assert sampler.times(4, 4096) == pytest.approx([1000, 900, 750, 500])
    assert sampler.times(4, 16) == sampler.times(4, 4096)
    own = sampled_as(spec, SamplingOptions(preset="qwen-image-lightning-8", shift=2.5)).sampler
    assert own.schedule == FlowSchedule(shift=2.5)
    assert few_step_hint("qwen-image", ["Qwen-Image-Lightning-4steps-V1.0"]) == "--preset qwen-image-lightning-4"


@pytest.mark.parametrize(
    ("family", "file", "preset"),
    [
        ("sd3", "Hyper-SD3-8steps-CFG-lora.safetensors", "hyper-sd3-8-cfg"),
        ("flux", "Hyper-FLUX.1-dev-8steps-lora.safetensors", "hyper-flux-8"),
        ("flux", "Hyper-FLUX.1-dev-16steps-lora.safetensors", "hyper-flux-16"),
        ("sdxl", "pcm_sdxl_smallcfg_2step_converted.safetensors", "pcm-sdxl-2"),
        ("sd15", "pcm_sd15_normalcfg_16step_converted.safetensors", "pcm-sd15-16-cfg"),
        ("sdxl", "pcm_sdxl_lcmlike_lora_converted.safetensors", "pcm-sdxl-lcm"),
        ("sd15", "TCD-SD21-base-LoRA", "tcd-sd21"),
        ("sd15", "TCD-SD15-LoRA", "tcd-sd15"),
        ("sd3", "flash-sd3", "flash-sd3"),
        ("sd3", "pcm_deterministic_2step_shift1.safetensors", "pcm-sd3-2-shift1"),
        ("sd3", "pcm_deterministic_4step_shift3.safetensors", "pcm-sd3-4-shift3"),
        ("sd3", "pcm_stochastic_shift3.safetensors", "pcm-sd3-stochastic"),
        ("qwen-image", "Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors", "qwen-image-lightning-4"),
        ("sd15", "flash-sd", "flash-sd15"),
    ],
)
def test_students_are_known_by_the_names_of_their_files(family: str, file: str, preset: str) -> None:
    assert few_step_hint(family, [file]) == f"--preset {preset}"


def test_an_option_overrides_its_preset(sdxl: Path) -> None:
    sampler = sampled_as(_spec(sdxl), SamplingOptions(preset="tcd-sdxl", eta=0.5, steps=2, guidance=1.5)).sampler
    assert (sampler.kind, sampler.eta, sampler.default_steps, sampler.guidance) == ("tcd", 0.5, 2, 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "sdxl-lightnin"}, "--preset sdxl-lightnin: no such preset; those for sdxl: sdxl-lightning-1, "),
        ({"preset": "tcd-sd15"}, "--preset tcd-sd15: it is for the family sd15, this base is sdxl"),
        ({"preset": "tcd-sdxl", "sampler": "lcm"}, "--sampler lcm: the preset tcd-sdxl says tcd; give one of the two"),
        ({"sampler": "dpm"}, "--sampler dpm: give ode, lcm, "),
        ({"sampler": "flow-euler"}, "--sampler flow-euler: this model predicts epsilon; take ode, lcm, euler"),
        ({"sampler": "euler", "eta": 0.5}, "--eta 0.5: the sampler euler does not take it; ddim, tcd, flow-euler do"),
        ({"sampler": "lcm", "spacing": "trailing"}, "--spacing trailing: the sampler lcm does not take it; euler, euler-anc"),
        ({"spacing": "trailing"}, "--spacing trailing: the sampler ode does not take it"),
        ({"shift": 3.0}, "--shift 3: this base is no rectified flow, and has no shift"),
        ({"sampler": "tcd", "eta": 1.5}, "--eta 1.5: give a number from 0 to 1"),
        ({"sampler": "lcm", "timesteps": (249, 999)}, r"timesteps \[249, 999\]: give falling whole numbers"),
        ({"sampler": "lcm", "timesteps": (1500, 3)}, "--timesteps 1500: this model's times go from 0 to 999"),
        ({"sampler": "lcm", "steps": 60}, "--steps 60: this model takes 1 to 50"),
        ({"sampler": "lcm", "steps": 0}, "--steps 0: give a whole number from 1 on"),
        ({"guidance": 101}, "--guidance 101.0: give a number from 0 to 100"),
    ],
)
def test_options_that_do_not_fit_are_refused(sdxl: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampled_as(_spec(sdxl), SamplingOptions(**options))


def test_a_base_says_itself_that_it_is_a_consistency_model(copy: Path) -> None:
    assert _spec(copy).sampler.kind == "ode"
    _edit_scheduler(copy, _class_name="LCMScheduler", original_inference_steps=25, timestep_scaling=5.0)
    sampler = _spec(copy).sampler
    assert (sampler.kind, sampler.original_steps, sampler.timestep_scaling) == ("lcm", 25, 5.0)
    assert (sampler.default_steps, sampler.guidance) == (4, 1.0)
    _edit_scheduler(copy, _class_name="TCDScheduler")
    assert _spec(copy).sampler.kind == "tcd"


def test_eulers_trailing_times_are_taken_from_a_base_and_its_leading_ones_are_not(copy: Path) -> None:
    _edit_scheduler(copy, _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    assert _spec(copy).sampler.kind == "euler-ancestral"
    assert sampled_as(_spec(copy), SamplingOptions(sampler="ode")).sampler.kind == "ode"
    _edit_scheduler(copy, _class_name="EulerDiscreteScheduler", timestep_spacing="leading")
    assert _spec(copy).sampler.kind == "ode"


def test_a_few_step_schedulers_setting_that_is_not_supported_is_named(copy: Path) -> None:
    _edit_scheduler(copy, _class_name="LCMScheduler", thresholding=True)
    with pytest.raises(ConfigError, match="scheduler: the scheduler's thresholding = True is not supported; set it to false"):
        _spec(copy)


def test_zero_terminal_snr_goes_with_v_prediction_alone(copy: Path) -> None:
    _edit_scheduler(copy, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    alphas, sigmas = _spec(copy).sampler.schedule.levels([999, 0])
    assert (alphas[0], sigmas[0]) == (0, 1)
    _edit_scheduler(copy, prediction_type="epsilon")
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr is not supported with prediction_type epsilon"):
        _spec(copy)


def test_a_flux_without_embedded_guidance_is_a_few_step_student_and_takes_none(tmp_path: Path) -> None:
    schnell, dev = make_tiny_flux(tmp_path / "schnell", guidance_embeds=False), make_tiny_flux(tmp_path / "dev")
    sampler = _spec(schnell).sampler
    assert (sampler.kind, sampler.default_steps, sampler.evaluations_per_step) == ("flow-euler", 4, 1)
    with pytest.raises(ConfigError, match="--guidance 3: schnell was distilled to run without guidance; leave it out, or give 0"):
        fused_spec(_spec(schnell), (), SamplingOptions(guidance=3.0))
    assert _spec(dev).sampler.kind == "ode"
    assert fused_spec(_spec(dev), (), SamplingOptions(guidance=2.0)).sampler.embedded_guidance == 2.0


def test_a_latent_consistency_pipeline_is_a_base_with_its_guidance_embedded(tmp_path: Path) -> None:
    base = make_tiny_sd15(tmp_path / "lcm", time_cond_proj_dim=32)
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline"))
    _edit_scheduler(base, _class_name="LCMScheduler")
    sampler = _spec(base).sampler
    assert (sampler.kind, sampler.embedded_guidance, sampler.evaluations_per_step) == ("lcm", 8.5, 1)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("sdxl_lightning_1step_unet_x0.safetensors", "sdxl-lightning-1"),
        ("sdxl_lightning_4step_lora.safetensors", "sdxl-lightning-4"),
        ("sdxl-turbo", "sdxl-turbo"),
        ("lcm-lora-sdxl", "lcm-lora-sdxl"),
        ("Hyper-SDXL-8steps-lora", "hyper-sdxl-8"),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors", "hyper-sdxl-8-cfg"),
        ("Hyper-SDXL-1step-lora.safetensors", "hyper-sdxl-1"),
        ("Hyper-SDXL-1step-Unet.safetensors", "hyper-sdxl-1-unet"),
        ("dmd2_sdxl_4step", "dmd2-sdxl-4"),
        ("dmd2_sdxl_1step_unet_fp16.bin", "dmd2-sdxl-1"),
        ("TCD-SDXL-LoRA", "tcd-sdxl"),
        ("pcm_sdxl_smallcfg_4step_converted.safetensors", "pcm-sdxl-4"),
        ("flash-sdxl", "flash-sdxl"),
    ],
)
def test_a_few_step_students_name_is_known_with_its_preset(name: str, preset: str) -> None:
    assert few_step_hint("sdxl", [name]) == f"--preset {preset}"


@pytest.mark.parametrize("name", ["watercolor", "my_style_v2", "lightbox", "alcmene", "steps-of-rome", "hyperrealism"])
def test_a_style_is_not_taken_for_a_student(name: str) -> None:
    assert few_step_hint("sdxl", [name]) is None


def _lora(path: Path, metadata: dict[str, str] | None = None) -> Path:
    import torch

    safetensors.torch.save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, path, metadata)
    return path


def _options(base: Path, out: Path, *loras: Path, **more: Any) -> BuildOptions:
    return BuildOptions(base=str(base), out=out, loras=tuple((str(lora), 1.0) for lora in loras), batch_sizes=(1, 2), **more)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [("sdxl_lightning_4step_lora", None), ("mystery", {"modelspec.title": "SDXL Lightning 4step"})],
)
def test_a_student_without_a_sampler_gets_one_line_that_says_what_to_add(
    sdxl: Path, tmp_path: Path, name: str, metadata: dict[str, str] | None
) -> None:
    lora = _lora(tmp_path / f"{name}.safetensors", metadata)
    lines = [line for line in describe(plan_build(_options(sdxl, tmp_path / "out", lora))) if line.startswith("warning")]
    assert len(lines) == 1
    assert f"{lora} looks like a few-step student" in lines[0]
    assert "sampled by 50 steps of ode, guidance 5; if it is one, add --preset sdxl-lightning-4" in lines[0]
    plan = plan_build(_options(sdxl, tmp_path / "out", lora, preset="sdxl-lightning-4"))
    assert not plan.warnings
    assert plan.inputs.model.sampler.kind == "euler"


def test_a_plain_style_gets_no_warning(sdxl: Path, tmp_path: Path) -> None:
    assert plan_build(_options(sdxl, tmp_path / "out", _lora(tmp_path / "watercolor.safetensors"))).warnings == ()


def test_a_base_that_says_itself_that_it_takes_few_steps_gets_no_warning(copy: Path, tmp_path: Path) -> None:
    turbo = copy.rename(tmp_path / "sdxl-turbo")
    _edit_scheduler(turbo, _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    (warning,) = plan_build(_options(turbo, tmp_path / "out")).warnings
    assert warning
    assert "sampled by 50 steps of euler-ancestral, guidance 5; if it is one, add --preset sdxl-turbo" in warning
    _edit_scheduler(turbo, _class_name="LCMScheduler")
    assert plan_build(_options(turbo, tmp_path / "out", _lora(tmp_path / "watercolor.safetensors"))).warnings == ()


@pytest.mark.parametrize("guidance", ["0", "0.0", "1"])
def test_guidance_zero_on_the_command_line_is_zero(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], guidance: str
) -> None:
    assert cli.main(["build-engine", str(sdxl), "--out", str(tmp_path / "out"), "--guidance", guidance, "--dry-run"]) == 0
    assert re.search(r"^sampler +ODE, epsilon, up to 100 steps, without guidance$", capsys.readouterr().out, re.MULTILINE)


def test_guidance_zero_in_a_recipe_is_zero_and_the_recipe_says_the_sampler(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "student.toml"
    recipe.write_text(f"base = '{sdxl}'\nsampler = 'lcm'\ntimesteps = [999, 499]\nguidance = 0\n")
    assert cli.main(["build-engine", str(recipe), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sampler"))
    assert line == "sampler      lcm, epsilon, up to 2 steps, without guidance; 2 by default, at [999, 499]"


def test_what_a_base_without_guidance_needs_is_a_batch_of_one(sdxl: Path, tmp_path: Path) -> None:
    options = _options(sdxl, tmp_path / "out", guidance=0.5).model_copy(update={"batch_sizes": (1,)})
    assert plan_build(options).inputs.model.sampler.evaluations_per_step == 1


def test_a_model_describes_its_sampler(sdxl: Path) -> None:
    def described(**options: Any) -> str:
        return describe_sampler(sampled_as(_spec(sdxl), SamplingOptions(**options)))

    assert described() == "ODE, epsilon, up to 100 steps, guidance 5"
    assert described(preset="tcd-sdxl") == (
        "tcd, epsilon, eta 0.3, original steps 50, up to 50 steps, without guidance; 4 by default, at [999, 759, 499, 259]"
    )
    assert described(preset="sdxl-lightning-2") == (
        "euler, epsilon, spacing trailing, up to 2 steps, without guidance; 2 by default, at [999, 499]"
    )


@pytest.fixture
def moved(flash_lora: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Our own student's file under another name and in another place, without flash.json."""

    def move(name: str) -> Path:
        target: Path = tmp_path / "elsewhere.safetensors"
        shutil.copyfile(flash_lora / name, target)
        return target

    return move


@pytest.mark.slow
@pytest.mark.parametrize("name", [WEIGHTS, KOHYA])
def test_our_own_student_keeps_its_grid_when_its_file_is_moved(
    flash_lora: Path, tiny_base: Path, moved: Callable[[str], Path], name: str
) -> None:
    info = read_flash_info(moved(name))
    assert info == read_flash_info(flash_lora)
    assert info
    sampler = fused_spec(_spec(tiny_base), [moved(name)], SamplingOptions()).sampler
    assert sampler.grid == info.grid
    with pytest.raises(ConfigError, match="--sampler lcm: the flash student says itself how it is sampled; leave it out"):
        fused_spec(_spec(tiny_base), [moved(name)], SamplingOptions(sampler="lcm"))
    assert fused_spec(_spec(tiny_base), [moved(name)], SamplingOptions(guidance=0.0)).sampler.kind == "flash"


@pytest.mark.slow
def test_a_grid_in_the_metadata_that_is_damaged_is_named(flash_lora: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(flash_lora / WEIGHTS)
    broken = tmp_path / "broken.safetensors"
    safetensors.torch.save_file(weights, broken, {"flashdiff": "{}"})
    with pytest.raises(LoraError, match=r"broken\.safetensors: its metadata 'flashdiff' is damaged: .*'grid' is missing"):
        read_flash_info(broken)
    assert not (tmp_path / FLASH).exists()
