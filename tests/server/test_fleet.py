"""Several devices: each order goes where it is done first, and what a failing device had accepted is answered once."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import numpy as np
import pytest
from served import MODEL, Clock, Gate, intercept, set_cost, until

from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BackendError, DeadlineError, DrainingError, OutOfMemoryError, OverloadedError, RequestError
from flashdiff.generate import generate
from flashdiff.orders import Order
from flashdiff.server.fleet import MOST_STRIKES, Fleet
from flashdiff.server.jobs import Job, Step
from flashdiff.server.loop import HANG_S
from flashdiff.server.metrics import Metrics
from flashdiff.server.models import Model
from flashdiff.tasks import check_order

DEVICES = tuple(Device(name=f"fake:{number}") for number in range(3))


class Asking:
    """A fleet of fakes whose clock stands until a test moves it."""

    def __init__(self, count: int, **options: object) -> None:
        devices = DEVICES[:count]
        self.fakes = [FakeComponents() for _ in devices]
        others = [Model(MODEL, fake, fake.costs, device) for fake, device in zip(self.fakes[1:], devices[1:], strict=True)]
        self.model = Model(MODEL, self.fakes[0], self.fakes[0].costs, devices[0], others)
        self.models = [self.model, *others]
        for fake in self.fakes:
            fake.calls.clear()  # those of opening it
        self.clock, self.lost = Clock(), list[Device]()
        self.metrics = Metrics([device.name for device in devices])
        self.fleet = Fleet(devices, self.metrics, clock=self.clock, on_lost=self.lost.append, **options)

    def order(self, seed: int = 0, **changes: object) -> Order:
        return check_order(self.fakes[0].spec, **{"prompt": f"prompt {seed}", "seed": seed, **changes})  # type: ignore[arg-type]

    def submit(self, seed: int = 0, timeout_s: float | None = None, steps: int = 4, count: int = 1, **options: object) -> Job:
        return self.fleet.submit(self.model, self.order(seed, steps=steps, count=count), timeout_s, **options)  # type: ignore[arg-type]

    def devices_of(self, jobs: list[Job]) -> Counter[str]:
        return Counter(job.answer.result(600).device for job in jobs)

    def counted(self, name: str, **labels: str) -> float:
        self.metrics.count()
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def finish(self) -> None:
        self.fleet.drain()
        assert self.fleet.join(600)
        assert self.fleet.pending_images == 0
        assert not self.fleet._placed


@pytest.fixture
def two() -> Iterator[Asking]:
    asking = Asking(2, max_pending_images=8)
    yield asking
    asking.finish()


def _same_pixels(job: Job) -> None:
    np.testing.assert_array_equal(job.answer.result(600).images, generate(FakeComponents(), [job.order])[0])


def _release(asking: Asking, jobs: list[Job]) -> None:
    for job in jobs:
        job.answer.exception(10)
        asking.fleet.release(job)


def test_an_order_goes_where_it_is_done_first(two: Asking) -> None:
    gates = [Gate(fake) for fake in two.fakes]
    for model in two.models:
        set_cost(model, "denoiser", 100.0)
    first = two.submit(1, steps=4, count=4)  # both are idle, and each is a full batch
    second = two.submit(2, steps=1, count=4)  # in 500 or 100 ms
    third = two.submit(3, steps=1, count=4)  # in 500 or 200
    for gate in gates:
        gate.open()
    _release(two, [first, second, third])
    assert [job.answer.result().device for job in (first, second, third)] == ["fake:0", "fake:1", "fake:1"]


def test_a_device_that_is_slower_now_gets_less(two: Asking) -> None:
    set_cost(two.models[0], "denoiser", 200.0)
    set_cost(two.models[1], "denoiser", 30.0)
    gates = [Gate(fake) for fake in two.fakes]
    jobs = [two.submit(seed, steps=1, count=4) for seed in range(2)]  # a full batch each: they cannot share one
    for gate in gates:
        gate.open()
    _release(two, jobs)
    assert two.devices_of(jobs) == {"fake:1": 2}
    assert two.counted("flashdiff_requests_total", device="fake:1", model="fake", outcome="ok") == 2


def test_the_work_of_one_client_is_spread_and_does_not_hold_up_another(two: Asking) -> None:
    for model in two.models:
        set_cost(model, "denoiser", 100.0)
    gates = [Gate(fake) for fake in two.fakes]
    ended = list[str]()
    jobs = [two.submit(seed, steps=1, count=2, client="many") for seed in range(6)]
    late = two.submit(99, steps=1, count=2, client="one")
    for name, job in (*((f"many {index}", job) for index, job in enumerate(jobs)), ("one", late)):
        job.answer.add_done_callback(lambda _, name=name: ended.append(name))
    for gate in gates:
        gate.open()
    _release(two, [*jobs, late])
    assert two.devices_of(jobs) == {"fake:0": 3, "fake:1": 3}
    assert ended.index("one") < len(ended) - 1


def test_a_queue_that_is_full_on_one_device_goes_to_another_and_a_refusal_has_the_earliest_room(two: Asking) -> None:
    gates = [Gate(fake) for fake in two.fakes]
    set_cost(two.models[1], "denoiser", 500.0)
    jobs = [two.submit(seed, count=4) for seed in range(4)]
    with pytest.raises(OverloadedError) as refused:
        two.submit(9)
    assert refused.value.retry_after_s == pytest.approx(0.1)  # the first's: the second has 4 s to do
    assert two.counted("flashdiff_refusals_total", cause="overloaded") == 1  # once, although both refused
    for gate in gates:
        gate.open()
    _release(two, jobs)
    assert two.devices_of(jobs) == {"fake:0": 2, "fake:1": 2}


def test_a_refused_deadline_has_the_best_of_the_promises(two: Asking) -> None:
    set_cost(two.models[0], "denoiser", 2000.0)
    set_cost(two.models[1], "denoiser", 1000.0)
    with pytest.raises(DeadlineError, match="this can be promised in about 1000 ms, the deadline is 500 ms away"):
        two.submit(steps=1, timeout_s=0.5)
    job = two.submit(steps=1, timeout_s=1.5)
    _release(two, [job])
    assert job.answer.result().device == "fake:1"
    assert two.fleet.estimate_ms(two.model, two.order(7, steps=1)) < 1100


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_what_a_lost_device_had_accepted_is_answered_once_by_the_other_with_the_same_pixels(two: Asking, how: str) -> None:
    gate = Gate(two.fakes[0], "denoiser", after=1)
    answers: Counter[Job] = Counter()
    jobs = [two.submit(seed, steps=1 + seed % 4) for seed in range(10)]
    for job in jobs:
        job.answer.add_done_callback(lambda _, job=job: answers.update([job]))
    assert gate.entered.wait(600)
    if how == "crash":
        intercept(two.fakes[0], "denoiser", lambda call, inputs: 1 / 0)
        gate.open()
        until(lambda: bool(two.fleet.workers[0].failure))
    else:
        until(lambda: not two.fleet.workers[1].pending_images)  # or its calls would count as hung as well
        two.clock.now += HANG_S + 1
        two.fleet.check_alive()
    _release(two, jobs)
    for job in jobs:
        _same_pixels(job)
    assert answers == dict.fromkeys(jobs, 1)
    gate.open()  # a hung call that comes back late changes nothing
    two.fleet.check_alive()
    assert two.lost == [DEVICES[0]]
    assert two.fleet.is_ready
    assert two.fleet.failure is None
    assert [bool(state.failure) for state in two.fleet.devices] == [True, False]
    assert two.counted("flashdiff_moved_requests_total", device="fake:0") > 0
    served = [two.counted("flashdiff_requests_total", device=d.name, model="fake", outcome="ok") for d in DEVICES[:2]]
    assert sum(served) == len(jobs)
    later = two.submit(20)
    _release(two, [later])
    assert later.answer.result().device == "fake:1"


def test_a_request_whose_steps_were_sent_is_failed_and_one_that_sent_none_is_moved(two: Asking) -> None:
    for model in two.models:
        set_cost(model, "denoiser", 100.0)
    gate = Gate(two.fakes[0], "denoiser", after=1)
    seen: dict[str, list[Step]] = {"begun": [], "waiting": []}
    begun = two.submit(1, steps=4, on_step=seen["begun"].append)
    other_gate = Gate(two.fakes[1], "decoder")
    blocking = two.submit(2, steps=4)  # on the second device
    assert gate.entered.wait(600)
    waiting = two.submit(3, steps=3, on_step=seen["waiting"].append)
    moved = two.fleet._placed[waiting.answer].worker is two.fleet.workers[0]
    intercept(two.fakes[0], "denoiser", lambda call, inputs: 1 / 0)
    gate.open()
    with pytest.raises(BackendError, match="the device thread has stopped"):
        begun.answer.result(600)
    other_gate.open()
    _release(two, [begun, blocking, waiting])
    assert moved
    _same_pixels(waiting)
    assert [step.step for step in seen["begun"]] == [1, 2]
    assert [step.step for step in seen["waiting"]] == [1, 2, 3]


def test_an_order_that_a_device_fails_is_tried_once_elsewhere(two: Asking) -> None:
    two.fakes[0].fail_on = "denoiser"
    job = two.submit()
    _release(two, [job])
    _same_pixels(job)
    assert job.answer.result().device == "fake:1"
    two.fakes[1].fail_on = "denoiser"
    bad = two.submit(1)
    with pytest.raises(BackendError, match="the fake denoiser failed, as asked"):
        bad.answer.result(600)
    two.fleet.release(bad)
    assert two.fleet.failure is None
    assert all(not worker.failure for worker in two.fleet.workers)  # one request is no reason to lose a device


def test_a_device_that_fails_what_the_other_serves_is_taken_out(two: Asking) -> None:
    two.fakes[0].fail_on = "text_encoder"
    for seed in range(MOST_STRIKES):
        assert not two.fleet.workers[0].failure
        job = two.submit(seed)
        _release(two, [job])
        _same_pixels(job)
    until(lambda: bool(two.fleet.workers[0].failure))
    assert "requests in a row" in two.fleet.devices[0].failure


def test_requests_that_fail_everywhere_or_for_their_own_fault_take_no_device_out(two: Asking) -> None:
    for fake in two.fakes:
        fake.fail_on = "denoiser"
    for seed in range(3 * MOST_STRIKES):
        job = two.submit(seed)
        assert isinstance(job.answer.exception(10), BackendError)
        two.fleet.release(job)
    for fake in two.fakes:
        fake.fail_on = None
    long = two.fleet.submit(two.model, two.order(prompt="word " * 40))
    assert isinstance(long.answer.exception(10), RequestError)
    two.fleet.release(long)
    assert all(not worker.failure for worker in two.fleet.workers)
    assert (
        two.counted("flashdiff_moved_requests_total", device="fake:0")
        + two.counted("flashdiff_moved_requests_total", device="fake:1")
        == 3 * MOST_STRIKES
    )


def test_a_request_without_memory_is_not_moved(two: Asking) -> None:
    def short(call: Callable[..., object], inputs: object) -> object:
        raise OutOfMemoryError("short")

    intercept(two.fakes[0], "denoiser", short)
    job = two.submit()
    assert isinstance(job.answer.exception(10), OutOfMemoryError)
    two.fleet.release(job)


def test_a_client_that_has_left_is_answered_by_no_other_device(two: Asking) -> None:
    gate = Gate(two.fakes[0])
    job = two.submit()
    assert gate.entered.wait(600)
    two.fleet.release(job)
    intercept(two.fakes[0], "text_encoder", lambda call, inputs: 1 / 0)
    gate.open()
    assert job.answer.exception(10)
    assert two.fakes[1].calls == []


def test_when_all_are_gone_what_was_accepted_is_failed_and_the_rest_refused() -> None:
    asking = Asking(3)
    gates = [Gate(fake) for fake in asking.fakes]
    jobs = [asking.submit(seed) for seed in range(9)]
    for fake in asking.fakes:
        intercept(fake, "denoiser", lambda call, inputs: 1 / 0)
    for gate in gates:
        gate.open()
    for job in jobs:
        assert isinstance(job.answer.exception(10), BackendError)
        asking.fleet.release(job)
    until(lambda: asking.fleet.failure is not None)
    assert not asking.fleet.is_ready
    with pytest.raises(BackendError, match="the device thread has stopped"):
        asking.submit(99)
    asking.fleet.check_alive()
    assert len(asking.lost) == 3
    asking.finish()


def test_a_fleet_that_drains_finishes_what_it_accepted_and_refuses_the_rest(two: Asking) -> None:
    gates = [Gate(fake) for fake in two.fakes]
    jobs = [two.submit(seed) for seed in range(4)]
    two.fleet.drain()
    with pytest.raises(DrainingError):
        two.submit(9)
    assert not two.fleet.join(0.01)
    for gate in gates:
        gate.open()
    _release(two, jobs)
    for job in jobs:
        _same_pixels(job)


def test_a_model_that_only_some_devices_have_is_served_by_those(two: Asking) -> None:
    fake = FakeComponents()
    alone = Model(MODEL, fake, fake.costs, DEVICES[1])
    jobs = [two.fleet.submit(alone, two.order(seed)) for seed in range(4)]
    wait([job.answer for job in jobs], 10)
    assert two.devices_of(jobs) == {"fake:1": 4}
    _release(two, jobs)


def test_under_load_with_one_device_killed_every_accepted_order_is_answered_once() -> None:
    asking = Asking(3)
    jobs, answers, noting = list[Job](), Counter[Job](), threading.Lock()

    def answered(job: Job) -> None:
        with noting:
            answers[job] += 1

    def ask(thread: int) -> None:
        for number in range(30):
            try:
                job = asking.submit(100 * thread + number, steps=1 + number % 4, client=f"client {thread}")
            except OverloadedError:
                continue
            job.answer.add_done_callback(lambda _, job=job: answered(job))
            with noting:
                jobs.append(job)
            if (thread, number) == (0, 10):
                intercept(asking.fakes[1], "denoiser", lambda call, inputs: 1 / 0)
            if number % 5:
                job.answer.exception(10)
            asking.fleet.release(job)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asking.fleet.drain()
    assert asking.fleet.join(600)
    assert asking.fleet.workers[1].failure
    assert answers == dict.fromkeys(jobs, 1)
    for job in jobs:
        if not job.answer.exception():
            _same_pixels(job)
    assert sum(job.answer.exception() is None for job in jobs) >= 8 * 24 - 8
    asking.finish()
