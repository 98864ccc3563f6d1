"""TensorRT plans as callables: one context, fixed buffers and one CUDA graph per bucket. Needs an NVIDIA GPU."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda
from numpy.typing import NDArray

from flashdiff.engines.backends.base import CompiledPart, CompilePart
from flashdiff.engines.backends.tensorrt_builder import library, make_logger
from flashdiff.engines.bundle import Manifest
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.shapes import bucket_shapes
from flashdiff.errors import BackendError


def open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    """Make the library's runtime and a stream for each part; see `Backend.open_parts`."""
    gpu = device.gpu_index
    _checked(cuda.cudaSetDevice(gpu))
    trt = library(manifest.backend)
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = manifest.version_compatible  # such plans carry code of their own
    # One a part: parts may run at once.
    streams = {name: _checked(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)) for name in manifest.parts}

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
        _checked(cuda.cudaSetDevice(gpu))  # of this thread: one that opens models has opened those of other GPUs
        engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise BackendError(f"{file.name}: {(logger.errors or ['no reason given'])[-1]}")
        context, part, stream = engine.create_execution_context(), manifest.parts[name], streams[name]
        tensors = {tensor.name: tensor for tensor in (*part.inputs, *part.outputs)}
        host = {
            tensor: np.zeros(shape, dtype=tensors[tensor].dtype)
            for tensor, shape in bucket_shapes(tensors.values(), dimensions).items()
        }
        memory = {tensor: _checked(cuda.cudaMalloc(values.nbytes)) for tensor, values in host.items()}
        for spec in part.inputs:
            context.set_input_shape(spec.name, host[spec.name].shape)
            _copy(memory[spec.name], host[spec.name].ctypes.data, host[spec.name].nbytes, _TO_DEVICE, stream)
        for tensor, address in memory.items():
            context.set_tensor_address(tensor, address)
        graph = _captured(lambda: context.execute_async_v3(int(stream)), stream, file)

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            _checked(cuda.cudaSetDevice(gpu))  # a parallel decoding call has a thread of its own
            for spec in part.inputs:
                np.copyto(host[spec.name], inputs[spec.name])
                _copy(memory[spec.name], host[spec.name].ctypes.data, host[spec.name].nbytes, _TO_DEVICE, stream)
            _checked(cuda.cudaGraphLaunch(graph, stream))
            for spec in part.outputs:
                _copy(host[spec.name].ctypes.data, memory[spec.name], host[spec.name].nbytes, _TO_HOST, stream)
            _checked(cuda.cudaStreamSynchronize(stream))
            return {spec.name: host[spec.name].copy() for spec in part.outputs}

        # The context reads these addresses for as long as it lives, so they live as long as `run`.
        run.kept = (engine, context)  # type: ignore[attr-defined]
        return run

    return compile_part


_TO_DEVICE = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
_TO_HOST = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost


def _captured(launch: Callable[[], bool], stream: Any, file: Path) -> Any:
    """The launch as a CUDA graph, after one run, which does all lazy initialisation."""
    if not launch():
        raise BackendError(f"{file.name} does not run")
    _checked(cuda.cudaStreamSynchronize(stream))
    _checked(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    launch()
    return _checked(cuda.cudaGraphInstantiate(_checked(cuda.cudaStreamEndCapture(stream)), 0))


def _copy(target: int, source: int, size: int, kind: Any, stream: Any) -> None:
    _checked(cuda.cudaMemcpyAsync(target, source, size, kind, stream))


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call; BackendError names its error."""
    error, *values = result
    if error != cuda.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA: {error.name}")
    return values[0] if values else None
