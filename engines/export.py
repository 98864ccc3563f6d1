"""A torch part to a graph, ONNX or OpenVINO's own: named tensors, dynamic batch and size, weights beside the graph."""

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from flashdiff.components import Size
from flashdiff.engines.bundle import ONNX_GRAPH, OPENVINO_GRAPH, Precision
from flashdiff.engines.parts import AtPrecision, Part, random_inputs
from flashdiff.engines.runtime import backend_module
from flashdiff.errors import BackendError, first_line
from flashdiff.families.base import TorchModel

_EXAMPLE_BATCH = 2  # with 1, torch.export would fix the batch to 1


def export_onnx(model: TorchModel, part: Part, folder: Path, *, size: Size, precision: Precision = "fp32") -> None:
    """Write `model.onnx` and `model.onnx.data` for a part into `folder`, which exists; inputs and outputs stay float32.

    `size` is the size of the example, and the only one that a part of fixed size will take. Below float32 the part's own
    weights are cast: take what is wanted of them in float32 before. BackendError when torch, the exporter or ONNX cannot.
    Two steps, torch.export and then the ONNX exporter, because the direct way fails on masks with a dynamic batch.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports the absence of torchvision, which is not needed
    try:
        program = _to_onnx(_traced(model, part, size, precision), part)
    except Exception as error:  # the exporter raises many kinds
        raise BackendError(f"{part.name} cannot be exported to ONNX: {first_line(error)}") from error
    _name_dimensions(program.model.graph, part)
    _check_precision(program.model.graph, part, precision)
    program.save(folder / ONNX_GRAPH, external_data=True)


def export_openvino(model: TorchModel, part: Part, folder: Path, *, size: Size, precision: Precision = "fp32") -> None:
    """Write `model.xml` and `model.bin` for a part, as `export_onnx` does.

    Not by way of ONNX, which knows attention and group norm only in pieces that OpenVINO does not put together again. Its
    graphs are float32; in float16 it stores their weights so, and lowers what it computes in by itself.
    """
    try:
        program = _traced(model, part, size, "fp32")
    except Exception as error:
        raise BackendError(f"{part.name} cannot be exported: {first_line(error)}") from error
    names = [tensor.name for tensor in part.inputs], [tensor.name for tensor in part.outputs]
    backend_module("openvino").convert(program, *names, folder / OPENVINO_GRAPH, precision)


def dimension_names(part: Part) -> set[str]:
    """The dimensions that stay open in a part's graph."""
    fixed = {"height", "width", "image_height", "image_width"} if part.fixed_size else set()
    return {d for tensor in part.inputs for d in tensor.shape if isinstance(d, str)} - fixed


def _traced(model: TorchModel, part: Part, size: Size, precision: Precision) -> torch.export.ExportedProgram:
    inputs = random_inputs(model, part, _EXAMPLE_BATCH, size, torch.Generator().manual_seed(0))
    is_open = dimension_names(part)
    dynamic: Any = tuple(
        {axis: torch.export.Dim.AUTO for axis, name in enumerate(tensor.shape) if name in is_open} for tensor in part.inputs
    )
    module = part.module
    if precision != "fp32":
        module, dynamic = AtPrecision(part, precision), (dynamic,)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)


def _to_onnx(traced: torch.export.ExportedProgram, part: Part) -> Any:
    _drop_idle_squeezes(traced.graph)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about torch's own code
        return torch.onnx.export(
            traced,
            dynamo=True,
            verbose=False,
            input_names=[tensor.name for tensor in part.inputs],
            output_names=[tensor.name for tensor in part.outputs],
        )


def _drop_idle_squeezes(graph: torch.fx.Graph) -> None:
    """torch squeezes a dimension that is not 1 by leaving it; ONNX refuses to (PixArt's blocks do that)."""
    for node in list(graph.nodes):
        if node.target == torch.ops.aten.squeeze.dim:
            source, axis = node.args
            if source.meta["val"].shape[axis] != 1:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _name_dimensions(graph: Any, part: Part) -> None:
    """Give the exporter's symbols (s10, s63) the names of our dimensions, wherever they stand in the graph."""
    names: dict[str, str] = {}
    for value, tensor in zip(graph.inputs, part.inputs, strict=True):
        for axis, wanted in enumerate(tensor.shape):
            found = value.shape[axis]
            if (wanted in dimension_names(part)) == isinstance(found, int):
                raise BackendError(
                    f"{part.name}: the export made dimension {axis} of {tensor.name} {found}, it should be {wanted}"
                )
            if isinstance(wanted, str) and not isinstance(found, int):
                names[str(found.value)] = wanted
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(getattr(d, "value", d)), d) for d in value.shape])


def _check_precision(graph: Any, part: Part, precision: Precision) -> None:
    """Engines that claim float16 and are float32 are a known failure: most of the weights must be of the type asked for."""
    wanted = {"fp32": onnx_ir.DataType.FLOAT, "fp16": onnx_ir.DataType.FLOAT16, "bf16": onnx_ir.DataType.BFLOAT16}[precision]
    sizes = {True: 0, False: 0}
    for value in graph.initializers.values():
        if value.dtype is not None and value.dtype.is_floating_point():
            sizes[value.dtype == wanted] += value.const_value.size
    if sizes[True] < sizes[False]:
        raise BackendError(f"{part.name}: asked for {precision}, but most of the exported weights are of another type")
