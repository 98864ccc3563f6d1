"""torch's outputs for random inputs and a whole image, kept so that its weights are released before an engine's are loaded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.components import Components, ModelSpec, Size
from flashdiff.engines.parts import Part, no_reduced_precision, random_inputs, run_torch
from flashdiff.families.base import TorchModel
from flashdiff.generate import decode_rows, prepare, unconditional_of
from flashdiff.orders import Pixels
from flashdiff.references import ENCODER, ReferenceRequest, takes_reference
from flashdiff.rows import denoise_rows, start_rows
from flashdiff.tasks import check_order
from flashdiff.tasks.samples import needed_inputs

Outputs = Mapping[str, NDArray[np.float32]]

_ACTIVATION_BYTES = 8 << 30  # SDXL's decoder takes some 5 GiB in float32, an image of 1024x1024 at a time


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
    plain: tuple[Case, ...]
    """The denoiser that reads a reference, where there is one: outputs of the same denoiser without its IP-Adapter."""
    images: dict[Size, NDArray[np.float32]]
    """What `sample_image` makes at every size."""


def run_reference(model: TorchModel, parts: Sequence[Part], batch_sizes: Sequence[int]) -> Reference:
    """Every part at every size and batch size, and an image at every size; the model is in float32.

    It runs on the GPU if there is one with enough memory: at real size a CPU takes minutes, a GPU a second. The model is
    on the CPU before and after.
    """
    generator = torch.Generator().manual_seed(1)
    cases, plain = list[Case](), list[Case]()
    with on_gpu(parts):
        for part in parts:
            for size in model.spec.sizes_of(part.name) if part.is_spatial else model.spec.sizes[:1]:
                for batch in batch_sizes:
                    inputs = [values.cpu() for values in random_inputs(model, part, batch, size, generator)]
                    named = {tensor.name: values.numpy() for tensor, values in zip(part.inputs, inputs, strict=True)}
                    cases.append(Case(part.name, size, batch, named, _row_by_row(part, inputs)))
                    if model.ip_adapter and part.module is model.denoiser:
                        *own, _, _ = inputs  # all but the tokens and their scale
                        without = replace(part, module=model.ip_adapter.without)
                        plain.append(Case(part.name, size, batch, named, _row_by_row(without, own)))
        images = {size: sample_image(model, model.spec, size) for size in model.spec.sizes}
    return Reference(tuple(cases), tuple(plain), images)


def _row_by_row(part: Part, inputs: Sequence[Tensor]) -> Outputs:
    """A part's outputs for a batch whose rows are run alone: they do not see each other, and it takes the memory of one."""
    place = next(part.module.parameters()).device
    rows = [run_torch(part, tuple(values.to(place) for values in row)) for row in zip(*(x.split(1) for x in inputs), strict=True)]
    return {tensor.name: torch.cat([row[tensor.name] for row in rows]).cpu().numpy() for tensor in part.outputs}


@contextmanager
def on_gpu(parts: Sequence[Part]) -> Iterator[None]:
    """Within the context, these modules are on the GPU if it has memory for them and their activations."""
    weights = {id(values): values for part in parts for values in part.module.parameters()}  # parts share some
    needed = sum(values.nbytes for values in weights.values()) + _ACTIVATION_BYTES
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < needed:
        yield
        return
    no_reduced_precision()
    try:
        for part in parts:
            part.module.to("cuda")
        yield
    finally:
        for part in parts:
            part.module.to("cpu")
        torch.cuda.empty_cache()


def sample_reference(spec: ModelSpec) -> ReferenceRequest | None:
    """A picture of color gradients, of the size that the model's image encoder reads; None for a model that takes none."""
    if not takes_reference(spec):
        return None
    side = spec.part(ENCODER).side or 1
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    rows, columns = np.meshgrid(ramp, ramp, indexing="ij")
    return ReferenceRequest(image=np.stack([rows, columns, 255 - rows], axis=-1), scale=0.5)


def sample_image(
    components: Components,
    spec: ModelSpec,
    size: Size,
    *,
    prompt: str = "a picture",
    seed: int = 1,
    steps: int | None = None,
    inputs: Mapping[str, Pixels] | None = None,
) -> NDArray[np.float32]:
    """One image [1, 3, H, W], step for step as a request goes, not clipped; in up to four steps where `steps` is None.

    A model that takes a reference gets `sample_reference`; `inputs` are images for `size`, which choose the task: none are those
    that the model needs, so most make an image of the prompt alone.
    """
    inputs = inputs or needed_inputs(spec, size)
    steps, reference = steps or min(4, spec.sampler.max_steps), sample_reference(spec)
    order = check_order(spec, prompt=prompt, seed=seed, steps=steps, size=size, inputs=inputs, reference=reference)
    preparations = order.task.preparations(spec, order)
    prepared = {name: prepare(components, given.part, [given.value])[0] for name, given in preparations.items()}  # type: ignore[arg-type]
    (row,) = start_rows(spec, order, prepared, unconditional_of(components))
    while not row.is_done:
        denoise_rows(components, [row])
    return decode_rows(components, [row])
