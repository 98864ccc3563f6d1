"""Runs an ASGI application with uvicorn as a task of the server's event loop, without its signal handlers and its log."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashdiff.errors import ConfigError
from flashdiff.server.certificates import Certificates
from flashdiff.server.http.sending import ABORT
from flashdiff.server.requests import sending_s

HEADERS_S = 30.0
"""How long a request's headers may take to arrive."""
_KEEP_ALIVE_S = 75.0  # of an idle connection: longer than those of load balancers
_CLOSING_S = 0.2  # for connections to be gone that are closed


class _Connection(H11Protocol):
    """Closes a connection whose next request does not begin and end its headers in time, or whose client does not read.

    uvicorn closes idle ones itself.
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1, low=0)  # so that all that waits for the client counts as unread
        app, abort = self.app, transport.abort
        self.app = lambda scope, receive, send: app({**scope, ABORT: abort}, receive, send)
        self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(sending_s(self.transport.get_write_buffer_size()), self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._stop_unread()

    def send_400_response(self, msg: str) -> None:
        """Answer garbage, unless a response has begun; uvicorn would fail then, and when the request under way is answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _watch_headers(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The server's own handlers stay."""
        yield


class HttpListener:
    """A running HTTP server; `port` is the one it listens on."""

    def __init__(self, port: int, server: _Uvicorn, running: "asyncio.Task[None]") -> None:
        self.port, self._server, self._running = port, server, running

    async def stop(self, grace_s: float) -> None:
        """Close: idle connections at once, those with a request when it is answered, all after `grace_s`."""
        grace_s = max(grace_s, _CLOSING_S)
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # passed on to asyncio.wait_for
        self._server.should_exit = True
        await self._running


async def listen_http(app: ASGIApp, host: str, port: int, certificates: Certificates | None) -> HttpListener:
    """Listen on a port, 0 takes a free one; ConfigError when it cannot be bound."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,  # type: ignore[arg-type]
        reset_contextvars=True,  # or a request in a kept-alive connection would see what the one before has set
        ssl_context_factory=(lambda *_: certificates.http_context()) if certificates else None,
    )
    config.load()
    bound = _bind(host, port)
    server = _Uvicorn(config)
    running = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not running.done():
        await asyncio.sleep(0)
    return HttpListener(bound.getsockname()[1], server, running)


def _bind(host: str, port: int) -> socket.socket:
    # The protocol is named because asyncio sets TCP_NODELAY only where it is: without it a response waits 40 ms for an ACK.
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError(f"--http-port {port}: cannot listen: {error.strerror or error}") from None
    return bound
