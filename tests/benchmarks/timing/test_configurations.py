"""Timing runs every configuration in every round; the times themselves are not tested."""

from benchmarks.measurements import stage_measurement
from benchmarks.timing.configurations import STAGES, in_process, stage_measurements, time_configurations
from flashdiff.engines.runtime.fake import GUIDED, FakeComponents


def test_every_round_runs_every_configuration_and_times_every_stage() -> None:
    student, teacher = FakeComponents(), FakeComponents(GUIDED)
    configurations = [
        in_process("student", student, 2, 1, "fake", "fp32"),
        in_process("teacher", teacher, 10, 2, "fake", "fp32"),
    ]
    samples = time_configurations(configurations, 3, lambda _: None)
    assert {stage for _, stage in samples} == set(STAGES) - {"queue", "wire"}
    for configuration in configurations:
        assert len(samples[configuration, "total"]) == len(samples[configuration, "text"]) == 3
        assert len(samples[configuration, "denoise_step"]) == 3 * configuration.steps
    assert teacher.calls.count(("denoiser", 4)) == 2 * 3 * 10  # each twice; two images, guided
    measurements = stage_measurements(configurations, samples)
    totals = [(one["model"], one["steps"], one["batch"], one["nfe"], one["n"]) for one in measurements if one["stage"] == "total"]
    assert totals == [("student", 2, 1, 2, 3), ("teacher", 10, 2, 20, 3)]


def test_measurement_has_the_documented_keys_and_medians() -> None:
    one = stage_measurement(
        [100.0, 300.0, 200.0], model="teacher", backend="onnxruntime", precision="fp32", batch=1, steps=50, nfe=100, stage="total"
    )
    assert one.keys() >= {"model", "backend", "precision", "batch", "steps", "nfe", "stage", "median_ms", "p95_ms", "n"}
    assert (one["median_ms"], one["p95_ms"], one["nfe"], one["n"], one["backend"]) == (200.0, 300.0, 100, 3, "onnxruntime")
    assert one["samples_ms"] == [100.0, 300.0, 200.0]
