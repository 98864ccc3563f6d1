"""ONNX graphs in int8, by ONNX Runtime's own static quantization: pairs of QuantizeLinear and DequantizeLinear at its layers."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.engines.backends.base import NOISE_ROWS
from flashdiff.errors import BackendError, first_line

_LAYERS = ("Conv", "Gemm", "MatMul")
_TINY = 1e-12


def quantize(graph: Path, target: Path, rows: Sequence[Mapping[str, NDArray[Any]]], kept: Collection[str]) -> dict[str, float]:
    """Write the graph in int8 to `target`, calibrated on rows of its inputs; the layers `kept` stay as they are."""
    from onnxruntime.quantization import QuantType, quantize_static

    # Weights are appended to a file that is there, as it is after a try before.
    target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    try:
        with _quiet():
            quantize_static(
                str(graph),
                str(target),
                _Reader(rows),
                op_types_to_quantize=list(_LAYERS),
                nodes_to_exclude=sorted(kept),
                per_channel=True,
                activation_type=QuantType.QUInt8,  # with weights in QInt8 what processors multiply
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"DedicatedQDQPair": True},  # otherwise `kept` layers read what is rounded for others
            )
        return _noise(target, rows[:: max(1, len(rows) // NOISE_ROWS)])
    except Exception as error:  # of ONNX, of ONNX Runtime, or a disk that is full
        raise BackendError(f"ONNX Runtime cannot quantize {target.parent.name}: {first_line(error)}") from error


class _Reader:
    """Rows as the calibration reads them."""

    def __init__(self, rows: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        row = next(self._rows, None)
        return None if row is None else dict(row)


def _noise(file: Path, rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """By layer, how far rounding moves its inputs and its output: root mean square, as a share of their own."""
    import onnx
    import onnxruntime as ort
    from onnx import helper

    model = onnx.load(file, load_external_data=False)
    nodes = list(model.graph.node)
    rounded = {node.output[0]: node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    before = {
        node.output[0]: rounded[node.input[0]]
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    after = {start: end for end, start in before.items()}
    layers = {
        node.name: [*(name for name in node.input if name in before), *(after[name] for name in node.output if name in after)]
        for node in nodes
        if node.op_type in _LAYERS and any(name in before for name in node.input)
    }
    roundings = sorted({name for names in layers.values() for name in names})
    tiny = helper.make_tensor("noise_tiny", onnx.TensorProto.FLOAT, [], [_TINY])
    model.graph.initializer.append(tiny)
    for index, end in enumerate(roundings):
        moved, square, mean, own, size, part = (
            f"noise_{index}_{name}" for name in ("moved", "square", "mean", "own", "size", "part")
        )
        model.graph.node.extend(
            [
                helper.make_node("Sub", [end, before[end]], [moved]),
                helper.make_node("Mul", [moved, moved], [square]),
                helper.make_node("ReduceMean", [square], [mean], keepdims=0),
                helper.make_node("Mul", [before[end], before[end]], [own]),
                helper.make_node("ReduceMean", [own], [size], keepdims=0),
                helper.make_node("Add", [size, tiny.name], [f"{size}_tiny"]),
                helper.make_node("Div", [mean, f"{size}_tiny"], [part]),
            ]
        )
    del model.graph.output[:]
    names = [f"noise_{index}_part" for index in range(len(roundings))]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []) for name in names)
    probe = file.with_name("noise.onnx")  # next to the weights, which it shares
    try:
        onnx.save(model, probe)
        session = ort.InferenceSession(str(probe), providers=["CPUExecutionProvider"])
    finally:
        probe.unlink(missing_ok=True)
    means = np.sqrt(np.mean([session.run(names, dict(row)) for row in rows], axis=0))
    noise = dict(zip(roundings, map(float, means), strict=True))
    return {layer: max(noise[name] for name in names) for layer, names in layers.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its advice, which it logs as the program itself would, between our own lines."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
