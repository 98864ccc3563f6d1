"""One run in one process or in many: which rows each process computes, and how the processes exchange results.

Accelerate finds out where this process runs (`accelerate launch`, torchrun, or alone). The same recipe gives the same losses
in any number of processes, because random numbers are drawn for the whole batch and each process takes those of its rows.
Gradients are averaged after the backward pass.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from flashdiff.errors import ConfigError


def _state() -> PartialState:
    # Without an accelerator and without cpu=True, accelerate would run each process of a launch as a run of its own.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def index() -> int:
    """This process's number, from 0; process 0 writes the files."""
    return int(_state().process_index)


def count() -> int:
    """The number of processes in the run."""
    return int(_state().num_processes)


def is_main() -> bool:
    """Whether this is process 0."""
    return index() == 0


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device(_state().device)


def precision() -> torch.dtype:
    """The type that networks compute in and the cache of embeddings holds: bfloat16 on GPUs that support it, else float32."""
    is_supported = device().type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if is_supported else torch.float32


def wait() -> None:
    """Block until all processes have called this."""
    _state().wait_for_everyone()


def main_first(act: Callable[[], object]) -> None:
    """Call `act` in the main process, and then in the others, which find its results on disk."""
    with _state().main_process_first():
        act()


def union(found: Mapping[Any, Any]) -> dict[Any, Any]:
    """The items of all processes' mappings, in every process."""
    if count() == 1:
        return dict(found)
    gathered: list[Any] = [None] * count()
    torch.distributed.all_gather_object(gathered, dict(found))
    return {key: value for one in gathered for key, value in one.items()}


def check_split(batch_size: int, accumulate: int, *, shard_base: bool) -> None:
    """ConfigError when a recipe with these values cannot run in this number of processes."""
    rows(batch_size, accumulate)
    if shard_base and count() == 1:
        raise ConfigError("shard_base spreads the network over processes, this run has one: start more, or leave it out")


def rows(total: int, parts: int = 1) -> list[slice]:
    """This process's rows of a batch of `total`, as `parts` slices of equal size; ConfigError when they do not divide it."""
    if total % (count() * parts):
        each = f" in {parts} parts each" if parts > 1 else ""
        raise ConfigError(
            f"batch_size {total} cannot be split over {count()} processes{each}; make it a multiple of {count() * parts}"
        )
    size = total // (count() * parts)
    start = index() * size * parts
    return [slice(start + part * size, start + (part + 1) * size) for part in range(parts)]


def gather(values: Tensor) -> Tensor:
    """The rows of all processes [count * n, ...], in their order, on the CPU; each process passes `values` [n, ...]."""
    if count() == 1:
        return values.cpu()
    gathered = [torch.empty_like(values) for _ in range(count())]
    torch.distributed.all_gather(gathered, values.contiguous())
    return torch.cat(gathered).cpu()


def mean(values: Tensor) -> Tensor:
    """`values` [...] averaged over the processes."""
    if count() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
        values /= count()
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its average over the processes: those of a LoRA in one all-reduce, of a network in several."""
    if count() == 1:
        return
    bucket: list[Tensor] = []
    values = 0
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        values += gradient.numel()
        if bucket and values > _BUCKET:
            _average(bucket)
            bucket, values = [], gradient.numel()
        bucket.append(gradient)
    if bucket:
        _average(bucket)


_BUCKET = 2**27
"""Values that are sent at once: half a GiB, for which there has to be room twice."""


def _average(gradients: list[Tensor]) -> None:
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Draws:
    """Random numbers drawn for a whole batch of `total` samples, so that they do not depend on how it is split.

    Each draw returns those of `rows`, all by default, on the device `to`, the CPU by default.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: slice | None = None, to: torch.device | None = None) -> None:
        self._generator, self._total, self._rows = generator, total, rows or slice(None)
        self._device = to or torch.device("cpu")

    def normal(self, shape: Iterable[int]) -> Tensor:
        """[rows, *shape], standard normal."""
        return torch.randn((self._total, *shape), generator=self._generator)[self._rows].to(self._device)

    def uniform(self) -> Tensor:
        """[rows] in [0, 1)."""
        return torch.rand(self._total, generator=self._generator)[self._rows].to(self._device)

    def integers(self, low: int, high: int) -> Tensor:
        """[rows] in low .. high - 1."""
        return torch.randint(low, high, (self._total,), generator=self._generator)[self._rows].to(self._device)
