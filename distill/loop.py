"""The training program: pools, updates, checkpoints and what is published in their order. `step` and `objective` do the work."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.components import ModelSpec
from flashdiff.distill import processes
from flashdiff.distill.bases import hashes_of_networks, load_trained_base
from flashdiff.distill.batch import MicroBatch, Targets
from flashdiff.distill.checkpoints import RECIPE, WEIGHTS, checkpoint_path, checkpoints
from flashdiff.distill.checks import check_run
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import Recipe
from flashdiff.distill.costs import RemainingTime
from flashdiff.distill.curriculum import phase_at
from flashdiff.distill.data import Dataset, load_dataset
from flashdiff.distill.held_out import HeldOut
from flashdiff.distill.initial import first_weights
from flashdiff.distill.network import checkpoint_gradients, place
from flashdiff.distill.objective import Objective
from flashdiff.distill.previews import preview, preview_steps, save_image
from flashdiff.distill.processes import Draws
from flashdiff.distill.progress import Stage, lines_above_bars, shown_time
from flashdiff.distill.publish import publish
from flashdiff.distill.speed import LOG, Speed
from flashdiff.distill.step import Pool, PoolSpan, SharedPools, make_pool, span_at, student_x0
from flashdiff.distill.student import Student
from flashdiff.distill.student_kinds import kind_of
from flashdiff.distill.trackers import Tracker, open_tracker
from flashdiff.errors import NotFiniteError, TrainingError, first_line
from flashdiff.families import find_base
from flashdiff.families.base import TorchModel
from flashdiff.families.files import base_files
from flashdiff.files import sweep_parts, write_whole
from flashdiff.locks import sole_user
from flashdiff.lora import read_flash_info
from flashdiff.lora_files import FLASH
from flashdiff.reading import first_change, read_json, witness
from flashdiff.sampling import Sampler, flash_student
from flashdiff.tasks.samples import needed_inputs

_log = logging.getLogger(__name__)

_LOSS_STREAM = 1 << 20
_SAME_RESULT = (
    "hash", "accumulate", "gradient_checkpointing", "shard_base", "checkpoint_every", "checkpoints_keep", "tracker",
    "preview_prompts", "target_batch", "skip_limit",
)  # fmt: skip
"""Keys that may change when a run is resumed, such as after it ran out of memory: no result depends on them."""
_TIMED_UPDATES = 10
"""After so many updates of this process, in a new or a resumed run, the log says how long the rest will take."""


def distill(recipe: Recipe, out: Path, *, pools: Path | None = None) -> bool:
    """Train the recipe's flash student into the folder `out`; a killed run is resumed by the same call.

    Returns False when `out` holds the finished student of the same recipe already, which is left alone.

    `pools` is a folder where runs of one process save the teacher's targets for other runs that need the same ones.

    Working files (checkpoints, log, curves, previews) are in `out/training`. TrainingError when the run cannot start, runs out
    of memory or computes numbers that are not finite; the last checkpoint is then untouched. ConfigError when the recipe does
    not fit the number of processes.
    """
    work = out / "training"
    if (out / FLASH).exists():
        info = read_flash_info(out)
        if info is None or info.recipe_hash != recipe.content_hash:
            raise TrainingError(f"{out} holds a finished run of another recipe; choose another --out or remove it")
        return False
    processes.check_split(recipe.batch_size, recipe.accumulate, shard_base=recipe.shard_base)
    with _claimed(work) if processes.is_main() else nullcontext():
        processes.main_first(lambda: _check_recipe(work, recipe))
        with lines_above_bars():
            _run(recipe, out, work, pools)
    return True


def _run(recipe: Recipe, out: Path, work: Path, pools: Path | None) -> None:
    """Train and publish, in a folder that is this run's alone."""
    with _explained_out_of_memory(recipe):
        base = find_base(recipe.base)
        files = witness(base_files(base))
        family, model = load_trained_base(recipe)
        weights = {"base": model.base_hash, **hashes_of_networks(recipe)}
        processes.main_first(lambda: _check_weights(work, weights))
        shared = SharedPools(pools, recipe, [*weights.values()]) if pools and processes.count() == 1 else None
        images = ImageConditions(model, recipe)
        check_run(model, recipe)
        place(model, recipe)
        _log.info("reading up to %d samples of '%s'", recipe.data.images, recipe.data.source)
        data = load_dataset(recipe.data, model, batch_size=recipe.batch_size, seed=recipe.seed, wanted=images.wanted)
        prints = ", ".join(f"{name[:12]} in {precision}" for precision, name in model.base_prints.items())
        _log.info("the base '%s' has the hash %s (%s)", recipe.base, model.base_hash[:12], prints)
        data, apart = data.held_out(recipe.keep_best)
        size = model.spec.sizes[0]
        if recipe.preview_prompts and images.wanted and not data.of_size(size):
            shown = "there are no previews" if needed_inputs(model.spec, size) else "previews show prompts alone"
            _log.warning("%s: no sample has %s, the size that they are drawn at", shown, size)
        if changed := first_change(files, witness(base_files(base))):
            raise TrainingError(f"{changed} changed while the run read it; start again when the base stays as it is")
        if processes.device().type != "cpu":
            model.text_encoder.to("cpu", torch.float32)  # from here on only previews use it
        kind_of(recipe).insert(model, family, recipe)
        kind_of(recipe).keep_teacher(model)
        objective = Objective(model, family, recipe, images)
        student = Student(model, recipe)
        if recipe.gradient_checkpointing:
            checkpoint_gradients(model)
        if not _resume(work, student, objective) and recipe.init_from:
            student.start_from(first_weights(recipe.init_from, model, family, recipe))
            _log.info("the student starts with the weights of '%s'", recipe.init_from)
        _log.info("training %d parameters from update %d of %d", student.parameter_count, student.update, recipe.updates)
        held_out = HeldOut(model, objective.branches, apart, recipe, images, work) if recipe.keep_best else None
        tracker = open_tracker(recipe, work, student.update) if processes.is_main() else None
        if processes.is_main():  # now that all of the recipe is known to be good: one with a mistake can be mended
            _save_recipe(work, recipe, weights)
        try:
            _train(model, student, objective, data, held_out, images, recipe, work, tracker, shared)
        finally:
            if tracker:
                tracker.close()

    if processes.is_main():
        published = [(out, recipe.updates, student.average)]
        if held_out:
            best = held_out.best()
            published.insert(0, (out / "best", best["update"], best["weights"]))
        for folder, updates, its_weights in published:
            folder.mkdir(exist_ok=True)
            with student.holding(its_weights):
                publish(folder, model, family, recipe, student, work / LOG, updates, images=images, branches=objective.branches)
    processes.wait()


