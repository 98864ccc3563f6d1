"""Replaces a masked part of an image from a prompt, with any text-to-image model: RePaint's blending (arXiv 2201.09865).

After every step the latents outside the mask become the image's own, at the noise level that the step has reached.
"""

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec
from flashdiff.errors import RequestError
from flashdiff.orders import Order, Pixels, Preparation
from flashdiff.tasks.base import Kept, Parameter, Prepared, Task

_LUMA = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue, as Pillow turns color into grey (ITU-R 601)."""


class _Inpainting(Task):
    name = "inpainting"
    inputs = ("image", "mask")
    # Below 1 the masked part starts from the image's own content, noised, in place of pure noise.
    parameters = (Parameter(name="strength", default=1.0, above=0, at_most=1),)

    def check(self, spec: ModelSpec, order: Order) -> None:
        if not _masked(order.inputs["mask"]).any():
            raise RequestError("mask", "all black", "it must be white where the image is made anew")
        if not _masked_cells(spec, order).any():
            raise RequestError("mask", "thin lines", f"its white parts must be wider than {spec.latent_factor} pixels")

    def steps_taken(self, order: Order) -> int:
        return max(1, int(order.parameters["strength"] * order.steps + 1e-4))  # 1e-4: a strength came as float32

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        return {**super().preparations(spec, order), "image": Preparation("encoder", order.inputs["image"])}

    def start(self, order: Order, prepared: Prepared) -> NDArray[np.float32] | None:
        return None if order.parameters["strength"] == 1 else prepared["image"]["latents"]

    def kept(self, spec: ModelSpec, order: Order, prepared: Prepared) -> Kept:
        return Kept(prepared["image"]["latents"], ~_masked_cells(spec, order)[None])

    def finish(self, order: Order, pixels: Pixels) -> Pixels:
        return np.where(_masked(order.inputs["mask"])[..., None], pixels, order.inputs["image"])


def _masked(mask: Pixels) -> NDArray[np.bool_]:
    """[H, W]: what is replaced."""
    return mask @ _LUMA >= 127.5


def _masked_cells(spec: ModelSpec, order: Order) -> NDArray[np.bool_]:
    """[h, w] of the latents: the nearest pixel decides, as in diffusers' pipelines."""
    return _masked(order.inputs["mask"])[:: spec.latent_factor, :: spec.latent_factor]


TASK = _Inpainting()
