"""The benchmark's code paths, never its times."""

from pathlib import Path

import pytest

from benchmarks.latency import STAGES, Configuration, markdown, measure, run
from benchmarks.rows import environment, row
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.fake_backend import GUIDED, FakeComponents
from flashdiff.errors import BundleError


def test_every_round_runs_every_configuration_and_times_every_stage() -> None:
    student, teacher = FakeComponents(), FakeComponents(GUIDED)
    configurations = [Configuration("student", student, 2, 1), Configuration("teacher", teacher, 10, 2)]
    samples = measure(configurations, 3, lambda _: None)
    assert {stage for _, stage in samples} == set(STAGES)
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
