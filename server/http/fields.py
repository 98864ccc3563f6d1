"""Reads the headers that several routes share."""

import time

from starlette.requests import Request

from flashdiff.errors import RequestError
from flashdiff.server.http.errors import HttpError
from flashdiff.server.http.front import exchange_of

_TIMEOUT = "x-request-timeout-ms"


def check_content_type(request: Request, wanted: str) -> None:
    """HttpError for a body of another type."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != wanted:
        raise HttpError(415, f"content-type: {given[:80]!r} is not taken here; send {wanted}")


def remaining_s(request: Request) -> float | None:
    """Seconds until the client's deadline, None without one; RequestError for a header that is not a time."""
    given = request.headers.get(_TIMEOUT)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:12]) <= 1e9:
        raise RequestError(_TIMEOUT, given, "it must be a whole number of milliseconds, at least 1")
    return int(given) / 1000 - (time.monotonic() - exchange_of(request).arrived)
