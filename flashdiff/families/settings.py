"""Settings of a base's configuration files: each is used, known not to matter, or refused by name.

A network's own class uses its settings, so its signature names them; what flashdiff does in the place of a pipeline or a
scheduler is listed here by hand. A setting at its class's default changes nothing, and counts as known.
"""

import functools
import inspect
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from flashdiff.errors import ModelError

if TYPE_CHECKING:
    from flashdiff.families.base import ModelFamily

Fixed = Mapping[str, tuple[Any, ...]]
"""Settings that flashdiff's code follows at these values alone."""

_OWN = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "sample_size"})
"""Known of every file. Where a class has no sample_size, families read the default image's size from it."""

UNET: Fixed = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "attention_type": ("default",),
}
"""Of Stable Diffusion's UNets: other values ask for inputs that text-to-image does not have."""

AUTOENCODERS = {name: name for name in ("AutoencoderKL", "AutoencoderTiny")}
"""Of every family: classes of a vae, each loaded as itself."""

_DERIVED = {"AutoencoderTiny": {"block_out_channels"}, "QwenImageTransformer2DModel": {"pooled_projection_dim"}}
"""Settings that a class writes, or once wrote, though it does not read them: they repeat others, or never did anything."""

VAE: Fixed = {"latents_mean": (None,), "latents_std": (None,)}
"""Latents are shifted and scaled by one number each."""

UNSHIFTED_VAE: Fixed = {**VAE, "shift_factor": (None, 0)}
"""Of families whose pipelines do not shift latents."""

_SCHEDULE = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "steps_offset",
    "rescale_betas_zero_snr", "set_alpha_to_one", "timestep_spacing", "original_inference_steps", "timestep_scaling",
    "interpolation_type",
}  # fmt: skip
_FLOW = {
    "num_train_timesteps", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "use_dynamic_shifting",
    "shift_terminal", "time_shift_type", "flow_shift",
}  # fmt: skip
_WALK = {
    "skip_prk_steps", "solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final",
    "lambda_min_clipped", "variance_type", "final_sigmas_type", "use_lu_lambdas", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "disable_corrector", "predict_x0", "sigma_min", "sigma_max", "timestep_type", "noise_sampler_seed",
    "dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value",
}  # fmt: skip
"""How the base's own solver walks: flashdiff's takes its place. The last three count only where clipping is on."""
_OFF: Fixed = {"clip_sample": (False, None), "thresholding": (False, None)}
_FLOW_OFF: Fixed = dict.fromkeys(
    ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False, None)
)
_FLOW_ON: Fixed = {"use_flow_sigmas": (True,), "prediction_type": ("flow_prediction", "trigflow")}
"""Of schedulers that serve other models as well."""
_UNUSED_COMPONENTS = {"safety_checker", "feature_extractor", "image_encoder"}
"""Of a pipeline: they judge finished images, or read pictures that flashdiff does not give them."""
_PIPELINE_SETTINGS = {"requires_safety_checker", "add_watermarker", "force_zeros_for_empty_prompt", "is_distilled"}
_PIPELINE_FIXED: Fixed = {"requires_aesthetics_score": (False, None)}

