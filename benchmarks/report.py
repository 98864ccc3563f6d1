"""Result files to one page: plots, tables, and what was measured where.

    python -m benchmarks.report latency.json load.json quality.json --images docs/images.png --out report
    python -m benchmarks.report benchmarks/results/LATENCY.json --readme README.md      # the README's table of speeds

Files are told apart by what is in them. The page, report.html, needs no other file; the plots lie beside it as PNG. Files
measured on different machines, with different libraries or of different bundles are refused: they must not be compared.
"""

import argparse
import base64
import html
import io
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import latency, load, quality, scaling
from benchmarks.peers import compare as peers
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.files import new_folder, write_whole

_STAGE_COLORS = {
    "text": "#8ab6d6", "denoise": "#2f6f9f", "decode": "#e0a458", "PNG": "#b56576",
    "queue": "#999999", "wire": "#cccccc", "whole": "#666666",
}  # fmt: skip
_COLORS = ("#2f6f9f", "#e0a458", "#b56576", "#8ab6d6")
_SAME = ("cpu", "threads", "system", "libraries", "bundles")  # what must agree for numbers to stand side by side

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } img { max-width: 100% } figure { margin: 1.5rem 0 } figcaption { color: #555 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
td, th { border: 1px solid #ddd; padding: .25rem .6rem }
td { text-align: right } td:first-child { text-align: left; white-space: nowrap }
code, pre { font-size: 13px } .claim { font-size: 1.2rem }
"""


@dataclass
class Results:
    """What the files hold."""

    environment: dict[str, Any]
    latency: list[dict[str, Any]] = field(default_factory=list)
    load: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)
    peers: list[dict[str, Any]] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)


def read_results(files: Sequence[Path]) -> Results:
    """ConfigError names the file that is no result with a section here, or that was measured elsewhere than those before."""
    results: Results | None = None
    for file in files:
        try:
            found = json.loads(file.read_text("utf-8"))
            environment = found["environment"]
            rows = found.get("rows") or [{}]
            keys = set.intersection(*map(set, rows))
        except (AttributeError, OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{file}: not a result of these benchmarks") from None
        results = results or Results(dict(environment))
        for name in _SAME:
            ours, theirs = results.environment.get(name), environment.get(name)
            if name in ("libraries", "bundles"):
                # Each benchmark names those it used: what it shares with any before it must be the same.
                known = results.environment[name] = {**(theirs or {}), **(ours or {})}
                ours, theirs = known, {**known, **(theirs or {})}
            if ours != theirs:
                raise ConfigError(
                    f"{file}: its {name} differs from that of the files before; measure all on one machine, in one state"
                )
        content: Any = rows
        if "points" in found:
            if not all(p.get(name) for p in (*found["points"], found.get("real", {})) for name in ("kid", "text")):
                raise ConfigError(f"{file}: points without KID or text score; measure them with both")
            section, content = "quality", found
        elif keys >= {"parameters", "median_ms"}:
            section = "scaling"
        elif keys >= {"server", "phase"}:
            section = "peers"
        elif "phase" in keys:
            section = "load"
            said = {"saturated": "cores", "quiet": "idle_cores"}
            if any(said.get(row["phase"], "phase") not in row for row in rows):
                raise ConfigError(f"{file}: rows of an older load.py, which tells less of the cores; measure them again")
        elif keys >= {"model", "steps", "stage", "median_ms"}:
            section = "latency"
        else:
            raise ConfigError(f"{file}: the report has no section for its rows")
        if getattr(results, section):
            raise ConfigError(f"{file}: a file before it has the {section} of the report; give one")
        setattr(results, section, content)
    if results is None:
        raise ConfigError("name at least one result file")
    return results


# --- plots -----------------------------------------------------------------------------------------------------------


def stage_bars(rows: Sequence[dict[str, Any]]) -> Any:
    """Where the milliseconds of one image go, a bar per configuration."""
    rows = latency.of_main_backend(rows)
    figure, axes = _figure(height=0.3 * len({(r["model"], r["steps"]) for r in rows}) + 1.2)
    totals = [row for row in rows if row["stage"] == "total" and row["batch"] == 1]
    # The teacher's bars are cut, or nothing could be seen of the others.
    limit = 1.2 * max((row["median_ms"] for row in totals if row["model"] != "teacher"), default=totals[0]["median_ms"])
    for place, total in enumerate(reversed(totals)):
        of = {r["stage"]: r["median_ms"] for r in rows if all(r[k] == total[k] for k in ("model", "steps", "batch"))}
        if "denoise_step" not in of:  # stock pipelines do not tell their stages
            parts = {"whole": total["median_ms"]}
        else:
            parts = {"text": of["text"], "denoise": total["steps"] * of["denoise_step"]}
            parts |= {"decode": of["decode"], "PNG": of["image_encoding"]}
            parts |= {name: of[name] for name in ("queue", "wire") if name in of}
        left = 0.0
        for name, spent in parts.items():
            axes.barh(place, spent, left=left, color=_STAGE_COLORS[name], label=name)
            left += spent
        if left <= limit and "interval_ms" in total:  # of the median, with 95 % confidence
            axes.plot(total["interval_ms"], [place, place], color="black", linewidth=1)
            left = max(left, total["interval_ms"][1])
        cut = " ..." if left > limit else ""
        axes.text(min(left, limit), place, f"{cut} {total['median_ms']:.1f}", va="center", fontsize=9)
    labels = [f"{t['model']}, {t['steps']} step{'s' * (t['steps'] > 1)}" for t in reversed(totals)]
    axes.set_yticks(range(len(totals)), labels)
    axes.set_xlim(0, limit)
    axes.set_xlabel("ms an image, median; the teacher's bars are cut")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handles = {name: handles[name] for name in _STAGE_COLORS if name in handles}
    axes.legend(handles.values(), handles.keys(), ncols=7, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def load_curves(rows: Sequence[dict[str, Any]]) -> Any:
    """p50 and p99 over offered load of every batching or server, and beside them the share of requests they are the times of;
    medians where there were several rounds."""
    figure, (left, right) = _figure(height=4, columns=2)
    open_loops: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["phase"] == "open loop"):
        open_loops.setdefault(row.get("server") or f"{row['batching']}-level", []).append(row)
    for (name, open_loop), color in zip(open_loops.items(), _COLORS, strict=False):
        loads = sorted({row["load"] for row in open_loop})
        runs = [[row for row in open_loop if row["load"] == at] for at in loads]
        for share, line in ((99, "-"), (50, "--")):
            times = [[row[f"p{share}_ms"] for row in of if row[f"p{share}_ms"] is not None] for of in runs]
            known = [(100 * at, statistics.median(ms)) for at, ms in zip(loads, times, strict=True) if ms]
            left.plot([at for at, _ in known], [ms for _, ms in known], line, color=color, marker="o", label=f"{name}, p{share}")
        in_time = [statistics.median(100 * r["statuses"].get("OK", 0) / max(1, r["sent"]) for r in of) for of in runs]
        right.plot([100 * at for at in loads], in_time, color=color, marker="o", label=name)
    _plain_log(left.yaxis)
    left.set_ylabel("ms, as the client sees it, of what was in time")
    right.set_ylim(0, 105)
    right.set_ylabel("answered in time, %")
    for axes in (left, right):
        axes.set_xlabel("offered load, % of what flashdiff does saturated")
        _legend_above(axes)
    return figure


def quality_front(found: dict[str, Any]) -> Any:
    """Kernel distance and text score over latency, with the real images' own. Not the Fréchet distance: of a few hundred
    images it is mostly the bias of so small a sample, and says the same of a teacher at 2 steps and at 50."""
    figure, both = _figure(height=4, columns=2)
    for axes, name, title in zip(
        both, ("kid", "text"), ("KID x1000 (lower is better)", "text score (higher is better)"), strict=True
    ):
        for model, color in (("student", "#2f6f9f"), ("teacher", "#b56576")):
            points = sorted((p for p in found["points"] if p["model"] == model), key=lambda p: p["steps"])
            values = [p[name]["value"] for p in points]
            below = [p[name]["value"] - p[name]["low"] for p in points]
            above = [p[name]["high"] - p[name]["value"] for p in points]
            times = [p["median_ms"] for p in points]
            axes.errorbar(times, values, yerr=[below, above], color=color, marker="o", capsize=3, label=model)
            for p, value in zip(points, values, strict=True):
                axes.annotate(p["steps"], (p["median_ms"], value), (6, 6), textcoords="offset points", fontsize=9)
        axes.axhline(found["real"][name]["value"], color="#999999", linestyle=":", label="real images")
        _plain_log(axes.xaxis)
        axes.set_xlabel("ms an image, median; the steps beside each point")
        axes.set_ylabel(title)
        _legend_above(axes)
    return figure


def scaling_curves(rows: Sequence[dict[str, Any]]) -> Any:
    """A step's cost over parameters, and what a row of a batch costs of one alone."""
    figure, (left, right) = _figure(height=4, columns=2)
    largest = max(row["batch"] for row in rows)
    for (width, height), color in zip(sorted({tuple(row["size"]) for row in rows}), _COLORS, strict=False):
        for batch, mark in ((1, "-"), (largest, "--")):
            known = [(r["parameters"] / 1e6, r["median_ms"]) for r in rows if (*r["size"], r["batch"]) == (width, height, batch)]
            left.plot(*zip(*known, strict=True), mark, color=color, marker="o", label=f"{width}x{height}, batch {batch}")
    default = min(row["size"] for row in rows)
    for parameters, color in zip(sorted({row["parameters"] for row in rows}), _COLORS, strict=False):
        known = [(r["batch"], r["median_ms"]) for r in rows if (r["parameters"], r["size"]) == (parameters, default)]
        shares = [100 * ms / batch / known[0][1] for batch, ms in known]
        right.plot([batch for batch, _ in known], shares, color=color, marker="o", label=f"{parameters / 1e6:.0f} M parameters")
    _plain_log(left.xaxis)
    _plain_log(left.yaxis)
    left.set_xlabel("million parameters")
    left.set_ylabel("ms a step, median")
    right.set_xlabel(f"rows in the batch, {default[0]}x{default[1]}")
    right.set_ylabel("% of a row alone, each")
    right.set_ylim(0, 105)
    for axes in (left, right):
        _legend_above(axes)
    return figure


def _legend_above(axes: Any) -> None:
    """Where it covers no point."""
    axes.legend(ncols=2, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _plain_log(axis: Any) -> None:
    """Logarithmic, with 1, 2, 5, 10 and so on written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    figures = figure.subplots(ncols=columns)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, figures


# --- the page --------------------------------------------------------------------------------------------------------


def claims(results: Results) -> list[str]:
    """What the numbers say, a sentence each."""
    said = []
    timed = latency.of_main_backend(results.latency)
    totals = {(r["model"], r["steps"]): r for r in timed if r["stage"] == "total" and r["batch"] == 1}
    teacher = max((row for (model, _), row in totals.items() if model == "teacher"), key=lambda r: r["steps"], default=None)
    for steps in (4, 2):
        row = totals.get(("student", steps))
        if row and teacher:
            speed, ideal = teacher["median_ms"] / row["median_ms"], teacher["nfe"] / row["nfe"]
            said.append(
                f"{steps} steps take {row['median_ms']:.1f} ms where the teacher's {teacher['steps']} guided ones take "
                f"{teacher['median_ms']:.0f} ms: {speed:.1f} times as fast, {speed / ideal:.2f} of the ideal {ideal:.0f}."
            )
    for (model, steps), row in totals.items():
        if model.startswith("diffusers") and ("student", steps) in totals and steps == 4:
            ratio = row["median_ms"] / totals["student", steps]["median_ms"]
            said.append(f"The same {steps} steps in stock {model} take {row['median_ms']:.1f} ms, {ratio:.1f} times as long.")
    points = {(p["model"], p["steps"]): p for p in results.quality.get("points", ())}
    for steps in (4, 2):
        if ("student", steps) in points and ("teacher", 50) in points:
            of = (points["student", steps], points["teacher", 50])
            kid, real = [p["kid"] for p in of], results.quality["real"]["kid"]
            text, large = ([p[name]["value"] for p in of] for name in ("text", "large"))
            said.append(
                f"At {steps} steps the kernel distance to real images (KID x1000) is {_with_interval(kid[0])}; the 50-step "
                f"teacher's is {_with_interval(kid[1])}, other real images' {_with_interval(real)}. The text score is "
                f"{text[0]:.1f} (teacher {text[1]:.1f}), large attributes are right on {100 * large[0]:.1f} % "
                f"({100 * large[1]:.1f} %) of the images."
            )
    return said


def _with_interval(found: dict[str, float]) -> str:
    return f"{found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


@dataclass(frozen=True)
class Section:
    """A plot and the numbers in it."""

    name: str
    title: str
    rows: Callable[[Results], Any]
    draw: Callable[[Any], Any]
    table: Callable[[Any], str]


SECTIONS = (
    Section("stages", "Where the time of one image goes", lambda r: r.latency, stage_bars, latency.summary),
    Section("quality", "Quality against latency", lambda r: r.quality, quality_front, lambda q: quality.markdown(q["points"])),
    Section("load", "Latency under load: Poisson arrivals, 2 and 4 steps mixed", lambda r: r.load, load_curves, load.markdown),
    Section("peers", "Other servers of the same bundle, same arrivals", lambda r: r.peers, load_curves, peers.markdown),
    Section("scaling", "How a step's cost grows: random networks", lambda r: r.scaling, scaling_curves, scaling.markdown),
)


def page(results: Results, plots: dict[str, bytes], images: Sequence[Path]) -> str:
    """The HTML, pictures inside; the numbers of every plot are folded below it."""
    parts = [f'<p class="claim">{html.escape(sentence)}</p>' for sentence in claims(results)]
    for image in images:
        parts.append(f"<h2>Samples: {html.escape(image.stem)}</h2>{_picture(image.read_bytes(), image.name)}")
    for section in SECTIONS:
        if section.name in plots:
            numbers = f"<details><summary>The numbers</summary>{_html(section.table(section.rows(results)))}</details>"
            parts.append(f"<h2>{section.title}</h2>{_picture(plots[section.name], section.title)}{numbers}")
    environment = html.escape(json.dumps(results.environment, indent=2))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>flashdiff: what was measured</title><style>{_STYLE}</style>"
        f"<h1>flashdiff: what was measured</h1><p>{html.escape(machine(results.environment))}.</p>{''.join(parts)}"
        f"<h2>Where</h2><details><summary>Machine, versions, bundles</summary><pre>{environment}</pre></details></html>\n"
    )


def machine(environment: dict[str, Any]) -> str:
    """What it ran on, in a line."""
    libraries = environment.get("libraries", {})
    engine = f", OpenVINO {libraries['openvino']}" if libraries.get("openvino") else ""
    return f"{environment['threads']} threads of {environment['cpu']}{engine}"


def _picture(data: bytes, caption: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}"></figure>'


def _html(markdown: str) -> str:
    """Our own Markdown (lines, lists and tables) as HTML."""
    parts: list[str] = []
    for is_table, group in groupby(markdown.splitlines(), lambda line: line.startswith("|")):
        if not is_table:
            parts += [f"<p>{html.escape(line.removeprefix('- '))}</p>" for line in group if line.strip()]
            continue
        parts.append("<table>")
        for index, line in enumerate(line for line in group if set(line) - set("|- ")):
            tag = "td" if index else "th"
            cells = (html.escape(cell.strip()) for cell in line.strip("|").split("|"))
            parts.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
        parts.append("</table>")
    return "".join(parts)


def write_report(results: Results, images: Sequence[Path], out: Path) -> None:
    """report.html and the plots in a new folder."""
    plots = {}
    for section in SECTIONS:
        if rows := section.rows(results):
            buffer = io.BytesIO()
            section.draw(rows).savefig(buffer, format="png")
            plots[section.name] = buffer.getvalue()
    with new_folder(out) as folder:
        for name, png in plots.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / "report.html").write_text(page(results, plots, images), "utf-8")


# --- the README ------------------------------------------------------------------------------------------------------

_REGION = re.compile(r"(<!-- speed: .*? -->\n).*?(<!-- /speed -->)", re.DOTALL)


def with_speed(readme: str, results: Results, link: str) -> str:
    """The README with its table of speeds made anew from rows that lie at `link`; ConfigError where there is no place for it."""
    if not _REGION.search(readme):
        raise ConfigError("the README has no lines `<!-- speed: ... -->` and `<!-- /speed -->` to write the table between")
    rows = [row for row in results.latency if row["batch"] == 1]
    if not rows:
        raise ConfigError("the README's table needs rows of latency.py at batch 1")
    rows = latency.of_main_backend(rows)
    beyond = {(found.total["model"], found.total["steps"]): found for found in latency.beyond_ideal(rows)}
    rest = "\n".join(
        f"With {steps} steps the student has {found.of_ideal:.2f} of the ideal: of its {found.total['median_ms']:.1f} ms, "
        f"{found.fixed:.1f} are text, decoding and PNG,\n"
        f"and {found.evaluations:.1f} what its evaluations cost more one by one than in the teacher's guided pairs."
        for steps in (4, 2)
        if (found := beyond.get(("student", steps)))
    )
    where = f"{machine(results.environment)}, {rows[0]['precision']}"
    about = (
        f"*Medians of {rows[0]['n']} interleaved runs on {where}; prompt to PNG bytes, in\n"
        f"milliseconds ([rows]({link})). Ideal is the ratio of network\n"
        f"evaluations.\n{rest}*"
    )
    return _REGION.sub(lambda found: f"{found[1]}\n{latency.markdown(rows)}\n\n{about}\n{found[2]}", readme)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON of the other benchmarks")
    parser.add_argument("--images", type=Path, nargs="*", default=[], metavar="PNG", help="sample sheets to show")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the page here")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the table of speeds into it; FILE has latency.py's rows"
    )
    options = parser.parse_args()
    try:
        if not (options.out or options.readme) or (options.readme and len(options.results) > 1):
            raise ConfigError("give --out FOLDER, or one file of rows and --readme FILE")
        results = read_results(options.results)
        if options.out:
            write_report(results, options.images, options.out)
            print(f"{options.out}/report.html")
        if options.readme:
            link = Path(os.path.relpath(options.results[0], options.readme.parent)).as_posix()
            write_whole(options.readme, with_speed(options.readme.read_text("utf-8"), results, link))
            print(options.readme)
    except (FlashdiffError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
