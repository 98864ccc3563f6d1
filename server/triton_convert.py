"""Between the messages of Triton's protocol and our records: requests into calls, results into responses."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size
from flashdiff.controls import ControlRequest, controls_of
from flashdiff.errors import RequestError, TensorError
from flashdiff.lora_requests import LoraRequest, slots_of
from flashdiff.noise import image_seed
from flashdiff.proto.v1 import triton_pb2 as pb
from flashdiff.references import ReferenceRequest, takes_reference
from flashdiff.server.images import control_request, reference_request
from flashdiff.server.jobs import Step
from flashdiff.server.names import ImageFormat, Priority
from flashdiff.server.reply_size import ReplyLimit
from flashdiff.server.requests import ImageRequest, Reply
from flashdiff.server.shared_memory import Regions, offered
from flashdiff.tasks import tasks_of

VERSION = "1"  # of every model: bundles differ by name and hash
MAX_ID = 256
_MAX_INPUT_BYTES = 4 * 1024 * 1024  # as for requests on the wire


@dataclass(frozen=True)
class Tensor:
    datatype: str
    config_type: pb.DataType
    shape: tuple[int, ...]
    optional: bool = True
    is_file: bool = False


_INPUTS = {
    "PROMPT": Tensor("BYTES", pb.TYPE_STRING, (1,), optional=False),
    "NEGATIVE_PROMPT": Tensor("BYTES", pb.TYPE_STRING, (1,)),
    "SEED": Tensor("UINT64", pb.TYPE_UINT64, (1,)),
    "STEPS": Tensor("INT32", pb.TYPE_INT32, (1,)),
    "WIDTH": Tensor("INT32", pb.TYPE_INT32, (1,)),
    "HEIGHT": Tensor("INT32", pb.TYPE_INT32, (1,)),
    "COUNT": Tensor("INT32", pb.TYPE_INT32, (1,)),
    "FORMAT": Tensor("BYTES", pb.TYPE_STRING, (1,)),
}
_FILE = Tensor("BYTES", pb.TYPE_STRING, (1,), is_file=True)
_NUMBER = Tensor("FP32", pb.TYPE_FP32, (1,))
_CONTROL = Tensor("BYTES", pb.TYPE_STRING, (1,), is_file=True)
_OF_CONTROL = Tensor("FP32", pb.TYPE_FP32, (1,))
_REFERENCE = Tensor("BYTES", pb.TYPE_STRING, (1,), is_file=True)
_OF_REFERENCE = Tensor("FP32", pb.TYPE_FP32, (1,))
_LORA, _LORA_SCALE = Tensor("BYTES", pb.TYPE_STRING, (1,)), Tensor("FP32", pb.TYPE_FP32, (1,))
OUTPUTS = {
    "IMAGES": Tensor("UINT8", pb.TYPE_UINT8, (-1, -1, -1, 3)),  # [count, height, width, RGB]
    "ENCODED": Tensor("BYTES", pb.TYPE_STRING, (-1,)),  # [count] files of FORMAT
    "SEEDS": Tensor("UINT64", pb.TYPE_UINT64, (-1,)),  # [count]
    "PREVIEW": Tensor("UINT8", pb.TYPE_UINT8, (-1, -1, 3)),  # [h, w, RGB] at latent size; streams only
}
NUMPY = {"UINT8": "u1", "UINT64": "<u8", "INT32": "<i4", "FP32": "<f4"}
_TYPED = {"UINT64": "uint64_contents", "INT32": "int_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}
_FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")


def inputs_of(spec: ModelSpec) -> dict[str, Tensor]:
    """The inputs of a model by name: those of all models, such as PROMPT [1], the files and numbers of its tasks, and those of
    its controls, reference and LoRA slots."""
    tasks = tasks_of(spec)
    files = {name.upper(): _FILE for task in tasks for name in task.inputs}
    numbers = {parameter.name.upper(): _NUMBER for task in tasks for parameter in task.parameters_of(spec)}
    names = [name.upper() for name in controls_of(spec)]
    controls = {f"CONTROL_{name}": _CONTROL for name in names}
    shares = {f"{share}_{name}": _OF_CONTROL for name in names for share in ("SCALE", "START", "END")}
    reference = {"REFERENCE": _REFERENCE, "REFERENCE_SCALE": _OF_REFERENCE} if takes_reference(spec) else {}
    slots = range(1, len(slots_of(spec)) + 1)
    loras = {f"LORA_{slot}": _LORA for slot in slots} | {f"LORA_SCALE_{slot}": _LORA_SCALE for slot in slots}
    return {**_INPUTS, **files, **numbers, **controls, **shares, **reference, **loras}


@dataclass(frozen=True)
class Call:
    """One inference request, read; `outputs` says of each output where in shared memory it goes, if anywhere."""

    request: ImageRequest
    outputs: dict[str, dict[str, Any]]


def read_request(
    request: pb.ModelInferRequest,
    spec: ModelSpec,
    remaining_s: float | None,
    regions: Regions | None,
    *,
    stream: bool,
    max_message_bytes: int | None = None,
) -> Call:
    """A request to the model of `spec`; an error names the input, output or parameter that is wrong."""
    if len(request.id) > MAX_ID:
        raise TensorError(f"the request's id has {len(request.id)} characters, at most {MAX_ID} are taken")
    inputs = inputs_of(spec)
    values = _read_inputs(request, inputs, regions)
    parameters = _parameters(request.parameters)
    outputs = {output.name: _parameters(output.parameters) for output in request.outputs} or {name: {} for name in OUTPUTS}
    for name in outputs:
        if name not in OUTPUTS:
            raise TensorError(f"unexpected inference output '{name}' for model '{request.model_name}'")
    for place in outputs.values():
        if "shared_memory_region" in place:
            offered(regions).find_one(_place(place)[0])  # now, and not when the images are made
    if "shared_memory_region" in outputs.get("PREVIEW", {}):
        raise TensorError("output 'PREVIEW' does not go to shared memory: it comes more than once")
    if not stream and "PREVIEW" in outputs:
        if request.outputs:
            raise TensorError("output 'PREVIEW' comes in a stream only: use ModelStreamInfer")
        del outputs["PREVIEW"]
    image_format = values.get("FORMAT", "png")
    if image_format not in _FORMATS:
        raise RequestError("FORMAT", image_format, f"it must be one of {', '.join(_FORMATS)}")
    asked = ImageRequest(
        prompt=values["PROMPT"],
        negative_prompt=values.get("NEGATIVE_PROMPT", ""),
        truncate_prompt=_flag(parameters, "truncate_prompt"),
        seed=values.get("SEED"),
        steps=values.get("STEPS"),
        size=Size(values.get("WIDTH", 0), values.get("HEIGHT", 0)) if {"WIDTH", "HEIGHT"} & set(values) else None,
        count=values.get("COUNT", 1),
        files={name.lower(): values[name] for name, tensor in inputs.items() if tensor is _FILE and name in values},
        parameters={name.lower(): values[name] for name, tensor in inputs.items() if tensor is _NUMBER and name in values},
        controls=_controls(spec, values),
        reference=_reference(values),
        loras=_loras(spec, values),
        format=image_format,
        priority=_priority(parameters),
        timeout_s=_timeout_s(parameters, remaining_s),
        wants_steps="PREVIEW" in outputs,
        wants_files="ENCODED" in outputs,
        limit=ReplyLimit(max_bytes=max_message_bytes, formats=_sent(outputs, image_format)) if max_message_bytes else None,
    )
    return Call(asked, outputs)


def _sent(outputs: Mapping[str, Mapping[str, Any]], image_format: ImageFormat) -> tuple[ImageFormat, ...]:
    """In which formats each image is in the response, and not in shared memory."""
    formats: dict[str, ImageFormat] = {"IMAGES": "raw", "ENCODED": image_format}
    return tuple(formats[name] for name, place in outputs.items() if name in formats and "shared_memory_region" not in place)


def _controls(spec: ModelSpec, values: Mapping[str, Any]) -> list[ControlRequest]:
    """The controls that any input names."""
    found = []
    for name in controls_of(spec):
        file = values.get(f"CONTROL_{name.upper()}")
        numbers = {share: values.get(f"{share.upper()}_{name.upper()}") for share in ("scale", "start", "end")}
        if file is not None or any(number is not None for number in numbers.values()):
            found.append(control_request(name, file or b"", **numbers))
    return found


def _reference(values: Mapping[str, Any]) -> ReferenceRequest | None:
    if not {"REFERENCE", "REFERENCE_SCALE"} & values.keys():
        return None
    return reference_request(values.get("REFERENCE", b""), scale=values.get("REFERENCE_SCALE"))


def _loras(spec: ModelSpec, values: Mapping[str, Any]) -> list[LoraRequest]:
    """The LoRAs of the slots that any input names."""
    found = []
    for slot in range(1, len(slots_of(spec)) + 1):
        name, scale = values.get(f"LORA_{slot}"), values.get(f"LORA_SCALE_{slot}")
        if name is not None:
            found.append(LoraRequest(name=name, scale=defaults.LORA_SCALE if scale is None else scale))
        elif scale is not None:
            raise RequestError(f"LORA_SCALE_{slot}", scale, f"it needs a LORA_{slot}")
    return found


def _read_inputs(request: pb.ModelInferRequest, inputs: Mapping[str, Tensor], regions: Regions | None) -> dict[str, Any]:
    """The value of every input given; RequestError names the tensor that is wrong."""
    model = request.model_name
    raws = iter(request.raw_input_contents)
    values: dict[str, Any] = {}
    for tensor in request.inputs:
        if tensor.name not in inputs:
            raise TensorError(f"unexpected inference input '{tensor.name}' for model '{model}'")
        expected = inputs[tensor.name]
        if tensor.name in values:
            raise TensorError(f"input '{tensor.name}' is given twice for model '{model}'")
        if tensor.datatype != expected.datatype:
            raise TensorError(
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model}' expects "
                f"'{expected.datatype}'"
            )
        if tuple(tensor.shape) != expected.shape:
            raise TensorError(
                f"unexpected shape for input '{tensor.name}' for model '{model}': expected {list(expected.shape)}, "
                f"got {list(tensor.shape)}"
            )
        # Raw contents are those of the inputs that have no place in shared memory, in their order.
        place = _parameters(tensor.parameters)
        raw = _read_shared(place, regions) if "shared_memory_region" in place else next(raws, None)
        if raw is not None and tensor.HasField("contents"):
            raise TensorError(f"input '{tensor.name}' has both contents and raw contents")
        value = _typed_value(tensor, expected) if raw is None else _raw_value(tensor.name, expected, raw)
        values[tensor.name] = _text(tensor.name, value) if isinstance(value, bytes) and not expected.is_file else value
    if next(raws, None) is not None:
        raise TensorError(f"more raw input contents than inputs that need them for model '{model}'")
    missing = [name for name, tensor in inputs.items() if not tensor.optional and name not in values]
    if missing:
        raise TensorError(f"expected input '{missing[0]}' for model '{model}' is not there")
    return values


def _read_shared(place: Mapping[str, Any], regions: Regions | None) -> bytes:
    region, offset, byte_size = _place(place)
    if byte_size > _MAX_INPUT_BYTES:
        raise TensorError(f"an input of {byte_size} bytes is more than the {_MAX_INPUT_BYTES} that are taken")
    return offered(regions).read(region, offset, byte_size)


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for name, value in parameters.items()}


def _place(parameters: Mapping[str, Any]) -> tuple[str, int, int]:
    """(region, offset, bytes) of a tensor in shared memory."""
    region, offset, byte_size = (
        parameters.get(f"shared_memory_{name}", default) for name, default in (("region", ""), ("offset", 0), ("byte_size", 0))
    )
    if not isinstance(region, str) or not isinstance(offset, int) or not isinstance(byte_size, int):
        raise TensorError("shared memory takes a region's name, an offset and a number of bytes")
    return region, offset, byte_size


def _raw_value(name: str, tensor: Tensor, raw: bytes) -> Any:
    """The one element: for BYTES a 4-byte little-endian length and as many bytes."""
    if tensor.datatype == "BYTES":
        if len(raw) < 4 or struct.unpack("<I", raw[:4])[0] != len(raw) - 4:
            raise TensorError(f"input '{name}': {len(raw)} bytes are not one element with its length before it")
        return raw[4:]
    kind = np.dtype(NUMPY[tensor.datatype])
    if len(raw) != kind.itemsize:
        raise TensorError(f"input '{name}': expected {kind.itemsize} bytes, got {len(raw)}")
    return np.frombuffer(raw, kind)[0].item()


def _typed_value(tensor: pb.ModelInferRequest.InferInputTensor, expected: Tensor) -> Any:
    contents = getattr(tensor.contents, _TYPED[expected.datatype])
    if len(contents) != 1:
        raise TensorError(f"input '{tensor.name}': expected 1 element, got {len(contents)}")
    return contents[0]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(name, value[:40], "it must be valid UTF-8") from None


def _priority(parameters: Mapping[str, Any]) -> Priority:
    """The priority of Triton's number: 1 is the highest, 0 or no number the default."""
    number = parameters.get("priority", 0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise RequestError("priority", number, "it must be a whole number from 0 on")
    named: dict[int, Priority] = {0: "normal", 1: "high", 2: "normal"}
    return named.get(number, "low")


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(name, value, "it must be true or false")
    return value


def _timeout_s(parameters: Mapping[str, Any], remaining_s: float | None) -> float | None:
    """The nearer of the call's deadline and the parameter, which is in microseconds."""
    number = parameters.get("timeout", 0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise RequestError("timeout", number, "it must be a number of microseconds from 0 on")
    limits = [limit for limit in (remaining_s, number / 1e6 if number else None) if limit is not None]
    return min(limits, default=None)


def write_preview(request: pb.ModelInferRequest, step: Step) -> pb.ModelInferResponse:
    """Where an image is heading, and which it is."""
    response = _response(request, {"PREVIEW": step.picture})
    for name, value in (("image", step.index), ("step", step.step), ("total", step.total)):
        response.parameters[name].int64_param = value
    response.parameters["triton_final_response"].bool_param = False
    return response


def write_result(request: pb.ModelInferRequest, call: Call, reply: Reply, regions: Regions | None) -> pb.ModelInferResponse:
    """The last response; outputs with a place in shared memory are written there."""
    order, timings = reply.order, reply.timings
    tensors: dict[str, NDArray[Any] | list[bytes]] = {}
    for name in call.outputs:
        if name == "IMAGES":
            tensors[name] = np.stack(reply.images)
        elif name == "SEEDS":
            tensors[name] = np.array([image_seed(order.seed, index) for index in range(order.count)], dtype="<u8")
        elif name == "ENCODED":
            tensors[name] = reply.files
    response = _response(request, tensors)
    raws = list(response.raw_output_contents)
    del response.raw_output_contents[:]
    for output, raw in zip(response.outputs, raws, strict=True):
        place = call.outputs[output.name]
        if "shared_memory_region" not in place:
            response.raw_output_contents.append(raw)
            continue
        region, offset, room = _place(place)
        offered(regions).write(region, offset, raw, room)
        output.parameters["shared_memory_region"].string_param = region
        output.parameters["shared_memory_offset"].int64_param = offset
        output.parameters["shared_memory_byte_size"].int64_param = len(raw)
    response.parameters["steps"].int64_param = order.steps
    response.parameters["bundle_hash"].string_param = reply.model.identity.bundle_hash
    stages = {"queue": timings.queue, **reply.stages_ms, "total": timings.total}
    for name, spent in stages.items():
        response.parameters[f"{name}_ms"].double_param = spent
    response.parameters["triton_final_response"].bool_param = True
    return response


def _response(request: pb.ModelInferRequest, tensors: Mapping[str, NDArray[Any] | list[bytes]]) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    for name, values in tensors.items():
        shape = [len(values)] if isinstance(values, list) else values.shape
        response.outputs.add(name=name, datatype=OUTPUTS[name].datatype, shape=shape)
        raw = b"".join(struct.pack("<I", len(v)) + v for v in values) if isinstance(values, list) else values.tobytes()
        response.raw_output_contents.append(raw)
    return response
