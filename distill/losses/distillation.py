"""Distillation: the student's one-step x_0 against the teacher's solution (arXiv 2406.02347, eq. 5)."""

from typing import assert_never

import torch
from torch import Tensor

from flashdiff.distill.batch import MicroBatch
from flashdiff.distill.losses.base import Setup, StudentLoss, renoise_alike
from flashdiff.distill.losses.decoding import Decoding, lpips_network
from flashdiff.distill.losses.settings import DistillationSettings, LatentDistance
from flashdiff.distill.network import as_teacher


def distillation_loss(kind: LatentDistance, student_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """The distance between two batches of clean latents [B, C, h, w], averaged over the batch.

    pseudo_huber is sqrt(|d|^2 + c^2) - c over each sample, c = 0.00054 sqrt(d) (Song & Dhariwal 2023), divided by the
    root of the number of values, so that it is the error of one value where all are alike.
    """
    difference = (student_x0 - teacher_x0).flatten(1)
    match kind:
        case "l2":
            return difference.square().mean()
        case "pseudo_huber":
            size = difference.shape[1]
            c = 0.00054 * size**0.5
            return ((difference.square().sum(dim=1) + c**2).sqrt() - c).mean() / size**0.5
        case _:
            assert_never(kind)


def perceptual_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """The squared distance between the frozen teacher's features [B, ...] of two images noised alike (the self-perceptual
    objective of 2401.00110), averaged over the batch.

    Each sample's is divided by the mean square of the second features: it is 1 where the first are zero, whatever the network.
    """
    error = (student_features - teacher_features).flatten(1).square().mean(dim=1)
    return (error / (teacher_features.flatten(1).square().mean(dim=1) + 1e-8)).mean()


def whitened_loss(student_x0: Tensor, teacher_x0: Tensor, variance: Tensor) -> Tensor:
    """The squared distance of latents [B, C, h, w], that of each channel divided by its `variance` [C]; the mean over all."""
    return ((student_x0 - teacher_x0).square() / (variance.view(1, -1, 1, 1) + 1e-8)).mean()


class Distillation(StudentLoss):
    """The distance to the teacher's solution: in latents, in the teacher's features, or in decoded images."""

    def __init__(self, setup: Setup, settings: DistillationSettings) -> None:
        self._setup, self._settings = setup, settings
        self._tap = setup.tap()
        decodes = settings.kind in ("decoded", "lpips")
        self._decode = Decoding(setup.model, setup.family, settings, setup.device) if decodes else None
        self._lpips = lpips_network(settings.network, setup.device) if settings.kind == "lpips" else None

    def loss(self, batch: MicroBatch) -> Tensor:
        """The scalar distance of the student's x_0 [B, C, h, w] from the teacher's."""
        student, targets = batch.x0, batch.targets
        match self._settings.kind:
            case "decoded" | "lpips":
                return self._of_images(batch)
            case "perceptual":
                return self._perceptual(batch)
            case "whitened":
                return whitened_loss(student, targets.x0, targets.variance)
            case kind:
                return distillation_loss(kind, student, targets.x0)

    def _of_images(self, batch: MicroBatch) -> Tensor:
        assert self._decode
        with torch.no_grad():
            teacher = self._decode(batch.targets.x0)
        student = self._decode(batch.x0)
        return self._lpips(student, teacher).mean() if self._lpips else distillation_loss("pseudo_huber", student, teacher)

    def _perceptual(self, batch: MicroBatch) -> Tensor:
        setup, conditioning = self._setup, batch.targets.conditioning
        times = batch.draws.integers(0, setup.grid.num_train_timesteps)
        student, teacher = renoise_alike(setup.model, batch.draws, times, batch.x0, batch.targets.x0)
        with as_teacher(setup.model):
            (student_features,) = self._tap(student, times, conditioning)
            with torch.no_grad():
                (teacher_features,) = self._tap(teacher, times, conditioning)
        return perceptual_loss(student_features, teacher_features)
