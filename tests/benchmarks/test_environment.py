"""The environment of a measurement names the commit and the bundles that were measured."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import environment
from benchmarks.environment import read_environment
from flashdiff.engines.bundle import read_manifest


def test_commit_of_changed_files_is_marked_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    (tmp_path / "file").write_text("a")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "x")
    clean = environment._commit()
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("b")
    assert environment._commit() == f"{clean}-dirty"


def test_environment_names_bundles_by_hash(teacher_bundle: Path) -> None:
    manifest = read_manifest(teacher_bundle)
    assert read_environment({"teacher": manifest})["bundles"]["teacher"]["hash"] == manifest.bundle_hash
