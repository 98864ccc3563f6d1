"""What an update starts from: samples solved by the teacher, and the student's own evaluation of them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.distill import processes
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import start_probabilities
from flashdiff.distill.data import Dataset
from flashdiff.distill.network import as_teacher, guided, levels, predict_x0, run_network
from flashdiff.distill.teacher import solve
from flashdiff.families.base import TorchModel
from flashdiff.sampling import renoise

POOL_BATCHES = 16
"""Targets are solved for this many batches at a time."""

REUSED_POOL_BATCHES = 256
"""Likewise where they are used again: of 16 batches, seen four times in a row, the embedded student's loss fell by a quarter
from the first use to the last, and was back at the first of the next 16: it was learning them by heart."""


@dataclass(frozen=True)
class Stretch:
    """The updates `first` to `end` (not included), which share one pool."""

    index: int  # of the pool
    phase: Phase
    first_batch: int  # of the data
    batches: int
    first: int
    end: int


def stretch_at(recipe: Recipe, update: int) -> Stretch:
    """The stretch that `update` is in: of one phase, and shorter than the others at the phase's end."""
    uses = recipe.target_uses
    batches = POOL_BATCHES if uses == 1 else REUSED_POOL_BATCHES
    index = first_batch = start = 0
    for phase in recipe.phases:
        if update < start + phase.updates:
            earlier = (update - start) // (batches * uses)
            first = start + earlier * batches * uses
            end = min(first + batches * uses, start + phase.updates)
            return Stretch(index + earlier, phase, first_batch + earlier * batches, -(-(end - first) // uses), first, end)
        index += -(-phase.updates // (batches * uses))
        first_batch += -(-phase.updates // uses)
        start += phase.updates
    raise IndexError(f"update {update} of {recipe.updates}")


@dataclass(frozen=True)
class Targets:
    """What the student learns from: noisy latents and the teacher's solution from each. No gradients."""

    z0: Tensor  # [N, C, h, w], the real images; the teacher's solutions where there are prompts only
    x_t: Tensor  # [N, C, h, w]
    times: Tensor  # [N]
    conditioning: Mapping[str, Tensor]  # [N, ...]
    x0: Tensor  # [N, C, h, w]


@dataclass(frozen=True)
class Solved:
    """The samples of a pool that share a size, their conditioning still in the data set. On the CPU, in every process."""

    items: NDArray[np.int64]  # [N]
    z0: Tensor
    x_t: Tensor
    times: Tensor
    x0: Tensor

    def targets(self, chosen: Tensor, data: Dataset, device: torch.device) -> Targets:
        """Some of the samples, on the device that computes."""
        z0, x_t, times, x0 = (values[chosen].to(device) for values in (self.z0, self.x_t, self.times, self.x0))
        conditioning = data.conditioning(self.items[chosen.numpy()])
        return Targets(z0, x_t, times, {name: values.to(device) for name, values in conditioning.items()}, x0)


class Pool:
    """The samples of a few batches. Each use goes through all of them, shuffled anew among those of one size."""

    def __init__(self, solved: list[Solved], batch_size: int) -> None:
        self.solved, self._batch_size = solved, batch_size

    def batch(self, number: int, seed: int) -> tuple[Solved, Tensor]:
        """The samples of one size, and which of them [batch_size] are batch `number` of the use that `seed` names."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(solved.items), generator=generator) for solved in self.solved]
        parts = [
            (solved, part) for solved, order in zip(self.solved, orders, strict=True) for part in order.split(self._batch_size)
        ]
        if len(self.solved) > 1:
            parts = [parts[index] for index in torch.randperm(len(parts), generator=generator)]
        return parts[number]


def shared_pool(folder: Path, model: TorchModel, recipe: Recipe, stretch: Stretch, make: Callable[[], Pool]) -> Pool:
    """The pool from `folder`, where another run has left it; else `make` it, and leave it there.

    Only for pools that do not draw on the student: they are functions of the values that name the file.
    """
    fixed = recipe.model_dump_json(include={"seed", "data", "grid", "guidance", "batch_size"})
    own = f"{stretch.phase.mode_weights} {stretch.index} {stretch.first_batch} {stretch.batches}"
    name = hashlib.sha256(f"{model.base_hash} {fixed} {own}".encode()).hexdigest()[:32]
    path = folder / f"{name}.pt"
    if path.exists():
        return Pool([Solved(**{**of, "items": of["items"].numpy()}) for of in load_state(path)["sizes"]], recipe.batch_size)
    pool = make()
    save_state(path, {"sizes": [{**vars(solved), "items": torch.from_numpy(solved.items)} for solved in pool.solved]})
    return pool


@torch.no_grad()
def make_pool(
    model: TorchModel, unconditional: Mapping[str, Tensor] | None, data: Dataset, recipe: Recipe, stretch: Stretch
) -> Pool:
    """The pool of a stretch: each sample with its own item, start time, guidance and noise, solved by the teacher.

    A function of seed, stretch and, where that draws on the student, of the student's weights in `model`. The processes
    share the work, and all get all of it.
    """
    grid, phase = recipe.grid, stretch.phase
    rng, generator = step_generator(recipe.seed, stretch.index)
    batches = [data.batch(number) for number in range(stretch.first_batch, stretch.first_batch + stretch.batches)]
    count = len(batches) * recipe.batch_size
    starts = torch.from_numpy(rng.choice(grid.solver_steps, count, p=start_probabilities(grid, phase.mode_weights)))
    guidance = torch.from_numpy(rng.uniform(*recipe.guidance, count)).float()
    simulated = torch.from_numpy(rng.random(count) < (phase.backward_simulation if data.has_images else 1.0))
    visits = torch.from_numpy(rng.random((count, grid.modes)) < 0.5)
    shapes = [(recipe.batch_size, *model.spec.latent_shape(size)) for size, _ in batches]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]

    solved = []
    for size in dict.fromkeys(size for size, _ in batches):
        members = [number for number, (of, _) in enumerate(batches) if of == size]
        samples = torch.arange(count).view(len(batches), -1)[members].flatten()
        solved.append(
            _solved(
                model, unconditional, data, recipe,
                items=np.concatenate([batches[number][1] for number in members]),
                starts=starts[samples], guidance=guidance[samples], simulated=simulated[samples], visits=visits[samples],
                noise=torch.cat([noise[number] for number in members]),
                seed=int(rng.integers(2**62)),
            )
        )  # fmt: skip
    return Pool(solved, recipe.batch_size)


def _solved(
    model: TorchModel,
    unconditional: Mapping[str, Tensor] | None,
    data: Dataset,
    recipe: Recipe,
    *,
    items: NDArray[np.int64],  # [N]
    starts: Tensor,  # [N] indices into the solver's times
    guidance: Tensor,  # [N]
    simulated: Tensor,  # [N] whether the noisy input is the student's own
    visits: Tensor,  # [N, M] which inference steps its rollout takes
    noise: Tensor,  # [N, C, h, w]
    seed: int,
) -> Solved:
    device = model.device
    (mine,) = processes.rows(len(items))
    draws = processes.Draws(torch.Generator().manual_seed(seed), len(items), mine)
    draws_on_student = bool(simulated.any())  # of any process: they evaluate the network equally often
    noises = (
        torch.stack([draws.normal(noise.shape[1:]) for _ in range(recipe.grid.modes)]) if draws_on_student else torch.empty(0)
    )
    solver_times = torch.tensor(recipe.grid.solver_times())
    found: dict[str, list[Tensor]] = {"z0": [], "x_t": [], "x0": []}
    # Memory as for one part of one batch, whatever the size of the pool.
    for part in torch.arange(len(items))[mine].split(recipe.batch_size // (processes.count() * recipe.accumulate)):
        conditioning = {name: values.to(device) for name, values in data.conditioning(items[part.numpy()]).items()}
        eps = noise[part].to(device)
        z0 = data.latents(items[part.numpy()]).to(device) if data.has_images else torch.zeros_like(eps)
        image = z0
        if draws_on_student:
            chosen = noises[:, part - mine.start].to(device)
            own = roll_out(model, chosen, starts[part], visits[part], simulated[part], conditioning, recipe)
            image = torch.where(_rows(simulated[part], device), own, z0)
        x_t = renoise(image, eps, *levels(model, solver_times[starts[part]].to(device)))
        # The first grid point is pure noise, without a trace of an image, because inference starts there.
        x_t = torch.where(_rows(starts[part] == 0, device), eps, x_t)
        x0 = _target(model, unconditional, recipe, x_t, starts[part], guidance[part].to(device), conditioning)
        for name, values in (("z0", z0 if data.has_images else x0), ("x_t", x_t), ("x0", x0)):
            found[name].append(values)
    z0, x_t, x0 = (processes.gather(torch.cat(values)) for values in found.values())
    return Solved(items, z0, x_t, solver_times[starts], x0)


def roll_out(
    model: TorchModel,
    noises: Tensor,  # [M, n, C, h, w], one a step
    starts: Tensor,  # [n] indices into the solver's times
    visits: Tensor,  # [n, M]
    simulated: Tensor,  # [n]
    conditioning: Mapping[str, Tensor],
    recipe: Recipe,
) -> Tensor:
    """Backward simulation (DMD2, 2405.14867, section 4.5): x_0 [n, C, h, w] where the student's sampling stands before `starts`.

    From pure noise over the inference steps that a sample `visits`, so that the paths of all numbers of steps occur. Zeros
    for samples that start at pure noise or are not `simulated`.
    """
    x0 = torch.zeros_like(noises[0])
    grid = recipe.grid
    for mode, index in enumerate(grid.mode_indices()):
        wanted = (simulated & (starts > index) & (visits[:, mode] | (mode == 0))).nonzero().squeeze(1)
        if not len(wanted) and not recipe.shard_base:
            continue
        active = wanted if len(wanted) else torch.tensor([0])  # other processes count on an evaluation; it is dropped
        times = torch.full((len(active),), grid.solver_times()[index], device=x0.device)
        noise = noises[mode][active]
        x_t = renoise(x0[active], noise, *levels(model, times)) if mode else noise
        found = predict_x0(model, x_t, times, {name: values[active] for name, values in conditioning.items()})
        x0[wanted] = found[: len(wanted)]
    return x0


def _target(
    model: TorchModel,
    unconditional: Mapping[str, Tensor] | None,
    recipe: Recipe,
    x_t: Tensor,  # [n, C, h, w]
    starts: Tensor,  # [n]
    guidance: Tensor,  # [n]
    conditioning: Mapping[str, Tensor],
) -> Tensor:
    """What the student's x_0 is regressed on: the end of the teacher's ODE, or of one step of it and the student from there."""
    grid = recipe.grid
    with as_teacher(model):
        solution = solve(
            lambda latents, t, condition: run_network(model, latents, t, condition),
            x_t,
            starts,
            guidance,
            guided(conditioning, guidance),
            unconditional,
            grid=grid,
            schedule=model.spec.sampler.schedule,
            prediction=model.spec.prediction,
            steps=1 if recipe.target == "consistency" else None,
            in_step=recipe.shard_base,
        )
    if recipe.target == "solution":
        return solution
    # Consistency distillation with guidance inside the target (LCM, 2310.04378, algorithm 1); the last step ends clean.
    times = torch.tensor([*grid.solver_times()[1:], 0])[starts].to(x_t.device)
    return torch.where(
        _rows(starts == grid.solver_steps - 1, x_t.device), solution, predict_x0(model, solution, times, conditioning)
    )


def _rows(chosen: Tensor, device: torch.device) -> Tensor:
    """[n] as [n, 1, 1, 1] on `device`."""
    return chosen.view(-1, 1, 1, 1).to(device)


def student_x0(model: TorchModel, batch: Targets) -> Tensor:
    """The student's single conditional evaluation at each sample's start, as x_0."""
    return predict_x0(model, batch.x_t, batch.times, batch.conditioning)
