"""What an update minimises: the three losses of Flash Diffusion (arXiv 2406.02347), and the networks two of them need.

One frozen base serves all roles: the teacher is the base with adapters off, the student and the fake score are LoRAs on it.
The teacher's ODE is not here: its solutions come with the batch, and no loss runs it again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdiff.distill import processes
from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.discriminator import Discriminator
from flashdiff.distill.losses import (
    approximate_r1,
    discriminator_loss,
    distillation_loss,
    distribution_matching_loss,
    generator_loss,
    perceptual_loss,
)
from flashdiff.distill.network import Tap, as_adapter, as_teacher, guided, levels, predict_x0, shard_base
from flashdiff.distill.processes import Draws
from flashdiff.distill.step import Targets
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.lora import ADAPTER, add_adapter
from flashdiff.prediction import guide
from flashdiff.sampling import renoise

FAKE_SCORE = "fake_score"
"""The second adapter's name within peft."""


@dataclass(frozen=True)
class Part:
    """What one process does of a batch at a time, with the student's answer to it."""

    batch: Targets
    x0: Tensor  # [B, C, h, w], the student's
    draws: Draws


class Objective:
    """The losses of a recipe, with the discriminator and the fake score where a phase uses them."""

    def __init__(self, model: TorchModel, family: ModelFamily, recipe: Recipe) -> None:
        self.model, self.recipe, self.unconditional = model, recipe, model.unconditional()
        self.critic: list[torch.nn.Parameter] = []
        matching = recipe.loss.distribution_matching
        if matching.decoupled and self.unconditional is None:
            raise ConfigError("loss.distribution_matching.decoupled: this network takes its guidance as an input; leave it out")
        if matching.fake_score == "lora" and any(phase.distribution_matching for phase in recipe.phases):
            targets = recipe.lora.targets or family.lora_targets
            add_adapter(model, targets, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed + 1, name=FAKE_SCORE)
            model.network.set_adapter(ADAPTER)
            self.critic = [p for name, p in model.network.named_parameters() if f".{FAKE_SCORE}." in name]
        if recipe.shard_base:  # once all adapters are in, and before the network runs
            shard_base(model)
        if self.critic:
            self.critic_optimizer = torch.optim.AdamW(self.critic, lr=matching.critic_learning_rate, weight_decay=0.0)
        self._tap = Tap(model, family)
        self.discriminator: Discriminator | None = None
        if any(phase.adversarial for phase in recipe.phases):
            self.discriminator = Discriminator(model, self._tap, seed=recipe.seed)
            self.discriminator_optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=recipe.loss.adversarial.learning_rate, betas=(0.5, 0.99), weight_decay=0.0
            )

    # --- the student -------------------------------------------------------------------------------------------------

    def losses(self, part: Part, phase: Phase) -> dict[str, Tensor]:
        """The weighted losses of the student's x_0, by name; those the phase leaves out cost nothing."""
        losses = {}
        if phase.distillation:
            losses["distillation"] = phase.distillation * self._distillation(part)
        if phase.adversarial:
            losses["adversarial"] = phase.adversarial * self._adversarial(part)
        if phase.distribution_matching:
            losses["distribution_matching"] = phase.distribution_matching * self._matching(part)
        return losses

    def _distillation(self, part: Part) -> Tensor:
        kind = self.recipe.loss.distillation
        if kind != "perceptual":
            return distillation_loss(kind, part.x0, part.batch.x0)
        times = part.draws.integers(0, self.recipe.grid.num_train_timesteps)
        student, teacher = self._noised_alike(part.draws, times, part.x0, part.batch.x0)
        with as_teacher(self.model):
            seen = self._tap(student, times, part.batch.conditioning)
            with torch.no_grad():
                wanted = self._tap(teacher, times, part.batch.conditioning)
        return perceptual_loss(seen, wanted)

    def _adversarial(self, part: Part) -> Tensor:
        assert self.discriminator
        times = self._judged_times(part.draws)
        fake_x, real_x = self._noised_alike(part.draws, times, part.x0, part.batch.z0)
        with as_teacher(self.model):
            fake = self.discriminator(fake_x, times, part.batch.conditioning)
            with torch.no_grad():
                real = self.discriminator(real_x, times, part.batch.conditioning)
        return generator_loss(self.recipe.loss.adversarial.kind, fake, real)

    def _matching(self, part: Part) -> Tensor:
        """Section 3.4: the scores of teacher and fake compared at x_tau, a re-noised x_0; no gradient through either."""
        recipe, x0, conditioning = self.recipe.loss.distribution_matching, part.x0, part.batch.conditioning
        low, high = self.recipe.guidance
        guidance = (low + (high - low) * part.draws.uniform()).view(-1, 1, 1, 1)
        first, last = (round(share * (self.recipe.grid.num_train_timesteps - 1)) for share in recipe.times)
        tau = part.draws.integers(first, last + 1)
        noise = part.draws.normal(x0.shape[1:])
        with torch.no_grad():
            x_tau = renoise(x0, noise, *levels(self.model, tau))
            with as_teacher(self.model):
                if self.unconditional is None:
                    teacher = predict_x0(self.model, x_tau, tau, guided(conditioning, guidance.flatten()))
                elif recipe.decoupled:
                    conditional, _ = self._both(x_tau, tau, conditioning)
                    # Guidance is compared where there is less noise than the student started from.
                    tau_guidance = (part.draws.uniform() * part.batch.times).long().clamp(min=first)
                    x_guidance = renoise(x0, noise, *levels(self.model, tau_guidance))
                    towards, away = self._both(x_guidance, tau_guidance, conditioning)
                    teacher = conditional + (guidance - 1) * (towards - away)
                else:
                    teacher = guide(*self._both(x_tau, tau, conditioning), guidance)
            with as_adapter(self.model, FAKE_SCORE if self.critic else ADAPTER):
                fake = predict_x0(self.model, x_tau, tau, conditioning)
        return distribution_matching_loss(x0, fake, teacher)

    # --- its opponents -----------------------------------------------------------------------------------------------

    def train_opponents(self, parts: Sequence[Part], phase: Phase) -> dict[str, float]:
        """Discriminator and fake score learn from the student's samples; their losses by name.

        The samples are those of the student's own update: the teacher's ODE is not run a second time.
        """
        parts = [Part(part.batch, part.x0.detach(), part.draws) for part in parts]
        losses = {}
        if phase.adversarial:
            with as_teacher(self.model):
                losses["discriminator"] = _descend(self.discriminator_optimizer, parts, self._discriminator_loss)
        if self.critic:  # in the phases before its own too: a fake score that lags behind the student misleads it
            with as_adapter(self.model, FAKE_SCORE):
                for _ in range(self.recipe.loss.distribution_matching.critic_updates):
                    losses["fake_score"] = _descend(self.critic_optimizer, parts, self._critic_loss)
        return losses

    def _discriminator_loss(self, part: Part) -> Tensor:
        assert self.discriminator
        recipe, conditioning, discriminator = self.recipe.loss.adversarial, part.batch.conditioning, self.discriminator
        times = self._judged_times(part.draws)
        fake_x, real_x = self._noised_alike(part.draws, times, part.x0, part.batch.z0)
        noise = part.draws.normal(real_x.shape[1:])
        real = discriminator(real_x, times, conditioning)
        loss = discriminator_loss(recipe.kind, discriminator(fake_x, times, conditioning), real)
        if recipe.r1_weight:
            loss = loss + recipe.r1_weight * approximate_r1(
                lambda x: discriminator(x, times, conditioning), real_x, real, noise, recipe.r1_sigma
            )
        return loss

    def _critic_loss(self, part: Part) -> Tensor:
        """Denoising (Ho et al. 2020) of the student's samples: the score of the student's distribution."""
        times = part.draws.integers(0, self.recipe.grid.num_train_timesteps)
        alpha, sigma = levels(self.model, times)
        x_t = renoise(part.x0, part.draws.normal(part.x0.shape[1:]), alpha, sigma)
        error = predict_x0(self.model, x_t, times, part.batch.conditioning) - part.x0
        weight = (alpha / sigma).square().clamp(max=5)  # min-SNR (2303.09556): every level counts
        return (weight * error.square()).mean()

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _judged_times(self, draws: Draws) -> Tensor:
        """One of the recipe's times for each sample [B]."""
        last = self.recipe.grid.num_train_timesteps - 1
        choices = torch.tensor([round(share * last) for share in self.recipe.loss.adversarial.times])
        chosen = draws.integers(0, len(choices))
        return choices.to(chosen.device)[chosen]

    def _noised_alike(self, draws: Draws, times: Tensor, *latents: Tensor) -> list[Tensor]:
        """Latents [B, C, h, w] noised to `times` [B] with the same noise."""
        noise = draws.normal(latents[0].shape[1:])
        alpha, sigma = levels(self.model, times)
        return [renoise(x, noise, alpha, sigma) for x in latents]

    def _both(self, x_t: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional x_0, in one evaluation of twice the batch."""
        assert self.unconditional
        both = {name: torch.cat([values, self.unconditional[name].expand_as(values)]) for name, values in conditioning.items()}
        conditional, contrast = predict_x0(self.model, x_t.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return conditional, contrast

    # --- on disk -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.discriminator:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        if self.critic:
            state["critic"] = [p.detach() for p in self.critic]
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        if self.critic:
            with torch.no_grad():
                for parameter, value in zip(self.critic, state["critic"], strict=True):
                    parameter.copy_(value)
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])


def _descend(optimizer: torch.optim.Optimizer, parts: Sequence[Part], loss_of: Callable[[Part], Tensor]) -> float:
    """One step on the mean loss of the parts and of all processes; returns it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    total = torch.zeros((), device=parameters[0].device)
    for part in parts:
        loss = loss_of(part) / len(parts)
        loss.backward()
        total += loss.detach()
    processes.average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    told = float(processes.mean(total))
    if not math.isfinite(told) or not torch.isfinite(norm):
        raise TrainingError(f"discriminator or fake score: loss {told} or gradient norm {norm.item()} is not finite")
    optimizer.step()
    return told
