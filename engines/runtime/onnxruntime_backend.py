"""ONNX Runtime on the CPU, float32, one session per static shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flashdiff.engines.bundle import PartSpec
from flashdiff.engines.runtime.threads import cpu_threads


def compile_part(file: Path, part: PartSpec, dimensions: Mapping[str, int]) -> Any:
    """See `flashdiff.engines.runtime.compile_part`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = cpu_threads()
    for name, value in dimensions.items():
        options.add_free_dimension_override_by_name(name, value)
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in part.outputs]

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        return dict(zip(names, session.run(names, {spec.name: inputs[spec.name] for spec in part.inputs}), strict=True))

    return run
