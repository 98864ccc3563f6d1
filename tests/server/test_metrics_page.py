"""The metrics port, as Prometheus and as others use it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from served import model_of

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server import metrics_page
from flashdiff.server.metrics import Metrics
from flashdiff.server.metrics_page import MetricsPage
from flashdiff.server.models import Models


async def _ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


@asynccontextmanager
async def _listening() -> AsyncIterator[int]:
    """The port of a page of one counter."""
    registry = CollectorRegistry()
    Counter("things", "Things", registry=registry).inc()
    page = MetricsPage(registry)
    yield await page.listen("127.0.0.1", 0)
    page.close()


def test_a_scrape_gets_the_metrics() -> None:
    async def scenario() -> None:
        async with _listening() as port:
            answer = await _ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert f"Content-Length: {len(body)}".encode() in head
            assert b"things_total 1.0" in body
            assert b"things_total" not in await _ask(port, b"GET /metrics?name[]=none HTTP/1.1\r\n\r\n")
            assert b"Content-Encoding: gzip" in await _ask(port, b"GET / HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n")
            assert (await _ask(port, b"HEAD / HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "garbage", [b"nonsense\r\n\r\n", b"\r\n\r\n", b"\x16\x03\x01" + bytes(99_000), b"GET / HTTP/1.1\r\n" * 5000]
)
def test_what_is_no_request_ends_the_connection(garbage: bytes) -> None:
    async def scenario() -> None:
        async with _listening() as port:
            with suppress(ConnectionError):  # closed while we still sent
                assert await _ask(port, garbage) == b""
            assert b"200 OK" in await _ask(port, b"GET / HTTP/1.1\r\n\r\n")

    asyncio.run(scenario())


def test_connections_that_say_nothing_take_no_thread_and_make_room_for_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page, "_WHOLE_S", 3600.0)  # time alone must not decide it

    async def scenario() -> None:
        async with _listening() as port:
            threads = threading.active_count()
            with ExitStack() as stack:
                silent = []
                for _ in range(200):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    stack.callback(writer.close)
                    writer.write(b"GET /")
                    silent.append(reader)
                assert threading.active_count() <= threads
                assert b"200 OK" in await _ask(port, b"GET / HTTP/1.1\r\n\r\n")
                assert await silent[0].read() == b""

    asyncio.run(scenario())


def test_a_request_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page, "_WHOLE_S", 0.05)

    async def scenario() -> None:
        async with _listening() as port:
            assert await _ask(port, b"GET / HTTP/1.1\r\n") == b""

    asyncio.run(scenario())


def test_the_process_the_build_the_models_and_the_devices_time_are_there() -> None:
    metrics = Metrics()
    metrics.watch_models(Models({"latest": model_of(FakeComponents())}))
    metrics.of_device().called("fake", "denoiser", 4, 250.0, 200.0)
    metrics.count()
    page = generate_latest(metrics.registry).decode()
    assert "process_resident_memory_bytes " in page
    assert 'flashdiff_build_info{python="' in page
    assert (
        f'flashdiff_model_info{{backend="fake",bundle_hash="{"0" * 64}",model="fake",name="latest",precision="fp32"}} 1.0' in page
    )
    assert "flashdiff_busy_seconds_total 0.25" in page
