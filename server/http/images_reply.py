"""Writes what OpenAI's images API answers: images, partial images, models. What OpenAI has no field for is under `flashdiff`."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashdiff.controls import controls_of
from flashdiff.lora_requests import slots_of
from flashdiff.noise import image_seed
from flashdiff.references import takes_reference
from flashdiff.server.jobs import Step
from flashdiff.server.models import Model
from flashdiff.server.names import ImageFormat
from flashdiff.server.requests import Reply
from flashdiff.tasks import tasks_of
from flashdiff.tasks.base import Parameter

_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}  # which the clients' types want; this server bills nothing


@dataclass(frozen=True)
class EventNames:
    """What the events of a stream are called."""

    partial: str
    completed: str


GENERATION = EventNames("image_generation.partial_image", "image_generation.completed")
EDIT = EventNames("image_edit.partial_image", "image_edit.completed")


def write_images(reply: Reply, created: int) -> bytes:
    """The response of a request that does not stream."""
    images = [
        {"b64_json": _base64(file), "flashdiff": {"seed": image_seed(reply.order.seed, index)}}
        for index, file in enumerate(reply.files)
    ]
    return json.dumps(
        {
            "created": created,
            "data": images,
            "background": "opaque",
            "output_format": reply.format,
            "size": str(reply.order.whole_size),
            "usage": _NO_USAGE,
            "flashdiff": _made_by(reply),
        }
    ).encode()


def write_completed(reply: Reply, index: int, created: int, names: EventNames) -> bytes:
    """The event of a finished image."""
    extras = {"image": index, "seed": image_seed(reply.order.seed, index), **_made_by(reply)}
    event = {
        **_image(reply.files[index], str(reply.order.whole_size), reply.format, created),
        "usage": _NO_USAGE,
        "flashdiff": extras,
    }
    return write_event(names.completed, event)


def write_partial(
    step: Step, number: int, file: bytes, size: str, image_format: ImageFormat, created: int, names: EventNames
) -> bytes:
    """The event of a preview: the `number`-th of its image, from 0."""
    extras = {"image": step.index, "step": step.step, "steps": step.total}
    event = {**_image(file, size, image_format, created), "partial_image_index": number, "flashdiff": extras}
    return write_event(names.partial, event)


def write_event(name: str, data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def partial_steps(steps: int, count: int) -> list[int]:
    """Which steps are shown by at most `count` previews: evenly spread, and not the last, after which the image itself comes."""
    return sorted({max(1, round(steps * (index + 1) / (count + 1))) for index in range(count)} - {steps})


def write_models(served: Mapping[str, Model], aliases: Mapping[str, str], created: int, loras: Sequence[str]) -> dict[str, Any]:
    """The names that requests may give, aliases last; `loras` are those of the server's folder."""
    named = {**served, **{alias: served[name] for alias, name in aliases.items() if name in served}}
    return {"object": "list", "data": [write_model(name, model, created, loras) for name, model in named.items()]}


def write_model(name: str, model: Model, created: int, loras: Sequence[str]) -> dict[str, Any]:
    """One model's entry; `created` is in seconds since 1970."""
    spec = model.components.spec
    slots = len(slots_of(spec))
    tasks = {
        task.name: {
            "inputs": list(task.inputs),
            "parameters": {p.name: {"default": p.default, **_least(p), "at_most": p.at_most} for p in task.parameters_of(spec)},
        }
        for task in tasks_of(spec)
    }
    extras = {
        **vars(model.identity),
        "sizes": [str(size) for size in spec.sizes],
        "default_steps": spec.sampler.default_steps,
        "max_steps": spec.sampler.max_steps,
        "takes_negative_prompt": spec.sampler.evaluations_per_step > 1,
        "tasks": tasks,
        "controls": list(controls_of(spec)),
        "takes_reference": takes_reference(spec),
        "loras": list(loras) if slots else [],
        "max_loras": slots,
    }
    return {"id": name, "object": "model", "created": created, "owned_by": "flashdiff", "flashdiff": extras}


def _least(parameter: Parameter) -> dict[str, Any]:
    """Where a parameter begins; of a whole one also that it is whole."""
    least = {"above": parameter.above} if parameter.at_least is None else {"at_least": parameter.at_least}
    return {**least, "is_whole": True} if parameter.is_whole else least


def _image(file: bytes, size: str, image_format: ImageFormat, created: int) -> dict[str, Any]:
    return {
        "b64_json": _base64(file),
        "background": "opaque",
        "created_at": created,
        "output_format": image_format,
        "quality": "auto",
        "size": size,
    }


def _made_by(reply: Reply) -> dict[str, Any]:
    timings = reply.timings
    stages = {"queue": timings.queue, **reply.stages_ms, "image_encoding": reply.encoding_ms}
    return {
        "model": reply.model.identity.name,
        "bundle_hash": reply.model.identity.bundle_hash,
        "steps": reply.order.steps,
        "timings_ms": {name: round(spent, 3) for name, spent in {**stages, "total": timings.total + reply.encoding_ms}.items()},
    }


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode("ascii")
