"""Request-level batching."""

from served import MODEL, Gate

from benchmarks.traffic.request_level import RequestLevelWorker
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server.models import Model
from flashdiff.tasks import check_order


def test_batch_has_as_many_requests_as_fill_it() -> None:
    fake = FakeComponents()
    model = Model(MODEL, fake, {key: {1: 10.0, 2: 10.0, 4: 10.0} for key in fake.costs})
    worker = RequestLevelWorker()
    fake.calls.clear()
    gate = Gate(fake)
    worker.submit(model, check_order(fake.spec, prompt="of another size", size=fake.spec.sizes[1], steps=1))
    assert gate.entered.wait(600)
    jobs = [worker.submit(model, check_order(fake.spec, prompt=f"x {seed}", steps=2, seed=seed)) for seed in range(3)]
    gate.open()  # all three are there
    for job in jobs:
        job.answer.result(600)
    worker.drain()
    assert worker.join(600)
    assert [rows for part, rows in fake.calls if part == "denoiser"] == [1, 2, 2, 1, 1]
