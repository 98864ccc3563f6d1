"""The comparison with other servers: everything but the peers, which have environments of their own."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest

from benchmarks.peers import compare
from benchmarks.peers.compare import QUICK, run
from benchmarks.peers.processes import LITSERVE, Peer
from benchmarks.peers.table import peers_table
from benchmarks.traffic.calls import Outcome
from benchmarks.traffic.workload import Workload
from flashdiff.errors import BackendError

pytestmark = pytest.mark.slow


def test_flashdiff_alone_goes_through_every_phase(student_bundle: Path) -> None:
    measurements = run(student_bundle, [], QUICK, lambda _: None)["rows"]
    assert [(one["server"], one["phase"], one.get("load"), one["round"]) for one in measurements] == [
        *(("flashdiff", "saturated", None, round_) for round_ in (1, 2)),
        *(("flashdiff", "open loop", 0.5, round_) for round_ in (1, 2)),
    ]
    assert all(sum(one["statuses"].values()) == one["sent"] for one in measurements)
    assert "| saturated | flashdiff | " in peers_table(measurements)
    assert "| 50% | flashdiff | " in peers_table(measurements)


def test_every_round_begins_with_another_server_and_the_table_has_median_and_range(
    student_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def pretended(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(address="")

    amounts: list[float] = []

    async def loop(_: object, amount: float, *_rest: float) -> Outcome:
        amounts.append(amount)
        sent = 30 + len(amounts)
        return Outcome(1.0, sent, [float(len(amounts))] * sent, [], Counter(OK=sent))

    class Client:
        generate = AsyncMock()

        async def __aenter__(self) -> "Client":
            return self

        async def __aexit__(self, *_: object) -> None: ...

    monkeypatch.setattr(compare, "start_server", pretended)
    monkeypatch.setattr(compare, "start_peer", pretended)
    monkeypatch.setattr(compare, "connect_flashdiff", lambda _: Client())
    monkeypatch.setattr(compare, "package_versions", lambda *_: {})
    for name in ("saturate", "open_loop"):
        monkeypatch.setattr(compare, name, loop)
    peers = [(Peer(name, "", lambda _: Client(), ()), Path()) for name in ("A", "B")]  # type: ignore[arg-type,return-value]
    workload = Workload(rounds=3, saturated_s=10.0, loads=(0.5,), open_loop_s=12.0)
    measurements = run(student_bundle, peers, workload, lambda _: None)["rows"]
    order = ["flashdiff", "A", "B", "A", "B", "flashdiff", "B", "flashdiff", "A"]
    assert [one["server"] for one in measurements] == 2 * order
    assert amounts[9:] == [0.5 * 36] * 9  # of 31, 36 and 38 images a second
    assert "| saturated | flashdiff | 6.0 (1.0 to 8.0) | 6.0 (1.0 to 8.0) |" in peers_table(measurements)
    assert "| 100.0 (100.0 to 100.0) | 36.0 (31.0 to 38.0) |" in peers_table(measurements)


def test_environment_without_the_peer_is_refused_before_anything_runs(student_bundle: Path) -> None:
    peer = Peer("Missing", "no_such_app", LITSERVE.connect, ("no-such-distribution",))
    with pytest.raises(BackendError, match="is not a Python with no-such-distribution; `make bench-peers` and"):
        run(student_bundle, [(peer, Path(sys.executable))], QUICK, lambda _: None)
