"""The gate before publishing: every compiled part and the whole road against torch in float32, or no bundle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdiff.components import Components, Size
from flashdiff.engines.bundle import Precision
from flashdiff.engines.parts import Part, random_inputs, run_torch
from flashdiff.engines.runtime.engine import Engine
from flashdiff.errors import BundleError
from flashdiff.families.base import TorchModel
from flashdiff.generate import check_order, decode_rows, denoise_rows, encode_prompts, new_row, unconditional_of

PART_ERROR: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}
"""Largest difference of a part's output to torch that is allowed, in units of that output's root mean square (at least 1)."""
IMAGE_ERROR: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest root mean square difference of a whole image in [-1, 1]: 0.005 is 52 dB, 0.03 is 36 dB."""
_EXACT = ("openvino", "onnxruntime")

Outputs = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Findings:
    """What a bundle that passed is known to do."""

    errors: dict[str, float]
    """By part, and for `image`."""
    allowed: dict[str, float]
    rows_are_exact: bool


def verify(model: TorchModel, parts: list[Part], engine: Engine) -> Findings:
    """Compare at every batch size and image size, on random inputs whose rows all differ; BundleError names what is wrong.

    Values must be finite and of the type asked for, identical rows must stay identical, and in float32 on a CPU a row must
    not depend, bit for bit, on its batch.
    """
    precision, machine = engine.manifest.precision, engine.manifest.machine
    must_be_exact = engine.manifest.backend in _EXACT and precision == "fp32" and machine.device == "cpu"
    allowed = {**{part.name: PART_ERROR[precision] for part in parts}, "image": IMAGE_ERROR[precision]}
    errors, are_exact = {}, True
    for part in parts:
        errors[part.name], is_exact = _check_part(model, part, engine, allowed[part.name])
        if must_be_exact and not is_exact:
            raise BundleError(f"{part.name}: a row changes with its batch; the bundle is not published")
        are_exact = are_exact and is_exact
    errors["image"] = max(_image_error(model, engine, size) for size in engine.spec.sizes)
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise BundleError(
                f"{name} differs from torch by {error:.2e}, more than {allowed[name]:.0e}; the bundle is not published"
            )
    return Findings(errors, allowed, are_exact)


def _check_part(model: TorchModel, part: Part, engine: Engine, allowed: float) -> tuple[float, bool]:
    """The worst error of a part over all its buckets, and whether its rows are exact."""
    generator = torch.Generator().manual_seed(1)
    worst, are_exact = 0.0, True
    for size in engine.spec.sizes if engine.manifest.parts[part.name].is_spatial else engine.spec.sizes[:1]:
        for batch in engine.manifest.batch_sizes:
            where = f"batch {batch}, {size}"
            inputs = random_inputs(model, part, batch, size, generator)
            expected = {name: values.numpy() for name, values in run_torch(part, inputs).items()}
            got = call(engine, part, [values.numpy() for values in inputs])
            _check_kind(part, got, expected, where)
            worst = max(worst, difference(got, expected))
            alone = call(engine, part, [values[-1:].numpy() for values in inputs])
            repeated = call(engine, part, [np.repeat(values[-1:].numpy(), batch, axis=0) for values in inputs])
            _check_repeated(part, repeated, allowed, where)
            last = {name: values[-1:] for name, values in got.items()}
            first = {name: np.broadcast_to(values[:1], values.shape) for name, values in repeated.items()}
            are_exact = are_exact and _equal(last, alone) and _equal(repeated, first)
    return worst, are_exact


def call(engine: Engine, part: Part, inputs: list[NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """One part of the engine on raw inputs, at the bucket that fits."""
    return engine.run_part(part.name, dict(zip((tensor.name for tensor in part.inputs), inputs, strict=True)))


def difference(got: Outputs, expected: Outputs) -> float:
    """Largest difference over the outputs, each in units of its root mean square where that is above 1."""

    def of(name: str) -> float:
        scale = max(1.0, float(np.sqrt(np.mean(np.square(expected[name], dtype=np.float64)))))
        return float(np.abs(got[name] - expected[name]).max()) / scale

    return max(map(of, expected))


def _check_kind(part: Part, got: Outputs, expected: Outputs, where: str) -> None:
    for tensor in part.outputs:
        values, wanted = got[tensor.name], expected[tensor.name]
        if values.shape != wanted.shape or values.dtype != tensor.dtype:
            found = f"{values.dtype} {list(values.shape)}"
            raise BundleError(
                f"{part.name} returned {found} as {tensor.name}, not {tensor.dtype} {list(wanted.shape)}, at {where}"
            )
        if not np.isfinite(values).all():
            raise BundleError(f"{part.name} returned values that are not finite at {where}; the bundle is not published")


def _check_repeated(part: Part, repeated: Outputs, allowed: float, where: str) -> None:
    """NVIDIA/TensorRT#4813 and its like: identical rows of one batch that come out different."""
    spread = difference(repeated, {name: np.broadcast_to(values[:1], values.shape) for name, values in repeated.items()})
    if not spread <= allowed:
        raise BundleError(f"{part.name}: identical rows differ by {spread:.2e} at {where}; the bundle is not published")


def _equal(one: Outputs, other: Outputs) -> bool:
    return all(np.array_equal(values, other[name]) for name, values in one.items())


def _image_error(model: TorchModel, engine: Engine, size: Size) -> float:
    """The whole road, torch and engine step for step from the same latents: root mean square difference of the images."""

    def image(components: Components) -> NDArray[np.float32]:
        order = check_order(engine.spec, prompt="a picture", seed=1, steps=min(4, engine.spec.sampler.max_steps), size=size)
        conditioning = encode_prompts(components, [order.prompt])[0]
        row = new_row(engine.spec, order, 0, conditioning, unconditional_of(components))
        while not row.is_done:
            denoise_rows(components, [row])
        decode_rows(components, [row])
        return components.decode(row.latents[None])

    return float(np.sqrt(np.mean(np.square(image(model) - image(engine)))))
