"""Renders of the world as one array, drawn once by all cores and kept on disk."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

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
        raise ConfigError(
            f"{images_file} or its .json is damaged ({first_line(error)}); remove both to draw them again"
        ) from None


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
