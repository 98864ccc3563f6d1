"""What is built from a checkout: all that is tracked, or nothing."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "engines", "distill", "proto")
pytestmark = pytest.mark.slow


def _tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The tracked files as they are now, links as links."""
    for name in _tracked():
        source, target = ROOT / name, tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return tmp_path / "checkout"


def _build(checkout: Path, kind: str) -> subprocess.CompletedProcess[str]:
    program = f"import setuptools.build_meta as build; print(build.build_{kind}('.'))"
    return subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True)


def test_the_wheel_and_the_source_distribution_hold_every_tracked_file_of_the_package(checkout: Path) -> None:
    """Generated stubs' scripts and notes for developers apart."""
    tracked = {
        f"flashdiff/{name}" if name.split("/")[0] in FOLDERS else name
        for name in _tracked()
        if name.split("/")[0] in (*FOLDERS, "flashdiff") and not (ROOT / name).is_symlink() and not name.endswith(".sh")
    }
    for kind in ("wheel", "sdist"):
        built = _build(checkout, kind)
        assert built.returncode == 0, built.stderr
        path = checkout / built.stdout.split()[-1]
        if kind == "wheel":
            with zipfile.ZipFile(path) as wheel:
                names = set(wheel.namelist())
        else:
            with tarfile.open(path) as archive:
                names = {name.partition("/")[2] for name in archive.getnames()}
        assert tracked - names == set()


def test_a_checkout_whose_links_are_broken_is_refused(checkout: Path) -> None:
    """Git without symbolic links writes files that hold the links' targets."""
    link = checkout / "flashdiff" / "server"
    link.unlink()
    link.write_text("../server")
    built = _build(checkout, "wheel")
    assert built.returncode != 0
    assert "flashdiff/server must be a symbolic link" in built.stderr
