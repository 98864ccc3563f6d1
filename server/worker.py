"""The thread that owns the device: it takes jobs, steps their rows together, and answers each job exactly once.

Where the device gains by it (a GPU), finished rows are decoded beside the next steps of others, in a thread a call, one call
at a time. Of a job that thread writes `images`, `decoding` and `timings.decode`, says that it `advanced`, and may be the one
that answers. Another thread draws the noise of rows whose texts the device reads.
"""

import logging
import math
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Conditioning
from flashdiff.errors import (
    BackendError,
    CancelledError,
    DeadlineError,
    DrainingError,
    FlashdiffError,
    OverloadedError,
)
from flashdiff.generate import (
    Order,
    Pixels,
    Row,
    decode_rows,
    denoise_rows,
    draw_noise,
    encode_images,
    encode_prompts,
    start_rows,
)
from flashdiff.preview import preview
from flashdiff.server.models import Model
from flashdiff.server.scheduler import (
    LEAST_MARGIN,
    MOST_MARGIN,
    PART_OF,
    Priority,
    Ready,
    Stage,
    Work,
    choose,
    due,
    finish_times,
    next_margin,
    promise_ms,
)

MAX_PENDING_IMAGES = 128
"""Accepted and not yet finished; what comes beyond is refused at once."""

MAX_PENDING_BYTES = 512 * 1024**2
"""Of their pixels and of those still being sent, likewise: large images need more room than small ones."""

_SHORTEST_RETRY_S = 0.1  # when all that fills the queue is being sent
_CLIENT_SHARE = 0.75  # of the queue, for one client, so that others always find room
_HANG_S = 60.0  # a device call that takes this long and 20 times its usual cost will not come back

_log = logging.getLogger(__name__)


@dataclass
class Timings:
    """Milliseconds. Stage times are those of the calls the job was part of, shared with whatever else was in them."""

    queue: float = 0.0
    text: float = 0.0
    input_image: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass
class Finished:
    images: list[Pixels]
    timings: Timings
    batches: list[int]
    """Slots of each denoise call that the job was part of."""


@dataclass(frozen=True)
class Step:
    """A row that has taken a step: `picture` [h, w, 3] shows, at latent size, where it is heading."""

    index: int  # of the image in its order
    step: int  # from 1
    total: int
    picture: Pixels


@dataclass(eq=False)
class Job:
    """One accepted request. The worker fills everything below `on_step`; `departed` says that nobody waits for it any more."""

    model: Model
    order: Order
    client: str
    deadline: float  # on the monotonic clock; infinity where there is none
    due: float
    whole: Work  # as it came: texts that were kept from before are no work
    alone_s: float  # how long it would have taken when it came, had nothing else been there; 0 where there is no deadline
    is_tight: bool  # it waits behind others, with a deadline so near that the margin may decide whether it is promised
    arrived: float
    arrival: int
    on_step: Callable[[Step], None] | None = None
    encoded: dict[str, Conditioning] = field(default_factory=dict)
    start: NDArray[np.float32] | None = None  # the latents of the order's image
    noise: "Future[list[list[NDArray[np.float32]]]] | None" = None  # being drawn
    rows: list[Row] = field(default_factory=list)  # empty until its texts and its image are encoded
    decoding: set[int] = field(default_factory=set)  # rows that are being decoded beside
    images: dict[int, Pixels] = field(default_factory=dict)  # by row
    timings: Timings = field(default_factory=Timings)
    batches: list[int] = field(default_factory=list)
    answer: "Future[Finished]" = field(default_factory=Future)
    departed: bool = False
    ended: bool = False
    _state: object = field(default_factory=object)  # another one whenever less is left
    _left: tuple[object, Work] = field(init=False)  # as of that state

    def __post_init__(self) -> None:
        self._left = self._state, self.whole

    @property
    def left(self) -> Work:
        """What is left to do: found out for who asks, once a state. The device need not wait for it."""
        state = self._state  # read first: what changes meanwhile is another state
        if self._left[0] is not state:
            self._left = state, _work_left(self)
        return self._left[1]

    def advanced(self) -> None:
        """Say so when less is left than before."""
        self._state = object()


