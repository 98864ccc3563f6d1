"""The simulation: it makes the real loop's batches, gives queueing theory's percentiles, and depends on its seed alone."""

import math
import random
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from served import MODEL, Clock
from simulated import RISING, costs_of

from flashdiff.components import Costs, Size
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.engines.runtime.fake import FLASH, GUIDED, FakeComponents
from flashdiff.errors import FlashdiffError
from flashdiff.orders import Order
from flashdiff.rows import draw_noise
from flashdiff.sampling import Sampler
from flashdiff.server.admission import Admission
from flashdiff.server.fleet import Fleet
from flashdiff.server.jobs import Job, Message
from flashdiff.server.loop import DeviceLoop, Noise
from flashdiff.server.models import Model
from flashdiff.server.names import Priority
from flashdiff.server.planning.devices import SimulatedWorker, simulated_model
from flashdiff.server.planning.processor import OVERLAP_SPEED, Processor
from flashdiff.server.planning.simulation import Arrival, Fate, simulate
from flashdiff.server.planning.timeline import Timeline
from flashdiff.tasks import check_order


def poisson(fake: FakeComponents, count: int, per_second: float, timeout_s: float | None = None) -> list[Arrival]:
    """Arrivals of every size and number of steps, equal for equal arguments."""
    rng, at, arrivals = random.Random(7), 0.0, []
    for number in range(count):
        at += rng.expovariate(per_second)
        order = check_order(
            fake.spec,
            prompt=f"prompt {rng.randrange(20 * count)}",
            seed=number,
            steps=rng.choice((1, 2, 4)),
            size=rng.choice(fake.spec.sizes),
            count=rng.choice((1, 1, 1, 2)),
        )
        arrivals.append(Arrival(at=at, order=order, timeout_s=timeout_s))
    return arrivals


def simulated(fake: FakeComponents, costs: Costs, arrivals: list[Arrival]) -> list[Fate]:
    timeline = Timeline()
    worker = SimulatedWorker(clock=timeline)
    return simulate(arrivals, worker, simulated_model(fake, [costs], [DEFAULT_DEVICE]), timeline)


