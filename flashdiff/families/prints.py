"""Names of a base's weights that do not depend on their precision, so that a base is known again after it was rounded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from flashdiff.errors import ModelError, first_line
from flashdiff.families.files import INDEX, local_files
from flashdiff.files import hash_file
from flashdiff.reading import read_json

_PRECISIONS = ("float16", "bfloat16")
_VALUES = 256  # of each tensor: every training and every merge of a LoRA changes some of them
_NOT_MEANING = ("_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype")


def prints_of(folder: Path) -> dict[str, str]:
    """By precision, a hash of the first values of every tensor rounded to it, with the settings and the tokenizers.

    One is equal for a base and its copy in that precision. Bases that are both rounded, to different precisions, share none.
    """
    files = {name: folder / file for name, file in local_files(folder).items() if name != INDEX}
    weights = [path for path in files.values() if path.suffix == ".safetensors"]
    rest = {name: _content(path) for name, path in files.items() if path not in weights and ".index." not in name}
    tensors = [tensor for path in weights for tensor in _tensors(path)]
    return {
        precision: hashlib.sha256(json.dumps([rest, sorted(hashes)], sort_keys=True).encode()).hexdigest()
        for precision, hashes in zip(_PRECISIONS, zip(*tensors, strict=True), strict=True)
    }


def shared_precision(folder: Path, recorded: Mapping[str, str]) -> str | None:
    """The precision in which the base in `folder` is the one whose prints were recorded; None where it is another base."""
    prints = prints_of(folder) if recorded else {}
    return next((precision for precision, name in recorded.items() if prints.get(precision) == name), None)


def _tensors(path: Path) -> Iterator[tuple[str, ...]]:
    """Of each tensor of a file, its place and shape and the hash of its first values, in every precision."""
    import safetensors
    import torch

    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                part = file.get_slice(name)
                shape = part.get_shape()
                values = part[:1].flatten()[:_VALUES] if shape else file.get_tensor(name).flatten()
                if values.is_floating_point():  # old text encoders also hold their positions, which are numbers from 0 on
                    rounded = (values.to(getattr(torch, precision)).view(torch.int16).numpy() for precision in _PRECISIONS)
                    where = f"{path.parent.name} {name} {shape}"
                    yield tuple(f"{where} {hashlib.sha256(numbers.tobytes()).hexdigest()}" for numbers in rounded)
    except Exception as error:  # whatever a damaged file leads to
        raise ModelError(f"{path} is damaged: {first_line(error)}") from None


def _content(path: Path) -> object:
    """The settings of a network or scheduler, or the hash of a tokenizer's file."""
    if not path.parent.name.startswith("tokenizer"):
        settings = read_json(path)
        return {name: value for name, value in settings.items() if name not in _NOT_MEANING}
    return hash_file(path)
