"""What a run shows while it works: on a terminal a named bar for each stage, elsewhere a plain line now and then."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flashdiff.distill import processes

_LINE_EVERY_S = 30.0
_COUNTED = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"
_OPEN_ENDED = "{desc}: {n_fmt} {unit} [{elapsed}]"

_log = logging.getLogger(__name__)


class Stage:
    """One stage of a run, as a context manager: counts what is done. Only the main process shows it.

    `total` is in units of `unit`; None when it is not known. A `nested` bar disappears when its stage ends.
    """

    def __init__(self, name: str, unit: str, total: int | None = None, *, done: int = 0, nested: bool = False) -> None:
        self._name, self._unit, self._total, self._done = name, unit, total, done
        self._plain = processes.is_main() and not _is_terminal()
        self._line_at = time.monotonic() + _LINE_EVERY_S
        self._bar = tqdm(
            desc=name, unit=unit, total=total, initial=done, leave=not nested, dynamic_ncols=True, mininterval=0.5,
            bar_format=_OPEN_ENDED if total is None else _COUNTED, disable=self._plain or not processes.is_main(),
        )  # fmt: skip

    def __enter__(self) -> "Stage":
        if self._plain and self._total is not None:
            _log.info("%s: %d %s", self._name, self._total, self._unit)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` stands at the end of the line."""
        self._done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if self._plain and time.monotonic() >= self._line_at:
            of = "" if self._total is None else f" of {self._total}"
            _log.info("%s: %d%s %s%s", self._name, self._done, of, self._unit, note and f", {note}")
            self._line_at = time.monotonic() + _LINE_EVERY_S


@contextmanager
def lines_above_bars() -> Iterator[None]:
    """Within the block, log lines appear above the bars of a terminal, not in the middle of them."""
    with logging_redirect_tqdm() if _is_terminal() else nullcontext():
        yield


def shown_time(seconds: float) -> str:
    """`0:12:05`, as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def _is_terminal() -> bool:
    return sys.stderr.isatty()
