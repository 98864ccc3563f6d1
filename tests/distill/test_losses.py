import torch

from flashdiff.distill.losses import distillation_loss


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
