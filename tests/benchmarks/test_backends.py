"""The comparison of backends: what it measures, its table, and what it refuses to compare."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.backends import STAGES, markdown, run
from flashdiff.errors import BundleError


def test_every_bundle_stage_and_batch_is_measured(teacher_bundle: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(teacher_bundle, tmp_path / "again"))
    report = run([teacher_bundle, again], batches=[1, 2], repeats=3, report=lambda _: None)
    measured = {(row["model"], row["batch"], row["stage"]) for row in report["rows"]}
    assert measured == {(name, batch, stage) for name in (teacher_bundle.name, "again") for batch in (1, 2) for stage in STAGES}
    assert all(row["n"] == 3 for row in report["rows"])


def test_the_table_says_how_much_faster_than_torch() -> None:
    def rows(backend: str, precision: str, ms: float) -> list[dict[str, object]]:
        return [{"backend": backend, "precision": precision, "batch": 1, "stage": stage, "median_ms": ms} for stage in STAGES]

    table = markdown([*rows("torch", "fp32", 10.0), *rows("openvino", "fp32", 4.0), *rows("openvino", "bf16", 2.0)])
    assert "| torch | fp32 | 1 | 10.00 | 10.00 | 10.00 |" in table
    assert "| openvino | fp32 | 1 | 4.00 (2.5x) |" in table
    assert "| openvino | bf16 | 1 | 2.00 (5.0x) |" in table


def test_the_quick_command_runs(teacher_bundle: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "backends.py"
    command = [sys.executable, str(script), str(teacher_bundle), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert "| onnxruntime | fp32 | 1 |" in run.stdout


def test_bundles_of_different_models_are_not_compared(student_bundle: Path, teacher_bundle: Path) -> None:
    with pytest.raises(BundleError, match="their costs cannot be compared"):
        run([student_bundle, teacher_bundle], batches=[1], repeats=1, report=print)
    with pytest.raises(BundleError, match="two bundles have the same name"):
        run([teacher_bundle, teacher_bundle], batches=[1], repeats=1, report=print)
    with pytest.raises(BundleError, match="takes at most 4 rows at once"):
        run([teacher_bundle], batches=[8], repeats=1, report=print)
