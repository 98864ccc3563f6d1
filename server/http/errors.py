"""How HTTP says that a request failed: OpenAI's form, and KServe's below /v2."""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from flashdiff.errors import AuthError, DeadlineError, FlashdiffError, NotFoundError, RequestError
from flashdiff.server.status import http_status_of, retry_after_ms

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 504: "deadline_exceeded"}
_MAX_MESSAGE = 500  # characters, which may quote the request


class HttpError(FlashdiffError):
    """A request that HTTP itself does not take, with its status: a body too large, a wrong type, a foreign origin."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


def status_of(error: FlashdiffError) -> int:
    """The HTTP status of an error."""
    return error.status if isinstance(error, HttpError) else http_status_of(error)


def error_body(path: str, error: FlashdiffError) -> dict[str, Any]:
    """What the client of a path reads of an error."""
    status, message = status_of(error), str(error)[:_MAX_MESSAGE]
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": message}
    code = "model_not_found" if isinstance(error, NotFoundError) else _CODES.get(status)
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": error.field if isinstance(error, RequestError) else None,
            "code": code,
        }
    }


def error_response(path: str, error: FlashdiffError) -> Response:
    """The whole response: body, status, and when to try again."""
    return JSONResponse(error_body(path, error), status_of(error), _headers(error))


def _headers(error: FlashdiffError) -> dict[str, str]:
    if isinstance(error, HttpError):
        return error.headers
    if isinstance(error, AuthError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, DeadlineError):
        return {"x-should-retry": "false"}  # OpenAI's clients would send it again, though its time is over
    wait_ms = retry_after_ms(error)
    return {} if wait_ms is None else {"retry-after-ms": str(wait_ms), "retry-after": str(math.ceil(wait_ms / 1000))}
