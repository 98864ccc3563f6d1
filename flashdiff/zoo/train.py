"""The recipe of the embedded model: renders -> VAE -> text encoder -> UNet -> a Stable Diffusion directory.

    python -m flashdiff.zoo.train flashdiff/zoo/avatars.toml --out runs/avatars

A killed run goes on where it was when the same command is given again. The random numbers of an update depend on the
seed and the update alone, so a resumed run repeats the unbroken one.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from flashdiff.checkpoint import load_state, save_state, step_generator
from flashdiff.config import Record, load_recipe
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.files import new_folder, write_whole
from flashdiff.schedule import NoiseSchedule
from flashdiff.zoo.fit import StageRecipe, fit
from flashdiff.zoo.images import rendered
from flashdiff.zoo.world import KINDS, Scene, attribute_labels, attribute_words, caption, full_caption

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's

_VALIDATION_IMAGES = 2000
_VALIDATION_SEED = 10_000_000  # far beyond any training seed


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"'{kind}' is none of {', '.join(KINDS)}")
    return kind


KindName = Annotated[str, AfterValidator(_known)]


class WorldRecipe(Record):
    kinds: tuple[KindName, ...] = Field(tuple(KINDS), min_length=1)
    image_size: int = Field(64, ge=8)
    train_images: int = Field(40_000, ge=1)


class VaeRecipe(StageRecipe):
    channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    """Residual blocks per resolution; the decoder runs in every request, the encoder only where one brings an image."""
    latent_channels: int
    latent_noise: float = 0.05
    """Noise on the latents while training, the fixed variance of this autoencoder: it keeps the latent space smooth."""
    crop: int = 32
    """Side of the random crops seen in the first seven eighths: the network is convolutional and has no norms, so
    small crops teach it as much per pixel and give four times the updates."""


class TextRecipe(StageRecipe):
    """The text encoder; its `images` are captions."""

    width: int = 128
    layers: int = 2
    tokens: int = 32
    vocabulary: int = 1000


class DenoiserRecipe(StageRecipe):
    block_out_channels: tuple[int, ...]
    caption_dropout: float = 0.1
    ema_decay: float = 0.999


class Recipe(Record):
    seed: int = 0
    world: WorldRecipe
    vae: VaeRecipe
    text: TextRecipe
    denoiser: DenoiserRecipe

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        if not 1 <= self.vae.crop <= self.world.image_size:
            raise ValueError(f"vae.crop must be at most world.image_size ({self.world.image_size}), not {self.vae.crop}")
        return self


def train(recipe: Recipe, out: Path) -> None:
    """Run every stage that `out` does not hold yet; the model directory is `out/model`."""
    if (out / "model").exists():
        raise TrainingError(f"{out} holds a finished model; choose another --out or remove it")
    resolved = out / "recipe.json"
    if resolved.exists() and json.loads(resolved.read_text()) != recipe.model_dump(mode="json"):
        raise TrainingError(f"{out} holds a run of another recipe; choose another --out or remove it")
    world = recipe.world
    cache = out / "renders"
    images, scenes = rendered(cache, world.kinds, 0, world.train_images, world.image_size)
    held_back, _ = rendered(cache, world.kinds, _VALIDATION_SEED, _VALIDATION_IMAGES, world.image_size)
    write_whole(resolved, recipe.model_dump_json(indent=2) + "\n")

    vae = make_vae(recipe)
    tokenizer = make_tokenizer(scenes, recipe)
    train_vae(vae, images, held_back, recipe, out)
    psnr = reconstruction_psnr(vae, held_back)
    print(f"VAE: {psnr:.2f} dB PSNR on {len(held_back)} held-back renders", flush=True)

    encoded = out / "latents.pt"
    if not encoded.exists():
        save_state(encoded, {"latents": encode_all(vae, images)})
    latents = load_state(encoded)["latents"]
    text_encoder = make_text_encoder(recipe, vocabulary=len(tokenizer))
    train_text_encoder(text_encoder, tokenizer, scenes, recipe, out)
    unet = make_unet(recipe)
    scale = 1.0 / float(latents.std())
    train_unet(unet, text_encoder, tokenizer, latents, scale, scenes, recipe, out)
    vae.register_to_config(scaling_factor=scale)
    export(out / "model", vae, unet, text_encoder, tokenizer)


# --- the parts -------------------------------------------------------------------------------------------------------


def make_vae(recipe: Recipe) -> Any:
    """AutoencoderTiny, the architecture of TAESD: at two steps a request, the decoder is a third of the time."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(recipe.seed)
    vae = recipe.vae
    return AutoencoderTiny(
        encoder_block_out_channels=(vae.channels,) * len(vae.encoder_blocks),
        decoder_block_out_channels=(vae.channels,) * len(vae.decoder_blocks),
        num_encoder_blocks=vae.encoder_blocks,
        num_decoder_blocks=vae.decoder_blocks,
        latent_channels=vae.latent_channels,
    )


