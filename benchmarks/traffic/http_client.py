"""An asyncio client of the images API that costs little: HTTP/1.1 over kept connections, and nothing that loads do not need."""

import asyncio
import base64
import json
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from flashdiff.server.client import ServerError

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP's statuses by their names in gRPC, so that outcomes of both protocols are counted alike."""


@dataclass(frozen=True)
class HttpResult:
    """What came back for one request."""

    images: list[bytes]
    timings: dict[str, float]
    """Milliseconds by stage, as the server reports them."""


class HttpClient:
    """Does what flashdiff's own client does over gRPC: the files of the images, and an error for a refusal."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    async def generate(
        self, prompt: str, *, steps: int | None = None, seed: int | None = None, timeout_s: float | None = None
    ) -> HttpResult:
        """One image as PNG; ServerError when the server refuses it."""
        timeout = f"x-request-timeout-ms: {round(1000 * timeout_s)}\r\n" if timeout_s else ""
        answer = await self._call("POST", "/v1/images/generations", {"prompt": prompt, "steps": steps, "seed": seed}, timeout)
        return HttpResult([base64.b64decode(image["b64_json"]) for image in answer["data"]], answer["flashdiff"]["timings_ms"])

    async def models(self) -> list[str]:
        """The names that requests may give."""
        return [model["id"] for model in (await self._call("GET", "/v1/models"))["data"]]

    async def _call(self, method: str, path: str, fields: dict[str, Any] | None = None, headers: str = "") -> dict[str, Any]:
        body = json.dumps(fields).encode() if fields else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        reader, writer = connection
        try:
            writer.write(f"{head}\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            status, length = int(answer.split(None, 2)[1]), _length(answer)
            content = json.loads(await reader.readexactly(length))
        except (OSError, EOFError) as error:
            writer.close()
            raise ServerError(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        except BaseException:
            writer.close()
            raise
        self._idle.append(connection)
        if status != 200:
            raise ServerError(_CODES.get(status, grpc.StatusCode.INTERNAL), content["error"]["message"])
        result: dict[str, Any] = content
        return result


def _length(head: bytes) -> int:
    return next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
