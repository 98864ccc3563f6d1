"""torch itself, the reference that always works: eager on a CPU, one captured CUDA graph per bucket on a GPU.

Its bundle holds a base directory with the LoRAs fused in, and each part runs as the module that other backends export.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.utils.logging
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.engines.bundle import Manifest
from flashdiff.engines.parts import AtPrecision, parts_of
from flashdiff.engines.runtime import bucket_shapes
from flashdiff.families import load_base

MODEL = "model"
"""The base directory within a bundle."""
_WARM_UP_RUNS = 3


def open_parts(folder: Path, manifest: Manifest) -> Callable[[str, Path, Mapping[str, int]], Any]:
    """See `flashdiff.engines.runtime.open_parts`."""
    transformers.utils.logging.disable_progress_bar()  # it would draw bars between a server's lines
    family, model = load_base(str(folder / MODEL))
    device = torch.device(manifest.machine.device)
    modules = {
        part.name: (part.module if manifest.precision == "fp32" else AtPrecision(part, manifest.precision)).to(device)
        for part in parts_of(family, model)
    }

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> Any:
        part, module = manifest.parts[name], modules[name]
        # Times and ids of zero are valid everywhere, which a warm-up on whatever memory held would not be.
        kinds = {spec.name: getattr(torch, spec.dtype) for spec in part.inputs}
        shapes = bucket_shapes(part.inputs, dimensions)
        buffers = [torch.zeros(shapes[name], dtype=kind, device=device) for name, kind in kinds.items()]
        replay = _eager(module, buffers) if device.type == "cpu" else _captured(module, buffers)

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            for spec, buffer in zip(part.inputs, buffers, strict=True):
                buffer.copy_(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])))
            # On a GPU .cpu() waits and copies; on a CPU the results are new in every call, but may be an input's own memory.
            outputs = (values.cpu().numpy() for values in replay())
            return {spec.name: values.copy() for spec, values in zip(part.outputs, outputs, strict=True)}

        return run

    return compile_part


def _eager(module: torch.nn.Module, buffers: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            outputs = module(*buffers)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def _captured(module: torch.nn.Module, buffers: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The module as one CUDA graph over fixed buffers: launched as a whole, nothing allocated per call."""
    eager = _eager(module, buffers)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants everything that is made lazily to exist already
        for _ in range(_WARM_UP_RUNS):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = eager()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay
