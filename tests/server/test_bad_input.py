"""What no client of ours would send: bytes that are not gRPC, and messages that are too large."""

import os
import random
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import METHODS, Running, message, until

from flashdiff.server.client import Client

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_GARBAGE = {
    "random": random.Random(0).randbytes(10_000),
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "half a preface": _PREFACE[:10],
    "a preface and no frames": _PREFACE + b"\xff" * 1000,
}


@pytest.mark.parametrize("garbage", _GARBAGE.values(), ids=_GARBAGE)
def test_garbage_on_the_port_harms_nobody_and_leaves_no_connection(running: Running, client: Client, garbage: bytes) -> None:
    client.generate("x", timeout_s=10)
    before = len(os.listdir("/proc/self/fd"))
    with socket.create_connection(("127.0.0.1", running.server.port)) as connection:
        connection.sendall(garbage)
        assert client.generate("x", timeout_s=10).images
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    with grpc.insecure_channel(running.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert check.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_100_megabytes_is_refused_and_the_next_is_served(running: Running, client: Client, method: str) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(f"/{method}")(iter([message(method, "w" * 100_000_000)]), timeout=60))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "message larger than max" in caught.value.details()
    assert client.generate("x", timeout_s=10).images


@pytest.mark.parametrize("method", METHODS[:3])  # in the fourth an error is an answer
def test_a_prompt_as_long_as_a_message_can_be_names_the_prompt(running: Running, method: str) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(f"/{method}")(iter([message(method, "w" * (4 * 1024 * 1024 - 100))]), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("prompt: 'www")
    assert len(caught.value.details()) < 400
