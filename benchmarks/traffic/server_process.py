"""A flashdiff server in a process of its own, on chosen cores, with the batching to be measured."""

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.traffic.cores import on_cores
from benchmarks.traffic.request_level import RequestLevelWorker
from benchmarks.traffic.sleeping import let_sleep
from flashdiff.components import Costs
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.errors import FlashdiffError
from flashdiff.server.jobs import Job
from flashdiff.server.worker import Worker

Batching = Literal["step", "request", "in turn"]
"""Step-level is the server's own, request-level that of most servers. `in turn` is step-level without parallel decoding."""


class Counts(NamedTuple):
    """What a server's worker has counted since it started."""

    accepted: int
    """Requests."""
    answered: int
    """Accepted requests that got their answer, whether or not the client was still there."""
    texts_mb: float
    """The cache of text embeddings."""
    costs: Sequence[Costs]
    """What device calls take now, by device."""


@dataclass(frozen=True)
class ServerProcess:
    """A running server, and the pipe to its process."""

    address: str
    http_address: str
    """Empty without HTTP."""
    process_id: int
    _pipe: Any

    def counts(self) -> Counts:
        """The server's counts; FlashdiffError if it does not answer."""
        try:
            self._pipe.send(None)
            if not self._pipe.poll(10):
                raise FlashdiffError("the server did not report its counts within 10 s")
            return Counts(*self._pipe.recv())
        except (EOFError, BrokenPipeError):
            raise FlashdiffError("the server has ended") from None

    def memory_mb(self) -> float:
        """Resident memory of the process."""
        return int(Path(f"/proc/{self.process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def start_server(
    bundle: Path,
    batching: Batching = "step",
    engine_cores: set[int] | None = None,
    *,
    with_http: bool = False,
    devices: Sequence[Device] = (DEFAULT_DEVICE,),
    sleep_for: Sequence[Costs] = (),
) -> Iterator[ServerProcess]:
    """A server of the bundle that is ready, its engine on `engine_cores` (None: on any) or one on each of the devices.

    With `sleep_for`, costs by device, its device calls sleep for so long and compute nothing.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(bundle, batching, engine_cores, with_http, devices, sleep_for, theirs), daemon=True
    )
    process.start()
    theirs.close()  # so that the pipe ends with the process
    try:
        if not ours.poll(120) or process.pid is None:
            raise FlashdiffError("the server did not start within two minutes")
        try:
            port, http_port = ours.recv()
        except EOFError:
            raise FlashdiffError(f"the server of {bundle} ended before it was ready; its output is above") from None
        yield ServerProcess(f"127.0.0.1:{port}", f"127.0.0.1:{http_port}" if with_http else "", process.pid, ours)
    finally:
        process.terminate()
        process.join(30)


def _serve(
    bundle: Path,
    batching: Batching,
    engine_cores: set[int] | None,
    with_http: bool,
    devices: Sequence[Device],
    sleep_for: Sequence[Costs],
    pipe: Any,
) -> None:
    """The process: serve until it is terminated, and answer every message on the pipe with the counts."""
    from flashdiff.server.app import Listen, freeze_loaded, start
    from flashdiff.server.models import Models
    from flashdiff.server.opening import open_model

    cores = engine_cores or os.sched_getaffinity(0)
    base = RequestLevelWorker if batching == "request" else Worker
    accepted = answered = 0
    counting = threading.Lock()  # answers come from two threads

    class PinnedWorker(base):  # type: ignore[valid-type,misc]
        def _run(self) -> None:
            with on_cores(cores):
                super()._run()

        def submit(self, *arguments: Any, **options: Any) -> Job:  # not called where there are several devices
            nonlocal accepted
            job: Job = super().submit(*arguments, **options)
            accepted += 1
            job.answer.add_done_callback(count_answer)
            return job

    def count_answer(_: object) -> None:
        nonlocal answered
        with counting:
            answered += 1

    async def run() -> None:
        with on_cores(cores):  # where the engine's own threads start
            model = open_model(bundle, devices)
            model.components.parallel_decode &= batching != "in turn"
        if sleep_for:
            let_sleep(model, sleep_for, devices)
        freeze_loaded()
        listen = Listen(port=0, http_port=0 if with_http else None)
        running = await start(Models({"student": model}, devices=devices), listen, worker=PinnedWorker)
        pipe.send((running.port, running.http_port))
        while True:
            await asyncio.to_thread(pipe.recv)
            costs = [own.costs.learned for own in map(model.on, devices) if own]
            pipe.send((accepted, answered, model.embeddings.bytes / 1e6, costs))

    asyncio.run(run())
