"""Between KServe v2 over HTTP and Triton's messages: JSON, with the bytes of tensors behind it where they are binary."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from flashdiff.errors import TensorError
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.server.http.errors import HttpError
from flashdiff.server.http.images_request import read_json
from flashdiff.server.triton_convert import NUMPY

HEADER_LENGTH = "inference-header-content-length"
_OUTPUTS_AS_JSON = ("IMAGES", "SEEDS")  # of a request that names none: files are no JSON
_MAX_INPUTS = 64
_PIXELS = np.array([b"%3d," % value for value in range(256)])
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Inference:
    """A request, and which of its outputs are wanted as bytes."""

    message: pb.ModelInferRequest
    binary: Mapping[str, bool]
    binary_by_default: bool

    def is_binary(self, output: str) -> bool:
        """Whether the client wants this output as bytes."""
        return self.binary.get(output, self.binary_by_default)


def read_inference(body: bytes, header_length: str | None, model: str, version: str) -> Inference:
    """The request in a body; TensorError or HttpError for a body that is not one."""
    length = _length(header_length, len(body))
    given = read_json(body[:length])
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=_take(given, "id", str, ""))
    parameters = _take(given, "parameters", dict, {})
    by_default = parameters.pop("binary_data_output", False)
    if not isinstance(by_default, bool):
        raise TensorError("binary_data_output must be true or false")
    _write_parameters(message.parameters, parameters)
    _add_inputs(message, _records(given, "inputs"), memoryview(body)[length:])
    outputs = _records(given, "outputs") or ([] if by_default else [{"name": name} for name in _OUTPUTS_AS_JSON])
    binary = _add_outputs(message, outputs)
    return Inference(message, binary, by_default)


def _length(header: str | None, whole: int) -> int:
    if header is None:
        return whole
    if not header.isascii() or not header.isdigit() or int(header[:20]) > whole:
        raise HttpError(400, f"{HEADER_LENGTH}: {header[:40]!r} is not a length within the body's {whole} bytes")
    return int(header)


def _add_inputs(message: pb.ModelInferRequest, inputs: list[dict[str, Any]], binary: memoryview) -> None:
    """The inputs, those of JSON as the bytes that they would have in binary."""
    taken = 0
    for given in inputs:
        name, datatype, shape = _take(given, "name", str), _take(given, "datatype", str), _take(given, "shape", list)
        if len(shape) > _MAX_DIMENSIONS:
            raise TensorError(f"input '{name}': its shape has {len(shape)} dimensions, at most {_MAX_DIMENSIONS} are taken")
        if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in shape):
            raise TensorError(f"input '{name}': its shape must be whole numbers")
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        parameters = _take(given, "parameters", dict, {})
        size = parameters.pop("binary_data_size", None)
        _write_parameters(tensor.parameters, parameters)
        if "shared_memory_region" in parameters:
            continue
        if size is None:
            message.raw_input_contents.append(_json_bytes(name, datatype, shape, _take(given, "data", list)))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary) - taken:
            raise TensorError(f"input '{name}': its binary_data_size is not within the body")
        message.raw_input_contents.append(bytes(binary[taken : taken + size]))
        taken += size
    if taken != len(binary):
        raise TensorError(f"{len(binary) - taken} bytes after the inputs belong to none")


def _add_outputs(message: pb.ModelInferRequest, outputs: list[dict[str, Any]]) -> dict[str, bool]:
    """The outputs; which of them say whether they are wanted as bytes."""
    binary = {}
    for given in outputs:
        output = message.outputs.add(name=_take(given, "name", str))
        parameters = _take(given, "parameters", dict, {})
        if "binary_data" in parameters:
            binary[output.name] = is_binary = parameters.pop("binary_data")
            if not isinstance(is_binary, bool):
                raise TensorError(f"output '{output.name}': binary_data must be true or false")
        _write_parameters(output.parameters, parameters)
    return binary


def _json_bytes(name: str, datatype: str, shape: list[int], data: list[Any]) -> bytes:
    """A tensor's JSON values as its bytes."""
    values = data
    for _ in shape[1:]:  # nested as its shape says, or flat
        values = [inner for value in values for inner in (value if isinstance(value, list) else [value])]
    if len(values) != math.prod(shape):
        raise TensorError(f"input '{name}': {len(values)} values do not fill the shape {shape}")
    if datatype == "BYTES":
        if not all(isinstance(value, str) for value in values):
            raise TensorError(f"input '{name}': the values of BYTES must be strings; send other bytes as binary data")
        return b"".join(_with_length(value.encode("utf-8", "surrogatepass")) for value in values)
    if datatype not in NUMPY:
        raise TensorError(f"input '{name}': data-type '{datatype[:20]}' is not taken")
    kind = np.dtype(NUMPY[datatype])
    wanted = (int, float) if kind.kind == "f" else int
    if not all(isinstance(value, wanted) and not isinstance(value, bool) for value in values):
        raise TensorError(f"input '{name}': its values must be numbers of type {datatype}")
    try:
        return np.array(values, dtype=kind).tobytes()
    except OverflowError:
        raise TensorError(f"input '{name}': a value is outside what {datatype} holds") from None


