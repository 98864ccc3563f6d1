"""Step-level against request-level batching on a simulated device: latency and goodput by load, mix of steps, guidance and size.

    python benchmarks/batching.py --json batching.json --plot docs/images/batching.svg      # some minutes of one core

The scheduler, admission and device loop are the server's own; only device calls are simulated. Two networks:

- SD1.5 on an H200: each call takes the milliseconds that an H200 took for it (bfloat16, 512x512, `costs_ms` of
  benchmarks/results/2026-11-28-sd15-latency-h200.json).
- batch-friendly: assumed; a call takes the same time for one to eight rows: a step 10 ms, the text 1, decoding 5.

Calls of a second size, 768x768, are assumed to take 2.25 times as long (by pixels; attention takes more). A guided step takes two
slots of a batch. Host work, noise and files take no time. Decoding takes turns with steps, as on CPUs, or runs in parallel with
them, as on GPUs, where two calls under way slow each other (`flashdiff.server.planning.processor`).

Arrivals are Poisson, the same for both batchings; in bursts, eight requests come at once. No request has a deadline, and none is
refused; goodput is the share of the requests that are answered within five times what they take alone. Load is a share of what
the device could do if every batch were full.
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, result_file, run_command, show, write_results
from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement, MeasurementLog
from benchmarks.stats import percentile
from benchmarks.traffic.request_level import RequestLevelLoop
from benchmarks.traffic.simulated_networks import SIZES, NetworkCosts, networks, spec_and_costs
from flashdiff.components import Size
from flashdiff.engines.runtime.device import DEFAULT_DEVICE
from flashdiff.errors import ConfigError
from flashdiff.orders import Order
from flashdiff.server.planning.devices import SimulatedComponents, SimulatedModel, SimulatedWorker
from flashdiff.server.planning.simulation import Arrival, Fate, simulate
from flashdiff.server.planning.timeline import Timeline
from flashdiff.tasks import check_order

LOADS = (0.5, 0.7, 0.9)
DECODINGS = ("in turn", "parallel")
_PATIENCE = 5.0  # times what a request takes alone
_BURST = 8


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A mix of requests, all kinds equally frequent."""

    name: str
    steps: tuple[int, ...]
    guided: tuple[bool, ...] = (False,)
    sizes: tuple[Size, ...] = SIZES[:1]
    burst: int = 1
    """Requests that come at once."""


SCENARIOS = (
    Scenario(name="4 steps", steps=(4,)),
    Scenario(name="2 and 4 steps", steps=(2, 4)),
    Scenario(name="1, 4 and 8 steps", steps=(1, 4, 8)),
    Scenario(name="1, 4, 8 and 50 steps", steps=(1, 4, 8, 50)),
    Scenario(name="1, 4, 8 and 50 steps, in bursts of 8", steps=(1, 4, 8, 50), burst=_BURST),
    Scenario(name="1, 4, 8 and 50 steps, half of them guided", steps=(1, 4, 8, 50), guided=(False, True)),
    Scenario(name="1, 4, 8 and 50 steps, two sizes", steps=(1, 4, 8, 50), sizes=SIZES),
)


class RequestLevelSimulated(SimulatedWorker):
    """A simulated worker that batches by request."""

    loop_class = RequestLevelLoop


BATCHINGS: Mapping[str, type[SimulatedWorker]] = {"step": SimulatedWorker, "request": RequestLevelSimulated}


def run(scenarios: Sequence[Scenario], loads: Sequence[float], requests: int, report: Callable[[str], None]) -> dict[str, Any]:
    """{"environment": ..., "costs_ms": ..., "rows": [a row for each way of decoding, network, scenario, load and batching]}."""
    log, costs = MeasurementLog(report), networks()
    for decoding, network, scenario, load, batching in product(DECODINGS, costs, scenarios, loads, BATCHINGS):
        fates = simulated(scenario, load, batching, costs[network], requests, parallel_decode=decoding == "parallel")
        conditions = {"decoding": decoding, "network": network, "scenario": scenario.name, "load": load, "batching": batching}
        log.add(conditions | _summary(fates))
    return {"environment": read_environment({}), "costs_ms": costs, "requests": requests, "rows": log.measurements}


def simulated(
    scenario: Scenario, load: float, batching: str, costs: NetworkCosts, requests: int, *, parallel_decode: bool = False
) -> list[Fate]:
    """The fates of the scenario's requests; equal arguments give equal ones, and both batchings get the same requests."""
    models = {guided: _model(guided, costs, parallel_decode=parallel_decode) for guided in scenario.guided}
    timeline = Timeline()
    worker = BATCHINGS[batching](clock=timeline, max_pending_images=10**6)
    return simulate(_arrivals(scenario, load, models, requests), worker, models[scenario.guided[0]], timeline)


def _summary(fates: Sequence[Fate]) -> Measurement:
    latencies = {id(fate): 1000 * (fate.latency_s or 0.0) for fate in fates}
    fewest = min(fate.arrival.order.steps for fate in fates)
    quickest = [latencies[id(fate)] for fate in fates if fate.arrival.order.steps == fewest]
    return {
        "p50_ms": round(percentile(list(latencies.values()), 50), 1),
        "p99_ms": round(percentile(list(latencies.values()), 99), 1),
        "fewest_steps_p99_ms": round(percentile(quickest, 99), 1),
        "goodput": round(sum(latencies[id(fate)] <= _PATIENCE * _alone_ms(fate) for fate in fates) / len(fates), 4),
    }


