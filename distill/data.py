"""Images and captions for distillation, as scaled latents in memory."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flashdiff.components import Size
from flashdiff.distill.config import DataRecipe
from flashdiff.errors import TrainingError
from flashdiff.families.base import TorchModel

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}

_ENCODE_BATCH = 64


@dataclass(frozen=True)
class Dataset:
    latents: Tensor  # [N, C, h, w], scaled
    captions: Sequence[str]  # [N]


def load_dataset(recipe: DataRecipe, model: TorchModel, *, cache: Path, seed: int) -> Dataset:
    """All images encoded once, captions beside them; TrainingError when there is nothing to train on."""
    size = model.spec.sizes[0]
    if recipe.source == "avatars":
        images, captions = _renders(recipe.images, size, cache, seed)
    else:
        images, captions = _folder(Path(recipe.source), recipe.images, size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(_ENCODE_BATCH)
        latents = torch.cat([model.encode_images(part.float().div(127.5).sub(1), generator) for part in parts])
    return Dataset(latents, captions)


def _renders(count: int, size: Size, cache: Path, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    from flashdiff.zoo.images import rendered
    from flashdiff.zoo.world import KINDS, caption

    if size.width != size.height:
        raise TrainingError(f"the embedded world draws squares; this model runs at {size}")
    images, scenes = rendered(cache, tuple(KINDS), 0, count, size.width)
    rng = random.Random(seed)
    return images, [caption(scene, rng) for scene in scenes]


def _folder(folder: Path, count: int, size: Size) -> tuple[NDArray[np.uint8], list[str]]:
    if not folder.is_dir():
        raise TrainingError(f"data.source '{folder}' is neither 'avatars' nor a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)[:count]
    if not files:
        raise TrainingError(f"data.source '{folder}' holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    images, captions = [], []
    for path in files:
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise TrainingError(f"{path} has no caption: {text.name} is missing")
        try:
            images.append(_fitted(Image.open(path).convert("RGB"), size))
        except (OSError, Image.DecompressionBombError):
            raise TrainingError(f"{path} is not a readable image") from None
        try:
            captions.append(text.read_text("utf-8").strip())
        except (OSError, UnicodeDecodeError):
            raise TrainingError(f"{text} is not readable UTF-8 text") from None
    return np.stack(images), captions


def _fitted(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """Centre-cropped to the size's proportions and resampled to it."""
    scale = max(size.width / image.width, size.height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - size.width) // 2, (image.height - size.height) // 2
    return np.asarray(image.crop((left, top, left + size.width, top + size.height)))
