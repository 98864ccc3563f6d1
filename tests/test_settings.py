"""Every setting of a base's configuration files is used, known not to matter, or refused by file and name."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from tiny import FAMILIES, STUDENTS, make_tiny_upscaler

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import FlashdiffError, ModelError
from flashdiff.families import _FAMILIES, family_of, find_base, load_base
from flashdiff.generate import decode_rows, generate_rows
from flashdiff.noise import image_noise
from flashdiff.schedule import FlowSchedule
from flashdiff.tasks import check_order

FILES = {
    "sd15": ["unet", "vae", "text_encoder"],
    "sd-upscaler": ["unet", "vae", "text_encoder"],
    "sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "pixart": ["transformer", "vae", "text_encoder"],
    "sd3": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["transformer", "vae", "text_encoder", "text_encoder_2"],
    "pixart-sigma": ["transformer", "vae", "text_encoder"],
    "z-image": ["transformer", "vae", "text_encoder"],
    "sana": ["transformer", "vae", "text_encoder"],
    "qwen-image": ["transformer", "vae", "text_encoder"],
    "flux2-klein": ["transformer", "vae", "text_encoder"],
    "sana-sprint": ["transformer", "vae", "text_encoder"],
}
PATHS = [
    (family, path)
    for family, parts in FILES.items()
    for path in ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts))
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name) for name, make in {**FAMILIES, **STUDENTS, "sd-upscaler": make_tiny_upscaler}.items()}


def _spec_with(base: Path, path: str, **settings: Any) -> ModelSpec:
    """The spec of a base with these settings in one file, which is as before afterwards; None takes a setting out."""
    file = base / path
    before = file.read_text()
    config = {**json.loads(before), **settings}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    try:
        return family_of(base).read_spec(base)
    finally:
        file.write_text(before)


def test_every_family_is_checked() -> None:
    assert FILES.keys() == {module.replace("_", "-") for module in _FAMILIES.values()}


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_an_unknown_setting_of_a_part_of_a_text_encoder_is_refused(bases: dict[str, Path], part: str) -> None:
    path = "text_encoder/config.json"
    inner = json.loads((bases["qwen-image"] / path).read_text())[part]
    with pytest.raises(ModelError, match=rf"text_encoder/config.json: {part}: nothing reads the setting 'made_up' = 7"):
        _spec_with(bases["qwen-image"], path, **{part: {**inner, "made_up": 7}})


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "sd3", "flux"])
def test_a_tokenizer_that_pads_on_the_left_is_refused(bases: dict[str, Path], family: str) -> None:
    with pytest.raises(ModelError, match=r"/tokenizer: 'padding_side' is 'left'; flashdiff pads on the right"):
        _spec_with(bases[family], "tokenizer/tokenizer_config.json", padding_side="left")


def test_every_network_of_a_family_is_checked(bases: dict[str, Path]) -> None:
    for name, base in bases.items():
        assert sorted(family_of(base).networks) == sorted(FILES[name])


@pytest.mark.parametrize(("family", "path"), PATHS)
def test_an_unknown_setting_is_refused_by_file_and_name(bases: dict[str, Path], family: str, path: str) -> None:
    with pytest.raises(ModelError, match="nothing reads the setting 'made_up_setting' = 7") as refused:
        _spec_with(bases[family], path, made_up_setting=7)
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "path", "settings", "said"),
    [
        ("sd15", "unet/config.json", {"class_embed_type": "timestep"}, "'class_embed_type' is \"timestep\", .* null is"),
        ("sd15", "unet/config.json", {"addition_embed_type": "text_time"}, "'addition_embed_type' is \"text_time\""),
        ("sdxl", "unet/config.json", {"addition_embed_type": "text"}, "'addition_embed_type' is \"text\""),
        ("sd15", "unet/config.json", {"attention_type": "gated"}, "'attention_type'"),
        ("sd15", "unet/config.json", {"in_channels": 7}, "the unet takes 7 channels"),
        ("sd15", "unet/config.json", {"_class_name": "UNet3DConditionModel"}, "'_class_name' is 'UNet3DConditionModel'"),
        ("sdxl", "vae/config.json", {"latents_mean": [0, 0, 0, 1]}, r"'latents_mean' is \[0, 0, 0, 1\]"),
        ("sd15", "vae/config.json", {"shift_factor": 0.1}, "'shift_factor' is 0.1, .* null or 0 is"),
        ("flux", "vae/config.json", {"_class_name": "VQModel"}, "'_class_name' is 'VQModel'"),
        ("sd15", "text_encoder/config.json", {"use_attention_mask": True}, "'use_attention_mask' = true"),
        ("sd15", "scheduler/scheduler_config.json", {"clip_sample": True}, "'clip_sample' is true"),
        ("sd15", "scheduler/scheduler_config.json", {"clip_sample": ...}, "'clip_sample' is true, the default that counts where"),
        ("sd15", "scheduler/scheduler_config.json", {"beta_start": ...}, "this DDIMScheduler has no beta_start"),
        ("pixart", "scheduler/scheduler_config.json", {"thresholding": True}, "'thresholding' is true"),
        ("flux", "scheduler/scheduler_config.json", {"invert_sigmas": True}, "'invert_sigmas' is true"),
        ("sd3", "scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "'use_karras_sigmas' is true"),
        ("sd3", "scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "shift_terminal is not supported"),
        ("qwen-image", "scheduler/scheduler_config.json", {"shift_terminal": 1.5}, "'terminal' = 1.5"),
        ("qwen-image", "transformer/config.json", {"zero_cond_t": True}, "'zero_cond_t' is true"),
        ("flux2-klein", "transformer/config.json", {"guidance_embeds": True}, "'guidance_embeds' is true"),
        ("sana", "scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "'use_flow_sigmas' is false"),
        ("sana", "scheduler/scheduler_config.json", {"prediction_type": ...}, "'prediction_type' is \"epsilon\""),
        ("sana", "transformer/config.json", {"interpolation_scale": 0}, "'interpolation_scale' is 0; give a number above 0"),
        ("sana", "transformer/config.json", {"interpolation_scale": "2"}, "misstates '>' not supported"),
        ("sdxl", "model_index.json", {"requires_aesthetics_score": True}, "'requires_aesthetics_score' is true"),
        ("sd15", "model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "'controlnet' = "),
    ],
)
def test_a_value_with_another_meaning_is_refused_by_name(
    bases: dict[str, Path], family: str, path: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(FlashdiffError, match=said):
        _spec_with(bases[family], path, **settings)


@pytest.mark.parametrize(
    ("family", "path", "settings"),
    [
        # As published: stable-diffusion-v1-5, stable-diffusion-xl-base-1.0, PixArt-XL-2-1024-MS, t5-v1_1-xxl, CLIP.
        (
            "sd15",
            "scheduler/scheduler_config.json",
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": False},
        ),
        (
            "sdxl",
            "scheduler/scheduler_config.json",
            {
                "_class_name": "EulerDiscreteScheduler",
                "interpolation_type": "linear",
                "sample_max_value": 1.0,
                "skip_prk_steps": True,
                "timestep_spacing": "leading",
                "use_karras_sigmas": False,
            },
        ),
        (
            "pixart",
            "scheduler/scheduler_config.json",
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "lambda_min_clipped": -5.1,
            },
        ),
        (
            "pixart",
            "transformer/config.json",
            {
                "_class_name": "Transformer2DModel",
                "double_self_attention": False,
                "num_vector_embeds": None,
                "only_cross_attention": False,
                "use_linear_projection": False,
            },
        ),
        (
            "sd15",
            "text_encoder/config.json",
            {"_name_or_path": "openai/clip-vit-large-patch14", "dropout": 0.0, "torch_dtype": "float16"},
        ),
        (
            "flux",
            "text_encoder_2/config.json",
            {"output_past": True, "dense_act_fn": "gelu_new", "is_gated_act": True, "use_cache": True},
        ),
        ("sd15", "unet/config.json", {"_name_or_path": "x", "num_class_embeds": None, "encoder_hid_dim": None}),
        # As transformers 4 wrote them: Qwen3, Gemma 2, Qwen2.5-VL; and Qwen-Image's transformer.
        ("z-image", "text_encoder/config.json", {"rope_theta": 1000000, "rope_scaling": None}),
        ("flux2-klein", "text_encoder/config.json", {"rope_theta": 1000000, "rope_scaling": None}),
        (
            "sana",
            "text_encoder/config.json",
            {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
        ),
        (
            "qwen-image",
            "text_encoder/config.json",
            {
                "image_token_id": 151655,
                "video_token_id": 151656,
                "vision_start_token_id": 151652,
                "vision_end_token_id": 151653,
                "vision_token_id": 151654,
                "rope_theta": 1000000.0,
            },
        ),
        ("qwen-image", "transformer/config.json", {"pooled_projection_dim": 768}),
        (
            "sd15",
            "model_index.json",
            {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "controlnet": None},
        ),
    ],
)
def test_settings_of_published_bases_are_known(bases: dict[str, Path], family: str, path: str, settings: dict[str, Any]) -> None:
    assert _spec_with(bases[family], path, **settings).family == family


@pytest.mark.parametrize("kind", ["Qwen3Config", "Gemma2Config", "Qwen2_5_VLTextConfig"])
def test_transformers_reads_the_older_name_of_a_rotation_s_base(kind: str) -> None:
    read = getattr(transformers, kind).from_dict({"rope_theta": 54321.0})
    assert read.rope_parameters["rope_theta"] == 54321.0


def test_a_setting_at_its_classs_default_is_known_and_at_another_value_is_not(bases: dict[str, Path]) -> None:
    path = "scheduler/scheduler_config.json"
    euler = {"_class_name": "EulerDiscreteScheduler"}
    with pytest.raises(ModelError, match="'use_flow_sigmas' = true"):
        _spec_with(bases["sd15"], path, _class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True)
    assert _spec_with(bases["sd15"], path, _class_name="DPMSolverMultistepScheduler", use_flow_sigmas=False)
    assert _spec_with(bases["sd15"], path, **euler)


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize(
    ("part", "value"), [("vae", ["diffusers", "AutoencoderKL", "x"]), ("text_encoder", "x"), ("text_encoder", ["a", "BertModel"])]
)
def test_a_network_of_another_class_is_refused(bases: dict[str, Path], family: str, part: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"model_index\.json: '{part}' is .*; the family {family} reads \["):
        _spec_with(bases[family], "model_index.json", **{part: value})


@pytest.mark.parametrize(
    ("name", "value"), [("scaling_factor", 0), ("scaling_factor", "x"), ("scaling_factor", True), ("shift_factor", "x")]
)
def test_latents_are_scaled_by_a_number_above_0(bases: dict[str, Path], name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"vae/config.json: '{name}' is .*; it must be a number"):
        _spec_with(bases["sd3"], "vae/config.json", **{name: value})


def test_the_embedded_model_is_known() -> None:
    assert family_of(find_base("avatars")).read_spec(find_base("avatars")).family == "sd15"


@pytest.mark.parametrize(("value", "expected"), [(..., "zeros"), (True, "zeros"), (False, "empty_prompt")])
def test_an_empty_prompt_of_sdxl_is_zeros_unless_the_base_says_otherwise(
    bases: dict[str, Path], value: Any, expected: str
) -> None:
    spec = _spec_with(bases["sdxl"], "model_index.json", force_zeros_for_empty_prompt=value)
    assert {condition.unconditional for condition in spec.conditions} == {expected}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("size", [Size(32, 32), Size(64, 48), Size(16, 64)])
def test_the_odes_dynamic_shift_is_that_of_the_size(bases: dict[str, Path], size: Size, steps: int) -> None:
    """Up to two steps DPM-Solver++ is Euler's method, so the stock pipeline is the reference."""
    _, model = load_base(str(bases["flux"]))
    spec = model.spec = model.spec.model_copy(update={"sizes": (size,)})
    assert spec.sampler.kind == "ode"
    assert isinstance(spec.sampler.schedule, FlowSchedule)
    order = check_order(spec, prompt="a red dog", seed=3, steps=steps, size=size)
    ((row, _),) = generate_rows(model, [order])[0]
    ours = np.clip(decode_rows(model, [row])[0] / 2 + 0.5, 0, 1)
    pipeline: Any = diffusers.FluxPipeline.from_pretrained(bases["flux"])
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(image_noise(3, 0, spec.latent_shape(size)))[None]
    stock = pipeline(
        "a red dog",
        latents=pipeline._pack_latents(latents, *latents.shape),
        width=size.width,
        height=size.height,
        num_inference_steps=steps,
        sigmas=[1 - step / steps for step in range(steps)],
        guidance_scale=3.5,
        output_type="pt",
    ).images[0]
    np.testing.assert_allclose(ours, stock.numpy(), atol=1e-4, rtol=0)
    assert len({spec.sampler.times(2, spec.tokens(other))[1] for other in (Size(32, 32), Size(64, 48))}) == 2
