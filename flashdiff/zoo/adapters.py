"""T2I-adapters of the embedded model: its denoiser learns to follow edges or silhouettes.

    python -m flashdiff.zoo.adapters edges --out runs/edges

Only the adapter learns, on the objective, the noise and the captions that its base was trained with. The control images are drawn
from the renders. The same command resumes a killed run.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdiff import defaults
from flashdiff.errors import FlashdiffError, TrainingError
from flashdiff.families import find_base
from flashdiff.families.control import RECORD, ControlInfo
from flashdiff.families.files import base_hash
from flashdiff.families.prints import prints_of
from flashdiff.files import new_folder, write_whole
from flashdiff.locks import sole_user
from flashdiff.zoo.control_images import CONTROLS
from flashdiff.zoo.denoiser import Batches
from flashdiff.zoo.fit import StageRecipe, fit
from flashdiff.zoo.images import render_cache, rendered
from flashdiff.zoo.initial import load_parts
from flashdiff.zoo.vae import encode_all
from flashdiff.zoo.world import KINDS

BASE = "avatars"
RECIPES = {
    "edges": StageRecipe(batch_size=16, images=32_000, learning_rate=3e-3),
    "silhouettes": StageRecipe(batch_size=16, images=16_000, learning_rate=3e-3),
}
SEEDS = {"edges": 77, "silhouettes": 78}
_CAPTION_DROPOUT, _EMA_DECAY = 0.1, 0.995


def make_adapter(unet: Any, seed: int) -> Any:
    """An untrained adapter for a UNet of the embedded model's form: one feature a level, at the size where the level adds it."""
    from diffusers import T2IAdapter

    torch.manual_seed(seed)
    widths = unet.config.block_out_channels
    # The first level has no attention, so its feature is added when it has been halved, as in SDXL.
    return T2IAdapter(in_channels=1, channels=list(widths), num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl")


def train(name: str, out: Path, recipe: StageRecipe, *, pictures: int = defaults.REFERENCE_COUNT) -> None:
    """Train the adapter for a control of `CONTROLS`, and write it to `out/avatars-NAME`; TrainingError when it is there."""
    target = out / f"{BASE}-{name}"
    if target.exists():
        raise TrainingError(f"{out} holds a finished adapter; choose another --out or remove it")
    with sole_user(out / "lock", TrainingError(f"another process trains in {out} now; choose another --out or wait for its end")):
        parts = load_parts(find_base(BASE))
        images, scenes = rendered(render_cache(), tuple(KINDS), 0, pictures, 64)
        controls = torch.from_numpy(np.stack([CONTROLS[name](image) for image in images]))[:, None].float()
        batches = Batches(
            parts.text_encoder, parts.tokenizer, encode_all(parts.vae, images), parts.vae.config.scaling_factor, scenes,
            seed=SEEDS[name], size=recipe.batch_size, caption_dropout=_CAPTION_DROPOUT,
        )  # fmt: skip
        parts.unet.to(memory_format=torch.channels_last)
        adapter = make_adapter(parts.unet, SEEDS[name])

        def loss_of(step: int) -> Tensor:
            batch = batches.draw(step)
            features = adapter(controls[batch.rows])
            output = parts.unet(batch.x_t, batch.t, batch.hidden, down_intrablock_additional_residuals=features).sample
            return (output - batch.v).square().mean()

        fit(name, adapter, loss_of, recipe, out, ema_decay=_EMA_DECAY, report=lambda: "")
        export(target, adapter, name)


def export(target: Path, adapter: Any, name: str) -> None:
    """Write the adapter as diffusers has it, weights in half precision, with the record of its base."""
    base = find_base(BASE)
    info = ControlInfo(control=name, base=BASE, base_hash=base_hash(base), base_prints=prints_of(base))
    with new_folder(target) as folder:
        adapter.half().save_pretrained(folder)
        write_whole(folder / RECORD, info.model_dump_json(indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("control", choices=tuple(CONTROLS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        train(options.control, options.out, RECIPES[options.control])
    except FlashdiffError as error:
        raise SystemExit(f"adapters: error: {error}") from None


if __name__ == "__main__":
    main()
