"""Engines that run. Only this folder knows an engine's library, and each library is imported where it is needed."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.engines.bundle import BackendName, PartSpec
from flashdiff.errors import BackendError, first_line

CompiledPart = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[np.float32]]]
"""One part at one fixed shape: named inputs of exactly that shape to named outputs, which belong to the caller."""


def compile_part(backend: BackendName, file: Path, part: PartSpec, dimensions: Mapping[str, int]) -> CompiledPart:
    """Make a part ready at one bucket's shape; BackendError when the library is missing or refuses."""
    try:
        module = importlib.import_module(f"flashdiff.engines.runtime.{backend}_backend")
    except ImportError as error:
        raise BackendError(f"backend '{backend}' needs '{error.name}', which is not here: pip install 'flashdiff[cpu]'") from None
    try:
        compiled: CompiledPart = module.compile_part(file, part, dimensions)
    except Exception as error:  # the libraries' errors share no public base class
        raise BackendError(f"{backend} could not compile {file.name}: {first_line(error)}") from None

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        try:
            return compiled(inputs)
        except Exception as error:
            raise BackendError(f"{backend} failed in {file.parent.name}: {first_line(error)}") from error

    return run
