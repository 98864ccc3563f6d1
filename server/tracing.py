"""The trace span of the call that a task works on."""

from contextvars import ContextVar

from opentelemetry import trace

# Never reset: a stream that is left unread is closed in another context.
current_span: ContextVar[trace.Span] = ContextVar("span", default=trace.INVALID_SPAN)


def describe_call(**attributes: float | str) -> None:
    """Add attributes to the span of the call that runs; of several requests in a stream, those of the last stay."""
    current_span.get().set_attributes(attributes)
