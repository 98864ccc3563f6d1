"""Request-level batching, as most servers do it, for comparison with the server's own step-level batching."""

from collections.abc import Iterable
from typing import Any

from benchmarks.traffic.batch_sizes import largest_filled
from flashdiff.server.scheduler import Ready, choose
from flashdiff.server.worker import Job, Worker


def _choose_all_that_fit(ready: Iterable[Ready]) -> list[Ready]:
    """`choose` for a device on which a full batch costs no more than a single row."""
    return choose(item._replace(costs=dict.fromkeys(item.costs, 1.0)) for item in ready)


class RequestLevelWorker(Worker):
    """A worker whose batches are closed when they start: their requests have one number of steps, and later requests wait.

    A batch has as many rows as fill one of the compiled sizes, so that no padding is computed.
    """

    _choose = staticmethod(_choose_all_that_fit)

    def __init__(self, **options: Any) -> None:
        self._closed_batch: list[Job] = []
        super().__init__(**options)

    def _candidates(self) -> list[Job]:
        waiting = sorted(super()._candidates(), key=lambda job: (job.due, job.arrival))
        self._closed_batch = [job for job in self._closed_batch if job in waiting]
        if not self._closed_batch and waiting:
            kinds = [(job.model, job.order.size, job.order.steps) for job in waiting]
            alike = [job for job, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]]
            first, (model, size, _) = waiting[0], kinds[0]
            slots = model.components.spec.sampler.evaluations_per_step
            sizes = [batch // slots for batch in sorted(model.costs["denoiser", size]) if batch >= slots]
            room = max(first.order.count, largest_filled(sum(job.order.count for job in alike), sizes))
            for job in alike:
                if room >= job.order.count:
                    self._closed_batch.append(job)
                    room -= job.order.count
        return self._closed_batch or waiting[:1]
