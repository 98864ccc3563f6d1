"""The report's plots, one function each."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.measurements import Measurement
from benchmarks.timing.speedup import of_main_backend
from benchmarks.traffic.calls import share_in_time

_STAGE_COLORS = {
    "text": "#8ab6d6", "denoise": "#2f6f9f", "decode": "#e0a458", "PNG": "#b56576",
    "queue": "#999999", "wire": "#cccccc", "whole": "#666666",
}  # fmt: skip
_COLORS = ("#2f6f9f", "#e0a458", "#b56576", "#8ab6d6")


def plot_stages(measurements: Sequence[Measurement]) -> Any:
    """A bar per configuration: the stages of one image."""
    measurements = of_main_backend(measurements)
    figure, axes = _new_figure(height=0.3 * len({(one["model"], one["steps"]) for one in measurements}) + 1.2)
    totals = [one for one in measurements if one["stage"] == "total" and one["batch"] == 1]
    # The teacher's bars are cut off: at full length they would shrink the others to nothing.
    limit = 1.2 * max((one["median_ms"] for one in totals if one["model"] != "teacher"), default=totals[0]["median_ms"])
    for place, total in enumerate(reversed(totals)):
        left = 0.0
        for name, spent in _stages_of(total, measurements).items():
            axes.barh(place, spent, left=left, color=_STAGE_COLORS[name], label=name)
            left += spent
        if left <= limit and "interval_ms" in total:  # the median's 95 % confidence interval
            axes.plot(total["interval_ms"], [place, place], color="black", linewidth=1)
            left = max(left, total["interval_ms"][1])
        cut = " ..." if left > limit else ""
        axes.text(min(left, limit), place, f"{cut} {total['median_ms']:.1f}", va="center", fontsize=9)
    labels = [f"{total['model']}, {total['steps']} step{'s' * (total['steps'] > 1)}" for total in reversed(totals)]
    axes.set_yticks(range(len(totals)), labels)
    axes.set_xlim(0, limit)
    axes.set_xlabel("ms per image, median; the teacher's bars are cut off")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handles = {name: handles[name] for name in _STAGE_COLORS if name in handles}
    axes.legend(handles.values(), handles.keys(), ncols=7, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _stages_of(total: Measurement, measurements: Sequence[Measurement]) -> dict[str, float]:
    """Milliseconds by the stage's name in the plot."""
    key = ("model", "steps", "batch")
    medians = {one["stage"]: one["median_ms"] for one in measurements if all(one[name] == total[name] for name in key)}
    if "denoise_step" not in medians:  # stock pipelines have no times by stage
        return {"whole": total["median_ms"]}
    return {
        "text": medians["text"],
        "denoise": total["steps"] * medians["denoise_step"],
        "decode": medians["decode"],
        "PNG": medians["image_encoding"],
        **{name: medians[name] for name in ("queue", "wire") if name in medians},
    }


def plot_load(measurements: Sequence[Measurement]) -> Any:
    """Over the offered load: p50 and p99 of every batching or server, and the share of requests that were refused or late.

    Where there were several rounds, their medians.
    """
    figure, (left, right) = _new_figure(height=4, columns=2)
    open_loops: dict[str, list[Measurement]] = {}
    for one in measurements:
        if one["phase"] == "open loop":
            open_loops.setdefault(one.get("server") or f"{one['batching']}-level", []).append(one)
    for (name, open_loop), color in zip(open_loops.items(), _COLORS, strict=False):
        loads = sorted({run["load"] for run in open_loop})
        rounds = [[run for run in open_loop if run["load"] == load] for load in loads]
        for percent, style in ((99, "-"), (50, "--")):
            times = [[run[f"p{percent}_ms"] for run in runs if run[f"p{percent}_ms"] is not None] for runs in rounds]
            known = [(100 * load, statistics.median(ms)) for load, ms in zip(loads, times, strict=True) if ms]
            label = f"{name}, p{percent}"
            left.plot([load for load, _ in known], [ms for _, ms in known], style, color=color, marker="o", label=label)
        missed = [statistics.median(100 * (1 - share_in_time(run)) for run in runs) for runs in rounds]
        right.plot([100 * load for load in loads], missed, color=color, marker="o", label=name)
    _scale_log(left.yaxis)
    left.set_ylabel("client latency of requests in time, ms")
    right.set_ylim(0, max(1.0, 1.1 * right.dataLim.ymax))  # so that a fraction of a percent shows
    right.set_ylabel("refused or late, % of requests")
    for axes in (left, right):
        axes.set_xlabel("offered load, % of flashdiff's saturated goodput")
        _legend_above(axes)
    return figure


