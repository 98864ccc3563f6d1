"""Behaviour under load: latency and goodput over offered load, step-level against request-level batching, overload, and chaos.

    python benchmarks/load.py STUDENT_BUNDLE --json load.json      # about twelve minutes; --quick for the code paths alone
    python benchmarks/load.py --server HOST:PORT --json load.json  # what can be told of a server that runs already

The server runs in a process of its own, the client here, over a real port. Arrivals are Poisson and do not wait for answers
(open loop). Every request has a prompt of its own, so the cache of text embeddings helps nobody.

The engine has half of the cores to itself, online and offline; the client and the rest of the server share the others. Otherwise
a load that the client makes would slow the engine that it measures. Offline and saturated run three times, each with a server of
its own, and on all cores too: the median of the saturated ones is the capacity that loads are shares of. Open loop runs once,
at 80 % three times; overload and chaos run once. Quiet is measured with idle cores left to sleep, as they do, and kept awake: how
long one takes to wake up is the machine's doing, and every hand-over between threads waits for it.
"""

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import environment, percentile, result_file
from benchmarks.serving import Batching, Counts, Served, awake, memory_mb, on_cores, server, split_cores
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import FlashdiffError
from flashdiff.files import write_whole
from flashdiff.generate import generate
from flashdiff.server.client import AsyncClient, ServerError
from flashdiff.tasks import check_order

_BATCHINGS: tuple[Batching, ...] = ("step", "request")
_STEPS = (2, 4)
_DEADLINE_S = 1.0
_FILLS = 4  # so many batches of requests in flight saturate a server
_AT_ONCE = 64  # of one whose batches are not known
_THINGS = ("monster", "robot", "planet", "face", "person")


@dataclass(frozen=True)
class Plan:
    """How long each part takes, in seconds, and how many requests."""

    quiet: int = 200
    rounds: int = 3
    offline_s: float = 8.0
    saturated_s: float = 12.0
    loads: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    goal_load: float = 0.8  # offered `rounds` times, the samples together: of one round the p99 is its third worst
    open_loop_s: float = 15.0
    overload_s: float = 60.0
    chaos: int = 10_000


QUICK = Plan(quiet=5, rounds=2, offline_s=0.2, saturated_s=0.5, loads=(0.5,), open_loop_s=0.5, overload_s=0.5, chaos=40)


@dataclass
class Outcome:
    """What a phase saw: milliseconds as the client measured them, by status."""

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

    def row(self, **about: Any) -> dict[str, Any]:
        return {
            **about,
            "seconds": round(self.seconds, 2),
            "sent": self.sent,
            "statuses": dict(self.statuses),
            "goodput_per_s": round(self.statuses["OK"] / self.seconds, 2),
            **{f"p{share}_ms": _rounded(self.latencies_ms, share) for share in (50, 95, 99)},
            "refusal_p99_ms": _rounded(self.refusals_ms, 99),
            "samples_ms": [round(value, 1) for value in self.latencies_ms],
        }


def _rounded(values: Sequence[float], percent: int) -> float | None:
    """The percentile; None of nothing."""
    return round(percentile(values, percent), 2) if values else None


def _prompt(rng: random.Random) -> str:
    """Short, so that it fits any model, and hardly ever the same twice."""
    return f"{rng.choice(_THINGS)} {rng.randrange(10**5)}"


async def _ask(
    client: AsyncClient, rng: random.Random, outcome: Outcome, timeout_s: float | None, planned: float | None = None
) -> None:
    """One request; its time counts from when it was planned, so that a late client hides nothing."""
    started = planned or time.perf_counter()
    outcome.sent += 1
    try:
        await client.generate(_prompt(rng), steps=rng.choice(_STEPS), seed=rng.randrange(2**32), timeout_s=timeout_s)
    except ServerError as error:
        outcome.refusals_ms.append(1000 * (time.perf_counter() - started))
        outcome.statuses[error.code.name] += 1
    else:
        outcome.latencies_ms.append(1000 * (time.perf_counter() - started))
        outcome.statuses["OK"] += 1


