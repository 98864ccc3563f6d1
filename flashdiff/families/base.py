"""What differs between model families, as one record; and a loaded model, which runs in torch.

A family names its parts as modules with flat, named tensors. Training, export and the torch reference all run these same
modules, so what is exported is what was trained.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flashdiff.components import Conditioning, ModelSpec
from flashdiff.errors import ModelError
from flashdiff.files import hash_files
from flashdiff.text import PromptTokenizer


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One kind of diffusion model. A family that needs an `if` outside this folder misses a field here."""

    name: str
    pipeline_class: str
    """`_class_name` of its model_index.json."""
    conditioning: tuple[str, ...]
    """Names of the text encoder's outputs, which are the denoiser's inputs after latents and times."""
    lora_targets: tuple[str, ...]
    """Module names (suffixes) in the denoiser that take LoRA layers."""
    feature_tap: Callable[[Any], nn.Module]
    """The module of the network whose output the discriminator looks at."""
    lora_prefix: str
    """The denoiser's name in a diffusers LoRA file."""
    default_guidance: float
    default_steps: int
    """Of the base model, without a flash LoRA."""
    read_spec: Callable[[Path], ModelSpec]
    """The spec of a base model from its configuration files alone, sampled by its ODE."""
    load: Callable[[Path, ModelSpec], "TorchModel"]


@dataclass(kw_only=True)
class TorchModel:
    """A base model in torch, float32 and in eval mode. Implements `Components`.

    text_encoder (input_ids [B, T]) -> conditioning tensors; denoiser (latents [B, C, h, w], times [B], *conditioning) ->
    [B, C, h, w]; decoder (latents) -> images [B, 3, H, W] in [-1, 1]. Latents are scaled: about unit variance.
    """

    spec: ModelSpec
    folder: Path
    tokenizer: PromptTokenizer
    conditioning: tuple[str, ...]
    text_encoder: nn.Module
    denoiser: nn.Module
    decoder: nn.Module
    encode_images: Callable[[Tensor, torch.Generator], Tensor]
    """Images [B, 3, H, W] in [-1, 1] to scaled latents, sampled where the autoencoder is variational."""
    network: Any
    """The diffusers model inside `denoiser`: where LoRA layers go."""
    max_batch: int = 8

    @cached_property
    def base_hash(self) -> str:
        """Names the weights and configuration, wherever they lie."""
        return base_hash(self.folder)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return {name: value.numpy() for name, value in self.encode_ids(self.tokenizer(prompts)).items()}

    def encode_ids(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """`encode` of token ids [B, T], for callers that go on in torch."""
        with torch.no_grad():
            return dict(zip(self.conditioning, self.text_encoder(torch.from_numpy(ids)), strict=True))

    def denoise(
        self, latents: NDArray[np.float32], times: NDArray[np.int64], conditioning: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        inputs = (latents, times, *(conditioning[name] for name in self.conditioning))
        with torch.no_grad():
            output: NDArray[np.float32] = self.denoiser(*(torch.from_numpy(values) for values in inputs)).numpy()
        return output

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            images: NDArray[np.float32] = self.decoder(torch.from_numpy(latents)).numpy()
        return images


def base_hash(folder: Path) -> str:
    """Hash of a model directory's weights and configuration; other files (cards, pictures) do not count."""
    return hash_files(folder, (path for path in folder.glob("*/*") if path.suffix in {".safetensors", ".bin", ".json", ".txt"}))


def read_config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """A part's configuration; ModelError when it is missing or not JSON."""
    path = folder / part / name
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError:
        raise ModelError(f"{folder}: not a complete model directory, {part}/{name} is missing") from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    return config
