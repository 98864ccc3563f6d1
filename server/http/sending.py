"""Responses that end what they are made from when they are sent, or when their client leaves or does not read them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from flashdiff.errors import CancelledError
from flashdiff.server.requests import sending_s

ABORT = "flashdiff.abort"
"""The scope's key for what drops the connection with all that waits to be sent."""
_PIECE_BYTES = 256 * 1024  # of a body that is handed on at once: what follows waits until the client has taken it


async def send_in_time(send: Send, message: Message, abort: Callable[[], None]) -> None:
    """Send a piece of a body; a client that does not take it in time loses its connection, and CancelledError is raised."""
    body, more_body = message.get("body", b""), message.get("more_body", False)
    if len(body) <= _PIECE_BYTES and not more_body:
        await send(message)  # the connection watches what is left of it
        return
    try:
        async with asyncio.timeout(sending_s(len(body))):
            for start in range(0, len(body), _PIECE_BYTES):
                await send({**message, "body": body[start : start + _PIECE_BYTES], "more_body": True})
            if not more_body:
                await send({**message, "body": b""})  # returns when the last piece has been taken
    except TimeoutError:
        abort()
        raise CancelledError("the client does not read its response") from None


class Closing(Response):
    """A whole body, and the generator whose place is kept until it is sent."""

    def __init__(
        self, body: bytes, updates: AsyncGenerator[object, None], *, media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(body, media_type=media_type, headers=headers)
        self._updates = updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._updates):
            await super().__call__(scope, receive, send)


class Streaming(Response):
    """A body whose pieces are sent as they come."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], *, media_type: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
