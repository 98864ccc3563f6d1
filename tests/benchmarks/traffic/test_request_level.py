"""Request-level batching."""

from served import MODEL

from benchmarks.traffic.request_level import RequestLevelWorker
from flashdiff.engines.runtime.fake_backend import FakeComponents
from flashdiff.generate import check_order
from flashdiff.server.models import Model


def test_batch_has_as_many_requests_as_fill_it() -> None:
    fake = FakeComponents(delay_s=0.01)
    model = Model(MODEL, fake, {key: {1: 10.0, 2: 10.0, 4: 10.0} for key in fake.costs})
    worker = RequestLevelWorker()
    fake.calls.clear()
    with worker._changed:  # nothing starts before all three are there
        jobs = [worker.submit(model, check_order(fake.spec, prompt=f"x {seed}", steps=2, seed=seed)) for seed in range(3)]
    for job in jobs:
        job.answer.result(10)
    worker.drain()
    assert worker.join(10)
    assert [rows for part, rows in fake.calls if part == "denoiser"] == [2, 2, 1, 1]
