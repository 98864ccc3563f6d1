"""Rows to images. A row is one image in progress; everybody who makes an image uses these pieces.

`generate` runs them for one request; the server's worker calls `encode_prompts`, `encode_images`, `start_rows`,
`denoise_rows` and `decode_rows` on whatever is ready, of any prompt, seed, time and number of steps.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from flashdiff import defaults
from flashdiff.components import Components, Conditioning, ModelSpec, Size
from flashdiff.errors import BackendError, RequestError
from flashdiff.noise import SEED_LIMIT, image_noise, image_seed
from flashdiff.prediction import guide, to_x0
from flashdiff.sampling import extrapolate, ode_step, ode_weights, renoise

MAX_COUNT = 16
"""Images per request."""

_EARLY_VALUES = 1 << 16
"""Latents of so many values get the noise of all their steps at once; drawing that of larger ones would hold everybody up."""

_CHARACTERS_PER_TOKEN = 64  # no word of a tokenizer is longer

Pixels = NDArray[np.uint8]
"""[H, W, 3] RGB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """What one request asks for, checked: see `check_order`."""

    prompt: str
    seed: int
    steps: int
    size: Size
    count: int = defaults.COUNT
    negative_prompt: str = ""
    """What guidance steers away from; empty: what the model was trained to contrast with."""
    image: Pixels | None = field(default=None, repr=False)
    """Of `size`: what the images start from, noised, in place of pure noise."""
    strength: float = 1.0
    """The share of the steps that an order with an image takes; the less, the more of the image stays (SDEdit, 2108.01073)."""

    @property
    def steps_taken(self) -> int:
        """The last of its steps, as many as its strength says, but at least one."""
        return max(1, int(self.strength * self.steps + 1e-4))  # a strength came as float32

    @property
    def texts(self) -> tuple[str, ...]:
        """What the text encoder has to read."""
        return (self.prompt, self.negative_prompt) if self.negative_prompt else (self.prompt,)


@dataclass
class Row:
    """One image in progress: it starts as noise and is done when `step` reaches the number of its times.

    What its steps need is made when it starts: right after a call of an engine, which has filled the processor's caches with
    its weights, it would take several times as long.
    """

    seed: int
    size: Size
    times: list[int]
    alphas: NDArray[np.float32]  # [len(times) + 1], the clean end last
    sigmas: NDArray[np.float32]
    extrapolations: list[np.float32]  # weights of `extrapolate` at each time, where the sampler is an ODE's
    noises: list[NDArray[np.float32]]  # [C, h, w], of the steps from 1 on, where it is not and they are small
    conditioning: Conditioning  # of this row alone, without the batch dimension
    unconditional: Conditioning | None  # the same for the negative or the empty prompt, where the sampler guides
    latents: NDArray[np.float32]  # [C, h, w]
    step: int = 0
    x0: NDArray[np.float32] | None = field(default=None, repr=False)
    """[C, h, w]: what the last step took the finished latents to be."""

    @property
    def is_done(self) -> bool:
        return self.step == len(self.times)

    @property
    def slots(self) -> int:
        """Network evaluations that one step of this row takes."""
        return 1 if self.unconditional is None else 2


def check_order(
    spec: ModelSpec,
    *,
    prompt: str,
    seed: int = defaults.SEED,
    steps: int | None = None,
    size: Size | None = None,
    count: int = defaults.COUNT,
    negative_prompt: str = "",
) -> Order:
    """An order this model can fill, defaults filled in; RequestError names the field, the value and what is allowed."""
    if not prompt.strip():
        raise RequestError("prompt", prompt, "it must not be empty")
    for field_name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if len(text) > _CHARACTERS_PER_TOKEN * spec.prompt_tokens:  # seen before a tokenizer spends time on it
            raise RequestError(field_name, text, f"{len(text)} characters are more than {spec.prompt_tokens} tokens can be")
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of bytes that are not UTF-8
            raise RequestError(field_name, text, "it must be valid Unicode text")
    if negative_prompt and spec.sampler.evaluations_per_step == 1:
        raise RequestError("negative_prompt", negative_prompt, "this model runs without guidance, it must be empty")
    if not 0 <= seed < SEED_LIMIT:
        raise RequestError("seed", seed, "it must be between 0 and 2^64 - 1")
    steps = spec.sampler.default_steps if steps is None else steps
    if not 1 <= steps <= spec.sampler.max_steps:
        raise RequestError("steps", steps, f"this model takes 1 to {spec.sampler.max_steps}")
    size = spec.sizes[0] if size is None else size
    if size not in spec.sizes:
        raise RequestError("size", str(size), f"this model was built for {', '.join(map(str, spec.sizes))}")
    if not 1 <= count <= MAX_COUNT:
        raise RequestError("count", count, f"it must be between 1 and {MAX_COUNT}")
    return Order(prompt=prompt, seed=seed, steps=steps, size=size, count=count, negative_prompt=negative_prompt)


