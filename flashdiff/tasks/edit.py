"""Edits an image by an instruction, with a model that was trained for it.

InstructPix2Pix (arXiv 2211.09800) joins the image to its latents, and is guided by the text and by the image; FLUX Kontext
(arXiv 2506.15742) reads the image as a part of its sequence, without guidance.
"""

from collections.abc import Mapping

from flashdiff import defaults
from flashdiff.components import ModelSpec, Tensors
from flashdiff.orders import Order, Preparation
from flashdiff.parts import EDITED_IMAGE
from flashdiff.tasks.base import Branch, Number, Parameter, Prepared, Task


class _Edit(Task):
    name = "edit"
    inputs = ("image",)
    # How closely the result keeps to the image, as the guidance scale does to the instruction.
    parameters = (Parameter(name="image_guidance", default=defaults.IMAGE_GUIDANCE, above=0, at_most=100),)
    conditions_made = (EDITED_IMAGE,)

    def parameters_of(self, spec: ModelSpec) -> tuple[Parameter, ...]:
        is_joined = any(condition.name == EDITED_IMAGE and condition.enters == "concat" for condition in spec.conditions)
        return self.parameters if is_joined else ()

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        return {**super().preparations(spec, order), "image": Preparation("encoder", order.inputs["image"])}

    def conditions(self, spec: ModelSpec, order: Order, prepared: Prepared, text: Tensors) -> Tensors:
        return {**super().conditions(spec, order, prepared, text), EDITED_IMAGE: prepared["image"]["latents"]}

    def evaluations_per_step(self, spec: ModelSpec) -> int:
        return 3 if spec.sampler.evaluations_per_step == 2 else 1

    def weights(self, guidance: Number, parameters: Mapping[str, float]) -> tuple[Number, ...]:
        """Of text and image, of the image alone, and of neither: w_T, w_I - w_T and 1 - w_I of equation 3."""
        image_guidance = parameters["image_guidance"]
        return guidance, image_guidance - guidance, 0 * guidance + (1 - image_guidance)

    def branches(self, spec: ModelSpec, order: Order, prepared: Prepared, unconditional: Tensors | None) -> tuple[Branch, ...]:
        """Text and image, the image alone, and neither."""
        branches = super().branches(spec, order, prepared, unconditional)
        if len(branches) == 1:
            return branches
        *_, weight_of_neither = self.weights(spec.sampler.guidance, order.parameters)
        neither = {name: values for name, values in branches[-1].conditions.items() if name != EDITED_IMAGE}  # zeros stand in
        return *branches, Branch(neither, weight_of_neither, has_prompt=False)


TASK = _Edit()
