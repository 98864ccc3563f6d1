"""Images of latents within a loss, and the network that compares them as people do."""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.distill.losses.settings import DistillationSettings
from flashdiff.errors import ConfigError, ModelError, first_line
from flashdiff.families.autoencoders import check_vae, find_vae, with_vae
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.hub import download_file, hub_name
from flashdiff.reading import open_file


class Decoding:
    """Decodes latents through a frozen autoencoder; the gradient passes through it to them."""

    def __init__(self, model: TorchModel, family: ModelFamily, settings: DistillationSettings, device: torch.device) -> None:
        """ConfigError where the recipe names a decoder that is not there, or not of this model's latents."""
        self._decoder: nn.Module = model.decoder
        if settings.decoder:
            try:
                folder = find_vae(settings.decoder)
                check_vae(folder, family, model.spec)
                self._decoder = with_vae(model, folder).decoder.to(device)
            except ModelError as error:
                raise ConfigError(f"loss.distillation.decoder: {str(error).removeprefix('--vae ')}") from None
        self._decoder.requires_grad_(False)
        self._crop = settings.crop

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of latents [B, C, h, w], or of their central cells."""
        if self._crop:
            height, width = (min(self._crop, side) for side in latents.shape[2:])
            top, left = ((side - kept) // 2 for side, kept in zip(latents.shape[2:], (height, width), strict=True))
            latents = latents[:, :, top : top + height, left : left + width]
        images: Tensor = self._decoder(latents)
        return images.clamp(-1, 1)


def lpips_network(file: str | None, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (1801.03924) of two batches of images in [-1, 1], one distance each; ConfigError where it cannot be had."""
    network: nn.Module = _scripted(file) if file else _of_the_package()
    network = network.to(device).eval()
    for parameter in network.parameters():  # TorchScript has no requires_grad_ of its own
        parameter.requires_grad = False
    return network


def _scripted(file: str) -> Any:
    on_hub = None if Path(file).exists() else hub_name(file)
    try:
        path = download_file(on_hub) if on_hub else Path(file)
        with open_file(path) as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which such files are saved in
            network = torch.jit.load(opened, map_location="cpu")
            with torch.no_grad():
                distances = network(*torch.zeros(2, 1, 3, 64, 64))
            if distances.numel() != 1:
                raise ValueError(f"for a batch of one it returns {distances.numel()} numbers")
            return network
    except ModelError as error:
        raise ConfigError(f"loss.distillation.network: {error}") from None
    except Exception as error:  # torch has many kinds for files that are no TorchScript
        raise ConfigError(
            f"loss.distillation.network '{file}': no TorchScript file that maps two batches of images to distances "
            f"({first_line(error)})"
        ) from None


def _of_the_package() -> Any:
    try:
        lpips: Any = import_module("lpips")  # an extra that brings torchvision
    except ImportError as error:
        raise ConfigError(
            f"loss.distillation 'lpips' needs '{error.name}', which is not installed: pip install lpips, "
            "or name a TorchScript file: loss.distillation.network"
        ) from None
    try:
        return lpips.LPIPS(net="vgg", verbose=False)  # torchvision downloads VGG's weights on first use
    except Exception as error:  # of the network, of many kinds
        raise ConfigError(
            f"loss.distillation 'lpips': the package lpips cannot load VGG ({first_line(error)}); "
            "name a TorchScript file: loss.distillation.network"
        ) from None
