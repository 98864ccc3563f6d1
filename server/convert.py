"""Between the wire of `flashdiff.v1` and our records. Only this file and `triton*.py` turn messages into records and back."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import RequestError
from flashdiff.generate import Order, check_order
from flashdiff.noise import SEED_LIMIT, image_seed
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.server.images import ImageFormat, start_from_file
from flashdiff.server.models import Model, ModelIdentity
from flashdiff.server.scheduler import Priority
from flashdiff.server.worker import Step, Timings

_FORMATS: dict[int, ImageFormat] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "png",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_JPEG: "jpeg",
    pb.IMAGE_FORMAT_WEBP: "webp",
    pb.IMAGE_FORMAT_RAW_RGB: "raw",
}
_NUMBERS: dict[ImageFormat, pb.ImageFormat] = {
    "png": pb.IMAGE_FORMAT_PNG,
    "jpeg": pb.IMAGE_FORMAT_JPEG,
    "webp": pb.IMAGE_FORMAT_WEBP,
    "raw": pb.IMAGE_FORMAT_RAW_RGB,
}
_TIMINGS = {field.name.removesuffix("_ms"): field.name for field in pb.Timings.DESCRIPTOR.fields}
_PRIORITIES: dict[int, Priority] = {pb.PRIORITY_NORMAL: "normal", pb.PRIORITY_HIGH: "high", pb.PRIORITY_LOW: "low"}


@dataclass(frozen=True)
class Wish:
    """What a request says beside its order."""

    format: ImageFormat
    quality: int | None
    priority: Priority


@dataclass(frozen=True)
class Result:
    """A reply, as the client hands it out. Times in milliseconds, see the .proto file."""

    images: tuple[bytes, ...]
    seeds: tuple[int, ...]
    steps: int
    size: Size
    format: ImageFormat
    timings: dict[str, float]
    model: ModelIdentity
    denoise_batches: tuple[int, ...]


@dataclass(frozen=True)
class Preview:
    """A small picture of where image `image` is heading after `step` of `steps`, as the client hands it out."""

    image: int
    step: int
    steps: int
    size: Size
    png: bytes


@dataclass(frozen=True)
class Estimate:
    """How long a request would take if it were sent now, waiting included, and how many images wait or are made."""

    expected_ms: float
    pending_images: int


def read_request(request: pb.GenerateRequest, spec: ModelSpec) -> tuple[Order, Wish]:
    """The order and how it is wanted; RequestError names the field that is wrong. Where there is an image it takes a while."""
    if request.format not in _FORMATS:
        raise RequestError("format", int(request.format), f"it must be one of {', '.join(pb.ImageFormat.keys())}")
    if request.priority not in _PRIORITIES:
        raise RequestError("priority", int(request.priority), f"it must be one of {', '.join(pb.Priority.keys())}")
    image_format = _FORMATS[request.format]
    if request.quality and (image_format not in ("jpeg", "webp") or request.quality > 100):
        raise RequestError("quality", request.quality, "it must be 1 to 100, for JPEG or WebP, or 0")
    has_size = request.width or request.height
    order = check_order(
        spec,
        prompt=request.prompt,
        seed=request.seed if request.HasField("seed") else secrets.randbits(32),
        steps=request.steps or None,
        size=Size(request.width, request.height) if has_size else None,
        count=request.count or 1,
        negative_prompt=request.negative_prompt,
    )
    order = start_from_file(order, request.image or None, request.strength or None)
    return order, Wish(image_format, request.quality or None, _PRIORITIES[request.priority])


def write_response(
    order: Order,
    wish: Wish,
    images: Sequence[bytes],
    timings: Timings,
    encoding_ms: float,
    batches: Sequence[int],
    model: ModelIdentity,
) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        images=[pb.Image(data=data, seed=image_seed(order.seed, index)) for index, data in enumerate(images)],
        steps=order.steps,
        width=order.size.width,
        height=order.size.height,
        format=_NUMBERS[wish.format],
        timings=pb.Timings(
            queue_ms=timings.queue,
            text_ms=timings.text,
            denoise_ms=timings.denoise,
            input_image_ms=timings.input_image,
            decode_ms=timings.decode,
            image_encoding_ms=encoding_ms,
            total_ms=timings.total + encoding_ms,
        ),
        model=pb.Model(**vars(model)),
        denoise_batches=batches,
    )


def write_preview(step: Step, png: bytes) -> pb.GenerateUpdate:
    height, width, _ = step.picture.shape
    preview = pb.Preview(image=step.index, step=step.step, steps=step.total, width=width, height=height, png=png)
    return pb.GenerateUpdate(preview=preview)


def write_result(response: pb.GenerateResponse) -> pb.GenerateUpdate:
    return pb.GenerateUpdate(result=response)


def write_models(served: dict[str, Model]) -> pb.ListModelsResponse:
    return pb.ListModelsResponse(models=[_served(name, model) for name, model in served.items()])


def _served(name: str, model: Model) -> pb.ServedModel:
    spec = model.components.spec
    return pb.ServedModel(
        name=name,
        model=pb.Model(**vars(model.identity)),
        sizes=[pb.Size(width=size.width, height=size.height) for size in spec.sizes],
        default_steps=spec.sampler.default_steps,
        max_steps=spec.sampler.max_steps,
        max_prompt_tokens=spec.prompt_tokens,
        takes_negative_prompt=spec.sampler.evaluations_per_step > 1,
    )


def write_estimate(expected_ms: float, pending_images: int) -> pb.EstimateResponse:
    return pb.EstimateResponse(expected_ms=expected_ms, pending_images=pending_images)


# --- the client's side -----------------------------------------------------------------------------------------------


def write_request(
    prompt: str,
    *,
    model: str = "",
    negative_prompt: str = "",
    seed: int | None = None,
    steps: int | None = None,
    size: Size | None = None,
    count: int = 1,
    image_format: ImageFormat = "png",
    quality: int | None = None,
    priority: Priority = "normal",
    image: bytes = b"",
    strength: float | None = None,
) -> pb.GenerateRequest:
    """The message; RequestError for a value that it cannot carry. What the model allows is the server's to say."""
    for field, value, least in (("seed", seed, 0), ("steps", steps, 1), ("count", count, 1), ("quality", quality, 1)):
        if value is not None and not least <= value < (SEED_LIMIT if field == "seed" else 2**32):
            raise RequestError(field, value, f"it must be a number from {least} on that the wire can carry")
    if image_format not in _NUMBERS:
        raise RequestError("format", image_format, f"it must be one of {', '.join(_NUMBERS)}")
    if strength is not None and not 0 < strength <= 1:
        raise RequestError("strength", strength, "it must be above 0 and at most 1")
    priorities = {name: number for number, name in _PRIORITIES.items()}
    if priority not in priorities:
        raise RequestError("priority", priority, f"it must be one of {', '.join(priorities)}")
    width, height = size or (0, 0)
    return pb.GenerateRequest(
        prompt=prompt,
        seed=seed,
        steps=steps or 0,
        width=width,
        height=height,
        count=count,
        format=_NUMBERS[image_format],
        model=model,
        negative_prompt=negative_prompt,
        quality=quality or 0,
        priority=pb.Priority.Name(priorities[priority]),
        image=image,
        strength=strength or 0.0,
    )


def read_response(response: pb.GenerateResponse) -> Result:
    times = response.timings
    return Result(
        images=tuple(image.data for image in response.images),
        seeds=tuple(image.seed for image in response.images),
        steps=response.steps,
        size=Size(response.width, response.height),
        format=_FORMATS[response.format],
        timings={name: getattr(times, field) for name, field in _TIMINGS.items()},
        model=ModelIdentity(*(getattr(response.model, field.name) for field in fields(ModelIdentity))),
        denoise_batches=tuple(response.denoise_batches),
    )


def read_models(response: pb.ListModelsResponse) -> list[str]:
    return [model.name for model in response.models]


def read_estimate(response: pb.EstimateResponse) -> Estimate:
    return Estimate(response.expected_ms, response.pending_images)


def read_update(update: pb.GenerateUpdate) -> Preview | Result:
    if update.HasField("result"):
        return read_response(update.result)
    seen = update.preview
    return Preview(seen.image, seen.step, seen.steps, Size(seen.width, seen.height), seen.png)
