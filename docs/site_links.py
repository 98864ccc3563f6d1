"""A hook of MkDocs: files outside docs/ that pages link to become part of the site, so that links work in both places."""

import re
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parent.parent
_OUTSIDE = "source"
"""Folder of the site that holds them, at their paths in the repository."""
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to, and those that the added pages link to in turn."""
    pages = [file.src_uri for file in files if file.is_documentation_page()]
    pages += ["source/README.md", "source/CONTRIBUTING.md", "source/flashdiff/zoo/avatars-flash/README.md"]
    seen = {file.src_uri for file in files}
    while pages:
        page = pages.pop()
        wanted = [page, *(target for _, target, _ in _targets(page))] if (_ROOT / _repository_path(page)).is_file() else [page]
        for target in wanted:
            path = _ROOT / _repository_path(target)
            if target.startswith(f"{_OUTSIDE}/") and target not in seen and path.is_file():
                seen.add(target)
                files.append(File.generated(config, target, abs_src_path=str(path)))
                if path.suffix == ".md":
                    pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links to files outside docs/ turned to their places in the site."""
    here = PurePosixPath(page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        target, anchor = _site_target(page.file.src_uri, match[2])
        return f"{match[1]}{relpath(target, here)}{anchor}{match[3]}" if target else match[0]

    return _outside_code(markdown, lambda text: _LINK.sub(turned, text))


def _targets(page: str) -> list[tuple[str, str, str]]:
    text = _CODE.sub("", (_ROOT / _repository_path(page)).read_text("utf-8"))
    return [(page, target, anchor) for link in _LINK.findall(text) for target, anchor in [_site_target(page, link[1])] if target]


def _site_target(page: str, link: str) -> tuple[str, str]:
    """Where a relative link of a page leads in the site, with its anchor; empty for an address or an anchor of the same page."""
    path, mark, anchor = link.partition("#")
    if not path or re.match(r"\w+:", path):
        return "", ""
    place = normpath(PurePosixPath(_repository_path(page)).parent / path)
    inside = place.startswith("docs/")
    return place.removeprefix("docs/") if inside else f"{_OUTSIDE}/{place}", mark + anchor


def _repository_path(page: str) -> str:
    """The path in the repository of a file of the site."""
    return page.removeprefix(f"{_OUTSIDE}/") if page.startswith(f"{_OUTSIDE}/") else f"docs/{page}"


def _outside_code(text: str, change: Any) -> str:
    """`text` with its parts outside code blocks changed."""
    parts, end = [], 0
    for block in _CODE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])