def _with_length(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _records(given: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    records = _take(given, name, list, [])
    if len(records) > _MAX_INPUTS or not all(isinstance(record, dict) for record in records):
        raise TensorError(f"{name} must be a list of at most {_MAX_INPUTS} objects")
    return records


def _take(given: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = given.get(name, default)
    if not isinstance(value, kind):
        raise TensorError(f"{name} must be a JSON {_JSON[kind]}")
    return value


_JSON: dict[type, str] = {str: "string", list: "array", dict: "object"}


def _write_parameters(target: Any, parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        match value:
            case bool():
                target[name].bool_param = value
            case int() if -(2**63) <= value < 2**63:
                target[name].int64_param = value
            case float():
                target[name].double_param = value
            case str():
                target[name].string_param = value
            case _:
                raise TensorError(f"parameter '{name[:40]}' must be a string, a number, true or false")


def write_inference(inference: Inference, response: pb.ModelInferResponse) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON where bytes follow it."""
    raws, behind, outputs = iter(response.raw_output_contents), list[bytes](), list[bytes]()
    for output in response.outputs:
        written: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        parameters, data = _read_parameters(output.parameters), None
        if "shared_memory_region" not in parameters:
            raw = next(raws)
            if inference.is_binary(output.name):
                parameters["binary_data_size"] = len(raw)
                behind.append(raw)
            else:
                data = _json_values(output.datatype, raw)
        start = json.dumps({**written, "parameters": parameters} if parameters else written).encode()
        outputs.append(start if data is None else b'%s, "data": %s}' % (start.removesuffix(b"}"), data))
    head = {
        "model_name": response.model_name,
        "model_version": response.model_version,
        **({"id": response.id} if response.id else {}),
        "parameters": _read_parameters(response.parameters),
    }
    encoded = b'%s, "outputs": [%s]}' % (json.dumps(head).encode().removesuffix(b"}"), b", ".join(outputs))
    return b"".join([encoded, *behind]), len(encoded) if behind else None


def check_outputs(inference: Inference) -> None:
    """TensorError for an output that JSON cannot carry; before any work is done for it."""
    for output in inference.message.outputs:
        if output.name == "ENCODED" and "shared_memory_region" not in output.parameters and not inference.is_binary(output.name):
            raise TensorError("output 'ENCODED' is files, which are no JSON: ask for it with binary_data")


def _json_values(datatype: str, raw: bytes) -> bytes:
    """The values as a JSON list; those of pixels with blanks, for an image has millions: json would hold up all for a second."""
    values: NDArray[Any] = np.frombuffer(raw, NUMPY[datatype])
    if values.dtype == np.uint8:
        return b"[%s]" % _PIXELS[values].tobytes().removesuffix(b",")
    return json.dumps(values.tolist()).encode()


def _read_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {name: getattr(value, str(value.WhichOneof("parameter_choice"))) for name, value in parameters.items()}


def as_json(message: Message) -> dict[str, Any]:
    """A message as JSON with the names of its fields, defaults included, and numbers as numbers."""
    written: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue  # none that is written here has one
        if field.is_repeated:
            written[field.name] = [_as_json_value(field, item) for item in value]
        elif field.message_type is None or message.HasField(field.name):
            written[field.name] = _as_json_value(field, value)
    return written


def _as_json_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value
