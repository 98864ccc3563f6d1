"""The plan against a real load."""

import os
from pathlib import Path

import pytest

from benchmarks.planned import run, table
from flashdiff.engines.runtime.device import parse_devices
from flashdiff.server.planning import plan as planning

CORES = sorted(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="two core sets need two cores")
def test_a_load_is_measured_and_planned(student_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "REQUESTS", 200)
    devices = parse_devices(f"cpu:{CORES[0]},cpu:{CORES[1]}")
    results = run(student_bundle, devices, [0.02], 1, 1.0, lambda line: None)
    (row,) = results["rows"]
    for side in ("measured", "planned", "planned_by_learned_costs"):
        assert row[side]["p50_ms"] > 0
    assert table(results["rows"]).count("\n") == 4
