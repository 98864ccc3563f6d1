"""ONNX Runtime, one session per static shape: on the CPU, or on the GPU that the bundle was checked on."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.engines.backends.base import ONNX, Backend, CompiledPart, CompilePart, check_int8
from flashdiff.engines.bundle import Machine, Manifest, Precision
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.threads import cpu_threads
from flashdiff.errors import BackendError, install

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_GPU_EXTRA = "onnxruntime-gpu"


def _open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    import onnxruntime as ort

    providers: list[Any] = [_CPU]
    if manifest.machine.device == "cuda":
        ort.preload_dlls()  # CUDA and cuDNN, where pip installed them
        providers = [(_CUDA, {"device_id": device.gpu_index, "use_tf32": 0}), _CPU]  # TF32 would round what convolutions read

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
        part = manifest.parts[name]
        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_threads()  # which start pinned as this one is
        # Every part and shape is a session with threads of its own: when idle ones spin, they take cores from the one that runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; it warns of every float16 constant that it cannot fold on a CPU
        if manifest.precision != "int8":  # a graph that was rounded for another library computes as it says
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        for dimension, value in dimensions.items():
            options.add_free_dimension_override_by_name(dimension, value)
        session = ort.InferenceSession(str(file), options, providers=providers)
        if len(session.get_providers()) < len(providers):
            raise BackendError(f"its CUDA provider did not start; CUDA and cuDNN come with {install(_GPU_EXTRA)}")
        names = [spec.name for spec in part.outputs]

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            return dict(zip(names, session.run(names, {spec.name: inputs[spec.name] for spec in part.inputs}), strict=True))

        return run

    return compile_part


def _uses_gpu() -> bool:
    import onnxruntime as ort

    return _CUDA in ort.get_available_providers()


def _quantize(graph: Path, target: Path, rows: Sequence[Mapping[str, NDArray[Any]]], kept: Collection[str]) -> dict[str, float]:
    from flashdiff.engines.backends.onnxruntime_quantizer import quantize

    return quantize(graph, target, rows, kept)


def _check_precision(precision: Precision, here: Machine) -> None:
    if precision == "int8":
        if here.device == "cuda":
            raise BackendError("--precision int8: ONNX Runtime's is for CPUs, and this one runs on the GPU; take fp16 or bf16")
        check_int8(here)
    if precision == "bf16" and here.device == "cpu":
        raise BackendError("--precision bf16: ONNX Runtime has no bfloat16 convolutions on CPUs; take fp32, or openvino")


RECORDS = (
    Backend(
        name="onnxruntime",
        extra="cpu",
        modules=("onnxruntime",),
        packages=("onnxruntime", "onnxruntime-gpu"),
        graph=ONNX,
        quantize={"int8": _quantize},
        open_parts=_open_parts,
        uses_gpu=_uses_gpu,
        gpu_extra=_GPU_EXTRA,
        check_precision=_check_precision,
        lacks={
            "fp8": "no CPU computes in fp8, and ONNX Runtime has no convolutions in it; take fp32 or int8, or openvino in bf16"
        },
        exact_rows_on_cpu=True,
        # int8 is made next to the float32 graph, with up to half of its layers in float32.
        weight_bytes={"fp32": 4, "fp16": 2, "bf16": 2, "int8": 7},
    ),
)
