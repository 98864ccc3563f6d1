"""Linear layers that multiply in fp8 (e4m3), in torch: weights rounded once, inputs as they come, products summed in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flashdiff.errors import BackendError

_LARGEST = 448.0
_TINY = 1e-12
_SIDE = 16
"""What the sides of a weight must be a multiple of for the kernels."""


def round_linears(network: nn.Module, names: Iterable[str]) -> None:
    """Let the linear layers of these names in `network` multiply in fp8, where their sides allow it.

    BackendError where no layer's do.
    """
    layers = [network.get_submodule(name) for name in names]
    fitting = [layer for layer in layers if isinstance(layer, nn.Linear) and not any(side % _SIDE for side in layer.weight.shape)]
    for layer in fitting:
        rounded, scale = _rounded(layer.weight.detach().float())
        del layer.weight
        layer.register_buffer("rounded", rounded)
        layer.register_buffer("scale", scale.t().contiguous())
        layer.__class__ = Fp8Linear  # in its place, so that its hooks stay
    if not fitting:
        raise BackendError(f"no layer has sides that are multiples of {_SIDE}, as fp8 needs; take bf16")


class Fp8Linear(nn.Linear):
    """A linear layer whose weight [N, K] is rounded with a scale a row."""

    rounded: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K], in its type."""
        rows, scale = _rounded(x.reshape(-1, x.shape[-1]))
        made = torch._scaled_mm(rows, self.rounded.t(), scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype)
        return made.reshape(*x.shape[:-1], -1)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a matrix in fp8, each by its own largest value, so that none depends on another; and the scales [rows, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=_TINY) / _LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale
