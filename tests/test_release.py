"""What `make release` refuses: a version, a changelog and a checkout that disagree."""

import importlib.util
import re
from pathlib import Path

import pytest

import flashdiff

_FILE = Path(__file__).parent.parent / "deploy" / "release.py"
_SPEC = importlib.util.spec_from_file_location("release", _FILE)
assert _SPEC
assert _SPEC.loader
release = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(release)

GOOD = "# Changelog\n\n## [Unreleased]\n\n## [0.3.0] - 2026-12-01\n- A change.\n\n## [0.2.0] - 2026-11-29\n- Another.\n"


def test_a_checkout_whose_version_and_changelog_agree_is_a_release() -> None:
    assert list(release.problems("0.3.0", GOOD, ["v0.2.0"], [])) == []


@pytest.mark.parametrize(
    ("version", "changelog", "tags", "changed", "said"),
    [
        ("0.4.0", GOOD, [], [], "__version__ is 0.4.0, but the newest in CHANGELOG.md is 0.3.0"),
        ("0.3.0", "# Changelog\n", [], [], "the newest in CHANGELOG.md is missing"),
        ("0.3.0", GOOD.replace("2026-12-01", "soon"), [], [], "the date of 0.3.0 is 'soon'"),
        (
            "0.3.0",
            GOOD.replace("[Unreleased]\n", "[Unreleased]\n- New.\n"),
            [],
            [],
            "under Unreleased belong under 0.3.0",
        ),
        ("0.3.0", GOOD, ["v0.3.0"], [], "v0.3.0 is tagged already"),
        ("0.3.0", GOOD, [], ["README.md"], "differs from its commit: README.md"),
    ],
)
def test_what_disagrees_is_named(version: str, changelog: str, tags: list[str], changed: list[str], said: str) -> None:
    (problem,) = release.problems(version, changelog, tags, changed)
    assert said in problem


def test_the_citation_names_this_version_and_the_changelogs_date() -> None:
    root = _FILE.parent.parent
    named = dict(
        re.findall(r'^(version|date-released): "?([^"\n]+)"?$', (root / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    )
    heading = re.search(r"^## \[(\d[^]]*)\] - (\S+)$", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading
    assert named == {"version": flashdiff.__version__, "date-released": heading[2]}