def start_from(order: Order, image: Pixels, strength: float | None = None) -> Order:
    """The order with an image to start from, image-to-image; RequestError when one of the two does not fit."""
    strength = float(np.float32(defaults.STRENGTH if strength is None else strength))  # as on the wire
    if not 0 < strength <= 1:
        raise RequestError("strength", strength, "it must be above 0 and at most 1")
    height, width, _ = image.shape
    if (width, height) != order.size:
        raise RequestError("image", f"{width}x{height}", f"it must have the size of the result, {order.size}")
    return replace(order, image=image, strength=strength)


def encode_prompts(components: Components, prompts: Sequence[str]) -> list[Conditioning]:
    """One conditioning a prompt, without the batch dimension; at most `max_batch` prompts."""
    batch = components.encode(prompts)
    return [{name: values[index] for name, values in batch.items()} for index in range(len(prompts))]


def encode_images(components: Components, images: Sequence[Pixels]) -> list[NDArray[np.float32]]:
    """The latents [C, h, w] of each image; at most `max_batch` images of one size."""
    batch = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    latents = components.encode_images(np.ascontiguousarray(batch))
    if not np.isfinite(latents).all():
        raise BackendError("the encoder returned values that are not finite")
    return list(latents)


def unconditional_of(components: Components) -> Conditioning | None:
    """What guided rows contrast with, or None where the model's sampler does not guide."""
    if components.spec.sampler.evaluations_per_step == 1:
        return None
    empty = encode_prompts(components, [""])[0]
    if components.spec.unconditional == "zeros":
        return {name: np.zeros_like(values) for name, values in empty.items()}
    return empty


def draw_noise(spec: ModelSpec, order: Order) -> list[list[NDArray[np.float32]]]:
    """Of each image of the order, the noise [C, h, w] of its first time and, where it is small and later steps add some, theirs.

    It asks for no text: a server draws it while the device reads that.
    """
    return [_noise_of(spec, order, index) for index in range(order.count)]


def _noise_of(spec: ModelSpec, order: Order, index: int) -> list[NDArray[np.float32]]:
    seed, shape = image_seed(order.seed, index), spec.latent_shape(order.size)
    are_early = spec.sampler.kind != "ode" and math.prod(shape) <= _EARLY_VALUES
    return [image_noise(seed, step, shape) for step in range(order.steps_taken if are_early else 1)]


def new_row(
    spec: ModelSpec,
    order: Order,
    index: int,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    start: NDArray[np.float32] | None = None,
    noise: Sequence[NDArray[np.float32]] = (),
) -> Row:
    """Image `index` of the order: pure noise, or the latents `start` of its image with the noise of the first time it takes.

    `noise` is what `draw_noise` says of it, where that was asked before.
    """
    times = spec.sampler.times(order.steps)[-order.steps_taken :]
    alphas, sigmas = (levels.astype(np.float32) for levels in spec.sampler.schedule.levels([*times, -1]))
    is_ode = spec.sampler.kind == "ode"
    latents, *later = noise or _noise_of(spec, order, index)
    return Row(
        seed=image_seed(order.seed, index),
        size=order.size,
        times=times,
        alphas=alphas,
        sigmas=sigmas,
        extrapolations=[np.float32(weight) for weight in ode_weights(spec.sampler.schedule, times)] if is_ode else [],
        noises=later,
        conditioning=conditioning,
        unconditional=unconditional,
        latents=latents if start is None else renoise(start, latents, alphas[0], sigmas[0]),
    )


def start_rows(
    spec: ModelSpec,
    order: Order,
    encoded: Mapping[str, Conditioning],
    unconditional: Conditioning | None,
    start: NDArray[np.float32] | None = None,
    noise: Sequence[Sequence[NDArray[np.float32]]] = (),
) -> list[Row]:
    """All images of the order; `encoded` holds its texts, `unconditional` is `unconditional_of` the model, `start` the latents
    of the order's image where it has one, `noise` that of `draw_noise` where it is drawn already."""
    contrast = encoded[order.negative_prompt] if order.negative_prompt else unconditional
    return [
        new_row(spec, order, index, encoded[order.prompt], contrast, start, noise[index] if noise else ())
        for index in range(order.count)
    ]


