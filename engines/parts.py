"""The parts of a bundle as torch modules with flat, named tensors: what is exported, what torch runs, what is compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flashdiff.components import Size
from flashdiff.engines.bundle import Precision, TensorSpec, is_spatial
from flashdiff.engines.shapes import dimensions_of
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.parts import Condition, PartSpec

_SMALL = 0.02
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """A module and its tensors, float32 or int64 whatever its precision. Shapes name their dynamic dimensions."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    float32_inputs: tuple[str, ...] = ()
    """Inputs that a lower precision leaves as they are: see `ModelFamily`."""
    fixed_size: bool = False
    """Whether one export serves one image size alone."""
    exceeds_float16: bool = False
    """Whether it stays in float32 where the precision is float16, as in its diffusers pipeline."""

    @property
    def is_spatial(self) -> bool:
        """Whether its inputs depend on the image's size."""
        return is_spatial(self.inputs)


def parts_of(family: ModelFamily, model: TorchModel) -> list[Part]:
    """The parts of a model, in the order of its spec, with the shapes of their tensors."""
    spec = model.spec
    latents = ("batch", spec.latent_channels, "height", "width")
    shapes: dict[str, tuple[int | str, ...]] = {
        "latents": latents,
        "times": ("batch",),
        "output": latents,
        "images": ("batch", 3, "image_height", "image_width"),
        **{tokenizer.name: ("batch", tokenizer.length) for tokenizer in spec.tokenizers},
        **{c.name: _image_shape(c) for c in spec.conditions if c.channels},
        **{c.name: ("batch", *c.tokens) for c in spec.conditions if c.tokens},
        **{name: ("batch", 3, part.side, part.side) for part in spec.parts if part.side for name in part.inputs},
        **{c.name: ("batch", c.values) for c in spec.conditions if c.values},
        **{c.name: ("batch",) for c in spec.conditions if c.classes},
        **{c.scale_name: ("batch",) for c in spec.conditions if c.scaled},
    }
    whole = {tokenizer.name for tokenizer in spec.tokenizers} | {c.name for c in spec.conditions if c.classes}
    whole |= {"times"} if spec.sampler.whole_times else set()

    def tensors(names: Iterable[str]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n, dtype="int64" if n in whole else "float32", shape=shapes[n]) for n in names)

    upcast = family.upcasts_vae and getattr(model.weights["vae"].config, "force_upcast", False)
    parts = []
    for part in spec.parts:
        module, inputs = model.module(part.name), tensors(part.inputs)
        if not set(part.outputs) <= shapes.keys():
            shapes |= _output_shapes(model, part, inputs)
        is_denoiser = part in spec.denoisers
        parts.append(
            Part(
                part.name,
                module,
                inputs,
                tensors(part.outputs),
                float32_inputs=family.float32_inputs if is_denoiser else (),
                fixed_size=family.fixed_size and is_denoiser,
                exceeds_float16=upcast and family.weights_of(part.name)[0] == "vae",
            )
        )
    return parts


def _image_shape(condition: Condition) -> tuple[int | str, ...]:
    if condition.is_of_pixel_size:
        return "batch", condition.channels, "image_height", "image_width"
    return "batch", condition.channels, "height", "width"


def _output_shapes(model: TorchModel, part: PartSpec, inputs: Sequence[TensorSpec]) -> dict[str, tuple[int | str, ...]]:
    """What a part gives for zeros, by name, with a dynamic batch: for outputs whose shapes do not depend on the image's size."""
    dimensions = dimensions_of(model.spec, model.spec.sizes[0], 1)
    zeros = {tensor.name: np.zeros(tensor.shape_for(dimensions), dtype=tensor.dtype) for tensor in inputs}
    return {name: ("batch", *values.shape[1:]) for name, values in model.call(part.name, zeros).items()}


