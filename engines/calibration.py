"""Calibration prompts: which they are, and what a model makes of them - the denoiser's inputs on the way, and the images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components, ModelSpec
from flashdiff.engines.bundle import Calibration
from flashdiff.errors import BundleError, RequestError
from flashdiff.evaluation.images import WORLD, Prompt, read_prompts
from flashdiff.generate import generate
from flashdiff.orders import Order, Pixels
from flashdiff.reading import lines_of, read_file
from flashdiff.tasks import check_order

MAX_PROMPTS = 256
_MAX_BYTES = 4 << 20  # of the file: far more than so many prompts have
CALIBRATING = 32
"""How many of the prompts calibrate; the images of all of them measure the quality."""
_WORLD_PROMPTS, _WORLD_SEED = 128, 50_000_000  # other prompts than those of `flashdiff evaluate`

Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a model in float32 makes of the calibration prompts."""

    prompts: tuple[Prompt, ...]
    steps: int
    rows: tuple[Inputs, ...]
    """The denoiser's inputs [1, ...] in every step of the first images."""
    images: tuple[Pixels, ...]
    """One of every prompt."""


def find_prompts(file: Path | None, *, is_world: bool) -> tuple[Calibration, tuple[Prompt, ...]]:
    """The prompts of a text file, or the embedded world's where `is_world` says that the base is its model.

    BundleError for a file that cannot be used, and where one is needed.
    """
    if file is not None:
        prompts = _read(file)
    elif is_world:
        prompts = tuple(read_prompts(WORLD, _WORLD_PROMPTS, _WORLD_SEED))
    else:
        raise BundleError(
            "--precision int8, fp8 and auto need --calibration-prompts FILE for this base: a text file with a prompt a line, "
            "like those that will be served"
        )
    texts = [prompt.text for prompt in prompts]
    prompts_hash = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Calibration(source=file.name if file else WORLD, prompts=len(texts), prompts_hash=prompts_hash), prompts


def _read(file: Path) -> tuple[Prompt, ...]:
    option = f"--calibration-prompts {file}"
    try:
        lines = lines_of(read_file(file, _MAX_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BundleError(f"{option}: not UTF-8 text; give a text file with a prompt a line") from None
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise BundleError(f"{option}: {reason}; give a text file with a prompt a line") from None
    prompts = tuple(Prompt(line) for line in dict.fromkeys(lines) if line)
    if not prompts:
        raise BundleError(f"{option}: the file holds no prompt; give one a line")
    if len(prompts) > MAX_PROMPTS:
        raise BundleError(f"{option}: the file holds {len(prompts)} prompts; give at most {MAX_PROMPTS}")
    return prompts


def check_tokens(components: Components, prompts: Sequence[Prompt]) -> None:
    """BundleError for a prompt of more tokens than the model takes."""
    for prompt in prompts:
        try:
            components.tokenize([prompt.text])
        except RequestError as error:
            allowed = error.allowed.replace("truncate_prompt cuts it", "shorten it in the file")
            raise BundleError(f"--calibration-prompts: '{prompt.text}': {allowed}") from None


def sample(components: Components, prompts: Sequence[Prompt]) -> Samples:
    """An image of each prompt, whose tokens fit, and the denoiser's inputs on the way to the first ones."""
    recorder = Recorder(components, components.spec.denoisers[0].name)
    orders = orders_of(components.spec, prompts)
    first = generate(recorder, orders[:CALIBRATING])
    rest = generate(components, orders[CALIBRATING:])
    images = tuple(image for of_order in (*first, *rest) for image in of_order)
    return Samples(prompts=tuple(prompts), steps=orders[0].steps, rows=tuple(recorder.rows), images=images)


def orders_of(spec: ModelSpec, prompts: Sequence[Prompt]) -> list[Order]:
    """An image of each prompt at the first size, in up to four steps, each from a seed of its own.

    BundleError for a prompt that the model refuses whatever its tokens.
    """
    steps = min(4, spec.sampler.max_steps)
    try:
        return [
            check_order(spec, prompt=prompt.text, seed=seed, steps=steps, size=spec.sizes[0])
            for seed, prompt in enumerate(prompts)
        ]
    except RequestError as error:
        raise BundleError(f"--calibration-prompts: {error}") from None


class Recorder:
    """`Components` that keep the inputs of one of their parts."""

    def __init__(self, components: Components, part: str) -> None:
        self.spec, self.max_batch, self.parallel_decode = components.spec, components.max_batch, components.parallel_decode
        self.rows: list[Inputs] = []
        self._components, self._part = components, part

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """As the components do."""
        return self._components.tokenize(prompts)

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """As the components do."""
        if part == self._part:
            count = len(next(iter(inputs.values())))
            self.rows += [{name: values[row : row + 1].copy() for name, values in inputs.items()} for row in range(count)]
        return self._components.call(part, inputs)
