"""ONNX graphs to TensorRT plans, through the part of the builder's API that TensorRT and TensorRT-RTX share.

Networks are strongly typed: precision is the graph's own. A plan serves one bucket (min = opt = max), because dynamic
shapes cost speed, and cannot be refitted, because refittable plans lose fusions and have been wrong.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdiff.engines.bundle import BackendName
from flashdiff.errors import BackendError, install
from flashdiff.files import write_whole

_WORKSPACE_BYTES = 4 << 30
"""Scratch memory a kernel may ask for. More hardly helps these networks, and the server would have to have it too."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    module: str
    package: str
    keeps_timings: bool
    """Whether it times kernels while it builds; TensorRT-RTX chooses them when a plan first runs."""


LIBRARIES: dict[BackendName, Library] = {
    "tensorrt": Library("tensorrt", "tensorrt", True),
    "tensorrt-rtx": Library("tensorrt_rtx", "tensorrt-rtx-cu13", False),
}


def library(backend: BackendName) -> Any:
    """The library's module; BackendError says what to install."""
    try:
        return importlib.import_module(LIBRARIES[backend].module)
    except ImportError:
        package = LIBRARIES[backend].package
        raise BackendError(f"--backend {backend} needs '{package}', which is not here: {install(backend)}") from None


def check_opens(backend: BackendName) -> None:
    """BackendError, in the library's own words, when it opens no plan here: one of a single sum is built and tried.

    TensorRT-RTX 1.7 builds plans anywhere and opens none on compute capability 9.0 (H100, H200).
    """
    trt = library(backend)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (1,))
    network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    serialized = builder.build_serialized_network(network, builder.create_builder_config())
    if serialized is None or trt.Runtime(logger).deserialize_cuda_engine(serialized) is None:
        raise BackendError(f"--backend {backend} does not run here: {(logger.errors or ['no reason given'])[-1]}")


def build_plan(
    backend: BackendName,
    graph: Path,
    shapes: Mapping[str, tuple[int, ...]],
    plan: Path,
    *,
    timings: Path,
    version_compatible: bool,
    report: Callable[[str], None],
) -> None:
    """Write the plan of a graph at these input shapes; BackendError quotes the builder where it refuses.

    `timings` is a file of kernel timings to start from and add to: it makes builds faster and kernels the same again.
    `version_compatible` plans run on later versions, more slowly. `report` gets a line per phase of the build.
    """
    trt = library(backend)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):  # by path, so that it finds the weights next to the graph
        problems = [": ".join(parser.get_error(index).desc().strip().split("\n")) for index in range(parser.num_errors)]
        raise BackendError(f"{backend} cannot read {graph.parent.name}: {(problems or logger.errors or ['no reason given'])[0]}")

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and off by more than float32's verification allows
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    config.progress_monitor = _monitor(trt, report)
    if version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    _add_profile(builder, network, config, shapes)
    keeps_timings = LIBRARIES[backend].keeps_timings
    if keeps_timings:
        config.set_timing_cache(config.create_timing_cache(timings.read_bytes() if timings.exists() else b""), False)

    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError(f"{backend} cannot build {graph.parent.name}: {(logger.errors or ['no reason given'])[0]}")
    write_whole(plan, bytes(serialized))
    if keeps_timings:
        write_whole(timings, bytes(config.get_timing_cache().serialize()))


def _add_profile(builder: Any, network: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    profile = builder.create_optimization_profile()
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if set(names) != set(shapes):
        raise BackendError(f"the graph takes {', '.join(names)}, not {', '.join(shapes)}")
    for name in names:
        profile.set_shape(name, shapes[name], shapes[name], shapes[name])
    config.add_optimization_profile(profile)


def make_logger(trt: Any) -> Any:
    """A logger that keeps the errors, to be quoted; warnings go to our own log."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip().split("\n")[0])
            elif severity == trt.ILogger.WARNING:
                _log.debug("%s", message)

    return Logger()


def _monitor(trt: Any, report: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                report(f"         {phase_name}, {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True  # go on

        def phase_finish(self, phase_name: str) -> None: ...

    return Monitor()
