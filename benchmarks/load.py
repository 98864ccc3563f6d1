"""Behaviour under load: latency and goodput over offered load, step-level against request-level batching, overload, and chaos.

    python benchmarks/load.py STUDENT_BUNDLE --json load.json      # about twelve minutes; --quick only exercises the code
    python benchmarks/load.py --server HOST:PORT --json load.json  # the phases that a running server allows
    python benchmarks/load.py STUDENT_BUNDLE --protocol http       # over HTTP, in turns with gRPC; six minutes

The server runs in a process of its own and is called over a real port. Arrivals are Poisson and do not wait for answers (open
loop). Every request has a new prompt, so the cache of text embeddings never helps.

The engine has half of the cores to itself, with and without a server; client and server share the other half. Otherwise the
client's work would slow the engine that it measures. The engine alone (offline) and the saturated server are measured in three
rounds, each with a new server, and also with the engine on all cores. The median goodput of the saturated servers is the
capacity, of which loads are shares. The open loop runs once per load, at 80 % three times; overload and chaos run once. The
quiet server is measured with idle cores asleep, as they normally are, and with cores kept awake: every hand-over between threads
waits for a core to wake up, and how long that takes is a property of the machine.
"""

import gc
import statistics
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.measurements import Measurement, MeasurementLog
from benchmarks.traffic.calls import Outcome, connect_flashdiff, open_loop, saturate, use_client
from benchmarks.traffic.cores import awake, on_cores, split_cores
from benchmarks.traffic.load_table import load_table
from benchmarks.traffic.phases import measure_chaos, measure_offline, measure_overload, measure_quiet
from benchmarks.traffic.protocols import measure_protocols, protocols_table
from benchmarks.traffic.server_process import Batching, ServerProcess, start_server
from benchmarks.traffic.workload import BATCHES_IN_FLIGHT, Workload
from flashdiff.engines.bundle import read_manifest
from flashdiff.errors import FlashdiffError
from flashdiff.server.client import AsyncClient

T = TypeVar("T")

_BATCHINGS: tuple[Batching, ...] = ("step", "request")
_REQUESTS_IN_FLIGHT = 64  # saturate a running server, whose batch sizes are unknown


@dataclass(frozen=True, kw_only=True)
class LoadWorkload(Workload):
    """The workload of all phases: seconds, or numbers of requests."""

    rounds: int = 3
    saturated_s: float = 12.0
    loads: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    open_loop_s: float = 15.0
    goal_load: float = 0.8
    """This load runs `rounds` times, its samples pooled: in a single run the p99 is the third-slowest request."""
    quiet_requests: int = 200
    offline_s: float = 8.0
    overload_s: float = 60.0
    chaos_requests: int = 10_000


QUICK = LoadWorkload(
    rounds=2,
    saturated_s=0.5,
    loads=(0.5,),
    open_loop_s=0.5,
    quiet_requests=5,
    offline_s=0.2,
    overload_s=0.5,
    chaos_requests=40,
)


