"""Which files of a base are loaded: one set of weights for each network, configurations and tokenizers, and nothing else."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashdiff.errors import ModelError
from flashdiff.families import family_of
from flashdiff.files import hash_files
from flashdiff.lora_files import FLASH
from flashdiff.reading import read_json

if TYPE_CHECKING:
    from flashdiff.families.base import ModelFamily

INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model")
_CURE = "convert the base with diffusers: `DiffusionPipeline.from_pretrained(BASE).save_pretrained(FOLDER)` writes safetensors"
_CURE_OF_ENCODER = "`CLIPVisionModelWithProjection.from_pretrained(FOLDER).save_pretrained(OTHER)` writes safetensors"


def networks_of(index: Mapping[str, Any], family: "ModelFamily") -> list[str]:
    """The folders of the networks that a model_index.json has: SD3 may do without T5."""
    return [part for part in family.networks if index.get(part) != [None, None]]


def used_files(
    names: Collection[str], index: Mapping[str, Any], family: "ModelFamily", *, source: object, variant: str | None = None
) -> dict[str, str]:
    """The files of a base that are loaded, among `names` (`folder/file`): the name that a loader looks for, to the file's own.

    The two differ for a variant such as fp16. Without `variant` it is taken where a network has no other weights.
    ModelError for a network without weights that can be loaded, and for a variant that there is not.
    """
    by_folder: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        by_folder.setdefault(folder, []).append(file)
    networks = networks_of(index, family)
    found = {
        part: _Weights(by_folder.get(part, ()), is_diffusers=not isinstance(family.networks[part], str)) for part in networks
    }
    if variant and not any(weights.of(variant) for weights in found.values()):
        others = sorted({other for weights in found.values() for other in weights.variants})
        raise ModelError(f"--variant {variant}: {source} has no such weights; it has {', '.join(others) or 'no variants'}")
    used = {name: name for name in (INDEX, FLASH, _SCHEDULER, *family.further_files) if name in names}
    for part, weights in found.items():
        chosen = {"config.json": "config.json"} | weights.chosen(variant, f"{source}: {part}")
        used |= {f"{part}/{name}": f"{part}/{file}" for name, file in chosen.items()}
        if "text_encoder" in part:
            folder = part.replace("text_encoder", "tokenizer")
            texts = [f"{folder}/{file}" for file in by_folder.get(folder, ()) if file.endswith(_TOKENIZER_SUFFIXES)]
            used |= {name: name for name in texts}
    return used


def network_files(folder: Path, library: str = "diffusers") -> dict[str, str]:
    """`used_files` of a folder with one network of diffusers, or with an image encoder of transformers."""
    names, is_diffusers = [path.name for path in folder.iterdir() if path.is_file()], library == "diffusers"
    cure = _CURE if is_diffusers else _CURE_OF_ENCODER
    return {"config.json": "config.json"} | _Weights(names, is_diffusers=is_diffusers).chosen(None, str(folder), cure)


class _Weights:
    """The safetensors files in the folder of one network."""

    def __init__(self, names: Collection[str], *, is_diffusers: bool) -> None:
        self._names, self._is_diffusers = names, is_diffusers
        self._stem = "diffusion_pytorch_model" if is_diffusers else "model"
        self._pickle = "diffusion_pytorch_model" if is_diffusers else "pytorch_model"

    @property
    def variants(self) -> list[str]:
        """The variants that there are, such as fp16."""
        pattern = re.compile(rf"{self._stem}\.(?:safetensors\.index\.(\w+)\.json|(\w+)\.safetensors)")
        return sorted({match[1] or match[2] for match in map(pattern.fullmatch, self._names) if match})

    def of(self, variant: str | None) -> dict[str, str]:
        """The files of a variant by the names of plain ones; empty where there are none."""
        stem, dot = self._stem, f".{variant}" if variant else ""
        whole = {f"{stem}.safetensors": f"{stem}{dot}.safetensors"}
        sharded = {f"{stem}.safetensors.index.json": f"{stem}.safetensors.index{dot}.json"}
        sharded |= {name: name for name in self._shards(variant)}
        for files in (sharded, whole) if self._is_diffusers else (whole, sharded):  # as the two libraries look for them
            if next(iter(files.values())) in self._names:
                return files
        return {}

    def _shards(self, variant: str | None) -> list[str]:
        """The names of a variant's shards. Those of a view, where the index has the plain name, keep their variant's."""
        pattern = re.compile(rf"{self._stem}(?:\.(\w+))?-\d+-of-\d+(?:\.(\w+))?\.safetensors")
        shards = {match[0]: match[1] or match[2] for match in map(pattern.fullmatch, self._names) if match}
        return [name for name, own in shards.items() if own == variant] or ([*shards] if variant is None else [])

    def chosen(self, variant: str | None, where: str, cure: str = _CURE) -> dict[str, str]:
        """The files of the variant asked for, else the plain ones, else those of the only variant."""
        if files := (variant and self.of(variant)) or self.of(None):
            return files
        if len(self.variants) == 1:
            return self.of(self.variants[0])
        if self.variants:
            raise ModelError(f"{where} has its weights as {', '.join(self.variants)} alone: choose one with --variant")
        if pickles := [name for name in self._names if name.startswith(self._pickle) and name.endswith(".bin")]:
            raise ModelError(f"{where} has its weights as {pickles[0]}, a pickle, which may run any program; {cure}")
        raise ModelError(f"{where} has no weights: {self._stem}.safetensors is missing")


def local_files(folder: Path, *, variant: str | None = None) -> dict[str, str]:
    """`used_files` of a model directory."""
    family = family_of(folder)
    names = {path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()}
    return used_files(names, read_index(folder), family, source=folder, variant=variant)


def base_files(folder: Path) -> list[Path]:
    """All files of a model directory that are read."""
    return [folder / file for file in local_files(folder).values()]


def base_hash(folder: Path) -> str:
    """Hash of the weights and configurations that are loaded: variants that are not, cards and pictures do not count."""
    return hash_files(folder, (path for path in base_files(folder) if path.name != INDEX))


def hash_of_all(folder: Path) -> str:
    """What `base_hash` was when it counted every file of these kinds: LoRAs of that time name it."""
    counted = (".safetensors", ".bin", *_TOKENIZER_SUFFIXES)
    return hash_files(folder, (path for path in folder.glob("*/*") if path.suffix in counted))


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a model directory."""
    try:
        index = read_json(folder / INDEX)
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict):
        raise ModelError(f"{folder} is not a diffusers model directory: it has no readable {INDEX}")
    return index
