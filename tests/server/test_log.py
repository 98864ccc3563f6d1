"""The log of a server never waits for its reader."""

import logging
import threading

import pytest

from flashdiff.server.log import QueuedLog, hide_lost_replies


class _Held(logging.Handler):
    """Writes nothing until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write, self.writing, self.lines = threading.Event(), threading.Event(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.writing.set()
        assert self.may_write.wait(600)
        self.lines.append(record.getMessage())


def test_lines_beyond_the_queue_are_dropped_and_counted() -> None:
    held = _Held()
    log = QueuedLog([held], most_waiting=3)

    def write(text: str) -> None:
        log.handle(logging.makeLogRecord({"msg": "%s", "args": (text,), "levelno": logging.INFO}))

    write("first")
    assert held.writing.wait(600)
    for number in range(10):
        write(f"line {number}")
    log.flush_within(0.01)  # returns, though nothing is written
    held.may_write.set()
    log.flush_within(60)
    write("last")
    log.flush_within(60)
    assert held.lines == ["first", "line 0", "line 1", "line 2", "7 lines were dropped: the log was not read", "last"]


def test_a_reply_that_found_no_call_any_more_writes_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """tests/attack/test_soak.py has calls whose deadline passes while their status is sent."""
    hide_lost_replies()
    log = logging.getLogger("grpc._cython.cygrpc")
    log.error("ExecuteBatchError raised in core by servicer method [%s]", "/flashdiff.v1.ImageService/Generate")
    log.error("Unexpected [%s] raised by servicer method [%s]", "ValueError", "/flashdiff.v1.ImageService/Generate")
    assert [record.getMessage().split()[0] for record in caplog.records] == ["Unexpected"]
