"""The policy: what the device does next, and whether a new request can be on time. Pure functions, no clock, no threads."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from flashdiff.components import Size
from flashdiff.parts import Phase
from flashdiff.server.names import Priority

LEAST_MARGIN, MOST_MARGIN = 1.4, 4.0
"""Bounds of the factor by which a promise multiplies the expected waiting time."""
_BROKEN_SHARE = 0.01  # of promises, once the margin is learned
_MARGIN_STEP = 0.05  # for a broken one: from least to most within fifty

PATIENCE_S: dict[Priority, float] = {"high": 1.0, "normal": 10.0, "low": 100.0}
"""How long a request without a deadline may wait before it is due. So every request becomes urgent: none starves."""


def due(arrived: float, priority: Priority, deadline: float, own_backlog_s: float) -> float:
    """When a request should be done: the order in which the device takes requests.

    This and `arrived`, `deadline` are seconds on the caller's clock. A client's own backlog, its pending work and the many rows
    of this request, postpones the time, so that a client with a hundred requests, or with one of a hundred rows,
    does not go before a client with one (start-time fair queueing, Goyal et al. 1996, with time on the device as the share).
    """
    return min(deadline, arrived + PATIENCE_S[priority] + own_backlog_s)


class Ready(NamedTuple):
    """Something the device could work on now: an input to prepare, or a row to step or to finish.

    Smaller is more urgent: by due time, then arrival of the request, then the caller's handle, which is unique.
    """

    due: float
    arrival: int
    handle: int
    phase: Phase
    call: str  # as `CostTable` names it
    model: Hashable
    size: Size | None  # None for texts, which share one bucket
    slots: int
    costs: Mapping[int, float]  # ms of a call, by slots of the batch
    left: int = 0  # steps until it is finished
    may_wait: bool = False  # a row to finish, for others to be finished with it
    joins: bool = True  # an input to prepare, whose request lacks no more of any part than one call prepares

    @property
    def bucket(self) -> tuple[str, Hashable, Size | None, int]:
        return self.call, self.model, self.size, self.slots


def choose(ready: Iterable[Ready]) -> list[Ready]:
    """The next batch: one part, one model, one size; empty when nothing is ready.

    Rows that only have to finish go first, since that answers a request, unless it pays to finish them with others
    (`_waits_for_company`). Then inputs are prepared, so that they join the very
    next step, unless they would not make it larger and all its rows are no less urgent: they would wait anyway, and are
    prepared together with those to come. Inputs of a request that needs several calls of one part, as the tiles of an upscale
    do, join no step soon, so they are prepared first only if they are more urgent than all rows of the step. Then one step.
    Within a phase, the most urgent item (due, then arrival) picks part, model and size, so none blocks another; the next in
    urgency follow, of rows to step as many as `best_batch` says.
    """
    urgent = sorted(ready)
    if len(urgent) == 1:
        return urgent  # a quiet server's every turn
    finish, given, rows = (
        _alike([item for item in urgent if item.phase == phase]) for phase in (Phase.FINISH, Phase.PREPARE, Phase.STEP)
    )
    step = rows[: _step_size(rows)]
    if finish and not _waits_for_company(finish, step, len(urgent)):
        return finish[: max(finish[0].costs)]
    if given:
        call = given[: max(given[0].costs)]
        if not step or call[0] < (step[-1] if call[0].joins else step[0]):
            return call
        joining = [item for item in call if item.joins and item.model == rows[0].model and item.size in (None, rows[0].size)]
        if _step_size([*rows, *joining]) > len(step):
            return call
    return step


def _waits_for_company(finish: Sequence[Ready], step: Sequence[Ready], ready: int) -> bool:
    """Whether rows should be finished later, together with those that the next steps complete; `ready` counts all that is ready.

    One call for all takes less of the device than two. Everything else that is ready gains that, and the rows that wait lose the
    steps and what the larger call takes longer: the smaller sum of waiting times wins.
    """
    if not step or not all(item.may_wait for item in finish):
        return False
    costs, step_ms = finish[0].costs, _cost(step[0].costs, len(step) * step[0].slots)
    joining = sorted(item.left for item in step if (item.model, item.size) == (finish[0].model, finish[0].size))
    for company, steps in enumerate(joining[: max(costs) - len(finish)], 1):
        now, later, together = (_cost(costs, rows) for rows in (len(finish), company, len(finish) + company))
        lost_ms = steps * step_ms + together - now
        if (now + later - together) * (ready - len(finish)) > lost_ms * len(finish):
            return True
    return False


def _alike(urgent: Sequence[Ready]) -> list[Ready]:
    """The most urgent item and what can share a call with it."""
    return [item for item in urgent if item.bucket == urgent[0].bucket]


def _step_size(rows: Sequence[Ready]) -> int:
    return best_batch(rows[0].costs, rows[0].slots, len(rows)) if rows else 0


def best_batch(costs: Mapping[int, float], slots: int, rows: int) -> int:
    """How many of the `rows` that wait for a step, of `slots` slots each, the next batch should take to cost least a row.

    `costs` holds milliseconds of a call by its slots. On a GPU the answer is all rows, padded; on a CPU, where eight cost nearly
    twice as much as four, five rows go as four and one.
    """
    sizes = {min(rows, batch // slots) for batch in costs if batch >= slots} or {1}
    return min(sizes, key=lambda size: (_cost(costs, size * slots) / size, -size))


@dataclass(frozen=True)
class Work:
    """What is left to do for one request."""

    steps: tuple[int, ...]
    """Steps left of each row that is not finished yet."""
    slots: int  # of each row's step
    prepare: Mapping[str, int]
    """Inputs left to prepare, by part."""
    costs: Mapping[str, Mapping[int, float]]
    """Milliseconds by batch of each part that prepares, of its step and of "finish", at its size."""
    bucket: Hashable = None  # whose rows share a step
    step: str = Phase.STEP
    """The call that takes a step of its rows."""

    @cached_property
    def share_ms(self) -> float:
        """Its share of the device, in full batches."""
        calls = {**self.prepare, self.step: sum(self.steps) * self.slots, Phase.FINISH: len(self.steps)}
        return sum(
            slots * by_batch[max(by_batch)] / max(by_batch) for part, slots in calls.items() for by_batch in [self.costs[part]]
        )

    @cached_property
    def joins(self) -> bool:
        """Whether its rows may join the next step of others: one call of each part prepares all that they lack."""
        return joins(self.prepare, self.costs)

    @property
    def prepare_ms(self) -> float:
        """Of all its preparations, alone in their calls."""
        return sum(_cost(self.costs[part], count) for part, count in self.prepare.items())

    @property
    def alone_ms(self) -> float:
        """How long it takes when nothing else is there."""
        return finish_times([self])[0]


def joins(prepare: Mapping[str, int], costs: Mapping[str, Mapping[int, float]]) -> bool:
    """Whether one call of each part prepares these inputs of a request, by part; `costs` are those of `Work`."""
    return all(count <= max(costs[part]) for part, count in prepare.items())


def finish_times(works: Sequence[Work]) -> list[float]:
    """When each is done, in ms from now, if nothing comes in between; the works in order of urgency.

    This is `choose`, played through from one row's end to the next. It leaves out that inputs of several requests share a
    call, and that some are prepared before they are needed. Rows whose inputs take several calls join no batch of more urgent
    ones: they are prepared when they are the most urgent.
    """
    lines: dict[Hashable, list[tuple[int, int]]] = {}  # by bucket: a row's work and its steps left
    for index, work in enumerate(works):
        lines.setdefault(work.bucket, []).extend((index, steps) for steps in work.steps)
    clock, ends, read = 0.0, [0.0] * len(works), set[int]()
    apart = {index for index, work in enumerate(works) if not work.joins}  # until they are prepared
    counts: dict[tuple[Hashable, int], int] = {}
    while lines := {bucket: rows for bucket, rows in lines.items() if rows}:
        bucket = min(lines, key=lambda bucket: lines[bucket][0][0])
        rows = lines[bucket]
        work = works[rows[0][0]]
        costs = work.costs[work.step]
        apart.discard(rows[0][0])  # the most urgent: it is prepared now
        able, unable = rows, list[tuple[int, int]]()
        if apart:
            able, unable = [row for row in rows if row[0] not in apart], [row for row in rows if row[0] in apart]
        key = bucket, min(len(able), max(costs))  # more than fit change nothing
        if key not in counts:
            counts[key] = best_batch(costs, work.slots, key[1])
        count = counts[key]
        batch, waiting = able[:count], able[count:]
        for index in {index for index, _ in batch} - read:
            read.add(index)
            clock += works[index].prepare_ms
        steps = min(left for _, left in batch)
        clock += steps * _cost(costs, count * work.slots)
        done = [index for index, left in batch if left == steps]
        clock += _cost(work.costs[Phase.FINISH], len(done))
        for index in done:
            ends[index] = clock
        left_over = [(index, left - steps) for index, left in batch if left > steps] + waiting
        lines[bucket] = sorted(left_over + unable, key=lambda row: row[0]) if unable else left_over
    return ends


def promise_ms(alone_ms: float, expected_ms: float, margin: float) -> float:
    """The time within which a request can be promised: its own time, and `margin` times the expected wait, which is uncertain.

    If plans had no margin, most work of an overloaded queue would end just too late.
    """
    return alone_ms + margin * (expected_ms - alone_ms)


def next_margin(margin: float, *, kept: bool) -> float:
    """The factor on the expected wait after a promise was kept or broken, so that about one promise in a hundred is broken.

    `finish_times` does not know which requests come later, whose texts are encoded in between, how full the last batches get, or
    how busy a shared machine will be. The factor therefore follows the error, by steps whose sum is 0 at that share (as in
    Robbins and Monro 1951, but of constant size, since the error changes).
    """
    step = -_MARGIN_STEP * _BROKEN_SHARE if kept else _MARGIN_STEP * (1 - _BROKEN_SHARE)
    return min(MOST_MARGIN, max(LEAST_MARGIN, margin + step))


def _cost(by_batch: Mapping[int, float], slots: int) -> float:
    """Of as many full batches as needed and the smallest bucket for the rest."""
    if not slots:
        return 0.0
    largest = max(by_batch)
    full, rest = divmod(slots, largest)
    return full * by_batch[largest] + (by_batch[min(batch for batch in by_batch if batch >= rest)] if rest else 0.0)
