"""A part to machine code by AOTInductor: a package a bucket, and next to them the weights, once.

A package depends on the graph alone, not on the weights, so that a model that was trained anew takes its packages from the cache.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._inductor import aoti_compile_and_package
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from flashdiff.components import Size
from flashdiff.engines.backends.torch import WEIGHTS
from flashdiff.engines.bundle import BuildInputs, Machine, PartFile
from flashdiff.engines.cache import cached, key_of
from flashdiff.engines.export import trace
from flashdiff.engines.folding import fold_decoder
from flashdiff.engines.parts import Part
from flashdiff.engines.shapes import bucket_shapes, dimensions_of
from flashdiff.errors import BackendError, first_line
from flashdiff.families.base import TorchModel

_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.dynamic_threads": True,  # otherwise a package keeps the number of threads of its build
    # Otherwise it keeps the values of tensors with one element, or one axis of up to 8: a cached package would have old biases.
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
}


def _options(machine: Machine) -> dict[str, Any]:
    """Inductor's settings. On x86 the code has the instructions of a level that the machine's features name: by default it has
    all of the compiling processor, which no bundle could check."""
    if not machine.system.endswith("x86_64"):
        return _OPTIONS
    level = 4 if "avx512f" in machine.features else 3 if "avx2" in machine.features else 2
    return {**_OPTIONS, "cpp.march": f"x86-64-v{level}"}


def compile_parts(
    model: TorchModel, parts: Sequence[Part], folder: Path, inputs: BuildInputs, report: Callable[[str], None]
) -> dict[str, tuple[PartFile, ...]]:
    """Write the packages and weights of every part into `folder`, and return each part's packages, relative to it.

    BackendError when torch cannot trace or compile one. Below float32 the model's weights are cast.
    """
    files = {}
    for part in reversed(parts):  # below float32 tracing casts its part, and the text encoder makes the denoiser's example
        if inputs.machine.device == "cpu":  # as when it runs as it is
            fold_decoder(model, part)
        try:
            files[part.name] = tuple(_compile(model, part, folder, inputs, report))
        except BackendError:
            raise
        except Exception as error:  # torch's own, of many kinds
            raise BackendError(f"--compile: torch cannot compile {part.name}: {first_line(error)}") from error
    return files


def _compile(
    model: TorchModel, part: Part, folder: Path, inputs: BuildInputs, report: Callable[[str], None]
) -> Iterator[PartFile]:
    sizes: tuple[Size | None, ...] = inputs.model.sizes_of(part.name) if part.is_spatial else (None,)
    for graph in sizes if part.fixed_size else (None,):
        place = Path(part.name, str(graph) if graph else "")
        (folder / place).mkdir(parents=True)
        program = trace(model, part, graph or inputs.sizes[0], inputs.precision)
        weights: dict[str, Tensor] = {}
        for size in (graph,) if graph else sizes:
            for batch in inputs.batch_sizes:
                bucket = at_bucket(program, part, dimensions_of(inputs.model, size, batch), inputs.machine.device)
                _add_weights(weights, bucket)
                file = f"batch{batch}.pt2" if size is None else f"batch{batch}-{size}.pt2"

                def make(target: Path, bucket: ExportedProgram = bucket, file: str = file) -> None:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # torch warns about its own code
                        aoti_compile_and_package(
                            bucket, package_path=str(target / file), inductor_configs=_options(inputs.machine)
                        )

                found = cached(key_of(f"torch-{part.name}", {"file": file} | _deciding(bucket, inputs)), make, folder / place)
                report(f"compiled {part.name} at batch {batch}{f', {size}' if size else ''}{', from the cache' if found else ''}")
                yield PartFile(file=(place / file).as_posix(), size=size, batch=batch)
        save_file(weights, folder / place / WEIGHTS)


def at_bucket(program: ExportedProgram, part: Part, dimensions: Mapping[str, int], device: str) -> ExportedProgram:
    """A part's open graph at one fixed shape, on a device."""
    module = program.module(check_guards=False)
    module._forward_pre_hooks.clear()  # which would refuse a batch of one, since the example was a batch of two
    shapes = bucket_shapes(part.inputs, dimensions)
    zeros = tuple(torch.zeros(shapes[tensor.name], dtype=getattr(torch, tensor.dtype)) for tensor in part.inputs)
    with torch.no_grad():
        fixed = torch.export.export(module, zeros, strict=False)
    return fixed if device == "cpu" else move_to_device_pass(fixed, device)


def _tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """The weights and constants that a program reads, under its names for them."""
    held = {**program.state_dict, **program.constants}
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    names = {spec.target for spec in program.graph_signature.input_specs if spec.arg.name in used and spec.target}
    return {name: values for name, values in held.items() if name in names}


def _add_weights(weights: dict[str, Tensor], program: ExportedProgram) -> None:
    """A name means the same in every bucket: they are of one module."""
    for name, values in _tensors(program).items():
        if name not in weights:
            weights[name] = values.detach().cpu().clone(memory_format=torch.contiguous_format)
        elif not torch.allclose(weights[name], values.cpu(), rtol=0, atol=0, equal_nan=True):  # tables of times end in NaN
            raise BackendError(f"--compile: '{name}' differs from bucket to bucket")


def _deciding(program: ExportedProgram, inputs: BuildInputs) -> dict[str, Any]:
    """What decides a package's content."""
    return {
        "graph": hashlib.sha256(f"{program.graph}\n{program.graph_signature}".encode()).hexdigest(),
        "shapes": [str(node.meta.get("val")) for node in program.graph.nodes if node.op == "placeholder"],
        "tensors": [[name, str(values.dtype), [*values.shape]] for name, values in _tensors(program).items()],
        "torch": torch.__version__,
        "options": _options(inputs.machine),
        "machine": inputs.machine.model_dump(mode="json"),
    }
