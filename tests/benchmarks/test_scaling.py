"""The scaling study: its code path, and the fit against costs that are known."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import exponent, fit_all, fit_line, scaling_table, table_error

pytestmark = pytest.mark.slow


def _measurement(parameters: int, batch: int, ms: float) -> dict[str, Any]:
    return {"parameters": parameters, "size": [64, 64], "batch": batch, "median_ms": ms, "samples_ms": [ms, 1.1 * ms] * 3}


def test_a_cost_that_is_a_line_is_found_and_one_that_is_not_shows_its_error() -> None:
    assert fit_line([1, 2, 4, 8], [5.0, 7.0, 11.0, 19.0]) == (pytest.approx(3), pytest.approx(2), pytest.approx(0, abs=1e-9))
    assert fit_line([1, 2, 4], [5.0, 50.0, 5.0])[2] > 0.5


def test_the_table_is_as_far_off_as_its_halves_disagree() -> None:
    assert table_error([10.0, 10.0, 10.0]) == 0
    assert table_error([11.0, 10.0, 11.0, 10.0]) == pytest.approx(0.1)
    assert table_error([10.0]) == 0


def test_every_network_has_a_fit_and_the_table_says_how_cost_grows() -> None:
    measurements = [
        _measurement(parameters, batch, batch * parameters / 1e6) for parameters in (1_000_000, 4_000_000) for batch in (1, 2)
    ]
    assert exponent(measurements, (64, 64), 1) == pytest.approx(1)
    assert [(fit["parameters"], round(fit["b_ms"], 3)) for fit in fit_all(measurements)] == [(1_000_000, 1.0), (4_000_000, 4.0)]
    table = scaling_table(measurements)
    assert [re.findall(r"\d+\.\d+", line) for line in table.splitlines() if line.startswith("- ")] == [["1.00"]] * 2  # exponents
    assert "| 4.0 M | 64x64 | 4.00 | 8.00 | 0.00 + 4.00 * batch | 0% | 9% |" in table


def test_the_command_runs_a_real_network(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
    command = [sys.executable, str(script), "--quick", "--json", str(tmp_path / "r.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=860, check=False)
    assert run.returncode == 0, run.stderr
    measurements = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(one["batch"], one["size"], one["stage"], one["n"]) for one in measurements] == [
        (batch, [64, 64], "denoise_step", 1) for batch in (1, 2)
    ]
    assert 0.5e6 < measurements[0]["parameters"] < 2e6
