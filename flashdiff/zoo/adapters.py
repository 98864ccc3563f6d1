"""Networks that steer the embedded model: T2I-adapters for edges and silhouettes, and a ControlNet for small pictures.

    python -m flashdiff.zoo.adapters edges --out runs/edges

Only the network learns, on the objective, the noise and the captions that its base was trained with. The control images are drawn
from the renders. The same command resumes a killed run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Resampling
from torch import Tensor

from flashdiff import defaults
from flashdiff.checkpoint import step_generator
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.families import find_base
from flashdiff.families.control import RECORD, ControlInfo
from flashdiff.files import new_folder, write_whole
from flashdiff.locks import sole_user
from flashdiff.orders import Pixels
from flashdiff.zoo.control_images import CONTROLS, TILE, tile
from flashdiff.zoo.denoiser import Batch, Batches
from flashdiff.zoo.fit import StageRecipe, device, fit
from flashdiff.zoo.images import render_cache, rendered
from flashdiff.zoo.initial import load_parts
from flashdiff.zoo.vae import encode_all
from flashdiff.zoo.world import KINDS

BASE = "avatars"
_CAPTION_DROPOUT, _EMA_DECAY = 0.1, 0.995
_NOISY, _MOST_NOISE = 0.25, 10.0
"""The share of small pictures with noise, and its largest standard deviation in levels of 255."""


def varied_tile(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """`tile` of a picture, made by filters that programs commonly use; some small pictures have noise."""
    height, width, _ = picture.shape
    shrink = (Resampling.LANCZOS, Resampling.BICUBIC, Resampling.BOX)[rng.integers(3)]
    enlarge = (Resampling.LANCZOS, Resampling.BICUBIC)[rng.integers(2)]
    deviation = np.float32(rng.uniform(0, _MOST_NOISE) if rng.random() < _NOISY else 0)
    return tile(picture, shrink, enlarge, deviation * rng.standard_normal((height // 2, width // 2, 3), np.float32))


def make_adapter(unet: Any, seed: int) -> Any:
    """An untrained adapter for a UNet of the embedded model's form: one feature a level, at the size where the level adds it."""
    from diffusers import T2IAdapter

    torch.manual_seed(seed)
    widths = unet.config.block_out_channels
    # The first level has no attention, so its feature is added when it has been halved, as in SDXL.
    return T2IAdapter(in_channels=1, channels=list(widths), num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl")


def make_controlnet(unet: Any, seed: int) -> Any:
    """An untrained ControlNet for a UNet of the embedded model's form: a copy of its encoder, without the attention."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    widths = unet.config.block_out_channels
    network: Any = ControlNetModel(
        in_channels=unet.config.in_channels, down_block_types=("DownBlock2D",) * len(widths), mid_block_type="UNetMidBlock2D",
        block_out_channels=widths, layers_per_block=unet.config.layers_per_block,
        cross_attention_dim=unet.config.cross_attention_dim, conditioning_embedding_out_channels=(16, 32, 64),
    )  # fmt: skip
    own = network.state_dict()
    network.load_state_dict({name: values for name, values in unet.state_dict().items() if name in own}, strict=False)
    return network


@dataclass(frozen=True, kw_only=True)
class ControlRecipe:
    """The form of a control network and its training."""

    make: Callable[[Any, int], Any]
    channels: int
    """Of its image: 1, grey, or 3."""
    stage: StageRecipe
    seed: int
    embedding: StageRecipe | None = None
    """Of what embeds a ControlNet's image, before `stage`."""


RECIPES = {
    "edges": ControlRecipe(
        make=make_adapter, channels=1, stage=StageRecipe(batch_size=16, images=32_000, learning_rate=3e-3), seed=77
    ),
    "silhouettes": ControlRecipe(
        make=make_adapter, channels=1, stage=StageRecipe(batch_size=16, images=16_000, learning_rate=3e-3), seed=78
    ),
    TILE: ControlRecipe(
        make=make_controlnet, channels=3, stage=StageRecipe(batch_size=16, images=28_000, learning_rate=3e-3), seed=79,
        embedding=StageRecipe(batch_size=16, images=16_000, learning_rate=3e-3),
    ),
}  # fmt: skip


def train(name: str, out: Path, recipe: ControlRecipe, *, pictures: int = defaults.REFERENCE_COUNT) -> None:
    """Train the network for a control of `CONTROLS`, and write it to `out/avatars-NAME`; TrainingError when it is there."""
    target = out / f"{BASE}-{name}"
    if target.exists():
        raise TrainingError(f"{out} holds a finished network; choose another --out or remove it")
    with sole_user(out / "lock", TrainingError(f"another process trains in {out} now; choose another --out or wait for its end")):
        parts = load_parts(find_base(BASE))
        images, scenes = rendered(render_cache(), tuple(KINDS), 0, pictures, 64)
        controls = _controls(name, images, recipe)
        batches = Batches(
            parts.text_encoder.to(device()), parts.tokenizer,
            encode_all(parts.vae, images), parts.vae.config.scaling_factor, scenes,
            seed=recipe.seed, size=recipe.stage.batch_size, caption_dropout=_CAPTION_DROPOUT,
        )  # fmt: skip
        network = recipe.make(parts.unet, recipe.seed)
        parts.unet.to(device(), memory_format=torch.channels_last)
        if recipe.embedding:
            _fit_embedding(name, network, controls, batches, recipe.embedding, out)

        def loss_of(step: int) -> Tensor:
            batch = batches.draw(step)
            residuals = _residuals(network, batch, _as_input(controls[batch.rows]))
            output = parts.unet(batch.x_t, batch.t, batch.hidden, **residuals).sample
            return (output - batch.v).square().mean()

        fit(name, network, loss_of, recipe.stage, out, ema_decay=_EMA_DECAY, report=lambda: "")
        export(target, network, name)


def _controls(name: str, images: NDArray[np.uint8], recipe: ControlRecipe) -> Tensor:
    """The control images of pictures [N, H, W, 3], uint8 [N, C, H, W]."""
    rng = np.random.default_rng(recipe.seed)
    draw = partial(varied_tile, rng=rng) if name == TILE else CONTROLS[name]
    drawn = np.stack([draw(image)[..., : recipe.channels] for image in images])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2)


