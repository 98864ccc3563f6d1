"""docs/concurrency.md says which thread writes which state; this test records which threads do."""

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orders import from_image
from served import MODEL, Clock, model_of

from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import DeadlineError, FlashdiffError, OverloadedError
from flashdiff.rows import Row
from flashdiff.server.admission import Admission
from flashdiff.server.costs import CostTable
from flashdiff.server.fleet import Fleet, Steps
from flashdiff.server.jobs import Call, Job, Running
from flashdiff.server.loop import HANG_S, DeviceLoop
from flashdiff.server.models import Embeddings, Model
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order

PAGE = Path(__file__).parents[2] / "docs" / "concurrency.md"
CLASSES: tuple[type, ...] = (Admission, DeviceLoop, Running, Row, CostTable, Call, Embeddings, Worker, Fleet, Steps)
ROLES = {"flashdiff-device": "device thread", "flashdiff-decode": "thread of the call", "flashdiff-noise": "noise"}
WRITERS = {
    "device thread": {"device thread"},
    "thread of the call": {"device thread", "thread of the call"},
    "any thread, under its lock": {"device thread+lock", "caller+lock"},
    "the watch": {"caller"},
    "device thread or the watch, once, under a lock": {"device thread+lock", "caller+lock"},
}


def _table() -> dict[str, set[str]]:
    """State -> the roles that may write it, as the page says."""
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]* \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    return {state: WRITERS[writer.strip()] for state, writer in rows}


class _Lock:
    """A lock that knows its owner."""

    def __init__(self) -> None:
        self._lock, self.owner = threading.Lock(), None

    def __enter__(self) -> None:
        self._lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self.owner = None
        self._lock.release()


class Recorder:
    """Notes the role of every thread that sets an attribute of an object after it was made, or changes a container in it."""

    def __init__(self) -> None:
        self.writes: dict[str, set[str]] = defaultdict(set)
        self._noting = threading.Lock()

    def note(self, owner: Any, attribute: str) -> None:
        locks = [value for value in vars(owner).values() if isinstance(value, _Lock)]
        role = ROLES.get(threading.current_thread().name.partition("_")[0], "caller")
        held = any(lock.owner == threading.get_ident() for lock in locks)
        name = type(owner).__name__
        with self._noting:
            self.writes[f"{name}.{attribute}" if f"{name}.{attribute}" in _table() else name].add(f"{role}{'+lock' * held}")

    def watch(self, kind: type, patch: pytest.MonkeyPatch) -> None:
        """Record writes to all objects of a class from the end of their construction on."""
        recorder, made, write = self, kind.__init__, kind.__setattr__

        def construct(self: Any, *arguments: Any, **options: Any) -> None:
            made(self, *arguments, **options)
            for name, value in list(vars(self).items()):
                if isinstance(value, type(threading.Lock())):
                    write(self, name, _Lock())
                else:
                    write(self, name, recorder._recording(self, name, value))
            write(self, "_is_made", True)

        def set_attribute(self: Any, name: str, value: Any) -> None:
            if "_is_made" in vars(self):
                recorder.note(self, name)
                value = recorder._recording(self, name, value)
            write(self, name, value)

        patch.setattr(kind, "__init__", construct)
        patch.setattr(kind, "__setattr__", set_attribute)

    def _recording(self, owner: Any, name: str, value: Any) -> Any:
        """A copy of a plain container that records its changes; other values as they are."""
        if type(value) not in (dict, list, set):
            return value
        note = self.note
        changes = {
            dict: ("__setitem__", "__delitem__", "pop", "update", "setdefault", "clear", "popitem"),
            list: ("__setitem__", "__delitem__", "append", "extend", "insert", "pop", "remove", "clear"),
            set: ("add", "discard", "remove", "pop", "update", "clear", "intersection_update", "difference_update"),
        }[type(value)]

        def noted(change: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Any, *arguments: Any) -> Any:
                note(owner, name)
                return change(self, *arguments)

            return call

        kind = type(type(value).__name__, (type(value),), {c: noted(getattr(type(value), c)) for c in changes})
        return kind(value)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    for kind in CLASSES:
        recorder.watch(kind, monkeypatch)
    return recorder


