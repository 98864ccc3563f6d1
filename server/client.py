"""A small typed client.

with Client("127.0.0.1:50051") as client:
    result = client.generate("a green monster with horns", steps=2, seed=7)
    Path("monster.png").write_bytes(result.images[0])
"""

from types import TracebackType
from typing import Self

import grpc

from flashdiff.components import Size
from flashdiff.errors import FlashdiffError
from flashdiff.proto.v1 import image_pb2_grpc
from flashdiff.server.convert import Result, read_response, write_request
from flashdiff.server.images import ImageFormat


class ServerError(FlashdiffError):
    """The server refused, failed or did not answer; `code` is the gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str | None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


class Client:
    """A connection to one server, safe to share between threads."""

    def __init__(self, address: str) -> None:
        options = [("grpc.max_receive_message_length", 256 * 1024 * 1024)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = image_pb2_grpc.ImageServiceStub(self._channel)

    def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        steps: int | None = None,
        size: Size | None = None,
        count: int = 1,
        image_format: ImageFormat = "png",
        timeout_s: float | None = None,
    ) -> Result:
        """Images of the prompt; None leaves the choice to the server.

        RequestError for a value that no request can carry; ServerError, with its status, for a refusal, a failure or no server.
        """
        try:
            request = write_request(prompt, seed=seed, steps=steps, size=size, count=count, image_format=image_format)
            return read_response(self._stub.Generate(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise ServerError(error.code(), error.details()) from None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until the server answers; ServerError when it does not in time."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout_s)
        except grpc.FutureTimeoutError:
            raise ServerError(grpc.StatusCode.UNAVAILABLE, f"no server answered within {timeout_s:g} s") from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
