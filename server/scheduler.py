"""The policy: what the device does next, and whether a new request can be on time. Pure functions, no clock, no threads."""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flashdiff.components import Size

Stage = Literal["decode", "encode", "denoise"]
_STAGES: tuple[Stage, ...] = ("decode", "encode", "denoise")

PART_OF: dict[Stage, str] = {"decode": "decoder", "encode": "text_encoder", "denoise": "denoiser"}

_WAIT_MARGIN = 1.4

Priority = Literal["high", "normal", "low"]
PATIENCE_S: dict[Priority, float] = {"high": 1.0, "normal": 10.0, "low": 100.0}
"""How long a request that names no deadline counts as willing to wait. Waiting makes any request urgent: none starves."""


def due(arrived: float, priority: Priority, deadline: float, own_backlog_s: float) -> float:
    """When a request should be done, in seconds on the caller's clock: the order in which the device takes them.

    A client's own pending work counts as patience, so that one who sends a hundred at once does not go before
    another who sends one (start-time fair queueing, Goyal et al. 1996, with time on the device as the share).
    """
    return min(deadline, arrived + PATIENCE_S[priority] + own_backlog_s)


@dataclass(frozen=True)
class Ready:
    """Something the device could work on now: a text to encode, or a row to denoise or decode."""

    stage: Stage
    model: Hashable
    size: Size | None  # None for texts, which share one bucket
    slots: int
    max_slots: int  # what a batch of this model holds
    due: float
    arrival: int  # order of arrival, of the request
    index: int  # the caller's handle

    @property
    def bucket(self) -> tuple[Stage, Hashable, Size | None]:
        return self.stage, self.model, self.size


def choose(ready: Iterable[Ready]) -> list[Ready]:
    """The next batch: one stage, one model, one size, at most `max_slots`; empty when nothing is ready.

    Finished rows are decoded first, since that answers someone. Then texts are encoded, so that they join the very next step,
    unless that step is full of rows no less urgent: they would wait anyway, and are read together with those to come. Then
    one denoise step. Within a stage, the most urgent item (due, then arrival) picks model and size, so none blocks another,
    and the rest of its bucket fills the batch in the same order.
    """
    urgent = sorted(ready, key=_urgency)
    decode, texts, step = (_fill([item for item in urgent if item.stage == stage]) for stage in _STAGES)
    is_full = bool(step) and sum(item.slots for item in step) + step[-1].slots > step[0].max_slots
    if texts and is_full and _urgency(step[-1]) <= _urgency(texts[0]):
        texts = []
    return decode or texts or step


def _urgency(item: Ready) -> tuple[float, int, int]:
    return item.due, item.arrival, item.index


def _fill(urgent: Sequence[Ready]) -> list[Ready]:
    """The first item's bucket, as far as the batch holds it."""
    batch: list[Ready] = []
    slots = 0
    for item in urgent:
        if item.bucket == urgent[0].bucket and slots + item.slots <= item.max_slots:
            batch.append(item)
            slots += item.slots
    return batch


@dataclass(frozen=True)
class Work:
    """What is left to do for one request."""

    steps: tuple[int, ...]
    """Of each row that is not decoded yet."""
    slots: int  # of each row's step
    texts: int
    costs: Mapping[str, Mapping[int, float]]  # ms by part, at its size, and batch
    bucket: Hashable = None  # whose rows share a denoise step

    @property
    def share_ms(self) -> float:
        """Its share of the device, in full batches."""
        calls = {"denoiser": sum(self.steps) * self.slots, "decoder": len(self.steps), "text_encoder": self.texts}
        return sum(
            slots * by_batch[max(by_batch)] / max(by_batch) for part, slots in calls.items() for by_batch in [self.costs[part]]
        )

    @property
    def alone_ms(self) -> float:
        """How long it takes when nothing else is there."""
        return finish_times([self])[0]


def finish_times(works: Sequence[Work]) -> list[float]:
    """When each is done, in ms from now, if nothing comes in between; the works in order of urgency.

    This is `choose`, played through: a row keeps its place in the batch until it is done, so it plays from one row's end to
    the next. It leaves out that texts of several requests share a call.
    """
    lines: dict[Hashable, deque[list[int]]] = {}  # by bucket: a row's work and its steps left
    for index, work in enumerate(works):
        lines.setdefault(work.bucket, deque()).extend([index, steps] for steps in work.steps)
    batches: dict[Hashable, list[list[int]]] = {bucket: [] for bucket in lines}
    clock, ends, read = 0.0, [0.0] * len(works), set[int]()
    while lines := {bucket: line for bucket, line in lines.items() if line or batches[bucket]}:
        bucket = min(lines, key=lambda bucket: (batches[bucket] or lines[bucket])[0][0])
        line, batch = lines[bucket], batches[bucket]
        work = works[(batch or line)[0][0]]
        while line and len(batch) < max(1, max(work.costs["denoiser"]) // work.slots):
            batch.append(line.popleft())
            if (index := batch[-1][0]) not in read:
                read.add(index)
                clock += _cost(work.costs["text_encoder"], works[index].texts)
        steps = min(left for _, left in batch)
        clock += steps * _cost(work.costs["denoiser"], len(batch) * work.slots)
        done = [index for index, left in batch if left == steps]
        clock += _cost(work.costs["decoder"], len(done))
        for index in done:
            ends[index] = clock
        batches[bucket] = [[index, left - steps] for index, left in batch if left > steps]
    return ends


def promise_ms(alone_ms: float, expected_ms: float) -> float:
    """The time within which a request can be promised: waiting, the uncertain part of it, counts two fifths more.

    Planned to the last millisecond, a queue under overload would be all work that ends just too late.
    """
    return alone_ms + _WAIT_MARGIN * (expected_ms - alone_ms)


def _cost(by_batch: Mapping[int, float], slots: int) -> float:
    """Of as many full batches as needed and the smallest bucket for the rest."""
    largest = max(by_batch)
    full, rest = divmod(slots, largest)
    return full * by_batch[largest] + (by_batch[min(batch for batch in by_batch if batch >= rest)] if rest else 0.0)
