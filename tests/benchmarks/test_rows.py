"""Where results go."""

import argparse
from pathlib import Path

import pytest

from benchmarks.rows import result_file


def test_a_place_for_results_is_tried_first(tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "rows.json"
    assert result_file(str(wanted)) == wanted
    assert list(wanted.parent.iterdir()) == []
    (tmp_path / "file").touch()
    for bad, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "rows.json", "Not a directory|File exists")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"cannot write {bad}: ({why})"):
            result_file(str(bad))
