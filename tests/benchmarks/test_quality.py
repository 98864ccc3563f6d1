"""Points of quality against latency, and evaluations that give none."""

from pathlib import Path

import pytest
from measured import estimate, timed, write_result

from benchmarks import quality
from benchmarks.quality import quality_points
from flashdiff.errors import ConfigError


def test_point_has_quality_and_time_of_one_number_of_steps() -> None:
    subject = {
        "fid": estimate(1),
        "kid": estimate(2),
        "text": estimate(3),
        "diversity": estimate(4),
        "attributes": {"large": estimate(5), "small": estimate(6)},
    }
    evaluation = {"rows": [{"name": name, **subject} for name in ("real", "mine, 4 steps", "mine, 1 step", "teacher, 50 steps")]}
    measurements = [*timed("student", 4, 4, 20.0), *timed("student", 1, 1, 6.0), *timed("teacher", 50, 100, 400.0)]
    found = quality_points(evaluation, measurements, {"student": "mine", "teacher": "teacher"})
    assert [(p["model"], p["steps"], p["median_ms"]) for p in found] == [
        ("student", 4, 20.0),
        ("student", 1, 6.0),
        ("teacher", 50, 400.0),
    ]
    assert found[0]["large"]["value"] == 5


def _quality(student: Path, teacher: Path, evaluation: Path | None) -> None:
    options = {"steps": [1], "teacher_steps": [2], "count": 2, "repeats": 1, "report": print}
    quality.run(student, teacher, evaluation_file=evaluation, **options)


def test_bundles_of_one_name_or_an_evaluation_without_text_scores_make_no_points(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both called 'bundle'"):
        _quality(tmp_path / "a" / "bundle", tmp_path / "b" / "bundle", None)
    subject = {"name": "real", "attributes": {"large": estimate(1)}, "kid": estimate(1), "text": None}
    evaluation = write_result(tmp_path, "evaluation.json", rows=[subject])
    with pytest.raises(ConfigError, match=r"evaluation\.json: not what .* text score included"):
        _quality(tmp_path / "a", tmp_path / "b", evaluation)