def flash_sampler(model: TorchModel, recipe: Recipe) -> Sampler:
    """The sampler of the student that this recipe trains."""
    return flash_student(model.spec.sampler, recipe.grid)


def _train(
    model: TorchModel,
    student: Student,
    objective: Objective,
    data: Dataset,
    held_out: HeldOut | None,
    images: ImageConditions,
    recipe: Recipe,
    work: Path,
    tracker: Tracker | None,
    shared: SharedPools | None,
) -> None:
    log = work / LOG
    if tracker and log.exists():  # drop what a killed run logged after its last checkpoint: those updates are computed again
        write_whole(log, "".join(log.read_text().splitlines(keepends=True)[: student.update]))
    time_left, speed, count = RemainingTime(recipe, objective.branches), Speed(recipe.batch_size), 0
    pool: Pool | None = None
    ends = accumulate(phase.updates for phase in recipe.phases)
    for number, (phase, end) in enumerate(zip(recipe.phases, ends, strict=True), 1):
        if student.update >= end:
            continue
        name = f"phase {number} of {len(recipe.phases)}" if len(recipe.phases) > 1 else "distill"
        with Stage(name, "updates", phase.updates, done=student.update - end + phase.updates) as stage:
            while student.update < end:
                update = student.update
                span = span_at(recipe, update)
                if pool is None or update == span.first:
                    started = time.monotonic()
                    pool = None  # or both pools would be in memory while the new one is made
                    pool = _new_pool(model, student, objective, data, images, recipe, span, shared)
                    took = time.monotonic() - started
                    time_left.solved(span, took)
                    speed.took("targets", took)
                started = time.monotonic()
                line = _update(model, student, objective, data, recipe, work, pool, span, speed, tracker)
                took = time.monotonic() - started
                time_left.updated(phase, took)
                speed.took("updates", took, updates=1)
                count += 1
                left = shown_time(time_left.left_s(student.update))
                if count == _TIMED_UPDATES and tracker:
                    _log.info(
                        "%.3g s an update and %.3g s for its targets, by the first %d: about %s to go",
                        *(time_left.update_s, time_left.target_s, _TIMED_UPDATES, left),
                    )
                shown = f"loss {line['loss']:.4f}" if "loss" in line else "skipped"
                stage.advance(note=f"{shown}, about {left} to go")
                is_saved = student.update % recipe.checkpoint_every == 0 or student.update == recipe.updates
                started = time.monotonic()
                if held_out and is_saved:
                    line["held_out"] = held_out.measure(model, student)
                if tracker:
                    with log.open("a") as file:
                        file.write(json.dumps({"update": update, **line}) + "\n")
                    tracker.numbers(update, line)
                if is_saved:
                    _save_progress(model, student, objective, data, images, recipe, work, tracker)
                    took = time.monotonic() - started
                    time_left.previewed(took)
                    speed.took("checkpoints", took)
                    if tracker:
                        tracker.numbers(update, speed.write(work, student.update))
            stage.advance(0, shown)  # the bar stays on the terminal, and no time is left of its phase


