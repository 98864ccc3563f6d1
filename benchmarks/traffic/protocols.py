"""HTTP and gRPC compared: one server, the same traffic, alternating by request or by phase."""

import asyncio
import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement, MeasurementLog
from benchmarks.stats import rounded_percentile
from benchmarks.traffic.calls import Outcome, connect_flashdiff, open_loop, saturate, share_in_time
from benchmarks.traffic.cores import awake, on_cores
from benchmarks.traffic.http_client import HttpClient
from benchmarks.traffic.server_process import start_server
from benchmarks.traffic.workload import BATCHES_IN_FLIGHT, Workload, random_prompt
from flashdiff.engines.bundle import read_manifest

Name = Literal["grpc", "http"]
_ENGINE_STAGES = ("text", "denoise", "decode")


class _Client(Protocol):
    """What both protocols' clients have."""

    async def generate(self, prompt: str, *, steps: int = ..., seed: int = ..., timeout_s: float | None = None) -> Any: ...
    async def models(self) -> object: ...


_Clients = dict[Name, _Client]


def measure_protocols(
    bundle: Path, workload: Workload, quiet_requests: int, engine_cores: set[int], other_cores: set[int], log: MeasurementLog
) -> None:
    """Quiet, saturated and open-loop traffic over both protocols, to one server whose engine has cores of its own."""
    in_flight = BATCHES_IN_FLIGHT * max(read_manifest(bundle).batch_sizes)
    with on_cores(other_cores), start_server(bundle, "step", engine_cores, with_http=True) as server:

        def use(run: Callable[[_Clients], Awaitable[list[Measurement]]]) -> list[Measurement]:
            async def connected() -> list[Measurement]:
                async with connect_flashdiff(server.address) as grpc, HttpClient(server.http_address) as http:
                    clients: _Clients = {"grpc": grpc, "http": http}
                    for client in clients.values():
                        await client.generate("warm", timeout_s=60)
                    return await run(clients)

            gc.freeze()  # otherwise this process's full collections, 30 ms each, would count as the server's latency
            return [log.add(measurement) for measurement in asyncio.run(connected())]

        use(lambda clients: _measure_quiet(clients, quiet_requests, "asleep"))
        with awake(engine_cores | other_cores):
            use(lambda clients: _measure_quiet(clients, quiet_requests, "awake"))
        saturated = use(lambda clients: _measure_saturated(clients, workload, in_flight))
        capacity = statistics.median(one["goodput_per_s"] for one in saturated if one["protocol"] == "grpc")
        for load in workload.loads:
            use(lambda clients, load=load: _measure_open_loop(clients, workload, load, capacity))  # type: ignore[misc]


async def _measure_quiet(clients: _Clients, count: int, idle_cores: str) -> list[Measurement]:
    """One request after another, the protocols in turns: the client's latency, and the part of it that is not the engine's."""
    rng = random.Random(0)
    seen, beyond, empty = (defaultdict[Name, list[float]](list) for _ in range(3))
    for _ in range(count):
        for name, client in clients.items():
            started = time.perf_counter()
            result = await client.generate(random_prompt(rng), steps=4)
            seen[name].append(1000 * (time.perf_counter() - started))
            beyond[name].append(seen[name][-1] - sum(result.timings[stage] for stage in _ENGINE_STAGES))
            started = time.perf_counter()
            await client.models()
            empty[name].append(1000 * (time.perf_counter() - started))
    return [
        {
            "phase": "quiet",
            "protocol": name,
            "idle_cores": idle_cores,
            "p50_ms": rounded_percentile(seen[name], 50),
            "p50_beyond_engine_ms": rounded_percentile(beyond[name], 50),
            "p99_beyond_engine_ms": rounded_percentile(beyond[name], 99),
            "p50_empty_call_ms": rounded_percentile(empty[name], 50),
            "sent": count,
        }
        for name in clients
    ]


async def _measure_saturated(clients: _Clients, workload: Workload, in_flight: int) -> list[Measurement]:
    return [
        (await saturate(client, workload.saturated_s, in_flight)).measurement(phase="saturated", protocol=name, round=round_)
        for round_ in range(1, workload.rounds + 1)
        for name, client in clients.items()
    ]


async def _measure_open_loop(clients: _Clients, workload: Workload, load: float, capacity: float) -> list[Measurement]:
    """The same arrivals over each protocol, a share of the time at once, in turns."""
    outcomes: dict[Name, Outcome] = defaultdict(Outcome)
    for _ in range(workload.rounds):
        for name, client in clients.items():
            outcomes[name] += await open_loop(client, load * capacity, workload.open_loop_s / workload.rounds)
    return [outcome.measurement(phase="open loop", protocol=name, load=load) for name, outcome in outcomes.items()]


def protocols_table(measurements: Sequence[Measurement]) -> str:
    """The goal's ratio for each state of the idle cores, and the loads, in Markdown."""
    quiet: dict[str, dict[Name, Measurement]] = defaultdict(dict)
    for one in measurements:
        if one["phase"] == "quiet":
            quiet[one["idle_cores"]][one["protocol"]] = one
    lines = [
        f"- quiet, idle cores {cores}: p50 beyond the engine {both['http']['p50_beyond_engine_ms']} ms over HTTP, "
        f"{both['grpc']['p50_beyond_engine_ms']} ms over gRPC, "
        f"{both['http']['p50_beyond_engine_ms'] / both['grpc']['p50_beyond_engine_ms']:.2f} times"
        for cores, both in quiet.items()
    ]
    for name in ("http", "grpc"):
        rates = [one["goodput_per_s"] for one in measurements if (one["phase"], one["protocol"]) == ("saturated", name)]
        lines.append(f"- saturated, {name}: {statistics.median(rates):.1f} images/s")
    titles = ("load", "protocol", "p50 ms", "p95 ms", "p99 ms", "in time")
    cells = [
        [f"{one['load']:.0%}", one["protocol"], *(str(one[f"p{p}_ms"]) for p in (50, 95, 99)), f"{share_in_time(one):.1%}"]
        for one in measurements
        if one["phase"] == "open loop"
    ]
    return "\n".join([*lines, "", markdown_table(titles, cells)])
