"""ONNX Runtime, one session per static shape: on the CPU, or on the GPU that the bundle was checked on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flashdiff.engines.bundle import Manifest
from flashdiff.engines.runtime.threads import cpu_threads


def open_parts(folder: Path, manifest: Manifest) -> Callable[[str, Path, Mapping[str, int]], Any]:
    """See `flashdiff.engines.runtime.open_parts`."""
    on_gpu = ["CUDAExecutionProvider"] if manifest.machine.device == "cuda" else []

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> Any:
        part = manifest.parts[name]
        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_threads()
        # Every part and shape is a session with threads of its own: when idle ones spin, they take cores from the one that runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; it warns of every float16 constant that it cannot fold on a CPU
        for dimension, value in dimensions.items():
            options.add_free_dimension_override_by_name(dimension, value)
        session = ort.InferenceSession(str(file), options, providers=[*on_gpu, "CPUExecutionProvider"])
        names = [spec.name for spec in part.outputs]

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            return dict(zip(names, session.run(names, {spec.name: inputs[spec.name] for spec in part.inputs}), strict=True))

        return run

    return compile_part
