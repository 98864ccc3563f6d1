"""The README's table of speeds."""

import re
from pathlib import Path

import pytest

from benchmarks.reporting.readme import replace_speed_table
from benchmarks.reporting.result_files import read_results
from flashdiff.errors import ConfigError


def test_readme_is_up_to_date_with_the_committed_measurements() -> None:
    root = Path(__file__).parents[3]
    readme = (root / "README.md").read_text()
    found = re.search(r"<!-- speed: .*?\(\[rows\]\((.*?)\)\).*?<!-- /speed -->", readme, re.DOTALL)
    assert found
    assert replace_speed_table(readme, read_results([root / found[1]]), found[1]) == readme


def test_table_is_replaced_and_nothing_around_it(files: list[Path]) -> None:
    results = read_results(files[:1])
    readme = replace_speed_table("before\n<!-- speed: x -->\nold\n<!-- /speed -->\nafter\n", results, "rows.json")
    assert readme.startswith("before\n<!-- speed: x -->\n\n| model |")
    assert "| student | 1 | 4 | 4 | 1.00 | 4.00 | 1.00 | 0.10 |  |  | 20.0 (20.0) | 20.0x | 25x |" in readme
    gap = next(line for line in readme.splitlines() if "0.80" in line)
    assert re.findall(r"\d+(?:\.\d+)?", gap) == ["4", "0.80", "20.0", "2.0"]  # steps, share of the ideal, ms, fixed ms
    assert readme.endswith("*\n<!-- /speed -->\nafter\n")
    assert "old" not in readme
    with pytest.raises(ConfigError, match="no lines"):
        replace_speed_table("nothing to fill in", results, "rows.json")
    with pytest.raises(ConfigError, match="at batch 1"):
        replace_speed_table(readme, read_results(files[1:2]), "rows.json")
