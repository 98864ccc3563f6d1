"""`flashdiff distill RECIPE --dry-run`: what a recipe would train, and what that costs."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from flashdiff.distill import processes
from flashdiff.distill.bases import load_trained_base
from flashdiff.distill.checks import check_run
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import Recipe
from flashdiff.distill.costs import held_out_cost, target_cost, teacher_evaluations, update_cost
from flashdiff.distill.initial import first_weights
from flashdiff.distill.int8 import round_to_int8
from flashdiff.distill.network import blank_conditioning, checkpoint_gradients, run_network
from flashdiff.distill.objective import Objective
from flashdiff.distill.student_kinds import kind_of
from flashdiff.families.base import TorchModel

_GIB = 2**30


def dry_run(recipe: Recipe) -> Iterator[str]:
    """Describe the run in lines, from the loaded base; nothing is trained or written, and no data are read.

    ConfigError or TrainingError when it could not start.
    """
    processes.check_split(recipe.batch_size, recipe.accumulate, shard_base=recipe.shard_base)
    family, model = load_trained_base(recipe)
    images = ImageConditions(model, recipe)
    check_run(model, recipe)
    if recipe.int8_base:
        round_to_int8(model.network)
    kind_of(recipe).insert(model, family, recipe)
    if recipe.init_from:
        first_weights(recipe.init_from, model, family, recipe)
    whole = recipe.model_copy(update={"shard_base": False})  # described whole, wherever it runs
    objective = Objective(model, family, whole, images)
    network = {name: p.numel() for name, p in model.network.named_parameters()}
    base = sum(count for name, count in network.items() if ".lora_" not in name)
    learns = sum(p.numel() for p in kind_of(recipe).parameters(model.network).values())
    frozen = ", frozen" if recipe.student == "lora" else ", which the teacher keeps a frozen copy of"
    yield f"base     {recipe.base} ({family.name}), denoiser {base:,} parameters{frozen}"
    yield f"student  {kind_of(recipe).described(recipe, learns, base)}"
    if read := images.described():
        yield f"reads    of every sample {read}"
    opponents = [f"{opponent.description} {opponent.parameter_count:,} parameters" for opponent in objective.opponents]
    if opponents:
        yield f"also     {', '.join(opponents)}: trained, not published"
    grid = recipe.grid
    yield f"grid     K = {grid.solver_steps} solver steps; trained for {grid.modes}: {grid.inference_times(grid.modes)}"
    start = 0
    for phase in recipe.phases:
        teacher = teacher_evaluations(recipe, phase, objective.branches)
        others = target_cost(recipe, phase, objective.branches) - teacher + update_cost(recipe, phase, objective.branches)
        weights = ", ".join(f"{t.title} {phase.weights[t.name]:g}" for t in recipe.terms() if phase.weights[t.name])
        yield (
            f"updates  {start:,} to {start + phase.updates:,}: {weights}; per sample and update {teacher:.1f} evaluations of the "
            f"teacher's ODE, {round(others, 1):g} other forward passes"
        )
        start += phase.updates
    if count := recipe.keep_best:
        checkpoints = -(-recipe.updates // recipe.checkpoint_every)
        yield (
            f"held out {count:,} samples: {held_out_cost(recipe, objective.branches):,} evaluations of the teacher's ODE "
            f"when the run starts, and {count:,} of the student at each of {checkpoints:,} checkpoints"
        )
    # Weights of every part, and for what is trained its gradient, average and AdamW's two moments.
    added = (model.reference_encoder, *model.controls.values())
    parts = (model.text_encoder, model.denoiser, model.decoder, *(part for part in added if part is not None))
    weights_bytes = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    copied = base if recipe.student == "full" else 0
    trained = sum(network.values()) - base + copied
    samples = recipe.batch_size // (processes.count() * recipe.accumulate)
    passes = 1 + sum(term.cost(recipe.loss.settings(term.name)).kept_passes for term in recipe.terms())
    kept_bytes = samples * passes * activation_bytes(model, checkpointing=recipe.gradient_checkpointing)
    rounded = ", int8 in the base's blocks:" if recipe.int8_base else ""
    kept_gib, all_gib = kept_bytes / _GIB, (weights_bytes + 4 * (copied + 4 * trained)) / _GIB
    yield (
        f"memory   in float32{rounded} {all_gib:.2f} GiB for weights and optimizers, and "
        f"{kept_gib:.2f} GiB that {samples} samples at a time keep for the backward pass; "
        "what a layer takes while it runs comes on top"
    )
    yield f"samples  {recipe.batch_size * recipe.updates:,} in {recipe.updates:,} updates of {recipe.batch_size}"


def activation_bytes(model: TorchModel, *, checkpointing: bool) -> int:
    """Bytes that one sample's forward pass keeps for the backward pass, measured with fake tensors, which take no memory.

    It is the difference between two samples and one, because weights are kept too, but only once.
    """
    if checkpointing:
        checkpoint_gradients(model)
    conditioning = blank_conditioning(model)

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
