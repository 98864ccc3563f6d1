"""What the commands share: the check that results can be written, and errors in one line."""

import argparse
from pathlib import Path

import pytest

from benchmarks.command import result_file, run_command
from flashdiff.errors import ConfigError


def test_result_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "results.json"
    assert result_file(str(wanted)) == wanted
    assert list(wanted.parent.iterdir()) == []
    (tmp_path / "file").touch()
    for bad, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "results.json", "Not a directory|File exists")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"cannot write {bad}: ({why})"):
            result_file(str(bad))


def test_expected_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ConfigError("--repeats 0")

    def fail() -> None:
        raise ValueError

    assert run_command("x.py", lambda: None) == 0
    assert run_command("x.py", refuse) == 1
    assert capsys.readouterr().err == "x.py: error: --repeats 0\n"
    with pytest.raises(ValueError):  # noqa: PT011 - our own mistakes keep their traceback
        run_command("x.py", fail)
