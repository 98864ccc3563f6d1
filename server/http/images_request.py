"""Reads the fields of OpenAI's images requests, from JSON or from a form."""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flashdiff.components import ModelSpec, Size
from flashdiff.controls import ControlRequest
from flashdiff.errors import RequestError
from flashdiff.lora_requests import LoraRequest
from flashdiff.references import ReferenceRequest
from flashdiff.server.http.errors import HttpError
from flashdiff.server.images import control_request, reference_request
from flashdiff.server.names import ImageFormat, Priority
from flashdiff.server.requests import ImageRequest
from flashdiff.tasks import MAX_COUNT, input_names, parameters, tasks_of

MAX_PARTIAL_IMAGES = 3
_Kind = Literal["text", "integer", "number", "flag", "controls", "reference", "loras"]
_FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
_IMAGES = re.compile(r"image(\[\d*\])?")  # one of several is image[]
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")

_FIELDS: dict[str, _Kind] = {
    "prompt": "text",
    "model": "text",
    "n": "integer",
    "size": "text",
    "output_format": "text",
    "output_compression": "integer",
    "response_format": "text",
    "background": "text",
    "stream": "flag",
    "partial_images": "integer",
    # Taken because OpenAI's clients send them, and without effect.
    "quality": "text",
    "style": "text",
    "moderation": "text",
    "user": "text",
    "safety_identifier": "text",
    "input_fidelity": "text",
    # Our own.
    "seed": "integer",
    "steps": "integer",
    "num_inference_steps": "integer",
    "negative_prompt": "text",
    "truncate_prompt": "flag",
    "priority": "text",
    "controls": "controls",
    "reference": "reference",
    "loras": "loras",
}
_OF_CONTROL: dict[str, _Kind] = {"name": "text", "image": "text", "scale": "number", "start": "number", "end": "number"}
_OF_REFERENCE: dict[str, _Kind] = {"image": "text", "scale": "number"}
_OF_LORA: dict[str, _Kind] = {"name": "text", "scale": "number"}
_UNSUPPORTED = ("complexity", "frame_count", "frame_duration_ms", "svg", "markup")  # OpenAI's, for other kinds of images


@dataclass(frozen=True, kw_only=True)
class ImagesRequest:
    """The fields of a request to the images API, without its images."""

    request: ImageRequest
    stream: bool
    partial_images: int
    """How many previews of each image a stream has at most."""


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds; HttpError for anything else."""
    try:
        value = _parsed(body.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and UnicodeEncodeError are ValueErrors
        where = f": {error}" if isinstance(error, json.JSONDecodeError) else ""
        raise HttpError(400, f"the body is not valid JSON{where}") from None
    if not isinstance(value, dict):
        raise HttpError(400, f"the body is a JSON {type(value).__name__}, but must be an object")
    return value


def _parsed(text: str) -> Any:
    """The value of a JSON text; a ValueError for any other and for NaN.

    RequestError for a member with half of a surrogate pair, which json reads, but no text can be written with.
    """
    value = json.loads(text, parse_constant=_refuse_constant)
    if "\\u" in text:
        for name, member in value.items() if isinstance(value, dict) else [("", value)]:
            try:
                json.dumps([name, member], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise RequestError(ascii(name)[1:-1], ascii(member)[:80], "it must be Unicode text") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def read_images_request(
    fields: Mapping[str, Any], files: Mapping[str, bytes], spec: ModelSpec, timeout_s: float | None
) -> ImagesRequest:
    """The request; RequestError for a field that is unknown, of the wrong type, or not supported by this server."""
    given = _typed(fields)
    _check_what_is_fixed(given)
    _check_inputs(spec, files)
    if "prompt" not in given:
        raise RequestError("prompt", None, "it is required")
    count = given.get("n", 1)
    if not 1 <= count <= MAX_COUNT:
        raise RequestError("n", count, f"it must be between 1 and {MAX_COUNT}")
    image_format = _choice(given, "output_format", _FORMATS)
    request = ImageRequest(
        prompt=given["prompt"],
        negative_prompt=given.get("negative_prompt", ""),
        truncate_prompt=given.get("truncate_prompt", False),
        seed=given.get("seed"),
        steps=_steps(given),
        size=_size(given.get("size", "auto")),
        count=count,
        files=files,
        parameters={name: given[name] for name in parameters() if name in given},
        controls=[_control(control) for control in given.get("controls", ())],
        reference=_reference(given["reference"]) if "reference" in given else None,
        loras=[_lora(lora) for lora in given.get("loras", ())],
        format=image_format,
        quality=_quality(given.get("output_compression"), image_format),
        priority=_choice(given, "priority", get_args(Priority), "normal"),
        timeout_s=timeout_s,
        wants_steps=bool(given.get("stream") and given.get("partial_images")),
    )
    return ImagesRequest(
        request=request, stream=given.get("stream", False), partial_images=_partial_images(given.get("partial_images", 0))
    )


def field_kinds() -> dict[str, _Kind]:
    """The fields that are taken, by name, those of tasks included."""
    return {**_FIELDS, **dict.fromkeys(parameters(), "number")}


def _typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null; RequestError for one that is unknown or of the wrong type."""
    kinds = field_kinds()
    given = {}
    for name, value in fields.items():
        if name in _UNSUPPORTED and value is not None:
            raise RequestError(name, value, "this server makes still images only, as PNG, JPEG or WebP")
        if name in input_names():
            raise RequestError(name, value, "it is a file: send it in a form to /v1/images/edits")
        if name not in kinds and name not in _UNSUPPORTED:
            raise RequestError(name[:80], value, "this server has no such field")
        if value is None:
            continue
        kind = kinds[name]
        if not _IS_OF_KIND[kind](value):
            raise RequestError(name, value, f"it must be {_A_KIND[kind]}")
        given[name] = value
    return given


