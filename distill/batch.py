"""The data of one update: samples with the teacher's targets, and the micro-batches that a process evaluates."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flashdiff.distill.processes import Draws


@dataclass(frozen=True)
class Targets:
    """What the student learns from: noisy latents and the teacher's solution from each. Without gradients."""

    z0: Tensor  # [N, C, h, w], latents of the real images; the teacher's solutions where there are only prompts
    x_t: Tensor  # [N, C, h, w]
    times: Tensor  # [N]
    conditioning: Mapping[str, Tensor]  # [N, ...]
    x0: Tensor  # [N, C, h, w]
    variance: Tensor  # [C], of the pool's solutions, by channel


@dataclass(frozen=True)
class MicroBatch:
    """The rows of a batch that one process evaluates at a time, with the student's answer to them."""

    targets: Targets  # B samples
    x0: Tensor  # [B, C, h, w], the student's
    draws: Draws

    def detached(self) -> "MicroBatch":
        """The same rows without the student's gradient; the random stream continues."""
        return MicroBatch(self.targets, self.x0.detach(), self.draws)
