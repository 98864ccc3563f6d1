"""The phases that only flashdiff's own client can measure: the engine alone, a quiet server, overload, and chaos."""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

from benchmarks.measurements import Measurement
from benchmarks.stats import rounded_percentile
from benchmarks.traffic.calls import connect_flashdiff, open_loop
from benchmarks.traffic.cores import on_cores
from benchmarks.traffic.server_process import Counts, ServerProcess
from benchmarks.traffic.workload import STEPS, random_prompt
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.generate import generate
from flashdiff.server.client import AsyncClient, ServerError
from flashdiff.tasks import check_order


def measure_offline(bundle: Path, seconds: float, cores: set[int]) -> Measurement:
    """The engine alone with full batches of the same mix of steps: the upper bound of any server's rate."""
    with on_cores(cores):
        engine, rng, made = open_bundle(bundle), random.Random(0), 0
        batch = engine.max_batch // engine.spec.sampler.evaluations_per_step
        generate(engine, [check_order(engine.spec, prompt="warm", steps=1, count=batch)])
        started = time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            steps = STEPS[made // batch % len(STEPS)]
            orders = [check_order(engine.spec, prompt=random_prompt(rng), seed=index, steps=steps) for index in range(batch)]
            generate(engine, orders)
            made += batch
    return {"phase": "offline", "images_per_s": round(made / spent, 2), "batch": batch}


async def measure_quiet(client: AsyncClient, count: int, idle_cores: str = "asleep") -> Measurement:
    """One request after another: the latency for the client, and the part of it that is not the engine's.

    Empty calls, after pauses as long as a request, show how much of that part is gRPC in Python.
    """
    rng, beyond, seen, empty = random.Random(0), [], [], []
    for _ in range(count):
        started = time.perf_counter()
        result = await client.generate(random_prompt(rng), steps=4)
        seen.append(1000 * (time.perf_counter() - started))
        beyond.append(seen[-1] - sum(result.timings[stage] for stage in ("text", "denoise", "decode")))
    for pause_ms in seen[: count // 4]:
        await asyncio.sleep(pause_ms / 1000)
        started = time.perf_counter()
        await client.models()
        empty.append(1000 * (time.perf_counter() - started))
    return {
        "phase": "quiet",
        "idle_cores": idle_cores,
        "p50_ms": rounded_percentile(seen, 50),
        "p50_beyond_engine_ms": rounded_percentile(beyond, 50),
        "p99_beyond_engine_ms": rounded_percentile(beyond, 99),
        "p50_empty_call_ms": rounded_percentile(empty, 50),
        "sent": count,
    }


async def measure_overload(client: AsyncClient, server: ServerProcess, per_second: float, seconds: float) -> Measurement:
    """An open loop of `per_second` requests a second, three times the capacity, with the server's memory at three moments.

    The moments are before, after a sixth of the time, and at the end: queue and buffers are full long before a sixth of the time.
    Every request has a new prompt, so the cache of text embeddings fills up; its size is recorded separately.
    """
    memory, texts = list[float](), list[float]()

    def record_memory() -> None:
        memory.append(round(server.memory_mb(), 1))
        texts.append(round(server.counts().texts_mb, 1))

    await asyncio.to_thread(record_memory)
    answers = asyncio.create_task(open_loop(client, per_second, seconds))
    await asyncio.sleep(seconds / 6)
    await asyncio.to_thread(record_memory)
    outcome = await answers
    await asyncio.to_thread(record_memory)
    return outcome.measurement(phase="overload", batching="step", load=3.0, memory_mb=memory, texts_mb=texts)


async def measure_chaos(client: AsyncClient, server: ServerProcess, count: int, per_second: float) -> Measurement:
    """`count` requests, `per_second` a second, of which many leave or have a deadline; their outcomes.

    At random moments a third are cancelled and a tenth lose their connection; a third have deadlines. By the server's own count,
    every accepted request must be answered, and none may keep its place in the queue.
    """
    rng, ends, before = random.Random(2), Counter[str](), await _settled_counts(server)

    async def call(seed: float) -> None:
        own = random.Random(seed)
        timeout_s = own.choice((None, None, own.uniform(0.001, 0.5)))
        fate = own.choices(("stays", "cancels", "disconnects"), (57, 33, 10))[0]
        through = connect_flashdiff(server.address) if fate == "disconnects" else client
        request = asyncio.create_task(through.generate(random_prompt(own), steps=own.choice(STEPS), timeout_s=timeout_s))
        if fate != "stays":
            await asyncio.sleep(own.uniform(0.0, 0.2))
            await through.close() if fate == "disconnects" else request.cancel()
        try:
            await request
            ends["OK"] += 1
        except ServerError as error:
            ends[error.code.name] += 1
        except asyncio.CancelledError:
            ends[f"{fate} here"] += 1

    calls = []
    for _ in range(count):
        await asyncio.sleep(rng.expovariate(per_second))
        calls.append(asyncio.create_task(call(rng.random())))
    await asyncio.gather(*calls)
    after = await _settled_counts(server)
    pending = (await client.estimate("x")).pending_images
    accepted, answered = after.accepted - before.accepted, after.answered - before.answered
    counts = {"sent": count, "accepted": accepted, "answered": answered, "slots_left": pending}
    return {"phase": "chaos", **counts, "ends": dict(ends)}


async def _settled_counts(server: ServerProcess) -> Counts:
    """The server's counts once every accepted request is answered, or after 10 s."""
    deadline = time.monotonic() + 10
    while (counts := server.counts()).answered < counts.accepted and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return counts
