"""Sets of images with what is known of each: made by a model, drawn by the renderer, or read from a folder or a tar file."""

import contextlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from flashdiff.datasets import (
    CAPTIONS,
    METADATA,
    SUFFIXES,
    caption_of,
    image_of,
    metadata_rows,
    packed_in,
    shard_samples,
    value_at,
    visible,
)
from flashdiff.errors import EvaluationError, first_line
from flashdiff.files import write_whole
from flashdiff.orders import Pixels
from flashdiff.pictures import read_rgb
from flashdiff.reading import MAX_BYTES, lines_of, read_file, read_text

DAMAGED_IMAGE = (Exception,)
"""What pillow raises for damaged files: errors of many kinds, some from within its decoders."""
DAMAGED_SHARD = (OSError, EOFError, ValueError, OverflowError, MemoryError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""And tarfile, of a compressed one too."""

WORLD = "avatars"
"""The renderer's name among prompt sets and reference sets."""
WORLD_SIZE = 64
"""Side of its pictures in pixels, by default."""
HELD_OUT = "avatars-held-out"
REAL = "real"
"""The name of the images that no model made."""

_PROMPT_SEED = 30_000_000  # beyond the seeds of every training
_REAL_SEED = 40_000_000


@dataclass(frozen=True)
class Prompt:
    """A prompt; one of the embedded world has the scene (kind, seed) that it describes."""

    text: str
    scene: tuple[str, int] | None = None
    background: str | None = None
    """Of the scene, where it is not its own."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, [N, H, W, 3], and of each its prompt where there is one."""

    name: str
    pixels: NDArray[np.uint8]
    prompts: tuple[Prompt | None, ...]
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, indices: NDArray[np.int64], name: str) -> "ImageSet":
        """The images and prompts at `indices` [n], under a new name; without seeds."""
        return ImageSet(name, self.pixels[indices], tuple(self.prompts[index] for index in indices))

    @property
    def groups(self) -> NDArray[np.int64]:
        """A number [N] for each image, the same for images of one prompt; images without a prompt have numbers of their own."""
        keys: list[object] = [prompt if prompt else index for index, prompt in enumerate(self.prompts)]
        number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return np.array([number[key] for key in keys])


# --- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(source: str, count: int, seed: int = _PROMPT_SEED) -> list[Prompt]:
    """`count` prompts of the embedded world by name, its scenes from `seed` on, or the first `count` lines of a text file."""
    if source in (WORLD, HELD_OUT):
        return _world_prompts(count, seed, held_out=source == HELD_OUT)
    try:
        lines = lines_of(read_text(Path(source)))
    except (OSError, ValueError):
        raise EvaluationError(f"--prompts {source}: neither '{WORLD}', '{HELD_OUT}' nor a readable text file") from None
    prompts = [Prompt(line) for line in dict.fromkeys(lines) if line][:count]
    if not prompts:
        raise EvaluationError(f"--prompts {source}: the file holds no prompt")
    return prompts


def _world_prompts(count: int, seed: int, *, held_out: bool) -> list[Prompt]:
    """Full captions of scenes that training has not seen; with `held_out`, of combinations it has never seen."""
    from flashdiff.zoo.world import KINDS, describe, full_caption

    kinds = tuple(KINDS)  # each has a held-out combination
    found: list[Prompt] = []
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        scene = describe(kind, seed)
        if scene.is_held_out == held_out:
            found.append(Prompt(full_caption(scene), (kind, seed)))
        seed += 1
    return found


def real_images(prompts: Sequence[Prompt], seeds: int, size: int) -> ImageSet:
    """The images that the renderer draws for prompts of the embedded world: what they say as they say it, the rest at random.

    A figure on another background than its own is kept whole.
    """
    from flashdiff.zoo.world import render

    wanted = [(index, prompt) for index, prompt in enumerate(prompts) for _ in range(seeds)]
    pixels = []
    for number, (_, prompt) in enumerate(wanted):
        assert prompt.scene
        kind, seed = prompt.scene
        pixels.append(render(kind, _REAL_SEED + number, size, like=seed, background=prompt.background)[0])
    return ImageSet(REAL, np.stack(pixels), tuple(prompt for _, prompt in wanted))


