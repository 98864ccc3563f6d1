"""The second gate: an image of a build is compared with the stock diffusers pipeline of its model.

The first gate compares with our own torch model, so a setting that both ignore passes it. This one compares twice: torch in
float32, where only a mistake makes a difference, and the finished engine, at its precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components, ModelSpec, Size
from flashdiff.engines.bundle import StockComparison
from flashdiff.engines.parts import Part
from flashdiff.engines.reference import on_gpu, sample_image, sample_reference
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.verify import IMAGE_ERROR
from flashdiff.errors import BundleError, ModelError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.stock import NoStockPipeline, stock_image
from flashdiff.orders import Pixels
from flashdiff.references import read_reference
from flashdiff.tasks import trained_task
from flashdiff.tasks.samples import sample_inputs
from flashdiff.tiles import decode_tiling

STOCK_ERROR = 1e-3
"""Largest root mean square difference of torch's image to the stock pipeline's, both in float32, pixels in [-1, 1]: 66 dB.
An engine's image may be off by `IMAGE_ERROR` of its precision more."""
_PROMPT, _SEED, _STEPS = " A Red dog", 1, 2
_REMEDY = "the bundle is not published; --no-compare-stock leaves this comparison out"


@dataclass(frozen=True, kw_only=True)
class StockReference:
    """The stock pipeline's image, and how far torch's is from it."""

    made_by: str
    steps: int
    size: Size
    pixels: NDArray[np.float32]  # [3, H, W] in [-1, 1]
    torch_error: float


def run_stock(
    family: ModelFamily, model: TorchModel, folder: Path, parts: Sequence[Part], vae: Path | None = None
) -> StockReference | str:
    """The stock pipeline's image at the smallest size, or why there is none; `folder` and `vae` hold the files that it reads.

    BundleError when torch's image differs from it, or the pipeline makes none.
    """
    size, steps = _case(model.spec)
    if decode_tiling(model.spec, size):
        return f"images of {size} are decoded in tiles here, and at once by the stock pipeline"
    reference = read_reference(model.spec, sample_reference(model.spec))
    try:
        with on_gpu(parts):
            stock = stock_image(
                family,
                model,
                folder,
                vae,
                prompt=_PROMPT,
                seed=_SEED,
                steps=steps,
                size=size,
                inputs=_inputs(model.spec, size),
                reference=reference,
            )
            ours = _image(model, model.spec)
    except NoStockPipeline as reason:
        return str(reason)
    except ModelError as reason:
        raise BundleError(f"{reason}; {_REMEDY}") from None
    pixels = 2 * stock.pixels - 1
    error = _difference(ours, pixels)
    if not error <= STOCK_ERROR:
        raise BundleError(
            f"the image of the torch model differs from that of the stock {stock.made_by} by {error:.2e}, more than "
            f"{STOCK_ERROR:.0e} ({steps} steps at {size}): a setting of this base has another meaning here; {_REMEDY}"
        )
    return StockReference(made_by=stock.made_by, steps=steps, size=size, pixels=pixels, torch_error=error)


def compare_stock(expected: StockReference, engine: Engine) -> StockComparison:
    """How far the engine's image is from the stock pipeline's; BundleError when it is too far."""
    error = _difference(_image(engine, engine.spec), expected.pixels)
    allowed = STOCK_ERROR + IMAGE_ERROR[engine.manifest.precision]
    if not error <= allowed:
        raise BundleError(
            f"the engine's image differs from that of the stock {expected.made_by} by {error:.2e}, more than {allowed:.1e} "
            f"({expected.steps} steps at {expected.size}); {_REMEDY}"
        )
    return StockComparison(
        made_by=expected.made_by,
        steps=expected.steps,
        size=expected.size,
        torch_error=expected.torch_error,
        error=error,
        allowed=allowed,
    )


def _case(spec: ModelSpec) -> tuple[Size, int]:
    """The smallest size, and two steps where the model takes so many: the fewest that show its times."""
    return min(spec.sizes, key=lambda size: size.width * size.height), min(_STEPS, spec.sampler.max_steps)


def _image(components: Components, spec: ModelSpec) -> NDArray[np.float32]:
    """[3, H, W], clipped as the pipelines clip."""
    size, steps = _case(spec)
    image = sample_image(components, spec, size, prompt=_PROMPT, seed=_SEED, steps=steps, inputs=_inputs(spec, size))
    return np.clip(image[0], -1, 1)


def _inputs(spec: ModelSpec, size: Size) -> dict[str, Pixels]:
    """The images for a model that was trained for a task; none for others."""
    task = trained_task(spec)
    return sample_inputs(spec, task, size) if task else {}


def _difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(one - other))))
