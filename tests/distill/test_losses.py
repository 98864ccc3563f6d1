import math

import pytest
import torch

from flashdiff.distill.losses.adversarial import approximate_r1, discriminator_loss, generator_loss
from flashdiff.distill.losses.distillation import distillation_loss, perceptual_loss
from flashdiff.distill.losses.distribution_matching import distribution_matching_loss
from flashdiff.distill.losses.settings import AdversarialKind


def test_l2_is_the_mean_square() -> None:
    assert distillation_loss("l2", torch.full((2, 3, 4, 4), 3.0), torch.ones(2, 3, 4, 4)) == 4


def test_pseudo_huber_is_smooth_at_zero_and_linear_far_out() -> None:
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    distillation_loss("pseudo_huber", zero, torch.zeros(1, 1, 2, 2)).backward()
    assert zero.grad is not None
    assert zero.grad.abs().max() == 0
    near, far = (distillation_loss("pseudo_huber", torch.full((1, 1, 2, 2), x), torch.zeros(1, 1, 2, 2)) for x in (10.0, 20.0))
    assert torch.isclose(far, 2 * near, rtol=1e-3)
    assert torch.isclose(near, torch.tensor(10.0), rtol=1e-3)


def test_perceptual_distance_is_a_share_of_the_teachers_features_sample_by_sample() -> None:
    teacher = torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), 100.0)])
    assert perceptual_loss(teacher, teacher) == 0
    assert perceptual_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    assert perceptual_loss(torch.stack([teacher[0] * 2, teacher[1]]), teacher).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "undecided_generator", "undecided_discriminator"),
    [("lsgan", 0.25, 0.25), ("non_saturating", math.log(2), 2 * math.log(2)), ("relativistic", math.log(2), math.log(2))],
)
def test_adversarial_losses_at_a_discriminator_that_cannot_tell(
    kind: AdversarialKind, undecided_generator: float, undecided_discriminator: float
) -> None:
    zero = torch.zeros(4, requires_grad=True)
    real = torch.zeros(4, requires_grad=True)
    generator = generator_loss(kind, zero, real)
    assert generator.item() == pytest.approx(undecided_generator)
    assert discriminator_loss(kind, zero, real).item() == pytest.approx(undecided_discriminator)
    generator.backward()
    assert zero.grad is not None
    assert (zero.grad < 0).all()  # the student wants larger logits for what it makes
    assert real.grad is None
    for logits, sign in ((zero, 1), (real, -1)):
        (gradient,) = torch.autograd.grad(discriminator_loss(kind, zero, real), logits)
        assert (sign * gradient > 0).all()


def test_the_robust_losses_still_pull_when_the_discriminator_is_sure() -> None:
    """The sigmoid makes lsgan's gradient vanish there: the trap that the other two are for."""
    strength = {}
    for kind in ("lsgan", "non_saturating", "relativistic"):
        fake = torch.full((1,), -12.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(generator_loss(kind, fake, torch.full((1,), 12.0)), fake)
        strength[kind] = gradient.abs().item()
    assert strength["lsgan"] < 1e-4
    assert min(strength["non_saturating"], strength["relativistic"]) > 0.99


def test_approximate_r1_is_the_squared_slope_along_the_noise() -> None:
    slope = torch.randn(6, generator=torch.Generator().manual_seed(0))
    real, noise = torch.randn(3, 6), torch.randn(3, 6)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return x @ slope

    found = approximate_r1(linear, real, linear(real), noise, 0.1)
    assert found.item() == pytest.approx((0.1 * noise @ slope).square().mean().item(), rel=1e-3)


def test_distribution_matching_moves_samples_from_the_fake_towards_the_teacher() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    fake, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    distribution_matching_loss(x, fake, teacher).backward()
    assert x.grad is not None
    scale = (x.detach() - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-5
    torch.testing.assert_close(x.grad, 2 * (fake - teacher) / scale / x.numel())
    torch.testing.assert_close(distribution_matching_loss(x, teacher, teacher).item(), 0.0)
