"""What a base reads of a sample's images: which images these are, and the denoiser's inputs that are made of them.

Images go through the same steps as a request's: an order, the task's preparations, the model's parts, the branches of a step.
So training and serving cannot disagree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size, Tensors
from flashdiff.controls import ControlRequest, controls_of
from flashdiff.distill.branches import Branches
from flashdiff.distill.config import IMAGE, MASK, REFERENCE, SOURCE, MaskRecipe, Recipe, called_twice
from flashdiff.distill.masks import draw_mask
from flashdiff.distill.network import trained_part
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families.base import TorchModel
from flashdiff.generate import prepare
from flashdiff.noise import SEED_LIMIT, image_seed
from flashdiff.orders import Order, Pixels
from flashdiff.parts import NOISE_LEVEL
from flashdiff.pictures import Background
from flashdiff.references import ENCODER, ReferenceRequest, takes_reference
from flashdiff.rows import branches_of
from flashdiff.tasks import check_order, edit, inpainting, super_resolution, task_for, trained_task
from flashdiff.tasks.base import Task

_MADE = tuple(name for task in (inpainting.TASK, edit.TASK, super_resolution.TASK) for name in task.conditions_made)
"""The conditions that training makes of a sample's images."""
_IMAGE_GUIDANCE = "image_guidance"


