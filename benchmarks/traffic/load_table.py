"""The load benchmark's measurements as text: a list of phases, and a table of the open loops."""

import statistics
from collections.abc import Sequence

from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.stats import median_and_range
from benchmarks.traffic.calls import share_in_time

_ENGINE_CORES = {
    "own": "cores of its own",
    "shared": "the cores of server and client",
    "in turn": "cores of its own, decoding in turn",
}


def load_table(measurements: Sequence[Measurement]) -> str:
    """The list and the table in Markdown. A server that load.py did not start has fewer phases."""

    def of_phase(phase: str) -> list[Measurement]:
        return [measurement for measurement in measurements if measurement["phase"] == phase]

    saturated: dict[str, list[Measurement]] = {}
    for one in of_phase("saturated"):
        saturated.setdefault(one["cores"] if one.get("batching") != "in turn" else "in turn", []).append(one)
    capacity = statistics.median(one["goodput_per_s"] for one in saturated.get("own") or next(iter(saturated.values())))
    lines = [
        *map(_quiet_line, of_phase("quiet")),
        *(_saturated_line(cores, runs) for cores, runs in saturated.items()),
        *(_overload_line(one, capacity) for one in of_phase("overload")),
        *map(_chaos_line, of_phase("chaos")),
    ]
    titles = ("load", "batching", "p50 ms", "p95 ms", "p99 ms", "in time")
    table = markdown_table(titles, map(_open_loop_cells, of_phase("open loop")))
    return "\n".join([*lines, "", table])


def _quiet_line(quiet: Measurement) -> str:
    return (
        f"- quiet, idle cores {quiet['idle_cores']}: client-seen p50 {quiet['p50_ms']} ms, "
        f"{quiet['p50_beyond_engine_ms']} ms of it beyond the engine, "
        f"a call that does nothing {quiet.get('p50_empty_call_ms', '-')} ms"
    )


def _saturated_line(cores: str, runs: Sequence[Measurement]) -> str:
    rate = f"{median_and_range([run['goodput_per_s'] for run in runs])} images/s"
    if cores not in _ENGINE_CORES:
        return f"- saturated: {rate}"
    share = median_and_range([run["goodput_per_s"] / run["of_offline"] for run in runs], 2)
    return f"- saturated, engine on {_ENGINE_CORES[cores]}: {rate}, {share} of the engine alone"


def _overload_line(overload: Measurement, capacity: float) -> str:
    memory, texts = (", ".join(f"{mb:.0f}" for mb in overload.get(name, ())) for name in ("memory_mb", "texts_mb"))
    return (
        f"- overload, 3 x capacity for {overload['seconds']:.0f} s: "
        f"goodput {overload['goodput_per_s'] / capacity:.2f} of capacity, refusals within {overload['refusal_p99_ms']} ms (p99)"
        + (f", memory of the server {memory} MB (before, after a sixth, at the end)" if memory else "")
        + (f", {texts} MB of it the cache of text embeddings" if texts else "")
    )


def _chaos_line(chaos: Measurement) -> str:
    return (
        f"- chaos: {chaos['sent']} requests, {chaos['answered']} of {chaos['accepted']} accepted ones answered, "
        f"{chaos['slots_left']} slots left behind"
    )


def _open_loop_cells(run: Measurement) -> list[str]:
    times = [str(run[f"p{percent}_ms"]) for percent in (50, 95, 99)]
    return [f"{run['load']:.0%}", f"{run['batching']}-level", *times, f"{share_in_time(run):.1%}"]
