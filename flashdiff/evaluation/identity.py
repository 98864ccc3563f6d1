"""How well images show the figure of a reference: `--task identity`, and `--task swap`, where a box of a picture becomes its own.

The renderer of the embedded world draws all that is needed, from seeds of no training. The judge is a probe of another form and
other seeds than the shipped adapter's encoder, and than the probe that the table of attributes is read by.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flashdiff import defaults
from flashdiff.components import Components, ModelSpec, Size
from flashdiff.errors import ConfigError
from flashdiff.evaluation.images import WORLD_SIZE, ImageSet, Prompt
from flashdiff.evaluation.metrics import Interval, bootstrap, weighted_mean
from flashdiff.evaluation.tasks import INPUT, OUTSIDE, SWAP, TaskData, check_task, parameter_option, psnr
from flashdiff.generate import decode_latents, prepare, to_pixels
from flashdiff.orders import Pixels, checked_scale
from flashdiff.pictures import as_clip_reads
from flashdiff.references import MAX_SCALE, ReferenceRequest, takes_reference
from flashdiff.tasks import inpainting
from flashdiff.zoo.evaluators import IDENTITY, load_identity_probe
from flashdiff.zoo.images import to_input
from flashdiff.zoo.world import KINDS, attribute_labels, describe, render, short_caption

SHOWN, FOUND_FIRST, RANK, INSIDE = "identity, %", "found first, %", "rank", "identity inside, %"
ROUND_TRIP = "autoencoder"
"""The name of the row of originals that were encoded and decoded, and nothing else."""
_SCALE = "scale"
_RULE_SEED, _RULE_PAIRS, _RULE_SHARE = 67_000_000, 40, 0.9
_BATCH = 64

_Scene = tuple[str, int]


def referred_prompts(task: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Of every prompt of the embedded world one that says its kind and a background alone.

    The background is not the figure's own: that of the picture that receives it for `swap`, else one at random.
    """
    scenes = [prompt.scene for prompt in prompts if prompt.scene]
    receivers, changed = _receivers(scenes) if task == SWAP else {}, []
    for kind, seed in scenes:
        own = describe(kind, seed).background
        others = [word for word in KINDS[kind].background if word != own]
        background = describe(*receivers[kind, seed]).background if task == SWAP else random.Random(seed).choice(others)
        changed.append(Prompt(short_caption(describe(kind, seed, background)), (kind, seed), background))
    return changed


def _receivers(scenes: Sequence[_Scene]) -> dict[_Scene, _Scene]:
    """The scene whose picture receives the figure of each scene: the next of its kind, around the list."""
    of_kind: dict[str, list[_Scene]] = {}
    for scene in dict.fromkeys(scenes):
        of_kind.setdefault(scene[0], []).append(scene)
    if any(len(same) == 1 for same in of_kind.values()):
        raise ConfigError(f"--task {SWAP}: a figure goes into another's picture, and a kind has but one; give a larger --count")
    return {scene: after for same in of_kind.values() for scene, after in zip(same, [*same[1:], same[0]], strict=True)}


def head_box(size: Size) -> NDArray[np.bool_]:
    """What a swap makes anew [H, W]: the upper five eighths, without a sixteenth on the left and on the right."""
    rows, columns = np.arange(size.height)[:, None], np.arange(size.width)
    return (rows < size.height * 5 / 8) & (columns >= size.width / 16) & (columns < size.width * 15 / 16)


@cache
def attributes_inside(kind: str) -> tuple[str, ...]:
    """The attributes of a kind that lie in the box of a swap.

    The box of one render is pasted into another, on the same background. Those attributes lie in it that the judge then reads as
    the first render has them, in 90 % of the pastes in which the two differ.
    """
    scenes = [describe(kind, _RULE_SEED + number) for number in range(_RULE_PAIRS)]
    after = [*scenes[1:], scenes[0]]
    box = head_box(Size(WORLD_SIZE, WORLD_SIZE))[..., None]
    pasted = []
    for scene, receiver in zip(scenes, after, strict=True):
        drawn = (render(kind, of.seed, WORLD_SIZE, like=of.seed, background=receiver.background)[0] for of in (scene, receiver))
        pasted.append(np.where(box, *drawn))
    wanted, shown = attribute_labels(scenes), attribute_labels(after)
    read = judge(np.stack(pasted)).words
    inside = []
    for name in _counted(kind):
        differ = wanted[name] != shown[name]
        if differ.any() and (read[name] == wanted[name])[differ].mean() >= _RULE_SHARE:
            inside.append(name)
    return tuple(inside)


def _counted(kind: str) -> tuple[str, ...]:
    """A kind's attributes that a prompt with kind and background leaves open."""
    return tuple(name for name in IDENTITY if name == "color" or name in KINDS[kind].phrases)


@dataclass(frozen=True)
class Judged:
    """What the second probe finds in images."""

    features: NDArray[np.float32]  # [N, D]
    words: Mapping[str, NDArray[np.int64]]
    """Of every attribute the place of the word [N] that `attribute_labels` counts by."""


@torch.no_grad()
def judge(images: NDArray[np.uint8]) -> Judged:
    """Images [N, 64, 64, 3] as the second probe reads them."""
    probe = _probe()
    found = [probe(to_input(images[start : start + _BATCH])) for start in range(0, len(images), _BATCH)]
    words = {name: torch.cat([logits[name] for _, logits in found]).argmax(1).numpy() for name in IDENTITY}
    return Judged(torch.cat([features for features, _ in found]).numpy(), words)


_probe = cache(load_identity_probe)


