"""The policy on made-up rows and a simulated clock: no threads, no sleep."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from flashdiff.components import Size
from flashdiff.server.scheduler import Ready, Stage, Work, choose, expected_ms

SMALL, LARGE = Size(64, 64), Size(128, 64)
COSTS = {"text_encoder": {1: 1.0, 4: 2.0}, "denoiser": {1: 10.0, 4: 20.0}, "decoder": {1: 4.0, 4: 8.0}}


def _ready(stage: Stage, index: int, *, size: Size | None = SMALL, slots: int = 1, deadline: float = math.inf) -> Ready:
    return Ready(stage, size, slots, deadline, index, index)


def test_nothing_ready_is_an_empty_batch() -> None:
    assert choose([], 4) == []


def test_finished_rows_are_decoded_before_prompts_are_encoded_before_steps_are_taken() -> None:
    ready = [_ready("denoise", 0), _ready("encode", 1, size=None), _ready("decode", 2)]
    assert [item.stage for item in choose(ready, 4)] == ["decode"]
    assert [item.stage for item in choose(ready[:2], 4)] == ["encode"]


def test_the_most_urgent_deadline_picks_the_size_and_the_rest_of_its_size_joins() -> None:
    ready = [
        _ready("denoise", 0),
        _ready("denoise", 1, size=LARGE, deadline=5),
        _ready("denoise", 2),
        _ready("denoise", 3, size=LARGE),
    ]
    assert [item.index for item in choose(ready, 4)] == [1, 3]


def test_slots_are_never_more_than_the_batch_and_a_guided_row_takes_two() -> None:
    ready = [_ready("denoise", index, slots=2) for index in range(3)]
    assert [item.index for item in choose(ready, 4)] == [0, 1]
    assert [item.index for item in choose(ready, 5)] == [0, 1]


_STAGE = st.sampled_from(["decode", "encode", "denoise"])


@given(st.lists(st.tuples(_STAGE, st.booleans(), st.integers(1, 2), st.integers(0, 9)), max_size=30), st.integers(2, 8))
def test_any_batch_is_of_one_stage_and_size_fits_and_holds_the_most_urgent(
    items: list[tuple[Stage, bool, int, int]], max_batch: int
) -> None:
    ready = [
        Ready(stage, None if stage == "encode" else (LARGE if large else SMALL), slots, float(deadline), index, index)
        for index, (stage, large, slots, deadline) in enumerate(items)
    ]
    batch = choose(ready, max_batch)
    assert bool(batch) == bool(ready)
    assert len({(item.stage, item.size) for item in batch}) <= 1
    assert sum(item.slots for item in batch) <= max_batch
    if batch:
        same = [item for item in ready if item.stage == batch[0].stage]
        assert min(same, key=lambda item: (item.deadline, item.arrival)) in batch


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
        ready = [Ready("denoise", size, 1, math.inf, index, index) for index, (_, size, _) in rows.items()]
        batch = choose(ready, 4)
        clock += 8.0
        for item in batch:
            steps, size, start = rows.pop(item.index)
            if steps > 1:
                rows[item.index] = (steps - 1, size, start)
            else:
                waits.append(clock - start)
    assert len(waits) == 3000
    assert max(waits) < 20 * (sum(waits) / len(waits))


def test_the_estimate_is_the_sum_of_the_stages_alone_and_grows_with_the_backlog() -> None:
    new = Work(rows=1, steps=4, slots=1, needs_text=True)
    assert expected_ms(new, [], COSTS) == 1 + 4 * 10 + 4
    ahead = Work(rows=2, steps=3, slots=1, needs_text=False)
    assert expected_ms(new, [ahead], COSTS) == 45 + 2 * 3 * 5 + 2 * 2
    assert expected_ms(Work(rows=5, steps=1, slots=1, needs_text=True), [], COSTS) == 1 + (20 + 10) + (8 + 4)
