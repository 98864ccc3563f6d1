"""What calls of all protocols share: authentication, the places for calls at once, and a trace span, a count and a log line each.

Span, count and line name no prompt.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from opentelemetry import propagate, trace

from flashdiff.server.auth import Tokens
from flashdiff.server.caps import Caps, Place
from flashdiff.server.json_log import FIELDS
from flashdiff.server.tracing import Noted, current_call, current_span

_MOST, _MOST_OF_ONE = 2000, 1500  # at once: far more than the queue takes, far less than would hurt
_MOST_HEALTH, _MOST_HEALTH_OF_ONE = 200, 100  # kept for health checks
_REQUEST_ID = re.compile(r"[\w.-]{1,64}")

_log = logging.getLogger(__name__)
_tracer = trace.get_tracer("flashdiff.server")


@dataclass
class Call:
    """A call while it runs, and how it ended."""

    method: str
    request_id: str
    client: str
    """The name of its token, else the address it comes from."""
    code: str
    """The status it ended with, in its protocol's terms."""
    has_failed: bool = False

    def fail(self, code: str) -> None:
        """Record the status of a call that failed, in its protocol's terms."""
        self.code, self.has_failed = code, True


class Calls:
    """With `tokens`, only a caller with one is admitted. `count` gets every call's method and status."""

    def __init__(self, tokens: Tokens | None = None, count: Callable[[str, str], None] = lambda method, code: None) -> None:
        self._tokens, self._count = tokens, count
        self._caps, self._health_caps = Caps(_MOST, _MOST_OF_ONE), Caps(_MOST_HEALTH, _MOST_HEALTH_OF_ONE)

    def admit(self, authorization: str) -> str:
        """The caller's name, empty without tokens; AuthError or OverloadedError for a caller that is not admitted."""
        return self._tokens.admit(authorization) if self._tokens else ""

    def placed(self, client: str, *, is_health: bool = False) -> AbstractContextManager[Place]:
        """A place for the current task's call; see `Caps.entered`. Health checks have places of their own."""
        return (self._health_caps if is_health else self._caps).entered(client)

    def refused(self, method: str, code: str) -> None:
        """Log and count a call that ended before it could be watched."""
        _log.info("call method=%s code=%s", method, code, extra={FIELDS: {"method": method, "code": code}})
        self._count(method, code)

    @contextmanager
    def watch(self, method: str, client: str, headers: Mapping[str, str], code: str) -> Iterator[Call]:
        """Trace, count and log what runs inside; the call ends with `code` unless its `code` is set or it fails."""
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        call = Call(method, request_id, client, code)
        started = time.perf_counter()
        span = _tracer.start_span(
            method.lstrip("/"), propagate.extract(headers), trace.SpanKind.SERVER, {"request_id": request_id}
        )
        current_span.set(span)
        noted = Noted()
        current_call.set(noted)
        try:
            yield call
        finally:
            if call.has_failed:
                span.set_status(trace.StatusCode.ERROR, call.code)  # and not the error itself, which may quote a prompt
            if call.method != method:
                span.update_name(call.method.lstrip("/"))
            span.end()
            self._count(call.method, call.code)
            spent_ms = 1000 * (time.perf_counter() - started)
            line = {"method": call.method, "id": request_id, "client": call.client, "code": call.code, "ms": round(spent_ms, 1)}
            line |= {name: value for name, value in vars(noted).items() if value}
            _log.info("call %s", " ".join(f"{name}={value}" for name, value in line.items()), extra={FIELDS: line})
