"""What a network predicts, turned into one meaning: the clean image x_0. Works on numpy arrays and torch tensors alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, assert_never

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow", "trigflow"]
Array = TypeVar("Array", "NDArray[Any]", "Tensor")


def to_x0(prediction: Prediction, output: Array, x_t: Array, alpha: Array, sigma: Array) -> Array:
    """x_0 [B, C, h, w] of the network's output at x_t = alpha x_0 + sigma eps; alpha and sigma broadcast against x_t.

    epsilon: (x_t - sigma eps) / alpha (Ho et al. 2020); v: alpha x_t - sigma v (Salimans & Ho 2022, appendix D);
    sample: the output itself; flow: x_t - sigma v, where v = eps - x_0 and alpha = 1 - sigma (Liu et al. 2023); trigflow is v
    with alpha = cos t and sigma = sin t (arXiv 2410.11081).
    """
    match prediction:
        case "epsilon":
            return (x_t - sigma * output) / alpha
        case "v_prediction" | "trigflow":
            return alpha * x_t - sigma * output
        case "sample":
            return output
        case "flow":
            return x_t - sigma * output
        case _:
            assert_never(prediction)


def with_norm_of(values: Array, reference: Array) -> Array:
    """`values` [..., C, h, w], each patch of 2x2 cells scaled to the length that it has in `reference`; h and w are even.

    What Qwen-Image does with guided outputs, the reference being the conditional ones.
    """
    *rest, channels, height, width = values.shape
    patches, expected = (x.reshape(*rest, channels, height // 2, 2, width // 2, 2) for x in (values, reference))
    lengths, wanted = ((x**2).sum(-1).sum(-2).sum(-3) ** 0.5 for x in (patches, expected))
    return (patches * (wanted / lengths).reshape(*rest, 1, height // 2, 1, width // 2, 1)).reshape(values.shape)


def guided_output(
    outputs: "Sequence[Tensor]", weights: "Sequence[Tensor]", *, keeps_norm: bool, rescale: float = 0.0
) -> "Tensor":
    """The sum of branches' outputs [B, C, h, w] by their weights [B, 1, 1, 1], the first being that with all conditions.

    See `Sampler` for `keeps_norm`, which settles lengths whatever `rescale`, and `rescaled`.
    """
    conditional = outputs[0]
    output = weights[0] * conditional
    for weight, values in zip(weights[1:], outputs[1:], strict=True):
        output = output + weight * values
    if rescale:
        output = rescaled(output, conditional, rescale)
    return with_norm_of(output, conditional) if keeps_norm else output


def rescaled(guided: "Tensor", conditional: "Tensor", share: float) -> "Tensor":
    """Guided outputs [B, ...], by `share` of the way brought to the deviation of the conditional ones (2305.08891, eq. 14-16)."""
    deviations = [values.flatten(1).std(dim=1).view(-1, *(1,) * (values.ndim - 1)) for values in (conditional, guided)]
    return share * guided * (deviations[0] / deviations[1]) + (1 - share) * guided
