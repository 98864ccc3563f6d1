"""A load on simulated devices: what becomes of every request."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from flashdiff.errors import FlashdiffError
from flashdiff.orders import Order
from flashdiff.server.image_threads import THREADS
from flashdiff.server.jobs import Job
from flashdiff.server.models import Model
from flashdiff.server.planning.timeline import Timeline
from flashdiff.server.submitter import Submitter


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that is going to come."""

    at: float
    """Seconds from the start."""
    order: Order
    model: Model | None = None
    """None: the simulation's."""
    timeout_s: float | None = None
    client: str = ""


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of a request."""

    arrival: Arrival
    latency_s: float | None = None
    """From its arrival to its files; None where it was refused or given up."""
    error: str = ""
    """The class of the error in that case."""
    batches: Sequence[int] = ()
    """Slots of each step that it took part in."""
    device: str = ""


def simulate(
    arrivals: Iterable[Arrival],
    submitter: Submitter,
    model: Model,
    timeline: Timeline,
    *,
    files_s: float = 0.0,
    file_threads: int = THREADS,
    is_decided: Callable[[Fate], bool] = lambda fate: False,
) -> list[Fate]:
    """The fate of each arrival, in order; `files_s` is how long one of the threads that write files takes for a request's.

    The submitter's workers are simulated ones, and its clock is the timeline. `is_decided` gets each fate as it becomes known;
    with True the simulation ends, and what is open then has no fate.
    """
    run = _Run(submitter, model, timeline, files_s, [0.0] * file_threads, is_decided)
    given = list(arrivals)
    for arrival in given:
        timeline.schedule(arrival.at, partial(run.arrive, arrival))
    timeline.run()
    return [run.fates[id(arrival)] for arrival in given if id(arrival) in run.fates]


@dataclass
class _Run:
    submitter: Submitter
    model: Model
    timeline: Timeline
    files_s: float
    free_at: list[float]
    """A heap of the times from which each thread that writes files is free."""
    is_decided: Callable[[Fate], bool]

    def __post_init__(self) -> None:
        self.fates: dict[int, Fate] = {}

    def arrive(self, arrival: Arrival) -> None:
        try:
            job = self.submitter.submit(
                arrival.model or self.model,
                arrival.order,
                arrival.timeout_s,
                client=arrival.client,
                files_s=0.0 if arrival.timeout_s is None else self.files_s,
            )
        except FlashdiffError as error:
            self._note(Fate(arrival=arrival, error=type(error).__name__))
            return
        job.answer.add_done_callback(lambda _: self._answered(arrival, job))

    def _answered(self, arrival: Arrival, job: Job) -> None:
        now = self.timeline.now
        if error := job.answer.exception():
            self.timeline.schedule(now, partial(self.submitter.release, job))
            self._note(Fate(arrival=arrival, error=type(error).__name__))
        else:
            finished, written_at = job.answer.result(), max(now, self.free_at[0]) + self.files_s
            heapq.heapreplace(self.free_at, written_at)
            self.timeline.schedule(written_at, partial(self.submitter.release, job))
            latency_s = written_at - arrival.at
            self._note(Fate(arrival=arrival, latency_s=latency_s, batches=finished.batches, device=finished.device))

    def _note(self, fate: Fate) -> None:
        self.fates[id(fate.arrival)] = fate
        if self.is_decided(fate):
            self.timeline.stop()