_Target = tuple[Job, int | str]
"""What a call can be made for: a row of a job, or a text, or its image."""


@dataclass(frozen=True)
class _Forecast:
    """Milliseconds from now."""

    own_ms: float  # of the new work
    jobs: list[Job]
    ends_ms: list[float]  # of the jobs


class Observer(Protocol):
    """Whoever counts: the metrics."""

    def called(self, model: str, stage: Stage, slots: int, spent_ms: float, expected_ms: float) -> None: ...

    def answered(self, model: str, timings: Timings, error: FlashdiffError | None) -> None: ...

    def refused(self, error: FlashdiffError) -> None: ...


class Worker:
    """`submit` from any thread; the answers come from the worker's own, or from one that decodes."""

    _choose = staticmethod(choose)  # the benchmarks compare another policy with it

    def __init__(self, *, max_pending_images: int = MAX_PENDING_IMAGES, observer: Observer | None = None) -> None:
        self.failure: BaseException | None = None
        self._max_pending_images = max_pending_images
        self._observer = observer
        self._jobs: list[Job] = []
        self._unsent: set[Job] = set()  # answered, their pixels not yet released
        self._arrivals = 0
        self._turns = 0  # of the device thread
        self._margin, self._widened = LEAST_MARGIN, 0  # of waiting in promises, and in which turn
        self._is_draining = False
        self._hung_at: dict[int, float] = {}  # when the call that runs now counts as hung, by thread
        self._changed = threading.Condition()
        self._is_decoding = False  # beside; one call at a time
        # Draws the noise of new rows while the device reads their texts. Its thread starts here: on the cores of who serves.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flashdiff-noise")
        self._drawing.submit(int)
        self._thread = threading.Thread(target=self._run, name="flashdiff-device", daemon=True)
        self._thread.start()

    @property
    def pending_images(self) -> int:
        return sum(job.order.count for job in self._jobs)

    def submit(
        self,
        model: Model,
        order: Order,
        timeout_s: float | None = None,
        *,
        client: str = "",
        priority: Priority = "normal",
        on_step: Callable[[Step], None] | None = None,
        files_s: float = 0.0,
    ) -> Job:
        """Accept an order, to be answered within `timeout_s`; raises a RefusedError at once when that cannot be.

        `files_s` of the timeout are kept for writing the files. `on_step` is called in the worker's thread after every step of
        every row; it must not block.
        """
        now = time.monotonic()
        with self._changed:
            try:
                job = self._accept(model, order, now, timeout_s, client, priority, on_step, files_s)
            except FlashdiffError as error:
                if self._observer:
                    self._observer.refused(error)
                raise
            job.answer.set_running_or_notify_cancel()  # from here on only the worker ends it; `cancel` is for who leaves
            self._jobs.append(job)
            self._arrivals = job.arrival  # last: who has seen it sees the job
            self._changed.notify()
        return job

    def estimate_ms(self, model: Model, order: Order, *, client: str = "", priority: Priority = "normal") -> float:
        """How long the order would take if it were submitted now; a deadline must leave a margin of the waiting in it."""
        now = time.monotonic()
        with self._changed:
            new = _work_of(model, order)
            return self._with(new, self._due(new, now, math.inf, client, priority)).own_ms

    def release(self, job: Job) -> None:
        """The client has what it asked for, or has left: rows in progress are dropped before the next step.

        Whoever submits releases; until then the job's pixels count as pending.
        """
        with self._changed:
            job.departed = True
            self._unsent.discard(job)

    def drain(self) -> None:
        """Refuse new orders from now on, finish the accepted ones, and stop the thread."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `drain`; False when it is still busy."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether new orders are taken at all."""
        return not self.failure and not self._is_draining

    @property
    def has_unsent(self) -> bool:
        """Whether answers are still being sent: see `release`."""
        return bool(self._unsent)

    def check_alive(self) -> None:
        """Give up on a device call that does not come back: its jobs are answered, and new ones refused."""
        if not self.failure and any(time.monotonic() > at for at in [*self._hung_at.values()]):
            self._give_up(BackendError(f"a device call has not come back for more than {_HANG_S:.0f} s"))

    def _accept(
        self,
        model: Model,
        order: Order,
        now: float,
        timeout_s: float | None,
        client: str,
        priority: Priority,
        on_step: Callable[[Step], None] | None,
        files_s: float,
    ) -> Job:
        if self.failure:
            raise BackendError(f"the device thread has stopped: {self.failure}")
        if self._is_draining:
            raise DrainingError("the server is shutting down")
        held = [*self._jobs, *self._unsent]
        for jobs, share, whose in ((held, 1.0, ""), (self._of(client), _CLIENT_SHARE, " of yours")):
            self._check_room(order, jobs, share, whose)
        deadline = math.inf if timeout_s is None else now + timeout_s - files_s
        new = _work_of(model, order)
        alone_ms = 0.0 if timeout_s is None else new.alone_ms
        due_at = self._due(new, now, deadline, client, priority)
        is_tight = False
        if timeout_s is not None:
            expected_ms = self._check_deadline(model, new, alone_ms, due_at, now, timeout_s, files_s)
            at_most_ms = promise_ms(alone_ms, expected_ms, MOST_MARGIN)
            is_tight = expected_ms > alone_ms and 1000 * (timeout_s - files_s) < at_most_ms
        return Job(
            model,
            order,
            client,
            deadline=deadline,
            due=due_at,
            whole=new,
            alone_s=alone_ms / 1000,
            is_tight=is_tight,
            arrived=now,
            arrival=self._arrivals + 1,
            on_step=on_step,
        )

    def _of(self, client: str) -> list[Job]:
        """Of a client's jobs, those that take room; without a name nobody's."""
        return [job for job in (*self._jobs, *self._unsent) if client and job.client == client]

    def _due(self, new: Work, now: float, deadline: float, client: str, priority: Priority) -> float:
        """When new work is due. Without a deadline it goes behind everybody who was promised a time that it would break."""
        due_at = due(now, priority, deadline, sum(job.left.share_ms for job in self._of(client)) / 1000)
        if deadline == math.inf and any(job.deadline < math.inf for job in self._jobs):
            while behind := [job.due for job in self._made_late(self._with(new, due_at), now) if job.due > due_at]:
                due_at = max(behind)
        return due_at

    def _check_deadline(
        self, model: Model, new: Work, alone_ms: float, due_at: float, now: float, timeout_s: float, files_s: float
    ) -> float:
        """In how many ms the work should be done.

        DeadlineError when it cannot be promised in time, or would break a promise that would hold without it.
        """
        forecast = self._with(new, due_at) if self._jobs else _Forecast(alone_ms, [], [])
        promised = promise_ms(alone_ms, forecast.own_ms, self._margin)
        if promised > 1000 * (timeout_s - files_s):
            if not self._jobs:
                _forget_slowness(model)
            raise DeadlineError(
                f"this can be promised in about {promised + 1000 * files_s:.0f} ms, "
                f"the deadline is {max(0.0, 1000 * timeout_s):.0f} ms away"
            )
        if self._made_late(forecast, now):
            raise DeadlineError("this can be in time, but others who were promised a time would then be late")
        return forecast.own_ms

    def _with(self, new: Work, due_at: float) -> "_Forecast":
        """How the queue would go with new work that is due then."""
        jobs = sorted(self._jobs, key=lambda job: (job.due, job.arrival))
        place = bisect_right(jobs, due_at, key=lambda job: job.due)
        works = [job.left for job in jobs]
        ends = finish_times([*works[:place], new, *works[place:]])
        return _Forecast(ends.pop(place), jobs, ends)

    def _made_late(self, forecast: "_Forecast", now: float) -> list[Job]:
        """Who would be in time without the new work, and is not with it."""
        late = [index for index, job in enumerate(forecast.jobs) if now + forecast.ends_ms[index] / 1000 > job.deadline]
        without = finish_times([job.left for job in forecast.jobs]) if late else []
        return [job for index in late if now + without[index] / 1000 <= (job := forecast.jobs[index]).deadline]

    def _check_room(self, order: Order, jobs: Sequence[Job], share: float, whose: str) -> None:
        """OverloadedError when an order does not fit beside these jobs into their share of the queue and of its bytes."""
        images = sum(job.order.count for job in jobs if not job.ended)
        limit = int(share * self._max_pending_images)
        pixels = sum(_pixel_bytes(job.order) for job in jobs)
        too_many = images + order.count > limit
        too_large = bool(jobs) and pixels + _pixel_bytes(order) > share * MAX_PENDING_BYTES
        if (too_many or too_large) and (jobs or not whose):
            retry_s = max(_SHORTEST_RETRY_S, sum(job.left.share_ms for job in self._jobs) / 1000)
            held = f"{images} images" if too_many else f"{pixels / 1e6:.0f} MB of images"
            most = f"{limit}" if too_many else f"{share * MAX_PENDING_BYTES / 1e6:.0f} MB"
            raise OverloadedError(
                f"the queue is full: {held}{whose} are pending, at most {most} fit; try again in about {1000 * retry_s:.0f} ms",
                retry_after_s=retry_s,
            )

    # --- below here: the worker's thread, and one that decodes -------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        except BaseException as error:  # nobody else could answer the jobs
            _log.exception("the device thread stopped")
            self._give_up(error)
        finally:
            self._drawing.shutdown(wait=False)

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            jobs = list(self._jobs)
        self._fail(jobs, BackendError(f"the device thread has stopped: {error}"))

    def _wait_for_work(self) -> bool:
        if self._jobs:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self.failure or (self._is_draining and not self._is_decoding))
            return bool(self._jobs)

    def _turn(self) -> None:
        """One call of the device, for whoever is most urgent and whatever can share it."""
        self._turns += 1
        seen = self._arrivals
        self._drop_departed(time.monotonic())
        targets: list[_Target] = []
        ready: list[Ready] = []
        for job in self._candidates():
            for stage, target in _needs(job):
                if stage == "decode" and self._is_decoding and job.model.components.parallel_decode:
                    continue  # with the next call, when this one is back
                size = None if stage == "encode_text" else job.order.size
                slots = job.rows[target].slots if stage == "denoise" and isinstance(target, int) else 1
                costs = job.model.costs[PART_OF[stage], size]
                ready.append(Ready(job.due, job.arrival, len(targets), stage, id(job.model), size, slots, costs))
                targets.append((job, target))
        batch = self._choose(ready)
        if not batch:  # all that is left is being decoded
            with self._changed:
                self._changed.wait_for(lambda: not self._is_decoding or self._arrivals != seen)
            return
        stage, chosen, slots = batch[0].stage, [targets[item.handle] for item in batch], sum(item.slots for item in batch)
        if stage == "decode" and chosen[0][0].model.components.parallel_decode:
            for job, target in chosen:
                job.decoding.add(int(target))
            self._is_decoding = True
            threading.Thread(target=self._decode_beside, args=(chosen, slots), name="flashdiff-decode", daemon=True).start()
        else:
            self._serve(stage, chosen, slots)

    def _decode_beside(self, chosen: Sequence[_Target], slots: int) -> None:
        """In a thread of its own."""
        try:
            self._serve("decode", chosen, slots)
        except BaseException as error:
            _log.exception("the decoding thread stopped")
            self._give_up(error)
        finally:
            for job, target in chosen:
                job.decoding.discard(int(target))
            with self._changed:
                self._is_decoding = False
                self._changed.notify()

    def _serve(self, stage: Stage, chosen: Sequence[_Target], slots: int) -> None:
        """Make one call, and answer whoever is done by it."""
        owners = list(dict.fromkeys(job for job, _ in chosen))
        try:
            self._call(stage, chosen, slots)
        except FlashdiffError as error:
            if len(owners) == 1:
                self._fail(owners, error)
            else:  # one job's text, numbers or memory must not take its neighbours down: each is tried again alone
                self._call_one_by_one(stage, chosen, owners)
        self._answer(owners)

    def _candidates(self) -> list[Job]:
        """Whose work may be done now."""
        return list(self._jobs)

    def _call_one_by_one(self, stage: Stage, chosen: Sequence[_Target], owners: Sequence[Job]) -> None:
        for job in owners:
            own = [(owner, target) for owner, target in chosen if owner is job]
            slots = (
                sum(job.rows[target].slots for _, target in own if isinstance(target, int)) if stage == "denoise" else len(own)
            )
            try:
                self._call(stage, own, slots)
            except FlashdiffError as error:
                self._fail([job], error)

    def _call(self, stage: Stage, chosen: Sequence[_Target], slots: int) -> None:
        """One call of one model; an error leaves every row as it was."""
        model = chosen[0][0].model
        if stage == "encode_text":
            slots = len({text for _, text in chosen})  # a text that several ask for is read once
        key = PART_OF[stage], None if stage == "encode_text" else chosen[0][0].order.size
        by_batch = model.costs[key]
        bucket = min(batch for batch in by_batch if batch >= slots)
        started = time.monotonic()
        self._hung_at[threading.get_ident()] = started + max(_HANG_S, 20 * by_batch[bucket] / 1000)
        try:
            if stage == "encode_text":
                self._encode(model, chosen)
            elif stage == "encode_image":
                jobs = [job for job, _ in chosen]
                latents = encode_images(model.components, [job.order.image for job in jobs if job.order.image is not None])
                for job, start in zip(jobs, latents, strict=True):
                    job.start = start
            else:
                rows = [job.rows[target] for job, target in chosen if isinstance(target, int)]
                if stage == "denoise":
                    denoise_rows(model.components, rows)
                else:
                    images = decode_rows(model.components, rows)
                    for (job, target), image in zip(chosen, images, strict=True):
                        job.images[int(target)] = image
        finally:
            del self._hung_at[threading.get_ident()]
        spent_ms = 1000 * (time.monotonic() - started)
        if self._observer:
            self._observer.called(model.identity.name, stage, slots, spent_ms, by_batch[bucket])
        # Follow the machine, slowly; one stall must not make the next deadlines look hopeless. The other batches follow as well,
        # more slowly: one that looks dear would not be tried again.
        by_batch[bucket] += 0.1 * (min(spent_ms, 3 * by_batch[bucket] + 1) - by_batch[bucket])
        first = model.first_costs[key]
        for other in by_batch:
            if other != bucket:
                by_batch[other] += 0.02 * (first[other] * by_batch[bucket] / first[bucket] - by_batch[other])
        name = {"encode_text": "text", "encode_image": "input_image"}.get(stage, stage)  # a field of Timings
        for job in dict.fromkeys(job for job, _ in chosen):
            job.advanced()
            setattr(job.timings, name, getattr(job.timings, name) + spent_ms)
            if stage == "denoise":
                job.batches.append(slots)
        if stage == "denoise":
            self._tell_steps(model, chosen)

    def _encode(self, model: Model, chosen: Sequence[_Target]) -> None:
        for job in dict.fromkeys(job for job, _ in chosen):
            job.noise = job.noise or self._drawing.submit(draw_noise, model.components.spec, job.order)
        texts = list(dict.fromkeys(str(text) for _, text in chosen))
        encoded = dict(zip(texts, encode_prompts(model.components, texts), strict=True))
        for text, conditioning in encoded.items():
            model.embeddings.put(text, conditioning)
        for job, target in chosen:
            job.encoded[str(target)] = encoded[str(target)]

    def _tell_steps(self, model: Model, chosen: Sequence[_Target]) -> None:
        for job, target in chosen:
            if job.on_step and isinstance(target, int):
                row = job.rows[target]
                assert row.x0 is not None  # it has just taken a step
                job.on_step(Step(target, row.step, len(row.times), preview(row.x0, model.preview_colors)))

    def _drop_departed(self, now: float) -> None:
        for job in list(self._jobs):
            if job.departed:
                self._fail([job], CancelledError("the client has left"))
            elif job.decoding or job.deadline > now + 3 * job.alone_s:
                continue  # how much of decoding is over is not known; three times, since the machine may have become slower
            elif job.deadline <= now + job.left.alone_ms / 1000:
                self._fail([job], DeadlineError("the deadline cannot be kept any more: the images would be done after it"))

    def _answer(self, jobs: list[Job]) -> None:
        for job in jobs:
            if len(job.images) == job.order.count:
                timings = job.timings
                timings.total = 1000 * (time.monotonic() - job.arrived)
                spent = timings.text + timings.input_image + timings.denoise + timings.decode
                timings.queue = max(0.0, timings.total - spent)
                if not self._end(job):
                    continue
                self._follow(job, kept=time.monotonic() <= job.deadline)
                if self._observer:
                    self._observer.answered(job.model.identity.name, timings, None)
                images = [job.images[row] for row in range(job.order.count)]
                job.answer.set_result(Finished(images, timings, job.batches))

    def _fail(self, jobs: Sequence[Job], error: FlashdiffError) -> None:
        for job in jobs:
            if self._end(job):
                if isinstance(error, DeadlineError) or time.monotonic() > job.deadline:  # also whose client has left by then
                    self._follow(job, kept=False)
                if self._observer:
                    self._observer.answered(job.model.identity.name, job.timings, error)
                job.answer.set_exception(error)

    def _follow(self, job: Job, *, kept: bool) -> None:
        """Learn from what became of its promise. A stall breaks those of all who wait, in one turn: that counts once."""
        with self._changed:
            if job.is_tight and (kept or self._turns > self._widened):
                self._margin = next_margin(self._margin, kept=kept)
                self._widened = self._widened if kept else self._turns

    def _end(self, job: Job) -> bool:
        """Take the job off the list; True for the one who may answer it."""
        with self._changed:
            if job.ended:
                return False
            job.ended = True
            self._jobs.remove(job)
            if len(job.images) == job.order.count and not job.departed:
                self._unsent.add(job)
            return True


