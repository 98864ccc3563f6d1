"""Losses between clean latents [B, C, h, w] and on discriminator logits; pure functions."""

from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import softplus

from flashdiff.distill.config import AdversarialKind, LatentDistance


def distillation_loss(kind: LatentDistance, student_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """How far the student's one-step x_0 is from the teacher's solution (arXiv 2406.02347, eq. 5), averaged over the batch.

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
    """Squared distance of the frozen teacher's features of two images noised alike (the self-perceptual objective of
    2401.00110), averaged over the batch.

    In shares of the second features' mean square, per sample: so it is 1 where the first are zero, whatever the network.
    """
    error = (student_features - teacher_features).flatten(1).square().mean(dim=1)
    return (error / (teacher_features.flatten(1).square().mean(dim=1) + 1e-8)).mean()


def generator_loss(kind: AdversarialKind, fake: Tensor, real: Tensor) -> Tensor:
    """What the student minimises, given the discriminator's logits of its samples and of real ones, in pairs."""
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
    """What the discriminator minimises, given its logits."""
    match kind:
        case "lsgan":
            return 0.5 * ((real.sigmoid() - 1).square().mean() + fake.sigmoid().square().mean())
        case "non_saturating":
            return softplus(-real).mean() + softplus(fake).mean()
        case "relativistic":
            return softplus(fake - real).mean()
        case _:
            assert_never(kind)


def approximate_r1(discriminate: Callable[[Tensor], Tensor], real: Tensor, logits: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(D(x) - D(x + sigma n))^2: R1 (1801.04406) by a finite difference, without second derivatives (APT, 2501.08316, eq. 5)."""
    return (discriminate(real + sigma * noise) - logits).square().mean()


def distribution_matching_loss(student_x0: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """|x_S - stopgrad(x_S - u g)|^2 with g = x_0^fake - x_0^teacher, both at a re-noised x_S (DMD, 2311.18828, eq. 7-8).

    Its gradient moves x_S along -g; u = 1 / mean |x_S - x_0^teacher| makes samples weigh alike at every noise level. Without
    DMD2's factor 1/2, as Flash Diffusion has it: a weight here is twice that weight there. Computed in float32.
    """
    with torch.no_grad():
        x, fake, teacher = student_x0.float(), fake_x0.float(), teacher_x0.float()
        scale = (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-5
        target = x - (fake - teacher) / scale
    return (student_x0.float() - target).square().mean()