def attributes_of(prompt: Prompt) -> dict[str, str]:
    """The attributes that a prompt of the embedded world names; empty for any other prompt."""
    if prompt.scene is None:
        return {}
    from flashdiff.zoo.world import describe

    return describe(*prompt.scene, prompt.background).attributes


# --- reading and writing ---------------------------------------------------------------------------------------------


def read_reference(source: str, count: int, size: int) -> ImageSet:
    """The reference set: training renders of the embedded world, a folder of images, or webdataset shards (.tar)."""
    if source == WORLD:
        return _world_reference(count, size)
    return read_images(Path(source), count)


def _world_reference(count: int, size: int) -> ImageSet:
    from flashdiff.zoo.images import render_cache, rendered
    from flashdiff.zoo.world import KINDS

    pixels, _ = rendered(render_cache(), tuple(KINDS), 0, count, size)
    return ImageSet(WORLD, pixels, (None,) * len(pixels))


def read_images(source: Path, count: int | None = None) -> ImageSet:
    """Images and captions of a folder or of webdataset shards, at most `count`, evenly spaced over all in order of their names.

    A folder has its captions in metadata files (`file_name`, `text`; as `datasets` reads them) or in .txt files; a shard in
    .txt or .json members. EvaluationError when there is no image, one cannot be read, or sizes are mixed.
    """
    if packed := packed_in(source):
        raise EvaluationError(f"{source}: {packed.name} is compressed; unpack it, shards are read as .tar")
    if source.is_file() and source.suffix == ".tar":
        shards = [source]
    elif source.is_dir():
        shards = sorted(path for path in source.glob("*.tar") if not path.name.startswith("."))
    else:
        raise EvaluationError(f"{source}: give a folder of images or webdataset shards (.tar)")

    def entries() -> Iterator[_Found]:
        return (entry for shard in shards for entry in _read_shard(shard)) if shards else _read_folder(source)

    wanted = None
    if count is not None and (total := sum(1 for _ in entries())) > count:
        wanted = set(np.linspace(0, total - 1, count).astype(int))
    pixels: list[Pixels] = []
    names: list[str] = []
    prompts, seeds = [], []
    for number, (name, read, prompt, seed) in enumerate(entries()):
        if wanted is not None and number not in wanted:
            continue
        try:
            image = np.asarray(read_rgb(read()))
        except DAMAGED_IMAGE:
            raise EvaluationError(f"{source}: {name} is not a readable image") from None
        if pixels and image.shape != pixels[0].shape:
            (h, w), (h0, w0) = image.shape[:2], pixels[0].shape[:2]
            raise EvaluationError(
                f"{source}: mixed sizes, {names[0]} is {w0}x{h0} and {name} is {w}x{h}; resize them to one size"
            )
        pixels.append(image)
        names.append(name)
        prompts.append(prompt)
        seeds.append(seed)
    if not pixels:
        raise EvaluationError(f"{source}: no images ({', '.join(sorted(SUFFIXES))})")
    return ImageSet(source.resolve().name, np.stack(pixels), tuple(prompts), tuple(seeds))


_Found = tuple[str, Callable[[], bytes], Prompt | None, int]
"""An image's name, its file, its prompt and its seed."""


def _read_folder(folder: Path) -> Iterator[_Found]:
    known = read_metadata(folder)
    for path in visible(folder, *SUFFIXES):
        name = path.relative_to(folder).as_posix()
        prompt, seed = known.get(name, (None, 0))
        text = path.with_suffix(".txt")
        if prompt is None and text.is_file():
            prompt = Prompt(_text(read_file(text, MAX_BYTES), text.name))
        yield name, partial(read_file, path), prompt, seed


def _known_background(word: str) -> str:
    from flashdiff.zoo.world import BACKGROUND_COLORS

    if word not in BACKGROUND_COLORS:
        raise ValueError(f"a background is one of {', '.join(BACKGROUND_COLORS)}")
    return word


