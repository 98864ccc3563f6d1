"""The page: one HTML file with claims, sample images, plots and their numbers."""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_machine
from benchmarks.peers.table import peers_table
from benchmarks.quality import quality_table
from benchmarks.reporting import plots
from benchmarks.reporting.claims import claims
from benchmarks.reporting.result_files import Results
from benchmarks.scaling import scaling_table
from benchmarks.timing.speedup import summary
from benchmarks.traffic.load_table import load_table
from flashdiff.files import new_folder

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } img { max-width: 100% } figure { margin: 1.5rem 0 } figcaption { color: #555 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
td, th { border: 1px solid #ddd; padding: .25rem .6rem }
td { text-align: right } td:first-child { text-align: left; white-space: nowrap }
code, pre { font-size: 13px } .claim { font-size: 1.2rem }
"""


@dataclass(frozen=True)
class Section:
    """A plot, and the table of its numbers."""

    name: str
    title: str
    content: Callable[[Results], Any]
    plot: Callable[[Any], Any]
    table: Callable[[Any], str]
    explanation: str = ""
    """What the plot's quantities are."""


SECTIONS = (
    Section("stages", "Where the time of one image goes", lambda r: r.latency, plots.plot_stages, summary),
    Section(
        "quality",
        "Quality against latency",
        lambda r: r.quality,
        plots.plot_quality,
        lambda q: quality_table(q["points"]),
        "KID, the kernel inception distance, compares the features of generated images with those of real ones: 0 means that no "
        "difference shows. The text score is 100 times the cosine of an image and its prompt in a network trained on such pairs. "
        "Bars are 95 % intervals.",
    ),
    Section("load", "Latency under load: Poisson arrivals, 2 and 4 steps mixed", lambda r: r.load, plots.plot_load, load_table),
    Section("peers", "Other servers of the same bundle, same arrivals", lambda r: r.peers, plots.plot_load, peers_table),
    Section("scaling", "How a step's cost grows: random networks", lambda r: r.scaling, plots.plot_scaling, scaling_table),
)


def write_page(results: Results, images: Sequence[Path], folder: Path, summary_table: str = "") -> None:
    """Write report.html and the plots into a new folder; `summary_table`, in Markdown, comes first."""
    pngs = {}
    for section in SECTIONS:
        if content := section.content(results):
            buffer = io.BytesIO()
            section.plot(content).savefig(buffer, format="png")
            pngs[section.name] = buffer.getvalue()
    with new_folder(folder) as new:
        for name, png in pngs.items():
            (new / f"{name}.png").write_bytes(png)
        (new / "report.html").write_text(_page(results, pngs, images, summary_table), "utf-8")


def _page(results: Results, pngs: dict[str, bytes], images: Sequence[Path], summary_table: str) -> str:
    """The HTML with its pictures inside; the numbers of every plot are folded below it."""
    parts = [_html(summary_table), *(f'<p class="claim">{html.escape(sentence)}</p>' for sentence in claims(results))]
    for image in images:
        parts.append(f"<h2>Samples: {html.escape(image.stem)}</h2>{_picture(image.read_bytes(), image.name)}")
    for section in SECTIONS:
        if section.name in pngs:
            numbers = f"<details><summary>The numbers</summary>{_html(section.table(section.content(results)))}</details>"
            explained = f"<p>{html.escape(section.explanation)}</p>" if section.explanation else ""
            parts.append(f"<h2>{section.title}</h2>{explained}{_picture(pngs[section.name], section.title)}{numbers}")
    environment = html.escape(json.dumps(results.environment, indent=2))
    machine = html.escape(describe_machine(results.environment))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>flashdiff benchmarks</title><style>{_STYLE}</style>"
        f"<h1>flashdiff benchmarks</h1><p>{machine}.</p>{''.join(parts)}"
        f"<h2>Environment</h2><details><summary>Machine, versions, bundles</summary><pre>{environment}</pre></details></html>\n"
    )


def _picture(data: bytes, caption: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}"></figure>'


def _html(markdown: str) -> str:
    """The tables' Markdown (lines, lists and tables) as HTML."""
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
