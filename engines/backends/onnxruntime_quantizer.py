"""ONNX graphs in int8, by ONNX Runtime's own static quantization: pairs of QuantizeLinear and DequantizeLinear at its layers."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flashdiff.engines.backends.onnx_probe import LAYERS, noise_of
from flashdiff.errors import BackendError, first_line


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
                op_types_to_quantize=list(LAYERS),
                nodes_to_exclude=sorted(kept),
                per_channel=True,
                activation_type=QuantType.QUInt8,  # with weights in QInt8 what processors multiply
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"DedicatedQDQPair": True},  # of a tensor that several rounded layers read
            )
        return noise_of(target, rows)
    except Exception as error:  # of ONNX, of ONNX Runtime, or a disk that is full
        raise BackendError(f"ONNX Runtime cannot quantize {target.parent.name}: {first_line(error)}") from error


class _Reader:
    """Rows as the calibration reads them."""

    def __init__(self, rows: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        row = next(self._rows, None)
        return None if row is None else dict(row)


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
