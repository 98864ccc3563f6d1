"""Jobs: accepted requests, their progress on the device, the work that is left, and the messages to the device thread."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Tensors
from flashdiff.orders import Order, Pixels, Preparation
from flashdiff.parts import Phase
from flashdiff.rows import Row, start_rows
from flashdiff.server.models import Model
from flashdiff.server.scheduler import Work


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Milliseconds. A part's time is that of the calls that the job took part in, which other jobs shared."""

    total: float = 0.0
    queue: float = 0.0
    """What remains of the total."""
    reading: float = 0.0
    """Reading the request's own images, before it was submitted."""
    parts: Mapping[str, float] = field(default_factory=dict)

    def by_stage(self, stages: Mapping[str, str]) -> dict[str, float]:
        """The stages that every model has: text, input_image (reading included), denoise, decode; `stages` is `Model.stages`."""
        spent = {"text": 0.0, "input_image": self.reading, "denoise": 0.0, "decode": 0.0}
        for part, spent_ms in self.parts.items():
            spent[stages[part]] += spent_ms
        return spent


@dataclass(frozen=True)
class Finished:
    """A job's answer."""

    images: list[Pixels]
    """Of its rows."""
    timings: Timings
    batches: list[int]
    """Slots of each denoise call that the job took part in."""
    device: str = ""
    """Which one made them, where devices have names."""


@dataclass(frozen=True)
class Step:
    """A row that has taken a step: `picture` [h, w, 3] shows, at latent size, where it is heading."""

    index: int  # of the image in its order
    step: int  # from 1
    total: int
    picture: Pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One accepted request. It never changes; only its answer is set, once."""

    model: Model
    order: Order
    client: str
    arrival: int  # from 1, in order of acceptance
    arrived: float  # on the worker's clock, in seconds, as all times here
    deadline: float  # infinity where there is none
    due: float
    preparations: Mapping[str, Preparation]
    whole: Work  # as accepted: texts and references in the model's cache are no work
    alone_s: float  # how long it would take on an idle device, as forecast at acceptance; 0 without a deadline
    is_tight: bool  # it waits behind others, and its deadline is so near that the margin decided whether it was accepted
    on_step: Callable[[Step], None] | None = None
    answer: "Future[Finished]" = field(default_factory=Future)
    _unclaimed: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def claim(self) -> bool:
        """True for the one caller that may set the answer."""
        return self._unclaimed.acquire(blocking=False)


class Progress(NamedTuple):
    """The work that is left of a job, as of the device thread's last turn."""

    job: Job
    prepare: Mapping[str, int]
    """Calls' slots that are left, by part."""
    steps: tuple[int, ...]
    """Steps left of each row that is not finished yet."""

    def work(self, costs: Mapping[str, Mapping[int, float]]) -> Work:
        """The work that is left, at `costs`: milliseconds of a call by part and batch size."""
        whole = self.job.whole
        return replace(whole, steps=self.steps, prepare=self.prepare, costs=costs)


def as_accepted(job: Job) -> Progress:
    """The progress of a job that the device thread has not seen yet."""
    return Progress(job, job.whole.prepare, job.whole.steps)


class Outlook(NamedTuple):
    """The device thread's unanswered jobs. It publishes a new outlook after every turn; an outlook never changes."""

    arrival: int
    """The last job it knows of."""
    progress: tuple[Progress, ...]
    """Of its unanswered jobs."""
    margin: float
    """See `scheduler.promise_ms`."""


# --- messages to the device thread -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrived:
    job: Job


@dataclass(frozen=True)
class Left:
    """The client has left, or has its answer."""

    job: Job


class Called(NamedTuple):
    """A device call has come back: its outputs, one a target, or its error."""

    call: "Call"
    outputs: "list[Output]"
    error: BaseException | None
    spent_ms: float


Output = Tensors | Pixels | None
"""What a call gives for a target: the outputs of the part that prepared it, nothing for a step, a finished image."""