_LISTS = (list, tuple)
_TYPES = {
    bool: ("true or false", "true and false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "text"),
    NoneType: ("null", "null"),
}
"""Of the settings of diffusers' classes: what one value is, and what several are."""

_TRANSFORMERS = {
    "torch_dtype", "dropout", "attn_implementation", "gradient_checkpointing", "n_positions", "output_past", "tokenizer_class",
    "task_specific_params", "decoder_start_token_id", "use_return_dict", "torchscript", "use_bfloat16", "pruned_heads",
    "bos_token_id", "eos_token_id", "pad_token_id",
    "tie_encoder_decoder", "finetuning_task", "prefix", "sep_token_id", "is_decoder", "add_cross_attention",
    "cross_attention_hidden_size", "tf_legacy_loss", "transformers_version", "use_cache", "tie_word_embeddings", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "_attn_implementation_autoset", "cache_implementation",
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id", "in_chans",
    "spatial_patch_size",
    "rope_theta", "rope_scaling",
}  # fmt: skip
"""Settings of training, text generation and pictures, which transformers once wrote into every configuration; and the last two,
which it reads by these older names of theirs, `rope_parameters` now."""

_UNREAD = {"Gemma2Config": {"hidden_act"}}
"""Settings of a class of transformers that its files have and it does not read: Gemma 2 computes with `hidden_activation`."""


def check_settings(folder: Path, family: "ModelFamily", configs: Mapping[str, Mapping[str, Any]]) -> None:
    """ModelError for the first setting of these files, by folder, that nothing reads or that has another meaning here."""
    for part in family.networks:
        if part in configs:
            check_network(f"{folder}/{part}/config.json", family, part, configs[part])
    _check_scheduler(f"{folder}/scheduler/scheduler_config.json", configs["scheduler"], is_flow=family.is_flow)
    _check_pipeline(f"{folder}/model_index.json", family, configs["."])


def check_network(path: str, family: "ModelFamily", part: str, config: Mapping[str, Any]) -> None:
    """`check_settings` of one network's file."""
    classes = family.networks[part]
    if isinstance(classes, str):
        check_transformers_config(path, config, classes)
        return
    written = config.get("_class_name", next(iter(classes)))
    if written not in classes:
        raise ModelError(f"{path}: '_class_name' is {written!r}; the family {family.name} reads {', '.join(classes)}")
    fixed, defaults = family.fixed.get(part, {}), default_settings(written)
    known = _OWN | default_settings(classes[written]).keys() | _DERIVED.get(written, set())
    implied = {name: defaults[name] for name in fixed if name in defaults}
    _check(path, config, known, fixed, defaults, implied)
    if part == "vae":
        _check_scale(path, config)


def check_transformers_config(path: str, config: Mapping[str, Any], kind: str) -> None:
    """`check_settings` of the file of a network with this class of configuration of transformers.

    ModelError for a setting that the class, or that of one of its parts such as `text_config`, does not read.
    """
    import transformers

    _check(path, config, _TRANSFORMERS | _OWN | _config_names(kind) | _UNREAD.get(kind, set()), {}, {})
    for part, inner in getattr(transformers, kind).sub_configs.items():
        if isinstance(found := config.get(part), Mapping):
            _check(f"{path}: {part}", found, _TRANSFORMERS | _OWN | frozenset(inner().to_dict()), {}, {})


def check_config(path: str, config: Mapping[str, Any], kind: str, fixed: Fixed) -> None:
    """`check_settings` of the file of a network of this class of diffusers."""
    _check(path, config, _OWN | default_settings(kind).keys(), fixed, default_settings(kind))


def check_types(path: str, config: Mapping[str, Any], kind: str, nullable: Collection[str] = ()) -> None:
    """ModelError for a setting whose value is not of the type in the signature of this class of diffusers.

    null stands for false and for a default of None as well; the `nullable` settings take it whatever the signature says.
    """
    import diffusers

    defaults = default_settings(kind)
    for name, hint in get_type_hints(getattr(diffusers, kind).__init__).items():
        wanted = hint | None if name in nullable or defaults.get(name, hint) is None else hint
        if name in config and not _is_of(config[name], wanted):
            raise ModelError(f"{path}: '{name}' is {_shown(config[name])}; it must be {_type_in_words(wanted)}")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of a type; a tuple's hint does not count its items, which some classes misstate."""
    choices = _choices(hint)
    if isinstance(value, list):
        return any(all(_is_of(item, get_args(one)[0]) for item in value) for one in choices if get_origin(one) in _LISTS)
    if value is None:
        return bool in choices or NoneType in choices
    return type(value) in choices or (type(value) is int and float in choices)


def _type_in_words(hint: Any) -> str:
    return " or ".join(
        f"a list of {_TYPES[get_args(one)[0]][1]}" if get_origin(one) in _LISTS else _TYPES[one][0] for one in _choices(hint)
    )


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check_scale(path: str, config: Mapping[str, Any]) -> None:
    """ModelError for numbers that latents cannot be shifted and scaled by."""
    for name in ("scaling_factor", "shift_factor"):
        value = config.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and (value > 0 or name == "shift_factor")):
            wanted = "a number above 0" if name == "scaling_factor" else "a number"
            raise ModelError(f"{path}: '{name}' is {_shown(value)}; it must be {wanted}, the one that the autoencoder came with")