def _update(
    model: TorchModel,
    student: Student,
    objective: Objective,
    data: Dataset,
    recipe: Recipe,
    work: Path,
    pool: Pool,
    span: PoolSpan,
    speed: Speed,
    tracker: Tracker | None,
) -> dict[str, float]:
    """The student's next update, from its batch of the pool; a batch whose loss is not finite is saved for inspection, and
    skipped where the recipe allows it."""
    update = student.update
    use, number = divmod(update - span.first, span.batches)
    solved, chosen = pool.batch(number, seed=((recipe.seed << 24) + span.index) * 64 + use)

    def targets(rows: slice, device: torch.device) -> Targets:
        return solved.targets(chosen[rows], data, device, pool.variance)

    try:
        parts = [targets(rows, model.device) for rows in processes.rows(recipe.batch_size, recipe.accumulate)]
        return _learn(model, student, objective, parts, recipe, speed)
    except TrainingError as error:
        if tracker:
            save_state(work / "bad_batch.pt", vars(targets(slice(None), torch.device("cpu"))))
        if isinstance(error, NotFiniteError) and student.skipped < recipe.skip_limit:
            student.skip(update)
            _log.warning("skipped: %s (%d of at most %d)", error, student.skipped, recipe.skip_limit)
            return {"skipped": student.skipped}
        raise TrainingError(f"{error}; the batch is in {work / 'bad_batch.pt'}, the last checkpoint is untouched") from None


def _new_pool(
    model: TorchModel,
    student: Student,
    objective: Objective,
    data: Dataset,
    images: ImageConditions,
    recipe: Recipe,
    span: PoolSpan,
    shared: SharedPools | None,
) -> Pool:
    """The pool of a span; it depends only on seed, span and anchor, so a resumed run makes the same one."""

    def make() -> Pool:
        name = f"targets of updates {span.first} to {span.end - 1}"
        with Stage(name, "samples", span.batches * recipe.batch_size, nested=True) as stage:
            return make_pool(model, objective.branches, data, recipe, span, images=images, on_solved=stage.advance)

    if not (span.phase.backward_simulation or recipe.target == "consistency" or not data.has_images):
        return shared.pool(span, make) if shared else make()
    if student.update == span.first:
        student.set_anchor()
    with student.holding(student.anchor):
        return make()


