"""The worker with the fake backend: every accepted order is answered exactly once."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import from_image
from served import SIZE, Clock, Gate, Tensors, intercept, model_of, set_cost, set_costs, until

from flashdiff.components import Size
from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.errors import BackendError, CancelledError, DeadlineError, DrainingError, OverloadedError, RequestError
from flashdiff.generate import generate
from flashdiff.orders import Order
from flashdiff.server import admission as admission_module
from flashdiff.server.jobs import Called, Job, Step, progress_of
from flashdiff.server.loop import HANG_S
from flashdiff.server.scheduler import next_margin
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order


@pytest.fixture(params=[False, True], ids=["in turn", "in parallel"])
def fake(request: pytest.FixtureRequest) -> FakeComponents:
    return FakeComponents(parallel_decode=request.param)


class Asking:
    """A worker whose clock stands until a test moves it, and the model of its orders unless a test names another."""

    def __init__(self, fake: FakeComponents, **options: object) -> None:
        self.model, self.clock = model_of(fake), Clock()
        self.worker = Worker(**{"clock": self.clock, **options})  # type: ignore[arg-type]

    def submit(self, order: Order, timeout_s: float | None = None, **options: object) -> Job:
        return self.worker.submit(self.model, order, timeout_s, **options)  # type: ignore[arg-type]

    def finish(self) -> None:
        self.worker.drain()
        assert self.worker.join(600)
        assert self.worker.pending_images == 0


@pytest.fixture
def asking(fake: FakeComponents) -> Iterator[Asking]:
    asking = Asking(fake, max_pending_images=8)
    yield asking
    asking.finish()


def _order(fake: FakeComponents, seed: int = 0, **changes: object) -> Order:
    return check_order(fake.spec, **{"prompt": f"prompt {seed}", "seed": seed, **changes})  # type: ignore[arg-type]


def test_everything_waiting_shares_the_next_steps_and_the_pixels_are_those_of_each_alone(
    fake: FakeComponents, asking: Asking
) -> None:
    gate = Gate(fake)
    first = asking.submit(_order(fake, steps=4))
    gate.entered.wait(600)
    others = [asking.submit(_order(fake, seed, steps=steps)) for seed, steps in ((1, 1), (2, 2), (3, 4))]
    gate.open()
    answers = [job.answer.result(600) for job in (first, *others)]
    assert ("denoiser", 4) in fake.calls
    assert sum(rows for part, rows in fake.calls if part == "denoiser") == 4 + 1 + 2 + 4
    for job, answer in zip((first, *others), answers, strict=True):
        np.testing.assert_array_equal(answer.images, generate(FakeComponents(), [job.order])[0])
        assert answer.timings.total >= answer.timings.parts["denoiser"]


def test_guided_rows_and_two_sizes_are_served_together() -> None:
    fake = FakeComponents(GUIDED)
    asking = Asking(fake)
    sizes = (Size(64, 64), Size(128, 64))
    jobs = [asking.submit(_order(fake, seed, size=sizes[seed % 2], count=3)) for seed in range(6)]
    for job in jobs:
        np.testing.assert_array_equal(job.answer.result(600).images, generate(FakeComponents(GUIDED), [job.order])[0])
    asking.finish()


def test_a_full_queue_and_a_hopeless_deadline_are_refused_at_once(fake: FakeComponents, asking: Asking) -> None:
    gate = Gate(fake)
    jobs = [asking.submit(_order(fake, seed, count=4)) for seed in range(2)]
    with pytest.raises(OverloadedError, match="8 images are pending, at most 8 fit"):
        asking.submit(_order(fake))
    gate.open()
    wait([job.answer for job in jobs], 10)
    set_cost(asking.model, "denoiser", 1000.0)
    with pytest.raises(DeadlineError, match=r"this can be promised in about \d+ ms, the deadline is 100 ms away"):
        asking.submit(_order(fake), timeout_s=0.1)
    with pytest.raises(DeadlineError):
        asking.submit(_order(fake), timeout_s=-1.0)


def test_departed_clients_and_passed_deadlines_free_their_places(fake: FakeComponents) -> None:
    asking, gate = Asking(fake), Gate(fake)
    running = asking.submit(_order(fake))
    gate.entered.wait(600)
    left, late = asking.submit(_order(fake, 1)), asking.submit(_order(fake, 2), timeout_s=0.05)
    asking.worker.release(left)
    asking.clock.now += 0.1
    gate.open()
    assert len(running.answer.result(600).images) == 1
    with pytest.raises(CancelledError):
        left.answer.result(600)
    with pytest.raises(DeadlineError, match="cannot be kept"):
        late.answer.result(600)
    assert ("text_encoder", 1) in fake.calls
    assert all(rows == 1 for _, rows in fake.calls)
    asking.finish()


def test_cancelling_the_answer_itself_does_not_reach_the_worker(fake: FakeComponents, asking: Asking) -> None:
    gate = Gate(fake)
    job = asking.submit(_order(fake))
    assert not job.answer.cancel()  # what asyncio.wrap_future tries when its client leaves
    gate.open()
    assert job.answer.result(600).images


def test_a_failing_engine_fails_its_own_jobs_and_the_next_one_is_served(fake: FakeComponents, asking: Asking) -> None:
    fake.fail_on = "denoiser"
    with pytest.raises(BackendError, match="as asked"):
        asking.submit(_order(fake)).answer.result(600)
    fake.fail_on = None
    assert len(asking.submit(_order(fake)).answer.result(600).images) == 1


def test_a_prompt_that_is_too_long_does_not_take_its_neighbours_down(fake: FakeComponents, asking: Asking) -> None:
    gate = Gate(fake)
    running = asking.submit(_order(fake))
    gate.entered.wait(600)
    long, fine = asking.submit(_order(fake, prompt="word " * 40)), asking.submit(_order(fake, 1))
    gate.open()
    with pytest.raises(RequestError, match="at most 32 words"):
        long.answer.result(600)
    assert fine.answer.result(600).images
    assert running.answer.result(600).images


def test_an_unexpected_crash_answers_every_job_and_refuses_later_ones(fake: FakeComponents) -> None:
    asking = Asking(fake)
    intercept(fake, "denoiser", lambda call, inputs: 1 / 0)
    with pytest.raises(BackendError, match="device thread has stopped"):
        asking.submit(_order(fake)).answer.result(600)
    assert asking.worker.join(600)
    with pytest.raises(BackendError, match="device thread has stopped"):
        asking.submit(_order(fake))


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(fake: FakeComponents, asking: Asking) -> None:
    gate = Gate(fake)
    accepted = asking.submit(_order(fake))
    asking.worker.drain()
    with pytest.raises(DrainingError):
        asking.submit(_order(fake))
    gate.open()
    assert accepted.answer.result(600).images


def test_each_size_costs_what_its_own_calls_take(fake: FakeComponents, asking: Asking) -> None:
    small, large = fake.spec.sizes

    def slow(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        asking.clock.now += 0.01
        return call(inputs)

    for part in ("denoiser", "decoder"):
        intercept(fake, part, slow)
    asking.submit(_order(fake, size=large, steps=1)).answer.result(600)
    costs = asking.model.costs.current
    for part in ("denoiser", "decoder"):
        assert costs[large][part][4] > costs[small][part][4] == 0
    set_cost(asking.model, "denoiser", 1000.0, large)
    with pytest.raises(DeadlineError):
        asking.submit(_order(fake, 1, size=large), timeout_s=0.5)
    assert asking.submit(_order(fake, 2, size=small), timeout_s=0.5).answer.result(600)


def test_a_slow_past_does_not_refuse_for_ever(fake: FakeComponents, asking: Asking) -> None:
    set_cost(asking.model, "denoiser", 1000.0)

    def is_accepted() -> bool:
        try:
            return bool(asking.submit(_order(fake), timeout_s=0.5).answer.result(600))
        except DeadlineError:
            return False

    until(is_accepted)


def test_every_step_of_every_row_is_reported_with_a_picture_of_its_estimate(fake: FakeComponents, asking: Asking) -> None:
    steps: list[Step] = []
    job = asking.submit(_order(fake, steps=3, count=2), on_step=steps.append)
    images = job.answer.result(600).images
    assert [(step.index, step.step, step.total) for step in steps] == [(i, s, 3) for s in (1, 2, 3) for i in (0, 1)]
    assert steps[-1].picture.shape == (8, 8, 3)
    assert np.abs(steps[-1].picture.astype(int) - images[1][::8, ::8]).max() <= 1  # the fake decodes by repeating cells


def test_a_text_read_before_is_not_read_again(fake: FakeComponents, asking: Asking) -> None:
    first = asking.submit(_order(fake, prompt="again")).answer.result(600)
    second = asking.submit(_order(fake, prompt="again")).answer.result(600)
    np.testing.assert_array_equal(first.images, second.images)
    assert sum(part == "text_encoder" for part, _ in fake.calls) == 1


def test_a_text_read_before_costs_its_request_no_time(fake: FakeComponents, asking: Asking) -> None:
    asking.submit(_order(fake, prompt="known", steps=1)).answer.result(600)
    set_cost(asking.model, "text_encoder", 5000.0)
    gate = Gate(fake)
    job = asking.submit(_order(fake, prompt="known", steps=1), timeout_s=3.0)
    assert not job.whole.prepare  # at its first turn too, when it might be dropped
    with pytest.raises(DeadlineError):
        asking.submit(_order(fake, prompt="new", steps=1), timeout_s=3.0)
    gate.open()
    assert job.answer.result(600).images


def test_noise_is_drawn_while_the_device_reads_the_text(fake: FakeComponents, asking: Asking) -> None:
    gate = Gate(fake)
    job = asking.submit(_order(fake, steps=3, count=2))
    gate.entered.wait(600)
    running = asking.worker._loop._running[job]
    assert running.noise
    drawn = running.noise.result(600)
    assert not fake.calls
    gate.open()
    np.testing.assert_array_equal(job.answer.result(600).images, generate(FakeComponents(), [job.order])[0])
    assert [row.later_noises for row in running.rows] == [later for _, *later in drawn]


def test_two_models_are_served_side_by_side() -> None:
    fakes = FakeComponents(), FakeComponents(GUIDED)
    asking, other = Asking(fakes[0]), model_of(fakes[1])
    jobs = [asking.submit(_order(fakes[0], 1)), asking.worker.submit(other, _order(fakes[1], 2, negative_prompt="dull"))]
    for fake, job in zip(fakes, jobs, strict=True):
        np.testing.assert_array_equal(job.answer.result(600).images, generate(fake, [job.order])[0])
    asking.finish()


def test_one_row_that_is_not_finite_does_not_take_its_neighbours_down(fake: FakeComponents, asking: Asking) -> None:
    bad_color = fake.call("text_encoder", fake.tokenize(["bad"]))["color"][0, 0]

    def poisoned(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        outputs = call(inputs)
        outputs["output"][inputs["color"][:, 0] == bad_color] = np.nan
        return outputs

    gate = Gate(fake)
    running = asking.submit(_order(fake))
    gate.entered.wait(600)
    intercept(fake, "denoiser", poisoned)
    bad, fine = asking.submit(_order(fake, prompt="bad")), asking.submit(_order(fake, 1))
    gate.open()
    with pytest.raises(BackendError, match="not finite"):
        bad.answer.result(600)
    for job in (running, fine):
        np.testing.assert_array_equal(job.answer.result(600).images, generate(FakeComponents(), [job.order])[0])


def test_one_client_leaves_room_in_the_queue_and_the_refusal_says_when_to_come_again(
    fake: FakeComponents, asking: Asking
) -> None:
    set_cost(asking.model, "denoiser", 100.0)
    gate = Gate(fake)
    greedy = asking.submit(_order(fake, count=6), client="greedy")
    with pytest.raises(OverloadedError, match="6 images of yours are pending, at most 6 fit; try again in about") as caught:
        asking.submit(_order(fake), client="greedy")
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0.1
    modest = asking.submit(_order(fake, count=2), client="modest")
    gate.open()
    assert modest.answer.result(600)
    assert greedy.answer.result(600)


def test_large_images_fill_the_queue_by_their_bytes(
    fake: FakeComponents, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "MAX_PENDING_BYTES", 3 * 64 * 64 * 3)
    gate = Gate(fake)
    jobs = [asking.submit(_order(fake, size=Size(128, 64)))]
    with pytest.raises(OverloadedError, match="MB of images are pending"):
        asking.submit(_order(fake, size=Size(128, 64)))
    jobs.append(asking.submit(_order(fake)))
    gate.open()
    wait([job.answer for job in jobs], 10)
    with pytest.raises(OverloadedError, match="MB of images are pending"):  # made, but not yet sent
        asking.submit(_order(fake, size=Size(128, 64)))
    for job in jobs:
        asking.worker.release(job)
    assert asking.submit(_order(fake, size=Size(128, 64))).answer.result(600)


def test_a_hundred_of_one_client_do_not_go_before_the_one_of_another() -> None:
    fake = FakeComponents()
    asking = Asking(fake)
    set_cost(asking.model, "denoiser", 1000.0)
    gate = Gate(fake)
    many = [asking.submit(_order(fake, seed, steps=1), client="many") for seed in range(40)]
    one = asking.submit(_order(fake, 99, steps=1), client="one")
    ended: list[Job] = []
    for job in (*many, one):
        job.answer.add_done_callback(lambda _, job=job: ended.append(job))  # type: ignore[misc]
    gate.open()
    wait([job.answer for job in (*many, one)], 10)
    assert ended.index(one) < 20
    asking.finish()


def test_an_urgent_request_breaks_no_promise_and_is_not_refused_for_a_backlog_without_deadlines(
    fake: FakeComponents, asking: Asking
) -> None:
    set_cost(asking.model, "denoiser", 100.0)
    gate = Gate(fake)
    patient = asking.submit(_order(fake, count=3, steps=4))
    hurried = asking.submit(_order(fake, 1, steps=1), timeout_s=0.35)  # the patient one alone would take longer than that
    with pytest.raises(DeadlineError):
        asking.submit(_order(fake, 2, steps=4, count=4), timeout_s=0.35)
    gate.open()
    assert hurried.answer.result(600)
    assert patient.answer.result(600)


def test_promises_to_waiting_requests_leave_a_margin_that_widens_when_one_is_broken(fake: FakeComponents, asking: Asking) -> None:
    least = asking.worker._loop._margin
    set_cost(asking.model, "denoiser", 1000.0)
    gate = Gate(fake)
    asking.submit(_order(fake, 0, steps=1, count=4), priority="high")
    assert gate.entered.wait(600)
    # The margin matters to the first three requests, of which two are refused at once.
    jobs = [asking.submit(_order(fake, seed, steps=1), timeout_s=4.0) for seed in range(1, 4)]
    jobs.append(asking.submit(_order(fake, 4, steps=1), timeout_s=99.0))
    assert [job.is_tight for job in jobs] == [True, True, True, False]
    for job in (*jobs[:2], jobs[3]):
        object.__setattr__(job, "deadline", 0.0)  # as if the clock had jumped for these alone
    gate.open()
    assert jobs[2].answer.result(600).images
    for job in (*jobs[:2], jobs[3]):
        with pytest.raises(DeadlineError):
            job.answer.result(600)
    assert asking.worker._loop._margin == next_margin(next_margin(least, kept=False), kept=True)


def test_the_margin_decides_which_requests_are_promised_a_time(fake: FakeComponents, asking: Asking) -> None:
    set_cost(asking.model, "denoiser", 1000.0)
    gate = Gate(fake)
    asking.submit(_order(fake, 0, steps=1, count=4), priority="high")
    assert gate.entered.wait(600)
    asking.submit(_order(fake, 1, steps=1), timeout_s=3.0)
    asking.worker._outlook = asking.worker._outlook._replace(margin=3.0)
    with pytest.raises(DeadlineError, match="promised in about 4"):
        asking.submit(_order(fake, 2, steps=1), timeout_s=3.0)
    gate.open()


def test_a_call_that_hangs_answers_every_job_and_refuses_later_ones(fake: FakeComponents) -> None:
    asking = Asking(fake)
    gate = Gate(fake)
    stuck = asking.submit(_order(fake))
    gate.entered.wait(600)
    asking.worker.check_alive()
    assert not stuck.answer.done()
    asking.clock.now += HANG_S + 1
    asking.worker.check_alive()
    with pytest.raises(BackendError, match="has not come back"):
        stuck.answer.result(0)
    with pytest.raises(BackendError, match="has not come back"):
        asking.submit(_order(fake))
    gate.open()
    assert asking.worker.join(600)


def test_what_is_left_of_a_job_is_known_after_every_call(
    fake: FakeComponents, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a job whose text was encoded in another job's call."""
    gate, jobs, loop = Gate(fake), list[Job](), asking.worker._loop
    take = loop._take

    def check(called: Called) -> None:
        take(called)
        for running in loop._running.values():
            assert loop._progress[running.job] == progress_of(running)

    monkeypatch.setattr(loop, "_take", check)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    for seed in range(6):
        order = _order(fake, seed, prompt="the same", steps=1 + seed % 3)
        jobs.append(asking.submit(from_image(order, picture, 1.0) if seed % 2 else order))
        assert jobs[-1].whole.prepare["text_encoder"] == 1
    gate.open()
    for job in jobs:
        assert len(job.answer.result(600).images) == 1
    assert [rows for part, rows in fake.calls if part == "encoder"] == [3]


