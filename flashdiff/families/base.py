"""What differs between model families, as one record; and a loaded model, which runs in torch.

A family names its parts as modules with flat, named tensors. Training, export and the torch reference all run these same
modules, so what is exported is what was trained.
"""

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
from flashdiff.families.codec import Encoder
from flashdiff.files import hash_files
from flashdiff.text import PromptTokenizer

GUIDANCE = "guidance"
"""The conditioning tensor [B] of networks that were trained to take the guidance scale as an input."""


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
    fixed_size: bool = False
    """Whether an exported network works at one image size alone, because it bakes its positions in; else at any."""
    float32_inputs: tuple[str, ...] = ()
    """Conditioning that stays float32 in a network of lower precision, because the network itself mixes it with float32."""
    size_step: Callable[[dict[str, Any]], int]
    """Latent cells that sides must be multiples of, from the denoiser's config.json."""
    largest_side: Callable[[dict[str, Any]], int | None] = lambda _: None
    """Latent cells of the longest side there are positions for, from the same; None: any."""
    lora_writer: str | None = None
    """The diffusers pipeline whose `save_lora_weights` writes such a file; None: `pipeline_class` itself."""
    default_guidance: float
    default_steps: int
    """Of the base model, without a flash LoRA."""
    read_spec: Callable[[Path], ModelSpec]
    """The spec of a base model from its configuration files alone, sampled by its ODE."""
    load: Callable[[Path, ModelSpec], "TorchModel"]


@dataclass(kw_only=True)
class TorchModel:
    """A base model in torch, float32 and in eval mode. Implements `Components`.

    text_encoder (ids [B, T] of every tokenizer) -> conditioning tensors; denoiser (latents [B, C, h, w], times [B],
    *conditioning) -> [B, C, h, w]; encoder (images [B, 3, H, W] in [-1, 1]) -> latents, and decoder back. Latents are scaled:
    about unit variance.
    """

    spec: ModelSpec
    folder: Path
    tokenizer: PromptTokenizer
    conditioning: tuple[str, ...]
    text_encoder: nn.Module
    denoiser: nn.Module
    encoder: Encoder
    decoder: nn.Module
    network: Any
    """The diffusers model inside `denoiser`: where LoRA layers go."""
    weights: Mapping[str, Any]
    """Every model that was loaded, by its folder: saving them, fused or not, makes a base directory again."""
    max_batch: int = 8
    parallel_decode: bool = False

    @cached_property
    def base_hash(self) -> str:
        """Names the weights and configuration, wherever they lie."""
        return base_hash(self.folder)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return {name: value.cpu().numpy() for name, value in self.encode_ids(self.tokenizer(prompts)).items()}

    def encode_ids(self, ids: Mapping[str, NDArray[np.int64]]) -> dict[str, Tensor]:
        """`encode` of token ids [B, T] of every tokenizer, for callers that go on in torch."""
        place = next(self.text_encoder.parameters()).device
        with torch.no_grad():
            outputs = self.text_encoder(*(torch.from_numpy(ids[tokenizer.name]).to(place) for tokenizer in self.spec.tokenizers))
        return {name: values.to(self.device, torch.float32) for name, values in zip(self.conditioning, outputs, strict=True)}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def guides_twice(self) -> bool:
        """Whether guidance is a second evaluation, and not an input of the network."""
        return GUIDANCE not in self.conditioning

    def unconditional(self) -> dict[str, Tensor] | None:
        """What guidance contrasts prompts with, batch 1; None where the network takes guidance as an input."""
        if not self.guides_twice:
            return None
        empty = self.encode_ids(self.tokenizer([""]))
        zeros = self.spec.unconditional == "zeros"
        return {name: torch.zeros_like(values) for name, values in empty.items()} if zeros else empty

    def encode_images(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            latents: NDArray[np.float32] = self.encoder(torch.from_numpy(images).to(self.device)).cpu().numpy()
        return latents

    def denoise(
        self, latents: NDArray[np.float32], times: NDArray[np.int64], conditioning: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        inputs = (latents, times, *(conditioning[name] for name in self.conditioning))
        with torch.no_grad():
            output: NDArray[np.float32] = (
                self.denoiser(*(torch.from_numpy(values).to(self.device) for values in inputs)).cpu().numpy()
            )
        return output

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            images: NDArray[np.float32] = self.decoder(torch.from_numpy(latents).to(self.device)).cpu().numpy()
        return images


def base_hash(folder: Path) -> str:
    """Hash of a model directory's weights and configuration; other files (cards, pictures) do not count."""
    counted = {".safetensors", ".bin", ".json", ".txt", ".model"}
    return hash_files(folder, (path for path in folder.glob("*/*") if path.suffix in counted))
