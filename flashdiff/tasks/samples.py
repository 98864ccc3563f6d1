"""Images for orders that no request brings: those of the gates, of previews and of measurements."""

import numpy as np

from flashdiff.components import ModelSpec, Size
from flashdiff.orders import Pixels
from flashdiff.tasks import tasks_of
from flashdiff.tasks.base import Task


def sample_inputs(spec: ModelSpec, task: Task, size: Size) -> dict[str, Pixels]:
    """The images that a task takes for a result of `size`: ramps of color and, as a mask, a slanted half of the image."""
    return {name: _sample(name, task.input_size(spec, name, size) or size) for name in task.inputs}


def needed_inputs(spec: ModelSpec, size: Size) -> dict[str, Pixels]:
    """The fewest images without which a model makes none; empty where it makes one of a prompt alone."""
    return sample_inputs(spec, min(tasks_of(spec), key=lambda task: len(task.inputs)), size)


def _sample(name: str, size: Size) -> Pixels:
    rows, columns = (np.arange(side) / side for side in (size.height, size.width))
    across = rows[:, None] + np.zeros(size.width), columns[None] + np.zeros((size.height, 1))
    ramps = np.stack([*across, 1 - across[0] * across[1]], axis=-1)
    mask = np.repeat((across[0] + across[1] / 3 > 0.6)[..., None], 3, axis=-1)
    return (255 * (mask if name == "mask" else ramps)).astype(np.uint8)
