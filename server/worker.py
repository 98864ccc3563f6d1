"""The one thread that owns the device: it takes jobs, steps their rows together, and answers each job exactly once."""

import logging
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from flashdiff.components import Components, Conditioning, Costs
from flashdiff.errors import (
    BackendError,
    CancelledError,
    DeadlineError,
    DrainingError,
    FlashdiffError,
    OverloadedError,
    RequestError,
)
from flashdiff.generate import Order, Pixels, Row, decode_rows, denoise_rows, encode_prompts, new_row, unconditional_of
from flashdiff.server.scheduler import PART_OF, Ready, Stage, Work, choose, expected_ms

MAX_PENDING_IMAGES = 128
"""Accepted and not yet finished; what comes beyond is refused at once."""

_log = logging.getLogger(__name__)


@dataclass
class Timings:
    """Milliseconds. Stage times are those of the calls the job was part of, shared with whatever else was in them."""

    queue: float = 0.0
    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass
class Finished:
    images: list[Pixels]
    timings: Timings


@dataclass(eq=False)
class Job:
    """One accepted request. The worker fills everything below `arrival`; `departed` is set by whoever took the request."""

    order: Order
    deadline: float  # on the monotonic clock; infinity where there is none
    arrived: float
    arrival: int
    rows: list[Row] = field(default_factory=list)  # empty until the prompt is encoded
    images: dict[int, Pixels] = field(default_factory=dict)  # by row
    timings: Timings = field(default_factory=Timings)
    answer: "Future[Finished]" = field(default_factory=Future)
    departed: bool = False


