"""A kill at any instant leaves the old or the new bundle whole, and the next run removes what it left."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from attack_bundles import other_bundle

from flashdiff.errors import TrainingError
from flashdiff.files import locked_folder, new_folder, sweep
from flashdiff.locks import sole_user

_TESTS = Path(__file__).parents[1]


def _instants(act: str, folder: Path, *more: str) -> int:
    """How many instants of an act were tried; fails when one left something that is not whole."""
    command = [sys.executable, str(_TESTS / "attack_kill_points.py"), act, str(folder), *more]
    environment = os.environ | {"PYTHONPATH": str(_TESTS.parent)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exchange", "two-renames"])
def test_a_bundle_that_is_replaced(student_bundle: Path, tmp_path: Path, way: str) -> None:
    shutil.copytree(student_bundle, tmp_path / "one")
    other_bundle(student_bundle, tmp_path / "two")
    assert _instants("bundle", tmp_path, way) > 50


def test_a_file_that_is_replaced(tmp_path: Path) -> None:
    assert _instants("file", tmp_path) >= 3


@pytest.mark.slow
def test_a_build(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    assert _instants("build", tmp_path) > 10


def test_only_what_is_abandoned_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    working, lock = locked_folder(tmp_path, ".out.", ".making")
    for name in (".out.abandoned.making", ".out.settings", ".other.abandoned.making"):
        (tmp_path / name).mkdir()
    sweep(target)
    assert {path.name for path in tmp_path.iterdir()} == {working.name, ".out.settings", ".other.abandoned.making"}
    os.close(lock)
    with new_folder(target) as folder:
        assert folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.settings", ".other.abandoned.making"}


def test_a_folder_that_another_process_sweeps_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, list[Path]()

    def swept_at_first(**options: Any) -> str:
        made.append(Path(make(**options)))
        if len(made) == 1:
            sweep(tmp_path / "out")
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", swept_at_first)
    folder, lock = locked_folder(tmp_path, ".out.", ".making")
    assert [made[0].exists(), folder] == [False, made[1]]
    os.close(lock)


def test_a_name_with_the_letters_of_patterns_is_swept_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / ".a[1]*.abandoned.making").mkdir()
    (tmp_path / ".a1b.abandoned.making").mkdir()
    sweep(tmp_path / "a[1]*")
    assert [path.name for path in tmp_path.iterdir()] == [".a1b.abandoned.making"]


def test_a_second_training_in_one_folder_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    from recipes import tiny_recipe

    from flashdiff.distill.loop import distill

    with (
        sole_user(tmp_path / "out" / "training" / "lock", RuntimeError()),
        pytest.raises(TrainingError, match="another process trains in"),
    ):
        distill(tiny_recipe(tiny_base), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "training").iterdir()] == ["lock"]
