"""The student: what is trained, with its optimizer, its running average and its update counter."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashdiff.distill import processes
from flashdiff.distill.config import Recipe
from flashdiff.distill.network import Exchange
from flashdiff.distill.student_kinds import kind_of
from flashdiff.errors import ConfigError, NotFiniteError, TrainingError
from flashdiff.families.base import TorchModel

_DRIFT_DECAY = 0.95
_DRIFT_LIMIT = 2.0


class Student:
    """What of `model` is trained and published, with its optimizer and its running average."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.parameters = kind_of(recipe).parameters(model.network)
        self._exchange = Exchange(model.network, self.parameters)
        self.optimizer = optimizer_of(recipe)(self.parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.anchor: dict[str, Tensor] = {}
        """The average when the present pool was made, if the pool draws on it: a resumed run then makes the same pool."""
        self.update = 0
        self.skipped = 0
        """Updates of the run that were left out because something was not finite."""
        self.gradient_norm = 0.0
        """Of the last update, before it was clipped."""
        self._drift = 0.0
        self._recipe = recipe

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def learn(self, loss: float) -> None:
        """One optimizer step on the present gradients, averaged over the processes; `loss` is this update's, a number.

        NotFiniteError, with weights untouched, when they or `loss` are not finite.
        """
        recipe = self._recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(self.update, recipe)
        processes.average_gradients(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise NotFiniteError(f"update {self.update}: loss {loss} or gradient norm {norm.item()} is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.gradient_norm = float(norm)
        self.update += 1
        decay = min(recipe.ema_decay, self.update / (10 + self.update))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def skip(self, update: int) -> None:
        """Leave out what is left of `update`, after a NotFiniteError in it."""
        self.optimizer.zero_grad()
        self.update = update + 1
        self.skipped += 1

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin the run with these weights."""
        self._set_weights(weights)
        for name, values in self.average.items():
            values.copy_(weights[name])

    def bound(self, student_rms: float, teacher_rms: float) -> None:
        """TrainingError when the student's latents stay much larger than the teacher's, by the root mean squares of each update.

        Losses driven by guidance enlarge the latents' mean or deviation long before images fall apart or a loss shows it
        (Decoupled DMD, 2511.22677), and such a run does not recover. Both values are in units of scaled latents.
        """
        self._drift = _DRIFT_DECAY * self._drift + (1 - _DRIFT_DECAY) * math.log(
            max(student_rms, 1e-12) / max(teacher_rms, 1e-12)
        )
        if self._drift > math.log(_DRIFT_LIMIT):
            raise TrainingError(
                f"update {self.update}: the student's latents have grown to {math.exp(self._drift):.2f} times the teacher's; "
                f"lower the weights of the losses other than distillation, the guidance or the learning_rate"
            )

    # --- its weights -------------------------------------------------------------------------------------------------

    def set_anchor(self) -> None:
        """Keep the present average as the weights that the next pool is made with."""
        self.anchor = {name: values.clone() for name, values in self.average.items()}

    def holding(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within the context, the student has `weights`, each shaped as the parameter of its name."""
        return self._exchange.held(weights)

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "anchor": self.anchor,
            "optimizer": self.optimizer.state_dict(),
            "update": self.update,
            "drift": self._drift,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError for an update beyond the recipe's, KeyError for a missing entry."""
        if not 0 <= state["update"] <= self._recipe.updates:
            raise ValueError(f"it is at update {state['update']} of {self._recipe.updates}")
        self._set_weights(state["weights"])
        for name, values in self.average.items():
            values.copy_(state["average"][name])
        self.anchor = {name: values.to(self.average[name].device) for name, values in state["anchor"].items()}
        self.update, self._drift = state["update"], state["drift"]
        self.skipped = state.get("skipped", 0)  # flashdiff 0.2 did not count them
        self.optimizer.load_state_dict(state["optimizer"])


def optimizer_of(recipe: Recipe) -> Any:
    """The class of the student's optimizer; ConfigError where it cannot run here."""
    if recipe.optimizer == "adamw":  # fused, it needs no room for intermediate results
        return partial(torch.optim.AdamW, fused=True) if recipe.student == "full" else torch.optim.AdamW
    if processes.device().type != "cuda":
        raise ConfigError(
            f"optimizer 'adamw_8bit' needs an NVIDIA GPU, this process runs on {processes.device()}; set it to 'adamw'"
        )
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError("optimizer 'adamw_8bit' needs 'bitsandbytes': pip install bitsandbytes") from None
    return bitsandbytes.optim.AdamW8bit


def _schedule(update: int, recipe: Recipe) -> float:
    """The factor of the learning rate at `update`: linear warm-up, constant, then linear to 0 over the recipe's share."""
    warm = min(1.0, (update + 1) / (recipe.warmup_updates + 1))
    decay = recipe.learning_rate_decay
    return warm * min(1.0, (recipe.updates - update) / (decay * recipe.updates)) if decay else warm
