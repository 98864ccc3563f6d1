"""The gate before publishing: every compiled part and the whole road against torch, or no bundle."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdiff.components import Components
from flashdiff.engines.export import Part, random_inputs
from flashdiff.engines.runtime.engine import Engine
from flashdiff.errors import BundleError
from flashdiff.families.base import TorchModel
from flashdiff.generate import check_order, decode_rows, denoise_rows, encode_prompts, new_row, unconditional_of

MAX_ERROR = 1e-4
"""Largest absolute difference to torch in float32; outputs are of order one."""


def verify(model: TorchModel, parts: list[Part], engine: Engine) -> dict[str, float]:
    """Largest error by part and for `image`; BundleError names the first thing that is wrong.

    Random inputs at every batch size and image size, every row at another time; values must be finite, a row of a batch
    must equal the row alone, and identical rows must give identical results.
    """
    errors = {part.name: _part_error(model, part, engine) for part in parts}
    errors["image"] = _image_error(model, engine)
    for name, error in errors.items():
        if not error <= MAX_ERROR:
            raise BundleError(f"{name} differs from torch by {error:.2e}, more than {MAX_ERROR:.0e}; the bundle is not published")
    return errors


def _part_error(model: TorchModel, part: Part, engine: Engine) -> float:
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for size in engine.spec.sizes:
        _, height, width = engine.spec.latent_shape(size)
        for batch in engine.manifest.batch_sizes:
            inputs = random_inputs(part, {"batch": batch, "height": height, "width": width}, generator)
            with torch.no_grad():
                expected = part.module(*inputs)
            got = call(engine, part, [values.numpy() for values in inputs])
            for name, values in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
                if not np.isfinite(got[name]).all():
                    raise BundleError(f"{part.name} returned values that are not finite at batch {batch}, {size}; not published")
                worst = max(worst, float(np.abs(got[name] - values.numpy()).max()))
            _check_rows(part, engine, [values.numpy() for values in inputs], got)
    return worst


def _check_rows(part: Part, engine: Engine, inputs: list[NDArray[Any]], got: dict[str, NDArray[np.float32]]) -> None:
    """NVIDIA/TensorRT#4813 and its like: rows of one batch must not depend on their place or company."""
    alone = call(engine, part, [values[-1:] for values in inputs])
    repeated = call(engine, part, [np.repeat(values[-1:], len(values), axis=0) for values in inputs])
    for name, values in got.items():
        if not (np.array_equal(values[-1:], alone[name]) and (repeated[name] == repeated[name][:1]).all()):
            raise BundleError(f"{part.name}: a row changes with its batch (batch {len(values)}); the bundle is not published")


def call(engine: Engine, part: Part, inputs: list[NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """One part of the engine on raw inputs, at the bucket that fits."""
    return engine.run_part(part.name, dict(zip((tensor.name for tensor in part.inputs), inputs, strict=True)))


def _image_error(model: TorchModel, engine: Engine) -> float:
    """The whole road, torch and engine step for step from the same latents, as float images."""

    def image(components: Components) -> NDArray[np.float32]:
        order = check_order(engine.spec, prompt="a picture", seed=1, steps=min(4, engine.spec.sampler.max_steps))
        conditioning = encode_prompts(components, [order.prompt])[0]
        row = new_row(engine.spec, order, 0, conditioning, unconditional_of(components))
        while not row.is_done:
            denoise_rows(components, [row])
        decode_rows(components, [row])
        return components.decode(row.latents[None])

    return float(np.abs(image(model) - image(engine)).max())
