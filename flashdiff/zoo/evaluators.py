"""Evaluation networks of the embedded world: probes that read attributes off pixels, and a dual encoder that scores text.

    python -m flashdiff.zoo.evaluators --out runs/evaluators

They are trained on renders of seed ranges of their own, and none is used in any loss. Their numbers are comparable
only with each other: a score here is not a CLIP score, a distance here is not an Inception distance.
"""

import argparse
import itertools
import random
import re
from collections.abc import Mapping, Sequence
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
from flashdiff.zoo.fit import StageRecipe, device, fit
from flashdiff.zoo.images import rendered, to_input
from flashdiff.zoo.world import ABSENT, KINDS, Scene, attribute_labels, attribute_words, caption

FOLDER = Path(__file__).parent / "avatars-evaluators"
SIZE = 64
"""Side of the images that the networks take."""
IDENTITY = tuple(name for name in attribute_words() if name != "background")
"""What an image and a reference of it on another background have in common."""

_TRAIN_SEED, _TRAIN_IMAGES = 20_000_000, 36_000
_HELD_BACK_SEED, _HELD_BACK_IMAGES = 25_000_000, 3_000
_IDENTITY_SEED, _IDENTITY_IMAGES = 60_000_000, 20_000
_IDENTITY_HELD_BACK_SEED = 65_000_000
_RECIPES = {
    "probe": StageRecipe(batch_size=64, images=128_000, learning_rate=3e-3),
    "dual_encoder": StageRecipe(batch_size=128, images=80_000, learning_rate=3e-3),
    "identity_probe": StageRecipe(batch_size=64, images=128_000, learning_rate=3e-3),
}
_SEED = 1234  # another than any that trains a model
_SECOND_SEED = 4321
_MAX_WORDS = 40

_Network = TypeVar("_Network", bound=nn.Module)


class Probe(nn.Module):
    """Images [B, 3, 64, 64] in [-1, 1] to features [B, 128] and, for every attribute, the logits of its words.

    Features have mean 0 and variance 1 over real renders, so that distances between them have a scale.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, trunk: nn.Module, width: int, attributes: Sequence[str]) -> None:
        super().__init__()
        self.trunk = trunk
        self.features = nn.Linear(width, 128)
        self.register_buffer("feature_mean", torch.zeros(128))
        self.register_buffer("feature_std", torch.ones(128))
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(attribute_words()[name])) for name in attributes})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features [B, 128], and by attribute the logits [B, words], of images [B, 3, 64, 64] in [-1, 1]."""
        features = self.features(self.trunk(images).flatten(1))
        logits = {name: head(functional.silu(features)) for name, head in self.heads.items()}
        return (features - self.feature_mean) / self.feature_std, logits


class AttributeProbe(Probe):
    """Convolutions, whose 8x8 map is not pooled: eyes and mouths have their places."""

    def __init__(self) -> None:
        super().__init__(_trunk((32, 64, 96)), 96 * 8 * 8, tuple(attribute_words()))


class IdentityProbe(Probe):
    """Of all attributes but the background, by another form: a transformer reads 64 tokens, and learned queries gather them.

    It judges whether an image shows what a reference does, next to networks that were trained to carry that.
    """

    def __init__(self) -> None:
        super().__init__(_Tokens(96, 8), 96 * 8, IDENTITY)


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
        ids = torch.tensor([_word_ids(text) for text in texts], device=self.places.device)
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


