"""Networks that turn images into features and texts into scores, chosen by name.

avatars              the embedded world's own probes and dual encoder, shipped
inception[:FOLDER]   Inception-v3 of 2015-12-05 through clean-fid; FOLDER holds inception-2015-12-05.pt
clip[:MODEL]         a CLIP model through transformers, a directory or a hub id; pickscore is clip:yuvalkirstain/PickScore_v1
image-reward         ImageReward-v1.0 through the package image-reward
hpsv2                HPSv2.1 through the package hpsv2
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flashdiff.errors import EvaluationError, first_line
from flashdiff.files import hash_file
from flashdiff.reading import open_file
from flashdiff.zoo.evaluators import FOLDER, SIZE, Probe, load_dual_encoder, load_identity_probe, load_probe
from flashdiff.zoo.images import to_input
from flashdiff.zoo.world import attribute_words

_BATCH = 64
_INCEPTION_FILE = "inception-2015-12-05.pt"
_CLIP = "openai/clip-vit-base-patch16"
_PICKSCORE = "yuvalkirstain/PickScore_v1"


def _device() -> torch.device:
    """Where Inception and CLIP run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class FeatureExtractor:
    """Images [B, H, W, 3] to features [B, dimension]."""

    name: str
    dimension: int
    resize: str
    """How images reach the network's size, in words: it changes the numbers (2104.11222)."""
    extract: Callable[[NDArray[np.uint8]], NDArray[np.float32]]

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.concatenate([self.extract(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)])


