"""The benchmark's code paths, never its times."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tiny_sdxl

from benchmarks import latency, rows
from benchmarks.latency import STAGES, Configuration, beyond_ideal, in_process, markdown, measure, of_main_backend, run, summary
from benchmarks.rows import environment, median_ranks, percentile, timed_row
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.fake import GUIDED, FakeComponents
from flashdiff.errors import BundleError, ConfigError


def test_a_commit_with_changes_on_top_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(rows, "__file__", str(tmp_path / "rows.py"))
    (tmp_path / "file").write_text("a")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "x")
    clean = rows._commit()
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("b")
    assert rows._commit() == f"{clean}-dirty"


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
    assert teacher.calls.count(("denoiser", 4)) == 2 * 3 * 10  # each twice; two images, guided


def test_rows_have_the_promised_form_and_the_table_says_the_speed_up() -> None:
    one = timed_row("onnxruntime", "fp32", "teacher", 1, 50, 100, "total", [100.0, 300.0, 200.0])
    assert one.keys() >= {"model", "backend", "precision", "batch", "steps", "nfe", "stage", "median_ms", "p95_ms", "n"}
    assert (one["median_ms"], one["p95_ms"], one["nfe"], one["n"], one["backend"]) == (200.0, 300.0, 100, 3, "onnxruntime")
    fast = {**one, "model": "student", "steps": 2, "nfe": 2, "median_ms": 10.0}
    table = markdown([{**base, "stage": stage} for base in (one, fast) for stage in STAGES])
    assert "| 200.0 | 1.0x | 1x |" in table
    assert "| 20.0x | 50x |" in table
    assert "p95" not in table  # of three samples
    many = {**fast, "n": 20, "p95_ms": 12.0}
    assert "| total, median (p95) ms |" in markdown([many, {**one, "n": 20}])
    assert "| 10.0 (12.0) |" in markdown([many, {**one, "n": 20}])


def test_a_percentile_is_the_nearest_rank() -> None:
    assert percentile(range(20, 0, -1), 95) == 19
    assert [percentile(range(1, 11), percent) for percent in (0, 50, 95, 100)] == [1, 5, 10, 10]
    assert percentile([7.0], 99) == 7


def test_the_environment_names_bundles_by_hash(teacher_bundle: Path) -> None:
    manifest = read_manifest(teacher_bundle)
    assert environment({"teacher": manifest})["bundles"]["teacher"]["hash"] == manifest.bundle_hash


def _timed(model: str, backend: str, steps: int, nfe: int, total: float, **stages: float) -> list[dict[str, Any]]:
    about = {"model": model, "backend": backend, "precision": "fp32", "batch": 1, "steps": steps, "nfe": nfe}
    return [{**about, "stage": name, "median_ms": ms, "p95_ms": ms, "n": 20} for name, ms in {**stages, "total": total}.items()]


_TWO_BACKENDS = [
    *_timed("student", "openvino", 4, 4, 24.0, text=1.0, denoise_step=5.0, decode=2.0, image_encoding=0.5),
    *_timed("student, served", "openvino", 4, 4, 30.0, text=1, denoise_step=5, decode=2, image_encoding=0.5, queue=2, wire=3),
    *_timed("diffusers", "torch", 4, 4, 80.0),
    *_timed("teacher", "openvino", 50, 100, 400.0, text=0.0, denoise_step=8.0, decode=0.0, image_encoding=0.0),
    *_timed("teacher", "openvino", 25, 50, 200.0, text=0.0, denoise_step=8.0, decode=0.0, image_encoding=0.0),
    *_timed("student", "torch", 4, 4, 60.0, text=1.0, denoise_step=14.0, decode=2.0, image_encoding=0.5),
    *_timed("teacher", "torch", 50, 100, 1200.0, text=0.0, denoise_step=24.0, decode=0.0, image_encoding=0.0),
]


def test_a_student_is_held_against_the_teacher_of_its_backend_and_an_alternative_against_the_first() -> None:
    cells = [line.split(" | ") for line in markdown(_TWO_BACKENDS).splitlines()[2:]]
    speed_ups = {(line[0], line[1]): line[-2] for line in cells}
    assert speed_ups["| student", "openvino"] == "16.7x"
    assert speed_ups["| student", "torch"] == "20.0x"
    assert speed_ups["| diffusers", "torch"] == "5.0x"
    assert {row["model"] for row in of_main_backend(_TWO_BACKENDS)} == {"student", "student, served", "diffusers", "teacher"}
    assert not any(row["backend"] == "torch" and row["model"] != "diffusers" for row in of_main_backend(_TWO_BACKENDS))


def test_the_rest_of_the_ideal_is_accounted_for() -> None:
    alone, served, torch = beyond_ideal(_TWO_BACKENDS)
    # 4 of 100 evaluations of 400 ms: 16. Text, decoding and PNG: 3.5 more. 4 steps of 5 ms beside 2 guided ones of 8: 4 more.
    assert (alone.ideal, alone.fixed, alone.evaluations, alone.served) == pytest.approx((16.0, 3.5, 4.0, 0.0))
    assert alone.other == pytest.approx(0.5)
    assert alone.of_ideal == pytest.approx(16 / 24)
    assert (served.served, served.other) == pytest.approx((5.0, 1.5))
    assert torch.ideal == pytest.approx(48.0)
    assert "| student, served | openvino | 1 | 4 | 16.0 | 3.5 | 4.0 | 5.0 | 1.5 | 30.0 | 0.53 |" in summary(_TWO_BACKENDS)


def test_the_median_lies_in_its_interval_19_times_of_20() -> None:
    assert [median_ranks(n) for n in (1, 5, 6, 20, 100)] == [(0, 0), (0, 4), (0, 5), (5, 14), (39, 60)]
    rng = np.random.default_rng(0)
    low, high = median_ranks(20)
    sorted_samples = np.sort(rng.exponential(size=(4000, 20)))  # of a lopsided distribution, whose median is ln 2
    inside = (sorted_samples[:, low] <= np.log(2)) & (np.log(2) <= sorted_samples[:, high])
    assert inside.mean() == pytest.approx(0.959, abs=0.01)


def test_bundles_that_cannot_be_compared_are_refused(student_bundle: Path, teacher_bundle: Path) -> None:
    with pytest.raises(BundleError, match="not ode and flash"):
        run([(teacher_bundle, student_bundle)], batches=[1], repeats=1, report=print)
    with pytest.raises(BundleError, match="must be built for the same backend"):
        run([(student_bundle, teacher_bundle)], batches=[1], repeats=1, report=print)


def test_the_command_times_every_backend_the_server_and_stock_diffusers(tmp_path: Path) -> None:
    """On the embedded model: stock diffusers needs one that its loader takes."""
    script = Path(__file__).parents[2] / "benchmarks" / "latency.py"
    command = [sys.executable, str(script), "--base", "avatars", "--lora", "avatars-flash", "--quick"]
    run = subprocess.run([*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=560, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    rows = found["rows"]
    assert {(row["model"], row["backend"]) for row in rows} == {
        *(("student", backend) for backend in ("openvino", "onnxruntime", "torch")),
        *(("teacher", backend) for backend in ("openvino", "onnxruntime", "torch")),
        ("student, served", "openvino"),
        ("diffusers", "torch"),
    }
    assert {row["stage"] for row in rows if row["model"] == "student, served"} == set(STAGES)
    assert set(found["environment"]["bundles"]) >= {"student", "teacher", "student, torch fp32"}
    assert "| student, served | openvino | 1 | 1 | 1 |" in run.stdout
    assert "Where the rest of the ideal speed-up went" in run.stdout
    peak_mb = {(row["model"], row["backend"]): row["peak_mb"] for row in found["memory"]}
    assert set(peak_mb) == {(row["model"], row["backend"]) for row in rows if row["model"] != "student, served"}
    assert 50 < peak_mb["student", "openvino"] < peak_mb["diffusers", "torch"]  # the first has no torch in it


def test_without_a_compiler_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(base: str, lora: Path, *, device: str, compiled: bool) -> Callable[[int, int], Configuration]:
        def once(_: int) -> dict[str, list[float]]:
            if compiled:
                raise RuntimeError("No working C++ compiler found\nand more")
            return {"total": [1.0]}

        return lambda steps, batch: Configuration("diffusers", "torch", "fp32", steps, batch, steps, once)

    monkeypatch.setattr(latency, "stock_diffusers", stock)
    said: list[str] = []
    assert latency._tried("avatars", tmp_path, "cpu", False, 1, said.append)
    assert latency._tried("avatars", tmp_path, "cpu", True, 1, said.append) is None
    assert said == ["without diffusers, compiled: No working C++ compiler found"]


def test_a_base_that_stock_diffusers_is_not_timed_with_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    latency.check_stock("avatars")
    with pytest.raises(ConfigError, match="is for a StableDiffusionXLPipeline"):
        latency.check_stock(str(make_tiny_sdxl(tmp_path)))


def test_bundles_that_are_no_pairs_are_one_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "latency.py"
    pair = ["--student", "a", "--teacher", "b"]
    for options, said in (
        (["--student", "a"], "pairs in order"),
        ([], "give --student and --teacher, or --base and --lora"),
        ([*pair, "--teacher-steps", "100,0"], "--teacher-steps '100,0': give whole numbers"),
        ([*pair, "--teacher-steps", "100"], "a: no such bundle"),
    ):
        run = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=100, check=False)
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1
        assert said in run.stderr
