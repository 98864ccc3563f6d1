"""Renders of the world as one array, drawn once by all cores and kept on disk."""

import hashlib
import importlib.metadata
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashdiff.errors import ConfigError, first_line
from flashdiff.files import cache_folder, write_whole
from flashdiff.reading import read_json
from flashdiff.zoo import world
from flashdiff.zoo.world import Scene, scenes

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1000
_AGAIN = 5_000_000
"""Added to a figure's seed for the chances of its second image."""


def rendered(folder: Path, kinds: Sequence[str], first_seed: int, count: int, size: int) -> tuple[NDArray[np.uint8], list[Scene]]:
    """`count` images [N, size, size, 3] and their scenes; drawn on the first call, read from `folder` afterwards.

    Each chunk of 1000 images starts at its own seed, 10,000 apart, so chunks can be drawn in any order.
    """
    name = f"{'+'.join(kinds)}-{first_seed}-{count}-{size}-{_world_hash()}"
    images_file, scenes_file = folder / f"{name}.npy", folder / f"{name}.json"
    if not scenes_file.exists():
        starts = range(0, count, _CHUNK)
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(_draw_chunk, tuple(kinds), first_seed + 10 * s, min(_CHUNK, count - s), size) for s in starts]
            chunks = [job.result() for job in jobs]
        drawn = np.concatenate([images for images, _ in chunks])
        write_whole(images_file, lambda file: np.save(file, drawn))
        write_whole(scenes_file, json.dumps([asdict(scene) for _, found in chunks for scene in found]))
    try:
        return np.load(images_file), [Scene(**scene) for scene in read_json(scenes_file)]
    except Exception as error:  # numpy has many kinds for a damaged file
        raise ConfigError(_damaged(images_file, error)) from None


def _damaged(file: Path, error: Exception) -> str:
    return f"{file} or its .json is damaged ({first_line(error)}); remove both to draw them again"


class Pairs(NamedTuple):
    """Renders of N figures, each twice: images i and i + N have the same figure on different backgrounds."""

    images: NDArray[np.uint8]
    """[2 N, size, size, 3]"""
    scenes: list[Scene]
    """Of the images."""
    figures: list[dict[str, str]]
    """What draws each of the N: `world.figure`."""


def rendered_pairs(folder: Path, kinds: Sequence[str], first_seed: int, count: int, size: int) -> Pairs:
    """The images of `rendered`, and each figure once more on another background; kept in `folder` likewise."""
    images, scenes = rendered(folder, kinds, first_seed, count, size)
    others = [replace(scene, background=_another_background(scene)) for scene in scenes]
    name = f"again-{'+'.join(kinds)}-{first_seed}-{count}-{size}-{_world_hash()}"
    images_file, figures_file = folder / f"{name}.npy", folder / f"{name}.json"
    if not figures_file.exists():
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(_drawn_again, others, [size] * count, chunksize=_CHUNK // 10))
        write_whole(images_file, lambda file: np.save(file, np.stack([image for image, _ in drawn])))
        write_whole(figures_file, json.dumps([figure for _, figure in drawn]))
    try:
        return Pairs(np.concatenate([images, np.load(images_file)]), [*scenes, *others], read_json(figures_file))
    except Exception as error:  # as above
        raise ConfigError(_damaged(images_file, error)) from None


def render_cache() -> Path:
    """Where renders that belong to no run are kept: 12 kB an image of 64x64."""
    return cache_folder() / "renders"


def to_input(images: NDArray[np.uint8]) -> "Tensor":
    """uint8 [B, H, W, 3] as float [B, 3, H, W] in [-1, 1], as networks take them."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def _world_hash() -> str:
    """Names what draws: another table or package draws another picture for the same seed."""
    drawers = [f"{name} {importlib.metadata.version(name)}" for name in ("dicebear-core", "dicebear-styles", "resvg-py")]
    return hashlib.sha256(Path(world.__file__).read_bytes() + "\n".join(drawers).encode()).hexdigest()[:8]


def _draw_chunk(kinds: Sequence[str], first_seed: int, count: int, size: int) -> tuple[NDArray[np.uint8], list[Scene]]:
    drawn = list(scenes(kinds, first_seed, count, size))
    return np.stack([image for image, _ in drawn]), [scene for _, scene in drawn]


def _another_background(scene: Scene) -> str:
    words = [word for word in world.KINDS[scene.kind].background if word != scene.background]
    return random.Random(scene.seed).choice(words)


def _drawn_again(scene: Scene, size: int) -> tuple[NDArray[np.uint8], dict[str, str]]:
    image, _ = world.render(scene.kind, _AGAIN + scene.seed, size, like=scene.seed, background=scene.background)
    return image, world.figure(scene.kind, scene.seed)
