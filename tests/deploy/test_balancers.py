"""Two server processes behind a real balancer, with the configuration of deploy/balancers, and behind `round_robin`."""

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from ports import reserved_ports
from replicas import Load, Replica, running_replicas
from served import until

from flashdiff.components import Size
from flashdiff.proto.v1 import image_pb2, image_pb2_grpc
from flashdiff.server.client import Client, Preview, ServerError

pytestmark = pytest.mark.slow
PLACE = Path(__file__).parents[2] / "deploy" / "balancers"
TOKEN, LIMITED = "one-token-0123456789", "another-token-01234567"
_LARGE = Size(1024, 1024)


def _haproxy(config: Path) -> list[str]:
    return ["haproxy", "-f", str(config)]


def _nginx(config: Path) -> list[str]:
    paths = "".join(f"{name}_temp_path {config.parent}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config.write_text(config.read_text().replace("http {", f"pid {config.parent}/pid;\nhttp {{ {paths}", 1))
    return ["nginx", "-p", str(config.parent), "-c", str(config), "-g", "daemon off;"]


_BALANCERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "haproxy": ("haproxy.cfg", _haproxy),
    "nginx": ("nginx.conf", _nginx),
}


@contextmanager
def _balanced(name: str, folder: Path, replicas: list[Replica]) -> Iterator[str]:
    """The address of a balancer in front of two replicas."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed: Debian has it in a package of that name")
    file, command = _BALANCERS[name]
    text = (PLACE / file).read_text()
    with reserved_ports(1) as (port,):
        ports = {
            50050: port,
            50051: replicas[0].port,
            50052: replicas[1].port,
            9091: replicas[0].metrics,
            9092: replicas[1].metrics,
        }
        for standard, used in ports.items():
            text = re.sub(rf"(127\.0\.0\.1:|port ){standard}\b", rf"\g<1>{used}", text)
        config = folder / file
        config.write_text(text)
        with (folder / "balancer.log").open("w") as log:
            process = subprocess.Popen(command(config), stdout=log, stderr=log)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(600)


@pytest.mark.parametrize("name", _BALANCERS)
def test_calls_pass_as_without_a_balancer(tmp_path: Path, name: str) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"all {TOKEN}\nfew {LIMITED} 0.001\n")
    with (
        running_replicas(tmp_path, f", tokens=Path({str(tokens)!r})") as (replicas, _),
        _balanced(name, tmp_path, replicas) as address,
        Client(address, token=TOKEN, retries=False) as client,
    ):
        until(lambda: _is_answered(client))
        # Unary calls use both replicas, and large replies pass.
        for _ in range(8):
            assert client.generate("x", steps=1, timeout_s=60).images
        assert all(replica.calls for replica in replicas)
        large = client.generate("x", steps=1, size=_LARGE, count=3, image_format="raw", timeout_s=60)
        assert sum(map(len, large.images)) == 3 * 3 * 1024 * 1024
        # The images of a request pass, up to nearly 4 MiB.
        with pytest.raises(ServerError, match=r"INVALID_ARGUMENT: image"):
            client.generate("x", image=bytes(4_000_000), timeout_s=60)
        # Previews come one by one, and a stream that is left ends at the replica.
        assert len(list(client.stream("x", steps=4, timeout_s=60))) == 5
        stream = client.stream("x", steps=4, count=16, timeout_s=60)
        assert isinstance(next(stream), Preview)
        stream.close()
        until(lambda: any("GenerateStream" in line and "code=CANCELLED" in line for line in _lines(replicas)))
        # Statuses, details and trailers.
        with pytest.raises(ServerError, match=r"INVALID_ARGUMENT: steps: 99 is not allowed"):
            client.generate("x", steps=99, timeout_s=60)
        with grpc.insecure_channel(address) as channel:
            stub = image_pb2_grpc.ImageServiceStub(channel)
            metadata = (("authorization", f"Bearer {LIMITED}"),)  # one call for each replica, so of three at least one is refused
            calls = [stub.Generate.future(image_pb2.GenerateRequest(prompt="x"), metadata=metadata, timeout=60) for _ in range(3)]
            refused = [call for call in calls if call.exception()]
            assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert int(dict(refused[0].trailing_metadata())["grpc-retry-pushback-ms"]) > 1000
        # The replica sees the deadline, and refuses at once what cannot be on time.
        until(lambda: _is_refused(client))


def _is_answered(client: Client) -> bool:
    try:
        return bool(client.generate("x", steps=1, timeout_s=5).images)
    except ServerError:
        return False


def _is_refused(client: Client) -> bool:
    """Whether the replica says so before the client's own clock ends the call."""
    try:
        client.generate("x", steps=4, count=16, timeout_s=0.15)
    except ServerError as error:
        return "DEADLINE_EXCEEDED: this can be promised in about" in str(error)
    return False


def _lines(replicas: list[Replica]) -> list[str]:
    return [line for replica in replicas for line in replica.log.splitlines()]


@pytest.mark.parametrize("name", _BALANCERS)
def test_one_replica_is_drained_and_one_killed_under_load_and_no_request_is_lost(tmp_path: Path, name: str) -> None:
    with running_replicas(tmp_path) as (replicas, stack), _balanced(name, tmp_path, replicas) as address:
        with Client(address, retries=False) as client:
            until(lambda: _is_answered(client))
        with Load(address) as load:
            _drain_and_kill(load, replicas, stack)
        # Once in some twenty runs a call behind nginx has ended so; neither its log nor a replica's says why.
        cancelled = ["CANCELLED: CANCELLED"] if name == "nginx" and load.lost else []
        assert load.lost == cancelled
        assert load.answered > 80


def _drain_and_kill(load: Load, replicas: list[Replica], stack: ExitStack) -> None:
    """Drain the first, start it again, then kill the second; requests go on after each."""
    first, second = replicas
    load.wait_for(20)
    until(lambda: bool(first.calls and second.calls))
    first.process.signal(signal.SIGTERM)
    assert first.process.status() == 0
    load.wait_for(20)
    first.start(stack)
    until(lambda: first.calls > 0)  # it is used again
    second.process.signal(signal.SIGKILL)
    second.process.status()
    load.wait_for(40)


def test_a_client_with_round_robin_uses_all_replicas_and_loses_nothing(tmp_path: Path) -> None:
    with running_replicas(tmp_path) as (replicas, stack):
        address = "ipv4:" + ",".join(f"127.0.0.1:{replica.port}" for replica in replicas)
        with Load(address, round_robin=True) as load:
            _drain_and_kill(load, replicas, stack)
        assert load.lost == []
        assert load.answered > 80
