"""A torch model's parts to ONNX: one graph each, named tensors, dynamic batch and size, weights beside the graph."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from flashdiff.engines.bundle import PartSpec, TensorSpec
from flashdiff.errors import BackendError, first_line
from flashdiff.families.base import TorchModel

_EXAMPLE_BATCH = 2  # with 1, torch.export would fix the batch to 1


@dataclass(frozen=True)
class Part:
    """A module and its tensors, ready to export. Shapes name their dynamic dimensions."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def parts_of(model: TorchModel) -> list[Part]:
    """The parts of a bundle, in the order of `bundle.PARTS`."""
    spec = model.spec
    states = [
        TensorSpec(name=name, dtype="float32", shape=("batch", *values.shape[1:]))
        for name, values in model.encode_ids(model.tokenizer([""])).items()
    ]
    latents = TensorSpec(name="latents", dtype="float32", shape=("batch", spec.latent_channels, "height", "width"))
    return [
        Part(
            "text_encoder",
            model.text_encoder,
            tuple(TensorSpec(name=t.name, dtype="int64", shape=("batch", t.length)) for t in spec.tokenizers),
            tuple(states),
        ),
        Part(
            "denoiser",
            model.denoiser,
            (latents, TensorSpec(name="times", dtype="int64", shape=("batch",)), *states),
            (TensorSpec(name="output", dtype="float32", shape=latents.shape),),
        ),
        Part(
            "decoder",
            model.decoder,
            (latents,),
            (TensorSpec(name="images", dtype="float32", shape=("batch", 3, "image_height", "image_width")),),
        ),
    ]


def random_inputs(part: Part, dimensions: dict[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Inputs of the right kinds: normal values, token ids, and times from the clean end to the noisiest, one a row."""

    def values(tensor: TensorSpec) -> Tensor:
        shape = tensor.shape_for(dimensions)
        if tensor.name == "times":
            return torch.linspace(0, 999, shape[0]).round().long()
        if tensor.dtype == "int64":
            return torch.randint(0, 200, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    return tuple(values(tensor) for tensor in part.inputs)


def export_onnx(model: TorchModel, part: Part, folder: Path) -> PartSpec:
    """Write `model.onnx` and `model.onnx.data` for a part into `folder`; the returned file name is relative to it.

    Two steps, torch.export and then the ONNX exporter, because the direct way fails on masks with a dynamic batch.
    """
    _, height, width = model.spec.latent_shape(model.spec.sizes[0])
    example = {"batch": _EXAMPLE_BATCH, "height": height, "width": width}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports the absence of torchvision, which is not needed
    inputs = random_inputs(part, example, torch.Generator().manual_seed(0))
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, name in enumerate(tensor.shape) if isinstance(name, str)} for tensor in part.inputs
    )
    try:
        program = _export(part, inputs, dynamic)
    except Exception as error:  # the exporter raises many kinds
        raise BackendError(f"{part.name} cannot be exported to ONNX: {first_line(error)}") from error
    _name_dimensions(program.model.graph, part)
    folder.mkdir(parents=True)
    program.save(folder / "model.onnx", external_data=True)
    return PartSpec(file="model.onnx", inputs=part.inputs, outputs=part.outputs)


def _export(part: Part, inputs: tuple[Tensor, ...], dynamic: tuple[dict[int, Any], ...]) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about torch's own code
        exported = torch.export.export(part.module, inputs, dynamic_shapes=dynamic, strict=False)
        return torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=[tensor.name for tensor in part.inputs],
            output_names=[tensor.name for tensor in part.outputs],
        )


def _name_dimensions(graph: Any, part: Part) -> None:
    """Give the exporter's symbols (s10, s63) the names of our dimensions, wherever they stand in the graph."""
    names: dict[str, str] = {}
    for value, tensor in zip(graph.inputs, part.inputs, strict=True):
        for axis, wanted in enumerate(tensor.shape):
            found = value.shape[axis]
            if isinstance(wanted, str) == isinstance(found, int):
                raise BackendError(
                    f"{part.name}: the export made dimension {axis} of {tensor.name} {found}, it should be {wanted}"
                )
            if isinstance(wanted, str):
                names[str(found.value)] = wanted
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(getattr(d, "value", d)), d) for d in value.shape])
