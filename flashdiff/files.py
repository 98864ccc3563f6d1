"""Files that are whole or absent: write beside, then rename; and the hashes that name their content."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashdiff.errors import ConfigError, FlashdiffError


@contextmanager
def new_folder(target: Path, error: type[FlashdiffError] = ConfigError, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    Refuses (as `error`) a disk that cannot take it, and a target that exists, unless it is to be replaced: then that stays
    whole until the new one is.
    """
    if target.exists() and not replace:
        raise error(f"{target} exists already; choose another place or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as problem:
        raise error(f"{target}: cannot write there: {problem.strerror}") from None
    try:
        yield beside
        for path in (beside, *beside.rglob("*")):  # mkdtemp and safetensors keep others out
            path.chmod(0o755 if path.is_dir() else 0o644)
        old = beside.with_name(f"{beside.name}.old")
        if replace and target.exists():
            target.rename(old)
        try:
            beside.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as problem:
        raise error(f"{target}: cannot write: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step, so that a reader or a crash never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def cache_folder() -> Path:
    """`flashdiff` in the user's cache directory: what is there can be made again, and may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashdiff"


def hash_file(path: Path) -> str:
    """SHA-256 of the content, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """One SHA-256 over the relative names and contents of `paths`: it names the content, wherever `folder` lies."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()
