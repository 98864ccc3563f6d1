"""A server with several devices, as its clients and its operators see it."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest
from served import MODEL, Running, intercept, serving, until

from flashdiff import cli
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BackendError, OverloadedError
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server import models as models_module
from flashdiff.server.app import Listen
from flashdiff.server.client import Client, Preview, ServerError
from flashdiff.server.fleet import Fleet
from flashdiff.server.models import Model, Models
from flashdiff.server.worker import Worker

DEVICES = (Device(name="fake:0"), Device(name="fake:1"))


def _model(fakes: list[FakeComponents]) -> Model:
    others = [Model(MODEL, fake, fake.costs, device) for fake, device in zip(fakes[1:], DEVICES[1:], strict=True)]
    return Model(MODEL, fakes[0], fakes[0].costs, DEVICES[0], others)


@pytest.fixture
def fakes() -> list[FakeComponents]:
    return [FakeComponents() for _ in DEVICES]


@pytest.fixture
def running(fakes: list[FakeComponents]) -> Iterator[Running]:
    models = Models({"fake": _model(fakes)}, devices=DEVICES)
    with serving(fakes[0], Listen(port=0), models) as running:
        yield running


def _metrics(running: Running) -> set[str]:
    running.server._metrics.count()
    return set(generate_latest(running.server._metrics.registry).decode().splitlines())


def _devices(running: Running) -> dict[str, str]:
    with grpc.insecure_channel(running.address) as channel:
        (model,) = image_pb2_grpc.ImageServiceStub(channel).ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    return {device.name: device.failure for device in model.devices}


def test_one_device_has_no_fleet_in_front_of_it_and_several_have() -> None:
    with serving(FakeComponents()) as running:
        assert type(running.server.worker) is Worker
        assert _devices(running) == {}
    fake = FakeComponents()
    named = Models({"fake": Model(MODEL, fake, fake.costs, DEVICES[0])}, devices=DEVICES[:1])
    with serving(fake, models=named) as running, Client(running.address) as client:
        assert type(running.server.worker) is Worker
        client.generate("x", timeout_s=60)
        assert _devices(running) == {"fake:0": ""}
        until(lambda: 'flashdiff_requests_total{device="fake:0",model="fake",outcome="ok"} 1.0' in _metrics(running))


def test_a_lost_device_shows_in_metrics_logs_and_models_while_the_server_serves(
    fakes: list[FakeComponents], running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flashdiff")
    assert type(running.server.worker) is Fleet
    assert _devices(running) == {"fake:0": "", "fake:1": ""}
    intercept(fakes[0], "denoiser", lambda call, inputs: 1 / 0)
    with Client(running.address) as client:
        first = client.generate("x", seed=1, timeout_s=60)  # moved
        until(lambda: 'flashdiff_moved_requests_total{device="fake:0"} 1.0' in _metrics(running))
        assert client.generate("x", seed=1, timeout_s=60).images == first.images
    until(lambda: "device fake:0 is out: division by zero; 1 of 2 are left" in caplog.text)
    assert re.search(r"call method=/flashdiff.v1.ImageService/Generate .* code=OK ms=\S+ model=fake device=fake:1", caplog.text)
    assert _devices(running) == {"fake:0": "division by zero", "fake:1": ""}
    lines = _metrics(running)
    assert {'flashdiff_device_up{device="fake:0"} 0.0', 'flashdiff_device_up{device="fake:1"} 1.0'} <= lines
    assert 'flashdiff_requests_total{device="fake:1",model="fake",outcome="ok"} 2.0' in lines
    assert 'flashdiff_pending_images{device="fake:1"} 0.0' in lines
    with grpc.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert running.server.models.devices == DEVICES[1:]


def test_a_stream_whose_previews_were_sent_is_failed_and_gets_each_preview_once(
    fakes: list[FakeComponents], running: Running
) -> None:
    calls = 0

    def fail_third(call, inputs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return call(inputs) if calls < 3 else 1 / 0

    intercept(fakes[0], "denoiser", fail_third)
    seen = []
    with Client(running.address) as client:
        with pytest.raises(ServerError, match="the device thread has stopped"):
            seen.extend(client.stream("x", steps=4, timeout_s=60))
        whole = list(client.stream("x", steps=4, timeout_s=60))
    assert len(whole) == 5
    assert [update.step for update in whole if isinstance(update, Preview)] == [1, 2, 3, 4]
    assert calls == 3


def _repository(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text("a")
    return tmp_path


def test_a_load_that_fails_on_one_device_is_a_failed_load(tmp_path: Path) -> None:
    def open_second(folder: Path) -> Model:
        raise BackendError("cuda:1 has no room")

    models = Models({}, _repository(tmp_path), opener=open_second, identify=lambda folder: "a", devices=DEVICES)
    with pytest.raises(BackendError, match="cuda:1 has no room"):
        models.load("a")
    assert models.served == {}


def test_loading_needs_memory_for_every_core_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = [FakeComponents(), FakeComponents()]
    folder = _repository(tmp_path)
    (folder / "a" / "weights").write_bytes(bytes(1000))  # and one more in the manifest
    options = {"opener": lambda folder: _model(fakes), "identify": lambda folder: "a"}
    monkeypatch.setattr(models_module, "_free_memory", lambda: 4003)
    with pytest.raises(OverloadedError):
        Models({}, folder, devices=DEVICES, **options).load("a")
    monkeypatch.setattr(models_module, "_free_memory", lambda: 4004)
    Models({}, folder, devices=DEVICES, **options).load("a")
    monkeypatch.setattr(models_module, "_free_memory", lambda: 2002)
    Models({}, folder, devices=[Device(name=f"cuda:{gpu}", gpu=gpu) for gpu in range(2)], **options).load("a")


@pytest.mark.parametrize(
    ("device", "problem"), [("cpu:0,cpu:0-1", "core 0 is in both cpu:0 and cpu:0-1"), ("cpu:99999", "there is no core 99999")]
)
def test_the_command_refuses_devices_in_one_line_before_it_opens_anything(
    device: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--repository", str(tmp_path), "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flashdiff: error: --device {device}: {problem}")
    assert error.count("\n") == 1
