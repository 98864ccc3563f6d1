"""The seam between whoever makes images and whatever runs the network: four calls and what the model says of itself.

`Components` is implemented by a torch model, by an opened bundle and by `FakeComponents`; generate, the server's
scheduler, training previews and the benchmarks use nothing else of them. Arrays handed out belong to the caller: an
implementation never writes to them again.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flashdiff.config import Record
from flashdiff.prediction import Prediction
from flashdiff.sampling import Sampler
from flashdiff.text import TokenizerSpec

Conditioning = dict[str, NDArray[np.float32]]
"""Named conditioning tensors of a batch, [B, ...] each, such as encoder_hidden_states [B, T, D]."""


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


Costs = dict[tuple[str, Size | None], dict[int, float]]
"""Milliseconds of a call by part of the model and image size (None for texts), then by batch size."""


class ModelSpec(Record):
    """What there is to know of a model without its weights."""

    name: str
    family: str
    prediction: Prediction
    sampler: Sampler
    latent_channels: int = Field(ge=1)
    latent_factor: int = Field(ge=1)
    """Pixels per latent cell, along each side."""
    sizes: tuple[Size, ...] = Field(min_length=1)
    """The default first."""
    tokenizers: tuple[TokenizerSpec, ...] = Field(min_length=1)
    unconditional: Literal["empty_prompt", "zeros"] = "empty_prompt"
    """What guidance contrasts a prompt with: the conditioning of the empty prompt, or zeros in its place."""

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt, in tokens, end marks included."""
        return max(tokenizer.length for tokenizer in self.tokenizers)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of an image of `size`."""
        return self.latent_channels, size.height // self.latent_factor, size.width // self.latent_factor


class Components(Protocol):
    """A model that runs. Batches up to `max_batch`; images of the sizes in `spec`."""

    spec: ModelSpec
    max_batch: int
    parallel_decode: bool
    """Whether `decode` may be called by another thread while another call runs, because the device gains by it."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts; RequestError for one that is too long."""
        ...

    def encode_images(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: the mean where the autoencoder has a distribution of them."""
        ...

    def denoise(
        self, latents: NDArray[np.float32], times: NDArray[np.int64], conditioning: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The network's raw output [B, C, h, w] for latents of that shape, each row at its own time [B]."""
        ...

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images [B, 3, H, W] in [-1, 1] (not clipped) of latents [B, C, h, w]."""
        ...