def really_served(fake: FakeComponents, costs: Costs, arrivals: list[Arrival]) -> list[Fate]:
    """The real loop and admission around the fake model, whose calls move the clock on; requests that come meanwhile are
    submitted from within the call, as other threads would."""
    model, clock, inbox, coming = Model(MODEL, fake, costs), Clock(), deque[Message](), deque(arrivals)
    fake.calls.clear()
    start = clock.now
    loop = DeviceLoop(clock, None, lambda spec, order: _done(draw_noise(spec, order)), lambda call: None)
    outlook = loop.outlook()
    admission = Admission(lambda: outlook, inbox.append, clock)
    jobs: dict[Arrival, Job | str] = {}

    def take(arrival: Arrival) -> None:
        clock.now = start + arrival.at
        try:
            jobs[arrival] = admission.accept(
                model, arrival.order, arrival.timeout_s, client="", priority="normal", on_step=None, files_s=0.0
            )
        except FlashdiffError as error:
            jobs[arrival] = type(error).__name__

    call = fake.call

    def timed(part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        rows, size = len(next(iter(inputs.values()))), fake.spec.sizes[0]
        if "latents" in inputs:
            *_, height, width = inputs["latents"].shape
            size = Size(8 * width, 8 * height)
        by_batch = model.costs.first[size][part]
        end = clock.now + by_batch[min(batch for batch in by_batch if batch >= rows)] / 1000
        while coming and start + coming[0].at < end:
            take(coming.popleft())
        clock.now = end
        return call(part, inputs)

    fake.call = timed  # type: ignore[method-assign]
    ends: dict[int, float] = {}
    while True:
        while inbox:
            loop.handle(inbox.popleft())
        is_busy = loop.turn()
        outlook = loop.outlook()
        for job in [job for job in jobs.values() if isinstance(job, Job) and job.answer.done() and id(job) not in ends]:
            ends[id(job)] = clock.now
            admission.release(job)
        if not is_busy and not inbox:
            if not coming:
                break
            take(coming.popleft())
    return [_fate(arrival, jobs[arrival], ends, start) for arrival in arrivals]


def _fate(arrival: Arrival, job: Job | str, ends: dict[int, float], start: float) -> Fate:
    if isinstance(job, str):
        return Fate(arrival=arrival, error=job)
    if error := job.answer.exception(0):
        return Fate(arrival=arrival, error=type(error).__name__)
    return Fate(arrival=arrival, latency_s=ends[id(job)] - start - arrival.at, batches=job.answer.result().batches)


def _done(noise: Noise) -> "Future[Noise]":
    done: Future[Noise] = Future()
    done.set_result(noise)
    return done


@pytest.mark.parametrize("sampler", [FLASH, GUIDED], ids=["flash", "guided"])
@pytest.mark.parametrize("timeout_s", [None, 0.15])
def test_the_simulation_makes_the_batches_of_the_real_loop(sampler: Sampler, timeout_s: float | None) -> None:
    fake = FakeComponents(sampler)
    costs = costs_of(fake, RISING, {1: 1.0, 2: 1.5, 4: 2.5})
    arrivals = poisson(fake, 200, per_second=80.0 / sampler.evaluations_per_step, timeout_s=timeout_s)
    expected, found = really_served(fake, costs, arrivals), simulated(fake, costs, arrivals)
    assert [(fate.batches, fate.error) for fate in found] == [(fate.batches, fate.error) for fate in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.latency_s == pytest.approx(other.latency_s, abs=1e-9)
    assert max(max(fate.batches, default=0) for fate in found) == 4
    assert any(fate.error for fate in found) == (timeout_s is not None)


def test_a_device_of_one_row_waits_as_an_m_d_1_queue() -> None:
    """Percentiles of the waiting time against its distribution, which Erlang gave in 1909."""
    fake, load, count = FakeComponents(max_batch=1), 0.7, 4000
    rng, at, arrivals = random.Random(1), 0.0, []
    order = check_order(fake.spec, prompt="p", steps=1)
    for _ in range(count):
        at += rng.expovariate(load / 0.01)
        arrivals.append(Arrival(at=at, order=order))
    fates = simulated(fake, costs_of(fake, {1: 10.0}, {1: 0.0}), arrivals)
    waits = sorted((fate.latency_s or math.inf) - 0.01 for fate in fates)
    for share in (0.5, 0.9, 0.99):
        assert waited_at_most(waits[int(share * count)] / 0.01, load) == pytest.approx(share, abs=0.015)


def waited_at_most(services: float, load: float) -> float:
    """The share of an M/D/1 queue's customers that wait no longer than so many services."""
    terms = (
        (load * (k - services)) ** k / math.factorial(k) * math.exp(-load * (k - services)) for k in range(int(services) + 1)
    )
    return (1 - load) * sum(terms)


def fleet_of(fake: FakeComponents, count: int, costs: Costs, timeline: Timeline) -> tuple[Fleet, Any]:
    devices = [Device(name=f"simulated:{number}") for number in range(count)]
    return Fleet(devices, worker=SimulatedWorker, clock=timeline), simulated_model(fake, [costs] * count, devices)


def test_a_fleet_shares_the_load_and_equal_arguments_give_equal_fates() -> None:
    fake = FakeComponents()
    costs, arrivals = costs_of(fake, RISING, {1: 1.0, 2: 1.5, 4: 2.5}), poisson(fake, 300, 200.0)
    runs = []
    for _ in range(2):
        timeline = Timeline()
        runs.append(simulate(arrivals, *fleet_of(fake, 3, costs, timeline), timeline))
    assert runs[0] == runs[1]
    shares = Counter(fate.device for fate in runs[0])
    assert len(shares) == 3
    assert min(shares.values()) > 70


def test_calls_at_the_same_time_slow_each_other_and_the_device_counts_as_busy_once() -> None:
    timeline, ends = Timeline(), []
    processor = Processor(timeline)
    processor.start(1.0, lambda: ends.append(timeline.now))
    timeline.schedule(0.5, lambda: processor.start(1.0, lambda: ends.append(timeline.now)))
    timeline.run()
    together = 0.5 / OVERLAP_SPEED  # until the first, half done, is over
    assert ends == pytest.approx([0.5 + together, 0.5 + together + 0.5])
    assert processor.busy_s == pytest.approx(ends[1])


def test_parallel_decoding_lets_the_next_step_begin() -> None:
    fates = {}
    for is_parallel in (False, True):
        fake = FakeComponents(max_batch=1, parallel_decode=is_parallel)
        orders = [check_order(fake.spec, prompt="p", seed=seed, steps=1) for seed in range(2)]
        arrivals = [Arrival(at=0.0, order=order) for order in orders]
        fates[is_parallel] = simulated(fake, costs_of(fake, {1: 10.0}, {1: 10.0}), arrivals)
    in_turn, parallel = ([fate.latency_s for fate in fates[key]] for key in (False, True))
    assert in_turn == pytest.approx([0.03, 0.05])
    both = 0.01 / OVERLAP_SPEED
    assert parallel == pytest.approx([0.02 + both, 0.02 + both + 0.01])


@pytest.mark.parametrize(("timeout_s", "latencies"), [(None, [40, 40, 40, 40]), (0.055, [30, 50, 50, 50])])
def test_a_finished_row_waits_for_company_unless_its_deadline_is_near(timeout_s: float | None, latencies: list[float]) -> None:
    fake, flat = FakeComponents(), {1: 10.0, 4: 10.0}  # a call takes 10 ms, whatever its batch: a text, each step, decoding
    orders = [check_order(fake.spec, prompt=f"prompt {steps}", steps=steps) for steps in (1, 2, 2, 2)]
    arrivals = [Arrival(at=0.0, order=order, timeout_s=timeout_s if order.steps == 1 else None) for order in orders]
    fates = simulated(fake, costs_of(fake, flat, flat), arrivals)
    assert [1000 * (fate.latency_s or 0.0) for fate in fates] == pytest.approx(latencies)


@pytest.mark.parametrize("timeout_s", [None, 0.06])
@pytest.mark.parametrize(("of_many", "of_one"), [("low", "high"), ("normal", "normal")])
def test_a_request_does_not_wait_for_an_upscale_of_another_client(
    of_many: Priority, of_one: Priority, timeout_s: float | None
) -> None:
    fake, flat, timeline = FakeComponents(), {1: 10.0, 4: 10.0}, Timeline()
    worker, model = SimulatedWorker(clock=timeline), simulated_model(fake, [costs_of(fake, flat, flat)], [DEFAULT_DEVICE])
    picture = np.zeros((256, 256, 3), dtype=np.uint8)
    upscale = check_order(fake.spec, prompt="many", inputs={"image": picture}, parameters={"upscale": 2})
    assert upscale.rows == 81
    ends: dict[str, float] = {}

    def submit(client: str, order: Order, priority: Priority, timeout_s: float | None) -> None:
        job = worker.submit(model, order, timeout_s, client=client, priority=priority)
        job.answer.add_done_callback(lambda done: ends.update({client: timeline.now} if done.result() else {}))

    timeline.schedule(0.0, lambda: submit("many", upscale, of_many, None))
    one = check_order(fake.spec, prompt="one", steps=1)
    timeline.schedule(0.015, lambda: submit("one", one, of_one, timeout_s))
    timeline.run()
    assert ends["one"] == pytest.approx(0.05)  # after the call under way: its text, its step and its decoding
    steps = upscale.steps_taken
    assert ends["many"] == pytest.approx(0.03 + 0.01 * (1 + 21 + (steps + 1) * 21))  # 21 calls for 81 tiles
