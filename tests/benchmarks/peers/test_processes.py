"""Peers as processes."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers.processes import LITSERVE, Peer, start_peer
from flashdiff.errors import BackendError


def test_peer_that_does_not_start_is_an_error_with_the_end_of_its_output(tmp_path: Path) -> None:
    broken = Peer("Broken", "no_such_app", LITSERVE.connect, ())
    with (
        pytest.raises(BackendError, match=r"(?s)Broken .*no_such_app"),
        start_peer(broken, Path(sys.executable), tmp_path, {0}),
    ):
        pass
