"""The comparison with other servers: everything but the peers, which have environments of their own."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from served import MODEL, intercept

from benchmarks import load
from benchmarks.peers import compare
from benchmarks.peers.compare import LITSERVE, QUICK, Peer, markdown, run, started
from benchmarks.peers.pipeline import Pipeline, Place
from benchmarks.serving import RequestLevelWorker
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BackendError
from flashdiff.server.models import Model
from flashdiff.tasks import check_order


def test_flashdiff_alone_goes_through_every_phase(student_bundle: Path) -> None:
    rows = run(student_bundle, [], QUICK, lambda _: None)["rows"]
    assert [(row["server"], row["phase"], row.get("load"), row["round"]) for row in rows] == [
        *(("flashdiff", "saturated", None, round_) for round_ in (1, 2)),
        *(("flashdiff", "open loop", 0.5, round_) for round_ in (1, 2)),
    ]
    assert all(sum(row["statuses"].values()) == row["sent"] for row in rows)
    assert "| saturated | flashdiff | " in markdown(rows)
    assert "| 50% | flashdiff | " in markdown(rows)


def test_rounds_start_with_another_server_each_and_the_table_has_median_and_range(
    student_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def pretended(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(address="")

    asked: list[float] = []

    async def outcome(_: object, *amounts: float) -> load.Outcome:
        asked.append(amounts[0])
        sent = 30 + len(asked)
        return load.Outcome(1.0, sent, [float(len(asked))] * sent, [], Counter(OK=sent))

    class Client:
        generate = AsyncMock()

        async def __aenter__(self) -> "Client":
            return self

        async def __aexit__(self, *_: object) -> None: ...

    monkeypatch.setattr(compare, "server", pretended)
    monkeypatch.setattr(compare, "started", pretended)
    monkeypatch.setattr(compare, "AsyncClient", lambda *_, **__: Client())
    monkeypatch.setattr(compare, "_versions", lambda *_: {})
    for phase in ("saturated", "open_loop"):
        monkeypatch.setattr(load, phase, outcome)
    peers = [(Peer(name, "", lambda _: Client(), ()), Path()) for name in ("A", "B")]  # type: ignore[arg-type,return-value]
    rows = run(student_bundle, peers, compare.Plan(loads=(0.5,)), lambda _: None)["rows"]
    order = ["flashdiff", "A", "B", "A", "B", "flashdiff", "B", "flashdiff", "A"]
    assert [row["server"] for row in rows] == 2 * order
    assert asked[9:] == [0.5 * 36] * 9  # of 31, 36 and 38 images a second
    assert "| saturated | flashdiff | 6.0 (1.0 to 8.0) | 6.0 (1.0 to 8.0) |" in markdown(rows)
    assert "| 100.0 (100.0 to 100.0) | 36.0 (31.0 to 38.0) |" in markdown(rows)


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


def test_three_requests_run_as_two_and_one_in_a_peer_and_pay_for_no_padding(student_bundle: Path) -> None:
    pipeline = Pipeline(Place(student_bundle, 0, frozenset(os.sched_getaffinity(0))))
    rows: list[int] = []
    call = pipeline._engine.call

    def counted(part, inputs):
        if part == "denoiser":
            rows.append(len(inputs["latents"]))
        return call(part, inputs)

    pipeline._engine.call = counted
    requests = [(f"a dog {seed}", 2, seed) for seed in range(3)]
    together = pipeline(requests)
    assert rows == [2, 2, 1, 1]
    assert together == [png for request in requests for png in pipeline([request])]


def test_request_level_batching_takes_as_many_as_fill_a_batch() -> None:
    fake = FakeComponents(delay_s=0.01)
    model = Model(MODEL, fake, {key: {1: 10.0, 2: 10.0, 4: 10.0} for key in fake.costs})
    worker = RequestLevelWorker()
    fake.calls.clear()
    gate = threading.Event()
    intercept(fake, "text_encoder", lambda call, inputs: call(inputs) if gate.wait(10) else {})
    worker.submit(model, check_order(fake.spec, prompt="another size", size=fake.spec.sizes[1], steps=1))
    jobs = [worker.submit(model, check_order(fake.spec, prompt=f"x {seed}", steps=2, seed=seed)) for seed in range(3)]
    gate.set()  # all three are there
    for job in jobs:
        job.answer.result(10)
    worker.drain()
    assert worker.join(10)
    assert [rows for part, rows in fake.calls if part == "denoiser"] == [1, 2, 2, 1, 1]
