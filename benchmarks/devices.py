"""Throughput of one bundle on one device against several: worker against fleet, without a network.

    python benchmarks/devices.py bundle --device cpu:0,cpu:1 --json devices.json

Both are opened before anything is measured, and measured in turn, so that both see the same noise of the machine. Requests mix
2 and 4 steps; four full batches a device are always in flight.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import check_repeats, command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.traffic.worker_rate import measure_rate
from benchmarks.traffic.workload import BATCHES_IN_FLIGHT
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.device import Device, parse_devices
from flashdiff.server.fleet import Fleet
from flashdiff.server.models import Model
from flashdiff.server.opening import open_model
from flashdiff.server.submitter import Submitter
from flashdiff.server.worker import Worker


def run(bundle: Path, devices: tuple[Device, ...], repeats: int, seconds: float, report: Callable[[str], None]) -> dict[str, Any]:
    """{"environment": ..., "rows": [images per second of each]}."""
    one, several = open_model(bundle), open_model(bundle, devices)
    alone, fleet = Worker(), Fleet(devices) if len(devices) > 1 else Worker(device=devices[0])
    sides: dict[str, tuple[Submitter, Model, int]] = {
        "default": (alone, one, 1),
        ",".join(device.name for device in devices): (fleet, several, len(devices)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, (submitter, model, count) in list(sides.items())[:: 1 if turn % 2 == 0 else -1]:
            in_flight = BATCHES_IN_FLIGHT * count * max(one.costs.current[one.components.spec.sizes[0]]["step"])
            made, spent = measure_rate(submitter, model, in_flight, seconds)
            rates[name].append(round(made / spent, 2))
            report(f"{name}: {rates[name][-1]} images/s")
    for submitter in (alone, fleet):
        submitter.drain()
        submitter.join(60)
    rows = [
        {"devices": name, "images_per_s": round(statistics.median(of), 2), "range": [min(of), max(of)], "rounds": of}
        for name, of in rates.items()
    ]
    return {"environment": read_environment({"bundle": read_manifest(bundle)}), "seconds": seconds, "rows": rows}


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", required=True, help="as of flashdiff serve")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement; default: %(default)s")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write the rates there")
    options = parser.parse_args()

    def work() -> None:
        check_repeats(options.repeats)
        results = run(options.bundle, parse_devices(options.device), options.repeats, options.seconds, show)
        for row in results["rows"]:
            show(f"{row['devices']}: median {row['images_per_s']} images/s, {row['range'][0]} to {row['range'][1]}")
        write_results(options.json, results, indent=2)

    return run_command("devices", work)


if __name__ == "__main__":
    sys.exit(main())
