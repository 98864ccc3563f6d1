"""Where training images and captions come from: renders, folders, webdataset shards, tables, lists of prompts."""

import logging
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flashdiff.components import Size
from flashdiff.datasets import METADATA, SUFFIXES, caption_of, image_of, packed_in, shard_samples, visible
from flashdiff.distill import processes
from flashdiff.distill.config import DataRecipe
from flashdiff.distill.remote import SHARDS, fetched, is_remote, remote_shards
from flashdiff.distill.tables import Columns, saved_files, table_rows
from flashdiff.errors import EvaluationError, TrainingError, first_line
from flashdiff.evaluation.images import DAMAGED_SHARD, WORLD, read_metadata
from flashdiff.pictures import Background, read_rgb, size_of
from flashdiff.reading import lines_of, open_file, read_file, read_text

_log = logging.getLogger(__name__)

DAMAGE_LIMIT = 0.05
"""A run stops when more than this share of the samples, or of the files that hold several, cannot be used."""


@dataclass(frozen=True)
class Sample:
    """An image with its caption, or a prompt alone."""

    where: str
    """The file, and the row or member in it, for messages."""
    caption: str
    image: bytes | NDArray[np.uint8] | None  # an image file, or pixels [H, W, 3]
    further: Mapping[str, bytes] = field(default_factory=dict)
    """Image files that go with it, by what they are."""


class Damage:
    """Counts what was read and what had to be skipped: a few damaged samples are skipped, many stop the run."""

    def __init__(self, source: str) -> None:
        self.source, self.skipped, self._read, self._first = source, Counter[str](), Counter[str](), dict[str, str]()

    def count(self, kind: str) -> None:
        """Count one more of `kind` ("samples", "files"), damaged or not."""
        self._read[kind] += 1

    def skip(self, kind: str, why: str) -> None:
        """Count one of them as unusable; the first of each kind is logged."""
        if not self.skipped[kind]:
            _log.warning("skipped: %s", why)
        self._first.setdefault(kind, why)
        self.skipped[kind] += 1

    def check(self) -> None:
        """TrainingError when too much was skipped; the message names the first of it."""
        for kind, skipped in self.skipped.items():
            if skipped > DAMAGE_LIMIT * self._read[kind]:
                raise TrainingError(
                    f"data.source '{self.source}': {skipped} of {self._read[kind]} {kind} cannot be used, more than "
                    f"{DAMAGE_LIMIT:.0%}; the first: {self._first[kind]}"
                )


def read_samples(recipe: DataRecipe, size: Size, seed: int, damage: Damage, further: Sequence[str] = ()) -> Iterator[Sample]:
    """Up to `recipe.images` samples in a fixed order; `damage` counts those that cannot be used. `size` is that of renders.

    Every sample has the images `further`. TrainingError when the source is of no known kind, or of one that has none of these.
    """
    called = {name: recipe.further_images.get(name, name) for name in further}
    source, columns = Path(recipe.source), Columns(image=recipe.image_column, caption=recipe.caption_column, further=called)
    if recipe.source == WORLD:
        if further:
            raise TrainingError(f"data.source '{WORLD}' has no {further[0]} images: give a folder, shards or a table with them")
        samples = _renders(recipe.images, size, seed)
    elif is_remote(recipe.source):
        samples = _files(remote_shards(recipe.source), columns, damage)
    elif packed := packed_in(source):
        raise TrainingError(f"data.source '{source}': {packed.name} is compressed; unpack it, shards are read as .tar")
    elif source.is_dir():
        saved = saved_files(source)
        files = [path for path in visible(source, *SHARDS) if path.name not in METADATA] if saved is None else saved
        if recipe.image_column and not files:
            raise TrainingError(f"data.image_column is for tables and shards, and '{source}' is a folder of images; leave it out")
        samples = _files(files, columns, damage) if files else _folder(source, columns, damage)
    elif source.is_file() and source.suffix in SHARDS:
        samples = _files([source], columns, damage)
    elif source.is_file() and source.suffix == ".txt":
        samples = _prompts(source)
    else:
        raise TrainingError(
            f"data.source '{source}' is neither '{WORLD}' nor a folder, a {', '.join(SHARDS)} file or address of one, "
            "or a .txt file of prompts"
        )
    for _, sample in zip(range(recipe.images), samples, strict=False):
        yield sample


