"""Engines that run. Only this folder knows an engine's library, and each library is imported where it is needed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.engines.bundle import BackendName, PartSpec
from flashdiff.errors import BackendError

CompiledPart = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[np.float32]]]
"""One part at one fixed shape: named inputs of exactly that shape to named outputs, which belong to the caller."""


def compile_part(backend: BackendName, file: Path, part: PartSpec, dimensions: Mapping[str, int]) -> CompiledPart:
    """Make a part ready at one bucket's shape; BackendError when the library is missing or refuses."""
    try:
        if backend == "openvino":
            from flashdiff.engines.runtime import openvino_backend as module
        else:
            from flashdiff.engines.runtime import onnxruntime_backend as module
    except ImportError as error:
        raise BackendError(f"the backend '{backend}' needs a package that is not here ({error.name}): pip install 'flashdiff[cpu]'") from None
    try:
        return module.compile_part(file, part, dimensions)
    except RuntimeError as error:
        raise BackendError(f"{backend} could not compile {file.name}: {str(error).splitlines()[0]}") from None
