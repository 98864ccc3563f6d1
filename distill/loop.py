"""The training program: when things happen. What one update is stands in `step`."""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.distill.config import Recipe
from flashdiff.distill.curriculum import phase_at
from flashdiff.distill.data import Dataset, load_dataset
from flashdiff.distill.previews import save_preview
from flashdiff.distill.publish import publish
from flashdiff.distill.step import Targets, make_targets, student_loss
from flashdiff.errors import TrainingError
from flashdiff.families import load_base
from flashdiff.families.base import TorchModel
from flashdiff.files import write_whole
from flashdiff.lora import FLASH, add_adapter
from flashdiff.sampling import Sampler

_log = logging.getLogger(__name__)

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
    add_adapter(model, family, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed)
    student = Student(model, recipe)
    student.resume(work / "checkpoint.pt")
    _log.info("training %d LoRA parameters from update %d of %d", student.parameter_count, student.update, recipe.updates)
    _train(model, student, data, recipe, work)

    student.use_average()
    publish(out, model, family, recipe, student.parameter_count)


class Student:
    """The trainable LoRA with its optimizer, its running average and its update counter."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.parameters = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
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

    def save(self, path: Path) -> None:
        weights = {name: p.detach() for name, p in self.parameters.items()}
        state = {"weights": weights, "average": self.average, "optimizer": self.optimizer.state_dict(), "update": self.update}
        save_state(path, state)

    def resume(self, path: Path) -> None:
        """Go on from `path` if it exists."""
        if path.exists():
            state = load_state(path)
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


def _train(model: TorchModel, student: Student, data: Dataset, recipe: Recipe, work: Path) -> None:
    unconditional = model.encode_ids(model.tokenizer([""]))
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
                pool = make_targets(model, unconditional, data, recipe, phase, _POOL_BATCHES * recipe.batch_size, *streams)
            batch = pool[_chosen(recipe, pool_index, within)]

            loss = student_loss(model, recipe, batch)
            try:
                student.learn(loss)
            except TrainingError as error:
                save_state(work / "bad_batch.pt", vars(batch))
                raise TrainingError(
                    f"{error}; the batch is in {work / 'bad_batch.pt'}, the last checkpoint is untouched"
                ) from None

            with log.open("a") as file:
                file.write(json.dumps({"update": update, "loss": loss.item()}) + "\n")
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
            if student.update % recipe.checkpoint_every == 0 or student.update == recipe.updates:
                student.save(checkpoint)
                if recipe.preview_prompts:
                    student.preview(model, recipe.preview_prompts, work / "previews" / f"{student.update:06d}.png")


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
