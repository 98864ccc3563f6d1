"""The model families, and how a base model is found and loaded. Only this folder knows a model's name."""

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from flashdiff.errors import ModelError
from flashdiff.lora_files import FLASH
from flashdiff.reading import read_json

if TYPE_CHECKING:
    from flashdiff.families.base import ModelFamily, TorchModel

_FAMILIES = {
    "StableDiffusionPipeline": "sd15",
    "LatentConsistencyModelPipeline": "sd15",
    "StableDiffusionInpaintPipeline": "sd15",
    "StableDiffusionInstructPix2PixPipeline": "sd15",
    "StableDiffusionUpscalePipeline": "sd_upscaler",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLInstructPix2PixPipeline": "sdxl",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart_sigma",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxFillPipeline": "flux",
    "FluxKontextPipeline": "flux",
    "ZImagePipeline": "z_image",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana_sprint",
    "QwenImagePipeline": "qwen_image",
    "Flux2KleinPipeline": "flux2_klein",
}
ZOO = Path(__file__).parent.parent / "zoo"
"""Where the embedded model, its LoRA and its adapters are."""


def find_base(base: str, *, variant: str | None = None, config: str | None = None) -> Path:
    """The directory of a base model: a path, the name of the embedded model, or a hub id, `owner/name[@revision]` (downloaded).

    `variant` chooses among weights of several precisions, such as fp16; without it they are taken where there are no others.
    A single-file checkpoint is converted to a directory; `config` is a model directory or hub id with its configuration.
    ModelError when there is no such model, and for weights that cannot be loaded.
    """
    from flashdiff.families.hub import download_base, hub_name
    from flashdiff.families.views import plain_view

    folder = Path(base)
    if folder.is_file():
        from flashdiff.families.single_file import directory_of

        return directory_of(folder, config)
    if config is not None:
        raise ModelError(f"--config {config}: it is for a base that is a single file, and {base} is none")
    if not folder.is_dir():
        if (ZOO / base / "model_index.json").is_file():
            folder = ZOO / base
        elif name := hub_name(base):
            folder = download_base(name, variant)
        else:
            raise ModelError(f"no base model '{base}': give a diffusers model directory, a hub id (owner/name) or 'avatars'")
    if (folder / "training" / "recipe.json").exists() and not (folder / FLASH).exists():
        raise ModelError(f"{folder} holds an unfinished training run: give `flashdiff distill` again, it goes on")
    return plain_view(folder, variant)


def family_of(folder: Path) -> "ModelFamily":
    """The family of a model directory; ModelError when there is none for its pipeline class."""
    try:
        pipeline_class = read_json(folder / "model_index.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{folder} is not a diffusers model directory: it has no readable model_index.json") from None
    if not isinstance(pipeline_class, str) or pipeline_class not in _FAMILIES:
        near = difflib.get_close_matches(str(pipeline_class), _FAMILIES, n=1, cutoff=0.7)
        hint = f"the nearest of those supported is {near[0]}; all: " if near else "supported: "
        raise ModelError(f"{folder}: no family for a {pipeline_class}; {hint}{', '.join(_FAMILIES)}")
    return _family(_FAMILIES[pipeline_class])


def all_families() -> "list[ModelFamily]":
    """Every family, once."""
    return [_family(module) for module in dict.fromkeys(_FAMILIES.values())]


def _family(module: str) -> "ModelFamily":
    family: ModelFamily = importlib.import_module(f"flashdiff.families.{module}").FAMILY
    return family


def load_base(base: str) -> "tuple[ModelFamily, TorchModel]":
    """Find and load a base model in torch."""
    folder = find_base(base)
    family = family_of(folder)
    return family, family.load(folder, family.read_spec(folder))
