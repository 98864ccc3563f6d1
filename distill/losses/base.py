"""What the student's losses share: how each is built, and how an opponent of the student trains."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.distill import processes
from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.branches import Branches
from flashdiff.distill.network import Tap, levels
from flashdiff.distill.processes import Draws
from flashdiff.errors import NotFiniteError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.sampling import renoise
from flashdiff.schedule import Grid


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a loss is built from."""

    model: TorchModel
    device: torch.device
    """Where the network will compute; while losses are built, a base that is to be sharded is still on the CPU."""
    family: ModelFamily
    tap: Callable[..., Tap]
    """(shares=...) -> the taps at these blocks of the network; without, the family's own."""
    branches: Branches
    """Of the teacher's guidance."""
    grid: Grid
    guidance: tuple[float, float]
    """Range of the teacher's guidance scale."""
    seed: int
    add_adapter: Callable[[str, int], list[nn.Parameter]]
    """(name, seed) -> the parameters of another LoRA in the network, of the student's shape. Only while a loss is built."""


class Opponent:
    """What trains against the student: its parameters and their optimizer."""

    def __init__(self, name: str, description: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.name, self.description = name, description
        self.parameters, self.optimizer = list(parameters), optimizer

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def learn(self, batches: Sequence[MicroBatch], loss_of: Callable[[MicroBatch], Tensor]) -> float:
        """One optimizer step on the mean of `loss_of`, a scalar [] each, over the micro-batches and all processes.

        Returns that mean. NotFiniteError, with weights untouched, when it or the gradient is not finite.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.parameters[0].device)
        for batch in batches:
            loss = loss_of(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        processes.average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        mean = float(processes.mean(total))
        if not math.isfinite(mean) or not torch.isfinite(norm):
            raise NotFiniteError(f"{self.description}: loss {mean} or gradient norm {norm.item()} is not finite")
        self.optimizer.step()
        return mean


class StudentLoss(ABC):
    """One loss of the student in a run. A subclass adds its LoRAs when it is built, and makes all else in `start`."""

    opponent: Opponent | None = None

    def start(self) -> None:  # noqa: B027  # most losses have nothing to make
        """Called once, when all LoRAs are in the network and it may run."""

    @abstractmethod
    def loss(self, batch: MicroBatch) -> Tensor:
        """The loss of the student's x_0 [B, C, h, w]: a scalar [] without its weight. Its gradient reaches the student alone."""

    def train_opponent(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Train the opponent on the micro-batches of one update; its losses by name, for the log.

        This happens in phases that give the loss no weight too: an opponent that lags behind the student misleads it.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The opponent and its optimizer, for a checkpoint that all losses share: keys must be this loss's own."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # most losses have no state
        """Restore what `state_dict` returned from a checkpoint that all losses share."""


def renoise_alike(model: TorchModel, draws: Draws, times: Tensor, *latents: Tensor) -> list[Tensor]:
    """Each of `latents` [B, C, h, w] noised to `times` [B], all with the same noise."""
    noise = draws.normal(latents[0].shape[1:])
    alpha, sigma = levels(model, times)
    return [renoise(x, noise, alpha, sigma) for x in latents]
