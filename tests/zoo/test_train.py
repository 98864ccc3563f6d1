"""The embedded model's recipe, on a toy scale: the code paths, not the quality."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flashdiff.config import load_recipe
from flashdiff.errors import FlashdiffError
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


UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_VALIDATION_IMAGES", 8)
    monkeypatch.setattr(fit, "_CHECKPOINT_EVERY", 2)


@pytest.fixture
def first_run(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return once("zoo", lambda out: train(RECIPE, out))


def _train_killed_once(recipe: ZooRecipe, out: Path, saves: int) -> None:
    """Killed at the save of that number, and started again."""
    saved, save = [], fit.save_state

    def save_until_killed(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        saved.append(path)
        if len(saved) == saves:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "save_state", save_until_killed)
        with pytest.raises(KilledError):
            train(recipe, out)
    assert not (out / "model").exists()
    train(recipe, out)


def _weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / f"{part}.safetensors")


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_killed_training_goes_on_and_makes_the_same_model(first_run: Path, tmp_path: Path) -> None:
    _train_killed_once(RECIPE, tmp_path / "broken", saves=5)  # in the middle of the second stage
    for part in (UNET, VAE, TEXT):
        assert _equal(_weights(first_run, part), _weights(tmp_path / "broken", part)), part
    _, model = load_base(str(first_run / "model"))
    assert model.spec.sizes[0] == (32, 32)
    assert model.call("text_encoder", model.tokenize(["a red planet"]))["encoder_hidden_states"].shape == (1, 32, 32)


def test_training_goes_on_from_another_models_denoiser(first_run: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "init_from": str(first_run / "model"),
        "layers_per_block": 2,
        "channel_weights": "whitened",
        "detail_weight": 4.0,
    }
    keys |= {"kind_weights": {"planets": 2.0}, "focus": (30, 450)}
    recipe = RECIPE.model_copy(update={"denoiser": RECIPE.denoiser.model_copy(update=keys)})
    train(recipe, tmp_path / "whole")
    _train_killed_once(recipe, tmp_path / "broken", saves=1)
    assert _equal(_weights(tmp_path / "whole", UNET), _weights(tmp_path / "broken", UNET))
    configs = [path.read_text() for path in (tmp_path / "whole" / "model").rglob("*.json")]
    assert not any(str(first_run) in text for text in configs)  # no folder of the machine that trained it
    for part in (VAE, TEXT):
        assert _equal(_weights(tmp_path / "whole", part), _weights(first_run, part)), part
    assert set(_weights(tmp_path / "whole", UNET)) > set(_weights(first_run, UNET))


def test_a_denoiser_that_computes_in_bfloat16_has_the_loss_of_one_in_float32(
    first_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compiling, which takes minutes here and is torch's own."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    losses = []
    for precision in ("float32", "bfloat16"):
        keys = {"init_from": str(first_run / "model"), "precision": precision}
        train(RECIPE.model_copy(update={"denoiser": RECIPE.denoiser.model_copy(update=keys)}), tmp_path / precision)
        losses.append([float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)])
    assert len(compiled) == 1
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert not _equal(_weights(tmp_path / "float32", UNET), _weights(tmp_path / "bfloat16", UNET))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_out_channels": (32, 64)}, r"denoiser.block_out_channels must be \(32, 64\), and is \(32, 32\) there"),
        ({"init_from": "nowhere"}, "no base model 'nowhere'"),
    ],
)
def test_a_model_of_another_form_is_refused(keys: dict[str, Any], message: str, first_run: Path, tmp_path: Path) -> None:
    denoiser = RECIPE.denoiser.model_copy(update={"init_from": str(first_run / "model"), **keys})
    with pytest.raises(FlashdiffError, match=message):
        train(RECIPE.model_copy(update={"denoiser": denoiser}), tmp_path)
