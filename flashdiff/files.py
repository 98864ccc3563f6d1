"""Files that are whole or absent, whenever the process is killed; and the hashes that name their content."""

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from functools import cache
from pathlib import Path
from typing import BinaryIO

from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.locks import take_lock
from flashdiff.reading import open_file

_MAKING, _OLD = ".making", ".replaced"
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2


# --- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(target: Path, error: type[FlashdiffError] = ConfigError, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    Refuses (as `error`) a disk that cannot take it, and a target that exists, unless it is to be replaced: then the two are
    exchanged in one step. What killed processes left of earlier tries at `target` is removed first.
    """
    if os.path.lexists(target) and not replace:
        raise error(f"{target} exists already; choose another place or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        unfinished, lock = locked_folder(target.parent, f".{target.name}.", _MAKING)
    except OSError as problem:
        raise error(f"{target}: cannot write there: {problem.strerror}") from None
    try:
        yield unfinished
        for path in (unfinished, *unfinished.rglob("*")):  # mkdtemp and safetensors keep others out
            path.chmod(0o755 if path.is_dir() else 0o644)
            _flush(path)
        if not _publish(unfinished, target, replace=replace):
            raise error(f"{target} exists already; choose another place or remove it")
    except OSError as problem:
        raise error(f"{target}: cannot write: {problem.strerror or problem}") from None
    finally:
        _remove(unfinished)  # the unfinished folder, or after the exchange the one that was replaced
        os.close(lock)


def locked_folder(parent: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    """A new folder of a random name, and a descriptor: `sweep_folders` leaves the folder alone while it is open."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover, and removed it
            continue
        try:
            is_ours = take_lock(descriptor) and folder.exists()  # else the same, a moment later
        except OSError:  # no locks on this file system: nothing is swept there either
            is_ours = True
        if is_ours:
            return folder, descriptor
        os.close(descriptor)


def sweep(target: Path) -> None:
    """Remove what killed processes left next to `target`; where one was killed between two renames, put the old folder back."""
    for old in target.parent.glob(f".{_escaped(target.name)}.*{_OLD}"):
        with _abandoned(old.with_name(old.name.removesuffix(_OLD) + _MAKING)) as is_abandoned:
            if is_abandoned and not os.path.lexists(target):
                old.rename(target)
            elif is_abandoned:
                _remove(old)
    sweep_folders(target.parent, f".{target.name}.", _MAKING)


def sweep_folders(parent: Path, prefix: str, suffix: str) -> None:
    """Remove the folders that `locked_folder` made for processes that are gone."""
    for folder in parent.glob(f"{_escaped(prefix)}*{suffix}"):
        with _abandoned(folder) as is_abandoned:
            if is_abandoned:
                _remove(folder)


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether no other process has the folder locked, nor can lock it within the block; False where that cannot be known."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as problem:
        yield isinstance(problem, FileNotFoundError)
        return
    try:
        is_abandoned = take_lock(descriptor)
    except OSError:
        is_abandoned = False
    try:
        yield is_abandoned
    finally:
        os.close(descriptor)


def _publish(unfinished: Path, target: Path, *, replace: bool) -> bool:
    """Rename `unfinished` to `target` in one step; a folder that was there takes its place. False when it must not be replaced.

    Where the system cannot exchange two names it takes two renames, and `sweep` mends what a kill between them leaves.
    """
    if not os.path.lexists(target):
        with suppress(FileExistsError):
            if not _rename(unfinished, target, _RENAME_NOREPLACE):
                unfinished.rename(target)
            _flush(target.parent)
            return True
    if not replace:
        return False
    if not _rename(unfinished, target, _RENAME_EXCHANGE):
        old = unfinished.with_name(unfinished.name.removesuffix(_MAKING) + _OLD)
        target.rename(old)
        try:
            unfinished.rename(target)
        except OSError:
            old.rename(target)
            raise
        _remove(old)
    _flush(target.parent)
    return True


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2 with a flag; False where the system or the file system does not have it."""
    call = _renameat2()
    if call is None or call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return call is not None
    number = ctypes.get_errno()
    if number in (22, 38, 95):  # EINVAL, ENOSYS, EOPNOTSUPP
        return False
    raise OSError(number, os.strerror(number), str(target))


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old libc
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call: Callable[..., int] = function
    return call


def _remove(path: Path) -> None:
    """A folder with all in it, a link or a file; what is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder's names, as far as the file system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _escaped(name: str) -> str:
    """A name that a glob pattern takes as it stands."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


# --- files -----------------------------------------------------------------------------------------------------------


def check_target(path: Path) -> Path:
    """The path, of a file to be written at the end of long work: checks, and makes its folder; OSError where it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "it is a folder")
    return path


def write_whole(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Replace `path` by `content`, or by what a function writes, in one step, so that a reader or a crash never sees half of it.

    What a kill leaves is one file `.NAME.part`, which the next write of the same file takes over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    with _alone(unfinished) as file:
        try:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """The file, empty and open for writing, once no other process is writing it."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            with suppress(OSError):
                take_lock(file.fileno(), wait=True)
            try:
                is_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_there = False
            if is_there:  # else the process that wrote it has renamed it meanwhile: begin another
                file.truncate(0)
                yield file
                return


def sweep_parts(folder: Path) -> None:
    """Remove what killed processes left of files in `folder`; for folders of a process that is alone there."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`flashdiff` in the user's cache directory: what is there can be made again, and may be removed at any time."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashdiff"
    except RuntimeError:  # a user without a name, in a container
        raise ConfigError("this user has no home directory: set XDG_CACHE_HOME to a folder that may be written") from None


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def shown_bytes(size: float) -> str:
    """A number of bytes for people: `310 MB`, `1.3 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# --- hashes ----------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """SHA-256 of the content, as hex; OSError for what is no regular file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a regular file; the SHA-256 of what was copied, as hex."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(source) as reading, open(target, "xb") as writing:
        while chunk := reading.read(1 << 20):
            digest.update(chunk)
            writing.write(chunk)
    return digest.hexdigest()


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """One SHA-256 over the relative names and contents of `paths`: it names the content, wherever `folder` lies."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()
