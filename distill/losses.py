"""Losses between clean latents [B, C, h, w]; pure functions."""

from typing import Literal, assert_never

from torch import Tensor


def distillation_loss(kind: Literal["l2", "pseudo_huber"], student_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """How far the student's one-step x_0 is from the teacher's solution (arXiv 2406.02347, eq. 5), averaged over the batch.

    pseudo_huber is sqrt(|d|^2 + c^2) - c over each sample, c = 0.00054 sqrt(d) (Song & Dhariwal 2023), divided by the
    number of values, so that both kinds are means over values.
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