def _as_input(controls: Tensor) -> Tensor:
    """Control images [B, C, H, W] as networks take them: in [0, 1], where networks are fitted."""
    return controls.float().div(255).contiguous(memory_format=torch.channels_last).to(device())


def _residuals(network: Any, batch: Batch, image: Tensor) -> dict[str, Any]:
    """What the network adds to the UNet, as the UNet's arguments."""
    if hasattr(network, "adapter"):
        return {"down_intrablock_additional_residuals": network(image)}
    down, mid = network(batch.x_t, batch.t, batch.hidden, controlnet_cond=image, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _fit_embedding(name: str, network: Any, controls: Tensor, batches: Batches, stage: StageRecipe, out: Path) -> None:
    """Train what embeds the image of a ControlNet, alone: a linear layer reads the picture's latents from it.

    This is four times as fast as training all, and in all the embedding would learn it late: it starts from zeros.
    """
    embedding = network.controlnet_cond_embedding
    reader = torch.nn.Conv2d(embedding.conv_out.out_channels, batches.latents.shape[1], 1)
    read = torch.nn.Sequential(embedding, reader)

    def loss_of(step: int) -> Tensor:
        rows = step_generator(batches.seed, step)[0].integers(0, len(controls), stage.batch_size)
        latents = batches.latents[rows].to(device()) * batches.scale
        return (read(_as_input(controls[rows])) - latents).square().mean()

    fit(f"{name}-embedding", read, loss_of, stage, out, ema_decay=_EMA_DECAY, report=lambda: "")


def export(target: Path, network: Any, name: str) -> None:
    """Write the network as diffusers has it, weights in half precision, with the record of its base."""
    info = ControlInfo.of(BASE, find_base(BASE), control=name)
    with new_folder(target) as folder:
        network.half().save_pretrained(folder)
        write_whole(folder / RECORD, info.model_dump_json(indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("control", choices=tuple(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        train(options.control, options.out, RECIPES[options.control])
    except (FlashdiffError, OSError) as error:
        raise SystemExit(f"adapters: error: {error}") from None


if __name__ == "__main__":
    main()