def _alone_ms(fate: Fate) -> float:
    model = fate.arrival.model
    assert isinstance(model, SimulatedModel)
    return model.work(fate.arrival.order).alone_ms


def _model(guided: bool, costs: NetworkCosts, *, parallel_decode: bool) -> SimulatedModel:
    spec, of_sizes = spec_and_costs(costs, guided=guided)
    components = SimulatedComponents(spec, max(costs["denoiser"]), parallel_decode=parallel_decode)
    return SimulatedModel(components, of_sizes, DEFAULT_DEVICE)


def _arrivals(scenario: Scenario, load: float, models: Mapping[bool, SimulatedModel], requests: int) -> list[Arrival]:
    def order(steps: int, guided: bool, size: Size, number: int) -> Order:
        spec = models[guided].components.spec
        return check_order(spec, prompt=f"prompt {number}", seed=number, steps=steps, size=size)

    kinds = [(steps, guided, size) for steps in scenario.steps for guided in scenario.guided for size in scenario.sizes]
    work_s = sum(models[kind[1]].work(order(*kind, 0)).share_ms for kind in kinds) / len(kinds) / 1000
    rng, at, arrivals = random.Random(1), 0.0, list[Arrival]()
    while len(arrivals) < requests:
        at += rng.expovariate(load / work_s / scenario.burst)
        for _ in range(scenario.burst):
            kind = rng.choice(kinds)
            arrivals.append(Arrival(at=at, order=order(*kind, len(arrivals)), model=models[kind[1]]))
    return arrivals


def table(rows: Sequence[Measurement], load: float, decoding: str) -> str:
    """Markdown: at one load, step-level and request-level side by side."""
    titles = ("network and mix", "p50 ms", "p99 ms", "p99 of the fewest steps", "in five times alone", "p99 ratio")
    shown = ((one, other) for one, other in _pairs(rows) if (one["load"], one["decoding"]) == (load, decoding))
    return markdown_table(titles, (_cells(one, other) for one, other in shown))


def _pairs(rows: Sequence[Measurement]) -> list[tuple[Measurement, Measurement]]:
    """Step-level and request-level of the same network, scenario and load."""
    return [(one, other) for one, other in zip(rows[::2], rows[1::2], strict=True)]


def _cells(step: Measurement, request: Measurement) -> list[str]:
    both = [f"{step[name]:.0f}, {request[name]:.0f}" for name in ("p50_ms", "p99_ms", "fewest_steps_p99_ms")]
    goodput = f"{step['goodput']:.0%}, {request['goodput']:.0%}"
    return [f"{step['network']}: {step['scenario']}", *both, goodput, f"{step['p99_ms'] / request['p99_ms']:.2f}"]


def plot(rows: Sequence[Measurement]) -> Any:
    """p99 and goodput of step-level and request-level batching by load: a line a scenario, a column a network and decoding."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((row["network"], row["decoding"]) for row in rows))
    figure = Figure(figsize=(4 * len(kinds), 7), layout="constrained")
    grid = figure.subplots(2, len(kinds), sharex=True, squeeze=False)
    for column, kind in enumerate(kinds):
        pairs = [(one, other) for one, other in _pairs(rows) if (one["network"], one["decoding"]) == kind]
        for scenario in dict.fromkeys(one["scenario"] for one, _ in pairs):
            of_scenario = [(one, other) for one, other in pairs if one["scenario"] == scenario]
            loads = [100 * one["load"] for one, _ in of_scenario]
            ratios = [one["p99_ms"] / other["p99_ms"] for one, other in of_scenario]
            grid[0][column].plot(loads, ratios, marker="o", label=scenario)
            gains = [100 * (one["goodput"] - other["goodput"]) for one, other in of_scenario]
            grid[1][column].plot(loads, gains, marker="o", label=scenario)
        grid[0][column].set_title(f"{kind[0]}, decoding {kind[1]}")
        grid[0][column].set_yscale("log")
        grid[0][column].yaxis.set_major_formatter("{x:g}")
        grid[0][column].yaxis.set_minor_formatter("{x:g}")
        grid[0][column].axhline(1.0, color="#999999", linestyle=":")
        grid[1][column].axhline(0.0, color="#999999", linestyle=":")
        grid[1][column].set_xlabel("load, % of full batches")
    grid[0][0].set_ylabel("p99, step-level over request-level")
    grid[1][0].set_ylabel("goodput, step-level minus request-level, points")
    grid[0][0].legend(fontsize=7)
    return figure


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--requests", type=int, default=800, help="of each simulation; default: %(default)s")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write costs and measurements")
    parser.add_argument("--plot", type=result_file, metavar="FILE", help="draw an .svg or .png")
    options = parser.parse_args()

    def work() -> None:
        if options.requests < 100:
            raise ConfigError(f"--requests {options.requests}: a 99th percentile needs 100 or more")
        results = run(SCENARIOS, LOADS, options.requests, show)
        for decoding, load in product(DECODINGS, LOADS):
            print(f"\ndecoding {decoding}, load {load:.0%}; step-level, request-level\n")
            print(table(results["rows"], load, decoding))
        write_results(options.json, results)
        if options.plot:
            plot(results["rows"]).savefig(options.plot)

    return run_command("batching.py", work)


if __name__ == "__main__":
    sys.exit(main())
