"""Runs an act again and again, each time in a process that is killed (SIGKILL) before its next file operation.

    python attack_kill_points.py ACT FOLDER [exchange|two-renames]

ACT is `bundle`, `file` or `build`. After each kill what stands in FOLDER must be whole; after the last, unbroken run nothing else
may be there. Prints how many instants were tried. A script, because it forks, which a process full of threads must not.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from flashdiff import files
from flashdiff.engines.bundle import read_manifest
from flashdiff.files import new_folder, sweep, write_whole

_OPERATIONS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")
_NOT_FILES = ("os.putenv", "os.unsetenv", "os.fork", "os.exec", "os.posix_spawn", "os.system")


def _count_operations(at: Callable[[int], None]) -> None:
    """Call `at` with the number of every file operation of this process, before it happens."""
    numbers = count(1)

    def hook(event: str, _: object) -> None:
        if event.startswith(_OPERATIONS) and not event.startswith(_NOT_FILES):
            at(next(numbers))

    rename = files._rename

    def audited(source: Path, target: Path, flag: int) -> bool:  # ctypes tells no name
        at(next(numbers))
        done = rename(source, target, flag)
        at(next(numbers))
        return done

    files._rename = audited
    sys.addaudithook(hook)


def _killed(act: Callable[[], None], instant: int) -> bool:
    """Whether the act was killed before it ended; any other end than these two is a failure."""
    child = os.fork()
    if child == 0:

        def kill(number: int) -> None:
            if number == instant:
                os.kill(os.getpid(), signal.SIGKILL)

        _count_operations(kill)
        try:
            act()
        except BaseException as error:
            sys.stderr.write(f"instant {instant}: {error!r}\n")
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"instant {instant}: status {status}"
    return status != 0


def _number_of_operations(act: Callable[[], None]) -> int:
    reading, writing = os.pipe()
    if os.fork() == 0:
        seen = [0]
        _count_operations(lambda number: seen.__setitem__(0, number))
        act()
        os.write(writing, str(seen[0]).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reading, 20))


def _instants(act: Callable[[], None], most: int | None) -> Iterator[int]:
    """Every instant up to an unbroken run, or `most` of them, evenly spread, when a run takes long."""
    if most is None:
        yield from count(1)
    else:
        total = _number_of_operations(act)
        yield from (1 + index * (total - 1) // (most - 1) for index in range(most))


def _try_all(act: Callable[[], None], check: Callable[[], None], most: int | None = None) -> int:
    tried = 0
    for instant in _instants(act, most):
        if not _killed(act, instant):
            break
        tried += 1
        check()
    act_in_child = os.fork()
    if act_in_child == 0:
        act()
        os._exit(0)
    assert os.waitpid(act_in_child, 0)[1] == 0
    check()
    return tried


def _bundle(folder: Path, *, exchanges: bool) -> int:
    """FOLDER/one and FOLDER/two are bundles, published in turn as FOLDER/place/out."""
    out, sources = folder / "place" / "out", [folder / "one", folder / "two"]
    known = {read_manifest(source).bundle_hash: source for source in sources}
    shutil.copytree(sources[0], out)
    if not exchanges:
        files._renameat2 = lambda: None

    def publish() -> None:
        there = known[read_manifest(out).bundle_hash] if out.exists() else sources[0]
        with new_folder(out, replace=True) as folder:
            shutil.copytree(sources[there == sources[0]], folder, dirs_exist_ok=True)

    def check() -> None:
        if not exchanges:
            sweep(out)  # as the next run does
        assert read_manifest(out).bundle_hash in known

    tried = _try_all(publish, check)
    assert [path.name for path in out.parent.iterdir()] == ["out"], list(out.parent.iterdir())
    return tried


def _file(folder: Path) -> int:
    file = folder / "file"
    file.write_text("old" * 1000)

    def check() -> None:
        assert file.read_text() in ("old" * 1000, "new" * 1000)

    tried = _try_all(lambda: write_whole(file, "new" * 1000), check)
    assert file.read_text() == "new" * 1000
    assert [path.name for path in folder.iterdir()] == ["file"]
    return tried


def _build(folder: Path) -> int:
    """FOLDER/base is a base model; its bundle FOLDER/place/out is built anew, with one batch size and with another in turn."""
    from flashdiff.engines.build import BuildOptions, build_engine

    out = folder / "place" / "out"

    def build() -> None:
        there = read_manifest(out).batch_sizes if out.exists() else (2,)
        batch_sizes = (2, 3) if there == (2,) else (2,)
        build_engine(BuildOptions(base=str(folder / "base"), out=out, batch_sizes=batch_sizes), lambda _: None)

    for _ in range(2):  # the exports are then in the cache
        assert not _killed(build, 10**9)
    tried = _try_all(build, lambda: (read_manifest(out), None)[1], most=16)
    assert [path.name for path in out.parent.iterdir()] == ["out"], list(out.parent.iterdir())
    cache = files.cache_folder()
    assert not [path for path in cache.iterdir() if path.name.startswith(".")], list(cache.iterdir())
    return tried


if __name__ == "__main__":
    act, folder = sys.argv[1], Path(sys.argv[2])
    tried = {
        "bundle": lambda: _bundle(folder, exchanges=sys.argv[3] == "exchange"),
        "file": lambda: _file(folder),
        "build": lambda: _build(folder),
    }[act]()
    print(tried)
