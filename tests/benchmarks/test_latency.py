"""The latency command on the embedded model; its times are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.timing.configurations import STAGES

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"


def test_command_times_every_backend_the_server_and_stock_diffusers(tmp_path: Path) -> None:
    """On the embedded model, which stock diffusers can load."""
    command = [sys.executable, str(SCRIPT), "--base", "avatars", "--lora", "avatars-flash", "--quick"]
    run = subprocess.run([*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=860, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    measurements = found["rows"]
    assert {(one["model"], one["backend"]) for one in measurements} == {
        *(("student", backend) for backend in ("openvino", "onnxruntime", "torch")),
        *(("teacher", backend) for backend in ("openvino", "onnxruntime", "torch")),
        ("student, served", "openvino"),
        ("diffusers", "torch"),
    }
    assert {one["stage"] for one in measurements if one["model"] == "student, served"} == set(STAGES)
    assert set(found["environment"]["bundles"]) >= {"student", "teacher", "student, torch fp32"}
    lines = run.stdout.splitlines()
    assert sum(line.startswith("| student, served | openvino | 1 | 1 | 1 |") for line in lines) == 1  # the speed-ups
    assert sum(line.startswith("| student, served | openvino | 1 | 1 |") for line in lines) == 2  # and the gaps to the ideal
    peak_mb = {(one["model"], one["backend"]): one["peak_mb"] for one in found["memory"]}
    assert set(peak_mb) == {(one["model"], one["backend"]) for one in measurements if one["model"] != "student, served"}
    assert 50 < peak_mb["student", "openvino"] < peak_mb["diffusers", "torch"]  # the first has no torch in it


def test_options_that_name_no_pairs_are_refused_in_one_line() -> None:
    pair = ["--student", "a", "--teacher", "b"]
    for options, message in (
        (["--student", "a"], "pairs in order"),
        ([], "give --student and --teacher, or --base and --lora"),
        ([*pair, "--teacher-steps", "100,0"], "--teacher-steps '100,0': give whole numbers"),
        ([*pair, "--teacher-steps", "100"], "a: no such bundle"),
        ([*pair, "--calibration-prompts", "p.txt"], "--calibration-prompts p.txt: it is for --matrix"),
        ([*pair, "--matrix"], "--matrix is of students: give no --teacher"),
        (["--matrix"], "--matrix: give --student, or --base and --lora"),
    ):
        run = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=600, check=False)
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1
        assert message in run.stderr
