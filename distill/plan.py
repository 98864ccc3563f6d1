"""What a recipe would do, before it does it: `flashdiff distill RECIPE --dry-run`."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from flashdiff.distill import processes
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import phase_at, start_probabilities
from flashdiff.distill.network import checkpoint_gradients, run_network
from flashdiff.distill.objective import Objective
from flashdiff.distill.step import stretch_at
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
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
        beside = target_cost(recipe, phase) - teacher_evaluations(recipe, phase) + update_cost(recipe, phase)
        weights = ", ".join(
            f"{name.replace('_', ' ')} {getattr(phase, name):g}"
            for name in ("distillation", "adversarial", "distribution_matching")
            if getattr(phase, name)
        )
        yield (
            f"updates  {start:,} to {start + phase.updates:,}: {weights}; per sample and update {teacher:.1f} evaluations of the "
            f"teacher's ODE, {round(beside, 1):g} forward passes beside"
        )
        start += phase.updates
    # Weights of every part, and for what is trained its gradient, average and AdamW's two moments.
    parts = (model.text_encoder, model.denoiser, model.decoder)
    weights_bytes = 4 * sum(p.numel() for part in parts for p in part.parameters())
    trained = lora + sum(p.numel() for p in objective.critic)
    samples = recipe.batch_size // (processes.count() * recipe.accumulate)
    passes = 1 + any(phase.adversarial for phase in recipe.phases) + (recipe.loss.distillation == "perceptual")
    kept_bytes = samples * passes * activation_bytes(model, checkpointing=recipe.gradient_checkpointing)
    yield (
        f"memory   in float32 {(weights_bytes + 4 * 4 * trained) / _GIB:.2f} GiB for weights and optimizers, and "
        f"{kept_bytes / _GIB:.2f} GiB that {samples} samples at a time keep for the backward pass; "
        "what a layer takes while it runs comes on top"
    )
    yield f"samples  {recipe.batch_size * recipe.updates:,} in {recipe.updates:,} updates of {recipe.batch_size}"


def activation_bytes(model: TorchModel, *, checkpointing: bool) -> int:
    """What one sample's forward pass keeps for the backward pass, from a pass of tensors without memory.

    The difference of two samples and one: weights are kept too, but once.
    """
    if checkpointing:
        checkpoint_gradients(model)
    conditioning = model.encode_ids(model.tokenizer([""]))

    def kept(samples: int) -> int:
        found: dict[int, Tensor] = {}

        def keep(values: Tensor) -> Tensor:
            found[values.untyped_storage()._cdata] = values
            return values

        with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(keep, lambda values: values):
            latents = torch.zeros(samples, *model.spec.latent_shape(model.spec.sizes[0]))
            rows = {name: values.expand(samples, *values.shape[1:]) for name, values in conditioning.items()}
            run_network(model, latents, torch.zeros(samples, dtype=torch.int64), rows)
        return sum(values.untyped_storage().nbytes() for values in found.values())

    return kept(2) - kept(1)


def cost(recipe: Recipe, *, guided_twice: bool = True) -> float:
    """What the whole run costs a sample of a batch, in forward passes of the network: see `target_cost` and `update_cost`."""
    return sum(
        phase.updates * (target_cost(recipe, phase, guided_twice=guided_twice) + update_cost(recipe, phase))
        for phase in recipe.phases
    )


def remaining_s(recipe: Recipe, update: int, *, target_s: float, update_s: float) -> float:
    """Expected seconds from `update` to the end, previews aside.

    `target_s` and `update_s` are what its pool, per update, and an update itself took; other phases take what they cost beside
    it.
    """
    now, pool_end = phase_at(recipe.phases, update), stretch_at(recipe, min(update, recipe.updates - 1)).end
    target_rate, update_rate = target_s / target_cost(recipe, now), update_s / update_cost(recipe, now)
    later = [(number, phase_at(recipe.phases, number)) for number in range(update, recipe.updates)]
    return sum(
        update_rate * update_cost(recipe, phase) + target_rate * target_cost(recipe, phase) * (number >= pool_end)
        for number, phase in later
    )


def teacher_evaluations(recipe: Recipe, phase: Phase, *, guided_twice: bool = True) -> float:
    """Expected evaluations of the teacher's ODE per sample and update: sum_i pi(i) (K - i), twice for guidance, by reuse."""
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    taken = recipe.grid.solver_steps - np.arange(recipe.grid.solver_steps)
    steps = 1.0 if recipe.target == "consistency" else float(probabilities @ taken)
    return (2 if guided_twice else 1) * steps / recipe.target_uses


def target_cost(recipe: Recipe, phase: Phase, *, guided_twice: bool = True) -> float:
    """Forward passes per sample and update for its input and target: the teacher's, and the student's where it has a part."""
    student = float(recipe.target == "consistency")
    if phase.backward_simulation:  # the first step, and half of the later ones before the start
        student += phase.backward_simulation * _roll_out(recipe, phase)
    return teacher_evaluations(recipe, phase, guided_twice=guided_twice) + student / recipe.target_uses


def update_cost(recipe: Recipe, phase: Phase) -> float:
    """Forward passes per sample that an update itself costs: the student's, and those of the losses.

    A backward pass counts as two forward passes where it trains a LoRA and as one where it only passes through, which is what
    they take on a CPU (2.7 and 2.0 for both ways together).
    """
    trained, passed = 3, 2
    count = float(trained)
    if phase.distillation and recipe.loss.distillation == "perceptual":
        count += passed + 1
    if phase.adversarial:  # the student's loss sees both sides; then the head's, which needs no gradient of the network
        count += passed + 1 + (3 if recipe.loss.adversarial.r1_weight else 2)
    matching = recipe.loss.distribution_matching
    if phase.distribution_matching:
        count += 3 + 2 * matching.decoupled
    if matching.fake_score == "lora" and any(other.distribution_matching for other in recipe.phases):
        count += trained * matching.critic_updates
    return count


def _roll_out(recipe: Recipe, phase: Phase) -> float:
    """Expected evaluations of the student on the way to a start."""
    probabilities = start_probabilities(recipe.grid, phase.mode_weights)
    earlier = [sum(mode < index for mode in recipe.grid.mode_indices()) for index in range(recipe.grid.solver_steps)]
    return float(probabilities @ [(count + 1) / 2 if count else 0 for count in earlier])
