"""Which requests are accepted: room in the queue, a place in it, and a time that can be promised."""

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from flashdiff.errors import DeadlineError, FlashdiffError, OverloadedError
from flashdiff.orders import Order, Preparation
from flashdiff.rows import replacing_part
from flashdiff.server.costs import step_call
from flashdiff.server.jobs import Arrived, Forgive, Job, Left, Message, Outlook, Progress, Step, as_accepted, pixel_bytes
from flashdiff.server.models import Model
from flashdiff.server.names import Priority
from flashdiff.server.scheduler import MOST_MARGIN, Work, due, finish_times, promise_ms

MAX_PENDING_IMAGES = 128
"""Accepted and not yet finished; what comes beyond is refused at once."""

MAX_PENDING_BYTES = 512 * 1024**2
"""Of their pixels and of those still being sent, likewise: large images need more room than small ones."""

_SHORTEST_RETRY_S = 0.1  # when all that fills the queue is being sent
_UNCOUNTED_ROWS = 16  # of an order, the most images that it can have: they do not postpone it
_CLIENT_SHARE = 0.75  # of the queue, for one client, so that others always have room


class _Waiting(NamedTuple):
    """An unanswered job, and what is left of it at its model's costs now."""

    job: Job
    work: Work


@dataclass(frozen=True)
class _Forecast:
    """Milliseconds from now."""

    own_ms: float  # of the new work
    queue: list[_Waiting]
    ends_ms: list[float]  # of the queue


