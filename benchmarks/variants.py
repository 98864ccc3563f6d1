"""The ablation's variants: changes of a recipe, made at an equal budget of network evaluations."""

from collections.abc import Mapping
from typing import Any

from flashdiff.distill.branches import Branches
from flashdiff.distill.config import Recipe
from flashdiff.distill.costs import cost
from flashdiff.tasks.base import Task

_PAPER = {"adversarial": {"kind": "lsgan", "r1_weight": 0.0}, "distribution_matching": {"times": (0.0, 1.0)}}

_DISTILLATION_ALONE = {"backward_simulation": (0.0, 0.0), "distribution_matching": (0.0, 0.0)}

VARIANTS: dict[str, dict[str, Any]] = {
    # The paper, loss by loss, with every target used once. The weights are those of its first, second and last phase.
    "distillation": {"target_uses": 1, "phases": _DISTILLATION_ALONE},
    "+adversarial": {"target_uses": 1, "loss": _PAPER, "phases": {**_DISTILLATION_ALONE, "adversarial": (0.0, 0.1, 0.3)}},
    "paper": {
        "target_uses": 1,
        "loss": _PAPER,
        "phases": {**_DISTILLATION_ALONE, "adversarial": (0.0, 0.1, 0.3), "distribution_matching": (0.0, 0.3, 0.7)},
    },
    # LCM: one teacher step, then the averaged student, with all times of the grid equally likely.
    "lcm": {"target_uses": 1, "target": "consistency", "every_time": True, "phases": _DISTILLATION_ALONE},
    # Ours: targets are reused, later phases also start from the student's own steps, and the last one matches distributions.
    # The variants of ours change one thing each.
    "ours": {},
    "ours-reuse": {"target_uses": 1},
    "ours-simulation": {"phases": {"backward_simulation": (0.0, 0.0)}},
    "ours-matching": {"phases": {"distribution_matching": (0.0, 0.0)}},
    "ours+huber": {"loss": {"distillation": "pseudo_huber"}},
    "ours+perceptual": {"loss": {"distillation": "perceptual"}},
    "ours+adversarial": {"phases": {"adversarial": (0.02, 0.05)}},
    "ours+critic": {"loss": {"distribution_matching": {"fake_score": "lora"}}},
    # What the audit of the method found, and the newer papers say.
    "ours+k8": {"grid": {"solver_steps": 8}},
    "ours+constant": {"learning_rate_decay": 0.0},
    "ours+fresh": {"pool_batches": 64, "target_uses": 2},
    "ours+whitened": {"loss": {"distillation": "whitened"}},
    "ours+roles": {"loss": {"distribution_matching": {"first_step": False}}},
    "ours+roles-critic": {
        "loss": {"distribution_matching": {"first_step": False, "fake_score": "lora", "decoupled": True}},
    },
    # Every step learns its own part of the trajectory, without and with a fake score that learns the student's samples.
    "ours+own-step": {"loss": {"distribution_matching": {"own_step": True}}},
    "ours+own-step-critic": {"loss": {"distribution_matching": {"own_step": True, "fake_score": "lora"}}},
}
"""Changes of the recipe by variant. Under `phases` are values by phase; the last one holds for all later phases."""


BY_TEXT = Branches(contrasts=({},), weights=lambda guidance: Task().weights(guidance, {}))
"""The teacher's guidance in all variants, for their cost."""

GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(VARIANTS),
    "audit": ("ours", "ours+k8", "ours+constant", "ours+fresh", "ours+whitened", "ours+roles", "ours+roles-critic"),
    "own-step": ("ours", "ours+own-step", "ours+own-step-critic"),
}
"""Variants under one name."""


def make_variant(recipe: Recipe, name: str, seed: int, scale: float) -> Recipe:
    """The recipe with the changes of variant `name`, as long as the budget allows: `scale` times the cost of `distillation`."""
    budget = scale * cost(_changed(recipe, VARIANTS["distillation"]), BY_TEXT)
    changed = _changed(recipe, {**VARIANTS[name], "seed": seed})
    share = budget / cost(changed, BY_TEXT)
    phases = [{**phase.model_dump(), "updates": max(1, round(phase.updates * share))} for phase in changed.phases]
    settings = {
        "phases": phases,
        "ramp_updates": min([round(recipe.ramp_updates * share), *(phase["updates"] for phase in phases[1:])]),
        "warmup_updates": round(recipe.warmup_updates * sum(phase["updates"] for phase in phases) / recipe.updates),
        "checkpoint_every": max(1, sum(phase["updates"] for phase in phases) // 4),
        "preview_prompts": (),
    }
    return Recipe.model_validate({**changed.model_dump(), **settings})


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    settings = {key: value for key, value in changes.items() if key not in ("phases", "grid", "every_time")}
    phases = [phase.model_dump() for phase in recipe.phases]
    for name, values in changes.get("phases", {}).items():
        for index, phase in enumerate(phases):
            phase[name] = values[min(index, len(values) - 1)]
    grid = {**recipe.grid.model_dump(), **changes.get("grid", {})}
    if changes.get("every_time"):
        grid["modes"] = grid["solver_steps"]
        for phase in phases:
            phase["mode_weights"] = (1,) * grid["modes"]
    return Recipe.model_validate({**recipe.model_dump(), "grid": grid, "phases": phases, **settings})
