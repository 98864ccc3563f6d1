"""The policy: what the device does next, and whether a new request can be on time. Pure functions, no clock, no threads."""

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flashdiff.components import Size

Stage = Literal["decode", "encode", "denoise"]
_STAGES: tuple[Stage, ...] = ("decode", "encode", "denoise")

PART_OF: dict[Stage, str] = {"decode": "decoder", "encode": "text_encoder", "denoise": "denoiser"}

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

    rows: int
    steps: int  # of each row
    slots: int  # of each row's step
    texts: int
    costs: Mapping[str, Mapping[int, float]]  # ms by part, at its size, and batch
    bucket: Hashable = None  # whose rows share a denoise step

    @property
    def share_ms(self) -> float:
        """Its share of the device, in full batches."""
        return self.rows * self.steps * self.slots * _per_slot(self.costs["denoiser"]) + self.around_ms

    @property
    def around_ms(self) -> float:
        """Of that, what comes before the first and after the last step."""
        return self.rows * _per_slot(self.costs["decoder"]) + self.texts * _per_slot(self.costs["text_encoder"])

    @property
    def alone_ms(self) -> float:
        """How long it takes when nothing else is there."""
        return expected_ms(self, [])


def expected_ms(new: Work, ahead: Sequence[Work]) -> float:
    """How long until `new` is done, all of `ahead` going first.

    The batch is so many places. A row takes the place that is free first and keeps it for all of its steps, so a request
    waits for places, and then for its steps at the cost of the batch they share; what shares no step comes on top.
    """
    beside = [work for work in ahead if work.bucket == new.bucket]
    return (
        (_steps_ms(new, beside) if beside else new.steps * _cost(new.costs["denoiser"], new.rows * new.slots))
        + _cost(new.costs["text_encoder"], new.texts)
        + _cost(new.costs["decoder"], new.rows)
        + sum(work.around_ms if work.bucket == new.bucket else work.share_ms for work in ahead)
    )


_WAIT_MARGIN = 1.25


def promised_ms(new: Work, ahead: Sequence[Work]) -> float:
    """The time within which `new` can be promised: waiting, the uncertain part of `expected_ms`, counts a quarter more.

    Planned to the last millisecond, a queue under overload would be all work that ends just too late.
    """
    return new.alone_ms + _WAIT_MARGIN * (expected_ms(new, ahead) - new.alone_ms)


def _steps_ms(new: Work, beside: Sequence[Work]) -> float:
    by_batch = new.costs["denoiser"]
    largest = max(by_batch)
    places = [0] * max(1, largest // new.slots)  # a heap: after how many steps each is free
    ends = [heapq.heapreplace(places, places[0] + work.steps) + work.steps for work in (*beside, new) for _ in range(work.rows)]
    slots = sum(work.rows * work.slots for work in (*beside, new))
    return max(ends[-new.rows :]) * _cost(by_batch, min(slots, largest))


def _per_slot(by_batch: Mapping[int, float]) -> float:
    largest = max(by_batch)
    return by_batch[largest] / largest


def _cost(by_batch: Mapping[int, float], slots: int) -> float:
    """Of as many full batches as needed and the smallest bucket for the rest."""
    largest = max(by_batch)
    full, rest = divmod(slots, largest)
    return full * by_batch[largest] + (by_batch[min(batch for batch in by_batch if batch >= rest)] if rest else 0.0)
