"""What the images of a task are made from, and how well they keep to it.

Every image has an original: the renderer's drawing of its prompt, or a photo of the user's with its caption. From it come the
images that the request brings, and what a model would return that changes nothing: the row `input`. `control` is measured like a
task: requests bring control images drawn from the originals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from flashdiff.components import ModelSpec, Size
from flashdiff.controls import ControlRequest, controls_of
from flashdiff.errors import ConfigError
from flashdiff.evaluation.images import ImageSet
from flashdiff.evaluation.metrics import Interval, bootstrap, weighted_mean
from flashdiff.orders import Pixels
from flashdiff.tasks import TASKS, edit, image_to_image, inpainting, super_resolution, tasks_of, upscaling
from flashdiff.tasks.base import GREY
from flashdiff.zoo.control_images import CONTROLS, TILE, edges, silhouette

INPUT = "input"
"""The name of the row of images that no model changed."""
OUTSIDE, SEAM, PSNR, SMALL = "outside, dB", "seam", "PSNR, dB", "made small, dB"
EDGES, SILHOUETTES = "edges, F1 %", "silhouettes, IoU %"
_MEANS = (PSNR, SMALL, OUTSIDE, EDGES, SILHOUETTES)
"""The numbers that are means over images."""
_SCALE = 2.0
"""Of an upscale, unless its parameter is given, and of a tile."""
_X4 = 4
"""Of the models that were trained for super-resolution."""
_STEP, _STEP_OF_ORIGINAL = "step", "step of the original"
_FROM_ANOTHER = (image_to_image.TASK.name, edit.TASK.name)
CONTROL = "control"
"""Not a task of a model, but what its controls do to the text-to-image task."""
IDENTITY, SWAP = "identity", "swap"
REFERRED = (IDENTITY, SWAP)
"""What its references do: see `evaluation.identity`."""
_STRENGTH = "strength"

_Inputs = Mapping[str, Pixels]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Of every image that is to be made, in the order of the originals: the inputs of its request."""

    originals: ImageSet
    inputs: Sequence[_Inputs]
    unchanged: ImageSet | None
    """The images of the row `input`; None where a request brings none that could be returned."""
    parameters: Mapping[str, float]
    enlarged: float | None = None
    """How many times as wide and as high as a small image its result is; None where requests bring no small image."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """The scales of the controls that each request brings, by name."""

    @cached_property
    def requests(self) -> list[dict[str, Any]]:
        """What each request brings, as `check_order` takes it."""
        return [
            {
                "inputs": given,
                "parameters": self.parameters,
                "controls": [
                    ControlRequest(name=name, image=CONTROLS[name](image), scale=scale) for name, scale in self.controls.items()
                ],
            }
            for given, image in zip(self.inputs, self.originals.pixels, strict=True)
        ]

    def of_image(self, number: int, image: Pixels, decode: Callable[[], Pixels]) -> dict[str, float]:
        """What `numbers` reads of image `number` [H, W, 3]; `decode` gives it as it left the decoder."""
        original = self.originals.pixels[number]
        found: dict[str, float] = {}
        if self.enlarged:
            small, theirs = (_made_small(picture, self.enlarged) for picture in (image, original))
            found |= {PSNR: psnr(image, original), SMALL: psnr(small, theirs)}
        if self.controls:
            found |= {
                EDGES: _edge_f1(edges(image), edges(original)),
                SILHOUETTES: _overlap(silhouette(image), silhouette(original)),
            }
        if "mask" not in self.inputs[number]:
            return found
        mask = self.inputs[number]["mask"][..., 0] > 0
        return {
            OUTSIDE: psnr(decode()[~mask], original[~mask]),
            _STEP: _step_across(image, mask),
            _STEP_OF_ORIGINAL: _step_across(original, mask),
        }

    def numbers(self, of_images: Sequence[Mapping[str, float]], groups: NDArray[np.int64]) -> dict[str, Interval]:
        """What only this task measures, by name, of the results of `of_image` [N] and the images' groups [N].

        Where a small image is made large: the PSNR to the original, and the same of both made small. With controls: the F1 of the
        edges and the overlap of the silhouettes, in per cent, of the image and of its original. With a mask: the PSNR outside it
        before the original's pixels were put back, and the seam: the mean step of level across the mask's edge, divided by that
        of the originals in the same places; no seam where none of these has a step.
        """
        values = {name: np.array([of[name] for of in of_images]) for name in of_images[0]}
        found = {name: bootstrap(partial(weighted_mean, values[name]), groups) for name in _MEANS if name in values}
        if _STEP in values and values[_STEP_OF_ORIGINAL].any():
            found[SEAM] = bootstrap(partial(_ratio, values[_STEP], values[_STEP_OF_ORIGINAL]), groups)
        return found

    @property
    def numbers_of_input(self) -> dict[str, Interval]:
        """The numbers of the images that no model changed, where they are small ones made large."""
        if not self.enlarged or not self.unchanged:
            return {}
        of_images = [self.of_image(number, image, image.copy) for number, image in enumerate(self.unchanged.pixels)]
        return self.numbers(of_images, self.unchanged.groups)


def _ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64], weights: NDArray[np.float64] | None) -> float:
    """That of the means of values [N], counted as often as weights [N] say; NaN over a mean of 0."""
    mean = weighted_mean(theirs, weights)
    return weighted_mean(ours, weights) / mean if mean else np.nan


def check_name(task: str) -> None:
    """ConfigError for what is no task to measure."""
    if task not in (names := (*_MAKERS, CONTROL, *REFERRED)):
        raise ConfigError(f"--task {task}: choose {', '.join(names)}")


def task_data(name: str, originals: ImageSet, parameters: Mapping[str, float]) -> TaskData:
    """The inputs of the task for every original; ConfigError for a task whose inputs cannot be made from one."""
    check_name(name)
    if name == CONTROL:
        return _controlled(originals, parameters)
    known = {parameter.name: parameter for parameter in TASKS[name].parameters}
    parameters = {key: known[key].check(value) if key in known else value for key, value in parameters.items()}
    if name == upscaling.TASK.name:
        parameters = {"upscale": _SCALE, **parameters}
    if name in _FROM_ANOTHER and not originals.groups.any():
        raise ConfigError(f"--task {name}: an image starts from that of another prompt; give two prompts at least")
    inputs, unchanged = _MAKERS[name](originals, parameters)
    assert set(inputs[0]) == set(TASKS[name].inputs)
    enlarged = {upscaling.TASK.name: parameters.get("upscale"), super_resolution.TASK.name: _X4}.get(name)
    return TaskData(
        originals=originals, inputs=inputs, unchanged=_of_input(originals, unchanged), parameters=parameters, enlarged=enlarged
    )


def parameter_option(name: str, value: float) -> str:
    """The option of the command line that gives a task's number."""
    return f"--parameter {name}={value:g}"


