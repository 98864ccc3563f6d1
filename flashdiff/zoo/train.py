"""Train the embedded model: renders -> VAE -> text encoder -> UNet -> a Stable Diffusion directory.

    python -m flashdiff.zoo.train flashdiff/zoo/avatars.toml --out runs/avatars

It runs on an NVIDIA GPU where there is one. With `denoiser.init_from`, training starts from that model's denoiser, and its other
parts are kept. The same command resumes a killed run. The random numbers of an update depend on the seed and the update alone, so
a resumed run equals an uninterrupted one.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdiff.checkpoint import load_state, save_state
from flashdiff.config import load_recipe
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.files import new_folder, write_whole
from flashdiff.locks import sole_user
from flashdiff.reading import read_json
from flashdiff.zoo.denoiser import SCHEDULE, make_unet, train_unet
from flashdiff.zoo.details import detail_places
from flashdiff.zoo.images import rendered
from flashdiff.zoo.initial import Parts, initial_parts
from flashdiff.zoo.recipe import ZooRecipe
from flashdiff.zoo.text_encoder import make_text_encoder, make_tokenizer, train_text_encoder
from flashdiff.zoo.vae import encode_all, make_vae, reconstruction_psnr, train_vae
from flashdiff.zoo.world import Scene

_VALIDATION_IMAGES = 2000
_VALIDATION_SEED = 10_000_000  # far beyond any training seed


def train(recipe: ZooRecipe, out: Path) -> None:
    """Run every stage that `out` does not hold yet; the model directory is `out/model`."""
    if (out / "model").exists():
        raise TrainingError(f"{out} holds a finished model; choose another --out or remove it")
    with sole_user(out / "lock", TrainingError(f"another process trains in {out} now; choose another --out or wait for its end")):
        _check_recipe(out / "recipe.json", recipe)
        _run_stages(recipe, out)


def _check_recipe(resolved: Path, recipe: ZooRecipe) -> None:
    try:
        before = read_json(resolved) if resolved.exists() else recipe.model_dump(mode="json")
    except ValueError as error:
        raise TrainingError(f"{resolved} is damaged ({error}); choose another --out or remove it") from None
    if before != recipe.model_dump(mode="json"):
        raise TrainingError(f"{resolved.parent} holds a run of another recipe; choose another --out or remove it")


def _run_stages(recipe: ZooRecipe, out: Path) -> None:
    world = recipe.world
    images, scenes = rendered(out / "renders", world.kinds, 0, world.train_images, world.image_size)
    write_whole(out / "recipe.json", recipe.model_dump_json(indent=2) + "\n")

    parts = initial_parts(recipe) if recipe.denoiser.init_from else _new_parts(recipe, images, scenes, out)
    latents = _kept(out / "latents.pt", lambda: encode_all(parts.vae, images))
    cells = latents.shape[-1]
    if recipe.denoiser.detail_weight > 1:
        details = _kept(out / "details.pt", lambda: torch.from_numpy(detail_places(images, scenes, cells)))
    else:
        details = torch.zeros(len(images), cells, cells)
    scale = parts.vae.config.scaling_factor if recipe.denoiser.init_from else 1.0 / float(latents.std())
    train_unet(parts.unet, parts.text_encoder, parts.tokenizer, latents, scale, scenes, details, recipe, out)
    parts.vae.register_to_config(scaling_factor=scale)
    export(out / "model", *parts)


def _kept(file: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` makes, or made before a restart."""
    if not file.exists():
        save_state(file, {file.stem: make()})
    tensor: torch.Tensor = load_state(file)[file.stem]
    return tensor


def _new_parts(recipe: ZooRecipe, images: NDArray[np.uint8], scenes: Sequence[Scene], out: Path) -> Parts:
    """The trained autoencoder and text encoder, and an untrained denoiser."""
    held_back, _ = rendered(out / "renders", recipe.world.kinds, _VALIDATION_SEED, _VALIDATION_IMAGES, recipe.world.image_size)
    vae = make_vae(recipe)
    tokenizer = make_tokenizer(scenes, recipe)
    train_vae(vae, images, held_back, recipe, out)
    psnr = reconstruction_psnr(vae, held_back)
    print(f"VAE: {psnr:.2f} dB PSNR on {len(held_back)} held-back renders", flush=True)
    text_encoder = make_text_encoder(recipe, vocabulary=len(tokenizer))
    train_text_encoder(text_encoder, tokenizer, scenes, recipe, out)
    return Parts(vae, tokenizer, text_encoder, make_unet(recipe))


def export(target: Path, vae: Any, tokenizer: Any, text_encoder: Any, unet: Any) -> None:
    """Write the Stable Diffusion directory, weights in half precision."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        **SCHEDULE.model_copy(update={"set_alpha_to_one": False, "steps_offset": 1}).model_dump(),
        prediction_type="v_prediction",
        clip_sample=False,
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
        for part in ("vae", "unet"):  # of a part that was loaded, diffusers writes the folder
            _edit_config(folder / part, lambda config: config.pop("_name_or_path", None))
        # Left at float16, transformers would load a half-precision text encoder next to diffusers' float32 UNet.
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
        train(load_recipe(options.recipe, ZooRecipe), options.out)
    except (FlashdiffError, OSError) as error:
        raise SystemExit(f"train: error: {error}") from None


if __name__ == "__main__":
    main()
