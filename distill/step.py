"""What an update starts from: samples solved by the teacher, and the student's own evaluation of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashdiff.distill.config import Phase, Recipe
from flashdiff.distill.curriculum import start_probabilities
from flashdiff.distill.data import Dataset
from flashdiff.distill.teacher import solve
from flashdiff.families.base import GUIDANCE, TorchModel
from flashdiff.prediction import to_x0
from flashdiff.sampling import renoise


@dataclass(frozen=True)
class Targets:
    """What the student learns from: noisy latents and the teacher's solution from each. No gradients."""

    z0: Tensor  # [N, C, h, w], the real images
    x_t: Tensor  # [N, C, h, w]
    times: Tensor  # [N]
    conditioning: Mapping[str, Tensor]  # [N, ...]
    x0: Tensor  # [N, C, h, w]

    def __getitem__(self, chosen: Tensor) -> "Targets":
        return Targets(
            self.z0[chosen],
            self.x_t[chosen],
            self.times[chosen],
            {name: values[chosen] for name, values in self.conditioning.items()},
            self.x0[chosen],
        )


def guided(conditioning: Mapping[str, Tensor], guidance: Tensor) -> Mapping[str, Tensor]:
    """The teacher's conditioning: with its guidance scales [B] in it, where the network takes them as an input."""
    return {**conditioning, GUIDANCE: guidance} if GUIDANCE in conditioning else conditioning


def run_network(model: TorchModel, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's raw output, with whatever adapters are on."""
    output: Tensor = model.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
    return output


@torch.no_grad()
def make_targets(
    model: TorchModel,
    unconditional: Mapping[str, Tensor] | None,
    data: Dataset,
    recipe: Recipe,
    phase: Phase,
    count: int,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Targets:
    """`count` samples, each with its own image, start time, guidance and noise, solved by the teacher (adapters off)."""
    grid, schedule = recipe.grid, model.spec.sampler.schedule
    chosen = rng.integers(0, len(data.captions), count)
    starts = torch.from_numpy(rng.choice(grid.solver_steps, count, p=start_probabilities(grid, phase.mode_weights)))
    guidance = torch.from_numpy(rng.uniform(*recipe.guidance, count)).float()
    times = torch.tensor(grid.solver_times())[starts]

    alpha, sigma = levels(model, times)
    noise = torch.randn((count, *data.latents.shape[1:]), generator=generator)
    # The first grid point is pure noise, without a trace of the image, because inference starts there.
    pure = (starts == 0).view(-1, 1, 1, 1)
    z0 = data.latents[torch.from_numpy(chosen)]
    x_t = torch.where(pure, noise, renoise(z0, noise, alpha, sigma))

    captions = [data.captions[index] for index in chosen]
    conditioning = model.encode_ids(model.tokenizer(captions, truncate=True))
    model.network.disable_adapters()
    x0 = torch.cat(
        [
            solve(
                lambda latents, t, condition: run_network(model, latents, t, condition),
                x_t[part],
                starts[part],
                guidance[part],
                {name: values[part] for name, values in guided(conditioning, guidance).items()},
                unconditional,
                grid=grid,
                schedule=schedule,
                prediction=model.spec.prediction,
            )
            for part in torch.arange(count).split(recipe.batch_size)  # memory as for one batch, whatever the count
        ]
    )
    model.network.enable_adapters()
    return Targets(z0, x_t, times, conditioning, x0)


def student_x0(model: TorchModel, batch: Targets) -> Tensor:
    """The student's single conditional evaluation at each sample's start, as x_0."""
    return predict_x0(model, batch.x_t, batch.times, batch.conditioning)


def predict_x0(model: TorchModel, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """x_0 of latents at `times` [B], by the denoiser with whatever adapters are on."""
    alpha, sigma = levels(model, times)
    return to_x0(model.spec.prediction, run_network(model, latents, times, conditioning), latents, alpha, sigma)


def levels(model: TorchModel, times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma [B, 1, 1, 1] of `times` [B]."""
    alpha, sigma = (torch.from_numpy(x).float().view(-1, 1, 1, 1) for x in model.spec.sampler.schedule.levels(times.tolist()))
    return alpha, sigma
