"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(titles: Sequence[str], lines: Iterable[Iterable[object]]) -> str:
    """The table with one title per column and one list of cells per line."""
    head = [_line(titles), "|---" * len(titles) + "|"]
    return "\n".join([*head, *(_line(cells) for cells in lines)])


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
