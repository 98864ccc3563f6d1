"""What no client should send over HTTP, and what web pages may not: the right status in OpenAI's form, and no traceback."""

import json
import random
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from served import FakeComponents, Running, serving, until

from flashdiff.errors import ConfigError
from flashdiff.server.app import Listen
from flashdiff.server.http import bodies, listener
from flashdiff.server.http.errors import HttpError
from flashdiff.server.http.origins import Origins
from flashdiff.server.images import encode_image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"content-type": "application/json"}
FRIEND = "https://friend.example"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeComponents(), Listen(port=0, http_port=0, allowed_origins=(FRIEND,))) as running:
        yield running


@pytest.fixture
def running(server: Running, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    """The server, which must still serve afterwards, and must have logged no traceback."""
    yield server
    assert httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": "x"}).status_code == 200
    assert server.server.worker.failure is None
    assert "Traceback" not in caplog.text


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def _refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of a refusal in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert response.headers["x-request-id"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "model": "\ud800"}, "model"),
        ({"prompt": "x", "\udc00": 1}, r"\udc00"),
        ({"prompt": "x", "model": 1}, "model"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 17}, "n"),
        ({"prompt": "x", "n": "1"}, "n"),
        ({"prompt": "x", "n": True}, "n"),
        ({"prompt": "x", "size": "1024x1024"}, "size"),
        ({"prompt": "x", "size": "big"}, "size"),
        ({"prompt": "x", "response_format": "url"}, "response_format"),
        ({"prompt": "x", "background": "transparent"}, "background"),
        ({"prompt": "x", "output_format": "gif"}, "output_format"),
        ({"prompt": "x", "output_compression": 101}, "output_compression"),
        ({"prompt": "x", "partial_images": 4}, "partial_images"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "x", "steps": 99}, "steps"),
        ({"prompt": "x", "steps": 2, "num_inference_steps": 3}, "num_inference_steps"),
        ({"prompt": "x", "negative_prompt": "y"}, "negative_prompt"),
        ({"prompt": "x", "strength": 0.5}, "strength"),
        ({"prompt": "x", "priority": "urgent"}, "priority"),
        ({"prompt": "x", "image": "data:"}, "image"),
        ({"prompt": "x", "svg": {}}, "svg"),
        ({"prompt": "x", "guidance_scale": 7}, "guidance_scale"),
    ],
)
def test_a_field_that_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = client.post(GENERATIONS, content=json.dumps({"stream": stream, **fields}), headers=JSON)
        assert param in _refused(response, 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": NaN}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"prompt=x",
        b'{"prompt": "\xed\xa0\x80"}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(client: httpx.Client, body: bytes) -> None:
    assert "JSON" in _refused(client.post(GENERATIONS, content=body, headers=JSON), 400)


def test_a_wrong_content_type_or_encoding_method_or_path_is_refused(client: httpx.Client) -> None:
    body = b'{"prompt": "x"}'
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = client.post(GENERATIONS, content=body, headers={"content-type": content_type})
        assert "send application/json" in _refused(response, 415)
    assert "send multipart/form-data" in _refused(client.post(EDITS, content=body, headers=JSON), 415)
    assert "gzip" in _refused(client.post(GENERATIONS, content=body, headers={**JSON, "content-encoding": "gzip"}), 415)
    _refused(client.get(GENERATIONS), 405)
    _refused(client.post("/v1/images/variations", content=body, headers=JSON), 404)
    _refused(client.get("/v1/../../etc/passwd"), 404)
    _refused(client.get("/v1/models/"), 404)


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "", "9" * 99, "\u0661"])
def test_a_timeout_that_is_none_is_refused(client: httpx.Client, given: str) -> None:
    headers = {"x-request-timeout-ms": given.encode()}
    _refused(client.post(GENERATIONS, json={"prompt": "x"}, headers=headers), 400, "x-request-timeout-ms")


