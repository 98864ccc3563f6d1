"""What LoRA slots cost: a plain row with them and without, and a row that uses them.

python -m benchmarks.lora_slots PLAIN SLOTS    (two bundles of one model, without slots and with)
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.engines.shapes import bucket_shapes, dimensions_of

_ROUNDS = 60


def main() -> None:
    """Print the medians, and the ratios of calls made in turns, at every batch size that both bundles have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path, help="a bundle without slots")
    parser.add_argument("slots", type=Path, help="a bundle of the same model with slots")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    options = parser.parse_args()
    plain, slots = open_bundle(options.plain), open_bundle(options.slots)
    values = next(condition.values for condition in slots.spec.conditions if condition.values)
    print(f"{slots.manifest.lora_slots} slot(s) of rank {slots.manifest.lora_rank}, {values} values each")
    for batch in sorted({*plain.manifest.batch_sizes} & {*slots.manifest.batch_sizes}):
        calls = [_call(plain, "denoiser", batch), _call(slots, "denoiser", batch), _call(slots, "denoiser_lora", batch)]
        usual, same, used = _ratios(calls, options.rounds)
        print(f"batch {batch}: {usual:.2f} ms without slots; plain row with slots x {same:.3f}; row with a LoRA x {used:.2f}")


def _call(engine: Engine, part: str, batch: int) -> Callable[[], object]:
    inputs = _inputs(engine.manifest.parts[part].inputs, engine.spec, batch)
    return lambda: engine.call(part, inputs)


def _inputs(tensors: Any, spec: ModelSpec, batch: int) -> Mapping[str, NDArray[Any]]:
    """Normal values, small ones for what is added to weights; a time that the model knows."""
    rng, shapes = np.random.default_rng(0), bucket_shapes(tensors, dimensions_of(spec, spec.sizes[0], batch))
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        if tensor.name == "times":
            inputs[tensor.name] = np.full(shapes[tensor.name], spec.sampler.times(1)[0], dtype=tensor.dtype)
        else:
            scale = 0.02 if tensor.name.startswith("lora_") else 1.0
            inputs[tensor.name] = (scale * rng.standard_normal(shapes[tensor.name])).astype(tensor.dtype)
    return inputs


def _ratios(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median milliseconds of the first call; of each other the median of its ratio to the first, round by round."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for index in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            started = time.perf_counter()
            calls[index]()
            if turn > 1:
                spent[index].append(1000 * (time.perf_counter() - started))
    first, *others = spent
    ratios = [statistics.median(ms / usual for ms, usual in zip(other, first, strict=True)) for other in others]
    return [statistics.median(first), *ratios]


if __name__ == "__main__":
    main()
