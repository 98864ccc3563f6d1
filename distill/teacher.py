"""The teacher: the frozen base with guidance, its ODE solved from any grid index to the clean end, per sample."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdiff.distill.branches import Branches, Network
from flashdiff.prediction import Prediction, to_x0
from flashdiff.sampling import extrapolate, ode_step, ode_weights
from flashdiff.schedule import Grid, Schedule


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network with all that says how its ODE is solved."""

    network: Network
    branches: Branches
    grid: Grid
    schedule: Schedule
    prediction: Prediction
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

        Sample b takes K - starts[b] steps, with an evaluation for each branch; samples that have not started yet cost nothing.
        Each sample's first step is first order, so no history leaks between samples. With `max_steps`, each sample takes that
        many at most, and the result is at the time after them.
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
            output = self.branches.output(self.network, x, t, chosen, guidance[active])
            x0 = to_x0(self.prediction, output, x, alpha, sigma)
            weight = torch.where(starts[active] < index, weights[index], 0.0).view(-1, 1, 1, 1).to(x)
            x_t[active] = ode_step(x, extrapolate(x0, previous_x0[active], weight), alpha, sigma, next_alpha, next_sigma)
            previous_x0[active] = x0
        return x_t
