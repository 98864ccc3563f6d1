"""Reads the bodies of requests: whole, in bounded time, and only so many bytes of all together."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.types import Receive

from flashdiff.errors import CancelledError, OverloadedError
from flashdiff.server.http.errors import HttpError

MIB = 1024 * 1024
READ_S = 60.0
"""How long a body may take to arrive."""
_MAX_BYTES = 4 * MIB  # as for messages of gRPC
_MAX_UPLOAD_BYTES = 16 * MIB  # of a form with images
_UPLOADS = "/v1/images/edits"
_MAX_HELD_BYTES = 256 * MIB
_MAX_HELD_BYTES_OF_ONE = 192 * MIB  # of these for one client, so that none fills it alone
_RETRY_S = 1.0


class Bodies:
    """Counts the bytes of all bodies that are read or in use, by client."""

    def __init__(self) -> None:
        self._held_bytes = Counter[str]()

    @asynccontextmanager
    async def read(self, path: str, client: str, headers: Mapping[str, str], receive: Receive) -> AsyncIterator[bytes]:
        """The body, which counts as held inside; HttpError for one that is too large, too slow or compressed."""
        limit = _MAX_UPLOAD_BYTES if path == _UPLOADS else _MAX_BYTES
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HttpError(415, f"content-encoding: {headers['content-encoding'][:80]!r} is not taken; send the body as it is")
        if headers.get("content-length", "").isdigit() and int(headers["content-length"][:20]) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(READ_S):
                    await self._receive(client, receive, body, limit)
            except TimeoutError:
                raise HttpError(408, f"the body did not arrive within {READ_S:g} s", {"connection": "close"}) from None
            yield bytes(body)
        finally:
            self._held_bytes[client] -= len(body)
            if not self._held_bytes[client]:
                del self._held_bytes[client]

    async def _receive(self, client: str, receive: Receive, body: bytearray, limit: int) -> None:
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CancelledError("the client has left")
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > limit:
                raise _too_large(limit)
            for held, most in (
                (self._held_bytes.total(), _MAX_HELD_BYTES),
                (self._held_bytes[client], _MAX_HELD_BYTES_OF_ONE),
            ):
                if held + len(chunk) > most:
                    raise OverloadedError("too many request bodies are being read", retry_after_s=_RETRY_S)
            self._held_bytes[client] += len(chunk)
            body += chunk
            has_more = message.get("more_body", False)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than the {limit // MIB} MiB that are taken here")
