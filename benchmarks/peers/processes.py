"""The peers as processes: starting one in its own Python environment, and ending it with all that it started."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.clients import LitServeClient, TritonClient
from benchmarks.traffic.calls import Connect, ImageClient
from flashdiff.errors import BackendError
from flashdiff.server.client import ServerError

_ROOT = Path(__file__).resolve().parents[2]
_READY_S = 120.0


@dataclass(frozen=True)
class Peer:
    """How to start a peer, and how to call it."""

    name: str
    app: str
    """The module of benchmarks.peers that serves the bundle."""
    connect: Connect[ImageClient]
    packages: tuple[str, ...]
    """Those whose versions count."""


LITSERVE = Peer("LitServe", "litserve_app", LitServeClient, ("litserve", "openvino", "numpy"))
PYTRITON = Peer("Triton", "pytriton_app", TritonClient, ("nvidia-pytriton", "openvino", "numpy"))


@contextmanager
def start_peer(peer: Peer, python: Path, bundle: Path, cores: set[int]) -> Iterator[str]:
    """The address of a peer that is ready; BackendError, with the end of its output, if it does not get ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), "-m", f"benchmarks.peers.{peer.app}", str(bundle.resolve()), "--port", str(port)]
    command += ["--cores", ",".join(map(str, sorted(cores)))]
    with tempfile.TemporaryFile() as output:
        # A process group of its own, which can be ended as a whole: both peers start more processes.
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=output, stderr=output, start_new_session=True, env={**os.environ, "PYTHONPATH": str(_ROOT)}
        )
        try:
            address = f"127.0.0.1:{port}"
            if not asyncio.run(_becomes_ready(peer, address, process)):
                output.seek(0)
                end = output.read().decode(errors="replace").strip()[-2000:]
                raise BackendError(f"{peer.name} does not answer; the end of its output:\n{end}")
            yield address
        finally:
            _end(process)


def package_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The versions that a Python environment has of the packages; BackendError if one is missing."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    try:
        found = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise BackendError(
            f"{python} is not a Python with {', '.join(packages)}; `make bench-peers` and `make bench-real-cpu` make them"
        ) from None
    versions: dict[str, str] = json.loads(found)
    return versions


async def _becomes_ready(peer: Peer, address: str, process: "subprocess.Popen[bytes]") -> bool:
    """Whether the peer makes an image before its process ends or the time is up."""
    until = time.monotonic() + _READY_S
    async with peer.connect(address) as client:
        while time.monotonic() < until and process.poll() is None:
            try:
                await client.generate("warm", timeout_s=30)
            except ServerError:
                await asyncio.sleep(0.5)
            else:
                return True
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate the process, and kill what is left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
