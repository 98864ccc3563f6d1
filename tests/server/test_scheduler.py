"""The policy on made-up rows and a simulated clock: no threads, no sleep."""

import math
import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flashdiff.components import Size
from flashdiff.server.scheduler import PATIENCE_S, Priority, Ready, Stage, Work, choose, due, expected_ms, promised_ms

SMALL, LARGE = Size(64, 64), Size(128, 64)
COSTS = {"text_encoder": {1: 1.0, 4: 2.0}, "denoiser": {1: 10.0, 4: 20.0}, "decoder": {1: 4.0, 4: 8.0}}


def _ready(
    stage: Stage, index: int, *, size: Size | None = SMALL, slots: int = 1, due: float = math.inf, model: str = "a", most: int = 4
) -> Ready:
    return Ready(stage, model, size, slots, most, due, index, index)


def test_nothing_ready_is_an_empty_batch() -> None:
    assert choose([]) == []


def test_finished_rows_are_decoded_before_prompts_are_encoded_before_steps_are_taken() -> None:
    ready = [_ready("denoise", 0), _ready("encode", 1, size=None), _ready("decode", 2)]
    assert [item.stage for item in choose(ready)] == ["decode"]
    assert [item.stage for item in choose(ready[:2])] == ["encode"]


def test_texts_wait_for_room_in_the_step_unless_they_are_more_urgent() -> None:
    full = [_ready("denoise", index, due=2) for index in range(4)]
    text = _ready("encode", 9, size=None, due=3)
    assert [item.stage for item in choose([*full, text])] == 4 * ["denoise"]
    assert [item.stage for item in choose([*full[:3], text])] == ["encode"]
    assert [item.stage for item in choose([*full, _ready("encode", 9, size=None, due=1)])] == ["encode"]


def test_the_most_urgent_deadline_picks_the_size_and_the_rest_of_its_size_joins() -> None:
    ready = [
        _ready("denoise", 0),
        _ready("denoise", 1, size=LARGE, due=5),
        _ready("denoise", 2),
        _ready("denoise", 3, size=LARGE),
    ]
    assert [item.index for item in choose(ready)] == [1, 3]


def test_slots_are_never_more_than_the_batch_and_a_guided_row_takes_two() -> None:
    for most in (4, 5):
        ready = [_ready("denoise", index, slots=2, most=most) for index in range(3)]
        assert [item.index for item in choose(ready)] == [0, 1]


def test_models_do_not_share_a_batch_and_none_blocks_another() -> None:
    ready = [_ready("denoise", 0), _ready("denoise", 1, model="b", due=5), _ready("denoise", 2), _ready("denoise", 3, model="b")]
    assert [item.index for item in choose(ready)] == [1, 3]


_STAGE = st.sampled_from(["decode", "encode", "denoise"])


@given(st.lists(st.tuples(_STAGE, st.booleans(), st.integers(1, 2), st.integers(0, 9)), max_size=30), st.integers(2, 8))
def test_any_batch_is_of_one_stage_and_size_fits_and_holds_the_most_urgent(
    items: list[tuple[Stage, bool, int, int]], max_batch: int
) -> None:
    ready = [
        _ready(
            stage,
            index,
            size=None if stage == "encode" else (LARGE if large else SMALL),
            slots=slots,
            due=float(due),
            most=max_batch,
            model="a" if due % 2 else "b",
        )
        for index, (stage, large, slots, due) in enumerate(items)
    ]
    batch = choose(ready)
    assert bool(batch) == bool(ready)
    assert len({item.bucket for item in batch}) <= 1
    assert sum(item.slots for item in batch) <= max_batch
    if batch:
        same = [item for item in ready if item.stage == batch[0].stage]
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
        ready = [_ready("denoise", index, size=size) for index, (_, size, _) in rows.items()]
        batch = choose(ready)
        clock += 8.0
        for item in batch:
            steps, size, start = rows.pop(item.index)
            if steps > 1:
                rows[item.index] = (steps - 1, size, start)
            else:
                waits.append(clock - start)
    assert len(waits) == 3000
    assert max(waits) < 20 * (sum(waits) / len(waits))


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
        del waiting[choose([_ready("denoise", index, due=at, most=1) for index, at in waiting.items()])[0].index]
        clock += 1.0
    assert clock > PATIENCE_S["low"] / 2


def test_the_estimate_is_the_sum_of_the_stages_alone_and_grows_with_the_backlog() -> None:
    new = Work(rows=1, steps=4, slots=1, texts=1, costs=COSTS)
    assert expected_ms(new, []) == 1 + 4 * 10 + 4
    assert expected_ms(Work(rows=5, steps=1, slots=1, texts=1, costs=COSTS), []) == 1 + (20 + 10) + (8 + 4)
    beside = Work(rows=2, steps=3, slots=1, texts=0, costs=COSTS)  # all three fit one batch of four
    assert expected_ms(new, [beside]) == 1 + 4 * 20 + 4 + 2 * 2
    elsewhere = replace(beside, bucket="another size")
    assert expected_ms(new, [elsewhere]) == expected_ms(new, []) + 2 * 3 * 5 + 2 * 2
    assert promised_ms(new, []) == expected_ms(new, [])
    assert promised_ms(new, [beside]) > expected_ms(new, [beside])
    assert expected_ms(new, 4 * [beside]) == 1 + (6 + 4) * 20 + 4 + 4 * 4  # eight rows of three steps go before it


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), max_size=20), st.integers(1, 3), st.integers(1, 6))
def test_the_estimate_is_what_the_policy_then_takes(ahead: list[tuple[int, int]], rows: int, steps: int) -> None:
    """Requests of so many rows and steps, in order, stepped as `choose` says, at the cost of a full batch each."""
    works = [Work(rows=r, steps=s, slots=1, texts=0, costs=COSTS) for r, s in (*ahead, (rows, steps))]
    left = {(job, row): work.steps for job, work in enumerate(works) for row in range(work.rows)}
    took = 0
    while any(job == len(ahead) for job, _ in left):
        handles = list(left)
        for item in choose([_ready("denoise", index, due=float(job)) for index, (job, _) in enumerate(handles)]):
            left[handles[item.index]] -= 1
        left = {key: steps for key, steps in left.items() if steps}
        took += 1
    around = sum(2.0 * r for r, _ in ahead) + (4.0 if rows == 1 else 8.0)
    assert expected_ms(works[-1], works[:-1]) == took * (20.0 if ahead or rows > 1 else 10.0) + around
