"""The training program: when things happen. What one update is stands in `step`."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.distill.config import Recipe
from flashdiff.distill.curriculum import phase_at
from flashdiff.distill.data import Dataset, load_dataset
from flashdiff.distill.objective import Objective
from flashdiff.distill.previews import save_preview
from flashdiff.distill.publish import publish
from flashdiff.distill.step import Targets, make_targets, student_x0
from flashdiff.errors import TrainingError
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
from flashdiff.files import write_whole
from flashdiff.lora import ADAPTER, FLASH, add_adapter
from flashdiff.sampling import Sampler

_log = logging.getLogger(__name__)

_LOSS_STREAM = 1 << 20
_POOL_BATCHES = 16  # targets are solved for this many batches at a time, so that reuse shuffles over more than one


def distill(recipe: Recipe, out: Path) -> None:
    """Train the recipe's flash LoRA into the folder `out`; a killed run goes on when called again.

    Working files (checkpoint, log, previews, renders) are in `out/training`. TrainingError when the run cannot start or
    its numbers stop being finite; the last checkpoint is then untouched.
    """
    work = out / "training"
    if (out / FLASH).exists():
        raise TrainingError(f"{out} holds a finished run; choose another --out or remove it")
    _claim(work, recipe)

    family, model = load_base(recipe.base)
    trained = model.spec.sampler.schedule.num_train_timesteps
    if recipe.grid.num_train_timesteps != trained:
        raise TrainingError(
            f"grid.num_train_timesteps is {recipe.grid.num_train_timesteps}, the base was trained on {trained}; set it so"
        )
    _log.info("drawing or reading up to %d images of '%s' and encoding them", recipe.data.images, recipe.data.source)
    data = load_dataset(recipe.data, model, cache=work / "renders", seed=recipe.seed)
    targets = recipe.lora.targets or family.lora_targets
    add_adapter(model, targets, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed)
    student = Student(model, recipe)
    objective = Objective(model, family, recipe)
    _resume(work / "checkpoint.pt", student, objective)
    _log.info("training %d LoRA parameters from update %d of %d", student.parameter_count, student.update, recipe.updates)
    _train(model, student, objective, data, recipe, work)

    student.use_average()
    publish(out, model, family, recipe, student.parameter_count)


class Student:
    """The trainable LoRA with its optimizer, its running average and its update counter."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.parameters = {name: p for name, p in model.network.named_parameters() if f".{ADAPTER}." in name}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.update = 0
        self._recipe = recipe

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def learn(self, loss: Tensor) -> None:
        """One optimizer step on `loss`; TrainingError, with weights untouched, when loss or gradient is not finite."""
        recipe = self._recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(self.update, recipe)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise TrainingError(f"update {self.update}: loss {loss.item()} or gradient norm {norm.item()} is not finite")
        self.optimizer.step()
        self.update += 1
        decay = min(recipe.ema_decay, self.update / (10 + self.update))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {"weights": weights, "average": self.average, "optimizer": self.optimizer.state_dict(), "update": self.update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._put(state["weights"])
        self.average, self.update = state["average"], state["update"]
        self.optimizer.load_state_dict(state["optimizer"])

    def use_average(self) -> dict[str, Tensor]:
        """Put the running average in place; returns the weights it replaced."""
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.average)
        return current

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def preview(self, model: TorchModel, prompts: tuple[str, ...], path: Path) -> None:
        """Draw the average's images beside the teacher's."""
        current = self.use_average()
        save_preview(model, flash_sampler(model, self._recipe), sum(self._recipe.guidance) / 2, prompts, path)
        self._put(current)


def flash_sampler(model: TorchModel, recipe: Recipe) -> Sampler:
    """How the student of this recipe is sampled."""
    return Sampler(kind="flash", schedule=model.spec.sampler.schedule, grid=recipe.grid, default_steps=min(4, recipe.grid.modes))


