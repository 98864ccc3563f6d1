"""What an update minimises: the three losses of Flash Diffusion (arXiv 2406.02347), and the networks two of them need.

One frozen base serves all roles: the teacher is the base with adapters off, the student and the fake score are LoRAs on it.
The teacher's ODE is not here: its solutions come with the batch, and no loss runs it again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.discriminator import Discriminator
from flashdiff.distill.losses import (
    approximate_r1,
    discriminator_loss,
    distillation_loss,
    distribution_matching_loss,
    generator_loss,
)
from flashdiff.distill.step import Targets, guided, levels, predict_x0
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.lora import ADAPTER, add_adapter
from flashdiff.prediction import guide
from flashdiff.sampling import renoise

FAKE_SCORE = "fake_score"
"""The second adapter's name within peft."""


class Objective:
    """The losses of a recipe, with the discriminator and the fake score where a phase uses them."""

    def __init__(self, model: TorchModel, family: ModelFamily, recipe: Recipe) -> None:
        self.model, self.recipe, self.unconditional = model, recipe, model.unconditional()
        self.discriminator: Discriminator | None = None
        if any(phase.adversarial for phase in recipe.phases):
            self.discriminator = Discriminator(model, family, seed=recipe.seed)
            self.discriminator_optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=recipe.loss.adversarial.learning_rate, betas=(0.5, 0.99), weight_decay=0.0
            )
        self.critic: list[torch.nn.Parameter] = []
        matching = recipe.loss.distribution_matching
        if matching.decoupled and self.unconditional is None:
            raise ConfigError("loss.distribution_matching.decoupled: this network takes its guidance as an input; leave it out")
        if matching.fake_score == "lora" and any(phase.distribution_matching for phase in recipe.phases):
            targets = recipe.lora.targets or family.lora_targets
            add_adapter(model, targets, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed + 1, name=FAKE_SCORE)
            self.critic = [p for name, p in model.network.named_parameters() if f".{FAKE_SCORE}." in name]
            self.critic_optimizer = torch.optim.AdamW(self.critic, lr=matching.critic_learning_rate, weight_decay=0.0)
            model.network.set_adapter(ADAPTER)

    # --- the student -------------------------------------------------------------------------------------------------

    def losses(self, x0: Tensor, batch: Targets, phase: Phase, generator: torch.Generator) -> dict[str, Tensor]:
        """The weighted losses of the student's x_0 [B, C, h, w], by name; those the phase leaves out cost nothing."""
        losses = {}
        if phase.distillation:
            losses["distillation"] = phase.distillation * distillation_loss(self.recipe.loss.distillation, x0, batch.x0)
        if phase.adversarial:
            losses["adversarial"] = phase.adversarial * self._adversarial(x0, batch, generator)
        if phase.distribution_matching:
            losses["distribution_matching"] = phase.distribution_matching * self._matching(x0, batch, generator)
        return losses

    def _adversarial(self, x0: Tensor, batch: Targets, generator: torch.Generator) -> Tensor:
        assert self.discriminator
        renoised, times = self._judged(generator, x0, batch.z0)
        with self._teacher():
            fake = self.discriminator(renoised[0], times, batch.conditioning)
            with torch.no_grad():
                real = self.discriminator(renoised[1], times, batch.conditioning)
        return generator_loss(self.recipe.loss.adversarial.kind, fake, real)

    def _matching(self, x0: Tensor, batch: Targets, generator: torch.Generator) -> Tensor:
        """Section 3.4: the scores of teacher and fake compared at x_tau, a re-noised x_0; no gradient through either."""
        recipe = self.recipe.loss.distribution_matching
        count = len(x0)
        low, high = self.recipe.guidance
        guidance = (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)
        first, last = (round(share * (self.recipe.grid.num_train_timesteps - 1)) for share in recipe.times)
        tau = torch.randint(first, last + 1, (count,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            x_tau = renoise(x0, noise, *levels(self.model, tau))
            with self._teacher():
                if self.unconditional is None:
                    teacher = predict_x0(self.model, x_tau, tau, guided(batch.conditioning, guidance.flatten()))
                elif recipe.decoupled:
                    conditional, _ = self._both(x_tau, tau, batch.conditioning)
                    # Guidance is compared where there is less noise than the student started from.
                    tau_guidance = (torch.rand(count, generator=generator) * batch.times).long().clamp(min=first)
                    x_guidance = renoise(x0, noise, *levels(self.model, tau_guidance))
                    towards, away = self._both(x_guidance, tau_guidance, batch.conditioning)
                    teacher = conditional + (guidance - 1) * (towards - away)
                else:
                    teacher = guide(*self._both(x_tau, tau, batch.conditioning), guidance)
            with self._adapter(FAKE_SCORE if self.critic else ADAPTER):
                fake = predict_x0(self.model, x_tau, tau, batch.conditioning)
        return distribution_matching_loss(x0, fake, teacher)

    # --- its opponents -----------------------------------------------------------------------------------------------

    def train_opponents(self, x0: Tensor, batch: Targets, phase: Phase, generator: torch.Generator) -> dict[str, float]:
        """Discriminator and fake score learn from the student's samples [B, C, h, w]; their losses by name.

        The samples are those of the student's own update: the teacher's ODE is not run a second time.
        """
        x0 = x0.detach()
        losses = {}
        if phase.adversarial:
            losses["discriminator"] = self._train_discriminator(x0, batch, generator)
        if self.critic:  # in the phases before its own too: a fake score that lags behind the student misleads it
            losses["fake_score"] = self._train_critic(x0, batch, generator)
        return losses

    def _train_discriminator(self, x0: Tensor, batch: Targets, generator: torch.Generator) -> float:
        assert self.discriminator
        recipe = self.recipe.loss.adversarial
        (fake_x, real_x), times = self._judged(generator, x0, batch.z0)
        noise = torch.randn(real_x.shape, generator=generator)
        with self._teacher():
            real = self.discriminator(real_x, times, batch.conditioning)
            loss = discriminator_loss(recipe.kind, self.discriminator(fake_x, times, batch.conditioning), real)
            if recipe.r1_weight:
                loss = loss + recipe.r1_weight * approximate_r1(
                    lambda x: self.discriminator(x, times, batch.conditioning),  # type: ignore[misc]
                    real_x, real, noise, recipe.r1_sigma,
                )  # fmt: skip
        _descend(self.discriminator_optimizer, loss)
        return loss.item()

    def _train_critic(self, x0: Tensor, batch: Targets, generator: torch.Generator) -> float:
        """Denoising (Ho et al. 2020) of the student's samples: the score of the student's distribution."""
        last = self.recipe.grid.num_train_timesteps
        loss = torch.zeros(())
        with self._adapter(FAKE_SCORE):
            for _ in range(self.recipe.loss.distribution_matching.critic_updates):
                times = torch.randint(0, last, (len(x0),), generator=generator)
                alpha, sigma = levels(self.model, times)
                x_t = renoise(x0, torch.randn(x0.shape, generator=generator), alpha, sigma)
                error = predict_x0(self.model, x_t, times, batch.conditioning) - x0
                weight = (alpha / sigma).square().clamp(max=5)  # min-SNR (2303.09556): every level counts
                loss = (weight * error.square()).mean()
                _descend(self.critic_optimizer, loss)
        return loss.item()

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _judged(self, generator: torch.Generator, *latents: Tensor) -> tuple[list[Tensor], Tensor]:
        """Latents noised alike, each sample to one of the recipe's times; and the times [B]."""
        last = self.recipe.grid.num_train_timesteps - 1
        choices = torch.tensor([round(share * last) for share in self.recipe.loss.adversarial.times])
        times = choices[torch.randint(0, len(choices), (len(latents[0]),), generator=generator)]
        noise = torch.randn(latents[0].shape, generator=generator)
        alpha, sigma = levels(self.model, times)
        return [renoise(x, noise, alpha, sigma) for x in latents], times

    def _both(self, x_t: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional x_0, in one evaluation of twice the batch."""
        assert self.unconditional
        both = {name: torch.cat([values, self.unconditional[name].expand_as(values)]) for name, values in conditioning.items()}
        conditional, contrast = predict_x0(self.model, x_t.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return conditional, contrast

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        self.model.network.disable_adapters()
        try:
            yield
        finally:
            self.model.network.enable_adapters()

    @contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        # peft lets only the active adapter's weights take gradients, so the student is put back before its backward pass.
        self.model.network.set_adapter(name)
        try:
            yield
        finally:
            self.model.network.set_adapter(ADAPTER)

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


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise TrainingError(f"discriminator or fake score: loss {loss.item()} or gradient norm {norm.item()} is not finite")
    optimizer.step()
