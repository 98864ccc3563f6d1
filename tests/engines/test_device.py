"""--device: what can be named, what is refused, and that an engine stays on its cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashdiff.engines.backends import find_backend
from flashdiff.engines.runtime import device as device_module
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device, parse_devices
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BundleError, ConfigError
from flashdiff.generate import generate
from flashdiff.tasks import check_order

ROOT = Path(__file__).parents[2]
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "count_gpus", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_named_by_number() -> None:
    assert parse_devices("0, 1") == (Device(name="cuda:0", gpu=0), Device(name="cuda:1", gpu=1))
    with pytest.raises(ConfigError, match=r"--device 0,2: there is no GPU 2: this machine has GPUs 0 to 1"):
        parse_devices("0,2")
    with pytest.raises(ConfigError, match=r"--device 1,01: cuda:1 is there twice"):
        parse_devices("1,01")


@pytest.mark.usefixtures("eight_cores")
def test_core_sets_are_named_by_their_cores() -> None:
    assert [device.cores for device in parse_devices("cpu:0-3,cpu:4+6-7")] == [(0, 1, 2, 3), (4, 6, 7)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cpu:0-3,cpu:3-4", "core 3 is in both cpu:0-3 and cpu:3-4"),
        ("cpu:1,cpu:1", "cpu:1 is there twice"),
        ("cpu:6-9", "there is no core 8 for this process, which may use 0, 1, 2, 3, 4, 5, 6, 7"),
        ("0,cpu:0", "a bundle is made for GPUs or for CPUs; give devices of one kind"),
        ("cpu:3-1", "'3-1' has no cores; write GPUs by number"),
        ("cpu", "'cpu' is no device; write GPUs by number"),
        ("cpu:0-3,", "'' is no device"),
        ("cpu:0-9999999999", "'cpu:0-9999999999' is no device"),
        ("-1", "'-1' is no device"),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_what_cannot_be_used_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_devices(text)
    assert str(caught.value).startswith(f"--device {text}: {problem}")
    assert "\n" not in str(caught.value)


def test_a_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "count_gpus", lambda: 0)
    with pytest.raises(ConfigError, match="there is no GPU 0: this machine has no NVIDIA GPU"):
        parse_devices("0")


def test_a_bundle_runs_on_the_kind_of_device_that_it_was_made_for(student_bundle: Path) -> None:
    manifest = open_bundle(student_bundle).manifest
    backend = find_backend(manifest.backend)
    with pytest.raises(BundleError, match="the bundle was made for a CPU, and cuda:1 is not one"):
        backend.check_machine(manifest, Device(name="cuda:1", gpu=1))
    on_gpu = manifest.model_copy(update={"machine": manifest.machine.model_copy(update={"device": "cuda"})})
    with pytest.raises(BundleError, match=r"the bundle was made for a GPU \(.*\), and cpu:0 is not one"):
        backend.check_machine(on_gpu, Device(name="cpu:0", cores=(0,)))


_PINNED = """
import contextlib, json, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.runtime.snapshot import Snapshot
from flashdiff.generate import generate
from flashdiff.tasks import check_order

def ticks():
    fields = {}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # it has ended
            fields[int(task)] = Path("/proc/self/task", task, "stat").read_text().rpartition(")")[2].split()
    return {task: int(of[11]) + int(of[12]) for task, of in fields.items()}

def open_engine(device):
    snapshot = Snapshot(Path(folder))
    engine = Engine(snapshot.folder, snapshot.manifest, snapshot, device)
    engine.measure_buckets()
    return engine

folder, out, *cores = sys.argv[1:]
devices = [Device(name=f"cpu:{core}", cores=(int(core),)) for core in cores]
engines = [device.run(lambda: open_engine(device)) for device in devices]
orders = [check_order(engines[0].spec, prompt="x", seed=seed, steps=2) for seed in range(2)]
threads = [ThreadPoolExecutor(1, initializer=device.pin) for device in devices]
images = [thread.submit(generate, engine, orders).result() for thread, engine in zip(threads, engines)]
before = ticks()
np.save(out, np.array(images[-1]))
while sum(ticks().values()) - sum(before.values()) < 30 * len(cores):
    for call in [thread.submit(generate, engine, orders) for thread, engine in zip(threads, engines)]:
        call.result()
spent = {task: now - before.get(task, 0) for task, now in ticks().items() if task != os.getpid()}  # not this one, which counts
print(json.dumps([(sorted(os.sched_getaffinity(task)), count) for task, count in spent.items() if count >= 5]))
"""


def _busy(folder: Path, images: Path, *cores: int) -> list[tuple[list[int], int]]:
    """Cores and processor time of every thread that computed, while engines on these cores did the same work at the same time."""
    command = [sys.executable, "-c", _PINNED, str(folder), str(images), *map(str, cores)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=600)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bundle", ["student_bundle", "teacher_bundle"], ids=["openvino", "onnxruntime"])
def test_an_engine_stays_on_its_core_with_the_same_pixels(bundle: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(bundle)
    busy = _busy(folder, tmp_path / "images.npy", CORES[-1])
    # OpenVINO's own pinning would have moved its threads elsewhere.
    assert busy
    assert all(cores == [CORES[-1]] for cores, _ in busy)
    plain = open_bundle(folder)
    orders = [check_order(plain.spec, prompt="x", seed=seed, steps=2) for seed in range(2)]
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), np.array(generate(plain, orders)))


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="two core sets need two cores")
@pytest.mark.parametrize("bundle", ["student_bundle", "teacher_bundle"], ids=["openvino", "onnxruntime"])
def test_two_engines_compute_on_a_core_each(bundle: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    busy = _busy(request.getfixturevalue(bundle), tmp_path / "images.npy", *CORES[:2])
    shares = [sum(count for cores, count in busy if cores == [core]) / sum(count for _, count in busy) for core in CORES[:2]]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0.3


def test_a_thread_keeps_its_cores() -> None:
    assert Device(name="x", cores=(CORES[0],)).run(lambda: os.sched_getaffinity(0)) == {CORES[0]}
    assert DEFAULT_DEVICE.run(lambda: os.sched_getaffinity(0)) == set(CORES)
    assert os.sched_getaffinity(0) == set(CORES)
