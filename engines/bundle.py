"""The bundle: a folder with the compiled parts and `manifest.json`, whole and checked or not opened at all."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size
from flashdiff.config import Record
from flashdiff.engines.backends import BACKENDS
from flashdiff.errors import BundleError
from flashdiff.files import hash_file, write_whole
from flashdiff.grown import GrownRecord
from flashdiff.reading import parse_json, read_text
from flashdiff.samplers.options import SamplingOptions
from flashdiff.text import TokenizerSpec

SCHEMA_VERSION = 9
MANIFEST = "manifest.json"
SLOTS = "lora_slots.json"
"""What reads LoRA files for a bundle's slots, where it has any: see `flashdiff.lora_slots.SlotTable`."""

MAX_BATCH = 64

NOT_COMPARED = "--no-compare-stock"
"""Why a bundle has no comparison with the stock pipeline, where none was wanted."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""Of a bundle. In int8 and fp8 are the layers of its denoiser; the rest is in `Backend.rest`."""
QUANTIZED: tuple[Precision, ...] = ("int8", "fp8")
"""Those whose bundles state the quality of their images."""
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
FileName = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$", max_length=1000)]
"""Of a file in the bundle, relative to it."""
Dimension = Annotated[int, Field(ge=1, le=2**31)] | Literal["batch", "height", "width", "image_height", "image_width"]

MAX_ELEMENTS = 2**31
"""Of one tensor, at the largest batch and size."""
_REBUILD = "build it again with `flashdiff build-engine`"
_TRIES = 3