class Admission:
    """The ledger of accepted requests. Any thread calls its methods; all its state is written under its lock.

    It reads the device thread's latest outlook and counts what it accepted since; it never touches the device thread's state.
    `post` sends the device thread a message and returns at once; messages are posted in the order of acceptance.
    """

    def __init__(
        self,
        outlook: Callable[[], Outlook],
        post: Callable[[Message], None],
        clock: Callable[[], float],
        max_pending_images: int = MAX_PENDING_IMAGES,
    ) -> None:
        self._outlook, self._post, self._clock = outlook, post, clock
        self._max_pending_images = max_pending_images
        self._lock = threading.Lock()
        self._arrivals = 0
        self._jobs: list[Job] = []  # unanswered, or answered and not released
        self._released: set[Job] = set()  # before they were answered
        self._closed: FlashdiffError | None = None

    # --- what callers ask for ----------------------------------------------------------------------------------------

    def accept(
        self,
        model: Model,
        order: Order,
        timeout_s: float | None,
        *,
        client: str,
        priority: Priority,
        on_step: Callable[[Step], None] | None,
        files_s: float,
    ) -> Job:
        """A job that will be answered within `timeout_s`, of which `files_s` are kept for writing files; or a RefusedError."""
        with self._lock:
            if self._closed:
                raise self._closed
            now = self._clock()
            self._forget_settled()
            for jobs, share, whose in ((self._jobs, 1.0, ""), (self._of(client), _CLIENT_SHARE, " of yours")):
                self._check_room(order, jobs, share, whose)
            preparations = order.task.preparations(model.components.spec, order)
            new, outlook = work_of(model, order, preparations), self._outlook()
            queue = self._queue(outlook)
            within_s = math.inf if timeout_s is None else timeout_s - files_s
            due_at = self._due(new, queue, now, now + within_s, client, priority)
            alone_ms, is_tight = 0.0, False
            if timeout_s is not None:
                alone_ms = new.alone_ms
                expected_ms = self._check_deadline(model, new, alone_ms, queue, due_at, now, timeout_s, files_s, outlook.margin)
                is_tight = expected_ms > alone_ms and 1000 * within_s < promise_ms(alone_ms, expected_ms, MOST_MARGIN)
            self._arrivals += 1
            job = Job(
                model=model,
                order=order,
                client=client,
                arrival=self._arrivals,
                arrived=now,
                deadline=now + within_s,
                due=due_at,
                preparations=preparations,
                whole=new,
                alone_s=alone_ms / 1000,
                is_tight=is_tight,
                on_step=on_step,
            )
            job.answer.set_running_or_notify_cancel()  # from here on, only the thread that claims the job ends it
            self._jobs.append(job)
            self._post(Arrived(job))
            return job

    def estimate_ms(self, model: Model, order: Order, *, client: str, priority: Priority) -> float:
        """How long the order would take if it were accepted now."""
        return self._expect(model, order, math.inf, client, priority)[1]

    def promise_ms(self, model: Model, order: Order, within_s: float, *, client: str, priority: Priority) -> float:
        """Within which time the order could be promised now, if it is due in `within_s` seconds."""
        alone_ms, expected_ms, margin = self._expect(model, order, within_s, client, priority)
        return promise_ms(alone_ms, expected_ms, margin)

    def take_over(self, job: Job, model: Model, on_step: Callable[[Step], None] | None) -> Job:
        """A job that another device accepted and failed, to be answered here with this model; raises when this device is closed.

        It was promised, so it needs no room and keeps its deadline and its place. Its claim is a new one: the caller has claimed
        the old one, so that only this device can answer.
        """
        with self._lock:
            if self._closed:
                raise self._closed
            self._forget_settled()
            preparations = job.order.task.preparations(model.components.spec, job.order)
            whole = work_of(model, job.order, preparations)
            self._arrivals += 1
            taken = replace(
                job,
                model=model,
                arrival=self._arrivals,
                preparations=preparations,
                whole=whole,
                alone_s=0.0 if job.deadline == math.inf else whole.alone_ms / 1000,
                is_tight=False,  # the margin here is not what decided
                on_step=on_step,
                _unclaimed=threading.Lock(),
            )
            self._jobs.append(taken)
            self._post(Arrived(taken))
            return taken

    def hand_over(self, job: Job) -> None:
        """The job is answered by another device: it takes no room here any more."""
        with self._lock:
            self._jobs = [kept for kept in self._jobs if kept is not job]
            self._released.discard(job)

    def release(self, job: Job) -> None:
        """The job's client has its answer, or has left: it takes no room once it is answered."""
        with self._lock:
            self._released.add(job)
            self._post(Left(job))
        job.answer.add_done_callback(lambda _: self._forget())  # at once where it is answered already

    def close(self, error: FlashdiffError) -> list[Job]:
        """Refuse everything from now on with this error, the first one given; returns the jobs that are not answered."""
        with self._lock:
            self._closed = self._closed or error
            return [job for job in self._jobs if not job.answer.done()]

    @property
    def pending_images(self) -> int:
        """Images accepted and not yet answered, a tile counted as one."""
        with self._lock:
            return sum(job.order.rows for job in self._jobs if not job.answer.done())

    @property
    def pending_s(self) -> float:
        """How long the device needs for the images that are not answered, in full batches."""
        with self._lock:
            return self._pending_s()

    @property
    def is_open(self) -> bool:
        """Whether new jobs are accepted."""
        return self._closed is None

    @property
    def has_unsent(self) -> bool:
        """Whether answers are still being sent."""
        with self._lock:
            self._forget_settled()
            return any(job.answer.done() for job in self._jobs)

    def _forget(self) -> None:
        with self._lock:
            self._forget_settled()

    # --- the ledger, under the lock ----------------------------------------------------------------------------------

    def _forget_settled(self) -> None:
        """Drop the jobs that take no room any more: answered and released, or failed."""

        def takes_room(job: Job) -> bool:
            return not job.answer.done() or (job not in self._released and job.answer.exception() is None)

        self._jobs = [job for job in self._jobs if takes_room(job)]
        self._released.intersection_update(self._jobs)

    def _of(self, client: str) -> list[Job]:
        """The client's jobs; none for a caller without a name."""
        return [job for job in self._jobs if client and job.client == client]

    def _check_room(self, order: Order, jobs: Sequence[Job], share: float, whose: str) -> None:
        """OverloadedError when an order does not fit with these jobs into their share of the queue and of its bytes."""
        images = sum(job.order.rows for job in jobs if not job.answer.done())
        limit = int(share * self._max_pending_images)
        pixels = sum(pixel_bytes(job.order) for job in jobs)
        too_many = images + order.rows > limit
        too_large = bool(jobs) and pixels + pixel_bytes(order) > share * MAX_PENDING_BYTES
        if (too_many or too_large) and (jobs or not whose):
            retry_s = max(_SHORTEST_RETRY_S, self._pending_s())
            held = f"{images} images" if too_many else f"{pixels / 1e6:.0f} MB of images"
            most = f"{limit}" if too_many else f"{share * MAX_PENDING_BYTES / 1e6:.0f} MB"
            raise OverloadedError(
                f"the queue is full: {held}{whose} are pending, at most {most} fit; try again in about {1000 * retry_s:.0f} ms",
                retry_after_s=retry_s,
            )

    def _pending_s(self) -> float:
        return sum(waiting.work.share_ms for waiting in self._queue(self._outlook())) / 1000

    def _queue(self, outlook: Outlook) -> list[_Waiting]:
        """Every unanswered job, in the order in which the device takes them."""
        new = [as_accepted(job) for job in self._jobs if job.arrival > outlook.arrival]
        left = [_Waiting(p.job, _work_left(p)) for p in (*outlook.progress, *new) if not p.job.answer.done()]
        return sorted(left, key=lambda waiting: (waiting.job.due, waiting.job.arrival))

    def _expect(self, model: Model, order: Order, within_s: float, client: str, priority: Priority) -> tuple[float, float, float]:
        """What an order would take alone and now, in ms, and the margin of a promise."""
        with self._lock:
            preparations = order.task.preparations(model.components.spec, order)
            now, new, outlook = self._clock(), work_of(model, order, preparations), self._outlook()
            queue = self._queue(outlook)
            due_at = self._due(new, queue, now, now + within_s, client, priority)
            alone_ms = new.alone_ms
            expected_ms = _forecast(new, due_at, queue).own_ms if queue else alone_ms
            return alone_ms, expected_ms, outlook.margin

    def _due(self, new: Work, queue: list[_Waiting], now: float, deadline: float, client: str, priority: Priority) -> float:
        """When new work is due. Without a deadline it goes behind every job whose promise it would break.

        A named client's backlog is what it has pending, and of the new work the rows beyond `_UNCOUNTED_ROWS`: an order's
        images come as one, and the tiles of an upscale are not to go before others' images.
        """
        backlog_ms = 0.0
        if client:
            pending_ms = sum(waiting.work.share_ms for waiting in queue if waiting.job.client == client)
            backlog_ms = pending_ms + new.share_ms * max(0.0, 1 - _UNCOUNTED_ROWS / len(new.steps))
        due_at = due(now, priority, deadline, backlog_ms / 1000)
        if deadline == math.inf and any(waiting.job.deadline < math.inf for waiting in queue):
            while behind := [job.due for job in _made_late(_forecast(new, due_at, queue), now) if job.due > due_at]:
                due_at = max(behind)
        return due_at

    def _check_deadline(
        self,
        model: Model,
        new: Work,
        alone_ms: float,
        queue: list[_Waiting],
        due_at: float,
        now: float,
        timeout_s: float,
        files_s: float,
        margin: float,
    ) -> float:
        """In how many ms the work should be done.

        DeadlineError when it cannot be promised in time, or would break a promise that would hold without it.
        """
        forecast = _forecast(new, due_at, queue) if queue else _Forecast(alone_ms, [], [])
        promised = promise_ms(alone_ms, forecast.own_ms, margin)
        if promised > 1000 * (timeout_s - files_s):
            if not queue:
                self._post(Forgive(model))
            raise DeadlineError(
                f"this can be promised in about {promised + 1000 * files_s:.0f} ms, "
                f"the deadline is {max(0.0, 1000 * timeout_s):.0f} ms away",
                promised_s=promised / 1000 + files_s,
            )
        if _made_late(forecast, now):
            raise DeadlineError("this request could be on time, but would make requests late that were accepted before")
        return forecast.own_ms


