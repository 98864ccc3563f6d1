"""The parts of a bundle as torch modules with flat, named tensors: what is exported, what torch runs, what is compared."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashdiff.components import Size
from flashdiff.engines.bundle import Precision, TensorSpec, is_spatial
from flashdiff.families.base import ModelFamily, TorchModel

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

    @property
    def is_spatial(self) -> bool:
        """Whether its inputs depend on the image's size."""
        return is_spatial(self.inputs)


def parts_of(family: ModelFamily, model: TorchModel) -> list[Part]:
    """The parts of a bundle, in the order of `bundle.PARTS`."""
    spec = model.spec
    states = [
        TensorSpec(name=name, dtype="float32", shape=("batch", *values.shape[1:]))
        for name, values in model.encode_ids(model.tokenizer([""])).items()
    ]
    latents = TensorSpec(name="latents", dtype="float32", shape=("batch", spec.latent_channels, "height", "width"))
    images = TensorSpec(name="images", dtype="float32", shape=("batch", 3, "image_height", "image_width"))
    return [
        Part(
            "text_encoder",
            model.text_encoder,
            tuple(TensorSpec(name=t.name, dtype="int64", shape=("batch", t.length)) for t in spec.tokenizers),
            tuple(states),
        ),
        Part("encoder", model.encoder, (images,), (latents,)),
        Part(
            "denoiser",
            model.denoiser,
            (latents, TensorSpec(name="times", dtype="int64", shape=("batch",)), *states),
            (TensorSpec(name="output", dtype="float32", shape=latents.shape),),
            float32_inputs=family.float32_inputs,
            fixed_size=family.fixed_size,
        ),
        Part("decoder", model.decoder, (latents,), (images,)),
    ]


class AtPrecision(nn.Module):
    """A part that computes in a lower precision and is float32 outside, so that callers need not know.

    Weights are cast where they lie, so that a large part is never held twice; buffers (tables of noise levels and positions)
    are not: float16 has no 999.5.
    """

    def __init__(self, part: Part, precision: Precision) -> None:
        super().__init__()
        self.module, self._dtype = part.module, DTYPES[precision]
        self._cast = [t.dtype == "float32" and t.name not in part.float32_inputs for t in part.inputs]
        for parameter in part.module.parameters():
            parameter.data = parameter.data.to(self._dtype)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.module(*(x.to(self._dtype) if cast else x for x, cast in zip(inputs, self._cast, strict=True)))
        return tuple(values.float() for values in outputs) if isinstance(outputs, tuple) else outputs.float()


def random_inputs(model: TorchModel, part: Part, batch: int, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Inputs of the kinds a part is really given, every row another: token ids that end in padding, uniform pixels, normal
    latents, the conditioning of such ids, and times from the clean end to the noisiest, a few-step student's own if it is one."""
    ids = {}
    for tokenizer in model.spec.tokenizers:
        rows = torch.randint(3, 200, (batch, tokenizer.length), generator=generator)
        ends = torch.randint(2, tokenizer.length + 1, (batch, 1), generator=generator)
        ids[tokenizer.name] = torch.where(torch.arange(tokenizer.length) < ends, rows, tokenizer.pad_id)
    if part.name == "text_encoder":
        return tuple(ids.values())
    times = model.spec.sampler.known_times or range(model.spec.sampler.schedule.num_train_timesteps)
    known: dict[str, Tensor] = {
        "latents": torch.randn(batch, *model.spec.latent_shape(size), generator=generator),
        "times": torch.tensor(times)[torch.linspace(0, len(times) - 1, batch).round().long()],
    }
    if part.name == "encoder":
        known["images"] = 2 * torch.rand(batch, 3, size.height, size.width, generator=generator) - 1
    if part.name == "denoiser":
        known |= model.encode_ids({name: values.numpy() for name, values in ids.items()})
    return tuple(known[tensor.name] for tensor in part.inputs)


def no_reduced_precision() -> None:
    """On a GPU give no precision away beyond the one asked for: left alone, float32 convolutions round their inputs to ten bits
    (TF32), and matrix products in float16 and bfloat16 may add up in these."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def run_torch(part: Part, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    """The reference: a part's outputs by name."""
    with torch.no_grad():
        outputs = part.module(*inputs)
    return dict(zip((t.name for t in part.outputs), outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
