"""Images of a prompt that start from an image, noised, in place of pure noise: SDEdit (arXiv 2108.01073)."""

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import ModelSpec
from flashdiff.orders import Order, Preparation
from flashdiff.tasks.base import Parameter, Prepared, Task, steps_from


class _ImageToImage(Task):
    name = "image_to_image"
    inputs = ("image",)
    # The share of the steps that are taken; a lower share keeps more of the image.
    parameters = (Parameter(name="strength", default=defaults.STRENGTH, above=0, at_most=1),)

    def steps_taken(self, order: Order) -> int:
        return steps_from(order.parameters["strength"], order.steps)

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        return {**super().preparations(spec, order), "image": Preparation("encoder", order.inputs["image"])}

    def start(self, order: Order, prepared: Prepared) -> NDArray[np.float32]:
        return prepared["image"]["latents"]


TASK = _ImageToImage()
