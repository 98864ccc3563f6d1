"""A recipe that trains in seconds."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdiff.distill.branches import Branches
from flashdiff.distill.config import Recipe
from flashdiff.tasks.base import Task

CAPTIONS = ("a dog", "a cat", "two birds", "a red car", "a tree", "the sea")


def tiny_recipe(base: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "base": str(base),
        "guidance": (2.0, 4.0),
        "batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_updates": 0,
        "checkpoint_every": 3,
        "data": {"source": str(image_folder(base.parent / "images"))},
        "grid": {"solver_steps": 4},
        "lora": {"rank": 2, "alpha": 4, "targets": ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")},
        "phases": [{"updates": 4, "mode_weights": (1, 1, 1, 1)}],
    }
    return Recipe(**{**values, **changes})


def killed_at(update: int, learn: Callable[..., None]) -> Callable[..., None]:
    """`Student.learn` in a process that is killed in this update."""

    def learn_until_killed(student: Any, loss: float) -> None:
        if student.update == update:
            raise KeyboardInterrupt
        learn(student, loss)

    return learn_until_killed


def branches_of_text(*contrasts: Mapping[str, Tensor]) -> Branches:
    """Classifier-free guidance with this contrast; none: the network takes its guidance as an input."""
    return Branches(contrasts=contrasts, weights=lambda guidance: Task().weights(guidance, {}))


def image_folder(folder: Path) -> Path:
    """Six flat pictures with captions, of an odd size."""
    from PIL import Image

    if not folder.exists():
        folder.mkdir()
        for index, caption in enumerate(CAPTIONS):
            Image.new("RGB", (50, 40), (40 * index, 255 - 40 * index, 128)).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(caption)
    return folder


FURTHER = ("source", "canny", "reference")
MASK_BOX = (10, 5, 30, 25)
"""The white part of every mask, before it is cropped with its image: left, top, right, bottom."""


def paired_folder(folder: Path) -> Path:
    """Six samples of noise, each with the further images that models may read: of its size, and a reference of another; and a
    mask."""
    import numpy as np
    from PIL import Image

    if not folder.exists():
        folder.mkdir()
        rng = np.random.default_rng(0)
        for index, caption in enumerate(CAPTIONS):
            for name in ("", *(f".{name}" for name in FURTHER)):
                height, width = (30, 30) if name == ".reference" else (40, 50)
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}{name}.png")
            mask = Image.new("L", (50, 40))
            mask.paste(255, MASK_BOX)
            mask.save(folder / f"{index}.mask.png")
            (folder / f"{index}.txt").write_text(caption)
    return folder
