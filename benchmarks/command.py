"""What the benchmark commands share: parser, checks of options, one-line errors, and result files."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.files import check_target, write_whole


def command_parser(module_docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` starts with the module's docstring."""
    return argparse.ArgumentParser(description=module_docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def result_file(text: str) -> Path:
    """The type of an option that names a result file, for argparse: checks before anything is measured that it can be written."""
    try:
        return check_target(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None


def check_repeats(repeats: int) -> None:
    """ConfigError for fewer than one repeat."""
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: give a number from 1 on")


def run_command(name: str, work: Callable[[], None]) -> int:
    """Do the command's work; its exit status. An expected error becomes one line on stderr, and status 1."""
    try:
        work()
    except (FlashdiffError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"{name}: error: {reason}", file=sys.stderr)
        return 1
    return 0


def show(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(line, flush=True)


def write_results(file: Path | None, results: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a result file, if one is wanted."""
    if file:
        write_whole(file, json.dumps(results, indent=indent) + "\n")


def write_and_print_results(file: Path, results: Mapping[str, Any]) -> None:
    """Write a result file, and print its measurements."""
    write_results(file, results, indent=2)
    print(json.dumps(results["rows"], indent=2))
