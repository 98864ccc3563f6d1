"""The policy on made-up rows and a simulated clock: no threads, no sleep."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdiff.components import Size
from flashdiff.parts import Phase
from flashdiff.server.names import Priority
from flashdiff.server.scheduler import (
    LEAST_MARGIN,
    MOST_MARGIN,
    PATIENCE_S,
    Ready,
    Work,
    best_batch,
    choose,
    due,
    finish_times,
    next_margin,
    promise_ms,
)

SMALL, LARGE = Size(64, 64), Size(128, 64)
COSTS = {
    "text_encoder": {1: 1.0, 4: 2.0},
    "encoder": {1: 3.0, 4: 6.0},
    "step": {1: 10.0, 4: 20.0},
    "finish": {1: 4.0, 4: 8.0},
}
PHASES = {"text_encoder": Phase.PREPARE, "encoder": Phase.PREPARE, "denoiser": Phase.STEP, "decoder": Phase.FINISH}


def _ready(
    part: str,
    index: int,
    *,
    size: Size | None = SMALL,
    slots: int = 1,
    due: float = math.inf,
    model: str = "a",
    most: int = 4,
    costs: Mapping[int, float] | None = None,
    arrival: int | None = None,
    left: int = 1,
    may_wait: bool = False,
    joins: bool = True,
) -> Ready:
    """Each of a request of its own unless `arrival` says whose; unless `costs` are given, a full batch costs as much as one."""
    arrived, by_batch = index if arrival is None else arrival, costs or {1: 10.0, most: 10.0}
    return Ready(due, arrived, index, PHASES[part], part, model, size, slots, by_batch, left, may_wait, joins)


def test_nothing_ready_is_an_empty_batch() -> None:
    assert choose([]) == []


def test_finished_rows_are_decoded_before_prompts_are_encoded_before_steps_are_taken() -> None:
    ready = [_ready("denoiser", 0), _ready("text_encoder", 1, size=None), _ready("decoder", 2)]
    assert [item.call for item in choose(ready)] == ["decoder"]
    assert [item.call for item in choose(ready[:2])] == ["text_encoder"]


def _finished_and_rows(left: int, rows: int = 3, decode: Mapping[int, float] | None = None, may_wait: bool = True) -> list[str]:
    """What is chosen of one finished row and some rows to step, the steps `left` of which are the same."""
    finished = _ready("decoder", 0, may_wait=may_wait, costs=decode)
    return [item.call for item in choose([finished, *(_ready("denoiser", index, left=left) for index in range(1, 1 + rows))])]


def test_a_finished_row_waits_for_rows_that_are_decoded_with_it_for_less() -> None:
    assert _finished_and_rows(left=1) == 3 * ["denoiser"]  # it loses 10 ms, and three others gain as much
    assert _finished_and_rows(left=2) == 3 * ["denoiser"]
    assert _finished_and_rows(left=3) == ["decoder"]  # it would lose as much as the others gain
    assert _finished_and_rows(left=1, rows=1) == ["decoder"]  # one other gains what it loses


def test_a_finished_row_does_not_wait_where_that_saves_nothing_or_makes_it_late() -> None:
    assert _finished_and_rows(left=1, decode={1: 10.0, 2: 20.0, 4: 40.0}) == ["decoder"]
    assert _finished_and_rows(left=1, decode={1: 10.0}) == ["decoder"]  # nothing can join it
    assert _finished_and_rows(left=1, may_wait=False) == ["decoder"]


def test_an_image_of_another_size_does_not_hold_up_a_step_that_it_cannot_join() -> None:
    row = _ready("denoiser", 0, due=2)
    assert [item.call for item in choose([row, _ready("encoder", 1, due=3)])] == ["encoder"]
    assert [item.call for item in choose([row, _ready("encoder", 1, size=LARGE, due=3)])] == ["denoiser"]


def test_inputs_that_take_several_calls_wait_for_all_rows_that_are_more_urgent() -> None:
    """Those of an upscale: no call but the last lets its rows join a step."""

    def next_call(*rows_due: float, joins: bool, many: int = 9) -> str:
        rows = [_ready("denoiser", index, due=due) for index, due in enumerate(rows_due)]
        tiles = [_ready("encoder", 10 + index, due=5, arrival=10, joins=joins) for index in range(many)]
        return choose([*rows, *tiles])[0].call

    assert [next_call(*rows, joins=False) for rows in ((), (1,), (9,), (1, 9))] == ["encoder", "denoiser", "encoder", "denoiser"]
    assert [next_call(*rows, joins=True, many=3) for rows in ((), (1,), (9,), (1, 9))] == 4 * ["encoder"]
    behind = _ready("encoder", 30, due=7)  # its rows would join, but not after this call
    tiles = [_ready("encoder", 10 + index, due=5, arrival=10, joins=False) for index in range(4)]
    assert choose([_ready("denoiser", 0, due=1), *tiles, behind])[0].call == "denoiser"


def test_texts_wait_for_room_in_the_step_unless_they_are_more_urgent() -> None:
    full = [_ready("denoiser", index, due=2) for index in range(4)]
    text = _ready("text_encoder", 9, size=None, due=3)
    assert [item.call for item in choose([*full, text])] == 4 * ["denoiser"]
    assert [item.call for item in choose([*full[:3], text])] == ["text_encoder"]
    assert [item.call for item in choose([*full, _ready("text_encoder", 9, size=None, due=1)])] == ["text_encoder"]


def test_the_most_urgent_deadline_picks_the_size_and_the_rest_of_its_size_joins() -> None:
    ready = [
        _ready("denoiser", 0),
        _ready("denoiser", 1, size=LARGE, due=5),
        _ready("denoiser", 2),
        _ready("denoiser", 3, size=LARGE),
    ]
    assert [item.handle for item in choose(ready)] == [1, 3]


def test_slots_are_never_more_than_the_batch_and_a_guided_row_takes_two() -> None:
    for most in (4, 5):
        ready = [_ready("denoiser", index, slots=2, most=most) for index in range(3)]
        assert [item.handle for item in choose(ready)] == [0, 1]


def test_a_step_takes_as_many_rows_as_cost_least_each() -> None:
    nearly_twice, hardly_more, dearer_full = {1: 5.0, 2: 9.0, 4: 17.0}, {1: 5.0, 2: 6.0, 4: 8.0}, {1: 5.0, 2: 6.0, 4: 14.0}
    assert [best_batch(nearly_twice, 1, waiting) for waiting in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    assert [best_batch(hardly_more, 1, waiting) for waiting in (1, 2, 3, 4, 9)] == [1, 2, 3, 4, 4]
    assert best_batch(dearer_full, 1, 9) == 2
    assert best_batch({1: 5.0, 2: 10.0}, 1, 9) == 2  # alike: the larger, which takes fewer calls
    assert best_batch(hardly_more, 2, 1) == 1
    assert best_batch({1: 5.0}, 2, 3) == 1  # what no batch holds is for the caller to refuse


def test_texts_wait_where_their_rows_would_not_join_the_step() -> None:
    costs = {1: 5.0, 2: 9.0, 4: 17.0}
    rows = [_ready("denoiser", index, due=1, costs=costs) for index in range(2)]
    texts = [_ready("text_encoder", index, size=None, due=9) for index in range(2, 4)]
    assert [item.call for item in choose([*rows, *texts[:1]])] == 2 * ["denoiser"]  # three would go as two and one
    assert [item.call for item in choose([*rows, *texts])] == 2 * ["text_encoder"]
    assert [
        item.call for item in choose([*rows, *(_ready("text_encoder", 5 + i, size=None, due=9, model="b") for i in (0, 1))])
    ] == (2 * ["denoiser"])


def test_models_do_not_share_a_batch_and_none_blocks_another() -> None:
    ready = [
        _ready("denoiser", 0),
        _ready("denoiser", 1, model="b", due=5),
        _ready("denoiser", 2),
        _ready("denoiser", 3, model="b"),
    ]
    assert [item.handle for item in choose(ready)] == [1, 3]


_PART = st.sampled_from(["decoder", "text_encoder", "encoder", "denoiser"])


@given(st.lists(st.tuples(_PART, st.booleans(), st.integers(0, 9)), max_size=30), st.integers(2, 8))
def test_any_batch_is_of_one_stage_and_size_fits_and_holds_the_most_urgent(
    items: list[tuple[str, bool, int]], max_batch: int
) -> None:
    ready = [
        _ready(
            part,
            index,
            size=None if part == "text_encoder" else (LARGE if large else SMALL),
            slots=2 if part == "denoiser" and due % 2 else 1,  # of a model with guidance
            due=float(due),
            most=max_batch,
            model="a" if due % 2 else "b",
        )
        for index, (part, large, due) in enumerate(items)
    ]
    batch = choose(ready)
    assert bool(batch) == bool(ready)
    assert len({item.bucket for item in batch}) <= 1
    assert sum(item.slots for item in batch) <= max_batch
    if batch:
        same = [item for item in ready if item.phase == batch[0].phase]
        assert min(same, key=lambda item: (item.due, item.arrival)) in batch


def test_thousands_of_arrivals_are_all_served_and_none_waits_for_ever() -> None:
    rng = random.Random(0)
    rows: dict[int, tuple[int, Size, float]] = {}  # steps left, size, arrival time
    clock, waits, arrived = 0.0, [], 0
    while arrived < 3000 or rows:
        while arrived < 3000 and arrived * 5.5 <= clock:  # a little under what the device can do: 4 rows of 2-4 steps in 20 ms
            rows[arrived] = (rng.choice((2, 4)), rng.choice((SMALL, LARGE)), clock)
            arrived += 1
        if not rows:
            clock = arrived * 5.5
            continue
        ready = [_ready("denoiser", index, size=size) for index, (_, size, _) in rows.items()]
        batch = choose(ready)
        clock += 8.0
        for item in batch:
            steps, size, start = rows.pop(item.handle)
            if steps > 1:
                rows[item.handle] = (steps - 1, size, start)
            else:
                waits.append(clock - start)
    assert len(waits) == 3000
    assert max(waits) < 20 * (sum(waits) / len(waits))


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_where_a_batch_is_dear_the_p99_is_lower_than_with_steps_that_all_rows_join(load: float) -> None:
    dear = {1: 8.8, 2: 15.6, 4: 29.5, 8: 57.0}  # as measured on one core
    p99 = [_simulated_p99(costs, dear, load) for costs in (dear, {1: 57.0, 8: 57.0})]  # what the policy takes them to be
    assert p99[0] < p99[1]


def _simulated_p99(believed: Mapping[int, float], costs: Mapping[int, float], load: float) -> float:
    """Of 3000 requests of 2 or 4 steps, arriving at random at a share of what full batches can take."""
    rng = random.Random(0)
    rows: dict[int, tuple[int, float]] = {}  # steps left, arrival
    clock, coming, number, latencies = 0.0, 0.0, 0, []
    while number < 3000 or rows:
        while number < 3000 and coming <= clock:
            rows[number] = rng.choice((2, 4)), coming
            number += 1
            coming += rng.expovariate(load * max(costs) / costs[max(costs)] / 3)
        if not rows:
            clock = coming
            continue
        batch = choose([_ready("denoiser", index, costs=believed) for index in rows])
        clock += costs[min(bucket for bucket in costs if bucket >= len(batch))]
        for item in batch:
            steps, arrived = rows.pop(item.handle)
            if steps > 1:
                rows[item.handle] = steps - 1, arrived
            else:
                latencies.append(clock - arrived)
    return sorted(latencies)[int(0.99 * len(latencies))]


def test_waiting_makes_anyone_urgent_and_a_clients_own_backlog_lets_others_by() -> None:
    assert due(0.0, "normal", 3.0, 0.0) == 3.0
    assert due(0.0, "high", math.inf, 0.0) < due(0.0, "normal", math.inf, 0.0) < due(0.0, "low", math.inf, 0.0)
    assert due(0.0, "low", math.inf, 0.0) < due(PATIENCE_S["low"], "high", math.inf, 0.0)
    assert due(1.0, "normal", math.inf, 0.0) < due(0.0, "normal", math.inf, own_backlog_s=2.0)


def test_under_lasting_overload_even_low_priority_is_served() -> None:
    """Twice as many arrive as can be served, for ever; one low request from the start is still taken in twice its patience."""
    priorities: tuple[Priority, ...] = ("high", "normal")
    rng = random.Random(0)
    clock, waiting = 0.0, {0: due(0.0, "low", math.inf, 0.0)}
    while 0 in waiting:
        assert clock <= 2 * PATIENCE_S["low"] + 2
        for index in (2 * int(clock) + 1, 2 * int(clock) + 2):
            waiting[index] = due(clock, rng.choice(priorities), math.inf, 0.0)
        del waiting[choose([_ready("denoiser", index, due=at, most=1) for index, at in waiting.items()])[0].handle]
        clock += 1.0
    assert clock > PATIENCE_S["low"] / 2


def test_a_request_alone_takes_its_stages_and_with_others_waits_for_places() -> None:
    new = Work(steps=(4,), slots=1, prepare={"text_encoder": 1}, costs=COSTS)
    assert finish_times([new]) == [1 + 4 * 10 + 4]
    assert finish_times([replace(new, steps=5 * (1,))]) == [1 + (20 + 8) + (10 + 4)]
    sharing = Work(steps=(3, 3), slots=1, prepare={}, costs=COSTS)  # all three fit one batch of four
    assert finish_times([sharing, new]) == [1 + 3 * 20 + 8, 1 + 3 * 20 + 8 + 10 + 4]
    elsewhere = replace(sharing, bucket="another size")
    assert finish_times([elsewhere, new]) == [3 * 20 + 8, 3 * 20 + 8 + 45]
    assert finish_times([replace(new, steps=(0, 2))]) == [1 + 4 + 2 * 10 + 4]  # the first row is only to be decoded


def test_rows_whose_inputs_take_several_calls_do_not_join_more_urgent_ones() -> None:
    urgent = Work(steps=(2,), slots=1, prepare={}, costs=COSTS)
    upscale = Work(steps=5 * (1,), slots=1, prepare={"encoder": 5}, costs=COSTS)
    alone = 2 * 10 + 4
    assert finish_times([urgent, upscale]) == [alone, alone + (6 + 3) + (20 + 8) + (10 + 4)]
    small = replace(upscale, steps=3 * (1,), prepare={"encoder": 3})  # all prepared by one call
    assert finish_times([urgent, small]) == [6 + (20 + 8) + (10 + 4), 6 + (20 + 8)]
    later = replace(urgent, steps=(1,))  # joins the urgent one past the upscale
    assert finish_times([urgent, upscale, later]) == [24 + 10 + 4, 38 + (6 + 3) + (20 + 8) + (10 + 4), 20 + 4]


def test_a_promise_leaves_a_margin_for_waiting_alone() -> None:
    assert promise_ms(40.0, 40.0, 1.5) == 40.0
    assert promise_ms(40.0, 140.0, 1.5) == 190.0


@pytest.mark.parametrize(("typical", "share"), [(0.8, 0.0), (1.2, 0.01), (1.8, 0.01), (2.5, 0.01), (9.0, 1.0)])
def test_the_margin_is_learned_until_one_promise_in_a_hundred_is_broken(typical: float, share: float) -> None:
    """Waiting takes `typical` times the forecast, give or take a tenth; a promise is broken when that is more than its margin."""
    rng, margin, broken = random.Random(0), LEAST_MARGIN, 0
    for number in range(22_000):
        kept = typical * rng.gauss(1.0, 0.1) <= margin
        margin = next_margin(margin, kept=kept)
        broken += not kept and number >= 2_000
    assert broken / 20_000 == pytest.approx(share, abs=0.002)
    assert LEAST_MARGIN <= margin <= MOST_MARGIN
    for _ in range(10_000):
        margin = next_margin(margin, kept=True)
    assert margin == LEAST_MARGIN


_REQUEST = st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 2), st.booleans(), st.booleans())


@given(st.lists(_REQUEST, min_size=1, max_size=12))
def test_finish_times_are_what_the_policy_then_takes(requests: list[tuple[list[int], int, bool, bool]]) -> None:
    """Requests of so many steps a row, in two sizes, guided or not, in order of urgency, stepped and decoded as `choose` says."""
    works = [
        Work(steps=tuple(steps), slots=slots, prepare={}, costs=COSTS, bucket=(LARGE if large else SMALL, slots))
        for steps, slots, large, _ in requests
    ]
    left = {(job, row): steps for job, work in enumerate(works) for row, steps in enumerate(work.steps)}
    clock, ends = 0.0, dict[int, float]()
    while left:
        handles = list(left)
        ready = [
            _ready(
                "denoiser" if left[job, row] else "decoder",
                index,
                size=works[job].bucket[0],  # type: ignore[index]
                slots=works[job].slots if left[job, row] else 1,
                due=float(job),
                model=str(works[job].slots),
                arrival=job,
                costs=COSTS["step" if left[job, row] else "finish"],
            )
            for index, (job, row) in enumerate(handles)
        ]
        batch = choose(ready)
        clock += (COSTS["finish"] if batch[0].call == "decoder" else COSTS["step"])[1 if sum(i.slots for i in batch) == 1 else 4]
        for item in batch:
            job, row = handles[item.handle]
            if item.call == "denoiser":
                left[job, row] -= 1
            else:
                del left[job, row]
                ends[job] = clock
    assert finish_times(works) == [ends[job] for job in range(len(works))]
