"""The training program: when things happen. What one update is stands in `step` and `objective`."""

import json
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.distill import processes
from flashdiff.distill.config import Recipe
from flashdiff.distill.curriculum import phase_at
from flashdiff.distill.data import Dataset, load_dataset
from flashdiff.distill.network import checkpoint_gradients, place
from flashdiff.distill.objective import Objective, Part
from flashdiff.distill.plan import remaining_s
from flashdiff.distill.previews import preview, save_image
from flashdiff.distill.processes import Draws
from flashdiff.distill.publish import publish
from flashdiff.distill.step import Pool, Stretch, Targets, make_pool, shared_pool, stretch_at, student_x0
from flashdiff.distill.student import Student
from flashdiff.distill.trackers import Tracker, open_tracker
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
from flashdiff.files import write_whole
from flashdiff.lora import FLASH, add_adapter
from flashdiff.sampling import Sampler

_log = logging.getLogger(__name__)

_LOG = "log.jsonl"
_LOSS_STREAM = 1 << 20
_SAME_RESULT = (
    "hash", "accumulate", "gradient_checkpointing", "shard_base", "checkpoint_every", "checkpoints_keep", "tracker",
    "preview_prompts",
)  # fmt: skip
"""What may be another when a run goes on, such as after it ran out of memory: no number depends on it."""
_TIMED_UPDATES = 10  # of this process, whether it began the run or goes on with it: then it tells how long the rest takes


def distill(recipe: Recipe, out: Path, *, pools: Path | None = None) -> None:
    """Train the recipe's flash LoRA into the folder `out`; a killed run goes on when called again.

    `pools` is a folder where runs of one process leave the teacher's targets for others that need the same.

    Working files (checkpoints, log, curves, previews) are in `out/training`. TrainingError when the run cannot start,
    runs out of memory or its numbers stop being finite; the last checkpoint is then untouched.
    """
    work = out / "training"
    if (out / FLASH).exists():
        raise TrainingError(f"{out} holds a finished run; choose another --out or remove it")
    processes.main_first(lambda: _claim(work, recipe))
    processes.rows(recipe.batch_size, recipe.accumulate)  # refuses what cannot be split

    with _told_out_of_memory(recipe):
        family, model = load_base(recipe.base)
        trained = model.spec.sampler.schedule.num_train_timesteps
        if recipe.grid.num_train_timesteps != trained:
            raise TrainingError(
                f"grid.num_train_timesteps is {recipe.grid.num_train_timesteps}, the base was trained on {trained}; set it so"
            )
        if recipe.shard_base and processes.count() == 1:
            raise ConfigError("shard_base spreads the network over processes, this run has one: start more, or leave it out")
        place(model, whole=not recipe.shard_base)
        _log.info("reading up to %d samples of '%s'", recipe.data.images, recipe.data.source)
        data = load_dataset(recipe.data, model, batch_size=recipe.batch_size, seed=recipe.seed)
        if processes.device().type != "cpu":
            model.text_encoder.to("cpu", torch.float32)  # all it is needed for now are previews
        targets = recipe.lora.targets or family.lora_targets
        add_adapter(model, targets, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed)
        objective = Objective(model, family, recipe)
        student = Student(model, recipe)
        if recipe.gradient_checkpointing:
            checkpoint_gradients(model)
        _resume(work, student, objective)
        _log.info("training %d LoRA parameters from update %d of %d", student.parameter_count, student.update, recipe.updates)
        tracker = open_tracker(recipe, work, student.update) if processes.is_main() else None
        try:
            _train(model, student, objective, data, recipe, work, tracker, pools)
        finally:
            if tracker:
                tracker.close()

    if processes.is_main():
        with student.holding(student.average):
            publish(out, model, family, recipe, student.parameter_count, work / _LOG)
    processes.wait()


def flash_sampler(model: TorchModel, recipe: Recipe) -> Sampler:
    """How the student of this recipe is sampled."""
    return Sampler(kind="flash", schedule=model.spec.sampler.schedule, grid=recipe.grid, default_steps=min(4, recipe.grid.modes))


