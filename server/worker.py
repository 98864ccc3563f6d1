"""The worker: a thread that owns the device, and the methods that other threads may call.

docs/concurrency.md lists the writer of each state: any thread writes the admission ledger, under its lock; the device thread
writes everything else, and learns of other threads by messages.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from flashdiff.components import ModelSpec
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.errors import BackendError, DrainingError, FlashdiffError
from flashdiff.orders import Order
from flashdiff.rows import draw_noise
from flashdiff.server.admission import MAX_PENDING_IMAGES, Admission
from flashdiff.server.jobs import Job, Message, Step, Stop, Timings
from flashdiff.server.loop import HANG_S, DeviceLoop, Noise, Observer, Rescue
from flashdiff.server.models import Model
from flashdiff.server.names import Priority
from flashdiff.server.submitter import DeviceState

_log = logging.getLogger(__name__)


class Worker:
    """A `Submitter` with one device."""

    loop_class: type[DeviceLoop] = DeviceLoop  # the benchmarks compare another one with it

    def __init__(
        self,
        *,
        max_pending_images: int = MAX_PENDING_IMAGES,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        device: Device = DEFAULT_DEVICE,
        rescue: "Callable[[Worker, Job, BackendError], bool]" = lambda worker, job, error: False,
    ) -> None:
        """`rescue` gets this worker and what `loop.Rescue` does, in the device thread or the one that gives up on it."""
        self.clock = clock
        self.device = device
        self.failure: BaseException | None = None
        """The error that stopped the device thread, if one did; set once, by `give_up`."""
        self._observer = observer
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._rescue: Rescue = partial(rescue, self)
        self._loop = self.loop_class(
            clock,
            observer,
            self._draw,
            self._start_call,
            self._rescue,
        )
        self._outlook = self._loop.outlook()
        self._giving_up = threading.Lock()
        self.admission = Admission(lambda: self._outlook, self._post, clock, max_pending_images)
        self._start()

    def _start(self) -> None:
        """Start the threads."""
        # That of the noise starts here, on the cores of the thread that serves.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flashdiff-noise")
        self._drawing.submit(int)
        self._thread = threading.Thread(target=self._run, name="flashdiff-device", daemon=True)
        self._thread.start()

    def submit(
        self,
        model: Model,
        order: Order,
        timeout_s: float | None = None,
        *,
        client: str = "",
        priority: Priority = "normal",
        on_step: Callable[[Step], None] | None = None,
        files_s: float = 0.0,
    ) -> Job:
        """See `Submitter.submit`."""
        try:
            return self.admission.accept(
                model, order, timeout_s, client=client, priority=priority, on_step=on_step, files_s=files_s
            )
        except FlashdiffError as error:
            if self._observer:
                self._observer.refused(error)
            raise

    def estimate_ms(self, model: Model, order: Order, *, client: str = "", priority: Priority = "normal") -> float:
        """See `Submitter.estimate_ms`."""
        return self.admission.estimate_ms(model, order, client=client, priority=priority)

    def release(self, job: Job) -> None:
        """See `Submitter.release`."""
        self.admission.release(job)

    def drain(self) -> None:
        """Refuse new orders from now on, finish the accepted ones, and stop the thread."""
        self.admission.close(DrainingError("the server is shutting down"))
        self._post(Stop())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `drain`; False when it is still busy."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def pending_images(self) -> int:
        """Accepted and not yet answered."""
        return self.admission.pending_images

    @property
    def pending_s(self) -> float:
        """How long the device needs for them, in full batches."""
        return self.admission.pending_s

    @property
    def is_ready(self) -> bool:
        """Whether new orders are taken at all."""
        return self.admission.is_open

    @property
    def has_unsent(self) -> bool:
        """Whether answers are still being sent: see `release`."""
        return self.admission.has_unsent

    @property
    def devices(self) -> tuple[DeviceState, ...]:
        """Its device, if that has a name."""
        return (DeviceState(self.device.name, str(self.failure or "")),) if self.device.name else ()

    def check_alive(self) -> None:
        """Give up on a device call that does not come back: its jobs are answered, and new ones refused."""
        now = self.clock()
        if not self.failure and any(not call.is_back and now > call.hung_at for call in self._loop.in_flight):
            self.give_up(BackendError(f"a device call has not come back for more than {HANG_S:.0f} s"))

    def give_up(self, error: BaseException) -> None:
        """Answer every job with the error and take no more; any thread may call this."""
        with self._giving_up:
            self.failure = self.failure or error
        reason = BackendError(f"the device thread has stopped: {error}")
        for job in self.admission.close(reason):
            if job.claim() and not self._rescue(job, reason):
                if self._observer:
                    self._observer.answered(job.model.identity.name, Timings(), reason)
                job.answer.set_exception(reason)
        self._post(Stop())

    def _post(self, message: Message) -> None:
        """Send the device thread a message."""
        self._inbox.put(message)

    def _draw(self, spec: ModelSpec, order: Order) -> Future[Noise]:
        """Start drawing an order's noise."""
        return self._drawing.submit(draw_noise, spec, order)

    # --- the device thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # no other thread could answer the jobs
            _log.exception("the device thread%s stopped", f" of {self.device.name}" if self.device.name else "")
            self.give_up(error)
        finally:
            self._drawing.shutdown(wait=False)

    def _serve(self) -> None:
        self.device.pin()
        loop, inbox = self._loop, self._inbox
        is_busy = False
        while not loop.is_over and not self.failure:
            if not is_busy:
                loop.handle(inbox.get())
            while not inbox.empty():
                loop.handle(inbox.get())
            is_busy = loop.turn()
            self._outlook = loop.outlook()

    def _start_call(self, call: Callable[[], Message]) -> None:
        """Run a call in a thread of its own, which posts the outcome to the inbox."""
        threading.Thread(target=lambda: self._post(call()), name="flashdiff-decode", daemon=True).start()
