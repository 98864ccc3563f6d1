"""The trace span of the call that a task works on, and the devices that served it."""

from contextvars import ContextVar

from opentelemetry import trace

# Never reset: a stream that is left unread is closed in another context.
current_span: ContextVar[trace.Span] = ContextVar("span", default=trace.INVALID_SPAN)


current_devices: ContextVar[list[str]] = ContextVar("devices")
"""The names of the devices that have served the call's requests."""


def note_device(device: str) -> None:
    """Add a device to the call that runs, for its span and its log line."""
    describe_call(device=device)
    if (devices := current_devices.get(None)) is not None and device not in devices:
        devices.append(device)


def describe_call(**attributes: float | str) -> None:
    """Add attributes to the span of the call that runs; of several requests in a stream, those of the last stay."""
    current_span.get().set_attributes(attributes)
