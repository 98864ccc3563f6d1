"""An opened bundle: `Components` over parts compiled at fixed shapes, batches padded to the nearest one."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Costs, ModelSpec, Size
from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.base import Backend, CompiledPart
from flashdiff.engines.bundle import SLOTS, BucketCost, Manifest, PartRecord, tokenizer_file
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.engines.runtime.snapshot import Snapshot
from flashdiff.engines.shapes import bucket_shapes, dimensions_of
from flashdiff.errors import BackendError, OutOfMemoryError, first_line
from flashdiff.lora_slots import SlotTable
from flashdiff.parts import Phase
from flashdiff.text import PromptTokenizer
from flashdiff.tiles import Tiling, decode_tiling, tiles_at_once

# How the libraries say that memory is short, in lower case: they have no class in common for it, and torch on CPUs, OpenVINO and
# ONNX Runtime none at all.
_OUT_OF_MEMORY = (
    "out of memory",  # torch and CUDA
    "can't allocate memory",  # torch on a CPU
    "failed to allocate",  # OpenVINO and ONNX Runtime
    "bad_alloc",
    "bad allocation",
    "memoryallocation",  # TensorRT's calls of CUDA
)
K = TypeVar("K")

_TIMED_RUNS, _TIMED_MS = 7, 1000  # of a bucket, at most


class Engine:
    """A bundle that runs. `manifest.rows_are_exact` says whether rows depend on what else is in their batch."""

    def __init__(
        self, folder: Path, manifest: Manifest, snapshot: Snapshot | None = None, device: Device = DEFAULT_DEVICE
    ) -> None:
        """`folder` holds the files; where that is a snapshot, the engine removes it when it needs it no more.

        A device of some cores opens, and every call runs, in a thread that is pinned to them.
        """
        self.manifest, self.device = manifest, device
        self._snapshot = snapshot
        self.spec: ModelSpec = manifest.model
        self.max_batch = manifest.batch_sizes[-1]
        backend = find_backend(manifest.backend)
        # Never on a CPU: each engine takes all of its cores.
        self.parallel_decode = manifest.machine.device == "cuda" and backend.parallel_decode_on_gpu
        texts = {tokenizer.name: (folder / tokenizer_file(tokenizer)).read_text("utf-8") for tokenizer in self.spec.tokenizers}
        self._tokenizer = PromptTokenizer(texts, self.spec.tokenizers)
        self.slots = SlotTable.model_validate_json((folder / SLOTS).read_bytes()) if manifest.lora_slots else None
        """What reads LoRA files for its slots, where it has any."""
        self._compile = _open_parts(folder, manifest, backend, device)
        self._compiled: dict[tuple[str, Size | None, int], CompiledPart] = {}
        self._size_axes = {part: _size_axes(record, self.spec.latent_factor) for part, record in manifest.parts.items()}

    @property
    def bucket_count(self) -> int:
        """How many buckets `measure_buckets` makes ready."""
        parts = self.manifest.parts.items()
        places = sum(len(self.spec.sizes_of(name)) if part.is_spatial else 1 for name, part in parts)
        return places * len(self.manifest.batch_sizes)

    def measure_buckets(self, on_ready: Callable[[], None] = lambda: None) -> tuple[BucketCost, ...]:
        """The milliseconds that every bucket takes, medians of a few runs; makes all of them ready, so that no request waits.

        `on_ready` is called after each bucket.
        """
        costs = []
        for part, spec in self.manifest.parts.items():
            for size in self.spec.sizes_of(part) if spec.is_spatial else (None,):
                runs = {batch: self._trial(part, size, batch, on_ready) for batch in self.manifest.batch_sizes}
                for batch, ms in usual_ms(runs).items():
                    costs.append(BucketCost(part=part, size=size, batch=batch, ms=round(ms, 4)))
        if self._snapshot:
            self._snapshot.remove()  # every bucket is compiled
        return tuple(costs)

    def _trial(self, part: str, size: Size | None, batch: int, on_ready: Callable[[], None]) -> Callable[[], object]:
        """A call of a bucket that is ready."""
        tensors = self.manifest.parts[part].inputs
        shapes = bucket_shapes(tensors, dimensions_of(self.spec, size, batch))
        inputs = {t.name: np.zeros(shapes[t.name], dtype=t.dtype) for t in tensors}
        if "times" in inputs:
            inputs["times"][:] = self.spec.sampler.times(1)[0]
        compiled = self._bucket(part, size, batch)
        on_ready()
        return lambda: compiled(inputs)

    def measure_costs(self, on_ready: Callable[[], None] = lambda: None) -> Costs:
        """`measure_buckets` by part and size, in milliseconds by batch size, as the scheduler reads it."""
        costs: Costs = {}
        for cost in self.measure_buckets(on_ready):
            costs.setdefault((cost.part, cost.size), {})[cost.batch] = cost.ms
        for size in self.spec.sizes:
            if tiling := decode_tiling(self.spec, size):
                for part in self.spec.parts_in(Phase.FINISH):
                    costs[part.name, size] = _cost_of_tiles(costs[part.name, tiling.tile], tiling)
        return costs

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Token ids [B, length] of every tokenizer; see `Components.tokenize`."""
        return self._tokenizer(prompts)

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """A part's outputs [B, ...], for inputs [B, ...] of up to `max_batch` rows, in the smallest bucket that holds them.

        BackendError when the library fails, OutOfMemoryError when it lacks memory.
        """
        rows = len(next(iter(inputs.values())))
        batch = next(batch for batch in self.manifest.batch_sizes if batch >= rows)
        size = None
        if axes := self._size_axes[part]:
            sides = inputs[axes.tensor].shape
            size = Size(sides[axes.width] * axes.factor, sides[axes.height] * axes.factor)
        run = self._bucket(part, size, batch)
        if rows == batch:
            return run(inputs)
        # Padding repeats the first row: any finite values do, since rows do not see each other.
        padded = {name: np.concatenate([values, *[values[:1]] * (batch - rows)]) for name, values in inputs.items()}
        return {name: values[:rows] for name, values in run(padded).items()}

    def _bucket(self, part: str, size: Size | None, batch: int) -> CompiledPart:
        """One part at one bucket, compiled when it is first asked for: one image needs few of them, not all."""
        key = (part, size, batch)
        if key not in self._compiled:
            self._compiled[key] = self._compile(part, size, batch)
        return self._compiled[key]


