"""What planning needs of a bundle on this machine: what its device calls take while it serves, and how long image files take."""

import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from flashdiff.components import Components, Costs, Size
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.runtime.snapshot import Snapshot
from flashdiff.errors import DeadlineError, OverloadedError
from flashdiff.generate import generate
from flashdiff.server.fleet import Fleet
from flashdiff.server.image_threads import THREADS
from flashdiff.server.images import encode_image
from flashdiff.server.jobs import Job
from flashdiff.server.models import Model
from flashdiff.server.names import ImageFormat
from flashdiff.server.opening import identity_of
from flashdiff.server.planning.devices import SimulatedComponents
from flashdiff.server.planning.plan import Demand, arrivals_of, full_batches_s
from flashdiff.tasks import check_order, check_size
from flashdiff.tasks.samples import needed_inputs

REHEARSAL_S = 10.0
REHEARSAL_LOAD = 0.6
"""Of the rate that the devices could answer, were every batch full."""
_MAX_REQUESTS = 100_000  # of a rehearsal
_DRAIN_S = 86_400.0  # a device that is lost ends its thread
_FILES = 9


@dataclass(frozen=True, kw_only=True)
class Measured:
    components: Components
    """A stand-in that only describes the engine."""
    costs: Sequence[Costs]
    """Of each device."""
    size: Size
    files_s: float
    """Median time of writing an image's file."""


def open_together(bundle: Path, devices: Sequence[Device]) -> Model:
    """The bundle on these devices, the costs of all of them measured at the same time, as they serve."""
    snapshot = Snapshot(bundle)
    engines = [device.run(partial(_open, snapshot, device, ready=len(devices) > 1)) for device in devices]
    with ThreadPoolExecutor(len(devices)) as threads:
        costs = list(threads.map(lambda engine: engine.device.run(engine.measure_costs), engines))
    snapshot.remove()
    identity = identity_of(bundle, snapshot.manifest)
    first, *rest = [
        partial(Model, identity, engine, of, engine.device, slots=engine.slots) for engine, of in zip(engines, costs, strict=True)
    ]
    return first(others=[other() for other in rest])


def measure(
    model: Model, devices: Sequence[Device], mix: Mapping[int, float], size: Size | None, image_format: ImageFormat
) -> Measured:
    """What the model's calls take while all devices serve requests of this mix; the size None is the model's.

    A call takes longer in a server than alone: host work comes with it, and the devices' threads wait for each other and for
    those that write files. So the server's own workers answer requests for ten seconds, at a load that fills only a part of the
    batches, and the costs are those that they have learned by then. RequestError for a size that the bundle was not built for.
    """
    components = model.components
    size = check_size(components.spec, size)
    files_s = devices[0].run(lambda: _files_s(components, size, image_format))
    _rehearse(model, devices, Demand(rate=1.0, p99_s=1.0, mix=mix, size=size), image_format)
    return Measured(
        components=SimulatedComponents(components.spec, components.max_batch, parallel_decode=components.parallel_decode),
        costs=[own.costs.learned for own in map(model.on, devices) if own],
        size=size,
        files_s=files_s,
    )


def _open(snapshot: Snapshot, device: Device, *, ready: bool) -> Engine:
    engine = Engine(snapshot.folder, snapshot.manifest, device=device)
    if ready:
        engine.measure_costs()  # opens every bucket, so that no device is measured while another opens some
    return engine


def _files_s(components: Components, size: Size, image_format: ImageFormat) -> float:
    order = check_order(components.spec, prompt="a photo", steps=1, size=size, inputs=needed_inputs(components.spec, size))
    (image,) = generate(components, [order])[0]
    spent = []
    for _ in range(_FILES):
        started = time.perf_counter()
        encode_image(image, image_format)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def _rehearse(model: Model, devices: Sequence[Device], demand: Demand, image_format: ImageFormat) -> None:
    """Serve Poisson arrivals without a wire; the workers' cost tables learn from it. An error of a request is the caller's."""
    costs = [own.costs.learned for own in map(model.on, devices) if own]
    rate = REHEARSAL_LOAD * sum(1 / full_batches_s(model.components, of, demand) for of in costs)
    fleet, written = Fleet(devices), list[Future[None]]()

    def write(job: Job) -> None:
        try:
            for image in job.answer.result().images:
                encode_image(image, image_format)
        finally:
            fleet.release(job)

    def answered(job: Job, _: object) -> None:
        written.append(threads.submit(write, job))

    with ThreadPoolExecutor(THREADS) as threads:
        arrivals = arrivals_of(model.components, demand.at(rate), _MAX_REQUESTS, seed=0)
        first = next(arrivals)  # it comes at once, however slow the model is
        started = time.monotonic()
        for arrival in chain([first], arrivals):
            waited = arrival.at - first.at
            if waited > REHEARSAL_S:
                break
            time.sleep(max(0.0, started + waited - time.monotonic()))
            try:
                job = fleet.submit(model, arrival.order)
            except (OverloadedError, DeadlineError):  # the machine has become slower than it was measured
                continue
            job.answer.add_done_callback(partial(answered, job))
        fleet.drain()
        fleet.join(_DRAIN_S)
    for file in written:
        file.result()
