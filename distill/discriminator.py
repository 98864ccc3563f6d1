"""The adversarial judge: a small head on the frozen teacher's features of re-noised latents (arXiv 2406.02347, section 3.3)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashdiff.distill.network import Tap
from flashdiff.families.base import TorchModel


class Discriminator(nn.Module):
    """Latents at a noise level to a map of logits, one a place: large for what looks real there."""

    def __init__(self, model: TorchModel, tap: Tap, *, seed: int) -> None:
        super().__init__()
        self._tap = tap
        torch.manual_seed(seed)
        latents = torch.zeros(1, *model.spec.latent_shape(model.spec.sizes[0]), device=model.device)
        conditioning = model.encode_ids(model.tokenizer([""]))
        with torch.no_grad():
            channels = tap(latents, torch.zeros(1, dtype=torch.int64, device=model.device), conditioning).shape[1]
        self.head = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.GroupNorm(4, 128), nn.SiLU(),
            nn.Conv2d(128, 1, 1),
        ).to(model.device)  # fmt: skip

    def forward(self, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, places] of latents [B, C, h, w] noised to `times` [B]; gradients flow through the teacher to them."""
        logits: Tensor = self.head(self._tap(latents, times, conditioning)).flatten(1)
        return logits
