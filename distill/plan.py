"""What a recipe would do, before it does it: `flashdiff distill RECIPE --dry-run`."""

from collections.abc import Iterator

import numpy as np

from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import start_probabilities
from flashdiff.distill.objective import Objective
from flashdiff.families import load_base
from flashdiff.lora import ADAPTER, add_adapter

_GIB = 2**30


def plan(recipe: Recipe) -> Iterator[str]:
    """The plan in lines, from the loaded base; nothing is trained or written."""
    family, model = load_base(recipe.base)
    targets = recipe.lora.targets or family.lora_targets
    add_adapter(model, targets, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed)
    objective = Objective(model, family, recipe)
    network = {name: p.numel() for name, p in model.network.named_parameters()}
    base = sum(count for name, count in network.items() if ".lora_" not in name)
    lora = sum(count for name, count in network.items() if f".{ADAPTER}." in name)
    yield f"base     {recipe.base} ({family.name}), denoiser {base:,} parameters, frozen"
    yield f"student  LoRA rank {recipe.lora.rank}: {lora:,} parameters, {100 * lora / base:.1f} % of the denoiser"
    opponents = []
    if objective.discriminator:
        opponents.append(f"discriminator head {sum(p.numel() for p in objective.discriminator.parameters()):,} parameters")
    if objective.critic:
        opponents.append(f"fake score LoRA {sum(p.numel() for p in objective.critic):,} parameters")
    if opponents:
        yield f"beside   {', '.join(opponents)}: trained, not published"
    grid = recipe.grid
    yield f"grid     K = {grid.solver_steps} solver steps; trained for {grid.modes}: {grid.inference_times(grid.modes)}"
    start = 0
    for phase in recipe.phases:
        teacher = teacher_evaluations(recipe, phase, guided_twice=model.guides_twice)
        weights = ", ".join(
            f"{name.replace('_', ' ')} {getattr(phase, name):g}"
            for name in ("distillation", "adversarial", "distribution_matching")
            if getattr(phase, name)
        )
        yield (
            f"updates  {start:,} to {start + phase.updates:,}: {weights}; per sample and update {teacher:.1f} evaluations of the "
            f"teacher's ODE, {round(_other_evaluations(recipe, phase), 1):g} others"
        )
        start += phase.updates
    # Weights of every part, and for what is trained its gradient, average and AdamW's two moments.
    parts = (model.text_encoder, model.denoiser, model.decoder)
    weights_bytes = 4 * sum(p.numel() for part in parts for p in part.parameters())
    trained = lora + sum(p.numel() for p in objective.critic)
    yield f"memory   {(weights_bytes + 4 * 4 * trained) / _GIB:.2f} GiB for weights and optimizers; activations come on top"
    yield f"samples  {recipe.batch_size * recipe.updates:,} in {recipe.updates:,} updates of {recipe.batch_size}"


def evaluations(recipe: Recipe) -> float:
    """Expected evaluations of the network in the whole run, per sample of a batch: the teacher's ODE and all others."""
    return sum(
        phase.updates * (teacher_evaluations(recipe, phase) + _other_evaluations(recipe, phase)) for phase in recipe.phases
    )


def teacher_evaluations(recipe: Recipe, phase: Phase, *, guided_twice: bool = True) -> float:
    """Expected evaluations of the teacher's ODE per sample and update: sum_i pi(i) (K - i), twice for guidance, by reuse."""
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    taken = recipe.grid.solver_steps - np.arange(recipe.grid.solver_steps)
    steps = 1.0 if recipe.target == "consistency" else float(probabilities @ taken)
    return (2 if guided_twice else 1) * steps / recipe.target_uses


def _other_evaluations(recipe: Recipe, phase: Phase) -> float:
    """The student's own, and those of the losses beside the distillation loss."""
    count = 1.0
    if recipe.target == "consistency":
        count += 1 / recipe.target_uses
    if phase.distillation and recipe.loss.distillation == "perceptual":
        count += 2
    if recipe.backward_simulation:  # the first step, and half of the later ones before the start
        count += recipe.backward_simulation * _roll_out(recipe, phase) / recipe.target_uses
    if phase.adversarial:
        count += 2 + (3 if recipe.loss.adversarial.r1_weight else 2)
    matching = recipe.loss.distribution_matching
    if phase.distribution_matching:
        count += 3 + 2 * matching.decoupled
    if matching.fake_score == "lora" and any(other.distribution_matching for other in recipe.phases):
        count += matching.critic_updates
    return count


def _roll_out(recipe: Recipe, phase: Phase) -> float:
    """Expected evaluations of the student on the way to a start."""
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    earlier = [sum(mode < index for mode in recipe.grid.mode_indices()) for index in range(recipe.grid.solver_steps)]
    return float(probabilities @ [(count + 1) / 2 if count else 0 for count in earlier])