async def quiet(client: AsyncClient, count: int, idle_cores: str = "asleep") -> dict[str, Any]:
    """One after another: what the client sees beyond the engine's own time; and what calls that do nothing take, after pauses as
    long as a request: that much is gRPC in Python."""
    rng, beyond, seen, empty = random.Random(0), [], [], []
    for _ in range(count):
        started = time.perf_counter()
        result = await client.generate(_prompt(rng), steps=4)
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
        "p50_ms": _rounded(seen, 50),
        "p50_beyond_engine_ms": _rounded(beyond, 50),
        "p99_beyond_engine_ms": _rounded(beyond, 99),
        "p50_empty_call_ms": _rounded(empty, 50),
        "sent": count,
    }


async def saturated(client: AsyncClient, seconds: float, at_once: int) -> Outcome:
    """So many requests in flight that the next batch can always be full."""
    outcome, until = Outcome(), time.perf_counter() + seconds
    started = time.perf_counter()

    async def keep_asking(seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < until:
            await _ask(client, rng, outcome, None)

    await asyncio.gather(*(keep_asking(seed) for seed in range(at_once)))
    outcome.seconds = time.perf_counter() - started
    return outcome


async def open_loop(client: AsyncClient, per_second: float, seconds: float, timeout_s: float = _DEADLINE_S) -> Outcome:
    """Poisson arrivals that wait for nobody; the same arrivals whenever the arguments are."""
    rng, outcome, calls = random.Random(1), Outcome(), []
    started = time.perf_counter()
    at = 0.0
    while (at := at + rng.expovariate(per_second)) < seconds:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        calls.append(asyncio.create_task(_ask(client, random.Random(rng.random()), outcome, timeout_s, started + at)))
    await asyncio.gather(*calls)
    outcome.seconds = time.perf_counter() - started
    return outcome


async def overload(client: AsyncClient, served: Served, per_second: float, seconds: float) -> dict[str, Any]:
    """Three times what can be served, and the server's memory: before, after a sixth of the time, when queue and buffers have
    been full for long, and at the end. With a new prompt in each request the cache of text embeddings fills: it is told apart."""
    memory, texts = list[float](), list[float]()

    def look() -> None:
        memory.append(round(memory_mb(served.process), 1))
        texts.append(round(served.counts().texts_mb, 1))

    await asyncio.to_thread(look)
    answers = asyncio.create_task(open_loop(client, per_second, seconds))
    await asyncio.sleep(seconds / 6)
    await asyncio.to_thread(look)
    outcome = await answers
    await asyncio.to_thread(look)
    return outcome.row(phase="overload", batching="step", load=3.0, memory_mb=memory, texts_mb=texts)


async def chaos(client: AsyncClient, served: Served, count: int, per_second: float) -> dict[str, Any]:
    """Requests that at a random moment are cancelled (a third) or lose their connection (a tenth), or have a random deadline
    (a third): by the server's own count it answers each that it accepted, and none keeps its place."""
    rng, ends, before = random.Random(2), Counter[str](), await _settled(served)

    async def one(seed: float) -> None:
        own = random.Random(seed)
        timeout_s = own.choice((None, None, own.uniform(0.001, 0.5)))
        fate = own.choices(("stays", "cancels", "disconnects"), (57, 33, 10))[0]
        through = AsyncClient(served.address, retries=False) if fate == "disconnects" else client
        call = asyncio.create_task(through.generate(_prompt(own), steps=own.choice(_STEPS), timeout_s=timeout_s))
        if fate != "stays":
            await asyncio.sleep(own.uniform(0.0, 0.2))
            await through.close() if fate == "disconnects" else call.cancel()
        try:
            await call
            ends["OK"] += 1
        except ServerError as error:
            ends[error.code.name] += 1
        except asyncio.CancelledError:
            ends[f"{fate} here"] += 1

    calls = []
    for _ in range(count):
        await asyncio.sleep(rng.expovariate(per_second))
        calls.append(asyncio.create_task(one(rng.random())))
    await asyncio.gather(*calls)
    after = await _settled(served)
    pending = (await client.estimate("x")).pending_images
    accepted, answered = after.accepted - before.accepted, after.answered - before.answered
    counts = {"sent": count, "accepted": accepted, "answered": answered, "slots_left": pending}
    return {"phase": "chaos", **counts, "ends": dict(ends)}


async def _settled(served: Served) -> Counts:
    """The server's counts when every request that it accepted is answered, or after 10 s."""
    deadline = time.monotonic() + 10
    while (counts := served.counts()).answered < counts.accepted and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return counts


def offline(bundle: Path, seconds: float, cores: set[int]) -> dict[str, Any]:
    """The engine alone with full batches of the same mixture: the most images a second that any server of it could send."""
    with on_cores(cores):
        engine, rng, made = open_bundle(bundle), random.Random(0), 0
        batch = engine.max_batch // engine.spec.sampler.evaluations_per_step
        generate(engine, [check_order(engine.spec, prompt="warm", steps=1, count=batch)])
        started = time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            steps = _STEPS[made // batch % len(_STEPS)]
            orders = [check_order(engine.spec, prompt=_prompt(rng), seed=index, steps=steps) for index in range(batch)]
            generate(engine, orders)
            made += batch
    return {"phase": "offline", "images_per_s": round(made / spent, 2), "batch": batch}


async def _with_client(address: str, use: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    gc.freeze()  # or full collections here, 30 ms each, would count as the server's
    async with AsyncClient(address, retries=False) as client:
        await client.generate("warm", timeout_s=60)
        return await use(client)


class Record:
    """The rows of a run, in order; each is reported when it comes."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._report = report

    def keep(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        self._report(" ".join(f"{name}={value}" for name, value in row.items() if name != "samples_ms"))
        return row

    def phase(self, address: str, use: Callable[[AsyncClient], Awaitable[Any]], **about: Any) -> dict[str, Any]:
        """A new client's part, as a row."""
        result = asyncio.run(_with_client(address, use))
        return self.keep(result if isinstance(result, dict) else result.row(**about))


def run(bundle: Path, plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    """Every phase, with servers of its own; {"environment": ..., "rows": [...]}, a row a run."""
    engine_cores, other_cores = split_cores()
    environment_ = environment({"student": read_manifest(bundle)})
    record = Record(report)

    def fill(cores: set[int], which: str, round_: int, batching: Batching = "step") -> dict[str, Any]:
        """What the engine makes on these cores, then what a new server does with it."""
        alone = record.keep(offline(bundle, plan.offline_s, cores) | {"cores": which, "round": round_})
        with server(bundle, batching, cores) as served:
            if which == "own" and round_ == 1 and batching == "step":
                record.phase(served.address, lambda client: quiet(client, plan.quiet))
                with awake(engine_cores | other_cores):
                    record.phase(served.address, lambda client: quiet(client, plan.quiet, "awake"))
            at_once = _FILLS * int(alone["batch"])
            return record.phase(
                served.address,
                lambda client: saturated(client, plan.saturated_s, at_once),
                phase="saturated",
                batching=batching,
                cores=which,
                round=round_,
                at_once=at_once,
                of_offline=alone["images_per_s"],
            )

    full = []
    for round_ in range(1, plan.rounds + 1):
        fill(engine_cores | other_cores, "shared", round_)
        with on_cores(other_cores):
            full.append(fill(engine_cores, "own", round_)["goodput_per_s"])
            if read_manifest(bundle).machine.device == "cuda":  # what decoding beside the steps of others gains
                fill(engine_cores, "own", round_, "in turn")
    capacity = statistics.median(full)
    with on_cores(other_cores):
        # The two in turn, each first every other time: a noisy machine is noisy for both.
        turns = [load for load in plan.loads for _ in range(plan.rounds if load == plan.goal_load else 1)]
        offered: dict[tuple[float, Batching], Outcome] = defaultdict(Outcome)
        for index, load in enumerate(turns):
            for batching in _BATCHINGS[:: -1 if index % 2 else 1]:
                with server(bundle, batching, engine_cores) as served:
                    offered[load, batching] += _offer(served.address, load * capacity, plan)
        for (load, batching), outcome in offered.items():
            record.keep(_open_loop_row(outcome, load, capacity, batching))
        with server(bundle, "step", engine_cores) as served:
            record.phase(served.address, lambda client: overload(client, served, 3 * capacity, plan.overload_s))
            record.phase(served.address, lambda client: chaos(client, served, plan.chaos, 2 * capacity))
    return {"environment": environment_, "rows": record.rows}


def run_against(address: str, plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    """What a server from elsewhere can be asked for; what it makes saturated is the capacity that loads are shares of."""
    record = Record(report)
    record.phase(address, lambda client: quiet(client, plan.quiet, "as they are"))
    capacity = record.phase(
        address,
        lambda client: saturated(client, plan.saturated_s, _AT_ONCE),
        phase="saturated",
        cores="its own",
        at_once=_AT_ONCE,
    )["goodput_per_s"]
    if not capacity:
        raise FlashdiffError(f"{address} answered none of the requests: its capacity is not known")
    for load in plan.loads:
        record.keep(_open_loop_row(_offer(address, load * capacity, plan), load, capacity, "step"))
    over = {"phase": "overload", "batching": "step", "load": 3.0}
    record.phase(address, lambda client: open_loop(client, 3 * capacity, plan.overload_s), **over)
    return {"environment": environment({}) | {"server": address}, "rows": record.rows}


def _offer(address: str, per_second: float, plan: Plan) -> Outcome:
    outcome: Outcome = asyncio.run(_with_client(address, lambda client: open_loop(client, per_second, plan.open_loop_s)))
    return outcome


def _open_loop_row(outcome: Outcome, load: float, capacity: float, batching: Batching) -> dict[str, Any]:
    return outcome.row(phase="open loop", batching=batching, load=load, offered_per_s=round(load * capacity, 2))


def median_and_range(values: Sequence[float | None], digits: int = 1) -> str:
    """`36.1 (35.0 to 38.2)` of what several runs found; nothing is told of runs that found nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    median, low, high = (f"{of(known):.{digits}f}" for of in (statistics.median, min, max))
    return f"{median} ({low} to {high})" if len(known) > 1 else median


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """What the rows say, each beside what it is measured against; of a server from elsewhere there are fewer."""
    lines = [
        f"- quiet, idle cores {row['idle_cores']}: client-seen p50 {row['p50_ms']} ms, {row['p50_beyond_engine_ms']} ms of it "
        f"beyond the engine, a call that does nothing {row.get('p50_empty_call_ms', '-')} ms"
        for row in rows
        if row["phase"] == "quiet"
    ]
    full: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["phase"] == "saturated"):
        full.setdefault(row["cores"] if row.get("batching") != "in turn" else "in turn", []).append(row)
    engines = {
        "own": "cores of its own",
        "shared": "the cores of server and client",
        "in turn": "cores of its own, decoding in turn",
    }
    for cores, runs in full.items():
        made = f"{median_and_range([row['goodput_per_s'] for row in runs])} images/s"
        if cores in engines:
            share = median_and_range([row["goodput_per_s"] / row["of_offline"] for row in runs], 2)
            lines.append(f"- saturated, engine on {engines[cores]}: {made}, {share} of the engine alone")
        else:
            lines.append(f"- saturated: {made}")
    capacity = statistics.median(row["goodput_per_s"] for row in full.get("own") or next(iter(full.values())))
    for over in (row for row in rows if row["phase"] == "overload"):
        memory, texts = (", ".join(f"{mb:.0f}" for mb in over.get(key, ())) for key in ("memory_mb", "texts_mb"))
        lines.append(
            f"- overload, 3 x capacity for {over['seconds']:.0f} s: goodput {over['goodput_per_s'] / capacity:.2f} of capacity, "
            f"refusals within {over['refusal_p99_ms']} ms (p99)"
            + (f", memory of the server {memory} MB (before, after a sixth, at the end)" if memory else "")
            + (f", {texts} MB of it the cache of text embeddings" if texts else "")
        )
    lines += [
        f"- chaos: {row['sent']} requests, {row['answered']} of {row['accepted']} accepted ones answered, "
        f"{row['slots_left']} slots left behind"
        for row in rows
        if row["phase"] == "chaos"
    ]
    lines += ["", "| load | batching | p50 ms | p95 ms | p99 ms | in time |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["phase"] == "open loop"):
        times = " | ".join(str(row[f"p{share}_ms"]) for share in (50, 95, 99))
        in_time = row["statuses"].get("OK", 0) / max(1, row["sent"])
        lines.append(f"| {row['load']:.0%} | {row['batching']}-level | {times} | {in_time:.1%} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    what.add_argument("--server", metavar="HOST:PORT", help="a flashdiff that runs already and asks for no token")
    parser.add_argument("--quick", action="store_true", help="a second or two a phase: does it run, not what it measures")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, rows and every latency")
    options = parser.parse_args()
    try:
        plan, show = QUICK if options.quick else Plan(), lambda line: print(line, flush=True)
        report = run_against(options.server, plan, show) if options.server else run(options.bundle, plan, show)
        print(markdown(report["rows"]))
        if options.json:
            write_whole(options.json, json.dumps(report) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"load.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
