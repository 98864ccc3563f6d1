"""How many devices a load needs: the fewest with which the simulated server answers it in time."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flashdiff.components import Components, Costs, Size
from flashdiff.engines.runtime.device import Device
from flashdiff.errors import ConfigError
from flashdiff.orders import Order
from flashdiff.server.fleet import Fleet
from flashdiff.server.image_threads import THREADS
from flashdiff.server.planning.devices import SimulatedModel, SimulatedWorker, simulated_model
from flashdiff.server.planning.simulation import Arrival, Fate, simulate
from flashdiff.server.planning.timeline import Timeline
from flashdiff.tasks import check_order
from flashdiff.tasks.samples import needed_inputs

MAX_DEVICES = 1000
IN_TIME = 0.99
"""The share of all requests, refused ones included, that must be answered within the wanted time."""
REQUESTS = 5000
"""Of one simulation: fifty of them decide the 99th percentile."""
_WARM_UP = 0.1  # share of the requests, from the start, that are left out: they find an empty server
_BUSY_WRITING = 0.8  # of the time of the threads that write files, at most: beyond that images wait for them
_GROWN = 1.5  # times longer in the last third than in the first: a queue that would grow for ever


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The load, and how fast it is to be answered."""

    rate: float
    """Requests a second; they come independently of each other (Poisson)."""
    p99_s: float
    mix: Mapping[int, float]
    """Shares of the requests by their number of steps."""
    size: Size
    timeout_s: float | None = None
    """The clients' deadline; None: they set none."""
    files_s: float = 0.0
    """How long writing a request's image file takes."""

    def at(self, rate: float) -> "Demand":
        """The same requests at another rate."""
        return replace(self, rate=rate)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What becomes of the load on so many devices."""

    devices: int
    servers: int
    """Processes that share the devices, as each has few threads that write files."""
    requests: int
    in_time: float
    """Share of the requests answered within the wanted time."""
    latency_ms: Mapping[str, float | None]
    """p50, p90, p95 and p99 of the answered requests, from arrival to files."""
    refused: float
    """Share of the requests that get no answer."""
    refusals: Mapping[str, int]
    """Their number by error."""
    utilization: float
    """Share of the time in which a device computes, mean of all devices."""
    mean_batch: float
    """Slots of a step, as a request sees them."""


def least_p99_s(components: Components, costs: Costs, demand: Demand) -> tuple[int, float]:
    """The number of steps that decides the least 99th percentile that any number of devices has, and that time."""
    model = SimulatedModel(components, costs, Device())
    share = 0.0
    alone = {steps: model.work(_order(components, demand, steps)).alone_ms / 1000 for steps in demand.mix}
    for steps, seconds in sorted(alone.items(), key=lambda one: one[1]):
        share += demand.mix[steps]
        if share >= IN_TIME:
            return steps, seconds + demand.files_s
    raise AssertionError("the shares of a mix sum to 1")


def plan(components: Components, costs: Sequence[Costs], demand: Demand, report: Callable[[str], None]) -> Forecast:
    """The forecast for the fewest devices that answer 99 % of the load in time; ConfigError where no number does.

    `costs` are those of one device, or of several that were measured together; the simulated ones take turns in having them.
    """
    _check_least(components, costs, demand)
    fewest = _fewest(components, costs, demand)
    if fewest > MAX_DEVICES:
        raise ConfigError(f"--rate {demand.rate:g}: this takes more than {MAX_DEVICES} devices; give at most the rate of so many")
    servers = max(1, math.ceil(demand.rate * demand.files_s / (_BUSY_WRITING * THREADS)))
    if servers > 1:
        report(
            f"writing files keeps {demand.rate * demand.files_s:.1f} threads busy, and a server has {THREADS}: {servers} servers"
        )
    forecasts: dict[int, Forecast] = {}

    def is_enough(devices: int) -> bool:
        found = forecast(components, costs, demand, devices, servers=servers)
        in_time = "too few" if found is None else f"{found.in_time:.1%} within {demand.p99_s:g} s"
        report(f"{devices} device{'s' * (devices > 1)}: {in_time}")
        if found:
            forecasts[devices] = found
        return found is not None

    return forecasts[_first(is_enough, fewest, demand)]


def forecast(
    components: Components,
    costs: Sequence[Costs],
    demand: Demand,
    devices: int,
    *,
    servers: int = 1,
    to_the_end: bool = False,
    seed: int = 0,
) -> Forecast | None:
    """What becomes of the load on so many devices; equal arguments give equal forecasts.

    None as soon as more than 1 % of the requests are late, or when the queue grows, unless the simulation goes on `to_the_end`.
    """
    timeline = Timeline()
    places = [Device(name=f"simulated:{number}") for number in range(devices)]
    model = simulated_model(components, [costs[number % len(costs)] for number in range(devices)], places)
    fleet = Fleet(places, worker=SimulatedWorker, clock=timeline)
    arrivals = list(arrivals_of(components, demand, REQUESTS, seed))
    counted_from, late = arrivals[int(_WARM_UP * REQUESTS)].at, 0

    def is_hopeless(fate: Fate) -> bool:
        nonlocal late
        late += fate.arrival.at >= counted_from and (fate.latency_s is None or fate.latency_s > demand.p99_s)
        return not to_the_end and late > (1 - IN_TIME) * (1 - _WARM_UP) * REQUESTS

    fates = simulate(
        arrivals, fleet, model, timeline, files_s=demand.files_s, file_threads=servers * THREADS, is_decided=is_hopeless
    )
    if not to_the_end and (len(fates) < len(arrivals) or _queue_grows(fates)):
        return None
    busy = [worker.processor.busy_s for worker in fleet.workers if isinstance(worker, SimulatedWorker)]
    return _summary(fates, demand, servers, busy, timeline.now)


def arrivals_of(components: Components, demand: Demand, requests: int, seed: int) -> Iterator[Arrival]:
    """The requests: every prompt a new one, and every client another."""
    rng, at = random.Random(seed), 0.0
    steps, shares = zip(*demand.mix.items(), strict=True)
    for number in range(requests):
        at += rng.expovariate(demand.rate)
        (chosen,) = rng.choices(steps, shares)
        yield Arrival(at=at, order=_order(components, demand, chosen, number), timeout_s=demand.timeout_s)


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile; None without samples."""
    return sorted(samples)[max(0, math.ceil(percent / 100 * len(samples)) - 1)] if samples else None


