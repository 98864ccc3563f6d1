"""The load benchmark's code paths; its numbers say nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import server
from flashdiff.errors import FlashdiffError

ROOT = Path(__file__).parent.parent.parent


def test_every_phase_runs_and_every_accepted_request_is_answered(student_bundle: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "load.py"),
        str(student_bundle),
        "--quick",
        "--json",
        str(tmp_path / "r.json"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["phase"] for row in rows] == [
        *("offline", "saturated", "offline", "quiet", "quiet", "saturated", "offline", "saturated", "offline", "saturated"),
        *("open loop", "open loop", "overload", "chaos"),
    ]
    assert [row["idle_cores"] for row in rows if row["phase"] == "quiet"] == ["asleep", "awake"]
    full = [row for row in rows if row["phase"] == "saturated"]
    assert [(row["cores"], row["round"]) for row in full] == [("shared", 1), ("own", 1), ("shared", 2), ("own", 2)]
    capacity = (full[1]["goodput_per_s"] + full[3]["goodput_per_s"]) / 2
    assert rows[10]["offered_per_s"] == pytest.approx(0.5 * capacity, abs=0.02)
    chaos = rows[-1]
    assert sum(chaos["ends"].values()) == chaos["sent"]
    assert (chaos["answered"], chaos["slots_left"]) == (chaos["accepted"], 0)
    assert chaos["ends"].get("OK", 0) <= chaos["accepted"] <= chaos["sent"]
    for row in (*full, *rows[10:13]):
        assert sum(row["statuses"].values()) == row["sent"]
        assert len(row["samples_ms"]) == row["statuses"].get("OK", 0)
    assert "step-level" in run.stdout
    assert "request-level" in run.stdout


def test_a_server_that_runs_already_is_measured_too(student_bundle: Path, tmp_path: Path) -> None:
    with server(student_bundle) as served:
        command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), "--server", served.address, "--quick"]
        run = subprocess.run(
            [*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=100, check=False
        )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["environment"]["server"] == served.address
    assert [row["phase"] for row in report["rows"]] == ["quiet", "saturated", "open loop", "overload"]
    assert "- saturated: " in run.stdout
    gone = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert gone.returncode == 1
    assert gone.stderr.startswith("load.py: error: UNAVAILABLE")


def test_a_server_that_dies_at_start_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(FlashdiffError, match="ended before it was ready"), server(tmp_path):
        pass


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), str(tmp_path), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("load.py: error: ")
    assert len(run.stderr.splitlines()) == 1
