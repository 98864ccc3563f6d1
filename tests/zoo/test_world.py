import random

import numpy as np
import pytest

from flashdiff.zoo.world import (
    BACKGROUND_COLORS,
    HELD_OUT,
    KINDS,
    OBJECT_COLORS,
    attribute_words,
    caption,
    describe,
    figure,
    full_caption,
    render,
    scenes,
    short_caption,
)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_image_is_a_function_of_kind_and_seed_and_shows_its_background(kind: str) -> None:
    for seed in range(6):
        image, scene = render(kind, seed, 64)
        again, same = render(kind, seed, 64)
        np.testing.assert_array_equal(image, again)
        assert scene == same
        color = BACKGROUND_COLORS[scene.background]
        assert f"#{image[1, 1, 0]:02x}{image[1, 1, 1]:02x}{image[1, 1, 2]:02x}" == color


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_caption_says_only_what_is_drawn(kind: str) -> None:
    rng = random.Random(0)
    known = attribute_words()
    phrases = {phrase for name, words in known.items() if name not in ("kind", "color", "background") for phrase in words}
    for seed in range(40):
        scene = describe(kind, seed)
        for text in (caption(scene, rng), full_caption(scene)):
            colors = {word for word in text.replace(",", "").split() if word in OBJECT_COLORS or word in BACKGROUND_COLORS}
            assert colors <= {scene.color, scene.background}, text
            said = {phrase for phrase in phrases if f" {_bare(phrase)} " in f" {text.replace(',', '')} "}
            true = {_bare(phrase) for phrase in scene.phrases.values()}
            assert all(any(_bare(phrase) in whole for whole in true) for phrase in said), text


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_full_caption_says_everything(kind: str) -> None:
    for seed in range(40):
        scene = describe(kind, seed)
        text = full_caption(scene)
        for name, phrase in scene.attributes.items():
            words = _bare(phrase).removesuffix(" shape") if name == "face" else _bare(phrase)
            assert all(word in text for word in words.split()), (text, name, phrase)


def _bare(phrase: str) -> str:
    return phrase.removeprefix("a ").removeprefix("an ")


def test_one_scene_has_short_full_and_reordered_captions() -> None:
    scene = describe("voxel-bot", 3)
    rng = random.Random(0)
    texts = {caption(scene, rng) for _ in range(300)}
    assert len(texts) > 50
    assert any(text.startswith("on a") for text in texts)
    assert any("," in text and " with " not in text for text in texts)
    assert min(len(text.split()) for text in texts) <= 3
    assert full_caption(scene) in texts or max(len(text) for text in texts) >= len(full_caption(scene))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_scene_can_be_drawn_again_with_other_chances(kind: str) -> None:
    for seed in range(8):
        first, scene = render(kind, seed, 64)
        others = [render(kind, 1000 + other, 64, like=seed) for other in range(4)]
        assert all(other.attributes == scene.attributes for _, other in others)
    assert any((image != first).any() for image, _ in others) or kind in ("planets", "voxel-art")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_figure_can_be_drawn_on_another_background(kind: str) -> None:
    for seed in range(8):
        first, scene = render(kind, seed, 64)
        word = next(word for word in KINDS[kind].background if word != scene.background)
        moved = describe(kind, seed, word)
        assert moved.attributes == {**scene.attributes, "background": word}
        assert set(figure(kind, seed)) >= {f"{name}Variant" for name in KINDS[kind].phrases}
        for chances in (1000, 1001):
            image, found = render(kind, chances, 64, like=seed, background=word)
            assert found.attributes == moved.attributes
            assert f"#{image[1, 1, 0]:02x}{image[1, 1, 1]:02x}{image[1, 1, 2]:02x}" == BACKGROUND_COLORS[word]
            same, _ = render(kind, chances, 64, like=seed, background=scene.background)
            if kind not in ("planets", "moods"):  # theirs have places of their own
                np.testing.assert_array_equal(same, first)
        text = short_caption(moved)
        assert text.endswith(f" {word} background")
        assert scene.color == word or scene.color not in text.split()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_a_combination_that_training_never_sees(kind: str) -> None:
    held_out = next(scene for seed in range(3000) if (scene := describe(kind, seed)).is_held_out)
    assert any((held_out.color, phrase) in HELD_OUT for phrase in held_out.phrases.values())
    kept = [scene.seed for _, scene in scenes([kind], held_out.seed, 2, 8)]
    assert kept[0] > held_out.seed
