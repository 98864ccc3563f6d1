"""The one table from our errors to the statuses of gRPC and of HTTP."""

from typing import Any, NoReturn

import grpc

from flashdiff.errors import (
    AuthError,
    BackendError,
    BundleError,
    CancelledError,
    DeadlineError,
    DrainingError,
    ExistsError,
    FlashdiffError,
    NotFoundError,
    OutOfMemoryError,
    OverloadedError,
    RepositoryError,
    RequestError,
)
from flashdiff.server.tracing import note_error

_MAX_DETAILS = 500  # characters, which may quote the request: a client takes 16 kB of trailers, escaped, or none

CLIENT_LEFT = 499
"""The HTTP status in logs and metrics of a request whose client closed the connection; nginx uses it too."""

# The first matching row counts, so subclasses stand before their base classes.
_STATUSES: tuple[tuple[type[FlashdiffError], grpc.StatusCode, int], ...] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND, 404),
    (ExistsError, grpc.StatusCode.ALREADY_EXISTS, 409),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT, 400),
    (AuthError, grpc.StatusCode.UNAUTHENTICATED, 401),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    (CancelledError, grpc.StatusCode.CANCELLED, CLIENT_LEFT),
    (DrainingError, grpc.StatusCode.UNAVAILABLE, 503),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION, 409),
    (RepositoryError, grpc.StatusCode.UNAVAILABLE, 503),
    (OutOfMemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED, 503),
    (BackendError, grpc.StatusCode.INTERNAL, 500),
)


def code_of(error: FlashdiffError) -> grpc.StatusCode:
    """The gRPC status of an error; UNKNOWN would hide a missing row, so it is INTERNAL."""
    return next((code for kind, code, _ in _STATUSES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def http_status_of(error: FlashdiffError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, _, status in _STATUSES if isinstance(error, kind)), 500)


def retry_after_ms(error: FlashdiffError) -> int | None:
    """When to try again, where that is known."""
    if isinstance(error, OverloadedError) and error.retry_after_s is not None:
        return max(1, round(1000 * error.retry_after_s))
    return None


def _trailers_of(error: FlashdiffError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata: when to try again, under the name that gRPC's own retries look at."""
    wait_ms = retry_after_ms(error)
    return () if wait_ms is None else (("grpc-retry-pushback-ms", str(wait_ms)),)


async def abort(context: Any, error: FlashdiffError) -> NoReturn:
    """End the call with the status of the error."""
    note_error(error)
    await context.abort(code_of(error), str(error)[:_MAX_DETAILS], _trailers_of(error))
    raise error  # abort has raised already
