"""Options of `serve` from environment variables, as containers give them: FLASHDIFF_PORT for --port; the command line wins."""

import argparse
import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from flashdiff.errors import ConfigError

PREFIX = "FLASHDIFF_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Kubernetes sets these in every pod for a Service named flashdiff or flashdiff-something, unless enableServiceLinks is off.
_SERVICE_LINK = re.compile(r"FLASHDIFF_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_LINKED_PORT = re.compile(r"(tcp|udp|sctp)://\S+")


class Variables:
    """The variables of a parser's options, each described in the option's help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._defaults: dict[str, Any] = {}
        self._actions: dict[str, argparse.Action] = {}
        for action in parser._actions:
            if action.dest == "help":
                continue
            name = PREFIX + action.dest.upper()
            default = [] if _is_list(action) and action.default is None else action.default
            self._actions[name], self._defaults[action.dest] = action, default
            separated = "; separated by commas, or a JSON list" if _is_list(action) else ""
            action.help = f"{(action.help or '').replace('%(default)s', str(action.default))} [{name}{separated}]"
            action.default = None  # so that what the command line does not give is recognised

    def fill(self, options: argparse.Namespace, environment: Mapping[str, str]) -> None:
        """Set what the command line leaves out; ConfigError for a value that is none, or a variable that no option has."""
        given = {
            name: value
            for name, value in environment.items()
            if name.startswith(PREFIX) and value and not _SERVICE_LINK.fullmatch(name) and not _LINKED_PORT.fullmatch(value)
        }
        for name in given.keys() - self._actions.keys():
            close = difflib.get_close_matches(name, self._actions, 1, cutoff=0.7)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(self._actions))}"
            raise ConfigError(f"{name}: no option has that variable; {hint}")
        for name, action in self._actions.items():
            if getattr(options, action.dest) not in (None, []):
                continue
            default = self._defaults[action.dest]
            setattr(options, action.dest, _read(name, given[name], action) if name in given else default)


def _is_list(action: argparse.Action) -> bool:
    return action.nargs == "*" or isinstance(action, argparse._AppendAction)


def _parts(name: str, text: str) -> list[str]:
    """The values of a list, separated by commas; or a JSON list, for values that hold commas themselves."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")]
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not (isinstance(values, list) and all(isinstance(value, str) and value for value in values)):
        raise ConfigError(f'{name}={text}: give values separated by commas, or a JSON list of texts such as ["a,b", "c"]')
    return values


def _read(name: str, text: str, action: argparse.Action) -> Any:
    if action.nargs == 0:
        if text.lower() not in _TRUE + _FALSE:
            raise ConfigError(f"{name}={text}: give one of {', '.join(_TRUE + _FALSE)}")
        return text.lower() in _TRUE
    convert = action.type if callable(action.type) else str
    try:
        values = [convert(part) for part in _parts(name, text)] if _is_list(action) else convert(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"{name}={text}: {'a whole number' if action.type is int else 'a number'} is needed") from None
    if action.choices and values not in action.choices:
        raise ConfigError(f"{name}={text}: give one of {', '.join(map(str, action.choices))}")
    return values