def run(bundle: Path, workload: LoadWorkload, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure every phase, with new servers of the bundle; {"environment": ..., "rows": [...]}."""
    environment = read_environment({"student": read_manifest(bundle)})
    own = _OwnServers(bundle, workload, *split_cores(), MeasurementLog(report))
    capacity = own.measure_capacity()
    with on_cores(own.other_cores):
        own.measure_open_loops(capacity)
        own.measure_overload_and_chaos(capacity)
    return {"environment": environment, "rows": own.log.measurements}


def run_protocols(bundle: Path, workload: LoadWorkload, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure HTTP and gRPC with one new server of the bundle."""
    environment, log = read_environment({"student": read_manifest(bundle)}), MeasurementLog(report)
    measure_protocols(bundle, workload, workload.quiet_requests, *split_cores(), log)
    return {"environment": environment, "rows": log.measurements}


@dataclass(frozen=True)
class _OwnServers:
    """A run whose servers this process starts itself."""

    bundle: Path
    workload: LoadWorkload
    engine_cores: set[int]
    other_cores: set[int]
    log: MeasurementLog

    def measure_capacity(self) -> float:
        """The median goodput of the saturated servers whose engines have their own cores; measures the quiet server too."""
        goodputs = []
        for round_ in range(1, self.workload.rounds + 1):
            self._measure_saturated(self.engine_cores | self.other_cores, "shared", round_)
            with on_cores(self.other_cores):
                goodputs.append(self._measure_saturated(self.engine_cores, "own", round_)["goodput_per_s"])
                if read_manifest(self.bundle).machine.device == "cuda":  # the gain of parallel decoding
                    self._measure_saturated(self.engine_cores, "own", round_, "in turn")
        return statistics.median(goodputs)

    def _measure_saturated(self, cores: set[int], cores_name: str, round_: int, batching: Batching = "step") -> Measurement:
        """The engine alone on these cores, then a saturated server of it; in between, once, the quiet server."""
        alone = measure_offline(self.bundle, self.workload.offline_s, cores)
        self.log.add(alone | {"cores": cores_name, "round": round_})
        in_flight = BATCHES_IN_FLIGHT * int(alone["batch"])
        with start_server(self.bundle, batching, cores) as server:
            if cores_name == "own" and round_ == 1 and batching == "step":
                self._measure_quiet(server)
            outcome = _call(server.address, lambda client: saturate(client, self.workload.saturated_s, in_flight))
        return self.log.add(
            outcome.measurement(
                phase="saturated",
                batching=batching,
                cores=cores_name,
                round=round_,
                at_once=in_flight,
                of_offline=alone["images_per_s"],
            )
        )

    def _measure_quiet(self, server: ServerProcess) -> None:
        count = self.workload.quiet_requests
        self.log.add(_call(server.address, lambda client: measure_quiet(client, count)))
        with awake(self.engine_cores | self.other_cores):
            self.log.add(_call(server.address, lambda client: measure_quiet(client, count, "awake")))

    def measure_open_loops(self, capacity: float) -> None:
        """Every load with both batchings. They alternate in going first, so that both meet the same noise of the machine."""
        rounds, goal_load = self.workload.rounds, self.workload.goal_load
        loads = [load for load in self.workload.loads for _ in range(rounds if load == goal_load else 1)]
        outcomes: dict[tuple[float, Batching], Outcome] = defaultdict(Outcome)
        for index, load in enumerate(loads):
            for batching in _BATCHINGS[:: -1 if index % 2 else 1]:
                with start_server(self.bundle, batching, self.engine_cores) as server:
                    outcomes[load, batching] += _run_open_loop(server.address, load * capacity, self.workload)
        for (load, batching), outcome in outcomes.items():
            self.log.add(_open_loop_measurement(outcome, load, capacity, batching))

    def measure_overload_and_chaos(self, capacity: float) -> None:
        """Three and two times the capacity, on one server."""
        seconds, count = self.workload.overload_s, self.workload.chaos_requests
        with start_server(self.bundle, "step", self.engine_cores) as server:
            self.log.add(_call(server.address, lambda client: measure_overload(client, server, 3 * capacity, seconds)))
            self.log.add(_call(server.address, lambda client: measure_chaos(client, server, count, 2 * capacity)))


def run_against(address: str, workload: LoadWorkload, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure the phases that a running server allows; its saturated goodput is the capacity of which loads are shares."""
    log = MeasurementLog(report)
    log.add(_call(address, lambda client: measure_quiet(client, workload.quiet_requests, "as they are")))
    saturated = _call(address, lambda client: saturate(client, workload.saturated_s, _REQUESTS_IN_FLIGHT))
    capacity = log.add(saturated.measurement(phase="saturated", cores="its own", at_once=_REQUESTS_IN_FLIGHT))["goodput_per_s"]
    if not capacity:
        raise FlashdiffError(f"{address} answered none of the requests: its capacity is not known")
    for load in workload.loads:
        log.add(_open_loop_measurement(_run_open_loop(address, load * capacity, workload), load, capacity, "step"))
    overload = _call(address, lambda client: open_loop(client, 3 * capacity, workload.overload_s))
    log.add(overload.measurement(phase="overload", batching="step", load=3.0))
    return {"environment": read_environment({}) | {"server": address}, "rows": log.measurements}


def _run_open_loop(address: str, per_second: float, workload: Workload) -> Outcome:
    return _call(address, lambda client: open_loop(client, per_second, workload.open_loop_s))


def _open_loop_measurement(outcome: Outcome, load: float, capacity: float, batching: Batching) -> Measurement:
    return outcome.measurement(phase="open loop", batching=batching, load=load, offered_per_s=round(load * capacity, 2))


def _call(address: str, use: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """The result of `use` with a new client of the server."""
    gc.freeze()  # otherwise this process's full collections, 30 ms each, would count as the server's latency
    return use_client(connect_flashdiff, address, use)


def main() -> int:
    parser = command_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    what.add_argument("--server", metavar="HOST:PORT", help="a running flashdiff server that requires no token")
    parser.add_argument(
        "--protocol",
        choices=("grpc", "http"),
        default="grpc",
        help="http: quiet, saturated and open loop over both, in turns; default: %(default)s",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a second or two per phase: exercises the code, the numbers mean nothing"
    )
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, measurements and every latency")
    options = parser.parse_args()
    if options.server and options.protocol == "http":
        parser.error("--protocol http starts its own server: give a BUNDLE in place of --server")

    def measure() -> None:
        workload = QUICK if options.quick else LoadWorkload()
        if options.protocol == "http":
            results = run_protocols(options.bundle, workload, show)
            print(protocols_table(results["rows"]))
        else:
            results = run_against(options.server, workload, show) if options.server else run(options.bundle, workload, show)
            print(load_table(results["rows"]))
        write_results(options.json, results)

    return run_command("load.py", measure)


if __name__ == "__main__":
    sys.exit(main())
