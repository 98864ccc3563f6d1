"""The comparison with other servers: everything but the peers, which have environments of their own."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers.compare import LITSERVE, QUICK, Peer, markdown, run, started
from flashdiff.errors import BackendError


def test_flashdiff_alone_goes_through_every_phase(student_bundle: Path) -> None:
    rows = run(student_bundle, [], QUICK, lambda _: None)["rows"]
    assert [(row["server"], row["phase"], row.get("load")) for row in rows] == [
        ("flashdiff", "saturated", None),
        ("flashdiff", "open loop", 0.5),
    ]
    assert all(sum(row["statuses"].values()) == row["sent"] for row in rows)
    assert "| saturated | flashdiff | " in markdown(rows)
    assert "| 50% | flashdiff | " in markdown(rows)


def test_a_peer_that_does_not_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    broken = Peer("Broken", "no_such_app", LITSERVE.connect, ())
    with (
        pytest.raises(BackendError, match=r"Broken does not answer; what it said last:\n.*no_such_app"),
        started(broken, Path(sys.executable), tmp_path, {0}),
    ):
        pass


def test_an_environment_without_the_peer_is_refused_before_anything_runs(student_bundle: Path) -> None:
    peer = Peer("Missing", "no_such_app", LITSERVE.connect, ("no-such-distribution",))
    with pytest.raises(BackendError, match="is not a Python with no-such-distribution; `make bench-peers` makes one"):
        run(student_bundle, [(peer, Path(sys.executable))], QUICK, lambda _: None)
