"""The device thread's loop without a thread: every order of messages that hypothesis finds, one after the other."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import from_image
from served import Clock, Tensors, intercept, model_of, set_costs

from flashdiff.components import ModelSpec
from flashdiff.engines.runtime.fake import FLASH, GUIDED, FakeComponents
from flashdiff.errors import BackendError, CancelledError, DeadlineError, FlashdiffError, OverloadedError
from flashdiff.generate import generate
from flashdiff.orders import Order
from flashdiff.rows import draw_noise
from flashdiff.server.admission import Admission
from flashdiff.server.jobs import Job, Left, Message, Stop, progress_of
from flashdiff.server.loop import DeviceLoop, Noise
from flashdiff.tasks import check_order


def _drawn(spec: ModelSpec, order: Order) -> "Future[Noise]":
    noise: Future[Noise] = Future()
    noise.set_result(draw_noise(spec, order))
    return noise


@dataclass
class Bench:
    """A loop, its admission, and all that is on its way between them; nothing happens before a test says so."""

    fake: FakeComponents
    clock: Clock = field(default_factory=Clock)
    inbox: list[Message] = field(default_factory=list)
    calls: list[Callable[[], Message]] = field(default_factory=list)
    """Parallel calls that have not come back."""

    def __post_init__(self) -> None:
        self.model = model_of(self.fake)
        self.loop = DeviceLoop(self.clock, None, _drawn, self.calls.append)
        self.outlook = self.loop.outlook()
        self.admission = Admission(lambda: self.outlook, self.inbox.append, self.clock, max_pending_images=12)

    def submit(self, order: Order, timeout_s: float | None = None) -> Job:
        return self.admission.accept(self.model, order, timeout_s, client="", priority="normal", on_step=None, files_s=0.0)

    def deliver(self) -> None:
        """The oldest message on its way."""
        if self.inbox:
            self.loop.handle(self.inbox.pop(0))

    def come_back(self) -> None:
        """The parallel call, where there is one."""
        if self.calls:
            self.inbox.append(self.calls.pop(0)())

    def turn(self) -> bool:
        is_busy = self.loop.turn()
        self.outlook = self.loop.outlook()
        return is_busy

    def run_dry(self) -> None:
        """Until nothing is left to do."""
        for _ in range(2000):
            while self.inbox:
                self.deliver()
            if not self.turn():
                if not self.calls and not self.inbox:
                    return
                self.come_back()
        pytest.fail("the loop does not come to an end")


@dataclass
class Asked:
    job: Job
    timeout_s: float | None
    has_left: bool = False


_SUBMIT = st.tuples(
    st.just("submit"),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["", "image", "other size"]),
    st.sampled_from([None, 0.2, 5.0]),
)
_EVENT = st.one_of(
    _SUBMIT,
    st.tuples(st.just("leave"), st.integers(0, 20)),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.3])),
    st.sampled_from([("deliver",), ("turn",), ("come back",), ("fail",), ("mend",)]),
)


@settings(max_examples=150)
@given(st.lists(_EVENT, max_size=40), st.booleans(), st.booleans())
def test_whatever_the_order_of_arrivals_departures_and_calls_each_job_is_answered_once(
    events: list[tuple], is_parallel: bool, is_guided: bool
) -> None:
    sampler = GUIDED if is_guided else FLASH
    fake = FakeComponents(sampler, parallel_decode=is_parallel)
    bench, asked, answers = Bench(fake), list[Asked](), dict[Job, int]()
    set_costs(bench.model, 1.0)
    for number, (kind, *values) in enumerate(events):
        match kind:
            case "submit":
                steps, count, shape, timeout_s = values
                size = fake.spec.sizes[shape == "other size"]
                order = check_order(fake.spec, prompt=f"prompt {number % 3}", seed=number, steps=steps, count=count, size=size)
                if shape == "image":
                    order = from_image(order, np.full((64, 64, 3), number % 256, dtype=np.uint8), 0.5)
                try:
                    job = bench.submit(order, timeout_s)
                except (OverloadedError, DeadlineError):
                    continue
                job.answer.add_done_callback(lambda _, job=job: answers.update({job: answers.get(job, 0) + 1}))
                asked.append(Asked(job, timeout_s))
            case "leave" if asked:
                leaver = asked[values[0] % len(asked)]
                leaver.has_left = leaver.has_left or not leaver.job.answer.done()
                bench.admission.release(leaver.job)
            case "wait":
                bench.clock.now += values[0]
            case "deliver":
                bench.deliver()
            case "turn":
                bench.turn()
                for running in bench.loop._running.values():
                    assert bench.loop._progress[running.job] == progress_of(running)
            case "come back":
                bench.come_back()
            case "fail":
                fake.fail_on = "decoder"
            case "mend":
                fake.fail_on = None
        assert bench.admission.pending_images == sum(a.job.order.count for a in asked if not a.job.answer.done()) <= 12
    fake.fail_on = None
    bench.inbox.append(Stop())
    bench.run_dry()
    assert bench.loop.is_over
    assert bench.outlook.progress == ()
    assert answers == dict.fromkeys((a.job for a in asked), 1)
    assert bench.admission.pending_images == 0
    for one in asked:
        error = one.job.answer.exception(0)
        if error is None:
            expected = generate(FakeComponents(sampler), [one.job.order])[0]
            np.testing.assert_array_equal(one.job.answer.result().images, expected)
        else:
            assert isinstance(error, FlashdiffError)
            assert one.has_left or not isinstance(error, CancelledError)
            assert one.timeout_s is not None or not isinstance(error, DeadlineError)
            assert ("fail",) in events or not isinstance(error, BackendError)
        bench.admission.release(one.job)
    assert not bench.admission.has_unsent


def test_a_client_that_leaves_while_its_rows_are_decoded_takes_no_other_answer_with_it() -> None:
    bench = Bench(FakeComponents(parallel_decode=True))
    left, stays = (bench.submit(check_order(bench.fake.spec, prompt="p", seed=seed, steps=1)) for seed in (1, 2))
    bench.deliver()
    bench.deliver()
    while not bench.calls:
        bench.turn()
    bench.admission.release(left)
    bench.deliver()
    assert bench.turn() is False
    with pytest.raises(CancelledError):
        left.answer.result(0)
    bench.come_back()
    bench.deliver()
    assert len(stays.answer.result(0).images) == 1


def test_nothing_is_kept_of_a_job_whose_client_left() -> None:
    bench = Bench(FakeComponents())
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    job = bench.submit(check_order(bench.fake.spec, prompt="p", inputs={"image": picture}, parameters={"upscale": 2.0}))
    tile, model = (weakref.ref(kept) for kept in (job.order.inputs["tile 0"], bench.model))
    bench.deliver()
    for _ in range(3):
        assert bench.turn()
    bench.admission.release(job)
    bench.deliver()
    assert not bench.turn()
    del job, bench.model
    gc.collect()
    assert tile() is None
    assert model() is None


def test_a_message_about_a_job_that_is_answered_changes_nothing() -> None:
    bench = Bench(FakeComponents())
    job = bench.submit(check_order(bench.fake.spec, prompt="p"))
    bench.run_dry()
    bench.loop.handle(Left(job))
    assert not bench.loop._left
    assert job.answer.result(0).images


def test_the_outlook_never_changes_and_counts_what_was_accepted_since() -> None:
    bench = Bench(FakeComponents())
    set_costs(bench.model, 100.0)
    bench.submit(check_order(bench.fake.spec, prompt="p", steps=4))
    first = bench.outlook
    assert first.progress == ()
    other = check_order(bench.fake.spec, prompt="q", size=bench.fake.spec.sizes[1])  # shares no step with the first
    one_waits = bench.admission.estimate_ms(bench.model, other, client="", priority="normal")
    bench.deliver()
    bench.turn()
    assert first.progress == ()
    assert [(p.steps, dict(p.prepare)) for p in bench.outlook.progress] == [((4,), {})]
    bench.turn()
    after_a_step = bench.admission.estimate_ms(bench.model, other, client="", priority="normal")
    assert after_a_step == pytest.approx(one_waits - 200)  # a text and a step less


def test_a_part_that_runs_out_of_finite_numbers_fails_the_jobs_of_its_call_alone() -> None:
    bench = Bench(FakeComponents())

    def poisoned(call: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        return {"color": np.nan * call(inputs)["color"]}

    fine = bench.submit(check_order(bench.fake.spec, prompt="fine", steps=2))
    bench.deliver()
    bench.turn()
    intercept(bench.fake, "text_encoder", poisoned)
    bad = bench.submit(check_order(bench.fake.spec, prompt="bad", steps=2))
    bench.run_dry()
    with pytest.raises(BackendError, match="the text_encoder returned values that are not finite"):
        bad.answer.result(0)
    assert fine.answer.result(0).images
