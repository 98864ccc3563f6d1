"""The benchmark's code paths, never its times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.latency import STAGES, in_process, markdown, measure, run
from benchmarks.rows import environment, row
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.fake_backend import GUIDED, FakeComponents
from flashdiff.errors import BundleError


def test_every_round_runs_every_configuration_and_times_every_stage() -> None:
    student, teacher = FakeComponents(), FakeComponents(GUIDED)
    configurations = [
        in_process("student", student, 2, 1, "fake", "fp32"),
        in_process("teacher", teacher, 10, 2, "fake", "fp32"),
    ]
    samples = measure(configurations, 3, lambda _: None)
    assert {stage for _, stage in samples} == set(STAGES) - {"queue", "wire"}
    for configuration in configurations:
        assert len(samples[configuration, "total"]) == len(samples[configuration, "text"]) == 3
        assert len(samples[configuration, "denoise_step"]) == 3 * configuration.steps
    assert teacher.calls.count(("denoiser", 4)) == (2 + 3) * 10  # two warm-up rounds; two images, guided


def test_rows_have_the_promised_form_and_the_table_says_the_speed_up(teacher_bundle: Path) -> None:
    manifest = read_manifest(teacher_bundle)
    one = row(manifest, "teacher", 1, 50, "total", [100.0, 300.0, 200.0])
    assert one.keys() >= {"model", "backend", "precision", "batch", "steps", "nfe", "stage", "median_ms", "p95_ms", "n"}
    assert (one["median_ms"], one["p95_ms"], one["nfe"], one["n"], one["backend"]) == (200.0, 300.0, 100, 3, "onnxruntime")
    fast = {**one, "model": "student", "steps": 2, "nfe": 2, "median_ms": 10.0}
    table = markdown([{**base, "stage": stage} for base in (one, fast) for stage in STAGES])
    assert "| 20.0x | 50x |" in table
    assert environment({"teacher": manifest})["bundles"]["teacher"]["hash"] == manifest.bundle_hash


def test_bundles_that_cannot_be_compared_are_refused(student_bundle: Path, teacher_bundle: Path) -> None:
    with pytest.raises(BundleError, match="not ode and flash"):
        run(teacher_bundle, student_bundle, batches=[1], repeats=1, report=print)
    with pytest.raises(BundleError, match="must be built for the same backend"):
        run(student_bundle, teacher_bundle, batches=[1], repeats=1, report=print)


def test_the_command_times_the_server_and_stock_diffusers_too(tmp_path: Path) -> None:
    """On the embedded model: stock diffusers needs one that its loader takes."""
    for name, options in (("student", ["--lora", "avatars-flash"]), ("teacher", ["--guidance", "3"])):
        build = ["build-engine", "avatars", *options, "--batch", "1,2", "--out", str(tmp_path / name)]
        subprocess.run([sys.executable, "-m", "flashdiff", *build], check=True, capture_output=True)
    bundles = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    script = Path(__file__).parents[2] / "benchmarks" / "latency.py"
    command = [sys.executable, str(script), *bundles, "--base", "avatars", "--lora", "avatars-flash", "--quick"]
    run = subprocess.run([*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"student", "student, served", "diffusers", "teacher"}
    assert {row["stage"] for row in rows if row["model"] == "student, served"} == set(STAGES)
    assert "| student, served | 1 | 1 | 1 |" in run.stdout