@dataclass(frozen=True, kw_only=True)
class ReferredData(TaskData):
    """Requests with a reference each: the figure of their original on its own background."""

    references: NDArray[np.uint8]  # [N, H, W, 3]
    scale: float
    wanted: Sequence[Mapping[str, int]]
    """Of every image the words that the judge should read, of the attributes that count."""

    @cached_property
    def requests(self) -> list[dict[str, Any]]:
        """What each request brings, as `check_order` takes it."""
        references = [ReferenceRequest(image=_reader(image), scale=self.scale) for image in self.references]
        return [
            {"reference": reference, **({"inputs": given} if given else {})}
            for reference, given in zip(references, self.inputs, strict=True)
        ]

    @cached_property
    def _features(self) -> NDArray[np.float32]:
        return judge(self.references).features

    def of_image(self, number: int, image: Pixels, decode: Callable[[], Pixels]) -> dict[str, float]:
        """What `numbers` reads of image `number` [H, W, 3]; `decode` gives it as it left the decoder."""
        judged = judge(image[None])
        right = [judged.words[name][0] == word for name, word in self.wanted[number].items()]
        share = 100 * float(np.mean(right)) if right else np.nan
        if given := self.inputs[number]:
            outside = given["mask"][..., 0] == 0
            return {INSIDE: share, OUTSIDE: psnr(decode()[outside], given["image"][outside])}
        distances = np.square(self._features - judged.features).sum(1)
        rank = 1 + len(np.unique(self.originals.groups[distances < distances[number]]))
        return {SHOWN: share, FOUND_FIRST: 100.0 * (rank == 1), RANK: float(rank)}

    def numbers(self, of_images: Sequence[Mapping[str, float]], groups: NDArray[np.int64]) -> dict[str, Interval]:
        """Means over images, by name.

        `identity`: the share of the reference's attributes that the judge reads, but for the kind, which the prompt says. With a
        mask, of those that lie in it, and the PSNR outside before the picture's pixels were put back. Without one: the
        reference's rank among all by the distance of the judge's features, and how often it is the first.
        """
        found = {}
        for name in of_images[0]:
            values = np.array([of[name] for of in of_images])
            known = ~np.isnan(values)
            found[name] = bootstrap(partial(weighted_mean, values[known]), groups[known])
        return found

    def numbers_of(self, images: ImageSet) -> dict[str, Interval]:
        """The same of images that no model made; nothing was put back into them."""
        of_images = [self.of_image(number, image, image.copy) for number, image in enumerate(images.pixels)]
        return self.numbers([{name: value for name, value in of.items() if name != OUTSIDE} for of in of_images], images.groups)

    @property
    def numbers_of_input(self) -> dict[str, Interval]:
        """Of the references, or for `swap` of the pictures that receive them."""
        return self.numbers_of(self.unchanged) if self.unchanged else {}


def _reader(image: Pixels) -> Callable[[Size], Pixels]:
    return lambda size: as_clip_reads(Image.fromarray(image), size.width)


def referred_data(task: str, originals: ImageSet, parameters: Mapping[str, float]) -> ReferredData:
    """The requests for every original that the renderer drew for `referred_prompts`; ConfigError for unknown parameters."""
    if unknown := [name for name in parameters if name != _SCALE]:
        raise ConfigError(f"{parameter_option(unknown[0], parameters[unknown[0]])}: --task {task} has {_SCALE} alone")
    scenes = [prompt.scene for prompt in originals.prompts if prompt and prompt.scene]
    references = np.stack([_drawn(scene) for scene in scenes])
    unchanged, inputs = references, [dict[str, Pixels]()] * len(scenes)
    if task == SWAP:
        receivers = _receivers(scenes)
        unchanged = np.stack([_drawn(receivers[scene]) for scene in scenes])
        mask = np.repeat(head_box(Size(WORLD_SIZE, WORLD_SIZE))[..., None], 3, axis=2).astype(np.uint8) * 255
        inputs = [{"image": image, "mask": mask} for image in unchanged]
    labels = attribute_labels([describe(*scene) for scene in scenes])
    counted = [attributes_inside(kind) if task == SWAP else _counted(kind) for kind, _ in scenes]
    return ReferredData(
        originals=originals,
        inputs=inputs,
        unchanged=ImageSet(INPUT, unchanged, originals.prompts),
        parameters={},
        references=references,
        scale=checked_scale(_SCALE, parameters.get(_SCALE, defaults.REFERENCE_SCALE), 0, MAX_SCALE),
        wanted=[{name: int(labels[name][number]) for name in names} for number, names in enumerate(counted)],
    )


def _drawn(scene: _Scene) -> Pixels:
    return render(*scene, WORLD_SIZE)[0]


def check_referred(task: str, spec: ModelSpec, title: str) -> None:
    """ConfigError for a model that takes no reference, or none in a mask, or makes images of another size."""
    if not takes_reference(spec):
        raise ConfigError(f"--task {task}: {title} takes no reference: give a bundle of build-engine --reference")
    if spec.sizes[0] != (WORLD_SIZE, WORLD_SIZE):
        drawn = f"the pictures are drawn with {WORLD_SIZE}x{WORLD_SIZE} pixels"
        raise ConfigError(f"--task {task}: {title} makes images of {spec.sizes[0]}, and {drawn}")
    if task == SWAP:
        check_task(inpainting.TASK.name, spec, title, {})


def round_trip(components: Components, images: ImageSet) -> ImageSet:
    """The images encoded and decoded by a model: no image of its own can be nearer."""
    pixels: list[Pixels] = []
    for start in range(0, len(images), components.max_batch):
        encoded = prepare(components, "encoder", list(images.pixels[start : start + components.max_batch]))
        pixels += to_pixels(decode_latents(components, [of["latents"] for of in encoded]))
    return ImageSet(ROUND_TRIP, np.stack(pixels), images.prompts)
