"""The embedded student on two core sets of this machine, over gRPC: one of them fails under load."""

import io
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from served import Running, serving, until

from flashdiff.engines.build import BuildOptions, build_engine
from flashdiff.engines.runtime.device import parse_devices
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.generate import generate
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.models import Models
from flashdiff.server.opening import open_models
from flashdiff.tasks import check_order

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two core sets need two cores"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "student"
    build_engine(BuildOptions(base="avatars", loras=(("avatars-flash", 1.0),), out=out, batch_sizes=(1, 4)), print)
    return out


@pytest.fixture
def models(bundle: Path) -> Models:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    return open_models([bundle], bundle.parent, parse_devices(f"cpu:{first},cpu:{second}"))


@pytest.fixture
def running(models: Models) -> Iterator[Running]:
    with serving(FakeComponents(), Listen(port=0, metrics_port=0), models) as running:
        yield running


def _metric(running: Running, name: str) -> dict[str, float]:
    """A metric's values by device, summed over other labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.server.metrics_port}/metrics", timeout=10) as page:
        lines = page.read().decode()
    values: Counter[str] = Counter()
    for device, value in re.findall(rf'^{name}\{{.*?device="([^"]*)".*?\}} (\S+)$', lines, re.MULTILINE):
        values[device] += float(value)
    return values


def test_one_of_two_core_sets_fails_under_load_and_every_request_is_answered_once(
    bundle: Path, models: Models, running: Running
) -> None:
    names = [device.name for device in models.devices]
    asked = [{"prompt": f"a red robot with {number} antennas", "seed": number, "steps": 1 + number % 4} for number in range(40)]
    broken = models.get().on(models.devices[1])
    assert broken
    calls, call = 0, broken.components.call

    def failing(part: str, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise RuntimeError("the device is gone, as asked")
        return call(part, inputs)

    broken.components.call = failing  # type: ignore[method-assign]
    with Client(running.address) as client, ThreadPoolExecutor(16) as clients:
        results = list(clients.map(lambda request: client.generate(**request, timeout_s=300), asked))
    engine = open_bundle(bundle)
    for request, result in zip(asked, results, strict=True):
        (wanted,) = generate(engine, [check_order(engine.spec, **request)])[0]
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(result.images[0]))), wanted)

    until(lambda: sum(_metric(running, "flashdiff_requests_total").values()) == len(asked))
    assert set(_metric(running, "flashdiff_requests_total")) == set(names)  # both served
    assert _metric(running, "flashdiff_device_up") == {names[0]: 1.0, names[1]: 0.0}
    assert _metric(running, "flashdiff_moved_requests_total")[names[1]] >= 1
    assert _metric(running, "flashdiff_pending_images") == dict.fromkeys(names, 0.0)
    with insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        (served,) = image_pb2_grpc.ImageServiceStub(channel).ListModels(image_pb2.ListModelsRequest(), timeout=10).models
    assert [(device.name, bool(device.failure)) for device in served.devices] == [(names[0], False), (names[1], True)]


def test_a_bundle_loads_on_the_devices_that_live(models: Models, running: Running) -> None:
    until(lambda: running.server.worker.is_ready)
    models.lose(models.devices[1])
    models.unload("student")
    models.load("student")
    assert models.get().on(models.devices[0])
    with Client(running.address) as client:
        assert client.generate("a red robot", steps=1, timeout_s=300).images
