"""What planning needs of a bundle on this machine: its costs, and how long writing an image file takes."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flashdiff.components import Components, Costs, Size
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.runtime.snapshot import Snapshot
from flashdiff.generate import generate
from flashdiff.server.images import encode_image
from flashdiff.server.names import ImageFormat
from flashdiff.server.planning.devices import SimulatedComponents
from flashdiff.tasks import check_order, check_size
from flashdiff.tasks.samples import needed_inputs

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


def measure(bundle: Path, devices: Sequence[Device], size: Size | None, image_format: ImageFormat) -> Measured:
    """Open a bundle on these devices and measure all of them at the same time, as they serve; the size None is the model's.

    RequestError for a size that the bundle was not built for.
    """
    snapshot = Snapshot(bundle)
    size = check_size(snapshot.manifest.model, size)
    engines = [device.run(partial(_open, snapshot, device, ready=len(devices) > 1)) for device in devices]
    with ThreadPoolExecutor(len(devices)) as threads:
        costs = list(threads.map(lambda engine: engine.device.run(engine.measure_costs), engines))
    first = engines[0]
    files_s = devices[0].run(lambda: _files_s(first, size, image_format))
    snapshot.remove()
    components = SimulatedComponents(first.spec, first.max_batch, parallel_decode=first.parallel_decode)
    return Measured(components=components, costs=costs, size=size, files_s=files_s)


def _open(snapshot: Snapshot, device: Device, *, ready: bool) -> Engine:
    engine = Engine(snapshot.folder, snapshot.manifest, device=device)
    if ready:
        engine.measure_costs()  # opens every bucket, so that no device is measured while another opens some
    return engine


def _files_s(engine: Engine, size: Size, image_format: ImageFormat) -> float:
    order = check_order(engine.spec, prompt="a photo", steps=1, size=size, inputs=needed_inputs(engine.spec, size))
    (image,) = generate(engine, [order])[0]
    spent = []
    for _ in range(_FILES):
        started = time.perf_counter()
        encode_image(image, image_format)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)
