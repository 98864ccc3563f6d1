"""The command line: one module a command, each importing what it needs only when it runs, so that `--help` answers at once."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

import flashdiff
from flashdiff.cli import build_engine, distill, evaluate, generate, inspect, plan, serve
from flashdiff.errors import ConfigError, FlashdiffError


class _Command(Protocol):
    """What the module of a command has; the docstring of `run` is the command's description."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, options: argparse.Namespace) -> None: ...


class _Parser(argparse.ArgumentParser):
    """Refuses in one line; an empty value too, which a script's unset variable leaves and which would mean a default, or the
    working directory."""

    def error(self, message: str) -> NoReturn:
        self.exit(_refuse(f"{message}; `{self.prog} --help` lists the options"))

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        is_own = action.nargs != argparse.PARSER  # else the command's parser gets the values
        if not arg_string and is_own and action.dest != "prompt":  # that is a text, and a request's own check refuses it
            name = action.option_strings[-1] if action.option_strings else action.metavar
            raise ConfigError(f"{name} '': give a value, or leave it out")
        return super()._get_value(action, arg_string)


_COMMANDS: dict[str, tuple[_Command, str]] = {
    "distill": (distill, "train a flash LoRA from a recipe"),
    "build-engine": (build_engine, "fuse, export, compile and check a bundle"),
    "inspect": (inspect, "print what a bundle holds"),
    "evaluate": (evaluate, "measure image quality, of a student and its teacher"),
    "serve": (serve, "serve bundles over gRPC and HTTP"),
    "plan": (plan, "say how many devices a load needs"),
    "generate": (generate, "make images without a server"),
}


_LONGEST = 2000  # of a message: values from files are quoted in it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can cause, in options or in files, are one line on stderr and exit status 2."""
    try:
        options = _parser().parse_args(arguments)
    except ConfigError as error:
        return _refuse(str(error))
    _switch_telemetry_off()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("flashdiff").setLevel(logging.INFO)  # libraries keep to warnings
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere at exit
        return 128 + signal.SIGPIPE
    except FlashdiffError as error:
        return _refuse(str(error))
    except OSError as error:  # a full disk or a missing permission, wherever it strikes
        return _refuse(f"{error.filename or 'cannot write'}: {error.strerror or error}")
    except MemoryError:
        return _refuse("out of memory")
    except KeyboardInterrupt:
        print("flashdiff: interrupted", file=sys.stderr)
        return 130
    return 0


def _switch_telemetry_off() -> None:
    """Libraries report their use to servers of their own, unless the user has chosen; an empty variable is no choice.

    Without this huggingface_hub also asks its hub for a list of agents (`/api/agent-harnesses`), to name one in its requests.
    """
    if not os.environ.get("HF_HUB_DISABLE_TELEMETRY"):
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not os.environ.get("DO_NOT_TRACK") and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1":
        os.environ["DO_NOT_TRACK"] = "1"
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO's converter does without it


def _refuse(message: str) -> int:
    """One line on stderr, whatever names and values from files the message quotes; the exit status."""
    line = "".join(letter if letter.isprintable() else " " for letter in message)
    print(f"flashdiff: error: {line if len(line) <= _LONGEST else line[:_LONGEST] + '...'}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flashdiff", description=flashdiff.__doc__)
    parser.add_argument("--version", action="version", version=f"flashdiff {flashdiff.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (command, summary) in _COMMANDS.items():
        of_command = commands.add_parser(name, help=summary, description=command.run.__doc__)
        command.add_arguments(of_command)
        of_command.set_defaults(run=command.run)
    return parser
