"""An IP-Adapter of the embedded model: its denoiser learns to draw the figure of a reference on the prompt's background.

    python -m flashdiff.zoo.identity --out runs/identity

First an image encoder learns to name what DiceBear drew of a figure. Then the adapter learns on the objective, the noise and the
captions that its base was trained with, from pairs: two renders of one figure on different backgrounds. Base and encoder are
frozen by then. The same command resumes a killed run.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flashdiff.checkpoint import step_generator
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.families import find_base
from flashdiff.families.ip_adapter import ENCODER_FOLDER, FILE, RECORD, as_clip_normalizes
from flashdiff.families.made_for import MadeFor
from flashdiff.families.readers import UNET_READER, Reading, teach
from flashdiff.files import new_folder, write_whole
from flashdiff.locks import sole_user
from flashdiff.zoo.denoiser import Batches
from flashdiff.zoo.evaluators import naming_loss, roughened
from flashdiff.zoo.fit import StageRecipe, device, fit
from flashdiff.zoo.images import Pairs, render_cache, rendered_pairs, to_input
from flashdiff.zoo.initial import load_parts
from flashdiff.zoo.vae import encode_all
from flashdiff.zoo.world import KINDS, Scene, caption, short_caption

BASE, NAME = "avatars", "avatars-identity"
FIGURES = 16_000
SIZE = 64
ENCODER = StageRecipe(batch_size=32, images=64_000, learning_rate=3e-3)
ADAPTER = StageRecipe(batch_size=16, images=64_000, learning_rate=3e-3)
_TOKENS = 4  # of the plain form
_ENCODER_SEED, _ADAPTER_SEED = 79, 80
_HELD_BACK_SEED, _HELD_BACK = 9_000_000, 600
_CAPTION_DROPOUT, _REFERENCE_DROPOUT, _SHORT, _EMA_DECAY = 0.1, 0.1, 0.6, 0.998


# --- the encoder -----------------------------------------------------------------------------------------------------


def make_encoder() -> Any:
    """The untrained image encoder: CLIP's vision tower on a tiny scale."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(_ENCODER_SEED)
    config = CLIPVisionConfig(
        hidden_size=96, intermediate_size=288, projection_dim=256, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIZE, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


class _Namer(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to embeddings [B, D] and, for every option of a figure, the logits of its values."""

    factor: Tensor
    offset: Tensor

    def __init__(self, encoder: Any, values: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.projection_dim
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(of_option)) for name, of_option in values.items()})
        factor, offset = as_clip_normalizes()
        self.register_buffer("factor", factor)
        self.register_buffer("offset", offset)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        embeds = self.encoder(images * self.factor + self.offset).image_embeds
        return embeds, {name: head(embeds) for name, head in self.heads.items()}

    @torch.no_grad()
    def embed(self, images: NDArray[np.uint8]) -> Tensor:
        """Embeddings [N, D] of images [N, H, W, 3]."""
        return torch.cat([self(to_input(part))[0] for part in _parts(images)])


def _parts(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [images[start : start + 250] for start in range(0, len(images), 250)]


def values_of(figures: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The values that each option of the figures takes, where it takes more than one."""
    found: dict[str, set[str]] = {}
    for of in figures:
        for name, value in of.items():
            found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in sorted(found.items()) if len(values) > 1}


def labels_of(figures: Sequence[Mapping[str, str]], values: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Of every option the place of each figure's value [N]; -1 for one that its kind has not, or that is not among them."""
    places = {name: {value: place for place, value in enumerate(of_option)} for name, of_option in values.items()}
    return {name: torch.tensor([place.get(of.get(name, ""), -1) for of in figures]) for name, place in places.items()}


def train_encoder(pairs: Pairs, out: Path, recipe: StageRecipe) -> _Namer:
    """An encoder whose embeddings name what draws a figure, from pictures of it on any background."""
    values = values_of(pairs.figures)
    labels = {name: of.repeat(2) for name, of in labels_of(pairs.figures, values).items()}
    namer = _Namer(make_encoder(), values)

    def loss_of(step: int) -> Tensor:
        rng, generator = step_generator(_ENCODER_SEED, step)
        chosen = rng.integers(0, len(pairs.images), recipe.batch_size)
        pictures = roughened(to_input(pairs.images[chosen]), generator).to(device())
        return naming_loss(namer(pictures)[1], labels, chosen)

    fit("encoder", namer, loss_of, recipe, out, ema_decay=_EMA_DECAY, report=lambda: "")
    return namer.requires_grad_(False)


@torch.no_grad()
def shares_named(namer: _Namer, pairs: Pairs, values: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Share of pictures, in [0, 1], whose value of an option is named right."""
    labels = labels_of(pairs.figures, values)
    logits = [namer(to_input(part))[1] for part in _parts(pairs.images)]
    found = {}
    for name, of_option in labels.items():
        wanted, named = of_option.repeat(2), torch.cat([of[name] for of in logits]).argmax(1)
        found[name] = float((named == wanted)[wanted >= 0].float().mean())
    return found


# --- the adapter -----------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Embeddings [B, D] to what a denoiser reads. Its tensors have their published names.

    Keys and values begin as those of the prompt.
    """

    def __init__(self, unet: Any, embedding: int) -> None:
        super().__init__()
        torch.manual_seed(_ADAPTER_SEED)
        width = UNET_READER.width(unet)
        self.image_proj = nn.ModuleDict({"proj": nn.Linear(embedding, _TOKENS * width), "norm": nn.LayerNorm(width)})
        self.ip_adapter = nn.ModuleDict()
        for index, name in enumerate(teach(UNET_READER, unet)):
            attention = unet.get_submodule(name)
            layers = nn.ModuleDict()
            for which, plain in (("to_k_ip", attention.to_k), ("to_v_ip", attention.to_v)):
                layers[which] = nn.Linear(plain.in_features, plain.out_features, bias=False)
                layers[which].load_state_dict({"weight": plain.weight})
            self.ip_adapter[str(UNET_READER.number(index))] = layers

    def forward(self, embeds: Tensor) -> Reading:
        tokens = self.image_proj["norm"](self.image_proj["proj"](embeds).unflatten(1, (_TOKENS, -1)))
        layers = [self.ip_adapter.get_submodule(name) for name in self.ip_adapter]
        keys, values = ([layer.get_submodule(which)(tokens) for layer in layers] for which in ("to_k_ip", "to_v_ip"))
        return Reading(keys, values, torch.ones(len(tokens), 1, 1, device=tokens.device))


def _caption(scene: Scene, rng: random.Random) -> str:
    return short_caption(scene) if rng.random() < _SHORT else caption(scene, rng)


def train_adapter(pairs: Pairs, embeds: Tensor, out: Path, recipe: StageRecipe) -> Adapter:
    """An adapter for embeddings [2 N, D] of the pairs' pictures."""
    parts = load_parts(find_base(BASE))
    batches = Batches(
        parts.text_encoder.to(device()), parts.tokenizer,
        encode_all(parts.vae, pairs.images), parts.vae.config.scaling_factor, pairs.scenes,
        seed=_ADAPTER_SEED, size=recipe.batch_size, caption_dropout=_CAPTION_DROPOUT, caption_of=_caption,
    )  # fmt: skip
    adapter = Adapter(parts.unet, embeds.shape[1])
    parts.unet.to(device(), memory_format=torch.channels_last)

    def loss_of(step: int) -> Tensor:
        batch = batches.draw(step)
        rng, _ = step_generator(_ADAPTER_SEED + 1, step)
        kept = torch.from_numpy(rng.random(len(batch.rows)) >= _REFERENCE_DROPOUT)
        others = (batch.rows + len(embeds) // 2) % len(embeds)
        reading = adapter((embeds[others] * kept[:, None]).to(device()))
        output = parts.unet(batch.x_t, batch.t, **reading.next_to({"encoder_hidden_states": batch.hidden})).sample
        return (output - batch.v).square().mean()

    fit("adapter", adapter, loss_of, recipe, out, ema_decay=_EMA_DECAY, report=lambda: "")
    return adapter


# --- both ------------------------------------------------------------------------------------------------------------


def train(out: Path, encoder: StageRecipe, adapter: StageRecipe, *, figures: int = FIGURES) -> None:
    """Train both, and write them to `out/avatars-identity`; TrainingError when they are there."""
    target = out / NAME
    if target.exists():
        raise TrainingError(f"{out} holds a finished adapter; choose another --out or remove it")
    with sole_user(out / "lock", TrainingError(f"another process trains in {out} now; choose another --out or wait for its end")):
        pairs = rendered_pairs(render_cache(), tuple(KINDS), 0, figures, SIZE)
        namer = train_encoder(pairs, out, encoder)
        held_back = rendered_pairs(render_cache(), tuple(KINDS), _HELD_BACK_SEED, _HELD_BACK, SIZE)
        for name, share in shares_named(namer, held_back, values_of(pairs.figures)).items():
            print(f"encoder {name}: {share:.3f} on {2 * _HELD_BACK} held-back renders", flush=True)
        export(target, namer.encoder, train_adapter(pairs, namer.embed(pairs.images), out, adapter))


def export(target: Path, encoder: Any, adapter: Adapter) -> None:
    """Write an IP-Adapter as it is published, weights in half precision, with its image encoder and the record of its base."""
    from safetensors.torch import save_file

    with new_folder(target) as folder:
        save_file({name: values.half().contiguous() for name, values in adapter.state_dict().items()}, folder / FILE)
        encoder.half().save_pretrained(folder / ENCODER_FOLDER)
        write_whole(folder / RECORD, MadeFor.of(BASE, find_base(BASE)).model_dump_json(indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        train(options.out, ENCODER, ADAPTER)
    except (FlashdiffError, OSError) as error:
        raise SystemExit(f"identity: error: {error}") from None


if __name__ == "__main__":
    main()
