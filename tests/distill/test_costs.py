"""What a recipe costs, in forward passes and in seconds that remain."""

from pathlib import Path

import pytest
from recipes import branches_of_text, tiny_recipe

from flashdiff.distill.config import Phase
from flashdiff.distill.costs import cost, held_out_cost, remaining_s, teacher_evaluations

TEXT, NONE = branches_of_text({}), branches_of_text()
PAPER = ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2))


@pytest.mark.parametrize(("weights", "steps"), list(zip(PAPER, (12.0, 17.4, 19.6, 21.9), strict=True)))
def test_the_papers_phases_cost_the_solver_steps_they_are_known_to(
    weights: tuple[float, ...], steps: float, tiny_base: Path
) -> None:
    recipe = tiny_recipe(tiny_base, grid={"solver_steps": 32})
    assert teacher_evaluations(recipe, Phase(updates=1, mode_weights=weights), TEXT) == pytest.approx(2 * steps, abs=0.1)


def test_a_network_that_takes_its_guidance_as_an_input_costs_the_teacher_half(tiny_base: Path) -> None:
    recipe = tiny_recipe(tiny_base)  # four updates, 2.5 solver steps each on average, and 3 for the student both ways
    assert (cost(recipe, TEXT), cost(recipe, NONE)) == pytest.approx((4 * (5 + 3), 4 * (2.5 + 3)))
    assert cost(tiny_recipe(tiny_base, guidance=(0.0, 1.0)), TEXT) == pytest.approx(4 * (2.5 + 3))  # as does no guidance


def test_prompts_alone_cost_the_students_own_steps(tiny_base: Path) -> None:
    phase = {"updates": 4, "mode_weights": (1, 1, 1, 1)}
    images = tiny_recipe(tiny_base, phases=[{**phase, "backward_simulation": 1.0}], keep_best=4)
    prompts = tiny_recipe(tiny_base, phases=[phase], data={"source": "prompts.txt"}, keep_best=4)
    assert cost(prompts, TEXT) == cost(images, TEXT) > cost(tiny_recipe(tiny_base), TEXT)
    assert (held_out_cost(images, TEXT), held_out_cost(prompts, TEXT)) == (2 * (4 + 3 + 2 + 1), 2 * 4 * 4)


def test_the_time_that_remains_counts_pools_and_dearer_phases_to_come(tiny_base: Path) -> None:
    modes = {"mode_weights": (0, 0, 0, 1)}
    recipe = tiny_recipe(tiny_base, phases=[{"updates": 20, **modes}, {"updates": 20, **modes, "distribution_matching": 0.5}])
    # 10 updates of 3 passes and 20 of 6; the pool of 16 updates is there, 24 more are to be solved.
    assert remaining_s(recipe, TEXT, 10, target_s=0.5, update_s=1.0) == pytest.approx(10 * 1 + 20 * 2 + 24 * 0.5, rel=0.01)
    # In the second phase, which has a pool for 16 updates and one for the last 4.
    assert remaining_s(recipe, TEXT, 33, target_s=0.5, update_s=2.0) == pytest.approx(7 * 2 + 4 * 0.5)
