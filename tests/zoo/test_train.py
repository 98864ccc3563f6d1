"""The embedded model's recipe, on a toy scale: the code paths, not the quality."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flashdiff.config import load_recipe
from flashdiff.families import load_base
from flashdiff.zoo import fit
from flashdiff.zoo import train as training
from flashdiff.zoo.recipe import DenoiserRecipe, TextRecipe, VaeRecipe, WorldRecipe, ZooRecipe
from flashdiff.zoo.train import train

pytestmark = pytest.mark.slow

RECIPE = ZooRecipe(
    world=WorldRecipe(kinds=("critters", "planets"), image_size=32, train_images=40),
    vae=VaeRecipe(
        channels=16,
        encoder_blocks=(0, 1, 1),
        decoder_blocks=(1, 1, 0),
        latent_channels=4,
        crop=16,
        batch_size=4,
        images=24,
        learning_rate=1e-3,
    ),
    text=TextRecipe(width=32, vocabulary=600, batch_size=4, images=24, learning_rate=1e-3),
    denoiser=DenoiserRecipe(block_out_channels=(32, 32), batch_size=4, images=24, learning_rate=1e-3),
)


def test_the_shipped_recipe_reads() -> None:
    recipe = load_recipe(Path(training.__file__).parent / "avatars.toml", ZooRecipe)
    assert recipe.world.image_size >= 64


class KilledError(Exception):
    pass


def test_a_killed_training_goes_on_and_makes_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_VALIDATION_IMAGES", 8)
    monkeypatch.setattr(fit, "_CHECKPOINT_EVERY", 2)
    train(RECIPE, tmp_path / "whole")

    saved, save = [], fit.save_state

    def save_until_killed(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        saved.append(path)
        if len(saved) == 5:  # in the middle of the second stage
            raise KilledError

    monkeypatch.setattr(fit, "save_state", save_until_killed)
    with pytest.raises(KilledError):
        train(RECIPE, tmp_path / "broken")
    assert not (tmp_path / "broken" / "model").exists()
    monkeypatch.setattr(fit, "save_state", save)
    train(RECIPE, tmp_path / "broken")

    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        name = f"model/{part}.safetensors"
        whole, broken = (load_file(tmp_path / run / name) for run in ("whole", "broken"))
        assert all(torch.equal(whole[key], broken[key]) for key in whole)
    _, model = load_base(str(tmp_path / "whole" / "model"))
    assert model.spec.sizes[0] == (32, 32)
    assert model.call("text_encoder", model.tokenize(["a red planet"]))["encoder_hidden_states"].shape == (1, 32, 32)
