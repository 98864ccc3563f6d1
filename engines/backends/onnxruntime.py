"""ONNX Runtime, one session per static shape: on the CPU, or on the GPU that the bundle was checked on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.engines.backends.base import ONNX, Backend, CompiledPart, CompilePart
from flashdiff.engines.bundle import Machine, Manifest, Precision
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.threads import cpu_threads
from flashdiff.errors import BackendError


def _open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    import onnxruntime as ort

    on_gpu = [("CUDAExecutionProvider", {"device_id": device.gpu_index})] if manifest.machine.device == "cuda" else []

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
        part = manifest.parts[name]
        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_threads()  # which start pinned as this one is
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


def _uses_gpu() -> bool:
    import onnxruntime as ort

    return "CUDAExecutionProvider" in ort.get_available_providers()


def _check_build(precision: Precision, here: Machine) -> None:
    if precision == "bf16" and here.device == "cpu":
        raise BackendError("--precision bf16: ONNX Runtime has no bfloat16 convolutions on CPUs; take fp32, or openvino")


RECORDS = (
    Backend(
        name="onnxruntime",
        extra="cpu",
        modules=("onnxruntime",),
        packages=("onnxruntime",),
        graph=ONNX,
        open_parts=_open_parts,
        uses_gpu=_uses_gpu,
        check_build=_check_build,
        lacks={
            "int8": "its int8 takes longer than its float32 for one image and gains little in batches; take openvino",
            "fp8": "no CPU computes in fp8, and ONNX Runtime has no convolutions in it; take fp32, or openvino in bf16 or int8",
        },
        exact_rows_on_cpu=True,
    ),
)