def _train(
    model: TorchModel,
    student: Student,
    objective: Objective,
    data: Dataset,
    recipe: Recipe,
    work: Path,
    tracker: Tracker | None,
    pools: Path | None,
) -> None:
    log = work / _LOG
    if tracker and log.exists():  # what a killed run told beyond its checkpoint is told again, half a line perhaps included
        write_whole(log, "".join(log.read_text().splitlines(keepends=True)[: student.update]))
    pool: Pool | None = None
    target_s, update_s = 0.0, list[float]()
    with tqdm(total=recipe.updates, initial=student.update, desc="distill", unit="update", disable=tracker is None) as bar:
        while student.update < recipe.updates:
            update = student.update
            stretch = stretch_at(recipe, update)
            started = time.monotonic()
            if pool is None or update == stretch.first:
                pool = _new_pool(model, student, objective, data, recipe, stretch, pools)
                target_s = (time.monotonic() - started) / (stretch.batches * recipe.target_uses)
                started = time.monotonic()
            use, number = divmod(update - stretch.first, stretch.batches)
            solved, chosen = pool.batch(number, seed=((recipe.seed << 24) + stretch.index) * 64 + use)
            batches = (
                solved.targets(chosen[rows], data, model.device) for rows in processes.rows(recipe.batch_size, recipe.accumulate)
            )
            try:
                line = _learn(model, student, objective, list(batches), recipe)
            except TrainingError as error:
                if tracker:
                    save_state(work / "bad_batch.pt", vars(solved.targets(chosen, data, torch.device("cpu"))))
                raise TrainingError(
                    f"{error}; the batch is in {work / 'bad_batch.pt'}, the last checkpoint is untouched"
                ) from None
            update_s.append(time.monotonic() - started)
            if len(update_s) == _TIMED_UPDATES and tracker:
                median_s = statistics.median(update_s)
                left_s = remaining_s(recipe, student.update, target_s=target_s, update_s=median_s)
                _log.info(
                    "%.3g s an update and %.3g s for its targets, by the first %d: about %s to go, previews aside",
                    *(median_s, target_s, _TIMED_UPDATES, timedelta(seconds=round(left_s))),
                )
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            bar.update()
            if tracker:
                with log.open("a") as file:
                    file.write(json.dumps({"update": update, **line}) + "\n")
                tracker.numbers(update, line)
            if student.update % recipe.checkpoint_every == 0 or student.update == recipe.updates:
                _keep(model, student, objective, recipe, work, tracker)


def _new_pool(
    model: TorchModel,
    student: Student,
    objective: Objective,
    data: Dataset,
    recipe: Recipe,
    stretch: Stretch,
    pools: Path | None,
) -> Pool:
    """A pool depends on seed, stretch and anchor alone, so a resumed run solves the same one."""

    def make() -> Pool:
        return make_pool(model, objective.unconditional, data, recipe, stretch)

    if not (stretch.phase.backward_simulation or recipe.target == "consistency" or not data.has_images):
        return shared_pool(pools, model, recipe, stretch, make) if pools and processes.count() == 1 else make()
    if student.update == stretch.first:
        student.drop_anchor()
    with student.holding(student.anchor):
        return make()


def _learn(model: TorchModel, student: Student, objective: Objective, batches: list[Targets], recipe: Recipe) -> dict[str, float]:
    """One update of the student and its opponents, from this process's parts of a batch; what there is to tell of it."""
    # Weights may be on their way from the phase before; the random stream is apart from the pools'.
    phase = phase_at(recipe.phases, student.update, recipe.ramp_updates)
    parts: list[Part] = []
    told: dict[str, Tensor] = {}
    for batch, rows in zip(batches, processes.rows(recipe.batch_size, recipe.accumulate), strict=True):
        _, generator = step_generator(recipe.seed + _LOSS_STREAM, student.update)
        part = Part(batch, student_x0(model, batch), Draws(generator, recipe.batch_size, rows, model.device))
        losses = objective.losses(part, phase)
        (torch.stack(list(losses.values())).sum() / len(batches)).backward()
        parts.append(Part(batch, part.x0.detach(), part.draws))
        for name, value in {**losses, **_moments(part)}.items():
            told[name] = told.get(name, 0) + value.detach() / len(batches)
    values = dict(zip(told, processes.mean(torch.stack(list(told.values()))).tolist(), strict=True))
    mean, square, wanted = (values.pop(name) for name in _MOMENTS)
    loss = sum(values.values())
    student.learn(loss)
    student.bound(square**0.5, wanted**0.5)
    opponents = objective.train_opponents(parts, phase)
    return {"loss": loss, **values, **opponents, "latent_mean": mean, "latent_std": (square - mean**2) ** 0.5}


