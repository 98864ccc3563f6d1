"""`/openapi.json`: the routes as they are, and the fields of the images API as they are read."""

from collections.abc import Iterable
from typing import Any

from starlette.routing import Route

import flashdiff
from flashdiff import controls, defaults, references
from flashdiff.server.http.images_request import MAX_PARTIAL_IMAGES, field_kinds
from flashdiff.tasks import MAX_COUNT, input_names, parameters
from flashdiff.tasks.base import Parameter

_SCHEMAS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "boolean"},
    "controls": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "image": {"type": "string", "format": "byte"},
                "scale": {"type": "number", "minimum": 0, "maximum": controls.MAX_SCALE},
                "start": {"type": "number", "minimum": 0, "maximum": 1},
                "end": {"type": "number", "minimum": 0, "maximum": 1},
            },
            "required": ["name", "image"],
            "additionalProperties": False,
        },
    },
    "reference": {
        "type": "object",
        "properties": {
            "image": {"type": "string", "format": "byte"},
            "scale": {"type": "number", "minimum": 0, "maximum": references.MAX_SCALE},
        },
        "required": ["image"],
        "additionalProperties": False,
    },
    "loras": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "scale": {"type": "number", "minimum": -defaults.MAX_LORA_SCALE, "maximum": defaults.MAX_LORA_SCALE},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}
_BOUNDS: dict[str, dict[str, Any]] = {
    "n": {"minimum": 1, "maximum": MAX_COUNT},
    "partial_images": {"minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
    "output_compression": {"minimum": 0, "maximum": 100},
    "response_format": {"enum": ["b64_json"]},
    "background": {"enum": ["auto", "opaque"]},
    "output_format": {"enum": ["png", "jpeg", "webp"]},
    "priority": {"enum": ["high", "normal", "low"]},
}


def describe_routes(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI document of the routes; the first line of a route's function is its summary."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(route.path_format, {})[method.lower()] = _operation(route)
    return {"openapi": "3.1.0", "info": {"title": "flashdiff", "version": flashdiff.__version__}, "paths": paths}


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0],
        "responses": {"200": {"description": "see docs/http.md"}},
    }
    if route.param_convertors:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.param_convertors
        ]
    if route.path in _BODIES:
        content_type, files = _BODIES[route.path]
        operation["requestBody"] = {"required": True, "content": {content_type: {"schema": _fields(files)}}}
    return operation


_BODIES: dict[str, tuple[str, list[str]]] = {
    "/v1/images/generations": ("application/json", []),
    "/v1/images/edits": ("multipart/form-data", input_names()),
}


def _fields(files: list[str]) -> dict[str, Any]:
    bounds = {**_BOUNDS, **{name: _bounds_of(parameter) for name, parameter in parameters().items()}}
    fields = {name: {**_SCHEMAS[kind], **bounds.get(name, {})} for name, kind in field_kinds().items()}
    binary = {name: {"type": "string", "format": "binary"} for name in files}
    required = ["prompt", *(["image"] if files else [])]
    return {"type": "object", "properties": {**fields, **binary}, "required": required, "additionalProperties": False}


def _bounds_of(parameter: Parameter) -> dict[str, Any]:
    least = {"exclusiveMinimum": parameter.above} if parameter.at_least is None else {"minimum": parameter.at_least}
    return {**least, "maximum": parameter.at_most, **({"type": "integer"} if parameter.is_whole else {})}
