"""ONNX graphs in int8 and fp8 as TensorRT reads them: pairs of QuantizeLinear and DequantizeLinear at layers with weights.

Written here, because ONNX Runtime's own quantization takes the scales of fp8 from deviations, and rounds biases.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from ml_dtypes import float8_e4m3fn
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from flashdiff.engines.backends.onnx_probe import LAYERS, Rows, measure, noise_of
from flashdiff.errors import BackendError, first_line

Kind = Literal["int8", "fp8"]

_LARGEST: Mapping[Kind, float] = {"int8": 127.0, "fp8": 448.0}
_FP8_CHANNELS = 16
"""What channels must be a multiple of for fp8 kernels."""


def quantize(kind: Kind, graph: Path, target: Path, rows: Rows, kept: Collection[str]) -> dict[str, float]:
    """Write the graph with its layers in `kind` to `target`; see `QuantizeGraph`.

    Scales are symmetric and keep the largest value: one an activation; one a channel of a weight in int8, one a weight in fp8.
    """
    try:
        model = onnx.load(graph)
        layers = [layer for layer in _layers(model.graph, kind) if layer.node.name not in kept]
        _round(model.graph, layers, _largest(graph, sorted({layer.node.input[0] for layer in layers}), rows), kind)
        data = target.with_name(f"{target.name}.data")
        data.unlink(missing_ok=True)  # weights would be appended to those of a try before
        onnx.save(model, target, save_as_external_data=True, location=data.name)
        return noise_of(target, rows)
    except Exception as error:  # of ONNX, of ONNX Runtime, or a disk that is full
        raise BackendError(f"{target.parent.name} cannot be rounded to {kind}: {first_line(error)}") from error


@dataclass(frozen=True)
class _Layer:
    """A layer that is rounded."""

    node: onnx.NodeProto
    weight: onnx.TensorProto
    axis: int
    """Of the weight's output channels."""


def _layers(graph: onnx.GraphProto, kind: Kind) -> Iterator[_Layer]:
    """Layers with weights. Products of two activations stay: TensorRT fuses attention as a whole."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        weight = stored.get(node.input[1]) if node.op_type in LAYERS else None
        if weight is None or len(weight.dims) < 2:
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        is_small = settings.get("group", 1) > 1 or any(side % _FP8_CHANNELS for side in weight.dims[:2])
        if kind == "int8" or not is_small:
            yield _Layer(node, weight, axis=0 if node.op_type == "Conv" or settings.get("transB") else 1)


def _largest(graph: Path, names: Sequence[str], rows: Rows) -> dict[str, float]:
    """The largest absolute value of tensors, by name, over the rows."""
    nodes = []
    for index, name in enumerate(names):
        nodes += [
            helper.make_node("Cast", [name], [f"float_{index}"], to=TensorProto.FLOAT),
            helper.make_node("Abs", [f"float_{index}"], [f"abs_{index}"]),
            helper.make_node("ReduceMax", [f"abs_{index}"], [f"largest_{index}"], keepdims=0),
        ]
    found = measure(graph, nodes, [f"largest_{index}" for index in range(len(names))], rows)
    return dict(zip(names, map(float, found.max(axis=0)), strict=True))


def _round(graph: onnx.GraphProto, layers: Sequence[_Layer], largest: Mapping[str, float], kind: Kind) -> None:
    """Let the layers read activations and weights that were rounded: the weights are stored so."""
    of_node = {layer.node.name: layer for layer in layers}
    nodes: list[onnx.NodeProto] = []
    restored: dict[str, str] = {}
    for node in [*graph.node]:
        if layer := of_node.get(node.name):
            source, weight = node.input[0], node.input[1]
            if source not in restored:
                scale = _scale(largest[source], layer.weight.data_type, kind)
                nodes += _pair(graph, source, scale, kind)
            if weight not in restored:
                nodes.append(_stored(graph, layer, kind))
            restored |= {name: _restored(name) for name in (source, weight)}
            node.input[0], node.input[1] = restored[source], restored[weight]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used or tensor.name not in restored]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _restored(name: str) -> str:
    return f"{name}_restored"


def _pair(graph: onnx.GraphProto, name: str, scale: NDArray[Any], kind: Kind) -> list[onnx.NodeProto]:
    """The nodes that round an activation."""
    names, rounded = _add_scale(graph, name, scale, kind), f"{name}_rounded"
    return [
        helper.make_node("QuantizeLinear", [name, *names], [rounded], name=rounded),
        helper.make_node("DequantizeLinear", [rounded, *names], [_restored(name)], name=_restored(name)),
    ]


def _stored(graph: onnx.GraphProto, layer: _Layer, kind: Kind) -> onnx.NodeProto:
    """The node that restores a weight, which is stored rounded."""
    name = layer.weight.name
    channels = np.moveaxis(numpy_helper.to_array(layer.weight).astype(np.float32), layer.axis, 0)
    largest = np.abs(channels).max(axis=tuple(range(1, channels.ndim)) if kind == "int8" else None)
    scale = _scale(largest, layer.weight.data_type, kind)
    divided = np.divide(channels.T, scale, dtype=np.float32).T
    graph.initializer.append(_tensor(f"{name}_rounded", np.moveaxis(divided, 0, layer.axis), kind))
    inputs = [f"{name}_rounded", *_add_scale(graph, name, scale, kind)]
    return helper.make_node("DequantizeLinear", inputs, [_restored(name)], name=_restored(name), axis=layer.axis)


def _scale(largest: ArrayLike, data_type: int, kind: Kind) -> NDArray[Any]:
    """In the type of the graph, never 0."""
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    return np.maximum(np.divide(largest, _LARGEST[kind]).astype(dtype), np.finfo(dtype).smallest_subnormal)


def _add_scale(graph: onnx.GraphProto, name: str, scale: NDArray[Any], kind: Kind) -> list[str]:
    """The names of a scale and of its zero points, which are stored."""
    names = [f"{name}_scale", f"{name}_zero"]
    graph.initializer.append(numpy_helper.from_array(scale, names[0]))
    graph.initializer.append(_tensor(names[1], np.zeros(scale.shape, dtype=np.float32), kind))
    return names


def _tensor(name: str, values: NDArray[np.float32], kind: Kind) -> onnx.TensorProto:
    """Values of up to the kind's largest, rounded."""
    limited = values.clip(-_LARGEST[kind], _LARGEST[kind])
    rounded = limited.round().astype(np.int8) if kind == "int8" else limited.astype(float8_e4m3fn)
    return numpy_helper.from_array(np.ascontiguousarray(rounded), name)
