"""Every training of the embedded networks computes where they are fitted: the meta device stands for a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdiff.config import load_recipe
from flashdiff.zoo import adapters, denoiser, evaluators, identity, text_encoder, vae
from flashdiff.zoo import train as training
from flashdiff.zoo.fit import StageRecipe
from flashdiff.zoo.images import rendered_pairs
from flashdiff.zoo.recipe import ZooRecipe
from flashdiff.zoo.world import KINDS

pytestmark = pytest.mark.slow

META = torch.device("meta")
MODULES = (adapters, denoiser, evaluators, identity, text_encoder, vae)


class LastSeenError(Exception):
    pass


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fits so far, each of one update on the meta device, after which the model is as it was."""
    names: list[str] = []

    def fit_once(name: str, model: torch.nn.Module, loss_of: Callable[[int], Tensor], *others: Any, **keys: Any) -> None:
        before = [value.clone() for value in (*model.parameters(), *model.buffers())]
        model.to(META)
        loss = loss_of(0)
        assert loss.device == META
        loss.backward()
        names.append(name)
        if name in ("denoiser", "edges", "tile", "adapter"):  # what is frozen next to it has lost its weights
            raise LastSeenError
        model.to_empty(device="cpu")
        for value, kept in zip((*model.parameters(), *model.buffers()), before, strict=True):
            value.data.copy_(kept)

    for module in MODULES:
        monkeypatch.setattr(module, "fit", fit_once)
        monkeypatch.setattr(module, "device", lambda: META)
    return names


def test_the_model(seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_VALIDATION_IMAGES", 8)
    recipe = load_recipe(Path(training.__file__).parent / "avatars.toml", ZooRecipe)
    world = recipe.world.model_copy(update={"train_images": 40})
    with pytest.raises(LastSeenError):
        training.train(recipe.model_copy(update={"world": world}), tmp_path)
    assert seen == ["vae", "text", "denoiser"]


@pytest.mark.parametrize(("name", "fits"), [("edges", ["edges"]), ("tile", ["tile-embedding", "tile"])])
def test_control_networks(name: str, fits: list[str], seen: list[str], tmp_path: Path) -> None:
    with pytest.raises(LastSeenError):
        adapters.train(name, tmp_path, adapters.RECIPES[name], pictures=6)
    assert seen == fits


def test_the_identity_adapter(seen: list[str], tmp_path: Path) -> None:
    pairs, stage = rendered_pairs(tmp_path, tuple(KINDS), 0, 6, 64), StageRecipe(batch_size=4, images=8, learning_rate=1e-3)
    namer = identity.train_encoder(pairs, tmp_path, stage)
    with pytest.raises(LastSeenError):
        identity.train_adapter(pairs, namer.embed(pairs.images), tmp_path, stage)
    assert seen == ["encoder", "adapter"]


def test_the_evaluation_networks(seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TRAIN_IMAGES", "_HELD_BACK_IMAGES", "_IDENTITY_IMAGES"):
        monkeypatch.setattr(evaluators, name, 6 if name != "_HELD_BACK_IMAGES" else 20)
    evaluators.train(tmp_path)
    assert seen == ["probe", "dual_encoder", "identity_probe"]
