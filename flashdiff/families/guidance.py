"""Guidance that a network takes as an input: an embedding of its scale, added to that of the time (LCM, arXiv 2310.04378)."""

import math

import torch
from torch import Tensor


def guidance_embedding(scale: float, width: int) -> Tensor:
    """[1, width] of a guidance scale: sinusoids of 1000 (scale - 1), as a UNet with `time_cond_proj_dim` was trained with."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor([1000.0 * (scale - 1)])[:, None] * frequencies[None]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
