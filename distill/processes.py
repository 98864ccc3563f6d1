"""One run in one process or in many: who computes which rows, and how the processes agree.

Accelerate says where this process runs (`accelerate launch`, torchrun, or alone); the same recipe then gives the same
losses in any number of processes, because every random number is drawn for the whole batch and each takes its rows.
Gradients are averaged after the backward pass: what is trained is a LoRA, small beside what computes it.
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
    # Asked for an accelerator that is not there, accelerate would run every process of a launch on its own.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def index() -> int:
    """This process's number; 0 writes files."""
    return int(_state().process_index)


def count() -> int:
    return int(_state().num_processes)


def is_main() -> bool:
    return index() == 0


def device() -> torch.device:
    return torch.device(_state().device)


def precision() -> torch.dtype:
    """What networks compute in and the cache holds: bfloat16 on GPUs that have it, else float32."""
    has_it = device().type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_it else torch.float32


def wait() -> None:
    """Until all processes are here."""
    _state().wait_for_everyone()


def main_first(act: Callable[[], object]) -> None:
    """`act` in the main process, then in the others, which find what it made."""
    with _state().main_process_first():
        act()


def union(found: Mapping[Any, Any]) -> dict[Any, Any]:
    """What any process found."""
    if count() == 1:
        return dict(found)
    gathered: list[Any] = [None] * count()
    torch.distributed.all_gather_object(gathered, dict(found))
    return {key: value for one in gathered for key, value in one.items()}


def rows(total: int, parts: int = 1) -> list[slice]:
    """This process's rows of a batch of `total`, in as many parts; ConfigError when they do not divide it."""
    if total % (count() * parts):
        raise ConfigError(
            f"batch_size {total} cannot be split over {count()} processes in {parts} parts each; "
            f"make it a multiple of {count() * parts}"
        )
    size = total // (count() * parts)
    start = index() * size * parts
    return [slice(start + part * size, start + (part + 1) * size) for part in range(parts)]


def gather(values: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, in order, on the CPU; every process gives as many."""
    if count() == 1:
        return values.cpu()
    gathered = [torch.empty_like(values) for _ in range(count())]
    torch.distributed.all_gather(gathered, values.contiguous())
    return torch.cat(gathered).cpu()


def mean(values: Tensor) -> Tensor:
    """The average over the processes."""
    if count() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
        values /= count()
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its average over the processes, in one message."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Draws:
    """Random numbers for a whole batch of `total` samples, of which this part of it takes its `rows`."""

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
