"""A row is one image, or one tile of it, in progress: its noise, its start, one step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff import controls as of_controls
from flashdiff import lora_requests as of_loras
from flashdiff import references
from flashdiff.components import Components, ModelSpec, Size, Tensors
from flashdiff.errors import BackendError, RequestError
from flashdiff.noise import Plane, image_seed
from flashdiff.orders import Order
from flashdiff.parts import Condition
from flashdiff.prediction import to_x0, with_norm_of
from flashdiff.samplers.base import Walk
from flashdiff.sampling import extrapolate, ode_step, ode_weights, renoise
from flashdiff.tasks.base import Branch, Kept, Prepared
from flashdiff.tiles import ORIGIN, Place

_EARLY_VALUES = 1 << 16
"""Latents of so many values get the noise of all their steps at the start; for larger ones that would delay the first step."""

_STAND_INS = {"zeros": np.zeros, "ones": np.ones}
"""What makes a condition that a request lacks, by `Condition.absent`."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The steps of an order's images, the same for each.

    What steps need is computed before the first: right after an engine call, which fills the processor's caches with weights,
    the same work takes several times as long.
    """

    times: list[int] | list[float]
    alphas: NDArray[np.float32]  # [steps], or one more, the clean end, without a walk
    sigmas: NDArray[np.float32]
    extrapolations: Sequence[np.float32] = ()  # weights of `extrapolate` at each time, where the sampler is an ODE's
    walk: Walk | None = None
    """Where the sampler is a published student's."""


@dataclass
class Row:
    """It starts as noise and is done when `step` reaches the number of its times."""

    plane: Plane
    """The rows of an image share it."""
    size: Size
    trajectory: Trajectory
    branches: tuple[Branch, ...]
    latents: NDArray[np.float32]  # [C, h, w]
    first_noise: NDArray[np.float32] = field(repr=False)  # [C, h, w]
    later_noises: list[NDArray[np.float32]] = field(repr=False)  # of the steps from 1 on, where they are drawn early
    place: Place = ORIGIN
    kept: Kept | None = None
    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Of conditions that have scales, at each step [steps], by condition; 0 where it is absent."""
    replacing: str | None = None
    """The part that its steps call in the place of the usual one: see `ModelSpec.step_parts`."""
    step: int = 0
    x0: NDArray[np.float32] | None = field(default=None, repr=False)
    """[C, h, w]: the last step's estimate of the finished latents."""

    @property
    def times(self) -> list[int] | list[float]:
        """What the network reads at each step, noisiest first."""
        return self.trajectory.times

    @property
    def is_done(self) -> bool:
        return self.step == len(self.times)

    @property
    def slots(self) -> int:
        """Network evaluations that one step takes."""
        return len(self.branches)


def draw_noise(spec: ModelSpec, order: Order) -> list[list[NDArray[np.float32]]]:
    """For each row of the order the noise [C, h, w] of its first time, and of later steps where latents are small.

    It does not depend on the prompt: a server draws it while the device encodes texts.
    """
    return [_noise_of(spec, order, plane, place) for plane, place in _planes_and_places(spec, order)]


def _planes_and_places(spec: ModelSpec, order: Order) -> list[tuple[Plane, Place]]:
    """Of each of its rows."""
    shape = spec.latent_shape(order.size)
    planes = [Plane(image_seed(order.seed, index), shape) for index in range(order.count)]
    return [(plane, place) for plane in planes for place in order.places]


def _noise_of(spec: ModelSpec, order: Order, plane: Plane, place: Place) -> list[NDArray[np.float32]]:
    values = math.prod(spec.latent_shape(order.size))
    are_early = spec.sampler.is_stochastic and order.tiling is None and values <= _EARLY_VALUES
    return [plane.tile(step, place) for step in range(order.steps_taken if are_early else 1)]


