"""Authentication: bearer tokens from a file, and a rate for each."""

import hashlib
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from flashdiff.errors import AuthError, ConfigError, OverloadedError
from flashdiff.reading import MAX_BYTES, lines_of, read_file

_log = logging.getLogger(__name__)


@dataclass
class _Holder:
    """The holder of a token, and the calls it has left: a token bucket that fills at `rate` a second."""

    name: str
    rate: float | None
    left: float = field(init=False)
    filled: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = max(1.0, self.rate or 0.0)

    def take(self) -> None:
        if self.rate is None:
            return
        now = time.monotonic()
        self.left = min(max(1.0, self.rate), self.left + self.rate * (now - self.filled))
        self.filled = now
        if self.left < 1:
            wait = (1 - self.left) / self.rate
            raise OverloadedError(f"'{self.name}' may call {self.rate:g} times a second; try again in {wait:.2f} s", wait)
        self.left -= 1


class Tokens:
    """The tokens of a file, one `NAME TOKEN [CALLS-PER-SECOND]` a line; read again whenever the file changes.

    A file with a mistake in it changes nothing until it is changed again, and one that cannot be read changes nothing until it
    can: every call tries again. The log says why.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = self._stat()
        self._holders = _read_tokens(file)
        self._trouble = ""  # why the file was not taken, as logged

    def admit(self, authorization: str) -> str:
        """The name of the holder of `Bearer TOKEN`; AuthError without one, OverloadedError beyond its rate."""
        self._reread()
        kind, _, token = authorization.partition(" ")
        holder = self._holders.get(_digest(token.strip())) if kind.lower() == "bearer" else None
        if holder is None:
            raise AuthError("send 'authorization: Bearer TOKEN' with a token that this server knows")
        with self._lock:
            holder.take()
        return holder.name

    def reload(self) -> None:
        """Read the file now, changed or not."""
        self._stamp = None
        self._reread()

    def _reread(self) -> None:
        stamp = self._stat()
        if stamp is not None and stamp == self._stamp:
            return
        try:
            fresh = _read_tokens(self._file)
        except UnreadableFileError as error:  # the file may have changed by now: read it as soon as possible
            self._stamp = None
            self._keep(error)
            return
        except ConfigError as error:
            self._stamp = stamp
            self._keep(error)
            return
        self._stamp, self._trouble = stamp, ""
        # A holder whose token and rate are unchanged keeps its used-up calls.
        self._holders = {
            key: kept if (kept := self._holders.get(key)) and _same(kept, new) else new for key, new in fresh.items()
        }
        _log.info("%d tokens read from %s", len(fresh), self._file)

    def _keep(self, error: ConfigError) -> None:
        """Log why the tokens stay: once, and not with every call."""
        if str(error) != self._trouble:
            _log.error("the tokens stay as they were: %s", error)
        self._trouble = str(error)

    def _stat(self) -> tuple[int, ...] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size


def _same(kept: _Holder, new: _Holder) -> bool:
    return (kept.name, kept.rate) == (new.name, new.rate)


def _digest(token: str) -> bytes:
    """The form in which tokens are compared, so that the duration of a comparison reveals nothing about them."""
    return hashlib.sha256(token.encode()).digest()


def _read_tokens(file: Path) -> dict[bytes, _Holder]:
    holders: dict[bytes, _Holder] = {}
    for number, line in enumerate(lines_of(_read(file).decode("utf-8-sig", "replace")), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        try:
            name, token, rate = parts[0], parts[1], float(parts[2]) if len(parts) > 2 else None
        except (IndexError, ValueError):
            name, token, rate = "", "", None
        if not name or len(parts) > 3 or (rate is not None and not rate > 0):
            raise ConfigError(f"--tokens {file}, line {number}: write NAME TOKEN [CALLS-PER-SECOND]")  # never the line itself
        if len(token) < 16:
            raise ConfigError(f"--tokens {file}, line {number}: the token of '{name}' is shorter than 16 characters")
        holders[_digest(token)] = _Holder(name, rate)
    if not holders:
        raise ConfigError(f"--tokens {file}: there is no token in it")
    return holders


class UnreadableFileError(ConfigError):
    """A file that could not be read, which says nothing about its content."""


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MAX_BYTES)
    except OSError as error:
        raise UnreadableFileError(f"--tokens {path}: cannot read: {error.strerror or error}") from None
