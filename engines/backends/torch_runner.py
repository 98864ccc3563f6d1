"""The parts of a torch bundle, eager or compiled, as callables: one captured CUDA graph per bucket on a GPU."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.utils.logging
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.base import CompiledPart, CompilePart
from flashdiff.engines.backends.torch import ADAPTER, CONTROLS, ENCODER_FOLDER, MODEL, REFERENCE, WEIGHTS
from flashdiff.engines.backends.torch_fp8 import round_linears
from flashdiff.engines.bundle import Manifest
from flashdiff.engines.folding import fold_decoder
from flashdiff.engines.parts import AtPrecision, no_reduced_precision, parts_of
from flashdiff.engines.runtime.device import Device
from flashdiff.engines.runtime.threads import cpu_threads
from flashdiff.engines.shapes import bucket_shapes
from flashdiff.families import family_of
from flashdiff.families.control import with_controls
from flashdiff.families.ip_adapter import Found, with_adapter
from flashdiff.families.slots import layers_of, with_slots

_WARM_UP_RUNS = 3
_CHANNELS_LAST_ON_GPU = "denoiser"
"""The first letters of parts whose convolutions are in NHWC, tensor cores' own layout. On an H200 SD1.5's UNet takes 7.5 ms in
place of 10.0, but its decoder 25 in place of 20: torch's group norm wants the other layout, and turning large images over costs
more than that gains."""


Module = Callable[..., Any]


def open_parts(folder: Path, manifest: Manifest, on: Device) -> CompilePart:
    """Load the parts of a bundle onto its device; see `Backend.open_parts`."""
    no_reduced_precision()
    is_cpu = manifest.machine.device == "cpu"
    device = torch.device("cpu") if is_cpu else torch.device("cuda", on.gpu_index)
    module_of = _packages(device) if manifest.compiled else _modules(folder, manifest, device)
    threads = cpu_threads() if on.cores else None
    runners = {name: _Eager(threads) if is_cpu else _Graphs(name, device) for name in manifest.parts}

    def compile_part(name: str, file: Path, dimensions: Mapping[str, int]) -> CompiledPart:
        part, runner = manifest.parts[name], runners[name]
        shapes = bucket_shapes(part.inputs, dimensions)
        # Times and ids of zero are valid everywhere, which uninitialised memory would not be.
        buffers = [torch.zeros(shapes[spec.name], dtype=getattr(torch, spec.dtype), device=device) for spec in part.inputs]
        replay = runner.prepare(module_of(name, file), buffers)

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            with runner.context():
                for spec, buffer in zip(part.inputs, buffers, strict=True):
                    buffer.copy_(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])))
                # Copied: a graph's outputs are the same memory in every call, and on a CPU a result may be an input's own.
                outputs = [values.to("cpu", copy=True).numpy() for values in replay()]
            return {spec.name: values for spec, values in zip(part.outputs, outputs, strict=True)}

        return run

    return compile_part


def _modules(folder: Path, manifest: Manifest, device: torch.device) -> Callable[[str, Path], Module]:
    """The parts' own modules by name, for all buckets the same."""
    transformers.utils.logging.disable_progress_bar()  # it would draw bars between a server's lines
    family = family_of(folder / MODEL)
    spec = family.read_spec(folder / MODEL)
    # Parts hold the sampler's times, noise levels and guidance: those of the build, which the model's files do not say.
    model = family.load(folder / MODEL, spec.model_copy(update={"sampler": manifest.model.sampler}))
    if manifest.reference:
        place = folder / MODEL / REFERENCE
        model = with_adapter(family, model, Found(file=place / ADAPTER, encoder=place / ENCODER_FOLDER))
    controls = {control.name: folder / MODEL / CONTROLS / control.name for control in manifest.controls}
    model = with_slots(with_controls(family, model, controls), family, manifest.lora_slots, manifest.lora_rank)
    precision = find_backend(manifest.backend).rest.get(manifest.precision, manifest.precision)
    if manifest.precision == "fp8":
        round_linears(model.network, [layer.name for layer in layers_of(model, family)])
    modules = {}
    for part in parts_of(family, model):
        if device.type == "cpu":  # on a GPU it was never timed
            fold_decoder(model, part)
        module = (part.module if precision == "fp32" else AtPrecision(part, precision)).to(device)
        if _sums_exactly_in_nhwc(module) if device.type == "cpu" else part.name.startswith(_CHANNELS_LAST_ON_GPU):
            _to_channels_last(module)
        modules[part.name] = module
    return lambda name, _: modules[name]


def _packages(device: torch.device) -> Callable[[str, Path], Module]:
    """A package of `torch_compiler` for every bucket, over one copy of each part's weights."""
    from torch._inductor import aoti_load_package

    weights: dict[Path, dict[str, Tensor]] = {}

    def load(_: str, file: Path) -> Module:
        stored = file.with_name(WEIGHTS)
        if stored not in weights:
            weights[stored] = load_file(stored, device=str(device))
        held = weights[stored]
        package = aoti_load_package(
            str(file), run_single_threaded=True, device_index=-1 if device.index is None else device.index
        )
        package.load_constants({n: held[n] for n in package.get_constant_fqns()}, check_full_update=True, user_managed=True)
        return lambda *inputs, _held=held: package(*inputs)  # it has nothing but pointers to the weights

    return load


def _sums_exactly_in_nhwc(module: torch.nn.Module) -> bool:
    """Whether a CPU may run it in NHWC, in which the embedded decoder takes two thirds of the time: torch's group norm sums so
    many values without care there that it is off by 2e-4 at 512x512, and by 1e-3 at 1024x1024."""
    return not any(isinstance(layer, torch.nn.GroupNorm) for layer in module.modules())


def _to_channels_last(module: torch.nn.Module) -> None:
    """The weights of its 2-D convolutions, which decide the layout."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


@cache
def _stream(name: str, device: torch.device) -> torch.cuda.Stream:
    """The same for every model: torch has 32 streams a GPU, and would give the first ones out again."""
    return torch.cuda.Stream(device)


class _Eager:
    """Modules as they are, with so many threads, or with torch's default of them."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads

    def context(self) -> AbstractContextManager[Any]:
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # for calls of this thread, whose helpers start pinned as it is
        return nullcontext()

    def prepare(self, module: Module, buffers: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                outputs = module(*buffers)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return call


class _Graphs(_Eager):
    """A module or package as one CUDA graph a bucket, over fixed buffers: launched as a whole, nothing allocated per call.

    Parts of one name have a stream, so that two kinds of parts may run at once. A part's graphs share their memory: outputs are
    read before its next call, so no two calls of it may overlap.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream, self._pool = _stream(name, device), torch.cuda.graph_pool_handle()

    def context(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def prepare(self, module: Module, buffers: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        with torch.cuda.device(self._device):
            return self._captured(super().prepare(module, buffers))

    def _captured(self, eager: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        # On a stream of its own, and ignoring calls of other threads, because other models may run meanwhile.
        aside = _stream("capture", self._device)
        aside.wait_stream(torch.cuda.current_stream())  # which filled the buffers
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP_RUNS):  # capture wants everything that is made lazily to exist already
                eager()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            outputs = eager()
        torch.cuda.current_stream().wait_stream(aside)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay
