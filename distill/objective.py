"""What an update minimises: the losses that a recipe uses (`terms`), each weighted by the phase, and their opponents' training.

One frozen base serves all roles: the teacher is the base with adapters off, the student and the fake score are LoRAs on it.
The teacher's ODE is not here: its solutions come with the batch, and no loss runs it again.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.losses.base import Opponent, Setup, StudentLoss
from flashdiff.distill.network import Tap, add_lora, shard_base
from flashdiff.errors import ConfigError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.lora import ADAPTER


class Objective:
    """The losses of a recipe; those that no phase uses are not built."""

    def __init__(self, model: TorchModel, family: ModelFamily, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.unconditional = _unconditional(model, recipe.negative_prompt)

        def add(name: str, seed: int) -> list[nn.Parameter]:
            add_lora(model, family, recipe.lora, seed=seed, name=name)
            model.network.set_adapter(ADAPTER)
            return [p for key, p in model.network.named_parameters() if f".{name}." in key]

        setup = Setup(
            model=model,
            family=family,
            tap=partial(Tap, model, family, runs_whole=recipe.shard_base),
            unconditional=self.unconditional,
            num_train_timesteps=recipe.grid.num_train_timesteps,
            guidance=recipe.guidance,
            seed=recipe.seed,
            add_adapter=add,
        )
        self._losses: dict[str, StudentLoss] = {
            term.name: term.build(setup, recipe.loss.settings(term.name)) for term in recipe.terms()
        }
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


def _unconditional(model: TorchModel, negative_prompt: str) -> dict[str, Tensor] | None:
    if negative_prompt and not model.guides_twice:
        raise ConfigError(f"negative_prompt '{negative_prompt}': this network takes its guidance as an input; leave it out")
    return model.unconditional(negative_prompt)