@dataclass(frozen=True, kw_only=True)
class WantedImage:
    """An image of every sample that training reads in addition to the latents of its own."""

    further: str | None = None
    """Its name among the sample's further images; None: the sample's own."""
    side: int | None = None
    """Pixels of each side, as an image encoder reads it; None: it has the sample's size."""
    shrunk: int = 1
    """How many times smaller than the sample it is, in width and height."""
    behind: Background = "white"
    """What is seen where it is transparent, as in a request."""
    check: Callable[[Pixels], None] | None = None
    """Raises a RequestError for pixels [H, W, 3] that no request could bring."""

    def size(self, sample: Size) -> Size:
        """Its size, of a sample of this one."""
        return Size(self.side, self.side) if self.side else Size(*(length // self.shrunk for length in sample))


def check_conditions(spec: ModelSpec) -> None:
    """TrainingError for a base whose network reads what is not made of a sample's images here."""
    given = [c.name for c in spec.conditions if c.part is None and c.enters != "residual" and c.name not in _MADE]
    if given:
        raise TrainingError(
            f"'{spec.name}' takes {', '.join(given)}, which training samples do not have; it can be served as it is"
        )


class ImageConditions:
    """The conditions of a run that are made of images; none of a base that reads texts alone."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        """ConfigError for keys that mean nothing to this base; TrainingError as in `check_conditions`."""
        self._model, self._recipe = model, recipe
        spec = model.spec
        check_conditions(spec)
        self.task: Task = trained_task(spec) or task_for(spec, ())
        self._texts: Tensors = dict.fromkeys(spec.text_part.outputs, np.zeros(0, dtype=np.float32))
        self._controls = {control.name: control.scale for control in recipe.controls}
        assert set(self._controls) == set(controls_of(spec))
        self._check_keys()
        self.wanted = self._wanted()
        """The images of every sample, by the name that `request` takes."""

    @property
    def names(self) -> tuple[str, ...]:
        """The denoiser's inputs that are made of images, their scales included."""
        return tuple(name for name in trained_part(self._model.spec).inputs[2:] if name not in self._texts)

    @property
    def of_pixels(self) -> set[str]:
        """Those that are images of the sample's size."""
        return {condition.name for condition in self._model.spec.conditions if condition.is_of_pixel_size}

    def _check_keys(self) -> None:
        recipe, name = self._recipe, self._model.spec.name
        if recipe.masks and MASK not in self.task.inputs:
            raise ConfigError(f"masks: '{name}' was not trained for inpainting; leave it out")
        if recipe.image_guidance is not None and not self._is_guided_by_image:
            raise ConfigError(f"image_guidance = {recipe.image_guidance}: '{name}' is not guided by an image; leave it out")
        if given := recipe.noise_level:
            most = self._most_noise
            if most is None:
                raise ConfigError(f"noise_level = {[*given]}: '{name}' was not trained for super-resolution; leave it out")
            if given[1] > most:
                raise ConfigError(f"noise_level = {[*given]}: '{name}' has the levels 0 to {most}")

    @property
    def _most_noise(self) -> int | None:
        """The highest noise level that the base knows; None where it takes none."""
        known = {parameter.name: parameter for parameter in self.task.parameters_of(self._model.spec)}
        return int(known[NOISE_LEVEL].at_most) if NOISE_LEVEL in known else None

    @property
    def _noise_levels(self) -> tuple[int, int] | None:
        """The lowest and the highest that are drawn."""
        most = self._most_noise
        return None if most is None else self._recipe.noise_level or (0, most)

    @property
    def _is_guided_by_image(self) -> bool:
        parameters = {parameter.name for parameter in self.task.parameters_of(self._model.spec)}
        return _IMAGE_GUIDANCE in parameters and self._model.guides_twice

    def _wanted(self) -> dict[str, WantedImage]:
        wanted = dict[str, WantedImage]()
        spec, size = self._model.spec, self._model.spec.sizes[0]
        if IMAGE in self.task.inputs:
            taken = self.task.input_size(spec, IMAGE, size) or size
            is_own = MASK in self.task.inputs or taken != size
            wanted[IMAGE] = WantedImage(further=None if is_own else SOURCE, shrunk=size.width // taken.width)
        if MASK in self.task.inputs and self._masks.image == "further":
            wanted[MASK] = WantedImage(further=MASK, behind="black", check=self._check_mask)
        wanted |= {name: WantedImage(further=name, behind="black") for name in self._controls}
        if reference := self._recipe.reference:
            assert takes_reference(spec)
            side = spec.part(ENCODER).side
            wanted[REFERENCE] = WantedImage(further=None if reference.image == "own" else REFERENCE, side=side)
        further = [image.further for image in wanted.values() if image.further]
        if unread := [name for name in self._recipe.data.further_images if name not in further]:
            read = f"it reads {', '.join(further)}" if further else "it reads none"
            raise ConfigError(f"data.further_images: this run reads no further image '{unread[0]}'; {read}")
        called = self._recipe.data.further_images
        if twice := called_twice(called.get(name, name) for name in further):
            raise ConfigError(f"{twice} (this run reads {' and '.join(further)})")
        return wanted

    @property
    def _masks(self) -> MaskRecipe:
        return self._recipe.masks or MaskRecipe()

    def _check_mask(self, mask: Pixels) -> None:
        size = Size(mask.shape[1], mask.shape[0])
        spec = self._model.spec.model_copy(update={"sizes": (size,)})
        check_order(spec, prompt="-", inputs={IMAGE: mask, MASK: mask})

    def described(self) -> str:
        """The images of a sample that are read, for people; empty where none is."""
        scales = {name: f" at scale {scale:g}" for name, scale in self._controls.items()}
        if self._recipe.reference:
            scales[REFERENCE] = f" as {REFERENCE} at scale {self._recipe.reference.scale:g}"
        scales |= {name: f" made {image.shrunk} times smaller" for name, image in self.wanted.items() if image.shrunk > 1}
        shown = [f"its {image.further or 'own'} image{scales.get(name, '')}" for name, image in self.wanted.items()]
        if MASK in self.task.inputs and MASK not in self.wanted:
            shown.append("a drawn mask")
        if levels := self._noise_levels:
            shown.append("noise of a level from {} to {}".format(*levels))
        return ", ".join(shown)

    # --- of a sample ---------------------------------------------------------------------------------------------------

    def request(self, images: Mapping[str, Pixels], size: Size, rng: np.random.Generator) -> dict[str, Any]:
        """What a request brings with these images [H, W, 3], as `check_order` takes it; what its recipe says is drawn
        here: a mask, a noise level."""
        inputs = {name: images[name] for name in self.task.inputs if name in images}
        if MASK in self.task.inputs and MASK not in inputs:
            inputs[MASK] = draw_mask(size, self._model.spec.latent_factor, self._masks, rng)
        reference = self._recipe.reference
        return {
            "inputs": inputs,
            "parameters": {**self._parameters(), **self._drawn_parameters(rng)},
            "controls": [ControlRequest(name=name, image=images[name], scale=scale) for name, scale in self._controls.items()],
            "reference": ReferenceRequest(image=images[REFERENCE], scale=reference.scale) if reference else None,
        }

    def _parameters(self) -> dict[str, float]:
        return {_IMAGE_GUIDANCE: self.image_guidance} if self._is_guided_by_image else {}

    def _drawn_parameters(self, rng: np.random.Generator) -> dict[str, float]:
        levels = self._noise_levels
        return {NOISE_LEVEL: int(rng.integers(*levels, endpoint=True))} if levels else {}

    @property
    def image_guidance(self) -> float:
        """The teacher's scale where it is guided by an image."""
        return self._recipe.image_guidance or defaults.IMAGE_GUIDANCE

    def of(self, images: Mapping[str, Pixels], size: Size, seed: Sequence[int]) -> dict[str, Tensor]:
        """The denoiser's inputs of one sample's images, without B, on the CPU. `seed` is that of all that is drawn."""
        if not self.wanted:
            return {}
        order = self._order(images, size, np.random.default_rng(seed))
        prepared = {
            name: self._texts if isinstance(given.value, str) else prepare(self._model, given.part, [given.value])[0]
            for name, given in order.task.preparations(self._model.spec, order).items()
        }
        return {name: torch.from_numpy(values) for name, values in self._made(self._model.spec, order, prepared)[0].items()}

    def _order(self, images: Mapping[str, Pixels], size: Size, rng: np.random.Generator) -> Order:
        spec = self._model.spec.model_copy(update={"sizes": (size,)})
        request = self.request(images, size, rng)
        return check_order(spec, prompt="-", size=size, steps=1, seed=int(rng.integers(SEED_LIMIT, dtype=np.uint64)), **request)

    def _made(
        self, spec: ModelSpec, order: Order, prepared: Mapping[str, Tensors], unconditional: Tensors | None = None
    ) -> list[dict[str, NDArray[Any]]]:
        """Of each branch of a step the inputs that are made of images, scales included."""
        drawn = order.task.drawn(spec, order, image_seed(order.seed, 0))
        branches, scales = branches_of(spec, order, prepared, unconditional, drawn)
        of_scales = {c.scale_name: scales[c.name][0] for c in spec.conditions if c.scaled and c.name in scales}
        rows: list[dict[str, Any]] = [{**branch.conditions, **of_scales} for branch in branches]
        kinds = {c.name: np.int64 if c.enters == "label" else np.float32 for c in spec.conditions}
        return [{name: np.asarray(row[name], kinds.get(name, np.float32), order="C") for name in self.names} for row in rows]

    # --- of the teacher's guidance -------------------------------------------------------------------------------------

    def branches(self, unconditional: Mapping[str, Tensor] | None, device: torch.device) -> Branches:
        """The branches of the teacher's guidance; `unconditional` [1, ...] is what it contrasts prompts with, and None where the
        network takes its guidance as an input."""
        weights = partial(self.task.weights, parameters=self._parameters())
        if unconditional is None:
            return Branches(contrasts=(), weights=weights)
        without_prompt = {name: values.to(device) for name, values in unconditional.items()}
        contrasts = [{**without_prompt, **images} for images in self._contrasts(device)]
        return Branches(
            contrasts=tuple(contrasts),
            weights=weights,
            keeps_norm=self._model.spec.sampler.keeps_norm,
            rescale=self._recipe.guidance_rescale,
        )

    def _contrasts(self, device: torch.device) -> list[dict[str, Tensor]]:
        """Of each further branch what stands in the place of a sample's images [1, ...], read off the branches of a request."""
        model, size = self._model, self._model.spec.sizes[0]
        guided = model.spec.model_copy(update={"sampler": model.spec.sampler.model_copy(update={"guidance": 2.0})})
        images = {name: np.full((*reversed(image.size(size)), 3), 255, dtype=np.uint8) for name, image in self.wanted.items()}
        order = self._order(images, size, np.random.default_rng(0))
        prepared: dict[str, Tensors] = {}
        for name, given in order.task.preparations(guided, order).items():
            if isinstance(given.value, str):
                prepared[name] = self._texts
            elif given.part == ENCODER:
                prepared[name] = prepare(model, given.part, [given.value])[0]
            else:  # which latents they are does not matter, and an autoencoder takes its time
                prepared[name] = {"latents": np.ones(model.spec.latent_shape(size), dtype=np.float32)}
        first, *others = self._made(guided, order, prepared, self._texts)
        return [
            {name: _repeated(values).to(device) for name, values in other.items() if not np.array_equal(values, first[name])}
            for other in others
        ]


def _repeated(values: NDArray[Any]) -> Tensor:
    """A contrast [1, ...] for every sample; of zeros a single one, which fits any size."""
    return torch.from_numpy(values)[None] if values.any() else torch.zeros([1] * (1 + values.ndim))
