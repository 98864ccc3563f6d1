"""The backends, by name. Only this folder knows a backend's name or its library; the list itself imports neither."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashdiff.engines.backends.base import Backend

BACKENDS = {
    "openvino": "flashdiff.engines.backends.openvino",
    "onnxruntime": "flashdiff.engines.backends.onnxruntime",
    "torch": "flashdiff.engines.backends.torch",
    "tensorrt": "flashdiff.engines.backends.tensorrt",
    "tensorrt-rtx": "flashdiff.engines.backends.tensorrt",
}
"""The module that holds each backend's record, in its `RECORDS`."""


def find_backend(name: str) -> "Backend":
    """The record of a backend; `name` is one of `BACKENDS`."""
    records: tuple[Backend, ...] = importlib.import_module(BACKENDS[name]).RECORDS
    return next(record for record in records if record.name == name)


_BEST_ON_GPU, _BEST_ON_CPU = "torch", ("openvino", "onnxruntime", "torch")
"""In order of speed; TensorRT is left out until its plans have run on a GPU."""


def best_backend(*, on_cpu: bool = False) -> str:
    """The fastest backend that runs here: torch with CUDA graphs on an NVIDIA GPU, else the first one installed for CPUs.

    `on_cpu` leaves the GPU out.
    """
    on_gpu = find_backend(_BEST_ON_GPU)
    if not on_cpu and _is_installed(on_gpu) and on_gpu.machine().device == "cuda":
        return _BEST_ON_GPU
    return next((name for name in _BEST_ON_CPU if _is_installed(find_backend(name))), _BEST_ON_CPU[0])


def _is_installed(backend: "Backend") -> bool:
    return all(importlib.util.find_spec(module) for module in backend.modules)
