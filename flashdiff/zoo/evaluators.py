"""Evaluation networks of the embedded world: a probe that reads attributes off pixels, and a dual encoder that scores text.

    python -m flashdiff.zoo.evaluators --out runs/evaluators

Both are trained on renders of a seed range of their own, and neither is used in any loss. Their numbers are comparable
only with each other: a score here is not a CLIP score, a distance here is not an Inception distance.
"""

import argparse
import itertools
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flashdiff.checkpoint import step_generator
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.files import new_folder
from flashdiff.zoo.fit import StageRecipe, fit
from flashdiff.zoo.images import rendered, to_input
from flashdiff.zoo.world import ABSENT, KINDS, Scene, attribute_labels, attribute_words, caption

FOLDER = Path(__file__).parent / "avatars-evaluators"
SIZE = 64
"""Side of the images both networks take."""

_TRAIN_SEED, _TRAIN_IMAGES = 20_000_000, 36_000
_HELD_BACK_SEED, _HELD_BACK_IMAGES = 25_000_000, 3_000
_RECIPES = {
    "probe": StageRecipe(batch_size=64, images=128_000, learning_rate=3e-3),
    "dual_encoder": StageRecipe(batch_size=128, images=80_000, learning_rate=3e-3),
}
_SEED = 1234  # another than any that trains a model
_MAX_WORDS = 40

_Network = TypeVar("_Network", bound=nn.Module)


class AttributeProbe(nn.Module):
    """Images [B, 3, 64, 64] in [-1, 1] to features [B, 128] and, for every attribute, the logits of its words.

    Features have mean 0 and variance 1 over real renders, so that distances between them have a scale.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk((32, 64, 96))
        self.features = nn.Linear(96 * 8 * 8, 128)  # not pooled: eyes and mouths have their places
        self.register_buffer("feature_mean", torch.zeros(128))
        self.register_buffer("feature_std", torch.ones(128))
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in attribute_words().items()})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features [B, 128], and by attribute the logits [B, words], of images [B, 3, 64, 64] in [-1, 1]."""
        features = self.features(self.trunk(images).flatten(1))
        logits = {name: head(functional.silu(features)) for name, head in self.heads.items()}
        return (features - self.feature_mean) / self.feature_std, logits


