"""Several devices behind one submitter: a worker each, and every order on the one that would be done with it first."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from flashdiff.engines.runtime.device import Device
from flashdiff.errors import BackendError, DeadlineError, DrainingError, FlashdiffError, OverloadedError
from flashdiff.orders import Order
from flashdiff.server.jobs import Finished, Job, Step
from flashdiff.server.loop import Observer
from flashdiff.server.models import Model
from flashdiff.server.names import Priority
from flashdiff.server.submitter import DeviceState
from flashdiff.server.worker import Worker

MOST_STRIKES = 3
"""A device is taken out when it fails so many requests in a row that another one serves."""

_log = logging.getLogger(__name__)


class FleetObserver(Protocol):
    """What is counted of a fleet: see `metrics`."""

    def of_device(self, device: str) -> Observer:
        """The observer of one device's worker."""
        ...

    def refused(self, error: FlashdiffError) -> None:
        """A request was refused."""
        ...

    def moved(self, device: str) -> None:
        """A job left a lost device for another one."""
        ...


class Steps:
    """Passes a job's steps on until another device takes the job over. Any thread may call the methods."""

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self.on_step = on_step
        self._lock = threading.Lock()
        self._is_closed, self._has_sent = False, False

    def send(self, step: Step) -> None:
        """Pass a step on, unless `close` was called."""
        with self._lock:
            if not self._is_closed:
                self._has_sent = True
                self.on_step(step)

    def close(self) -> bool:
        """Send none from now on; True when none was sent."""
        with self._lock:
            self._is_closed = True
            return not self._has_sent


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """An accepted order and the device that is to answer it."""

    model: Model
    """The first device's, as callers know it."""
    worker: Worker
    job: Job
    steps: Steps | None
    failed: Worker | None = None
    """The device that failed the order before, and lives."""