def _check(
    path: str,
    config: Mapping[str, Any],
    known: Collection[str],
    fixed: Fixed,
    defaults: Mapping[str, Any],
    implied: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """`implied` are the values of settings that the file may leave out."""
    for name, value in {**implied, **config}.items():
        if name in fixed:
            if not any(type(value) is type(one) and value == one for one in fixed[name]) and not (
                value == 0 and 0 in fixed[name]
            ):
                values = " or ".join(map(_shown, fixed[name]))
                source = "" if name in config else ", the default that counts where it is left out"
                raise ModelError(f"{path}: '{name}' is {_shown(value)}{source}, which is not supported; {values} is")
        elif name not in known and not (name in defaults and _same(value, defaults[name])):
            raise ModelError(
                f"{path}: nothing reads the setting '{name}' = {_shown(value)}, so images might be wrong; "
                "remove it if it does not matter to this model"
            )


def _check_scheduler(path: str, config: Mapping[str, Any], *, is_flow: bool) -> None:
    defaults = default_settings(str(config.get("_class_name")))
    fixed = {**_OFF, **_FLOW_OFF, **_FLOW_ON} if is_flow else _OFF
    implied = {name: defaults[name] for name in ("clip_sample", "thresholding", *_FLOW_ON) if name in fixed and name in defaults}
    known = _OWN | _WALK | (_FLOW if is_flow else _SCHEDULE)
    _check(path, config, known, fixed, defaults, implied)


def _check_pipeline(path: str, family: "ModelFamily", config: Mapping[str, Any]) -> None:
    tokenizers = {part.replace("text_encoder", "tokenizer") for part in family.networks}
    further = {file.partition("/")[0] for file in family.further_files}
    components = {"scheduler", *tokenizers, *further, *family.networks, *_UNUSED_COMPONENTS}
    absent = {name for name, value in config.items() if value in ([None, None], None)}
    known = components | _OWN | _PIPELINE_SETTINGS | {*family.pipeline_settings} | absent
    _check(path, config, known, _PIPELINE_FIXED, {})
    for part, classes in family.networks.items():
        if part in config and part not in absent:
            _check_class(path, family, part, classes, config[part])


def _check_class(path: str, family: "ModelFamily", part: str, classes: str | Mapping[str, str], written: Any) -> None:
    """ModelError where model_index.json names a network of a class that the family would load as another."""
    is_pair = isinstance(written, list) and len(written) == 2 and all(isinstance(name, str) for name in written)
    if isinstance(classes, str):
        stem = classes.removesuffix("Config")
        is_known, wanted = is_pair and written[1].startswith(stem), f'["transformers", "{stem}..."]'
    else:
        is_known = is_pair and written[1] in {*classes, *classes.values()}
        wanted = " or ".join(f'["diffusers", "{name}"]' for name in classes)
    if not is_known:
        raise ModelError(f"{path}: '{part}' is {_shown(written)}; the family {family.name} reads {wanted}")


@functools.cache
def default_settings(name: str) -> Mapping[str, Any]:
    """The settings of a class of diffusers, with their defaults; empty for an unknown class."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if not inspect.isclass(kind):
        return {}
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items() if name != "self"}


@functools.cache
def _config_names(name: str) -> frozenset[str]:
    """The settings of a configuration class of transformers."""
    import transformers

    kind = getattr(transformers, name)
    # Files that transformers 4 wrote have the settings of a text model as well as those of the whole.
    kinds = (kind, *(kind.sub_configs[part] for part in ("text_config",) if part in kind.sub_configs))
    return frozenset().union(*(one().to_dict() for one in kinds))


def _same(value: Any, default: Any) -> bool:
    return bool((tuple(value) if isinstance(value, list) else value) == default)


def _shown(value: Any) -> str:
    """A value as its file has it, short."""
    import json

    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
