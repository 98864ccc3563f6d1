"""Orders to images, with the pieces that a server calls one by one: prepare, step, finish."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components, Size, Tensors
from flashdiff.errors import BackendError
from flashdiff.orders import Order, Pixels, Preparation
from flashdiff.parts import Phase
from flashdiff.rows import Row, denoise_rows, stacked, start_rows
from flashdiff.tiles import decode_tiling, tiles_at_once


def prepare(components: Components, part: str, values: Sequence[str] | Sequence[NDArray[Any]]) -> list[Tensors]:
    """A part's outputs for each text, or for each image [H, W, 3] of one size; at most `max_batch` of them.

    RequestError for a text that is too long, BackendError for outputs that are not finite.
    """
    if isinstance(values[0], str):
        texts = [value for value in values if isinstance(value, str)]
        inputs: dict[str, NDArray[np.int64]] | dict[str, NDArray[np.float32]] = components.tokenize(texts)
    else:
        (name,) = components.spec.part(part).inputs
        batch = np.stack(values).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        inputs = {name: np.ascontiguousarray(batch)}
    outputs = components.call(part, inputs)
    for output in outputs.values():
        if not np.isfinite(output).all():
            raise BackendError(f"the {part} returned values that are not finite")
    return [{name: output[index] for name, output in outputs.items()} for index in range(len(values))]


def unconditional_of(components: Components) -> Tensors | None:
    """The text conditions that guidance contrasts prompts with, of one row and without B: [T, D] and the like, by name.

    None where the model's sampler does not guide.
    """
    spec = components.spec
    if spec.sampler.evaluations_per_step == 1:
        return None
    zeros = {condition.name for condition in spec.conditions if condition.unconditional == "zeros"}
    empty = prepare(components, spec.text_part.name, [""])[0]
    return {name: np.zeros_like(values) if name in zeros else values for name, values in empty.items()}


def decode_rows(components: Components, rows: Sequence[Row]) -> NDArray[np.float32]:
    """Images [B, 3, H, W] in [-1, 1] (not clipped) of finished rows of one size; at most `max_batch` rows.

    Where the model decodes in tiles, these are cut from the latents, and the results are blended.
    """
    tiling = decode_tiling(components.spec, rows[0].size)
    if tiling is None:
        return decode_latents(components, [row.latents for row in rows])
    latents = [tile for row in rows for tile in tiling.cut_latents(row.latents)]
    most = tiles_at_once(tiling, len(rows), components.max_batch)
    chunks = [latents[start : start + most] for start in range(0, len(latents), most)]
    tiles = [tile for chunk in chunks for tile in decode_latents(components, chunk)]
    count = len(tiling.places)
    return np.stack([tiling.blend(tiles[start : start + count], first_axis=1) for start in range(0, len(tiles), count)])


def decode_latents(components: Components, latents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Images [B, 3, H, W] in [-1, 1] (not clipped) of latents [C, h, w] of one size; at most `max_batch` of them."""
    values = {"latents": stacked(latents)}
    for part in components.spec.parts_in(Phase.FINISH):
        values |= components.call(part.name, {name: values[name] for name in part.inputs})
    return values["images"]


def finish_rows(components: Components, rows: Sequence[Row]) -> list[Pixels]:
    """The same as RGB bytes [H, W, 3]."""
    return to_pixels(decode_rows(components, rows))


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
    """The images [H, W, 3] of each order, in order; `on_step` is called after each step of a batch. Errors as in `prepare`."""
    made = generate_rows(components, orders, on_step)
    return [order.task.whole_images(order, [image for _, image in rows]) for order, rows in zip(orders, made, strict=True)]


def generate_rows(
    components: Components, orders: Sequence[Order], on_step: Callable[[], None] | None = None
) -> list[list[tuple[Row, Pixels]]]:
    """Each row of the orders, finished, with its image: its latents [C, h, w] are what the decoder was given."""
    unconditional = unconditional_of(components)
    texts: dict[tuple[str, str], Tensors] = {}
    wanted = [order.task.preparations(components.spec, order) for order in orders]
    for part, texts_of_part in _texts_by_part(wanted).items():
        for some in _chunks(texts_of_part, components.max_batch):
            texts |= zip(((part, text) for text in some), prepare(components, part, some), strict=True)
    rows = []
    for order, preparations in zip(orders, wanted, strict=True):
        prepared = {
            name: texts[given.part, given.value]
            if isinstance(given.value, str)
            else prepare(components, given.part, [given.value])[0]
            for name, given in preparations.items()
        }
        rows.append(start_rows(components.spec, order, prepared, unconditional))
    images = _finished(components, [row for of_order in rows for row in of_order], on_step)
    return [
        [(row, order.task.finish(order, images[id(row)])) for row in of_order]
        for order, of_order in zip(orders, rows, strict=True)
    ]


def _texts_by_part(wanted: Sequence[dict[str, Preparation]]) -> dict[str, list[str]]:
    """Each text once, by the part that reads it."""
    texts: dict[str, dict[str, None]] = {}
    for preparations in wanted:
        for given in preparations.values():
            if isinstance(given.value, str):
                texts.setdefault(given.part, {})[given.value] = None
    return {part: list(of_part) for part, of_part in texts.items()}


def _finished(components: Components, rows: Sequence[Row], on_step: Callable[[], None] | None) -> dict[int, Pixels]:
    """The decoded images of the rows, by the rows' ids."""
    pending, images = list(rows), dict[int, Pixels]()
    while pending:
        alike = _alike(pending[0])
        chunk = [row for row in pending if _alike(row) == alike][: components.max_batch // pending[0].slots]
        while active := [row for row in chunk if not row.is_done]:
            denoise_rows(components, active)
            if on_step:
                on_step()
        images |= {id(row): image for row, image in zip(chunk, finish_rows(components, chunk), strict=True)}
        pending = [row for row in pending if id(row) not in images]
    return images


def _alike(row: Row) -> tuple[Size, int, str | None]:
    """Equal for rows whose steps can share a call."""
    return row.size, row.slots, row.replacing


def _chunks(items: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]
