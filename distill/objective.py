"""What an update minimises: the losses that a recipe uses (`terms`), each weighted by the phase, and their opponents' training.

One network serves all roles: the teacher is the base with adapters off, a learned fake score is a LoRA on it, and the student
another LoRA, or the network's own weights, in whose place those of the base are put for the others.
The teacher's ODE is not here: its solutions come with the batch, and no loss runs it again.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashdiff.distill import processes
from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.conditions import ImageConditions
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.losses.base import Opponent, Setup, StudentLoss
from flashdiff.distill.network import Tap, add_lora, as_student, shard_base
from flashdiff.errors import ConfigError, RequestError
from flashdiff.families.base import ModelFamily, TorchModel


class Objective:
    """The losses of a recipe; those that no phase uses are not built."""

    def __init__(self, model: TorchModel, family: ModelFamily, recipe: Recipe, images: ImageConditions | None = None) -> None:
        """`images` is what the base reads of them; None: as the recipe says."""
        self.model, self.recipe = model, recipe
        device = processes.device() if recipe.shard_base else model.device
        images = images or ImageConditions(model, recipe)
        self.branches = images.branches(_unconditional(model, recipe), device)

        def add(name: str, seed: int) -> list[nn.Parameter]:
            if recipe.lora is None:
                raise ConfigError("loss.distribution_matching.fake_score = 'lora' needs the table lora, with rank and alpha")
            trained = [p for p in model.network.parameters() if p.requires_grad]
            add_lora(model, family, recipe.lora, seed=seed, name=name)
            for parameter in trained:  # peft freezes all that is no adapter's
                parameter.requires_grad_(True)
            as_student(model.network)
            return [p for key, p in model.network.named_parameters() if f".{name}." in key]

        setup = Setup(
            model=model,
            device=device,
            family=family,
            tap=partial(Tap, model, family, runs_whole=recipe.shard_base),
            branches=self.branches,
            grid=recipe.grid,
            guidance=recipe.guidance,
            seed=recipe.seed,
            add_adapter=add,
        )
        self._losses: dict[str, StudentLoss] = {
            term.name: term.build(setup, recipe.loss.settings(term.name)) for term in recipe.terms()
        }
        if recipe.student == "full" and recipe.lora and not getattr(model.network, "peft_config", {}):
            raise ConfigError("lora: student = 'full' trains the network itself, and no fake score is a LoRA; leave it out")
        if recipe.shard_base:  # once all adapters are in, and before the network runs
            shard_base(model)
        for loss in self._losses.values():
            loss.start()

    @property
    def opponents(self) -> list[Opponent]:
        return [loss.opponent for loss in self._losses.values() if loss.opponent]

    def losses(self, batch: MicroBatch, phase: Phase) -> dict[str, Tensor]:
        """The weighted losses of the student's x_0, scalars [] by name; those that the phase leaves out are not computed."""
        weights = phase.weights
        return {name: weights[name] * loss.loss(batch) for name, loss in self._losses.items() if weights[name]}

    def train_opponents(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Train every opponent on the student's samples; their losses by name.

        The samples are those of the student's own update: the teacher's ODE is not run a second time.
        """
        detached = [batch.detached() for batch in batches]
        return {name: value for loss in self._losses.values() for name, value in loss.train_opponent(detached).items()}

    def state_dict(self) -> dict[str, Any]:
        return {key: value for loss in self._losses.values() for key, value in loss.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for loss in self._losses.values():
            loss.load_state_dict(state)


def _unconditional(model: TorchModel, recipe: Recipe) -> dict[str, Tensor] | None:
    """What guidance contrasts prompts with; ConfigError for keys of the recipe that say how and cannot act on this network."""
    for key, is_given in (("negative_prompt", recipe.negative_prompt), ("guidance_rescale", recipe.guidance_rescale)):
        if is_given and not model.guides_twice:
            raise ConfigError(f"{key} = {is_given!r}: this network takes its guidance as an input; leave it out")
    if recipe.guidance_rescale and model.spec.sampler.keeps_norm:
        raise ConfigError(
            f"guidance_rescale = {recipe.guidance_rescale}: this model's guided outputs keep the lengths of unguided ones; "
            "leave it out"
        )
    try:
        return model.unconditional(recipe.negative_prompt)
    except RequestError as error:
        if not recipe.negative_prompt:
            raise
        why = str(error).removesuffix("; truncate_prompt cuts it")  # which is for requests
        raise ConfigError(f"negative_{why}; shorten it") from None
