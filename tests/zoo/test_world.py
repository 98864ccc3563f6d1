import random

import numpy as np
import pytest

from flashdiff.zoo.world import BACKGROUND_COLORS, HELD_OUT, KINDS, caption, draw, render, scenes


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_image_is_a_function_of_kind_and_seed_and_shows_its_background(kind: str) -> None:
    for seed in range(6):
        image, scene = render(kind, seed, 64)
        again, same = render(kind, seed, 64)
        np.testing.assert_array_equal(image, again)
        assert scene == same
        color = BACKGROUND_COLORS[scene.background]
        assert f"#{image[1, 1, 0]:02x}{image[1, 1, 1]:02x}{image[1, 1, 2]:02x}" == color


def test_a_caption_says_only_what_is_drawn() -> None:
    rng = random.Random(0)
    for seed in range(40):
        scene = draw("critters", seed)[1]
        text = caption(scene, rng)
        assert "monster" in text
        colors = {word for word in text.replace(",", "").split() if word in BACKGROUND_COLORS}
        assert colors <= {scene.color, scene.background}
        said = sum(phrase.removeprefix("a ").removeprefix("an ") in text for phrase in scene.parts)
        assert said <= len(scene.parts)


def test_one_scene_has_short_full_and_reordered_captions() -> None:
    scene = draw("voxel-bot", 3)[1]
    rng = random.Random(0)
    texts = {caption(scene, rng) for _ in range(200)}
    assert len(texts) > 50
    assert any(text.startswith("on a") for text in texts)
    assert any("," in text and " with " not in text for text in texts)
    assert min(len(text.split()) for text in texts) <= 6


def test_held_out_combinations_are_left_out_of_training_and_exist_outside_it() -> None:
    left_out = [scene for seed in range(1500) if (scene := draw("critters", seed)[1]).is_held_out]
    assert left_out
    assert all((scene.color, "a crown") in HELD_OUT for scene in left_out)
    first = left_out[0]
    kept = [scene for _, scene in scenes(["critters"], first.seed, 2, 8)]
    assert [scene.seed for scene in kept] == [first.seed + 1, first.seed + 2] or all(not scene.is_held_out for scene in kept)
    assert first.seed not in {scene.seed for scene in kept}
