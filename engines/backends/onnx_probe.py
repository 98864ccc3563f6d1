"""What tensors within an ONNX graph are like: numbers by row, and the noise of rounded layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from flashdiff.engines.backends.base import noise_rows

LAYERS = ("Conv", "Gemm", "MatMul")
"""The kinds of nodes that are rounded."""

Rows = Sequence[Mapping[str, NDArray[Any]]]


def measure(file: Path, nodes: Sequence[NodeProto], names: Sequence[str], rows: Rows) -> NDArray[np.float32]:
    """What nodes that are added to a graph make of each row, [rows, names]; the names are those of float32 scalars."""
    model = onnx.load(file, load_external_data=False)
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in names)
    probe = file.with_name("probe.onnx")  # next to the weights, which it shares
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # what is rounded is not to be fused with its layer
    try:
        onnx.save(model, probe)
        session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    finally:
        probe.unlink(missing_ok=True)
    return np.array([session.run([*names], dict(row)) for row in rows], dtype=np.float32)


def noise_of(file: Path, rows: Rows) -> dict[str, float]:
    """By rounded layer, how far rounding moves its inputs and its output: root mean square, as a share of their own.

    It is measured on a few of the rows.
    """
    model = onnx.load(file, load_external_data=False)
    made_by = {node.output[0]: node for node in model.graph.node}
    before = {
        end: made_by[node.input[0]].input[0]
        for end, node in made_by.items()
        if node.op_type == "DequantizeLinear" and node.input[0] in made_by
    }
    after = {start: end for end, start in before.items()}
    layers = {
        node.name: [*(name for name in node.input if name in before), *(after[name] for name in node.output if name in after)]
        for node in model.graph.node
        if node.op_type in LAYERS and any(name in before for name in node.input)
    }
    ends = sorted({name for names in layers.values() for name in names})
    nodes = []
    for index, end in enumerate(ends):
        nodes += [
            helper.make_node("Cast", [end], [f"after_{index}"], to=TensorProto.FLOAT),
            helper.make_node("Cast", [before[end]], [f"before_{index}"], to=TensorProto.FLOAT),
            helper.make_node("Sub", [f"after_{index}", f"before_{index}"], [f"moved_{index}"]),
        ]
        for kind in ("moved", "before"):
            nodes += [
                helper.make_node("Mul", [f"{kind}_{index}"] * 2, [f"{kind}_{index}_squared"]),
                helper.make_node("ReduceMean", [f"{kind}_{index}_squared"], [f"{kind}_{index}_mean"], keepdims=0),
            ]
    names = [f"{kind}_{index}_mean" for kind in ("moved", "before") for index in range(len(ends))]
    moved, own = np.split(measure(file, nodes, names, noise_rows(rows)), 2, axis=1)
    means = np.sqrt(np.mean(moved / (own + np.float32(1e-12)), axis=0))
    noise = dict(zip(ends, map(float, means), strict=True))
    return {layer: max(noise[name] for name in names) for layer, names in layers.items()}
