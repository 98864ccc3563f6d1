"""OpenVINO graphs in int8, by NNCF's post-training quantization. Only building needs NNCF; the graphs are plain OpenVINO."""

import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.engines.backends.base import noise_rows
from flashdiff.errors import BackendError, first_line

_REARRANGING = ("Broadcast", "Concat", "Interpolate", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def quantize(graph: Path, target: Path, rows: Sequence[Mapping[str, NDArray[Any]]], kept: Collection[str]) -> dict[str, float]:
    """Write the graph in int8 to `target`, calibrated on rows of its inputs; the layers `kept` stay as they are."""
    import openvino as ov

    from flashdiff.engines.backends.openvino import name_nodes

    try:
        with _quiet():
            import nncf

            model = nncf.quantize(
                ov.Core().read_model(graph),
                nncf.Dataset([dict(row) for row in rows]),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                model_type=nncf.ModelType.TRANSFORMER,  # smooths activations into weights; norms and additions stay in float32
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
                subset_size=len(rows),
                ignored_scope=nncf.IgnoredScope(names=sorted(kept)),
            )
        noise = _noise(model, _layers(model), noise_rows(rows))
        name_nodes(model)
        ov.save_model(model, str(target), compress_to_fp16=False)
    except Exception as error:  # of NNCF, of OpenVINO, or a disk that is full
        raise BackendError(f"NNCF cannot quantize {target.parent.name}: {first_line(error)}") from error
    return noise


def _layers(model: Any) -> dict[str, list[Any]]:
    """The layers whose activations are rounded, each with the nodes that round them."""
    found: dict[str, list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            for layer in _consumers(node):
                found.setdefault(layer, []).append(node)
    return found


def _consumers(node: Any) -> Iterator[str]:
    """The convolutions and matrix products that a rounding feeds, also through nodes that only rearrange."""
    for port in node.output(0).get_target_inputs():
        consumer = port.get_node()
        if consumer.get_type_name() in ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention"):
            yield consumer.get_friendly_name()
        elif consumer.get_type_name() in _REARRANGING:
            yield from _consumers(consumer)


def _noise(model: Any, layers: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """By layer, how far the rounding of its inputs moves them: root mean square, as a share of the inputs' own."""
    import openvino as ov
    from openvino import opset13 as ops

    roundings = list({id(node): node for nodes in layers.values() for node in nodes}.values())
    tiny = ops.constant(np.float32(1e-12))
    ratios = []
    for node in roundings:
        before, after = node.input_value(0), node.output(0)
        axes = ops.constant(np.arange(before.get_partial_shape().rank.get_length()))
        moved, own = (ops.reduce_mean(ops.multiply(values, values), axes) for values in (ops.subtract(after, before), before))
        ratios.append(ops.divide(moved, ops.add(own, tiny)))
    probe = ov.Model([ops.result(ratio) for ratio in ratios], model.get_parameters(), "noise")
    compiled = ov.Core().compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    runs = [compiled(dict(row)) for row in rows]
    means = np.sqrt(np.mean([[float(run[index]) for index in range(len(roundings))] for run in runs], axis=0))
    noise = {id(node): float(mean) for node, mean in zip(roundings, means, strict=True)}
    return {layer: max(noise[id(node)] for node in nodes) for layer, nodes in layers.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's progress bars and advice between our own lines."""
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
