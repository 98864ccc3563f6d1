"""What is noted of the call that a task works on: in its trace span, and in its log line."""

import re
from contextvars import ContextVar
from dataclasses import dataclass

from opentelemetry import trace

from flashdiff.errors import FlashdiffError


@dataclass
class Noted:
    """For the log line; nothing of it names a prompt."""

    model: str = ""
    reason: str = ""
    """Why there are no images: the kind of error."""
    device: str = ""
    """The devices that have served its requests, where devices have names."""


_FIELD = re.compile(r"[\w.\[\]-]{1,64}")

# Never reset: a stream that is left unread is closed in another context.
current_span: ContextVar[trace.Span] = ContextVar("span", default=trace.INVALID_SPAN)
current_call: ContextVar[Noted | None] = ContextVar("call", default=None)


def note_device(device: str) -> None:
    """Add a device to the span and the log line of the present call."""
    describe_call(device=device)
    if (noted := current_call.get()) and device not in (devices := noted.device.split("+")):
        noted.device = "+".join([*filter(None, devices), device])


def describe_call(**attributes: float | str) -> None:
    """Add attributes to the span of the call that runs; of several requests in a stream, those of the last stay."""
    current_span.get().set_attributes(attributes)


def note_model(name: str) -> None:
    """Name the model in the log line of the present call."""
    if noted := current_call.get():
        noted.model = name


def note_error(error: FlashdiffError) -> None:
    """The kind of error and, of a request's error, the field; its message may quote a prompt."""
    if noted := current_call.get():
        kind = type(error).__name__.removesuffix("Error").lower()
        field = getattr(error, "field", None) or ""  # which the client may have made up
        noted.reason = f"{kind}:{field}" if _FIELD.fullmatch(field) else kind
