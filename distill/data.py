"""Training data: latents and text embeddings in a cache on disk, batched by size, in an order that a resumed run continues."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdiff.components import Size
from flashdiff.distill import processes
from flashdiff.distill.conditions import WantedImage
from flashdiff.distill.config import DataRecipe
from flashdiff.distill.progress import Stage
from flashdiff.distill.sources import Damage, Sample, decoded, fitted, image_size, opened_rgb, read_samples
from flashdiff.errors import RequestError, TrainingError, first_line
from flashdiff.evaluation.images import DAMAGED_IMAGE
from flashdiff.families.base import TorchModel
from flashdiff.files import cache_folder, hash_files, write_whole
from flashdiff.orders import Pixels
from flashdiff.pictures import as_clip_reads

_log = logging.getLogger(__name__)

_FORMAT = 1  # raise it when the same bytes give another tensor than before
_WIDEST = 2.0  # aspect bucket, long side to short side


@dataclass(frozen=True)
class Item:
    """One sample in the cache: the files that hold its tensors."""

    prompt: Path
    latents: Path | None  # None: a prompt without an image
    pixels: Mapping[str, Path] = field(default_factory=dict)
    """Of the images that the base reads, by name."""


class Dataset:
    """The items of a run by their size, batched in an order that is a function of seed and batch number alone.

    An epoch holds every item at least once: each size's items are shuffled and cut into batches, the last one filled up from
    the same shuffle, and the batches of all sizes are shuffled. So the number of the update is all that a resumed run needs.
    """

    def __init__(self, items: Sequence[tuple[Size, Item]], *, batch_size: int, seed: int) -> None:
        self.items = [item for _, item in items]
        self._of_size = {size: np.flatnonzero([s == size for s, _ in items]) for size in sorted({size for size, _ in items})}
        self._batch_size, self._seed = batch_size, seed
        self._epoch: tuple[int, list[tuple[Size, NDArray[np.int64]]]] = (-1, [])

    def __len__(self) -> int:
        return len(self.items)

    @property
    def has_images(self) -> bool:
        """Whether the samples have images; those of a list of prompts have none."""
        return self.items[0].latents is not None

    @property
    def sizes(self) -> list[Size]:
        """The sizes of the images, each once."""
        return list(self._of_size)

    def of_size(self, size: Size) -> list[int]:
        """The indices of the items whose images have this size."""
        return [int(index) for index in self._of_size.get(size, ())]

    def held_out(self, count: int) -> tuple["Dataset", "Dataset"]:
        """The samples to train on, and `count` of one size that are set aside, drawn by the seed; 0: none are.

        The size is the one that most samples have. TrainingError where it has not so many more.
        """
        if not count:
            return self, Dataset([], batch_size=self._batch_size, seed=self._seed)
        size, indices = max(self._of_size.items(), key=lambda found: len(found[1]))
        if len(indices) <= count:
            raise TrainingError(
                f"keep_best = {count}: there are {len(indices)} samples of {size}, and some are needed to train on"
            )
        apart = set(np.random.default_rng(self._seed).permutation(indices)[:count].tolist())
        return self._chosen(set(range(len(self))) - apart), self._chosen(apart)

    def _chosen(self, indices: Iterable[int]) -> "Dataset":
        size_of = {int(index): size for size, members in self._of_size.items() for index in members}
        return Dataset([(size_of[i], self.items[i]) for i in sorted(indices)], batch_size=self._batch_size, seed=self._seed)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that show every item at least once; each size fills its own."""
        return sum(-(-len(indices) // self._batch_size) for indices in self._of_size.values())

    def batch(self, number: int) -> tuple[Size, NDArray[np.int64]]:
        """Batch `number` of the run, counted from 0: the size of its images, and the indices [batch_size] of its items."""
        epoch, within = divmod(number, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(np.random.default_rng([self._seed, epoch])))
        return self._epoch[1][within]

    def _shuffled(self, rng: np.random.Generator) -> list[tuple[Size, NDArray[np.int64]]]:
        batches: list[tuple[Size, NDArray[np.int64]]] = []
        for size, indices in self._of_size.items():
            count = -(-len(indices) // self._batch_size)
            order = np.resize(rng.permutation(indices), count * self._batch_size)
            batches += [(size, part) for part in order.reshape(count, -1)]
        return [batches[index] for index in rng.permutation(len(batches))]

    def latents(self, chosen: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Scaled latents [len(chosen), C, h, w] of the items' images."""
        paths = [self.items[index].latents for index in chosen]
        return torch.stack([_read(path)["latents"] for path in paths if path]).float()

    def pixels(self, index: int) -> dict[str, Pixels]:
        """The images [H, W, 3] of an item that the base reads, by name."""
        return {name: _read(path)["pixels"].numpy() for name, path in self.items[index].pixels.items()}

    def conditioning(self, chosen: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        """Conditioning tensors [len(chosen), ...] of the items' prompts."""
        rows = [_read(self.items[index].prompt) for index in chosen]
        return {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]}


def load_dataset(
    recipe: DataRecipe, model: TorchModel, *, batch_size: int, seed: int, wanted: Mapping[str, WantedImage] = MappingProxyType({})
) -> Dataset:
    """The samples that the recipe names, encoded into the cache unless they are there already; each process encodes its share.

    `wanted` are the images of a sample that the base reads; their pixels are cached too, because a shard is read but once and in
    its order, while a sample's images are needed whenever it comes into a pool.

    A few damaged samples are skipped and counted. TrainingError when there is nothing to train on or too much is damaged.
    """
    damage, cache = Damage(recipe.source), _Cache(model)
    default = model.spec.sizes[0]
    sizes = aspect_sizes(default, model.spec.latent_factor) if recipe.buckets else [default]
    items: dict[int, tuple[Size, Item]] = {}
    bad: dict[int, str] = {}
    further = tuple(dict.fromkeys(image.further for image in wanted.values() if image.further))
    samples = read_samples(recipe, default, seed, damage, further)
    with Stage("encode", "samples") as stage:
        for number, sample in enumerate(samples):
            stage.advance()
            is_mine = number % processes.count() == processes.index()
            if sample.image is None and wanted:
                raise TrainingError(
                    f"data.source '{recipe.source}' holds prompts alone, and '{model.spec.name}' reads images "
                    f"({', '.join(wanted)}): give images with captions"
                )
            try:
                _check_sizes(sample, wanted)
                size = default if sample.image is None else nearest_size(sizes, *image_size(sample.image))
                item = cache.item(sample, size, wanted)
                is_missing = is_mine and item.latents is not None and not _is_whole(item.latents)
                pixels = decoded(sample.image, size) if is_missing and sample.image is not None else None
                if is_mine:
                    cache.put_pixels(item, sample, size, wanted)
            except _FurtherError as error:
                bad[number] = str(error)
                continue
            except DAMAGED_IMAGE as error:
                bad[number] = f"{sample.where} is not a readable image ({first_line(error)})"
                continue
            items[number] = size, item
            if pixels is not None:
                cache.put_image(item, pixels)
            if is_mine and not _is_whole(item.prompt):
                cache.put_prompt(item, sample.caption)
    for number, why in sorted(processes.union(bad).items()):
        damage.skip("samples", why)
        items.pop(number, None)
    damage.check()
    if not items:
        raise TrainingError(
            f"data.source '{recipe.source}' holds no images or prompts: give a folder of images, "
            "shards (.tar, .parquet) or a .txt file of prompts"
        )
    data = Dataset(list(items.values()), batch_size=batch_size, seed=seed)
    skipped = "".join(f", {count} {kind} skipped" for kind, count in damage.skipped.items())
    _log.info("%d samples of %s%s; their tensors are in %s", len(data), ", ".join(map(str, data.sizes)), skipped, cache.folder)
    return data


# --- sizes -----------------------------------------------------------------------------------------------------------


def aspect_sizes(size: Size, factor: int) -> list[Size]:
    """Sizes with about the area of `size`, from 1:2 to 2:1, in ascending order.

    Sides are multiples of an eighth of its shorter side, and of at least two latent cells.
    """
    step = max(min(size) // 8, 2 * factor)
    area = size.width * size.height
    widths = range(step, 2 * max(size) + 1, step)
    sizes = {Size(width, max(round(area / width / step), 1) * step) for width in widths} | {size}
    return sorted(found for found in sizes if max(found) <= _WIDEST * min(found))


def nearest_size(sizes: Sequence[Size], width: int, height: int) -> Size:
    """The size whose aspect ratio is nearest to an image's of `width` x `height`, on a logarithmic scale."""
    return min(sizes, key=lambda size: abs(math.log(size.width / size.height) - math.log(width / height)))


# --- the cache -------------------------------------------------------------------------------------------------------


class _Cache:
    """Tensors in files named by their origin: the sample's bytes, and the hash of the parts that encode it.

    Samples are encoded one by one, so that values never depend on which other samples were missing.
    """

    def __init__(self, model: TorchModel) -> None:
        def parts(pattern: str) -> str:
            files = [path for folder in model.folder.glob(pattern) for path in folder.iterdir() if path.is_file()]
            return hash_files(model.folder, files)[:16]

        self.folder, self._model = cache_folder() / "distill", model
        self._latents = self.folder / f"latents-{_FORMAT}-{parts('vae')}"
        self._pixels = self.folder / f"pixels-{_FORMAT}"
        # Embeddings are large, so they are stored in the precision that text encoders (t*) run in.
        precision = str(processes.precision()).removeprefix("torch.")
        self._prompts = self.folder / f"prompts-{_FORMAT}-{model.spec.family}-{precision}-{parts('t[eo]*')}"

    def item(self, sample: Sample, size: Size, wanted: Mapping[str, WantedImage]) -> Item:
        """The paths of the sample's tensors, whether or not they exist yet."""
        image = _bytes_of(sample.image)
        latents = None if image is None else _named(self._latents, image, str(size))
        pixels = {
            name: _named(
                self._pixels,
                *(_bytes_of(_file_of(sample, kind)) or b"", str(kind.side or kind.size(size)), kind.behind),
                *([self._model.base_hash] if kind.check else []),  # what is there has passed this base's check
            )
            for name, kind in wanted.items()
        }
        return Item(_named(self._prompts, sample.caption.encode()), latents, pixels)

    def put_pixels(self, item: Item, sample: Sample, size: Size, wanted: Mapping[str, WantedImage]) -> None:
        """Save the images that the base reads, cropped as it does, unless they are there; _FurtherError for one that is damaged
        or cannot be used."""
        for name, kind in wanted.items():
            image = _file_of(sample, kind)
            if image is None or _is_whole(item.pixels[name]):
                continue
            with _about(sample, kind):
                picture = opened_rgb(image, kind.behind)
                pixels = as_clip_reads(picture, kind.side) if kind.side else fitted(picture, kind.size(size))
            try:
                if kind.check:
                    kind.check(pixels)
            except RequestError as error:
                raise _FurtherError(f"{sample.where}: its {kind.further} image cannot be used ({error})") from None
            _write(item.pixels[name], {"pixels": torch.from_numpy(pixels)})

    def put_image(self, item: Item, pixels: NDArray[np.uint8]) -> None:
        """Encode an image [H, W, 3]. A variational autoencoder is sampled once, with a seed from the file's name."""
        assert item.latents
        generator = torch.Generator().manual_seed(int(item.latents.stem[:12], 16))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(processes.device()).float().div(127.5).sub(1)
        with torch.no_grad():
            _write(item.latents, {"latents": self._model.encoder(image, generator)[0].float()})

    def put_prompt(self, item: Item, caption: str) -> None:
        """Encode a caption, cut to the tokenizers' length."""
        rows = self._model.encode_ids(self._model.tokenizer([caption], truncate=True))
        _write(item.prompt, {name: values[0].to(processes.precision()) for name, values in rows.items()})


def _file_of(sample: Sample, kind: WantedImage) -> bytes | NDArray[np.uint8] | None:
    """The image of a sample that is wanted, as it was read."""
    return sample.further.get(kind.further) if kind.further else sample.image


def _bytes_of(image: bytes | NDArray[np.uint8] | None) -> bytes | None:
    return image.tobytes() if isinstance(image, np.ndarray) else image


class _FurtherError(Exception):
    """A further image of a sample cannot be read, or does not fit the sample's own."""


@contextmanager
def _about(sample: Sample, kind: WantedImage) -> Iterator[None]:
    """Turn the errors of a damaged image into a _FurtherError, where it is a further one."""
    try:
        yield
    except DAMAGED_IMAGE as error:
        if kind.further is None:
            raise
        raise _FurtherError(f"{sample.where}: its {kind.further} image is not readable ({first_line(error)})") from None


def _check_sizes(sample: Sample, wanted: Mapping[str, WantedImage]) -> None:
    """_FurtherError where an image that belongs to the sample's own pixel for pixel has another size; else as `image_size`."""
    for kind in wanted.values():
        image = _file_of(sample, kind)
        if kind.further is None or kind.side or image is None or sample.image is None:
            continue
        own = image_size(sample.image)
        with _about(sample, kind):
            size = image_size(image)
        if size != own:
            sizes = f"{size[0]}x{size[1]} pixels, the sample's own {own[0]}x{own[1]}"
            raise _FurtherError(f"{sample.where}: its {kind.further} image has {sizes}; they must have one size")


def _named(folder: Path, *content: bytes | str) -> Path:
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.encode() if isinstance(part, str) else part)
    name = digest.hexdigest()[:40]
    return folder / name[:2] / f"{name}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file whole or not at all, even when another process writes the same one."""
    write_whole(path, safetensors.torch.save({name: values.contiguous().cpu() for name, values in tensors.items()}))


def _is_whole(path: Path) -> bool:
    """Whether the file exists and is as long as its header says."""
    try:
        with safetensors.safe_open(path, "pt"):
            return True
    except (OSError, safetensors.SafetensorError):
        return False


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingError(f"{path}: the cache lost this file ({first_line(error)}); start again to encode it again") from None
