"""Calls that no client of ours would make, at a scale of seconds; `make attack` makes more of them."""

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_http2 import Connection
from served import METHODS, Running, message, serving, until

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.proto.v1 import image_pb2, triton_pb2
from flashdiff.server import gate
from flashdiff.server import requests as requests_module
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.wire import FORMAT_NUMBERS

SCALE = int(os.environ.get("ATTACK_SCALE", "1"))
TOKEN = "alice-secret-0123456"
CHECK = "grpc.health.v1.Health/Check"


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents()) as running:
        yield running


def _is_healthy(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    return bool(check.status == health_pb2.HealthCheckResponse.SERVING)


def _calls(running: Running) -> int:
    """How many calls gRPC holds."""

    async def count() -> int:
        return sum(task.get_name() == "rpc_task" for task in asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), running.loop).result(600)


@pytest.mark.parametrize("method", [*METHODS, "flashdiff.v1.ImageService/ListModels", CHECK])
def test_a_call_without_a_message_ends_within_its_time(running: Running, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_FIRST_S", 0.05)
    with Connection(running.address) as half_open:
        stream = half_open.call(method)
        assert b"grpc-status\x014" in half_open.ended(1)[stream]  # DEADLINE_EXCEEDED
    until(lambda: _calls(running) == 0)


def test_a_call_without_a_valid_token_ends_before_its_message(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    with serving(FakeComponents(), Listen(port=0, tokens=tmp_path / "tokens")) as running:
        with Connection(running.address) as half_open:
            streams = [half_open.call(method) for method in METHODS]
            ends = half_open.ended(len(streams))
        assert all(b"grpc-status\x0216" in ends[stream] for stream in streams)  # UNAUTHENTICATED


def test_half_open_calls_of_one_client_shut_out_neither_others_nor_the_health_check(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_FIRST_S", 3600.0)  # time alone must not decide it
    with ExitStack() as stack:
        for number in range(4 * SCALE):
            attacker = stack.enter_context(Connection(running.address, source=f"127.0.0.{2 + number % 4}"))
            for call in range(500):
                attacker.call(CHECK if call % 5 == 0 else METHODS[call % 4])
        until(lambda: _calls(running) >= 1500)
        assert _is_healthy(running.address)
        with Client(running.address, retries=False) as client:
            for _ in range(10):
                assert client.generate("x", timeout_s=60).images
            assert _is_healthy(running.address)
    until(lambda: _calls(running) == 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_that_is_never_read_leaves_the_server(running: Running, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "_SENDING_S", 0.1)
    with Connection(running.address) as silent:
        for _ in range(4 * SCALE):  # 400 kB each, of which the window takes 64
            silent.call(method, _large(method))
        until(lambda: _calls(running) > 0)
        until(lambda: _calls(running) == 0)
        until(lambda: not running.server.worker.has_unsent)
        with Client(running.address) as client:
            assert client.generate("x", timeout_s=60).images
        assert silent.ended(1)  # the call, and not the connection


def _large(method: str) -> bytes:
    if "ImageService" in method:
        sizes = {"count": 16, "width": 128, "height": 64, "format": FORMAT_NUMBERS["raw"]}
        return image_pb2.GenerateRequest(prompt="x", **sizes).SerializeToString()
    request = triton_pb2.ModelInferRequest.FromString(message(method))
    for name, value in (("COUNT", 16), ("WIDTH", 128), ("HEIGHT", 64)):
        request.inputs.add(name=name, datatype="INT32", shape=[1]).contents.int_contents.append(value)
    return request.SerializeToString()


def test_a_flood_of_calls_without_a_token_leaves_room_for_those_with_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    with serving(FakeComponents(), Listen(port=0, tokens=tmp_path / "tokens")) as running:
        with Connection(running.address) as flood:
            for _ in range(SCALE):
                for number in range(400):
                    flood.call(METHODS[number % 4], b"\xff\xff", {"authorization": "Bearer no-such-token-0123"})
                with Client(running.address, token=TOKEN) as client:
                    assert client.generate("x", timeout_s=60).images
                assert _is_healthy(running.address)
                flood.ended(400)
        assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
def test_garbage_for_the_health_service_writes_no_trace(running: Running, caplog: pytest.LogCaptureFixture, method: str) -> None:
    with Connection(running.address) as connection:
        stream = connection.call(method, b"\xff\xff\xff")
        assert b"grpc-status\x013" in connection.ended(1)[stream]  # INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.exc_info]


def test_garbage_for_reflection_writes_no_trace(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with Connection(running.address) as connection:
        stream = connection.call("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\xff\xff\xff")
        assert b"grpc-status\x013" in connection.ended(1)[stream]
    assert not [record for record in caplog.records if record.exc_info]


def test_calls_reset_as_soon_as_they_begin_leave_nothing(running: Running) -> None:
    for _ in range(5 * SCALE):
        with Connection(running.address) as connection:
            for number in range(100):
                connection.reset(connection.call(METHODS[number % 4], message(METHODS[number % 4])))
    assert _is_healthy(running.address)
    until(lambda: _calls(running) == 0 and running.server.worker.pending_images == 0)
    assert running.server.worker.failure is None