def _learn(
    model: TorchModel, student: Student, objective: Objective, targets: list[Targets], recipe: Recipe, speed: Speed
) -> dict[str, float]:
    """One update of the student and its opponents, from this process's rows of a batch; the numbers of its line in the log."""
    # The phase's weights may be ramping up. The losses' random stream is apart from that of the pools.
    phase = phase_at(recipe.phases, student.update, recipe.ramp_updates)
    batches: list[MicroBatch] = []
    totals: dict[str, Tensor] = {}
    for chunk, rows in zip(targets, processes.rows(recipe.batch_size, recipe.accumulate), strict=True):
        _, generator = step_generator(recipe.seed + _LOSS_STREAM, student.update)
        batch = MicroBatch(chunk, student_x0(model, chunk), Draws(generator, recipe.batch_size, rows, model.device))
        losses = objective.losses(batch, phase)
        (torch.stack(list(losses.values())).sum() / len(targets)).backward()
        batches.append(batch.detached())
        for name, value in {**losses, **_moments(batch)}.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(targets)
    values = dict(zip(totals, processes.mean(torch.stack(list(totals.values()))).tolist(), strict=True))
    mean, square, teacher_square = (values.pop(name) for name in _MOMENTS)
    loss = sum(values.values())
    student.learn(loss)
    student.bound(square**0.5, teacher_square**0.5)
    with speed.within("opponents"):
        opponents = objective.train_opponents(batches)
    latents = {"latent_mean": mean, "latent_std": (square - mean**2) ** 0.5}
    return {"loss": loss, **values, **opponents, **latents, "gradient_norm": student.gradient_norm}


_MOMENTS = ("mean", "square", "teacher_square")


def _moments(batch: MicroBatch) -> dict[str, Tensor]:
    """Moments of the student's latents and the teacher's: losses driven by guidance make them drift before images fall apart."""
    return dict(zip(_MOMENTS, (batch.x0.mean(), batch.x0.square().mean(), batch.targets.x0.square().mean()), strict=True))


# --- on disk ---------------------------------------------------------------------------------------------------------


def _save_progress(
    model: TorchModel,
    student: Student,
    objective: Objective,
    data: Dataset,
    images: ImageConditions,
    recipe: Recipe,
    work: Path,
    tracker: Tracker | None,
) -> None:
    """Save a checkpoint and a preview of the averaged student next to the teacher; only the main process writes them."""
    if tracker:
        save_state(
            checkpoint_path(work, student.update),
            {
                "student": student.state_dict(),
                "objective": objective.state_dict(),
                "base_hash": model.base_hash,
                "base_prints": model.base_prints,
            },
        )
        for old in checkpoints(work)[: -recipe.checkpoints_keep]:
            old.unlink()
    requests = _preview_requests(data, images, recipe, model.spec)
    if requests and (tracker or recipe.shard_base):
        sampler = flash_sampler(model, recipe)
        steps = preview_steps(model, sampler, requests, branches=objective.branches.count)
        with student.holding(student.average), Stage("preview", "steps", steps, nested=True) as stage:
            guidance, negative = sum(recipe.guidance) / 2, recipe.negative_prompt
            sheet = preview(model, sampler, guidance, requests, stage.advance, negative_prompt=negative)
        if tracker:
            save_image(sheet, work / "previews" / f"{student.update:06d}.png")
            tracker.image(student.update - 1, sheet)  # the update that this checkpoint's numbers have
    processes.wait()


def _preview_requests(data: Dataset, images: ImageConditions, recipe: Recipe, spec: ModelSpec) -> list[dict[str, Any]]:
    """The prompts of previews, each with the images of a sample of the base's size, where the base reads images and there is one;
    none where it makes nothing of prompts alone and there is no such sample."""
    size = spec.sizes[0]
    prompts = [{"prompt": prompt} for prompt in recipe.preview_prompts]
    samples = data.of_size(size) if images.wanted else []
    if not samples:
        return [] if needed_inputs(spec, size) else prompts
    return [
        {**prompt, **images.request(data.pixels(samples[number % len(samples)]), size, np.random.default_rng(number))}
        for number, prompt in enumerate(prompts)
    ]