def _part(name: str, data: bytes, filename: str | None = None) -> bytes:
    said = f'; filename="{filename}"' if filename is not None else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{said}\r\n\r\n'.encode() + data + b"\r\n"


PNG = encode_image(np.zeros((64, 64, 3), dtype=np.uint8), "png")
IMAGE, PROMPT, END = _part("image", PNG, "a.png"), _part("prompt", b"x"), b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"x" * 1000, None),
        (IMAGE + PROMPT, None),
        (_part("", b"x") + END, None),
        (PROMPT * 100 + END, None),
        (b"--b\r\n" + b"a: b\r\n" * 1000 + b"\r\n\r\n" + END, None),
        (b"--b\r\n" + b"a" * 100_000 + b": b\r\n\r\n\r\n" + END, None),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, None),
        (PROMPT + END, "image"),
        (IMAGE + END, "prompt"),
        (IMAGE + PROMPT + PROMPT + END, "prompt"),
        (IMAGE + IMAGE + PROMPT + END, "image"),
        (IMAGE + _part("prompt", b"\xff") + END, "prompt"),
        (IMAGE + PROMPT + _part("n", b"two") + END, "n"),
        (IMAGE + PROMPT + _part("stream", b"maybe") + END, "stream"),
        (IMAGE + PROMPT + _part("strength", b"nan") + END, "strength"),
        (IMAGE + PROMPT + _part("unknown", b"x") + END, "unknown"),
        (IMAGE + PROMPT + _part("mask", PNG, "m.png") + END, "mask"),
        (IMAGE + PROMPT + _part("other", PNG, "o.png") + END, "other"),
        (PROMPT + _part("image", PNG) + END, "image"),
        (PROMPT + _part("image", b"", "a.png") + END, "image"),
        (PROMPT + _part("image", PNG[:50], "a.png") + END, "image"),
        (PROMPT + _part("image", b"GIF89a" + bytes(100), "a.gif") + END, "image"),
    ],
)
def test_a_form_that_is_wrong_is_refused(client: httpx.Client, body: bytes, param: str | None) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    _refused(client.post(EDITS, content=body, headers=headers), 400, param)


def test_a_form_without_a_boundary_is_refused(client: httpx.Client) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'b' * 5000}"):
        _refused(client.post(EDITS, content=PROMPT + END, headers={"content-type": content_type}), 400)


