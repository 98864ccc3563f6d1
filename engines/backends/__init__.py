"""The backends, by name. Only this folder knows a backend's name or its library; the list itself imports neither."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashdiff.engines.backends.base import Backend

BACKENDS = {
    "openvino": "flashdiff.engines.backends.openvino",
    "onnxruntime": "flashdiff.engines.backends.onnxruntime",
    "torch": "flashdiff.engines.backends.torch",
    "tensorrt": "flashdiff.engines.backends.tensorrt",
    "tensorrt-rtx": "flashdiff.engines.backends.tensorrt",
}
"""The module that holds each backend's record, in its `RECORDS`."""


def find_backend(name: str) -> "Backend":
    """The record of a backend; `name` is one of `BACKENDS`."""
    records: tuple[Backend, ...] = importlib.import_module(BACKENDS[name]).RECORDS
    return next(record for record in records if record.name == name)
