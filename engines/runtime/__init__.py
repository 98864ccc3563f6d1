"""Engines that run. Only this folder knows an engine's library, and each library is imported where it is needed."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec, Size
from flashdiff.engines.bundle import BackendName, Manifest, TensorSpec
from flashdiff.engines.runtime.machine import check_machine
from flashdiff.errors import BackendError, first_line, install

CompiledPart = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[np.float32]]]
"""One part at one fixed shape: named inputs of exactly that shape to named outputs, which belong to the caller."""

Compile = Callable[[str, Size | None, int], CompiledPart]
"""A part, by name, made ready at one size (None for a part that has none) and batch size."""

EXTRA: dict[BackendName, str] = {
    "openvino": "cpu",
    "onnxruntime": "cpu",
    "torch": "distill",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}
"""What to install for a backend."""


def backend_module(backend: BackendName) -> Any:
    """The file that knows a backend's library; BackendError says what to install when the library is missing."""
    try:
        return importlib.import_module(f"flashdiff.engines.runtime.{backend.replace('-rtx', '')}_backend")
    except ImportError as error:
        needed = f"backend '{backend}' needs '{error.name}', which is not here"
        raise BackendError(f"{needed}: {install(EXTRA[backend])}") from None


def open_parts(folder: Path, manifest: Manifest) -> Compile:
    """What makes a bundle's parts ready, one bucket a call; BundleError when they were made for another machine."""
    check_machine(manifest)
    module = backend_module(manifest.backend)
    try:
        compile_part = module.open_parts(folder, manifest)
    except Exception as error:  # the libraries' errors share no public base class
        raise BackendError(f"{manifest.backend} could not open {folder}: {first_line(error)}") from None

    def compile_named(part: str, size: Size | None, batch: int) -> CompiledPart:
        spec = manifest.parts[part]
        dimensions = dimensions_of(manifest.model, size, batch)
        try:
            compiled: CompiledPart = compile_part(part, folder / spec.file_for(size, batch), dimensions)
        except Exception as error:
            raise BackendError(f"{manifest.backend} could not compile {part}: {first_line(error)}") from None

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            try:
                return compiled(inputs)
            except Exception as error:
                raise BackendError(f"{manifest.backend} failed in {part}: {first_line(error)}") from error

        return run

    return compile_named


def dimensions_of(spec: ModelSpec, size: Size | None, batch: int) -> dict[str, int]:
    """What fills the named dimensions of tensors at one bucket; `size` is None for a part that has none."""
    if size is None:
        return {"batch": batch}
    _, height, width = spec.latent_shape(size)
    return {"batch": batch, "height": height, "width": width, "image_height": size.height, "image_width": size.width}


def bucket_shapes(tensors: Iterable[TensorSpec], dimensions: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name."""
    return {tensor.name: tensor.shape_for(dimensions) for tensor in tensors}
