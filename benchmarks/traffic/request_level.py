"""Request-level batching, as most servers do it, for comparison with the server's own step-level batching."""

from collections.abc import Iterable
from typing import Any

from benchmarks.traffic.batch_sizes import largest_filled
from flashdiff.parts import Phase
from flashdiff.server.jobs import Running
from flashdiff.server.loop import DeviceLoop
from flashdiff.server.scheduler import Ready, choose
from flashdiff.server.worker import Worker


def _choose_all_that_fit(ready: Iterable[Ready]) -> list[Ready]:
    """`choose` for a device on which a full batch costs no more than a single row."""
    return choose(item._replace(costs=dict.fromkeys(item.costs, 1.0)) for item in ready)


class RequestLevelLoop(DeviceLoop):
    """A device loop whose batches are closed when they start: their requests have one number of steps, and later requests wait.

    A batch has as many rows as fill one of the compiled sizes, so that no padding is computed.
    """

    _choose = staticmethod(_choose_all_that_fit)

    def __init__(self, *arguments: Any) -> None:
        self._closed_batch: list[Running] = []
        super().__init__(*arguments)

    def _candidates(self) -> list[Running]:
        waiting = sorted(super()._candidates(), key=lambda running: (running.job.due, running.job.arrival))
        self._closed_batch = [running for running in self._closed_batch if running in waiting]
        if not self._closed_batch and waiting:
            kinds = [(running.job.model, running.job.order.size, running.job.order.steps) for running in waiting]
            alike = [running for running, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]]
            first, (model, size, _) = waiting[0].job.order, kinds[0]
            slots = model.components.spec.sampler.evaluations_per_step
            sizes = [batch // slots for batch in sorted(model.costs.current[size][Phase.STEP]) if batch >= slots]
            room = max(first.count, largest_filled(sum(running.job.order.count for running in alike), sizes))
            for running in alike:
                if room >= running.job.order.count:
                    self._closed_batch.append(running)
                    room -= running.job.order.count
        return self._closed_batch or waiting[:1]


class RequestLevelWorker(Worker):
    """A worker with that loop."""

    loop_class = RequestLevelLoop
