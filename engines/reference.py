"""What torch makes of random inputs and of a whole image: kept, so that its weights can go before an engine's come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdiff.components import Components, ModelSpec, Size
from flashdiff.engines.parts import Part, random_inputs, run_torch
from flashdiff.families.base import TorchModel
from flashdiff.generate import check_order, denoise_rows, encode_prompts, new_row, unconditional_of

Outputs = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """One part at one bucket: inputs whose rows all differ, and torch's outputs in float32, by name."""

    part: str
    size: Size
    batch: int
    inputs: dict[str, NDArray[Any]]
    outputs: Outputs


@dataclass(frozen=True)
class Reference:
    cases: tuple[Case, ...]
    images: dict[Size, NDArray[np.float32]]
    """What `sample_image` makes at every size."""


def run_reference(model: TorchModel, parts: Sequence[Part], batch_sizes: Sequence[int]) -> Reference:
    """Every part at every size and batch size, and an image at every size; the model is in float32."""
    generator = torch.Generator().manual_seed(1)
    cases = []
    for part in parts:
        for size in model.spec.sizes if part.is_spatial else model.spec.sizes[:1]:
            for batch in batch_sizes:
                inputs = random_inputs(model, part, batch, size, generator)
                named = {tensor.name: values.numpy() for tensor, values in zip(part.inputs, inputs, strict=True)}
                outputs = {name: values.numpy() for name, values in run_torch(part, inputs).items()}
                cases.append(Case(part.name, size, batch, named, outputs))
    return Reference(tuple(cases), {size: sample_image(model, model.spec, size) for size in model.spec.sizes})


def sample_image(components: Components, spec: ModelSpec, size: Size) -> NDArray[np.float32]:
    """One image [1, 3, H, W] from a fixed prompt and seed, step for step as a request goes, not clipped."""
    order = check_order(spec, prompt="a picture", seed=1, steps=min(4, spec.sampler.max_steps), size=size)
    conditioning = encode_prompts(components, [order.prompt])[0]
    row = new_row(spec, order, 0, conditioning, unconditional_of(components))
    while not row.is_done:
        denoise_rows(components, [row])
    return components.decode(row.latents[None])
