"""What a build takes: disk, memory and time, estimated from numbers of parameters in the headers of the weights."""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import safetensors

from flashdiff.components import ModelSpec
from flashdiff.engines.backends.base import Backend, Export
from flashdiff.engines.bundle import BuildInputs
from flashdiff.errors import BundleError
from flashdiff.families.base import ModelFamily
from flashdiff.families.files import base_files
from flashdiff.families.ip_adapter import LAYERS, PROJECTION, VISION, Found, encoder_files
from flashdiff.families.networks import files_of_network
from flashdiff.files import cache_folder, shown_bytes
from flashdiff.references import ENCODER

_MOST_BYTES = {"text_encoder": 3, "encoder": 4, "decoder": 4}
"""Of a weight in float16, by part: some of T5's layers and all of some autoencoders stay in float32."""
_COMPILING_S = 60
"""Of a small part at one bucket by torch's inductor."""


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Estimates, of which those of disk space are upper bounds."""

    parameters: Mapping[str, int]
    """Of each part."""
    disk_bytes: Mapping[Path, int]
    """What the build may write, at most, where."""
    memory_bytes: int
    """Peak, roughly."""
    seconds: float
    """On one core, of small models."""

    def check_disk(self) -> None:
        """BundleError when the disks cannot take what the build may write."""
        by_disk: dict[int, tuple[Path, int]] = {}
        for place, needed in self.disk_bytes.items():
            device = _existing(place).stat().st_dev
            by_disk[device] = (place, by_disk.get(device, (place, 0))[1] + needed)
        for place, needed in by_disk.values():
            free = free_bytes(place)
            if needed > free:
                raise BundleError(
                    f"{place}: the build needs {shown_bytes(needed)} there, {shown_bytes(free)} are free; make room"
                )


def estimate(
    backend: Backend, inputs: BuildInputs, exports: Sequence[Export], parameters: Mapping[str, int], out: Path
) -> Requirements:
    """What it takes to export what is not cached, and to build the bundle `out`."""
    buckets = len(inputs.sizes) * len(inputs.batch_sizes)
    return Requirements(
        parameters=parameters,
        disk_bytes=_disk_bytes(backend, inputs, exports, parameters, buckets, out),
        memory_bytes=_memory_bytes(backend, parameters, buckets),
        seconds=_seconds(exports, parameters, buckets) + (_COMPILING_S * buckets * len(parameters) if inputs.compiled else 0),
    )


def free_bytes(place: Path) -> int:
    """The disk that a folder is on, or would be."""
    return shutil.disk_usage(_existing(place)).free


def count_parameters(
    folder: Path, family: ModelFamily, spec: ModelSpec, controls: Iterable[Path] = (), adapter: Found | None = None
) -> dict[str, int]:
    """Parameters by part, read off the headers of the weights; `controls` are the folders of the control networks."""
    reading = dict[str, int]()
    if adapter:
        encoder = sum(_tensor_elements(file, VISION) for file in encoder_files(adapter.encoder) if file.suffix == ".safetensors")
        layers = _tensor_elements(adapter.file, LAYERS)
        reading = {part.name: layers for part in spec.denoisers}
        reading[ENCODER] = encoder + _tensor_elements(adapter.file, PROJECTION)
    steering = sum(_tensor_elements(file, ("",)) for control in controls for file in files_of_network(control))
    steered = {part.name for part in spec.replacements if any(c.enters == "residual" for c in spec.taken_by(part.name))}
    weights = [file for file in base_files(folder) if file.suffix == ".safetensors"]

    def count(pattern: str, prefixes: tuple[str, ...]) -> int:
        return sum(_tensor_elements(file, prefixes) for file in weights if fnmatch(file.parent.name, pattern))

    own = {part.name: count(*family.weights_of(part.name)) for part in spec.parts if part.name != ENCODER}
    return {
        part.name: own.get(part.name, 0) + reading.get(part.name, 0) + (steering if part.name in steered else 0)
        for part in spec.parts
    }


def _disk_bytes(
    backend: Backend,
    inputs: BuildInputs,
    exports: Sequence[Export],
    parameters: Mapping[str, int],
    buckets: int,
    out: Path,
) -> dict[Path, int]:
    usual, most = backend.weight_bytes[inputs.precision], _MOST_BYTES if inputs.precision == "fp16" else {}
    weights = {part: count * max(usual, most.get(part, 0)) for part, count in parameters.items()}
    copies = buckets if backend.files_per_bucket else 1
    sizes = {part: len([export for export in exports if export.part == part]) for part in weights}
    bundle = sum(weights[part] * max(copies, sizes[part]) for part in weights)
    cache = sum(weights[export.part] for export in exports if not export.is_cached)
    return {out.absolute().parent: bundle, cache_folder(): cache}


def _memory_bytes(backend: Backend, parameters: Mapping[str, int], buckets: int) -> int:
    """Bytes at the peak: the model in torch, or later one copy for each bucket, with activations and libraries."""
    copies = buckets if backend.memory_per_bucket else 1
    return 4 * copies * sum(parameters.values()) + (1400 << 20)


def _seconds(exports: Sequence[Export], parameters: Mapping[str, int], buckets: int) -> float:
    """Exporting takes a while however small a part is, and so does each bucket. Weights come on top: a second per five million
    parameters, where networks of real size took one per 7 to 18 million (docs/engines.md)."""
    largest = max(parameters, key=lambda part: parameters[part])
    exporting = sum(
        (25 if export.part == largest else 6) + parameters[export.part] / 5e6 for export in exports if not export.is_cached
    )
    return 8 + exporting + 2 * buckets * (1 + max(parameters.values()) / 100e6)


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if folder.exists())


def _tensor_elements(file: Path, prefixes: tuple[str, ...]) -> int:
    """Of the tensors whose names start with one of these."""
    try:
        with safetensors.safe_open(file, "np") as weights:
            names = [name for name in weights.keys() if name.startswith(prefixes)]  # noqa: SIM118  # not a mapping
            shapes = [weights.get_slice(name).get_shape() for name in names]
    except Exception:  # a damaged file is named when it is loaded
        return 0
    return sum(map(math.prod, shapes))
