"""Replaces a masked part of an image from a prompt.

Models that were trained for it read the mask, by latent cells or by pixels (FLUX Fill), and the image without what it covers, as
two conditions. Any other text-to-image model does it by RePaint's blending (arXiv 2201.09865): after every step the latents
outside the mask become the image's own, at the noise level that the step has reached.
"""

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec, Tensors
from flashdiff.errors import RequestError
from flashdiff.orders import Order, Pixels, Preparation
from flashdiff.parts import MASK, MASKED_IMAGE
from flashdiff.tasks.base import GREY, Kept, Parameter, Prepared, Task, steps_from

_LUMA = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue, as Pillow turns color into grey (ITU-R 601)."""


class _Inpainting(Task):
    name = "inpainting"
    inputs = ("image", "mask")
    # Below 1 the masked part starts from the image's own content, noised, in place of pure noise.
    parameters = (Parameter(name="strength", default=1.0, above=0, at_most=1),)
    conditions_made = (MASK, MASKED_IMAGE)

    def check(self, spec: ModelSpec, order: Order) -> None:
        if not _masked(order.inputs["mask"]).any():
            raise RequestError("mask", "all black", "it must be white where the image is made anew")
        if not _reads_pixels(spec) and not _masked_cells(spec, order).any():
            raise RequestError("mask", "thin lines", f"its white parts must be wider than {spec.latent_factor} pixels")

    def steps_taken(self, order: Order) -> int:
        return steps_from(order.parameters["strength"], order.steps)

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        image, given = order.inputs["image"], super().preparations(spec, order)
        is_trained = MASKED_IMAGE in given
        if is_trained:
            rest = np.where(_masked(order.inputs["mask"])[..., None], np.float32(GREY), image)
            given[MASKED_IMAGE] = Preparation("encoder", rest)
        if not is_trained or order.parameters["strength"] < 1:
            given["image"] = Preparation("encoder", image)
        return given

    def conditions(self, spec: ModelSpec, order: Order, prepared: Prepared, text: Tensors) -> Tensors:
        given = super().conditions(spec, order, prepared, text)
        if MASKED_IMAGE not in given:
            return given
        mask = _masked_pixels(spec, order) if _reads_pixels(spec) else _masked_cells(spec, order)[None]
        return {**given, MASK: mask.astype(np.float32)}

    def start(self, order: Order, prepared: Prepared) -> NDArray[np.float32] | None:
        return None if order.parameters["strength"] == 1 else prepared["image"]["latents"]

    def kept(self, spec: ModelSpec, order: Order, prepared: Prepared) -> Kept | None:
        if MASKED_IMAGE in prepared:
            return None
        return Kept(prepared["image"]["latents"], ~_masked_cells(spec, order)[None])

    def finish(self, order: Order, pixels: Pixels) -> Pixels:
        return np.where(_masked(order.inputs["mask"])[..., None], pixels, order.inputs["image"])


def _masked(mask: Pixels) -> NDArray[np.bool_]:
    """[H, W]: what is replaced."""
    return mask @ _LUMA >= 127.5


def _masked_cells(spec: ModelSpec, order: Order) -> NDArray[np.bool_]:
    """[h, w] of the latents: the nearest pixel decides, as in diffusers' pipelines."""
    return _masked(order.inputs["mask"])[:: spec.latent_factor, :: spec.latent_factor]


def _reads_pixels(spec: ModelSpec) -> bool:
    """Whether the model was trained on masks of which every pixel counts."""
    return any(condition.name == MASK and condition.channels > 1 for condition in spec.conditions)


def _masked_pixels(spec: ModelSpec, order: Order) -> NDArray[np.bool_]:
    """[pixels of a cell, h, w]: the pixels of every cell, row by row, as its channels."""
    factor, (_, height, width) = spec.latent_factor, spec.latent_shape(order.size)
    pixels = _masked(order.inputs["mask"]).reshape(height, factor, width, factor)
    return pixels.transpose(1, 3, 0, 2).reshape(factor**2, height, width)


TASK = _Inpainting()
