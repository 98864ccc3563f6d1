"""Where an image shows, or could show, its faint attributes: patterns, surfaces, rings and beards.

They fill a twentieth of an image at low contrast, so a plain squared error hardly sees them. Each scene is drawn once more with
these attributes toggled; what changes is where they are. Absent ones count too: a place that counts only where something is
drawn would teach the denoiser to draw it unasked.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.zoo.world import KINDS, OBJECT_COLORS, Scene, _style

_CHUNK = 1000
_FAINT = {"critters": ("pattern",), "sprouts": ("pattern",), "planets": ("surface", "ring"), "voxel-art": ("beard",)}


def detail_places(images: NDArray[np.uint8], scenes: Sequence[Scene], cells: int) -> NDArray[np.bool_]:
    """Which of the cells [N, cells, cells] of images [N, H, W, 3] hold a faint attribute, or would if the scene had it."""
    parts = [slice(start, start + _CHUNK) for start in range(0, len(scenes), _CHUNK)]
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(_places, images[part], scenes[part], cells) for part in parts]
        return np.concatenate([job.result() for job in jobs])


def _places(images: NDArray[np.uint8], scenes: Sequence[Scene], cells: int) -> NDArray[np.bool_]:
    places = np.zeros((len(scenes), cells, cells), np.bool_)
    for place, image, scene in zip(places, images, scenes, strict=True):
        if scene.kind in _FAINT:
            side = image.shape[0] // cells
            changed = (image != _toggled(scene, image.shape[0])).any(-1)
            place[:] = changed.reshape(cells, side, cells, side).any((1, 3))
    return places


def _toggled(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The scene's picture [size, size, 3] without the faint attributes that it has, and with those that it lacks."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    kind = KINDS[scene.kind]
    options: dict[str, Any] = {"backgroundColor": list(kind.background.values()), **dict(kind.fixed), "seed": str(scene.seed)}
    options |= {name: list(OBJECT_COLORS.values()) for name in (kind.color, *kind.palettes)}
    options |= {f"{name}Probability": 0 if name in scene.phrases else 100 for name in _FAINT[scene.kind]}
    drawn = Avatar(_style(kind.style), options).to_string()
    png = bytes(resvg_py.svg_to_bytes(svg_string=drawn, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