def start_rows(
    spec: ModelSpec,
    order: Order,
    prepared: Prepared,
    unconditional: Tensors | None,
    noise: Sequence[Sequence[NDArray[np.float32]]] = (),
) -> list[Row]:
    """A row, with latents [C, h, w], for each image of an order whose inputs are prepared, or for each of its tiles.

    `noise` is the result of `draw_noise` where it was drawn before.

    `unconditional` is `generate.unconditional_of` the model. RequestError for an order without a condition that it needs.
    """
    drawn = [order.task.drawn(spec, order, image_seed(order.seed, index)) for index in range(order.count)]
    shared = branches_of(spec, order, prepared, unconditional, drawn[0])
    evaluated = [shared, *(branches_of(spec, order, prepared, unconditional, own) if own else shared for own in drawn[1:])]
    replacing = replacing_part(spec, order)
    trajectory = _trajectory(spec, order)
    starts, kept = order.task.starts(order, prepared), order.task.kept(spec, order, prepared)
    rows = []
    for index, (plane, place) in enumerate(_planes_and_places(spec, order)):
        first, *later = noise[index] if noise else _noise_of(spec, order, plane, place)
        start = starts[index % len(starts)]
        branches, scales = evaluated[index // len(starts)]
        if start is None:
            latents = first if trajectory.walk is None else np.float32(trajectory.walk.start) * first
        else:
            latents = renoise(start, first, trajectory.alphas[0], trajectory.sigmas[0])
        rows.append(
            Row(
                plane,
                order.size,
                trajectory,
                branches,
                latents,
                first_noise=first,
                later_noises=later,
                place=place,
                kept=kept,
                scales=scales,
                replacing=replacing,
            )
        )
    return rows


def branches_of(
    spec: ModelSpec,
    order: Order,
    prepared: Prepared,
    unconditional: Tensors | None,
    drawn: Mapping[str, NDArray[Any]],
) -> tuple[tuple[Branch, ...], dict[str, NDArray[np.float32]]]:
    """The branches of an order's steps, with all that the denoiser takes, and the scales at each step [steps], by condition.

    `drawn` is what the image drew: `Task.drawn`. The other arguments, and the errors, are those of `start_rows`.
    """
    own = {**of_controls.images_of(order.controls, prepared), **of_loras.vectors_of(order.loras)}
    taken = spec.taken_by(replacing_part(spec, order))
    evaluated = order.task.branches(spec, order, prepared, unconditional)
    branches = tuple(
        replace(branch, conditions=_complete(spec, taken, order.size, {**branch.conditions, **own, **tokens, **drawn}))
        for branch in evaluated
        for tokens in [references.tokens_of(prepared, has_prompt=branch.has_prompt)]
    )
    given = {condition.name for condition in taken if condition.scaled and condition.name in evaluated[0].conditions}
    scales = {
        **dict.fromkeys(given, np.ones(order.steps_taken, dtype=np.float32)),
        **of_controls.scales_of(order.controls, order.steps_taken),
        **of_loras.scales_of(order.loras, order.steps_taken),
        **references.scales_of(order),
    }
    return branches, scales


def replacing_part(spec: ModelSpec, order: Order) -> str | None:
    """The part that takes an order's steps in the place of the usual one, because of what it takes more; None: the usual one."""
    wanted = {enters for enters, given in (("residual", order.controls), ("weights", order.loras)) if given}
    if not wanted:
        return None
    usual = {condition.name for condition in spec.taken_by()}
    for part in spec.replacements:
        if {c.enters for c in spec.taken_by(part.name) if c.name not in usual} == wanted:
            return part.name
    raise AssertionError(f"no part takes {wanted}")  # `check_order` knows what the model takes


def _complete(
    spec: ModelSpec, taken: Sequence[Condition], size: Size, given: Mapping[str, NDArray[Any]]
) -> Mapping[str, NDArray[Any]]:
    """All of the conditions that are taken: zeros or ones for those that may be absent."""
    missing = [condition for condition in taken if condition.name not in given]
    if not missing:
        return given
    for condition in missing:
        if condition.absent not in _STAND_INS:
            raise RequestError(condition.name, None, "this model needs it")
    stand_ins = {c.name: _STAND_INS[c.absent](shape_of(spec, c, size), dtype=np.float32) for c in missing}
    return {**given, **stand_ins}


def shape_of(spec: ModelSpec, condition: Condition, size: Size) -> tuple[int, ...]:
    """[C, H, W] of an image, [T, D] of tokens, or [values] of a vector, that may be absent."""
    if condition.tokens:
        return condition.tokens
    if condition.values:
        return (condition.values,)
    if condition.is_of_pixel_size:
        return condition.channels, size.height, size.width
    _, height, width = spec.latent_shape(size)
    return condition.channels, height, width


def _trajectory(spec: ModelSpec, order: Order) -> Trajectory:
    tokens, taken = spec.tokens(order.size), -order.steps_taken
    if walk := spec.sampler.walk(spec.prediction, order.steps, tokens):
        walk = walk.last(order.steps_taken)
        times = [int(time) for time in walk.times] if spec.sampler.whole_times else walk.times
        return Trajectory(times, walk.alphas.astype(np.float32), walk.sigmas.astype(np.float32), walk=walk)
    times = spec.sampler.times(order.steps, tokens)[taken:]
    alphas, sigmas = spec.sampler.levels(times)
    weights = ode_weights(alphas[:-1], sigmas[:-1]) if spec.sampler.kind == "ode" else []
    return Trajectory(times, alphas.astype(np.float32), sigmas.astype(np.float32), [np.float32(weight) for weight in weights])


def denoise_rows(components: Components, rows: Sequence[Row]) -> None:
    """Take every row one step further; an error changes none. The rows share a size and the parts of their steps, and their slots
    fit in one batch."""
    # The first branches of all rows stand first in the batch, then the second ones of those that have one, and so on.
    most = max(row.slots for row in rows)
    entries = [(index, row.branches[rank]) for rank in range(most) for index, row in enumerate(rows) if rank < row.slots]
    spec = components.spec
    times = [rows[index].times[rows[index].step] for index, _ in entries]
    values: dict[str, NDArray[Any]] = {
        "latents": stacked([rows[index].latents for index, _ in entries]),
        "times": np.array(times, dtype=np.float32 if isinstance(times[0], float) else np.int64),
    }
    replacing = rows[0].replacing
    for condition in spec.taken_by(replacing):
        values[condition.name] = stacked([branch.conditions[condition.name] for _, branch in entries])
        if condition.scaled:
            of_rows = [_scale_of(row, condition) for row in rows]
            values[condition.scale_name] = np.array([of_rows[index] for index, _ in entries], dtype=np.float32)
    for part in spec.step_parts(replacing):
        values |= components.call(part.name, {name: values[name] for name in part.inputs})
    outputs = _weighted(entries, values["output"], len(rows))
    if spec.sampler.keeps_norm:
        outputs = [
            with_norm_of(output, first) if row.slots > 1 else output
            for row, output, first in zip(rows, outputs, values["output"], strict=False)
        ]
    for row, output in zip(rows, outputs, strict=True):
        if not np.isfinite(output).all():
            raise BackendError(
                f"the network returned values that are not finite at time {row.times[row.step]} (seed {row.plane.seed})"
            )
    for row, output in zip(rows, outputs, strict=True):
        _advance(spec, row, output)
        if row.kept:
            own = row.kept.latents
            if not row.is_done:
                own = renoise(own, row.first_noise, row.trajectory.alphas[row.step], row.trajectory.sigmas[row.step])
            row.latents = np.where(row.kept.cells, own, row.latents)


def _scale_of(row: Row, condition: Condition) -> float:
    """The condition's scale in the row's next step."""
    return float(row.scales[condition.name][row.step]) if condition.name in row.scales else 0.0


def _weighted(entries: Sequence[tuple[int, Branch]], output: NDArray[np.float32], count: int) -> list[NDArray[np.float32]]:
    """Each row's sum of its branches' outputs, by their weights."""
    if len(entries) == count:
        return list(output)
    sums: list[NDArray[np.float32] | None] = [None] * count
    for (index, branch), values in zip(entries, output, strict=True):
        before, values = sums[index], branch.weight * values
        sums[index] = values if before is None else before + values
    return [total for total in sums if total is not None]


def stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows [...] as one batch [B, ...]: `np.stack`, which for a single row would cost more than the rest of its step."""
    return np.stack(rows) if len(rows) > 1 else rows[0][None]


def _advance(spec: ModelSpec, row: Row, output: NDArray[np.float32]) -> None:
    """One sampler step of one row, alone, so that no other row of the batch can touch its arithmetic."""
    step, trajectory, previous_x0 = row.step, row.trajectory, row.x0
    row.step += 1
    if walk := trajectory.walk:
        row.x0 = walk.clean(step, row.latents, output)
        row.latents = walk.advance(step, row.latents, output, _step_noise(row) if walk.needs_noise(step) else None)
        return
    alpha, sigma, next_alpha, next_sigma = (
        trajectory.alphas[step],
        trajectory.sigmas[step],
        trajectory.alphas[row.step],
        trajectory.sigmas[row.step],
    )
    x0 = row.x0 = to_x0(spec.prediction, output, row.latents, alpha, sigma)
    if spec.sampler.kind == "ode":
        estimate = x0 if previous_x0 is None else extrapolate(x0, previous_x0, trajectory.extrapolations[step])
        row.latents = ode_step(row.latents, estimate, alpha, sigma, next_alpha, next_sigma)
    elif row.is_done:
        row.latents = x0
    else:
        row.latents = renoise(x0, _step_noise(row), next_alpha, next_sigma)


def _step_noise(row: Row) -> NDArray[np.float32]:
    """What the step that ends at `row.step` adds."""
    drawn = row.step - 1
    if drawn < len(row.later_noises):
        return row.later_noises[drawn]
    return row.plane.tile(row.step, row.place)
