"""Balancing policies on simulated devices."""

import pytest

from benchmarks.balancing import POLICIES, measure, plot, run, table
from benchmarks.traffic.simulated_networks import networks

COSTS = networks()["SD1.5 on an H200"]


def test_every_policy_answers_and_equal_arguments_give_equal_numbers() -> None:
    results = run([1, 3], [3], 3, lambda count: 30, lambda line: None)
    again = measure("least of two", 3, 30, COSTS, slow=False)
    (first,) = (row for row in results["rows"] if (row["policy"], row["devices"], row["slow"]) == ("least of two", 3, False))
    assert {**again, "choosing_ms": first["choosing_ms"]} == first
    assert {row["policy"] for row in results["rows"]} == set(POLICIES)
    assert all(row["in_time"] > 0 and row["choosing_ms"] > 0 for row in results["rows"])
    assert table(results["rows"], slow=True).count("\n") == 2
    assert len(plot(results["rows"]).axes) == 3


def test_promises_are_left_out_where_too_many_devices_would_be_asked() -> None:
    rows = run([1, 2], [], 1, lambda count: 10, lambda line: None)["rows"]
    assert {row["devices"] for row in rows if row["policy"] == "promised end"} == {1}
    assert {row["devices"] for row in rows if row["policy"] == "promise of two"} == {1, 2}


@pytest.mark.parametrize("policy", ["least request", "promised end"])
def test_a_policy_that_sees_the_queues_avoids_slow_devices(policy: str) -> None:
    blind, seeing = (measure(name, 10, 300, COSTS, slow=True) for name in ("round robin", policy))
    assert seeing["p99_ms"] < blind["p99_ms"]
