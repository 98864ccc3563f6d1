"""An opened bundle: `Components` over parts compiled at fixed shapes, batches padded to the nearest one."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Conditioning, Costs, ModelSpec, Size
from flashdiff.engines.bundle import PARTS, Manifest, PartSpec, read_manifest, tokenizer_file
from flashdiff.engines.runtime import CompiledPart, compile_part
from flashdiff.text import PromptTokenizer

_TIMED_RUNS = 7


class Engine:
    """A bundle ready to run. Rows do not depend on what else is in their batch; see docs/structure.md for the contract."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.spec: ModelSpec = manifest.model
        self.max_batch = manifest.batch_sizes[-1]
        texts = {tokenizer.name: (folder / tokenizer_file(tokenizer)).read_text("utf-8") for tokenizer in self.spec.tokenizers}
        self._tokenizer = PromptTokenizer(texts, self.spec.tokenizers)
        self._compiled: dict[tuple[str, Size | None, int], CompiledPart] = {}
        for part in PARTS:
            spec = manifest.parts[part]
            for size in self._sizes_of(spec):
                for batch in manifest.batch_sizes:
                    dimensions = {"batch": batch, **(_spatial(self.spec, size) if size else {})}
                    self._compiled[part, size, batch] = compile_part(manifest.backend, folder / spec.file, spec, dimensions)

    def measure_costs(self) -> Costs:
        """Run every bucket a few times and say what it takes; also warms the engine up, so no request pays for a first run."""
        costs: Costs = {part: {} for part in PARTS}
        for (part, size, batch), compiled in self._compiled.items():
            dimensions = {"batch": batch, **(_spatial(self.spec, size) if size else {})}
            inputs = {t.name: np.zeros(t.shape_for(dimensions), dtype=t.dtype) for t in self.manifest.parts[part].inputs}
            times = []
            for _ in range(_TIMED_RUNS):
                started = time.perf_counter()
                compiled(inputs)
                times.append(1000 * (time.perf_counter() - started))
            if size in (None, self.spec.sizes[0]):
                costs[part][batch] = round(statistics.median(times), 4)
        return costs

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.run_part("text_encoder", self._tokenizer(prompts))

    def denoise(
        self, latents: NDArray[np.float32], times: NDArray[np.int64], conditioning: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        return self.run_part("denoiser", {"latents": latents, "times": times, **conditioning})["output"]

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.run_part("decoder", {"latents": latents})["images"]

    def run_part(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Outputs of one part for up to `max_batch` rows, at the smallest bucket that holds them."""
        rows = len(next(iter(inputs.values())))
        batch = next(batch for batch in self.manifest.batch_sizes if batch >= rows)
        # Padding repeats the first row: any finite values do, since rows do not see each other.
        padded = {name: np.concatenate([values, *[values[:1]] * (batch - rows)]) for name, values in inputs.items()}
        outputs = self._compiled[part, self._size_of(inputs), batch](padded)
        return {name: values[:rows] for name, values in outputs.items()}

    def _size_of(self, inputs: Mapping[str, NDArray[Any]]) -> Size | None:
        """The image size whose bucket takes these inputs: read off the latents, None for a part that has none."""
        if "latents" not in inputs:
            return None
        _, _, height, width = inputs["latents"].shape
        return Size(width * self.spec.latent_factor, height * self.spec.latent_factor)

    def _sizes_of(self, part: PartSpec) -> tuple[Size | None, ...]:
        spatial = any("height" in tensor.shape for tensor in part.inputs)
        return self.spec.sizes if spatial else (None,)


def _spatial(spec: ModelSpec, size: Size) -> dict[str, int]:
    _, height, width = spec.latent_shape(size)
    return {"height": height, "width": width}


def open_bundle(folder: Path) -> Engine:
    """Check a bundle and make it ready to run; BundleError or BackendError say why it cannot be."""
    return Engine(folder, read_manifest(folder))
