"""The policy: what the device does next, and whether a new request can be on time. Pure functions, no clock, no threads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from flashdiff.components import Costs, Size

Stage = Literal["decode", "encode", "denoise"]
_STAGES: tuple[Stage, ...] = ("decode", "encode", "denoise")

PART_OF: dict[Stage, str] = {"decode": "decoder", "encode": "text_encoder", "denoise": "denoiser"}


@dataclass(frozen=True)
class Ready:
    """Something the device could work on now: a prompt to encode, or a row to denoise or decode."""

    stage: Stage
    size: Size | None  # None for prompts, which share one bucket
    slots: int
    deadline: float  # seconds on the worker's clock; infinity where there is none
    arrival: int  # order of arrival, of the request
    index: int  # the caller's handle


def choose(ready: Iterable[Ready], max_batch: int) -> list[Ready]:
    """The next batch: one stage, one size, at most `max_batch` slots; empty when nothing is ready.

    Finished rows are decoded first, since that answers someone; then prompts are encoded, so that they join the very next
    step; then one denoise step. Within a stage, the most urgent item (deadline, then arrival) picks the size, so no size
    blocks another, and the rest of its size fills the batch in the same order.
    """
    urgent = sorted(ready, key=lambda item: (_STAGES.index(item.stage), item.deadline, item.arrival, item.index))
    batch: list[Ready] = []
    slots = 0
    for item in urgent:
        if (item.stage, item.size) == (urgent[0].stage, urgent[0].size) and slots + item.slots <= max_batch:
            batch.append(item)
            slots += item.slots
    return batch


@dataclass(frozen=True)
class Work:
    """What is left to do for one request."""

    rows: int
    steps: int  # of each row
    slots: int  # of each row's step
    needs_text: bool


def expected_ms(new: Work, backlog: Sequence[Work], costs: Costs) -> float:
    """How long until `new` is done, all of `backlog` going first in full batches and `new` then running alone."""
    ahead = sum(
        work.rows * work.steps * work.slots * _per_slot(costs["denoiser"])
        + work.rows * _per_slot(costs["decoder"])
        + work.needs_text * _per_slot(costs["text_encoder"])
        for work in backlog
    )
    alone = (
        _cost(costs["text_encoder"], 1)
        + new.steps * _cost(costs["denoiser"], new.rows * new.slots)
        + _cost(costs["decoder"], new.rows)
    )
    return ahead + alone


def _per_slot(by_batch: dict[int, float]) -> float:
    largest = max(by_batch)
    return by_batch[largest] / largest


def _cost(by_batch: dict[int, float], slots: int) -> float:
    """Of as many full batches as needed and the smallest bucket for the rest."""
    largest = max(by_batch)
    full, rest = divmod(slots, largest)
    return full * by_batch[largest] + (by_batch[min(batch for batch in by_batch if batch >= rest)] if rest else 0.0)
