"""Between the wire and our records. Only this file knows protobuf messages."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import RequestError
from flashdiff.generate import Order, check_order
from flashdiff.noise import SEED_LIMIT, image_seed
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.server.images import ImageFormat
from flashdiff.server.worker import Timings

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


@dataclass(frozen=True)
class ModelIdentity:
    """What a reply says about the model that made it."""

    name: str
    bundle_hash: str
    family: str
    backend: str
    precision: str


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


def read_request(request: pb.GenerateRequest, spec: ModelSpec) -> tuple[Order, ImageFormat]:
    """The order and the wanted format; RequestError names the field that is wrong."""
    if request.format not in _FORMATS:
        raise RequestError("format", int(request.format), f"it must be one of {', '.join(pb.ImageFormat.keys())}")
    has_size = request.width or request.height
    order = check_order(
        spec,
        prompt=request.prompt,
        seed=request.seed if request.HasField("seed") else secrets.randbits(32),
        steps=request.steps or None,
        size=Size(request.width, request.height) if has_size else None,
        count=request.count or 1,
    )
    return order, _FORMATS[request.format]


def write_response(
    order: Order, images: Sequence[bytes], image_format: ImageFormat, timings: Timings, encoding_ms: float, model: ModelIdentity
) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        images=[pb.Image(data=data, seed=image_seed(order.seed, index)) for index, data in enumerate(images)],
        steps=order.steps,
        width=order.size.width,
        height=order.size.height,
        format=_NUMBERS[image_format],
        timings=pb.Timings(
            queue_ms=timings.queue,
            text_ms=timings.text,
            denoise_ms=timings.denoise,
            decode_ms=timings.decode,
            image_encoding_ms=encoding_ms,
            total_ms=timings.total + encoding_ms,
        ),
        model=pb.Model(**vars(model)),
    )


def write_request(
    prompt: str, *, seed: int | None, steps: int | None, size: Size | None, count: int, image_format: ImageFormat
) -> pb.GenerateRequest:
    """The message; RequestError for a value that it cannot carry. What the model allows is the server's to say."""
    for field, value, least in (("seed", seed, 0), ("steps", steps, 1), ("count", count, 1)):
        if value is not None and not least <= value < (SEED_LIMIT if field == "seed" else 2**32):
            raise RequestError(field, value, f"it must be a number from {least} on that the wire can carry")
    if image_format not in _NUMBERS:
        raise RequestError("format", image_format, f"it must be one of {', '.join(_NUMBERS)}")
    width, height = size or (0, 0)
    return pb.GenerateRequest(
        prompt=prompt, seed=seed, steps=steps or 0, width=width, height=height, count=count, format=_NUMBERS[image_format]
    )


def read_response(response: pb.GenerateResponse) -> Result:
    times = response.timings
    return Result(
        images=tuple(image.data for image in response.images),
        seeds=tuple(image.seed for image in response.images),
        steps=response.steps,
        size=Size(response.width, response.height),
        format=_FORMATS[response.format],
        timings={field.name.removesuffix("_ms"): getattr(times, field.name) for field in times.DESCRIPTOR.fields},
        model=ModelIdentity(**{field.name: getattr(response.model, field.name) for field in response.model.DESCRIPTOR.fields}),
    )
