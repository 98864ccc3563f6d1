"""The process of `flashdiff serve`: signals and exit."""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from opentelemetry import trace

from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.server.app import Listen, serve
from flashdiff.server.log import QueuedLog, queued_log
from flashdiff.server.models import Models

_LAST_S = 3.0  # for spans and log lines in flight at the end

_log = logging.getLogger(__name__)


def run_server(open_models: Callable[[], Models], listen: Listen) -> NoReturn:
    """Open the models and serve them until a signal; the process exits with 0 after a drain, 1 after a failure.

    Raises ConfigError, and what opening raises, while nothing runs yet.
    """
    with queued_log() as log, _handled({signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: lambda *_: _leave(log, 0)}):
        try:
            models = _open_in_thread(open_models)
            asyncio.run(_serve(models, listen, log))
        except KeyboardInterrupt:
            _leave(log, 130, "flashdiff: interrupted")
        raise AssertionError  # _serve leaves


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Within the block, handle signals until the server installs its own handlers."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(models: Models, listen: Listen, log: QueuedLog) -> None:
    try:
        await serve(models, listen)
    except ConfigError:
        raise
    except FlashdiffError as error:
        _leave(log, 1, f"flashdiff: error: {error}")
    except Exception:
        _log.exception("the server failed")
        _leave(log, 1)
    _leave(log, 0)  # here already: asyncio and the interpreter would wait for their threads


def _open_in_thread(open_models: Callable[[], Models]) -> Models:
    """The main thread only waits, because signals reach it: while it compiled a model, it would handle none for minutes."""
    opened: list[Models | BaseException] = []

    def run() -> None:
        try:
            opened.append(open_models())
        except BaseException as error:
            opened.append(error)

    thread = threading.Thread(target=run, name="flashdiff-opening", daemon=True)
    thread.start()
    thread.join()
    (outcome,) = opened
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _leave(log: QueuedLog, status: int, message: str = "") -> NoReturn:
    """End the process at once.

    The interpreter's own end would wait for threads that read images or open models, and would abort the process (SIGABRT)
    when the device thread comes back from an engine in the middle of it.
    """

    def flush() -> None:
        log.flush_within()
        if message:
            print(message, file=sys.stderr, flush=True)  # noqa: T201
        if force_flush := getattr(trace.get_tracer_provider(), "force_flush", None):  # an SDK's, if there is one
            force_flush(1000 * _LAST_S)
        sys.stdout.flush()

    flushing = threading.Thread(target=flush, daemon=True)  # stderr or the collector may block
    flushing.start()
    flushing.join(_LAST_S)
    os._exit(status)
