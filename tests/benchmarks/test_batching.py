"""Step-level against request-level batching on a simulated device."""

import re

from benchmarks.batching import BATCHINGS, SCENARIOS, Scenario, plot, run, simulated, table
from benchmarks.traffic.simulated_networks import SIZES, networks
from flashdiff.server.planning.simulation import Fate

MIXED = Scenario(name="mixed", steps=(1, 50), guided=(False, True), sizes=SIZES, burst=3)
FRIENDLY = networks()["batch-friendly"]


def test_both_batchings_get_the_same_requests_and_answer_them_all() -> None:
    fates = {batching: simulated(MIXED, 0.5, batching, FRIENDLY, 40) for batching in BATCHINGS}
    kinds = {
        batching: [(fate.arrival.at, fate.arrival.order.steps, fate.arrival.order.size) for fate in of_batching]
        for batching, of_batching in fates.items()
    }
    assert kinds["step"] == kinds["request"]
    assert len(set(kinds["step"])) > 10
    assert all(fate.latency_s for of_batching in fates.values() for fate in of_batching)


def test_a_guided_row_takes_two_slots_of_a_batch() -> None:
    fates = simulated(MIXED, 0.5, "step", FRIENDLY, 40)
    guided, plain = ([fate for fate in fates if _is_guided(fate) == is_guided] for is_guided in (True, False))
    assert guided
    assert plain
    assert all(slots % 2 == 0 for fate in guided for slots in fate.batches)
    assert any(slots % 2 for fate in plain for slots in fate.batches)


def _is_guided(fate: Fate) -> bool:
    assert fate.arrival.model
    return fate.arrival.model.components.spec.sampler.guidance > 1


def test_with_request_level_batching_few_steps_wait_for_many() -> None:
    (wide,) = (scenario for scenario in SCENARIOS if scenario.name == "1, 4, 8 and 50 steps")
    results = run([wide], [0.7], 100, lambda line: None)
    rows = [row for row in results["rows"] if (row["network"], row["decoding"]) == ("batch-friendly", "in turn")]
    step, request = rows
    assert step["fewest_steps_p99_ms"] < request["fewest_steps_p99_ms"] / 2
    assert step["goodput"] > request["goodput"]
    assert re.search(r"\| batch-friendly: 1, 4, 8 and 50 steps \| \d+, \d+ \|", table(results["rows"], 0.7, "parallel"))
    assert len(plot(results["rows"]).axes) == 8
