"""The benchmark of one device against several."""

import os
from pathlib import Path

import pytest

from benchmarks.devices import run
from flashdiff.engines.runtime.device import parse_devices

CORES = sorted(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="two core sets need two cores")
def test_one_device_and_two_core_sets_are_measured_in_turn(student_bundle: Path) -> None:
    lines, names = list[str](), f"cpu:{CORES[0]},cpu:{CORES[1]}"
    results = run(student_bundle, parse_devices(names), 2, 0.1, lines.append)
    assert [row["devices"] for row in results["rows"]] == ["default", names]
    assert all(row["images_per_s"] > 0 and len(row["rounds"]) == 2 for row in results["rows"])
    assert [line.partition(": ")[0] for line in lines] == ["default", names, names, "default"]
