"""Replies that are larger than a client takes: refused before any work, or in parts."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from served import Running, serving

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import RequestError
from flashdiff.orders import Order, Pixels
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc, triton_pb2
from flashdiff.server.client import Client
from flashdiff.server.images import encode_image
from flashdiff.server.names import ImageFormat
from flashdiff.server.reply_size import LIMIT_KEY, MESSAGE_EXTRA_BYTES, ReplyLimit, stated_limit
from flashdiff.tasks import TASKS

SIDE = 1024
STOCK = 4 * 1024 * 1024
"""Bytes that gRPC's clients take unless they are set to take more."""


@pytest.fixture
def running() -> Iterator[Running]:
    fake = FakeComponents()
    fake.spec = fake.spec.model_copy(update={"sizes": (Size(64, 64), Size(SIDE, SIDE), Size(4096, 4096))})
    with serving(fake) as server:
        yield server


def _request(count: int, side: int = SIDE) -> image_pb2.GenerateRequest:
    return image_pb2.GenerateRequest(
        prompt="x", seed=7, steps=2, count=count, width=side, height=side, format=image_pb2.IMAGE_FORMAT_RAW_RGB
    )


def _stated(limit: object) -> tuple[tuple[str, str], ...]:
    return ((LIMIT_KEY, str(limit)),)


def test_what_the_client_does_not_take_is_refused_before_any_work(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        for call in (stub.Generate, stub.Estimate):
            with pytest.raises(grpc.RpcError) as refused:
                call(_request(2), metadata=_stated(STOCK), timeout=60)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert refused.value.details() == (
                "count: 2 is not allowed; 2 images of 1024x1024 as raw may take 6299648 bytes, "
                "and a message has at most 4194304: "
                f"ask for fewer or smaller images or for JPEG, or raise the client's limit, and {LIMIT_KEY} with it"
            )
        assert not running.fake.calls
        assert stub.Generate(_request(1), metadata=_stated(STOCK), timeout=60).images


def test_what_no_message_holds_is_refused_before_any_work(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        for metadata in ((), _stated(10**12)):
            with pytest.raises(grpc.RpcError, match="at most 268435456: ask for fewer or smaller images") as refused:
                image_pb2_grpc.ImageServiceStub(channel).Generate(_request(6, 4096), metadata=metadata, timeout=60)
            assert "JPEG" not in refused.value.details()
    assert not running.fake.calls


def test_a_stream_spreads_the_images_over_messages_that_the_client_takes(running: Running) -> None:
    with Client(running.address) as client:
        whole = client.generate("x", seed=7, steps=2, count=3, size=Size(SIDE, SIDE), image_format="raw", timeout_s=60)
    with grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        for limit, parts in ((STOCK, [1, 1, 1]), (2 * STOCK, [2, 1]), (4 * STOCK, [3])):
            options = [("grpc.max_receive_message_length", limit)]
            with grpc.insecure_channel(running.address, options) as limited:
                stream = image_pb2_grpc.ImageServiceStub(limited).GenerateStream
                updates = list(stream(_request(3), metadata=_stated(limit), timeout=60))
            results = [update.result for update in updates if update.HasField("result")]
            assert [len(result.images) for result in results] == parts
            assert tuple(image.data for result in results for image in result.images) == whole.images
            assert [image.seed for result in results for image in result.images] == [7, 8, 9]
            assert all(result.timings.total_ms and result.model.name == "fake" for result in results)
        with pytest.raises(grpc.RpcError, match="1 image of 1024x1024 as raw may take"):
            list(stub.GenerateStream(_request(3), metadata=_stated(1_000_000), timeout=60))


def test_tritons_clients_state_it_as_well(running: Running) -> None:
    request = triton_pb2.ModelInferRequest(model_name="fake")
    for name, kind, field, value in (
        ("PROMPT", "BYTES", "bytes_contents", b"x"),
        ("WIDTH", "INT32", "int_contents", SIDE),
        ("HEIGHT", "INT32", "int_contents", SIDE),
    ):
        getattr(request.inputs.add(name=name, datatype=kind, shape=[1]).contents, field).append(value)
    with grpc.insecure_channel(running.address, [("grpc.max_receive_message_length", 4 * STOCK)]) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            triton_pb2.ModelInferRequest.SerializeToString,
            triton_pb2.ModelInferResponse.FromString,
        )
        with pytest.raises(
            grpc.RpcError, match="1 image of 1024x1024 as raw and png may take"
        ):  # both outputs, unless one is named
            infer(request, metadata=_stated(STOCK), timeout=60)
        assert not running.fake.calls
        assert len(infer(request, metadata=_stated(2 * STOCK), timeout=60).raw_output_contents) == 3


@pytest.mark.parametrize("value", ["", "x", "-1", "1e6", "٣٠٠٠٠٠٠", "0", str(MESSAGE_EXTRA_BYTES), "9" * 16])
def test_a_limit_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(RequestError, match=f"{LIMIT_KEY}: '{value}' is not allowed; state a number of bytes, more than 8192"):
        stated_limit({LIMIT_KEY: value})


@pytest.mark.parametrize(
    ("image_format", "quality"), [("raw", None), ("png", None), ("webp", None), ("webp", 80), ("jpeg", None), ("jpeg", 100)]
)
@pytest.mark.parametrize("size", [Size(32, 32), Size(512, 256)], ids=str)
def test_no_picture_takes_more_than_is_expected(image_format: ImageFormat, quality: int | None, size: Size) -> None:
    rng = np.random.default_rng(1)
    shape = (size.height, size.width, 3)
    checks = np.indices(shape).sum(0) % 2 * 255
    pictures: list[Pixels] = [
        rng.integers(0, 256, shape, dtype=np.uint8),
        (rng.integers(0, 2, shape) * 255).astype(np.uint8),
        checks.astype(np.uint8),
        np.zeros(shape, np.uint8),
    ]
    order = Order(task=TASKS["text_to_image"], prompt="x", seed=0, steps=1, size=size)
    for picture in pictures:
        found = len(encode_image(picture, image_format, quality)) + MESSAGE_EXTRA_BYTES
        with pytest.raises(RequestError):
            ReplyLimit(max_bytes=found - 1, formats=(image_format,)).check(order, quality)