class DualEncoder(nn.Module):
    """Images and texts to unit vectors [B, 96], trained so that those of a pair point the same way (CLIP, 2103.00020)."""

    def __init__(self) -> None:
        super().__init__()
        width = 96
        self.trunk = _trunk((24, 48, 72, 128))
        self.project = nn.Linear(128 * 4 * 4, width)
        self.words = nn.Embedding(len(_vocabulary()) + 2, width)
        self.places = nn.Parameter(0.02 * torch.randn(_MAX_WORDS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, 96] of images [B, 3, 64, 64] in [-1, 1]."""
        return functional.normalize(self.project(self.trunk(images).flatten(1)), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, 96] of texts, from their first words."""
        ids = torch.tensor([_word_ids(text) for text in texts])
        filled = ids != _PAD
        hidden = self.text(self.words(ids) + self.places, src_key_padding_mask=~filled)
        return functional.normalize((hidden * filled[:, :, None]).sum(1), dim=-1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def _trunk(widths: Sequence[int]) -> nn.Sequential:
    """[B, 3, 64, 64] to [B, widths[-1], n, n] with n = 64 / 2^levels."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), _Block(widths[0])]
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), _Block(wide)]
    return nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.SiLU())


# --- words -----------------------------------------------------------------------------------------------------------


_PAD, _UNKNOWN = 0, 1


@cache
def _vocabulary() -> dict[str, int]:
    words = {word for phrases in attribute_words().values() for phrase in phrases if phrase != ABSENT for word in phrase.split()}
    words |= {"a", "an", "on", "in", "with", "and", "background", "plant", "hair", "hat"}
    return {word: index for index, word in enumerate(sorted(words), start=2)}


def _word_ids(text: str) -> list[int]:
    ids = [_vocabulary().get(word, _UNKNOWN) for word in re.findall(r"[a-z]+", text.lower())][:_MAX_WORDS] or [_UNKNOWN]
    return ids + [_PAD] * (_MAX_WORDS - len(ids))


# --- use -------------------------------------------------------------------------------------------------------------


def load_probe(folder: Path = FOLDER) -> AttributeProbe:
    """The trained probe."""
    return _load(AttributeProbe(), folder / "probe.safetensors")


def load_dual_encoder(folder: Path = FOLDER) -> DualEncoder:
    """The trained dual encoder."""
    return _load(DualEncoder(), folder / "dual_encoder.safetensors")


def _load(network: _Network, file: Path) -> _Network:
    from safetensors.torch import load_file

    network.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


# --- training --------------------------------------------------------------------------------------------------------


def train(out: Path) -> None:
    """Fit both networks and write `out/avatars-evaluators`, half precision."""
    from safetensors.torch import save_file

    if (out / FOLDER.name).exists():
        raise TrainingError(f"{out / FOLDER.name} exists; choose another --out or remove it")
    images, scenes = rendered(out / "renders", tuple(KINDS), _TRAIN_SEED, _TRAIN_IMAGES, SIZE)
    held_back, held_back_scenes = rendered(out / "renders", tuple(KINDS), _HELD_BACK_SEED, _HELD_BACK_IMAGES, SIZE)
    torch.manual_seed(_SEED)
    probe, dual = AttributeProbe(), DualEncoder()
    labels = {name: torch.from_numpy(found) for name, found in attribute_labels(scenes).items()}

    def probe_loss(step: int) -> Tensor:
        rng, generator = step_generator(_SEED, step)
        chosen = rng.integers(0, len(images), _RECIPES["probe"].batch_size)
        _, logits = probe(_roughened(to_input(images[chosen]), generator))
        losses = [
            functional.cross_entropy(logits[name], labels[name][chosen], ignore_index=-1, reduction="sum") for name in logits
        ]
        return torch.stack(losses).sum() / len(chosen)

    def dual_loss(step: int) -> Tensor:
        rng, generator = step_generator(_SEED + 1, step)
        words = random.Random(int(rng.integers(2**62)))
        chosen = rng.integers(0, len(images), _RECIPES["dual_encoder"].batch_size)
        seen = dual.encode_images(_roughened(to_input(images[chosen]), generator))
        read = dual.encode_texts([caption(scenes[index], words) for index in chosen])
        logits = dual.log_scale.clamp(max=4.6).exp() * seen @ read.T
        pairs = torch.arange(len(chosen))
        return (functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)) / 2

    fit("probe", probe, probe_loss, _RECIPES["probe"], out, ema_decay=0.998, report=lambda: "")
    with torch.no_grad():
        features = torch.cat([probe(to_input(part))[0] for part in np.array_split(held_back, 20)])
        probe.feature_mean.copy_(features.mean(0))
        probe.feature_std.copy_(features.std(0))
    for name, share in probe_accuracy(probe, held_back, held_back_scenes).items():
        print(f"probe {name}: {share:.3f} on {len(held_back)} held-back renders")
    fit("dual_encoder", dual, dual_loss, _RECIPES["dual_encoder"], out, ema_decay=0.998, report=lambda: "")
    with new_folder(out / FOLDER.name) as folder:
        for name, network in (("probe", probe), ("dual_encoder", dual)):
            weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")


def _roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A little blur and noise on half of the images, so that a soft edge does not change what is read."""
    count = len(pixels)
    blur, noise = torch.rand(2, count, 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0)
    soft = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    rough = pixels + blur * (soft - pixels) + 0.1 * noise * torch.randn(pixels.shape, generator=generator)
    return rough.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def probe_accuracy(probe: AttributeProbe, images: NDArray[np.uint8], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of right readings per attribute, in [0, 1], among the scenes whose kind has it; `images` are [N, H, W, 3]."""
    labels = attribute_labels(scenes)
    logits = [probe(to_input(images[start : start + 256]))[1] for start in range(0, len(images), 256)]
    result = {}
    for name in labels:
        read = torch.cat([batch[name] for batch in logits]).argmax(1).numpy()
        known = labels[name] >= 0
        result[name] = float((read == labels[name])[known].mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    try:
        train(parser.parse_args().out)
    except FlashdiffError as error:
        raise SystemExit(f"evaluators: error: {error}") from None


if __name__ == "__main__":
    main()
