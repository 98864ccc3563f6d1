"""The teacher: the frozen base with guidance, its ODE solved from any grid index to the clean end, per sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdiff.prediction import Prediction, guided_output, to_x0
from flashdiff.sampling import extrapolate, ode_step, ode_weights
from flashdiff.schedule import Grid, Schedule

Network = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(latents [B, C, h, w], times [B], conditioning) -> raw output."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network with all that says how its ODE is solved."""

    network: Network
    unconditional: Mapping[str, Tensor] | None
    """What guidance contrasts the conditioning with: the same names, batch 1. None: the network takes guidance as an input."""
    grid: Grid
    schedule: Schedule
    prediction: Prediction
    keeps_norm: bool = False
    """See `Sampler`."""
    rescale: float = 0.0
    """How far guided outputs get the deviation of the conditional ones."""
    lockstep: bool = False
    """Evaluate the network K times per solution whatever the samples, because other processes must do so equally often."""

    def solve(
        self,
        x_t: Tensor,  # [B, C, h, w]
        starts: Tensor,  # [B] indices into the solver's times
        guidance: Tensor,  # [B]
        conditioning: Mapping[str, Tensor],  # [B, ...]
        *,
        max_steps: int | None = None,
    ) -> Tensor:
        """x_0 [B, C, h, w] at the end of the guided probability-flow ODE from `x_t`, by DPM-Solver++(2M).

        Sample b takes K - starts[b] steps of two evaluations (one without `unconditional`); samples that have not started yet
        cost nothing. Each sample's first step is first order, so no history leaks between samples. With `max_steps`, each
        sample takes that many at most, and the result is at the time after them.
        """
        times = self.grid.solver_times()
        levels = [torch.from_numpy(values).to(x_t) for values in self.schedule.levels([*times, -1])]
        weights = ode_weights(*self.schedule.levels(times))
        x_t, previous_x0 = x_t.clone(), x_t.clone()
        for index in range(0 if self.lockstep else int(starts.min()), len(times)):
            active = ((starts <= index) & (index < starts + (max_steps or len(times)))).nonzero().squeeze(1)
            if not len(active):
                if self.lockstep:
                    first = {name: values[:1] for name, values in conditioning.items()}
                    self.network(x_t[:1], torch.full((1,), times[index], device=x_t.device), first)
                continue
            alpha, next_alpha = (levels[0][i].view(1, 1, 1, 1) for i in (index, index + 1))
            sigma, next_sigma = (levels[1][i].view(1, 1, 1, 1) for i in (index, index + 1))
            x = x_t[active]
            chosen = {name: values[active] for name, values in conditioning.items()}
            t = torch.full((len(active),), times[index], dtype=torch.int64, device=x.device)
            output = self._guided_output(x, t, chosen, guidance[active])
            x0 = to_x0(self.prediction, output, x, alpha, sigma)
            weight = torch.where(starts[active] < index, weights[index], 0.0).view(-1, 1, 1, 1).to(x)
            x_t[active] = ode_step(x, extrapolate(x0, previous_x0[active], weight), alpha, sigma, next_alpha, next_sigma)
            previous_x0[active] = x0
        return x_t

    def _guided_output(self, x: Tensor, times: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        """The network's output, guided; scales up to 1 mean no guidance, and one evaluation where all are."""
        if self.unconditional is None or bool((guidance <= 1).all()):
            return self.network(x, times, conditioning)
        both = {name: torch.cat([values, self.unconditional[name].expand_as(values)]) for name, values in conditioning.items()}
        conditional, contrast = self.network(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        scale = guidance.clamp(min=1).view(-1, 1, 1, 1)
        return guided_output(conditional, contrast, scale, keeps_norm=self.keeps_norm, rescale=self.rescale)
