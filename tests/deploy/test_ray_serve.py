"""Ray Serve for real: deploy/ray/serve.yaml with two replicas of a fake model, in an environment that the Makefile makes.

One test runs all cases, so that test processes that share the work start one Ray and not several.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from filelock import FileLock
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import reserved_ports
from ray_fake import hash_of
from replicas import Load
from served import until

from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.client import Client, Preview, Result, ServerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
_INSTALL_S, _START_S = 480, 180
_NO_INDEX = re.compile(
    r"from versions: none|connection|timed out|timeout|name resolution|network|proxy|HTTP error|SSLError", re.I
)
"""What pip says when it cannot reach the index or the index lacks the package; all else is a fault of the repository."""
_MARK = "TEST_RAY_SERVE"


@dataclass
class Cluster:
    """A Ray that runs here, with the application up."""

    address: str
    url: str
    folder: Path
    mark: str

    def replicas(self) -> list[int]:
        """Their processes."""
        return [pid for pid in _marked(self.mark) if "ServeReplica" in _command(pid)]

    def log(self, pid: int) -> str:
        """What that replica has logged."""
        files = self.folder.glob("ray/session_2*/logs/serve/replica_*.log")
        return next(text for file in files if f"(bundle {hash_of(pid)[:12]}" in (text := file.read_text()))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _marked(mark: str) -> list[int]:
    """The processes that this test has started, by their environment or, as some overwrite it with a title, by their files."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0") or any(
                f"/{mark}/" in os.readlink(file) for file in (entry / "fd").iterdir()
            ):
                found.append(int(entry.name))
    return found


def _kill(mark: str) -> list[int]:
    """Kill what this test has started, but not its own process, which has files there open too; those that it found."""
    found = [pid for pid in _marked(mark) if pid != os.getpid()]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def _installed() -> Path:
    """Ray's command, in an environment that is made when it is not there."""
    command = ["make", "-s", f"PYTHON={sys.executable}", ".venv-ray/.installed"]
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "venv-ray.lock"):
        made = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said = made.communicate(timeout=_INSTALL_S)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(made.pid, signal.SIGKILL)  # pip too, which would go on without make
    if made.returncode and _NO_INDEX.search(said):
        pytest.skip(f"Ray could not be installed: {said.strip().splitlines()[-1]}")
    assert made.returncode == 0, f"Ray could not be installed: {said[-3000:]}"
    return ROOT / ".venv-ray" / "bin" / "serve"