def plot_quality(found: dict[str, Any]) -> Any:
    """Kernel distance and text score over latency, with the real images' own values.

    The Fréchet distance is left out: with a few hundred images it is mostly the bias of the small sample, and hardly differs
    between a teacher at 2 steps and one at 50.
    """
    figure, both = _new_figure(height=4, columns=2)
    for axes, name, title in zip(
        both, ("kid", "text"), ("KID x1000 (lower is better)", "text score (higher is better)"), strict=True
    ):
        for model, color in (("student", "#2f6f9f"), ("teacher", "#b56576")):
            points = sorted((point for point in found["points"] if point["model"] == model), key=lambda point: point["steps"])
            values = [point[name]["value"] for point in points]
            below = [point[name]["value"] - point[name]["low"] for point in points]
            above = [point[name]["high"] - point[name]["value"] for point in points]
            times = [point["median_ms"] for point in points]
            axes.errorbar(times, values, yerr=[below, above], color=color, marker="o", capsize=3, label=model)
            for point, value in zip(points, values, strict=True):
                axes.annotate(point["steps"], (point["median_ms"], value), (6, 6), textcoords="offset points", fontsize=9)
        axes.axhline(found["real"][name]["value"], color="#999999", linestyle=":", label="real images")
        _scale_log(axes.xaxis)
        axes.set_xlabel("ms per image, median; points have their steps")
        axes.set_ylabel(title)
        _legend_above(axes)
    return figure


def plot_scaling(measurements: Sequence[Measurement]) -> Any:
    """The cost of a step over the number of parameters, and the cost per row of a batch relative to a single row."""
    figure, (left, right) = _new_figure(height=4, columns=2)
    largest = max(one["batch"] for one in measurements)
    sizes = sorted({tuple(one["size"]) for one in measurements})
    for (width, height), color in zip(sizes, _COLORS, strict=False):
        for batch, style in ((1, "-"), (largest, "--")):
            known = [
                (one["parameters"] / 1e6, one["median_ms"])
                for one in measurements
                if (*one["size"], one["batch"]) == (width, height, batch)
            ]
            left.plot(*zip(*known, strict=True), style, color=color, marker="o", label=f"{width}x{height}, batch {batch}")
    default = min(one["size"] for one in measurements)
    for parameters, color in zip(sorted({one["parameters"] for one in measurements}), _COLORS, strict=False):
        known = [
            (one["batch"], one["median_ms"]) for one in measurements if (one["parameters"], one["size"]) == (parameters, default)
        ]
        shares = [100 * ms / batch / known[0][1] for batch, ms in known]
        right.plot([batch for batch, _ in known], shares, color=color, marker="o", label=f"{parameters / 1e6:.0f} M parameters")
    _scale_log(left.xaxis)
    _scale_log(left.yaxis)
    left.set_xlabel("million parameters")
    left.set_ylabel("ms per step, median")
    right.set_xlabel(f"rows in the batch, {default[0]}x{default[1]}")
    right.set_ylabel("cost per row, % of a single row")
    right.set_ylim(0, 105)
    for axes in (left, right):
        _legend_above(axes)
    return figure


def _legend_above(axes: Any) -> None:
    """Put the legend above the plot, where it covers no point."""
    axes.legend(ncols=2, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _scale_log(axis: Any) -> None:
    """Make an axis logarithmic, with ticks at 1, 2, 5, 10 and so on in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _new_figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, several if there are several columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    subplots = figure.subplots(ncols=columns)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, subplots
