"""What an update starts from: pools of samples with the teacher's targets, and the student's evaluation of a batch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.components import Size
from flashdiff.distill import processes
from flashdiff.distill.batch import Targets
from flashdiff.distill.branches import Branches
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import start_probabilities
from flashdiff.distill.data import Dataset
from flashdiff.distill.network import as_teacher, guided, levels, predict_x0, run_network
from flashdiff.distill.teacher import Teacher
from flashdiff.families.base import TorchModel
from flashdiff.sampling import renoise

POOL_BATCHES = 16
"""Targets are solved for this many batches at a time."""

_FIXED = {"seed", "data", "grid", "guidance", "guidance_rescale", "negative_prompt", "batch_size"} | {
    "image_guidance", "noise_level", "masks", "controls", "reference", "keep_best", "int8_base"
}  # fmt: skip
"""Keys of a recipe that targets depend on which do not draw on the student."""

REUSED_POOL_BATCHES = 256
"""The same where targets are used again. With 16 batches, each used four times in a row, the embedded student memorised them: its
loss fell by a quarter from the first use to the last, and was back at its old value with the next 16."""


@dataclass(frozen=True)
class PoolSpan:
    """Consecutive updates of one phase, which share one pool of targets."""

    index: int  # of the pool, from 0
    phase: Phase
    first_batch: int  # of the data, in the pool
    batches: int  # in the pool
    first: int  # update
    end: int  # update, not included


def span_at(recipe: Recipe, update: int) -> PoolSpan:
    """The span that contains `update`; the last span of a phase may be shorter than the others."""
    uses = recipe.target_uses
    batches = recipe.pool_batches or (POOL_BATCHES if uses == 1 else REUSED_POOL_BATCHES)
    index = first_batch = start = 0
    for phase in recipe.phases:
        if update < start + phase.updates:
            earlier = (update - start) // (batches * uses)
            first = start + earlier * batches * uses
            end = min(first + batches * uses, start + phase.updates)
            return PoolSpan(index + earlier, phase, first_batch + earlier * batches, -(-(end - first) // uses), first, end)
        index += -(-phase.updates // (batches * uses))
        first_batch += -(-phase.updates // uses)
        start += phase.updates
    raise IndexError(f"update {update} of {recipe.updates}")


@dataclass(frozen=True)
class Solved:
    """The samples of a pool that share an image size, on the CPU, in every process. What is made of their prompts stays in the
    data set.

    The tensors are those of `Targets`.
    """

    items: NDArray[np.int64]  # [N] indices into the data set
    z0: Tensor  # [N, C, h, w]
    x_t: Tensor  # [N, C, h, w]
    times: Tensor  # [N]
    x0: Tensor  # [N, C, h, w]
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """The conditioning that is made of their images [N, ...]; pixels as bytes."""

    def targets(self, chosen: Tensor, data: Dataset, device: torch.device, variance: Tensor) -> Targets:
        """The samples `chosen` [n], indices into these, on `device`; `variance` is that of their pool."""
        z0, x_t, times, x0 = (values[chosen].to(device) for values in (self.z0, self.x_t, self.times, self.x0))
        of_images = {name: _as_values(values[chosen]) for name, values in self.images.items()}
        conditioning = {**data.conditioning(self.items[chosen.numpy()]), **of_images}
        return Targets(
            z0, x_t, times, {name: values.to(device) for name, values in conditioning.items()}, x0, variance.to(device)
        )


def _as_bytes(values: Tensor) -> Tensor:
    """Pixels [...] in [-1, 1] that were bytes, as these again: a pool would take four times the memory."""
    return ((values + 1) * 127.5).round().to(torch.uint8)


def _as_values(values: Tensor) -> Tensor:
    """The same values as before `_as_bytes`; others as they are."""
    return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values


class Pool:
    """The solved samples of a number of batches. Each use goes through all of them, those of one size shuffled again."""

    def __init__(self, solved: list[Solved], batch_size: int) -> None:
        self.solved, self._batch_size = solved, batch_size

    @cached_property
    def variance(self) -> Tensor:
        """The variance [C] of the teacher's solutions, by channel."""
        return torch.cat([solved.x0.transpose(0, 1).flatten(1) for solved in self.solved], dim=1).var(dim=1)

    def batch(self, number: int, seed: int) -> tuple[Solved, Tensor]:
        """Batch `number` of a use: the samples of its size, and the indices [batch_size] of those in it. `seed` names the use."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(solved.items), generator=generator) for solved in self.solved]
        parts = [
            (solved, part) for solved, order in zip(self.solved, orders, strict=True) for part in order.split(self._batch_size)
        ]
        if len(self.solved) > 1:
            parts = [parts[index] for index in torch.randperm(len(parts), generator=generator)]
        return parts[number]


class SharedPools:
    """A folder where runs save the pools that do not draw on the student, for each other.

    Such a pool is a function of the values that name its file.
    """

    def __init__(self, folder: Path, recipe: Recipe, weights: Sequence[str]) -> None:
        """`weights` are the hashes of all networks that make a target: the base, and those that the recipe adds."""
        self._folder, self._batch_size = folder, recipe.batch_size
        self._fixed = " ".join([*weights, recipe.model_dump_json(include=_FIXED)])

    def pool(self, span: PoolSpan, make: Callable[[], Pool]) -> Pool:
        """The pool of a span if a run has saved it; otherwise the result of `make`, which is saved."""
        own = f"{span.phase.mode_weights} {span.index} {span.first_batch} {span.batches}"
        path = self._folder / f"{hashlib.sha256(f'{self._fixed} {own}'.encode()).hexdigest()[:32]}.pt"
        if path.exists():
            return Pool([Solved(**{**of, "items": of["items"].numpy()}) for of in load_state(path)["sizes"]], self._batch_size)
        pool = make()
        save_state(path, {"sizes": [{**vars(solved), "items": torch.from_numpy(solved.items)} for solved in pool.solved]})
        return pool


@torch.no_grad()
def make_pool(
    model: TorchModel,
    branches: Branches,
    data: Dataset,
    recipe: Recipe,
    span: PoolSpan,
    *,
    images: ImageConditions | None = None,
    on_solved: Callable[[int], None] = lambda _: None,
) -> Pool:
    """The pool of a span: each sample with its own item, start time, guidance and noise, solved by the teacher.

    It is a function of the seed, the span and, where the pool draws on the student, the student's weights in `model`. The
    processes share the work, and each gets the whole pool. `branches` are those of the teacher's guidance, `images` what the base
    reads of images, if any. `on_solved` gets a number of samples whenever so many more are solved.
    """
    grid, phase = recipe.grid, span.phase
    rng, generator = step_generator(recipe.seed, span.index)
    batches = [data.batch(number) for number in range(span.first_batch, span.first_batch + span.batches)]
    count = len(batches) * recipe.batch_size
    starts = torch.from_numpy(rng.choice(grid.solver_steps, count, p=start_probabilities(grid, phase.mode_weights)))
    guidance = torch.from_numpy(rng.uniform(*recipe.guidance, count)).float()
    simulated = torch.from_numpy(rng.random(count) < (phase.backward_simulation if data.has_images else 1.0))
    visits = torch.from_numpy(rng.random((count, grid.modes)) < 0.5)
    shapes = [(recipe.batch_size, *model.spec.latent_shape(size)) for size, _ in batches]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]

    teacher = teacher_of(model, branches, recipe)
    solved = []
    for size in dict.fromkeys(size for size, _ in batches):
        members = [number for number, (of, _) in enumerate(batches) if of == size]
        samples = torch.arange(count).view(len(batches), -1)[members].flatten()
        solved.append(
            solve(
                model, teacher, data, recipe, images, size,
                items=np.concatenate([batches[number][1] for number in members]),
                starts=starts[samples], guidance=guidance[samples], simulated=simulated[samples], visits=visits[samples],
                noise=torch.cat([noise[number] for number in members]),
                seed=int(rng.integers(2**62)), on_solved=on_solved,
            )
        )  # fmt: skip
    return Pool(solved, recipe.batch_size)


def teacher_of(model: TorchModel, branches: Branches, recipe: Recipe) -> Teacher:
    """The teacher of a run; `branches` are those of its guidance."""
    return Teacher(
        network=lambda latents, times, conditioning: run_network(model, latents, times, conditioning),
        branches=branches,
        grid=recipe.grid,
        schedule=model.spec.sampler.schedule,
        prediction=model.spec.prediction,
        lockstep=recipe.shard_base,
    )


def solve(
    model: TorchModel,
    teacher: Teacher,
    data: Dataset,
    recipe: Recipe,
    images: ImageConditions | None,
    size: Size,
    *,
    items: NDArray[np.int64],  # [N]
    starts: Tensor,  # [N] indices into the solver's times
    guidance: Tensor,  # [N]
    simulated: Tensor,  # [N] whether the noisy input is the student's own
    visits: Tensor,  # [N, M] which inference steps a sample's roll-out takes
    noise: Tensor,  # [N, C, h, w]
    seed: int,
    on_solved: Callable[[int], None],
) -> Solved:
    """Samples of one size with their noisy inputs and targets; the processes share the work, and each gets all of them."""
    device = model.device
    (mine,) = processes.rows(len(items))
    draws = processes.Draws(torch.Generator().manual_seed(seed), len(items), mine)
    draws_on_student = bool(simulated.any())  # of all processes' samples, because all must evaluate the network equally often
    noises = (
        torch.stack([draws.normal(noise.shape[1:]) for _ in range(recipe.grid.modes)]) if draws_on_student else torch.empty(0)
    )
    solver_times = torch.tensor(recipe.grid.solver_times())
    found: dict[str, list[Tensor]] = {"z0": [], "x_t": [], "x0": []}
    of_images: dict[str, list[Tensor]] = {}
    # In pieces, by default of a micro-batch's size, so that memory does not depend on the size of the pool.
    at_once = recipe.target_batch or recipe.batch_size // (processes.count() * recipe.accumulate)
    for piece in torch.arange(len(items))[mine].split(at_once):
        conditioning = {name: values.to(device) for name, values in data.conditioning(items[piece.numpy()]).items()}
        if images and images.wanted:
            made = [images.of(data.pixels(items[row]), size, (seed, row)) for row in piece.tolist()]
            stacked = {name: torch.stack([row[name] for row in made]) for name in images.names}
            conditioning |= {name: values.to(device) for name, values in stacked.items()}
            for name, values in stacked.items():
                of_images.setdefault(name, []).append(_as_bytes(values) if name in images.of_pixels else values)
        eps = noise[piece].to(device)
        z0 = data.latents(items[piece.numpy()]).to(device) if data.has_images else torch.zeros_like(eps)
        image = z0
        if draws_on_student:
            chosen = noises[:, piece - mine.start].to(device)
            own = roll_out(model, chosen, starts[piece], visits[piece], simulated[piece], conditioning, recipe)
            image = torch.where(_rows(simulated[piece], device), own, z0)
        x_t = renoise(image, eps, *levels(model, solver_times[starts[piece]].to(device)))
        # The first grid point is pure noise, without a trace of an image, because inference starts there.
        x_t = torch.where(_rows(starts[piece] == 0, device), eps, x_t)
        x0 = _target(model, teacher, recipe, x_t, starts[piece], guidance[piece].to(device), conditioning)
        for name, values in (("z0", z0 if data.has_images else x0), ("x_t", x_t), ("x0", x0)):
            found[name].append(values)
        on_solved(len(piece) * processes.count())
    z0, x_t, x0 = (processes.gather(torch.cat(values)) for values in found.values())
    conditions = {name: _gathered(torch.cat(values), device) for name, values in of_images.items()}
    return Solved(items, z0, x_t, solver_times[starts], x0, conditions)


def _gathered(values: Tensor, device: torch.device) -> Tensor:
    """As `processes.gather`, of values on the CPU: processes exchange what is on their devices, and one alone moves nothing."""
    return processes.gather(values.to(device)) if processes.count() > 1 else values


def roll_out(
    model: TorchModel,
    noises: Tensor,  # [M, n, C, h, w], one per step
    starts: Tensor,  # [n] indices into the solver's times
    visits: Tensor,  # [n, M]
    simulated: Tensor,  # [n]
    conditioning: Mapping[str, Tensor],  # [n, ...]
    recipe: Recipe,
) -> Tensor:
    """Backward simulation (DMD2, 2405.14867, section 4.5): x_0 [n, C, h, w] of the student's own sampling before `starts`.

    Sampling goes from pure noise over the inference steps that a sample `visits`, so that the paths of all numbers of steps
    occur. The result is zero for samples that start at pure noise or are not `simulated`.
    """
    x0 = torch.zeros_like(noises[0])
    grid = recipe.grid
    for mode, index in enumerate(grid.mode_indices()):
        wanted = (simulated & (starts > index) & (visits[:, mode] | (mode == 0))).nonzero().squeeze(1)
        if not len(wanted) and not recipe.shard_base:
            continue
        active = wanted if len(wanted) else torch.tensor([0])  # other processes need this evaluation too; its result is dropped
        times = torch.full((len(active),), grid.solver_times()[index], device=x0.device)
        noise = noises[mode][active]
        x_t = renoise(x0[active], noise, *levels(model, times)) if mode else noise
        found = predict_x0(model, x_t, times, {name: values[active] for name, values in conditioning.items()})
        x0[wanted] = found[: len(wanted)]
    return x0


def _target(
    model: TorchModel,
    teacher: Teacher,
    recipe: Recipe,
    x_t: Tensor,  # [n, C, h, w]
    starts: Tensor,  # [n]
    guidance: Tensor,  # [n]
    conditioning: Mapping[str, Tensor],  # [n, ...]
) -> Tensor:
    """The target of the student's x_0 [n, C, h, w]: the end of the teacher's ODE, or the student's x_0 after one step of it."""
    grid = recipe.grid
    max_steps = 1 if recipe.target == "consistency" else None
    with as_teacher(model):
        solution = teacher.solve(x_t, starts, guidance, guided(conditioning, guidance), max_steps=max_steps)
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
    """The student's one conditional evaluation at each sample's start, as x_0 [N, C, h, w]."""
    return predict_x0(model, batch.x_t, batch.times, batch.conditioning)
