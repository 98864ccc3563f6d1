"""`flashdiff inspect`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle, or 'avatars', the embedded model")


def run(options: argparse.Namespace) -> None:
    """Check a bundle's files and print what it was made from, what it can do, how exact it is and what it costs."""
    from flashdiff.cli.bundles import find_bundles
    from flashdiff.engines.bundle import read_manifest
    from flashdiff.engines.describe import describe

    (bundle,) = find_bundles([options.bundle])
    for line in describe(bundle, read_manifest(bundle)):
        print(line)
