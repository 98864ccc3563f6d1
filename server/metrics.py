"""What Prometheus reads: the queue, the batches, the time each part takes, and what was refused."""

import os
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

import flashdiff
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.server.jobs import Timings
from flashdiff.server.metrics_page import MetricsPage
from flashdiff.server.models import Models

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SLOTS = (1, 2, 4, 8, 16, 32)
_RATIO = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4)


class Metrics:
    """Counts for one server, with a label `device` where devices have names."""

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.page = MetricsPage(self.registry)
        self._devices = tuple(devices)
        registry, on = self.registry, ["device"] if devices else []
        part, model = [*on, "model", "part"], [*on, "model"]
        self._part = Histogram("flashdiff_part_seconds", "Device calls", part, buckets=_SECONDS, registry=registry)
        self._slots = Histogram(
            "flashdiff_batch_slots", "Slots filled, two by a guided row", part, buckets=_SLOTS, registry=registry
        )
        self._error = Histogram(
            "flashdiff_cost_ratio",
            "Time of a device call over what admission expected",
            part,
            buckets=_RATIO,
            registry=registry,
        )
        self._total = Histogram(
            "flashdiff_request_seconds", "From acceptance to pixels", model, buckets=_SECONDS, registry=registry
        )
        self._queue = Histogram("flashdiff_queue_seconds", "Of that, waiting", model, buckets=_SECONDS, registry=registry)
        self._answered = Counter(
            "flashdiff_requests", "Accepted requests by how they ended", [*model, "outcome"], registry=registry
        )
        self._refused = Counter("flashdiff_refusals", "Requests refused at once, by cause", ["cause"], registry=registry)
        self._calls = Counter("flashdiff_calls", "All calls by status", ["method", "code"], registry=registry)
        self._pending = Gauge("flashdiff_pending_images", "Accepted and not yet finished", on, registry=registry)
        self._up = Gauge("flashdiff_device_up", "1 while a device serves, 0 when it was taken out", ["device"], registry=registry)
        self._moved = Counter(
            "flashdiff_moved_requests", "Accepted requests that another device took over from this", ["device"], registry=registry
        )
        self._busy = Counter("flashdiff_busy_seconds", "Time of device calls: its rate is the utilization", on, registry=registry)
        build = Gauge("flashdiff_build_info", "1, by version", ["version", "python"], registry=registry)
        build.labels(flashdiff.__version__, platform.python_version()).set(1)
        ProcessCollector(registry=registry)
        self._seen = deque[Callable[[], None]]()  # by several threads, and not yet counted

    def watch_queue(self, pending_images: Callable[[], int], device: str = "") -> None:
        """Show a device's queue; the whole server's where devices have no names."""
        (self._pending.labels(device) if self._devices else self._pending).set_function(pending_images)

    def watch_device(self, device: str, is_up: Callable[[], bool]) -> None:
        """Show whether a device serves."""
        self._up.labels(device).set_function(is_up)
        self._moved.labels(device)

    def of_device(self, device: str = "") -> "DeviceMetrics":
        """What a device's worker tells."""
        return DeviceMetrics(self, (device,) if self._devices else ())

    def watch_models(self, models: Models) -> None:
        """Show which bundle each name leads to."""
        self.registry.register(_ModelInfo(models))

    async def listen(self, host: str, port: int) -> int:
        """Serve /metrics on the event loop; the port it listens on."""
        try:
            return await self.page.listen(host, port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
            raise ConfigError(f"--metrics-port {port}: cannot listen: {reason}") from None

    def count(self) -> None:
        """Count what was seen since the last time.

        Observer methods only append to lists. They run between two device calls, where on a CPU, with caches full of an engine's
        weights, counting takes ten times as long, or just before an answer.
        """
        for _ in range(len(self._seen)):
            self._seen.popleft()()

    def see(self, count: Callable[..., None], *values: object) -> None:
        """Have `count` called with the values by the next `count()`."""
        self._seen.append(partial(count, *values))

    def ended(self, method: str, code: str) -> None:
        self.see(self._count_end, method, code)

    def refused(self, error: FlashdiffError) -> None:
        self.see(self._count_refusal, _cause(error))

    def moved(self, device: str) -> None:
        self.see(self._count_move, device)

    def count_call(self, on: Sequence[str], model: str, part: str, slots: int, spent_ms: float, expected_ms: float) -> None:
        self._part.labels(*on, model, part).observe(spent_ms / 1000)
        (self._busy.labels(*on) if on else self._busy).inc(spent_ms / 1000)
        self._slots.labels(*on, model, part).observe(slots)
        if expected_ms:
            self._error.labels(*on, model, part).observe(spent_ms / expected_ms)

    def count_answer(self, on: Sequence[str], model: str, total_ms: float, queue_ms: float, outcome: str) -> None:
        self._answered.labels(*on, model, outcome).inc()
        if outcome == "ok":
            self._total.labels(*on, model).observe(total_ms / 1000)
            self._queue.labels(*on, model).observe(queue_ms / 1000)

    def _count_end(self, method: str, code: str) -> None:
        self._calls.labels(method, code).inc()

    def _count_refusal(self, cause: str) -> None:
        self._refused.labels(cause).inc()

    def _count_move(self, device: str) -> None:
        self._moved.labels(device).inc()


class DeviceMetrics:
    """A worker's observer: its counts have the label of its device, if that has a name."""

    def __init__(self, metrics: Metrics, labels: tuple[str, ...]) -> None:
        self._metrics, self._labels = metrics, labels

    def called(self, model: str, part: str, slots: int, spent_ms: float, expected_ms: float) -> None:
        metrics = self._metrics
        metrics.see(metrics.count_call, self._labels, model, part, slots, spent_ms, expected_ms)

    def answered(self, model: str, timings: Timings, error: FlashdiffError | None) -> None:
        # Its name and not the error itself, which would keep what it is about.
        outcome, metrics = _cause(error) if error else "ok", self._metrics
        metrics.see(metrics.count_answer, self._labels, model, timings.total, timings.queue, outcome)

    def refused(self, error: FlashdiffError) -> None:
        self._metrics.refused(error)


class _ModelInfo(Collector):
    """The models as they are when they are asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["name", "model", "bundle_hash", "backend", "precision"]
        info = GaugeMetricFamily("flashdiff_model_info", "1, by what is served", labels=labels)
        for name, model in self._models.served.items():
            identity = model.identity
            info.add_metric([name, identity.name, identity.bundle_hash, identity.backend, identity.precision], 1)
        yield info


def _cause(error: FlashdiffError) -> str:
    return type(error).__name__.removesuffix("Error").lower()
