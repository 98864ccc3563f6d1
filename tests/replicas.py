"""Server processes with the fake model, each with its log in a file, and threads that keep them busy."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ports import reserved_ports
from served import Process, until

from flashdiff.server.client import Client, ServerError

SETUP = """
from flashdiff.components import Size
fake = FakeComponents(delay_s=0.01)
fake.spec = fake.spec.model_copy(update={{"sizes": (Size(64, 64), Size(1024, 1024))}})
listen = Listen(port={port}, metrics_port={metrics}, drain_delay_s=3.0{more})
"""


class Replica:
    """A server process; `more` are further options of its `Listen`, `setup` is further code."""

    def __init__(self, log: Path, port: int, metrics: int, more: str = "", setup: str = "", is_up: str = "serving fake") -> None:
        self.port, self.metrics, self._log = port, metrics, log
        self._setup, self._is_up = SETUP.format(port=port, metrics=metrics, more=more) + setup, is_up

    def start(self, stack: ExitStack) -> None:
        self.began = len(self.log)
        file = stack.enter_context(self._log.open("a"))
        self.process = stack.enter_context(Process(self._setup, stderr=file))
        until(lambda: self._is_up in self.log[self.began :])

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def calls(self) -> int:
        """Answered, since the last start."""
        return self.log[self.began :].count("Generate id=")


@contextmanager
def running_replicas(
    folder: Path, more: str = "", setup: str = "", is_up: str = "serving fake"
) -> Iterator[tuple[list[Replica], ExitStack]]:
    with reserved_ports(4) as ports, ExitStack() as stack:
        replicas = [
            Replica(folder / f"log{number}", *ports[2 * number : 2 * number + 2], more, setup, is_up) for number in range(2)
        ]
        for replica in replicas:
            replica.start(stack)
        yield replicas, stack


class Load:
    """Threads that send one request after another."""

    def __init__(self, address: str, threads: int = 4, **options: object) -> None:
        self.hashes, self.lost = Counter[str](), list[str]()
        self._is_over, self._address, self._options = threading.Event(), address, options
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        with Client(self._address, **self._options) as client:  # type: ignore[arg-type]
            while not self._is_over.is_set():
                try:
                    self.hashes[client.generate("x", steps=2, timeout_s=60).model.bundle_hash] += 1
                except ServerError as error:
                    self.lost.append(str(error))

    @property
    def answered(self) -> int:
        return self.hashes.total()

    def wait_for(self, more: int) -> None:
        """Until that many more requests have ended."""
        target = self.answered + len(self.lost) + more
        until(lambda: self.answered + len(self.lost) >= target)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(600)