def test_images_to_start_from_are_encoded_together_and_one_that_fails_takes_none_with_it(
    fake: FakeComponents, asking: Asking
) -> None:
    pictures = [np.full((64, 64, 3), shade, dtype=np.uint8) for shade in (10, 99, 200)]
    orders = [from_image(_order(fake, seed), picture, 0.5) for seed, picture in enumerate(pictures)]
    alone = [generate(FakeComponents(), [order])[0][0] for order in orders]
    gate = Gate(fake)

    def fail_dark(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        outputs = call(inputs)
        if inputs["images"].min() < -0.9:
            raise BackendError("too dark")
        return outputs

    intercept(fake, "encoder", fail_dark)
    jobs = [asking.submit(order) for order in orders]
    gate.open()
    with pytest.raises(BackendError, match="too dark"):
        jobs[0].answer.result(600)
    for job, expected in zip(jobs[1:], alone[1:], strict=True):
        np.testing.assert_array_equal(job.answer.result(600).images[0], expected)


def test_an_order_larger_than_a_batch_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts and steps done count no more, or it would be given up as too late on the way."""
    fake = FakeComponents()
    asking = Asking(fake)

    def called(part: str, rows: int) -> None:
        asking.clock.now += 0.02

    monkeypatch.setattr(fake, "_called", called)
    set_costs(asking.model, 20.0)
    order = _order(fake, count=7, steps=3)
    promised_s = asking.worker.estimate_ms(asking.model, order) / 1000
    assert promised_s >= 0.02 * (1 + 2 * 3 + 2)
    assert len(asking.submit(order, timeout_s=1.01 * promised_s).answer.result(600).images) == 7
    asking.finish()


def test_patient_requests_do_not_shut_out_an_urgent_one_which_must_not_break_their_promises(fake: FakeComponents) -> None:
    asking = Asking(fake)
    set_costs(asking.model, 1000.0)
    gate = Gate(fake)
    patient = [  # 6 s each, 60 in all: with the margin for waiting, the last is promised in 82
        asking.submit(_order(fake, seed, count=4, steps=4), timeout_s=83, priority="low") for seed in range(10)
    ]
    hurried = asking.submit(_order(fake, 99, steps=1), timeout_s=5, client="another")  # 3 s
    assert all(job.due > hurried.due for job in patient)
    with pytest.raises(DeadlineError, match="late that were accepted before"):
        asking.submit(_order(fake, 98, count=16, steps=4), timeout_s=60)  # 21 s
    gate.open()
    wait([job.answer for job in (*patient, hurried)], 30)
    asking.finish()


def test_a_promise_outlasts_later_requests_without_a_deadline(fake: FakeComponents) -> None:
    """Whatever its priority, the later request goes first only where that makes no promised one late."""
    asking = Asking(fake)
    set_costs(asking.model, 1000.0)
    gate = Gate(fake)
    promised = asking.submit(_order(fake, steps=4), timeout_s=20)  # 6 s
    asking.clock.now += 0.001
    later = asking.submit(_order(fake, 1, steps=1), timeout_s=60)
    long = asking.submit(_order(fake, 2, count=12, steps=4), priority="high", client="another")  # 16 s
    assert promised.due == long.due < later.due
    short = asking.submit(_order(fake, 3, steps=1), priority="high", client="a third")
    assert short.due < promised.due
    gate.open()
    wait([job.answer for job in (promised, later, long, short)], 30)
    asking.finish()


def test_an_estimate_counts_other_waiting_requests_and_the_clients_own(fake: FakeComponents) -> None:
    asking = Asking(fake)
    set_costs(asking.model, 1000.0)
    gate = Gate(fake)

    def estimate_s(client: str) -> float:
        return asking.worker.estimate_ms(asking.model, _order(fake, 99, steps=2), client=client) / 1000

    assert estimate_s("one") == pytest.approx(4)
    waiting = [asking.submit(_order(fake, seed, count=4, steps=4), client="one") for seed in range(3)]
    assert estimate_s("another") < estimate_s("one") == pytest.approx(3 * 6 + 4)
    gate.open()
    wait([job.answer for job in waiting], 30)
    asking.finish()


def test_a_text_that_two_ask_for_costs_what_one_costs(fake: FakeComponents, asking: Asking) -> None:
    asking.model.costs.replace("text_encoder", SIZE, {1: 1.0, 2: 1000.0})
    asking.model.costs.first = asking.model.costs.current
    gate = Gate(fake)
    first = asking.submit(_order(fake))
    gate.entered.wait(600)
    alike = [asking.submit(_order(fake, seed, prompt="the same")) for seed in (1, 2)]
    gate.open()
    wait([job.answer for job in (first, *alike)], 10)
    assert fake.calls.count(("text_encoder", 1)) == 2
    assert asking.model.costs.current[SIZE]["text_encoder"][2] > 950  # there was no call of two texts to learn from


def test_refusing_while_idle_does_not_make_the_costs_vanish() -> None:
    fake = FakeComponents(delay_s=0.001)
    asking = Asking(fake)
    first = asking.model.costs.current
    set_costs(asking.model, 100.0)
    for _ in range(100):
        with pytest.raises(DeadlineError):
            asking.submit(_order(fake), timeout_s=-1.0)
    asking.finish()
    assert asking.model.costs.current == first


def test_finished_rows_are_decoded_while_others_take_their_steps() -> None:
    fake = FakeComponents(parallel_decode=True)
    asking = Asking(fake)
    decoding, second_steps = threading.Event(), threading.Event()

    def decodes_when_another_steps(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        decoding.set()
        assert second_steps.wait(600)
        return call(inputs)

    def denoises(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        if decoding.is_set():
            second_steps.set()
        return call(inputs)

    intercept(fake, "decoder", decodes_when_another_steps)
    intercept(fake, "denoiser", denoises)
    first = asking.submit(_order(fake, steps=1))
    assert decoding.wait(600)
    second = asking.submit(_order(fake, 1, steps=2))  # comes while all that there was is being decoded
    for job in (first, second):
        np.testing.assert_array_equal(job.answer.result(600).images, generate(FakeComponents(), [job.order])[0])
    asking.finish()


def test_a_request_that_comes_during_a_parallel_decode_waits_for_it_too() -> None:
    fake = FakeComponents(parallel_decode=True)
    asking = Asking(fake)
    set_costs(asking.model, 100.0)
    alone_ms = asking.worker.estimate_ms(asking.model, _order(fake, 1, steps=1))
    decoding, opened = threading.Event(), threading.Event()

    def held(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        decoding.set()
        assert opened.wait(600)
        return call(inputs)

    intercept(fake, "decoder", held)
    first = asking.submit(_order(fake, steps=1))
    assert decoding.wait(600)
    assert asking.worker.estimate_ms(asking.model, _order(fake, 1, steps=1)) > alone_ms + 50
    opened.set()
    assert first.answer.result(600)
    asking.finish()


def test_a_crash_of_a_parallel_decode_answers_every_job_too() -> None:
    fake = FakeComponents(parallel_decode=True)
    asking = Asking(fake)

    def crash(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        raise ZeroDivisionError("no room")

    intercept(fake, "decoder", crash)
    with pytest.raises(BackendError, match="the device thread has stopped: no room"):
        asking.submit(_order(fake)).answer.result(600)
    with pytest.raises(BackendError, match="the device thread has stopped"):
        asking.submit(_order(fake))
    assert asking.worker.join(600)


def test_draining_waits_for_a_parallel_decode() -> None:
    fake = FakeComponents(parallel_decode=True)
    asking = Asking(fake)
    gate = Gate(fake)
    job = asking.submit(_order(fake, steps=1))
    gate.entered.wait(600)
    asking.worker.drain()
    assert not asking.worker.join(0.05)
    gate.open()
    assert asking.worker.join(600)
    assert job.answer.done()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["stays", "leaves", "hurries", "fails"])),
        min_size=1,
        max_size=12,
    )
)
def test_requests_that_come_during_a_parallel_decode_are_answered_once(requests: list[tuple[int, int, str]]) -> None:
    fake = FakeComponents(parallel_decode=True, delay_s=0.0005)
    asking = Asking(fake, clock=time.monotonic)  # what is in time is left to chance: every way must end well
    jobs = []
    for seed, (steps, count, fate) in enumerate(requests):
        prompt = "too " * 40 if fate == "fails" else f"prompt {seed}"
        try:
            timeout_s = 0.003 if fate == "hurries" else None
            jobs.append((asking.submit(_order(fake, seed, steps=steps, count=count, prompt=prompt), timeout_s), fate))
        except DeadlineError:
            continue
        if fate == "leaves":
            asking.worker.release(jobs[-1][0])
    asking.finish()
    for job, fate in jobs:
        error = job.answer.exception(0)
        if error is None:
            np.testing.assert_array_equal(job.answer.result().images, generate(FakeComponents(), [job.order])[0])
        may_end_in = {"fails": RequestError, "leaves": CancelledError, "hurries": DeadlineError}.get(fate, type(None))
        assert isinstance(error, may_end_in | None)
        assert fate != "fails" or error is not None
