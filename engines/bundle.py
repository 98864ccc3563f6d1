"""The bundle: a folder with the compiled parts and `manifest.json`, whole and checked or not opened at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from flashdiff.components import ModelSpec
from flashdiff.config import Record
from flashdiff.errors import BundleError
from flashdiff.files import hash_file
from flashdiff.text import TokenizerSpec

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
PARTS = ("text_encoder", "denoiser", "decoder")

BackendName = Literal["openvino", "onnxruntime"]


def tokenizer_file(tokenizer: TokenizerSpec) -> str:
    """Where a bundle keeps a tokenizer."""
    return f"tokenizers/{tokenizer.name}.json"


class TensorSpec(Record):
    """One named input or output. Dimensions are numbers or names; `batch`, `height` and `width` are filled per bucket."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]

    def shape_for(self, dimensions: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dimensions[d] if isinstance(d, str) else d for d in self.shape)


class PartSpec(Record):
    """One compiled part: its file, relative to the bundle, and its tensors in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class LoraRecord(Record):
    name: str
    weights_hash: str
    weight: float


class Manifest(Record):
    schema_version: int
    flashdiff_version: str
    model: ModelSpec
    base_hash: str
    loras: tuple[LoraRecord, ...]
    backend: BackendName
    precision: Literal["fp32"]
    batch_sizes: tuple[int, ...] = Field(min_length=1)
    """Rising; every part is compiled for each of them."""
    parts: dict[str, PartSpec]
    max_error: dict[str, float]
    """Largest absolute difference to torch found before publishing: per part, and `image` for the whole road."""
    max_error_allowed: float
    step_cost_ms: dict[str, dict[int, float]]
    """Median time per part and batch size, on the building machine: for people; a server measures its own."""
    library_versions: dict[str, str]
    files: dict[str, str]
    """SHA-256 of every other file of the bundle, by relative path."""

    @property
    def bundle_hash(self) -> str:
        """Names what is served: everything but what was measured, so that two builds of the same have the same."""
        return self.model_copy(update={"step_cost_ms": {}, "max_error": {}}).content_hash


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle whose files are all there and unchanged; BundleError says what is not and what to do."""
    rebuild = "build it again with `flashdiff build-engine`"
    if not bundle.is_dir():
        raise BundleError(f"{bundle}: no such bundle")
    try:
        values = json.loads((bundle / MANIFEST).read_text("utf-8"))
        version = values["schema_version"]
    except OSError:
        raise BundleError(f"{bundle} is not a bundle: it has no readable {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{bundle}/{MANIFEST} is damaged; {rebuild}") from None
    if version != SCHEMA_VERSION:
        raise BundleError(f"{bundle} was made with bundle schema {version}, this flashdiff reads {SCHEMA_VERSION}; {rebuild}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise BundleError(f"{bundle}/{MANIFEST} is damaged at '{where}'; {rebuild}") from None
    if set(manifest.parts) != set(PARTS):
        raise BundleError(f"{bundle}/{MANIFEST} is damaged at 'parts'; {rebuild}")
    for name, expected in manifest.files.items():
        path = bundle / name
        if not path.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(f"{bundle}/{MANIFEST} names a file outside the bundle: {name}")
        if not path.is_file():
            raise BundleError(f"{bundle} is incomplete: {name} is missing; {rebuild}")
        if hash_file(path) != expected:
            raise BundleError(f"{bundle} is damaged: {name} has changed since it was built; {rebuild}")
    for name in (*map(tokenizer_file, manifest.model.tokenizers), *(part.file for part in manifest.parts.values())):
        if name not in manifest.files:
            raise BundleError(f"{bundle}/{MANIFEST} is damaged: {name} is not among its files; {rebuild}")
    return manifest
