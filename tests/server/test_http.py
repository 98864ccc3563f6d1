"""What every HTTP request passes: authentication, logs and metrics, and how the server starts, drains and stops."""

import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import FakeComponents, Gate, Running, model_of, serving, until

from flashdiff.errors import ConfigError
from flashdiff.server import calls
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.models import Models

ALICE = "alice-secret-0123456"
GENERATIONS = "/v1/images/generations"
LISTEN = Listen(port=0, http_port=0)


def _ask(running: Running, body: dict[str, object] | None = None, **headers: str) -> httpx.Response:
    return httpx.post(f"{running.url}{GENERATIONS}", json=body or {"prompt": "x"}, headers=headers, timeout=60)


def test_a_token_is_needed_as_over_grpc_but_not_for_health_checks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flashdiff")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {ALICE}\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tokens)) as running:
        assert _ask(running, authorization=f"Bearer {ALICE}").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong-secret-0123456"}, {"authorization": ALICE}):
            refused = _ask(running, **headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/v2", "/v2/models/fake", "/metrics"):
                assert httpx.get(running.url + path, headers=headers).status_code == 401
        for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/openapi.json"):
            assert httpx.get(running.url + path).status_code == 200
    assert "client=alice code=200" in caplog.text
    assert ALICE not in caplog.text


def test_a_token_has_one_rate_for_both_protocols(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {ALICE} 0.001\n")
    with serving(FakeComponents(), Listen(port=0, http_port=0, tokens=tokens)) as running:
        with Client(running.address, token=ALICE) as client:
            client.generate("x", timeout_s=10)
        refused = _ask(running, authorization=f"Bearer {ALICE}")
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 0 < int(refused.headers["retry-after-ms"]) <= 1_000_000
    assert int(refused.headers["retry-after"]) >= int(refused.headers["retry-after-ms"]) / 1000


def test_the_log_has_a_line_a_request_with_its_id_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(FakeComponents(), LISTEN) as running:
        answer = _ask(running, {"prompt": "my secret wish"}, **{"x-request-id": "r-17"})
        assert answer.headers["x-request-id"] == "r-17"
        forged = _ask(running, {"prompt": "my secret wish", "steps": 99}, **{"x-request-id": "1 forged code=200"})
        assert len(forged.headers["x-request-id"]) == 16
        httpx.get(f"{running.url}/my-secret-path")
        httpx.get(f"{running.url}/health/live")
        until(lambda: len(_lines(caplog)) == 3)
    first, second, third = _lines(caplog)
    assert first.startswith(f"call method={GENERATIONS} id=r-17 client=127.0.0.1 code=200 ms=")
    assert "code=400" in second
    assert third.startswith("call method=unmatched ")
    assert "code=404" in third
    for hidden in ("secret", "forged", "uvicorn", "Started server"):
        assert hidden not in "".join(record.getMessage() for record in caplog.records if record.name != "httpx2")


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("call ")]


def test_a_span_belongs_to_the_callers_trace_and_a_failed_one_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(calls, "_tracer", provider.get_tracer("flashdiff.server"))
    with serving(FakeComponents(), LISTEN) as running:
        _ask(running, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        _ask(running, {"prompt": "my secret wish", "steps": 99})
        until(lambda: len(exporter.get_finished_spans()) == 2)
    good, bad = exporter.get_finished_spans()
    assert good.name == "v1/images/generations"
    assert f"{good.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert {"denoise_ms", "queue_ms", "model", "request_id"} <= set(good.attributes or {})
    assert (bad.status.is_ok, bad.status.description) == (False, "400")
    assert "secret" not in bad.to_json()


def test_metrics_count_by_route_and_status() -> None:
    with serving(FakeComponents(), LISTEN) as running:
        _ask(running)
        _ask(running, {"prompt": ""})
        httpx.get(f"{running.url}/any/path")
        httpx.get(f"{running.url}/v1/models/fake")

        def lines() -> set[str]:
            return set(httpx.get(f"{running.url}/metrics").text.splitlines())

        for method, code in (
            (GENERATIONS, 200),
            (GENERATIONS, 400),
            ("unmatched", 404),
            ("/v1/models/{name:path}", 200),
        ):
            line = f'flashdiff_calls_total{{code="{code}",method="{method}"}} 1.0'
            until(lambda line=line: line in lines())  # type: ignore[misc]
        assert 'flashdiff_requests_total{model="fake",outcome="ok"} 1.0' in lines()


def test_stopping_answers_what_was_accepted_and_refuses_the_rest() -> None:
    with serving(FakeComponents(), LISTEN) as running, ThreadPoolExecutor(2) as threads:
        gate = Gate(running.fake)
        accepted = threads.submit(_ask, running)
        assert gate.entered.wait(600)
        stopping = threads.submit(running.stop)
        until(lambda: not running.server.worker.is_ready)
        refused = _ask(running)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        assert httpx.get(f"{running.url}/health/ready").status_code == 503
        gate.open()
        assert accepted.result(600).status_code == 200
        stopping.result(600)
        with pytest.raises(httpx.ConnectError):
            _ask(running)


def test_stopping_cuts_off_what_takes_longer_than_the_grace() -> None:
    with serving(FakeComponents(), LISTEN) as running, ThreadPoolExecutor(1) as threads:
        gate = Gate(running.fake)
        asking = threads.submit(_ask, running)
        assert gate.entered.wait(600)
        running.stop(grace_s=0)
        gate.open()
        assert asking.exception(60) or asking.result().status_code >= 500


def test_an_answered_request_leaves_nothing_behind() -> None:
    with serving(FakeComponents(), LISTEN) as running:
        _ask(running)
        _ask(running, {"prompt": "x", "stream": True, "partial_images": 2})
        until(lambda: not running.server.worker.has_unsent and not running.server.worker.pending_images)


def test_a_port_in_use_and_an_alias_of_nothing_are_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .* choose another with --http-port"),
            serving(FakeComponents(), Listen(port=0, http_port=port)),
        ):
            pass
    for alias, message in (
        (("a", "none"), "there is no model 'none', but fake"),
        (("fake", "fake"), "a model has that name already"),
    ):
        with (
            pytest.raises(ConfigError, match=message),
            serving(FakeComponents(), Listen(port=0, http_port=0, aliases=(alias,))),
        ):
            pass


def test_the_openapi_document_lists_every_route_and_field() -> None:
    with serving(FakeComponents(), LISTEN) as running:
        document = httpx.get(f"{running.url}/openapi.json").json()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert operation["summary"], path
                answer = httpx.request(method, running.url + path.replace("{name}", "none").replace("{version}", "1"))
                assert answer.status_code != 405
                assert answer.json()["error"] if answer.status_code == 404 else True
        schema = document["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"prompt", "seed", "strength", "partial_images"} <= set(schema["properties"])
        assert schema["properties"]["strength"] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        assert schema["properties"]["upscale"] == {"type": "number", "minimum": 1, "maximum": 8}
        # Of any base: a schedule has at most so many levels.
        assert schema["properties"]["noise_level"] == {"type": "integer", "minimum": 0, "maximum": 99_999}


def test_two_models_answer_to_their_names() -> None:
    fake = FakeComponents()
    with serving(fake, LISTEN, Models({"one": model_of(fake), "two": model_of(fake)})) as running:
        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["one", "two"]
        assert listed[0]["flashdiff"]["sizes"] == ["64x64", "128x64"]
