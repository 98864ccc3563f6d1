"""The device thread: it takes messages, and makes one device call after another until every job is answered.

The device thread owns all state here, and learns of other threads by messages alone: `handle` takes one message, `turn` makes one
call, `outlook` returns what is left. Tests call these without a thread, in any order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import BackendError, CancelledError, DeadlineError, FlashdiffError, OutOfMemoryError
from flashdiff.generate import finish_rows, prepare
from flashdiff.orders import Order
from flashdiff.parts import Phase
from flashdiff.preview import preview
from flashdiff.rows import denoise_rows
from flashdiff.server.jobs import (
    Arrived,
    Call,
    Called,
    Finished,
    Forgive,
    Job,
    Left,
    Message,
    Outlook,
    Output,
    Progress,
    Running,
    Step,
    Stop,
    Target,
    Timings,
    as_accepted,
    progress_of,
    targets_of,
)
from flashdiff.server.models import Model
from flashdiff.server.scheduler import LEAST_MARGIN, Ready, choose, joins, next_margin

HANG_S = 60.0
"""A device call that takes this long, and 20 times its usual cost, counts as hung."""

_LEARNED_AT_ONCE = 8  # calls
_SLOWER = 3.0  # how many times slower the machine may be than when it accepted a job, before the job counts as urgent

Noise = list[list[NDArray[np.float32]]]


class Observer(Protocol):
    """What is counted of jobs and calls: see `metrics`."""

    def called(self, model: str, part: str, slots: int, spent_ms: float, expected_ms: float) -> None:
        """A device call of `slots` slots took `spent_ms` where `expected_ms` was its usual cost (0: not known)."""
        ...

    def answered(self, model: str, timings: Timings, error: FlashdiffError | None) -> None:
        """A job of the model ended after these times, in milliseconds, with images or with `error`."""
        ...

    def refused(self, error: FlashdiffError) -> None:
        """A request was refused."""
        ...


Rescue = Callable[[Job, BackendError], bool]
"""Gets a job that the device failed, claimed but not answered; True when another device is going to answer it."""


class DeviceLoop:
    """The jobs in hand and what to do with them.

    `draw` starts drawing an order's noise in another thread. `start` runs a call in another thread, and sends the device
    thread the message that it returns.
    """

    _choose = staticmethod(choose)  # the benchmarks compare another policy with it

    def __init__(
        self,
        clock: Callable[[], float],
        observer: Observer | None,
        draw: "Callable[[ModelSpec, Order], Future[Noise]]",
        start: Callable[[Callable[[], Message]], None],
        rescue: Rescue = lambda job, error: False,
    ) -> None:
        self._clock, self._observer, self._draw, self._start, self._rescue = clock, observer, draw, start, rescue
        self._running: dict[Job, Running] = {}
        self._progress: dict[Job, Progress] = {}
        self._left: set[Job] = set()
        self._arrival = 0
        self._turns = 0
        self._margin, self._widened = LEAST_MARGIN, 0  # of waiting in promises, and in which turn it was widened
        self._unlearned: list[tuple[Model, Size, int, dict[str, float], Mapping[str, float]]] = []
        """Calls that costs and metrics do not know yet: slots, milliseconds spent and usual by part."""
        self._is_stopping = False
        self._parallel: Call | None = None
        self.in_flight: tuple[Call, ...] = ()
        """The calls under way, for a watch in another thread."""

    # --- messages in, outlook out ------------------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """Take one message; an error that no request caused ends the device thread."""
        match message:
            case Arrived(job):
                self._running[job], self._progress[job] = Running(job), as_accepted(job)
                self._arrival = job.arrival
            case Left(job):
                if job in self._running:
                    self._left.add(job)
            case Called():
                self._parallel, self.in_flight = None, ()
                self.came_back(message)
            case Forgive(model):
                model.costs.forgive()
            case Stop():
                self._is_stopping = True

    @property
    def is_over(self) -> bool:
        """Whether every job is answered and none will come."""
        return self._is_stopping and not self._running and not self._parallel

    def outlook(self) -> Outlook:
        """What is in hand now."""
        return Outlook(self._arrival, tuple(self._progress.values()), self._margin)

    def turn(self) -> bool:
        """Make one device call; False when there is nothing to do."""
        call = self.next_call()
        if call is None:
            self._learn_costs()  # no call waits, and what is kept of models that were unloaded goes
            return False
        if call.is_parallel:
            self.call_in_parallel(call)
        else:
            self.came_back(self._call_here(call))
        return True

    # --- what to call ------------------------------------------------------------------------------------------------

    def next_call(self) -> Call | None:
        """The call for the most urgent work and all that can share it; None when there is nothing to do."""
        self._turns += 1
        now = self._clock()
        self._drop_hopeless(now)
        targets: list[Target] = []
        ready: list[Ready] = []
        for running in self._candidates():
            for target in self._targets(running):
                if target.phase == Phase.FINISH and self._parallel:
                    continue  # with the next call, when this one is back
                ready.append(self._ready(target, len(targets), now))
                targets.append(target)
        chosen = [targets[item.handle] for item in self._choose(ready)]
        return self._planned(chosen) if chosen else None

    def _candidates(self) -> Iterable[Running]:
        """The jobs that may be served now."""
        return list(self._running.values())

    def _targets(self, running: Running) -> list[Target]:
        was_preparing = not running.rows
        try:
            targets = targets_of(running)
        except FlashdiffError as error:
            self._fail(running.job, error)
            return []
        except MemoryError:
            self._fail(running.job, _short_of_memory())
            return []
        if was_preparing:  # what the model's cache has is prepared, or the rows have started
            self._progress[running.job] = progress_of(running)
        return targets

    def _ready(self, target: Target, handle: int, now: float) -> Ready:
        job = target.running.job
        costs, size = job.model.costs, job.order.size
        return Ready(
            job.due,
            job.arrival,
            handle,
            target.phase,
            target.call,
            id(job.model),
            costs.size_of(target.call, size),
            target.slots,
            costs.current[size][target.call],
            left=target.steps_left,
            may_wait=target.phase == Phase.FINISH and self._may_wait(job, now),
            joins=target.phase != Phase.PREPARE or joins(self._progress[job].prepare, costs.current[size]),
        )

    def _may_wait(self, job: Job, now: float) -> bool:
        """Whether the job's finished rows may be decoded a step later: they are on time even if both calls take twice as long."""
        longest = job.model.costs.current[job.order.size]
        return job.deadline > now + 2 * sum(max(longest[call].values()) for call in (job.whole.step, Phase.FINISH)) / 1000

    # --- calls -------------------------------------------------------------------------------------------------------

    def _planned(self, targets: list[Target]) -> Call:
        """The call for these targets; the noise of what it prepares is drawn meanwhile."""
        job, slots = targets[0].running.job, _slots(targets)
        if targets[0].phase == Phase.PREPARE:
            for running in (target.running for target in targets):
                running.noise = running.noise or self._draw(running.job.model.components.spec, running.job.order)
        usual_ms = job.model.costs.usual_ms(targets[0].call, job.order.size, slots)
        is_parallel = targets[0].phase == Phase.FINISH and job.model.components.parallel_decode
        return Call(targets, slots, usual_ms, self._clock() + max(HANG_S, 20 * sum(usual_ms.values()) / 1000), is_parallel)

    def _call_here(self, call: Call) -> Called:
        """Make a call in this thread."""
        before, self.in_flight = self.in_flight, (*self.in_flight, call)
        called = _make(call, self._clock)
        self.in_flight = before
        return called

    def call_in_parallel(self, call: Call) -> None:
        """Make a call in another thread; its outputs come as a message."""
        for target in call.targets:
            target.running.finishing.add(target.row)
        clock, self._parallel, self.in_flight = self._clock, call, (call,)
        self._start(lambda: _make(call, clock))

    def came_back(self, called: Called) -> None:
        """Take what a call gave: its outputs, or its error."""
        targets, error = called.call.targets, called.error
        if targets[0].phase == Phase.FINISH:
            for target in targets:
                target.running.finishing.discard(target.row)
        if error is None:
            self._take(called)
            return
        owners = list(dict.fromkeys(target.running for target in targets))
        if not isinstance(error, FlashdiffError):
            raise error
        if len(owners) == 1:
            self._fail(owners[0].job, error)
        else:  # one job's text, numbers or memory must not take its neighbours down: each is tried again alone
            for owner in owners:
                alone = self._call_here(self._planned([target for target in targets if target.running is owner]))
                if alone.error is None:
                    self._take(alone)
                elif isinstance(alone.error, FlashdiffError):
                    self._fail(owner.job, alone.error)
                else:
                    raise alone.error

    def _take(self, called: Called) -> None:
        """Take the outputs of a call; without the memory for it the call's jobs fail, and no others."""
        try:
            self._note(called)
        except MemoryError:
            for running in dict.fromkeys(target.running for target in called.call.targets):
                self._fail(running.job, _short_of_memory())

    def _note(self, called: Called) -> None:
        """Note outputs, time spent and progress of a call, and answer the jobs that it finished."""
        call = called.call
        phase, spent = call.targets[0].phase, _shares(call.usual_ms, called.spent_ms)
        for target, output in zip(call.targets, called.outputs, strict=True):
            self._take_output(target, output)
        job = call.targets[0].running.job
        self._unlearned.append((job.model, job.order.size, call.slots, spent, call.usual_ms))
        if phase == Phase.FINISH or len(self._unlearned) == _LEARNED_AT_ONCE:
            self._learn_costs()
        for running in dict.fromkeys(target.running for target in call.targets):
            for part, spent_ms in spent.items():
                running.spent_ms[part] = running.spent_ms.get(part, 0.0) + spent_ms
            if phase == Phase.STEP:
                running.batches.append(call.slots)
            if running.job in self._running:
                self._progress[running.job] = progress_of(running)
                if running.is_done:
                    self._answer(running)

    def _learn_costs(self) -> None:
        """Let costs and metrics follow the calls made since the last time.

        Right after an engine call, which fills the processor's caches with weights, this takes several times as long, and the
        next call waits for it: several calls at once cost little more than one. Before jobs are answered it is always done.
        """
        for model, size, slots, spent, usual_ms in self._unlearned:
            for part, spent_ms in spent.items():
                model.costs.follow(part, size, slots, spent_ms)
                if self._observer:
                    self._observer.called(model.identity.name, part, slots, spent_ms, usual_ms[part])
        self._unlearned.clear()

    def _take_output(self, target: Target, output: Output) -> None:
        running = target.running
        if target.phase == Phase.PREPARE:
            running.prepared[target.preparation] = output  # type: ignore[assignment]
            key = running.job.preparations[target.preparation].key
            if key is not None:
                running.job.model.embeddings.put(key, output)  # type: ignore[arg-type]
        elif target.phase == Phase.FINISH:
            running.images[target.row] = output  # type: ignore[assignment]
        elif running.job.on_step:
            row = running.rows[target.row]
            assert row.x0 is not None  # it has just taken a step
            picture = preview(row.x0, running.job.model.preview_colors)
            running.job.on_step(Step(target.row, row.step, len(row.times), picture))

    # --- answers -----------------------------------------------------------------------------------------------------

    def _drop_hopeless(self, now: float) -> None:
        """Answer the jobs of clients that have left, and those that can no longer be on time."""
        for job, running in list(self._running.items()):
            if job in self._left:
                self._fail(job, CancelledError("the client has left"))
            elif running.finishing or job.deadline > now + _SLOWER * job.alone_s:
                continue  # how much of a parallel call is over is not known
            else:
                work = self._progress[job].work(job.model.costs.current[job.order.size])
                if job.deadline <= now + work.alone_ms / 1000:
                    self._fail(job, DeadlineError("the deadline cannot be kept any more: the images would be done after it"))

    def _answer(self, running: Running) -> None:
        job, now = running.job, self._clock()
        total, spent = 1000 * (now - job.arrived), sum(running.spent_ms.values())
        timings = Timings(total=total, queue=max(0.0, total - spent), parts=running.spent_ms)
        if self._end(job):
            self._learn(job, kept=now <= job.deadline)
            if self._observer:
                self._observer.answered(job.model.identity.name, timings, None)
            images = [running.images[row] for row in range(job.order.rows)]
            job.answer.set_result(Finished(images, timings, running.batches, job.model.device.name))

    def _fail(self, job: Job, error: FlashdiffError) -> None:
        if self._end(job):
            if isinstance(error, DeadlineError) or self._clock() > job.deadline:  # also where its client has left by then
                self._learn(job, kept=False)
            elif isinstance(error, BackendError) and not isinstance(error, OutOfMemoryError) and self._rescue(job, error):
                return
            if self._observer:
                self._observer.answered(job.model.identity.name, Timings(), error)
            job.answer.set_exception(error)

    def _learn(self, job: Job, *, kept: bool) -> None:
        """Let the margin follow what became of a promise. A stall breaks many promises in one turn: that counts once."""
        if job.is_tight and (kept or self._turns > self._widened):
            self._margin = next_margin(self._margin, kept=kept)
            self._widened = self._widened if kept else self._turns

    def _end(self, job: Job) -> bool:
        """Take the job out of hand; True when its answer is still to be given."""
        self._left.discard(job)
        self._progress.pop(job, None)
        return self._running.pop(job, None) is not None and job.claim()