def _summary(fates: Sequence[Fate], demand: Demand, servers: int, busy_s: Sequence[float], end_s: float) -> Forecast:
    counted = fates[int(_WARM_UP * len(fates)) :]
    latencies = [fate.latency_s for fate in counted if fate.latency_s is not None]
    batches = [slots for fate in counted for slots in fate.batches]
    times = {f"p{percent}": percentile(latencies, percent) for percent in (50, 90, 95, 99)}
    return Forecast(
        devices=len(busy_s),
        servers=servers,
        requests=len(counted),
        in_time=sum(latency <= demand.p99_s for latency in latencies) / len(counted),
        latency_ms={name: None if seconds is None else round(1000 * seconds, 1) for name, seconds in times.items()},
        refused=1 - len(latencies) / len(counted),
        refusals=dict(Counter(fate.error for fate in counted if fate.error)),
        utilization=sum(busy_s) / len(busy_s) / end_s,
        mean_batch=sum(batches) / len(batches) if batches else 0.0,
    )


def _queue_grows(fates: Sequence[Fate]) -> bool:
    """Whether requests take longer and longer: the devices are too few, though none of these requests may be late yet."""
    times = [fate.latency_s for fate in fates[int(_WARM_UP * len(fates)) :] if fate.latency_s is not None]
    third = max(1, len(times) // 3)
    return sum(times[-third:]) > _GROWN * sum(times[:third])


def _check_least(components: Components, costs: Sequence[Costs], demand: Demand) -> None:
    """ConfigError for times that the fastest device cannot keep either: enough of those can serve the whole load."""
    steps, least_s = min((least_p99_s(components, of, demand) for of in costs), key=lambda least: least[1])
    alone = f"a request of {steps} step{'s' * (steps > 1)} takes {least_s:.3g} s on an idle device"
    if least_s > demand.p99_s:
        raise ConfigError(f"--p99 {demand.p99_s:g}: {alone}, so no number of devices has a lower 99th percentile; give more")
    if demand.timeout_s is not None and least_s > demand.timeout_s:
        raise ConfigError(f"--timeout {demand.timeout_s:g}: {alone}; give more")


def full_batches_s(components: Components, costs: Costs, demand: Demand) -> float:
    """The device's time for a request of the mix, on average, were every batch full and the text new."""
    model = SimulatedModel(components, costs, Device())
    return sum(share * model.work(_order(components, demand, steps)).share_ms / 1000 for steps, share in demand.mix.items())


def _fewest(components: Components, costs: Sequence[Costs], demand: Demand) -> int:
    """Surely no more than are needed: four fifths of the load's work in full batches, by the fastest device."""
    work_s = min(full_batches_s(components, of, demand) for of in costs)
    return max(1, math.floor(demand.rate * work_s * (0.7 if components.parallel_decode else 0.8)))


def _first(is_enough: Callable[[int], bool], fewest: int, demand: Demand) -> int:
    """The least number from `fewest` on that is enough: by steps that double, and then by halves."""
    below, step = fewest - 1, 1
    while not is_enough(at := min(MAX_DEVICES, below + step)):
        if at == MAX_DEVICES:
            raise ConfigError(
                f"--rate {demand.rate:g}: {MAX_DEVICES} devices are not enough; give a lower rate or a higher --p99"
            )
        below, step = at, 2 * step
    enough = at
    while enough - below > 1:
        middle = (below + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            below = middle
    return enough


def _order(components: Components, demand: Demand, steps: int, number: int = 0) -> Order:
    spec, inputs = components.spec, needed_inputs(components.spec, demand.size)
    return check_order(spec, prompt=f"prompt {number}", seed=number, steps=steps, size=demand.size, inputs=inputs)
