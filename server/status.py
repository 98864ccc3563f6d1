"""The one table from our errors to gRPC status codes."""

import grpc

from flashdiff.errors import (
    BackendError,
    CancelledError,
    DeadlineError,
    DrainingError,
    FlashdiffError,
    OverloadedError,
    RequestError,
)

_CODES: tuple[tuple[type[FlashdiffError], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (CancelledError, grpc.StatusCode.CANCELLED),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (BackendError, grpc.StatusCode.INTERNAL),
)


def code_of(error: FlashdiffError) -> grpc.StatusCode:
    """The status of an error; UNKNOWN would hide a missing row, so it is INTERNAL."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