def _cost_of_tiles(by_batch: Mapping[int, float], tiling: Tiling) -> dict[int, float]:
    """What batches of images take, by their size, that are decoded in tiles, as `generate.decode_rows` does."""

    def call(tiles: int) -> float:
        return min(ms for batch, ms in by_batch.items() if batch >= tiles) if tiles else 0.0

    def cost(images: int) -> float:
        most = tiles_at_once(tiling, images, max(by_batch))
        full, rest = divmod(images * len(tiling.places), most)
        return full * call(most) + call(rest)

    return {images: cost(images) for images in by_batch}


def usual_ms(runs: Mapping[K, Callable[[], object]]) -> dict[K, float]:
    """The median milliseconds of each of these calls, made in turns: the scheduler compares batch sizes with each other, and
    whatever else the machine does meanwhile must not fall on one of them alone."""
    spent: dict[K, list[float]] = {batch: [] for batch in runs}
    for run in runs.values():
        run()  # the first call sets up
    for turn in range(_TIMED_RUNS):
        if turn >= 2 and sum(map(sum, spent.values())) > _TIMED_MS * len(runs):
            break
        for batch, run in runs.items():
            started = time.perf_counter()
            run()
            spent[batch].append(1000 * (time.perf_counter() - started))
    return {batch: statistics.median(times) for batch, times in spent.items()}


class _SizeAxes(NamedTuple):
    """Where a part's inputs show the image size: a tensor, its axes, and pixels per cell."""

    tensor: str
    width: int
    height: int
    factor: int


def _size_axes(part: PartRecord, latent_factor: int) -> _SizeAxes | None:
    """None for a part whose tensors do not depend on the size."""
    for tensor in part.inputs:
        for height, width, factor in (("image_height", "image_width", 1), ("height", "width", latent_factor)):
            if height in tensor.shape:
                return _SizeAxes(tensor.name, tensor.shape.index(width), tensor.shape.index(height), factor)
    return None


def _open_parts(
    folder: Path, manifest: Manifest, backend: Backend, device: Device
) -> Callable[[str, Size | None, int], CompiledPart]:
    """Makes a bundle's parts ready: one part, by name, at one size (None for a part that has none) and batch size a call.

    BundleError when they were made for another machine; BackendError for whatever goes wrong in the library, then or later.
    """
    backend.check_machine(manifest, device)
    backend.import_modules()
    try:
        compile_part = backend.open_parts(folder, manifest, device)
    except Exception as error:  # the libraries' errors share no public base class
        raise _library_error(f"{backend.name} could not open the bundle", error) from None

    def compile_named(part: str, size: Size | None, batch: int) -> CompiledPart:
        spec = manifest.parts[part]
        dimensions = dimensions_of(manifest.model, size, batch)
        try:
            compiled = compile_part(part, folder / spec.file_for(size, batch), dimensions)
        except Exception as error:
            raise _library_error(f"{backend.name} could not compile {part}", error) from None

        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
            try:
                return compiled(inputs)
            except Exception as error:
                raise _library_error(f"{backend.name} failed in {part}", error) from error

        return run

    return compile_named


def _library_error(what: str, error: Exception) -> BackendError:
    """What a library failed in, as OutOfMemoryError where it lacked memory."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return OutOfMemoryError(f"{what}: there is not enough memory for this now")
    return BackendError(f"{what}: {first_line(error)}")


def open_bundle(folder: Path) -> Engine:
    """Check a bundle and make it ready to run; BundleError, ModelError or BackendError say why it cannot be.

    It runs on the bytes that were checked, whatever becomes of the folder.
    """
    snapshot = Snapshot(folder)
    return Engine(snapshot.folder, snapshot.manifest, snapshot)