def _needs(job: Job) -> list[tuple[Stage, int | str]]:
    """What a job could have done now: a text or its image encoded, or the next call of each unfinished row."""
    if not job.rows:
        for text in job.order.texts:
            if text not in job.encoded and (kept := job.model.embeddings.get(text)) is not None:
                job.encoded[text] = kept
                job.advanced()
        missing: list[tuple[Stage, int | str]] = [("encode_text", text) for text in job.order.texts if text not in job.encoded]
        if job.order.image is not None and job.start is None:
            missing.append(("encode_image", "image"))
        if missing:
            return missing
        noise = job.noise.result() if job.noise else ()
        job.rows = start_rows(job.model.components.spec, job.order, job.encoded, job.model.unconditional, job.start, noise)
        job.noise = None
    return [
        ("decode" if row.is_done else "denoise", index)
        for index, row in enumerate(job.rows)
        if index not in job.decoding and index not in job.images  # in this order: an image is there before its mark goes
    ]


def _pixel_bytes(order: Order) -> int:
    """Of its images, the one it starts from included."""
    return 3 * (order.count + (order.image is not None)) * order.size.width * order.size.height


def _work_of(model: Model, order: Order) -> Work:
    slots = model.components.spec.sampler.evaluations_per_step
    texts = sum(text not in model.embeddings for text in order.texts)
    costs = {part: by_batch for (part, size), by_batch in model.costs.items() if size in (None, order.size)}
    images = int(order.image is not None)
    return Work((order.steps_taken,) * order.count, slots, texts, costs, images, bucket=(id(model), order.size))


def _work_left(job: Job) -> Work:
    whole, texts, images = job.whole, 0, 0
    if job.rows:
        steps = tuple(len(row.times) - row.step for index, row in enumerate(job.rows) if index not in job.images)
    else:
        steps, images = whole.steps, int(job.order.image is not None and job.start is None)
        texts = sum(text not in job.encoded for text in job.order.texts)
    return Work(steps, whole.slots, texts, whole.costs, images, whole.bucket)


def _forget_slowness(model: Model) -> None:
    """Refusing while idle measures nothing, so a slow past would refuse for ever: let it fade to what was measured at first."""
    for key, by_batch in model.costs.items():
        for batch, first in model.first_costs[key].items():
            by_batch[batch] = min(by_batch[batch], max(first, 0.9 * by_batch[batch]))
