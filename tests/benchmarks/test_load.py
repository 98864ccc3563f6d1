"""The load command's code paths; its numbers are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.traffic.server_process import start_server

pytestmark = pytest.mark.slow

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
    run = subprocess.run(command, capture_output=True, text=True, timeout=860, check=False)
    assert run.returncode == 0, run.stderr
    measurements = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [one["phase"] for one in measurements] == [
        *("offline", "saturated", "offline", "quiet", "quiet", "saturated", "offline", "saturated", "offline", "saturated"),
        *("open loop", "open loop", "overload", "chaos"),
    ]
    assert [one["idle_cores"] for one in measurements if one["phase"] == "quiet"] == ["asleep", "awake"]
    saturated = [one for one in measurements if one["phase"] == "saturated"]
    assert [(one["cores"], one["round"]) for one in saturated] == [("shared", 1), ("own", 1), ("shared", 2), ("own", 2)]
    capacity = (saturated[1]["goodput_per_s"] + saturated[3]["goodput_per_s"]) / 2
    assert measurements[10]["offered_per_s"] == pytest.approx(0.5 * capacity, abs=0.02)
    chaos = measurements[-1]
    assert sum(chaos["ends"].values()) == chaos["sent"]
    assert (chaos["answered"], chaos["slots_left"]) == (chaos["accepted"], 0)
    assert chaos["ends"].get("OK", 0) <= chaos["accepted"] <= chaos["sent"]
    for one in (*saturated, *measurements[10:13]):
        assert sum(one["statuses"].values()) == one["sent"]
        assert len(one["samples_ms"]) == one["statuses"].get("OK", 0)
    assert "| 50% | step-level |" in run.stdout
    assert "| 50% | request-level |" in run.stdout


def test_running_server_is_measured_too(student_bundle: Path, tmp_path: Path) -> None:
    with start_server(student_bundle) as server:
        command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), "--server", server.address, "--quick"]
        run = subprocess.run(
            [*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=600, check=False
        )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["environment"]["server"] == server.address
    assert [one["phase"] for one in results["rows"]] == ["quiet", "saturated", "open loop", "overload"]
    assert f" {results['rows'][1]['goodput_per_s']:.1f} images/s" in run.stdout
    gone = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert gone.returncode == 1
    assert gone.stderr.startswith("load.py: error: UNAVAILABLE")


def test_http_and_grpc_are_measured_with_the_same_arrivals(student_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), str(student_bundle), "--protocol", "http", "--quick"]
    run = subprocess.run([*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    phases = [(one["phase"], one["protocol"]) for one in rows]
    assert phases == [(phase, name) for phase in ("quiet", "quiet", *["saturated"] * 2, "open loop") for name in ("grpc", "http")]
    for grpc, http in zip(rows[::2], rows[1::2], strict=True):
        if grpc["phase"] != "saturated":
            assert grpc["sent"] == http["sent"] > 0
        if grpc["phase"] != "quiet":
            assert set(http["statuses"]) <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert "times\n" in run.stdout
    assert "| 50% | http |" in run.stdout


def test_folder_that_is_no_bundle_is_refused_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), str(tmp_path), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("load.py: error: ")
    assert len(run.stderr.splitlines()) == 1
