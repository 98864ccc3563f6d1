"""The log as JSON."""

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import grpc
import pytest
from served import serving

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.json_log import JsonFormatter


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def calls(self) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.lines) if line["message"].startswith("call ")]


@pytest.fixture
def log() -> Iterator[_Lines]:
    handler, logger = _Lines(), logging.getLogger("flashdiff")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_call_is_one_object_with_its_model_and_the_reason_of_a_refusal_but_no_prompt(log: _Lines) -> None:
    with serving(FakeComponents()) as running, grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        stub.Generate(image_pb2.GenerateRequest(prompt="my secret wish"), timeout=30)
        for wrong in ({"steps": 99}, {"model": "my secret model"}):
            with pytest.raises(grpc.RpcError):
                stub.Generate(image_pb2.GenerateRequest(prompt="my secret wish", **wrong), timeout=30)
    good, bad, unknown = log.calls()
    assert (good["level"], good["code"], good["model"]) == ("INFO", "OK", "fake")
    assert "reason" not in good
    assert datetime.fromisoformat(good["time"]).tzinfo is not None
    assert (bad["code"], bad["model"], bad["reason"]) == ("INVALID_ARGUMENT", "fake", "request:steps")
    assert (unknown["code"], unknown["reason"]) == ("NOT_FOUND", "notfound:model")
    assert "secret" not in "".join(log.lines)


def test_lines_and_tracebacks_stay_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord(
            "flashdiff", logging.ERROR, __file__, 1, "a\n%s", ("b",), (type(error), error, error.__traceback__)
        )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"]) == ("a\nb", "ERROR")
    assert "ValueError: two\nlines" in line["exception"]
