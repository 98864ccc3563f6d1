"""OpenVINO on the CPU, one static shape per compiled part; float32 unless a lower precision was asked for."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from flashdiff.engines.bundle import Manifest, Precision
from flashdiff.engines.runtime import bucket_shapes
from flashdiff.engines.runtime.threads import cpu_threads
from flashdiff.errors import BackendError, first_line

# Without the hint OpenVINO computes in bf16 on CPUs that can, a few per cent off and in silence.
_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


@cache
def _core() -> Any:
    return ov.Core()


def open_parts(folder: Path, manifest: Manifest) -> Callable[[str, Path, Mapping[str, int]], Any]:
    """See `flashdiff.engines.runtime.open_parts`."""
    config = {"INFERENCE_PRECISION_HINT": _HINTS[manifest.precision], "PERFORMANCE_HINT": "LATENCY"}

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> Any:
        part = manifest.parts[name]
        model, shapes = _core().read_model(file), bucket_shapes(part.inputs, dimensions)
        model.reshape({name: ov.PartialShape(list(shape)) for name, shape in shapes.items()})
        compiled = _core().compile_model(model, "CPU", {**config, "INFERENCE_NUM_THREADS": cpu_threads()})
        request = compiled.create_infer_request()
        # Fixed tensors: the caller's values are copied in and the results out, nothing else is allocated per call.
        shapes |= bucket_shapes(part.outputs, dimensions)
        buffers = {spec.name: np.empty(shapes[spec.name], dtype=spec.dtype) for spec in (*part.inputs, *part.outputs)}
        for name, buffer in buffers.items():
            request.set_tensor(name, ov.Tensor(buffer, shared_memory=True))

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            for spec in part.inputs:
                np.copyto(buffers[spec.name], inputs[spec.name])
            request.infer(share_outputs=True)
            return {spec.name: buffers[spec.name].copy() for spec in part.outputs}

        return run

    return compile_part


def convert(program: Any, inputs: Sequence[str], outputs: Sequence[str], target: Path, precision: Precision) -> None:
    """What torch.export traced, in OpenVINO's own form (.xml and .bin), its tensors named; weights in float32 unless `precision`
    is float16."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own copying
            model = ov.convert_model(program)
        for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
            for port, name in zip(ports, names, strict=True):
                port.tensor.set_names({name})
        # It numbers the model and the nodes that it adds by all that the process did before: two builds of the same would differ.
        model.set_friendly_name(target.stem)
        for index, node in enumerate(model.get_ordered_ops()):
            if re.fullmatch(r"[A-Z]\w*_\d+", node.get_friendly_name()):
                node.set_friendly_name(f"{node.get_type_name()}_{index}")
        ov.save_model(model, str(target), compress_to_fp16=precision == "fp16")
    except Exception as error:  # a graph it cannot take, or a disk that is full
        raise BackendError(f"OpenVINO cannot convert {target.parent.name}: {first_line(error)}") from error
