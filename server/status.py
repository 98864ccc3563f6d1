"""The one table from our errors to gRPC status codes."""

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
    OverloadedError,
    RequestError,
)

_MAX_DETAILS = 500  # characters, which may quote the request: a client takes 16 kB of trailers, escaped, or none

# The first row that fits counts: kinds stand before what they are kinds of.
_CODES: tuple[tuple[type[FlashdiffError], grpc.StatusCode], ...] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (ExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (AuthError, grpc.StatusCode.UNAUTHENTICATED),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (CancelledError, grpc.StatusCode.CANCELLED),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),
    (BackendError, grpc.StatusCode.INTERNAL),
)


def code_of(error: FlashdiffError) -> grpc.StatusCode:
    """The status of an error; UNKNOWN would hide a missing row, so it is INTERNAL."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def _trailers_of(error: FlashdiffError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata: when to try again, under the name that gRPC's own retries look at."""
    if isinstance(error, OverloadedError) and error.retry_after_s is not None:
        return (("grpc-retry-pushback-ms", str(max(1, round(1000 * error.retry_after_s)))),)
    return ()


async def abort(context: Any, error: FlashdiffError) -> NoReturn:
    """End the call with the status of the error."""
    await context.abort(code_of(error), str(error)[:_MAX_DETAILS], _trailers_of(error))
    raise error  # abort has raised already
