"""A server in a process of its own, for the benchmarks; and the batching that most servers have, to compare with."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.peers.pipeline import filled
from flashdiff.errors import FlashdiffError
from flashdiff.server.scheduler import Ready, choose
from flashdiff.server.worker import Job, Worker

Batching = Literal["step", "request", "in turn"]
"""Step-level as the server does it, request-level as most do; and step-level with decoding in turn where it would be beside."""

_SPIN = """
import os, sys
parent, core = map(int, sys.argv[1:])
os.sched_setaffinity(0, {core})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    pass
"""


def split_cores() -> tuple[set[int], set[int]]:
    """(the engine's, everybody else's): halves of the cores this process may use, so that client and engine do not compete.

    On a GPU the device is nobody else's either. With one core both are that one.
    """
    cores = sorted(os.sched_getaffinity(0))
    middle = max(1, len(cores) // 2)
    return set(cores[:middle]), set(cores[middle:] or cores)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This thread, and those it starts, on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def awake(cores: set[int]) -> Iterator[None]:
    """These cores never idle meanwhile: on each a process spins that gives way to any other at once."""
    spinners: list[subprocess.Popen[bytes]] = []
    try:
        for core in cores:
            spinners.append(subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid()), str(core)]))
        yield
        if any(spinner.poll() is not None for spinner in spinners):
            raise FlashdiffError("the cores were not kept awake: a process that spins on one of them has ended")
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def _all_that_fit(ready: Iterable[Ready]) -> list[Ready]:
    """`choose` on a device where a full batch costs no more than one."""
    return choose(item._replace(costs=dict.fromkeys(item.costs, 1.0)) for item in ready)


class RequestLevelWorker(Worker):
    """What most servers do, for comparison: a batch is closed when it starts, all of one number of steps; who comes waits.

    It takes as many rows as fill a batch size, so that none pays for padding.
    """

    _choose = staticmethod(_all_that_fit)

    def __init__(self, **options: Any) -> None:
        self._group: list[Job] = []
        super().__init__(**options)

    def _candidates(self) -> list[Job]:
        waiting = sorted(super()._candidates(), key=lambda job: (job.due, job.arrival))
        self._group = [job for job in self._group if job in waiting]
        if not self._group and waiting:
            kinds = [(job.model, job.order.size, job.order.steps) for job in waiting]
            alike = [job for job, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]]
            first, (model, size, _) = waiting[0], kinds[0]
            slots = model.components.spec.sampler.evaluations_per_step
            sizes = [batch // slots for batch in sorted(model.costs["denoiser", size]) if batch >= slots]
            room = max(first.order.count, filled(sum(job.order.count for job in alike), sizes))
            for job in alike:
                if room >= job.order.count:
                    self._group.append(job)
                    room -= job.order.count
        return self._group or waiting[:1]


class Counts(NamedTuple):
    """Of a server since it started, as its worker saw them."""

    accepted: int  # requests
    answered: int  # of these, whoever had left by then
    texts_mb: float  # kept embeddings


@dataclass(frozen=True)
class Served:
    """A server in a process of its own."""

    address: str
    process: int
    _pipe: Any

    def counts(self) -> Counts:
        """FlashdiffError where the server does not tell."""
        try:
            self._pipe.send(None)
            if not self._pipe.poll(10):
                raise FlashdiffError("the server does not tell its counts within 10 s")
            return Counts(*self._pipe.recv())
        except (EOFError, BrokenPipeError):
            raise FlashdiffError("the server has ended") from None


@contextmanager
def server(bundle: Path, batching: Batching = "step", engine_cores: set[int] | None = None) -> Iterator[Served]:
    """A server of the bundle that is ready, its engine on `engine_cores` (None: on any)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(bundle, batching, engine_cores, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the pipe ends with the process
    try:
        if not ours.poll(120) or process.pid is None:
            raise FlashdiffError("the server did not start within two minutes")
        try:
            port = ours.recv()
        except EOFError:
            raise FlashdiffError(f"the server of {bundle} ended before it was ready; what it said is above") from None
        yield Served(f"127.0.0.1:{port}", process.pid, ours)
    finally:
        process.terminate()
        process.join(30)


def _serve(bundle: Path, batching: Batching, engine_cores: set[int] | None, pipe: Any) -> None:
    from flashdiff.cli import open_model
    from flashdiff.server.app import Listen, freeze_loaded, start
    from flashdiff.server.models import Models

    cores = engine_cores or os.sched_getaffinity(0)
    base = RequestLevelWorker if batching == "request" else Worker
    accepted = answered = 0
    counting = threading.Lock()  # answers come from two threads

    class PinnedWorker(base):  # type: ignore[valid-type,misc]
        def _run(self) -> None:
            with on_cores(cores):
                super()._run()

        def submit(self, *arguments: Any, **options: Any) -> Job:
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
            model = open_model(bundle)
            model.components.parallel_decode &= batching != "in turn"
        freeze_loaded()
        running = await start(Models({"student": model}), Listen(port=0), worker=PinnedWorker)
        pipe.send(running.port)
        while True:
            await asyncio.to_thread(pipe.recv)
            pipe.send((accepted, answered, model.embeddings.bytes / 1e6))

    asyncio.run(run())


def memory_mb(process: int) -> float:
    """Resident memory of a process, as Linux tells it."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
