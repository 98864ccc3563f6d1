"""`flashdiff inspect`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")


def run(options: argparse.Namespace) -> None:
    """Check a bundle's files and print what it was made from, what it can do, how exact it is and what it costs."""
    from flashdiff.engines.bundle import read_manifest
    from flashdiff.engines.describe import describe

    for line in describe(options.bundle, read_manifest(options.bundle)):
        print(line)
