"""Authentication of gRPC calls, and what a call leaves in logs and metrics."""

import errno
import json
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import METHODS, message, serving, set_cost, until
from tls import certificate

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import AuthError, ConfigError
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc, triton_pb2
from flashdiff.server import calls
from flashdiff.server.app import Listen
from flashdiff.server.auth import Tokens
from flashdiff.server.client import Client, ServerError
from flashdiff.server.metrics import Metrics

ALICE, BOB = "alice-secret-0123456", "bob-secret-012345678"


def _tokens(folder: Path, text: str) -> Path:
    file = folder / "tokens"
    file.write_text(text)
    return file


def test_only_clients_with_a_token_are_admitted_and_health_checks_need_none(tmp_path: Path) -> None:
    tokens = _tokens(tmp_path, f"# who\nalice {ALICE}\n\nbob {BOB} 100\n")
    with serving(FakeComponents(), Listen(port=0, tokens=tokens)) as running:
        for token in (ALICE, BOB):
            with Client(running.address, token=token) as client:
                assert client.generate("x", timeout_s=10).images
                assert len(list(client.stream("x", steps=1, timeout_s=10))) == 2
        for bad in (None, "wrong-secret-0123456", ""):
            with Client(running.address, token=bad) as client:
                with pytest.raises(ServerError, match="UNAUTHENTICATED: send 'authorization: Bearer TOKEN'"):
                    client.generate("x", timeout_s=10)
                with pytest.raises(ServerError, match="UNAUTHENTICATED"):
                    list(client.stream("x", timeout_s=10))
        with grpc.insecure_channel(running.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert check.status == health_pb2.HealthCheckResponse.SERVING


def test_tokens_rotate_without_a_restart_and_a_broken_file_locks_no_client_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = _tokens(tmp_path, f"alice {ALICE}\n")
    tokens = Tokens(file)
    assert tokens.admit(f"Bearer {ALICE}") == "alice"
    file.write_text(f"bob {BOB}\n")
    os.utime(file, ns=(1, 1))
    assert tokens.admit(f"bearer {BOB}") == "bob"
    with pytest.raises(Exception, match="with a token that this server knows"):
        tokens.admit(f"Bearer {ALICE}")
    file.write_text("nonsense\n")
    os.utime(file, ns=(2, 2))
    assert tokens.admit(f"Bearer {BOB}") == "bob"
    assert "the tokens stay as they were" in caplog.text
    assert BOB not in caplog.text
    file.write_text(f"alice {ALICE}\n")
    os.utime(file, ns=(2, 2))  # two changes within one tick of the file system's clock
    assert tokens.admit(f"Bearer {ALICE}") == "alice"


@pytest.mark.parametrize("trouble", ["open", "gone"])
def test_a_token_is_revoked_though_the_file_could_not_be_read_when_it_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    file = _tokens(tmp_path, f"alice {ALICE}\n")
    tokens = Tokens(file)
    file.write_text(f"bob {BOB}\n")

    def no_descriptors(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        if trouble == "open":
            patch.setattr("flashdiff.reading.open_file", no_descriptors)
        else:
            file.rename(tmp_path / "away")
        for _ in range(3):
            assert tokens.admit(f"Bearer {ALICE}") == "alice"
        assert caplog.text.count("the tokens stay as they were") == 1
    if trouble == "gone":
        (tmp_path / "away").rename(file)
    with pytest.raises(AuthError):
        tokens.admit(f"Bearer {ALICE}")
    assert tokens.admit(f"Bearer {BOB}") == "bob"


def test_a_pipe_in_place_of_the_tokens_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="a pipe or device, where a file is needed"):
        Tokens(tmp_path / "pipe")


def test_a_token_has_its_rate_and_the_refusal_says_when_to_come_again(tmp_path: Path) -> None:
    tokens = _tokens(tmp_path, f"alice {ALICE} 1\n")
    with serving(FakeComponents(), Listen(port=0, tokens=tokens)) as running, grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        metadata = (("authorization", f"Bearer {ALICE}"),)
        stub.Generate(image_pb2.GenerateRequest(prompt="x"), metadata=metadata, timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(image_pb2.GenerateRequest(prompt="x"), metadata=metadata, timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata())
        assert 0 < int(trailers["grpc-retry-pushback-ms"]) <= 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no token in it"),
        ("alice\n", "line 1: write NAME TOKEN"),
        (f"\nalice {ALICE} often\n", "line 2: write NAME TOKEN"),
        (f"alice {ALICE} -1\n", "line 1: write NAME TOKEN"),
        ("alice short\n", "line 1: the token of 'alice' is shorter than 16 characters"),
    ],
)
def test_a_bad_token_file_names_the_line_and_never_the_token(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Tokens(_tokens(tmp_path, text))
    assert ALICE not in str(caught.value)


def test_a_public_address_without_authentication_must_be_said_twice() -> None:
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 admits every client: give --tokens"):
        Listen(host="0.0.0.0")
    Listen(host="0.0.0.0", no_auth=True)
    Listen(host="0.0.0.0", tokens=Path("tokens"))
    with pytest.raises(ConfigError, match="--no-auth contradicts"):
        Listen(host="0.0.0.0", tokens=Path("tokens"), no_auth=True)


def test_tls_with_a_token_and_with_client_certificates(tmp_path: Path) -> None:
    authority = certificate(tmp_path, "ca")
    for name in ("server", "client"):
        certificate(tmp_path, name, authority)
    tls = {"tls_cert": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    tokens = _tokens(tmp_path, f"alice {ALICE}\n")
    with serving(FakeComponents(), Listen(port=0, tokens=tokens, **tls)) as running:
        with Client(running.address, token=ALICE, tls_ca=tmp_path / "ca.pem") as client:
            assert client.generate("x", timeout_s=10).images
        with Client(running.address, token=ALICE) as plain, pytest.raises(ServerError, match=r"UNAVAILABLE|DEADLINE"):
            plain.generate("x", timeout_s=2)
    with serving(FakeComponents(), Listen(port=0, tls_client_ca=tmp_path / "ca.pem", **tls)) as running:
        root, chain, key = ((tmp_path / name).read_bytes() for name in ("ca.pem", "client.pem", "client.key"))
        with grpc.secure_channel(running.address, grpc.ssl_channel_credentials(root, key, chain)) as channel:
            stub = image_pb2_grpc.ImageServiceStub(channel)
            assert stub.Generate(image_pb2.GenerateRequest(prompt="x"), timeout=10).images
        with (
            Client(running.address, tls_ca=tmp_path / "ca.pem") as client,
            pytest.raises(ServerError, match=r"UNAVAILABLE|DEADLINE"),
        ):
            client.generate("x", timeout_s=2)


def test_http_has_the_same_tls_and_client_certificates(tmp_path: Path) -> None:
    authority = certificate(tmp_path, "ca")
    for name in ("server", "client"):
        certificate(tmp_path, name, authority)
    tls = {"tls_cert": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with serving(FakeComponents(), Listen(port=0, http_port=0, tls_client_ca=tmp_path / "ca.pem", **tls)) as running:
        url = running.url.replace("http:", "https:") + "/v1/models"
        with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)):
            urllib.request.urlopen(url, context=trust, timeout=10)
        trust.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        with urllib.request.urlopen(url, context=trust, timeout=10) as page:
            assert page.status == 200


def test_reflection_counts_in_the_rate_of_a_token_and_health_checks_do_not(tmp_path: Path) -> None:
    tokens = _tokens(tmp_path, f"alice {ALICE} 0.001\n")
    with serving(FakeComponents(), Listen(port=0, tokens=tokens)) as running, grpc.insecure_channel(running.address) as channel:
        for _ in range(3):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        metadata = (("authorization", f"Bearer {ALICE}"),)
        (found,) = reflection.ServerReflectionInfo(iter([listing]), metadata=metadata, timeout=10)
        assert found.list_services_response.service
        for call in (
            lambda: list(reflection.ServerReflectionInfo(iter([listing]), metadata=metadata, timeout=10)),
            lambda: image_pb2_grpc.ImageServiceStub(channel).ListModels(
                image_pb2.ListModelsRequest(), metadata=metadata, timeout=10
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_half_of_tls_and_unreadable_files_are_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="TLS needs both --tls-cert and --tls-key"),
        serving(FakeComponents(), Listen(port=0, tls_cert=tmp_path / "no.pem")),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"--tls-cert .*no\.pem: cannot read"),
        serving(FakeComponents(), Listen(port=0, tls_cert=tmp_path / "no.pem", tls_key=tmp_path / "no.key")),
    ):
        pass


