"""OpenVINO on the CPU, one static shape per compiled part; float32 unless a lower precision is given."""

import importlib.util
import logging
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Size
from flashdiff.engines.backends.base import EXPORTERS, Backend, CompiledPart, CompilePart, GraphForm, check_int8
from flashdiff.engines.bundle import Machine, Manifest, Precision
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.threads import cpu_threads
from flashdiff.engines.shapes import bucket_shapes
from flashdiff.errors import BackendError, first_line, install

if TYPE_CHECKING:
    from flashdiff.engines.parts import Part
    from flashdiff.families.base import TorchModel

# Without the hint OpenVINO silently computes in bf16 on CPUs that support it, a few per cent off.
_HINTS: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
_CPU_FEATURES: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""A precision needs any of these; without one OpenVINO would silently compute in float32."""


_log = logging.getLogger(__name__)


@cache
def _core() -> Any:
    import openvino as ov

    return ov.Core()


def _open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    import openvino as ov

    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[manifest.precision], "PERFORMANCE_HINT": "LATENCY"}
    if device.cores:
        # Otherwise it moves the calling thread to cores of its own choice, the same ones for every set, and then to any.
        config["ENABLE_CPU_PINNING"] = False
        if len(device.cores) > 1:
            _log.warning("%s: OpenVINO's helper threads may leave the core set; those of ONNX Runtime do not", device.name)

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
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


def _export(model: "TorchModel", part: "Part", folder: Path, *, size: Size, precision: Precision = "fp32") -> None:
    """Not through ONNX, which splits attention and group norm into pieces that OpenVINO does not fuse again.

    The graphs are float32, for bfloat16 the same. For float16, OpenVINO stores their weights in float16 and chooses what it
    computes in.
    """
    import openvino as ov

    from flashdiff.engines.export import trace
    from flashdiff.engines.folding import fold_decoder

    fold_decoder(model, part)
    try:
        program = trace(model, part, size, "fp32")
    except Exception as error:
        raise BackendError(f"{part.name} cannot be exported: {first_line(error)}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own copying
            converted = ov.convert_model(program)
        for ports, tensors in ((converted.inputs, part.inputs), (converted.outputs, part.outputs)):
            for port, tensor in zip(ports, tensors, strict=True):
                port.tensor.set_names({tensor.name})
        name_nodes(converted)
        ov.save_model(converted, str(folder / _GRAPH.file), compress_to_fp16=precision == "fp16")
    except Exception as error:  # a graph it cannot take, or a disk that is full
        raise BackendError(f"OpenVINO cannot convert {folder.name}: {first_line(error)}") from error


def name_nodes(model: Any) -> None:
    """Give a model and its nodes names of their own.

    OpenVINO numbers them by what the process converted before, so that two builds of one model would differ.
    """
    model.set_friendly_name("model")
    for index, node in enumerate(model.get_ordered_ops()):
        if re.fullmatch(r"[A-Z]\w*_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")


def _quantize(graph: Path, target: Path, rows: Sequence[Mapping[str, NDArray[Any]]], kept: Collection[str]) -> dict[str, float]:
    from flashdiff.engines.backends.openvino_quantizer import quantize

    return quantize(graph, target, rows, kept)


def _check_build(precision: Precision, _: Machine) -> None:
    if precision == "int8" and importlib.util.find_spec("nncf") is None:
        raise BackendError(f"--precision int8 needs 'nncf', which is not here: {install('int8')}")


def _check_precision(precision: Precision, here: Machine) -> None:
    if precision == "int8":
        check_int8(here)
    elif precision != "fp32" and not set(_CPU_FEATURES[precision]) & set(here.features):
        raise BackendError(
            f"--precision {precision}: this processor has no such arithmetic (none of "
            f"{', '.join(_CPU_FEATURES[precision])}), OpenVINO would compute in float32; take fp32"
        )


_GRAPH = GraphForm(name="OpenVINO", file="model.xml", packages=(*EXPORTERS, "openvino"), export=_export, as_float32=("bf16",))

RECORDS = (
    Backend(
        name="openvino",
        extra="cpu",
        modules=("openvino",),
        telemetry=("openvino_telemetry",),  # of its converter, and of NNCF
        packages=("openvino",),
        graph=_GRAPH,
        quantize={"int8": _quantize},
        quantizer_packages=("nncf",),
        open_parts=_open_parts,
        check_precision=_check_precision,
        check_build=_check_build,
        lacks={"fp8": "no CPU computes in fp8, and OpenVINO converts it to float32 there; take bf16 or int8"},
        exact_rows_on_cpu=True,
        # It computes in bfloat16 with weights kept in float32. int8 is made next to the float32 graph, with up to half of the
        # layers in float32.
        weight_bytes={"fp32": 4, "fp16": 2, "bf16": 4, "int8": 7},
    ),
)
