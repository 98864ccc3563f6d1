"""The matrix of backends and precisions: its table, what it times, and what it refuses."""

from pathlib import Path

import pytest

from benchmarks.measurements import stage_measurement
from benchmarks.timing.matrix import matrix_table, run_matrix
from flashdiff.errors import BundleError


def test_a_line_has_time_ratios_and_quality() -> None:
    of_student = {"model": "student", "backend": "openvino", "batch": 8, "steps": 4, "nfe": 4}
    stock = {"backend": "torch", "precision": "fp32", "batch": 8, "steps": 4, "nfe": 4, "stage": "total"}
    rows = [
        stage_measurement([2.0], precision="int8", stage="denoise_step", **of_student),
        stage_measurement([16.0], precision="int8", stage="total", **of_student),
        stage_measurement([32.0], precision="bf16", stage="total", **of_student),
        stage_measurement([64.0], model="diffusers", **stock),
    ]
    quality = [
        {"backend": "openvino", "precision": "int8", "psnr": 30.04, "attributes": [0.95, 0.949], "kid": [1.0, 1.25]},
        {"backend": "openvino", "precision": "bf16"},
    ]
    head, _, int8, bf16, diffusers = matrix_table({"rows": rows, "quality": quality}).splitlines()
    assert head.startswith(
        "| model | backend | precision | batch | a step of the batch, ms | an image of 4 steps, ms | diffusers takes |"
    )
    assert int8 == "| student | openvino | int8 | 8 | 2.00 | 2.00 | 4.00x | 30.0 | 94.9% (float32 95.0%) | 1.25 (float32 1.00) |"
    assert bf16 == "| student | openvino | bf16 | 8 |  | 4.00 | 2.00x |  |  |  |"
    assert diffusers == "| diffusers | torch | fp32 | 8 |  | 8.00 | 1.00x |  |  |  |"


def test_every_bundle_is_timed_at_every_batch(student_bundle: Path) -> None:
    results = run_matrix([student_bundle], batches=(1, 2), repeats=1, with_compiled=False, report=print)
    totals = [row for row in results["rows"] if row["stage"] == "total"]
    assert [(row["backend"], row["precision"], row["batch"]) for row in totals] == [
        ("openvino", "fp32", 1),
        ("openvino", "fp32", 2),
    ]
    assert matrix_table(results).count("| student | openvino | fp32 |") == 2
    with pytest.raises(BundleError, match="--batch 8: a bundle takes at most 4 evaluations"):
        run_matrix([student_bundle], batches=(8,), repeats=1, with_compiled=False, report=print)
    with pytest.raises(BundleError, match="the same backend and precision"):
        run_matrix([student_bundle] * 2, batches=(1,), repeats=1, with_compiled=False, report=print)