def denoise_rows(components: Components, rows: Sequence[Row]) -> None:
    """Take every row one step further; an error changes none. The rows share a size, their slots fit in one batch."""
    # Guided rows stand in the batch twice: the prompt's copies first, then the unconditional ones.
    guided = [row for row in rows if row.unconditional is not None]
    entries = [*((row, row.conditioning) for row in rows), *((row, row.unconditional or {}) for row in guided)]
    output = components.denoise(
        _stacked([row.latents for row, _ in entries]),
        np.array([row.times[row.step] for row, _ in entries], dtype=np.int64),
        {name: _stacked([conditioning[name] for _, conditioning in entries]) for name in rows[0].conditioning},
    )
    contrast = iter(output[len(rows) :])
    guidance = components.spec.sampler.guidance
    outputs = [
        output[index] if row.unconditional is None else guide(output[index], next(contrast), guidance)
        for index, row in enumerate(rows)
    ]
    for row, values in zip(rows, outputs, strict=True):
        if not np.isfinite(values).all():
            raise BackendError(f"the network returned values that are not finite at time {row.times[row.step]} (seed {row.seed})")
    for row, values in zip(rows, outputs, strict=True):
        _advance(components.spec, row, values)


def _stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """`np.stack`, which costs a single row more than the rest of its step."""
    return np.stack(rows) if len(rows) > 1 else rows[0][None]


def _advance(spec: ModelSpec, row: Row, output: NDArray[np.float32]) -> None:
    """One sampler step of one row, alone, so that no other row of the batch can touch its arithmetic."""
    step, previous_x0 = row.step, row.x0
    alpha, sigma, next_alpha, next_sigma = row.alphas[step], row.sigmas[step], row.alphas[step + 1], row.sigmas[step + 1]
    x0 = to_x0(spec.prediction, output, row.latents, alpha, sigma)
    row.x0 = x0

    row.step += 1
    if spec.sampler.kind == "ode":
        estimate = x0 if previous_x0 is None else extrapolate(x0, previous_x0, row.extrapolations[step])
        row.latents = ode_step(row.latents, estimate, alpha, sigma, next_alpha, next_sigma)
    elif row.is_done:
        row.latents = x0
    else:
        noise = row.noises[step] if row.noises else image_noise(row.seed, row.step, x0.shape)
        row.latents = renoise(x0, noise, next_alpha, next_sigma)


def decode_rows(components: Components, rows: Sequence[Row]) -> list[Pixels]:
    """The images of finished rows of one size; at most `max_batch` rows."""
    return to_pixels(components.decode(_stacked([row.latents for row in rows])))


def to_pixels(images: NDArray[np.float32]) -> list[Pixels]:
    """[B, 3, H, W] in [-1, 1] as RGB bytes; BackendError when a value is not finite, never a black image."""
    if not np.isfinite(images).all():
        raise BackendError("the decoder returned values that are not finite")
    levels = images * np.float32(127.5)
    levels += np.float32(127.5)  # in place, as what follows: large images cost their memory once
    np.clip(levels, 0, 255, out=levels)
    np.rint(levels, out=levels)
    return [np.ascontiguousarray(image) for image in levels.astype(np.uint8).transpose(0, 2, 3, 1)]


def generate(components: Components, orders: Sequence[Order], on_step: Callable[[], None] | None = None) -> list[list[Pixels]]:
    """The images of each order, in order; `on_step` is called after each network call."""
    return [[image for _, image in of_order] for of_order in generate_rows(components, orders, on_step)]


def generate_rows(
    components: Components, orders: Sequence[Order], on_step: Callable[[], None] | None = None
) -> list[list[tuple[Row, Pixels]]]:
    """`generate`, with the finished row beside each image: its latents are what the decoder was given."""
    unconditional = unconditional_of(components)
    texts = list(dict.fromkeys(text for order in orders for text in order.texts))
    encoded: dict[str, Conditioning] = {}
    for some in _chunks(texts, components.max_batch):
        encoded |= zip(some, encode_prompts(components, some), strict=True)
    starts = [None if order.image is None else encode_images(components, [order.image])[0] for order in orders]
    rows = [
        start_rows(components.spec, order, encoded, unconditional, start) for order, start in zip(orders, starts, strict=True)
    ]
    pending = [row for of_order in rows for row in of_order]
    images: dict[int, Pixels] = {}
    while pending:
        size, slots = pending[0].size, pending[0].slots
        chunk = [row for row in pending if row.size == size][: components.max_batch // slots]
        while active := [row for row in chunk if not row.is_done]:
            denoise_rows(components, active)
            if on_step:
                on_step()
        images |= {id(row): image for row, image in zip(chunk, decode_rows(components, chunk), strict=True)}
        pending = [row for row in pending if id(row) not in images]
    return [[(row, images[id(row)]) for row in of_order] for of_order in rows]


def _chunks(items: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]
