"""Simulated devices: the server's own model record and worker, whose calls take their measured time and compute nothing."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components, Costs, ModelSpec, Tensors
from flashdiff.engines.runtime.device import Device
from flashdiff.orders import Order
from flashdiff.parts import Phase
from flashdiff.server.admission import work_of
from flashdiff.server.costs import CostTable, bucket_of
from flashdiff.server.jobs import Call, Called, Message, Output, Target
from flashdiff.server.loop import Noise
from flashdiff.server.models import Embeddings, Model
from flashdiff.server.names import ModelIdentity
from flashdiff.server.planning.processor import Processor
from flashdiff.server.planning.timeline import Timeline
from flashdiff.server.scheduler import Work
from flashdiff.server.worker import Worker

_NOTHING = np.zeros((1, 1, 1), dtype=np.float32)  # in the place of every tensor
_NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)
_IDENTITY = ModelIdentity(name="simulated", bundle_hash="0" * 64, family="simulated", backend="simulated", precision="fp32")


class SimulatedComponents:
    """Implements `Components` for a loop that plans calls and never makes them."""

    def __init__(self, spec: ModelSpec, max_batch: int, *, parallel_decode: bool = False) -> None:
        self.spec, self.max_batch, self.parallel_decode = spec, max_batch, parallel_decode

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        raise AssertionError("a simulated model reads no prompts")

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        raise AssertionError("a simulated model is not called")


class SimulatedModel(Model):
    """A model as a simulated device has it: its calls take the milliseconds of `costs.first`, always."""

    def __init__(self, components: Components, costs: Costs, device: Device, others: Sequence[Model] = ()) -> None:
        self.identity, self.components, self.device = _IDENTITY, components, device
        self._others = {other.device: other for other in others}
        self.costs = CostTable(components.spec, costs)
        self.embeddings = Embeddings()
        text = components.spec.text_part.name
        self.unconditional = self.outputs(text) if components.spec.sampler.evaluations_per_step == 2 else None

    def work(self, order: Order) -> Work:
        """All that an order takes."""
        return work_of(self, order, order.task.preparations(self.components.spec, order))

    def outputs(self, part: str) -> Tensors:
        """The place of what a part gives for one row."""
        return dict.fromkeys(self.components.spec.part(part).outputs, _NOTHING)


def simulated_model(components: Components, costs: Sequence[Costs], devices: Sequence[Device]) -> SimulatedModel:
    """The model as it is open on each of these devices, with the costs of each."""
    others = [SimulatedModel(components, of, device) for of, device in zip(costs[1:], devices[1:], strict=True)]
    return SimulatedModel(components, costs[0], devices[0], others)


class SimulatedWorker(Worker):
    """A worker without threads: events on its clock, a `Timeline`, stand for what its threads would do."""

    def _start(self) -> None:
        assert isinstance(self.clock, Timeline)
        self._timeline = self.clock
        self.processor = Processor(self._timeline)
        self._is_awake = False

    def _draw(self, spec: ModelSpec, order: Order) -> Future[Noise]:
        drawn: Future[Noise] = Future()
        drawn.set_result([[_NOTHING]] * order.rows)
        return drawn

    def _post(self, message: Message) -> None:
        super()._post(message)
        if not self._is_awake:
            self._is_awake = True
            self._timeline.schedule(self._timeline.now, self._turn)

    def _turn(self) -> None:
        """`Worker._serve` from one call's end to the next call's beginning, or to where it waits for a message."""
        loop, inbox = self._loop, self._inbox
        self._is_awake = True
        while True:
            while not inbox.empty():
                loop.handle(inbox.get())
            call = loop.next_call()
            if call is None or not call.is_parallel:
                break
            loop.call_in_parallel(call)
            self._outlook = loop.outlook()
        if call is None:
            self._outlook = loop.outlook()
            self._is_awake = False
        else:
            self._begin(call, self._came_back)

    def _start_call(self, call: Callable[[], Message]) -> None:
        (parallel,) = self._loop.in_flight
        self._begin(parallel, self._post)

    def _begin(self, call: Call, on_end: Callable[[Called], None]) -> None:
        job = call.targets[0].running.job
        by_batch = job.model.costs.first[job.order.size][call.targets[0].call]
        ms = by_batch[bucket_of(by_batch, call.slots)]
        self.processor.start(ms / 1000, partial(self._end, call, self._timeline.now, on_end))

    def _end(self, call: Call, started: float, on_end: Callable[[Called], None]) -> None:
        call.is_back = True
        outputs = [_output(target) for target in call.targets]
        on_end(Called(call, outputs, None, 1000 * (self._timeline.now - started)))

    def _came_back(self, called: Called) -> None:
        self._loop.came_back(called)
        self._outlook = self._loop.outlook()
        self._turn()


def _output(target: Target) -> Output:
    """What a call gives for a target; a row takes its step."""
    model = target.running.job.model
    if target.phase == Phase.PREPARE:
        assert isinstance(model, SimulatedModel)
        return model.outputs(target.call)
    if target.phase == Phase.FINISH:
        return _NO_IMAGE
    target.running.rows[target.row].step += 1
    return None