@contextmanager
def _running(serve: Path, grpc_port: int, http_port: int) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="fd", dir="/tmp"))  # Ray's sockets lie there: their paths must be short
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    config["grpc_options"]["port"], config["http_options"]["port"] = grpc_port, http_port
    (application,) = config["applications"]
    application["import_path"] = "ray_fake:app"
    application["deployments"][0]["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.5}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    mark = folder.name
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        _MARK: mark,
        "HOME": str(folder),  # Ray writes a token there
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    running = Cluster(f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}/flashdiff", folder, mark)
    output = folder / "output"
    with output.open("w") as out:
        command = [str(serve), "run", str(folder / "serve.yaml")]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        _wait_for_two_replicas(running, process, output)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)  # `serve run` sometimes never ends after a replica was killed
        until(lambda: not _kill(mark))
        process.wait(600)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_two_replicas(cluster: Cluster, process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Until both have answered."""
    hashes, deadline = set[str](), time.monotonic() + _START_S
    with Client(cluster.address, retries=False) as client:
        while len(hashes) < 2:
            assert process.poll() is None, f"Ray has ended: {output.read_text()[-5000:]}"
            assert time.monotonic() < deadline, f"{len(hashes)} of 2 replicas answer: {output.read_text()[-5000:]}"
            try:
                hashes.add(client.generate("x", steps=1, timeout_s=10).model.bundle_hash)
            except ServerError:
                time.sleep(0.5)


def _calls_are_answered_as_by_flashdiff_serve(cluster: Cluster) -> None:
    with Client(cluster.address, retries=False) as client:
        assert client.models(timeout_s=60) == ["fake", "other"]
        assert client.generate("x", model="other", timeout_s=60).model.name == "other"
        kinds = [type(update) for update in client.stream("x", steps=4, timeout_s=60)]
        assert kinds == [Preview] * 4 + [Result]
        assert client.generate("x", timeout_s=None).images
        assert client.estimate("x", steps=4, timeout_s=60).expected_ms > 0
        with pytest.raises(ServerError, match=r"NOT_FOUND: model: 'none' is not allowed; this server has fake, other"):
            client.generate("x", model="none", timeout_s=60)
        for call in (client.generate, lambda *given, **options: list(client.stream(*given, **options))):
            with pytest.raises(ServerError, match=r"INVALID_ARGUMENT: steps: 99 is not allowed"):
                call("x", steps=99, timeout_s=60)


def _a_deadline_that_cannot_be_met_is_refused_by_the_replica(cluster: Cluster) -> None:
    def is_refused(stream: bool) -> bool:
        """Before the client's own clock ends the call."""
        with Client(cluster.address, retries=False) as client:
            try:
                if stream:
                    list(client.stream("x", steps=4, count=16, timeout_s=0.8))
                else:
                    client.generate("x", steps=4, count=16, timeout_s=0.8)
            except ServerError as error:
                return "DEADLINE_EXCEEDED: this can be promised in about" in str(error)
        return False

    until(lambda: is_refused(stream=False))
    until(lambda: is_refused(stream=True))


def _a_full_queue_says_when_to_come_back_and_those_that_leave_make_room(cluster: Cluster) -> None:
    # Each queue takes 6 requests of 16 images from one client, so the thirteenth is refused at the latest.
    request = image_pb2.GenerateRequest(prompt="x", steps=4, count=16)
    with grpc.insecure_channel(cluster.address, (("grpc.enable_retries", 0),)) as channel, Client(cluster.address) as client:
        stub = image_pb2_grpc.ImageServiceStub(channel)
        for send in (stub.Generate.future, stub.GenerateStream):
            calls = [send(request, timeout=120) for _ in range(16)]
            until(lambda calls=calls: any(_is_failed(call) for call in calls))  # type: ignore[misc]
            refused = next(call for call in calls if _is_failed(call))
            assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refused.details().startswith("the queue is full")
            assert int(dict(refused.trailing_metadata())["grpc-retry-pushback-ms"]) >= 100
            for call in calls:
                call.cancel()
            until(lambda: all(client.estimate("x", timeout_s=60).pending_images == 0 for _ in range(10)))
    for method in ("Generate", "GenerateStream"):  # estimates may all have gone to one replica: the other is not done yet
        cancelled = re.compile(rf"ImageService/{method} id=.* code=CANCELLED")
        until(lambda cancelled=cancelled: any(cancelled.search(cluster.log(pid)) for pid in cluster.replicas()))  # type: ignore[misc]


def _the_client_waits_as_long_as_a_full_queue_says_and_tries_again(cluster: Cluster) -> None:
    # Twelve of these fit; the others come at the same time, and fit when some are done.
    before, start = _refused(cluster), threading.Barrier(16)
    results: list[Result | Exception] = []

    def send(streams: bool) -> None:
        options = {"steps": 4, "count": 16, "timeout_s": 120.0}
        try:
            with Client(cluster.address) as client:
                client.models(timeout_s=60)  # it is connected
                start.wait(600)
                results.append(list(client.stream("x", **options))[-1] if streams else client.generate("x", **options))  # type: ignore[arg-type]
        except (ServerError, threading.BrokenBarrierError) as error:
            results.append(error)

    threads = [threading.Thread(target=send, args=(bool(number % 2),)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [type(result) for result in results] == [Result] * 16
    assert _refused(cluster) > before


def _health_is_checked_and_not_watched(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "flashdiff.v1.ImageService", "other"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as failed:
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
    assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "health cannot be watched; call Check" in failed.value.details()


def _one_replica_is_killed_under_load_and_no_request_is_lost_or_answered_twice(cluster: Cluster) -> None:
    killed, living = cluster.replicas()
    answered_before = {pid: _answered(cluster.log(pid)) for pid in (killed, living)}
    with Load(cluster.address) as load:
        load.wait_for(30)
        until(lambda: bool(load.hashes[hash_of(killed)] and load.hashes[hash_of(living)]))
        os.kill(killed, signal.SIGKILL)
        load.wait_for(40)
        until(lambda: len(load.hashes) == 3, _START_S)  # Ray has started another
        load.wait_for(10)
    assert load.lost == []
    assert {hash_of(pid) for pid in cluster.replicas()} == set(load.hashes) - {hash_of(killed)}
    # A living replica sent each reply once, and each arrived; it refused and dropped none.
    for pid in cluster.replicas():
        log = cluster.log(pid)
        assert _answered(log) - answered_before.get(pid, 0) == load.hashes[hash_of(pid)]
    assert load.hashes[hash_of(killed)] <= _answered(cluster.log(killed)) - answered_before[killed]


def _is_failed(call: Any) -> bool:
    return call.done() and call.code() != grpc.StatusCode.OK


def _refused(cluster: Cluster) -> int:
    return sum(cluster.log(pid).count("code=RESOURCE_EXHAUSTED") for pid in cluster.replicas())


def _answered(log: str) -> int:
    return len(re.findall(r"ImageService/Generate id=.* code=OK", log))


_CASES: tuple[Callable[[Cluster], None], ...] = (
    _calls_are_answered_as_by_flashdiff_serve,
    _a_deadline_that_cannot_be_met_is_refused_by_the_replica,
    _a_full_queue_says_when_to_come_back_and_those_that_leave_make_room,
    _the_client_waits_as_long_as_a_full_queue_says_and_tries_again,
    _health_is_checked_and_not_watched,
    _one_replica_is_killed_under_load_and_no_request_is_lost_or_answered_twice,
)
"""In this order: the last one kills a replica."""


def test_ray_serve_keeps_what_flashdiff_serve_promises() -> None:
    serve = _installed()
    with reserved_ports(2) as (grpc_port, http_port), _running(serve, grpc_port, http_port) as cluster:
        for case in _CASES:
            try:
                case(cluster)
            except BaseException as error:
                error.add_note(f"in the case {case.__name__}")
                raise
