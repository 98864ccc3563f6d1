"""The evaluation networks' recipe on a toy scale, and that what ships is what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flashdiff.zoo import evaluators
from flashdiff.zoo.evaluators import FOLDER, IDENTITY, load_dual_encoder, load_identity_probe, load_probe
from flashdiff.zoo.fit import StageRecipe
from flashdiff.zoo.images import to_input
from flashdiff.zoo.world import attribute_words

pytestmark = pytest.mark.slow


def test_the_recipe_writes_networks_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TRAIN_IMAGES", "_IDENTITY_IMAGES", "_HELD_BACK_IMAGES"):
        monkeypatch.setattr(evaluators, name, 24)
    toy = StageRecipe(batch_size=8, images=24, learning_rate=1e-3)
    monkeypatch.setattr(evaluators, "_RECIPES", {"probe": toy, "dual_encoder": toy, "identity_probe": toy})
    evaluators.train(tmp_path)
    images = to_input(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8))
    probe, dual = load_probe(tmp_path / FOLDER.name), load_dual_encoder(tmp_path / FOLDER.name)
    with torch.no_grad():
        features, logits = probe(images)
        found, named = load_identity_probe(tmp_path / FOLDER.name)(images)
        seen, read = dual.encode_images(images), dual.encode_texts(["a green monster", "zebra", ""])
    assert features.shape == (3, 128)
    assert probe.feature_std.min() > 0
    assert {name: values.shape[1] for name, values in logits.items()} == {
        name: len(words) for name, words in attribute_words().items()
    }
    assert found.shape == (3, 128)
    assert {name: values.shape[1] for name, values in named.items()} == {name: len(attribute_words()[name]) for name in IDENTITY}
    assert "background" not in named
    for vectors in (seen, read):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


def test_the_shipped_networks_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6
    assert (FOLDER / "identity_probe.safetensors").stat().st_size < 1.5e6
    load_probe()
    load_dual_encoder()
    load_identity_probe()
