"""Balancing policies on up to a thousand simulated devices: latency, requests in time, and what choosing costs.

    python benchmarks/balancing.py --json balancing.json --plot docs/images/balancing.svg      # some minutes of one core

Each device is a worker with the server's own admission and device loop; device calls take the milliseconds that an H200 took for
SD1.5 in bfloat16 (benchmarks/results/2026-11-28-sd15-latency-h200.json), decoding in parallel. Requests mix 2 and 4 steps, every
prompt is new, and all have a deadline of one second. The load is a share of what the devices could do if every batch were full.
Devices are alike, or one in ten is half as fast.

- round robin: the next device in turn.
- least request: the device with the fewest images pending, of all.
- least of two: of two random devices, as Envoy's LEAST_REQUEST chooses.
- promised end: the device that promises the earliest end, of all; when it refuses, the next: `flashdiff serve --device`.
- promise of two: the earlier promise of two random devices; not in flashdiff.

A policy that knows one device asks no other when that one refuses. The time to choose is processor time of this machine, and
includes admission. A simulation starts with idle devices; its first fifth is left out of the figures.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement, MeasurementLog
from benchmarks.stats import percentile
from benchmarks.traffic.simulated_networks import NetworkCosts, networks, spec_and_costs
from flashdiff.components import Costs
from flashdiff.engines.runtime.device import Device
from flashdiff.orders import Order
from flashdiff.server.fleet import Fleet
from flashdiff.server.jobs import Job
from flashdiff.server.models import Model
from flashdiff.server.names import Priority
from flashdiff.server.planning.devices import SimulatedComponents, SimulatedModel, SimulatedWorker, simulated_model
from flashdiff.server.planning.simulation import Arrival, simulate
from flashdiff.server.planning.timeline import Timeline
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order

COUNTS = (1, 10, 100, 1000)
SLOW_COUNTS = (10, 100)
"""Numbers of devices that are alike, and of which one in ten is slow."""
LOAD = 0.7
STEPS = (2, 4)
TIMEOUT_S = 1.0
_SLOW_EVERY = 10
_SLOWER = 2.0
_WARM_UP = 0.2
_ASK_ALL = ("promised end",)  # 0.1 ms for each device and request
_NETWORK = "SD1.5 on an H200"

Choice = tuple[Worker, Model]


class TimedFleet(Fleet):
    """A fleet that measures its processor time; its choice is the server's own: the promised end, of all."""

    spent_s = 0.0

    def submit(self, *arguments: Any, **options: Any) -> Job:
        started = time.process_time()
        try:
            return super().submit(*arguments, **options)
        finally:
            self.spent_s += time.process_time() - started


class RoundRobin(TimedFleet):
    """The next device in turn."""

    turn = -1

    def _ranked(self, model: Model, order: Order, within_s: float, client: str, priority: Priority) -> list[Choice]:
        self.turn = (self.turn + 1) % len(self.workers)
        return [self._place(model, self.turn)]

    def _place(self, model: Model, number: int) -> Choice:
        worker = self.workers[number]
        own = model.on(worker.device)
        assert own
        return worker, own


class LeastRequest(RoundRobin):
    """The device with the fewest pending images, of all."""

    def _ranked(self, model: Model, order: Order, within_s: float, client: str, priority: Priority) -> list[Choice]:
        return [self._place(model, min(range(len(self.workers)), key=lambda number: self.workers[number].pending_images))]


