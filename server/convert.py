"""The server's half of `flashdiff.v1`: its messages to requests, replies to its messages."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size
from flashdiff.controls import ControlRequest, controls_of
from flashdiff.errors import RequestError
from flashdiff.lora_requests import LoraRequest, slots_of
from flashdiff.noise import image_seed
from flashdiff.parts import NOISE_LEVEL
from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.references import ReferenceRequest, takes_reference
from flashdiff.server.images import control_request, reference_request
from flashdiff.server.jobs import Step
from flashdiff.server.models import Model
from flashdiff.server.reply_size import MAX_MESSAGE_BYTES, MESSAGE_EXTRA_BYTES, ReplyLimit
from flashdiff.server.requests import Estimate, ImageRequest, Reply
from flashdiff.server.submitter import DeviceState
from flashdiff.server.wire import FORMAT_NUMBERS, FORMATS, PRIORITIES
from flashdiff.tasks import tasks_of

_Value = TypeVar("_Value")


def read_request(
    message: pb.GenerateRequest, timeout_s: float | None = None, *, stated_limit: int | None = None, wants_steps: bool = False
) -> ImageRequest:
    """The request; RequestError for a field without a meaning, or for a value given twice."""
    if message.format not in FORMATS:
        raise RequestError("format", int(message.format), f"it must be one of {', '.join(pb.ImageFormat.keys())}")
    if message.priority not in PRIORITIES:
        raise RequestError("priority", int(message.priority), f"it must be one of {', '.join(pb.Priority.keys())}")
    image_format = FORMATS[message.format]
    if message.quality and (image_format not in ("jpeg", "webp") or message.quality > 100):
        raise RequestError("quality", message.quality, "it must be 1 to 100, for JPEG or WebP, or 0")
    files, parameters = dict(message.inputs), dict(message.parameters)
    if message.image:
        _add(files, "image", message.image)
    if message.strength:
        _add(parameters, "strength", message.strength)
    if message.HasField("noise_level"):
        _add(parameters, NOISE_LEVEL, message.noise_level)
    if message.HasField("upscale"):
        _add(parameters, "upscale", message.upscale)
    return ImageRequest(
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        truncate_prompt=message.truncate_prompt,
        seed=message.seed if message.HasField("seed") else None,
        steps=message.steps or None,
        size=Size(message.width, message.height) if message.width or message.height else None,
        count=message.count or 1,
        files=files,
        parameters=parameters,
        controls=[_read_control(control) for control in message.controls],
        reference=_read_reference(message.reference) if message.HasField("reference") else None,
        loras=[_read_lora(lora) for lora in message.loras],
        format=image_format,
        quality=message.quality or None,
        priority=PRIORITIES[message.priority],
        timeout_s=timeout_s,
        wants_steps=wants_steps,
        limit=ReplyLimit(
            max_bytes=stated_limit or MAX_MESSAGE_BYTES,
            formats=(image_format,),
            in_parts=wants_steps and stated_limit is not None,
        ),
    )


def _read_control(control: pb.Control) -> ControlRequest:
    scale, end = (getattr(control, name) if control.HasField(name) else None for name in ("scale", "end"))
    return control_request(control.name, control.image, scale=scale, start=control.start, end=end)


def _read_reference(reference: pb.Reference) -> ReferenceRequest:
    return reference_request(reference.image, scale=reference.scale if reference.HasField("scale") else None)


def _read_lora(lora: pb.Lora) -> LoraRequest:
    return LoraRequest(name=lora.name, scale=lora.scale if lora.HasField("scale") else defaults.LORA_SCALE)


def _add(given: dict[str, _Value], name: str, value: _Value) -> None:
    """Take the value of a field that has a name in the map as well; RequestError when both are given."""
    if name in given:
        raise RequestError(name, value, "it is given twice, by its own field and by name")
    given[name] = value


def write_response(reply: Reply) -> pb.GenerateResponse:
    """The message of a reply, with times in milliseconds."""
    order, timings = reply.order, reply.timings
    return pb.GenerateResponse(
        images=[pb.Image(data=data, seed=image_seed(order.seed, index)) for index, data in enumerate(reply.files)],
        steps=order.steps,
        width=order.whole_size.width,
        height=order.whole_size.height,
        format=FORMAT_NUMBERS[reply.format],
        timings=pb.Timings(
            queue_ms=timings.queue,
            image_encoding_ms=reply.encoding_ms,
            total_ms=timings.total + reply.encoding_ms,
            part_ms=timings.parts,
            **{f"{stage}_ms": spent_ms for stage, spent_ms in reply.stages_ms.items()},
        ),
        model=pb.Model(**vars(reply.model.identity)),
        denoise_batches=reply.batches,
    )


def write_preview(step: Step, png: bytes) -> pb.GenerateUpdate:
    """The message of a step and the PNG of its picture [H, W, 3]."""
    height, width, _ = step.picture.shape
    preview = pb.Preview(image=step.index, step=step.step, steps=step.total, width=width, height=height, png=png)
    return pb.GenerateUpdate(preview=preview)


def write_result(response: pb.GenerateResponse, stated_limit: int | None = None) -> Iterator[pb.GenerateUpdate]:
    """The last message or, for a client that states a limit, as many as it takes: each has some images, and all else."""
    if stated_limit is None:
        yield pb.GenerateUpdate(result=response)
        return
    images = list(response.images)
    del response.images[:]
    while images:
        part, room = pb.GenerateResponse(), stated_limit - MESSAGE_EXTRA_BYTES
        part.CopyFrom(response)
        while images and (not part.images or len(images[0].data) <= room):
            room -= len(images[0].data)
            part.images.append(images.pop(0))
        yield pb.GenerateUpdate(result=part)


def write_models(served: dict[str, Model], devices: Sequence[DeviceState], loras: Sequence[str]) -> pb.ListModelsResponse:
    """The message of all served models, the state of the devices that serve them, and the names of the server's LoRAs."""
    return pb.ListModelsResponse(models=[_served(name, model, devices, loras) for name, model in served.items()])


def _served(name: str, model: Model, devices: Sequence[DeviceState], loras: Sequence[str]) -> pb.ServedModel:
    spec = model.components.spec
    slots = len(slots_of(spec))
    return pb.ServedModel(
        name=name,
        model=pb.Model(**vars(model.identity)),
        sizes=[pb.Size(width=size.width, height=size.height) for size in spec.sizes],
        default_steps=spec.sampler.default_steps,
        max_steps=spec.sampler.max_steps,
        max_prompt_tokens=spec.prompt_tokens,
        takes_negative_prompt=spec.sampler.evaluations_per_step > 1,
        tasks=[task.name for task in tasks_of(spec)],
        controls=controls_of(spec),
        takes_reference=takes_reference(spec),
        loras=loras if slots else (),
        max_loras=slots,
        max_noise_level=_max_noise_level(spec),
        devices=[pb.Device(name=device.name, failure=device.failure) for device in devices],
    )


def _max_noise_level(spec: ModelSpec) -> int | None:
    """None for a model that takes no noise level."""
    numbers = {parameter.name: parameter for task in tasks_of(spec) for parameter in task.parameters_of(spec)}
    return int(numbers[NOISE_LEVEL].at_most) if NOISE_LEVEL in numbers else None


def write_estimate(estimate: Estimate) -> pb.EstimateResponse:
    """The message of an estimate, in milliseconds and images."""
    return pb.EstimateResponse(expected_ms=estimate.expected_ms, pending_images=estimate.pending_images)
