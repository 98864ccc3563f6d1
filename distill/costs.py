"""What a recipe costs, in forward passes of the network, and how long a run still takes."""

import statistics
from collections import deque

import numpy as np

from flashdiff.distill.branches import Branches
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import phase_at, start_probabilities
from flashdiff.distill.previews import TEACHER_STEPS
from flashdiff.distill.step import PoolSpan, span_at
from flashdiff.distill.terms import TRAINED_PASS


def cost(recipe: Recipe, branches: Branches) -> float:
    """Forward passes of the whole run for one sample of a batch: the sum of `target_cost` and `update_cost` over all updates."""
    return sum(
        phase.updates * (target_cost(recipe, phase, branches) + update_cost(recipe, phase, branches)) for phase in recipe.phases
    )


class RemainingTime:
    """How long a run still takes, from the seconds that its targets, updates and previews took so far.

    Every duration is scaled by its cost in forward passes, so that phases which cost more are counted before they begin; what
    each phase then takes corrects the estimate.
    """

    def __init__(self, recipe: Recipe, branches: Branches) -> None:
        """`branches` are those of the teacher's guidance, here and in all functions below."""
        self._recipe, self._branches = recipe, branches
        self._updates_s = deque[float](maxlen=_RECENT)
        self._phase: Phase | None = None
        self.target_s = 0.0
        """Seconds of the last pool's targets, per update that uses them."""
        self._preview_s: float | None = None

    @property
    def update_s(self) -> float:
        """Seconds of an update, the median of the last ones."""
        return statistics.median(self._updates_s)

    def solved(self, span: PoolSpan, seconds: float) -> None:
        """The targets of a pool took this long."""
        self.target_s = seconds / (span.batches * self._recipe.target_uses)

    def updated(self, phase: Phase, seconds: float) -> None:
        """One update of a phase took this long."""
        if phase is not self._phase:
            self._phase, self._updates_s = phase, deque(maxlen=_RECENT)
        self._updates_s.append(seconds)

    def previewed(self, seconds: float) -> None:
        """A checkpoint with its preview took this long."""
        self._preview_s = seconds

    def left_s(self, update: int) -> float:
        """Expected seconds from `update`, of the phase that is running, to the end of the run."""
        recipe, branches, now = self._recipe, self._branches, self._phase
        assert now
        training_s = remaining_s(recipe, branches, update, target_s=self.target_s, update_s=self.update_s, measured=now)
        preview_s = self._preview_s
        if preview_s is None:  # mostly the teacher's evaluations, at the rate of those in the targets
            preview_s = self.target_s / target_cost(recipe, now, branches) * checkpoint_cost(recipe, branches) / recipe.batch_size
        return training_s + preview_s * (-(-recipe.updates // recipe.checkpoint_every) - update // recipe.checkpoint_every)


_RECENT = 50
"""Updates whose median is the pace of a phase."""


def remaining_s(
    recipe: Recipe, branches: Branches, update: int, *, target_s: float, update_s: float, measured: Phase | None = None
) -> float:
    """Expected seconds from `update` to the end, without previews.

    `update_s` is what an update of the phase `measured` took (default: the phase of `update`), and `target_s` what its targets
    took, per update of their pool; both are scaled by cost for the phases to come.
    """
    now, span = measured or phase_at(recipe.phases, update), span_at(recipe, min(update, recipe.updates - 1))
    pool_end = span.end if span.first < update else update
    target_rate, update_rate = target_s / target_cost(recipe, now, branches), update_s / update_cost(recipe, now, branches)
    seconds, start = 0.0, 0
    for phase in recipe.phases:
        end = start + phase.updates
        to_learn, to_solve = (max(0, end - max(start, begin)) for begin in (update, max(update, pool_end)))
        if to_learn:
            seconds += update_rate * update_cost(recipe, phase, branches) * to_learn
            seconds += target_rate * target_cost(recipe, phase, branches) * to_solve
        start = end
    return seconds


def teacher_evaluations(recipe: Recipe, phase: Phase, branches: Branches) -> float:
    """Expected evaluations of the network in the teacher's ODE, per sample and update.

    That is sum_i pi(i) (K - i), times those of a step at the highest guidance, divided by how often a target is used.
    """
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    taken = recipe.grid.solver_steps - np.arange(recipe.grid.solver_steps)
    steps = 1.0 if recipe.target == "consistency" else float(probabilities @ taken)
    return branches.evaluations(recipe.guidance[1]) * steps / recipe.target_uses


def target_cost(recipe: Recipe, phase: Phase, branches: Branches) -> float:
    """Forward passes per sample and update for its input and target: the teacher's, and the student's where they draw on it."""
    student = float(recipe.target == "consistency")
    # Of a roll-out the first step, and half of the later ones before the start; prompts alone have no other inputs.
    student += (1.0 if recipe.data.is_prompts else phase.backward_simulation) * _roll_out(recipe, phase)
    return teacher_evaluations(recipe, phase, branches) + student / recipe.target_uses


def update_cost(recipe: Recipe, phase: Phase, branches: Branches) -> float:
    """Forward passes per sample that an update itself costs: the student's, and those of the losses and their opponents."""
    weights, count = phase.weights, float(TRAINED_PASS)
    for term in recipe.terms():
        passes = term.cost(recipe.loss.settings(term.name))
        count += passes.throughout + (passes.in_use + branches.count * passes.guided if weights[term.name] else 0)
    return count


def checkpoint_cost(recipe: Recipe, branches: Branches) -> float:
    """Forward passes at one checkpoint: the student's of the held-out samples, and for each prompt of the preview those of the
    guided teacher, and of the student at its most, 2 and 1 steps."""
    return recipe.keep_best + len(recipe.preview_prompts) * (branches.count * TEACHER_STEPS + recipe.grid.modes + 2 + 1)


def held_out_cost(recipe: Recipe, branches: Branches) -> int:
    """Evaluations of the network for the teacher's solutions of the held-out samples, which start at the modes in turn; prompts
    alone start at the first."""
    modes = recipe.grid.mode_indices()[: 1 if recipe.data.is_prompts else None]
    steps = sum(recipe.grid.solver_steps - modes[number % len(modes)] for number in range(recipe.keep_best))
    return branches.evaluations(sum(recipe.guidance) / 2) * steps


def _roll_out(recipe: Recipe, phase: Phase) -> float:
    """Expected evaluations of the student on the way to a start."""
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    earlier = [sum(mode < index for mode in recipe.grid.mode_indices()) for index in range(recipe.grid.solver_steps)]
    return float(probabilities @ [(count + 1) / 2 if count else 0 for count in earlier])
