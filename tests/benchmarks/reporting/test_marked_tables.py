"""Tables of speed inside Markdown files."""

import json
import re
from pathlib import Path

import pytest
from measured import estimate, timed, write_result

from benchmarks.reporting.marked_tables import read_sources, replace_tables, short_table
from flashdiff.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_tables_are_up_to_date_with_the_committed_measurements(name: str) -> None:
    file = ROOT / name
    text = file.read_text()
    found = re.findall(r"<!-- (?:speed|summary): .*? -->\n(.*?)<!-- /", text, re.DOTALL)
    assert found
    linked = [(file.parent / link).resolve() for link in re.findall(r"\[rows\]\((.*?)\)", "".join(found))]
    latency, *others = linked
    quality = next((path for path in others if "quality" in path.name), None)
    assert replace_tables(file, read_sources(latency, quality, [path for path in others if path != quality])) == text


def test_table_is_replaced_and_nothing_around_it(files: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- speed: x -->\nold\n<!-- /speed -->\nafter\n")
    text = replace_tables(file, read_sources(files[0], None, []))
    assert text.startswith("before\n<!-- speed: x -->\n\n| model |")
    assert "| student | 1 | 4 | 4 | 1.00 | 4.00 | 1.00 | 0.10 |  |  | 20.0 (20.0) | 20.0x | 25x |" in text
    gap = next(line for line in text.splitlines() if "0.80" in line)
    assert re.findall(r"\d+(?:\.\d+)?", gap) == ["4", "0.80", "20.0", "2.0"]  # steps, share of the ideal, ms, fixed ms
    assert f"]({files[0].name})" in text
    assert text.endswith("*\n<!-- /speed -->\nafter\n")
    assert "old" not in text
    with pytest.raises(ConfigError, match="at batch 1"):
        replace_tables(file, read_sources(files[1], None, []))
    file.write_text("nothing to fill in")
    with pytest.raises(ConfigError, match="no lines"):
        replace_tables(file, read_sources(files[0], None, []))


def test_short_table_joins_speed_and_quality(files: list[Path], tmp_path: Path) -> None:
    rows = [
        {"name": name, "images": 10, "kid": estimate(kid), "text": estimate(80.0), "attributes": {"large": estimate(0.9)}}
        for name, kid in (("real", 1.0), ("student, 4 steps", 12.0), ("teacher, 50 steps", 11.0))
    ]
    quality = tmp_path / "quality.json"
    quality.write_text(json.dumps({"rows": rows}))
    real_size = write_result(
        tmp_path,
        "h200.json",
        model="sd15, random weights",
        rows=[*timed("student", 4, 4, 50.0, backend="torch"), *timed("teacher", 50, 100, 500.0, backend="torch")],
    )
    sources = read_sources(files[0], quality, [real_size])
    assert short_table(sources).splitlines()[2:] == [
        "| student | 4 | 20.0 | 20.0x | 12.0 ± 1.0 | 80.0 ± 1.0 |",
        "| student, served | 4 | 25.0 | 16.0x | 12.0 ± 1.0 | 80.0 ± 1.0 |",
        "| teacher | 50 | 400.0 | 1.0x | 11.0 ± 1.0 | 80.0 ± 1.0 |",
    ]
    file = tmp_path / "README.md"
    file.write_text("<!-- summary: x -->\n<!-- /summary -->\n")
    line = next(line for line in replace_tables(file, sources).splitlines() if "](h200.json)" in line)
    figures = re.findall(r"\d+(?:\.\d+)?", line.partition("](h200.json)")[0])
    assert figures[-3:] == ["4", "50", "10.0"]  # steps, ms, and the ratio to the teacher's
    with pytest.raises(ConfigError, match=r"latency\.json: not a result of real_latency"):
        read_sources(files[0], None, [files[0]])