def test_the_log_has_a_line_a_call_with_its_id_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flashdiff")
    with serving(FakeComponents()) as running, grpc.insecure_channel(running.address) as channel:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        stub.Generate(image_pb2.GenerateRequest(prompt="my secret wish"), metadata=(("x-request-id", "r-17"),), timeout=10)
        forged = (("x-request-id", "1 forged code=OK"),)
        with pytest.raises(grpc.RpcError):
            stub.Generate(image_pb2.GenerateRequest(prompt="my secret wish", steps=99), metadata=forged, timeout=10)
    lines = [line for line in caplog.messages if line.startswith("call ")]
    assert "id=r-17" in lines[0]
    assert "forged" not in lines[1]
    assert "code=OK" in lines[0]
    assert "code=INVALID_ARGUMENT" in lines[1]
    assert "secret" not in caplog.text


def test_a_stream_whose_next_message_is_refused_answers_those_before_and_ends_with_the_refusals_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokens, method = _tokens(tmp_path, f"alice {ALICE} 0.001\n"), METHODS[3]
    with serving(FakeComponents(), Listen(port=0, tokens=tokens)) as running, grpc.insecure_channel(running.address) as channel:
        call = channel.stream_stream(f"/{method}", response_deserializer=triton_pb2.ModelStreamInferResponse.FromString)
        answers = call(iter([message(method)] * 3), metadata=(("authorization", f"Bearer {ALICE}"),), timeout=10)
        assert not next(answers).error_message
        with pytest.raises(grpc.RpcError, match=r"'alice' may call 0\.001 times a second"):
            list(answers)
        assert answers.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        until(lambda: any(line.startswith("call ") for line in caplog.messages))
    assert f"method=/{method}" in caplog.text
    assert "code=RESOURCE_EXHAUSTED" in caplog.text
    assert "raised by servicer" not in caplog.text


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(calls, "_tracer", provider.get_tracer("flashdiff.server"))
    return exporter


