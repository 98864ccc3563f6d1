"""Makes an image of a smaller one, with a model that was trained for it: Stable Diffusion's x4 upscaler (arXiv 2112.10752).

The network reads the small image in pixels, one a latent cell, with noise of a level that it is given as well: the more noise,
the less the result keeps of the image's details, its flaws among them. Each image of an order draws noise of its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size
from flashdiff.noise import low_res_noise
from flashdiff.orders import Order
from flashdiff.parts import LOW_RES_IMAGE, NOISE_LEVEL
from flashdiff.sampling import renoise
from flashdiff.schedule import MAX_TIMESTEPS
from flashdiff.tasks.base import Parameter, Task

_LEVEL = Parameter(name=NOISE_LEVEL, default=defaults.NOISE_LEVEL, at_least=0, at_most=MAX_TIMESTEPS - 1, is_whole=True)
"""Of any model; each has a highest level of its own."""


class _SuperResolution(Task):
    name = "super_resolution"
    inputs = ("image",)
    parameters = (_LEVEL,)
    conditions_made = (LOW_RES_IMAGE, NOISE_LEVEL)

    def parameters_of(self, spec: ModelSpec) -> tuple[Parameter, ...]:
        most = spec.condition(NOISE_LEVEL).classes - 1
        return (replace(_LEVEL, default=min(defaults.NOISE_LEVEL, most), at_most=most),)

    def input_size(self, spec: ModelSpec, name: str, size: Size) -> Size:
        _, height, width = spec.latent_shape(size)
        return Size(width, height)

    def drawn(self, spec: ModelSpec, order: Order, seed: int) -> Mapping[str, NDArray[Any]]:
        schedule, level = spec.condition(LOW_RES_IMAGE).noised, int(order.parameters[NOISE_LEVEL])
        assert schedule
        alphas, sigmas = (values.astype(np.float32) for values in schedule.levels([level]))
        pixels = order.inputs["image"].transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1
        noisy = renoise(pixels, low_res_noise(seed, pixels.shape), alphas[0], sigmas[0])
        return {LOW_RES_IMAGE: noisy, NOISE_LEVEL: np.array(level, dtype=np.int64)}


TASK = _SuperResolution()
