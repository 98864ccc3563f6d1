"""What a recipe costs, in forward passes of the network, and how long a run still takes."""

import numpy as np

from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import phase_at, start_probabilities
from flashdiff.distill.step import span_at
from flashdiff.distill.terms import TRAINED_PASS


def cost(recipe: Recipe, *, guided_twice: bool = True) -> float:
    """Forward passes of the whole run for one sample of a batch: the sum of `target_cost` and `update_cost` over all updates."""
    return sum(
        phase.updates * (target_cost(recipe, phase, guided_twice=guided_twice) + update_cost(recipe, phase))
        for phase in recipe.phases
    )


def remaining_s(recipe: Recipe, update: int, *, target_s: float, update_s: float) -> float:
    """Expected seconds from `update` to the end, without previews.

    `update_s` is what an update took, and `target_s` what its targets took, per update of their pool; both are scaled by cost
    for the phases to come.
    """
    now, pool_end = phase_at(recipe.phases, update), span_at(recipe, min(update, recipe.updates - 1)).end
    target_rate, update_rate = target_s / target_cost(recipe, now), update_s / update_cost(recipe, now)
    later = [(number, phase_at(recipe.phases, number)) for number in range(update, recipe.updates)]
    return sum(
        update_rate * update_cost(recipe, phase) + target_rate * target_cost(recipe, phase) * (number >= pool_end)
        for number, phase in later
    )


def teacher_evaluations(recipe: Recipe, phase: Phase, *, guided_twice: bool = True) -> float:
    """Expected evaluations of the network in the teacher's ODE, per sample and update.

    That is sum_i pi(i) (K - i), twice for guidance, divided by how often a target is used.
    """
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    taken = recipe.grid.solver_steps - np.arange(recipe.grid.solver_steps)
    steps = 1.0 if recipe.target == "consistency" else float(probabilities @ taken)
    is_guided = guided_twice and recipe.guidance[1] > 1
    return (2 if is_guided else 1) * steps / recipe.target_uses


def target_cost(recipe: Recipe, phase: Phase, *, guided_twice: bool = True) -> float:
    """Forward passes per sample and update for its input and target: the teacher's, and the student's where they draw on it."""
    student = float(recipe.target == "consistency")
    if phase.backward_simulation:  # the first step, and half of the later ones before the start
        student += phase.backward_simulation * _roll_out(recipe, phase)
    return teacher_evaluations(recipe, phase, guided_twice=guided_twice) + student / recipe.target_uses


def update_cost(recipe: Recipe, phase: Phase) -> float:
    """Forward passes per sample that an update itself costs: the student's, and those of the losses and their opponents."""
    weights, count = phase.weights, float(TRAINED_PASS)
    for term in recipe.terms():
        passes = term.cost(recipe.loss.settings(term.name))
        count += passes.throughout + (passes.in_use if weights[term.name] else 0)
    return count


def _roll_out(recipe: Recipe, phase: Phase) -> float:
    """Expected evaluations of the student on the way to a start."""
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    earlier = [sum(mode < index for mode in recipe.grid.mode_indices()) for index in range(recipe.grid.solver_steps)]
    return float(probabilities @ [(count + 1) / 2 if count else 0 for count in earlier])
