"""Networks that turn images into features and texts into scores, chosen by name.

avatars              the embedded world's own probes and dual encoder, shipped
inception[:FOLDER]   Inception-v3 of 2015-12-05 through clean-fid; FOLDER holds inception-2015-12-05.pt
dino[:MODEL]         a DINOv2 model through transformers, a directory or a hub id
clip[:MODEL]         a CLIP model through transformers, a directory or a hub id; pickscore is clip:yuvalkirstain/PickScore_v1
aesthetic[:FOLDER]   LAION's aesthetic predictor on CLIP ViT-L/14; FOLDER holds that CLIP and aesthetic-model.pth
image-reward         ImageReward-v1.0 through the package image-reward
hpsv2                HPSv2.1 through the package hpsv2
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

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
_DINO = "facebook/dinov2-large"
_AESTHETIC = ("openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
"""The CLIP, and the repository and file of what reads its image embedding."""


def _device() -> torch.device:
    """Where Inception, DINOv2 and CLIP run."""
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
    """How well images [B, H, W, 3] fit their texts: 100 times the cosine [B], as CLIPScore without its factor (2104.08718), or a
    preference model's score."""

    name: str
    score: Callable[[NDArray[np.uint8], Sequence[str]], NDArray[np.float32]]
    reads_text: bool = True

    def __call__(self, images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        starts = range(0, len(images), _BATCH)
        return np.concatenate([self.score(images[s : s + _BATCH], texts[s : s + _BATCH]) for s in starts])


def check_features(name: str) -> None:
    """EvaluationError for a name that `feature_extractor` does not know; loads nothing."""
    if name != "avatars" and name.partition(":")[0] not in ("inception", "dino"):
        raise EvaluationError(f"--features {name}: choose avatars, inception[:FOLDER] or dino[:MODEL]")


def check_scorer(name: str, option: str = "--text") -> None:
    """EvaluationError for a name that `text_scorer` does not know; loads nothing."""
    if name not in ("avatars", "pickscore", *_PREFERENCES) and name.partition(":")[0] not in ("clip", "aesthetic"):
        diversity = ["dino[:MODEL]"] if option == "--scores" else []
        *others, last = ("avatars", "clip[:MODEL]", "pickscore", "aesthetic[:FOLDER]", *_PREFERENCES, *diversity)
        raise EvaluationError(f"{option} {name}: choose {', '.join(others)} or {last}")


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor of that name; EvaluationError says what to install or where to put it."""
    check_features(name)
    kind, _, place = name.partition(":")
    if kind == "avatars":
        return _probed("probe", load_probe())
    if kind == "dino":
        return dino(place, "--features dino")
    return _inception(Path(place) if place else Path(torch.hub.get_dir()) / "checkpoints")


def second_extractor(name: str) -> FeatureExtractor | None:
    """Next to the extractor of that name a network of another form, seed and data; None where there is none."""
    return _probed("identity_probe", load_identity_probe()) if name == "avatars" else None


def text_scorer(name: str, option: str = "--text") -> TextScorer:
    """The scorer of that name, which `option` gives; EvaluationError says what to install or where to put it."""
    check_scorer(name, option)
    kind, _, place = name.partition(":")
    if kind == "avatars":
        return _avatars_scorer()
    if kind in ("clip", "pickscore"):
        return _clip(_PICKSCORE if kind == "pickscore" else place or _CLIP, option)
    return _aesthetic(place, option) if kind == "aesthetic" else _preference(name, option)


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


def dino(model: str, option: str) -> FeatureExtractor:
    """The class token of DINOv2 after its last norm: what FD-DINOv2 compares (2306.04675). EvaluationError names `option`.

    `model` is a directory or a hub id; without it, ViT-L/14.
    """
    from transformers import AutoImageProcessor, AutoModel

    model = model or _DINO
    try:
        network = AutoModel.from_pretrained(model, dtype=torch.float32).eval().to(_device())
        if network.config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(f"it is a {network.config.model_type}")
        processor = AutoImageProcessor.from_pretrained(model)
    except Exception as error:  # network errors and those of damaged files come as many kinds
        raise EvaluationError(
            f"{option}: no DINOv2 model '{model}', neither a directory nor on the hub ({first_line(error)}); "
            "name a transformers directory: dino:FOLDER"
        ) from None

    @torch.no_grad()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").to(_device())
        features: NDArray[np.float32] = network(**inputs).pooler_output.cpu().numpy()
        return features

    return FeatureExtractor(f"dino {model}", network.config.hidden_size, "as the model's image processor does", extract)


def _clip(model: str, option: str) -> TextScorer:
    from transformers import CLIPModel, CLIPProcessor

    try:
        network = CLIPModel.from_pretrained(model, dtype=torch.float32).eval().to(_device())
        processor = CLIPProcessor.from_pretrained(model)
    except Exception as error:  # as above
        raise EvaluationError(
            f"{option} clip: no CLIP model '{model}', neither a directory nor on the hub ({first_line(error)}); "
            f"name a transformers directory: {option} clip:FOLDER"
        ) from None

    @torch.no_grad()
    def score(images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        pictures = [Image.fromarray(image) for image in images]
        inputs = processor(text=list(texts), images=pictures, return_tensors="pt", padding=True, truncation=True).to(_device())
        output = network(**inputs)
        cosines: NDArray[np.float32] = (100 * (output.image_embeds * output.text_embeds).sum(1)).cpu().numpy()
        return cosines

    return TextScorer(f"clip {model}", score)


def _aesthetic(folder: str, option: str) -> TextScorer:
    """LAION's improved aesthetic predictor: how much people like an image, from 1 to 10, whatever its text."""
    from huggingface_hub import hf_hub_download
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    clip, repository, name = _AESTHETIC
    try:
        network = CLIPVisionModelWithProjection.from_pretrained(folder or clip, dtype=torch.float32).eval().to(_device())
        processor = CLIPImageProcessor.from_pretrained(folder or clip)
        file = Path(folder) / name if folder else Path(hf_hub_download(repository, name))
        with open_file(file) as opened:
            weights = torch.load(opened, map_location=_device(), weights_only=True)
        # The dropouts between its linear layers do nothing here.
        layers = [(weights[f"layers.{index}.weight"], weights[f"layers.{index}.bias"]) for index in (0, 2, 4, 6, 7)]
    except Exception as error:  # as above
        raise EvaluationError(
            f"{option} aesthetic: cannot read the predictor and its CLIP ({first_line(error)}); name a folder that holds CLIP "
            f"ViT-L/14 as transformers saves it, and {name}: {option} aesthetic:FOLDER"
        ) from None

    @torch.no_grad()
    def score(images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").to(_device())
        values = network(**inputs).image_embeds
        values = values / values.norm(dim=1, keepdim=True)
        for weight, bias in layers:
            values = torch.nn.functional.linear(values, weight.float(), bias.float())
        scores: NDArray[np.float32] = values[:, 0].cpu().numpy()
        return scores

    return TextScorer("aesthetic", score, reads_text=False)


def _image_reward() -> Callable[[str, Image.Image], float]:
    model = import_module("ImageReward").load("ImageReward-v1.0")
    return lambda text, picture: float(model.score(text, picture))


def _hps() -> Callable[[str, Image.Image], float]:
    """As `hpsv2.score`, which reads its weights again at every call."""
    from huggingface_hub import hf_hub_download

    parts, files = import_module("hpsv2.img_score"), import_module("hpsv2.utils").hps_version_map
    parts.initialize_model()
    model, preprocess, tokenizer = parts.model_dict["model"], parts.model_dict["preprocess_val"], parts.get_tokenizer("ViT-H-14")
    weights = torch.load(hf_hub_download("xswu/HPSv2", files["v2.1"]), map_location=_device())["state_dict"]
    model.load_state_dict(weights)
    model.to(_device()).eval()

    @torch.no_grad()
    def rate(text: str, picture: Image.Image) -> float:
        with torch.autocast(_device().type, enabled=_device().type == "cuda"):
            output = model(preprocess(picture)[None].to(_device()), tokenizer([text]).to(_device()))
        return 100 * float((output["image_features"] * output["text_features"]).sum())

    return rate


_PREFERENCES: dict[str, Callable[[], Callable[[str, Image.Image], float]]] = {"image-reward": _image_reward, "hpsv2": _hps}
"""Models of what people prefer by the package that has them: how each rates an image."""


def _preference(name: str, option: str) -> TextScorer:
    try:
        rated = _PREFERENCES[name]()
        rated("a picture", Image.new("RGB", (64, 64)))  # before thousands of images are made
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{option} {name} needs '{error.name}', which is not installed: pip install --no-deps {name}, and what it imports"
        ) from None
    except Exception as error:  # weights that cannot be had come as many kinds
        raise EvaluationError(f"{option} {name}: the package {name} cannot load or run its model ({first_line(error)})") from None

    def score(images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([rated(text, Image.fromarray(image)) for image, text in zip(images, texts, strict=True)], np.float32)

    return TextScorer(name, score)