_IS_OF_KIND: dict[_Kind, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "flag": lambda value: isinstance(value, bool),
    **dict.fromkeys(
        ("controls", "loras"), lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value)
    ),
    "reference": lambda value: isinstance(value, dict),
}
_A_KIND: dict[_Kind, str] = {
    "text": "a string",
    "integer": "an integer",
    "number": "a number",
    "flag": "true or false",
    "controls": "a list of objects",
    "reference": "an object with image and scale",
    "loras": "a list of objects",
}


def read_form_value(name: str, text: str) -> Any:
    """A form's text as the value that JSON would have; other text is returned unchanged, and refused later by its type."""
    kind = field_kinds().get(name, "text")
    try:
        match kind:
            case "integer":
                return int(text[:80])
            case "number":
                return float(text[:80])
            case "flag":
                return {"true": True, "false": False}[text.lower()]
            case "controls" | "reference" | "loras":
                return _parsed(text)
    except (ValueError, KeyError, RecursionError):
        pass
    return text


def _control(fields: Mapping[str, Any]) -> ControlRequest:
    """A control, whose image is a file in base64."""
    given = _members("controls", "a control", fields, _OF_CONTROL)
    file = _base64_file("controls.image", given.pop("image", ""))
    return control_request(given.pop("name", ""), file, **given)


def _reference(fields: Mapping[str, Any]) -> ReferenceRequest:
    """A reference, whose image is a file in base64."""
    given = _members("reference", "a reference", fields, _OF_REFERENCE)
    return reference_request(_base64_file("reference.image", given.pop("image", "")), **given)


def _members(field: str, what: str, fields: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    """The members of an object that are not null; RequestError for one that is unknown or of the wrong type."""
    given = {}
    for name, value in fields.items():
        if name not in kinds:
            raise RequestError(f"{field}.{name[:80]}", value, f"{what} has {', '.join(kinds)}")
        if value is not None:
            if not _IS_OF_KIND[kinds[name]](value):
                raise RequestError(f"{field}.{name}", value, f"it must be {_A_KIND[kinds[name]]}")
            given[name] = value
    return given


def _base64_file(field: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise RequestError(field, "text", "it must be a file in base64") from None


def _lora(fields: Mapping[str, Any]) -> LoraRequest:
    return LoraRequest(**{"name": "", **_members("loras", "a LoRA", fields, _OF_LORA)})


def name_files(files: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """A form's files by the names that tasks give them; RequestError for a second file of a name."""
    named: dict[str, bytes] = {}
    for given, file in files:
        name = "image" if _IMAGES.fullmatch(given) else given
        if name in named:
            count = sum(1 for other, _ in files if other == given)
            raise RequestError(name, f"{count} files", "this server takes one")
        named[name] = file
    return named


def _check_what_is_fixed(given: Mapping[str, Any]) -> None:
    if given.get("response_format", "b64_json") != "b64_json":
        raise RequestError("response_format", given["response_format"], "images are sent as b64_json: this server keeps no files")
    if given.get("background", "auto") not in ("auto", "opaque"):
        raise RequestError("background", given["background"], "images are opaque: give auto or opaque")


def _check_inputs(spec: ModelSpec, files: Mapping[str, bytes]) -> None:
    taken = {name for task in tasks_of(spec) for name in task.inputs}
    for name, file in files.items():
        if name not in taken:
            raise RequestError(name, f"{len(file)} bytes", "no task of this model takes it")


def _steps(given: Mapping[str, Any]) -> int | None:
    names = [name for name in ("steps", "num_inference_steps") if name in given]
    if len({given[name] for name in names}) > 1:
        raise RequestError("num_inference_steps", given["num_inference_steps"], f"steps says {given['steps']}")
    return given[names[0]] if names else None


def _size(text: str) -> Size | None:
    if text == "auto":
        return None
    match = _SIZE.fullmatch(text)
    if not match:
        raise RequestError("size", text, "it must be WIDTHxHEIGHT or auto")
    return Size(int(match[1]), int(match[2]))


def _choice(given: Mapping[str, Any], name: str, allowed: tuple[Any, ...], default: str | None = None) -> Any:
    value = given.get(name, default or allowed[0])
    if value not in allowed:
        raise RequestError(name, value, f"it must be one of {', '.join(allowed)}")
    return value


def _quality(compression: int | None, image_format: ImageFormat) -> int | None:
    if compression is None:
        return None
    if not 0 <= compression <= 100:
        raise RequestError("output_compression", compression, "it must be between 0 and 100")
    return None if image_format == "png" else max(1, compression)  # of a PNG it says nothing: nothing is lost there


def _partial_images(count: int) -> int:
    if not 0 <= count <= MAX_PARTIAL_IMAGES:
        raise RequestError("partial_images", count, f"it must be between 0 and {MAX_PARTIAL_IMAGES}")
    return count
