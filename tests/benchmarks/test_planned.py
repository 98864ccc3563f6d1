"""The plan against a real load."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.planned import run, table
from benchmarks.traffic.sleeping import SleepingComponents
from flashdiff.engines.runtime.device import parse_devices
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server.costs import CostTable
from flashdiff.server.planning import measuring
from flashdiff.server.planning import plan as planning

CORES = sorted(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="two core sets need two cores")
@pytest.mark.parametrize("sleep", [False, True])
def test_a_load_is_measured_and_planned(student_bundle: Path, monkeypatch: pytest.MonkeyPatch, sleep: bool) -> None:
    monkeypatch.setattr(planning, "REQUESTS", 200)
    monkeypatch.setattr(measuring, "REHEARSAL_S", 0.5)
    devices = parse_devices(f"cpu:{CORES[0]},cpu:{CORES[1]}")
    results = run(student_bundle, devices, [0.02], 1, 1.0, lambda line: None, sleep=sleep)
    (row,) = results["rows"]
    for side in ("measured", "planned", "planned_by_learned_costs"):
        assert row[side]["p50_ms"] > 0
    assert table(results["rows"]).count("\n") == 4


def test_calls_that_sleep_have_the_shapes_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, slept = FakeComponents(delay_s=0.0), list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    sleeping = SleepingComponents(fake, CostTable(fake.spec, {key: {1: 3.0, 4: 5.0} for key in fake.costs}))
    for rows in (1, 3):
        shape = sleeping.call("decoder", {"latents": np.zeros((rows, 3, 8, 8), np.float32)})["images"].shape
        assert shape == (rows, 3, 64, 64)
    assert (slept, fake.calls) == ([0.003, 0.005], [("decoder", 1)])
