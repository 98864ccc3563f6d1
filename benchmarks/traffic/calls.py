"""The clients' calls: closed and open loops of requests through any client, and what became of them."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from benchmarks.measurements import Measurement
from benchmarks.stats import rounded_percentile
from benchmarks.traffic.workload import DEADLINE_S, STEPS, random_prompt
from flashdiff.server.client import AsyncClient, ServerError

T = TypeVar("T")


class ImageClient(Protocol):
    """What the loops need of a client: `generate` raises ServerError for a request that fails."""

    async def generate(self, prompt: str, *, steps: int = ..., seed: int = ..., timeout_s: float | None = None) -> object: ...


C = TypeVar("C", bound=ImageClient)

Connect = Callable[[str], AbstractAsyncContextManager[C]]
"""Makes a client of an address, in the event loop that uses it."""


@dataclass
class Outcome:
    """What became of the requests of one phase: how many had which status, and how long they took for the client."""

    seconds: float = 0.0
    sent: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    refusals_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.seconds + other.seconds,
            self.sent + other.sent,
            self.latencies_ms + other.latencies_ms,
            self.refusals_ms + other.refusals_ms,
            self.statuses + other.statuses,
        )

    def measurement(self, **conditions: Any) -> Measurement:
        """The numbers of the phase, after the conditions that it ran under."""
        return {
            **conditions,
            "seconds": round(self.seconds, 2),
            "sent": self.sent,
            "statuses": dict(self.statuses),
            "goodput_per_s": round(self.statuses["OK"] / self.seconds, 2),
            **{f"p{percent}_ms": rounded_percentile(self.latencies_ms, percent) for percent in (50, 95, 99)},
            "refusal_p99_ms": rounded_percentile(self.refusals_ms, 99),
            "samples_ms": [round(value, 1) for value in self.latencies_ms],
        }


def share_in_time(measurement: Mapping[str, Any]) -> float:
    """The share of a phase's requests that were answered in time."""
    return float(measurement["statuses"].get("OK", 0) / max(1, measurement["sent"]))


def connect_flashdiff(address: str) -> AsyncClient:
    """flashdiff's own client, which does not retry: every refusal counts."""
    return AsyncClient(address, retries=False)


def use_client(connect: Connect[C], address: str, use: Callable[[C], Awaitable[T]]) -> T:
    """The result of `use` with a new client, after one request to warm up server and connection."""

    async def run() -> T:
        async with connect(address) as client:
            await client.generate("warm", timeout_s=60)
            return await use(client)

    return asyncio.run(run())


async def saturate(client: ImageClient, seconds: float, in_flight: int) -> Outcome:
    """A closed loop: a constant number of requests in flight, enough for every batch to be full."""
    outcome, until = Outcome(), time.perf_counter() + seconds
    started = time.perf_counter()

    async def keep_calling(seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < until:
            await _call(client, rng, outcome, None)

    await asyncio.gather(*(keep_calling(seed) for seed in range(in_flight)))
    outcome.seconds = time.perf_counter() - started
    return outcome


async def open_loop(client: ImageClient, per_second: float, seconds: float, timeout_s: float = DEADLINE_S) -> Outcome:
    """Poisson arrivals, `per_second` requests a second on average, that do not wait for earlier answers.

    Equal arguments give equal arrivals.
    """
    rng, outcome, calls = random.Random(1), Outcome(), []
    started = time.perf_counter()
    at = 0.0
    while (at := at + rng.expovariate(per_second)) < seconds:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        calls.append(asyncio.create_task(_call(client, random.Random(rng.random()), outcome, timeout_s, started + at)))
    await asyncio.gather(*calls)
    outcome.seconds = time.perf_counter() - started
    return outcome


async def _call(
    client: ImageClient, rng: random.Random, outcome: Outcome, timeout_s: float | None, planned: float | None = None
) -> None:
    """Send one request and record what becomes of it. Its time counts from `planned`, so that a late client hides no delay."""
    started = planned or time.perf_counter()
    outcome.sent += 1
    try:
        await client.generate(random_prompt(rng), steps=rng.choice(STEPS), seed=rng.randrange(2**32), timeout_s=timeout_s)
    except ServerError as error:
        outcome.refusals_ms.append(1000 * (time.perf_counter() - started))
        outcome.statuses[error.code.name] += 1
    else:
        outcome.latencies_ms.append(1000 * (time.perf_counter() - started))
        outcome.statuses["OK"] += 1
