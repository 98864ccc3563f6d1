"""The teacher's ODE on a network whose solution is known: data at a point, so every evaluation points at that point."""

from collections.abc import Mapping

import torch
from recipes import branches_of_text
from torch import Tensor

from flashdiff.distill.branches import Network
from flashdiff.distill.teacher import Teacher
from flashdiff.schedule import Grid, NoiseSchedule

GRID = Grid(solver_steps=8)
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _network(calls: list[int]) -> Network:
    def network(latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        calls.append(len(latents))
        alpha, sigma = (torch.from_numpy(x).float().view(-1, 1, 1, 1) for x in SCHEDULE.levels(times.tolist()))
        point = torch.tanh(latents.mean(dim=(1, 2, 3))).view(-1, 1, 1, 1) + conditioning["c"].view(-1, 1, 1, 1)
        return (latents - alpha * point) / sigma

    return network


def _teacher(network: Network, grid: Grid, unconditional: Tensor) -> Teacher:
    branches = branches_of_text({"c": unconditional})
    return Teacher(network=network, branches=branches, grid=grid, schedule=SCHEDULE, prediction="epsilon")


def _solve(x_t: Tensor, starts: list[int], guidance: list[float], color: Tensor, calls: list[int]) -> Tensor:
    return _teacher(_network(calls), GRID, torch.zeros(1, 1)).solve(
        x_t, torch.tensor(starts), torch.tensor(guidance), {"c": color}
    )


def test_guidance_up_to_one_is_one_unguided_evaluation() -> None:
    x_t, color = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.1], [0.5]])
    calls: list[int] = []
    none = _solve(x_t, [0, 0], [0.0, 0.7], color, calls)
    assert sum(calls) == 2 * 8
    torch.testing.assert_close(none, _solve(x_t, [0, 0], [1.0, 1.0], color, []))
    torch.testing.assert_close(_solve(x_t, [0, 0], [0.0, 3.0], color, [])[:1], none[:1])  # next to a guided sample too


def test_samples_with_their_own_start_and_guidance_equal_each_alone_and_cost_only_their_own_steps() -> None:
    x_t, color = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.1], [0.5], [-0.3]])
    starts, guidance, calls = [2, 0, 7], [1.0, 3.0, 5.0], []
    together = _solve(x_t, starts, guidance, color, calls)
    assert sum(calls) == 2 * sum(8 - start for start in starts)
    for i in range(3):
        alone = _solve(x_t[i : i + 1], starts[i : i + 1], guidance[i : i + 1], color[i : i + 1], [])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_the_input_is_left_as_it_was() -> None:
    x_t = torch.randn(2, 2, 4, 4)
    before = x_t.clone()
    _solve(x_t, [0, 4], [2.0, 2.0], torch.zeros(2, 1), [])
    torch.testing.assert_close(x_t, before)


def test_the_end_is_that_of_the_guided_ode_whose_solution_is_known() -> None:
    """Gaussian data of one deviation around two points: guidance moves the mean, and what flows is a line in x."""
    deviation, grid = 0.5, Grid(solver_steps=500)

    def network(latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        alpha, sigma = (torch.from_numpy(x).float().view(-1, 1, 1, 1) for x in SCHEDULE.levels(times.tolist()))
        mean = conditioning["c"].view(-1, 1, 1, 1)
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        x0 = mean + gain * (latents - alpha * mean)
        return (latents - alpha * x0) / sigma

    starts, guidance = torch.tensor([0, 0, 250]), torch.tensor([1.0, 4.0, 4.0])
    said, unsaid = torch.tensor([[0.3], [0.3], [-0.2]]), torch.tensor([[0.1]])
    x_t = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = _teacher(network, grid, unsaid).solve(x_t, starts, guidance, {"c": said})
    mean = (unsaid + guidance.view(-1, 1) * (said - unsaid)).view(-1, 1, 1, 1)
    times = [grid.solver_times()[start] for start in starts]
    alpha, sigma = (torch.from_numpy(x).float().view(-1, 1, 1, 1) for x in SCHEDULE.levels(times))
    wanted = mean + deviation * (x_t - alpha * mean) / (alpha**2 * deviation**2 + sigma**2).sqrt()
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)
