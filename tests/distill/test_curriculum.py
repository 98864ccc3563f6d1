import numpy as np

from flashdiff.distill.config import Phase
from flashdiff.distill.curriculum import phase_at, start_probabilities
from flashdiff.schedule import Grid


def test_mass_is_on_the_modes_as_the_paper_has_it() -> None:
    grid = Grid(solver_steps=32)
    probability = start_probabilities(grid, (0.25, 0.25, 0.25, 0.25))
    assert np.isclose(probability.sum(), 1)
    for mode, share, neighbour in ((0, 0.88, 0.12), (8, 0.786, 0.106), (24, 0.786, 0.106)):
        around = probability[max(0, mode - 3) : mode + 4].sum()
        assert np.isclose(probability[mode] / around, share, atol=0.002)
        assert np.isclose(probability[mode + 1] / around, neighbour, atol=0.002)


def test_a_mode_without_weight_is_not_drawn() -> None:
    probability = start_probabilities(Grid(solver_steps=16), (0, 0, 0.5, 0.5))
    assert probability[:5].sum() < 1e-6


def test_phases_follow_each_other_and_the_last_one_holds() -> None:
    first, second = Phase(updates=2, mode_weights=(1,)), Phase(updates=3, mode_weights=(2,))
    assert [phase_at((first, second), update) for update in range(7)] == [first] * 2 + [second] * 5


def test_loss_weights_ramp_from_the_phase_before() -> None:
    first = Phase(updates=4, mode_weights=(1,), distillation=1)
    second = Phase(updates=6, mode_weights=(2,), distillation=0.5, adversarial=0.4)
    found = [phase_at((first, second), update, ramp_updates=3) for update in range(12)]
    assert [round(phase.adversarial, 6) for phase in found] == [0] * 4 + [0.1, 0.2, 0.3] + [0.4] * 5
    assert [round(phase.distillation, 6) for phase in found[3:8]] == [1, 0.875, 0.75, 0.625, 0.5]
    assert all(phase.mode_weights == (2,) for phase in found[4:])
