"""The page, from made-up and from committed results."""

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.reporting.page import write_page
from benchmarks.reporting.result_files import read_results
from flashdiff.errors import ConfigError


def test_page_holds_a_picture_per_section_and_needs_no_other_file(files: list[Path], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8)).save(sheet)
    results = read_results(files)
    write_page(results, [sheet], tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count('class="claim"') == 3
    assert html.count("<img ") == 6
    assert 'src="data:image/png;base64,' in html
    assert "http" not in html
    assert "<td>student, served</td>" in html
    for name in ("stages", "load", "quality", "peers", "scaling"):
        with Image.open(tmp_path / "report" / f"{name}.png") as plot:
            assert plot.width > 500


def test_page_starts_with_the_summary_table(files: list[Path], tmp_path: Path) -> None:
    write_page(read_results(files[:1]), [], tmp_path / "report", "| model | ms |\n|---|---|\n| student | 20.0 |")
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.index("<td>20.0</td>") < html.index('class="claim"')


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.name
)
def test_committed_results_are_drawn_or_refused_by_name(file: Path, tmp_path: Path) -> None:
    if any(kind in file.name for kind in ("latency", "load", "peers", "scaling")):
        write_page(read_results([file]), [], tmp_path / "report")
        assert len(list((tmp_path / "report").glob("*.png"))) == 1
    else:
        with pytest.raises(ConfigError, match=re.escape(file.name)):
            read_results([file])
