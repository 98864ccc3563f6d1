"""Which scenes and noise levels the embedded denoiser is trained on."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from flashdiff.zoo import denoiser
from flashdiff.zoo.denoiser import Batches
from flashdiff.zoo.recipe import DenoiserRecipe
from flashdiff.zoo.world import Scene, describe

SIZE = 4096


@pytest.fixture
def scenes() -> list[Scene]:
    return [describe(kind, seed) for seed in range(10) for kind in ("planets", "moods")]


def _batches(scenes: list[Scene], **keys: Any) -> Batches:
    return Batches(
        lambda ids: SimpleNamespace(last_hidden_state=ids), None, torch.randn(len(scenes), 4, 2, 2), 1.0, scenes,
        seed=0, size=SIZE, caption_dropout=1.0, **keys,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "token_ids", lambda tokenizer, texts: torch.zeros(len(texts), 1))


def test_scenes_and_times_are_drawn_evenly(scenes: list[Scene]) -> None:
    batch = _batches(scenes).draw(0)
    assert np.bincount(batch.rows, minlength=len(scenes)) / SIZE == pytest.approx(1 / len(scenes), abs=0.015)
    assert (batch.t < 450).float().mean() == pytest.approx(0.45, abs=0.03)


def test_scenes_of_a_kind_are_drawn_as_often_as_its_weight_says(scenes: list[Scene]) -> None:
    batch = _batches(scenes, shares=denoiser._shares(scenes, {"planets": 3.0})).draw(0)
    kinds = np.array([scene.kind for scene in scenes])[batch.rows]
    assert (kinds == "planets").mean() == pytest.approx(0.75, abs=0.03)


def test_half_of_the_times_lie_in_the_focus(scenes: list[Scene]) -> None:
    batch = _batches(scenes, focus=(100, 199)).draw(0)
    inside = ((batch.t >= 100) & (batch.t <= 199)).float().mean()
    assert inside == pytest.approx(0.5 + 0.5 * 0.1, abs=0.03)
    assert {int(batch.t.min()) < 100, int(batch.t.max()) > 199} == {True}


def test_a_focus_rises() -> None:
    with pytest.raises(ValidationError, match=r"denoiser\.focus must be two rising times, not \(450, 30\)"):
        DenoiserRecipe(block_out_channels=(32,), batch_size=4, images=8, learning_rate=1e-3, focus=(450, 30))