@pytest.mark.parametrize("method", METHODS)
def test_a_span_belongs_to_the_callers_trace_and_says_where_the_time_went(spans: InMemorySpanExporter, method: str) -> None:
    with serving(FakeComponents()) as running, grpc.insecure_channel(running.address) as channel:
        parent = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        list(channel.stream_stream(f"/{method}")(iter([message(method)]), metadata=(parent,), timeout=10))
    (span,) = spans.get_finished_spans()
    assert span.name == method
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.attributes is not None
    assert {"denoise_ms", "queue_ms", "model", "request_id"} <= set(span.attributes)


@pytest.mark.parametrize("method", METHODS[:3])  # in the fourth an error is an answer
def test_the_span_of_a_failed_call_has_its_code_and_no_prompt(spans: InMemorySpanExporter, method: str) -> None:
    with serving(FakeComponents()) as running, grpc.insecure_channel(running.address) as channel:
        call = channel.stream_stream(f"/{method}")(iter([message(method, "my secret wish " * 99)]), timeout=10)
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
        until(lambda: bool(spans.get_finished_spans()))
    (span,) = spans.get_finished_spans()
    assert "secret" not in span.to_json()
    assert (span.status.is_ok, span.status.description) == (False, "INVALID_ARGUMENT")


def test_metrics_tell_of_batches_times_and_refusals() -> None:
    with serving(FakeComponents(), Listen(port=0, metrics_port=0)) as running, Client(running.address) as client:
        client.generate("x", steps=3, timeout_s=10)
        set_cost(running.server.models.get(), "denoiser", 5000.0)
        with pytest.raises(ServerError):
            client.generate("x", timeout_s=1)
        lines = set[str]()

        def refusal_is_counted() -> bool:  # half a second later
            with urllib.request.urlopen(f"http://127.0.0.1:{running.server.metrics_port}/metrics", timeout=10) as page:
                lines.clear()
                lines.update(page.read().decode().splitlines())
            return 'flashdiff_refusals_total{cause="deadline"} 1.0' in lines

        until(refusal_is_counted)
    assert 'flashdiff_batch_slots_count{model="fake",part="denoiser"} 3.0' in lines
    assert 'flashdiff_requests_total{model="fake",outcome="ok"} 1.0' in lines
    assert "flashdiff_pending_images 0.0" in lines
    for code in ("OK", "DEADLINE_EXCEEDED"):
        assert f'flashdiff_calls_total{{code="{code}",method="/flashdiff.v1.ImageService/Generate"}} 1.0' in lines


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"flashdiff_\w+", t["expr"])}
    ends = ("", "_total", "_bucket", "_sum", "_count")
    exported = {f"{metric.name}{end}" for metric in Metrics().registry.collect() for end in ends}
    assert asked
    assert asked <= exported
