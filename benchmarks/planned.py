"""The plan against the server: what `flashdiff plan` forecasts for core sets, and what a real load on them measures.

    python benchmarks/planned.py bundle --device cpu:0,cpu:1 --json planned.json      # four minutes
    python benchmarks/planned.py bundle --device cpu:0,cpu:1 --sleep                  # the devices' calls compute nothing

Each round measures the costs as `flashdiff plan` does, starts a server on the devices, and sends it Poisson arrivals of 2 and 4
steps over a real port, with deadlines of one second. The rate is a share of what the measured costs allow, were every batch full.
Then the same load is simulated with the costs from before, and with those that the server has learned by the end, which include
what client, server and everything else on the machine took from its cores. Compared are times from acceptance to the file, as the
server's replies have them; the client's own are listed too, since the plan leaves the wire out.

With --sleep, device calls sleep for their measured costs: client and server then take no processor time from the devices, as on a
machine whose devices are GPUs, and what differs from the plan is the server's own doing.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import check_repeats, command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement, MeasurementLog
from benchmarks.stats import median_and_range, rounded_percentile
from benchmarks.traffic.calls import Outcome, connect_flashdiff, open_loop, use_client
from benchmarks.traffic.server_process import start_server
from benchmarks.traffic.sleeping import let_sleep
from benchmarks.traffic.workload import DEADLINE_S, STEPS
from flashdiff.components import Costs
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.device import Device, parse_devices
from flashdiff.errors import ConfigError
from flashdiff.server.client import AsyncClient
from flashdiff.server.planning.measuring import Measured, measure, open_together
from flashdiff.server.planning.plan import Demand, forecast, full_batches_s

_PERCENTS = (50, 95, 99)


class TimedClient:
    """flashdiff's client, which keeps the server's own time of every answer."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.total_ms: list[float] = []

    async def generate(self, prompt: str, **options: Any) -> object:
        result = await self._client.generate(prompt, **options)
        self.total_ms.append(result.timings["total"])
        return result


def run(
    bundle: Path,
    devices: Sequence[Device],
    loads: Sequence[float],
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
    *,
    sleep: bool = False,
) -> dict[str, Any]:
    """{"environment": ..., "rows": [a row for each load and round]}."""
    log = MeasurementLog(report)
    for round_ in range(1, rounds + 1):
        for load in loads[:: 1 if round_ % 2 else -1]:
            log.add({"round": round_, "load": load, **_compare(bundle, devices, load, seconds, sleep=sleep)})
    return {
        "environment": read_environment({"bundle": read_manifest(bundle)}),
        "devices": [device.name for device in devices],
        "seconds": seconds,
        "sleep": sleep,
        "rows": log.measurements,
    }


def _compare(bundle: Path, devices: Sequence[Device], load: float, seconds: float, *, sleep: bool) -> Measurement:
    shares = {steps: 1 / len(STEPS) for steps in STEPS}
    model = open_together(bundle, devices)
    alone = [own.costs.learned for own in map(model.on, devices) if own]
    if sleep:
        let_sleep(model, alone, devices)
    measured = measure(model, devices, shares, None, "png")
    del model  # its memory is the server's
    demand = Demand(rate=1.0, p99_s=DEADLINE_S, mix=shares, size=measured.size, timeout_s=DEADLINE_S, files_s=measured.files_s)
    rate = load * sum(1 / full_batches_s(measured.components, of, demand) for of in measured.costs)
    demand = demand.at(rate)
    with start_server(bundle, devices=devices, sleep_for=alone if sleep else ()) as server:
        outcome, server_ms = _real_load(server.address, rate, seconds)
        learned = server.counts().costs
    return {
        "rate_per_s": round(rate, 2),
        "sent": outcome.sent,
        "measured": {**_percentiles(server_ms), "in_time": round(outcome.statuses["OK"] / max(1, outcome.sent), 4)},
        "client": _percentiles(outcome.latencies_ms),
        "planned": _forecast(measured, measured.costs, demand, len(devices)),
        "planned_by_learned_costs": _forecast(measured, learned, demand, len(devices)),
    }


def _real_load(address: str, rate: float, seconds: float) -> tuple[Outcome, list[float]]:
    timed: list[TimedClient] = []

    @asynccontextmanager
    async def connect(address: str) -> Any:
        async with connect_flashdiff(address) as client:
            timed.append(TimedClient(client))
            yield timed[-1]

    outcome = use_client(connect, address, lambda client: open_loop(client, rate, seconds))
    return outcome, timed[0].total_ms[1:]  # without the one that warms up


def _forecast(measured: Measured, costs: Sequence[Costs], demand: Demand, devices: int) -> dict[str, float | None]:
    found = forecast(measured.components, costs, demand, devices, to_the_end=True)
    assert found
    times = {f"p{percent}_ms": found.latency_ms[f"p{percent}"] for percent in _PERCENTS}
    return {**times, "in_time": round(found.in_time, 4), "utilization": round(found.utilization, 3)}


def _percentiles(samples_ms: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}_ms": rounded_percentile(samples_ms, percent) for percent in _PERCENTS}


def table(rows: Sequence[Measurement]) -> str:
    """Markdown: by load, measured and planned percentiles, and the ratios of planned to measured: medians and ranges."""
    titles = ("load", "", "measured ms", "planned ms", "planned / measured", "by learned costs / measured")
    cells = []
    for load in dict.fromkeys(row["load"] for row in rows):
        of_load = [row for row in rows if row["load"] == load]
        for name in (f"p{percent}_ms" for percent in _PERCENTS):
            values = {side: [row[side][name] for row in of_load] for side in ("measured", "planned", "planned_by_learned_costs")}
            measured, planned, learned = values.values()
            ratios = [
                median_and_range([ours / theirs for ours, theirs in zip(side, measured, strict=True) if ours and theirs], 2)
                for side in (planned, learned)
            ]
            medians = [f"{statistics.median(value or 0.0 for value in side):.1f}" for side in (measured, planned)]
            cells.append([f"{load:.0%}", name.removesuffix("_ms"), *medians, *ratios])
    return markdown_table(titles, cells)


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", required=True, help="as of flashdiff serve")
    parser.add_argument("--loads", default="0.4,0.7", metavar="SHARE[,...]", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, each with all loads; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load; default: %(default)s")
    parser.add_argument("--sleep", action="store_true", help="device calls sleep for their costs instead of computing")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write the rounds there")
    options = parser.parse_args()

    def work() -> None:
        check_repeats(options.repeats)
        devices = parse_devices(options.device)
        results = run(
            options.bundle, devices, _parse_loads(options.loads), options.repeats, options.seconds, show, sleep=options.sleep
        )
        print(table(results["rows"]))
        write_results(options.json, results, indent=2)

    return run_command("planned.py", work)


def _parse_loads(text: str) -> list[float]:
    try:
        loads = [float(load) for load in text.split(",")]
    except ValueError:
        loads = [0.0]
    if not all(0 < load < 2 for load in loads):
        raise ConfigError(f"--loads {text}: give shares such as 0.4,0.7")
    return loads


if __name__ == "__main__":
    sys.exit(main())
