"""The adversarial loss (arXiv 2406.02347, section 3.3): a discriminator on the frozen teacher's features of re-noised latents."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from flashdiff.distill import processes
from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.losses.base import Opponent, Setup, StudentLoss, renoise_alike
from flashdiff.distill.losses.settings import AdversarialKind, AdversarialSettings
from flashdiff.distill.network import Tap, as_teacher, blank_conditioning
from flashdiff.distill.processes import Draws
from flashdiff.families.base import TorchModel

# --- on logits -------------------------------------------------------------------------------------------------------


def generator_loss(kind: AdversarialKind, fake: Tensor, real: Tensor) -> Tensor:
    """What the student minimises, given the discriminator's logits [B, places] of its samples and of real ones, in pairs."""
    match kind:
        case "lsgan":  # on the sigmoid, as the paper has it (1611.04076)
            return (fake.sigmoid() - 1).square().mean()
        case "non_saturating":  # 1406.2661, section 3
            return softplus(-fake).mean()
        case "relativistic":  # paired (1807.00734; R3GAN, 2501.05441)
            return softplus(real.detach() - fake).mean()
        case _:
            assert_never(kind)


def discriminator_loss(kind: AdversarialKind, fake: Tensor, real: Tensor) -> Tensor:
    """What the discriminator minimises, given its logits [B, places]."""
    match kind:
        case "lsgan":
            return 0.5 * ((real.sigmoid() - 1).square().mean() + fake.sigmoid().square().mean())
        case "non_saturating":
            return softplus(-real).mean() + softplus(fake).mean()
        case "relativistic":
            return softplus(fake - real).mean()
        case _:
            assert_never(kind)


def _share_right(kind: AdversarialKind, fake: Tensor, real: Tensor) -> Tensor:
    """The share of logits by which the discriminator tells samples from real ones: 0.5 where it cannot, 1 where it always does.

    A relativistic one knows only which of a pair is real.
    """
    if kind == "relativistic":
        return (real > fake).float().mean()
    return 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())


def approximate_r1(discriminate: Callable[[Tensor], Tensor], real: Tensor, logits: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The mean of (D(x) - D(x + sigma n))^2: R1 (1801.04406) by a finite difference (APT, 2501.08316, eq. 5).

    It needs no second derivatives. `logits` is D(x) [B, places] of the `real` latents x [B, C, h, w], and the noise n has the
    latents' shape.
    """
    return (discriminate(real + sigma * noise) - logits).square().mean()


# --- the discriminator and its loss ----------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """Maps latents at a noise level to one logit per place, large for what looks real there; each tap has a head of its own."""

    def __init__(self, model: TorchModel, tap: Tap, *, seed: int) -> None:
        super().__init__()
        self._tap = tap
        torch.manual_seed(seed)
        latents = torch.zeros(1, *model.spec.latent_shape(model.spec.sizes[0]), device=model.device)
        with torch.no_grad():
            maps = tap(latents, torch.zeros(1, dtype=torch.int64, device=model.device), blank_conditioning(model))
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features.shape[1], 64, 3, padding=1), nn.SiLU(),
                nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.GroupNorm(4, 128), nn.SiLU(),
                nn.Conv2d(128, 1, 1),
            )
            for features in maps
        ).to(model.device)  # fmt: skip

    def forward(self, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, places] of latents [B, C, h, w] noised to `times` [B]; gradients flow through the teacher to them."""
        maps = self._tap(latents, times, conditioning)
        return torch.cat([head(features).flatten(1) for head, features in zip(self.heads, maps, strict=True)], dim=1)


class Adversarial(StudentLoss):
    """The discriminator's verdict on the student's samples; it trains in every phase of the run."""

    discriminator: Discriminator
    opponent: Opponent

    def __init__(self, setup: Setup, settings: AdversarialSettings) -> None:
        self._setup, self._settings, self._tap = setup, settings, setup.tap(shares=settings.taps)

    def start(self) -> None:
        self.discriminator = Discriminator(self._setup.model, self._tap, seed=self._setup.seed)
        parameters = list(self.discriminator.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self._settings.learning_rate, betas=(0.5, 0.99), weight_decay=0.0)
        self.opponent = Opponent("discriminator", "discriminator head", parameters, optimizer)

    def loss(self, batch: MicroBatch) -> Tensor:
        """The scalar loss of the student's x_0 [B, C, h, w] against the teacher's samples, both renoised alike."""
        conditioning, times = batch.targets.conditioning, self._judged_times(batch.draws)
        fake_x, real_x = renoise_alike(self._setup.model, batch.draws, times, batch.x0, batch.targets.z0)
        with as_teacher(self._setup.model):
            fake = self.discriminator(fake_x, times, conditioning)
            with torch.no_grad():
                real = self.discriminator(real_x, times, conditioning)
        return generator_loss(self._settings.kind, fake, real)

    def train_opponent(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        self._right = torch.zeros((), device=self._setup.model.device)
        with as_teacher(self._setup.model):
            loss = self.opponent.learn(batches, self._discriminator_loss)
        accuracy = float(processes.mean(self._right / len(batches)))
        return {self.opponent.name: loss, "discriminator_accuracy": accuracy}

    def _discriminator_loss(self, batch: MicroBatch) -> Tensor:
        settings, conditioning, discriminator = self._settings, batch.targets.conditioning, self.discriminator
        times = self._judged_times(batch.draws)
        fake_x, real_x = renoise_alike(self._setup.model, batch.draws, times, batch.x0, batch.targets.z0)
        noise = batch.draws.normal(real_x.shape[1:])
        real = discriminator(real_x, times, conditioning)
        fake = discriminator(fake_x, times, conditioning)
        self._right += _share_right(settings.kind, fake.detach(), real.detach())
        loss = discriminator_loss(settings.kind, fake, real)
        if settings.r1_weight:
            loss = loss + settings.r1_weight * approximate_r1(
                lambda x: discriminator(x, times, conditioning), real_x, real, noise, settings.r1_sigma
            )
        return loss

    def _judged_times(self, draws: Draws) -> Tensor:
        """One of the settings' times for each sample [B]."""
        last = self._setup.grid.num_train_timesteps - 1
        choices = torch.tensor([round(share * last) for share in self._settings.times])
        chosen = draws.integers(0, len(choices))
        return choices.to(chosen.device)[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"discriminator": self.discriminator.state_dict(), "discriminator_optimizer": self.opponent.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["discriminator"]
        # flashdiff 0.2 had one head, without a number.
        self.discriminator.load_state_dict(
            {f"heads.0.{name.removeprefix('head.')}" if name.startswith("head.") else name: v for name, v in saved.items()}
        )
        self.opponent.optimizer.load_state_dict(state["discriminator_optimizer"])