def _slots(targets: Sequence[Target]) -> int:
    """Of the call for these targets; a text that several jobs share is encoded once."""
    if targets[0].phase != Phase.PREPARE:
        return sum(target.slots for target in targets)
    values = (target.running.job.preparations[target.preparation].value for target in targets)
    return len({value if isinstance(value, str) else id(value) for value in values})


def _shares(usual_ms: Mapping[str, float], spent_ms: float) -> dict[str, float]:
    """The time that each part of a call took, by what they usually take."""
    if len(usual_ms) == 1:
        return dict.fromkeys(usual_ms, spent_ms)
    total = sum(usual_ms.values())
    return {part: spent_ms * (ms / total if total else 1 / len(usual_ms)) for part, ms in usual_ms.items()}


def _make(call: Call, clock: Callable[[], float]) -> Called:
    """Make the device call, all of whose targets are of one part, model and size; an error leaves every row as it was."""
    started = clock()
    outputs: list[Output] = []
    error: BaseException | None = None
    try:
        outputs = _outputs(call.targets)
    except MemoryError:
        error = _short_of_memory()
    except BaseException as caught:
        error = caught
    finally:
        call.is_back = True
    return Called(call, outputs, error, 1000 * (clock() - started))


def _short_of_memory() -> OutOfMemoryError:
    return OutOfMemoryError("there is not enough memory for this now")


def _outputs(targets: Sequence[Target]) -> list[Output]:
    first = targets[0]
    components = first.running.job.model.components
    if first.phase == Phase.PREPARE:
        given = [target.running.job.preparations[target.preparation] for target in targets]
        keys = [index if one.key is None else one.key for index, one in enumerate(given)]
        values: dict[object, object] = {}
        for key, one in zip(keys, given, strict=True):
            values.setdefault(key, one.value)
        made = dict(zip(values, prepare(components, first.call, [*values.values()]), strict=True))  # type: ignore[arg-type]
        return [made[key] for key in keys]
    rows = [target.running.rows[target.row] for target in targets]
    if first.phase == Phase.STEP:
        denoise_rows(components, rows)
        return [None] * len(rows)
    orders = [target.running.job.order for target in targets]
    return [order.task.finish(order, pixels) for order, pixels in zip(orders, finish_rows(components, rows), strict=True)]
