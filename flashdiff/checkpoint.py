"""Training state on disk: saved whole, loaded without running anything from the file.

In the core because both trainings use it: the embedded model's (`flashdiff.zoo`) and distillation (`flashdiff.distill`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashdiff.errors import TrainingError
from flashdiff.files import write_whole
from flashdiff.reading import open_file


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and plain containers; a kill at any moment leaves the old or the new file, never half."""
    try:
        write_whole(path, lambda file: torch.save(dict(state), file))
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"{path}: cannot save the checkpoint ({error}); the one before is untouched") from None


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; TrainingError when the file is damaged."""
    try:
        with open_file(path) as file:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError
    except Exception as error:  # torch raises many kinds for a damaged file
        raise TrainingError(f"{path}: damaged checkpoint ({type(error).__name__}); remove it to start over") from None
    return state


def step_generator(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The random streams of one update: functions of seed and step alone, so a resumed run draws the same."""
    return np.random.default_rng([seed, step]), torch.Generator().manual_seed((seed << 32) + step)
