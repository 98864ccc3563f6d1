"""Result files to one page: claims, plots, tables and the environment.

    python -m benchmarks.report latency.json load.json quality.json --images docs/images.png --out report
    python -m benchmarks.report benchmarks/results/LATENCY.json --readme README.md      # the README's table of speeds

The kind of each file is recognised by its content. The page, report.html, needs no other file; its plots are also written as PNG.
Files from different machines, libraries or bundles must not be compared, and are refused.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.command import command_parser, run_command
from benchmarks.reporting.page import write_page
from benchmarks.reporting.readme import replace_speed_table
from benchmarks.reporting.result_files import read_results
from flashdiff.errors import ConfigError
from flashdiff.files import write_whole


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON of the other benchmarks")
    parser.add_argument("--images", type=Path, nargs="*", default=[], metavar="PNG", help="sample sheets to show")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the page here")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the table of speeds into this file, from latency.py's results"
    )
    options = parser.parse_args()
    return run_command("report", lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    if not (options.out or options.readme) or (options.readme and len(options.results) > 1):
        raise ConfigError("give --out FOLDER, or one file of measurements and --readme FILE")
    results = read_results(options.results)
    if options.out:
        write_page(results, options.images, options.out)
        print(f"{options.out}/report.html")
    if options.readme:
        link = Path(os.path.relpath(options.results[0], options.readme.parent)).as_posix()
        write_whole(options.readme, replace_speed_table(options.readme.read_text("utf-8"), results, link))
        print(options.readme)


if __name__ == "__main__":
    sys.exit(main())
