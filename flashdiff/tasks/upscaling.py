"""Enlarges an image of any size: the model remakes it in overlapping tiles, each as image-to-image does, at low strength.

The image is scaled first (Lanczos), and cut into tiles of a size that the model was built for; each tile is a row. Their noise is
cut from one plane, so that tiles agree where they overlap, and the results are blended there: see `flashdiff.tiles`.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashdiff import defaults
from flashdiff.components import ModelSpec, Size
from flashdiff.errors import RequestError
from flashdiff.orders import Order, Pixels, Preparation
from flashdiff.tasks.base import Parameter, Prepared, Task, steps_from
from flashdiff.tiles import Tiling

MAX_PIXELS = 4096 * 4096
"""Of the enlarged image."""
MAX_TILES = 96
"""Of a request: the rows that one client may have pending."""
_MAX_SIDE = 16383
"""WebP's longest."""


def enlarged(size: Size, scale: float) -> Size:
    """The size of a picture that is enlarged: halves up, also of a scale that float32 made a little smaller."""
    return Size(*(int(scale * side * (1 + 2**-23) + 0.5) for side in size))


class _Upscaling(Task):
    name = "upscaling"
    inputs = ("image",)
    parameters = (
        Parameter(name="upscale", default=None, at_least=1, at_most=8),
        Parameter(name="strength", default=defaults.UPSCALE_STRENGTH, above=0, at_most=1),
    )

    def input_size(self, spec: ModelSpec, name: str, size: Size) -> None:
        """Its own."""

    def laid_out(self, spec: ModelSpec, order: Order) -> Order:
        if order.controls:
            raise RequestError("controls", ", ".join(order.controls), "an upscale takes none")
        scale, picture = order.parameters["upscale"], Image.fromarray(order.inputs["image"])
        size = enlarged(Size(*picture.size), scale)
        becomes = f"{picture.width}x{picture.height} would become {size}"
        if size.width * size.height > MAX_PIXELS or max(size) > _MAX_SIDE:
            raise RequestError("upscale", scale, f"{becomes}; at most {MAX_PIXELS} pixels are made, and {_MAX_SIDE} a side")
        tiling = Tiling(size=size, tile=order.size, factor=spec.latent_factor)
        if (count := order.count * len(tiling.places)) > MAX_TILES:
            raise RequestError("upscale", scale, f"{becomes}, {count} tiles of {order.size}; a request has at most {MAX_TILES}")
        tiles = tiling.cut(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)))
        return replace(order, inputs={f"tile {index}": tile for index, tile in enumerate(tiles)}, tiling=tiling)

    def steps_taken(self, order: Order) -> int:
        return steps_from(order.parameters["strength"], order.steps)

    def preparations(self, spec: ModelSpec, order: Order) -> dict[str, Preparation]:
        tiles = {name: Preparation("encoder", tile) for name, tile in order.inputs.items()}
        return {**super().preparations(spec, order), **tiles}

    def starts(self, order: Order, prepared: Prepared) -> list[NDArray[np.float32] | None]:
        return [prepared[name]["latents"] for name in order.inputs]

    def whole_images(self, order: Order, pixels: list[Pixels]) -> list[Pixels]:
        assert order.tiling
        tiles = len(order.places)
        return [order.tiling.blend(pixels[first : first + tiles]) for first in range(0, len(pixels), tiles)]


TASK = _Upscaling()
