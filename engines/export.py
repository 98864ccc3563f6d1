"""A torch part to a traced program, and to an ONNX graph: named tensors, dynamic batch and size, weights next to the graph."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor

from flashdiff.components import Size
from flashdiff.engines.backends.base import ONNX
from flashdiff.engines.bundle import Precision
from flashdiff.engines.parts import AtPrecision, Part, random_inputs
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
        program = _to_onnx(trace(model, part, size, precision), part)
    except Exception as error:  # the exporter raises many kinds
        raise BackendError(f"{part.name} cannot be exported to ONNX: {first_line(error)}") from error
    _name_dimensions(program.model.graph, part)
    _check_precision(program.model.graph, part, precision)
    _drop_sources(program.model)
    program.save(folder / ONNX.file, external_data=True)


def dimension_names(part: Part) -> set[str]:
    """The dimensions that stay open in a part's graph."""
    fixed: set[str] = {"height", "width", "image_height", "image_width"} if part.fixed_size else set()
    named: set[str] = {d for tensor in part.inputs for d in tensor.shape if isinstance(d, str)}
    return named - fixed


def trace(model: TorchModel, part: Part, size: Size, precision: Precision) -> torch.export.ExportedProgram:
    """A part's graph at a precision, its batch and sizes open, with all that its few known times decide looked up in tables.

    Below float32 the part's own weights are cast. What torch cannot trace raises torch's errors, of many kinds.
    """
    inputs = random_inputs(model, part, _EXAMPLE_BATCH, size, torch.Generator().manual_seed(0))
    is_open = dimension_names(part)
    dynamic: Any = tuple(
        {axis: torch.export.Dim.AUTO for axis, name in enumerate(tensor.shape) if name in is_open} for tensor in part.inputs
    )
    module = part.module if precision == "fp32" else AtPrecision(part, precision)
    times = model.spec.sampler.known_times if "times" in {tensor.name for tensor in part.inputs} else []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
        shapes = (dynamic,) if inspect.Parameter.VAR_POSITIONAL in kinds else dynamic
        traced = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        if times:
            index = [tensor.name for tensor in part.inputs].index("times")
            module = traced.module()
            _look_up_times(module, inputs, index, times, model.spec.sampler.schedule.num_train_timesteps)
            traced = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        return traced


def _look_up_times(module: Any, inputs: tuple[Tensor, ...], index: int, times: Sequence[int], num_times: int) -> None:
    """Compute now what depends on nothing but the time (input `index`), at each of these times, and look it up from here on.

    A few-step student is evaluated at no others of the `num_times`: it needs no time embedding, nor its projections in every
    block, and at a lower precision they are not rounded on the way. At any other its output is not a number.
    """
    graph: torch.fx.Graph = module.graph
    given = [node for node in graph.nodes if node.op == "placeholder"]
    # True: decided by the time alone; None: by nothing at all, such as weights and sizes; False: by other inputs.
    by_time: dict[torch.fx.Node, bool | None] = {}
    for node in graph.nodes:
        kinds = {by_time[source] for source in node.all_input_nodes}
        if node.op == "placeholder":
            by_time[node] = node is given[index]
        elif node.target == torch.ops.aten.sym_size.int:
            by_time[node] = None
        else:
            by_time[node] = False if False in kinds else (True if True in kinds else None)
    rows = [*times, *times[-1:]]  # twice the last, because a batch of one is not what was traced
    values = _by_time(module, by_time, [x[:1].expand(len(rows), *x.shape[1:]) for x in inputs], index, rows)
    row_of_time = torch.full((num_times,), len(times))
    row_of_time[torch.tensor(times)] = torch.arange(len(times))
    module.register_buffer("row_of_time", row_of_time)
    with graph.inserting_after(given[-1]):
        table = graph.get_attr("row_of_time")
    with graph.inserting_after(table):
        row = graph.call_function(torch.ops.aten.index_select.default, (table, 0, given[index]))
    used = [node for node in values if any(not by_time[user] for user in node.users)]
    for number, node in enumerate(used):
        by_row = torch.cat([values[node][: len(times)], torch.full_like(values[node][:1], torch.nan)])
        module.register_buffer(f"by_time_{number}", by_row)
        with graph.inserting_after(node):
            table = graph.get_attr(f"by_time_{number}")
        with graph.inserting_after(table):
            looked_up = graph.call_function(torch.ops.aten.index_select.default, (table, 0, row))
        node.replace_all_uses_with(looked_up)
    graph.eliminate_dead_code()
    module.recompile()


def _by_time(
    module: Any, by_time: Mapping[torch.fx.Node, bool | None], inputs: list[Tensor], index: int, rows: Sequence[int]
) -> dict[torch.fx.Node, Tensor]:
    """What the nodes compute that the time alone decides, for a batch whose row i is at time rows[i]: floating-point tensors with
    that many rows. Nothing else is computed: at real size the whole network would take minutes."""
    found: dict[torch.fx.Node, Tensor] = {}

    class TimesAlone(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if by_time[n] is False and n.op != "placeholder":
                return None
            value = super().run_node(n)
            if by_time[n] and isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == (len(rows),):
                found[n] = value
            return value

    inputs[index] = torch.tensor(rows)
    TimesAlone(module).run(*inputs)
    return found


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


def _drop_sources(model: onnx_ir.Model) -> None:
    """Drop what the exporter notes of our source files and of its own: a graph's bytes must not depend on where they lie."""
    graphs: list[Any] = [model.graph, *model.functions.values()]
    nodes = [node for graph in graphs for node in onnx_ir.traversal.RecursiveGraphIterator(graph)]
    values = [value for graph in graphs for value in (*graph.inputs, *graph.outputs)]
    values += [value for node in nodes for value in node.outputs] + list(model.graph.initializers.values())
    for noted in (model, *graphs, *nodes, *values):
        noted.metadata_props.clear()
        noted.doc_string = None


def _check_precision(graph: Any, part: Part, precision: Precision) -> None:
    """Engines that claim float16 and are float32 are a known failure: most of the weights must be of the type asked for."""
    wanted = {"fp32": onnx_ir.DataType.FLOAT, "fp16": onnx_ir.DataType.FLOAT16, "bf16": onnx_ir.DataType.BFLOAT16}[precision]
    sizes = {True: 0, False: 0}
    for value in graph.initializers.values():
        if value.dtype is not None and value.dtype.is_floating_point():
            sizes[value.dtype == wanted] += value.const_value.size
    if sizes[True] < sizes[False]:
        raise BackendError(f"{part.name}: asked for {precision}, but most of the exported weights are of another type")
