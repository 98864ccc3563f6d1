"""What several commands share: reading and showing their arguments, and checking and quieting the libraries they need."""

import math
from collections.abc import Iterable

from flashdiff.errors import ConfigError, install


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
