"""What balancers and probes learn of a server: by gRPC's health service, and by the plain port."""

import asyncio
import threading
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import MODEL, Gate, Running, model_of, serving, until

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.health import Health
from flashdiff.server.models import Models

_Status = health_pb2.HealthCheckResponse


def _check(channel: grpc.Channel, name: str) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status


def _probe(running: Running, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{running.server.metrics_port}{path}", timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_health_is_by_the_names_of_the_models() -> None:
    fake = FakeComponents()
    models = Models({"fake": model_of(fake)})
    with serving(fake, models=models) as running, grpc.insecure_channel(running.address) as channel:
        assert _check(channel, "fake") == _Status.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            _check(channel, "later")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="later"), timeout=60)
        assert next(watching).status == _Status.SERVICE_UNKNOWN
        models._served = {**models._served, "later": model_of(fake)}
        assert next(watching).status == _Status.SERVING
        assert _check(channel, "later") == _Status.SERVING


def test_it_has_every_method_of_the_protocol_that_is_installed(running: Running) -> None:
    """Later versions of grpcio-health-checking have a List, and register it."""
    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    assert all(callable(getattr(Health, method.name, None)) for method in service.methods)
    if hasattr(health_pb2, "HealthListRequest"):
        with grpc.insecure_channel(running.address) as channel:
            listed = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=10)
        assert listed.statuses["fake"].status == _Status.SERVING


def test_a_watcher_that_leaves_takes_no_other_along(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
        staying, leaving = stub.Watch(request, timeout=60), stub.Watch(request, timeout=60)
        assert next(staying).status == next(leaving).status == _Status.SERVING
        leaving.cancel()
        running.loop.call_soon_threadsafe(running.server.leave)
        assert next(staying).status == _Status.NOT_SERVING


def test_a_draining_server_is_alive_but_not_ready_and_still_answers() -> None:
    listen = Listen(port=0, metrics_port=0, http_port=0)
    with serving(FakeComponents(), listen) as running, Client(running.address) as client:
        assert (_probe(running, "/healthz"), _probe(running, "/readyz")) == (200, 200)

        async def leave() -> None:
            running.server.leave()

        asyncio.run_coroutine_threadsafe(leave(), running.loop).result(600)
        assert (_probe(running, "/healthz"), _probe(running, "/readyz")) == (200, 503)
        assert client.generate("x", timeout_s=30).images
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{running.url}/health/ready", timeout=10)
        with grpc.insecure_channel(running.address) as channel:
            assert _check(channel, "") == _check(channel, MODEL.name) == _Status.NOT_SERVING


def test_other_paths_of_the_plain_port_are_404() -> None:
    with serving(FakeComponents(), Listen(port=0, metrics_port=0)) as running:
        assert _probe(running, "/metrics") == 200
        assert [_probe(running, path) for path in ("/admin", "/healthz/", "/metrics/x")] == [404, 404, 404]


def test_a_connection_of_the_age_is_closed_and_its_calls_end_well() -> None:
    fake, states = FakeComponents(), list[grpc.ChannelConnectivity]()
    with serving(fake, Listen(port=0, max_connection_age_s=1.0)) as running, grpc.insecure_channel(running.address) as channel:
        note, before = states.append, {*threading.enumerate()}
        channel.subscribe(note)
        stub = image_pb2_grpc.ImageServiceStub(channel)
        held = Gate(fake)
        call = stub.Generate.future(image_pb2.GenerateRequest(prompt="x"), timeout=60)
        assert held.entered.wait(600)
        ready, idle = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE
        until(lambda: ready in states and idle in states[states.index(ready) :])  # the server has closed the connection
        held.open()
        assert call.result(600).images
        assert stub.Generate(image_pb2.GenerateRequest(prompt="y"), timeout=60).images
        channel.unsubscribe(note)
        for thread in {*threading.enumerate()} - before:
            if thread.name.endswith("(_run)"):  # grpcio's, which fail when the channel closes before they have ended
                thread.join(600)
