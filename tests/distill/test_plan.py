"""The plan tells what then happens."""

from pathlib import Path

import pytest
from recipes import tiny_recipe

from flashdiff.distill.config import Phase
from flashdiff.distill.plan import plan, teacher_evaluations

PAPER = ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2))


@pytest.mark.parametrize(("weights", "steps"), list(zip(PAPER, (12.0, 17.4, 19.6, 21.9), strict=True)))
def test_the_papers_phases_cost_the_solver_steps_they_are_known_to(
    weights: tuple[float, ...], steps: float, tiny_base: Path
) -> None:
    recipe = tiny_recipe(tiny_base, grid={"solver_steps": 32})
    assert teacher_evaluations(recipe, Phase(updates=1, mode_weights=weights)) == pytest.approx(2 * steps, abs=0.1)


def test_a_plan_counts_parameters_apart_and_writes_nothing(tiny_base: Path, tmp_path: Path, flash_lora: Path) -> None:
    loss = {"distribution_matching": {"fake_score": "lora", "critic_updates": 2}}
    phases = [{"updates": 3, "mode_weights": (1, 1, 1, 1)}, {"updates": 5, "mode_weights": (1, 0, 0, 0), "adversarial": 0.1}]
    phases[1]["distribution_matching"] = 0.3
    lines = "\n".join(plan(tiny_recipe(tiny_base, phases=phases, loss=loss)))
    assert "fake score LoRA" in lines
    assert "discriminator head" in lines
    assert "0 to 3: distillation 1; per sample and update 5.0 evaluations of the teacher's ODE, 3 others" in lines
    assert "3 to 8: distillation 1, adversarial 0.1, distribution matching 0.3" in lines
    assert "ODE, 11 others" in lines  # student 1, adversarial 2 + 3, matching 3, critic 2
    assert "16 in 8 updates of 2" in lines
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_what_other_targets_and_inputs_cost(tiny_base: Path) -> None:
    one_phase = [{"updates": 3, "mode_weights": (0, 0, 0, 1)}]
    lines = "\n".join(plan(tiny_recipe(tiny_base, phases=one_phase, target="consistency", loss={"distillation": "perceptual"})))
    assert "2.0 evaluations of the teacher's ODE, 4 others" in lines  # student, its answer as target, two for the features
    lines = "\n".join(plan(tiny_recipe(tiny_base, phases=one_phase, backward_simulation=0.5)))
    assert "2.2 evaluations of the teacher's ODE, 2 others" in lines  # mostly the last mode: two of three earlier steps
