"""The worker with the fake backend: every accepted order is answered exactly once."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait

import numpy as np
import pytest

from flashdiff.components import Size
from flashdiff.engines.runtime.fake_backend import GUIDED, FakeComponents
from flashdiff.errors import BackendError, CancelledError, DeadlineError, DrainingError, OverloadedError, RequestError
from flashdiff.generate import Order, check_order, generate
from flashdiff.server.worker import Worker


class Gate:
    """Holds the device in its next call until opened, so that tests decide what is waiting meanwhile."""

    def __init__(self, fake: FakeComponents) -> None:
        self._open, self.entered = threading.Event(), threading.Event()
        called = fake._called

        def gated(part: str, rows: int) -> None:
            self.entered.set()
            assert self._open.wait(10)
            called(part, rows)

        fake._called = gated  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def fake() -> FakeComponents:
    return FakeComponents()


@pytest.fixture
def worker(fake: FakeComponents) -> Iterator[Worker]:
    worker = Worker(fake, fake.costs, max_pending_images=8)
    yield worker
    worker.drain()
    assert worker.join(10)
    assert worker._jobs == []


def _order(fake: FakeComponents, seed: int = 0, **changes: object) -> Order:
    return check_order(fake.spec, **{"prompt": f"prompt {seed}", "seed": seed, **changes})  # type: ignore[arg-type]


def test_everything_waiting_shares_the_next_steps_and_the_pixels_are_those_of_each_alone(
    fake: FakeComponents, worker: Worker
) -> None:
    gate = Gate(fake)
    first = worker.submit(_order(fake, steps=4))
    gate.entered.wait(10)
    others = [worker.submit(_order(fake, seed, steps=steps)) for seed, steps in ((1, 1), (2, 2), (3, 4))]
    gate.open()
    answers = [job.answer.result(10) for job in (first, *others)]
    assert ("denoiser", 4) in fake.calls
    assert sum(rows for part, rows in fake.calls if part == "denoiser") == 4 + 1 + 2 + 4
    for job, answer in zip((first, *others), answers, strict=True):
        np.testing.assert_array_equal(answer.images, generate(FakeComponents(), [job.order])[0])
        assert answer.timings.total >= answer.timings.denoise


def test_guided_rows_and_two_sizes_are_served_together() -> None:
    fake = FakeComponents(GUIDED)
    worker = Worker(fake, fake.costs)
    sizes = (Size(64, 64), Size(128, 64))
    jobs = [worker.submit(_order(fake, seed, size=sizes[seed % 2], count=3)) for seed in range(6)]
    for job in jobs:
        np.testing.assert_array_equal(job.answer.result(10).images, generate(FakeComponents(GUIDED), [job.order])[0])
    worker.drain()
    assert worker.join(10)


def test_a_full_queue_and_a_hopeless_deadline_are_refused_at_once(fake: FakeComponents, worker: Worker) -> None:
    gate = Gate(fake)
    jobs = [worker.submit(_order(fake, seed, count=4)) for seed in range(2)]
    with pytest.raises(OverloadedError, match="8 images are pending, at most 8 fit"):
        worker.submit(_order(fake))
    gate.open()
    wait([job.answer for job in jobs], 10)
    worker._costs["denoiser"][4] = 1000.0
    with pytest.raises(DeadlineError, match=r"this would take about \d+ ms, the deadline is 100 ms away"):
        worker.submit(_order(fake), timeout_s=0.1)
    with pytest.raises(DeadlineError):
        worker.submit(_order(fake), timeout_s=-1.0)


def test_who_left_and_whose_deadline_passed_free_their_place(fake: FakeComponents, worker: Worker) -> None:
    gate = Gate(fake)
    running = worker.submit(_order(fake))
    gate.entered.wait(10)
    left, late = worker.submit(_order(fake, 1)), worker.submit(_order(fake, 2), timeout_s=0.05)
    worker.cancel(left)
    time.sleep(0.1)
    gate.open()
    assert len(running.answer.result(10).images) == 1
    with pytest.raises(CancelledError):
        left.answer.result(10)
    with pytest.raises(DeadlineError, match="passed before"):
        late.answer.result(10)
    assert ("text_encoder", 1) in fake.calls
    assert all(rows == 1 for _, rows in fake.calls)


def test_cancelling_the_answer_itself_does_not_reach_the_worker(fake: FakeComponents, worker: Worker) -> None:
    gate = Gate(fake)
    job = worker.submit(_order(fake))
    assert not job.answer.cancel()  # what asyncio.wrap_future tries when its client leaves
    gate.open()
    assert job.answer.result(10).images


def test_a_failing_engine_fails_its_own_jobs_and_the_next_one_is_served(fake: FakeComponents, worker: Worker) -> None:
    fake.fail_on = "denoiser"
    with pytest.raises(BackendError, match="as asked"):
        worker.submit(_order(fake)).answer.result(10)
    fake.fail_on = None
    assert len(worker.submit(_order(fake)).answer.result(10).images) == 1


def test_a_prompt_that_is_too_long_does_not_take_its_neighbours_down(fake: FakeComponents, worker: Worker) -> None:
    gate = Gate(fake)
    running = worker.submit(_order(fake))
    gate.entered.wait(10)
    long, fine = worker.submit(_order(fake, prompt="word " * 40)), worker.submit(_order(fake, 1))
    gate.open()
    with pytest.raises(RequestError, match="at most 32 words"):
        long.answer.result(10)
    assert fine.answer.result(10).images
    assert running.answer.result(10).images


def test_an_unexpected_crash_answers_everyone_and_refuses_what_comes_later(fake: FakeComponents) -> None:
    worker = Worker(fake, fake.costs)
    fake.denoise = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(BackendError, match="device thread has stopped"):
        worker.submit(_order(fake)).answer.result(10)
    assert worker.join(10)
    with pytest.raises(BackendError, match="device thread has stopped"):
        worker.submit(_order(fake))


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(fake: FakeComponents, worker: Worker) -> None:
    gate = Gate(fake)
    accepted = worker.submit(_order(fake))
    worker.drain()
    with pytest.raises(DrainingError):
        worker.submit(_order(fake))
    gate.open()
    assert accepted.answer.result(10).images


def test_a_slow_past_does_not_refuse_for_ever(fake: FakeComponents, worker: Worker) -> None:
    worker._costs["denoiser"][4] = 1000.0
    for _ in range(200):
        try:
            worker.submit(_order(fake), timeout_s=0.5).answer.result(10)
            break
        except DeadlineError:
            continue
    else:
        pytest.fail("refused 200 times by an idle device")
