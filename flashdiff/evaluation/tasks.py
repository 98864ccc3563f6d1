"""What the images of a task are made from, and how well they keep to it.

Every image has an original: the renderer's drawing of its prompt, or a photo of the user's with its caption. From it come the
images that the request brings, and what a model would return that changes nothing: the row `input`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import ConfigError
from flashdiff.evaluation.images import ImageSet
from flashdiff.evaluation.metrics import Interval, bootstrap, weighted_mean
from flashdiff.orders import Pixels
from flashdiff.tasks import TASKS, tasks_of, upscaling
from flashdiff.tasks.base import GREY

INPUT = "input"
"""The name of the row of images that no model changed."""
OUTSIDE, SEAM, PSNR = "outside, dB", "seam", "PSNR, dB"
_SCALE = 2.0
"""Of an upscale, unless its parameter is given."""
_X4 = 4
"""Of the models that were trained for super-resolution."""

_Inputs = Mapping[str, Pixels]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Of every image that is to be made, in the order of the originals: the inputs of its request."""

    originals: ImageSet
    inputs: Sequence[_Inputs]
    unchanged: ImageSet
    parameters: Mapping[str, float]
    is_enlarged: bool = False

    @property
    def numbers_of_input(self) -> dict[str, Interval]:
        """The same of the images that no model changed, where that says something."""
        return {PSNR: self._psnr(self.unchanged)} if self.is_enlarged else {}

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What each request brings, as `check_order` takes it."""
        return [{"inputs": given, "parameters": self.parameters} for given in self.inputs]

    def numbers(self, made: ImageSet, decode: Callable[[], NDArray[np.uint8]]) -> dict[str, Interval]:
        """What only this task measures, by name, of the images; `decode` gives the same [N, H, W, 3] as they left the decoder.

        Where the task is to make a small image large: the PSNR to the original. With a mask: the PSNR outside it before the
        original's pixels were put back, and the seam: the mean step of level across the mask's edge, divided by that of the
        originals in the same places.
        """
        if self.is_enlarged:
            return {PSNR: self._psnr(made)}
        if "mask" not in self.inputs[0]:
            return {}
        masks = np.stack([given["mask"][..., 0] > 0 for given in self.inputs])
        originals = self.originals.pixels.astype(np.float64)
        errors = ((decode() - originals) ** 2).mean(3)
        outside = np.array([_psnr(error[~mask]) for error, mask in zip(errors, masks, strict=True)])
        ours, theirs = (
            np.array([_step_across(*pair) for pair in zip(of, masks, strict=True)]) for of in (made.pixels, originals)
        )
        groups = made.groups
        return {
            OUTSIDE: bootstrap(lambda weights: weighted_mean(outside, weights), groups),
            SEAM: bootstrap(lambda weights: weighted_mean(ours, weights) / weighted_mean(theirs, weights), groups),
        }

    def _psnr(self, made: ImageSet) -> Interval:
        pairs = zip(made.pixels.astype(np.float64), self.originals.pixels, strict=True)
        each = np.array([_psnr((ours - original) ** 2) for ours, original in pairs])
        return bootstrap(lambda weights: weighted_mean(each, weights), made.groups)


def task_data(name: str, originals: ImageSet, parameters: Mapping[str, float]) -> TaskData:
    """The inputs of the task for every original; ConfigError for a task whose inputs cannot be made from one."""
    if name not in _MAKERS:
        raise ConfigError(f"--task {name}: choose {', '.join(_MAKERS)}")
    if name == upscaling.TASK.name:
        parameters = {"upscale": _SCALE, **parameters}
    inputs, unchanged = _MAKERS[name](originals, parameters)
    assert set(inputs[0]) == set(TASKS[name].inputs)
    of_input = ImageSet(INPUT, np.stack(unchanged), originals.prompts)
    is_enlarged = inputs[0]["image"].shape != unchanged[0].shape
    return TaskData(originals=originals, inputs=inputs, unchanged=of_input, parameters=parameters, is_enlarged=is_enlarged)


def check_task(name: str, spec: ModelSpec, title: str) -> None:
    """ConfigError for a model that does not do the task."""
    known = [task.name for task in tasks_of(spec)]
    if name not in known:
        raise ConfigError(f"--task {name}: {title} does {', '.join(known)}")


_Made = tuple[list[_Inputs], list[Pixels]]


def _masked(originals: ImageSet, _: Mapping[str, float]) -> _Made:
    """In turn the upper half, a box in the middle, and all but that box are made anew."""
    _, height, width, _ = originals.pixels.shape
    inputs: list[_Inputs] = []
    unchanged: list[Pixels] = []
    for number, image in enumerate(originals.pixels):
        mask = _MASKS[number % len(_MASKS)](Size(width, height))
        inputs.append({"image": image, "mask": np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255})
        unchanged.append(np.where(mask[..., None], np.uint8(GREY), image))
    return inputs, unchanged


def _of_another_prompt(originals: ImageSet, _: Mapping[str, float]) -> _Made:
    """Every image starts from the original of the next prompt."""
    groups = originals.groups
    others = np.roll(originals.pixels, -int((groups == groups[0]).sum()), axis=0)
    return [{"image": image} for image in others], list(others)


def _upscaled(originals: ImageSet, parameters: Mapping[str, float]) -> _Made:
    return _small(originals, parameters["upscale"], "upscale")


def _x4(originals: ImageSet, _: Mapping[str, float]) -> _Made:
    return _small(originals, _X4, "task")


def _small(originals: ImageSet, scale: float, option: str) -> _Made:
    """The originals made smaller; without a model they are enlarged by PIL's bicubic filter."""
    _, height, width, _ = originals.pixels.shape
    side = Size(round(width / scale), round(height / scale))
    if (side.width * scale, side.height * scale) != (width, height):
        raise ConfigError(f"--{option}: originals of {width}x{height} cannot be made {scale:g} times smaller; use another size")
    inputs: list[_Inputs] = []
    unchanged: list[Pixels] = []
    for image in originals.pixels:
        small = Image.fromarray(image).resize(side, Image.Resampling.LANCZOS)
        inputs.append({"image": np.asarray(small)})
        unchanged.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return inputs, unchanged


_MAKERS: dict[str, Callable[[ImageSet, Mapping[str, float]], _Made]] = {
    "image_to_image": _of_another_prompt,
    "inpainting": _masked,
    "edit": _of_another_prompt,
    "upscaling": _upscaled,
    "super_resolution": _x4,
}


def _upper_half(size: Size) -> NDArray[np.bool_]:
    return np.broadcast_to(np.arange(size.height)[:, None] < size.height // 2, (size.height, size.width))


def _box(size: Size) -> NDArray[np.bool_]:
    rows, columns = (abs(np.arange(side) - (side - 1) / 2) < side / 4 for side in (size.height, size.width))
    box: NDArray[np.bool_] = rows[:, None] & columns
    return box


_MASKS: tuple[Callable[[Size], NDArray[np.bool_]], ...] = (_upper_half, _box, lambda size: ~_box(size))


def _psnr(squared_errors: NDArray[np.float64]) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, squared_errors.mean())))


def _step_across(image: NDArray[np.floating] | Pixels, mask: NDArray[np.bool_]) -> float:
    """The mean difference of level, over the channels, of neighbours of which one is masked."""
    levels = image.astype(np.float64)
    steps = [abs(np.diff(levels, axis=axis)).mean(2)[np.diff(mask, axis=axis)] for axis in (0, 1)]
    return float(np.concatenate(steps).mean())
