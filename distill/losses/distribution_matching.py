"""Distribution matching (arXiv 2406.02347, section 3.4): the teacher's score against that of the student's distribution."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.losses.base import Opponent, Setup, StudentLoss
from flashdiff.distill.losses.settings import DistributionMatchingSettings
from flashdiff.distill.network import as_adapter, as_teacher, guided, levels, predict_x0, run_network
from flashdiff.errors import ConfigError
from flashdiff.prediction import to_x0
from flashdiff.sampling import renoise

FAKE_SCORE = "fake_score"
"""The second adapter's name within peft."""


def distribution_matching_loss(student_x0: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """|x_S - stopgrad(x_S - u g)|^2 with g = x_0^fake - x_0^teacher, both at a re-noised x_S (DMD, 2311.18828, eq. 7-8).

    All are [B, C, h, w]. The gradient moves x_S along -g; u = 1 / mean |x_S - x_0^teacher| makes samples weigh alike at every
    noise level. Without DMD2's factor 1/2, as Flash Diffusion has it: a weight here is twice that weight there. Computed in
    float32.
    """
    with torch.no_grad():
        x, fake, teacher = student_x0.float(), fake_x0.float(), teacher_x0.float()
        scale = (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-5
        target = x - (fake - teacher) / scale
    return (student_x0.float() - target).square().mean()


class DistributionMatching(StudentLoss):
    """Moves the student's samples from the fake score towards the guided teacher's.

    The fake score is the student itself, or a LoRA that trains on its samples in every phase of the run.
    """

    def __init__(self, setup: Setup, settings: DistributionMatchingSettings) -> None:
        if settings.decoupled and setup.branches.are_an_input:
            raise ConfigError("loss.distribution_matching.decoupled: this network takes its guidance as an input; leave it out")
        self._setup, self._settings = setup, settings
        has_critic = settings.fake_score == "lora"
        self._critic = setup.add_adapter(FAKE_SCORE, setup.seed + 1) if has_critic else []

    def start(self) -> None:
        if self._critic:
            optimizer = torch.optim.AdamW(self._critic, lr=self._settings.critic_learning_rate, weight_decay=0.0)
            self.opponent = Opponent("fake_score", "fake score LoRA", self._critic, optimizer)

    def loss(self, batch: MicroBatch) -> Tensor:
        """A scalar that compares the scores of teacher and fake at x_tau, a re-noised x_0 [B, C, h, w].

        No gradient flows through either score.
        """
        setup, settings, model = self._setup, self._settings, self._setup.model
        x0, conditioning = batch.x0, batch.targets.conditioning
        low, high = settings.guidance or setup.guidance
        guidance = low + (high - low) * batch.draws.uniform()
        first, last = (round(share * (setup.grid.num_train_timesteps - 1)) for share in settings.times)
        starts = batch.targets.times
        ends = self._next_times(starts) if settings.own_step else torch.zeros_like(starts)
        if settings.own_step:
            low_tau, high_tau = ends.clamp(min=first), starts.clamp(max=last)
            tau = (low_tau + batch.draws.uniform() * (high_tau - low_tau).clamp(min=0)).long()
        else:
            tau = batch.draws.integers(first, last + 1)
        noise = batch.draws.normal(x0.shape[1:])
        with torch.no_grad():
            x_tau = renoise(x0, noise, *levels(model, tau))
            with as_teacher(model):
                if setup.branches.are_an_input:
                    teacher = predict_x0(model, x_tau, tau, guided(conditioning, guidance))
                elif settings.decoupled:
                    conditional = predict_x0(model, x_tau, tau, conditioning)
                    # Guidance is compared where there is less noise than the student started from.
                    tau_guidance = (ends + batch.draws.uniform() * (starts - ends)).long().clamp(min=first)
                    x_guidance = renoise(x0, noise, *levels(model, tau_guidance))
                    plain, led = self._conditional_and_guided(x_guidance, tau_guidance, conditioning, guidance)
                    teacher = conditional + (led - plain)
                else:
                    _, teacher = self._conditional_and_guided(x_tau, tau, conditioning, guidance)
            with as_adapter(model, FAKE_SCORE) if self._critic else nullcontext():
                fake = predict_x0(model, x_tau, tau, conditioning)
        if settings.first_step:
            return distribution_matching_loss(x0, fake, teacher)
        later = (starts < setup.grid.num_train_timesteps - 1).view(-1, 1, 1, 1)
        # Where fake and teacher agree, the loss is 0: samples that start from pure noise count, but are not moved.
        return distribution_matching_loss(x0, torch.where(later, fake, teacher), teacher)

    def _next_times(self, times: Tensor) -> Tensor:
        """The first inference time [B] after each of the start times [B]; 0 after the last."""
        grid = self._setup.grid
        after = torch.tensor([*grid.inference_times(grid.modes), 0], device=times.device).expand(len(times), -1)
        return torch.where(after < times[:, None], after, 0).amax(1)

    def _conditional_and_guided(
        self, x_t: Tensor, times: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both x_0 [B, C, h, w] of the teacher at the scales [B], in one evaluation of all branches; guided as its ODE is."""
        model, branches = self._setup.model, self._setup.branches
        alpha, sigma = levels(model, times)
        outputs = branches.outputs(partial(run_network, model), x_t, times, conditioning)
        guided_too = (outputs[0], branches.joined(outputs, guidance))
        plain_x0, led_x0 = (to_x0(model.spec.prediction, output, x_t, alpha, sigma) for output in guided_too)
        return plain_x0, led_x0

    def train_opponent(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        losses = {}
        if self.opponent:
            with as_adapter(self._setup.model, FAKE_SCORE):
                for _ in range(self._settings.critic_updates):
                    losses[self.opponent.name] = self.opponent.learn(batches, self._critic_loss)
        return losses

    def _critic_loss(self, batch: MicroBatch) -> Tensor:
        """Denoising (Ho et al. 2020) of the student's samples: the score of the student's distribution."""
        times = batch.draws.integers(0, self._setup.grid.num_train_timesteps)
        alpha, sigma = levels(self._setup.model, times)
        x_t = renoise(batch.x0, batch.draws.normal(batch.x0.shape[1:]), alpha, sigma)
        error = predict_x0(self._setup.model, x_t, times, batch.targets.conditioning) - batch.x0
        weight = (alpha / sigma).square().clamp(max=5)  # min-SNR (2303.09556): every level counts
        return (weight * error.square()).mean()

    def state_dict(self) -> dict[str, Any]:
        if not self.opponent:
            return {}
        return {"critic": [p.detach() for p in self._critic], "critic_optimizer": self.opponent.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.opponent:
            with torch.no_grad():
                for parameter, value in zip(self._critic, state["critic"], strict=True):
                    parameter.copy_(value)
            self.opponent.optimizer.load_state_dict(state["critic_optimizer"])
