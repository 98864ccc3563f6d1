"""HTTP requests that no client of ours would make, at a scale of seconds; `make attack` makes more of them."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2 as httpx
import pytest
from served import Running, serving, until

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server import calls
from flashdiff.server import requests as requests_module
from flashdiff.server.app import Listen
from flashdiff.server.caps import Caps
from flashdiff.server.client import Client, ServerError
from flashdiff.server.http import bodies, listener

SCALE = int(os.environ.get("ATTACK_SCALE", "1"))
TOKEN = "alice-secret-0123456"
GENERATIONS = "/v1/images/generations"
LISTEN = Listen(port=0, http_port=0)


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents(), LISTEN) as running:
        assert running.server._http
        for listening in running.server._http._server.servers:
            for bound in listening.sockets:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or the kernel would take what is sent
        yield running


class Raw:
    """A connection that sends the given bytes and reads only when a test calls for it; its kernel takes 4 KiB."""

    def __init__(self, running: Running, sent: bytes = b"", source: str = "127.0.0.1") -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(60)
        self.socket.bind((source, 0))
        self.socket.connect(("127.0.0.1", running.server.http_port or 0))
        self.socket.sendall(sent)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def _post(path: str, body: bytes, length: int | None = None, headers: str = "") -> bytes:
    length = len(body) if length is None else length
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n"
    )
    return head.encode() + body


def _generates(running: Running, **headers: str) -> bool:
    return httpx.post(running.url + GENERATIONS, json={"prompt": "x"}, headers=headers, timeout=60).status_code == 200


def _is_live(running: Running) -> bool:
    return httpx.get(f"{running.url}/health/live", timeout=60).status_code == 200


def _connections(running: Running) -> int:
    """How many connections the HTTP server holds."""
    assert running.server._http
    return len(running.server._http._server.server_state.connections)


def test_slow_bodies_of_some_clients_shut_out_neither_others_nor_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_S", 3600.0)  # time alone must not decide it
    monkeypatch.setattr(calls, "_MOST", 60 * SCALE)
    monkeypatch.setattr(calls, "_MOST_OF_ONE", 45 * SCALE)
    with serving(FakeComponents(), LISTEN) as running, ExitStack() as stack:
        for number in range(70 * SCALE):
            source = f"127.0.0.{2 + (number >= 45 * SCALE)}"
            stack.enter_context(Raw(running, _post(GENERATIONS, b"{", length=100), source))
        until(lambda: _connections(running) >= 70 * SCALE)
        for _ in range(10):
            assert _generates(running)
            assert _is_live(running)


def test_calls_of_both_protocols_share_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_S", 3600.0)
    monkeypatch.setattr(calls, "_MOST_OF_ONE", 2)
    caps = list[Caps]()
    monkeypatch.setattr(calls, "Caps", lambda *limits: caps.append(Caps(*limits)) or caps[-1])
    with serving(FakeComponents(), LISTEN) as running, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Raw(running, _post(GENERATIONS, b"{", length=100)))
        until(lambda: caps[0]._count == 2)
        refused = pytest.raises(ServerError, match="calls of yours are under way")
        with Client(running.address, retries=False) as client, refused:
            client.generate("x", timeout_s=60)
        assert httpx.post(running.url + GENERATIONS, json={"prompt": "x"}, timeout=60).status_code == 429
        assert _is_live(running)


@pytest.mark.parametrize("ending", ["", "Connection: close\r\n"])
def test_a_response_that_is_never_read_leaves_the_server(running: Running, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "_SENDING_S", 0.1)
    numbers = {"COUNT": 16, "WIDTH": 128, "HEIGHT": 64}  # 400 kB, of which kernels take 10
    inputs = [{"name": name, "datatype": "INT32", "shape": [1], "data": [value]} for name, value in numbers.items()]
    inputs.append({"name": "PROMPT", "datatype": "BYTES", "shape": [1], "data": ["x"]})
    body = json.dumps({"inputs": inputs}).encode()
    for _ in range(SCALE):  # as many at once as the queue takes: the connection of a refused request stays
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(Raw(running, _post("/v2/models/fake/infer", body, headers=ending)))
            until(lambda: _connections(running) == 0)
        until(lambda: running.server.worker.pending_images == 0 and not running.server.worker.has_unsent)
        assert _generates(running)


def test_pipelined_requests_whose_responses_are_never_read_leave_the_server(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "_SENDING_S", 0.1)
    with Raw(running, b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 100 * SCALE):
        until(lambda: _connections(running) == 0)


def test_a_request_without_a_valid_token_is_answered_before_its_body(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tmp_path / "tokens")) as running:
        for path in (GENERATIONS, "/v1/images/edits", "/v2/models/fake/infer", "/v2/repository/index"):
            with Raw(running, _post(path, b"", length=1_000_000)) as half_open:
                assert half_open.socket.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_headers_that_drip_do_not_keep_a_connection(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADERS_S", 0.1)
    with Raw(running, b"GET / HTTP/1.1\r\n") as slow:
        slow.socket.settimeout(0.02)
        for _ in range(3000):  # a minute
            try:
                slow.socket.sendall(b"a")
                if not slow.socket.recv(1):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        raise AssertionError("the connection was kept")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://[\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: \xff\xfe\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\ntraceparent: \xff\r\nbaggage: \xff=\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"\x16\x03\x01" + bytes(2000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_garbage_without_a_token_writes_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEADERS_S", 0.1)
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tmp_path / "tokens")) as running:
        for _ in range(SCALE):
            with Raw(running, request_bytes) as connection, suppress(ConnectionError):
                connection.socket.recv(65536)
        assert _generates(running, authorization=f"Bearer {TOKEN}")
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


def test_a_body_that_turns_out_as_garbage_after_the_response_writes_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tmp_path / "tokens")) as running:
        chunked = b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        for _ in range(SCALE):
            with Raw(running, chunked) as connection, suppress(ConnectionError):
                assert connection.socket.recv(65536).startswith(b"HTTP/1.1 401 ")
                connection.socket.sendall(b"zz\r\n")
                while connection.socket.recv(65536):
                    pass
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


def test_one_client_cannot_hold_the_memory_for_all_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_S", 3600.0)
    monkeypatch.setattr(bodies, "_MAX_HELD_BYTES_OF_ONE", 3000)
    monkeypatch.setattr(bodies, "_MAX_HELD_BYTES", 4000)
    with serving(FakeComponents(), LISTEN) as running, ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(Raw(running, _post(GENERATIONS, b" " * 990, length=1000), "127.0.0.2"))
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=transport, base_url=running.url, timeout=60) as greedy:
            until(lambda: greedy.post(GENERATIONS, json={"prompt": "x" * 50}).status_code == 429)
        assert _generates(running)
