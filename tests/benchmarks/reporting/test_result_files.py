"""Result files that the report refuses."""

import json
from pathlib import Path

import pytest
from measured import ENVIRONMENT, estimate, write_result

from benchmarks.reporting.result_files import read_results
from flashdiff.errors import ConfigError


def test_results_of_different_machines_or_bundles_are_refused(files: list[Path], tmp_path: Path) -> None:
    for name, value in (("cpu", "another"), ("libraries", {"openvino": "2"}), ("bundles", {"student": {"hash": "other"}})):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads(files[1].read_text()), "environment": {**ENVIRONMENT, name: value}}))
        with pytest.raises(ConfigError, match=f"its {name} differs from that of"):
            read_results([files[0], other])
    later = tmp_path / "later.json"  # it shares no bundle with the first, but one with the second
    later.write_text(
        json.dumps({"environment": {**ENVIRONMENT, "bundles": {"more": {"hash": "m"}}}, "rows": [{"phase": "chaos"}]})
    )
    other.write_text(
        json.dumps({"environment": {**ENVIRONMENT, "bundles": {"more": {"hash": "n"}}}, "rows": [{"phase": "chaos"}]})
    )
    with pytest.raises(ConfigError, match=r"other\.json: its bundles differs"):
        read_results([files[0], later, other])


def test_incomplete_measurements_are_refused(tmp_path: Path) -> None:
    old = write_result(tmp_path, "old.json", rows=[{"phase": "saturated", "goodput_per_s": 90}])
    with pytest.raises(ConfigError, match=r"old\.json: measurements of an older load\.py"):
        read_results([old])
    real = {"name": "real", "kid": estimate(1), "text": None}
    bare = write_result(tmp_path, "quality.json", points=[{"model": "student", "kid": estimate(1), "text": None}], real=real)
    with pytest.raises(ConfigError, match=r"quality\.json: points without KID or text score"):
        read_results([bare])


def test_two_files_of_one_benchmark_are_refused(files: list[Path]) -> None:
    with pytest.raises(ConfigError, match="already has the report's load section"):
        read_results([files[1], files[1]])


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for text in ("{}", "[]", "no JSON", '{"environment": {}, "rows": [1]}'):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json: not a result"):
            read_results([bad])
