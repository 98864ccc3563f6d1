"""What several commands share: reading and showing their arguments, and checking and quieting the libraries they need."""

import argparse
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeVar

from flashdiff import defaults
from flashdiff.errors import ConfigError, install
from flashdiff.presets import PRESETS

T = TypeVar("T")


def listed(numbers: Iterable[int]) -> str:
    """`1,2,4,8`, as lists of numbers are written on the command line."""
    return ",".join(map(str, numbers))


def parse_lora(text: str) -> tuple[str, float]:
    """`FOLDER` or `FOLDER:WEIGHT`."""
    folder, _, weight = text.rpartition(":")
    if not folder:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"--lora '{text}': the weight after ':' must be a number")
    return folder, number


def parse_control(text: str, what: str = "FOLDER or a hub id") -> tuple[str, str]:
    """`NAME=VALUE`; ConfigError, with `what` the value is, for anything else."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise ConfigError(f"--control '{text}': give NAME={what}")
    return name, value


def assignment(kind: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """Reads an option's `NAME=VALUE`."""

    def read(text: str) -> tuple[str, T]:
        name, is_there, value = text.partition("=")
        if not (name and is_there):
            raise ValueError(text)
        return name, kind(value)

    read.__name__ = "NAME=VALUE"
    return read


class Once(argparse.Action):
    """Stores a value, and refuses a second one, of which there might have been several."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise ConfigError(f"{option} is given twice, and there can be but one")
        setattr(namespace, self.dest, values)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, with_steps: bool = True, with_presets: bool = False) -> None:
    """How a published few-step student is sampled; `with_presets` lists them all."""
    presets = "sampling settings published with a student"
    presets += f": {', '.join(PRESETS)}" if with_presets else ", such as sdxl-lightning-4; `build-engine --help` lists them"
    few = parser.add_argument_group("few-step students that flashdiff did not train")
    few.add_argument("--preset", metavar="NAME", help=presets)
    few.add_argument("--sampler", choices=defaults.SAMPLERS, help="default: what the base's scheduler says, else ode")
    few.add_argument(
        "--spacing", choices=defaults.SPACINGS, help="timestep spacing, for euler, euler-ancestral, ddim and flow-euler"
    )
    few.add_argument("--timesteps", metavar="N[,N...]", help="the student's own times, noisiest first, such as 999,749,499,249")
    few.add_argument("--eta", type=float, help="share of fresh noise, 0 to 1, for ddim, tcd (its gamma) and flow-euler")
    few.add_argument(
        "--shift", type=float, help="noise-level shift of a flow-matching model, the same at every size; default: the base's"
    )
    few.add_argument("--prediction", choices=defaults.PREDICTIONS, help="what the network predicts; default: as the base")
    if with_steps:
        few.add_argument("--steps", type=int, metavar="N", help="of requests that do not say; default: the preset's, else 4")


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of `add_sampling_arguments` and `--guidance`, by the fields of `SamplingOptions`."""
    timesteps = parse_timesteps(options.timesteps) if options.timesteps is not None else None
    values = {name: getattr(options, name) for name in ("preset", "sampler", "spacing", "eta", "shift", "guidance", "prediction")}
    return {**values, "timesteps": timesteps, "steps": None if isinstance(options.steps, str) else options.steps}


def parse_timesteps(text: str) -> tuple[int, ...]:
    """`999,749` as falling times; ConfigError for anything else."""
    try:
        times = tuple(int(part) for part in text.split(","))
    except ValueError:
        times = (-1,)
    if min(times) < 0 or any(later >= time for time, later in pairwise(times)):
        raise ConfigError(f"--timesteps '{text}': give falling whole numbers from 0 on, such as 999,749,499,249")
    return times


def need(extra: str, *modules: str) -> None:
    """ConfigError that says what to install when an optional package is missing."""
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"this command needs '{module}', which is not installed: {install(extra)}")


def quiet_libraries() -> None:
    """No progress bars or advice from the libraries between our own lines."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for module in (diffusers.utils.logging, transformers.utils.logging):
        module.set_verbosity_error()
        module.disable_progress_bar()
