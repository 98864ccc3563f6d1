"""flashdiff, LitServe and Triton under the same arrivals, with the same bundle and engine on the same cores.

    python benchmarks/peers/compare.py BUNDLE --litserve PYTHON --pytriton PYTHON --json peers.json      # or make bench-peers

Each PYTHON belongs to an environment with the peer and what a bundle needs to run (`make bench-peers` makes them). A peer batches
requests and runs the whole pipeline on them, in batches without padding; flashdiff batches steps. Cores, prompts, seeds and
Poisson arrivals are those of load.py; loads are shares of flashdiff's saturated rate. The peers have no deadlines: a request with
one is a client that leaves after a second.

Every phase runs in three rounds. Each round starts every server anew and begins with another one. Tables and plots show medians,
tables also the range.
"""

import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.command import command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.measurements import MeasurementLog
from benchmarks.peers.processes import LITSERVE, PYTRITON, Peer, package_versions, start_peer
from benchmarks.peers.table import peers_table
from benchmarks.traffic.calls import Connect, ImageClient, Outcome, connect_flashdiff, open_loop, saturate, use_client
from benchmarks.traffic.cores import on_cores, split_cores
from benchmarks.traffic.server_process import start_server
from benchmarks.traffic.workload import Workload
from flashdiff.engines.bundle import read_manifest

FULL = Workload(rounds=3, saturated_s=10.0, loads=(0.4, 0.6, 0.8, 0.95), open_loop_s=12.0)
QUICK = Workload(rounds=2, saturated_s=0.5, loads=(0.5,), open_loop_s=0.5)

Loop = Callable[[ImageClient], Awaitable[Outcome]]
"""A loop of calls, through any client."""


def run(bundle: Path, peers: Sequence[tuple[Peer, Path]], workload: Workload, report: Callable[[str], None]) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}: measurements as load.py's, with `server`; the environment has the peers' versions."""
    engine_cores, other_cores = split_cores()
    manifest = read_manifest(bundle)
    environment = read_environment({"student": manifest})
    environment["peers"] = {peer.name: package_versions(python, peer.packages) for peer, python in peers}
    log = MeasurementLog(report)

    def measure(name: str, connect: Connect[Any], address: str, loop: Loop, conditions: dict[str, Any]) -> None:
        log.add(use_client(connect, address, loop).measurement(server=name, **conditions))

    def measure_flashdiff(loop: Loop, conditions: dict[str, Any]) -> None:
        with start_server(bundle, "step", engine_cores) as server:
            measure("flashdiff", connect_flashdiff, server.address, loop, conditions)

    def measure_peer(peer: Peer, python: Path, loop: Loop, conditions: dict[str, Any]) -> None:
        with start_peer(peer, python, bundle, engine_cores) as address:
            measure(peer.name, peer.connect, address, loop, conditions)

    def measure_all(loop: Loop, **conditions: Any) -> None:
        servers: list[Callable[[Loop, dict[str, Any]], None]] = [
            measure_flashdiff,
            *(partial(measure_peer, *peer) for peer in peers),
        ]
        for index in range(workload.rounds):
            first = index % len(servers)
            for measure_one in (*servers[first:], *servers[:first]):
                measure_one(loop, {**conditions, "round": index + 1})

    with on_cores(other_cores):
        in_flight = 2 * manifest.batch_sizes[-1] // manifest.model.sampler.evaluations_per_step
        measure_all(lambda client: saturate(client, workload.saturated_s, in_flight), phase="saturated")
        capacity = statistics.median(one["goodput_per_s"] for one in log.measurements if one["server"] == "flashdiff")
        for share in workload.loads:
            offered = share * capacity
            measure_all(
                lambda client, offered=offered: open_loop(client, offered, workload.open_loop_s),  # type: ignore[misc]
                phase="open loop",
                load=share,
                offered_per_s=round(offered, 2),
            )
    return {"environment": environment, "rows": log.measurements}


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--litserve", type=Path, metavar="PYTHON", help="of an environment with litserve")
    parser.add_argument("--pytriton", type=Path, metavar="PYTHON", help="of an environment with nvidia-pytriton")
    parser.add_argument(
        "--quick", action="store_true", help="half a second per phase: exercises the code, the numbers mean nothing"
    )
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, measurements and every latency")
    options = parser.parse_args()
    peers = [(peer, python) for peer, python in ((LITSERVE, options.litserve), (PYTRITON, options.pytriton)) if python]

    def measure() -> None:
        results = run(options.bundle, peers, QUICK if options.quick else FULL, show)
        print(peers_table(results["rows"]))
        write_results(options.json, results)

    return run_command("compare.py", measure)


if __name__ == "__main__":
    sys.exit(main())
