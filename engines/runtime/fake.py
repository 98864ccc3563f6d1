"""Components without a model: an image is one flat colour, made from prompt and seed. For tests and for client authors."""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Costs, ModelSpec, Size
from flashdiff.errors import BackendError, RequestError
from flashdiff.parts import Condition, latent_diffusion
from flashdiff.sampling import Sampler
from flashdiff.schedule import Grid, NoiseSchedule
from flashdiff.text import CutText, TokenizerSpec

_SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FLASH = Sampler(kind="flash", schedule=_SCHEDULE, grid=Grid(solver_steps=16), default_steps=4)
GUIDED = Sampler(kind="ode", schedule=_SCHEDULE, guidance=3.0, default_steps=10)


class FakeComponents:
    """Implements `Components`. Every call is recorded in `calls` as (part, rows); it can be slow or fail on demand."""

    def __init__(
        self, sampler: Sampler = FLASH, *, delay_s: float = 0.0, max_batch: int = 4, parallel_decode: bool = False
    ) -> None:
        self.spec = ModelSpec(
            name="fake",
            family="fake",
            prediction="epsilon",
            sampler=sampler,
            latent_channels=3,
            latent_factor=8,
            sizes=(Size(64, 64), Size(128, 64)),
            tokenizers=(TokenizerSpec(name="input_ids", length=32, pad_id=0),),
            parts=latent_diffusion(["input_ids"], ["color"]),
            conditions=(Condition(name="color", part="text_encoder"),),
        )
        self.max_batch = max_batch
        self.parallel_decode = parallel_decode
        self.delay_s = delay_s
        self.fail_on: str | None = None  # the part that raises BackendError
        self.calls: list[tuple[str, int]] = []

    @property
    def costs(self) -> Costs:
        """What each call takes: the delay, whatever the size and the batch."""
        spatial = [(part, size) for part in ("encoder", "denoiser", "decoder") for size in self.spec.sizes]
        return {key: {self.max_batch: 1000 * self.delay_s} for key in (("text_encoder", None), *spatial)}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Ids [B, length]: one for the whole prompt, then padding. A prompt that may be cut keeps the words that fit.

        RequestError for a longer prompt that may not be cut.
        """
        length = self.spec.prompt_tokens
        for prompt in prompts:
            if len(prompt.split()) > length and not isinstance(prompt, CutText):
                raise RequestError("prompt", prompt, f"at most {length} words fit")
        prompts = [" ".join(p.split()[:length]) if len(p.split()) > length else p for p in prompts]
        return {"input_ids": np.array([[zlib.crc32(p.encode()), *[0] * (length - 1)] for p in prompts], dtype=np.int64)}

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """The outputs [B, ...] of a part after the delay; BackendError where `fail_on` names it."""
        self._called(part, len(next(iter(inputs.values()))))
        runs: dict[str, Callable[..., NDArray[np.float32]]] = {
            "text_encoder": _color,
            "encoder": self._encode,
            "denoiser": self._denoise,
            "decoder": self._decode,
        }
        return {self.spec.part(part).outputs[0]: runs[part](**inputs)}

    def _encode(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        batch, channels, height, width = images.shape
        factor = self.spec.latent_factor
        cells = images.reshape(batch, channels, height // factor, factor, width // factor, factor)
        latents: NDArray[np.float32] = cells.mean((3, 5), dtype=np.float32)
        return latents

    def _denoise(self, latents: NDArray[np.float32], times: NDArray[np.int64], color: NDArray[np.float32]) -> NDArray[np.float32]:
        alphas, sigmas = self.spec.sampler.schedule.levels(times)
        x0 = np.broadcast_to(color[:, :, None, None], latents.shape)
        epsilon: NDArray[np.float32] = ((latents - alphas[:, None, None, None] * x0) / sigmas[:, None, None, None]).astype(
            np.float32
        )
        return epsilon

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        factor = self.spec.latent_factor
        return np.asarray(latents.repeat(factor, axis=2).repeat(factor, axis=3))

    def _called(self, part: str, rows: int) -> None:
        assert rows <= self.max_batch
        self.calls.append((part, rows))
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.fail_on == part:
            raise BackendError(f"the fake {part} failed, as asked")


def _color(input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[B, 3] in [0, 1]: three bytes of each prompt's id."""
    return np.stack([(input_ids[:, 0] >> shift & 255) / 255 for shift in (0, 8, 16)], axis=1).astype(np.float32)
