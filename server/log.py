"""The log of a server: a thread writes it, so that a stderr that nothing reads delays no request."""

import logging
import logging.handlers
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_WAITING = 10_000  # lines, about 2 MB
_LAST_S = 1.0  # for the lines that wait when the server ends


class QueuedLog(logging.handlers.QueueHandler):
    """Passes lines to the handlers in a thread; lines that find the queue full are dropped, and counted in the next one."""

    def __init__(self, handlers: list[logging.Handler], most_waiting: int = _MOST_WAITING) -> None:
        self._lines: queue.SimpleQueue[logging.LogRecord | threading.Event] = queue.SimpleQueue()
        super().__init__(self._lines)
        self._handlers, self._most_waiting, self._dropped = handlers, most_waiting, 0
        threading.Thread(target=self._write, name="flashdiff-log", daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= self._most_waiting:
            self._dropped += 1
            return
        if self._dropped:
            text = f"{self._dropped} lines were dropped: the log was not read"
            self._lines.put(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None))
            self._dropped = 0
        self._lines.put(record)

    def flush_within(self, seconds: float = _LAST_S) -> None:
        """Wait until the lines so far are written, but no longer than that."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(seconds)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            for handler in self._handlers:
                if line.levelno >= handler.level:
                    handler.handle(line)


@contextmanager
def queued_log() -> Iterator[QueuedLog]:
    """Within the block, what the root logger's handlers would write goes through a queue."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    log = QueuedLog(handlers)
    root.handlers[:] = [log]
    try:
        yield log
    finally:
        log.flush_within()
        root.handlers[:] = handlers


def hide_lost_replies() -> None:
    """Drop gRPC's tracebacks of replies that found no call any more.

    It writes one when a client leaves, or its deadline passes, at the very moment at which its reply or status is sent.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_lost_reply)


def _is_no_lost_reply(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("ExecuteBatchError raised in core")
