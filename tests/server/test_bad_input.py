"""What no client of ours would send: bytes that are not gRPC, and messages that are too large."""

import os
import random
import socket
import struct

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import METHODS, Running, message, until

from flashdiff.proto.v1 import image_pb2, triton_pb2
from flashdiff.server.client import Client
from flashdiff.server.images import encode_image

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_GARBAGE = {
    "random": random.Random(0).randbytes(10_000),
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "half a preface": _PREFACE[:10],
    "a preface and no frames": _PREFACE + b"\xff" * 1000,
}


@pytest.mark.parametrize("garbage", _GARBAGE.values(), ids=_GARBAGE)
def test_garbage_on_the_port_disturbs_no_client_and_leaves_no_connection(
    running: Running, client: Client, garbage: bytes
) -> None:
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


@pytest.mark.parametrize("method", [*METHODS, "grpc.health.v1.Health/Check"])
def test_a_compressed_message_is_refused_before_it_is_unpacked(running: Running, method: str) -> None:
    """The limit of a message's length counts its bytes as sent: a few kilobytes could become gigabytes."""
    with (
        grpc.insecure_channel(running.address, compression=grpc.Compression.Gzip) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(channel.stream_stream(f"/{method}")(iter([message(METHODS[0], "w" * 100_000)]), timeout=60))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", METHODS[:3])  # in the fourth an error is an answer
def test_a_prompt_as_long_as_a_message_can_be_names_the_prompt(running: Running, method: str) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(f"/{method}")(iter([message(method, "w" * (4 * 1024 * 1024 - 100))]), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("prompt: 'www")
    assert len(caught.value.details()) < 400


def _full(method: str) -> bytes:
    """A request with all that its message has."""
    image = encode_image(np.zeros((8, 8, 3), dtype=np.uint8), "png")
    if "ImageService" in method:
        sizes = {"seed": 7, "steps": 2, "width": 64, "height": 64, "count": 2, "format": 2, "quality": 50, "priority": 1}
        request = image_pb2.GenerateRequest(prompt="x", model="fake", image=image, strength=0.5, **sizes)
        return request.SerializeToString()
    infer = triton_pb2.ModelInferRequest(model_name="fake", model_version="1", id="mine")
    infer.parameters["timeout"].int64_param = 10_000_000
    values = {"PROMPT": b"x", "IMAGE": image, "FORMAT": b"png", "SEED": 7, "STEPS": 2, "COUNT": 2, "STRENGTH": 0.5}
    for name, value in values.items():
        datatype = {"SEED": "UINT64", "STEPS": "INT32", "COUNT": "INT32", "STRENGTH": "FP32"}.get(name, "BYTES")
        infer.inputs.add(name=name, datatype=datatype, shape=[1])
        code = {"UINT64": "<Q", "INT32": "<i", "FP32": "<f"}.get(datatype)
        raw = struct.pack(code, value) if code else struct.pack("<I", len(bytes(value))) + bytes(value)
        infer.raw_input_contents.append(raw)
    for name in ("IMAGES", "ENCODED", "SEEDS"):
        infer.outputs.add(name=name)
    return infer.SerializeToString()


@pytest.mark.parametrize("method", [*METHODS, "flashdiff.v1.ImageService/Estimate"])
def test_any_bytes_for_a_message_are_answered_with_a_status(running: Running, method: str) -> None:
    rng, valid, ends = random.Random(0), _full(method), []
    with grpc.insecure_channel(running.address) as channel:
        call = channel.stream_stream(f"/{method}")
        list(call(iter([valid]), timeout=10))
        for number in range(200):
            data = bytearray(valid if number % 2 else rng.randbytes(rng.randrange(200)))
            for _ in range(rng.randrange(1, 4)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                list(call(iter([bytes(data)]), timeout=10))
                ends.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                ends.append(error.code())
                assert "Traceback" not in (error.details() or "")  # noqa: PT017
    assert set(ends) <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert grpc.StatusCode.OK in ends  # some changes mean nothing, or are within what is allowed
    until(lambda: running.server.worker.pending_images == 0)
    assert running.server.worker.failure is None
