"""The rate of the server's worker or fleet with a queue that is never empty, without a network."""

import copy
import time
from concurrent.futures import FIRST_COMPLETED, wait

from benchmarks.measurements import Measurement
from benchmarks.traffic.workload import BATCHES_IN_FLIGHT, STEPS
from flashdiff.components import Costs
from flashdiff.engines.runtime.engine import Engine
from flashdiff.server.jobs import Job
from flashdiff.server.models import Model
from flashdiff.server.names import ModelIdentity
from flashdiff.server.submitter import Submitter
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order


def measure_worker_rate(engine: Engine, costs: Costs, seconds: float, *, parallel_decode: bool) -> Measurement:
    """Images per second, with finished rows decoded in parallel with the steps of others, or in turn with them."""
    engine = copy.copy(engine)
    engine.parallel_decode = parallel_decode
    identity = ModelIdentity(engine.spec.name, "", engine.spec.family, "torch", engine.manifest.precision)
    in_flight = BATCHES_IN_FLIGHT * engine.max_batch
    model, worker = Model(identity, engine, costs), Worker(max_pending_images=in_flight)
    made, spent = measure_rate(worker, model, in_flight, seconds)
    worker.drain()
    worker.join(60)
    rate = {"images": made, "seconds": round(spent, 2), "images_per_s": round(made / spent, 2)}
    return {"decoding": "parallel" if parallel_decode else "in turn", "batch": engine.max_batch, **rate}


def measure_rate(submitter: Submitter, model: Model, in_flight: int, seconds: float) -> tuple[int, float]:
    """The images made with so many requests always in flight, and the seconds that it took."""
    made, sent, running = -in_flight, 0, set[Job]()  # the first requests find idle devices and are not counted
    started = time.perf_counter()
    while made <= 0 or time.perf_counter() - started < seconds:
        while len(running) < in_flight:
            order = check_order(model.components.spec, prompt=f"robot {sent}", seed=sent, steps=STEPS[sent % len(STEPS)])
            running.add(submitter.submit(model, order))
            sent += 1
        wait([job.answer for job in running], return_when=FIRST_COMPLETED)
        for job in [job for job in running if job.answer.done()]:
            job.answer.result()
            submitter.release(job)
            running.remove(job)
            made += 1
            if made == 0:
                started = time.perf_counter()
    spent = time.perf_counter() - started
    for job in running:
        job.answer.result()
        submitter.release(job)
    return made, spent