@dataclass(frozen=True)
class TextScorer:
    """How well images [B, H, W, 3] fit their texts: 100 times the cosine [B], as CLIPScore without its factor (2104.08718)."""

    name: str
    score: Callable[[NDArray[np.uint8], Sequence[str]], NDArray[np.float32]]

    def __call__(self, images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        starts = range(0, len(images), _BATCH)
        return np.concatenate([self.score(images[s : s + _BATCH], texts[s : s + _BATCH]) for s in starts])


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor of that name; EvaluationError says what to install or where to put it."""
    kind, _, place = name.partition(":")
    if name == "avatars":
        return _probed("probe", load_probe())
    if kind == "inception":
        return _inception(Path(place) if place else Path(torch.hub.get_dir()) / "checkpoints")
    raise EvaluationError(f"--features {name}: choose avatars or inception[:FOLDER]")


def second_extractor(name: str) -> FeatureExtractor | None:
    """Next to the extractor of that name a network of another form, seed and data; None where there is none."""
    return _probed("identity_probe", load_identity_probe()) if name == "avatars" else None


def text_scorer(name: str) -> TextScorer:
    """The scorer of that name; EvaluationError says what to install or where to put it."""
    kind, _, place = name.partition(":")
    if name == "avatars":
        return _avatars_scorer()
    if kind == "clip":
        return _clip(place or _CLIP)
    if name == "pickscore":
        return _clip(_PICKSCORE)
    if name in _PREFERENCES:
        module, package, rate = _PREFERENCES[name]
        return _preference(name, module, package, rate)
    raise EvaluationError(f"--text {name}: choose avatars, clip[:MODEL], pickscore, {' or '.join(_PREFERENCES)}")


def attribute_reader() -> Callable[[NDArray[np.uint8]], dict[str, list[str]]]:
    """Reads off images [N, H, W, 3] of the embedded world the word of every attribute, by its probe."""
    probe, words = load_probe(), attribute_words()

    @torch.no_grad()
    def read(images: NDArray[np.uint8]) -> dict[str, list[str]]:
        batches = [probe(to_input(_world_sized(images[s : s + _BATCH])))[1] for s in range(0, len(images), _BATCH)]
        return {name: [words[name][index] for batch in batches for index in batch[name].argmax(1)] for name in words}

    return read


def _probed(name: str, probe: Probe) -> FeatureExtractor:
    """The features of a probe of the embedded world, `name`.safetensors."""

    @torch.no_grad()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        features: NDArray[np.float32] = probe(to_input(_world_sized(images)))[0].numpy()
        return features

    return FeatureExtractor(
        name=f"avatars {name.replace('_', ' ')} {hash_file(FOLDER / f'{name}.safetensors')[:12]}",
        dimension=probe.features.out_features,
        resize=f"none at {SIZE}x{SIZE}, else PIL bicubic with antialiasing to it",
        extract=extract,
    )


def _avatars_scorer() -> TextScorer:
    encoder = load_dual_encoder()

    @torch.no_grad()
    def score(images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        seen, read = encoder.encode_images(to_input(_world_sized(images))), encoder.encode_texts(texts)
        cosines: NDArray[np.float32] = (100 * (seen * read).sum(1)).numpy()
        return cosines

    return TextScorer(f"avatars dual encoder {hash_file(FOLDER / 'dual_encoder.safetensors')[:12]}", score)


def _world_sized(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if images.shape[1:3] == (SIZE, SIZE):
        return images
    resized = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def _inception(folder: Path) -> FeatureExtractor:
    try:
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer
    except ImportError:
        raise EvaluationError("--features inception needs clean-fid: pip install --no-deps clean-fid==0.1.35") from None
    file = folder / _INCEPTION_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            open_file(file).close()  # a pipe would keep torch waiting
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which these weights are saved in
            network = InceptionV3W(str(folder), download=not file.exists(), resize_inside=False).eval().to(_device())
    except Exception as error:  # network and unpickling errors come as many kinds
        raise EvaluationError(
            f"--features inception: {file} is missing or unreadable and could not be downloaded ({first_line(error)}); "
            "put the file there, or name its folder: --features inception:FOLDER"
        ) from None
    resizer = build_resizer("clean")

    @torch.no_grad()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        resized = np.stack([resizer(image) for image in images]).transpose(0, 3, 1, 2)
        inputs = torch.from_numpy(np.ascontiguousarray(resized, dtype=np.float32)).to(_device())
        features: NDArray[np.float32] = network(inputs).cpu().numpy()
        return features

    resize = "clean-fid's: PIL bicubic with antialiasing to 299x299, not rounded to bytes"
    return FeatureExtractor(f"inception {hash_file(file)[:12]}", 2048, resize, extract)


def _clip(model: str) -> TextScorer:
    from transformers import CLIPModel, CLIPProcessor

    try:
        network, processor = CLIPModel.from_pretrained(model).eval().to(_device()), CLIPProcessor.from_pretrained(model)
    except Exception as error:  # as above
        raise EvaluationError(
            f"--text clip: no CLIP model '{model}', neither a directory nor on the hub ({first_line(error)}); "
            "name a transformers directory: --text clip:FOLDER"
        ) from None

    @torch.no_grad()
    def score(images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        pictures = [Image.fromarray(image) for image in images]
        inputs = processor(text=list(texts), images=pictures, return_tensors="pt", padding=True, truncation=True).to(_device())
        output = network(**inputs)
        cosines: NDArray[np.float32] = (100 * (output.image_embeds * output.text_embeds).sum(1)).cpu().numpy()
        return cosines

    return TextScorer(f"clip {model}", score)


def _image_reward(package: Any) -> Callable[[str, Image.Image], float]:
    model = package.load("ImageReward-v1.0")
    return lambda text, picture: float(model.score(text, picture))


def _hps(package: Any) -> Callable[[str, Image.Image], float]:
    return lambda text, picture: 100 * float(package.score(picture, text, hps_version="v2.1")[0])


_PREFERENCES: dict[str, tuple[str, str, Callable[[Any], Callable[[str, Image.Image], float]]]] = {
    "image-reward": ("ImageReward", "image-reward", _image_reward),
    "hpsv2": ("hpsv2", "hpsv2", _hps),
}
"""Models of what people prefer: the module, the package that has it, and how it rates an image."""


def _preference(name: str, module: str, package: str, rate: Callable[[Any], Callable[[str, Image.Image], float]]) -> TextScorer:
    try:
        rated = rate(import_module(module))
    except ImportError as error:
        raise EvaluationError(f"--text {name} needs '{error.name}', which is not installed: pip install {package}") from None
    except Exception as error:  # weights that cannot be had come as many kinds
        raise EvaluationError(f"--text {name}: the package {package} cannot load its model ({first_line(error)})") from None

    def score(images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([rated(text, Image.fromarray(image)) for image, text in zip(images, texts, strict=True)], np.float32)

    return TextScorer(name, score)