def _check_backend_name(value: object) -> object:
    if value not in tuple(BACKENDS):
        *others, last = map(repr, BACKENDS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return value


BackendName = Annotated[str, BeforeValidator(_check_backend_name)]
"""One of `BACKENDS`."""


def at_scale_0(part: str) -> str:
    """The name, among a manifest's errors, of a part whose control networks, reference and LoRAs have the scale 0."""
    return f"{part} at scale 0"


def replaced_by(spec: ModelSpec, name: str) -> str | None:
    """The part of the bundle that the error of this name is measured from; None: it is measured from torch."""
    return {at_scale_0(part.name): part.replaces for part in spec.replacements}.get(name)


def tokenizer_file(tokenizer: TokenizerSpec) -> str:
    """Where a bundle keeps a tokenizer."""
    return f"tokenizers/{tokenizer.name}.json"


class TensorSpec(Record):
    """One named input or output. Dimensions are numbers or names; `batch`, `height` and `width` are filled per bucket."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[Dimension, ...] = Field(max_length=8)

    def shape_for(self, dimensions: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with `dimensions` in place of its named axes; KeyError for a name that it lacks."""
        return tuple(dimensions[d] if isinstance(d, str) else d for d in self.shape)


def is_spatial(tensors: Iterable[TensorSpec]) -> bool:
    """Whether the shape of a tensor, such as [batch, 4, height, width], depends on the image's size."""
    return any(dimension in ("height", "image_height") for tensor in tensors for dimension in tensor.shape)


class PartFile(Record):
    """One compiled file of a part and the bucket it is for."""

    file: FileName
    size: Size | None = None
    """None: any size."""
    batch: Batch | None = None
    """None: any batch."""


class PartRecord(Record):
    """One compiled part: its files, and its tensors in order."""

    files: tuple[PartFile, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def is_spatial(self) -> bool:
        """Whether it is compiled for every image size, or for none."""
        return is_spatial(self.inputs)

    def file_for(self, size: Size | None, batch: int) -> str:
        """The file that serves a bucket."""
        return next(f.file for f in self.files if f.size in (None, size) and f.batch in (None, batch))


class LoraRecord(Record):
    name: str
    weights_hash: str
    weight: float


class VaeRecord(Record):
    name: str
    weights_hash: str


class ControlRecord(Record):
    name: str
    """By which requests name it."""
    source: str
    """The folder or hub id that it was found by."""
    kind: str
    """The class of diffusers."""
    weights_hash: str


class ReferenceRecord(Record):
    """An IP-Adapter and its image encoder."""

    name: str
    kind: str
    """plain, or plus (a Resampler)."""
    weights_hash: str
    encoder: str
    """Its name; the hash is what counts."""
    encoder_hash: str


class Machine(Record):
    """What a bundle was compiled and checked on."""

    system: str
    """Operating system and architecture, such as Linux x86_64."""
    processor: str
    device: Literal["cpu", "cuda"]
    """Where the parts run."""
    features: tuple[str, ...]
    """Instruction sets of a CPU (avx2, avx512f, ...), or the compute capability of a GPU (sm_89)."""


class LatentCodec(Record):
    """How the autoencoder's own latents become the model's: (latents - shift) * scale."""

    channels: int = Field(ge=1, le=4096)
    factor: int = Field(ge=1, le=256)
    scale: float | None
    """None: every channel has a mean and a deviation of its own."""
    shift: float


class BucketCost(Record):
    """Median time of one call, measured before publishing on the machine that built the bundle."""

    part: str
    size: Size | None
    batch: Batch
    ms: float = Field(ge=0)


class StockComparison(Record):
    """How far an image of the bundle is from the stock pipeline's, in root mean square, pixels in [-1, 1]."""

    made_by: str
    """The pipeline and its scheduler."""
    steps: int
    size: Size
    torch_error: float
    """Of the torch model that the bundle was made from, in float32."""
    error: float
    allowed: float


class Calibration(Record):
    """The prompts whose images calibrate a quantized engine, and by which the quality of a precision is measured."""

    source: str
    """The name of the file, or of the embedded model's world; the hash is what counts."""
    prompts: int = Field(ge=1)
    prompts_hash: str


class Quantization(Record):
    """What was rounded to int8 or fp8, and what was not."""

    part: str
    rows: int
    """Rows of the part's inputs that it was calibrated on."""
    layers: int
    """Layers that are rounded."""
    kept: tuple[str, ...] = Field(max_length=10_000)
    """Layers that stay as they are, because the gate failed with them rounded."""
    tries: int
    """Quantizations until the gate passed."""


class Quality(Record):
    """What a precision costs: images of the calibration prompts, here and by torch in float32, from the same seeds."""

    images: int
    steps: int
    psnr: float
    """To the images in float32, in decibels, over all pixels."""
    attributes: tuple[float, float] | None = None
    """Shares of large attributes that the embedded world's probe reads as the prompt says: in float32, and here."""
    kid: tuple[float, float] | None = None
    """1000 times the kernel distance to renders of the embedded world: in float32, and here."""


class BuildInputs(GrownRecord):
    """What decides a bundle's content, and so its fingerprint."""

    LATER: ClassVar[frozenset[str]] = frozenset({"compiled"})

    base: str
    """Its name; the hash is what counts."""
    base_hash: str
    vae: VaeRecord | None
    """The autoencoder in the place of the base's own."""
    controls: tuple[ControlRecord, ...] = Field((), max_length=8)
    """The networks that requests may be steered by."""
    reference: ReferenceRecord | None = None
    """What reads the reference of a request."""
    loras: tuple[LoraRecord, ...]
    lora_slots: int = Field(0, ge=0, le=defaults.MAX_LORA_SLOTS)
    """How many LoRAs a request may bring."""
    lora_rank: int = Field(0, ge=0, le=defaults.MAX_LORA_RANK)
    """Up to which rank each; 0 without slots."""
    model: ModelSpec
    """What is served, as the base's configuration, a LoRA's flash.json (its grid) and the options make it."""
    guidance: float | None
    """Asked for; None: the family's default, or a flash student's none."""
    sampling: SamplingOptions
    """The sampling options of the build; the sampler that follows from them is in `model`."""
    backend: BackendName
    precision: Precision
    calibration: Calibration | None = None
    """None: the build neither quantizes nor measures quality."""
    sizes: tuple[Size, ...] = Field(min_length=1, max_length=64)
    batch_sizes: tuple[Batch, ...] = Field(min_length=1, max_length=MAX_BATCH)
    """Rising; every part is compiled for each of them."""
    library_versions: dict[str, str]
    version_compatible: bool = False
    """Whether TensorRT plans run on later versions too, more slowly."""
    compiled: bool = False
    """Whether torch's parts are machine code."""
    code: str
    """Hash of the sources that build a bundle."""
    machine: Machine

    @property
    def fingerprint(self) -> str:
        """Equal when a build would give the same bundle."""
        values = {name: getattr(self, name) for name in BuildInputs.model_fields}
        loras = [lora.model_copy(update={"name": ""}) for lora in self.loras]
        model = self.model.model_copy(update={"name": ""})
        vae = self.vae and self.vae.model_copy(update={"name": ""})
        controls = [control.model_copy(update={"source": ""}) for control in self.controls]
        reference = self.reference and self.reference.model_copy(update={"name": "", "encoder": ""})
        calibration = self.calibration and self.calibration.model_copy(update={"source": ""})
        same = {
            "base": "",
            "vae": vae,
            "controls": controls,
            "reference": reference,
            "loras": loras,
            "model": model,
            "sampling": SamplingOptions(),
            "calibration": calibration,
        }
        return BuildInputs(**{**values, **same}).content_hash


class Manifest(BuildInputs):
    LATER: ClassVar[frozenset[str]] = BuildInputs.LATER | {"candidates", "vae_psnr"}

    schema_version: int
    flashdiff_version: str
    latent_codec: LatentCodec
    parts: dict[str, PartRecord]
    rows_are_exact: bool
    """Whether a row has the same values, bit for bit, in every batch size, place and company."""
    max_error: dict[str, float]
    """Difference to torch in float32 found before publishing: see `flashdiff.engines.verify`."""
    max_error_allowed: dict[str, float]
    vae_psnr: float | None = None
    """Of an autoencoder in the place of the base's own: decibels between what both decoders make of the same latents, in torch,
    over an image of each size."""
    quantization: Quantization | None = None
    quality: Quality | None = None
    chosen: str = ""
    """Why `--precision auto` chose the precision; empty where the precision was given."""
    candidates: tuple[Precision, ...] = ()
    """Those that it could build."""
    stock: StockComparison | str = ""
    """The comparison with the stock pipeline, or why there is none."""
    step_costs: tuple[BucketCost, ...]
    """For people; a server measures its own."""
    files: dict[FileName, str]
    """SHA-256 of every other file of the bundle, by relative path."""
    checksum: str = ""
    """Of this manifest without it: it finds accidental edits, and is no signature."""

    @model_validator(mode="after")
    def _tensors_can_be_made(self) -> Self:
        if [*self.batch_sizes] != sorted({*self.batch_sizes}):
            raise ValueError(f"batch_sizes must rise, not {list(self.batch_sizes)}")
        width, height = (max(size[side] for size in self.model.sizes) for side in (0, 1))
        largest = {"batch": self.batch_sizes[-1], "image_height": height, "image_width": width}
        largest |= {"height": height // self.model.latent_factor, "width": width // self.model.latent_factor}
        for name, part in self.parts.items():
            named = {d for tensor in (*part.inputs, *part.outputs) for d in tensor.shape if isinstance(d, str)}
            if not part.is_spatial and named - {"batch"}:
                raise ValueError(f"{name} has outputs of the image's size, and no input that has it")
            for tensor in (*part.inputs, *part.outputs):
                if math.prod(tensor.shape_for(largest)) > MAX_ELEMENTS:
                    raise ValueError(f"{name}: {tensor.name} would have more than {MAX_ELEMENTS} elements")
        return self

    @property
    def bundle_hash(self) -> str:
        """Names what is served: everything but what was measured, so that two builds of the same have the same."""
        measured: dict[str, object] = {
            "step_costs": (),
            "max_error": {},
            "vae_psnr": None,
            "quality": None,
            "chosen": "",
            "candidates": (),
            "stock": "",
            "checksum": "",
        }
        return self.model_copy(update=measured).content_hash

    def sealed(self) -> Self:
        """With its checksum."""
        return self.model_copy(update={"checksum": self.model_copy(update={"checksum": ""}).content_hash})


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write the manifest with its checksum, whole or not at all."""
    write_whole(bundle / MANIFEST, manifest.sealed().model_dump_json(indent=2) + "\n")


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle whose files are all there and unchanged; BundleError says what is not and what to do."""
    return read_bundle(bundle, lambda path, _: hash_file(path))


def read_bundle(bundle: Path, hash_of: Callable[[Path, str], str]) -> Manifest:
    """`read_manifest`, with each file's SHA-256 from `hash_of`, which gets its path and its name in the bundle.

    A bundle that is replaced meanwhile is read again from the start.
    """
    for _ in range(_TRIES):
        text, manifest = parse_manifest(bundle)
        try:
            _check_files(bundle, manifest, hash_of)
        except BundleError:
            if _text_of(bundle) == text:
                raise
        else:
            return manifest
    raise BundleError(f"{bundle} changed while it was opened; try again when its files stay as they are")


def parse_manifest(bundle: Path) -> tuple[str, Manifest]:
    """The text of a bundle's manifest and what it says, without a look at the other files; BundleError when it is damaged."""
    if not bundle.is_dir():
        raise BundleError(f"{bundle} is a file; a bundle is a folder" if bundle.is_file() else f"{bundle}: no such bundle")
    text = _text_of(bundle)
    if text is None:
        raise BundleError(f"{bundle} is not a bundle: it has no readable {MANIFEST}")
    try:
        values = parse_json(text)
        version = values["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{bundle}/{MANIFEST} is damaged; {_REBUILD}") from None
    if version != SCHEMA_VERSION:
        raise BundleError(f"{bundle} was made with bundle schema {version}, this flashdiff reads {SCHEMA_VERSION}; {_REBUILD}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or error.errors()[0]["msg"]
        raise BundleError(f"{bundle}/{MANIFEST} is damaged at '{where}'; {_REBUILD}") from None
    if manifest.sealed() != manifest:
        raise BundleError(f"{bundle}/{MANIFEST} has changed since it was built; {_REBUILD}")
    if set(manifest.parts) != {part.name for part in manifest.model.parts}:
        raise BundleError(f"{bundle}/{MANIFEST} is damaged at 'parts'; {_REBUILD}")
    return text, manifest


def _text_of(bundle: Path) -> str | None:
    try:
        return read_text(bundle / MANIFEST)
    except (OSError, ValueError):
        return None


def _check_files(bundle: Path, manifest: Manifest, hash_of: Callable[[Path, str], str]) -> None:
    for name, expected in manifest.files.items():
        path, parts = bundle / name, PurePosixPath(name)
        # By its name too: a copy of the bundle has no links that bring a way up back inside.
        climbs = parts.is_absolute() or ".." in parts.parts
        if climbs or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
            raise BundleError(f"{bundle}/{MANIFEST} names a file outside the bundle: {name}")
        if not path.is_file():
            raise BundleError(f"{bundle} is incomplete: {name} is missing; {_REBUILD}")
        try:
            found = hash_of(path, name)
        except OSError as error:
            raise BundleError(f"{error.filename or path}: {error.strerror or error}") from None
        if found != expected:
            raise BundleError(f"{bundle} is damaged: {name} has changed since it was built; {_REBUILD}")
    needed = [tokenizer_file(tokenizer) for tokenizer in manifest.model.tokenizers]
    needed += [file.file for part in manifest.parts.values() for file in part.files]
    needed += [SLOTS] if manifest.lora_slots else []
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"{bundle}/{MANIFEST} is damaged: {name} is not among its files; {_REBUILD}")
    for path in bundle.rglob("*"):  # a server must not seem to run what it does not
        name = path.relative_to(bundle).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if path.is_file() and name not in manifest.files and name != MANIFEST and not hidden:
            raise BundleError(f"{bundle} holds {name}, which it was not published with; remove it")
