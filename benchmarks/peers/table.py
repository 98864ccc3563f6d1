"""The comparison's measurements as a table."""

from collections.abc import Sequence

from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.stats import median_and_range
from benchmarks.traffic.calls import share_in_time


def peers_table(measurements: Sequence[Measurement]) -> str:
    """A line per load and server, with medians and ranges over the rounds; the saturated phase first."""
    rounds: dict[tuple[float | None, str], list[Measurement]] = {}
    for one in measurements:
        rounds.setdefault((one.get("load"), one["server"]), []).append(one)
    lines = []
    for (load, server), runs in sorted(rounds.items(), key=lambda item: item[0][0] or 0):
        times = [median_and_range([run[f"p{percent}_ms"] for run in runs]) for percent in (50, 95, 99)]
        in_time = median_and_range([100 * share_in_time(run) for run in runs])
        rate = median_and_range([run["goodput_per_s"] for run in runs])
        lines.append([f"{load:.0%}" if load else "saturated", server, *times, in_time, rate])
    return markdown_table(("load", "server", "p50 ms", "p95 ms", "p99 ms", "in time, %", "images/s"), lines)