class Fleet:
    """A `Submitter` with several devices. Others answer what a device that fails had accepted.

    Its lock is taken before those of its workers' admissions. A job keeps its answer on every device, so the caller need not know
    where it is; only a device that holds the job's claim may answer, so there is one answer.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        observer: FleetObserver | None = None,
        *,
        worker: type[Worker] = Worker,
        on_lost: Callable[[Device], None] = lambda device: None,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        """The options go to each worker. `on_lost` gets a device that was taken out, in the thread that calls `check_alive`."""
        self.clock = clock
        self._observer, self._on_lost = observer, on_lost
        self._lock = threading.Lock()
        self._placed: dict[Future[Finished], _Placed] = {}
        self._strikes: dict[Worker, int] = {}
        self._lost: list[Worker] = []
        self.workers = tuple(
            worker(
                device=device,
                observer=observer.of_device(device.name) if observer else None,
                clock=clock,
                rescue=self._rescue,
                **options,
            )
            for device in devices
        )

    # --- what callers ask for ----------------------------------------------------------------------------------------

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
        """See `Submitter.submit`; refused only when every device refuses, with the best of their promises."""
        steps = Steps(on_step) if on_step else None
        within_s = math.inf if timeout_s is None else timeout_s - files_s
        refusals: list[FlashdiffError] = []
        with self._lock:
            for worker, own in self._ranked(model, order, within_s, client, priority) or self._all_of(model):
                try:
                    job = worker.admission.accept(
                        own,
                        order,
                        timeout_s,
                        client=client,
                        priority=priority,
                        on_step=steps.send if steps else None,
                        files_s=files_s,
                    )
                except FlashdiffError as error:
                    refusals.append(error)
                    continue
                self._placed[job.answer] = _Placed(model=model, worker=worker, job=job, steps=steps)
                return job
        refusal = min(refusals, key=_despair)
        if self._observer:
            self._observer.refused(refusal)
        raise refusal

    def estimate_ms(self, model: Model, order: Order, *, client: str = "", priority: Priority = "normal") -> float:
        """See `Submitter.estimate_ms`."""
        devices = self._open_with(model) or self._all_of(model)
        return min(worker.estimate_ms(own, order, client=client, priority=priority) for worker, own in devices)

    def release(self, job: Job) -> None:
        """See `Submitter.release`."""
        with self._lock:
            placed = self._placed.pop(job.answer, None)
            if placed is None:
                return
            placed.worker.release(placed.job)
            failing = self._judge(placed)
        if failing:
            failing.give_up(BackendError(f"it failed {MOST_STRIKES} requests in a row that other devices served"))

    def drain(self) -> None:
        """See `Submitter.drain`."""
        for worker in self.workers:
            worker.drain()

    def join(self, timeout_s: float) -> bool:
        """See `Submitter.join`."""
        until = time.monotonic() + timeout_s
        return all(bool(worker.failure) or worker.join(max(0.0, until - time.monotonic())) for worker in self.workers)

    def check_alive(self) -> None:
        """See `Submitter.check_alive`; also takes note of the devices that were lost."""
        for worker in self.workers:
            worker.check_alive()
            if worker.failure and worker not in self._lost:
                self._lost.append(worker)
                left = len(self.workers) - len(self._lost)
                _log.error("device %s is out: %s; %d of %d are left", worker.device.name, worker.failure, left, len(self.workers))
                self._on_lost(worker.device)

    @property
    def failure(self) -> BaseException | None:
        """See `Submitter.failure`: one device that lives is enough."""
        failures = [worker.failure for worker in self.workers]
        return failures[-1] if all(failures) else None

    @property
    def pending_images(self) -> int:
        return sum(worker.pending_images for worker in self.workers)

    @property
    def is_ready(self) -> bool:
        return any(worker.is_ready for worker in self.workers)

    @property
    def has_unsent(self) -> bool:
        return any(worker.has_unsent for worker in self.workers)

    @property
    def devices(self) -> list[DeviceState]:
        """The state of every device, in the workers' order."""
        return [state for worker in self.workers for state in worker.devices]

    # --- which device ------------------------------------------------------------------------------------------------

    def _all_of(self, model: Model) -> list[tuple[Worker, Model]]:
        """The devices that have the model open, with their own one."""
        own = [(worker, model.on(worker.device)) for worker in self.workers]
        return [(worker, found) for worker, found in own if found]

    def _open_with(self, model: Model) -> list[tuple[Worker, Model]]:
        """Those of them that take orders."""
        return [(worker, own) for worker, own in self._all_of(model) if worker.is_ready]

    def _ranked(self, model: Model, order: Order, within_s: float, client: str, priority: Priority) -> list[tuple[Worker, Model]]:
        """Those of them, the one that promises the earliest end first; of equal ones, the one with fewer images."""
        found = self._open_with(model)
        if len(found) < 2:
            return found
        promises = [
            (worker.admission.promise_ms(own, order, within_s, client=client, priority=priority), worker.pending_images)
            for worker, own in found
        ]
        return [found[index] for index in sorted(range(len(found)), key=promises.__getitem__)]

    # --- devices that fail -------------------------------------------------------------------------------------------

    def _rescue(self, worker: Worker, job: Job, error: BackendError) -> bool:
        """Give a claimed job that the worker failed to another one; False where that cannot be.

        It cannot when the client has left or has seen a step, or when a device that lives has failed the job before: then the job
        is the cause.
        """
        with self._lock:
            worker.admission.hand_over(job)
            placed = self._placed.get(job.answer)
            if placed is None or (placed.failed and not worker.failure) or (placed.steps and not placed.steps.close()):
                return False
            steps = Steps(placed.steps.on_step) if placed.steps else None
            ranked = self._ranked(placed.model, job.order, job.deadline - self.clock(), job.client, "normal")
            for other, own in ranked:
                if other in (worker, placed.failed):
                    continue
                try:
                    taken = other.admission.take_over(job, own, steps.send if steps else None)
                except FlashdiffError:  # it has just failed, too, or drains
                    continue
                failed = placed.failed if worker.failure else worker
                self._placed[job.answer] = _Placed(model=placed.model, worker=other, job=taken, steps=steps, failed=failed)
                if self._observer:
                    self._observer.moved(worker.device.name)
                _log.warning("a request was moved from %s to %s: %s", worker.device.name, other.device.name, error)
                return True
        return False

    def _judge(self, placed: _Placed) -> Worker | None:
        """Learn from an order that was released; returns the device that should be taken out."""
        if not placed.job.answer.done() or placed.job.answer.exception():
            return None
        self._strikes.pop(placed.worker, None)
        if not placed.failed or placed.failed.failure:
            return None
        strikes = self._strikes[placed.failed] = self._strikes.get(placed.failed, 0) + 1
        return placed.failed if strikes >= MOST_STRIKES else None


def _despair(refusal: FlashdiffError) -> tuple[int, float]:
    """Smaller is better news for the client: the earliest promise, then the earliest room."""
    match refusal:
        case DeadlineError():
            return 0, math.inf if refusal.promised_s is None else refusal.promised_s
        case OverloadedError():
            return 1, math.inf if refusal.retry_after_s is None else refusal.retry_after_s
        case DrainingError():
            return 2, 0.0
    return 3, 0.0
