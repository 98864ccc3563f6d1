"""Single-file checkpoints, in the naming of the models' original code: diffusers converts them to directories in the cache."""

import hashlib
import importlib
import importlib.metadata
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from flashdiff.errors import FlashdiffError, ModelError, first_line
from flashdiff.families import family_of
from flashdiff.families.files import INDEX, networks_of, read_index
from flashdiff.families.hub import download_config, hub_name
from flashdiff.families.views import plain_view
from flashdiff.files import cache_folder, hash_file, hash_files, new_folder
from flashdiff.reading import read_json

_VAE = ("first_stage_model.", "vae.")
_PREFIXES = {
    "StableDiffusionPipeline": {"vae": _VAE, "text_encoder": ("cond_stage_model.",)},
    "StableDiffusionXLPipeline": {
        "vae": _VAE,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    "StableDiffusion3Pipeline": {
        "vae": _VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "FluxPipeline": {"vae": _VAE, "text_encoder": ("text_encoders.clip_l.",), "text_encoder_2": ("text_encoders.t5xxl.",)},
}
"""By pipeline, what the names of a part's tensors start with, where a checkpoint has it."""
_DENOISER = "model.diffusion_model."
"""Before the names of the denoiser's tensors, unless the checkpoint has nothing but the denoiser."""
_READ = (".json", ".txt", ".model", ".safetensors")


def directory_of(file: Path, config: str | None) -> Path:
    """The model directory of a checkpoint, converted once; parts that it lacks are those of `config`, a directory or a hub id.

    ModelError for other files, and where the configuration is not to be had.
    """
    if file.suffix != ".safetensors":
        raise ModelError(
            f"{file}: a base that is one file must be a .safetensors checkpoint; .ckpt and .bin files are pickles, which may run "
            "any program"
        )
    settings = _config_folder(file, config)
    family, index = family_of(settings), read_index(settings)
    if family.pipeline_class not in _PREFIXES:
        supported = ", ".join(_PREFIXES)
        raise ModelError(f"{file}: {settings} is a {family.pipeline_class}; single files are read of {supported}")
    known = [path for path in (settings / INDEX, *settings.glob("*/*")) if path.suffix in _READ and path.is_file()]
    deciding = [hash_file(file), hash_files(settings, known), *map(importlib.metadata.version, ("diffusers", "transformers"))]
    key = hashlib.sha256(" ".join(deciding).encode()).hexdigest()[:24]
    target = cache_folder() / "bases" / key / file.stem
    if not target.is_dir():
        with new_folder(target, ModelError, replace=True) as folder:
            _convert(file, settings, family.pipeline_class, networks_of(index, family), index, folder)
    return target


def _config_folder(file: Path, config: str | None) -> Path:
    """The directory with the configuration of a checkpoint: the one given, else what diffusers takes it for, from the hub."""
    if config is not None and Path(config).is_dir():
        try:
            return plain_view(Path(config), None)  # parts that the checkpoint lacks may be there as a variant
        except ModelError:  # it has configurations alone
            return Path(config)
    repository = config or _repository_of(file)
    on_hub = hub_name(repository)
    if on_hub is None:
        raise ModelError(f"--config {config}: there is no such directory; give a diffusers model directory or a hub id")
    try:
        return download_config(on_hub)
    except ModelError as error:
        cure = "" if config else "; or give its configuration with --config FOLDER, a diffusers model directory"
        raise ModelError(f"{file}: its configuration is that of {repository}: {error}{cure}") from None


def _repository_of(file: Path) -> str:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    try:
        name: str = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    except Exception as error:  # a damaged file, or one of a model that diffusers does not know
        raise ModelError(f"{file}: not a checkpoint that diffusers knows: {first_line(error)}") from None
    return name


def _convert(
    file: Path, settings: Path, pipeline_class: str, networks: list[str], index: Mapping[str, Any], folder: Path
) -> None:
    """Write the model directory, in the precision of the checkpoint."""
    import diffusers

    sizes, dtype = _header(file)
    _check_prediction(file, settings, sizes)
    prefixes = _PREFIXES[pipeline_class]
    given: dict[str, Any] = {"safety_checker": None} if pipeline_class == "StableDiffusionPipeline" else {}
    for part in prefixes:
        if part not in networks:  # SD3's T5, where model_index.json has none
            given[part] = None
        elif not any(name.startswith(prefixes[part]) for name in sizes):
            given[part] = _part_of(settings, part, index[part], file)
        if part in given and given[part] is None:
            given[part.replace("text_encoder", "tokenizer")] = None
    try:
        pipeline = getattr(diffusers, pipeline_class).from_single_file(
            str(file), config=str(settings), local_files_only=True, torch_dtype=dtype, **given
        )
        for part in {*networks} - {*given}:
            _check_filled(file, settings, part, getattr(pipeline, part))
        _check_taken(file, settings, sizes, pipeline, prefixes)
        pipeline.save_pretrained(folder)
        # The class of its configuration: LCM, inpainting, edits, FLUX Fill and Kontext are read with that of their family.
        written = {**read_index(folder), "_class_name": index["_class_name"]}
        (folder / INDEX).write_text(json.dumps(written, indent=2) + "\n")
    except FlashdiffError:
        raise
    except Exception as error:  # diffusers has many kinds for weights that do not fit the configuration
        why = first_line(error).partition(" If you want")[0]  # then follows advice to a programmer
        if "meta tensor" in why:
            why = "it lacks weights that this asks for; give --config with the configuration of this very model"
        raise ModelError(f"{file}: diffusers cannot read it with the configuration of {settings}: {why}") from None


def _check_prediction(file: Path, settings: Path, names: Collection[str]) -> None:
    """ModelError for a checkpoint that says that it predicts velocities, with settings that say something else.

    The tensors `v_pred` and `ztsnr` (zero terminal SNR) say so to ComfyUI, `modelspec.prediction_type` to others; diffusers reads
    none of them.
    """
    with safetensors.safe_open(file, "pt") as opened:
        spec = (opened.metadata() or {}).get("modelspec.prediction_type")
    scheduler = read_json(settings / "scheduler" / "scheduler_config.json")
    wanted: dict[str, str | bool] = {"prediction_type": "v_prediction"} if "v_pred" in names or spec == "v" else {}
    wanted |= {"rescale_betas_zero_snr": True} if "ztsnr" in names else {}
    for name, value in wanted.items():
        if scheduler.get(name) != value:
            raise ModelError(
                f"{file}: it says that its scheduler's {name} is {value}, which that of {settings} is not; "
                "give --config with the configuration of this very model"
            )


def _check_filled(file: Path, settings: Path, part: str, model: Any) -> None:
    """ModelError for a network with weights that the checkpoint lacks; T5's embedding, which is there once, is tied first."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    lacking = [name for name, values in model.named_parameters() if values.is_meta]
    if lacking:
        raise ModelError(
            f"{file}: its {part} lacks {lacking[0]}, which the configuration of {settings} asks for; "
            "give --config with the configuration of this very model"
        )


def _check_taken(
    file: Path, settings: Path, sizes: Mapping[str, int], pipeline: Any, prefixes: Mapping[str, tuple[str, ...]]
) -> None:
    """ModelError for values of the denoiser that no layer took: the converters leave out what they do not know.

    They only rename, join, split and reorder, so the numbers of values before and after are the same.
    """
    others = tuple(prefix for of_part in prefixes.values() for prefix in of_part)
    names = [name for name in sizes if name.startswith(_DENOISER)] or [name for name in sizes if not name.startswith(others)]
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    held = sum(values.numel() for values in getattr(pipeline, part).state_dict().values())
    written = sum(sizes[name] for name in names)
    if held != written:
        scales = [name for name in names if "scale_weight" in name or "scaled_fp8" in name]
        cure = (
            f"{scales[0]} is a scale of 8-bit weights, which diffusers leaves out: give the checkpoint in bf16 or fp16"
            if scales
            else "give --config with the configuration of this very model"
        )
        raise ModelError(f"{file}: its denoiser has {written:,} values, of which the {part} of {settings} takes {held:,}; {cure}")


def _part_of(settings: Path, part: str, kind: list[str], file: Path) -> Any:
    """A part that the checkpoint lacks, from the directory of its configuration; None for SD3's T5, which it may do without."""
    weights = next((settings / part).glob("*.safetensors"), None)
    if weights is None:
        if part == "text_encoder_3":
            return None
        raise ModelError(f"{file} has no {part}, and neither has {settings}: give --config with a directory that has its weights")
    from flashdiff.families.loading import load_part

    return load_part(settings, part, getattr(importlib.import_module(kind[0]), kind[1])).to(_header(weights)[1])


def _header(file: Path) -> tuple[dict[str, int], torch.dtype]:
    """The number of values of each tensor, and the precision to store them in, which holds all of them exactly."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            sizes = {name: math.prod(part.get_shape()) for name, part in slices.items()}
            kinds = {part.get_dtype() for part in slices.values()}
    except Exception as error:  # whatever a damaged file leads to
        raise ModelError(f"{file} is damaged: {first_line(error)}") from None
    if kinds & {"F64", "F32"} or kinds >= {"BF16", "F16"}:
        return sizes, torch.float32
    return sizes, torch.bfloat16 if "BF16" in kinds else torch.float16  # float16 holds all of float8
