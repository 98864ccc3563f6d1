"""The command line: one module a command, each importing what it needs only when it runs, so that `--help` answers at once."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Protocol

import flashdiff
from flashdiff.cli import build_engine, distill, evaluate, generate, inspect, serve
from flashdiff.errors import FlashdiffError


class _Command(Protocol):
    """What the module of a command has; the docstring of `run` is the command's description."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, options: argparse.Namespace) -> None: ...


_COMMANDS: dict[str, tuple[_Command, str]] = {
    "distill": (distill, "train a flash LoRA from a recipe"),
    "build-engine": (build_engine, "fuse, export, compile and check a bundle"),
    "inspect": (inspect, "print what a bundle holds"),
    "evaluate": (evaluate, "measure image quality, of a student and its teacher"),
    "serve": (serve, "serve bundles over gRPC and HTTP"),
    "generate": (generate, "make images without a server"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can cause are one line on stderr and exit status 1, usage errors 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("flashdiff").setLevel(logging.INFO)  # libraries keep to warnings
    try:
        options.run(options)
    except FlashdiffError as error:
        print(f"flashdiff: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk or a missing permission, wherever it strikes
        print(f"flashdiff: error: {error.filename or 'cannot write'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flashdiff: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashdiff", description=flashdiff.__doc__)
    parser.add_argument("--version", action="version", version=f"flashdiff {flashdiff.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (command, summary) in _COMMANDS.items():
        of_command = commands.add_parser(name, help=summary, description=command.run.__doc__)
        command.add_arguments(of_command)
        of_command.set_defaults(run=command.run)
    return parser
