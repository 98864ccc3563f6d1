"""The worker: a thread that owns the device, and the methods that other threads may call.

docs/concurrency.md lists the writer of each state: callers write the admission ledger, under its lock; the device thread writes
everything else, and learns of other threads by messages.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from flashdiff.errors import BackendError, DrainingError, FlashdiffError
from flashdiff.orders import Order
from flashdiff.rows import draw_noise
from flashdiff.server.admission import MAX_PENDING_IMAGES, Admission
from flashdiff.server.jobs import Job, Message, Step, Stop, Timings
from flashdiff.server.loop import HANG_S, DeviceLoop, Observer
from flashdiff.server.models import Model
from flashdiff.server.names import Priority

_log = logging.getLogger(__name__)


class Worker:
    """Accepts orders from any thread and answers each accepted one exactly once."""

    loop_class: type[DeviceLoop] = DeviceLoop  # the benchmarks compare another one with it

    def __init__(
        self,
        *,
        max_pending_images: int = MAX_PENDING_IMAGES,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.failure: BaseException | None = None
        """Why the device thread has stopped before it was asked to; set once, by `_give_up`."""
        self._observer = observer
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Its thread starts here, on the cores of the thread that serves.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flashdiff-noise")
        self._drawing.submit(int)
        self._loop = self.loop_class(
            clock, observer, lambda spec, order: self._drawing.submit(draw_noise, spec, order), self._start_call
        )
        self._outlook = self._loop.outlook()
        self._giving_up = threading.Lock()
        self.admission = Admission(lambda: self._outlook, self._inbox.put, clock, max_pending_images)
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
        """Accept an order, to be answered within `timeout_s` seconds; raises a RefusedError at once when that cannot be.

        `files_s` of the timeout are kept for writing the files. `on_step` is called in the device thread after every step of
        every row; it must not block. The caller releases the job when it is done with its images.
        """
        try:
            return self.admission.accept(
                model, order, timeout_s, client=client, priority=priority, on_step=on_step, files_s=files_s
            )
        except FlashdiffError as error:
            if self._observer:
                self._observer.refused(error)
            raise

    def estimate_ms(self, model: Model, order: Order, *, client: str = "", priority: Priority = "normal") -> float:
        """How long the order would take if it were submitted now; a deadline must leave a margin of the waiting in it."""
        return self.admission.estimate_ms(model, order, client=client, priority=priority)

    def release(self, job: Job) -> None:
        """The client has its answer, or has left: rows in progress are dropped before the next step.

        Until then the job's pixels count as pending.
        """
        self.admission.release(job)

    def drain(self) -> None:
        """Refuse new orders from now on, finish the accepted ones, and stop the thread."""
        self.admission.close(DrainingError("the server is shutting down"))
        self._inbox.put(Stop())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `drain`; False when it is still busy."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def pending_images(self) -> int:
        """Accepted and not yet answered."""
        return self.admission.pending_images

    @property
    def is_ready(self) -> bool:
        """Whether new orders are taken at all."""
        return self.admission.is_open

    @property
    def has_unsent(self) -> bool:
        """Whether answers are still being sent: see `release`."""
        return self.admission.has_unsent

    def check_alive(self) -> None:
        """Give up on a device call that does not come back: its jobs are answered, and new ones refused."""
        now = self.clock()
        if not self.failure and any(not call.is_back and now > call.hung_at for call in self._loop.in_flight):
            self._give_up(BackendError(f"a device call has not come back for more than {HANG_S:.0f} s"))

    def _give_up(self, error: BaseException) -> None:
        """Answer every job with the error, in the device thread or, where that hangs, in the one that watches it."""
        with self._giving_up:
            self.failure = self.failure or error
        reason = BackendError(f"the device thread has stopped: {error}")
        for job in self.admission.close(reason):
            if job.claim():
                if self._observer:
                    self._observer.answered(job.model.identity.name, Timings(), reason)
                job.answer.set_exception(reason)
        self._inbox.put(Stop())

    # --- the device thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # no other thread could answer the jobs
            _log.exception("the device thread stopped")
            self._give_up(error)
        finally:
            self._drawing.shutdown(wait=False)

    def _serve(self) -> None:
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
        threading.Thread(target=lambda: self._inbox.put(call()), name="flashdiff-decode", daemon=True).start()