def _resume(work: Path, student: Student, objective: Objective) -> bool:
    """Restore the last checkpoint; False where there is none."""
    if found := checkpoints(work):
        state = load_state(found[-1])
        try:
            student.load_state_dict(state["student"])
            objective.load_state_dict(state["objective"])
        except Exception as error:  # a file that torch can load, but of something else
            raise TrainingError(
                f"{found[-1]} is no checkpoint of this run ({first_line(error)}); remove it to go on from the one before"
            ) from None
    return bool(found)


@contextmanager
def _explained_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """Turn running out of memory into a TrainingError that names the settings which would take less and are not set yet."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors, of its own class for GPUs alone
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        share = recipe.batch_size // processes.count()
        micro_batch, cures = share // recipe.accumulate, []
        if recipe.target_batch and recipe.target_batch > micro_batch:
            cures.append(f"target_batch = {micro_batch}")
        if recipe.accumulate < share:
            cures.append(f"accumulate = {next(n for n in range(recipe.accumulate + 1, share + 1) if share % n == 0)}")
        if not recipe.gradient_checkpointing:
            cures.append("gradient_checkpointing = true")
        if processes.count() > 1 and recipe.student == "lora" and not (recipe.shard_base or recipe.int8_base):
            cures.append("shard_base = true")
        if recipe.optimizer == "adamw" and processes.device().type == "cuda":
            cures.append('optimizer = "adamw_8bit"')
        is_lora = recipe.student == "lora"
        cures.append("a smaller lora.rank or batch_size" if is_lora else 'a smaller batch_size or student = "lora"')
        raise TrainingError(
            f"out of memory with {micro_batch} samples at a time: set {', or '.join(cures)}; the last checkpoint is untouched"
        ) from None


@contextmanager
def _claimed(work: Path) -> Iterator[None]:
    """Within the block no other process trains in this folder; TrainingError when one does already."""
    busy = TrainingError(f"another process trains in {work} now; choose another --out or wait for its end")
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_user(work / "lock", busy))
            sweep_parts(work / "checkpoints")
        except OSError as error:
            raise TrainingError(f"{work}: cannot write there: {error.strerror}") from None
        yield


def _check_recipe(work: Path, recipe: Recipe) -> None:
    """TrainingError when the working folder holds a run of a recipe with other results."""
    resolved, values = work / RECIPE, _resolved(recipe)
    try:
        before = read_json(resolved) if resolved.exists() else dict(values)
        if not isinstance(before, dict):
            raise ValueError("it is no JSON object")
        if not isinstance(before.pop(WEIGHTS, {}), dict):
            raise ValueError(f"'{WEIGHTS}' is no JSON object")
        names = dict.fromkeys((*values, *before))  # keys at their defaults may be in one of them alone
        same = {*_SAME_RESULT} - ({"checkpoint_every"} if recipe.keep_best else set())  # the best is one of the checkpoints
        changed = [name for name in names if name not in same and before.get(name) != values.get(name)]
        if changed:
            raise TrainingError(
                f"{work} holds a run of another recipe, which differs in {', '.join(changed)}; choose another --out or remove it"
            )
    except ValueError as error:
        raise TrainingError(f"{resolved} is damaged ({error}); choose another --out or remove {work}") from None
    except OSError as error:
        raise TrainingError(f"{resolved}: cannot be read: {error.strerror}") from None


def _check_weights(work: Path, weights: Mapping[str, str]) -> None:
    """TrainingError when a run in the working folder, whose recipe was checked, loaded other files."""
    before = read_json(work / RECIPE).get(WEIGHTS, {}) if (work / RECIPE).exists() else {}
    if changed := [name for name, value in weights.items() if before.get(name, value) != value]:
        raise TrainingError(
            f"{changed[0]}: its files are not those that the run in {work} began with; put them back, or choose another --out"
        )


def _save_recipe(work: Path, recipe: Recipe, weights: Mapping[str, str]) -> None:
    try:
        write_whole(work / RECIPE, json.dumps({**_resolved(recipe), WEIGHTS: weights}, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"{work}: cannot write there: {error.strerror}") from None


def _resolved(recipe: Recipe) -> dict[str, object]:
    """The recipe as it is saved, defaults included."""
    return {"hash": recipe.content_hash, **recipe.model_dump(mode="json")}