def _known_kind(scene: tuple[str, int]) -> tuple[str, int]:
    from flashdiff.zoo.world import KINDS

    if scene[0] not in KINDS or not 0 <= scene[1] < 2**62:
        raise ValueError(f"a scene is one of {', '.join(KINDS)} and a seed")
    return scene


class _Entry(BaseModel):
    """A line of metadata.jsonl; other keys are ignored."""

    file_name: str
    text: Annotated[str, Field(min_length=1)] | None = None
    seed: int = Field(0, ge=0, lt=2**64)
    scene: Annotated[tuple[str, int], AfterValidator(_known_kind)] | None = None
    background: Annotated[str, AfterValidator(_known_background)] | None = None


def read_metadata(folder: Path, caption: str | None = None) -> dict[str, tuple[Prompt | None, int]]:
    """Prompt and seed by file name, from the metadata files of a folder and those below; empty where there are none.

    `caption` is the column of the prompts, else a usual one. EvaluationError names the row that cannot be read.
    """
    known: dict[str, tuple[Prompt | None, int]] = {}
    try:
        for row in metadata_rows(folder):
            column = caption or next((name for name in CAPTIONS if name in row.values), "text")
            values = {name: value for name, value in row.values.items() if name in ("file_name", "seed", "scene", "background")}
            with contextlib.suppress(KeyError):
                values["text"] = value_at(row.values, column)
            try:
                entry = _Entry.model_validate(values)
            except ValidationError as error:
                problem = error.errors()[0]
                field = ".".join(map(str, problem["loc"])) or "the line"
                raise EvaluationError(f"{row.where}: {column if field == 'text' else field}: {problem['msg']}") from None
            # Windows writes other slashes, and `find .` a "./" in front.
            name = row.folder + PurePosixPath(entry.file_name.replace("\\", "/")).as_posix()
            if name in known:
                raise EvaluationError(f"{row.where}: {name} has a row already; keep one of them")
            known[name] = (None if entry.text is None else Prompt(entry.text, entry.scene, entry.background), entry.seed)
    except (OSError, ValueError) as error:
        raise EvaluationError(first_line(error)) from None
    return known


def _read_shard(path: Path) -> Iterator[_Found]:
    try:
        for members in shard_samples(path):
            yield from _sample(members, path.name)
    except DAMAGED_SHARD as error:
        raise EvaluationError(f"{path}: not a readable tar file ({first_line(error)})") from None


def _sample(members: dict[str, bytes], shard: str) -> Iterator[_Found]:
    try:
        if (name := image_of(members)) is None:
            return  # not an image: an index, a set of features
        text = caption_of(members)
    except ValueError as error:
        raise EvaluationError(f"{shard}/{next(iter(members))}: {error}") from None
    prompt = None if text is None else Prompt(_text(text, name))
    yield f"{shard}/{name}", partial(bytes, members[name]), prompt, 0


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise EvaluationError(f"{name} is not UTF-8 text") from None


def write_images(images: ImageSet, folder: Path) -> None:
    """PNG files and metadata.jsonl: `read_images` gives the same set back."""
    folder.mkdir(parents=True)
    lines = []
    for index, (pixels, prompt) in enumerate(zip(images.pixels, images.prompts, strict=True)):
        name = f"{index:05}.png"
        Image.fromarray(pixels).save(folder / name)
        entry: dict[str, Any] = {"file_name": name}
        if prompt:
            entry |= {"text": prompt.text} | ({"scene": list(prompt.scene)} if prompt.scene else {})
            entry |= {"background": prompt.background} if prompt.background else {}
        if images.seeds:
            entry["seed"] = images.seeds[index]
        lines.append(json.dumps(entry))
    write_whole(folder / METADATA[0], "\n".join(lines) + "\n")


def sheet(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], columns: int = 8, gap: int = 2) -> Image.Image:
    """Images [H, W, 3] of one size side by side, `columns` a line, `gap` pixels apart, on white."""
    height, width = images[0].shape[:2]
    lines = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), "white")
    for index, pixels in enumerate(images):
        page.paste(Image.fromarray(pixels), ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return page
