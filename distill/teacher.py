"""The teacher: the frozen base with guidance, its ODE solved from any grid index to the clean end, per sample."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flashdiff.prediction import Prediction, guide, to_x0
from flashdiff.sampling import extrapolate, ode_step, ode_weights
from flashdiff.schedule import Grid, Schedule

Network = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(latents [B, C, h, w], times [B], conditioning) -> raw output."""


def solve(
    network: Network,
    x_t: Tensor,  # [B, C, h, w]
    starts: Tensor,  # [B] indices into the solver's times
    guidance: Tensor,  # [B]
    conditioning: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None,  # the same names, batch 1; None: the network takes guidance as an input
    *,
    grid: Grid,
    schedule: Schedule,
    prediction: Prediction,
    steps: int | None = None,
    in_step: bool = False,
) -> Tensor:
    """x_0 [B, C, h, w] at the end of the guided probability-flow ODE from `x_t`, by DPM-Solver++(2M).

    Sample b takes K - starts[b] steps of two evaluations (one without `unconditional`); samples that have not started yet
    cost nothing. Each sample's first step is first order, so no history leaks between samples. With `steps`, each sample
    takes that many at most, and stands at the time after them. With `in_step` the network is evaluated K times whatever the
    samples, because other processes count on it.
    """
    times = grid.solver_times()
    levels = [torch.from_numpy(values).to(x_t) for values in schedule.levels([*times, -1])]
    weights = ode_weights(schedule, times)
    x_t, previous_x0 = x_t.clone(), x_t.clone()
    for index in range(0 if in_step else int(starts.min()), len(times)):
        active = ((starts <= index) & (index < starts + (steps or len(times)))).nonzero().squeeze(1)
        if not len(active):
            if in_step:
                one = {name: values[:1] for name, values in conditioning.items()}
                network(x_t[:1], torch.full((1,), times[index], device=x_t.device), one)
            continue
        alpha, next_alpha = (levels[0][i].view(1, 1, 1, 1) for i in (index, index + 1))
        sigma, next_sigma = (levels[1][i].view(1, 1, 1, 1) for i in (index, index + 1))
        x = x_t[active]
        chosen = {name: values[active] for name, values in conditioning.items()}
        t = torch.full((len(active),), times[index], dtype=torch.int64, device=x.device)
        if unconditional is None:
            output = network(x, t, chosen)
        else:
            both = {name: torch.cat([values, unconditional[name].expand_as(values)]) for name, values in chosen.items()}
            conditional, contrast = network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            output = guide(conditional, contrast, guidance[active].view(-1, 1, 1, 1))
        x0 = to_x0(prediction, output, x, alpha, sigma)
        weight = torch.where(starts[active] < index, weights[index], 0.0).view(-1, 1, 1, 1).to(x)
        x_t[active] = ode_step(x, extrapolate(x0, previous_x0[active], weight), alpha, sigma, next_alpha, next_sigma)
        previous_x0[active] = x0
    return x_t