class AtPrecision(nn.Module):
    """A part that computes in a lower precision and is float32 outside, so that callers need not know.

    Weights are cast where they lie, so that a large part is never held twice; buffers (tables of noise levels and positions)
    are not: float16 has no 999.5. Neither are weights that their library keeps in float32 next to float16: of T5's layers `wo`,
    whose outputs float16 cannot hold.
    """

    def __init__(self, part: Part, precision: Precision) -> None:
        super().__init__()
        self.module, self._dtype = part.module, DTYPES["fp32" if part.exceeds_float16 and precision == "fp16" else precision]
        self._cast = [t.dtype == "float32" and t.name not in (*part.float32_inputs, "times") for t in part.inputs]
        kept = _kept_in_float32(part.module) if precision == "fp16" else ()
        for parameter in part.module.parameters():
            if not any(parameter is other for other in kept):
                parameter.data = parameter.data.to(self._dtype)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The part's outputs [B, ...] as float32, of its inputs [B, ...] in their usual types."""
        outputs = self.module(*(x.to(self._dtype) if cast else x for x, cast in zip(inputs, self._cast, strict=True)))
        return tuple(values.float() for values in outputs) if isinstance(outputs, tuple) else outputs.float()


def _kept_in_float32(module: nn.Module) -> list[nn.Parameter]:
    """The weights in layers that transformers and diffusers leave in float32 when they load a model in float16."""
    return [
        parameter
        for model in module.modules()
        for name, parameter in model.named_parameters()
        if not {*(getattr(model, "_keep_in_fp32_modules", None) or ())}.isdisjoint(name.split("."))
    ]


def random_inputs(model: TorchModel, part: Part, batch: int, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Realistic inputs of a part, in its order, [batch, ...] each, with different values in every row.

    Token ids end in padding, pixels are uniform in [-1, 1], latents are normal, conditions are made by the parts from such
    inputs, scales are 1 and 0 in turns, times go from the clean end to the noisiest, and classes from the first to the last; a
    few-step student's times are its own.
    """
    spec = model.spec
    known: dict[str, Tensor] = {}
    for tokenizer in spec.tokenizers:
        rows = torch.randint(3, 200, (batch, tokenizer.length), generator=generator)
        ends = torch.randint(2, tokenizer.length + 1, (batch, 1), generator=generator)
        known[tokenizer.name] = torch.where(torch.arange(tokenizer.length) < ends, rows, tokenizer.pad_id)
    known["latents"] = torch.randn(batch, *spec.latent_shape(size), generator=generator)
    if spec.sampler.whole_times:
        times = spec.sampler.known_times or range(spec.sampler.schedule.num_train_timesteps)
        known["times"] = torch.tensor(times)[torch.linspace(0, len(times) - 1, batch).round().long()]
    else:
        known["times"] = torch.linspace(0, float(spec.sampler.times(1)[0]), batch)
    known["images"] = 2 * torch.rand(batch, 3, size.height, size.width, generator=generator) - 1
    for name, side in {name: other.side for other in spec.parts if other.side for name in other.inputs}.items():
        known[name] = 2 * torch.rand(batch, 3, side, side, generator=generator) - 1
    for condition in spec.conditions:
        if condition.name not in {tensor.name for tensor in part.inputs} or condition.name in known:
            continue
        if condition.is_of_pixel_size:
            known[condition.name] = 2 * torch.rand(batch, condition.channels, size.height, size.width, generator=generator) - 1
        elif condition.encoded:
            known[condition.name] = torch.randn(known["latents"].shape, generator=generator)
        elif condition.values:  # so that each layer's output changes by a few per cent
            known[condition.name] = _SMALL * torch.randn(batch, condition.values, generator=generator)
        elif condition.classes:
            known[condition.name] = torch.linspace(0, condition.classes - 1, batch).round().long()
        elif condition.noised:
            known[condition.name] = torch.randn(batch, condition.channels, *known["latents"].shape[2:], generator=generator)
        elif condition.part is None:
            known[condition.name] = torch.rand(
                batch, condition.channels, *known["latents"].shape[2:], generator=generator
            ).round()
        else:
            made = model.call(condition.part, {n: known[n].numpy() for n in spec.part(condition.part).inputs})
            known |= {name: torch.from_numpy(values).to(model.device) for name, values in made.items()}
    for condition in spec.conditions:
        if condition.scaled:
            known[condition.scale_name] = (torch.arange(batch) % 2 == 0).float()  # rows with it and without in turns
    return tuple(known[tensor.name] for tensor in part.inputs)


def no_reduced_precision() -> None:
    """Keep the requested precision on a GPU. By default, float32 convolutions round their inputs to ten bits (TF32), and matrix
    products in float16 and bfloat16 may accumulate in these types."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def run_torch(part: Part, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    """The reference: a part's outputs [B, ...] by name, for its inputs [B, ...] in their order, without gradients."""
    with torch.no_grad():
        outputs = part.module(*inputs)
    return dict(zip((t.name for t in part.outputs), outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