@pytest.mark.parametrize("path", [GENERATIONS, EDITS, "/v2/models/fake/infer"])
@pytest.mark.parametrize("has_length", [True, False])
def test_an_upload_of_100_megabytes_is_refused(client: httpx.Client, path: str, has_length: bool) -> None:
    chunk = bytes(1_000_000)
    content = bytes(100_000_000) if has_length else (chunk for _ in range(100))
    try:
        response = client.post(path, content=content, headers={"content-type": "multipart/form-data; boundary=b"})
    except httpx.WriteError:  # refused and closed before all was sent
        return
    if path.startswith("/v2"):
        assert (response.status_code, list(response.json())) == (413, ["error"])
    else:
        assert "MiB" in _refused(response, 413)


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_body_that_does_not_arrive_is_given_up(running: Running, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(bodies, "READ_S", 0.05)
    with socket.create_connection(("127.0.0.1", running.server.http_port or 0)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"prompt":')
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # to the end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"type":"invalid_request_error"' in answer


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("begun", [b"", b"GET /v1/models HTTP/1.1\r\nHost: 127"])
def test_a_connection_whose_headers_do_not_arrive_is_closed(
    running: Running, monkeypatch: pytest.MonkeyPatch, begun: bytes, is_first: bool
) -> None:
    monkeypatch.setattr(listener, "HEADERS_S", 0.05)
    with socket.create_connection(("127.0.0.1", running.server.http_port or 0)) as connection:
        if not is_first:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            begun = begun or b"\r"
        connection.sendall(begun)
        while connection.recv(65536):
            pass


def test_bodies_together_are_bounded(running: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_MAX_HELD_BYTES", 1000)
    with socket.create_connection(("127.0.0.1", running.server.http_port or 0)) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b" " * 990)
        body = json.dumps({"prompt": "x"}).encode()
        until(lambda: client.post(GENERATIONS, content=body, headers=JSON).status_code == 429)
    until(lambda: client.post(GENERATIONS, content=body, headers=JSON).status_code == 200)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8000"}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "[::1"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ({"origin": FRIEND}, 200),
        ({"host": "friend.example", "origin": FRIEND}, 200),
    ],
)
@pytest.mark.parametrize("path", [GENERATIONS, "/v2/repository/models/fake/unload", "/metrics", "/"])
def test_only_its_own_pages_and_allowed_ones_use_a_loopback_server(
    client: httpx.Client, headers: dict[str, str], status: int, path: str
) -> None:
    if path == GENERATIONS:
        response = client.post(path, json={"prompt": "x"}, headers=headers)
        assert response.status_code == status
        if status == 403:
            assert "see --allow-origin" in _refused(response, 403)
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == (FRIEND if headers.get("origin") == FRIEND else None)
    else:
        response = client.get(path, headers=headers) if path in ("/metrics", "/") else client.post(path, headers=headers)
        assert (response.status_code == 403) == (status == 403)


def test_a_browser_may_ask_first_for_an_allowed_page(client: httpx.Client) -> None:
    headers = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = client.options(GENERATIONS, headers={**headers, "origin": FRIEND})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, FRIEND)
    assert allowed.headers["access-control-allow-headers"] == "authorization"
    assert client.options(GENERATIONS, headers={**headers, "origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("allowed", "sent"),
    [("https://X.example:443", "https://x.example"), ("http://x:80", "http://x"), ("http://x:443", "http://x:443")],
)
def test_an_allowed_origin_may_name_the_port_that_its_scheme_has(allowed: str, sent: str) -> None:
    Origins("0.0.0.0", [allowed]).check({"host": "server", "origin": sent})
    with pytest.raises(HttpError, match="may not use this server"):
        Origins("0.0.0.0", [allowed]).check({"host": "server", "origin": f"{sent}8"})


def test_an_origin_that_is_none_is_said() -> None:
    for origin in (
        "friend.example",
        "http://[x",
        "https://*.example",
        "https://x:port",
        "https://x:0",
        "https://x/",
        "https://a@x",
    ):
        with pytest.raises(ConfigError, match=rf"--allow-origin {re.escape(origin)}: give scheme://host"):
            Listen(http_port=0, allowed_origins=(origin,))
    with pytest.raises(ConfigError, match="give --http-port"):
        Listen(allowed_origins=(FRIEND,))


@pytest.mark.parametrize(
    "garbage", [random.Random(0).randbytes(10_000), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01" + bytes(500)]
)
def test_garbage_on_the_port_is_closed(running: Running, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.server.http_port or 0)) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass


def test_any_bytes_for_a_body_are_answered_with_a_status(client: httpx.Client) -> None:
    rng, statuses = random.Random(0), set()
    good = json.dumps({"prompt": "x", "n": 1, "size": "64x64", "seed": 7, "steps": 2, "stream": False}).encode()
    form = IMAGE + PROMPT + _part("steps", b"2") + END
    for number in range(200):
        data = bytearray(good if number % 2 else form)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path, content_type = (GENERATIONS, "application/json") if number % 2 else (EDITS, "multipart/form-data; boundary=b")
        statuses.add(client.post(path, content=bytes(data), headers={"content-type": content_type}).status_code)
    assert statuses <= {200, 400, 404}
    assert {200, 400} <= statuses


def test_many_at_once_are_all_answered(running: Running) -> None:
    answers = list[int]()

    def ask() -> None:
        answers.append(httpx.post(f"{running.url}{GENERATIONS}", json={"prompt": "x"}, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {200}