@pytest.mark.parametrize("is_parallel", [False, True])
def test_every_write_is_by_the_thread_that_the_page_names(recorder: Recorder, is_parallel: bool) -> None:
    fake, clock = FakeComponents(parallel_decode=is_parallel), Clock()
    model, worker = model_of(fake), Worker(clock=clock, max_pending_images=16)
    fakes = [FakeComponents(parallel_decode=is_parallel) for _ in range(2)]
    pair = _opened_on_two(fakes)
    recorder.writes.clear()  # opening the models is done before they are shared

    def ask(seed: int) -> None:
        order = check_order(fake.spec, prompt=f"prompt {seed % 5}", seed=seed, steps=1 + seed % 4, count=1 + seed % 3)
        if seed % 3 == 0:
            order = from_image(order, np.zeros((64, 64, 3), dtype=np.uint8), 0.5)
        try:
            job = worker.submit(model, order, (None, 5.0, -1.0)[seed % 3], client=f"client {seed % 4}")
        except (OverloadedError, DeadlineError):
            return
        if seed % 7 == 0:
            worker.release(job)
        with suppress(FlashdiffError):
            job.answer.result(600)
        worker.estimate_ms(model, order)
        worker.release(job)
        assert worker.pending_images >= 0
        assert worker.has_unsent in (True, False)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(ask, range(120)))
    gate = threading.Event()
    hang = fake.call

    def hanging(part: str, inputs: Any) -> Any:
        gate.wait(600)
        return hang(part, inputs)

    fake.call = hanging  # type: ignore[method-assign]
    stuck = worker.submit(model, check_order(fake.spec, prompt="stuck"))
    while not worker._loop.in_flight:
        pass
    clock.now += HANG_S + 1
    worker.check_alive()
    assert stuck.answer.exception(0)
    gate.set()
    assert worker.join(600)
    _lose_a_device(pair, fakes)

    table, found = _table(), recorder.writes
    assert {name.partition(".")[0] for name in table} == {kind.__name__ for kind in CLASSES}
    wrong = {state: roles - table[state] for state, roles in found.items() if not roles <= table[state]}
    assert not wrong, f"docs/concurrency.md names other writers: {wrong}"
    assert set(found) == set(table)


DEVICES = [Device(name="one"), Device(name="two")]


def _opened_on_two(fakes: list[FakeComponents]) -> Model:
    first, second = fakes
    return Model(MODEL, first, first.costs, DEVICES[0], [Model(MODEL, second, second.costs, DEVICES[1])])


def _lose_a_device(model: Model, fakes: list[FakeComponents]) -> None:
    """Load a fleet of two, one of which fails its requests and is taken out."""
    fleet = Fleet(DEVICES, max_pending_images=16)
    fakes[0].fail_on = "denoiser"

    def ask(seed: int) -> None:
        order = check_order(fakes[0].spec, prompt=f"prompt {seed % 5}", seed=seed, steps=1 + seed % 4)
        with suppress(OverloadedError):
            job = fleet.submit(model, order, client=f"client {seed % 4}", on_step=(None, lambda step: None)[seed % 2])
            with suppress(FlashdiffError):
                job.answer.result(600)
            fleet.estimate_ms(model, order)
            fleet.release(job)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(ask, range(60)))
    assert fleet.workers[0].failure
    fleet.check_alive()
    fleet.drain()
    assert fleet.join(600)
    assert fleet.pending_images == 0


def test_a_write_by_another_thread_would_be_found(recorder: Recorder) -> None:
    loop = DeviceLoop(Clock(), None, lambda spec, order: None, lambda call: None)  # type: ignore[arg-type,return-value]
    recorder.writes.clear()
    loop._left.add("a job")  # type: ignore[arg-type]
    loop._turns = 3
    assert recorder.writes == {"DeviceLoop": {"caller"}}


def test_concurrent_callers_never_get_more_room_than_there_is_and_each_job_is_answered_once() -> None:
    fake = FakeComponents(parallel_decode=True)
    model, worker = model_of(fake), Worker(max_pending_images=6)
    accepted, answered, most = list[Job](), list[Job](), 0
    noting, together = threading.Lock(), threading.Barrier(16)

    def ask(thread: int) -> None:
        nonlocal most
        together.wait(600)
        for number in range(30):
            try:
                job = worker.submit(model, check_order(fake.spec, prompt=f"p {thread}", seed=number, count=1 + number % 3))
            except OverloadedError:
                continue
            pending = worker.pending_images
            job.answer.add_done_callback(lambda _, job=job: answered.append(job))
            with noting:
                accepted.append(job)
                most = max(most, pending)
            if number % 4:
                job.answer.exception(10)
            worker.release(job)

    with ThreadPoolExecutor(16) as callers:
        list(callers.map(ask, range(16)))
    worker.drain()
    assert worker.join(600)
    assert most <= 6
    assert len(accepted) >= 16
    assert sorted(job.arrival for job in accepted) == list(range(1, len(accepted) + 1))
    assert sorted(job.arrival for job in answered) == list(range(1, len(accepted) + 1))
    assert worker.pending_images == 0
    assert not worker.has_unsent