def _work_left(progress: Progress) -> Work:
    job = progress.job
    return progress.work(job.model.costs.current[job.order.size])


def _forecast(new: Work, due_at: float, queue: list[_Waiting]) -> _Forecast:
    """When each pending job is done if new work is added that is due then."""
    place = bisect_right(queue, due_at, key=lambda waiting: waiting.job.due)
    works = [waiting.work for waiting in queue]
    ends = finish_times([*works[:place], new, *works[place:]])
    return _Forecast(ends.pop(place), queue, ends)


def _made_late(forecast: _Forecast, now: float) -> list[Job]:
    """The jobs that are in time without the new work, and not with it."""
    jobs = [waiting.job for waiting in forecast.queue]
    late = [index for index, job in enumerate(jobs) if now + forecast.ends_ms[index] / 1000 > job.deadline]
    without = finish_times([waiting.work for waiting in forecast.queue]) if late else []
    return [jobs[index] for index in late if now + without[index] / 1000 <= jobs[index].deadline]


def work_of(model: Model, order: Order, preparations: Mapping[str, Preparation]) -> Work:
    """All that an order with these preparations takes, but for texts and references in the model's cache."""
    prepare: dict[str, int] = {}
    for given in preparations.values():
        if given.key is None or given.key not in model.embeddings:
            prepare[given.part] = prepare.get(given.part, 0) + 1
    slots = order.task.evaluations_per_step(model.components.spec)
    step = step_call(replacing_part(model.components.spec, order))
    bucket = id(model), order.size, slots, step
    return Work((order.steps_taken,) * order.rows, slots, prepare, model.costs.current[order.size], bucket, step)