_MOMENTS = ("mean", "square", "teacher_square")


def _moments(part: Part) -> dict[str, Tensor]:
    """Of the student's latents: guidance-driven losses make them drift before anything else shows."""
    return dict(zip(_MOMENTS, (part.x0.mean(), part.x0.square().mean(), part.batch.x0.square().mean()), strict=True))


# --- on disk ---------------------------------------------------------------------------------------------------------


def _keep(model: TorchModel, student: Student, objective: Objective, recipe: Recipe, work: Path, tracker: Tracker | None) -> None:
    """A checkpoint, and a look at the average student beside the teacher; the main process writes them."""
    if tracker:
        save_state(
            work / "checkpoints" / f"{student.update:06d}.pt",
            {"student": student.state_dict(), "objective": objective.state_dict()},
        )
        for old in _checkpoints(work)[: -recipe.checkpoints_keep]:
            old.unlink()
    if recipe.preview_prompts and (tracker or recipe.shard_base):
        with student.holding(student.average):
            sheet = preview(model, flash_sampler(model, recipe), sum(recipe.guidance) / 2, recipe.preview_prompts)
        if tracker:
            save_image(sheet, work / "previews" / f"{student.update:06d}.png")
            tracker.image(student.update, sheet)
    processes.wait()


def _checkpoints(work: Path) -> list[Path]:
    """Oldest first."""
    return sorted((work / "checkpoints").glob("*.pt"))


def _resume(work: Path, student: Student, objective: Objective) -> None:
    """Go on from the last checkpoint if there is one."""
    if found := _checkpoints(work):
        state = load_state(found[-1])
        student.load_state_dict(state["student"])
        objective.load_state_dict(state["objective"])


@contextmanager
def _told_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """What to turn when memory runs out, by what is not turned yet."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own for GPUs is a RuntimeError, as is its allocator's for CPUs
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        share = recipe.batch_size // processes.count()
        cures = []
        if recipe.accumulate < share:
            cures.append(f"accumulate = {next(n for n in range(recipe.accumulate + 1, share + 1) if share % n == 0)}")
        if not recipe.gradient_checkpointing:
            cures.append("gradient_checkpointing = true")
        if processes.count() > 1 and not recipe.shard_base:
            cures.append("shard_base = true")
        if recipe.optimizer == "adamw" and processes.device().type == "cuda":
            cures.append('optimizer = "adamw_8bit"')
        cures.append("a smaller lora.rank or batch_size")
        raise TrainingError(
            f"out of memory with {share // recipe.accumulate} samples at a time: set {', or '.join(cures)}; "
            f"the last checkpoint is untouched"
        ) from None


def _claim(work: Path, recipe: Recipe) -> None:
    """Make the working folder this recipe's own; refuses one that holds a run of another, unless the results are the same."""
    resolved = work / "recipe.json"
    try:
        values = {"hash": recipe.content_hash, **recipe.model_dump(mode="json")}
        before = json.loads(resolved.read_text()) if resolved.exists() else values
        changed = [name for name in values if name not in _SAME_RESULT and before.get(name) != values[name]]
        if changed:
            raise TrainingError(
                f"{work} holds a run of another recipe, which differs in {', '.join(changed)}; choose another --out or remove it"
            )
        write_whole(resolved, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"{work}: cannot write there: {error.strerror}") from None
