"""Result files to one page: claims, plots, tables and the environment.

    python -m benchmarks.report latency.json load.json quality.json --images docs/images.png --out report

The kind of each file is recognised by its content. The page, report.html, needs no other file; its plots are also written as PNG.
Files from different machines, libraries or bundles must not be compared, and are refused.

    python -m benchmarks.report LATENCY.json --quality EVALUATION.json --readme README.md --readme docs/benchmarks.md

writes the tables of README.md and docs/benchmarks.md, from one file of latency.py. With --quality the page shows that table too.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.command import command_parser, run_command
from benchmarks.reporting.marked_tables import read_sources, replace_tables, short_table
from benchmarks.reporting.page import write_page
from benchmarks.reporting.result_files import read_results
from flashdiff.errors import ConfigError
from flashdiff.files import write_whole


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON of the other benchmarks")
    parser.add_argument("--images", type=Path, nargs="*", default=[], metavar="PNG", help="sample sheets to show")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the page here")
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="quality for the short table: JSON of `flashdiff evaluate student --teacher teacher`",
    )
    parser.add_argument(
        "--real-size",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="results of real_latency.py, a line each below the short table",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the tables between this file's marks, from one file of latency.py; may be given several times",
    )
    options = parser.parse_args()
    return run_command("report", lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    needs_one = options.readme or options.quality or options.real_size
    if not (options.out or options.readme) or (needs_one and len(options.results) > 1):
        raise ConfigError("give --out FOLDER, or one file of measurements and --readme FILE")
    sources = read_sources(options.results[0], options.quality, options.real_size) if needs_one else None
    if options.out:
        write_page(read_results(options.results), options.images, options.out, short_table(sources) if sources else "")
        print(f"{options.out}/report.html")
    if sources:
        for file in options.readme:
            write_whole(file, replace_tables(file, sources))
            print(file)


if __name__ == "__main__":
    sys.exit(main())
