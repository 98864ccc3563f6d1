"""The adversarial judge: a small head on the frozen teacher's features of re-noised latents (arXiv 2406.02347, section 3.3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.families.base import ModelFamily, TorchModel


class Discriminator(nn.Module):
    """Latents at a noise level to a map of logits, one a place: large for what looks real there."""

    def __init__(self, model: TorchModel, family: ModelFamily, *, seed: int) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that the frozen network does not become a submodule
        self._tap = [family.feature_tap(model.network)]
        torch.manual_seed(seed)
        latents = torch.zeros(1, *model.spec.latent_shape(model.spec.sizes[0]))
        conditioning = model.encode_ids(model.tokenizer([""]))
        with torch.no_grad():
            channels = self._features(latents, torch.zeros(1, dtype=torch.int64), conditioning).shape[1]
        self.head = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.GroupNorm(4, 128), nn.SiLU(),
            nn.Conv2d(128, 1, 1),
        )  # fmt: skip

    def forward(self, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, places] of latents [B, C, h, w] noised to `times` [B]; gradients flow through the teacher to them."""
        logits: Tensor = self.head(self._features(latents, times, conditioning)).flatten(1)
        return logits

    def _features(self, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """What the tapped module puts out, as a map [B, C, h, w]."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            caught.append(output[-1] if isinstance(output, tuple) else output)  # text comes first, the image last

        (model,), (tap,) = self._model, self._tap
        handle = tap.register_forward_hook(catch)
        try:
            model.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
        finally:
            handle.remove()
        features = caught[0]
        if features.ndim == 3:  # a transformer's tokens [B, N, C], in rows as long as the image is wide
            rows = round((features.shape[1] * latents.shape[2] / latents.shape[3]) ** 0.5)
            features = features.transpose(1, 2).unflatten(2, (rows, -1))
        return features.float()
