"""flashdiff, LitServe and Triton under the same arrivals: the same bundle, the same engine, on the same cores.

    python benchmarks/peers/compare.py BUNDLE --litserve PYTHON --pytriton PYTHON --json peers.json      # or make bench-peers

Each PYTHON is that of an environment with the peer in it and what a bundle needs to run (`make bench-peers` makes them). A peer
batches requests and runs the whole pipeline on them, in batches that they fill; flashdiff batches steps. Cores, prompts, seeds
and Poisson arrivals are load.py's; loads are shares of what flashdiff does saturated. A peer knows no deadlines: all that it sees
of one is a client that leaves after a second.

Every phase runs three times, every server started anew and another one first in each round; tables and plots tell the median, and
tables the range.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc
import httpx2
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from benchmarks import load
from benchmarks.rows import environment, result_file
from benchmarks.serving import on_cores, server, split_cores
from flashdiff.engines.bundle import read_manifest
from flashdiff.errors import BackendError, FlashdiffError
from flashdiff.files import write_whole
from flashdiff.server.client import AsyncClient, ServerError

_ROOT = Path(__file__).resolve().parents[2]
_READY_S = 120.0

Connect = Callable[[str], AbstractAsyncContextManager[Any]]
"""A client of an address, made in the event loop that uses it."""

Use = Callable[[Any], Awaitable[load.Outcome]]
"""A phase of load.py."""


@dataclass(frozen=True)
class Plan:
    """Seconds of each part, and how often it runs."""

    rounds: int = 3
    saturated_s: float = 10.0
    loads: tuple[float, ...] = (0.4, 0.6, 0.8, 0.95)
    open_loop_s: float = 12.0


QUICK = Plan(rounds=2, saturated_s=0.5, loads=(0.5,), open_loop_s=0.5)


class LitServeClient:
    """`AsyncClient.generate`, as far as load.py calls it, over LitServe's HTTP."""

    def __init__(self, address: str) -> None:
        limits = httpx2.Limits(max_connections=None)
        self._http = httpx2.AsyncClient(base_url=f"http://{address}", limits=limits, timeout=60, trust_env=False)

    async def generate(self, prompt: str, steps: int = 4, seed: int = 0, timeout_s: float | None = None) -> bytes:
        try:
            request = {"prompt": prompt, "steps": steps, "seed": seed}
            async with asyncio.timeout(timeout_s):
                answer = await self._http.post("/predict", json=request)
        except TimeoutError:
            raise ServerError(grpc.StatusCode.DEADLINE_EXCEEDED, None) from None
        except httpx2.HTTPError as error:
            raise ServerError(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        if answer.status_code != 200:
            raise ServerError(grpc.StatusCode.UNKNOWN, answer.text)
        return bytes(answer.content)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()


class TritonClient:
    """The same over Triton's gRPC, with its own client."""

    def __init__(self, address: str) -> None:
        self._grpc = triton.InferenceServerClient(address)

    async def generate(self, prompt: str, steps: int = 4, seed: int = 0, timeout_s: float | None = None) -> bytes:
        inputs = []
        for name, kind, value in (("PROMPT", "BYTES", prompt.encode()), ("STEPS", "INT32", steps), ("SEED", "UINT64", seed)):
            dtype = {"BYTES": np.object_, "INT32": np.int32, "UINT64": np.uint64}[kind]
            inputs.append(triton.InferInput(name, [1, 1], kind).set_data_from_numpy(np.array([[value]], dtype=dtype)))
        try:
            answer = await self._grpc.infer("images", inputs, client_timeout=timeout_s)
        except InferenceServerException as error:
            name = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
            raise ServerError(grpc.StatusCode[name], error.message()) from None
        return bytes(answer.as_numpy("IMAGE")[0, 0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._grpc.close()


@dataclass(frozen=True)
class Peer:
    """How to start a server, and how to speak with it."""

    name: str
    app: str
    connect: Connect
    versions: tuple[str, ...]


LITSERVE = Peer("LitServe", "litserve_app", LitServeClient, ("litserve", "openvino", "numpy"))
PYTRITON = Peer("Triton", "pytriton_app", TritonClient, ("nvidia-pytriton", "openvino", "numpy"))


@contextmanager
def started(peer: Peer, python: Path, bundle: Path, cores: set[int]) -> Iterator[str]:
    """The address of a peer that answers; BackendError has its last words when it does not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), "-m", f"benchmarks.peers.{peer.app}", str(bundle.resolve()), "--port", str(port)]
    command += ["--cores", ",".join(map(str, sorted(cores)))]
    with tempfile.TemporaryFile() as words:
        # A process group of its own: both peers start processes, and all must end with them.
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=words, stderr=words, start_new_session=True, env={**os.environ, "PYTHONPATH": str(_ROOT)}
        )
        try:
            address = f"127.0.0.1:{port}"
            if not asyncio.run(_answers(peer, address, process)):
                words.seek(0)
                last = words.read().decode(errors="replace").strip()[-2000:]
                raise BackendError(f"{peer.name} does not answer; what it said last:\n{last}")
            yield address
        finally:
            _end(process)


async def _answers(peer: Peer, address: str, process: "subprocess.Popen[bytes]") -> bool:
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
    """Ask, then insist."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(bundle: Path, peers: Sequence[tuple[Peer, Path]], plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}: rows as load.py's, with `server`; the environment has the peers' versions."""
    engine_cores, other_cores = split_cores()
    manifest = read_manifest(bundle)
    record = environment({"student": manifest})
    record["peers"] = {peer.name: _versions(python, peer.versions) for peer, python in peers}
    rows: list[dict[str, Any]] = []

    def measure(name: str, connect: Connect, address: str, use: Use, about: dict[str, Any]) -> None:
        async def with_client() -> load.Outcome:
            async with connect(address) as client:
                await client.generate("warm", timeout_s=60)
                return await use(client)

        rows.append(asyncio.run(with_client()).row(server=name, **about))
        report(" ".join(f"{key}={value}" for key, value in rows[-1].items() if key != "samples_ms"))

    def ours(use: Use, about: dict[str, Any]) -> None:
        with server(bundle, "step", engine_cores) as served:
            measure("flashdiff", lambda address: AsyncClient(address, retries=False), served.address, use, about)

    def theirs(peer: Peer, python: Path, use: Use, about: dict[str, Any]) -> None:
        with started(peer, python, bundle, engine_cores) as address:
            measure(peer.name, peer.connect, address, use, about)

    def each(use: Use, **about: Any) -> None:
        servers: list[Callable[[Use, dict[str, Any]], None]] = [ours, *(partial(theirs, *peer) for peer in peers)]
        for index in range(plan.rounds):
            first = index % len(servers)
            for run_one in (*servers[first:], *servers[:first]):
                run_one(use, {**about, "round": index + 1})

    with on_cores(other_cores):
        at_once = 2 * manifest.batch_sizes[-1] // manifest.model.sampler.evaluations_per_step
        each(lambda client: load.saturated(client, plan.saturated_s, at_once), phase="saturated")
        capacity = statistics.median(row["goodput_per_s"] for row in rows if row["server"] == "flashdiff")
        for share in plan.loads:
            offered = share * capacity
            each(
                lambda client, offered=offered: load.open_loop(client, offered, plan.open_loop_s),  # type: ignore[misc]
                phase="open loop",
                load=share,
                offered_per_s=round(offered, 2),
            )
    return {"environment": record, "rows": rows}


def _versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    try:
        found = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise BackendError(f"{python} is not a Python with {', '.join(names)}; `make bench-peers` makes one") from None
    versions: dict[str, str] = json.loads(found)
    return versions


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line per load and server, medians over the rounds and their range; saturated first."""
    lines = ["| load | server | p50 ms | p95 ms | p99 ms | in time, % | images/s |", "|---|---|---|---|---|---|---|"]
    runs: dict[tuple[float | None, str], list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row.get("load"), row["server"]), []).append(row)
    for (at, name), of in sorted(runs.items(), key=lambda item: item[0][0] or 0):
        times = [load.median_and_range([row[f"p{share}_ms"] for row in of]) for share in (50, 95, 99)]
        in_time = load.median_and_range([100 * row["statuses"].get("OK", 0) / max(1, row["sent"]) for row in of])
        rate = load.median_and_range([row["goodput_per_s"] for row in of])
        lines.append(f"| {f'{at:.0%}' if at else 'saturated'} | {name} | {' | '.join(times)} | {in_time} | {rate} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--litserve", type=Path, metavar="PYTHON", help="of an environment with litserve")
    parser.add_argument("--pytriton", type=Path, metavar="PYTHON", help="of an environment with nvidia-pytriton")
    parser.add_argument("--quick", action="store_true", help="half a second a phase: does it run, not what it measures")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, rows and every latency")
    options = parser.parse_args()
    peers = [(peer, python) for peer, python in ((LITSERVE, options.litserve), (PYTRITON, options.pytriton)) if python]
    try:
        found = run(options.bundle, peers, QUICK if options.quick else Plan(), lambda line: print(line, flush=True))
        print(markdown(found["rows"]))
        if options.json:
            write_whole(options.json, json.dumps(found) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
