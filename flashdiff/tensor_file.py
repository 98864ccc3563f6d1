"""A safetensors file in numpy: for servers, which have neither torch nor the library. Every flaw is a ValueError."""

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.reading import parse_json

_MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}
"""bfloat16 is the upper half of a float32; whole numbers are read one at a time, as kohya's scripts write an alpha."""


class UnreadTypeError(ValueError):
    """A tensor of a type that is not read here, in a file that may be whole."""


def parse_tensors(content: bytes) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """The tensors of a file by name, as float32, and its metadata; ValueError for a damaged file, or tensors of other types."""
    header, data = _split(content)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    if unprintable := next((name for name in header if not name.isprintable()), None):
        raise ValueError(f"{unprintable[:80]!r} is no name of a tensor")
    return {name: _tensor(name, entry, data) for name, entry in header.items()}, metadata


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(content) < 8:
        raise ValueError("it is too short")
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(_MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"its header has {length} bytes")
    header = parse_json(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, memoryview(content)[8 + length :]


def _tensor(name: str, entry: Any, data: memoryview) -> NDArray[np.float32]:
    try:
        kind, shape, (start, end) = str(entry["dtype"]), list(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"'{name[:80]}' lacks its type, shape or place") from None
    if kind.startswith("F8"):
        raise UnreadTypeError(f"'{name[:80]}' has the type {kind[:20]}, which slots do not read; save it in float16")
    if kind not in _KINDS or (kind.startswith("I") and shape not in ([], [1])):
        raise ValueError(f"'{name[:80]}' has the type {kind[:20]}, which no LoRA has")
    numbers = [*shape, start, end]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError(f"'{name[:80]}' has a shape or place that is no whole number")
    own = np.dtype(_KINDS[kind])
    if end - start != math.prod(shape) * own.itemsize or end > len(data):
        raise ValueError(f"'{name[:80]}' has a shape that does not fit its bytes")
    values = np.frombuffer(data[start:end], own)
    if kind == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what is not finite is refused by the caller
        return values.astype(np.float32, copy=False).reshape(shape)
