"""What can go wrong, as one tree.

FlashdiffError
  ConfigError          a recipe or an option that makes no sense
  ModelError           no such base model, or not what its family needs
  LoraError            a LoRA that does not fit its base
  BundleError          a bundle that is damaged, of another version, or cannot be made
  BackendError         an engine library that is missing or refused its work
    OutOfMemoryError   or has too little memory for it now
  TrainingError        a training run that cannot continue
    NotFiniteError     an update whose loss or gradient is not finite
  EvaluationError      images, prompts or a reference set that cannot be measured
  RepositoryError      a model repository that cannot be read
  RequestError         a request that asks for what this model cannot do
    NotFoundError      or names a model, or a region of memory, that is not there
    ExistsError        or makes one that is
  AuthError            a call without a token that this server knows
  RefusedError         a sound request that is not served
    OverloadedError    the queue is full
    DeadlineError      it cannot be on time
    CancelledError     its client left
    DrainingError      the server is shutting down

The command line prints the message in one line and exits with 2; `flashdiff.server.status` maps the classes to gRPC codes.
"""

from importlib.metadata import version
from pathlib import Path


class FlashdiffError(Exception):
    """An error that a user can cause or fix; the message says what was wrong, the value, and what to do instead."""


class ConfigError(FlashdiffError): ...


class ModelError(FlashdiffError): ...


class LoraError(FlashdiffError): ...


class BundleError(FlashdiffError): ...


class BackendError(FlashdiffError): ...


class OutOfMemoryError(BackendError): ...


class TrainingError(FlashdiffError): ...


class NotFiniteError(TrainingError): ...


class EvaluationError(FlashdiffError): ...


class RepositoryError(FlashdiffError): ...


class RequestError(FlashdiffError):
    """A request that the model cannot fill; most say which field is outside what the model allows."""

    field: str | None = None
    allowed: str = ""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.allowed = field, allowed
        shown = repr(value[:80] if isinstance(value, str | bytes) else value)  # which may be megabytes
        super().__init__(f"{field}: {shown if len(shown) <= 80 else shown[:77] + '...'} is not allowed; {allowed}")


class TensorError(RequestError):
    """A tensor of a Triton request has the wrong name, type, shape or bytes."""

    def __init__(self, message: str) -> None:
        FlashdiffError.__init__(self, message)


class NotFoundError(RequestError): ...


class ExistsError(RequestError): ...


class AuthError(FlashdiffError): ...


class RefusedError(FlashdiffError): ...


class OverloadedError(RefusedError):
    """There is no room; `retry_after_s` is when some is expected, where that is known."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RefusedError):
    """It cannot be on time; `promised_s` is within which time it could be promised, where that is the reason."""

    def __init__(self, message: str, promised_s: float | None = None) -> None:
        super().__init__(message)
        self.promised_s = promised_s


class CancelledError(RefusedError): ...


class DrainingError(RefusedError): ...


def install(extra: str) -> str:
    """How to get what a command lacks, for messages: flashdiff is in no package index."""
    if (Path(__file__).parents[1] / "pyproject.toml").is_file():
        return f"pip install '.[{extra}]' from flashdiff's checkout"
    wheel = f"flashdiff-{version('flashdiff')}-py3-none-any.whl"
    return f"pip install '{wheel}[{extra}]', the file that flashdiff was installed from"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: for messages that quote it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
