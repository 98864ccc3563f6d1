"""Previews: latents to small pictures by one matrix, fitted to the model's own decoder when the model is opened."""

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components
from flashdiff.generate import generate_rows
from flashdiff.orders import Pixels
from flashdiff.tasks import check_order
from flashdiff.tasks.samples import needed_inputs

_PROMPTS = ("red", "green", "blue", "yellow", "purple", "black", "white", "a photo")  # any model makes many colours of these
_STEPS = 2


def fit_preview(components: Components) -> NDArray[np.float32]:
    """The [C + 1, 3] least-squares map from a latent cell, and 1, to the mean colour (0 to 255) of the pixels it decodes to.

    Fitted to eight of the model's own images.
    """
    spec = components.spec
    steps, size = min(_STEPS, spec.sampler.max_steps), spec.sizes[0]
    inputs = needed_inputs(spec, size)
    orders = [check_order(spec, prompt=prompt, seed=seed, steps=steps, inputs=inputs) for seed, prompt in enumerate(_PROMPTS)]
    made = [row_and_image for (row_and_image,) in generate_rows(components, orders)]
    channels, height, width = spec.latent_shape(size)
    cells = np.stack([row.latents for row, _ in made]).transpose(0, 2, 3, 1).reshape(-1, channels)
    blocks = np.stack([image for _, image in made]).reshape(len(made), height, spec.latent_factor, width, spec.latent_factor, 3)
    colors = blocks.mean((2, 4)).reshape(-1, 3)
    solution: NDArray[np.float64] = np.linalg.lstsq(_with_one(cells), colors, rcond=None)[0]
    return solution.astype(np.float32)


def preview(latents: NDArray[np.float32], colors: NDArray[np.float32]) -> Pixels:
    """Latents [C, h, w] as a picture [h, w, 3], one pixel a cell; microseconds, where the decoder takes milliseconds."""
    seen = _with_one(latents.transpose(1, 2, 0)) @ colors
    pixels: Pixels = np.clip(seen, 0, 255).round().astype(np.uint8)
    return pixels


def _with_one(cells: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([cells, np.ones_like(cells[..., :1])], axis=-1)
