"""The speed-up, its table, and the gap to the ideal."""

import pytest
from measured import timed

from benchmarks.timing.configurations import STAGES
from benchmarks.timing.speedup import ideal_gaps, of_main_backend, speedup_table, summary

_TWO_BACKENDS = [
    *timed("student", 4, 4, 24.0, text=1.0, denoise_step=5.0, decode=2.0, image_encoding=0.5),
    *timed("student, served", 4, 4, 30.0, text=1, denoise_step=5, decode=2, image_encoding=0.5, queue=2, wire=3),
    *timed("diffusers", 4, 4, 80.0, backend="torch"),
    *timed("teacher", 50, 100, 400.0, text=0.0, denoise_step=8.0, decode=0.0, image_encoding=0.0),
    *timed("teacher", 25, 50, 200.0, text=0.0, denoise_step=8.0, decode=0.0, image_encoding=0.0),
    *timed("student", 4, 4, 60.0, backend="torch", text=1.0, denoise_step=14.0, decode=2.0, image_encoding=0.5),
    *timed("teacher", 50, 100, 1200.0, backend="torch", text=0.0, denoise_step=24.0, decode=0.0, image_encoding=0.0),
]


def test_table_has_the_speed_up_and_a_p95_from_20_samples_on() -> None:
    teacher = {**timed("teacher", 50, 100, 200.0)[0], "n": 3}
    student = {**teacher, "model": "student", "steps": 2, "nfe": 2, "median_ms": 10.0}
    table = speedup_table([{**one, "stage": stage} for one in (teacher, student) for stage in STAGES])
    assert "| 200.0 | 1.0x | 1x |" in table
    assert "| 20.0x | 50x |" in table
    assert "p95" not in table  # of three samples
    many = speedup_table([{**student, "n": 20, "p95_ms": 12.0}, {**teacher, "n": 20}])
    assert "| total, median (p95) ms |" in many
    assert "| 10.0 (12.0) |" in many


def test_student_is_compared_with_the_teacher_of_its_backend_and_stock_diffusers_with_the_first() -> None:
    cells = [line.split(" | ") for line in speedup_table(_TWO_BACKENDS).splitlines()[2:]]
    speed_ups = {(line[0], line[1]): line[-2] for line in cells}
    assert speed_ups["| student", "openvino"] == "16.7x"
    assert speed_ups["| student", "torch"] == "20.0x"
    assert speed_ups["| diffusers", "torch"] == "5.0x"
    assert {one["model"] for one in of_main_backend(_TWO_BACKENDS)} == {"student", "student, served", "diffusers", "teacher"}
    assert not any(one["backend"] == "torch" and one["model"] != "diffusers" for one in of_main_backend(_TWO_BACKENDS))
    assert of_main_backend([]) == []


def test_gap_to_the_ideal_adds_up() -> None:
    alone, served, torch = ideal_gaps(_TWO_BACKENDS)
    # 4 of 100 evaluations of 400 ms: 16. Text, decoding and PNG: 3.5 more. 4 steps of 5 ms instead of 2 guided ones of 8: 4 more.
    assert (alone.ideal, alone.fixed, alone.evaluations, alone.serving) == pytest.approx((16.0, 3.5, 4.0, 0.0))
    assert alone.other == pytest.approx(0.5)
    assert alone.share_of_ideal == pytest.approx(16 / 24)
    assert (served.serving, served.other) == pytest.approx((5.0, 1.5))
    assert torch.ideal == pytest.approx(48.0)
    assert "| student, served | openvino | 1 | 4 | 16.0 | 3.5 | 4.0 | 5.0 | 1.5 | 30.0 | 0.53 |" in summary(_TWO_BACKENDS)