class Worker:
    """`submit` from any thread; the answers come from the worker's own."""

    def __init__(self, components: Components, costs: Costs, *, max_pending_images: int = MAX_PENDING_IMAGES) -> None:
        self.components = components
        self.failure: BaseException | None = None
        self._costs = {part: dict(by_batch) for part, by_batch in costs.items()}
        self._first_costs = costs
        self._max_pending_images = max_pending_images
        self._unconditional = unconditional_of(components)
        self._jobs: list[Job] = []
        self._arrivals = 0
        self._is_draining = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flashdiff-device", daemon=True)
        self._thread.start()

    def submit(self, order: Order, timeout_s: float | None = None) -> Job:
        """Accept an order, to be answered within `timeout_s`; raises a RefusedError at once when that cannot be."""
        now = time.monotonic()
        with self._changed:
            if self.failure:
                raise BackendError(f"the device thread has stopped: {self.failure}")
            if self._is_draining:
                raise DrainingError("the server is shutting down")
            pending = sum(job.order.count for job in self._jobs)
            if pending + order.count > self._max_pending_images:
                raise OverloadedError(
                    f"the queue is full: {pending} images are pending, at most {self._max_pending_images} fit; try again later"
                )
            if timeout_s is not None:
                expected = expected_ms(self._work_of(order), [self._work_left(job) for job in self._jobs], self._costs)
                if expected > 1000 * timeout_s:
                    if not self._jobs:
                        self._forget_slowness()
                    raise DeadlineError(
                        f"this would take about {expected:.0f} ms, the deadline is {max(0.0, 1000 * timeout_s):.0f} ms away"
                    )
            self._arrivals += 1
            deadline = math.inf if timeout_s is None else now + timeout_s
            job = Job(order=order, deadline=deadline, arrived=now, arrival=self._arrivals)
            job.answer.set_running_or_notify_cancel()  # from here on only the worker ends it; `cancel` is for who leaves
            self._jobs.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """The client has left: its rows are dropped before the next step."""
        job.departed = True

    def drain(self) -> None:
        """Refuse new orders from now on, finish the accepted ones, and stop the thread."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `drain`; False when it is still busy."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- below here: the worker's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        except BaseException as error:  # nobody else could answer the jobs
            _log.exception("the device thread stopped")
            with self._changed:
                self.failure = error
                jobs = list(self._jobs)
            self._fail(jobs, BackendError(f"the device thread has stopped: {error}"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_draining)
            return bool(self._jobs)

    def _turn(self) -> None:
        """One call of the device, for whoever is most urgent and whatever can share it."""
        self._drop_departed(time.monotonic())
        with self._changed:
            jobs = list(self._jobs)
        targets: list[tuple[Job, int]] = []  # a row of a job, or row -1 for its prompt
        ready: list[Ready] = []
        for job in jobs:
            for stage, row in _needs(job):
                size, slots = (job.order.size, job.rows[row].slots if stage == "denoise" else 1) if row >= 0 else (None, 1)
                ready.append(Ready(stage, size, slots, job.deadline, job.arrival, len(targets)))
                targets.append((job, row))
        batch = choose(ready, self.components.max_batch)
        if not batch:
            return
        chosen = [targets[item.index] for item in batch]
        owners = list(dict.fromkeys(job for job, _ in chosen))
        started = time.perf_counter()
        try:
            self._call(batch[0].stage, chosen)
        except RequestError as error:
            # A prompt the tokenizer refuses must not take its neighbours down: they are encoded again one by one.
            if len(owners) == 1:
                self._fail(owners, error)
            else:
                for job in owners:
                    self._encode_alone(job)
        except BackendError as error:
            self._fail(owners, error)
        spent = 1000 * (time.perf_counter() - started)
        self._account(batch[0].stage, owners, sum(item.slots for item in batch), spent)
        self._answer(owners)

    def _call(self, stage: Stage, chosen: list[tuple[Job, int]]) -> None:
        if stage == "encode":
            encoded = encode_prompts(self.components, [job.order.prompt for job, _ in chosen])
            for (job, _), conditioning in zip(chosen, encoded, strict=True):
                self._start_rows(job, conditioning)
        elif stage == "denoise":
            denoise_rows(self.components, [job.rows[row] for job, row in chosen])
        else:
            images = decode_rows(self.components, [job.rows[row] for job, row in chosen])
            for (job, row), image in zip(chosen, images, strict=True):
                job.images[row] = image

    def _encode_alone(self, job: Job) -> None:
        try:
            self._start_rows(job, encode_prompts(self.components, [job.order.prompt])[0])
        except FlashdiffError as error:
            self._fail([job], error)

    def _start_rows(self, job: Job, conditioning: Conditioning) -> None:
        spec = self.components.spec
        job.rows = [new_row(spec, job.order, index, conditioning, self._unconditional) for index in range(job.order.count)]

    def _drop_departed(self, now: float) -> None:
        with self._changed:
            departed = [job for job in self._jobs if job.departed]
            late = [job for job in self._jobs if not job.departed and job.deadline <= now]
        self._fail(departed, CancelledError("the client has left"))
        self._fail(late, DeadlineError("the deadline passed before the images were done"))

    def _answer(self, jobs: list[Job]) -> None:
        for job in jobs:
            if len(job.images) == job.order.count and not job.answer.done():
                timings = job.timings
                timings.total = 1000 * (time.monotonic() - job.arrived)
                timings.queue = max(0.0, timings.total - timings.text - timings.denoise - timings.decode)
                self._remove(job)
                job.answer.set_result(Finished([job.images[row] for row in range(job.order.count)], timings))

    def _fail(self, jobs: list[Job], error: FlashdiffError) -> None:
        for job in jobs:
            self._remove(job)
            if not job.answer.done():
                job.answer.set_exception(error)

    def _remove(self, job: Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def _account(self, stage: Stage, jobs: list[Job], slots: int, spent_ms: float) -> None:
        for job in jobs:
            name = {"encode": "text", "denoise": "denoise", "decode": "decode"}[stage]
            setattr(job.timings, name, getattr(job.timings, name) + spent_ms)
        with self._changed:
            by_batch = self._costs[PART_OF[stage]]
            bucket = min(batch for batch in by_batch if batch >= slots)
            # Follow the machine, slowly; one stall must not make the next deadlines look hopeless.
            by_batch[bucket] += 0.1 * (min(spent_ms, 3 * by_batch[bucket] + 1) - by_batch[bucket])

    def _forget_slowness(self) -> None:
        """Refusing while idle measures nothing, so a slow past would refuse for ever: let it fade to the costs at the start."""
        for part, by_batch in self._costs.items():
            for batch in by_batch:
                by_batch[batch] = max(self._first_costs[part][batch], 0.9 * by_batch[batch])

    def _work_of(self, order: Order) -> Work:
        return Work(rows=order.count, steps=order.steps, slots=self.components.spec.sampler.evaluations_per_step, needs_text=True)

    def _work_left(self, job: Job) -> Work:
        steps = max((len(row.times) - row.step for row in job.rows), default=job.order.steps)
        left = self._work_of(job.order)
        return Work(rows=left.rows - len(job.images), steps=steps, slots=left.slots, needs_text=not job.rows)


def _needs(job: Job) -> list[tuple[Stage, int]]:
    """What a job could have done now: its prompt encoded, or the next call of each unfinished row."""
    if not job.rows:
        return [("encode", -1)]
    return [("decode" if row.is_done else "denoise", index) for index, row in enumerate(job.rows) if index not in job.images]
