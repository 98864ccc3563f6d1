"""Single-file checkpoints, in the naming of the models' original code: diffusers converts them to directories in the cache."""

import hashlib
import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from flashdiff.errors import FlashdiffError, ModelError, first_line
from flashdiff.families import family_of
from flashdiff.families.files import INDEX, networks_of, read_index
from flashdiff.families.hub import download_config, hub_name
from flashdiff.files import cache_folder, hash_file, hash_files, new_folder

_TEXT = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
_PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""What the names of a part's tensors start with, where a checkpoint has it."""
_PRECISIONS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The widest first: a file may hold several."""
_READ = (".json", ".txt", ".model", ".safetensors")
_SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


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
    if family.pipeline_class not in _SUPPORTED:
        supported = ", ".join(_SUPPORTED)
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

    names, dtype = _header(file)
    given: dict[str, Any] = {"safety_checker": None} if pipeline_class == "StableDiffusionPipeline" else {}
    for part in networks:
        if part in _PREFIXES and not any(name.startswith(_PREFIXES[part]) for name in names):
            given[part] = _part_of(settings, part, index[part], file)
            if given[part] is None:
                given[part.replace("text_encoder", "tokenizer")] = None
    try:
        pipeline = getattr(diffusers, pipeline_class).from_single_file(
            str(file), config=str(settings), local_files_only=True, torch_dtype=dtype, **given
        )
        pipeline.save_pretrained(folder)
    except FlashdiffError:
        raise
    except Exception as error:  # diffusers has many kinds for weights that do not fit the configuration
        raise ModelError(f"{file}: diffusers cannot read it with the configuration of {settings}: {first_line(error)}") from None


def _part_of(settings: Path, part: str, kind: list[str], file: Path) -> Any:
    """A part that the checkpoint lacks, from the directory of its configuration; None for SD3's T5, which it may do without."""
    if not any((settings / part).glob("*.safetensors")):
        if part == "text_encoder_3":
            return None
        raise ModelError(f"{file} has no {part}, and neither has {settings}: give --config with a directory that has its weights")
    from flashdiff.families.loading import load_part

    return load_part(settings, part, getattr(importlib.import_module(kind[0]), kind[1]))


def _header(file: Path) -> tuple[list[str], torch.dtype]:
    """The names of a file's tensors, and the precision to store them in: their own, or float16, which holds all of float8."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            names = list(opened.keys())
            kinds = {opened.get_slice(name).get_dtype() for name in names}
    except Exception as error:  # whatever a damaged file leads to
        raise ModelError(f"{file} is damaged: {first_line(error)}") from None
    return names, next((dtype for kind, dtype in _PRECISIONS.items() if kind in kinds), torch.float16)
