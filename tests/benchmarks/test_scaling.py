"""The scaling study: its code path, and the fit against costs that are known."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import exponent, fits, line, markdown, table_error


def _row(parameters: int, batch: int, ms: float) -> dict[str, Any]:
    return {"parameters": parameters, "size": [64, 64], "batch": batch, "median_ms": ms, "samples_ms": [ms, 1.1 * ms] * 3}


def test_a_cost_that_is_a_line_is_found_and_one_that_is_not_shows_its_error() -> None:
    assert line([1, 2, 4, 8], [5.0, 7.0, 11.0, 19.0]) == (pytest.approx(3), pytest.approx(2), pytest.approx(0, abs=1e-9))
    assert line([1, 2, 4], [5.0, 50.0, 5.0])[2] > 0.5


def test_the_table_is_as_far_off_as_its_halves_disagree() -> None:
    assert table_error([10.0, 10.0, 10.0]) == 0
    assert table_error([11.0, 10.0, 11.0, 10.0]) == pytest.approx(0.1)
    assert table_error([10.0]) == 0


def test_every_network_has_a_fit_and_the_table_says_how_cost_grows() -> None:
    rows = [_row(parameters, batch, batch * parameters / 1e6) for parameters in (1_000_000, 4_000_000) for batch in (1, 2)]
    assert exponent(rows, (64, 64), 1) == pytest.approx(1)
    assert [(fit["parameters"], round(fit["b_ms"], 3)) for fit in fits(rows)] == [(1_000_000, 1.0), (4_000_000, 4.0)]
    assert "- at 64x64, batch 2, a step's cost grows as parameters to the power of 1.00" in markdown(rows)
    assert "| 4.0 M | 64x64 | 4.00 | 8.00 | 0.00 + 4.00 * batch | 0% | 9% |" in markdown(rows)


def test_the_command_runs_a_real_network(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
    command = [sys.executable, str(script), "--quick", "--json", str(tmp_path / "r.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["batch"], row["size"], row["stage"], row["n"]) for row in rows] == [
        (batch, [64, 64], "denoise_step", 1) for batch in (1, 2)
    ]
    assert 0.5e6 < rows[0]["parameters"] < 2e6