class _Tokens(nn.Module):
    """[B, 3, 64, 64] to what each query finds among 64 tokens [B, queries, width]."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1),
        )  # fmt: skip
        self.places = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(queries, width) / width**0.5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.layers(self.stem(images).flatten(2).transpose(1, 2) + self.places))
        return (tokens @ self.queries.T).softmax(1).transpose(1, 2) @ tokens


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


def load_identity_probe(folder: Path = FOLDER) -> IdentityProbe:
    """The trained second probe."""
    return _load(IdentityProbe(), folder / "identity_probe.safetensors")


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
    """Fit the networks and write `out/avatars-evaluators`, half precision."""
    from safetensors.torch import save_file

    if (out / FOLDER.name).exists():
        raise TrainingError(f"{out / FOLDER.name} exists; choose another --out or remove it")
    torch.manual_seed(_SEED)
    probe, dual = AttributeProbe(), DualEncoder()
    _fit_probe("probe", probe, out, _SEED, (_TRAIN_SEED, _TRAIN_IMAGES), _HELD_BACK_SEED)
    _fit_dual_encoder(dual, out)
    with new_folder(out / FOLDER.name) as folder:
        for name, network in (("probe", probe), ("dual_encoder", dual), ("identity_probe", train_identity_probe(out))):
            weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")


def train_identity_probe(out: Path) -> IdentityProbe:
    """The second probe, fitted from another seed on other renders; checkpoints and renders are kept in `out`."""
    torch.manual_seed(_SECOND_SEED)
    probe = IdentityProbe()
    _fit_probe("identity_probe", probe, out, _SECOND_SEED, (_IDENTITY_SEED, _IDENTITY_IMAGES), _IDENTITY_HELD_BACK_SEED)
    return probe


def _fit_probe(name: str, probe: Probe, out: Path, seed: int, renders: tuple[int, int], held_back_seed: int) -> None:
    images, scenes = rendered(out / "renders", tuple(KINDS), *renders, SIZE)
    held_back, held_back_scenes = rendered(out / "renders", tuple(KINDS), held_back_seed, _HELD_BACK_IMAGES, SIZE)
    labels = {name: torch.from_numpy(found) for name, found in attribute_labels(scenes).items()}

    def loss_of(step: int) -> Tensor:
        rng, generator = step_generator(seed, step)
        chosen = rng.integers(0, len(images), _RECIPES[name].batch_size)
        return naming_loss(probe(roughened(to_input(images[chosen]), generator).to(device()))[1], labels, chosen)

    fit(name, probe, loss_of, _RECIPES[name], out, ema_decay=0.998, report=lambda: "")
    with torch.no_grad():
        features = torch.cat([probe(to_input(part))[0] for part in np.array_split(held_back, 20)])
        probe.feature_mean.copy_(features.mean(0))
        probe.feature_std.copy_(features.std(0))
    for attribute, share in probe_accuracy(probe, held_back, held_back_scenes).items():
        print(f"{name} {attribute}: {share:.3f} on {len(held_back)} held-back renders")


def _fit_dual_encoder(dual: DualEncoder, out: Path) -> None:
    images, scenes = rendered(out / "renders", tuple(KINDS), _TRAIN_SEED, _TRAIN_IMAGES, SIZE)

    def loss_of(step: int) -> Tensor:
        rng, generator = step_generator(_SEED + 1, step)
        words = random.Random(int(rng.integers(2**62)))
        chosen = rng.integers(0, len(images), _RECIPES["dual_encoder"].batch_size)
        seen = dual.encode_images(roughened(to_input(images[chosen]), generator).to(device()))
        read = dual.encode_texts([caption(scenes[index], words) for index in chosen])
        logits = dual.log_scale.clamp(max=4.6).exp() * seen @ read.T
        pairs = torch.arange(len(chosen), device=device())
        return (functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)) / 2

    fit("dual_encoder", dual, loss_of, _RECIPES["dual_encoder"], out, ema_decay=0.998, report=lambda: "")


def naming_loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], chosen: NDArray[np.int64]) -> Tensor:
    """Cross-entropy [] an image of logits [B, words] by name, where the labels [N] of the chosen rows [B] are not -1."""
    losses = [
        functional.cross_entropy(of, labels[name][chosen].to(of.device), ignore_index=-1, reduction="sum")
        for name, of in logits.items()
    ]
    return torch.stack(losses).sum() / len(chosen)


def roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A little blur and noise on half of the images, so that a soft edge does not change what is read."""
    count = len(pixels)
    blur, noise = torch.rand(2, count, 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0)
    soft = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    rough = pixels + blur * (soft - pixels) + 0.1 * noise * torch.randn(pixels.shape, generator=generator)
    return rough.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def probe_accuracy(probe: Probe, images: NDArray[np.uint8], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of right readings per attribute, in [0, 1], among the scenes whose kind has it; `images` are [N, H, W, 3]."""
    labels = attribute_labels(scenes)
    logits = [probe(to_input(images[start : start + 256]))[1] for start in range(0, len(images), 256)]
    result = {}
    for name in logits[0]:
        read = torch.cat([batch[name] for batch in logits]).argmax(1).numpy()
        known = labels[name] >= 0
        result[name] = float((read == labels[name])[known].mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    try:
        train(parser.parse_args().out)
    except (FlashdiffError, OSError) as error:
        raise SystemExit(f"evaluators: error: {error}") from None


if __name__ == "__main__":
    main()