class LeastOfTwo(RoundRobin):
    """Of two random devices, the one with fewer pending images."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rng = random.Random(0)

    def _two(self) -> list[int]:
        return self._rng.sample(range(len(self.workers)), min(2, len(self.workers)))

    def _ranked(self, model: Model, order: Order, within_s: float, client: str, priority: Priority) -> list[Choice]:
        return [self._place(model, min(self._two(), key=lambda number: self.workers[number].pending_images))]


class PromiseOfTwo(LeastOfTwo):
    """Of two random devices, the one that promises the earlier end."""

    def _ranked(self, model: Model, order: Order, within_s: float, client: str, priority: Priority) -> list[Choice]:
        places = [self._place(model, number) for number in self._two()]
        return sorted(
            places,
            key=lambda place: place[0].admission.promise_ms(place[1], order, within_s, client=client, priority=priority),
        )


POLICIES: dict[str, type[TimedFleet]] = {
    "round robin": RoundRobin,
    "least request": LeastRequest,
    "least of two": LeastOfTwo,
    "promised end": TimedFleet,
    "promise of two": PromiseOfTwo,
}


def run(
    counts: Sequence[int],
    slow_counts: Sequence[int],
    most_asked: int,
    requests: Callable[[int], int],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """{"environment": ..., "costs_ms": ..., "rows": [a row for each kind of devices, number of them, and policy]}."""
    log, costs = MeasurementLog(report), networks()[_NETWORK]
    for slow, of_kind in ((False, counts), (True, slow_counts)):
        for count in of_kind:
            for policy in [policy for policy in POLICIES if policy not in _ASK_ALL or count <= most_asked]:
                log.add(measure(policy, count, requests(count), costs, slow=slow))
    return {"environment": read_environment({}), "load": LOAD, "costs_ms": costs, "rows": log.measurements}


def measure(policy: str, count: int, requests: int, costs: NetworkCosts, *, slow: bool) -> Measurement:
    """One simulation; equal arguments give equal numbers but for the time to choose."""
    spec, of_one = spec_and_costs(costs)
    speeds = [_SLOWER if slow and number % _SLOW_EVERY == 0 else 1.0 for number in range(count)]
    devices = [Device(name=f"simulated:{number}") for number in range(count)]
    components = SimulatedComponents(spec, max(costs["denoiser"]), parallel_decode=True)
    model = simulated_model(components, [_times(of_one, speed) for speed in speeds], devices)
    fast = SimulatedModel(components, of_one, devices[0])
    work_s = sum(fast.work(check_order(spec, prompt="p", steps=steps)).share_ms for steps in STEPS) / len(STEPS) / 1000
    timeline = Timeline()
    fleet = POLICIES[policy](devices, worker=SimulatedWorker, clock=timeline)
    rate = LOAD * sum(1 / speed for speed in speeds) / work_s
    fates = simulate(list(_arrivals(model, rate, requests)), fleet, model, timeline)
    counted = fates[int(_WARM_UP * requests) :]
    latencies = [1000 * fate.latency_s for fate in counted if fate.latency_s is not None]
    return {
        "devices": count,
        "slow": slow,
        "policy": policy,
        "requests": requests,
        "p50_ms": round(percentile(latencies, 50), 1),
        "p99_ms": round(percentile(latencies, 99), 1),
        "in_time": round(len(latencies) / len(counted), 4),
        "choosing_ms": round(1000 * fleet.spent_s / requests, 3),
    }


def _arrivals(model: SimulatedModel, rate: float, requests: int) -> Iterator[Arrival]:
    rng, at = random.Random(1), 0.0
    for number in range(requests):
        at += rng.expovariate(rate)
        order = check_order(model.components.spec, prompt=f"prompt {number}", seed=number, steps=rng.choice(STEPS))
        yield Arrival(at=at, order=order, timeout_s=TIMEOUT_S)


def _times(costs: Costs, factor: float) -> Costs:
    return {key: {batch: factor * ms for batch, ms in by_batch.items()} for key, by_batch in costs.items()}


def table(rows: Sequence[Measurement], *, slow: bool) -> str:
    """Markdown: by number of devices, for each policy p99, share in time, and time to choose."""

    def cell(count: int, policy: str) -> str:
        for row in rows:
            if (row["devices"], row["policy"], row["slow"]) == (count, policy, slow):
                return f"{row['p99_ms']:.0f}, {row['in_time']:.1%}, {row['choosing_ms']:.2f}"
        return "-"

    counts = dict.fromkeys(row["devices"] for row in rows if row["slow"] == slow)
    return markdown_table(("devices", *POLICIES), ([count, *(cell(count, policy) for policy in POLICIES)] for count in counts))


def plot(rows: Sequence[Measurement]) -> Any:
    """By number of devices, a line a policy: p99 with devices alike and with slow ones, and the time to choose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    columns = figure.subplots(1, 3)
    titles = (("p99_ms", False, "p99 ms, devices alike"), ("p99_ms", True, "p99 ms, one in ten half as fast"))
    for axes, (name, slow, title) in zip(columns, (*titles, ("choosing_ms", False, "ms to choose")), strict=True):
        for policy in POLICIES:
            points = [(row["devices"], row[name]) for row in rows if (row["policy"], row["slow"]) == (policy, slow)]
            axes.plot(*zip(*points, strict=True), marker="o", label=policy)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("devices")
        axes.set_title(title)
    columns[2].set_yscale("log")
    columns[2].yaxis.set_major_formatter("{x:g}")
    columns[0].legend(fontsize=8)
    return figure


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="up to ten devices: exercises the code, the numbers mean nothing")
    parser.add_argument(
        "--most-asked",
        type=int,
        default=max(COUNTS),
        metavar="N",
        help="leave the promised end out for more devices: it takes 0.1 ms for each device and request; default: %(default)s",
    )
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write costs and measurements")
    parser.add_argument("--plot", type=result_file, metavar="FILE", help="draw an .svg or .png")
    options = parser.parse_args()

    def work() -> None:
        if options.quick:
            results = run(COUNTS[:2], SLOW_COUNTS[:1], options.most_asked, lambda count: 100, show)
        else:
            results = run(COUNTS, SLOW_COUNTS, options.most_asked, lambda count: max(1000, 5 * count), show)
        for slow in (False, True):
            print(f"\n{'one device in ten half as fast' if slow else 'devices alike'}; p99 ms, in time, ms to choose\n")
            print(table(results["rows"], slow=slow))
        write_results(options.json, results)
        if options.plot:
            plot(results["rows"]).savefig(options.plot)

    return run_command("balancing.py", work)


if __name__ == "__main__":
    sys.exit(main())