def _resume(path: Path, student: Student, objective: Objective) -> None:
    """Go on from `path` if it exists."""
    if path.exists():
        state = load_state(path)
        student.load_state_dict(state["student"])
        objective.load_state_dict(state["objective"])


def _train(model: TorchModel, student: Student, objective: Objective, data: Dataset, recipe: Recipe, work: Path) -> None:
    checkpoint, log = work / "checkpoint.pt", work / "log.jsonl"
    pool_updates = _POOL_BATCHES * recipe.target_uses
    pool: Targets | None = None
    with tqdm(total=recipe.updates, initial=student.update, desc="distill", unit="update", mininterval=1) as bar:
        while student.update < recipe.updates:
            update = student.update
            pool_index, within = divmod(update, pool_updates)
            if pool is None or within == 0:
                # Phases change between pools; a pool depends on seed and index alone, so a resumed run solves the same one.
                phase = phase_at(recipe.phases, update - within)
                streams = step_generator(recipe.seed, pool_index)
                count = _POOL_BATCHES * recipe.batch_size
                pool = make_targets(model, objective.unconditional, data, recipe, phase, count, *streams)
            batch = pool[_chosen(recipe, pool_index, within)]

            # The phase of the losses is the update's own; its random stream is apart from the pools'.
            phase = phase_at(recipe.phases, update, recipe.ramp_updates)
            _, generator = step_generator(recipe.seed + _LOSS_STREAM, update)
            x0 = student_x0(model, batch)
            losses = objective.losses(x0, batch, phase, generator)
            try:
                student.learn(torch.stack(list(losses.values())).sum())
                opponents = objective.train_opponents(x0, batch, phase, generator)
            except TrainingError as error:
                save_state(work / "bad_batch.pt", vars(batch))
                raise TrainingError(
                    f"{error}; the batch is in {work / 'bad_batch.pt'}, the last checkpoint is untouched"
                ) from None

            with log.open("a") as file:
                told = {name: value.item() for name, value in losses.items()}
                line = {"update": update, "loss": sum(told.values()), **told, **opponents, **_moments(x0)}
                file.write(json.dumps(line) + "\n")
            bar.set_postfix({name: f"{value:.4f}" for name, value in told.items()}, refresh=False)
            bar.update()
            if student.update % recipe.checkpoint_every == 0 or student.update == recipe.updates:
                save_state(checkpoint, {"student": student.state_dict(), "objective": objective.state_dict()})
                if recipe.preview_prompts:
                    student.preview(model, recipe.preview_prompts, work / "previews" / f"{student.update:06d}.png")


def _moments(x0: Tensor) -> dict[str, float]:
    """Mean and deviation of the student's latents: guidance-driven losses make them drift before anything else shows."""
    return {"latent_mean": x0.mean().item(), "latent_std": x0.std().item()}


def _chosen(recipe: Recipe, pool_index: int, within: int) -> Tensor:
    """Indices of one batch: every use of the pool is a shuffle of all of it."""
    use, batch = divmod(within, _POOL_BATCHES)
    shuffle = torch.Generator().manual_seed(((recipe.seed << 24) + pool_index) * 64 + use)
    order = torch.randperm(_POOL_BATCHES * recipe.batch_size, generator=shuffle)
    return order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]


def _schedule(update: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear to zero over the last fifth."""
    warm = min(1.0, (update + 1) / (recipe.warmup_updates + 1))
    return warm * min(1.0, 5 * (recipe.updates - update) / recipe.updates)


def _claim(work: Path, recipe: Recipe) -> None:
    """Make the working folder this recipe's own; refuses one that holds another recipe's run."""
    resolved = work / "recipe.json"
    try:
        if resolved.exists() and json.loads(resolved.read_text())["hash"] != recipe.content_hash:
            raise TrainingError(f"{work} holds a run of another recipe; choose another --out or remove it")
        write_whole(resolved, json.dumps({"hash": recipe.content_hash, **recipe.model_dump(mode="json")}, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"{work}: cannot write there: {error.strerror}") from None
