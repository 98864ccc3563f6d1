"""What the protocols see of the devices: a taker of orders. A worker is one, and so is a fleet of workers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from flashdiff.orders import Order
from flashdiff.server.jobs import Job, Step
from flashdiff.server.models import Model
from flashdiff.server.names import Priority


class DeviceState(NamedTuple):
    """A device that --device names, and whether it still serves."""

    name: str
    failure: str = ""
    """Why it was taken out; empty while it serves."""


class Submitter(Protocol):
    """Accepts orders from any thread and answers each accepted one exactly once."""

    clock: Callable[[], float]

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

        `files_s` of the timeout are kept for writing the files. A device thread calls `on_step` after every step of every row;
        it must not block. The caller releases the job when it is done with its images.
        """

    def estimate_ms(self, model: Model, order: Order, *, client: str = "", priority: Priority = "normal") -> float:
        """How long the order would take if it were submitted now; a deadline must leave a margin of the waiting in it."""

    def release(self, job: Job) -> None:
        """The client has its answer, or has left: rows in progress are dropped before the next step.

        Until then the job's pixels count as pending.
        """

    def drain(self) -> None:
        """Refuse new orders from now on and finish the accepted ones."""

    def join(self, timeout_s: float) -> bool:
        """Wait after `drain` until every accepted order is answered; False when some are not."""

    def check_alive(self) -> None:
        """Give up on a device call that does not come back. One thread calls this now and then."""

    @property
    def failure(self) -> BaseException | None:
        """Why no order can be answered any more; None while one can."""

    @property
    def pending_images(self) -> int:
        """Accepted and not yet answered."""

    @property
    def is_ready(self) -> bool:
        """Whether new orders are taken at all."""

    @property
    def has_unsent(self) -> bool:
        """Whether answers are still being sent: see `release`."""

    @property
    def devices(self) -> Sequence[DeviceState]:
        """The devices that have names."""