def make_unet(recipe: Recipe) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(recipe.seed + 1)
    denoiser = recipe.denoiser
    inner = len(denoiser.block_out_channels) - 1
    return UNet2DConditionModel(
        sample_size=recipe.world.image_size // 2 ** (len(recipe.vae.decoder_blocks) - 1),
        in_channels=recipe.vae.latent_channels,
        out_channels=recipe.vae.latent_channels,
        block_out_channels=denoiser.block_out_channels,
        # Attention only inside: on the largest map it would cost more than all the rest.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * inner),
        up_block_types=(*("CrossAttnUpBlock2D",) * inner, "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=recipe.text.width,
        attention_head_dim=4,
    )


def make_text_encoder(recipe: Recipe, vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(recipe.seed + 2)
    text = recipe.text
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=4,
            max_position_embeddings=text.tokens,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


class CaptionReader(torch.nn.Module):
    """Hidden states [B, tokens, width] to the logits of every attribute's words.

    One query per attribute attends to the tokens, as the UNet's cross-attention will.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        words = attribute_words()
        self.queries = torch.nn.Parameter(torch.randn(len(words), width) / width**0.5)
        self.key, self.value = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, len(choices)) for name, choices in words.items()})

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        scores = self.queries @ self.key(hidden).transpose(1, 2)
        read = scores.softmax(-1) @ self.value(hidden)
        return {name: head(read[:, place]) for place, (name, head) in enumerate(self.heads.items())}


def make_tokenizer(scenes: Sequence[Scene], recipe: Recipe) -> Any:
    """A CLIP tokenizer whose byte-pair merges are learned from the captions; any other text still has tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = random.Random(recipe.seed)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.text.vocabulary - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator((caption(scene, rng).replace(",", " ,") for scene in scenes[:20_000]), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(merge) for merge in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,  # type: ignore[arg-type]  # pairs, not text, is what it takes
        model_max_length=recipe.text.tokens,
    )


# --- training --------------------------------------------------------------------------------------------------------


def train_vae(vae: Any, images: NDArray[np.uint8], held_back: NDArray[np.uint8], recipe: Recipe, out: Path) -> None:
    """Reconstruction (L1 + 2 L2) through noisy latents, in place."""
    stage = recipe.vae
    full_from = 7 * (stage.images // stage.batch_size) // 8

    def loss_of(step: int) -> Tensor:
        rng, generator = step_generator(recipe.seed, step)
        pixels = to_pixels(images[rng.integers(0, len(images), stage.batch_size)])
        if step < full_from:
            top, left = rng.integers(0, pixels.shape[-1] - stage.crop + 1, 2)
            pixels = pixels[:, :, top : top + stage.crop, left : left + stage.crop]
        latents = vae.encode(pixels).latents
        noisy = latents + stage.latent_noise * torch.randn(latents.shape, generator=generator)
        error = vae.decode(noisy).sample - pixels
        return error.abs().mean() + 2 * error.square().mean() + 1e-3 * latents.square().mean()

    fit("vae", vae, loss_of, stage, out, ema_decay=None, report=lambda: f"{reconstruction_psnr(vae, held_back[:128]):.2f} dB")


def train_text_encoder(text_encoder: Any, tokenizer: Any, scenes: Sequence[Scene], recipe: Recipe, out: Path) -> None:
    """The encoder learns to say what the image of a caption shows, in place; then it is frozen, as Stable Diffusion's is.

    Learned with the UNet instead, words for details of low contrast stay unread: 200,000 images taught it the eyes, but not
    the rings and patterns, whose share of the loss is a hundredth of theirs.
    """
    stage = recipe.text
    torch.manual_seed(recipe.seed + 3)
    reader = CaptionReader(stage.width)
    labels = {name: torch.from_numpy(found) for name, found in attribute_labels(scenes).items()}

    def loss_of(step: int) -> Tensor:
        rng, _ = step_generator(recipe.seed + 2, step)
        words = random.Random(int(rng.integers(2**62)))
        chosen = rng.integers(0, len(scenes), stage.batch_size)
        texts = [caption(scenes[index], words) for index in chosen]
        logits = reader(text_encoder(_token_ids(tokenizer, texts)).last_hidden_state)
        losses = [
            torch.nn.functional.cross_entropy(logits[name], labels[name][chosen], ignore_index=-1, reduction="sum")
            for name in logits
        ]
        return torch.stack(losses).sum() / len(chosen)

    @torch.no_grad()
    def report() -> str:
        """Share of attributes read right off captions that say everything."""
        logits = reader(text_encoder(_token_ids(tokenizer, [full_caption(scene) for scene in scenes[:500]])).last_hidden_state)
        right = [(logits[name].argmax(1) == labels[name][:500])[labels[name][:500] >= 0] for name in logits]
        return f"{torch.cat(right).float().mean():.3f} read"

    fit("text", torch.nn.ModuleList([text_encoder, reader]), loss_of, stage, out, ema_decay=None, report=report)
    text_encoder.requires_grad_(False)


def train_unet(
    unet: Any,
    text_encoder: Any,
    tokenizer: Any,
    latents: Tensor,
    scale: float,
    scenes: Sequence[Scene],
    recipe: Recipe,
    out: Path,
) -> None:
    """v-prediction (Salimans & Ho 2022, eq. 9) of text-conditioned latents, in place; the weights left are the EMA."""
    stage = recipe.denoiser
    alphas, sigmas = (torch.from_numpy(values).float() for values in SCHEDULE.levels(list(range(SCHEDULE.num_train_timesteps))))

    def loss_of(step: int) -> Tensor:
        rng, generator = step_generator(recipe.seed + 1, step)
        words = random.Random(int(rng.integers(2**62)))
        chosen = rng.integers(0, len(scenes), stage.batch_size)
        texts = ["" if words.random() < stage.caption_dropout else caption(scenes[index], words) for index in chosen]
        hidden = text_encoder(_token_ids(tokenizer, texts)).last_hidden_state

        x0 = latents[torch.from_numpy(chosen)] * scale
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, len(alphas), (len(chosen),), generator=generator)
        alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
        x_t, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        return torch.nn.functional.mse_loss(unet(x_t, t, hidden).sample, v)

    fit("denoiser", unet, loss_of, stage, out, ema_decay=stage.ema_decay, report=lambda: "")


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    ids: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


# --- images and latents ----------------------------------------------------------------------------------------------


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] as float [B, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_all(vae: Any, images: NDArray[np.uint8]) -> Tensor:
    """Unscaled latents [N, C, h, w] of all images."""
    return torch.cat([vae.encode(to_pixels(images[i : i + 256])).latents for i in range(0, len(images), 256)])


@torch.no_grad()
def reconstruction_psnr(vae: Any, images: NDArray[np.uint8]) -> float:
    """PSNR in dB of encode and decode, over all pixels of all images."""
    pixels = to_pixels(images)
    decoded = torch.cat([vae.decode(vae.encode(part).latents).sample for part in pixels.split(128)])
    return float(-10 * torch.log10(((decoded.clamp(-1, 1) - pixels) / 2).square().mean()))


def export(target: Path, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Write the Stable Diffusion directory, weights in half precision."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        **SCHEDULE.model_dump(),
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae.half(),
        unet=unet.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with new_folder(target) as folder:
        pipeline.save_pretrained(folder)
        # AutoencoderTiny derives block_out_channels, and warns on loading when it is given.
        _edit_config(folder / "vae", lambda config: config.pop("block_out_channels"))
        # Left at float16, transformers would load a half-precision text encoder beside diffusers' float32 UNet.
        _edit_config(folder / "text_encoder", lambda config: config.update(dtype="float32"))


def _edit_config(part: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((part / "config.json").read_text())
    edit(config)
    write_whole(part / "config.json", json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        train(load_recipe(options.recipe, Recipe), options.out)
    except FlashdiffError as error:
        raise SystemExit(f"train: error: {error}") from None


if __name__ == "__main__":
    main()