def check_task(name: str, spec: ModelSpec, title: str, parameters: Mapping[str, float]) -> None:
    """ConfigError for a model that does not do the task, or takes other controls than these parameters name."""
    if name == CONTROL:
        taken = controls_of(spec)
        if not taken:
            raise ConfigError(f"--task {name}: {title} takes no controls: give a bundle of build-engine --control")
        if other := next((control for control in parameters if control not in (*taken, _STRENGTH)), None):
            raise ConfigError(f"{parameter_option(other, parameters[other])}: {title} takes {', '.join(taken)}")
        return
    known = [task.name for task in tasks_of(spec)]
    if name not in known:
        raise ConfigError(f"--task {name}: {title} does {', '.join(known)}")


def _of_input(originals: ImageSet, unchanged: Sequence[Pixels]) -> ImageSet:
    return ImageSet(INPUT, np.stack(unchanged), originals.prompts)


def _controlled(originals: ImageSet, given: Mapping[str, float]) -> TaskData:
    """Requests with control images of their originals, at these scales by name.

    With a tile and a strength, a request starts from the tile's image too.
    """
    scales = {name: value for name, value in given.items() if name != _STRENGTH}
    if unknown := [name for name in scales if name not in CONTROLS]:
        raise ConfigError(
            f"{parameter_option(unknown[0], scales[unknown[0]])}: of --task {CONTROL}, {', '.join(CONTROLS)} can be drawn"
        )
    if not scales:
        raise ConfigError(f"--task {CONTROL}: name a control and its scale, as --parameter {next(iter(CONTROLS))}=1")
    parameters = {name: value for name, value in given.items() if name == _STRENGTH}
    if TILE not in scales:
        if parameters:
            raise ConfigError(f"{parameter_option(_STRENGTH, given[_STRENGTH])}: of --task {CONTROL}, it is for {TILE}")
        return TaskData(originals=originals, inputs=[{}] * len(originals), unchanged=None, parameters={}, controls=scales)
    tiles = [CONTROLS[TILE](image) for image in originals.pixels]
    return TaskData(
        originals=originals,
        inputs=[{"image": image} if parameters else {} for image in tiles],
        unchanged=_of_input(originals, tiles),
        parameters=parameters,
        enlarged=_SCALE,
        controls=scales,
    )


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
    members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    others = []
    for number, group in enumerate(groups):
        place, those = int(np.searchsorted(members[group], number)), members[(group + 1) % len(members)]
        others.append(originals.pixels[those[place % len(those)]])
    return [{"image": image} for image in others], others


