"""The page that Prometheus reads and the probes of a kubelet, on the event loop, so that a silent connection takes no thread."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app

_WHOLE_S = 10.0  # for one request and its answer
_MOST_CONNECTIONS = 64  # the oldest makes room for the next
_MOST_BYTES = 16 * 1024  # of a request


_METRICS = ("/", "/metrics")
LIVE, READY = "/healthz", "/readyz"


class MetricsPage:
    """Answers HTTP requests for the metrics of a registry and for the probes, one a connection; any other path is 404."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app = make_wsgi_app(registry)
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[Any], None] = {}  # the oldest first
        self._probes: dict[str, Callable[[], bool]] = {LIVE: lambda: True, READY: lambda: False}  # until the server has started

    async def listen(self, host: str, port: int) -> int:
        """Serve until `close`; the port it listens on. OSError when it cannot."""
        self._server = await asyncio.start_server(self._answer, host, port, limit=_MOST_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    def show_health(self, is_live: Callable[[], bool], is_ready: Callable[[], bool]) -> None:
        """What the probes answer from now on: 200 or 503."""
        self._probes = {LIVE: is_live, READY: is_ready}

    def close(self) -> None:
        if self._server:
            self._server.close()
        for connection in self._connections:
            connection.cancel()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        if len(self._connections) >= _MOST_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[task] = None
        writer.transport.set_write_buffer_limits(high=0)  # so that draining it takes until all is sent
        try:
            async with asyncio.timeout(_WHOLE_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(await asyncio.to_thread(self._response, request.decode("latin-1")))  # making it takes milliseconds
                await writer.drain()
        except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client is too slow, has left, or speaks another protocol
        except asyncio.CancelledError:
            if task in self._connections:  # the server ends; otherwise it makes room
                raise
        finally:
            self._connections.pop(task, None)
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # closing would wait for the client
            else:
                writer.close()

    def _response(self, request: str) -> bytes:
        head, *lines = request.split("\r\n")
        method, target, _ = head.split(" ")  # ValueError when it is no request
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        url = urlsplit(target)
        if url.path not in _METRICS:
            return self._short(url.path, method)
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": url.path,
            "QUERY_STRING": url.query,
            "HTTP_ACCEPT": headers.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", ""),
        }
        answer: list[bytes] = []

        def start(status: str, fields: Iterable[tuple[str, str]], _: Any = None) -> Callable[[bytes], None]:
            answer.append(f"HTTP/1.1 {status}\r\n".encode())
            answer.extend(f"{name}: {value}\r\n".encode() for name, value in fields)
            return answer.append

        body = b"".join(self._app(environ, start))
        answer.append(f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(answer) + (b"" if method == "HEAD" else body)

    def _short(self, path: str, method: str) -> bytes:
        """The answer of a probe, or 404."""
        probe = self._probes.get(path)
        status, body = ("404 Not Found", "not found\n") if probe is None else ("200 OK", "ok\n")
        if probe and not probe():
            status, body = "503 Service Unavailable", "no\n"
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return (head + ("" if method == "HEAD" else body)).encode()
