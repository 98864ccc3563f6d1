"""Build a release into dist/, once its version, its changelog and the checkout agree: `make release`."""

import datetime
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
_RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", re.MULTILINE)


def problems(version: str, changelog: str, tags: list[str], changed: list[str]) -> Iterator[str]:
    """Why this checkout is no release, a line each.

    `changed` are tracked files that differ from the commit; `tags` are the repository's.
    """
    newest = _RELEASE.search(changelog)
    if newest is None or newest[1] != version:
        yield f"flashdiff.__version__ is {version}, but the newest in CHANGELOG.md is {newest[1] if newest else 'missing'}"
    elif not _is_date(newest[2]):
        yield f"CHANGELOG.md: the date of {version} is '{newest[2]}', not a date like 2026-11-29"
    unreleased = changelog.partition("## [Unreleased]")[2].split("\n## [", 1)[0]
    if re.search(r"^- ", unreleased, re.MULTILINE):
        yield f"CHANGELOG.md: entries under Unreleased belong under {version}"
    if f"v{version}" in tags:
        yield f"v{version} is tagged already: raise flashdiff.__version__"
    if changed:
        yield f"the checkout differs from its commit: {', '.join(changed)}"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from flashdiff import __version__

    found = list(
        problems(__version__, (ROOT / "CHANGELOG.md").read_text("utf-8"), _git("tag"), _git("diff", "--name-only", "HEAD"))
    )
    for problem in found:
        print(f"release: {problem}", file=sys.stderr)
    if found:
        return 1
    for kind in ("sdist", "wheel"):
        program = f"import setuptools.build_meta as build; build.build_{kind}('dist')"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"dist/ holds flashdiff {__version__}. After CI has passed on this commit: git tag v{__version__}, and push the tag")
    return 0


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
