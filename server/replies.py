"""The client's half of `flashdiff.v1`: what it sends, and what it makes of replies. It imports no server code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import SupportsFloat, SupportsIndex

from flashdiff import defaults
from flashdiff.components import Size
from flashdiff.errors import RequestError
from flashdiff.noise import SEED_LIMIT
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.server.names import ImageFormat, ModelIdentity, Priority
from flashdiff.server.wire import FORMAT_NUMBERS, FORMATS, PRIORITY_NUMBERS

_TIMINGS = {field.name.removesuffix("_ms"): field.name for field in pb.Timings.DESCRIPTOR.fields if field.name != "part_ms"}


@dataclass(frozen=True)
class Result:
    """A reply, as the client returns it. Times in milliseconds; the .proto file describes the fields."""

    images: tuple[bytes, ...] = field(repr=False)
    """Files in `format`; for "raw", RGB bytes [height, width, 3]."""
    seeds: tuple[int, ...]
    steps: int
    size: Size
    format: ImageFormat
    timings: dict[str, float]
    part_timings: dict[str, float]
    """Of the device calls, by the part of the model that they ran."""
    model: ModelIdentity
    denoise_batches: tuple[int, ...]


@dataclass(frozen=True)
class Preview:
    """A small picture of where image `image` is heading after `step` of `steps`, as the client returns it."""

    image: int
    step: int
    steps: int
    size: Size
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Estimate:
    """How long a request would take if it were sent now, waiting included, and how many images are pending."""

    expected_ms: float
    pending_images: int


@dataclass(frozen=True, kw_only=True)
class Control:
    """An image that steers the steps from `start` to `end`, shares of them, as the client sends it."""

    name: str
    """One of those that the model was built with."""
    image: bytes = field(repr=False)
    """A PNG, JPEG or WebP file."""
    scale: float = defaults.CONTROL_SCALE
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An image that goes with the prompt, as the client sends it."""

    image: bytes = field(repr=False)
    """A PNG, JPEG or WebP file."""
    scale: float = defaults.REFERENCE_SCALE


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA of the server's folder, for one request, as the client sends it."""

    name: str
    scale: float = defaults.LORA_SCALE


def write_request(
    prompt: str,
    *,
    model: str = "",
    negative_prompt: str = "",
    truncate_prompt: bool = False,
    seed: int | None = None,
    steps: int | None = None,
    size: Size | None = None,
    count: int = 1,
    image_format: ImageFormat = "png",
    quality: int | None = None,
    priority: Priority = "normal",
    image: bytes | None = None,
    strength: float | None = None,
    noise_level: float | None = None,
    upscale: float | None = None,
    inputs: Mapping[str, bytes] | None = None,
    parameters: Mapping[str, float] | None = None,
    controls: Sequence[Control] = (),
    reference: Reference | None = None,
    loras: Sequence[Lora] = (),
) -> pb.GenerateRequest:
    """The message; RequestError for a value that it cannot carry. The server checks what the model allows."""
    for name, value, least in (("seed", seed, 0), ("steps", steps, 1), ("count", count, 1), ("quality", quality, 1)):
        if value is not None and not isinstance(value, SupportsIndex):
            raise RequestError(name, value, "it must be a whole number")
        if value is not None and not least <= value < (SEED_LIMIT if name == "seed" else 2**32):
            raise RequestError(name, value, f"it must be a number from {least} on that the wire can carry")
    if image_format not in FORMAT_NUMBERS:
        raise RequestError("format", image_format, f"it must be one of {', '.join(FORMAT_NUMBERS)}")
    shares = {f"controls.{c.name}.{name}": getattr(c, name) for c in controls for name in ("scale", "start", "end")}
    scales = {f"loras.{lora.name}.scale": lora.scale for lora in loras}
    if reference:
        scales["reference.scale"] = reference.scale
    for name, number in {
        "strength": strength,
        "noise_level": noise_level,
        "upscale": upscale,
        **(parameters or {}),
        **shares,
        **scales,
    }.items():
        if number is not None:
            _check_number(name, number)
    of_controls = {f"controls.{control.name}.image": control.image for control in controls}
    if reference:
        of_controls["reference.image"] = reference.image
    if image is not None:
        of_controls["image"] = image
    for name, file in {**(inputs or {}), **of_controls}.items():
        if not isinstance(file, bytes):
            raise RequestError(name, file, "it must be the bytes of an image file")
    if image == b"":  # on the wire, no image
        raise RequestError("image", "0 bytes", "it must be the bytes of an image file")
    if strength is not None and not 0 < strength <= 1:
        raise RequestError("strength", strength, "it must be above 0 and at most 1")
    if priority not in PRIORITY_NUMBERS:
        raise RequestError("priority", priority, f"it must be one of {', '.join(PRIORITY_NUMBERS)}")
    width, height = (0, 0) if size is None else size
    if size is not None and not (0 < width < 2**32 and 0 < height < 2**32):
        raise RequestError("size", f"{width}x{height}", "it must be two sides from 1 on that the wire can carry")
    return pb.GenerateRequest(
        prompt=prompt,
        seed=seed,
        steps=steps or 0,
        width=width,
        height=height,
        count=count,
        format=FORMAT_NUMBERS[image_format],
        model=model,
        negative_prompt=negative_prompt,
        truncate_prompt=truncate_prompt,
        quality=quality or 0,
        priority=PRIORITY_NUMBERS[priority],
        image=image or b"",
        strength=strength or 0.0,
        noise_level=noise_level,
        upscale=upscale,
        inputs=inputs or {},
        parameters=parameters or {},
        controls=[pb.Control(**vars(control)) for control in controls],
        reference=pb.Reference(**vars(reference)) if reference else None,
        loras=[pb.Lora(**vars(lora)) for lora in loras],
    )


def _check_number(name: str, number: object) -> None:
    if not isinstance(number, SupportsFloat):
        raise RequestError(name, number, "it must be a number")
    try:
        float(number)
    except OverflowError:
        raise RequestError(name, number, "it must be a number that the wire can carry") from None


def read_response(response: pb.GenerateResponse) -> Result:
    """The reply as the client returns it."""
    times = response.timings
    return Result(
        images=tuple(image.data for image in response.images),
        seeds=tuple(image.seed for image in response.images),
        steps=response.steps,
        size=Size(response.width, response.height),
        format=FORMATS[response.format],
        timings={name: getattr(times, field) for name, field in _TIMINGS.items()},
        part_timings=dict(times.part_ms),
        model=ModelIdentity(*(getattr(response.model, field.name) for field in fields(ModelIdentity))),
        denoise_batches=tuple(response.denoise_batches),
    )


def read_models(response: pb.ListModelsResponse) -> list[str]:
    """The names of the models, the default first."""
    return [model.name for model in response.models]


def read_estimate(response: pb.EstimateResponse) -> Estimate:
    """The expected time in milliseconds, and the images that are pending."""
    return Estimate(response.expected_ms, response.pending_images)


def read_update(update: pb.GenerateUpdate) -> Preview | Result:
    """A preview, or the result that ends the stream."""
    if update.HasField("result"):
        return read_response(update.result)
    seen = update.preview
    return Preview(seen.image, seen.step, seen.steps, Size(seen.width, seen.height), seen.png)
