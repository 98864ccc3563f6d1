"""The server in a process of its own."""

from pathlib import Path

import pytest

from benchmarks.traffic.server_process import start_server
from flashdiff.errors import FlashdiffError


def test_server_that_dies_at_start_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FlashdiffError, match="ended before it was ready"), start_server(tmp_path):
        pass