def image_size(image: bytes | NDArray[np.uint8]) -> tuple[int, int]:
    """Width and height as displayed, in pixels, of an array [H, W, 3] or from a file's header.

    Raises as `pictures.opened` does.
    """
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else size_of(image)


def decoded(image: bytes | NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """RGB pixels [H, W, 3] of `size`, the image centre-cropped to its proportions. Raises as `image_size` does."""
    return fitted(opened_rgb(image), size)


def fitted(picture: Image.Image, size: Size) -> NDArray[np.uint8]:
    """A picture's pixels [H, W, 3] as those of `size`, cropped at the centre to its proportions."""
    return np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


def opened_rgb(image: bytes | NDArray[np.uint8], behind: Background = "white") -> Image.Image:
    """The picture of an image file or of pixels [H, W, 3], in RGB. Raises as `image_size` does."""
    return Image.fromarray(image) if isinstance(image, np.ndarray) else read_rgb(image, behind)


def _renders(count: int, size: Size, seed: int) -> Iterator[Sample]:
    from flashdiff.zoo.images import render_cache, rendered
    from flashdiff.zoo.world import KINDS, caption

    if size.width != size.height:
        raise TrainingError(f"the embedded world draws squares; this model runs at {size}")
    processes.main_first(lambda: rendered(render_cache(), tuple(KINDS), 0, count, size.width))
    images, scenes = rendered(render_cache(), tuple(KINDS), 0, count, size.width)
    rng = random.Random(seed)
    for number, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        yield Sample(f"render {number}", caption(scene, rng), image)


def _folder(folder: Path, columns: Columns, damage: Damage) -> Iterator[Sample]:
    """Image files, each with its caption in a .txt or .json file next to it or in a row of a metadata file."""
    try:
        known = read_metadata(folder, columns.caption)
    except EvaluationError as error:  # a malformed row
        raise TrainingError(str(error)) from None
    listing = next((name for name in METADATA if (folder / name).is_file()), "its folder's metadata")
    there = {path.relative_to(folder).as_posix(): path for path in visible(folder, *SUFFIXES)}
    samples, others = _apart(there, columns.further, known)
    for name, path in samples.items():
        prompt, _ = known.get(name, (None, 0))
        text, record = path.with_suffix(".txt"), path.with_suffix(".json")
        try:
            beside = {file.name: read_file(file) for file in (text, record) if file.is_file()}
            caption = prompt.text.encode() if prompt else caption_of(beside, columns.caption)
            image = read_file(path)
            places = others.get(name.removesuffix(path.suffix), {})
            further = {kind: read_file(_only(kind, found)) for kind, found in places.items()}
        except ValueError as error:  # of the .json file, or several images of a kind
            damage.count("samples")
            damage.skip("samples", f"{path}: {error}")
            continue
        except OSError as error:
            damage.count("samples")
            damage.skip("samples", f"{error.filename} cannot be read: {error.strerror}")
            continue
        missing = f"no line in {listing} names it" if known else f"{text.name} is missing, and so is {record.name}"
        yield from _checked(str(path), image, caption, missing, damage, further, columns)
    for name in sorted(known.keys() - there.keys()):
        damage.count("samples")
        damage.skip("samples", f"{folder}: its metadata names {name}, which is no visible image there")


def _apart(
    there: Mapping[str, Path], called: Mapping[str, str], known: Collection[str]
) -> tuple[dict[str, Path], dict[str, dict[str, list[Path]]]]:
    """The images of a folder that are samples, and those that go with one: `a/x.source.png` under `a/x` and `source`.

    Such images of other kinds, without a caption of their own, are left out.
    """
    kinds = _kinds(called)
    stems = {name: name.removesuffix(path.suffix) for name, path in there.items()}
    taken = set(stems.values())
    samples: dict[str, Path] = {}
    others: dict[str, dict[str, list[Path]]] = {}
    unread: list[str] = []
    for name, path in there.items():
        stem, _, word = stems[name].rpartition(".")
        if stem not in taken:
            samples[name] = path
        elif word.lower() in kinds:
            others.setdefault(stem, {}).setdefault(kinds[word.lower()], []).append(path)
        elif name in known or any(path.with_suffix(ending).is_file() for ending in (".txt", ".json")):
            samples[name] = path
        else:
            unread.append(name)
    if unread:
        _log.info("%d images such as %s go with a sample, and this run does not read them", len(unread), unread[0])
    return samples, others


def _only(kind: str, places: Sequence[Path]) -> Path:
    """The one further image of a kind; ValueError where there are several."""
    if len(places) > 1:
        raise ValueError(_several(kind, [place.name for place in places]))
    return places[0]


def _several(kind: str, names: Sequence[str]) -> str:
    return f"it has several {kind} images: {', '.join(names)}"


def _kinds(called: Mapping[str, str]) -> dict[str, str]:
    """What further images are, by the words in their files' names, which may be written in any case."""
    return {word.lower(): kind for kind, word in called.items()}


def _files(files: Sequence[Path | str], columns: Columns, damage: Damage) -> Iterator[Sample]:
    """The samples of shards and tables, here or at an address; a damaged file gives those before the damage."""
    for file in files:
        damage.count("files")
        try:
            with nullcontext(file) if isinstance(file, Path) else fetched(file) as path:
                open_file(path).close()  # a pipe or a device would keep the library waiting
                yield from (_shard if path.suffix == ".tar" else _table)(path, str(file), columns, damage)
        except DAMAGED_SHARD as error:
            damage.skip("files", f"{file} is damaged ({first_line(error)})")


def _shard(path: Path, where: str, columns: Columns, damage: Damage) -> Iterator[Sample]:
    """Webdataset: members that share a name are one sample, its caption in the .txt or .json member."""
    for members in shard_samples(path):
        try:
            further = _further_of(members, columns.further)
            name = image_of({member: content for member, content in members.items() if member not in further.values()})
            if name is None:
                continue  # not an image: an index, a set of features
            caption = caption_of(members, columns.caption)
        except ValueError as error:
            damage.count("samples")
            damage.skip("samples", f"{where}/{next(iter(members)).split('.')[0]}: {error}")
            continue
        missing = "it has no .txt or .json member"
        images = {kind: members[member] for kind, member in further.items()}
        yield from _checked(f"{where}/{name}", members[name], caption, missing, damage, images, columns)


def _further_of(members: Mapping[str, bytes], called: Mapping[str, str]) -> dict[str, str]:
    """The members of a sample that hold its further images, by what they are: NAME.source.png."""
    kinds = _kinds(called)
    found: dict[str, str] = {}
    for member in members:
        _, *words = member.split(".")
        if len(words) == 2 and words[0] in kinds and f".{words[1]}" in SUFFIXES:
            if kinds[words[0]] in found:
                raise ValueError(_several(kinds[words[0]], [found[kinds[words[0]]], member]))
            found[kinds[words[0]]] = member
    return found


def _table(path: Path, where: str, columns: Columns, damage: Damage) -> Iterator[Sample]:
    """Rows in the layout of Hugging Face data sets."""
    for number, row in enumerate(table_rows(path, where, columns), start=1):
        missing, caption = f"column '{row.column}' is empty", row.caption.encode() if row.caption else None
        yield from _checked(f"{where}, row {number}", row.image, caption, missing, damage, row.further, columns)


def _prompts(path: Path) -> Iterator[Sample]:
    try:
        lines = lines_of(read_text(path))
    except (OSError, ValueError) as error:
        raise TrainingError(f"data.source '{path}': cannot read the prompts: {first_line(error)}") from None
    yield from (Sample(f"{path}:{number}", line.strip(), None) for number, line in enumerate(lines, start=1) if line.strip())


def _checked(
    where: str,
    image: bytes | None,
    caption: bytes | None,
    missing: str,
    damage: Damage,
    further: Mapping[str, bytes | None],
    columns: Columns,
) -> Iterator[Sample]:
    """The sample, unless it has no image, no caption or not all further images. No image is decoded yet."""
    there = {kind: content for kind, content in further.items() if content}
    lacking = next((kind for kind in columns.further if kind not in there), None)
    damage.count("samples")
    try:
        text = caption.decode("utf-8-sig").strip() if caption is not None else ""
    except UnicodeDecodeError:
        damage.skip("samples", f"{where}: its caption is not UTF-8 text")
        return
    if not text:
        damage.skip("samples", f"{where} has no caption: {missing if caption is None else 'it is empty'}")
    elif not image:
        damage.skip("samples", f"{where} has no image: it holds no bytes")
    elif lacking:
        called = columns.further[lacking]
        damage.skip("samples", f"{where} has no {lacking} image: nothing is called '{called}' there, or it holds no bytes")
    else:
        yield Sample(where, text, image, there)