@dataclass(frozen=True)
class Forgive:
    """A request was refused by the costs of an idle device."""

    model: Model


@dataclass(frozen=True)
class Stop:
    """End when every job is answered."""


Message = Arrived | Left | Called | Forgive | Stop


# --- the device thread's own ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Running:
    """What the device thread has made of a job; no other thread sees it."""

    job: Job
    prepared: dict[str, Tensors] = field(default_factory=dict)  # what the parts made of these
    noise: "Future[list[list[NDArray[np.float32]]]] | None" = None  # being drawn
    rows: list[Row] = field(default_factory=list)  # empty until everything is prepared
    finishing: set[int] = field(default_factory=set)  # rows in a call that runs in parallel
    images: dict[int, Pixels] = field(default_factory=dict)  # by row
    spent_ms: dict[str, float] = field(default_factory=dict)  # by part
    batches: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.images) == self.job.order.rows


class Target(NamedTuple):
    """What a device call can be made for: a preparation of a job, or one of its rows to step or to finish."""

    running: Running
    phase: Phase
    call: str
    """As `CostTable` names it."""
    preparation: str = ""
    row: int = -1
    slots: int = 1

    @property
    def steps_left(self) -> int:
        """Of a row."""
        row = self.running.rows[self.row] if self.row >= 0 else None
        return len(row.times) - row.step if row else 0


class Call:
    """A device call for some targets; only the thread that makes it sets `is_back`."""

    def __init__(
        self, targets: "list[Target]", slots: int, usual_ms: Mapping[str, float], hung_at: float, is_parallel: bool = False
    ) -> None:
        self.targets, self.slots = targets, slots
        self.usual_ms = usual_ms
        """Of each of its parts."""
        self.hung_at = hung_at
        """When the call counts as hung, on the worker's clock."""
        self.is_parallel = is_parallel
        """Whether another thread makes it while the device thread goes on."""
        self.is_back = False


def targets_of(running: Running) -> list[Target]:
    """The device calls that a job is ready for: each missing preparation, or the next call of each unfinished row."""
    job = running.job
    if not running.rows:
        if missing := _missing(running):
            return [Target(running, Phase.PREPARE, job.preparations[name].part, preparation=name) for name in missing]
        _start(running)
    return [
        Target(running, Phase.FINISH, Phase.FINISH, row=index)
        if row.is_done
        else Target(running, Phase.STEP, job.whole.step, row=index, slots=row.slots)
        for index, row in enumerate(running.rows)
        if index not in running.finishing and index not in running.images
    ]


def _missing(running: Running) -> list[str]:
    """The preparations that are left, once texts and references in the model's cache are taken from there."""
    for name, given in running.job.preparations.items():
        if name in running.prepared or given.key is None:
            continue
        if (kept := running.job.model.embeddings.get(given.key)) is not None:
            running.prepared[name] = kept
    return [name for name in running.job.preparations if name not in running.prepared]


def _start(running: Running) -> None:
    """Make the rows, now that everything is prepared."""
    job, noise = running.job, running.noise.result() if running.noise else ()
    running.noise = None
    running.rows = start_rows(job.model.components.spec, job.order, running.prepared, job.model.unconditional, noise)


def progress_of(running: Running) -> Progress:
    """A frozen view of what is left."""
    job = running.job
    if not running.rows:
        left = Counter(given.part for name, given in job.preparations.items() if name not in running.prepared)
        return Progress(job, left, job.whole.steps)
    steps = tuple(len(row.times) - row.step for index, row in enumerate(running.rows) if index not in running.images)
    return Progress(job, {}, steps)


def pixel_bytes(order: Order) -> int:
    """Of its images and tiles, of those it starts from, and of its controls, which the device thread keeps as float32 as well."""
    pixels = order.size.width * order.size.height
    made = order.rows * pixels
    if order.tiling:
        made += order.count * order.whole_size.width * order.whole_size.height
    return 3 * (made + order.input_pixels + 4 * len(order.controls) * pixels)
