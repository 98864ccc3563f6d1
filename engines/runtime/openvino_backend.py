"""OpenVINO on the CPU, float32, one static shape per compiled part."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from flashdiff.engines.bundle import PartSpec
from flashdiff.engines.runtime.threads import cpu_threads
from flashdiff.errors import BackendError, first_line

# Without the precision hint OpenVINO computes in bf16 on CPUs that can, a few per cent off and in silence.
_CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


@cache
def _core() -> Any:
    return ov.Core()


def compile_part(file: Path, part: PartSpec, dimensions: Mapping[str, int]) -> Any:
    """See `flashdiff.engines.runtime.compile_part`."""
    model = _core().read_model(file)
    model.reshape({spec.name: ov.PartialShape(list(spec.shape_for(dimensions))) for spec in part.inputs})
    compiled = _core().compile_model(model, "CPU", {**_CONFIG, "INFERENCE_NUM_THREADS": cpu_threads()})
    request = compiled.create_infer_request()
    # Fixed input tensors: the caller's values are copied in, nothing is allocated per call but the results.
    buffers = {spec.name: np.empty(spec.shape_for(dimensions), dtype=spec.dtype) for spec in part.inputs}
    for name, buffer in buffers.items():
        request.set_tensor(name, ov.Tensor(buffer, shared_memory=True))

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        for name, buffer in buffers.items():
            np.copyto(buffer, inputs[name])
        request.infer()
        return {spec.name: request.get_tensor(spec.name).data.copy() for spec in part.outputs}

    return run


def convert(onnx_file: Path, target: Path) -> None:
    """ONNX to OpenVINO's own form (.xml and .bin), weights kept in float32."""
    try:
        ov.save_model(ov.convert_model(str(onnx_file)), str(target), compress_to_fp16=False)
    except Exception as error:  # a graph it cannot take, or a disk that is full
        raise BackendError(f"OpenVINO cannot convert {onnx_file.parent.name}: {first_line(error)}") from error