def _upscaled(originals: ImageSet, parameters: Mapping[str, float]) -> _Made:
    scale = parameters["upscale"]
    return _small(originals, scale, parameter_option("upscale", scale))


def _x4(originals: ImageSet, _: Mapping[str, float]) -> _Made:
    return _small(originals, _X4, f"--task {super_resolution.TASK.name}")


def _small(originals: ImageSet, scale: float, option: str) -> _Made:
    """The originals made smaller; without a model they are enlarged by PIL's bicubic filter."""
    _, height, width, _ = originals.pixels.shape
    side = Size(round(width / scale), round(height / scale))
    if upscaling.enlarged(side, scale) != (width, height):
        raise ConfigError(f"{option}: originals of {width}x{height} cannot be made {scale:g} times smaller; use another size")
    inputs: list[_Inputs] = []
    unchanged: list[Pixels] = []
    for image in originals.pixels:
        small = _made_small(image, scale)
        inputs.append({"image": small})
        unchanged.append(np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)))
    return inputs, unchanged


def _made_small(image: Pixels, scale: float) -> Pixels:
    height, width, _ = image.shape
    return np.asarray(Image.fromarray(image).resize((round(width / scale), round(height / scale)), Image.Resampling.LANCZOS))


_MAKERS: dict[str, Callable[[ImageSet, Mapping[str, float]], _Made]] = {
    image_to_image.TASK.name: _of_another_prompt,
    inpainting.TASK.name: _masked,
    edit.TASK.name: _of_another_prompt,
    upscaling.TASK.name: _upscaled,
    super_resolution.TASK.name: _x4,
}


def _upper_half(size: Size) -> NDArray[np.bool_]:
    return np.broadcast_to(np.arange(size.height)[:, None] < size.height // 2, (size.height, size.width))


def _box(size: Size) -> NDArray[np.bool_]:
    rows, columns = (abs(np.arange(side) - (side - 1) / 2) < side / 4 for side in (size.height, size.width))
    box: NDArray[np.bool_] = rows[:, None] & columns
    return box


_MASKS: tuple[Callable[[Size], NDArray[np.bool_]], ...] = (_upper_half, _box, lambda size: ~_box(size))


def psnr(ours: Pixels, theirs: Pixels) -> float:
    """In dB, of levels 0 to 255; at most 138."""
    return float(10 * np.log10(255**2 / max(1e-9, ((ours.astype(np.float64) - theirs) ** 2).mean())))


def _step_across(image: Pixels, mask: NDArray[np.bool_]) -> float:
    """The mean difference of level, over the channels, of neighbours of which one is masked."""
    levels = image.astype(np.float64)
    steps = [abs(np.diff(levels, axis=axis)).mean(2)[np.diff(mask, axis=axis)] for axis in (0, 1)]
    return float(np.concatenate(steps).mean())


def _edge_f1(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """F1 in per cent of edges [H, W], which may lie a pixel off: the harmonic mean of the shares of ours that lie by one of
    theirs, and of theirs that lie by one of ours."""
    if not ours.any() or not theirs.any():
        return 100.0 * (ours.any() == theirs.any())
    precision, recall = (ours & _widened(theirs)).sum() / ours.sum(), (theirs & _widened(ours)).sum() / theirs.sum()
    return float(200 * precision * recall / max(precision + recall, 1e-9))


def _widened(edge: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With the eight neighbours of every pixel."""
    return np.asarray(Image.fromarray(edge.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0


def _overlap(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """Intersection over union of figures [H, W], per cent; that of two empty ones is 100."""
    union = (ours | theirs).sum()
    return float(100 * (ours & theirs).sum() / union) if union else 100.0
