"""The branches of the teacher's guidance: what each evaluation of a step reads, and their weighted sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdiff.prediction import guided_output

Network = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(latents [B, C, h, w], times [B], conditioning) -> raw output."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """The first branch reads all conditions of a sample; each further one has others in the place of some."""

    contrasts: tuple[Mapping[str, Tensor], ...]
    """Of each further branch what stands in the place of the sample's own [1, ...], by name: at most as large as these, and
    repeated. Empty: the network takes its guidance as an input."""
    weights: Callable[[Tensor], tuple[Tensor, ...]]
    """The weights of all branches at guidance scales."""
    keeps_norm: bool = False
    """See `Sampler`."""
    rescale: float = 0.0
    """How far guided outputs get the deviation of the conditional ones."""

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 + len(self.contrasts)

    @property
    def are_an_input(self) -> bool:
        """Whether the network takes the guidance scale as an input, so that one evaluation is guided."""
        return not self.contrasts

    def evaluations(self, guidance: float) -> int:
        """Evaluations of a step at a guidance scale: one where no branch but the first has a weight."""
        return self.count if self._are_needed(torch.tensor([guidance])) else 1

    def output(
        self, network: Network, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> Tensor:
        """The network's output [B, C, h, w], guided at the scales `guidance` [B]; one evaluation where no sample needs others."""
        if not self._are_needed(guidance):
            return network(latents, times, conditioning)
        return self.joined(self.outputs(network, latents, times, conditioning), guidance)

    def outputs(self, network: Network, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> list[Tensor]:
        """Every branch's output [B, C, h, w], in one evaluation of so many times the batch."""
        rows = {
            name: torch.cat([values, *(contrast.get(name, values).expand_as(values) for contrast in self.contrasts)])
            for name, values in conditioning.items()
        }
        return list(network(latents.repeat(self.count, 1, 1, 1), times.repeat(self.count), rows).chunk(self.count))

    def joined(self, outputs: list[Tensor], guidance: Tensor) -> Tensor:
        """The guided output of those of all branches [B, C, h, w], at the scales [B]."""
        return guided_output(outputs, self._weights(guidance), keeps_norm=self.keeps_norm, rescale=self.rescale)

    def _are_needed(self, guidance: Tensor) -> bool:
        """Whether some sample's scale gives a weight to a branch after the first."""
        return not self.are_an_input and any(bool(weight.any()) for weight in self._weights(guidance)[1:])

    def _weights(self, guidance: Tensor) -> tuple[Tensor, ...]:
        """Of every branch [B, 1, 1, 1]; scales up to 1 mean no guidance by the prompt."""
        return self.weights(guidance.clamp(min=1).view(-1, 1, 1, 1))
